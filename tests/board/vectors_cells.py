"""Section 8: link certificates, ntor, hs-ntor, messages; vectors as in test_cells.py."""

import json
import sys

import minitor

H = minitor.binascii.unhexlify


class Thing(minitor.Record):
    pass


def refused(function, *args):
    try:
        function(*args)
    except minitor.ProtocolError:
        return True
    return False


urandom = minitor.urandom


def drawn(secret):
    return lambda n: secret if n == 32 else urandom(n)


# CERTS of C tor.
made = json.loads(open(sys.argv[1] + "/tor_made.json").read())["certs"]
body, digest, rsa_id, ed_id = [H(made[name]) for name in ("body", "digest", "rsa", "ed")]
found, expires = minitor.parse_certs(body, digest, rsa_id, None)
assert found == ed_id and 0 < expires - made["when"] < 50 * 3600
assert minitor.parse_certs(body, digest, rsa_id, ed_id) == (ed_id, expires)
assert refused(minitor.parse_certs, body, digest, bytes(20), None)
assert refused(minitor.parse_certs, body, bytes(32), rsa_id, None)
assert refused(minitor.parse_certs, body[:-1], digest, rsa_id, None)

# ntor.
B = H("ccbc8541904d18af08753eae967874749e6149f873de937f57f8fd903a21c471")
identity = H("69546f6c64596f7541626f75745374616972732e")
minitor.urandom = drawn(
    H("706f6461792069207075742e2e2e2e2e2e2e2e4a454c4c59206f6e2074686973")
)
skin, finish = minitor.ntor(identity, B)
reply = H(
    "390480a14362761d6aec1fea840f6e9e928fb2adb7b25c670be1045e35133a37"
    "1cbdf68b89923e1f85e8e18ee6e805ea333fe4849c790ffd2670bd80fec95cc8"
)
assert finish(b"\0\x40" + reply)[:72] == H(
    "0c62dee7f48893370d0ef896758d35729867beef1a5121df80e00f79ed349af39b51cae125719182f19d"
    "932a667dae1afbf2e336e6910e7822223e763afad0a13342157969dc6b79"
)
assert refused(finish, b"\0\x40" + reply[:-1] + b"\0")

# hs-ntor: the rendezvous of C tor's handshake, then both ends.
intro = Thing()
intro.auth_key = H("34E171E4358E501BFF21ED907E96AC6BFEF697C779D040BBAF49ACC30FC5D21F")
intro.enc_key = H("8E5127A40E83AABF6493E41F142B6EE3604B85A3961CD7E38D247239AFF71979")
intro.b = H("A0ED5DBF94EEB2EDB3B514E4CF6ABFF6022051CC5F103391F1970A3FCD15296A")
x = H("60B4D6BF5234DCF87A4E9D7487BDF3F4A69B6729835E825CA29089CFDDA1E341")
reply = H(
    "8fbe0db4d4a9c7ff46701e3e0ee7fd05cd28be4f302460addeec9e93354ee700"
    "4A92E8437B8424D5E5EC279245D5C72B25A0327ACF6DAF902079FCB643D8B208"
)
seed = H("4D0C72FE8AFF35559D95ECC18EB5A36883402B28CDFD48C8A530A5A3D7D578DB")
keys = minitor.shake256(seed + b"tor-hs-ntor-curve25519-sha3-256-1:hs_key_expand", 128)
relay = Thing()
relay.ntor_key = b"n" * 32
relay.specifiers = b"\3\0\6\x7f\0\0\1\x13\x89\2\x14" + b"r" * 20 + b"\3\x20" + b"e" * 32
minitor.urandom = drawn(x)
_, finish = minitor.hs_ntor_client(intro, b"s" * 32, b"c" * 20, relay)
assert finish(reply) == keys
assert refused(finish, reply[:-1] + b"\0")

minitor.urandom = urandom
body, finish = minitor.hs_ntor_client(intro, b"s" * 32, b"c" * 20, relay)
assert len(body) == 310
target, cookie, answer, keys = minitor.hs_ntor_service(intro, [bytes(32), b"s" * 32], body)
assert cookie == b"c" * 20 and (target.address, target.port) == ("127.0.0.1", 5001)
assert (target.rsa_id, target.ed_id, target.ntor_key) == (b"r" * 20, b"e" * 32, b"n" * 32)
assert target.specifiers == relay.specifiers
assert finish(answer[20:]) == keys and len(keys) == 128
assert refused(minitor.hs_ntor_service, intro, [bytes(32)], body)
assert refused(minitor.hs_ntor_service, intro, [b"s" * 32], body[:100])

# Messages.
intro.esk = minitor.ed25519_expand(b"s" * 32)
assert len(minitor.establish_intro(intro, b"k" * 20)) == 134
assert len(minitor.cell(1, minitor.RELAY, b"x" * 509)) == 514
assert minitor.parse_begin(b"a.b:80\0\0\0\0\1") == 80
assert refused(minitor.parse_begin, b"a:99999\0")
for address, private in ((b"\xac\x10\3\4", True), (b"\xac\x20\3\4", False)):
    spec = relay.specifiers.replace(b"\x7f\0\0\1", address)
    assert minitor.parse_link_specifiers(minitor.Reader(spec), b"").private == private
assert minitor.parse_resolved(H("0404010203040000000a")) == ["1.2.3.4"]
assert minitor.parse_resolved(b"\6\x10" + bytes(20)) == ["0:0:0:0:0:0:0:0"]

print("ok")
