"""The demonstration that tests/demo.sh runs inside a private network (MINITOR_NETWORK)."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tornet import Client, require_tor

MINITOR = Path(__file__).resolve().parent.parent / "minitor.py"


def say(text):
    print("\n\033[1m%s\033[0m" % text if sys.stdout.isatty() else "\n== " + text, flush=True)


def run(*command):
    print("$ " + " ".join(command), flush=True)
    return subprocess.run(command, check=True)


def host(folder):
    """Start `minitor.py --serve` and return the process and the address that it prints."""
    print("$ python minitor.py --serve", flush=True)
    program = subprocess.Popen(
        [sys.executable, str(MINITOR), "--data-dir", folder + "/host", "--serve"],
        stdout=subprocess.PIPE, text=True)
    for line in program.stdout:
        print(line, end="", flush=True)
        found = re.search(r"[a-z2-7]{56}\.onion", line)
        if found:
            return program, found[0]
    raise SystemExit("minitor ended")


def c_tor(folder):
    """Start C tor as a client and return it once it has opened its SOCKS port."""
    text = "%%include %s\nSocksPort 127.0.0.1:auto\nEnforceDistinctSubnets 1\n" % (
        os.environ["MINITOR_NETWORK"])
    client = Client(require_tor()[0], folder + "/tor", text).start()
    opened = r"Opened Socks listener connection \(ready\) on 127\.0\.0\.1:(\d+)"
    while not client.bootstrapped():
        time.sleep(0.1)
    client.socks_port = re.search(opened, client.log())[1]
    return client


def main():
    folder = tempfile.mkdtemp(prefix="minitor-demo-")
    say("minitor hosts an onion service through the relays of a private network")
    program, address = host(folder)
    client = c_tor(folder)
    try:
        say("C tor's client opens it")
        run("curl", "-sS", "--socks5-hostname", "127.0.0.1:" + client.socks_port,
            "http://%s/" % address)
        say("minitor opens it")
        run(sys.executable, str(MINITOR), "--data-dir", folder + "/client", "--host", address)
        say("It works. This page came through six relays that know nothing of minitor.")
    finally:
        program.terminate()
        program.wait()
        client.stop()


if __name__ == "__main__":
    main()
