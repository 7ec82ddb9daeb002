"""The budget of the heap, and what memory that is really short does to streams."""

import asyncio
import gc
import os

import minitor as m

m.set_log(m.ERR + 1)
time = [1000]
ticks_ms, m.ticks_ms = m.ticks_ms, lambda: time[0]


def used():
    gc.collect()
    return gc.mem_alloc()


# On an ESP32 without PSRAM it is 96 KB, whatever the heap may grow to.
heap = gc.mem_free() + gc.mem_alloc()
assert abs(m._admission[0] - heap * 7 // 8) < 64
assert not m.crowded()
m._admission[0] = used() + 20000
assert not m.crowded()
held = bytearray(30000)
assert m.crowded()
held = None
# For a second it is not collected for those that come.
assert m.crowded()
time[0] += 1001
assert not m.crowded()
# Garbage does not count, and costs no visitor a wait.
for _ in range(20):
    bytearray(10000)
    assert not m.crowded()
m.ticks_ms = ticks_ms


class Idle:
    """A circuit of `size` bytes, with so many streams; `service`: it is a client's of a service."""

    closed = False

    def __init__(self, since, size=4000, streams=(), service=True):
        self.since, self.on_begin, self.streams = since, service, streams
        self.held = bytearray(size)

    def close(self):
        self.closed, self.held = True, None


class Idles:
    def __init__(self, circuits):
        self.circuits = {n: circuit for n, circuit in enumerate(circuits)}


# Room is made by circuits that nobody uses, first those that were not used for long.
links = [Idles([Idle(7), Idle(5, 4000, [1]), Idle(3)]), Idles([Idle(1, 4000, (), None), Idle(4)])]
for spare, gone in ((1000, []), (-1000, [3]), (-9000, [3, 4, 7])):
    m._admission[0] = used() + m._ROOM + spare
    m.make_room(links)
    every = [circuit for link in links for circuit in link.circuits.values()]
    assert sorted([circuit.since for circuit in every if circuit.closed]) == gone, (spare, gone)
links = every = None
m._admission[0] = 1 << 30


class Link:
    """A channel that hands its cells to the circuit at the other end."""

    def __init__(self):
        self.closed, self.cells, self.far, self.circuits = None, [], None, {}

    def room(self):
        return 32 - len(self.cells)

    def send(self, data):
        self.cells += [data[at : at + 514] for at in range(0, len(data), 514)]

    async def carry(self):
        while True:
            while self.cells:
                cell = self.cells.pop(0)
                self.far.receive(bytearray(cell[5:]), cell[4])
            self.far.resume()
            await asyncio.sleep(0)


async def main():
    keys, links = os.urandom(128), (Link(), Link())
    client, service = [m.Circuit(link) for link in links]
    links[0].far, links[1].far = service, client
    client.add_onion_hop(keys)
    service.add_onion_hop(keys, True)
    tasks = [asyncio.create_task(link.carry()) for link in links]
    ends = []

    async def on_begin(stream, port):
        stream.accept()
        try:
            if port == 80:
                await asyncio.sleep(1000)
            while True:
                stream.write(await stream.readexactly(4))
        except m.StreamError as e:
            ends.append(e.reason)

    service.on_begin = on_begin
    flood = await client.open_stream(m.BEGIN, m.begin("", 80), 5)
    other = await client.open_stream(m.BEGIN, m.begin("", 81), 5)

    async def lost():
        """Send as a client that heeds nothing until the stream ends; return how much."""
        total = 0
        while not flood.is_closing() and total < 200000:
            client.send(m.DATA, flood.stream_id, bytes(498))
            total += 498
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            other.write(b"ping")
            assert await other.readexactly(4) == b"ping"
        try:
            await flood.read(1)
        except m.StreamError as e:
            assert e.reason == m.END_RESOURCELIMIT
            return total
        assert False, "the flood was let through"

    # By what one stream may hold; by the budget; by what the heap really has.
    found = [await lost()]
    for how in "budget", "heap":
        flood = await client.open_stream(m.BEGIN, m.begin("", 80), 5)
        held = []
        if how == "budget":
            m._admission[0] = used() + 1000
        else:
            m._admission[0] = 1 << 30
            room = bytearray(40000)
            try:
                while True:
                    held = held, bytearray(200)
            except MemoryError:
                room = None
        found.append(await lost())
    print("lost after %d, %d and %d bytes" % tuple(found))
    assert m.READ_AHEAD < found[1] < found[0] < 60000 and found[2] < 32768
    held = None
    assert not client.closed and not service.closed
    for task in tasks:
        task.cancel()


asyncio.run(asyncio.wait_for(main(), 120))
print("ok")
