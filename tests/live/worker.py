"""A program that uses minitor's API, run by the live tests as a process of its own.

    worker.py DATA_DIR echo URL SIZE [COUNT]    COUNT streams at once, each SIZE bytes there and back
    worker.py DATA_DIR host PORT [KEY_DIR]      host a service for a local port; print the address

The last line on standard output is the report, in JSON.
"""

import asyncio
import hashlib
import json
import signal
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import minitor  # noqa: E402
from httptarget import payload  # noqa: E402


async def exchange(tor, url, size, seed):
    """POST `size` bytes to `url` on a stream of its own and compare what comes back."""
    parts = urlsplit(url)
    body = payload(size, seed)
    reader, writer = await tor.open_connection(parts.hostname, parts.port or 80)
    head = "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    writer.write((head % (parts.path, parts.hostname, size)).encode())
    for at in range(0, size, 1 << 16):
        writer.write(body[at:at + (1 << 16)])
        await writer.drain()
    status = await reader.readline()
    if b" 200 " not in status:
        raise ValueError("the target answered %r" % status)
    while (await reader.readline()).strip():
        pass
    digest, left = hashlib.sha256(), size
    while left:
        piece = await reader.read(1 << 16)
        if not piece:
            raise ValueError("the stream ended %d bytes early" % left)
        digest.update(piece)
        left -= len(piece)
    if await reader.read():
        raise ValueError("more came back than was sent")
    writer.close()
    await writer.wait_closed()
    if digest.digest() != hashlib.sha256(body).digest():
        raise ValueError("not what was sent came back")


async def echo(data_dir, url, size, count=1):
    started = time.monotonic()
    async with minitor.AsyncTor(data_dir=data_dir) as tor:
        ready = time.monotonic()
        each = [exchange(tor, url, size, seed) for seed in range(count)]
        results = await asyncio.gather(*each, return_exceptions=True)
        ended = time.monotonic()
    errors = ["%s: %s" % (type(e).__name__, e) for e in results if e is not None]
    return {"bootstrap": ready - started, "seconds": ended - ready, "errors": errors}


async def host(data_dir, port, key_dir=None):
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with minitor.AsyncTor(data_dir=data_dir) as tor:
        service = await tor.create_onion_service(80, target=port, key_dir=key_dir)
        print(service.address, flush=True)
        await stop.wait()
    return {"address": service.address}


def main(data_dir, kind, *arguments):
    if kind == "echo":
        coroutine = echo(data_dir, arguments[0], *map(int, arguments[1:]))
    else:
        coroutine = host(data_dir, int(arguments[0]), *arguments[1:])
    print(json.dumps(asyncio.run(coroutine)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
