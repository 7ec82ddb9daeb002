"""What a link costs over the bare stream that it runs on, what it keeps, how soon it is back.

    python tests/benchmarks/bench_link.py                        over TCP
    python tests/tornet.py -- python tests/benchmarks/bench_link.py      and over Tor

Both ends are in this process, so its CPU time is that of both.  What is compared alternates in one
run, over Tor on the same circuits; figures are medians, and their ratios to the bare stream's.
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
        self._writer = stream._writer
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


class Sink:
    """What takes all that comes on a bare stream."""

    def __init__(self):
        self.left, self.done = 0, asyncio.Event()

    async def take(self, stream):
        while data := await stream.read(1 << 16):
            self.left -= len(data)
            if not self.left:
                self.done.set()


async def bare(stream, sink, count):
    """Send `count` messages over a stream that ends in `sink`."""
    sink.left, message = count * SIZE, bytes(SIZE)
    sink.done.clear()
    for _ in range(count):
        await stream.write(message)
    await sink.done.wait()
    Counted.written += count * SIZE


async def linked(link, back, count):
    """Send `count` messages over a link whose other end is `back`."""

    async def take():
        for _ in range(count):
            await back.receive()

    taking, message = asyncio.ensure_future(take()), bytes(SIZE)
    for _ in range(count):
        await link.send(message)
    await taking


async def measured(sending, link=None):
    """Run a coroutine; return seconds, CPU seconds and the bytes that were written.

    Seconds until the other end has all; what a link acknowledges after that counts for the rest.
    """
    await quiet()
    wall, cpu, written = time.perf_counter(), time.process_time(), Counted.written
    await sending
    wall = time.perf_counter() - wall
    if link:
        await link.flush()
    return wall, time.process_time() - cpu, Counted.written - written


def report(name, runs, count):
    """Print medians, and the ratio of each to the first."""
    print("%s, messages of %d bytes" % (name, SIZE))
    first = None
    for what, found in runs.items():
        wall, cpu, sent = [statistics.median(column) for column in zip(*found)]
        first = first or (wall, cpu, sent)
        row = what, count * SIZE / wall / 1e6, cpu / count * 1e6
        row += wall / first[0], cpu / first[1], sent / first[2]
        print("  %-20s %6.1f MB/s, %6.1f us of CPU each; seconds %.3f, CPU %.3f, bytes %.4f" % row)


async def up(ours, theirs):
    """Return both ends of a link between two nodes."""
    link = ours.link(theirs.key, theirs.address)
    await link.ready(60)
    return link, await theirs.__anext__()


async def over_tcp(count=2000, rounds=9):
    sink, host = Sink(), minitor.DirectTransport()
    await host.listen(sink.take)
    stream = await host.dial(host.address)
    node = lambda private: minitor.Node(
        os.urandom(32), Counting(minitor.DirectTransport(), private))
    async with node(True) as a, node(True) as b, node(False) as c, node(False) as d:
        opened, sealed = await up(a, b), await up(c, d)
        runs = {"bare stream": [], "link, not encrypted": [], "link, sealed": []}
        for _ in range(rounds):
            runs["bare stream"].append(await measured(bare(stream, sink, count)))
            runs["link, not encrypted"].append(await measured(linked(*opened, count), opened[0]))
            runs["link, sealed"].append(await measured(linked(*sealed, count), sealed[0]))
    stream.close()
    await host.close()
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


class OneCircuit(minitor.TorTransport):
    """One whose streams to a service share a circuit, in place of one for each."""

    async def dial(self, address, seconds=120):
        host, port = minitor.split_address(address)
        return minitor.PeerStream(*await self._tor.open_connection(host, port, seconds, "one"), True)


async def over_tor(count=500, rounds=10, circuits=6):
    with tempfile.TemporaryDirectory() as folder:
        async with minitor.AsyncTor(folder + "/a") as here, minitor.AsyncTor(folder + "/b") as there:
            runs = {"bare stream": [], "link": []}
            for _ in range(circuits):
                await one_circuit(here, there, runs, count, rounds)
            report("Tor, a circuit to an onion service", runs, count)
            keys = [minitor.load_identity(os.urandom(32)) for _ in range(2)]
            ends = (here, keys[0]), (there, keys[1])
            await recovery([minitor.TorTransport(*end) for end in ends], keys)


async def one_circuit(here, there, runs, count, rounds):
    """Measure a stream and a link on the same circuit, in turns."""
    sink, key = Sink(), minitor.load_identity(os.urandom(32))
    take = lambda reader, writer: sink.take(minitor.PeerStream(reader, writer, True))
    ours, theirs = OneCircuit(here), minitor.TorTransport(there, key, others={7: take})
    async with minitor.Node(os.urandom(32), Counting(ours)) as a, \
            minitor.Node(key, Counting(theirs)) as b:
        link, back = await up(a, b)
        stream = await ours.dial(b.address.partition(":")[0] + ":7")
        assert stream._writer.circuit is link._pipe.stream._writer.circuit
        # A circuit learns how much may be on the way.
        await bare(stream, sink, count)
        for _ in range(rounds):
            runs["bare stream"].append(await measured(bare(stream, sink, count)))
            runs["link"].append(await measured(linked(link, back, count), link))
        stream.close()


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
