"""Give an asyncio application that exists already an .onion address.

    python examples/host_asyncio_app.py

The application is a guest book on a local TCP port: it sends what others wrote and takes one
line. Nothing of it knows about Tor; `main` is where the two meet. Visitors from Tor and from
this machine meet in the same book:

    torsocks nc <56 characters>.onion 7000
    nc 127.0.0.1 7000
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import minitor

# ── The application, as it was ──

book = []


async def guest(reader, writer):
    try:
        writer.write("".join("> %s\n" % line for line in book).encode() + b"Your line: ")
        await writer.drain()
        line = (await reader.readline()).decode(errors="replace").strip()
        if line:
            book.append(line[:200])
            writer.write(b"Thank you.\n")
            await writer.drain()
    except (OSError, ValueError):
        pass
    writer.close()


# ── And with Tor ──


async def main(port=7000):
    server = await asyncio.start_server(guest, "127.0.0.1", port)
    async with server, minitor.AsyncTor() as tor:
        local = server.sockets[0].getsockname()
        # The coroutine itself would do as well, and needs no local port: target=guest.
        service = await tor.create_onion_service(7000, target=local)
        print(service.address, flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    try:
        asyncio.run(main(*map(int, sys.argv[1:])))
    except KeyboardInterrupt:
        pass
    except minitor.TorError as e:
        sys.exit("host_asyncio_app: %s" % e)
