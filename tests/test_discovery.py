"""Section 18, discovery: advertisements, and the table of them among 32 peers of whom some lie.

The peers talk in memory, and time is made up: who is silent costs the test nothing.
"""

import asyncio
import random
import selectors
import struct

import minitor
import pytest
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
    yield loop.run_until_complete
    loop.run_until_complete(asyncio.sleep(0))
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
