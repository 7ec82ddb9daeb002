"""Forwards TCP connections and delays what goes through, in both directions.

    delay.py SECONDS LISTEN=TARGET...       each an address:port
"""

import asyncio
import sys


async def carry(reader, writer, seconds):
    loop = asyncio.get_running_loop()
    waiting = asyncio.Queue()

    async def deliver():
        while True:
            due, data = await waiting.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                break
            writer.write(data)
            await writer.drain()

    delivering = asyncio.ensure_future(deliver())
    try:
        data = b"-"
        while data:
            data = await reader.read(1 << 16)
            waiting.put_nowait((loop.time() + seconds, data))
        await delivering
    except OSError:
        delivering.cancel()
    finally:
        writer.close()


async def forward(listen, target, seconds):
    async def connected(reader, writer):
        try:
            there = await asyncio.open_connection(*target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(carry(reader, there[1], seconds), carry(there[0], writer, seconds))

    await asyncio.start_server(connected, *listen)


def endpoint(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


async def main(seconds, *pairs):
    for pair in pairs:
        listen, _, target = pair.partition("=")
        await forward(endpoint(listen), endpoint(target), float(seconds))
    print("ready", flush=True)
    # The end of standard input is the end of the program that started this one.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
