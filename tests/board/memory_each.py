"""Each allocation of a service that is at work fails once; afterwards it has to answer.

    memory_each.py streams|loops FOLDER STRIDE

`hurt` is minitor, calling `_tick` before each allocation (test_memory_board.py).
"""

import asyncio
import os
import sys

import hurt
import minitor as m

count, fail_at, failed = 0, 0, 0


def tick():
    global count, failed
    count += 1
    if count == fail_at:
        failed += 1
        raise MemoryError("injected")


hurt._tick = tick
hurt.set_log(hurt.ERR + 1)
m.set_log(m.ERR + 1)


def arm(n):
    global count, fail_at
    count, fail_at = 0, n


class Thing(m.Record):
    pass


def thing(**fields):
    found = Thing()
    for name in fields:
        setattr(found, name, fields[name])
    return found


# Relay cells between the service's channel, which is real, and clients of our own.


class Wire:
    """The service's connection to its guard; `clients`: {circuit ID: Circuit}."""

    closed, out_buf = None, b""

    def __init__(self):
        self.circuits, self.event, self.greeted = {}, asyncio.Event(), False
        self.data = b"\0\0\x80\0\0"  # VPADDING, after what stands for VERSIONS

    # What the service's channel sees.
    async def read(self, n):
        while not self.data:
            self.event.clear()
            await self.event.wait()
        piece, self.data = self.data[:n], self.data[n:]
        return piece

    async def readinto(self, buffer):
        piece = await self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def write(self, data):
        if not self.greeted:
            self.greeted = True
            return
        assert len(data) % 514 == 0
        for at in range(0, len(data), 514):
            cell = data[at : at + 514]
            circuit = self.circuits.get(m.uint(cell[:4]))
            if circuit:
                circuit.receive(cell[5:], cell[4])

    async def drain(self):
        if self.out_buf:
            self.write(self.out_buf)
        self.out_buf = b""
        await asyncio.sleep(0)

    # What the clients see.
    def room(self):
        return 100

    def send(self, data):
        self.data += data
        self.event.set()


async def hang_up(writer):
    pass


async def echo(reader, writer):
    while True:
        data = await reader.read(1000)
        if not data:
            break
        writer.write(data)
        await writer.drain()
    writer.close()


def make_service(folder, port):
    consensus = thing(param=lambda name, default, low=0, high=0: default)
    directory = thing(consensus=consensus, network=thing(testing=True), table=None)
    directory.turn, directory.moment = m.Turn(), m.Turn()
    tor = thing(directory=directory, paths=thing(param=consensus.param, updates=0), services=[])
    tor._channels = thing(open={})
    service = hurt.OnionService(tor, folder + "/key", {80: echo, 81: port})
    tor.services.append(service)
    return tor, service


async def streams(folder):
    port = 20000 + os.urandom(1)[0] * 100 + os.urandom(1)[0] % 100
    server = await asyncio.start_server(echo, "127.0.0.1", port)
    tor, service = make_service(folder, port)
    intro = thing(cookies=bytearray(), left=10**9, circuit=True, rsa_id=b"i" * 20)
    intro.auth_key = m.ed25519_public(m.ed25519_expand(b"a" * 32))
    intro.b = b"q" * 32
    intro.enc_key = m.x25519(intro.b)
    service.intros.append(intro)
    service._periods = [(0, b"", b"", b"s" * 32, {})]
    specifiers = b"\3\0\6\x0b\x16\x21\x2c\x23\x29\2\x14" + b"r" * 20 + b"\3\x20" + b"e" * 32
    relay = thing(specifiers=specifiers, ntor_key=m.x25519(b"n" * 32))

    wire = Wire()

    async def tls_connect(address, port, seconds):
        return wire, wire, [b""]

    hurt.tls_connect, hurt.hang_up = tls_connect, hang_up
    hurt.Channel._dial = staticmethod(tls_connect)
    channel = hurt.Channel("127.0.0.1", 1, b"g" * 20, None, 20)
    channel._due = []
    channel.opened.set(channel)
    while not wire.greeted:
        await asyncio.sleep(0)
    meeting = []

    async def circuit_to(target=None, attempts=None):
        circuit, client, finish = hurt.Circuit(channel), meeting[0], meeting[1]
        circuit.since = m.ticks_ms()

        def send(command, stream_id, answer):
            assert command == m.RENDEZVOUS1
            del circuit.send
            client.add_onion_hop(finish(answer[20:]))
            wire.circuits[circuit.circ_id] = client
            client.circ_id = circuit.circ_id
            meeting.clear()

        circuit.send = send
        return circuit

    tor.circuit_to = circuit_to

    async def attempt(seconds):
        """Meet the service, open two streams, send and receive; whether it worked."""
        service._tokens = 10
        client = m.Circuit(wire)
        wire.circuits.pop(client.circ_id)
        body, finish = m.hs_ntor_client(intro, b"s" * 32, os.urandom(20), relay)
        meeting[:] = [client, finish]
        try:
            service._introduced(intro, body)
            for _ in range(200):
                if meeting:
                    await asyncio.sleep(0)
            if meeting:
                return False
            await asyncio.sleep(0)
            for port in 80, 81:
                stream = await client.open_stream(m.BEGIN, m.begin("", port), seconds)
                sent = os.urandom(700)
                stream.write(sent)
                got = await asyncio.wait_for(stream.readexactly(len(sent)), seconds)
                assert got == sent
                stream.close()
            return True
        except (m.TorError, asyncio.TimeoutError, EOFError):
            return False
        finally:
            client.close()

    async def bystander():
        client = m.Circuit(wire)
        wire.circuits.pop(client.circ_id)
        body, finish = m.hs_ntor_client(intro, b"s" * 32, os.urandom(20), relay)
        meeting[:] = [client, finish]
        service._tokens = 10
        service._introduced(intro, body)
        while meeting:
            await asyncio.sleep(0)
        stream = await client.open_stream(m.BEGIN, m.begin("", 80), 20)
        return client, stream

    assert await attempt(20), "the test itself"
    arm(10**9)
    assert await attempt(20)
    total = count
    print("%d allocations" % total)
    n = lost = harmed = reached = 0
    other, stream = await bystander()
    # Until no attempt gets that far: they differ a little.
    while reached + 3 * stride > n:
        n += stride
        arm(n)
        worked = await attempt(1)
        reached = n if count >= n else reached
        arm(0)
        for _ in range(50):
            if not service.circuits and len(channel.circuits) <= 1:
                break
            await asyncio.sleep(0)
        assert not channel.closed, (n, channel.closed)
        lost += not worked
        # Those that share the link may lose their circuit, as the one that held most, no more.
        if other.closed or stream.is_closing():
            harmed += 1
            other, stream = await bystander()
        assert await attempt(20), "%d: the service does not answer" % n
        stream.write(b"still")
        assert await asyncio.wait_for(stream.readexactly(5), 20) == b"still", n
        service._tasks = [task for task in service._tasks if not task.done()]
        intro.cookies = bytearray()
        if failed % 10 == 0:
            for _ in range(100):
                await asyncio.sleep(0)
            assert len(channel.circuits) <= 6, (n, len(channel.circuits))
            assert len(service.circuits) <= 6, (n, len(service.circuits))
    print("%d failed: %d attempts and %d others came to nothing" % (failed, lost, harmed))
    assert failed * stride > total * 3 // 4 and harmed * 10 < failed
    server.close()


# The service's loops: introduction points and descriptors, in a time that flies.


class FakeCircuit:
    def __init__(self, relay):
        self.closed, self.on_control, self.kh, self.relay = None, {}, b"k" * 20, relay

    async def ask(self, *what):
        return b""

    def close(self):
        self.closed = True


class FakeTable:
    def find(self, rsa_id):
        return rsa_id[0]

    def rsa_id(self, i):
        return bytes([i]) * 20

    def relay(self, i):
        relay = dict(address="10.0.0.1", port=1, ntor_key=b"", specifiers=b"")
        return thing(rsa_id=bytes([i]) * 20, **relay)


class Asyncio:
    def __getattr__(self, name):
        return getattr(asyncio, name)

    async def sleep(self, seconds):
        clock[0] += seconds
        await asyncio.sleep(0)


clock = [1460545200]


async def loops(folder):
    posts, built, used = [], [], []
    tor, _ = make_service(folder, 1)
    consensus = tor.directory.consensus
    consensus.valid_after, consensus.fresh_until = 1460545200, 1460548800
    consensus.srv_current = consensus.srv_previous = b"c" * 32
    tor.directory.table = FakeTable()

    def pick(role, accept, stable):
        used.append(len(used) % 15)
        return used[-1]

    async def circuit_to(target=None, attempts=None):
        built.append(FakeCircuit(target))
        return built[-1]

    async def hsdir_request(tor, relay, path, file):
        file.seek(0)
        assert file.read() == b"text"
        posts.append(relay)

    async def until(condition):
        for _ in range(3000):
            if condition():
                return True
            await asyncio.sleep(0)

    tor.paths.pick, tor.circuit_to, hurt.hsdir_request = pick, circuit_to, hsdir_request
    hurt.asyncio, hurt.now, hurt.distinct = Asyncio(), lambda: clock[0], lambda *_: True
    hurt.hsdir_ring = lambda *_: [15, 16, 17]
    hurt.make_descriptor = lambda file, *_: file.write(b"text")
    hurt.revision_counter, hurt.ed25519_sign = lambda *_: 1, lambda *_: bytes(64)
    n = reached = 0
    while reached + 3 * stride > n:
        n += stride
        del posts[:], built[:]
        service = hurt.OnionService(tor, folder + "/key", {80: echo})
        tor.services = [service]
        arm(n)
        try:
            starting = asyncio.create_task(service.start())
            assert await until(lambda: starting.done()), "%d: not published" % n
            await starting
        except MemoryError:
            await service.close()
            reached = n
            continue
        intros = lambda: sorted([c.relay.rsa_id for c in built if not c.closed])
        assert await until(lambda: len(intros()) == 3), "%d: introduction points lack" % n
        del posts[:]
        clock[0] += 7201
        assert await until(lambda: len(posts) >= 6), "%d: not published again" % n
        [c for c in built if not c.closed][0].close()
        assert await until(lambda: len(intros()) == 3), "%d: one lacks for ever" % n
        reached = n if count >= n else reached
        arm(0)
        await service.close()
        assert await until(lambda: not intros()), "%d: open after the end" % n
    print("%d failed of %d" % (failed, reached))
    assert failed > 30 // stride


part, folder, stride = sys.argv[-3:]
stride = int(stride)
asyncio.run(streams(folder) if part == "streams" else loops(folder))
print("ok")
