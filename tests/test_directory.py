"""Section 13: networks, HTTP over directory streams, bootstrap and refresh, without relays."""

import asyncio
import io
import lzma
import time
import zlib
from types import SimpleNamespace

import pytest

import minitor
from fakenet import FakeNet, FakeRelay

PHASES = (5, 25, 40, 45, 50, 75)


class FakeStream:
    """What the other end of a directory stream answers, in pieces of `size` bytes."""

    def __init__(self, answer, size=1000):
        self.answer, self.size, self.sent, self.closed = answer, size, b"", False

    def write(self, data):
        self.sent += data

    async def drain(self):
        if callable(self.answer) and b"\r\n\r\n" in self.sent:
            self.answer = self.answer(self.sent)

    async def readuntil(self, separator, limit):
        at = self.answer.find(separator, 0, limit)
        if at < 0:
            raise EOFError
        head, self.answer = self.answer[: at + 4], self.answer[at + 4 :]
        return head

    async def read(self, n):
        await asyncio.sleep(0)
        n = min(n, self.size)
        piece, self.answer = self.answer[:n], self.answer[n:]
        return piece

    def close(self):
        self.closed = True


def answer(body, status="200 OK", *fields):
    head = ["HTTP/1.0 " + status, "Date: now"] + list(fields)
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def request(data, limit=65536, sink=None, body=b"", size=1000):
    stream = FakeStream(data, size)
    return asyncio.run(minitor.http_request(stream, "/tor/x", limit, sink, body)), stream


def expand(data, encoding, limit=1 << 20, size=1000):
    got = []
    reply = answer(data, "200 OK", "Content-Encoding: " + encoding)
    request(reply, limit=limit, sink=got.append, size=size)
    return b"".join(got)


def alone(data):
    return lzma.compress(data, lzma.FORMAT_ALONE)


# ── Networks ──


def network_of(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "torrc"
    path.write_text(text)
    return minitor.load_network(str(path))


def test_the_public_network():
    network = minitor.load_network()
    assert len(network.authorities) == len(network.identities) == 9 and not network.testing
    rsa_id = bytes.fromhex("1A25C6358DB91342AA51720A5038B72742732498")
    assert minitor.place(network.authorities[0]) == ("128.31.0.39", 9201, rsa_id)
    assert bytes.fromhex("F533C81CEF0BC0267857C99B2F471ADF249FA232") in network.identities
    assert len(network.fallbacks) == len(set(network.fallbacks)) == 200
    address, port, rsa_id = minitor.place(network.fallbacks[0])
    assert (rsa_id.hex().upper()[:8], address, port) == ("4F067C5C", "64.65.62.122", 443)
    for address, port, rsa_id in map(minitor.place, network.fallbacks):
        assert len(rsa_id) == 20 and 0 < port < 65536


def test_a_network_of_ones_own(tmp_path):
    text = """
# a comment
TestingTorNetwork 1
SocksPort 9050
DirAuthority auth0 orport=5000 no-v2 hs v3ident=%s 127.1.0.1:7000 0577 D7BD CC1E 3F8E 588C 426E 4520 1835 EDF3 EDB3
dirauthority auth1 v3ident=%s orport=5001 127.2.0.1:7001 5E805B0FD0D3431C80AB53CB069460E2B02F919D # and this
DirAuthority Serge orport=9001 bridge 66.111.2.131:9030 BA44A889E64B93FAA2B114E02C2A279A8555C533
""" % ("11" * 20, "22" * 20)
    network = network_of(tmp_path, text)
    assert network.testing and network.identities == {b"\x11" * 20, b"\x22" * 20}
    first = bytes.fromhex("0577D7BDCC1E3F8E588C426E45201835EDF3EDB3")
    assert network.authorities[0] == ("127.1.0.1", 5000, first)
    assert network.authorities[1][:2] == ("127.2.0.1", 5001) and not network.fallbacks
    same = network_of(tmp_path, text.replace("127.1", "127.3"))
    assert same.id == network.id != minitor.load_network().id


@pytest.mark.parametrize(
    "line",
    [
        "DirAuthority",
        "DirAuthority a v3ident=%s 1.2.3.4:80 %s" % ("11" * 20, "22" * 20),
        "DirAuthority a orport=x v3ident=%s 1.2.3.4:80 %s" % ("11" * 20, "22" * 20),
        "DirAuthority a orport=1 v3ident=%s 1.2.3.4:80 %s" % ("11" * 19, "22" * 20),
        "DirAuthority a orport=1 v3ident=%s 1.2.3.4:80" % ("11" * 20),
        "DirAuthority a orport=1 v3ident=%s 1.2.3.4 %s" % ("11" * 20, "zz" * 20),
        "TestingTorNetwork",
    ],
)
def test_bad_network_lines(tmp_path, line):
    with pytest.raises(minitor.ConfigError) as e:
        network_of(tmp_path, "# first\n" + line)
    assert line in str(e.value)


def test_no_network(tmp_path):
    with pytest.raises(minitor.ConfigError, match="no DirAuthority"):
        network_of(tmp_path, "SocksPort 9050\n")
    with pytest.raises(minitor.ConfigError, match="/no/such/file"):
        minitor.load_network("/no/such/file")


# ── HTTP ──


def test_http_get_and_post():
    body, stream = request(answer(b"hello", "200 OK", "Content-Length: 5"))
    assert body == b"hello" and stream.sent == b"GET /tor/x HTTP/1.0\r\n\r\n"
    with pytest.raises(minitor.DirectoryError, match="404"):
        request(answer(b"hello", "404 Not found", "Content-Length: 5"))
    body, stream = request(answer(b""), body=io.BytesIO(b"data"))
    assert stream.sent == b"POST /tor/x HTTP/1.0\r\nContent-Length: 4\r\n\r\ndata"
    # Only what goes to a sink may be compressed: a descriptor is fetched through a circuit.
    _, stream = request(answer(b""), sink=print)
    assert b"Accept-Encoding: identity, x-tor-lzma, deflate\r\n" in stream.sent


def test_on_a_board_an_answer_is_taken_piece_by_piece(monkeypatch):
    """Parsers join and cut what they get: three times what has come is more than there is."""
    monkeypatch.setattr(minitor, "PIECE", 478)
    pieces, data = [], bytes(range(256)) * 20
    request(answer(data), 1 << 20, pieces.append, size=100000)
    assert b"".join(pieces) == data and max(map(len, pieces)) <= 478


@pytest.mark.parametrize("size", [1, 10, 100000])
@pytest.mark.parametrize("encoding, pack", [("deflate", zlib.compress), ("x-tor-lzma", alone)])
def test_compression(encoding, pack, size):
    data = b"".join(b"line %d of a document\n" % (i * i) for i in range(100 + size % 99999 * 900))
    assert expand(pack(data), encoding, size=size) == data
    # Streams in a row.
    assert expand(pack(data) + pack(b"") + pack(b"end"), encoding, size=size) == data + b"end"
    assert expand(b"", encoding) == b""
    packed = pack(data)
    for n in (1, 10, len(packed) // 2, len(packed) - 1):
        with pytest.raises(minitor.ProtocolError):
            expand(packed[:n], encoding, size=size)
        with pytest.raises(minitor.ProtocolError):
            expand(pack(b"first") + packed[:n], encoding, size=size)
    for bad in (b"x" + packed, packed + b"garbage"):
        with pytest.raises(minitor.ProtocolError):
            expand(bad, encoding, size=size)


@pytest.mark.parametrize("encoding, pack", [("deflate", zlib.compress), ("x-tor-lzma", alone)])
def test_compression_bombs(encoding, pack):
    bomb = pack(bytes(16 << 20))
    with pytest.raises(minitor.ProtocolError, match="too long"):
        expand(bomb, encoding)
    with pytest.raises(minitor.ProtocolError, match="too long"):
        # However much is allowed in all.
        expand(bomb, encoding, 1 << 30, 65536)
    small = pack(bytes(1 << 20))
    with pytest.raises(minitor.ProtocolError, match="too long"):
        expand(small * 3, encoding, (3 << 20) - 1)
    assert len(expand(small * 3, encoding, 3 << 20)) == 3 << 20


def test_an_answer_without_end():
    with pytest.raises(minitor.ProtocolError, match="too long"):
        request(answer(bytes(1001)), limit=1000)
    assert request(answer(bytes(1000)), limit=1000)[0] == bytes(1000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.0 200 OK\r\n",
        b"nonsense\r\n\r\n",
        b"HTTP/1.0 abc OK\r\n\r\n",
        b"\xff\xff \xfe\r\n\r\n",
        b"x" * 9000 + b"\r\n\r\n",
        answer(b"", "200 OK", "Content-Encoding: x-zstd"),
        answer(b"12345", "200 OK", "Content-Length: 6"),
        answer(b"12345", "200 OK", "Content-Length: 4"),
        answer(b"12345", "200 OK", "Content-Length: x"),
    ],
)
def test_bad_answers(data):
    with pytest.raises(minitor.ProtocolError):
        request(data)


# ── The directory ──


class FakeChannel:
    rsa_id, skew = b"fallback".ljust(20), 0


class FakeCircuit:
    def __init__(self, mirror):
        self.channel = FakeChannel()
        self.mirror, self.closed, self.streams = mirror, False, []

    async def open_stream(self, command, body, seconds):
        assert not self.closed and command == minitor.BEGIN_DIR
        self.streams.append(FakeStream(self.mirror.serve))
        return self.streams[-1]

    def close(self):
        self.closed = True


class Mirror:
    """A directory that serves a FakeNet; `spoil` maps a part of a path to another answer."""

    def __init__(self, net):
        self.net, self.spoil, self.asked, self.circuits = net, {}, [], []

    def circuit(self):
        self.circuits.append(FakeCircuit(self))
        return self.circuits[-1]

    def serve(self, sent):
        path = sent.split(b" ")[1].decode()
        self.asked.append(path)
        for part, spoilt in self.spoil.items():
            if part in path:
                return spoilt(path) if callable(spoilt) else spoilt
        assert b"Accept-Encoding: " in sent
        if path.startswith("/tor/status-vote/current/consensus-microdesc/"):
            return answer(alone(self.net.consensus()), "200 OK", "Content-Encoding: x-tor-lzma")
        if path.startswith("/tor/keys/fp-sk/"):
            return answer(self.net.certs())
        digests = {minitor.b64decode(d.encode()) for d in path.split("/", 4)[4].split("-")}
        body = self.net.microdescs(digests)
        fields = "200 OK", "Content-Encoding: deflate"
        return answer(zlib.compress(body), *fields) if body else answer(b"", "404 Not found")


class Setup:
    def __init__(self, path, net, mirrors):
        self.progress, self.updates, self.mirrors = [], [], list(mirrors)
        network = network_of(path, net.torrc())
        self.directory = minitor.Directory(
            network, str(path), None, lambda *args: self.progress.append(args)
        )
        self.directory._circuit = self.circuit
        update = lambda table, consensus: self.updates.append(consensus)  # noqa: E731
        self.directory.paths = SimpleNamespace(update=update)

    async def circuit(self):
        if len(self.mirrors) > 1:
            return self.mirrors.pop(0).circuit()
        if not self.mirrors:
            raise minitor.DirectoryError("no directory can be reached")
        return self.mirrors[0].circuit()

    def bootstrap(self):
        asyncio.run(self.directory.bootstrap())
        return self.directory

    def refresh(self, until):
        """Run refresh(), without waiting for its times, until `until(directory)`."""
        self.directory._next_time = lambda: 0
        before = len(self.updates)

        async def run():
            task = asyncio.ensure_future(self.directory.refresh())
            while not until(self.directory) or len(self.updates) == before:
                await asyncio.sleep(0.001)
            task.cancel()

        asyncio.run(asyncio.wait_for(run(), 20))
        return self.directory


@pytest.fixture
def net(monkeypatch):
    monkeypatch.setattr(minitor, "_BATCH", 4)
    monkeypatch.setattr(minitor, "_PAUSE_SECONDS", 0)
    return FakeNet(200)


@pytest.fixture
def on_flash(monkeypatch):
    """As on a board: the table in files."""

    def new_table(path, network_id, old):
        table = minitor.FlashTable(path, network_id)
        table.begin(old)
        return table

    def load_table(path, network_id):
        table = minitor.FlashTable(path, network_id)
        consensus = table.load()
        return consensus and (table, consensus)

    monkeypatch.setattr(minitor, "new_table", new_table)
    monkeypatch.setattr(minitor, "load_table", load_table)
    monkeypatch.setattr(minitor, "_BATCH", 37)
    monkeypatch.setattr(minitor, "_WORKERS", 1)


def full(directory):
    return next(directory.table.missing(), None) is None


def test_bootstrap_cold_and_warm(net, tmp_path):
    mirror = Mirror(net)
    cold = Setup(tmp_path, net, [mirror])
    directory = cold.bootstrap()
    assert len(directory.table) == 200
    assert sum(1 for flags in directory.table.flags if flags & minitor.USABLE) >= 120
    consensus, certs, *micro = mirror.asked
    wanted = "+".join(sorted(a.id[:3].hex().upper() for a in net.authorities))
    assert consensus.endswith("/consensus-microdesc/" + wanted)
    assert certs.startswith("/tor/keys/fp-sk/") and certs.count("+") == 2
    assert all(p.startswith("/tor/micro/d/") and p.count("-") <= 3 for p in micro)
    assert all(c.closed for c in mirror.circuits)
    assert all(stream.closed for c in mirror.circuits for stream in c.streams)
    percents = [p[0] for p in cold.progress]
    assert percents == sorted(set(percents)) and percents[0] == 25 and percents[-1] == 75
    assert set(PHASES[1:]) <= set(percents)
    assert cold.progress[-1] == (
        75, "enough_dirinfo", "Loaded enough directory info to build circuits"
    )
    # Then the rest, without a new consensus.
    assert not full(directory)
    cold.refresh(full)
    assert "/micro/" in mirror.asked[len(micro) + 2]
    # A warm start asks no one.
    warm = Setup(tmp_path, net, [])
    again = warm.bootstrap()
    assert again.table.flags == directory.table.flags
    assert [p[0] for p in warm.progress] == [75] and again.consensus.params["circwindow"] == 1000


def test_refresh_downloads_what_changed(net, tmp_path):
    setup = Setup(tmp_path, net, [Mirror(net)])
    setup.bootstrap()
    setup.refresh(full)
    mirror = setup.mirrors[0]
    mirror.asked.clear()
    net.valid_after += 60
    net.relays[0].policy = "accept 23"
    net.relays[1:3] = [FakeRelay(1000)]
    directory = setup.refresh(lambda d: d.consensus.valid_after == net.valid_after and full(d))
    assert len(directory.table) == 199
    micro = [p for p in mirror.asked if "/micro/" in p]
    assert sum(p.count("-") + 1 for p in micro) == 2
    # The authorities' certificates were not asked for again.
    assert not [p for p in mirror.asked if "/keys/" in p]
    i = directory.table.find(net.relays[0].rsa_id)
    assert directory.table.exit_allows(i, 23)


def usable(table):
    return sum(1 for _ in table.rows(minitor.USABLE, minitor.USABLE))


def test_bootstrap_and_refresh_on_flash(net, tmp_path, on_flash):
    mirror = Mirror(net)
    directory = Setup(tmp_path, net, [mirror]).bootstrap()
    assert len(directory.table) == 200 and 120 <= usable(directory.table) < 200
    assert 3 < len([p for p in mirror.asked if "/micro/" in p]) < 6
    # A warm start asks no one, and goes on where it was.
    setup = Setup(tmp_path, net, [])
    directory = setup.bootstrap()
    assert 120 <= usable(directory.table) < 200
    setup.mirrors = [Mirror(net)]
    setup.refresh(full)
    assert usable(directory.table) == 200
    # The next hour: what is new is fetched before the table changes.
    mirror = setup.mirrors[0]
    mirror.asked.clear()
    net.valid_after += 60
    net.relays[0].policy = "accept 80,443"
    net.relays[1:3] = [FakeRelay(1000)]
    setup.refresh(lambda d: d.consensus.valid_after == net.valid_after)
    assert len(directory.table) == usable(directory.table) == 199
    assert sum(p.count("-") + 1 for p in mirror.asked if "/micro/" in p) == 2
    table = Setup(tmp_path, net, []).bootstrap().table
    assert usable(table) == 199
    for r in net.relays:
        i = table.find(r.rsa_id)
        assert table.relay(i).ntor_key == r.ntor_key
        assert table.exit_allows(i, 80) == ("accept 80" in r.policy)


def test_on_a_board_a_consensus_is_judged_while_nothing_is_answered(net, tmp_path, on_flash):
    """That takes much memory for a moment, as an introduction's answer does."""
    setup = Setup(tmp_path, net, [Mirror(net)])
    setup.bootstrap()
    setup.refresh(full)
    directory, asked = setup.directory, setup.mirrors[0].asked
    net.valid_after += 60

    async def main():
        asked.clear()
        directory.moment = asyncio.Lock()
        async with directory.moment:
            task = asyncio.ensure_future(directory._ask(directory._consensus_from))
            while not setup.mirrors[0].circuits[-1].closed and not asked:
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            assert len(asked) == 1 and "consensus" in asked[0] and not task.done()
        _, consensus = await task
        assert "/keys/" in asked[1] and not directory.moment.locked()
        assert consensus.valid_after == net.valid_after

    directory._certs.clear()
    asyncio.run(main())


def test_refresh_that_fails_is_tried_again_within_the_life_of_a_consensus(net, tmp_path):
    """However often it fails: with a directory too old, a service is where nobody looks."""
    setup = Setup(tmp_path, net, [Mirror(net)])
    directory, pauses = setup.bootstrap(), []
    fresh = directory.consensus.fresh_until - directory.consensus.valid_after

    async def renew():
        raise MemoryError("memory allocation failed")

    async def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) > 60:
            raise KeyboardInterrupt

    async def main():
        with pytest.raises(KeyboardInterrupt):
            await directory.refresh()

    directory._renew, directory._next_time = renew, lambda: 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minitor.asyncio, "sleep", sleep)
        asyncio.run(main())
    waits = [seconds for seconds in pauses if seconds]
    # Longer and longer, so as to be no burden.
    assert 30 <= waits[0] < 60 <= waits[1] < 120
    assert fresh <= waits[-1] < 2 * fresh and max(waits) < 2 * fresh


def test_forged_consensuses_change_nothing_on_flash(net, tmp_path, on_flash):
    setup = Setup(tmp_path, net, [Mirror(net)])
    setup.bootstrap()
    setup.refresh(full)
    mirror, directory = setup.mirrors[0], setup.directory
    before = {i: (flags, weight) for i, flags, weight in directory.table.rows()}
    net.valid_after += 60
    net.relays[5].weight = 7
    forged = net.consensus().replace(b"Bandwidth=1000", b"Bandwidth=9999", 1)
    for body in (FakeNet(250).consensus(), forged, net.consensus()[:5000]):
        mirror.spoil = {"consensus": answer(body)}
        with pytest.raises(minitor.DirectoryError, match="no directory gave"):
            asyncio.run(directory._ask(directory._consensus_from))
        table = Setup(tmp_path, net, []).bootstrap().table
        for each in (table, directory.table):
            assert {i: (flags, weight) for i, flags, weight in each.rows()} == before
            assert {each.rsa_id(i) for i in before} == {r.rsa_id for r in net.relays}
    mirror.spoil = {}
    setup.refresh(lambda d: d.consensus.valid_after == net.valid_after)
    # A damaged shard is noticed: all is fetched anew.
    shard = tmp_path / "relays.d" / "0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    again = Setup(tmp_path, net, [Mirror(net)])
    assert usable(again.bootstrap().table) >= 120 and again.progress[0][0] == 25


def test_more_relays_change_than_flash_has_room_for(net, tmp_path, on_flash):
    setup = Setup(tmp_path, net, [Mirror(net)])
    setup.bootstrap()
    setup.refresh(full)
    net.relays = [FakeRelay(n) for n in range(1000, 1200)]
    net.valid_after += 60
    # What has no room is in the next pass, with the same consensus.
    directory = setup.refresh(lambda d: d.consensus.valid_after == net.valid_after)
    assert directory.table.short and len(directory.table) < 200
    directory = setup.refresh(lambda d: not d.table.short)
    assert len(directory.table) == usable(directory.table) == 200


def test_flash_that_is_full(net, tmp_path, on_flash, monkeypatch):
    def fail(*args):
        raise OSError(28, "no space")

    setup = Setup(tmp_path, net, [Mirror(net)])
    setup.bootstrap()
    setup.refresh(full)
    right = minitor.write_file
    monkeypatch.setattr(minitor, "write_file", fail)
    with pytest.raises(minitor.DirectoryError, match="cannot be written"):
        Setup(tmp_path / "other", net, [Mirror(net)]).bootstrap()
    net.valid_after += 60
    net.relays[0].policy = "accept 80,443"
    directory = setup.directory

    async def refresh():
        table, consensus = await directory._ask(directory._consensus_from)
        await directory._fill(table, consensus)

    with pytest.raises(minitor.DirectoryError, match="cannot be written"):
        asyncio.run(refresh())
    # The one in force is whole, and the next attempt succeeds.
    assert usable(directory.table) == 200 and len(directory.table) == 200
    monkeypatch.setattr(minitor, "write_file", right)
    asyncio.run(refresh())
    assert directory.consensus.valid_after == net.valid_after


def test_bad_directories_are_left(net, tmp_path):
    good = net.consensus()
    forged = good.replace(b"Bandwidth=1000", b"Bandwidth=9999", 1)
    minority = net.consensus(signers=net.authorities[:1])
    other = FakeNet(200)
    spoilt = []
    for body in (forged, minority, good[:5000], other.consensus(), b"", b"x" * 70000):
        spoilt.append({"consensus": answer(body)})
    spoilt.append({"consensus": answer(b"", "503 Busy")})
    spoilt.append({"consensus": b"nonsense"})
    spoilt.append({"keys": answer(b"", "404 Not found")})
    spoilt.append({"keys": answer(other.certs())})
    mirrors = []
    for spoil in spoilt:
        mirrors.append(Mirror(net))
        mirrors[-1].spoil = spoil
    setup = Setup(tmp_path, net, mirrors + [Mirror(net)])
    directory = setup.bootstrap()
    assert directory.consensus.valid_after == net.valid_after
    assert len(setup.mirrors) == 1 and all(m.asked for m in mirrors)


def test_no_good_directory(net, tmp_path):
    mirror = Mirror(net)
    mirror.spoil = {"consensus": answer(b"", "404 Not found")}
    with pytest.raises(minitor.DirectoryError, match="404"):
        Setup(tmp_path, net, [mirror]).bootstrap()
    assert [file.name for file in tmp_path.iterdir()] == ["torrc"]
    mirror.spoil = {"/micro/": answer(b"", "404 Not found")}
    with pytest.raises(minitor.DirectoryError, match="too few"):
        Setup(tmp_path, net, [mirror]).bootstrap()


def test_microdescriptors_are_checked_and_asked_for_again(net, tmp_path):
    mirror, tries = Mirror(net), []

    def first_bad(path):
        tries.append(path)
        if len(tries) <= 2:
            # Not what was asked for: another relay's keys.
            return answer(FakeRelay(5000).microdesc() * 10)
        mirror.spoil.clear()
        return mirror.serve(b"GET %s Accept-Encoding: " % path.encode())

    mirror.spoil = {"/micro/": first_bad}
    setup = Setup(tmp_path, net, [mirror])
    setup.bootstrap()
    directory = setup.refresh(full)
    assert FakeRelay(5000).ed_id not in directory.table.records


def test_a_wrong_clock(net, tmp_path):
    net.valid_after = int(time.time()) + 90000
    with pytest.raises(minitor.ClockError, match="behind"):
        Setup(tmp_path, net, [Mirror(net)]).bootstrap()
    net.valid_after = int(time.time()) - 100 * 3600
    with pytest.raises(minitor.DirectoryError, match="100 hours old"):
        Setup(tmp_path, net, [Mirror(net)]).bootstrap()
    # Within a day of its validity a consensus is still used.
    net.valid_after = int(time.time()) - 26 * 3600
    assert Setup(tmp_path, net, [Mirror(net)]).bootstrap().table


def test_a_wrong_clock_is_told_by_an_authority(net, tmp_path):
    """Only an authority is believed about the time, and by a consensus that is refused."""
    net.valid_after = int(time.time()) - 100 * 3600
    authority = network_of(tmp_path, net.torrc()).authorities[0][2]
    # Who says that his clock is how many minutes ahead; what we say then.
    for rsa_id, minutes, told in (
        (b"fallback".ljust(20), -6000, None),
        (authority, -59, None),
        (authority, -1860, "about 31 hours ahead: set it"),
        (authority, -60000, "about 41 days ahead"),
        (authority, 6000, "at least 4 days behind"),
    ):
        mirror = Mirror(net)
        circuit = mirror.circuit

        def telling():
            made = circuit()
            made.channel.rsa_id, made.channel.skew = rsa_id, minutes * 60
            return made

        mirror.circuit = telling
        setup = Setup(tmp_path, net, [Mirror(net), mirror])
        kind = minitor.ClockError if told else minitor.DirectoryError
        with pytest.raises(kind, match=told or "100 hours old"):
            setup.bootstrap()
        # After the first that said so, authorities are asked.
        assert setup.directory._failures >= 2 * minitor._TRIES
    # While the consensus can be used, no one asks about the clock.
    net.valid_after = int(time.time()) // 3600 * 3600
    assert Setup(tmp_path, net, [mirror]).bootstrap().table


def test_required_protocols(net, tmp_path, monkeypatch):
    text = net.unsigned().replace("Relay=2\n", "Relay=2,60 Strange=1\n", 1)
    mirror = Mirror(net)
    mirror.spoil = {"consensus": answer(net.consensus(text))}
    monkeypatch.setattr(minitor, "_RELEASED", net.valid_after)
    with pytest.raises(minitor.ConfigError, match="requires Relay=60 Strange=1"):
        Setup(tmp_path, net, [mirror]).bootstrap()
    # In a consensus from before the release that says nothing.
    monkeypatch.setattr(minitor, "_RELEASED", net.valid_after + 1)
    Setup(tmp_path, net, [mirror]).bootstrap()
    monkeypatch.setattr(minitor, "_RELEASED", net.valid_after)
    with pytest.raises(minitor.ConfigError):
        Setup(tmp_path, net, [mirror]).bootstrap()


def test_caches_that_are_no_good(net, tmp_path):
    setup = Setup(tmp_path, net, [Mirror(net)])
    setup.bootstrap()
    setup.refresh(full)
    path = tmp_path / "relays"
    good = path.read_bytes()
    for bad in (good[:-1], good[:70], b"", good[:5000] + b"x" + good[5001:]):
        path.write_bytes(bad)
        again = Setup(tmp_path, net, [Mirror(net)])
        assert again.bootstrap().table and again.progress[0][0] == 25
        assert len(path.read_bytes()) > 5000
    # One of another network is not looked at.
    path.write_bytes(good)
    other = FakeNet(30)
    again = Setup(tmp_path, other, [Mirror(other)])
    assert len(again.bootstrap().table) == 30


def test_an_old_cache_saves_microdescriptors(net, tmp_path, monkeypatch):
    setup = Setup(tmp_path, net, [Mirror(net)])
    setup.bootstrap()
    setup.refresh(full)
    # Two days later.
    later = int(time.time()) + 2 * 86400
    net.valid_after = later // 3600 * 3600
    monkeypatch.setattr(minitor, "now", lambda: later)
    for a in net.authorities:
        a.cert = a.certify(later + 10**6)
    again = Setup(tmp_path, net, [Mirror(net)])
    directory = again.bootstrap()
    assert directory.consensus.valid_after == net.valid_after
    assert not [p for p in again.mirrors[0].asked if "/micro/" in p]
    # While no one can be asked, nothing is lost.
    failing = Setup(tmp_path, net, [])
    assert failing.bootstrap().consensus.valid_after == net.valid_after


def test_refresh_goes_on_after_failures(net, tmp_path, monkeypatch):
    slept = []
    real_sleep = asyncio.sleep

    async def sleep(seconds):
        slept.append(seconds)
        await real_sleep(0)

    setup = Setup(tmp_path, net, [Mirror(net)])
    setup.bootstrap()
    setup.refresh(full)
    mirror = setup.mirrors[0]
    old, newer = net.valid_after - 3600, net.valid_after + 60
    counts = []

    def failing(path):
        counts.append(path)
        if len(counts) < 4:
            # Older than what is in use: not taken.
            net.valid_after = old
            return answer(net.consensus())
        mirror.spoil = {}
        net.valid_after = newer
        return answer(net.consensus())

    mirror.spoil = {"consensus": failing}
    monkeypatch.setattr(minitor.asyncio, "sleep", sleep)
    setup.directory._next_time = lambda: 0

    async def run():
        task = asyncio.ensure_future(setup.directory.refresh())
        for _ in range(3000):
            await real_sleep(0.001)
            if setup.directory.consensus.valid_after == newer:
                break
        task.cancel()

    asyncio.run(run())
    assert setup.directory.consensus.valid_after == newer
    waits = [s for s in slept if s]
    # Longer each time, and never in step with others.
    assert len(waits) == 3 and 30 <= waits[0] < 60 <= waits[1] < 120 <= waits[2] < 240


@pytest.mark.parametrize("frozen", [False, True])
def test_refresh_never_spins(net, tmp_path, monkeypatch, frozen):
    """Whatever the times: a consensus that is no newer is asked for less and less often."""
    net.valid_after = int(time.time()) - 20 * 3600
    setup = Setup(tmp_path, net, [Mirror(net)])
    directory = setup.bootstrap()
    monkeypatch.setattr(minitor, "_PAUSE_SECONDS", 5)
    mirror = setup.mirrors[0]
    if frozen:
        monkeypatch.setattr(minitor, "now", lambda: directory.consensus.valid_until + 1)
    slept, real_sleep = [], asyncio.sleep

    async def sleep(seconds):
        slept.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr(minitor.asyncio, "sleep", sleep)

    async def run():
        task = asyncio.ensure_future(directory.refresh())
        while len([s for s in slept if s]) < 10:
            await real_sleep(0.001)
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 20))
    waits = [s for s in slept if s]
    # By turns the pause before, and the wait after it was in vain.
    assert waits[:9:2] == [5] * 5 and 30 <= waits[1] < 60 <= waits[3] < 120 <= waits[5] < 240
    assert len([p for p in mirror.asked if "consensus" in p]) <= 7 and len(setup.updates) == 2


def test_schedule(net, tmp_path):
    directory = Setup(tmp_path, net, [Mirror(net)]).bootstrap()
    c = directory.consensus
    times = [directory._next_time() for _ in range(2000)]
    start = c.fresh_until + 45 * 60
    span = (c.valid_until - start) * 7 // 8
    assert min(times) >= start and max(times) < start + span < c.valid_until
    assert max(times) - min(times) > span * 0.9
    # A fast network: intervals of 20 seconds, and only one of them valid.
    c.fresh_until, c.valid_until = c.valid_after + 20, c.valid_after + 20
    assert c.valid_after < directory._next_time() < c.valid_until


def test_a_full_disk_is_no_reason_to_stop(net, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "no space")

    monkeypatch.setattr(minitor, "write_file", fail)
    assert Setup(tmp_path, net, [Mirror(net)]).bootstrap().table


# ── Which directory is asked ──


class FakeChannels:
    """Channels by address: an error, seconds until it opens, or None for at once."""

    def __init__(self, behaviour):
        self.behaviour, self.asked, self.seconds, self.open = behaviour, [], [], {}

    async def get(self, address, port, rsa_id, ed_id=None, seconds=None):
        self.asked.append(address)
        self.seconds.append(seconds)
        what = self.behaviour(address)
        if isinstance(what, Exception):
            raise what
        await asyncio.sleep(what)
        return address


class OneHop:
    made = []

    def __init__(self, channel):
        self.channel, self.closed = channel, False
        OneHop.made.append(self)

    async def extend(self, relay, seconds):
        await asyncio.sleep(0)

    def close(self):
        self.closed = True


def sources(monkeypatch, tmp_path, behaviour, fallbacks=3):
    monkeypatch.setattr(minitor, "Circuit", OneHop)
    OneHop.made = []
    line = "DirAuthority a orport=1 v3ident=%s authority%d:1 %s\n"
    text = "".join(line % ("%02x" % i * 20, i, "22" * 20) for i in range(2))
    progress = []
    network = network_of(tmp_path, text)
    network.fallbacks = [("fallback%d" % i, 1, bytes([i]) * 20) for i in range(fallbacks)]
    channels = FakeChannels(behaviour)
    report = lambda *args: progress.append(args[0])  # noqa: E731
    return minitor.Directory(network, str(tmp_path), channels, report), channels, progress


def ask(directory):
    """Return the circuit to the first directory that answers."""

    async def use(circuit):
        return circuit

    return asyncio.run(directory._ask(use))


REFUSED = minitor.ChannelError("relay x cannot be reached: refused")


def test_a_wrong_clock_is_told_by_expired_certificates(monkeypatch, tmp_path):
    """Together with what an authority, which they prove it to be, says the time is."""
    for who, skew, told in (
        ("fallback", -60, None),
        ("authority", -60, "about 60 hours ahead: set it"),
        ("authority", -6000, "about 250 days ahead"),
        ("authority", 0, None),
    ):

        def expired(address):
            place = [p for p in network.fallbacks + network.authorities if p[0] == address][0]
            if address.startswith(who):
                channel = SimpleNamespace(rsa_id=place[2], expired=True, skew=skew * 3600)
                channels.open[place[2]] = channel
            return minitor.ChannelError("its certificates have expired")

        directory, channels, _ = sources(monkeypatch, tmp_path, expired)
        network = directory.network
        kind = minitor.ClockError if told else minitor.DirectoryError
        with pytest.raises(kind, match=told or "certificates have expired"):
            ask(directory)


def test_fallbacks_before_authorities(monkeypatch, tmp_path):
    directory, channels, progress = sources(
        monkeypatch, tmp_path, lambda a: REFUSED if a.startswith("fallback") else 0
    )
    circuit = ask(directory)
    assert circuit.closed and circuit.channel == channels.asked[-1] and progress == [5]
    first, then = channels.asked[:8], channels.asked[8:]
    assert set(first) <= {"fallback0", "fallback1", "fallback2"} and len(set(first)) > 1
    assert len(then) == 1 and then[0] in ("authority0", "authority1")
    # A slow directory delays the others little; where all are slow, they get more and more.
    assert channels.seconds == [5, 5, 6, 6, 7, 7, 8, 8, 9]


def test_no_directory_at_all(monkeypatch, tmp_path):
    directory, channels, _ = sources(monkeypatch, tmp_path, lambda a: REFUSED)
    with pytest.raises(minitor.DirectoryError, match="refused"):
        ask(directory)
    assert len(channels.asked) == 12 and {a[:9] for a in channels.asked[8:]} == {"authority"}
    # Were they silent, the user would know after this time.
    assert sum(channels.seconds) <= 90


def test_directory_guards_come_first(monkeypatch, tmp_path):
    directory, channels, _ = sources(monkeypatch, tmp_path, lambda a: 0)
    relay, failed, good = SimpleNamespace(rsa_id=bytes(20), address="guard", port=1), [], []
    directory.paths = SimpleNamespace(
        guard=lambda **_: relay, failed=failed.append, succeeded=good.append
    )
    ask(directory)
    assert channels.asked == ["guard"] and good == [bytes(20)] and not failed
    # But one that fails is not asked for ever, and the guards hear of it.
    channels.behaviour, channels.asked = lambda a: REFUSED if a == "guard" else 0, []
    ask(directory)
    assert channels.asked[:4] == ["guard"] * 4 and channels.asked[4][:8] == "fallback"
    assert failed == [bytes(20)] * 4 and len(good) == 2

    # Nor is that it when there is no guard to ask.
    def none(**_):
        raise minitor.CircuitError("no entry guard is left")

    channels.asked, directory.paths.guard = [], none
    ask(directory)
    assert channels.asked[0][:8] == "fallback"


def test_a_board_asks_over_the_link_that_it_has(monkeypatch, tmp_path):
    """The guard of its circuits, unless what that has is too old."""
    directory, channels, _ = sources(monkeypatch, tmp_path, lambda a: 0)
    relay, asked, blamed = SimpleNamespace(rsa_id=bytes(20), address="guard", port=1), [], []
    directory.paths = SimpleNamespace(guard=lambda **how: asked.append(how) or relay,
                                      failed=blamed.append, succeeded=lambda rsa_id: None)
    directory._near = True
    ask(directory)
    assert asked == [{}]
    # Nor is another asked, or the guard blamed, where memory is what lacks.
    channels.behaviour, channels.asked = lambda a: minitor.NO_MEMORY, []
    with pytest.raises(minitor.MemoryShort):
        ask(directory)
    assert channels.asked == ["guard"]
    channels.behaviour, channels.asked = lambda a: REFUSED, []
    with pytest.raises(minitor.DirectoryError):
        ask(directory)
    assert channels.asked == ["guard"] * 4 == ["guard"] * len(blamed)
    directory._near = False
    channels.behaviour = lambda a: 0
    ask(directory)
    assert asked[-1] == {"kind": "dir-guards", "use": 3}


def test_a_directory_that_falls_silent(net, tmp_path, monkeypatch):
    monkeypatch.setattr(minitor, "_FETCH_SECONDS", 1)
    silent, mirror = Mirror(net), Mirror(net)

    class Silent(FakeCircuit):
        async def open_stream(self, command, body, seconds):
            stream = FakeStream(self.mirror.serve)
            read = stream.read

            async def stall(n):
                if len(stream.answer) < 3000:
                    await asyncio.sleep(100)
                return await read(n)

            stream.read = stall
            return stream

    silent.circuit = lambda: Silent(silent)
    setup = Setup(tmp_path, net, [silent, mirror])
    assert setup.bootstrap().table and silent.asked and mirror.asked
