"""Two people talk: two addresses, and nothing else.

    python examples/chat.py              prints your address, for the other one
    python examples/chat.py ADDRESS      talk with whom that is; the other one does the same

Nobody else gets in. What you write while the other one is away, or while the connection is down,
waits, even for the next time you start it.
"""

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import minitor


def told(link, event, detail):
    words = {"up": "connected", "down": "not connected", "lag": "slow" if detail else "quick again"}
    print("[%s]" % words.get(event, event), file=sys.stderr)


def show(node, address):
    try:
        # Also after the other one went away.
        while True:
            for message in node.link(address):
                text = message.decode("utf-8", "replace")
                # Nothing that a terminal would obey.
                print("> " + "".join([c if c.isprintable() else "?" for c in text]), flush=True)
    except minitor.TorError:
        pass  # The program ends.


def main(address=None):
    folder = minitor.folders(None, None)[0] + "/chat"
    key = minitor.load_identity(folder)
    if not address:
        return print(minitor.onion_address(key[1]))
    other = minitor.parse_onion_address(address)
    with minitor.Tor() as tor:
        node = minitor.BlockingNode(
            key, minitor.TorTransport(tor, key), folder + "/unsent", lambda peer: peer == other,
            told, tor=tor)
        with node:
            threading.Thread(target=show, args=(node, address), daemon=True).start()
            for line in sys.stdin:
                node.link(address).send(line.rstrip("\n").encode())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except KeyboardInterrupt:
        pass
    except minitor.TorError as e:
        sys.exit("chat: %s" % e)
