"""Section 9: addresses, time periods, hash ring, descriptors; vectors as in test_onion.py."""

import json
import sys

import minitor

H = minitor.binascii.unhexlify


class Thing(minitor.Record):
    pass


def refused(error, function, *args):
    try:
        function(*args)
    except error:
        return True
    return False


# Addresses.
address = "25njqamcweflpvkl73j4szahhihoc4xt3ktcgjnpaingr5yhkenl5sid.onion"
key = H("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
assert minitor.onion_address(key) == address and minitor.parse_onion_address(address) == key
for bad in ("x.onion", address[1:], "3" + address[1:], minitor.onion_address(bytes(32))):
    assert refused(minitor.AddressError, minitor.parse_onion_address, bad), bad

# Time periods and the ring.
consensus = Thing()
consensus.valid_after, consensus.fresh_until = 1460545200, 1460548800
consensus.srv_current, consensus.srv_previous = b"c" * 32, None
consensus.param = lambda name, default, low=0, high=0: default
first, second, fetch = minitor.time_periods(consensus, False)
assert fetch is first and first[:2] == (16903, 1440) and second[:3] == (16904, 1440, b"c" * 32)
assert first[3] == 1460419200 and second[3] == 1460505600
assert first[2][:8].hex() == "e7a6d7d2d9de116d"
period = (42, 1440, b"\x43" * 32, 0)


def hs_index(blinded, replica, period):
    place = minitor.pack(">QQQ", replica, period[1], period[0])
    return minitor.sha3_256(b"store-at-idx" + blinded + place)


def hsdir_index(ed_id, period):
    place = period[2] + minitor.pack(">QQ", period[0], period[1])
    return minitor.sha3_256(b"node-idx" + ed_id + place)


assert hs_index(b"\x42" * 32, 1, period) == H(
    "37e5cbbd56a22823714f18f1623ece5983a0d64c78495a8cfab854245e5f9a8a"
)
assert hsdir_index(b"\x42" * 32, period) == H(
    "db475361014a09965e7e5e4d4a25b8f8d4b8f16cb1d8a7e95eed50249cc1a2d5"
)


class Table:
    def ed_id(self, i):
        return minitor.sha256(bytes([i]))

    def identities(self, need):
        return [(i, self.ed_id(i)) for i in range(100)]


ring = sorted([(hsdir_index(Table().ed_id(i), period), i) for i in range(100)])
expected = []
for replica in (1, 2):
    at = hs_index(key, replica, period)
    order = [i for d, i in ring if d >= at] + [i for d, i in ring if d < at]
    expected += [i for i in order if i not in expected][:4]
assert minitor.hsdir_ring(Table(), consensus, key, period, "store") == expected

# A descriptor of C tor, with its revision counter; then one of our own.
made = json.loads(open(sys.argv[1] + "/tor_made.json").read())["descriptor"]
key, esk, when = H(made["key"]), H(made["besk"]), made["when"]
blinded = minitor.ed25519_blind_public(key, minitor.blinding_param(key, made["period"]))
subcred = minitor.subcredential(key, blinded)
found = minitor.parse_descriptor(made["text"].encode(), blinded, subcred, when)
assert found.revision == made["revision"] == minitor.revision_counter(esk, made["second"])
intros = [
    [i.address, i.port] + [k.hex() for k in (i.rsa_id, i.auth_key, i.enc_key)]
    for i in found.intro_points
]
assert intros == made["intro"]
urandom, seeds = minitor.urandom, list(range(1000))
minitor.urandom = lambda n: minitor.sha256(b"%d" % seeds.pop())[:n]
with minitor.spool("descriptor.test") as file:
    minitor.make_descriptor(file, esk, blinded, subcred, 7, found.intro_points, when)
    file.seek(0)
    text = file.read()
if minitor.MICROPYTHON:
    minitor.os.remove("descriptor.test")
minitor.urandom = urandom
# What was made when a descriptor was still one text in memory.
assert minitor.sha256(text)[:8].hex() == "80d376b5dcbfeef3"
again = minitor.parse_descriptor(text, blinded, subcred, when)
assert again.revision == 7 and [i.enc_key for i in again.intro_points] == [
    i.enc_key for i in found.intro_points
]
parse, error = minitor.parse_descriptor, minitor.ProtocolError
assert refused(error, parse, text.replace(b"counter 7", b"counter 8"), blinded, subcred, when)
assert refused(error, parse, text, blinded, bytes(32), when)
assert refused(error, parse, text, blinded, subcred, when + 200000)

# For some clients; of C tor first.
made = json.loads(open(sys.argv[1] + "/tor_made.json").read())["restricted"]
key = H(made["key"])
hidden = minitor.ed25519_blind_public(key, minitor.blinding_param(key, made["period"]))
text, known = made["text"].encode(), (minitor.subcredential(key, hidden), made["when"])
found = parse(text, hidden, known[0], known[1], H(made["client"]))
assert [i.enc_key.hex() for i in found.intro_points] == [row[4] for row in made["intro"]]
assert refused(minitor.AuthorizationError, parse, text, hidden, known[0], known[1])
secret, reasons = b"s" * 32, []
clients = [b"q" * 32, minitor.x25519(secret)]
with minitor.spool("descriptor.test") as file:
    minitor.make_descriptor(file, esk, blinded, subcred, 7, again.intro_points, when, 0, clients)
    file.seek(0)
    text = file.read()
if minitor.MICROPYTHON:
    minitor.os.remove("descriptor.test")
found = parse(text, blinded, subcred, when, secret)
assert [i.enc_key for i in found.intro_points] == [i.enc_key for i in again.intro_points]
for wrong in (None, b"t" * 32):
    try:
        parse(text, blinded, subcred, when, wrong)
    except minitor.AuthorizationError as e:
        reasons.append(e.reason)
assert reasons == [0xF4, 0xF5]
written = minitor.auth_text(clients[1])
assert minitor.auth_key(written) == minitor.auth_key(clients[1]) == clients[1]
assert refused(minitor.ConfigError, minitor.auth_key, written[:-1])
assert refused(minitor.ConfigError, minitor.auth_key, bytes(32))

key = H("19e05891d55232c08c2cad91d612fdb9cbd6691949a0742434a76c80bc6992fe")
minitor.sha3_256 = lambda data: key
assert minitor.revision_counter(b"", 123121) == 4036781069
assert minitor.revision_counter(b"", -5) == minitor.revision_counter(b"", 0) < 65537

print("ok")
