"""Fuzz tests of the pure parsers: whatever comes from the network, the error is a TorError.

Valid inputs are changed at random, from a fixed seed, and each is parsed with its signatures
checked and again with every check passing, so that what lies behind them is reached too.
MINITOR_FUZZ=20 makes it twenty times as many.
"""

import asyncio
import base64
import os
import random
import struct
import zlib
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

import minitor
from fakenet import read_certs

NOW = 1_800_000_000
ROUNDS = int(200 * float(os.environ.get("MINITOR_FUZZ", "1")))
WORDS = [
    b"", b" ", b"\n", b"\n\n", b"\0", b"=", b"-", b"--", b",", b":", b"0", b"-1", b"1_0", b"+1",
    b"1.5", b"1e9", b"65536", b"4294967296", b"9" * 30, b"\xff\xfe", b"\xc3\xa9", b"\r\n",
    b"-----BEGIN X-----\n", b"-----END X-----\n", b"[::1]:1", b"[fffff:1::]:1", b"256.1.1.1",
    b"\xd9\xa1", b"$", b"%s", b"a=b=c", b"Link=1-9999999", b"Link=5-1", b"accept", b"reject 1-",
]  # fmt: skip


def ed_public(seed):
    return minitor.ed25519_public(minitor.ed25519_expand(seed))


class Mutator:
    """Changes bytes at random."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def __call__(self, data):
        data = bytes(data)
        for _ in range(self.random.choice((1, 1, 1, 2, 3, 8))):
            change = self.random.choice((self.flip, self.cut, self.copy, self.put, self.lines))
            data = change(data)
        return data

    def span(self, data, longest=64):
        start = self.random.randrange(len(data) + 1)
        return start, min(len(data), start + self.random.randrange(longest))

    def flip(self, data):
        if not data:
            return b"\0"
        at = self.random.randrange(len(data))
        byte = self.random.choice((0, 1, 127, 128, 255, data[at] ^ 1 << self.random.randrange(8)))
        return data[:at] + bytes([byte]) + data[at + 1 :]

    def cut(self, data):
        if self.random.random() < 0.2:
            return data[: self.random.randrange(len(data) + 1)]
        start, end = self.span(data)
        return data[:start] + data[end:]

    def copy(self, data):
        start, end = self.span(data, 300)
        at = self.random.randrange(len(data) + 1)
        return data[:at] + data[start:end] + data[at:]

    def put(self, data):
        start, end = self.span(data, 8)
        return data[:start] + self.random.choice(WORDS) + data[end:]

    def lines(self, data):
        lines = data.split(b"\n")
        at = self.random.randrange(len(lines))
        kind = self.random.randrange(4)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(self.random.randrange(len(lines)), lines[at])
        elif kind == 2:
            words = lines[at].split(b" ")
            words[self.random.randrange(len(words))] = self.random.choice(WORDS)
            lines[at] = b" ".join(words)
        else:
            self.random.shuffle(lines)
        return b"\n".join(lines)


def fuzz(parse, valid, rounds=ROUNDS):
    """Parse `valid`, which must pass, and then `rounds` changed ones."""
    parse(valid)
    mutate, refused = Mutator(parse.__qualname__), 0
    for n in range(rounds):
        data = mutate(valid)
        try:
            parse(data)
        except minitor.TorError as e:
            assert str(e)
            refused += 1
        except Exception as e:
            pytest.fail("%s: %s\nin round %d, from %r" % (type(e).__name__, e, n, data[:3000]))
    return refused


@pytest.fixture(params=["checked", "unchecked"])
def checks(request, monkeypatch):
    """Once with signatures and MACs that count, once with all of them good."""
    if request.param == "unchecked":
        monkeypatch.setattr(minitor, "ed25519_verify", lambda public, message, signature: True)
        monkeypatch.setattr(minitor, "rsa_verify", lambda key, digest, signature: True)
        monkeypatch.setattr(minitor, "consteq", lambda a, b: True)
    return request.param


def b64(data):
    return base64.b64encode(data).rstrip(b"=")


def armour(label, data):
    return b"-----BEGIN %s-----\n%s-----END %s-----\n" % (label, base64.encodebytes(data), label)


# ── what is valid ──


def der(tag, *parts):
    body = b"".join(parts)
    size = len(body)
    if size < 128:
        return bytes([tag, size]) + body
    if size < 256:
        return bytes([tag, 0x81, size]) + body
    return bytes([tag, 0x82]) + struct.pack(">H", size) + body


class RSA:
    def __init__(self):
        private = rsa.generate_private_key(65537, 1024).private_numbers()
        self.n, self.d = private.public_numbers.n, private.d
        modulus = b"\0" + self.n.to_bytes(128, "big")
        self.der = der(0x30, der(2, modulus), der(2, b"\1\0\1"))

    def sign(self, digest):
        padded = b"\0\1" + b"\xff" * (125 - len(digest)) + b"\0" + digest
        return pow(int.from_bytes(padded, "big"), self.d, self.n).to_bytes(128, "big")


@pytest.fixture(scope="module")
def key():
    return RSA()


def expanded(seed):
    return minitor.ed25519_expand(seed), ed_public(seed)


def ed_cert(kind, certified, seed=b"s" * 32):
    return minitor.make_ed_cert(kind, certified, NOW, *expanded(seed))


@pytest.fixture(scope="module")
def certs(key):
    """A CERTS cell, and the digest of the TLS certificate it is for."""
    tls = minitor.sha256(b"TLS certificate")
    signing = ed_public(b"t" * 32)
    identity = ed_public(b"s" * 32)
    name = der(0x30, der(0x31, der(0x30, der(6, b"\x55\4\3"), der(12, b"relay"))))
    sha256_rsa = der(0x30, der(6, b"\x2a\x86\x48\x86\xf7\x0d\1\1\x0b"), der(5))
    rsa_key = der(0x30, der(6, b"\x2a\x86\x48\x86\xf7\x0d\1\1\1"), der(5))
    tbs = der(
        0x30,
        der(0xA0, der(2, b"\2")),
        der(2, b"\1"),
        sha256_rsa,
        name,
        der(0x30, der(0x17, b"250101000000Z"), der(0x17, b"350101000000Z")),
        name,
        der(0x30, rsa_key, der(3, b"\0", key.der)),
    )
    info = b"010\r\x06\t`\x86H\x01e\x03\x04\x02\x01\x05\x00\x04 "
    x509 = der(0x30, tbs, sha256_rsa, der(3, b"\0", key.sign(info + minitor.sha256(tbs))))
    cross = identity + struct.pack(">I", NOW // 3600 + 100)
    prefix = b"Tor TLS RSA/Ed25519 cross-certificate"
    cross += b"\x80" + key.sign(minitor.sha256(prefix + cross))
    link = bytearray(ed_cert(5, tls, b"t" * 32)[:-64])
    link[6] = 3  # kind of key: the digest of a TLS certificate
    link = bytes(link) + minitor.ed25519_sign(*expanded(b"t" * 32), bytes(link))
    body = b"\4"
    for kind, cert in ((2, x509), (4, ed_cert(4, signing)), (5, link), (7, cross)):
        body += struct.pack(">BH", kind, len(cert)) + cert
    return body, tls


@pytest.fixture(scope="module")
def authority_certs(key):
    fingerprint = minitor.sha1(key.der)
    text = b"dir-key-certificate-version 3\nfingerprint %s\n" % fingerprint.hex().encode()
    text += b"dir-key-published 2026-11-20 09:00:00\ndir-key-expires 2027-11-20 09:00:00\n"
    text += b"dir-identity-key\n" + armour(b"RSA PUBLIC KEY", key.der)
    text += b"dir-signing-key\n" + armour(b"RSA PUBLIC KEY", key.der)
    text += b"dir-key-crosscert\n" + armour(b"ID SIGNATURE", key.sign(fingerprint))
    text += b"dir-key-certification\n"
    text += armour(b"SIGNATURE", key.sign(minitor.sha1(text)))
    return text, fingerprint


@pytest.fixture(scope="module")
def consensus(key):
    fingerprint = minitor.sha1(key.der)
    relays = b""
    for n in range(1, 7):
        digest = minitor.sha256(b"%d" % n)
        relays += b"r relay%d %s 2038-01-01 00:00:00 127.%d.0.1 9001 0\n" % (
            n, b64(bytes([n]) * 20), n
        )
        relays += b"a [2001:db%d::1]:9001\n" % n if n % 2 else b""
        relays += b"m %s\ns Exit Fast Guard HSDir Running Stable V2Dir Valid\n" % b64(digest)
        relays += b"v Tor 0.4.9.11\n"
        relays += b"pr FlowCtrl=1-2 HSDir=2 HSIntro=4-5 HSRend=1-2 Link=1-5 Relay=1-4\n"
        relays += b"w Bandwidth=%d\n" % (n * 1000)
    text = (
        b"network-status-version 3 microdesc\nvote-status consensus\nconsensus-method 33\n"
        b"valid-after 2027-01-15 08:00:00\nfresh-until 2027-01-15 09:00:00\n"
        b"valid-until 2027-01-15 11:00:00\nvoting-delay 300 300\nknown-flags Exit Fast\n"
        b"required-client-protocols Cons=2 Desc=2 Link=4 Microdesc=2 Relay=2\n"
        b"params circwindow=1000 hsdir_interval=1440 bwweightscale=10000\n"
        b"shared-rand-previous-value 8 " + b64(b"p" * 32) + b"=\n"
        b"shared-rand-current-value 8 " + b64(b"c" * 32) + b"=\n"
        b"dir-source a 0232AF901C31A04EE9848595AF9BB7620D4C5B2E a.example 127.1.0.1 80 443\n"
        b"contact somebody\nvote-digest B475B153AB5B2F4D2365A85DB3BDFD93E78E0BE6\n"
        + relays
        + b"directory-footer\nbandwidth-weights Wbd=0 Wbe=0 Wgd=0 Wgg=6752 Wmm=10000\n"
        b"directory-signature "
    )
    signature = key.sign(minitor.sha256(text))
    text += b"sha256 %s %s\n" % (fingerprint.hex().encode(), minitor.sha1(key.der).hex().encode())
    return text + armour(b"SIGNATURE", signature), fingerprint


def microdescs():
    text = b""
    for n in range(1, 4):
        text += b"onion-key\nntor-onion-key %s\nid ed25519 %s\n" % (
            b64(bytes([n]) * 32), b64(bytes([n + 50]) * 32)
        )
        text += b"a [2001:db8::1]:9001\np accept 80,443,1000-2000\np6 reject 1-65535\n"
        text += b"family %s\n" % b" ".join(b"$" + b"%02X" % m * 20 for m in range(1, 9))
        text += b"family-ids ed25519:%s\n" % b64(b"f" * 32)
    return text


class Intro(minitor.Record):
    def __init__(self, n):
        self.rsa_id, self.ed_id = bytes([n]) * 20, bytes([n]) * 32
        self.address, self.port = "127.%d.0.1" % n, 5000 + n
        place = bytes((127, n, 0, 1)) + self.port.to_bytes(2, "big")
        self.specifiers = b"\3\0\6" + place + b"\2\x14" + self.rsa_id + b"\3\x20" + self.ed_id
        self.ntor_key = minitor.x25519(bytes([n]) * 32)
        self.auth_key = ed_public(bytes([n]) * 32)
        self.enc_key = minitor.x25519(bytes([n + 1]) * 32)


# ── sections 6 and 7 ──


def test_ed25519_certificates(checks):
    def check_ed_cert(data):
        minitor.check_ed_cert(data, 4, ed_public(b"s" * 32), NOW)

    fuzz(check_ed_cert, ed_cert(4, b"k" * 32))


def test_authority_certificates(checks, authority_certs):
    text, fingerprint = authority_certs
    assert len(read_certs(text, {fingerprint})) == 1
    fuzz(lambda data: read_certs(data, {fingerprint}), text)


def read_consensus(data, fingerprint, size=10**9):
    table = minitor.RelayTable()
    parser = minitor.ConsensusParser(table.add)
    for at in range(0, len(data), size):
        parser.feed(data[at : at + size])
    return table, parser.finish()


@pytest.mark.parametrize("size", [10**9, 100, 7])
def test_consensus(checks, consensus, authority_certs, size):
    text, fingerprint = consensus
    certs = read_certs(authority_certs[0], {fingerprint})
    weights = []

    def parse_consensus(data):
        table, parsed = read_consensus(data, fingerprint, size)
        parsed.missing_certs(certs, {fingerprint})
        parsed.verify(certs, {fingerprint})
        parsed.check_times(parsed.valid_after)
        again = minitor.Consensus(parsed.head)
        assert again.params == parsed.params and again.srv_current == parsed.srv_current
        weights.append(minitor.PathSelector(table, parsed, None).percent())
        minitor.time_periods(parsed, False)
        minitor.time_periods(parsed, True)
        for i in range(len(table)):
            table.relay(i)

    fuzz(parse_consensus, text, ROUNDS if size > 7 else ROUNDS // 4)
    assert weights


@pytest.mark.parametrize("size", [10**9, 50])
def test_microdescriptors(size):
    def parse_microdescs(data):
        found = []
        parser = minitor.MicrodescParser(lambda *md: found.append(md))
        for at in range(0, len(data), size):
            parser.feed(data[at : at + size])
        parser.finish()
        table = minitor.RelayTable()
        for i, (digest, keys, beside) in enumerate(found[:8]):
            table.add(bytes([i]) * 20, digest, b"\x7f\0\0\1", 1, 0, 0, 0)
            table.set_microdesc(i, keys, beside)
            table.exit_allows(i, 443)
        for i in range(len(table)):
            table.same_family(0, i)
            assert len(table.ed_id(i)) == 32

    fuzz(parse_microdescs, microdescs())


def test_stored_table(tmp_path, consensus):
    text, fingerprint = consensus
    path = str(tmp_path / "relays")
    table, parsed = read_consensus(text, fingerprint)
    found = []
    parser = minitor.MicrodescParser(lambda *md: found.append(md))
    parser.feed(microdescs())
    parser.finish()
    for i, (_, keys, beside) in enumerate(found):
        table.set_microdesc(i, keys, beside)
    table.save(path, bytes(32), parsed)
    stored = (tmp_path / "relays").read_bytes()

    def load_table(data):
        (tmp_path / "relays").write_bytes(data)
        assert (minitor.load_table(path, bytes(32)) is None) == (data != stored)

    fuzz(load_table, stored)


# ── section 8 ──


def test_certs_cell(checks, certs, key):
    (body, tls), rsa_id = certs, minitor.sha1(key.der)
    ed_id = minitor.parse_certs(body, tls, rsa_id, None)[0]
    fuzz(lambda data: minitor.parse_certs(data, tls, rsa_id, ed_id), body)
    fuzz(lambda data: minitor.parse_certs(data, tls, rsa_id, None), body)


def test_link_specifiers():
    def parse_link_specifiers(data):
        target = minitor.parse_link_specifiers(minitor.Reader(data), bytes(32))
        assert target.private in (False, True)
        assert target.specifiers in data

    fuzz(parse_link_specifiers, Intro(1).specifiers, 5 * ROUNDS)


@pytest.mark.parametrize(
    "name, valid",
    [
        ("parse_begin", b"example.com:443\0\0\0\0\1"),
        ("parse_resolved", b"\4\4\x7f\0\0\1\0\0\0\1" + b"\0\3abc\0\0\0\1" + b"\xf1\0\0\0\0\1"),
    ],
)
def test_relay_messages(name, valid):
    fuzz(getattr(minitor, name), valid, 3 * ROUNDS)


def test_names_that_an_exit_resolves():
    fuzz(lambda data: minitor.parse_resolved(data, True), b"\0\3abc\0\0\0\1" * 2, ROUNDS)


def test_handshake_replies(checks):
    _, ntor_finish = minitor.ntor(bytes(20), minitor.x25519(b"b" * 32))
    _, hs_finish = minitor.hs_ntor_client(Intro(1), b"u" * 32, bytes(20), Intro(3))

    def finish(data):
        for step in (
            lambda: ntor_finish(data),
            lambda: minitor.fast_finish(bytes(20), data),
            lambda: hs_finish(data),
        ):
            try:
                step()
            except minitor.ProtocolError:
                pass

    for head in (b"", b"\0\x40"):
        fuzz(finish, head + minitor.x25519(b"y" * 32) + bytes(32), ROUNDS // 2)


def introduce2(plain, subcredential=b"u" * 32):
    """Return the body of an INTRODUCE2 for Intro(1) with the plaintext `plain`."""
    intro = Intro(1)
    x = b"x" * 32
    X = minitor.x25519(x)
    keys = minitor._intro_keys(minitor.x25519(x, intro.enc_key), X, intro, subcredential)
    body = bytes(20) + b"\2\0\x20" + intro.auth_key + b"\0" + X
    body += minitor.AesCtr(keys[:32]).crypt(plain)
    return body + minitor.hs_mac(keys[32:], body)


def test_introduce2(checks):
    intro = Intro(1)
    intro.b = bytes([2]) * 32
    plain = b"c" * 20 + b"\0\1\0\x20" + intro.ntor_key + intro.specifiers + bytes(60)

    # Without checks, the first is taken.
    subcredentials = [b"v" * 32, b"u" * 32][checks == "unchecked" :]

    def open_introduce2(body):
        return minitor.hs_ntor_service(intro, subcredentials, body)

    def open_plaintext(data):
        return open_introduce2(introduce2(data))

    assert open_introduce2(introduce2(plain))[1] == b"c" * 20
    fuzz(open_introduce2, introduce2(plain), ROUNDS // 2)
    if checks == "checked":
        fuzz(open_plaintext, plain, ROUNDS)


# ── section 9 ──


@pytest.fixture(scope="module")
def onion():
    esk, public = expanded(b"i" * 32)
    param = minitor.blinding_param(public, (20000, 1440, bytes(32), 0))
    blinded = minitor.ed25519_blind_public(public, param)
    return minitor.ed25519_blind_secret(esk, param), blinded, minitor.subcredential(public, blinded)


@pytest.fixture(scope="module")
def descriptor(onion):
    file = minitor.spool("")
    minitor.make_descriptor(file, *onion, 7, [Intro(1), Intro(3)], NOW)
    return file.getvalue()


def test_descriptor(checks, onion, descriptor):
    def parse_descriptor(data):
        minitor.parse_descriptor(data, onion[1], onion[2], NOW)

    fuzz(parse_descriptor, descriptor)


@pytest.mark.parametrize("depth", ["outer", "inner"])
def test_layers_of_a_descriptor(onion, descriptor, monkeypatch, depth):
    """What the service itself encrypted and signed may be malformed too."""
    _, blinded, subcredential = onion
    opened = {}
    unseal = minitor._unseal

    def keep(item, keyword, secret):
        opened[keyword] = unseal(item, keyword, secret)
        return opened[keyword]

    monkeypatch.setattr(minitor, "_unseal", keep)
    minitor.parse_descriptor(descriptor, blinded, subcredential, NOW)
    layer = {"outer": b"superencrypted", "inner": b"encrypted"}[depth]
    plain = opened[layer]
    changed = [b""]
    # As if the layer had been sealed with the changed text.
    monkeypatch.setattr(
        minitor,
        "_unseal",
        lambda item, keyword, secret: (
            changed[0] if keyword == layer else unseal(item, keyword, secret)
        ),
    )
    monkeypatch.setattr(minitor, "ed25519_verify", lambda public, message, signature: True)

    def parse_layer(data):
        changed[0] = data
        found = minitor.parse_descriptor(descriptor, blinded, subcredential, NOW)
        for intro in found.intro_points:
            assert len(intro.enc_key) == len(intro.auth_key) == len(intro.ntor_key) == 32

    fuzz(parse_layer, plain, 2 * ROUNDS)


def test_onion_addresses():
    valid = minitor.onion_address(ed_public(b"i" * 32))

    def parse_onion_address(data):
        minitor.parse_onion_address(data.decode("utf-8", "replace"))

    fuzz(parse_onion_address, valid.encode())
    fuzz(parse_onion_address, ("www.ÄK." + valid).upper().encode())


# ── sections 12 and 13, and bytes ──


def test_stored_guards(tmp_path, monkeypatch):
    path = tmp_path / "guards.json"
    consensus = SimpleNamespace(param=lambda name, usual, *_: usual, bandwidth_weights={})
    monkeypatch.setattr(minitor, "write_file", lambda *_: None)
    entry = '["%s", 1800000000, 1]' % minitor.b32encode(b"r" * 20)

    def load_guards(data):
        path.write_bytes(data)
        for guard in minitor.PathSelector(minitor.RelayTable(), consensus, str(path)).sample:
            assert isinstance(guard.rsa_id, bytes) and isinstance(guard.until, int)

    minitor.set_log(minitor.ERR)
    try:
        fuzz(load_guards, ("[%s, %s]" % (entry, entry)).encode())
    finally:
        minitor.set_log(minitor.NOTICE)


def test_network_file(tmp_path):
    path = tmp_path / "network"
    text = b"""# a private network
TestingTorNetwork 1
DirAuthority a orport=5001 no-v2 v3ident=0232AF901C31A04EE9848595AF9BB7620D4C5B2E 127.1.0.1:7001 \
F533C81CEF0BC0267857C99B2F471ADF249FA232
DirAuthority b orport=5002 v3ident=23D15D965BC35114467363C165C4F724B64B4F66 127.2.0.1:7002 74A9 \
1064 6BCE EFBC D2E8 74FC 1DC9 9743 0F96 8145
FallbackDir 127.3.0.1:80 orport=5003 id=F533C81CEF0BC0267857C99B2F471ADF249FA232
"""

    def load_network(data):
        path.write_bytes(data)
        network = minitor.load_network(str(path))
        assert network.authorities

    fuzz(load_network, text)


class Stream:
    """A directory stream that has already received `data`."""

    def __init__(self, data, size=50):
        self.data, self.size = data, size

    def write(self, data):
        pass

    async def drain(self):
        pass

    async def readuntil(self, separator=b"\n", limit=65536):
        at = self.data.find(separator)
        if at < 0:
            raise EOFError("the stream ended")
        at += len(separator)
        piece, self.data = self.data[:at], self.data[at:]
        return piece

    async def read(self, n=-1):
        n = min(n, self.size)
        piece, self.data = self.data[:n], self.data[n:]
        return piece


def lzma_alone(data):
    import lzma

    return lzma.compress(data, lzma.FORMAT_ALONE)


@pytest.mark.parametrize("encoding", ["identity", "deflate", "x-tor-lzma"])
@pytest.mark.parametrize("size", [7, 65536])
def test_http_replies(encoding, size):
    plain = b"network-status-version 3 microdesc\n" * 50
    body = {"identity": bytes, "deflate": zlib.compress, "x-tor-lzma": lzma_alone}[encoding](plain)
    reply = b"HTTP/1.0 200 OK\r\nDate: now\r\nContent-Encoding: %s\r\n" % encoding.encode()
    reply += b"Content-Length: %d\r\n\r\n" % len(body)
    loop = asyncio.new_event_loop()

    def read_reply(data):
        pieces = []
        request = minitor.http_request(
            Stream(data, size), "/tor/", 10000, pieces.append
        )
        rest = loop.run_until_complete(asyncio.wait_for(request, 20))
        assert len(b"".join(pieces)) <= 10000 and len(rest) <= 10000

    try:
        fuzz(read_reply, reply + body)
    finally:
        loop.close()


def test_text_encodings():
    def decode(data):
        text = data.decode("utf-8", "replace")
        for function, value in (
            (minitor.b32decode, text),
            (minitor.b32decode, text.lower()),
            (minitor.b64decode, text.encode()),
            (minitor.b64decode, data),
        ):
            try:
                function(value)
            except minitor.TorError:
                pass

    fuzz(decode, b"mfrggzdfmztwq2lkMFRGGZDFMZTWQ2LK", 5 * ROUNDS)
