"""Sections 13b to 16 without a network: sharing, keys on disk, introductions, ports, refusals."""

import asyncio
import os
import stat
from pathlib import Path

import pytest

import minitor


def ed_public(seed):
    return minitor.ed25519_public(minitor.ed25519_expand(seed))


class Thing(minitor.Record):
    private = False

    def __init__(self, **fields):
        self.__dict__.update(fields)


class Consensus:
    params = {}
    valid_after, fresh_until = 1460545200, 1460548800
    srv_current, srv_previous = b"c" * 32, b"p" * 32

    def param(self, name, default, low=0, high=1 << 31):
        return self.params.get(name, default)


class Circuit:
    """What the onion sections see of a circuit; `answers`: what `ask` returns, in turn."""

    def __init__(self, answers=()):
        self.closing, self.on_control, self.on_begin = minitor.Promise(), {}, None
        self.streams, self.kh, self.sent = {}, b"k" * 20, []
        self.path, self.answers, self.keys = [], list(answers), None
        self.promises, self.since = [], minitor.ticks_ms()

    @property
    def closed(self):
        return self.closing.done()

    def close(self):
        self.closing.set()

    async def ask(self, command, body, expected, seconds):
        self.sent.append((command, body))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def expect(self, command):
        self.promises.append((command, minitor.Promise()))
        if self.answers:
            self.promises[-1][1].set(self.answers.pop(0))
        return self.promises[-1][1]

    def send(self, command, stream_id, body):
        self.sent.append((command, body))

    def add_onion_hop(self, keys, service=False, vegas=None):
        self.keys, self.vegas = (keys, service), vegas


class Stream:
    def __init__(self, circuit):
        self.circuit, self.log = circuit, []

    def accept(self):
        self.log.append("accept")

    def send_end(self, reason):
        self.log.append(reason)

    def close(self):
        self.log.append("close")


def fake_tor(testing=False, **fields):
    network = Thing(testing=testing)
    turns = {"turn": minitor.Turn(), "moment": minitor.Turn()}
    directory = Thing(consensus=Consensus(), network=network, table=None, **turns)
    caches = {"descriptors": {}}
    paths = Thing(param=directory.consensus.param, updates=0, online=1 << 40,
                  excluded=lambda relay: False)
    return Thing(directory=directory, paths=paths, onion_keys={}, **caches, **fields)


@pytest.fixture
def service(tmp_path):
    """Return a service with one introduction point, as it is after publishing."""
    tor = fake_tor()
    service = minitor.OnionService(tor, str(tmp_path / "key"), {80: 8080})
    intro = Thing(cookies=bytearray(), left=100, circuit=True, rsa_id=b"i" * 20)
    intro.auth_key = ed_public(b"a" * 32)
    intro.b = b"q" * 32
    intro.enc_key = minitor.x25519(intro.b)
    service.intros.append(intro)
    service._periods = [(0, b"", b"", b"s" * 32, {})]
    service.built = []

    async def circuit_to(target=None, attempts=None):
        service.built.append((target, attempts))
        return Circuit()

    tor.circuit_to = circuit_to
    return service


def introduce(service, cookie=b"c" * 20, address="11.22.33.44"):
    place = bytes(map(int, address.split("."))) + b"\x23\x29"
    specifiers = b"\3\0\6" + place + b"\2\x14" + b"r" * 20 + b"\3\x20" + b"e" * 32
    relay = Thing(specifiers=specifiers, ntor_key=minitor.x25519(b"n" * 32))
    return minitor.hs_ntor_client(service.intros[0], b"s" * 32, cookie, relay)


# ─── keys on disk ───


def test_new_key(tmp_path):
    folder = tmp_path / "a" / "b"
    esk, public = minitor.load_service_key(str(folder))
    secret = (folder / "hs_ed25519_secret_key").read_bytes()
    assert secret == b"== ed25519v1-secret: type0 ==\0\0\0" + esk and len(secret) == 96
    assert (folder / "hs_ed25519_public_key").read_bytes() == (
        b"== ed25519v1-public: type0 ==\0\0\0" + public
    )
    assert (folder / "hostname").read_text() == minitor.onion_address(public) + "\n"
    assert stat.S_IMODE(os.stat(str(folder)).st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert minitor.load_service_key(str(folder)) == (esk, public)
    signature = minitor.ed25519_sign(esk, public, b"m")
    assert minitor.ed25519_verify(public, b"m", signature)


@pytest.mark.parametrize("content", [b"", b"x" * 96, b"== ed25519v1-secret: type0 ==\0\0\0" + bytes(63)])
def test_bad_key_is_kept(tmp_path, content):
    path = tmp_path / "hs_ed25519_secret_key"
    path.write_bytes(content)
    with pytest.raises(minitor.ConfigError, match="no key"):
        minitor.load_service_key(str(tmp_path))
    assert path.read_bytes() == content


def test_unreadable_key_is_kept(tmp_path):
    (tmp_path / "hs_ed25519_secret_key").mkdir()
    with pytest.raises(minitor.ConfigError, match="cannot be read"):
        minitor.load_service_key(str(tmp_path))
    assert (tmp_path / "hs_ed25519_secret_key").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(minitor.ConfigError):
        minitor.load_service_key(str(tmp_path / "file"))


def test_clients_of_a_service(tmp_path, capsys):
    folder, key = tmp_path / "authorized_clients", minitor.x25519(b"c" * 32)

    def clients(given=None):
        return minitor.OnionService(fake_tor(), str(tmp_path), {}, given).clients

    assert clients() == [] and stat.S_IMODE(folder.stat().st_mode) == 0o700
    good = minitor.auth_text(key)
    texts = {
        "a.auth": " %s \r\n" % good, "b.auth": "", "c.auth": good[:-1], "d.auth": good + "A",
        "e.auth": "x:" + good, "f.auth": good.replace("x25519", "x448"), ".auth": good,
        "g.auth": good + "\n" + good, "h.auth": minitor.auth_text(bytes(32)), "bob": good,
        "i.auth~": good, "j.auth": "stealth:x25519:" + good[18:]}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "k.auth").mkdir()
    assert clients() == [key]
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 12 and all("/authorized_clients/" in line for line in warned)
    other = minitor.x25519(b"d" * 32)
    assert clients([other, good]) == [other, key]
    # As tor: what is not understood admits everybody.  It is said.
    (folder / "a.auth").unlink()
    assert clients() == [] and "everybody is admitted" in capsys.readouterr().err
    # But by no mistake of a program.
    for bad in ([], [b"x"], [bytes(32)], [good[:-1]]):
        with pytest.raises(minitor.ConfigError):
            clients(bad)


def test_a_board_admits_nobody_by_mistake(tmp_path, monkeypatch):
    """A folder of a host's that restricts its service is not read there, and not passed over."""
    if "if MICROPYTHON" not in Path(minitor.__file__).read_text("latin-1"):
        pytest.skip("a build is for one runtime")
    monkeypatch.setattr(minitor, "MICROPYTHON", True)
    assert minitor.OnionService(fake_tor(), str(tmp_path), {}).clients == []
    (tmp_path / "authorized_clients").mkdir()
    with pytest.raises(minitor.ConfigError, match="authorized_clients"):
        minitor.OnionService(fake_tor(), str(tmp_path), {})
    key = minitor.x25519(b"c" * 32)
    assert minitor.OnionService(fake_tor(), str(tmp_path), {}, [key]).clients == [key]


@pytest.mark.parametrize("target", ["127.0.0.1:80", "http://x", 1.5, ("host",), None, b"unix:/x"])
def test_bad_target(tmp_path, target):
    with pytest.raises(minitor.ConfigError, match="no target"):
        minitor.OnionService(fake_tor(), str(tmp_path), {80: target})


# ─── introductions ───


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def test_introduction(service):
    async def main():
        body, finish = introduce(service)
        service._introduced(service.intros[0], body)
        await settle()
        assert len(service.circuits) == 1
        target, attempts = service.built[0]
        assert (target.rsa_id, attempts) == (b"r" * 20, 2)
        circuit = service.circuits[0]
        command, answer = circuit.sent[0]
        assert command == minitor.RENDEZVOUS1 and answer[:20] == b"c" * 20
        keys = finish(answer[20:])
        assert circuit.keys == (keys, True) and circuit.on_begin
        circuit.close()
        service._tidy()
        assert service.circuits == []

    asyncio.run(main())


def test_introductions_refused(service):
    async def main():
        intro = service.intros[0]
        body, _ = introduce(service)
        service._introduced(intro, body)
        await settle()
        assert intro.left == 99
        # The same again, the same cookie from somewhere else, garbage.
        for bad in (body, introduce(service)[0], b"", body[:-1] + b"\0"):
            service._introduced(intro, bad)
            await settle()
        assert len(service.built) == 1

    asyncio.run(main())


def test_on_a_board_one_answers_at_a_time_and_not_while_a_consensus_is_judged(service):
    """There is no memory for both; who waits is answered then."""

    async def main():
        moment, gate = asyncio.Lock(), asyncio.Event()
        service.tor.directory.moment = moment
        right = service.tor.circuit_to

        async def circuit_to(target=None, attempts=None):
            circuit = await right(target, attempts)
            await gate.wait()
            return circuit

        service.tor.circuit_to = circuit_to
        await moment.acquire()
        for n in range(3):
            service._introduced(service.intros[0], introduce(service, bytes([n]) * 20)[0])
        await settle()
        assert service.built == [] and service.intros[0].left == 100
        moment.release()
        await settle()
        assert len(service.built) == 1
        gate.set()
        await settle()
        assert len(service.built) == len(service.circuits) == 3 and not moment.locked()
        # What comes to nothing gives way, too.
        service._introduced(service.intros[0], b"")
        await settle()
        assert not moment.locked()

    asyncio.run(main())


def test_rate_limit(service):
    async def main():
        service.rate, service._tokens = 1, 3
        for n in range(10):
            service._introduced(service.intros[0], introduce(service, bytes([n]) * 20)[0])
            await settle()
        assert len(service.built) == 3

    asyncio.run(main())


def test_full_service_closes_an_idle_circuit(service, monkeypatch):
    async def main():
        monkeypatch.setattr(minitor, "_MAX_TASKS", 3)
        for n in range(3):
            service._introduced(service.intros[0], introduce(service, bytes([n]) * 20)[0])
            await settle()
        first, second, third = service.circuits
        first.streams = {1: None}
        service._introduced(service.intros[0], introduce(service, b"x" * 20)[0])
        await settle()
        assert second.closed and not first.closed and len(service.circuits) == 3
        for circuit in service.circuits:
            circuit.streams = {1: None}
        service._introduced(service.intros[0], introduce(service, b"y" * 20)[0])
        await settle()
        assert len(service.built) == 4

    asyncio.run(main())


def test_past_the_budget_nothing_begins(service, monkeypatch):
    """Introductions are dropped, streams refused, and who has one keeps it."""

    async def main():
        for n in range(2):
            service._introduced(service.intros[0], introduce(service, bytes([n]) * 20)[0])
            await settle()
        first, second = service.circuits
        first.streams = {1: None}
        monkeypatch.setattr(minitor, "crowded", lambda: True)
        relieved = []
        monkeypatch.setattr(minitor, "relieve", lambda circuits, still: relieved.append(still))
        stream = Stream(first)
        await service._begin(stream, 80)
        assert stream.log == [minitor.END_RESOURCELIMIT] and not first.closed
        # An idle circuit makes room for one that is wanted; then there is none.
        service._introduced(service.intros[0], introduce(service, b"x" * 20)[0])
        await settle()
        assert second.closed and len(service.circuits) == 2 and len(service.built) == 3
        service.circuits[-1].streams = {1: None}
        service._introduced(service.intros[0], introduce(service, b"y" * 20)[0])
        await settle()
        assert len(service.built) == 3 and relieved == [minitor.STILL_MS] * 3
        monkeypatch.setattr(minitor, "crowded", lambda: False)
        service._introduced(service.intros[0], introduce(service, b"z" * 20)[0])
        await settle()
        assert len(service.built) == 4

    asyncio.run(main())


# ─── streams ───


def test_ports(service, monkeypatch):
    sleep = asyncio.sleep

    slept = []

    async def short(seconds):
        slept.append(seconds)
        await sleep(0)

    async def main():
        async def handler(reader, writer):
            seen.append(reader is writer)

        async def broken(reader, writer):
            raise ValueError("of the handler")

        monkeypatch.setattr(minitor.asyncio, "sleep", short)
        seen = []
        slept.clear()
        service.ports.update({81: handler, 82: broken, 83: ("127.0.0.1", 1)})
        for port, expected, closed in (
            (79, [minitor.END_DONE], True),
            (81, ["accept", "close"], False),
            (82, ["accept", minitor.END_CONNECTREFUSED], False),
            (83, [minitor.END_CONNECTREFUSED], False),
        ):
            circuit = Circuit()
            stream = Stream(circuit)
            await service._begin(stream, port)
            assert (stream.log, circuit.closed) == (expected, closed), port
            assert bool(slept) == closed
            slept.clear()
        assert seen == [True]
        circuit = Circuit()
        circuit.streams = {n: None for n in range(600)}
        stream = Stream(circuit)
        await service._begin(stream, 81)
        assert stream.log == [minitor.END_RESOURCELIMIT]

    asyncio.run(main())


# ─── the client ───


def meet(answer):
    """Run `_introduce` with that INTRODUCE_ACK: (rendezvous circuit, introduction circuit)."""
    intro = Thing(auth_key=ed_public(b"a" * 32), address="11.22.33.44", private=False)
    intro.b, intro.enc_key = b"q" * 32, minitor.x25519(b"q" * 32)
    rend, introducing = Circuit([b""]), Circuit([answer])
    specifiers = b"\3\0\6\x0b\x16\x21\x2c\x23\x29\2\x14" + b"r" * 20 + b"\3\x20" + b"e" * 32
    relay = Thing(specifiers=specifiers, ntor_key=minitor.x25519(b"n" * 32))
    rend.path = [relay]

    async def circuit_to(target=None):
        assert target in (None, intro)
        return introducing if target else rend

    async def main():
        descriptor = Thing(subcred=b"s" * 32, flow=31)
        tor = fake_tor(circuit_to=circuit_to)
        task = asyncio.ensure_future(minitor._introduce(tor, descriptor, intro))
        await settle()
        if introducing.sent:
            body = introducing.sent[0][1]
            target, cookie, reply, _ = minitor.hs_ntor_service(intro, [b"s" * 32], body)
            assert target.flow
            assert rend.sent == [(minitor.ESTABLISH_RENDEZVOUS, cookie)]
            rend.promises[1][1].set(reply[20:])
        return await task

    try:
        return asyncio.run(main()), rend, introducing
    except minitor.TorError as e:
        return e, rend, introducing


def test_client_meets_service():
    result, rend, introducing = meet(b"\0\0\0")
    assert result is rend and introducing.closed and not rend.closed
    assert len(rend.keys[0]) == 128 and rend.keys[1] is False
    # RENDEZVOUS2 was expected before INTRODUCE1 went out.
    expected = [minitor.RENDEZVOUS_ESTABLISHED, minitor.RENDEZVOUS2]
    assert [command for command, _ in rend.promises] == expected


@pytest.mark.parametrize(
    "answer,error", [(b"\0\1\0", minitor.ProtocolError), (b"", minitor.ProtocolError),
                     (minitor.CircuitError("gone"), minitor.CircuitError),
                     (minitor.CircuitError("silent", 10), minitor.OnionError)]
)
def test_client_is_refused(answer, error):
    result, rend, introducing = meet(answer)
    assert result.reason == 0xF7 * (error is minitor.OnionError)
    assert isinstance(result, error) and rend.closed and introducing.closed and not rend.keys


def test_streams_share_one_attempt(monkeypatch, tmp_path):
    built, opened = [], []
    keys = {name: ed_public(name.encode() * 32) for name in "kob"}

    async def fake_meet(tor, key):
        built.append(key)
        await asyncio.sleep(0.01)
        if key == keys["b"]:
            raise minitor.OnionError("down")
        circuit = Circuit()

        async def open_stream(command, body, seconds):
            assert (command, body) == (minitor.BEGIN, minitor.begin("", port_of(body)))
            opened.append((circuit, port_of(body)))
            if failures:
                raise failures.pop(0)
            return len(opened)

        circuit.open_stream = open_stream
        return circuit

    def port_of(body):
        return minitor.parse_begin(body)

    monkeypatch.setattr(minitor, "meet", fake_meet)
    failures = []

    async def main():
        tor = minitor.AsyncTor(str(tmp_path))
        connect = lambda key, port: tor.open_connection(minitor.onion_address(keys[key]), port)
        await asyncio.gather(*[connect("k", 80 + n) for n in range(5)])
        assert len(set([c for c, _ in opened])) == 1 and built == [keys["k"]]
        assert [port for _, port in opened] == [80, 81, 82, 83, 84]
        opened[0][0].close()
        await connect("k", 80)
        assert opened[5][0] is not opened[0][0]
        # One that gives up leaves the attempt to the others.
        first = asyncio.ensure_future(connect("o", 80))
        second = asyncio.ensure_future(connect("o", 80))
        await asyncio.sleep(0)
        first.cancel()
        assert await second and built.count(keys["o"]) == 1
        for _ in range(2):
            with pytest.raises(minitor.OnionError, match="down"):
                await connect("b", 80)
        assert built[-2:] == [keys["b"]] * 2 and len(tor._shared) <= 3
        # A service that refuses is not met again, one that falls silent is.
        before = len(built)
        failures.append(minitor.StreamError("refused", 3))
        with pytest.raises(minitor.StreamError, match="refused"):
            await connect("o", 80)
        assert len(built) == before
        failures.append(minitor.StreamError("silent", minitor.END_TIMEOUT))
        await connect("o", 80)
        assert built[before:] == [keys["o"]] and opened[-1][0] is not opened[-2][0]

    asyncio.run(main())


def test_descriptors_are_kept(monkeypatch):
    asked, broken = [], []

    async def hsdir_request(tor, relay, path):
        asked.append(relay)
        if relay in broken:
            raise minitor.DirectoryError("answers 404")
        return b""

    found = lambda *_: Thing(until=minitor.now() + 60, intro_points=[])
    monkeypatch.setattr(minitor, "hsdir_request", hsdir_request)
    monkeypatch.setattr(minitor, "parse_descriptor", found)
    monkeypatch.setattr(minitor, "hsdir_ring", lambda *_: [1, 2, 3])

    async def main():
        tor, key = fake_tor(), ed_public(b"k" * 32)
        tor.directory.table = Thing(rsa_id=lambda i: i)
        first = await minitor._find_descriptor(tor, key)
        assert await minitor._find_descriptor(tor, key) is first and len(asked) == 1
        first.until = 0
        broken[:] = [1, 2]
        assert await minitor._find_descriptor(tor, key) is not first
        assert asked[-1] == 3
        monkeypatch.setattr(minitor, "_MAX_DESCRIPTORS", 4)
        for n in range(9):
            await minitor._find_descriptor(tor, ed_public(bytes([n]) * 32))
            assert len(tor.descriptors) <= 4
        broken.append(3)
        with pytest.raises(minitor.DescriptorError, match="404"):
            await minitor._find_descriptor(tor, ed_public(b"u" * 32))

    asyncio.run(main())


def test_a_descriptor_that_takes_a_key(monkeypatch):
    asked, given, key = [], [], ed_public(b"k" * 32)

    async def hsdir_request(tor, relay, path):
        asked.append(relay)
        return b"text"

    def parse(text, blinded, subcred, when, secret):
        given.append(secret)
        if secret != b"s" * 32:
            raise minitor.AuthorizationError("takes a key", 0xF5 if secret else 0xF4)
        return Thing(until=when + 60, intro_points=[])

    monkeypatch.setattr(minitor, "hsdir_request", hsdir_request)
    monkeypatch.setattr(minitor, "parse_descriptor", parse)
    monkeypatch.setattr(minitor, "hsdir_ring", lambda *_: [1, 2, 3])
    seen = []
    monkeypatch.setattr(minitor, "announce", lambda *what: seen.append(what[2]))

    async def main():
        tor = minitor.AsyncTor("/none")
        tor.directory.consensus, tor.directory.table = Consensus(), Thing(rsa_id=lambda i: i)
        tor.paths = Thing(excluded=lambda relay: False)
        address = minitor.onion_address(key)
        # No other directory would have another answer, and waiting would not help.
        for secret, reason in ((None, 0xF4), (b"w" * 32, 0xF5)):
            tor.add_onion_key(address, secret)
            with pytest.raises(minitor.AuthorizationError, match=address) as caught:
                await minitor.meet(tor, key)
            assert caught.value.reason == reason and given[-1] == secret
        assert len(asked) == 2 and seen == ["REQUESTED", "RECEIVED"] * 2
        # Now what was fetched can be read.
        assert tor.add_onion_key("http." + address, b"s" * 32) is True
        assert (await minitor._find_descriptor(tor, key)).intro_points == [] and len(asked) == 2
        tor.add_onion_key(address, None)
        assert tor.descriptors == tor.onion_keys == {}
        assert tor.add_onion_key(address, minitor.auth_text(b"s" * 32)) is False
        await minitor._find_descriptor(tor, key)
        assert len(asked) == 3
        for bad in (b"", "x", bytes(32)):
            with pytest.raises(minitor.ConfigError):
                tor.add_onion_key(address, bad)
        with pytest.raises(minitor.AddressError):
            tor.add_onion_key("example.org", b"s" * 32)

    asyncio.run(main())


def test_what_cannot_be_read_fills_no_memory():
    tor = minitor.AsyncTor("/none")
    for n in range(100):
        tor.keep_sealed(b"%d" % n, (b"", b"", b""))
        assert len(tor._sealed) < 10
    tor.newnym()
    assert not tor._sealed


# ─── introduction points and publishing ───


class Table:
    """Relays by number; the RSA identity of each is its number, twenty times."""

    gone = frozenset()

    def __init__(self, count):
        self.count = count

    def find(self, rsa_id):
        return -1 if rsa_id[0] in self.gone else rsa_id[0]

    def rsa_id(self, i):
        return bytes([i]) * 20

    def relay(self, i):
        key = minitor.x25519(b"n" * 32)
        return Thing(rsa_id=self.rsa_id(i), index=i, address="11.22.33.%d" % i, ed_id=b"e" * 32,
                     port=9001, ntor_key=key, specifiers=b"")


@pytest.fixture
def published(service, monkeypatch):
    """A service on a network of 20 relays; `posts`: (directory, introduction points)."""
    table, clock, sleep = Table(20), [0], asyncio.sleep
    service.intros.clear()
    service.posts, service.refusing, service.clock = [], set(), clock
    service.tor.directory.table = table

    def pick(role, accept, flags):
        assert (role, flags) == ("intro", minitor.STABLE)
        found = [i for i in range(20) if i not in table.gone | tried and accept(i)]
        if not found:
            raise minitor.CircuitError("no relay fits")
        tried.add(found[0])
        return found[0]

    tried = service.tried = set()

    service.tor.paths.pick = pick
    service.tor.services = [service]
    monkeypatch.setattr(minitor, "distinct", lambda table, i, j: i != j)
    monkeypatch.setattr(minitor, "hsdir_ring", lambda *_: [15, 16, 17])
    monkeypatch.setattr(minitor, "now", lambda: 1460545200 + clock[0])
    write = lambda file, *args: file.write(bytes([i.rsa_id[0] for i in args[4]]))
    monkeypatch.setattr(minitor, "make_descriptor", write)

    async def circuit_to(target, attempts=None):
        if target.rsa_id[0] in service.refusing:
            raise minitor.CircuitError("refused")
        service.built.append(Circuit([b""]))
        service.built[-1].path = [target]
        return service.built[-1]

    async def hsdir_request(tor, rsa_id, path, file):
        if rsa_id[0] in service.refusing:
            raise minitor.DirectoryError("refused")
        service.posts.append((rsa_id[0], sorted(file.getvalue())))

    async def fast(seconds):
        clock[0] += 1 if seconds else 0
        await sleep(0)

    service.tor.circuit_to = circuit_to
    monkeypatch.setattr(minitor, "hsdir_request", hsdir_request)
    monkeypatch.setattr(minitor.asyncio, "sleep", fast)

    async def run(ticks):
        for _ in range(ticks):
            await sleep(0)

    service.tick = run
    return service


def live(service):
    return sorted([c.path[0].rsa_id[0] for c in service.built if not c.closed])


def test_publishing(published):
    async def main():
        await asyncio.wait_for(published.start(), 5)
        # Both periods, each at three directories.
        assert sorted(published.posts) == sorted([(d, [0, 1, 2]) for d in (15, 16, 17)] * 2)
        await published.tick(100)
        assert len(published.posts) == 6
        # Again after one to two hours.
        published.clock[0] += 7201
        await published.tick(100)
        assert len(published.posts) == 12
        # A new directory gets it, the others need not.
        published.tor.paths.updates += 1
        minitor.hsdir_ring = lambda *_: [15, 16, 18]
        await published.tick(100)
        assert published.posts[12:] == [(18, [0, 1, 2])] * 2
        # One that refuses is asked again, the others are not.
        published.refusing, published.clock[0] = {18}, published.clock[0] + 7201
        await published.tick(10)
        published.refusing = set()
        await published.tick(100)
        assert sorted(published.posts[14:]) == sorted([(d, [0, 1, 2]) for d in (15, 16, 18)] * 2)
        await published.close()
        await published.tick(10)
        assert live(published) == [] and published.tor.services == []

    asyncio.run(main())


def test_who_is_admitted_no_more_loses_the_introduction_points(published, monkeypatch):
    alice, bob, carol = [minitor.x25519(bytes([n]) * 32) for n in (1, 2, 3)]
    given = []
    write = lambda file, *args: given.append(args[7]) or file.write(
        bytes([i.rsa_id[0] for i in args[4]]))
    monkeypatch.setattr(minitor, "make_descriptor", write)

    async def change(clients, intros):
        del published.posts[:], given[:]
        published.admit(clients)
        await published.tick(300)
        assert given[-1] == clients and live(published) == intros
        assert {tuple(held) for _, held in published.posts[-6:]} == {tuple(intros)}

    async def main():
        monkeypatch.setattr(published, "clients", [alice])
        await asyncio.wait_for(published.start(), 5)
        assert given == [[alice]] * 2
        published.admit([alice])
        await published.tick(100)
        assert len(published.posts) == 6
        await change([alice, bob], [0, 1, 2])
        assert len(published.posts) == 6
        # Bob, and then everybody, had read where to introduce oneself.
        await change([alice, carol], [3, 4, 5])
        published.clock[0] += 300
        await change([], [3, 4, 5])
        await change([alice], [6, 7, 8])
        await published.close()

    asyncio.run(main())


def test_on_a_board_publishing_waits_for_its_turn(published):
    """While the directory is refreshed there is no memory for it."""

    async def main():
        turn = published.tor.directory.turn = asyncio.Lock()
        await turn.acquire()
        task = asyncio.ensure_future(published.start())
        await published.tick(200)
        assert published.posts == [] and not task.done()
        turn.release()
        await asyncio.wait_for(task, 5)
        assert len(published.posts) == 6 and not turn.locked()
        await published.close()

    asyncio.run(main())


def test_periods_that_are_over_are_forgotten(published):
    """Memory is the same after any number of time periods, and each is published once."""

    async def main():
        await asyncio.wait_for(published.start(), 5)
        for n in range(1, 7):
            consensus = published.tor.directory.consensus
            consensus.valid_after += 86400
            consensus.fresh_until += 86400
            published.tor.paths.updates += 1
            due = {t for _, _, _, _, directories in published._periods
                   for t in directories.values()}
            await published.tick(100)
            # The newer of the two periods is the older one now.
            assert len(published.posts) == 6 + 3 * n
            periods = published._periods
            assert len(periods) == 2 and [len(period[4]) for period in periods] == [3, 3]
            assert due & set(periods[0][4].values())
        await published.close()

    asyncio.run(main())


def test_published_is_what_both_periods_have(published, monkeypatch):
    """Clients look for one of them: where no directory of it answers, nobody finds the service."""

    async def main():
        places = minitor.descriptor_place

        def place(tor, key, n):
            found = places(tor, key, n)
            return found[:4] + ({bytes([n]) * 20: 0},)

        monkeypatch.setattr(minitor, "descriptor_place", place)
        published.refusing = {1}
        task = asyncio.ensure_future(published.start())
        await published.tick(200)
        assert [d for d, _ in published.posts] == [0] and not task.done()
        published.refusing = set()
        await published.tick(200)
        assert task.done() and [d for d, _ in published.posts] == [0, 1]
        await published.close()

    asyncio.run(main())


def test_without_memory_publishing_goes_on(published, monkeypatch):
    """The next attempt makes good what one allocation that failed prevented."""

    async def main():
        make, failures = minitor.make_descriptor, [MemoryError(), None, MemoryError()]

        def failing(*args):
            error = failures.pop(0) if failures else None
            if error:
                raise error
            make(*args)

        monkeypatch.setattr(minitor, "make_descriptor", failing)
        await asyncio.wait_for(published.start(), 5)
        assert sorted(published.posts) == sorted([(d, [0, 1, 2]) for d in (15, 16, 17)] * 2)
        assert published.clock[0] < 200
        await published.close()

    asyncio.run(main())


@pytest.mark.parametrize("why", ["time", "count", "consensus"])
def test_rotation_makes_the_new_one_first(published, why):
    """An introduction point whose time is over stays until the descriptor names another."""

    async def main():
        await asyncio.wait_for(published.start(), 5)
        old = published.intros[1]
        published.refusing = set(range(3, 20))
        if why == "time":
            old.until = 0
        elif why == "count":
            old.left = 0
        else:
            published.tor.directory.table.gone = {1}
            published.tor.paths.updates += 1
        # No other can be had, and then no directory reached: it stays.
        while len(published.tried) < 20:
            await published.tick(10)
        await published.tick(60)
        assert live(published) == [0, 1, 2]
        published.refusing = {15, 16, 17}
        published.clock[0] += 300
        published.tried.clear()
        await published.tick(200)
        assert live(published) == [0, 1, 2, 3] and old.circuit
        published.refusing = set()
        await published.tick(200)
        assert live(published) == [0, 2, 3] and old not in published.intros
        assert published.posts[-1][1] == [0, 2, 3]
        await published.close()

    asyncio.run(main())


def test_lost_introduction_circuit(published):
    async def main():
        await asyncio.wait_for(published.start(), 5)
        keys = [i.auth_key for i in published.intros]
        published.built[0].close()
        await published.tick(100)
        # The same point with the same keys: the descriptor is still right.
        assert live(published) == [0, 1, 2] and keys == [i.auth_key for i in published.intros]
        assert len(published.posts) == 6
        published.refusing = {0}
        published.built[3].close()
        await published.tick(300)
        assert live(published) == [1, 2, 3] and published.posts[-1][1] == [1, 2, 3]
        # Ten circuits in five minutes, then it has to wait.
        published.refusing, published.clock[0] = set(), published.clock[0] + 301
        published.tried.clear()
        start, before = published.clock[0], len(published.built)
        while published.clock[0] < start + 290:
            for circuit in published.built:
                circuit.close()
            await published.tick(5)
        assert len(published.built) - before <= 10
        await published.close()

    asyncio.run(main())


@pytest.mark.parametrize("why", ["network", "memory"])
def test_an_outage_costs_no_introduction_point(published, why):
    """Without a network, or memory, for a while: then the same points work again, at once."""

    async def main():
        await asyncio.wait_for(published.start(), 5)
        keys, circuit_to = [i.auth_key for i in published.intros], published.tor.circuit_to
        tried = []

        async def fails(target, attempts=None):
            tried.append(target)
            raise MemoryError if why == "memory" else minitor.CircuitError("unreachable")

        published.tor.circuit_to = fails
        published.tor.paths.online = 0 if why == "network" else 1 << 40
        for circuit in published.built:
            circuit.close()
        end = published.clock[0] + (5 if why == "memory" else 400)
        while published.clock[0] < end:
            await published.tick(1)
        assert len(tried) >= 3
        published.tor.circuit_to, published.tor.paths.online = circuit_to, 1 << 40
        while len(live(published)) < 3:
            await published.tick(1)
            assert published.clock[0] < end + 40
        assert keys == [i.auth_key for i in published.intros]
        await published.close()

    asyncio.run(main())


# ─── circuits ───


class Core(minitor.AsyncTor):
    """An AsyncTor whose circuits are made of nothing."""

    def __init__(self):
        self.directory = Thing(network=Thing(testing=False), table=Thing(
            find=lambda rsa_id: rsa_id[0], exit_allows=lambda i, port: port < 1000))
        self._shared, self._spares, self._tasks = {}, [], []
        self.proxies, self.wanted, self._exits, self._opening = [], {}, [], 0
        self.ready, self.bridges = True, None
        self.dirty_ms, self.build_times = minitor.DIRTY_MS, minitor.BuildTimes("/nowhere")
        self.log, self.down, self.gate = [], set(), None

        def failed(rsa_id, hop):
            self.doubts.append(rsa_id) if hop else self.log.append(("failed", rsa_id[0]))

        self.paths = Thing(failed=failed, param=lambda name, default=0, *_: default,
                           succeeded=lambda i: self.log.append(("succeeded", i[0])) or True)
        self.doubts = []
        self.paths.onion_path = lambda target=None: [
            self.relay(i) for i in (1, 2, 3)] + ([target] if target else [])
        self.paths.exit_path = lambda port: [self.relay(i) for i in (1, 2, port % 100)]

        async def get(address, port, rsa_id, ed_id):
            if rsa_id[0] in self.down:
                raise minitor.ChannelError("down")
            return Thing(circuits={})

        self._channels = Thing(get=get)

    def relay(self, i):
        return Thing(rsa_id=bytes([i]) * 20, ed_id=b"", address="11.22.33.%d" % i, port=1)


@pytest.fixture
def core(monkeypatch):
    core = Core()
    core.made = []

    class Made(Circuit):
        def __init__(self, channel, window):
            Circuit.__init__(self)
            core.made.append(self)

        async def extend(self, relay, seconds):
            await asyncio.sleep(0)
            if relay.rsa_id[0] in core.down:
                self.close()
                raise minitor.CircuitError("no answer")
            self.path.append(relay)

    monkeypatch.setattr(minitor, "Circuit", Made)
    return core


def numbers(circuit):
    return [relay.rsa_id[0] for relay in circuit.path]


def test_circuits_are_tried_again(core):
    async def main():
        assert numbers(await core.circuit_to()) == [1, 2, 3]
        assert core.log == [("succeeded", 1)]
        assert numbers(await core.circuit_to(core.relay(9))) == [1, 2, 3, 9]
        for down, attempts, made in ((9, None, 3), (9, 2, 2), (2, None, 3), (1, None, 0)):
            core.down, core.made[:], core.log[:] = {down}, [], []
            with pytest.raises(minitor.CircuitError, match="no circuit"):
                await core.circuit_to(core.relay(9), attempts)
            assert len(core.made) == made and all([c.closed for c in core.made])
            assert ("failed", 1) in core.log if down == 1 else ("failed", 1) not in core.log
        core.down = set()
        core.made[:] = []
        task = asyncio.ensure_future(core.circuit_to())
        for _ in range(2):
            await asyncio.sleep(0)
        task.cancel()
        await settle()
        assert task.cancelled() and [c.closed for c in core.made] == [True]

    asyncio.run(main())


@pytest.mark.parametrize("error", [MemoryError(), minitor.MemoryShort("out of memory", 5)])
def test_want_of_memory_is_no_relays_fault(core, monkeypatch, error):
    async def main():
        async def extend(relay, seconds):
            raise error

        monkeypatch.setattr(minitor.Circuit, "extend", lambda self, *args: extend(*args))
        with pytest.raises(minitor.MemoryShort, match="no circuit could be built"):
            await core.circuit_to(core.relay(9), 2)
        assert not core.log and not core.doubts and all([c.closed for c in core.made])

    monkeypatch.setattr(minitor.asyncio, "sleep", lambda _, sleep=asyncio.sleep: sleep(0))
    asyncio.run(main())


def test_private_addresses_are_refused(core):
    """Onion services and their clients name relays to each other, but none in our network."""

    async def main():
        target = core.relay(9)
        target.address, target.private = "192.168.1.1", True
        with pytest.raises(minitor.CircuitError, match="private"):
            await core.circuit_to(target, 2)
        assert not core.made and not core.log
        core.directory.network.testing = True
        assert numbers(await core.circuit_to(target, 2)) == [1, 2, 3, 9]

    asyncio.run(main())


def test_spare_circuits(core):
    async def main():
        core._spares = [await core.circuit_to() for _ in range(2)]
        first, second = core._spares
        assert await core.circuit_to(core.relay(9)) is first
        assert numbers(first) == [1, 2, 3, 9]
        # A-B-A is not extended to; the guard is.
        third = await core.circuit_to(core.relay(3))
        assert third is not second and second.closed
        core._spares = [await core.circuit_to()]
        assert numbers(await core.circuit_to(core.relay(1))) == [1, 2, 3, 1]
        old = await core.circuit_to()
        old.since -= minitor.DIRTY_MS + 1
        core._spares = [old]
        assert await core.circuit_to() is not old and old.closed
        keeper = asyncio.ensure_future(core._keep_spares())
        await settle()
        assert len(core._spares) == minitor.SPARES
        keeper.cancel()

    asyncio.run(main())


def test_past_the_budget_no_stream_is_opened(core, monkeypatch):
    monkeypatch.setattr(minitor, "crowded", lambda: True)
    with pytest.raises(minitor.StreamError, match="out of memory") as e:
        asyncio.run(core.open_connection("example.com", 80))
    assert e.value.reason == minitor.END_RESOURCELIMIT


@pytest.mark.parametrize("error", [MemoryError(), asyncio.CancelledError(), KeyError("a bug")])
def test_who_waits_for_a_shared_circuit_hears_of_any_end(core, monkeypatch, error):
    async def circuit_to(**_):
        await asyncio.sleep(0)
        raise error

    async def main():
        core.circuit_to = circuit_to
        waiting = [core._circuit(None, 80) for _ in range(2)]
        found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
        assert [isinstance(e, minitor.CircuitError) for e in found] == [True] * 2

    minitor.set_log(minitor.ERR + 1)
    try:
        asyncio.run(main())
    finally:
        minitor.set_log(minitor.NOTICE)


def test_exit_circuits_are_shared(core, monkeypatch):
    async def main():
        a, b, c = await asyncio.gather(*[core._circuit(None, p) for p in (80, 80, 443)])
        assert a is b and c is not a
        # Its exit allows this port, too; not that one.
        assert await core._circuit(None, 22) is a
        assert await core._circuit(None, 1080) not in (a, c)
        a.since -= 2 * minitor.DIRTY_MS
        assert await core._circuit(None, 80) is c
        c.close()
        d = await core._circuit(None, 80)
        assert d not in (a, c)
        d.since -= minitor.DIRTY_MS + 1
        assert await core._circuit(None, 80) is not d
        core.down = {2}
        for _ in range(2):
            with pytest.raises(minitor.CircuitError):
                await core._circuit(None, 8080)
        assert len(core._shared) <= 4

    asyncio.run(main())


def test_isolated_streams_share_no_circuit(core):
    async def main():
        a, b, c, d = await asyncio.gather(*[
            core._circuit(None, 80, who) for who in (None, "a", "a", "b")])
        assert b is c and len({id(x) for x in (a, b, d)}) == 3
        # Nor where another's exit would do.
        assert await core._circuit(None, 22, "a") is b
        assert await core._circuit(None, 22, "c") not in (a, b, d)
        assert await core._circuit(None, 80) is a

    asyncio.run(main())


def test_newnym(core):
    async def main():
        a = await core._circuit(None, 80)
        pending = asyncio.ensure_future(core._circuit(None, 5000))
        await asyncio.sleep(0)
        core.dirty_ms, core.descriptors = 100 * minitor.DIRTY_MS, {b"k": 1}
        core.newnym()
        assert minitor.is_dirty(a) and not core.descriptors
        b = await core._circuit(None, 80)
        # What was begun before serves who waits for it, and no other.
        late = await pending
        assert b is not a and await core._circuit(None, 5000) is not late

    asyncio.run(main())


def test_circuits_live_as_long_as_is_set(core):
    async def main():
        core.dirty_ms = 5000
        a = await core._circuit(None, 80)
        a.since -= 4000
        assert await core._circuit(None, 80) is a
        a.since -= 2000
        assert await core._circuit(None, 80) is not a

    asyncio.run(main())


def test_circuits_are_built_ahead_for_proxies(core, monkeypatch):
    pause = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: pause(0))

    async def main():
        keeper = asyncio.ensure_future(core._keep_exits())
        await settle()
        # Nobody asks for any.
        assert not core.made
        core.proxies, core.wanted = [Thing()], {80: minitor.ticks_ms()}
        await settle()
        await settle()
        assert len(core._exits) >= 2 and all(core._allows(c, 80) for c in core._exits)
        ready, before = list(core._exits), len(core.made)
        keeper.cancel()
        assert await core._circuit(None, 80, "a") is ready[0] and len(core.made) == before
        assert await core._circuit(None, 80, "b") is ready[1] and ready[0] not in core._exits
        # Those that are too old or closed go, and ports that nobody asks for any more.
        for circuit in core._exits:
            circuit.since -= 1800001
        old, core.wanted = list(core._exits), {80: minitor.ticks_ms() - 3600001}
        keeper = asyncio.ensure_future(core._keep_exits())
        await settle()
        assert not core._exits and not core.wanted and all(c.closed for c in old)
        keeper.cancel()

    asyncio.run(main())


def test_where_a_circuit_that_is_built_ahead_fails_the_next_waits(core, monkeypatch):
    pause, slept = asyncio.sleep, []
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: slept.append(seconds) or pause(0))

    async def circuit_to(*_, **named):
        raise minitor.CircuitError("none")

    async def main():
        # NewCircuitPeriod.
        core.pause, core.circuit_to = 7, circuit_to
        core.wanted = {80: minitor.ticks_ms()}
        for keep in (core._keep_exits, core._keep_spares):
            keeper = asyncio.ensure_future(keep())
            await settle()
            keeper.cancel()
            assert slept.count(7) >= 1
            slept.clear()

    asyncio.run(main())


def test_the_first_proxy_has_circuits_built_ahead(core, monkeypatch):
    core._exits, core.services, core._channels = None, [], Thing(close=lambda: None)

    async def main():
        for _ in range(2):
            core._attach(Thing(close=lambda: None))
        assert len(core._tasks) == 1 and core._exits == [] and sorted(core.wanted) == [80, 443]
        core.ready = False
        await asyncio.sleep(1.1)
        assert not core.made
        await core.aclose()
        assert core._exits is None

    asyncio.run(main())


def test_circuits_are_built_to_learn_how_long_it_takes(core, monkeypatch):
    pause = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: pause(0))

    async def main():
        core.proxies, core.wanted = [Thing()], {80: minitor.ticks_ms()}
        keeper = asyncio.ensure_future(core._keep_exits())
        while len(core.build_times.times) < 100:
            await settle()
            assert len(core._exits) <= 11
        for _ in range(20):
            await settle()
        assert len(core.made) < 110
        keeper.cancel()

    asyncio.run(main())


def test_beside_a_late_circuit_another_is_begun(core, monkeypatch):
    """And the late one is built all the same, for its time; then it is kept or closed."""

    async def main():
        core.build_times.times, slow = [1000] * 100, []
        monkeypatch.setattr(core.build_times, "_estimate", lambda param: 50)
        extend = minitor.Circuit.extend

        async def slowly(self, relay, seconds):
            if self is core.made[0]:
                slow.append(self)
                await asyncio.sleep(0.1)
            await extend(self, relay, seconds)

        monkeypatch.setattr(minitor.Circuit, "extend", slowly)
        core._tasks = [1]
        circuit = await core.circuit_to()
        assert circuit is core.made[1] and not core.made[0].closed
        await asyncio.sleep(0.4)
        assert core._spares == [core.made[0]] and len(slow) == 3
        assert len(core.build_times.times) == 102 and max(core.build_times.times[-2:]) >= 200
        # One with a target of its own is of no use to others.
        core._spares, core.made[:] = [], []
        circuit = await core.circuit_to(core.relay(9))
        late = core.made[0]
        await asyncio.sleep(0.6)
        assert circuit is not late and late.closed and not core._spares and not circuit.closed

    asyncio.run(main())


def test_who_gives_up_leaves_no_circuit_behind(core, monkeypatch):
    async def main():
        monkeypatch.setattr(core.build_times, "ms", lambda param, hops: 1)

        async def never(self, relay, seconds):
            await asyncio.sleep(60)

        monkeypatch.setattr(minitor.Circuit, "extend", never)
        task = asyncio.ensure_future(core.circuit_to())
        await asyncio.sleep(0.1)
        assert len(core.made) > 2
        task.cancel()
        await asyncio.sleep(0.05)
        assert all(circuit.closed for circuit in core.made)

    asyncio.run(main())


def test_not_too_many_circuits_at_once(core, monkeypatch):
    async def main():
        gate, going = asyncio.Event(), []

        async def wait(self, relay, seconds):
            going.append(self)
            await gate.wait()
            self.path.append(relay)

        monkeypatch.setattr(minitor.Circuit, "extend", wait)
        asks = [asyncio.ensure_future(core._circuit(None, 80, i)) for i in range(50)]
        await asyncio.sleep(0.1)
        assert len(going) == 32
        gate.set()
        assert len({id(await ask) for ask in asks}) == 50 and not core._opening

    asyncio.run(main())


def test_idle_circuits_are_closed():
    class Closing(minitor.Promise):
        async def wait(self, seconds):
            await asyncio.sleep(0)
            raise asyncio.TimeoutError

    async def main():
        circuit = Circuit()
        circuit.closing, circuit.streams = Closing(), {1: None}
        task = asyncio.ensure_future(minitor.close_idle(circuit))
        circuit.since -= minitor.DIRTY_MS + 1
        await settle()
        assert not circuit.closed
        # Used again, then idle, and at last idle for long.
        circuit.streams, circuit.since = {}, minitor.ticks_ms()
        await settle()
        assert not circuit.closed
        circuit.since -= minitor.DIRTY_MS + 1
        await task
        assert circuit.closed

    asyncio.run(main())
