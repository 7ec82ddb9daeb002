"""A network in memory for the tests of section 18: connections get lost, late, or cut."""

import asyncio
import random

import minitor


class End:
    """One end of a connection; what `write` takes the other end reads."""

    def __init__(self, net, private):
        self.net, self.private, self.other = net, private, None
        self.data, self.changed, self.ended = bytearray(), asyncio.Event(), False

    async def read(self, n):
        while not self.data and not self.ended:
            self.changed.clear()
            await self.changed.wait()
        piece = bytes(self.data[:n])
        self.data = self.data[n:]
        self.changed.set()
        return piece

    async def write(self, data):
        if self.ended:
            raise OSError("the connection is cut")
        room = len(data)
        if self.net.left is not None:
            room = min(room, self.net.left)
            self.net.left -= room
        self.net.moved += room
        self.net.seen.append((self, bytes(data[:room])))
        self.other.data += data[:room]
        self.other.changed.set()
        if room < len(data):
            self.net.cuts += 1
            self.net.left = None
            self.close()
            self.net.on_cut()
            raise OSError("the connection is cut")
        # Let the other end answer before there is more.
        for _ in range(self.net.random.randrange(4)):
            await asyncio.sleep(0)
        while len(self.other.data) > 1 << 16 and not self.ended:
            self.changed.clear()
            self.other.changed.set()
            await asyncio.sleep(0)

    def close(self):
        for end in (self, self.other):
            end.ended = True
            end.changed.set()


class Network:
    """`transport(name)`: one whose address is `name`.

    `left`: after so many bytes, both ways together, a connection is cut; None: never.  `loss`:
    the share of dials that fail; `delay`: seconds within which connections come about, at random,
    so that they overtake each other.  `private`: what streams say of themselves.
    """

    def __init__(self, seed=1, loss=0, delay=0, private=True):
        self.random, self.loss, self.delay, self.private = random.Random(seed), loss, delay, private
        self.accepts, self.ends, self.tasks = {}, [], set()
        self.left, self.moved, self.cuts, self.dials, self.seen = None, 0, 0, 0, []
        self.on_cut = lambda: None

    def transport(self, name):
        return Transport(self, name)

    def cut(self):
        """Cut all connections."""
        ends, self.ends = self.ends, []
        for end in ends:
            end.close()

    async def dial(self, name):
        self.dials += 1
        if self.delay:
            await asyncio.sleep(self.random.random() * self.delay)
        if name not in self.accepts or self.random.random() < self.loss:
            raise minitor.PeerError("nobody at " + name)
        ours, theirs = End(self, self.private), End(self, self.private)
        ours.other, theirs.other = theirs, ours
        self.ends.append(ours)

        async def serve():
            await self.accepts[name](theirs)
            theirs.close()

        task = asyncio.ensure_future(serve())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return ours


class Transport:
    def __init__(self, net, name):
        self.net, self.address = net, name

    async def dial(self, address, seconds=120):
        return await self.net.dial(address)

    async def listen(self, accept):
        self.net.accepts[self.address] = accept

    async def close(self):
        self.net.accepts.pop(self.address, None)
