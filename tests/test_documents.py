"""Section 6: certificates, authority certificates, consensus, microdescriptors."""

import calendar
import hashlib
import json
import pathlib
import random
import struct
import time
import types

import pytest

import minitor
from fakenet import FakeNet, FakeRelay, RsaKey, read_certs

REAL = pathlib.Path(__file__).resolve().parents[2] / "shared" / "real"
ERRORS = (minitor.ProtocolError, minitor.DirectoryError, minitor.ClockError)


def ed_public(seed):
    return minitor.ed25519_public(minitor.ed25519_expand(seed))


@pytest.fixture(scope="module")
def net():
    return FakeNet()


def parse(net, text, size=1 << 20, table=None):
    table = minitor.RelayTable() if table is None else table
    parser = minitor.ConsensusParser(table.add)
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
    return table, parser.finish()


def certs_of(net):
    return read_certs(net.certs(), net.identities)


# ── Ed25519 certificates ──


def ed_cert(seed, key, expires, extensions=(), kind=4, key_type=1, version=1):
    body = struct.pack(">BBIB", version, kind, expires // 3600, key_type) + key
    body += bytes([len(extensions)])
    for extension, flags, data in extensions:
        body += struct.pack(">HBB", len(data), extension, flags) + data
    esk = minitor.ed25519_expand(seed)
    return body + minitor.ed25519_sign(esk, ed_public(seed), body)


def test_ed_cert():
    seed, key, when = bytes(range(32)), bytes(32), 1_700_000_000
    public = ed_public(seed)
    data = ed_cert(seed, key, when + 3600, [(4, 0, public), (99, 0, b"unknown")])
    for at in (when, (when + 3600) // 3600 * 3600):
        assert minitor.check_ed_cert(data, 4, public, at) == key
    for kind, by, at, error in (
        (4, public, when + 7200, "expired"),
        (4, public, (when + 3600) // 3600 * 3600 + 1, "expired"),
        (4, key, when, "another key"),
        (5, public, when, "type 5"),
    ):
        with pytest.raises(minitor.ProtocolError, match="certificate .*" + error):
            minitor.check_ed_cert(data, kind, by, at)


def test_ed_cert_without_its_key():
    seed, when = bytes(range(32)), 1_700_000_000
    data, public = ed_cert(seed, bytes(32), when + 7200, kind=5, key_type=3), ed_public(seed)
    assert minitor.check_ed_cert(data, 5, public, when) == bytes(32)
    with pytest.raises(minitor.ProtocolError, match="signature"):
        minitor.check_ed_cert(data, 5, ed_public(bytes(32)), when)
    # Others must have it.
    data = ed_cert(seed, bytes(32), when + 7200)
    with pytest.raises(minitor.ProtocolError, match="another key"):
        minitor.check_ed_cert(data, 4, public, when)
    with pytest.raises(minitor.ProtocolError, match="signature"):
        minitor.check_ed_cert(data, 4, ed_public(bytes(32)), when)


@pytest.mark.parametrize(
    "extensions, version, key_type",
    [([(99, 1, b"")], 1, 1), ([(4, 0, b"short")], 1, 1), ([], 2, 1), ([], 1, 3)],
)
def test_ed_cert_refused(extensions, version, key_type):
    seed, when = bytes(32), 1_700_000_000
    data = ed_cert(seed, bytes(32), when + 7200, extensions, 4, key_type, version)
    with pytest.raises(minitor.ProtocolError, match="malformed"):
        minitor.check_ed_cert(data, 4, ed_public(seed), when)


def test_ed_cert_truncated_changed_or_longer():
    seed, when = bytes(range(32)), 1_700_000_000
    public = ed_public(seed)
    data = ed_cert(seed, bytes(32), when + 7200, [(4, 0, public)])
    bad = [data[:n] for n in range(len(data))] + [data + b"x"]
    for n in range(0, len(data), 5):
        changed = bytearray(data)
        changed[n] ^= 1
        bad.append(bytes(changed))
    for one in bad:
        with pytest.raises(minitor.ProtocolError):
            minitor.check_ed_cert(one, 4, public, when)


def test_crosscert():
    key, when, seed = RsaKey(), 1_700_000_000, bytes(32)
    other, signing, identity = RsaKey(), ed_public(seed), ed_public(b"i" * 32)
    certified = ed_cert(b"i" * 32, signing, when + 86400, [(4, 0, identity)])
    link = ed_cert(seed, b"d" * 32, when + 86400, kind=5, key_type=3)

    def parse(cross, by=key):
        body = b"\4"
        for kind, cert in ((2, by.der), (4, certified), (5, link), (7, cross)):
            body += struct.pack(">BH", kind, len(cert)) + cert
        return minitor.parse_certs(body, b"d" * 32, minitor.sha1(by.der), None)

    def crosscert(ed_id, hours=2):
        signed = ed_id + struct.pack(">I", when // 3600 + hours)
        digest = hashlib.sha256(b"Tor TLS RSA/Ed25519 cross-certificate" + signed).digest()
        return signed + bytes([128]) + key.sign(digest)

    data = crosscert(identity)
    # With the time at which the first expires: the caller judges that.
    assert parse(data) == (identity, when // 3600 * 3600 + 7200)
    assert when + 82800 < parse(crosscert(identity, 48))[1] <= when + 86400
    for bad, by, error in (
        (data, other, "wrong"),
        (data + b"x", key, "wrong"),
        (data[:-1], key, "truncated"),
        (b"x" + data[1:], key, "wrong"),
        (crosscert(signing), key, "another key"),
    ):
        with pytest.raises(minitor.ProtocolError, match=error):
            parse(bad, by)


# ── Meta-format, authority certificates ──


def test_parse_time():
    for t in list(range(0, 4_000_000_000, 86400 * 13 + 4321)) + [951782400, 951868800]:
        text = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(t)).encode()
        assert minitor.parse_time(text) == t == calendar.timegm(time.gmtime(t))
    for bad in (b"", b"2024-05-17", b"2024-13-01 00:00:00", b"2024-01-01 25:00:00", b"x y", b"x-y-z a:b:c"):
        with pytest.raises(minitor.ProtocolError):
            minitor.parse_time(bad)


def test_authority_certs(net):
    certs = certs_of(net)
    assert set(certs) == {(a.id, a.signing.digest) for a in net.authorities}
    for size in (1, 61, 498):
        assert read_certs(net.certs(), net.identities, size) == certs
    assert read_certs(net.certs(), set()) == {}
    one = net.authorities[0]
    assert list(read_certs(net.certs(), {one.id})) == [
        (one.id, one.signing.digest)
    ]


def test_authority_certs_refused(net):
    one, two = net.authorities[:2]
    text = one.cert
    lines = text.split(b"\n")
    for bad in (
        text.replace(b"dir-key-expires 20", b"dir-key-expires 21"),
        text.replace(b"dir-key-crosscert\n", b"dir-key-other\n"),
        text[:-200],
        text.replace(b"dir-key-published", b"dir-key-expires"),
        two.cert[: two.cert.find(b"dir-key-crosscert")]
        + one.cert[one.cert.find(b"dir-key-crosscert") :],
        b"\n".join(lines[:5] + [lines[5].swapcase()] + lines[6:]),
    ):
        with pytest.raises(minitor.ProtocolError):
            assert read_certs(bad, net.identities) == {}
            raise minitor.ProtocolError("passed over")


# ── Consensus ──


@pytest.mark.parametrize("size", [1, 7, 64, 4096, 1 << 20])
def test_consensus(net, size):
    table, c = parse(net, net.consensus(), size)
    assert len(table) == len(net.relays)
    c.verify(certs_of(net), net.identities)
    assert c.valid_after == net.valid_after
    assert c.fresh_until - c.valid_after == 3600 and c.valid_until - c.valid_after == 10800
    assert c.params == {"circwindow": 1000, "hsdir_interval": 1440}
    assert c.srv_previous == c.srv_current == bytes(range(32))
    assert c.bandwidth_weights == {"Wbd": 0, "Wbe": 0, "Wgg": 10000}
    assert c.lacking == []
    for fake in net.relays:
        relay = table.relay(table.find(fake.rsa_id))
        assert (relay.rsa_id, relay.address, relay.port) == (fake.rsa_id, fake.address, 9001)
        assert table.weights[relay.index] == 1000 and not relay.flags & minitor.USABLE
        assert bool(relay.flags & minitor.EXIT) == ("Exit" in fake.flags)
        wanted = minitor.GUARD | minitor.RELAY2 | minitor.HSDIR2
        assert relay.flags & wanted == wanted
        assert not relay.flags & (minitor.BADEXIT)


def test_param(net):
    c = parse(net, net.consensus())[1]
    assert c.param("circwindow", 500) == 1000
    assert c.param("circwindow", 500, 100, 900) == 900
    assert c.param("missing", 7, 8, 9) == 8


def test_flags_follow_the_lines(net):
    relay = FakeRelay(1, flags="Fast MiddleOnly BadExit NoEdConsensus Unknown")
    text = net.unsigned()
    at = text.index("r relay")
    entry = relay.entry().replace("FlowCtrl=1-2", "FlowCtrl=2").replace("Relay=1-4", "Relay=3")
    text = text[:at] + entry + text[text.index("directory-footer") :]
    table = parse(net, net.consensus(text))[0]
    flags = table.flags[0]
    m = minitor
    for bit in (m.FAST, m.MIDDLEONLY, m.BADEXIT, m.NOEDCONSENSUS):
        assert flags & bit
    for bit in (m.GUARD, m.EXIT, m.FLOWCTRL1, m.RELAY2):
        assert not flags & bit
    assert flags & m.HSDIR2 and flags & m.HSINTRO4 and flags & m.HSREND2


def test_relays_without_microdescriptor_are_left_out(net):
    text = net.unsigned()
    start = text.index("\nm ", text.index("\nr ")) + 1
    text = text[:start] + text[text.index("\n", start) + 1 :]
    assert len(parse(net, net.consensus(text))[0]) == len(net.relays) - 1


def test_more_than_half_of_the_known_authorities(net):
    certs = certs_of(net)
    a, b, c = net.authorities
    for signers, good in (
        ([a, b, c], True),
        ([a, b], True),
        ([a], False),
        ([a, a, a], False),
        ([], False),
    ):
        if not signers:
            continue
        consensus = parse(net, net.consensus(signers=signers))[1]
        if good:
            consensus.verify(certs, net.identities)
        else:
            with pytest.raises(minitor.DirectoryError, match="only [01] of 3 authorities signed"):
                consensus.verify(certs, net.identities)
    consensus = parse(net, net.consensus(signers=[a, b]))[1]
    # Two of four are not more than half, whoever the others are.
    with pytest.raises(minitor.DirectoryError):
        consensus.verify(certs, net.identities | {bytes(20)})
    with pytest.raises(minitor.DirectoryError):
        consensus.verify(certs, {bytes([i]) * 20 for i in range(3)})


def test_two_keys_of_one_authority_count_once(net):
    other = FakeNet(0, 1).authorities[0]
    one = net.authorities[0]
    twin = type(one).__new__(type(one))
    twin.name, twin.identity, twin.signing, twin.id = "twin", one.identity, other.signing, one.id
    twin.cert = twin.certify(int(time.time()) + 100000)
    consensus = parse(net, net.consensus(signers=[one, twin]))[1]
    certs = read_certs(net.certs() + twin.cert, net.identities)
    assert len(certs) == 4 and len(consensus.signatures) == 2
    with pytest.raises(minitor.DirectoryError, match="1 of 3"):
        consensus.verify(certs, net.identities)


def test_expired_and_missing_certificates(net):
    consensus = parse(net, net.consensus())[1]
    certs = certs_of(net)
    just = {pair: (key, net.valid_after) for pair, (key, _) in certs.items()}
    late = {pair: (key, net.valid_after - 1) for pair, (key, _) in certs.items()}
    assert len(consensus.missing_certs(late, net.identities)) == 3
    assert consensus.missing_certs(certs, net.identities) == []
    assert consensus.missing_certs(just, net.identities) == []
    assert len(consensus.missing_certs({}, net.identities)) == 3
    # Those of others are not asked for.
    one = net.authorities[0].id
    assert [pair[0] for pair in consensus.missing_certs({}, {one})] == [one]
    consensus.verify(just, net.identities)
    with pytest.raises(minitor.DirectoryError):
        consensus.verify(late, net.identities)
    with pytest.raises(minitor.DirectoryError):
        consensus.verify({}, net.identities)


def test_every_change_is_noticed(net):
    text, certs = net.consensus(), certs_of(net)
    end = text.index(b"directory-signature")
    rng = random.Random(1)
    for _ in range(200):
        changed = bytearray(text)
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
        with pytest.raises(ERRORS):
            parse(net, bytes(changed))[1].verify(certs, net.identities)


def test_nothing_but_our_errors(net):
    text = net.consensus()
    rng = random.Random(2)
    for _ in range(400):
        changed = bytearray(text)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(changed))
            if rng.random() < 0.5:
                changed[at] = rng.choice(b"\0\n -=,[]:\xff9m")
            else:
                del changed[at : at + rng.randrange(60)]
        try:
            parse(net, bytes(changed), rng.choice([100, 5000]))
        except ERRORS:
            pass


@pytest.mark.parametrize(
    "old, new",
    [
        ("version 3 microdesc", "version 3"),
        ("version 3 microdesc", "version 4 microdesc"),
        ("vote-status consensus", "vote-status vote"),
        ("consensus-method 33", "consensus-method 8"),
        ("consensus-method 33\n", ""),
        ("valid-after", "valid-afterwards"),
        ("voting-delay 300 300", "consensus-method 34"),
        ("circwindow=1000", "circwindow=x"),
        ("Cons=2", "Cons=70"),
        ("Cons=2", "Cons=3-2"),
        ("shared-rand-current-value 8 AA", "shared-rand-current-value 8 "),
        ("Bandwidth=1000", "Bandwidth=many"),
        (" 9001 0", " 90010 0"),
        (" 9001 0", " 0 0"),
        ("10.0.0.1 9001", "10.0.0 9001"),
        ("10.0.0.1 9001", "10.0.0.256 9001"),
        ("a [2001:db1::1]", "a [xyz:db1::1]"),
        ("directory-footer", "directory-foot"),
        ("\nm ", "\nm x"),
    ],
)
def test_malformed(net, old, new):
    text = net.unsigned()
    assert old in text
    with pytest.raises(minitor.ProtocolError):
        parse(net, net.consensus(text.replace(old, new)))


def test_order_of_the_times(net):
    text = net.unsigned()
    with pytest.raises(minitor.ProtocolError):
        parse(net, net.consensus(text.replace("fresh-until 20", "fresh-until 19")))


def test_relays_must_be_sorted_and_distinct(net):
    text = net.unsigned()
    first, second = [text.index("\nr ") + 1, 0]
    second = text.index("\nr ", first) + 1
    for bad in (
        text[:first] + text[first:second] * 2 + text[second:],
        text[:first] + text[second:].replace("directory-footer", text[first:second] + "directory-footer"),
    ):
        with pytest.raises(minitor.ProtocolError, match="order"):
            parse(net, net.consensus(bad))


def test_truncated(net):
    text = net.consensus()
    for n in range(0, len(text), 331):
        with pytest.raises(ERRORS):
            c = parse(net, text[:n])[1]
            c.verify(certs_of(net), net.identities)
            # What is cut off between two signatures still has a majority.
            assert len(c.signatures) >= 2
            raise minitor.ProtocolError("accepted, as it may be")


def test_what_follows_a_signature_is_not_believed(net):
    text = net.consensus()
    c = parse(net, text + b"bandwidth-weights Wgg=1\n")[1]
    assert c.bandwidth_weights["Wgg"] == 10000
    unsigned = net.unsigned().replace("bandwidth-weights", "other-weights")
    c = parse(net, net.consensus(unsigned) + b"bandwidth-weights Wgg=1\n")[1]
    assert c.bandwidth_weights == {}
    for at in ("vote-status", "r relay"):
        bad = net.unsigned().replace(at, "directory-signature sha256 A B\n" + at, 1)
        with pytest.raises(minitor.ProtocolError):
            parse(net, net.consensus(bad))


def test_sha1_signatures_do_not_count(net):
    text = net.consensus().replace(b"directory-signature sha256 ", b"directory-signature ")
    assert parse(net, text)[1].signatures == {}


def test_bounds(net):
    parser = minitor.ConsensusParser(minitor.RelayTable().add)
    with pytest.raises(minitor.ProtocolError, match="too long"):
        for _ in range(100):
            parser.feed(b"x" * 1000)
    # Of lines before the relays nothing is kept but what a Consensus has, once.
    parser = minitor.ConsensusParser(minitor.RelayTable().add)
    for _ in range(3000):
        parser.feed(b"contact me\n")
    assert not parser._rest and not parser._bits
    parser.feed(b"params a=1\n")
    with pytest.raises(minitor.ProtocolError, match="malformed"):
        parser.feed(b"params a=2\n")


def test_times(net):
    c = parse(net, net.consensus())[1]
    day = 86400
    for when in (c.valid_after, c.valid_after - day, c.valid_until + day):
        c.check_times(when)
    with pytest.raises(minitor.ClockError, match="at least 24 hours behind: set it"):
        c.check_times(c.valid_after - day - 1)
    with pytest.raises(minitor.ClockError, match="at least 365 days behind"):
        c.check_times(c.valid_after - 365 * day)
    with pytest.raises(minitor.DirectoryError, match="old"):
        c.check_times(c.valid_until + day + 1)


def test_load(net):
    c = parse(net, net.consensus())[1]
    d = minitor.Consensus(c.head)
    names = set(c.__dict__) - {"digest", "signatures"}
    assert names == set(d.__dict__)
    for name in names:
        assert getattr(c, name) == getattr(d, name)
    # What the authorities say of themselves is not kept.
    assert b"contact" not in c.head and len(c.head) < 1000
    with pytest.raises(minitor.ProtocolError):
        minitor.Consensus(b"")


@pytest.mark.skipif(not REAL.exists(), reason="the real documents are not beside the repository")
def test_the_real_consensus():
    network = minitor.load_network()
    text = (REAL / "2024-05-17-certs").read_bytes().replace(b"\r", b"")
    certs = read_certs(text, network.identities)
    table = minitor.RelayTable()
    parser = minitor.ConsensusParser(table.add)
    document = (REAL / "2024-05-17-17-00-consensus-microdesc").read_bytes()
    for at in range(0, len(document), 498):
        parser.feed(document[at : at + 498])
    c = parser.finish()
    assert len(network.identities) == 9 and len(table) == 7195
    assert len(c.missing_certs(certs, network.identities)) == 2
    c.verify(certs, network.identities)
    c.check_times(c.valid_after)
    # Six signatures verify, so two authorities may be missing, and no more.
    pairs = [p for p in c.signatures if p in certs]
    for drop, good in ((1, True), (2, False)):
        left = {p: certs[p] for p in pairs[drop:]}
        if good:
            c.verify(left, network.identities)
        else:
            with pytest.raises(minitor.DirectoryError, match="4 of 9"):
                c.verify(left, network.identities)
    assert c.params["hsdir_spread_store"] == 4 and c.bandwidth_weights["Wbg"] == 3248
    i = table.find(bytes.fromhex("000A10D4") + table.rsa_id(0)[4:])
    relay = table.relay(i)
    assert (relay.address, relay.port, table.weights[i]) == ("104.53.221.159", 9001, 570)
    assert relay.flags & minitor.V2DIR and not relay.flags & minitor.GUARD
    assert table.subnets(1) == (5 << 8 | 196, 0x200141D0)


# ── Microdescriptors ──


def microdescs(text, size=1 << 20):
    found = []

    def sink(digest, keys, beside):
        md = types.SimpleNamespace(digest=digest, bad=len(keys) != 64, ed_id=keys[:32], ntor_key=keys[32:])
        md.policy, md.family, md.family_ids = beside
        found.append(md)

    parser = minitor.MicrodescParser(sink)
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
    parser.finish()
    return found


@pytest.mark.parametrize("size", [1, 13, 498, 1 << 20])
def test_microdescs(net, size):
    a, b = FakeRelay(100), FakeRelay(101, policy="reject 25,119", family_ids=["ed25519:x", "y"])
    a.family = [FakeRelay(i) for i in range(300)]
    b.extra = "p6 accept 1-65535\nid rsa1024 xyz\n"
    relays = net.relays[:5] + [a, b]
    found = microdescs(b"".join(r.microdesc() for r in relays), size)
    assert [md.digest for md in found] == [r.digest() for r in relays]
    for md, r in zip(found, relays):
        assert (md.ntor_key, md.ed_id, md.bad) == (r.ntor_key, r.ed_id, False)
        assert md.policy == r.policy.encode()
    assert found[5].family == b"".join(m.rsa_id[:4] for m in a.family)
    ids = [hashlib.sha256(i).digest()[:8] for i in (b"ed25519:x", b"y")]
    assert found[6].family_ids == b"".join(ids)


def test_a_family_line_is_never_held_whole():
    relay = FakeRelay(0, family=[FakeRelay(i) for i in range(3000)])
    text = relay.microdesc()
    assert len(text) > 120000
    parser = minitor.MicrodescParser(lambda *md: None)
    for at in range(0, len(text), 498):
        parser.feed(text[at : at + 498])
        assert len(parser._rest) < 4096
    [md] = microdescs(text, 498)
    assert md.digest == relay.digest() and not md.bad
    # Bounded: the first thousand or so.
    assert 4000 < len(md.family) < 4200
    assert md.family == b"".join(m.rsa_id[:4] for m in relay.family)[: len(md.family)]


def test_old_forms_of_microdescriptors():
    relay = FakeRelay(1)
    text = relay.microdesc().replace(
        b"onion-key\n",
        b"onion-key\n-----BEGIN RSA PUBLIC KEY-----\nMIGJAoGBAK\n-----END RSA PUBLIC KEY-----\n",
        1,
    )
    text = text.replace(b"id ed", b"family nick $%s=name other\nid ed" % relay.rsa_id.hex().encode())
    [md] = microdescs(text)
    assert md.family == relay.rsa_id[:4] and md.ed_id == relay.ed_id and not md.bad


@pytest.mark.parametrize(
    "old, new",
    [
        (b"ntor-onion-key ", b"ntor-onion-key x"),
        (b"ntor-onion-key ", b"other "),
        (b"id ed25519 ", b"id ed25519 !"),
        (b"id ed25519 ", b"id ed25519\n"),
        (b"id ed25519 ", b"id ed25519 %s\nid ed25519 " % (b"A" * 43)),
    ],
)
def test_a_malformed_microdescriptor_spoils_no_other(old, new):
    one, two = FakeRelay(1), FakeRelay(2)
    found = microdescs(one.microdesc().replace(old, new) + two.microdesc())
    assert [md.bad for md in found] == [True, False]
    assert found[1].digest == two.digest()


def test_microdescs_truncated_or_too_long():
    text = FakeRelay(1).microdesc()
    with pytest.raises(minitor.ProtocolError):
        microdescs(text[:-1])
    with pytest.raises(minitor.ProtocolError):
        microdescs(text + b"x" * 70000)
    assert microdescs(b"") == microdescs(b"nonsense\n") == []


def test_microdescs_fuzz():
    text = b"".join(FakeRelay(i, policy="accept 1-2", family=[FakeRelay(3)]).microdesc() for i in range(5))
    rng = random.Random(3)
    for _ in range(500):
        changed = bytearray(text)
        for _ in range(rng.randrange(1, 6)):
            changed[rng.randrange(len(changed))] = rng.choice(b"\0\n -$\xffonid")
        try:
            microdescs(bytes(changed), rng.choice([50, 1000]))
        except minitor.ProtocolError:
            pass
