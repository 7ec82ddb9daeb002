"""Section 8: cells, link certificates, handshakes.

Vectors: ntor and hs-ntor from the test suites of Arti and C tor (ntor_ref, hs_ntor_ref, and a
handshake that C tor made); the rest by hand from tor-spec and rend-spec-v3.
"""

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

import minitor

H = bytes.fromhex


class Thing(minitor.Record):
    def __init__(self, **fields):
        self.__dict__.update(fields)


def fix_keypair(monkeypatch, secret):
    monkeypatch.setattr(
        minitor, "x25519_keypair", lambda: (secret, minitor.x25519(secret))
    )


def link_specifiers(address="127.0.0.1", port=5001, rsa_id=b"r" * 20, ed_id=b"e" * 32):
    place = bytes(map(int, address.split("."))) + port.to_bytes(2, "big")
    return b"\3\0\6" + place + b"\2\x14" + rsa_id + b"\3\x20" + ed_id


def relay(**fields):
    return Thing(ntor_key=b"n" * 32, specifiers=link_specifiers(**fields))


def target(address):
    spec = link_specifiers(address)
    return minitor.parse_link_specifiers(minitor.Reader(spec), b"")


# ─── cells ───


def test_cell_layout():
    fixed = minitor.cell(0x80000001, minitor.CREATE2, b"xyz")
    assert len(fixed) == 514 and fixed[:8] == H("80000001 0a") + b"xyz" and not any(fixed[8:])


@pytest.mark.parametrize("text", ["0.0.0.0", "127.0.0.1", "255.255.255.255", "198.51.100.7"])
def test_address_round_trip(text):
    assert target(text).address == text


@pytest.mark.parametrize(
    "text", ["0.1.2.3", "10.9.8.7", "100.64.0.1", "100.127.1.1", "127.0.0.1", "169.254.1.1",
             "172.16.0.1", "172.31.255.255", "192.168.3.4", "224.0.0.1", "255.255.255.255"]
)
def test_private(text):
    assert target(text).private


@pytest.mark.parametrize(
    "text", ["1.1.1.1", "11.0.0.1", "100.63.255.255", "100.128.0.1", "126.1.1.1", "128.0.0.1",
             "169.253.1.1", "172.15.0.1", "172.32.0.1", "192.167.1.1", "223.255.255.255"]
)
def test_public(text):
    assert not target(text).private


def test_reason_text():
    assert minitor.reason_text(minitor.END_REASONS, 3) == "connection refused"
    assert minitor.reason_text(minitor.DESTROY_REASONS, 12) == "no such service"
    assert minitor.reason_text(minitor.END_REASONS, 99) == "unknown reason 99"
    assert len(minitor.END_REASONS) == 15 and len(minitor.DESTROY_REASONS) == 13


def test_link_specifiers():
    spec = link_specifiers()
    assert spec == H("03 0006 7f000001 1389 0214") + b"r" * 20 + H("0320") + b"e" * 32
    # An unknown specifier and an IPv6 one are kept as they came.
    more = b"\x05" + spec[1:] + H("0112") + bytes(15) + H("01 1f90") + H("0901ff")
    reader = minitor.Reader(more + b"tail")
    target = minitor.parse_link_specifiers(reader, b"k" * 32)
    assert (target.address, target.port) == ("127.0.0.1", 5001)
    assert (target.rsa_id, target.ed_id, target.ntor_key) == (b"r" * 20, b"e" * 32, b"k" * 32)
    assert target.specifiers == more and reader.take(4) == b"tail" and not reader.left()
    # Relays connect to the first address.
    two = b"\4" + spec[1:] + H("0006 0a0000012329")
    assert minitor.parse_link_specifiers(minitor.Reader(two), b"").address == "127.0.0.1"
    for n in range(len(spec)):
        with pytest.raises(minitor.ProtocolError):
            minitor.parse_link_specifiers(minitor.Reader(spec[:n]), b"")
    twice = b"\4" + spec[1:] + H("0214") + b"x" * 20
    # With these EXTEND2 would be longer than a relay message.
    long = b"\5" + spec[1:] + H("09ff") + bytes(255) + H("0960") + bytes(96)
    for bad in (H("00"), b"\x02" + spec[1:31], H("01 0006 7f0000011389"), twice, long):
        with pytest.raises(minitor.ProtocolError):
            minitor.parse_link_specifiers(minitor.Reader(bad + bytes(40)), b"")


CERTS = json.loads((Path(__file__).resolve().parent / "tor_made.json").read_text())["certs"]


def certs(body=None, digest=None, rsa_id=None, ed_id=None):
    return minitor.parse_certs(
        H(CERTS["body"]) if body is None else body,
        digest or H(CERTS["digest"]),
        rsa_id or H(CERTS["rsa"]),
        ed_id,
    )


def test_certs_of_c_tor():
    rsa_id, ed_id = H(CERTS["rsa"]), H(CERTS["ed"])
    assert certs() == certs(rsa_id=rsa_id, ed_id=ed_id)
    found, expires = certs()
    # tor gives link certificates two days.
    assert found == ed_id and 0 < expires - CERTS["when"] < 50 * 3600
    for wrong in dict(digest=bytes(32)), dict(rsa_id=bytes(20)), dict(ed_id=bytes(32)):
        with pytest.raises(minitor.ProtocolError):
            certs(**wrong)


def test_certs_refused():
    body = H(CERTS["body"])
    found = {}
    reader = minitor.Reader(body)
    for _ in range(reader.uint(1)):
        kind = reader.uint(1)
        found[kind] = reader.take(reader.uint(2))
    # Type 1, the TLS link certificate of old handshakes, says nothing today.
    assert found.pop(1) and sorted(found) == [2, 4, 5, 7]

    def pack(items):
        out = b"".join(struct.pack(">BH", k, len(v)) + v for k, v in items)
        return bytes([len(items)]) + out

    items = sorted(found.items())
    assert certs(pack(items))
    for i in range(4):
        with pytest.raises(minitor.ProtocolError):
            certs(pack(items[:i] + items[i + 1 :]))
        with pytest.raises(minitor.ProtocolError):
            certs(pack(items + items[i : i + 1]))
    for n in range(0, len(body), 11):
        with pytest.raises(minitor.ProtocolError):
            certs(body[:n])
    # Every bit counts, but in the X.509 certificate only those of the key.
    key = found[2].find(H("30818902818100"))
    for kind, first, end in ((4, 0, 140), (5, 0, 140), (7, 0, 165), (2, key, key + 140)):
        for n in range(first, min(end, len(found[kind])), 13):
            bad = bytearray(found[kind])
            bad[n] ^= 4
            with pytest.raises(minitor.ProtocolError):
                certs(pack([(k, bytes(bad) if k == kind else v) for k, v in items]))


# ─── circuits ───

NTOR = dict(
    b="4820544f4c4420594f5520444f474954204b454550532048415050454e494e47",
    B="ccbc8541904d18af08753eae967874749e6149f873de937f57f8fd903a21c471",
    x="706f6461792069207075742e2e2e2e2e2e2e2e4a454c4c59206f6e2074686973",
    id="69546f6c64596f7541626f75745374616972732e",
    X="e65dfdbef8b2635837fe2cebc086a8096eae3213e6830dc407516083d412b078",
    reply="390480a14362761d6aec1fea840f6e9e928fb2adb7b25c670be1045e35133a37"
    "1cbdf68b89923e1f85e8e18ee6e805ea333fe4849c790ffd2670bd80fec95cc8",
    keys="0c62dee7f48893370d0ef896758d35729867beef1a5121df80e00f79ed349af39b51cae125719182f19d"
    "932a667dae1afbf2e336e6910e7822223e763afad0a13342157969dc6b79",
)


def test_ntor_vector(monkeypatch):
    fix_keypair(monkeypatch, H(NTOR["x"]))
    skin, finish = minitor.ntor(H(NTOR["id"]), H(NTOR["B"]))
    assert skin.hex() == "00020054" + NTOR["id"] + NTOR["B"] + NTOR["X"]
    # A CREATED2 cell is longer.
    for rest in (b"", bytes(443)):
        keys = finish(b"\0\x40" + H(NTOR["reply"]) + rest)
        assert len(keys) == 92 and keys[:72].hex() == NTOR["keys"]
    # KH, too, is by RFC 5869.
    x, B, X, Y = [H(NTOR[name]) for name in ("x", "B", "X", "reply")]
    secret = minitor.x25519(x, Y[:32]) + minitor.x25519(x, B) + H(NTOR["id"]) + B + X + Y[:32]
    protocol = b"ntor-curve25519-sha256-1"
    kdf = HKDF(hashes.SHA256(), 92, protocol + b":key_extract", protocol + b":key_expand")
    assert keys == kdf.derive(secret + protocol)


def test_ntor_refuses(monkeypatch):
    fix_keypair(monkeypatch, H(NTOR["x"]))
    _, finish = minitor.ntor(H(NTOR["id"]), H(NTOR["B"]))
    reply, head = H(NTOR["reply"]), b"\0\x40"
    bad = [reply[:63], b"", reply[:-1] + b"\0", b"\0" * 32 + reply[32:], b"\1" + reply[1:]]
    for data in [head + data for data in bad] + [b"", b"\0", b"\0\x3f" + reply, b"\1\x40" + reply]:
        with pytest.raises(minitor.ProtocolError):
            finish(data)


def test_create_fast():
    x, y = bytes(range(20)), bytes(range(100, 120))
    stream = b"".join(hashlib.sha1(x + y + bytes([i])).digest() for i in range(5))
    keys = minitor.fast_finish(x, y + stream[:20])
    assert keys == stream[20:92] + stream[:20]
    for bad in (y + bytes(20), y + stream[:19], y, b""):
        with pytest.raises(minitor.ProtocolError):
            minitor.fast_finish(x, bad)


# ─── streams ───


def test_begin():
    assert minitor.parse_begin(b":80\0") == 80
    assert minitor.parse_begin(b"a.b:65535\0\0\0\0\1") == 65535
    assert minitor.begin("a.b", 80) == b"a.b:80\0\0\0\0\1"
    assert minitor.begin("2001:db8::1", 80, 5) == b"[2001:db8::1]:80\0\0\0\0\5"
    assert minitor.begin("", 80, 5) == b":80\0"
    for bad in (b"", b"a:80", b":0\0", b":65536\0", b":-1\0", b"a\0", b":\0", b"80\0"):
        with pytest.raises(minitor.ProtocolError):
            minitor.parse_begin(bad)


def test_resolved():
    body = H("04 04 01020304 00000010") + H("f1 00 00000000") + b"\0\3abc" + bytes(4)
    assert minitor.parse_resolved(body) == ["1.2.3.4"]
    assert minitor.parse_resolved(body, True) == ["abc"]
    assert minitor.parse_resolved(b"\0\2\xc3\xa4" + bytes(4), True) == []
    body = H("0610 20010db8") + bytes(11) + b"\1" + bytes(4)
    assert minitor.parse_resolved(body) == ["2001:db8:0:0:0:0:0:1"]
    for bad in (H("04 03 010203 00000000"), H("04 04 0102"), H("0410") + bytes(20)):
        with pytest.raises(minitor.ProtocolError):
            minitor.parse_resolved(bad)


# ─── onion services ───

AUTH = H("34E171E4358E501BFF21ED907E96AC6BFEF697C779D040BBAF49ACC30FC5D21F")
SUBCREDENTIAL = H("0085D26A9DEBA252263BF0231AEAC59B17CA11BAD8A218238AD6487CBAD68B57")
B = H("8E5127A40E83AABF6493E41F142B6EE3604B85A3961CD7E38D247239AFF71979")
b = H("A0ED5DBF94EEB2EDB3B514E4CF6ABFF6022051CC5F103391F1970A3FCD15296A")
x = H("60B4D6BF5234DCF87A4E9D7487BDF3F4A69B6729835E825CA29089CFDDA1E341")
y = H("68CB5188CA0CD7924250404FAB54EE1392D3D2B9C049A2E446513875952F8F55")
INTRODUCE = H(
    "000000000000000000000000000000000000000002002034E171E4358E501BFF"
    "21ED907E96AC6BFEF697C779D040BBAF49ACC30FC5D21F00BF04348B46D09AED"
    "726F1D66C618FDEA1DE58E8CB8B89738D7356A0C59111D5DADBECCCB38E37830"
    "4DCC179D3D9E437B452AF5702CED2CCFEC085BC02C4C175FA446525C1B9D5530"
    "563C362FDFFB802DAB8CD9EBC7A5EE17DA62E37DEEB0EB187FBB48C63298B0E8"
    "3F391B7566F42ADC97C46BA7588278273A44CE96BC68FFDAE31EF5F0913B9A9C"
    "7E0F173DBC0BDDCD4ACB4C4600980A7DDD9EAEC6E7F3FA3FC37CD95E5B8BFB3E"
    "35717012B78B4930569F895CB349A07538E42309C993223AEA77EF8AEA64F25D"
    "DEE97DA623F1AEC0A47F150002150455845C385E5606E41A9A199E7111D54EF2"
    "D1A51B7554D8B3692D85AC587FB9E69DF990EFB776D8"
)
REPLY = H(
    "8fbe0db4d4a9c7ff46701e3e0ee7fd05cd28be4f302460addeec9e93354ee700"
    "4A92E8437B8424D5E5EC279245D5C72B25A0327ACF6DAF902079FCB643D8B208"
)
SEED = H("4D0C72FE8AFF35559D95ECC18EB5A36883402B28CDFD48C8A530A5A3D7D578DB")
INTRO = Thing(auth_key=AUTH, enc_key=B, b=b)


def hs_keys():
    text = SEED + b"tor-hs-ntor-curve25519-sha3-256-1:hs_key_expand"
    return hashlib.shake_256(text).digest(128)


def test_hs_mac():
    for key, message, digest in (
        (b"who", b"knows?", "5e7da329630fdaa3eab7498bb1dc625bbb9ca968f10392b6af92d51d5db17473"),
        (b"gone", b"by", "90071aabb06d3f7c777db41542f4790c7dd9e2e7b2b842f54c9c42bbdb37e9a0"),
    ):
        assert minitor.hs_mac(key, message).hex() == digest


def test_introduce2_of_c_tor(monkeypatch):
    fix_keypair(monkeypatch, y)
    target, cookie, answer, keys = minitor.hs_ntor_service(
        INTRO, [bytes(32), SUBCREDENTIAL], INTRODUCE
    )
    assert cookie == H("6BD364C12638DD5C3BE23D76ACA05B04E6CE932C")
    assert target.ntor_key == H("0DE6130E4FCAC4EDDA24E21220CC3EADAE403EF6B7D11C8273AC71908DE56545")
    assert (target.address, target.port) == ("127.0.0.1", 5001)
    assert target.rsa_id == H("F823C4F8CC085C792E0AEE0283FE00AD7520B37D")
    assert target.ed_id == H("728D5DF39B7B7077A0118A900FF4456C382F0041300ACF9C58E51C392795EF87")
    assert answer[:84] == cookie + REPLY and len(answer) == 168
    assert keys == hs_keys()


def test_rendezvous2_of_c_tor(monkeypatch):
    fix_keypair(monkeypatch, x)
    _, finish = minitor.hs_ntor_client(INTRO, SUBCREDENTIAL, bytes(20), relay())
    assert finish(REPLY + bytes(84)) == hs_keys()
    for bad in (REPLY[:63], REPLY[:-1] + b"\0", bytes(64)):
        with pytest.raises(minitor.ProtocolError):
            finish(bad)


def test_introduce_both_ends():
    cookie = os.urandom(20)
    body, finish = minitor.hs_ntor_client(INTRO, SUBCREDENTIAL, cookie, relay())
    # tor pads head and plaintext together to 246; CLIENT_PK and MAC come on top.
    assert len(body) == 246 + 64
    target, got, answer, keys = minitor.hs_ntor_service(INTRO, [SUBCREDENTIAL], body)
    assert got == cookie and target.rsa_id == b"r" * 20 and target.ntor_key == b"n" * 32
    assert finish(answer[20:]) == keys


def test_introduce2_refused():
    for n in range(0, len(INTRODUCE), 7):
        with pytest.raises(minitor.ProtocolError):
            minitor.hs_ntor_service(INTRO, [SUBCREDENTIAL], INTRODUCE[:n])
        bad = INTRODUCE[:n] + bytes([INTRODUCE[n] ^ 1]) + INTRODUCE[n + 1 :]
        with pytest.raises(minitor.ProtocolError):
            minitor.hs_ntor_service(INTRO, [SUBCREDENTIAL], bad)
    with pytest.raises(minitor.ProtocolError):
        minitor.hs_ntor_service(INTRO, [bytes(32)], INTRODUCE)


def test_establish_intro():
    esk, kh = minitor.ed25519_expand(b"s" * 32), b"k" * 20
    auth = minitor.ed25519_public(esk)
    body = minitor.establish_intro(Thing(esk=esk, auth_key=auth), kh)
    assert len(body) == 134 and body[:36] == H("02 0020") + auth + b"\0"
    assert body[36:68] == hashlib.sha3_256(struct.pack(">Q", 20) + kh + body[:36]).digest()
    assert body[68:70] == H("0040")
    assert minitor.ed25519_verify(auth, b"Tor establish-intro cell v1" + body[:68], body[70:])
