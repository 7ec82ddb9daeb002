"""Circuits and streams against a relay whose every cell the test chooses.

The far side is built from the specification's layout with hashlib and `cryptography`, not with
minitor's own relay encryption.  What real relays do is tested in tests/live.
"""

import asyncio
import hashlib
import os
import struct

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import minitor

BEGIN, DATA, END, CONNECTED, SENDME, DROP, TRUNCATED = 1, 2, 3, 4, 5, 10, 9


class Hop:
    """The relay's side of one hop (tor-spec 5.2), from its 72 bytes of keys."""

    def __init__(self, keys):
        self.forward, self.backward = hashlib.sha1(keys[:20]), hashlib.sha1(keys[20:40])
        self.decrypt, self.encrypt = (
            Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
            for key in (keys[40:56], keys[56:72])
        )


class FakeChannel:
    """Keeps what a circuit sends."""

    def __init__(self, room=1000):
        self.sent, self.space, self.closed = [], room, None
        self.circuits = {}

    def room(self):
        return self.space

    def send(self, data):
        self.sent.extend(data[at : at + 514] for at in range(0, len(data), 514))


class Far:
    """A circuit of `hops` hops over a FakeChannel, and all relays of it."""

    def __init__(self, hops=3):
        self.channel = FakeChannel()
        self.circuit = minitor.Circuit(self.channel)
        self.hops = []
        for _ in range(hops):
            keys = os.urandom(92)
            self.circuit._layers.append(minitor.Layer(keys))
            self.hops.append(Hop(keys))

    def cell(self, command, stream_id, data=b"", hop=-1, size=None, recognised=0, forge=False):
        """Return an encrypted relay cell from the relay `hop` to the client."""
        hops = self.hops[: hop % len(self.hops) + 1]
        size = len(data) if size is None else size
        body = data + bytes(498 - len(data))
        plain = struct.pack(">BHHIH", command, recognised, stream_id, 0, size) + body
        hops[-1].backward.update(plain)
        tag = bytes(4) if forge else hops[-1].backward.digest()[:4]
        plain = plain[:5] + tag + plain[9:]
        for one in reversed(hops):
            plain = one.encrypt.update(plain)
        return plain

    def tag(self, hop=-1):
        return self.hops[hop].forward.digest()

    def received(self):
        """Return what the last relay reads of the cells sent: [(command, stream_id, data)]."""
        found, sent, self.channel.sent = [], self.channel.sent, []
        self.tags = []
        for cell in sent:
            if cell[4] == 4:
                found.append(("destroy", 0, b""))
                continue
            body = cell[5:]
            for hop in self.hops:
                body = hop.decrypt.update(body)
            command, recognised, stream_id, tag, size = struct.unpack_from(">BHH4sH", body)
            assert recognised == 0
            self.hops[-1].forward.update(body[:5] + bytes(4) + body[9:])
            assert self.hops[-1].forward.digest()[:4] == tag
            self.tags.append(self.hops[-1].forward.digest())
            # tor-spec 6.1: four zero bytes, then random ones.
            assert body[11 + size : 15 + size].strip(b"\0") == b""
            found.append((command, stream_id, body[11 : 11 + size]))
        return found

    async def stream(self, host="example.com"):
        body = minitor.begin(host, 80)
        opening = asyncio.ensure_future(self.circuit.open_stream(BEGIN, body, 5))
        await asyncio.sleep(0)
        ((command, stream_id, data),) = self.received()
        flags = b"\0\0\0\1" if host else b""
        assert (command, data) == (BEGIN, host.encode() + b":80\0" + flags)
        self.circuit.receive(self.cell(CONNECTED, stream_id))
        return await opening


def run(test):
    return asyncio.run(asyncio.wait_for(test(), 20))


def test_cells_that_come_together_are_read_in_order():
    async def test():
        far = Far()
        stream = await far.stream()
        pieces = [bytes([i]) * (498 - i) for i in range(20)]
        cells = [far.cell(DATA, stream.stream_id, piece) for piece in pieces]
        far.circuit.receive(b"".join(cells[:13]))
        far.circuit.receive(b"".join(cells[13:]) + far.cell(END, stream.stream_id, b"\6"))
        assert await stream.read() == b"".join(pieces)

    run(test)


def test_a_cell_of_a_middle_relay_does_not_shift_the_key_streams_behind_it():
    async def test():
        far = Far()
        stream = await far.stream()
        cells = [
            far.cell(DATA, stream.stream_id, b"one"),
            far.cell(DROP, 0, b"", hop=0),
            far.cell(DATA, stream.stream_id, b"two"),
            far.cell(DROP, 0, b"", hop=1),
            far.cell(DROP, 0, b"", hop=1),
            far.cell(DATA, stream.stream_id, b"three"),
        ]
        far.circuit.receive(b"".join(cells))
        assert await stream.readexactly(11) == b"onetwothree"
        assert not far.circuit.closed

    run(test)


@pytest.mark.parametrize(
    "bad",
    [
        lambda far, s: far.cell(DATA, s, b"x", forge=True),
        lambda far, s: far.cell(DATA, s, b"x", recognised=1),
        lambda far, s: far.cell(DATA, s, b"x", size=499),
        lambda far, s: far.cell(DATA, 0, b"x"),
        lambda far, s: far.cell(DATA, s, b"x", hop=1),
        lambda far, s: far.cell(SENDME, 0, b"\1\0\x14" + bytes(20)),
        lambda far, s: far.cell(SENDME, s),
        lambda far, s: far.cell(CONNECTED, s),
        lambda far, s: far.cell(15, 0, b"unasked EXTENDED2"),
        lambda far, s: far.cell(37, 0, bytes(64)),
        lambda far, s: far.cell(BEGIN, 999, b"localhost:22\0"),
        lambda far, s: far.cell(99, 0),
        lambda far, s: far.cell(TRUNCATED, 0, b"\5", hop=1),
        lambda far, s: os.urandom(509),
        lambda far, s: b"".join(far.cell(DATA, s, b"x") for _ in range(501)),
    ],
)
def test_what_breaks_the_protocol_closes_the_circuit(bad):
    async def test():
        far = Far()
        stream = await far.stream()
        stream.feed(b"before")
        # Nobody reads, so no SENDME is due to the stream.
        minitor.READ_AHEAD, before = 0, minitor.READ_AHEAD
        try:
            far.circuit.receive(bad(far, stream.stream_id))
        finally:
            minitor.READ_AHEAD = before
        assert far.circuit.closed
        assert far.received()[-1][0] == "destroy"
        with pytest.raises(minitor.StreamError):
            while await stream.read(100):
                pass

    run(test)


def test_sendmes_carry_the_tag_of_the_cell_that_made_them_due():
    async def test():
        far = Far()
        stream = await far.stream()
        cells, tags = [], []
        for i in range(250):
            cells.append(far.cell(DATA, stream.stream_id, b"x"))
            tags.append(far.hops[-1].backward.digest())
        far.circuit.receive(b"".join(cells))
        sent = far.received()
        circuit = [data for command, stream_id, data in sent if command == SENDME and not stream_id]
        assert circuit == [b"\1\0\x14" + tags[99], b"\1\0\x14" + tags[199]]
        assert len([1 for command, stream_id, _ in sent if stream_id]) == 5

    run(test)


def test_sending_stops_at_the_windows_and_goes_on_with_authentic_sendmes():
    async def test():
        far = Far()
        stream = await far.stream()
        data = os.urandom(498 * 1300)
        stream.write(data)
        sent = far.received()
        assert len(sent) == 500
        # At least one cell in each window is short, so that its tag cannot be foretold.
        assert all(
            min(len(d) for _, _, d in sent[at : at + 100]) <= 478 for at in range(0, 500, 100)
        )
        got = b"".join(d for _, _, d in sent)
        tags = far.tags
        for i in range(10):
            far.circuit.receive(far.cell(SENDME, stream.stream_id))
        more = far.received()
        tags += far.tags
        assert len(more) == 500
        got += b"".join(d for _, _, d in more)
        for i in range(10):
            far.circuit.receive(far.cell(SENDME, stream.stream_id))
        assert far.received() == []
        for i in range(4):
            tag = tags[100 * i + 99][:20]
            far.circuit.receive(far.cell(SENDME, 0, b"\1\0\x14" + tag))
        got += b"".join(d for _, _, d in far.received())
        assert got == data
        far.circuit.receive(far.cell(SENDME, 0, b"\1\0\x14" + bytes(20)))
        assert far.circuit.closed

    run(test)


def test_sending_waits_for_room_in_the_channel():
    async def test():
        far = Far()
        stream = await far.stream()
        far.channel.space = 0
        stream.write(bytes(5000))
        assert far.received() == []
        far.channel.space = 100
        far.circuit.resume()
        assert sum(len(d) for _, _, d in far.received()) == 5000
        await stream.drain()

    run(test)


def test_a_writer_goes_on_as_soon_as_there_is_room():
    async def test():
        far = Far()
        stream = await far.stream()
        far.channel.space = 0
        stream.write(bytes(2 * minitor.WRITE_AHEAD))
        draining = asyncio.ensure_future(stream.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        # The window of the stream holds more than half of it, and not all.
        far.channel.space = 1000
        far.circuit.resume()
        await asyncio.wait_for(draining, 1)
        assert 0 < len(stream.outgoing) <= minitor.WRITE_AHEAD

    run(test)


def test_bytes_that_came_before_the_end_are_not_lost():
    async def test():
        for reason, fails in ((6, False), (12, True)):
            far = Far()
            stream = await far.stream()
            far.circuit.receive(
                far.cell(DATA, stream.stream_id, b"last words")
                + far.cell(END, stream.stream_id, bytes([reason]))
            )
            assert await stream.read(5) == b"last "
            assert await stream.read(100) == b"words"
            if fails:
                with pytest.raises(minitor.StreamError, match="reset"):
                    await stream.read(100)
            else:
                assert await stream.read(100) == b""
            with pytest.raises(minitor.TorError):
                stream.write(b"too late")

    run(test)


def test_a_closed_stream_is_ended_and_late_data_does_no_harm():
    async def test():
        far = Far()
        stream = await far.stream()
        stream.write(b"bye")
        stream.close()
        await stream.wait_closed()
        assert [c for c, _, _ in far.received()] == [DATA, END]
        far.circuit.receive(
            far.cell(DATA, stream.stream_id, b"late") + far.cell(END, stream.stream_id, b"\6")
        )
        assert not far.circuit.closed and not far.circuit.streams

    run(test)


def test_begin_to_an_onion_service():
    async def test():
        assert await Far().stream("")

    run(test)


def test_early_data_goes_before_the_answer():
    async def test():
        far = Far()
        body = os.urandom(1000)
        opening = asyncio.ensure_future(
            far.circuit.open_stream(BEGIN, b"example.com:80\0", 5, bytearray(body)))
        await asyncio.sleep(0)
        (command, stream_id, _), *rest = far.received()
        assert command == BEGIN and {c for c, _, _ in rest} == {DATA}
        assert b"".join(data for _, _, data in rest) == body and not opening.done()
        far.circuit.receive(
            far.cell(CONNECTED, stream_id) + far.cell(DATA, stream_id, b"early, too"))
        stream = await opening
        assert stream.early == 1000 and await stream.read(100) == b"early, too"
        assert (await far.stream()).early == 0

    run(test)


def test_a_refused_stream_says_why():
    async def test():
        far = Far()
        opening = asyncio.ensure_future(far.circuit.open_stream(BEGIN, b"example.com:80\0", 5))
        await asyncio.sleep(0)
        ((_, stream_id, _),) = far.received()
        far.circuit.receive(far.cell(END, stream_id, b"\4" + bytes(8)))
        with pytest.raises(minitor.StreamError, match="policy") as caught:
            await opening
        assert caught.value.reason == 4 and not far.circuit.streams

    run(test)


def test_destroy_ends_streams_with_its_reason():
    async def test():
        far = Far()
        stream = await far.stream()
        far.circuit.receive(b"\5", minitor.DESTROY)
        with pytest.raises(minitor.StreamError, match="resources"):
            await stream.read(1)
        with pytest.raises(minitor.CircuitError):
            await far.circuit.open_stream(BEGIN, b"example.com:80\0", 5)

    run(test)


def test_lines_and_separators():
    async def test():
        far = Far()
        stream = await far.stream()
        far.circuit.receive(far.cell(DATA, stream.stream_id, b"one\ntw"))
        assert await stream.readline() == b"one\n"
        far.circuit.receive(far.cell(DATA, stream.stream_id, b"o\r\n\r\nrest"))
        assert await stream.readuntil(b"\r\n\r\n") == b"two\r\n\r\n"
        far.circuit.receive(far.cell(END, stream.stream_id, b"\6"))
        assert await stream.readline() == b"rest"
        assert await stream.readline() == b""
        with pytest.raises(EOFError):
            await stream.readexactly(1)

    run(test)


def test_a_service_reads_early_data_and_ends_streams_as_done():
    async def test():
        far = Far(2)
        begun = []

        async def on_begin(stream, port):
            begun.append(port)
            stream.accept()
            stream.write(await stream.readline())
            stream.close()

        far.circuit.on_begin = on_begin
        far.circuit.receive(far.cell(BEGIN, 7, b":80\0") + far.cell(DATA, 7, b"hello\n"))
        await asyncio.sleep(0.01)
        assert begun == [80]
        assert far.received() == [(CONNECTED, 7, b""), (DATA, 7, b"hello\n"), (END, 7, b"\6")]
        far.circuit.receive(far.cell(BEGIN, 8, b"no port"))
        assert far.circuit.closed

    run(test)


XOFF, XON = 43, 44


def defaults(name, default, low=0, high=1 << 31):
    return default


async def controlled():
    """Return a Far and a stream of a circuit with congestion control."""
    far = Far()
    vegas = far.circuit.vegas = minitor.Vegas(defaults)
    far.circuit._increment, far.circuit.window = vegas.increment, vegas.cwnd
    return far, await far.stream()


def test_congestion_control_opens_its_window_as_sendmes_come():
    async def test():
        far, stream = await controlled()
        stream.write(os.urandom(498 * 1000))
        assert len(far.received()) == 124
        tags = far.tags
        far.circuit.receive(far.cell(SENDME, 0, b"\1\0\x14" + tags[30][:20]))
        # Slow start: as many as were acknowledged, and as many again.
        assert len(far.received()) == 62
        far.circuit.receive(far.cell(SENDME, 0, b"\1\0\x14" + tags[30][:20]))
        assert far.circuit.closed

    run(test)


def test_congestion_control_backs_off_from_queues():
    vegas = minitor.Vegas(defaults)
    sizes = []
    for rtt in [20] * 40 + [200] * 60 + [20] * 60:
        vegas.acked(vegas.cwnd, rtt)
        sizes.append(vegas.cwnd)
    assert 124 < sizes[39] <= 5000
    assert sizes[99] < sizes[39] // 2 and min(sizes) >= 124
    assert sizes[-1] > sizes[99]


def test_congestion_control_acknowledges_each_increment_and_stops_a_fast_sender():
    async def test():
        far, stream = await controlled()
        data = bytes(498)
        for start in range(0, 1240, 31):
            far.circuit.receive(
                b"".join(far.cell(DATA, stream.stream_id, data) for _ in range(31))
            )
        sent = far.received()
        assert len([1 for command, stream_id, _ in sent if command == SENDME]) == 40
        assert not any(command == SENDME and stream_id for command, stream_id, _ in sent)
        assert [(c, d) for c, s, d in sent if s] == [(XOFF, b"\0")]
        await stream.readexactly(498 * 1100)
        assert far.received() == [(XON, stream.stream_id, bytes(5))]

    run(test)


def test_xoff_holds_a_stream_and_xon_lets_it_go():
    async def test():
        far, stream = await controlled()
        far.circuit.receive(far.cell(XOFF, stream.stream_id, b"\0"))
        stream.write(b"held")
        assert far.received() == []
        far.circuit.receive(far.cell(XON, stream.stream_id, bytes(5)))
        assert far.received() == [(DATA, stream.stream_id, b"held")]

    run(test)


def test_a_sender_that_does_not_heed_xoff_loses_the_circuit():
    async def test():
        far, stream = await controlled()
        cells = b"".join(far.cell(DATA, stream.stream_id, bytes(498)) for _ in range(31))
        for _ in range(400):
            if far.circuit.closed:
                break
            far.circuit.receive(cells)
            cells = b"".join(far.cell(DATA, stream.stream_id, bytes(498)) for _ in range(31))
        assert far.circuit.closed

    run(test)


def test_xoff_without_congestion_control_closes_the_circuit():
    async def test():
        far = Far()
        stream = await far.stream()
        far.circuit.receive(far.cell(XOFF, stream.stream_id, b"\0"))
        assert far.circuit.closed

    run(test)


RESOURCELIMIT = b"\x0b"


async def serving():
    """A service's circuit with two streams, the handlers of which read nothing before `go`."""
    far, go, got = Far(2), asyncio.Event(), []

    async def on_begin(stream, port):
        stream.accept()
        await go.wait()
        try:
            got.append((stream.stream_id, await stream.readexactly(5)))
        except (minitor.StreamError, EOFError) as e:
            got.append((stream.stream_id, e))
        stream.close()

    far.circuit.on_begin = on_begin
    far.circuit.receive(far.cell(BEGIN, 7, b":80\0") + far.cell(BEGIN, 8, b":80\0"))
    await asyncio.sleep(0.01)
    assert far.received() == [(CONNECTED, 7, b""), (CONNECTED, 8, b"")]
    return far, go, got


async def others_go_on(far, go, got):
    """The stream 7 has ended for want of memory, the stream 8 has not."""
    ends = [message for message in far.received() if message[0] == END]
    assert ends == [(END, 7, RESOURCELIMIT)] and not far.circuit.closed
    assert list(far.circuit.streams) == [8]
    # What still comes on it is nothing to anyone.
    far.circuit.receive(far.cell(DATA, 7, b"late") + far.cell(DATA, 8, b"hello"))
    go.set()
    await asyncio.sleep(0.01)
    errors = dict(got)
    assert errors.pop(8) == b"hello" and errors[7].reason == minitor.END_RESOURCELIMIT
    assert not far.circuit.closed and far.received()[-1] == (END, 8, b"\6")


def test_a_client_that_ignores_the_window_loses_the_stream():
    async def test():
        far, go, got = await serving()
        minitor.READ_AHEAD, before = 0, minitor.READ_AHEAD
        try:
            for _ in range(40):
                far.circuit.receive(b"".join(far.cell(DATA, 7, bytes(498)) for _ in range(20)))
        finally:
            minitor.READ_AHEAD = before
        await others_go_on(far, go, got)

    run(test)


@pytest.mark.parametrize("how", ["most", "crowded", "failing"])
def test_a_stream_that_takes_too_much_memory_ends(monkeypatch, how):
    async def test():
        far, go, got = await serving()
        if how == "most":
            monkeypatch.setattr(minitor, "MOST_UNREAD", 20000)
        elif how == "crowded":
            monkeypatch.setattr(minitor, "READ_AHEAD", 5000)
            monkeypatch.setattr(minitor, "crowded", lambda: True)
        else:
            stream = far.circuit.streams[7]

            class Full(bytearray):
                def extend(self, data):
                    raise MemoryError

            stream._incoming = Full()
        for _ in range(5):
            far.circuit.receive(b"".join(far.cell(DATA, 7, bytes(498)) for _ in range(10)))
        await others_go_on(far, go, got)

    run(test)


def test_a_send_that_lacks_memory_costs_the_circuit():
    """The digest counts what was not sent: nothing more could be read there."""

    async def test():
        far = Far()
        stream = await far.stream()

        def short(data):
            del far.channel.send
            raise MemoryError

        far.channel.send = short
        stream.write(b"x")
        assert far.circuit.closed.reason == 5
        assert [cell[4] for cell in far.channel.sent] == [4]
        with pytest.raises(minitor.StreamError):
            await stream.read(1)

    run(test)


def test_relief_takes_the_stream_that_holds_most_or_an_idle_circuit(monkeypatch):
    async def test():
        monkeypatch.setattr(minitor, "READ_AHEAD", 1 << 20)
        one, two, idle = [(await serving())[0] for _ in range(3)]
        circuits = one.circuit, two.circuit, idle.circuit
        for far, stream_id, count in ((one, 7, 4), (two, 7, 9), (two, 8, 5)):
            far.circuit.receive(b"".join(far.cell(DATA, stream_id, bytes(498)) for _ in range(count)))
        # None has been still for so long.
        minitor.relieve(circuits, 1 << 20)
        assert two.received() == []
        minitor.relieve(circuits)
        assert two.received() == [(END, 7, RESOURCELIMIT)] and one.received() == []
        minitor.relieve(circuits)
        assert two.received() == [(END, 8, RESOURCELIMIT)]
        two.circuit.streams.clear()
        minitor.relieve(circuits)
        assert one.received() == [(END, 7, RESOURCELIMIT)]
        minitor.relieve(circuits)
        assert [bool(circuit.closed) for circuit in circuits] == [False, True, False]

    run(test)
