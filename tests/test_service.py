"""Sections 14 and 15 without a network: keys on disk, introductions, ports, refusals."""

import asyncio
import os
import stat

import pytest

import minitor


class Thing:
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
        self.promises = []

    @property
    def closed(self):
        return self.closing.done()

    def close(self, reason=0):
        self.closing.set()

    async def ask(self, command, body, answers, seconds):
        self.sent.append((command, body))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answers[0], answer

    def expect(self, commands):
        self.promises.append((commands, minitor.Promise()))
        return self.promises[-1][1]

    def send(self, command, stream_id, body):
        self.sent.append((command, body))

    def add_onion_hop(self, keys, service=False):
        self.keys = keys, service


class Stream:
    def __init__(self, circuit):
        self.circuit, self.log = circuit, []

    async def accept(self):
        self.log.append("accept")

    async def reject(self, reason):
        self.log.append(reason)

    def close(self):
        self.log.append("close")


def fake_tor(testing=False, **fields):
    network = Thing(testing=testing)
    directory = Thing(consensus=Consensus(), network=network, table=None)
    return Thing(directory=directory, onion_circuits={}, asked=[], **fields)


@pytest.fixture
def service(tmp_path):
    """Return a service with one introduction point, as it is after publishing."""
    tor = fake_tor()
    service = minitor.OnionService(tor, str(tmp_path / "key"), {80: 8080})
    intro = Thing(cookies=set(), left=100, ready=True, rsa_id=b"i" * 20)
    intro.auth_key = minitor.ed25519_public(b"a" * 32)
    intro.b = b"q" * 32
    intro.enc_key = minitor.x25519_public(intro.b)
    service.intros.append(intro)
    service._periods = [((1, 1440, b"", 0), b"", b"", b"s" * 32, [])]
    service.built = []

    async def circuit_to(purpose, target=None, attempts=6):
        service.built.append((purpose, target, attempts))
        return Circuit()

    tor.circuit_to = circuit_to
    return service


def introduce(service, cookie=b"c" * 20, address="11.22.33.44"):
    relay = Thing(rsa_id=b"r" * 20, ed_id=b"e" * 32, address=address, port=9001)
    relay.ntor_key = minitor.x25519_public(b"n" * 32)
    return minitor.hs_ntor_client_intro(service.intros[0], b"s" * 32, cookie, relay)


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
    signature = minitor.ed25519_sign_expanded(esk, public, b"m")
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
    (tmp_path / "file").write_text("")
    with pytest.raises(minitor.ConfigError):
        minitor.load_service_key(str(tmp_path / "file"))


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
        state, body = introduce(service)
        service._introduced(service.intros[0], body)
        await settle()
        assert len(service.circuits) == 1 and service._meetings == 0
        purpose, target, attempts = service.built[0]
        assert (purpose, target.rsa_id, attempts) == ("service_rendezvous", b"r" * 20, 2)
        circuit = service.circuits[0]
        command, answer = circuit.sent[0]
        assert command == minitor.RELAY_RENDEZVOUS1 and answer[:20] == b"c" * 20
        keys = minitor.hs_ntor_client_finish(state, answer[20:])
        assert circuit.keys == (keys, True) and circuit.on_begin
        circuit.close()
        await settle()
        assert service.circuits == []

    asyncio.run(main())


def test_introductions_refused(service):
    async def main():
        intro = service.intros[0]
        _, body = introduce(service)
        service._introduced(intro, body)
        await settle()
        assert intro.left == 99
        # The same again, the same cookie from somewhere else, garbage, a private address.
        for bad in (body, introduce(service)[1], b"", body[:-1] + b"\0",
                    introduce(service, b"p" * 20, "127.0.0.1")[1]):
            service._introduced(intro, bad)
            await settle()
        assert len(service.built) == 1 and service._meetings == 0
        service.tor.directory.network.testing = True
        service._introduced(intro, introduce(service, b"P" * 20, "127.0.0.1")[1])
        await settle()
        assert len(service.built) == 2

    asyncio.run(main())


def test_rate_limit(service):
    async def main():
        service.rate, service._tokens = 1, 3000
        for n in range(10):
            service._introduced(service.intros[0], introduce(service, bytes([n]) * 20)[1])
            await settle()
        assert len(service.built) == 3

    asyncio.run(main())


def test_full_service_closes_an_idle_circuit(service, monkeypatch):
    async def main():
        monkeypatch.setattr(minitor, "_MAX_CIRCUITS", 3)
        for n in range(3):
            service._introduced(service.intros[0], introduce(service, bytes([n]) * 20)[1])
            await settle()
        first, second, third = service.circuits
        first.streams = {1: None}
        service._introduced(service.intros[0], introduce(service, b"x" * 20)[1])
        await settle()
        assert second.closed and not first.closed and len(service.circuits) == 3
        for circuit in service.circuits:
            circuit.streams = {1: None}
        service._introduced(service.intros[0], introduce(service, b"y" * 20)[1])
        await settle()
        assert len(service.built) == 4

    asyncio.run(main())


# ─── streams ───


def test_ports(service):
    async def main():
        async def handler(reader, writer):
            seen.append(reader is writer)

        async def broken(reader, writer):
            raise ValueError("of the handler")

        seen = []
        service.ports.update({81: handler, 82: broken, 83: ("127.0.0.1", 1)})
        for port, expected, closed in (
            (79, [minitor.END_DONE], True),
            (81, ["accept", "close"], False),
            (82, ["accept", minitor.END_CONNECTREFUSED], False),
            (83, [minitor.END_CONNECTREFUSED], False),
        ):
            circuit = Circuit()
            stream = Stream(circuit)
            await service._begin(stream, "", port)
            assert (stream.log, circuit.closed) == (expected, closed), port
        assert seen == [True]
        circuit = Circuit()
        circuit.streams = {n: None for n in range(600)}
        stream = Stream(circuit)
        await service._begin(stream, "", 81)
        assert stream.log == [minitor.END_RESOURCELIMIT]

    asyncio.run(main())


# ─── the client ───


def peer_and_intro():
    intro = Thing(auth_key=minitor.ed25519_public(b"a" * 32), address="11.22.33.44")
    intro.enc_key = minitor.x25519_public(b"q" * 32)
    peer = minitor.OnionPeer(b"")
    peer.subcred = b"s" * 32
    return peer, intro


def meet(answer, testing=False, address="11.22.33.44"):
    """Run `_introduce` with that INTRODUCE_ACK: (rendezvous circuit, introduction circuit)."""
    peer, intro = peer_and_intro()
    intro.address = address
    rend, introducing = Circuit([b""]), Circuit([answer])
    relay = Thing(rsa_id=b"r" * 20, ed_id=b"e" * 32, address="11.22.33.44", port=9001)
    relay.ntor_key = minitor.x25519_public(b"n" * 32)
    rend.path = [relay]

    async def circuit_to(purpose, target=None):
        return rend if purpose == "rendezvous" else introducing

    async def main():
        task = asyncio.ensure_future(
            minitor._introduce(fake_tor(testing, circuit_to=circuit_to), peer, intro)
        )
        await settle()
        if rend.promises and introducing.sent:
            body = introducing.sent[0][1]
            cookie, reply = minitor.hs_ntor_service(intro, b"q" * 32, [b"s" * 32], body)[1:3]
            assert rend.sent == [(minitor.RELAY_ESTABLISH_RENDEZVOUS, cookie)]
            rend.promises[0][1].set((minitor.RELAY_RENDEZVOUS2, reply[20:]))
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
    assert rend.promises[0][0] == (minitor.RELAY_RENDEZVOUS2,)


@pytest.mark.parametrize(
    "answer,error", [(b"\0\1\0", minitor.OnionError), (b"", minitor.ProtocolError),
                     (minitor.CircuitError("gone"), minitor.CircuitError)]
)
def test_client_is_refused(answer, error):
    result, rend, introducing = meet(answer)
    assert isinstance(result, error) and rend.closed and introducing.closed and not rend.keys


def test_client_refuses_private_introduction_points():
    result, rend, introducing = meet(b"\0\0\0", address="192.168.1.1")
    assert isinstance(result, minitor.OnionError) and not introducing.sent
    assert meet(b"\0\0\0", True, "192.168.1.1")[0].keys


def test_streams_share_one_attempt(monkeypatch):
    built = []

    async def fake_meet(tor, peer):
        built.append(peer.key)
        await asyncio.sleep(0.01)
        if peer.key == b"bad":
            raise minitor.OnionError("down")
        return Circuit()

    monkeypatch.setattr(minitor, "_meet", fake_meet)

    async def main():
        tor = fake_tor()
        name = (b"key", None)
        circuits = await asyncio.gather(*[minitor.onion_circuit(tor, name) for _ in range(5)])
        assert len(set(circuits)) == 1 and built == [b"key"]
        await minitor.onion_circuit(tor, (b"key", "other"))
        assert len(built) == 2
        circuits[0].close()
        await settle()
        assert tor.onion_circuits[name].circuit is None
        assert await minitor.onion_circuit(tor, name) is not circuits[0]
        for _ in range(2):
            with pytest.raises(minitor.OnionError, match="down"):
                await minitor.onion_circuit(tor, (b"bad", None))
        assert built[-2:] == [b"bad"] * 2
        # What is kept of services stays bounded.
        for n in range(600):
            tor.onion_circuits[n, None] = minitor.OnionPeer(b"idle")
        with pytest.raises(minitor.OnionError):
            await minitor.onion_circuit(tor, (b"bad", "again"))
        assert len(tor.onion_circuits) < 10

    asyncio.run(main())
