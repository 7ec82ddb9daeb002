"""A client's and a service's end of a circuit, face to face: streams, windows, SENDMEs, ends."""

import asyncio
import os

import minitor as m


class Wire:
    """A channel that hands its cells to the circuit at the other end."""

    def __init__(self):
        self.closed, self.cells, self.far, self.near = None, [], None, None
        self.circuits = {}

    def room(self):
        return 32 - len(self.cells)

    def send(self, data):
        assert len(data) % 514 == 0
        self.cells += [data[at : at + 514] for at in range(0, len(data), 514)]

    async def carry(self):
        while True:
            cells, self.cells = self.cells, []
            while cells:
                command, count = cells[0][4], 1
                if command == m.RELAY:
                    while count < len(cells) and cells[count][4] == command:
                        count += 1
                self.far.receive(b"".join([one[5:] for one in cells[:count]]), command)
                cells = cells[count:]
            self.near.resume()
            await asyncio.sleep(0)


async def main():
    keys, begun = os.urandom(128), []
    links = Wire(), Wire()
    client, service = [m.Circuit(link) for link in links]
    links[0].far, links[1].far = service, client
    links[0].near, links[1].near = client, service
    client.add_onion_hop(keys)
    service.add_onion_hop(keys, True)
    tasks = [asyncio.create_task(link.carry()) for link in links]

    async def on_begin(stream, port):
        begun.append(port)
        if port == 81:
            return stream.send_end(m.END_CONNECTREFUSED)
        stream.accept()
        if port == 82:
            return None
        line = await stream.readline()
        size = int(line)
        stream.write(line)
        total = 0
        while total < size:
            data = await stream.read(4096)
            assert data
            total += len(data)
            stream.write(data)
            await stream.drain()
        stream.close()
        await stream.wait_closed()

    service.on_begin = on_begin
    # More than the windows of stream and circuit hold; where it is slow, one SENDME of a stream.
    size = 27000 if m.MICROPYTHON else 2000000
    stream = await client.open_stream(m.BEGIN, m.begin("", 80), 5)
    assert begun == [80] and list(client.streams) == list(service.streams)
    stream.write(b"%d\n" % size)
    assert await stream.readuntil(b"\n") == b"%d\n" % size
    piece = bytes(range(256)) * 8

    async def upload():
        left = size
        while left:
            stream.write(piece[: min(left, len(piece))])
            left -= min(left, len(piece))
            await stream.drain()

    uploading = asyncio.create_task(upload())
    left = size
    while left:
        n = min(left, len(piece))
        assert await stream.readexactly(n) == piece[:n]
        left -= n
    await uploading
    assert await stream.read() == b""
    try:
        stream.write(b"late")
        assert False
    except m.StreamError as e:
        assert e.reason == m.END_DONE
    try:
        await client.open_stream(m.BEGIN, m.begin("", 81), 5)
        assert False
    except m.StreamError as e:
        assert e.reason == m.END_CONNECTREFUSED
    await asyncio.sleep(0)
    assert not client.streams and not service.streams

    # A control message that is expected, and one that is not.
    answer = client.expect(m.RENDEZVOUS2)
    service.send(m.RENDEZVOUS2, 0, b"met")
    assert await answer.wait(5) == b"met" and not client.closed
    waiting = await client.open_stream(m.BEGIN, m.begin("", 82), 5)
    service.send(m.RENDEZVOUS2, 0, b"again")
    client.closing, service.closing = m.Promise(), m.Promise()
    error = await client.closing.wait(5)
    assert error.reason == 1 and client.closed is error
    assert (await service.closing.wait(5)).reason == 0
    try:
        await waiting.read(1)
        assert False
    except m.StreamError as e:
        assert e.reason == 8
    for task in tasks:
        task.cancel()


def test_padding_of_an_earlier_hop():
    # It stands between two cells of the last hop, whose layer never sees it.  A board, which
    # negotiates no padding, keeps no digests of such hops: it closes the circuit.
    links = Wire(), Wire()
    ends = [m.Circuit(link) for link in links]
    for onion in (False, False, True):
        keys = os.urandom(128)
        for end, service in zip(ends, (False, True)):
            end._layers.append(m.Layer(keys, onion, service))
    near, far = ends
    layers = far._layers
    stream = m.Stream(near, 7)
    stream._deliver = 500
    for count, command, stream_id, data in (
        (3, m.DATA, 7, b"one, "),
        (1, m.DROP, 0, b""),
        (2, m.DROP, 0, b""),
        (3, m.DATA, 7, b"two"),
    ):
        far._layers = layers[:count]
        far.send(command, stream_id, data)
    if m.MICROPYTHON:
        first, early = links[1].cells[:2]
        near.receive(first[5:])
        assert not near.closed and stream._incoming == b"one, "
        near.receive(early[5:])
        assert near.closed.reason == 1
        return
    near.receive(b"".join([cell[5:] for cell in links[1].cells]))
    assert not near.closed and stream._incoming == b"one, two"
    far.send(m.DATA, 7, b".")
    cell = bytearray(links[1].cells[-1][5:])
    cell[100] ^= 1
    near.receive(cell)
    assert near.closed.reason == 1


def test_a_changed_cell():
    links = Wire(), Wire()
    near, far = [m.Circuit(link) for link in links]
    for onion in (False, True):
        keys = os.urandom(128)
        for end, service in ((near, False), (far, True)):
            end._layers.append(m.Layer(keys, onion, service))
    far.send(m.DROP, 0, b"")
    far.send(m.DROP, 0, b"")
    near.receive(links[1].cells[0][5:])
    assert not near.closed
    cell = bytearray(links[1].cells[1][5:])
    cell[100] ^= 1
    near.receive(cell)
    assert near.closed.reason == 1


test_a_changed_cell()
test_padding_of_an_earlier_hop()
asyncio.run(asyncio.wait_for(main(), 120))
print("ok")
