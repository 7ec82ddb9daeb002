"""Section 18, discovery: advertisements, and the table of them among 32 peers of whom some lie.

The peers talk in memory, and time is made up: who is silent costs the test nothing.
"""

import asyncio
import contextlib
import functools
import random
import selectors
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import minitor
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from minitor import Advertisement, Discovery

NOW = 1790000000


class Skipping(selectors.DefaultSelector):
    """A selector that does not wait: the loop's clock moves instead."""

    skipped = 0

    def select(self, timeout=None):
        assert timeout is not None, "everyone waits for ever"
        self.skipped += timeout
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.selector = Skipping()
        super().__init__(self.selector)

    def time(self):
        return self.selector.skipped


@pytest.fixture
def run(monkeypatch):
    """Run a coroutine in made-up time, with made-up randomness."""
    loop = Loop()
    chance = random.Random(5)
    monkeypatch.setattr(minitor, "urandom", chance.randbytes)
    monkeypatch.setattr(minitor, "now", lambda: NOW + int(loop.time()))
    monkeypatch.setattr(minitor, "ticks_ms", lambda: int(loop.time() * 1000))
    # Many peers check the same signatures.
    for name in ("ed25519_verify", "ed25519_valid"):
        monkeypatch.setattr(minitor, name, functools.lru_cache(None)(getattr(minitor, name)))
    yield loop.run_until_complete
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(1))
    loop.close()


def secret(n):
    """The key of peer `n`, as of load_service_key."""
    esk = minitor.ed25519_expand(n.to_bytes(32, "big"))
    return esk, minitor.ed25519_public(esk)


# ─── advertisements ───

SERVICES = {"web": (80, b""), "agents.sum-2": (7001, b"v=1;\0\xff")}
ENCODED = bytes.fromhex(
    "4cb5abf6ad79fbf5abbccafcc269d85cd2651ed4b885b5869f241aedf0a5ba298b7203000000006ab13b8000"
    "000e10020c6167656e74732e73756d2d321b5906763d313b00ff03776562005000a715355b54bccea25ed40f"
    "b49a60cee9bd34c9e461a06c39d4e387bd624b9ad9a8b9420a329015f5add6223762f308a4212db3f207f239"
    "b1e9abba3fb996cc00")


def test_vector():
    ad = Advertisement.create(secret(1), SERVICES, 3600, NOW)
    assert ad.address == minitor.onion_address(secret(1)[1])
    assert ad.encode() == ENCODED
    again = Advertisement.decode(ENCODED).verify(NOW + 3599)
    assert (again.key, again.address, again.services) == (ad.key, ad.address, SERVICES)
    assert (again.timestamp, again.expiry) == (NOW, NOW + 3600)
    assert again.encode() == ENCODED
    # Another's Ed25519 agrees.
    theirs = Ed25519PrivateKey.from_private_bytes((1).to_bytes(32, "big"))
    assert theirs.sign(b"minitor advertisement 1\0" + ENCODED[:-64]) == ENCODED[-64:]


@pytest.mark.parametrize("services, seconds, text", [
    ({"Web": (80, b"")}, 60, "no name"),
    ({"": (80, b"")}, 60, "no name"),
    ({"a" * 64: (80, b"")}, 60, "no name"),
    ({"a" * 56 + ".onion": (80, b"")}, 60, "no name"),
    ({"ä": (80, b"")}, 60, "no name"),
    ({"a": (0, b"")}, 60, "port 0"),
    ({"a": (65536, b"")}, 60, "port 65536"),
    ({"a": (1, bytes(129))}, 60, "129 bytes"),
    ({"a%d" % n: (1, b"") for n in range(17)}, 60, "16 services"),
    ({}, 0, "lifetime"),
    ({}, 86401, "lifetime"),
])
def test_bounds(services, seconds, text):
    with pytest.raises(minitor.ConfigError, match=text):
        Advertisement.create(secret(1), services, seconds, NOW)
    # Who signs it all the same is refused by others.
    key = secret(1)
    ad = Advertisement(key[1], {}, NOW, NOW + seconds)
    ad.services = services
    try:
        content = ad._content()
    except (struct.error, ValueError):
        return
    signature = minitor.ed25519_sign(*key, minitor._AD_PREFIX + content)
    with pytest.raises(minitor.ProtocolError):
        Advertisement.decode(content + signature)


def test_the_largest_fits_an_answer():
    services = {"%02d" % n + "a" * 61: (65535, bytes(128)) for n in range(16)}
    data = Advertisement.create(secret(1), services, 86400, NOW).encode()
    assert Advertisement.decode(data).verify(NOW).services == services
    assert len(data) < minitor._MOST_ADS_SENT / 3


def test_freshness():
    ad = Advertisement.decode(ENCODED)
    for at in NOW - minitor._AD_SKEW, NOW, NOW + 3599:
        ad.verify(at)
    for at, text in ((NOW - minitor._AD_SKEW - 1, "future"), (NOW + 3600, "expired")):
        with pytest.raises(minitor.ProtocolError, match=text):
            ad.verify(at)


def test_every_bit_counts():
    # Whatever is changed: it is refused, when it is decoded or when it is verified.
    for i in range(len(ENCODED) * 8):
        data = bytearray(ENCODED)
        data[i // 8] ^= 1 << i % 8
        with pytest.raises(minitor.ProtocolError):
            Advertisement.decode(bytes(data)).verify(NOW)


def test_one_encoding():
    head, web, agents = ENCODED[:48], ENCODED[-71:-64], ENCODED[48:-71]
    assert web == b"\3web\0\x50\0" and head + agents + web + ENCODED[-64:] == ENCODED
    signed = lambda content: content + minitor.ed25519_sign(
        *secret(1), minitor._AD_PREFIX + content)
    assert signed(ENCODED[:-64]) == ENCODED
    for content in (
        head + web + agents,  # another order
        head[:47] + b"\3" + agents + web + web,  # twice
        head[:47] + b"\3" + agents + web,  # fewer
        head[:47] + b"\1" + agents + web,  # more
        head + agents + web + b"\0",
        ENCODED[:34] + b"\4" + ENCODED[35:-64],  # another version
        ENCODED[:32] + b"\0\0" + ENCODED[34:-64],  # another checksum
    ):
        with pytest.raises(minitor.ProtocolError):
            Advertisement.decode(signed(content))
    # Who signs for another's address.
    with pytest.raises(minitor.ProtocolError, match="not signed by its key"):
        ad = Advertisement.decode(ENCODED)
        ad.signature = minitor.ed25519_sign(*secret(2), minitor._AD_PREFIX + ad._content())
        Advertisement.decode(ad.encode()).verify(NOW)
    # Without its prefix the signature is of something else.
    with pytest.raises(minitor.ProtocolError, match="not signed by its key"):
        ad.signature = minitor.ed25519_sign(*secret(1), ad._content())
        ad.verify(NOW)
    # A signature with another s of the same value.
    s = int.from_bytes(ENCODED[-32:], "little") + minitor._L
    with pytest.raises(minitor.ProtocolError, match="not signed by its key"):
        Advertisement.decode(ENCODED[:-32] + s.to_bytes(32, "little")).verify(NOW)


def test_a_key_of_low_order_signs_nothing():
    # (x, y) of order 8, for which R = A, s = 0 would verify for many messages.
    low = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")
    ad = Advertisement(low, {}, NOW, NOW + 60, low + bytes(32))
    with pytest.raises(minitor.ProtocolError):
        Advertisement.decode(ad.encode()).verify(NOW)


def mangled(data, chance):
    """`data` cut, repeated, or with other bytes in it."""
    data = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        at, n = chance.randrange(len(data) + 1), chance.randrange(1, 9)
        data[at : at + n * chance.randrange(2)] = chance.randbytes(n * chance.randrange(2))
    return bytes(data)


def test_only_tor_errors_come_out():
    chance = random.Random(1)
    for _ in range(3000):
        data = mangled(ENCODED, chance) if chance.randrange(3) else chance.randbytes(
            chance.randrange(200))
        try:
            ad = Advertisement.decode(data)
        except minitor.TorError:
            continue
        assert ad.encode() == data


# ─── the table ───


class Network:
    """Peers in memory: `peers` {contact: Discovery}; who is in `behaviour` answers otherwise."""

    def __init__(self, count):
        self.secrets = [secret(n) for n in range(count)]
        self.contacts = [(s[1], minitor.onion_address(s[1]) + ":1") for s in self.secrets]
        self.peers, self.behaviour, self.calls, self.gone = {}, {}, 0, set()
        for contact, key in zip(self.contacts, self.secrets):
            self.peers[contact] = Discovery(self.calling(contact), key, contact[1])

    def calling(self, caller):
        async def call(contact, request):
            self.calls += 1
            await asyncio.sleep(0.1)
            if contact not in self.peers or contact in self.gone:
                await asyncio.sleep(20)
                raise minitor.OnionError("there is no %s" % contact[1])
            if contact in self.behaviour:
                return await self.behaviour[contact](caller, request)
            return self.peers[contact].answer(caller[0], request)

        return call

    def visitor(self, n=1000):
        """A peer that takes no calls."""
        key = secret(n)
        return Discovery(self.calling((key[1], "")), key)

    async def start(self):
        """All join by the first and advertise a service of their own, and one of four."""
        for i, contact in enumerate(self.contacts):
            await self.peers[contact].join(self.contacts[:1] if i else [])
        await asyncio.sleep(1)
        for i, contact in enumerate(self.contacts):
            services = {"agent-%d" % i: (7000 + i, b""), "kind-%d" % (i % 4): (80, b"x")}
            assert await self.peers[contact].advertise(services) >= min(8, len(self.contacts) - 1)

    async def check(self, seekers, sought):
        """Every one of `seekers` finds one of `sought` (numbers), by name and by address."""
        for n, seeker in enumerate(seekers):
            i = sought[n % len(sought)]
            contact = self.contacts[i]
            found = await seeker.discover("agent-%d" % i)
            assert [ad.key for ad in found] == [contact[0]], i
            assert found[0].services["agent-%d" % i] == (7000 + i, b"")
            ad = await seeker.locate(contact[1].partition(":")[0])
            assert ad.encode() == found[0].encode()


def test_32_peers_find_each_other(run):
    net = Network(32)
    run(net.start())
    peers = [net.peers[c] for c in net.contacts]
    run(net.check(peers, list(range(7, 32)) + list(range(7))))
    calls = net.calls
    visitor = net.visitor()
    run(visitor.join(net.contacts[:1]))
    found = run(visitor.discover("kind-2"))
    assert {ad.key for ad in found} == {net.contacts[i][0] for i in range(2, 32, 4)}
    assert run(visitor.discover("nobody-has-this")) == []
    with pytest.raises(minitor.DiscoveryError, match="no peer knows"):
        run(visitor.locate(minitor.onion_address(secret(999)[1])))
    # A look-up asks a part of them, and nobody is told of who takes no calls.
    assert (net.calls - calls) / 4 < 24
    assert all(visitor.key != key for peer in peers for key, _ in peer.contacts())
    assert all(len(b) <= 8 for peer in peers for both in peer._buckets.values() for b in both)


# What liars do with a call: coroutine functions(network, contact, caller, request).


def done(address=""):
    return bytes([minitor.DONE, len(address)]) + address.encode()


async def silent(net, *_):
    await asyncio.sleep(3600)


async def dead(net, *_):
    raise minitor.StreamError("the stream ended")


async def garbage(net, *_):
    return bytes([minitor.DONE]) + net.chance.randbytes(net.chance.randrange(300))


async def endless(net, *_):
    return bytes([minitor.DONE]) + bytes(1 << 20)


async def refusing(net, *_):
    return bytes([minitor.REFUSED])


async def empty(net, contact, caller, request):
    return done(contact[1]) + bytes(request[0] == minitor.LOOK)


async def misleading(net, contact, caller, request):
    """Name peers that do not exist, ever nearer to what is sought."""
    place = int.from_bytes(request[-32:], "big")
    keys = [net.chance.randbytes(32) for _ in range(200)]
    keys.sort(key=lambda key: minitor.place_of(key) ^ place)
    contacts = [(key, minitor.onion_address(key) + ":1") for key in keys[:8]]
    return done(contact[1]) + b"\x08" + b"".join(map(minitor.pack_contact, contacts))


async def misplacing(net, contact, caller, request):
    """Name those who exist at ports where they are not."""
    contacts = [(key, address + "23") for key, address in net.chance.choices(net.contacts, k=8)]
    return done(contact[1]) + b"\x08" + b"".join(map(minitor.pack_contact, contacts))


async def forging(net, contact, caller, request):
    """Say that every name is another's, and sign it as far as possible."""
    place, liar = int.from_bytes(request[-32:], "big"), net.secrets[net.contacts.index(contact)]
    reply = done(contact[1]) + b"\0"
    for n in range(2):
        # In others' names, and in its own: the second is no lie, but is not what was asked for.
        services = {net.names.get(place, "other"): (666, b"forged")}
        key = net.secrets[(n + 3) % len(net.secrets)]
        ad = Advertisement.create((liar[0], key[1]) if n == 0 else liar, services, 60)
        reply += len(ad.encode()).to_bytes(2, "big") + ad.encode()
    return reply


async def unrelated(net, contact, caller, request):
    """Offer what is true, and was not asked for."""
    ad = Advertisement.create(secret(500), {"other": (1, b"")}, 60)
    return done(contact[1]) + b"\0" + len(ad.encode()).to_bytes(2, "big") + ad.encode()


async def outdated(net, contact, caller, request):
    """Show what was true before."""
    place, reply = int.from_bytes(request[-32:], "big"), done(contact[1]) + b"\0"
    for i, key in enumerate(net.secrets):
        services = {"agent-%d" % i: (1, b"moved since")}
        ad = Advertisement.create(key, services, 86400, NOW - 60)
        if place in minitor.places_of(ad):
            reply += len(ad.encode()).to_bytes(2, "big") + ad.encode()
    return reply


LIES = (silent, dead, garbage, endless, refusing, empty, misleading, misplacing, forging,
        unrelated, outdated)


def let_lie(net, numbers, lies=LIES):
    net.chance = random.Random(7)
    net.names = {minitor.place_of("agent-%d" % i): "agent-%d" % i for i in range(32)}
    for n, i in enumerate(numbers):
        contact, lie = net.contacts[i], lies[n % len(lies)]
        net.behaviour[contact] = lambda caller, request, contact=contact, lie=lie: lie(
            net, contact, caller, request)


LEAVING = random.Random(3).sample(range(32), 11)
STAYING = [i for i in range(32) if i not in LEAVING]


def test_a_third_leaves(run):
    net = Network(32)
    run(net.start())
    net.gone = {net.contacts[i] for i in LEAVING}
    staying = [net.peers[net.contacts[i]] for i in STAYING]
    run(net.check(staying, STAYING[4:] + STAYING[:4]))
    # Those who left are forgotten, and a new one joins by any that stayed.
    for peer in staying * 4:
        run(peer.upkeep())
    assert not [peer for peer in staying if net.gone & set(peer.contacts())]
    visitor = net.visitor()
    run(visitor.join([net.contacts[i] for i in (LEAVING[0], STAYING[0])]))
    run(net.check([visitor], STAYING[-1:]))
    # What those who left have offered is forgotten in time, what others offer is not.
    begun = minitor.now()
    while minitor.now() < begun + minitor.AD_SECONDS:
        run(asyncio.sleep(minitor.UPKEEP_SECONDS))
        for peer in staying:
            run(peer.upkeep())
    run(net.check(staying[:3], STAYING[5:8]))
    assert run(visitor.discover("agent-%d" % LEAVING[1])) == []
    assert all(len(peer._ads) <= len(staying) for peer in staying)


def test_a_third_lies(run):
    net = Network(32)
    run(net.start())
    let_lie(net, LEAVING)
    run(net.check([net.peers[net.contacts[i]] for i in STAYING], list(range(32))))


@pytest.mark.parametrize("lie", [misleading, forging, silent, unrelated])
def test_a_third_lies_from_the_start(run, lie):
    net = Network(32)
    let_lie(net, LEAVING, (lie,))
    honest = [net.peers[net.contacts[i]] for i in STAYING]
    for peer in honest:
        # By one that lies, and one that does not.
        run(peer.join([net.contacts[LEAVING[0]], net.contacts[STAYING[0]]][peer is honest[0] :]))
    for i, peer in zip(STAYING, honest):
        run(peer.advertise({"agent-%d" % i: (7000 + i, b"")}))
    net.calls = 0
    run(net.check(honest, STAYING[9:] + STAYING[:9]))
    # Not many are asked who do not exist.
    assert net.calls / len(honest) / 2 < 40


def test_who_is_silent_is_not_waited_for(run):
    net = Network(32)
    run(net.start())
    let_lie(net, LEAVING, (silent,))
    for i in STAYING[:6]:
        begun = minitor.now()
        run(net.check([net.peers[net.contacts[i]]], STAYING[9:10]))
        # Two look-ups, in which calls would take a minute each to fail.
        assert minitor.now() - begun < 2 * minitor.CALL_SECONDS


def test_who_is_slow_is_waited_for_where_there_are_few(run):
    net = Network(2)
    run(net.start())

    async def slow(net, contact, caller, request):
        await asyncio.sleep(4 * minitor._LATE_SECONDS)
        return net.peers[contact].answer(caller[0], request)

    let_lie(net, [0], (slow,))
    run(net.check([net.peers[net.contacts[1]]], [0]))


def test_joining_by_liars_alone(run):
    for lie in LIES:
        net = Network(2)
        let_lie(net, [0], (lie,))
        peer = net.peers[net.contacts[1]]
        if lie in (empty, misleading, misplacing, outdated):
            run(peer.join(net.contacts[:1]))
            assert run(peer.discover("agent-7")) == []
        else:
            with pytest.raises(minitor.DiscoveryError, match="none of 1 peers answers: "):
                run(peer.join(net.contacts[:1]))
            assert not peer.contacts()


# ─── one peer ───


def alone(n=0, **options):
    """A peer whose calls get `reply`, or raise it."""
    async def call(contact, request):
        calls.append((contact, request))
        return options.get("reply") or done(contact[1]) + b"\0"

    calls, key = [], secret(n)
    peer = Discovery(call, key, options.get("address", ""), options.get("direct", False))
    peer.calls = calls
    return peer


def store(ad):
    return bytes([minitor.STORE, 0]) + ad.encode()


def look(place, address=b""):
    return bytes([minitor.LOOK, len(address)]) + address + place.to_bytes(32, "big")


def offered(peer, place):
    """The advertisements that `peer` shows for a place."""
    reply = peer.answer(bytes(32), look(minitor.place_of(place)))
    assert reply[:3] == done() + b"\0"
    reader, ads = minitor.Reader(reply[3:]), []
    while reader.left():
        ads.append(Advertisement.decode(reader.take(reader.uint(2))))
    return ads


def ad_of(n, *names, seconds=3600, at=NOW):
    return Advertisement.create(secret(n), {name: (80, b"") for name in names}, seconds, at)


def test_only_who_is_entitled_stores(run):
    peer, ad = alone(), ad_of(1, "web")
    kept, refused = done(), bytes([minitor.REFUSED])
    assert peer.answer(secret(2)[1], store(ad)) == refused  # another's
    forged = Advertisement.decode(ad.encode())
    forged.signature = minitor.ed25519_sign(*secret(2), minitor._AD_PREFIX + ad._content())
    assert peer.answer(ad.key, store(forged)) == refused
    assert peer.answer(ad.key, store(ad_of(1, "web", at=NOW - 3600))) == refused  # expired
    assert peer.answer(ad.key, store(ad_of(1, "web", at=NOW + 86400))) == refused  # of the future
    assert offered(peer, "web") == [] == offered(peer, ad.key)
    assert peer.answer(ad.key, store(ad)) == kept
    assert peer.answer(ad.key, store(ad)) == kept
    for place in "web", ad.key:
        assert [found.encode() for found in offered(peer, place)] == [ad.encode()]
    assert offered(peer, "other") == [] == offered(peer, secret(2)[1])
    # A later one takes the place of an earlier one, not the other way around.
    later = ad_of(1, "other", at=NOW + 1)
    assert peer.answer(ad.key, store(later)) == kept
    assert peer.answer(ad.key, store(ad)) == refused
    assert offered(peer, "web") == [] and len(offered(peer, "other")) == 1
    # Until it expires.
    run(asyncio.sleep(3601))
    assert offered(peer, "other") == []
    run(peer.upkeep())
    assert not peer._ads and not peer._places


def test_what_is_kept_is_bounded(run, monkeypatch):
    monkeypatch.setattr(minitor, "MOST_ADS", 20)
    monkeypatch.setattr(minitor, "_MOST_OF_NAME", 6)
    peer = alone()
    run(peer.advertise({"mine": (1, b"")}))
    for n in range(1, 60):
        ad = ad_of(n, "popular", "name-%d" % n)
        peer.answer(ad.key, store(ad))
        assert len(peer._ads) <= 20 and len(peer._places) <= 20 * 3
        assert all(len(keys) <= 6 for keys in peer._places.values())
        assert all(key in peer._ads for keys in peer._places.values() for key in keys)
    # What is nearest is kept, and our own.
    assert len(offered(peer, "popular")) >= 3 and len(offered(peer, "mine")) == 1
    for n in range(1, 60):
        peer._drop(secret(n)[1])
    assert set(peer._ads) == {peer.key} and len(peer._places) == 2


def test_rates_are_bounded(run, monkeypatch):
    peer, ask = alone(), look(0)

    def answered(key, request=ask, most=10000):
        return sum(peer.answer(key, request)[0] == minitor.DONE for _ in range(most))

    burst, each = minitor._PEER_RATE
    assert answered(b"a" * 32) == burst
    assert answered(b"b" * 32) == burst
    run(asyncio.sleep(10))
    assert answered(b"a" * 32) == 10 * each
    # Storing costs more, and there is a bound for all.
    ad = ad_of(1, "web")
    assert answered(ad.key, store(ad)) == burst // minitor._STORE_COST
    run(asyncio.sleep(3600))
    total = sum(answered(bytes([n]) * 32, most=200) for n in range(100))
    assert total == minitor._RATE_OF_ALL[0]
    monkeypatch.setattr(minitor, "_MOST_RATES", 50)
    run(asyncio.sleep(3600))
    answered(b"c" * 32)
    for n in range(200):
        answered(n.to_bytes(32, "big"), most=1)
        # Who came often is not forgotten for those who came once.
        assert len(peer._rates) <= 51


def test_answers_are_bounded_and_vary(run):
    peer = alone()
    for n in range(1, 120):
        ad = ad_of(n, "popular")
        peer._keep(ad)
    seen = set()
    for _ in range(8):
        assert len(peer.answer(bytes(32), look(minitor.place_of("popular")))) < minitor.MOST_CALL
        found = {ad.key for ad in offered(peer, "popular")}
        assert 50 < len(found) < 119
        seen |= found
    assert len(seen) == 119


def test_hostile_calls(run, monkeypatch):
    peer, chance = alone(), random.Random(2)
    monkeypatch.setattr(minitor, "_PEER_RATE", (1 << 20, 1))
    monkeypatch.setattr(minitor, "_RATE_OF_ALL", (1 << 20, 1))
    ad = ad_of(1, "web")
    for n in range(1500):
        request = chance.choice((store(ad), look(5), look(5, b"x.onion:1"), b""))
        request = mangled(request, chance) if n % 3 else chance.randbytes(chance.randrange(99))
        reply = peer.answer(secret(1)[1], request)
        assert isinstance(reply, bytes) and 1 <= len(reply) <= minitor.MOST_CALL
    assert set(peer._ads) <= {ad.key}
    for _, kept, _ in peer._ads.values():
        kept.verify()


def test_hostile_answers(run):
    chance, contact = random.Random(3), (secret(1)[1], minitor.onion_address(secret(1)[1]) + ":1")
    good = done(contact[1]) + b"\1" + minitor.pack_contact(contact)
    good += len(ENCODED).to_bytes(2, "big") + ENCODED
    for n in range(600):
        reply = mangled(good, chance) if n % 2 else chance.randbytes(chance.randrange(200))
        peer = alone(reply=reply)
        peer._seen(contact)
        try:
            found = run(peer.discover("web"))
        except minitor.TorError:
            continue
        assert [ad.encode() for ad in found] in ([], [ENCODED])


def test_who_calls_is_checked_before_others_hear_of_it(run):
    peer, direct, busy = [alone(address="x:1", direct=d) for d in (0, 1, 0)]
    onions = {n: minitor.onion_address(secret(n)[1]) + ":1" for n in range(1, 60)}

    async def hear(who, n, address):
        who.answer(secret(n)[1], look(0, address.encode()))

    # Elsewhere than at its onion address nobody is called, unless that is asked for.
    for address in "127.0.0.1:22", onions[2], "x" * 99:
        run(hear(peer, 1, address))
        run(asyncio.sleep(1))
        assert not peer.calls and not peer.contacts()
    run(hear(peer, 1, onions[1]))
    assert not peer.contacts()
    run(asyncio.sleep(1))
    assert peer.contacts() == [(secret(1)[1], onions[1])]
    run(hear(direct, 1, "127.0.0.1:22"))
    run(asyncio.sleep(1))
    assert direct.contacts() == [(secret(1)[1], "127.0.0.1:22")]

    # Many callers cannot make it call many at once.
    async def all_call():
        for n, onion in onions.items():
            await hear(busy, n, onion)

    run(all_call())
    run(asyncio.sleep(1))
    assert 0 < len(busy.calls) <= minitor._ALPHA_LATE


def test_who_is_there_for_long_stays(run):
    gone = set()

    async def call(contact, request):
        if contact in gone:
            raise minitor.OnionError("gone")
        return done(moved.get(contact, contact)[1]) + b"\0"

    moved = {}
    peer = Discovery(call, secret(0), "x:1")
    keys = [secret(n)[1] for n in range(1, 120)]
    far = [k for k in keys if (minitor.place_of(k) ^ peer.place) >> 255]
    contacts = [(key, minitor.onion_address(key) + ":1") for key in far]
    assert len(contacts) > 30
    for contact in contacts:
        run(peer._look(contact, 0))
    assert peer.contacts() == contacts[:8]
    # Who answers is seen last; who fails makes room for who was seen last.
    run(peer._look(contacts[0], 0))
    assert peer.contacts() == contacts[1:8] + contacts[:1]
    gone.add(contacts[1])
    run(peer.upkeep())
    assert set(peer.contacts()) == set(contacts[2:8] + contacts[:1] + contacts[-1:])
    # Who has moved says where to, and keeps its place.
    moved[contacts[2]] = contacts[2][0], contacts[2][1] + "0"
    run(peer._look(contacts[2], 0))
    assert peer.contacts()[-1] == moved[contacts[2]] and len(peer.contacts()) == 8
    # Not to another's address; who takes no calls any more, is not told of.
    for n, other in (3, contacts[9]), (4, (contacts[4][0], "")):
        moved[contacts[n]] = other
        run(peer._look(contacts[n], 0))
        assert not {contacts[n][0], contacts[9][0]} & {key for key, _ in peer.contacts()}


def test_whom_liars_alone_have_named_is_not_asked():
    contacts = [(bytes([n]) * 32, "x:1") for n in range(100)]
    contacts.sort(key=lambda contact: minitor.place_of(contact[0]))
    invented, (liar, *honest) = contacts[:40], contacts[40:56]
    for named in ([], invented[20:23]):
        lookup, asked = minitor._Lookup(0, [liar] + honest), []
        while contact := lookup.next():
            asked.append(contact)
            lookup.result(contact, contact not in invented)
            # Ever nearer ones; of some an honest peer thinks that they are there.
            if contact == liar:
                lookup.learn(liar, invented)
            elif contact == honest[0]:
                lookup.learn(contact, named)
        assert len(set(asked) & set(invented) - set(named)) == minitor._CREDIT
        assert not set(named) - set(asked)
        assert set(lookup.nearest()) <= set([liar] + honest) and len(lookup.nearest()) == 8
    # As long as they take to fail, they are not counted on either.
    lookup, asked = minitor._Lookup(0, [liar]), []
    lookup.result(lookup.next(), True)
    lookup.learn(liar, invented)
    for _ in range(9):
        asked += [lookup.next(), lookup.next()]
        lookup.late()
        assert lookup.waits() == 0
    assert len(set(asked) - {None}) == 4
    # Until they answer.
    for contact in asked[:4]:
        lookup.result(contact, True)
    assert lookup.next() and len(lookup.nearest()) == 5


def test_contacts_in_texts():
    key = secret(1)[1]
    onion = minitor.onion_address(key)
    assert minitor.parse_contact(onion) == (key, onion + ":7717")
    assert minitor.parse_contact("a." + onion.upper()) == (key, onion + ":7717")
    assert minitor.parse_contact(onion + ":6") == (key, onion + ":6")
    assert minitor.parse_contact(onion + "@[::1]:7", True) == (key, "[::1]:7")
    for text in ("", "x", "x.onion", onion + ":", onion + ":0", onion + ":65536", onion + ":²",
                 onion + ":" + "9" * 5000, onion[1:], onion + "@127.0.0.1:7", "127.0.0.1:7"):
        with pytest.raises(minitor.AddressError):
            minitor.parse_contact(text)


# ─── over links ───


async def nodes_of(stack, count):
    """So many nodes on this machine, with a Discovery each, all joined by the first."""
    found = []
    for n in range(count):
        node = minitor.Node(n.to_bytes(32, "big"), minitor.DirectTransport())
        await stack.enter_async_context(node)
        found.append((node, Discovery.over(node, direct=True)))
        text = "%s@%s" % (minitor.onion_address(found[0][0].key), found[0][0].address)
        await found[-1][1].join([text] * bool(n))
    return found


def test_discovery_over_links():
    async def main():
        async with contextlib.AsyncExitStack() as stack:
            nodes = await nodes_of(stack, 5)
            for n, (_, peer) in enumerate(nodes):
                await peer.advertise({"svc-%d" % n: (n + 1, b"")})
            for n, (node, peer) in enumerate(nodes):
                other = (n + 2) % 5
                found = await peer.discover("svc-%d" % other)
                assert [ad.key for ad in found] == [nodes[other][0].key]
            # One that is gone breaks nothing, and is told apart from one that lies about its key.
            await nodes[4][0].close(0)
            assert await nodes[1][1].discover("svc-2")
            calls = minitor.Calls(nodes[1][0], "other")
            with pytest.raises(minitor.PeerError, match="is it up"):
                await calls.call((nodes[4][0].key, nodes[4][0].address), b"")
            with pytest.raises(minitor.WrongPeer):
                await calls.call((secret(77)[1], nodes[2][0].address), b"")

    asyncio.run(main())


def test_who_had_a_fast_clock_advertises_again(monkeypatch):
    async def main():
        async with minitor.Node(bytes([1] * 32), minitor.DirectTransport()) as node:
            peer, now = Discovery.over(node, True), minitor.now
            for ahead in 86400, 0:
                monkeypatch.setattr(minitor, "now", lambda: now() + ahead)
                await peer.advertise({"x": (1, b"")})
                (ad,) = await peer.discover("x")
                assert abs(ad.timestamp - now() - ahead) < 60

    asyncio.run(asyncio.wait_for(main(), 60))


def test_calls_over_links(monkeypatch):
    async def main():
        async def slowly(key, request):
            await asyncio.sleep(0.05)
            return key + request

        async with contextlib.AsyncExitStack() as stack:
            a, b = [minitor.Node(bytes([n] * 32), minitor.DirectTransport()) for n in (1, 2)]
            await stack.enter_async_context(a)
            await stack.enter_async_context(b)
            calls = minitor.Calls(a, "calls", lambda key, request: request[::-1], idle=0.3)
            other = minitor.Calls(b, "calls", slowly, idle=30)
            to_a, to_b = (a.key, a.address), (b.key, b.address)
            assert await calls.call(to_b, b"abc") == a.key + b"abc"
            assert await other.call(to_a, b"abc") == b"cba"
            # Who is called may call back, over the same link, before it answers.
            async def count(key, request):
                if not request:
                    return b"."
                each = there if key == a.key else here
                return b"x" + await each.call(to_a if key == a.key else to_b, request[1:])

            here, there = minitor.Calls(a, "nested", count), minitor.Calls(b, "nested", count)
            assert await here.call(to_b, b"12345") == b"xxxxx."
            await a.links[b.key, "nested"].close()
            # Both ways at once, over one link.
            requests = [bytes([n]) * n for n in range(20)]
            one = asyncio.gather(*[calls.call(to_b, request) for request in requests])
            two = asyncio.gather(*[other.call(to_a, request) for request in requests])
            assert await one == [a.key + request for request in requests]
            assert await two == [request[::-1] for request in requests]
            assert len(a.links) == 1 == len(b.links)
            # What nobody uses is closed; the next call opens it again.
            while a.links or b.links:
                await asyncio.sleep(0.05)
            assert await calls.call(to_b, b"") == a.key
            # Closed by the other side just as it is used again.
            link = b.links[a.key, "calls"]
            await link.close()
            assert await calls.call(to_b, b"x") == a.key + b"x"
            # By this side.
            closing = asyncio.ensure_future(a.links[b.key, "calls"].close())
            await asyncio.sleep(0)
            assert await calls.call(to_b, b"y") == a.key + b"y"
            await closing
            with pytest.raises(minitor.TorTimeout, match="did not answer"):
                await calls.call(to_b, b"x", 0.01)
            assert not calls._waiting

    asyncio.run(asyncio.wait_for(main(), 60))


def test_many_calls_both_ways_wait_for_each_other_and_end():
    async def main():
        async with contextlib.AsyncExitStack() as stack:
            a, b = [minitor.Node(bytes([n] * 32), minitor.DirectTransport()) for n in (1, 2)]
            for node in a, b:
                node.buffer = node.largest = 1 << 18
                await stack.enter_async_context(node)
            to_a, to_b = (a.key, a.address), (b.key, b.address)
            # Replies together are more than either end takes at once.
            answer = lambda key, request: bytes(60000)
            one, two = minitor.Calls(a, "large", answer), minitor.Calls(b, "large", answer)
            replies = await asyncio.gather(*[one.call(to_b, b"?", 50) for _ in range(30)],
                                           *[two.call(to_a, b"?", 50) for _ in range(30)])
            assert replies == [bytes(60000)] * 60

            # All that are asked ask back.
            async def ask_back(key, request):
                return await there.call(to_a, request)

            here = minitor.Calls(a, "back", lambda key, request: request[::-1])
            there = minitor.Calls(b, "back", ask_back)
            replies = await asyncio.gather(*[here.call(to_b, b"%d" % i, 50) for i in range(200)])
            assert replies == [(b"%d" % i)[::-1] for i in range(200)]

            # Who has more calls open than it may have is cut off.
            async def never(key, request):
                await asyncio.sleep(60)

            minitor.Calls(a, "never", never)
            link = b.link(a.key, a.address, "never", False)
            for i in range(3 * minitor._CALLS_AT_ONCE):
                await link.send(bytes([0, 0, 0, 0, i]))
            with pytest.raises(minitor.LinkError):
                await link.receive(20)
            # And nobody works for it any more.
            while len(asyncio.all_tasks()) > minitor._CALLS_AT_ONCE:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_hostile_calls_over_links(monkeypatch):
    said = []
    monkeypatch.setattr(minitor, "log", lambda severity, text, *args: said.append(text % args))

    async def main():
        chance = random.Random(4)
        async with contextlib.AsyncExitStack() as stack:
            a, b = [minitor.Node(bytes([n] * 32), minitor.DirectTransport()) for n in (1, 2)]
            await stack.enter_async_context(a)
            await stack.enter_async_context(b)
            calls = minitor.Calls(a, "calls", lambda key, request: request, largest=1000)
            # Too short, too long: the link ends.  Answers to nothing are passed over.
            for message in b"", b"\0", bytes(1001):
                link = b.link(a.key, a.address, "calls", False)
                await link.send(message)
                with pytest.raises(minitor.LinkError):
                    await link.receive(20)
            link = b.link(a.key, a.address, "calls", False)
            for _ in range(300):
                kind = chance.randrange(1, 9)
                await link.send(bytes([kind]) + chance.randbytes(4 + chance.randrange(40)))
            await link.send(b"\0\0\0\0\1hello")
            assert await link.receive(20) == b"\1\0\0\0\1hello"
            assert not calls._waiting and len(a.links) == 1
            # Garbage where the table is.
            peer = Discovery.over(a, True)
            link = b.link(a.key, a.address, "discovery", False)
            for _ in range(50):
                await link.send(bytes(5) + chance.randbytes(chance.randrange(60)))
                assert (await link.receive(20))[5] == minitor.REFUSED
            assert not peer._ads and not peer.contacts()

    asyncio.run(asyncio.wait_for(main(), 60))
    assert not [text for text in said if "bug" in text]


# ─── the command line ───


class Local(minitor.DirectTransport):
    """Stands for TorTransport: onion addresses lead to ports of this machine."""

    reached = {}

    def __init__(self, tor, key=None, port=minitor.PEER_PORT, others=()):
        super().__init__()
        self.onion = key and "%s:%d" % (minitor.onion_address(key[1]), port)
        self.others = others

    async def listen(self, accept):
        await super().listen(accept)
        self.reached[self.onion], self.address = self.address, self.onion

    async def dial(self, address, seconds=120):
        if address not in self.reached:
            raise minitor.PeerError("%s cannot be reached, is it up?" % address)
        stream = await super().dial(self.reached[address], seconds)
        stream.private = True
        return stream


def test_advertise_and_discover(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(minitor, "TorTransport", Local)
    monkeypatch.setattr(Local, "reached", {})
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()

    async def printed(lines):
        out = err = ""
        while out.count("\n") < lines:
            await asyncio.sleep(0.01)
            captured = capsys.readouterr()
            out, err = out + captured.out, err + captured.err
        return out, err

    async def main():
        tasks, contacts = [], []
        for n, folder in enumerate(folders):
            services, targets = minitor.offers(["web", "api-%d=8080" % n], 80)
            tasks.append(asyncio.ensure_future(minitor.advertise(
                None, secret(n), services, targets, list(contacts), str(folder))))
            contacts.append(minitor.parse_contact((await printed(1))[0].strip()))
            assert contacts[-1][0] == secret(n)[1]
            while not [p for p in folder.iterdir() if p.name == "peers"] and n:
                await asyncio.sleep(0.01)
        onions = [minitor.onion_address(key) for key, _ in contacts]
        await minitor.discover(None, "web", contacts[1:2], str(tmp_path))
        out, _ = await printed(3)
        assert sorted(out.split("\n")[:3]) == sorted(onion + ":80 web" for onion in onions)
        # Whom it met it knows the next time, and beside others.
        again = minitor.read_peers(minitor_options(), str(tmp_path))
        assert set(again) == set(contacts)
        await minitor.discover(None, "api-0", again, str(tmp_path))
        assert (await printed(1))[0] == onions[0] + ":81 api-0\n"
        await minitor.discover(None, onions[2], again, str(tmp_path))
        assert (await printed(2))[0] == "%s:81 api-2\n%s:80 web\n" % (onions[2], onions[2])
        with pytest.raises(minitor.DiscoveryError, match="nobody advertises other"):
            await minitor.discover(None, "other", again, str(tmp_path))
        with pytest.raises(minitor.DiscoveryError, match="none of 1 peers answers: .*is it up"):
            await minitor.discover(None, "web", [(secret(9)[1], ONION9)], str(tmp_path))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    asyncio.run(asyncio.wait_for(main(), 60))


ONION9 = minitor.onion_address(secret(9)[1]) + ":7717"


def minitor_options(peer=(), peers=None):
    return SimpleNamespace(peer=list(peer), peers=peers)


def test_peers_from_options_and_files(tmp_path):
    keys = [secret(n)[1] for n in range(4)]
    onions = [minitor.onion_address(key) for key in keys]
    file = tmp_path / "list"
    file.write_text("# some\n\n%s:5  # one\n%s\r\n" % tuple(onions[:2]))
    (tmp_path / "peers").write_text(onions[2] + ":7717\n")
    found = minitor.read_peers(minitor_options([onions[3]], str(file)), str(tmp_path))
    assert found == [(keys[3], onions[3] + ":7717"), (keys[0], onions[0] + ":5"),
                     (keys[1], onions[1] + ":7717"), (keys[2], onions[2] + ":7717")]
    assert minitor.read_peers(minitor_options(), str(tmp_path / "none")) == []
    file.write_text("example.com\n")
    for options, text in ((minitor_options([onions[0][1:]]), "^--peer: "),
                          (minitor_options(peers=str(file)), "list: "),
                          (minitor_options(peers=str(tmp_path / "nothing")), "cannot read"),
                          (minitor_options([onions[0] + "@127.0.0.1:80"]), "over Tor")):
        with pytest.raises(minitor.ConfigError, match=text):
            minitor.read_peers(options, str(tmp_path))


@pytest.mark.parametrize("words, text", [
    (["a", "a"], "twice"), (["a"] * 2, "twice"), (["A"], "no name"), (["=80"], "no name"),
    (["a=no/such/folder"], "no folder"), (["a%d" % n for n in range(17)], "16 services"),
])
def test_what_cannot_be_advertised(words, text):
    with pytest.raises(minitor.ConfigError, match=text):
        minitor.offers(words, 80)
    with pytest.raises(minitor.ConfigError):
        minitor.offers(["a", "b"], minitor.PEER_PORT - 1)
    with pytest.raises(minitor.ConfigError):
        minitor.offers(["a", "b"], 65535)


@pytest.mark.parametrize("arguments, text", [
    (["--discover", "web"], "nobody is known"),
    (["--discover", "Web", "--peer", ONION9], "no name"),
    (["--discover", "", "--peer", ONION9], "no name"),
    (["--discover", "a" * 56 + ".onion", "--peer", ONION9], "no onion address"),
    (["--discover", "web", "--peer", "x.onion"], "--peer: "),
    (["--advertise", "a=nothing/there"], "no folder"),
    (["--advertise"], "expected at least one"),
    (["--advertise", "a", "--peers", "nothing"], "cannot read nothing"),
])
def test_usage_errors(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(minitor, "Tor", None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    try:
        status = minitor.main(arguments + ["--data-dir", str(tmp_path / "data")])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1) and text in err
    assert not (tmp_path / "data").exists()


def test_agents():
    agents = Path(__file__).resolve().parent.parent / "examples" / "agents.py"
    done = subprocess.run([sys.executable, str(agents), "--direct"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    lines = done.stdout.split("\n")
    assert lines[3:5] == ["words: 4", "total: 6.5"] and "ValueError" in lines[5], done.stderr
    assert (done.returncode, done.stderr) == (0, "")
