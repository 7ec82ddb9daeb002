"""What a link costs over the bare stream that it runs on, what it keeps, how soon it is back.

    python tests/benchmarks/bench_link.py                        over TCP
    python tests/tornet.py -- python tests/benchmarks/bench_link.py      and over Tor

Both ends are in this process, so its CPU time is that of both; what is compared alternates in one
run, and ratios are of medians.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import minitor  # noqa: E402

SIZE = 16384


class Counted:
    """A transport's stream that counts what is written, and says whether it is `private`."""

    written = 0

    def __init__(self, stream, private):
        self.read, self.close, self._write = stream.read, stream.close, stream.write
        self.private = stream.private if private is None else private

    def write(self, data):
        Counted.written += len(data)
        return self._write(data)


class Counting:
    """Another transport, with Counted streams."""

    def __init__(self, transport, private=None):
        self.transport, self.private = transport, private

    async def dial(self, address, seconds=120):
        return Counted(await self.transport.dial(address, seconds), self.private)

    async def listen(self, accept):
        await self.transport.listen(lambda stream: accept(Counted(stream, self.private)))

    address = property(lambda self: self.transport.address)

    async def close(self):
        await self.transport.close()


async def quiet(seconds=20):
    """Wait until this process does nothing else: Tor builds circuits ahead, and publishes."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        cpu = time.process_time()
        await asyncio.sleep(0.5)
        if time.process_time() - cpu < 0.01:
            break


async def bare(transports, count):
    """Send `count` messages over a stream; return seconds, CPU seconds and bytes."""
    ours, theirs = transports
    done = asyncio.Event()

    async def take(stream):
        left = count * SIZE
        while left:
            left -= len(await stream.read(1 << 16))
        done.set()

    await theirs.listen(take)
    stream, message = await ours.dial(theirs.address), bytes(SIZE)
    await quiet()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        await stream.write(message)
    await done.wait()
    spent = time.perf_counter() - wall, time.process_time() - cpu, count * SIZE
    stream.close()
    await theirs.close()
    return spent


async def linked(transports, count, keys):
    """As `bare`, over a link."""
    ours, theirs = [Counting(transport, private) for transport, private in transports]
    async with minitor.Node(keys[0], ours) as a, minitor.Node(keys[1], theirs) as b:
        link, message = a.link(b.key, b.address), bytes(SIZE)
        await link.ready(60)
        back = await b.__anext__()

        async def take():
            for _ in range(count):
                await back.receive()

        taking = asyncio.ensure_future(take())
        await quiet()
        wall, cpu, written = time.perf_counter(), time.process_time(), Counted.written
        for _ in range(count):
            await link.send(message)
        await taking
        await link.flush()
        return (time.perf_counter() - wall, time.process_time() - cpu, Counted.written - written)


def report(name, runs, count):
    """Print medians, and the ratio of each to the first."""
    print("%s, messages of %d bytes" % (name, SIZE))
    first = None
    for what, found in runs.items():
        wall, cpu, sent = [statistics.median(column) for column in zip(*found)]
        first = first or (wall, cpu, sent)
        row = what, count * SIZE / wall / 1e6, cpu / count * 1e6, cpu / first[1], sent / first[2]
        print("  %-22s %8.1f MB/s %8.1f us of CPU each, ratio %.3f; bytes %.4f" % row)


async def over_tcp(count=2000, rounds=9):
    keys = [minitor.load_identity(os.urandom(32)) for _ in range(2)]
    runs = {"bare stream": [], "link, not encrypted": [], "link, sealed": []}
    pair = lambda: (minitor.DirectTransport(), minitor.DirectTransport())
    for _ in range(rounds):
        runs["bare stream"].append(await bare(pair(), count))
        for what, private in (("link, not encrypted", True), ("link, sealed", False)):
            found = await linked([(transport, private) for transport in pair()], count, keys)
            runs[what].append(found)
    report("TCP on this machine", runs, count)


async def memory():
    async with minitor.Node(os.urandom(32), minitor.DirectTransport()) as node:
        link = node.link(minitor.load_identity(os.urandom(32))[1], "127.0.0.1:1")
        tracemalloc.start()
        for i in range(10000):
            await link.send(os.urandom(1024))
        print("10,000 unacknowledged messages of 1 KB: %.1f MB" % (
            tracemalloc.get_traced_memory()[0] / 1e6))
        tracemalloc.stop()
        try:
            await link.close(0)
        except minitor.LinkError:
            pass


async def over_tor(count=500, rounds=5):
    with tempfile.TemporaryDirectory() as folder:
        async with minitor.AsyncTor(folder + "/a") as here, minitor.AsyncTor(folder + "/b") as there:
            keys = [minitor.load_identity(os.urandom(32)) for _ in range(2)]
            pair = lambda: [minitor.TorTransport(*end) for end in ((here, keys[0]), (there, keys[1]))]
            runs = {"bare stream": [], "link": []}
            for _ in range(rounds):
                runs["bare stream"].append(await bare(pair(), count))
                runs["link"].append(await linked([(end, None) for end in pair()], count, keys))
            report("Tor, to an onion service", runs, count)
            await recovery(pair(), keys)


async def recovery(transports, keys, rounds=5):
    """How long a new connection takes, and a link after its circuit was cut."""
    fresh, back = [], []
    ours, theirs = transports
    async with minitor.Node(keys[0], ours) as a, minitor.Node(keys[1], theirs) as b:
        link = a.link(b.key, b.address)
        await link.ready(60)
        for _ in range(rounds):
            # Each begins with spare circuits; a link that ends at once is not dialled at once.
            await asyncio.sleep(2.5)
            start = time.perf_counter()
            (await ours.dial(b.address)).close()
            fresh.append(time.perf_counter() - start)
            await asyncio.sleep(2.5)
            # As a relay's end shows.
            link._pipe.stream._writer.circuit.close()
            start = time.perf_counter()
            while link.up:
                await asyncio.sleep(0)
            await link.ready(60)
            back.append(time.perf_counter() - start)
    fresh, back = statistics.median(fresh), statistics.median(back)
    print("a new circuit to the service: %.2f s; after a cut the link is up in %.2f s, ratio %.2f" % (
        fresh, back, back / fresh))


def main():
    asyncio.run(over_tcp())
    asyncio.run(memory())
    if os.environ.get("MINITOR_NETWORK"):
        asyncio.run(over_tor())


if __name__ == "__main__":
    main()
