"""Section 9: addresses, time periods, the hash ring, descriptors, revision counters.

Vectors: from the test suite of tor 0.4.9 (test_hs_common, test_crypto_ope, hs_indexes), the
addresses of rend-spec-v3, and descriptors that C tor 0.4.9.11 made, with keys.
"""

import base64
import calendar
import hashlib
import json
import struct
from pathlib import Path

import pytest

import minitor

H = bytes.fromhex
NOW = 1732100000
# u-coordinates of points whose order divides 8, also unreduced.
LOW_ORDER = [bytes(32), b"\1" + bytes(31)] + [H(text) for text in (
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)]


def ed_public(seed):
    return minitor.ed25519_public(minitor.ed25519_expand(seed))


class Consensus:
    def __init__(self, text, interval=3600, params=None, current=b"c" * 32, previous=b"p" * 32):
        date, clock = text.split(" ")
        fields = [int(n) for n in date.split("-") + clock.split(":")]
        self.valid_after = calendar.timegm(fields)
        self.fresh_until = self.valid_after + interval
        self.params = params or {}
        self.srv_current, self.srv_previous = current, previous

    def param(self, name, default, low=0, high=2**31):
        return min(max(self.params.get(name, default), low), high)


# ─── addresses ───

GOOD = [
    "25njqamcweflpvkl73j4szahhihoc4xt3ktcgjnpaingr5yhkenl5sid",
    "pg6mmjiyjmcrsslvykfwnntlaru7p5svn6y2ymmju6nubxndf4pscryd",
    "sp3k262uwy4r2k3ycr5awluarykdpag6a7y33jxop4cs2lu5uz5sseqd",
    "xa4r2iadxm55fbnqgwwi5mymqdcofiu3w6rpbtqn7b2dyn7mgwj64jyd",
]


def test_address_vector():
    key = H("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    assert minitor.onion_address(key) == GOOD[0] + ".onion"
    assert minitor.parse_onion_address(GOOD[0] + ".onion") == key


@pytest.mark.parametrize("text", GOOD)
def test_address_good(text):
    key = minitor.parse_onion_address("www." + text.upper() + ".ONION.")
    assert minitor.onion_address(key) == text + ".onion"


def with_torsion(key):
    """The address of a key with a point of order 8 added, its checksum right."""
    torsion = H("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a")
    p = 2**255 - 19
    d = -121665 * pow(121666, p - 2, p) % p

    def decode(data):
        y = int.from_bytes(data, "little")
        sign, y = y >> 255, y & (1 << 255) - 1
        xx = (y * y - 1) * pow(d * y * y + 1, p - 2, p) % p
        x = pow(xx, (p + 3) // 8, p)
        if (x * x - xx) % p:
            x = x * pow(2, (p - 1) // 4, p) % p
        return (p - x if x & 1 != sign else x), y

    (a, b), (c, e) = decode(key), decode(torsion)
    k = d * a * b * c * e % p
    x = (a * e + b * c) * pow(1 + k, p - 2, p) % p
    y = (b * e + a * c) * pow(1 - k, p - 2, p) % p
    return minitor.onion_address((y | (x & 1) << 255).to_bytes(32, "little"))


@pytest.mark.parametrize(
    "text",
    [
        "", "onion", ".onion", "example.com", "expyuzz4wqqyqhjn.onion", GOOD[0],
        GOOD[0] + ".onion.com", GOOD[0][:-1] + ".onion", GOOD[0][:-1] + "a.onion",
        "3" + GOOD[0][1:] + ".onion", GOOD[0][:20] + "1" + GOOD[0][21:] + ".onion",
        minitor.onion_address(bytes(32)),
        minitor.onion_address(b"\x01" + bytes(31)),
        with_torsion(minitor.parse_onion_address(GOOD[0] + ".onion")),
    ],
)
def test_address_bad(text):
    with pytest.raises(minitor.AddressError):
        minitor.parse_onion_address(text)


# ─── time periods ───


@pytest.mark.parametrize(
    "when,first,rotated",
    [
        # rend-spec-v3 [TIME-PERIODS]: period 16903 ends on 2016-04-13 at 12:00.
        ("2016-04-13 00:00:00", 16903, False),
        ("2016-04-13 11:00:00", 16903, False),
        ("2016-04-13 12:00:00", 16903, True),
        ("2016-04-13 23:00:00", 16903, True),
        ("2016-04-14 00:00:00", 16904, False),
        ("2016-04-14 11:00:00", 16904, False),
        ("2016-04-14 12:00:00", 16904, True),
    ],
)
def test_time_periods(when, first, rotated):
    consensus = Consensus(when)
    one, two, fetch = minitor.time_periods(consensus, False)
    assert one[:3] == (first, 1440, b"p" * 32) and two[:3] == (first + 1, 1440, b"c" * 32)
    assert fetch is (two if rotated else one)
    # A protocol run begins at midnight.
    midnight = consensus.valid_after // 86400 * 86400
    assert one[3] == midnight - 86400 and two[3] == midnight


def test_time_periods_testing():
    # 20 s between votes: a run is 480 s, a period 8 minutes, the offset 4 minutes.
    start = 3600000 * 480
    for slot in range(24):
        consensus = Consensus("2016-04-13 00:00:00", 20)
        consensus.valid_after = start + slot * 20
        consensus.fresh_until = consensus.valid_after + 20
        one, two, fetch = minitor.time_periods(consensus, True)
        assert one[1] == 8 and two[0] == one[0] + 1 == 3600000
        assert one[3] == start - 480 and two[3] == start
        assert fetch is (two if slot >= 12 else one)
        consensus.params = {"hsdir_interval": 8}
        assert minitor.time_periods(consensus, False) == (one, two, fetch)


def test_disaster_value():
    consensus = Consensus("2016-04-13 00:00:00", current=None, previous=None)
    one, two, _ = minitor.time_periods(consensus, False)
    for period in (one, two):
        text = b"shared-random-disaster" + (1440).to_bytes(8, "big") + period[0].to_bytes(8, "big")
        assert period[2] == hashlib.sha3_256(text).digest()
    consensus = Consensus("1970-01-03 00:00:00", current=None, previous=b"p" * 32)
    one, two, _ = minitor.time_periods(consensus, False)
    assert one[2] == b"p" * 32
    # tor: test_disaster_srv, time period 1.
    consensus = Consensus("1970-01-02 13:00:00", current=None, previous=None)
    for period in minitor.time_periods(consensus, False):
        if period[0] == 1:
            assert period[2].hex().upper() == (
                "F8A4948707653837FA44ABB5BBC75A12F6F101E7F8FAF699B9715F4965D3507D"
            )
            break
    else:
        pytest.fail("period 1 is in force a day and a half after the epoch")


# ─── hash ring ───


class Table:
    def __init__(self, count, hsdirs):
        self.ids = [hashlib.sha256(b"%d" % i).digest() for i in range(count)]
        flags = minitor.HSDIR | minitor.HSDIR2 | minitor.USABLE
        self.flags = [flags if i % hsdirs == 0 else flags & ~minitor.HSDIR for i in range(count)]

    def ed_id(self, i):
        return self.ids[i]

    def identities(self, need):
        return [(i, self.ids[i]) for i, flags in enumerate(self.flags) if flags & need == need]


def hs_index(blinded, replica, period):
    place = struct.pack(">QQQ", replica, period[1], period[0])
    return hashlib.sha3_256(b"store-at-idx" + blinded + place).digest()


def hsdir_index(ed_id, period):
    place = period[2] + struct.pack(">QQ", period[0], period[1])
    return hashlib.sha3_256(b"node-idx" + ed_id + place).digest()


def test_ring_indexes(monkeypatch):
    """The vectors of C tor are what the ring is made of."""
    period = (42, 1440, b"\x43" * 32, 0)
    assert hs_index(b"\x42" * 32, 1, period).hex() == (
        "37e5cbbd56a22823714f18f1623ece5983a0d64c78495a8cfab854245e5f9a8a"
    )
    assert hsdir_index(b"\x42" * 32, period).hex() == (
        "db475361014a09965e7e5e4d4a25b8f8d4b8f16cb1d8a7e95eed50249cc1a2d5"
    )
    table, seen, right = Table(1, 1), [], minitor.sha3_256
    table.ids = [b"\x42" * 32]

    def sha3_256(data):
        seen.append(right(data))
        return seen[-1]

    monkeypatch.setattr(minitor, "sha3_256", sha3_256)
    consensus = Consensus("2016-04-13 00:00:00")
    assert minitor.hsdir_ring(table, consensus, b"\x42" * 32, period, "fetch") == [0]
    starts = [hs_index(b"\x42" * 32, n, period) for n in (1, 2)]
    assert seen == starts + [hsdir_index(b"\x42" * 32, period)]


def slow_ring(table, blinded, period, replicas, spread):
    ring = sorted(
        (hsdir_index(table.ed_id(i), period), i)
        for i, flags in enumerate(table.flags)
        if flags & minitor.HSDIR
    )
    found = []
    for replica in range(1, replicas + 1):
        at = hs_index(blinded, replica, period)
        order = [i for d, i in ring if d >= at] + [i for d, i in ring if d < at]
        found += [i for i in order if i not in found][:spread]
    return found


@pytest.mark.parametrize("count", [1, 5, 9, 100, 1000])
@pytest.mark.parametrize("replicas,spread", [(1, 1), (2, 3), (2, 4), (4, 2)])
def test_ring(count, replicas, spread):
    names = ("hsdir_n_replicas", "hsdir_spread_store", "hsdir_spread_fetch")
    consensus = Consensus("2016-04-13 00:00:00", params=dict(zip(names, (replicas, spread, 1))))
    table = Table(count, 2)
    for n in range(4):
        blinded = hashlib.sha256(b"b%d" % n).digest()
        period = (n, 1440, b"s" * 32, 0)
        found = minitor.hsdir_ring(table, consensus, blinded, period, "store")
        assert found == slow_ring(table, blinded, period, replicas, spread)
        assert len(found) == min(replicas * spread, (count + 1) // 2)
        fetch = minitor.hsdir_ring(table, consensus, blinded, period, "fetch")
        assert fetch == slow_ring(table, blinded, period, replicas, 1)


# ─── revision counters ───


@pytest.mark.parametrize(
    "n,expected",
    [(82283, 2695743564), (123122, 4036781069), (12154, 402067100), (11391, 376696838),
     (65845, 2161801517), (86301, 2828270975), (7110, 234966492), (9612, 318326551),
     (121128, 3971553290), (46254, 1521227949)],
)
def test_ope_vectors(n, expected, monkeypatch):
    key = H("19e05891d55232c08c2cad91d612fdb9cbd6691949a0742434a76c80bc6992fe")
    monkeypatch.setattr(minitor, "sha3_256", lambda data: key)
    assert minitor.revision_counter(b"", n - 1) == expected


def test_revision_counter_grows():
    esk = minitor.ed25519_expand(b"k" * 32)
    counters = [minitor.revision_counter(esk, n) for n in (0, 1, 2, 255, 256, 257, 5000, 172800)]
    assert counters == sorted(set(counters)) and counters[0] > 0


# ─── descriptors ───


class Intro(minitor.Record):
    def __init__(self, n):
        self.rsa_id, self.ed_id = bytes([n]) * 20, bytes([n]) * 32
        self.address, self.port = "127.%d.0.1" % n, 5000 + n
        place = bytes((127, n, 0, 1)) + self.port.to_bytes(2, "big")
        self.specifiers = b"\3\0\6" + place + b"\2\x14" + self.rsa_id + b"\3\x20" + self.ed_id
        self.ntor_key = minitor.x25519(bytes([n]) * 32)
        self.auth_key = ed_public(bytes([n]) * 32)
        self.enc_key = minitor.x25519(bytes([n + 1]) * 32)


@pytest.fixture(scope="module")
def keys():
    esk = minitor.ed25519_expand(b"identity".ljust(32, b"."))
    key = minitor.ed25519_public(esk)
    param = minitor.blinding_param(key, (16903, 1440, b"", 0))
    blinded = minitor.ed25519_blind_public(key, param)
    blinded_esk = minitor.ed25519_blind_secret(esk, param)
    assert minitor.ed25519_public(blinded_esk) == blinded
    return blinded_esk, blinded, minitor.subcredential(key, blinded)


def make(keys, intros, when=NOW, revision=123456789012, clients=()):
    file = minitor.spool("")
    minitor.make_descriptor(file, keys[0], keys[1], keys[2], revision, intros, when, 0, clients)
    return file.getvalue()


def test_descriptor_round_trip(keys):
    intros = [Intro(1), Intro(2), Intro(3)]
    data = make(keys, intros)
    # 10,000 bytes of plaintext, salt and MAC, in base64.
    assert 13300 < len(data) < 15000
    found = minitor.parse_descriptor(data, keys[1], keys[2], NOW)
    assert (found.revision, found.until) == (123456789012, NOW + 10800)
    for a, b in zip(found.intro_points, intros):
        for name in ("rsa_id", "ed_id", "address", "port", "ntor_key", "auth_key", "enc_key"):
            assert getattr(a, name) == getattr(b, name)
    again = make(keys, found.intro_points)
    assert len(minitor.parse_descriptor(again, keys[1], keys[2], NOW).intro_points) == 3


def test_descriptor_form(keys):
    data = make(keys, [Intro(1)])
    assert data.startswith(b"hs-descriptor 3\ndescriptor-lifetime 180\ndescriptor-signing-key-cert\n-")
    assert all(len(line) <= 64 for line in data.split(b"\n") if b" " not in line)
    assert data.endswith(b"\n") and data.count(b"\nsignature ") == 1
    item = minitor.document(data)
    blob = item(b"superencrypted")[1]
    assert (len(blob) - 48) % 10000 == 0
    secret = keys[1] + keys[2] + (123456789012).to_bytes(8, "big")
    outer = minitor._unseal(item, b"superencrypted", secret)
    assert outer.startswith(b"desc-auth-type x25519\ndesc-auth-ephemeral-key ")
    assert outer.count(b"\nauth-client ") == 16


@pytest.mark.parametrize("count,digest", [(3, "32d73d72c77d567f"), (20, "58922289cf93929a")])
def test_descriptor_in_pieces_is_that_made_in_one(keys, monkeypatch, count, digest):
    """The digests are of what was made when a descriptor was still one text in memory."""
    seeds = iter(range(1000))
    monkeypatch.setattr(minitor, "urandom", lambda n: minitor.sha256(b"%d" % next(seeds))[:n])
    data = make(keys, [Intro(n) for n in range(1, count + 1)])
    assert minitor.sha256(data)[:8].hex() == digest


def refused(data, keys, when=NOW, match=None):
    with pytest.raises(minitor.ProtocolError, match=match):
        minitor.parse_descriptor(data, keys[1], keys[2], when)


def outer_layer(data, keys):
    item, secret = minitor.document(data), keys[1] + keys[2] + (123456789012).to_bytes(8, "big")
    return minitor._unseal(item, b"superencrypted", secret)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_descriptor_for_some_clients(keys, count):
    secrets = [bytes([n + 1]) * 32 for n in range(count)]
    clients = [minitor.x25519(secret) for secret in secrets]
    data = make(keys, [Intro(1), Intro(2)], clients=clients)
    for secret in secrets:
        found = minitor.parse_descriptor(data, keys[1], keys[2], NOW, secret)
        assert [i.rsa_id[0] for i in found.intro_points] == [1, 2]
    for secret, reason in ((None, 0xF4), (b"z" * 32, 0xF5), (clients[0], 0xF5)):
        with pytest.raises(minitor.AuthorizationError) as caught:
            minitor.parse_descriptor(data, keys[1], keys[2], NOW, secret)
        assert caught.value.reason == reason and isinstance(caught.value, minitor.OnionError)
    # How many there are does not show; where they stand is chance.
    lines = outer_layer(data, keys).count(b"\nauth-client ")
    assert lines == (count + 15) // 16 * 16
    if count == 1:
        assert len(data) == len(make(keys, [Intro(1), Intro(2)]))


def test_too_many_clients(keys, monkeypatch):
    """What directories would refuse is not made."""
    monkeypatch.setattr(minitor, "x25519", lambda *_: b"x" * 32)
    clients = [bytes([n % 251] * 32) for n in range(320)]
    assert 40000 < len(make(keys, [Intro(1)] * 3, clients=clients)) < 50000
    with pytest.raises(minitor.ProtocolError, match="fewer clients"):
        make(keys, [Intro(1)] * 3, clients=clients * 2)


def test_the_cookie_of_a_descriptor_by_other_means(keys):
    """As rend-spec-v3 2.5.1.2 has it, with the algorithms of another library."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    own = X25519PrivateKey.from_private_bytes(b"c" * 32)
    data = make(keys, [Intro(1)], clients=[b"q" * 32, minitor.x25519(b"c" * 32), b"r" * 32])
    lines = [line.split(b" ") for line in outer_layer(data, keys).split(b"\n")]
    places, form = {}, lambda word: base64.b64decode(word + b"==")
    assert lines[0] == [b"desc-auth-type", b"x25519"]
    assert lines[1][0] == b"desc-auth-ephemeral-key"
    seed = own.exchange(X25519PublicKey.from_public_bytes(form(lines[1][1])))
    kdf = hashlib.shake_256(keys[2] + seed).digest(40)
    assert [line[0] for line in lines[2:19]] == [b"auth-client"] * 16 + [b"encrypted"]
    for _, client_id, iv, cookie in lines[2:18]:
        assert [len(form(word)) for word in (client_id, iv, cookie)] == [8, 16, 16]
        assert b"=" not in client_id + iv + cookie
        places[form(client_id)] = form(iv), form(cookie)
    iv, cookie = places[kdf[:8]]
    cookie = Cipher(algorithms.AES(kdf[8:]), modes.CTR(iv)).decryptor().update(cookie)
    secret = keys[1] + cookie + keys[2] + (123456789012).to_bytes(8, "big")
    item = minitor.document(outer_layer(data, keys))
    assert minitor._unseal(item, b"encrypted", secret).startswith(b"create2-formats 2\n")


def test_clients_stand_anywhere(keys):
    places = set()
    for _ in range(12):
        data = make(keys, [Intro(1)], clients=[minitor.x25519(b"c" * 32)])
        outer = outer_layer(data, keys)
        public = minitor.b64decode(minitor.document(outer)(b"desc-auth-ephemeral-key")[0])
        client_id, _ = minitor._client_keys(keys[2], b"c" * 32, public)
        found = [line.split(b" ")[1] for line in outer.split(b"\n") if line[:5] == b"auth-"]
        places.add(found.index(minitor.b64encode(client_id).encode()))
    # All at one place: one in 16 to the 11.
    assert len(places) > 1


def test_a_key_that_is_not_needed_does_no_harm(keys):
    data = make(keys, [Intro(1)])
    assert minitor.parse_descriptor(data, keys[1], keys[2], NOW, b"k" * 32).intro_points


def test_authorization_with_zeros_is_refused(keys, monkeypatch):
    for key in LOW_ORDER:
        with pytest.raises(minitor.ProtocolError):
            make(keys, [Intro(1)], clients=[key])
        for given in (key, minitor.auth_text(key)):
            with pytest.raises(minitor.ConfigError, match="X25519"):
                minitor.auth_key(given)
        # A service's ephemeral key.
        with monkeypatch.context() as patch:
            patch.setattr(minitor, "x25519_keypair", lambda: (b"x" * 32, key))
            data = make(keys, [Intro(1)])
        minitor.parse_descriptor(data, keys[1], keys[2], NOW)
        with pytest.raises(minitor.ProtocolError, match="X25519"):
            minitor.parse_descriptor(data, keys[1], keys[2], NOW, b"k" * 32)


def test_keys_for_authorization():
    for n in range(5):
        key = minitor.sha256(bytes([n]))
        text = base64.b32encode(key).decode().rstrip("=")
        assert minitor.auth_text(key) == "descriptor:x25519:" + text
        for given in (key, text, text.lower(), " %s\n" % text, "a:descriptor:x25519:" + text):
            assert minitor.auth_key(given) == key
    for bad in (b"", b"k" * 31, b"k" * 33, "", text[1:], text + "A", text[:-1] + "1", "\xe9" * 52):
        with pytest.raises(minitor.ConfigError, match="X25519"):
            minitor.auth_key(bad)


def test_descriptor_refused(keys):
    data = make(keys, [Intro(1), Intro(2)])
    refused(b"", keys)
    refused(data, keys, NOW + 55 * 3600, "expired")
    refused(data, (0, ed_public(b"o" * 32), keys[2]), match="another key")
    refused(data, (0, keys[1], bytes(32)), match="superencrypted")
    refused(data.replace(b"revision-counter 1", b"revision-counter 2"), keys, match="signature")
    for n in range(0, len(data), 397):
        refused(data[:n], keys)
        refused(data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :], keys)
    refused(make(keys, [Intro(1)], revision=0).replace(b"counter 0", b"counter x"), keys)


def test_descriptor_bad_intro_points(keys, monkeypatch):
    class Zero(Intro):
        def __init__(self, n):
            Intro.__init__(self, n)
            self.enc_key = bytes(32)

    data = make(keys, [Zero(1), Intro(2)])
    found = minitor.parse_descriptor(data, keys[1], keys[2], NOW)
    assert [i.rsa_id[0] for i in found.intro_points] == [2]
    refused(make(keys, [Zero(1)]), keys, match="no usable")
    refused(make(keys, []), keys, match="no usable")
    # A certificate for another key than the one beside it.
    right = minitor._enc_key_ed
    monkeypatch.setattr(minitor, "_enc_key_ed", lambda u: right(u[::-1]))
    data = make(keys, [Intro(1)])
    monkeypatch.undo()
    refused(data, keys, match="no usable")


def test_descriptor_other_keys(keys, monkeypatch):
    """Keys of other kinds beside ntor's are passed over; a second one of ntor is not."""
    encode = minitor._base64

    def make_with(kind):
        def both(data):
            line = b" %sonion-key %s " % (encode(data), kind)
            return encode(data) if data != Intro(1).ntor_key else line[1:] + encode(data)

        monkeypatch.setattr(minitor, "_base64", both)
        data = make(keys, [Intro(1)])
        monkeypatch.undo()
        return data

    found = minitor.parse_descriptor(make_with(b"ntor-v9"), keys[1], keys[2], NOW)
    assert found.intro_points[0].ntor_key == Intro(1).ntor_key
    refused(make_with(b"ntor"), keys, match="no usable")


def test_descriptor_certificates(keys, monkeypatch):
    """The signing-key extension is mandatory; the key is one of Ed25519."""
    right = minitor.make_ed_cert
    for kind in (8, 9, 11):
        for at, byte in ((6, 3), (42, 5)):

            def changed(k, key, when, esk, public):
                cert = bytearray(right(k, key, when, esk, public)[:-64])
                if k == kind:
                    cert[at] = byte
                cert = bytes(cert)
                return cert + minitor.ed25519_sign(esk, public, cert)

            monkeypatch.setattr(minitor, "make_ed_cert", changed)
            data = make(keys, [Intro(1)])
            monkeypatch.undo()
            refused(data, keys)


def test_descriptor_numbers(keys):
    top = (1 << 64) - 1
    data = make(keys, [Intro(1)], revision=top)
    assert minitor.parse_descriptor(data, keys[1], keys[2], NOW).revision == top
    for word, least, most in ((b"0", 0, 1), (b"18446744073709551615", 0, top), (b"30", 30, 720)):
        assert minitor.decimal(word, least, most) == int(word)
    for word in (b"", b"-1", b"+1", b"1_0", b" 1", b"29", b"721", b"9" * 5000):
        with pytest.raises(minitor.ProtocolError):
            minitor.decimal(word, 30, 720)


def test_descriptor_of_c_tor():
    made = json.loads((Path(__file__).resolve().parent / "tor_made.json").read_text())["descriptor"]
    key, data, when = H(made["key"]), made["text"].encode(), made["when"]
    blinded = minitor.ed25519_blind_public(key, minitor.blinding_param(key, made["period"]))
    subcred = minitor.subcredential(key, blinded)
    found = minitor.parse_descriptor(data, blinded, subcred, when)
    # tor's revision counter is that of a whole second in the protocol run.
    assert found.revision == made["revision"]
    assert minitor.revision_counter(H(made["besk"]), made["second"]) == made["revision"]
    intros = [
        [i.address, i.port, i.rsa_id.hex(), i.auth_key.hex(), i.enc_key.hex()]
        for i in found.intro_points
    ]
    assert intros == made["intro"] and len(intros) == 3
    # What we make is as long as what tor makes, but for the revision counter's digits.
    again = make((H(made["besk"]), blinded, subcred), found.intro_points, when, found.revision)
    assert len(again) == len(data)
    refused(data, (0, blinded, subcred), when + 60 * 3600, "expired")


def test_descriptor_of_c_tor_for_some_clients():
    made = json.loads((Path(__file__).resolve().parent / "tor_made.json").read_text())["restricted"]
    key, data, when, secret = H(made["key"]), made["text"].encode(), made["when"], H(made["client"])
    blinded = minitor.ed25519_blind_public(key, minitor.blinding_param(key, made["period"]))
    subcred = minitor.subcredential(key, blinded)
    found = minitor.parse_descriptor(data, blinded, subcred, when, secret)
    assert found.revision == made["revision"] and made["intro"] == [
        [i.address, i.port, i.rsa_id.hex(), i.auth_key.hex(), i.enc_key.hex()]
        for i in found.intro_points]
    for wrong, reason in ((None, 0xF4), (minitor.x25519(secret), 0xF5)):
        with pytest.raises(minitor.AuthorizationError) as caught:
            minitor.parse_descriptor(data, blinded, subcred, when, wrong)
        assert caught.value.reason == reason
    # As long as what we make for as many.
    clients, file = [minitor.x25519(bytes([n]) * 32) for n in (1, 2, 3)], minitor.spool("")
    keys = minitor.ed25519_expand(b"any"), blinded, subcred, found.revision
    minitor.make_descriptor(file, *keys, found.intro_points, when, found.flow, clients)
    assert len(file.getvalue()) == len(data)


def test_enc_key_form():
    for n in range(1, 5):
        ed = ed_public(bytes([n]) * 32)
        scalar = minitor.ed25519_expand(bytes([n]) * 32)[:32]
        u = minitor.x25519(scalar)
        assert minitor._enc_key_ed(u) == ed[:31] + bytes([ed[31] & 127])
