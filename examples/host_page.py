"""Host a page from inside a program: no web server, no open port, no fixed IP address.

    python examples/host_page.py

It prints its .onion address. The address stays the same from run to run, because its key is
kept in minitor's data folder.
"""

import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import minitor

started = time.time()
visits = 0


async def page(reader, writer):
    """Answer one visitor; `reader` and `writer` are used as those of asyncio."""
    global visits
    await reader.readuntil(b"\r\n\r\n")
    visits += 1
    body = "You are visitor %d in %d seconds.\n" % (visits, time.time() - started)
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n" % len(body)
    writer.write((head + "Connection: close\r\n\r\n" + body).encode())
    await writer.drain()
    writer.close()


def main():
    with minitor.Tor() as tor:
        service = tor.create_onion_service(80, page)
        print(service.address, flush=True)
        # A program does its own work here.
        threading.Event().wait()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except minitor.TorError as e:
        sys.exit("host_page: %s" % e)
