"""A microdot application at an .onion address, without a port on this machine.

    python -m pip install microdot
    python examples/microdot_app.py

On a board with PSRAM: copy microdot.py (or .mpy) and this file there, with
"app": "microdot_app" in settings.json; board_boot.py calls `handler` for each visitor.
"""

import asyncio
import json
import sys

if sys.implementation.name != "micropython":
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from microdot import Microdot

# ── The application ──

app = Microdot()
notes = []


@app.get("/")
async def page(request):
    text = "<!doctype html><title>Notes</title><h1>%d notes</h1>" % len(notes)
    return text, {"Content-Type": "text/html; charset=utf-8"}


@app.get("/notes")
async def all_notes(request):
    return json.dumps(notes), {"Content-Type": "application/json"}


@app.post("/notes")
async def new_note(request):
    notes.append(request.body.decode()[:200])
    del notes[:-20]
    return "", 201


# ── And Tor ──


class Connection:
    """A stream with the two methods that microdot adds to asyncio's."""

    def __init__(self, stream):
        self.stream, self.get_extra_info = stream, stream.get_extra_info
        self.readline, self.readexactly = stream.readline, stream.readexactly

    async def awrite(self, data):
        self.stream.write(data)
        await self.stream.drain()

    async def aclose(self):
        self.stream.close()
        await self.stream.wait_closed()


async def handler(reader, writer):
    connection = Connection(writer)
    await app.handle_request(connection, connection)


async def main():
    import minitor

    async with minitor.AsyncTor() as tor:
        service = await tor.create_onion_service(80, target=handler)
        print(service.address, flush=True)
        while True:
            await asyncio.sleep(3600)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
