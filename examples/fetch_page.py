"""Fetch a page through Tor and print it.

    python examples/fetch_page.py https://check.torproject.org/api/ip
    python examples/fetch_page.py <56 characters>.onion
"""

import sys
from pathlib import Path

# To run from a clone; not needed where minitor is installed, or lies beside the program.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import minitor


def main(url):
    with minitor.Tor() as tor:
        with tor.urlopen(url) as response:
            print(response.status, response.reason, response.url, file=sys.stderr)
            sys.stdout.buffer.write(response.read())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: fetch_page.py URL")
    try:
        main(sys.argv[1])
    except minitor.TorError as e:
        sys.exit("fetch_page: %s" % e)
