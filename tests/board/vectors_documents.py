"""Sections 6, 7 and 13: a made-up network's documents (tests/fakenet.py), the table, networks."""

import json
import os
import sys

import minitor
from minitor import ProtocolError

FOLDER = sys.argv[1] + "/board/"
PATH = FOLDER + "table-%s-%d.tmp" % (sys.implementation.name, sys.maxsize & 0xFF00000000 > 0)


def unhex(text):
    return minitor.binascii.unhexlify(text)


with open(FOLDER + "documents.json") as f:
    given = json.load(f)
identities = {unhex(i) for i in given["identities"]}
text, when = given["consensus"].encode(), given["valid_after"]


network_id = bytes(32)


def parse(text, size, old=None):
    table = minitor.new_table(PATH, network_id, old)
    parser = minitor.ConsensusParser(table.add)
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
    consensus = parser.finish()
    table.finish(consensus, old)
    return table, consensus


# Authority certificates, consensus, signatures, times.
def authority_certs(wanted, size):
    found, text = {}, given["certs"].encode()
    parser = minitor.CertParser(found, wanted)
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
    return found


certs = authority_certs(identities, 1 << 16)
assert len(certs) == 3 and certs == authority_certs(identities, 100)
assert authority_certs(set(), 498) == {}
for size in (1, 498, 4096):
    table, consensus = parse(text, size)
    assert len(table) == 12 and consensus.missing_certs(certs, identities) == []
    consensus.verify(certs, identities)
consensus.check_times(when)
assert consensus.valid_after == when and consensus.valid_until == when + 10800
assert consensus.params == {"circwindow": 1000, "hsdir_interval": 1440}
assert consensus.srv_current == bytes(range(32)) and consensus.bandwidth_weights["Wgg"] == 10000
for at, error in ((86401, minitor.ClockError), (-97201, minitor.DirectoryError)):
    try:
        consensus.check_times(when - at)
        assert False
    except error:
        pass
for bad in (
    text.replace(b"Bandwidth=1000", b"Bandwidth=1001", 1),
    text.replace(b"directory-signature sha256", b"directory-signature sha1"),
    text.replace(b"microdesc\n", b"\n", 1),
    text.replace(b"\nm ", b"\nm !", 1),
    text[:3000],
):
    try:
        parse(bad, 498)[1].verify(certs, identities)
        assert False
    except (ProtocolError, minitor.DirectoryError):
        pass

# Microdescriptors into the table.
def fill(table):
    found = {}
    parser = minitor.MicrodescParser(lambda digest, *md: found.update({digest: md}))
    document = given["microdescs"].encode()
    for at in range(0, len(document), 100):
        parser.feed(document[at : at + 100])
    parser.finish()
    for wanted in table.missing():
        for i in wanted:
            table.set_microdesc(i, *found[table.digest(i)])


table, consensus = parse(text, 498)
fill(table)
assert list(table.missing()) == []


def check(table):
    index, rows = [], {i: (flags, weight) for i, flags, weight in table.rows()}
    for n, (rsa_id, ed_id, ntor_key, address) in enumerate(given["relays"]):
        i = table.find(unhex(rsa_id))
        relay = table.relay(i)
        index.append(i)
        assert relay.rsa_id == unhex(rsa_id) and relay.address == address
        assert relay.port == 9001 and rows[i][1] == 1000
        usable = bool(relay.flags & minitor.USABLE)
        assert usable == (n != 6) and bool(rows[i][0] & minitor.EXIT) == (n % 3 == 0)
        if usable:
            assert relay.ed_id == table.ed_id(i) == unhex(ed_id)
            assert relay.ntor_key == unhex(ntor_key)
            assert table.exit_allows(i, 8500) == (n % 3 == 0)
            assert not table.exit_allows(i, 25)
    same = table.same_family
    assert same(index[1], index[2]) and same(index[4], index[5])
    assert not same(index[1], index[3]) and not same(index[2], index[4])
    assert table.find(bytes(20)) == -1
    assert len(table) == len(rows) == 12


check(table)

# On disk and back; one of another network is not taken.
table.save(PATH, network_id, consensus)
loaded, head = minitor.load_table(PATH, network_id)
check(loaded)
assert head.params == consensus.params and head.srv_current == consensus.srv_current
assert head.valid_until == consensus.valid_until
assert minitor.load_table(PATH, b"x" * 32) is None

# The next consensus: what is the same is carried over.
table, consensus = parse(text, 1000, loaded)
check(table)
assert list(table.missing()) == []

# Nor is a damaged one (FlashTable: vectors_table.py).
if minitor.MICROPYTHON:
    table.save(PATH, network_id, consensus)
    for name in os.listdir(PATH + ".d"):
        os.remove(PATH + ".d/" + name)
    os.rmdir(PATH + ".d")
else:
    with open(PATH, "rb") as f:
        good = f.read()
    for bad in (good[:-1], good[:60], b"", good[:500] + b"x" + good[501:], good + b"x"):
        with open(PATH, "wb") as f:
            f.write(bad)
        assert minitor.load_table(PATH, network_id) is None
    os.remove(PATH)
assert minitor.load_table(PATH, network_id) is None

# Networks.
network = minitor.load_network()
assert len(network.authorities) == 9 and len(network.fallbacks) == 200
line = "DirAuthority a orport=5000 v3ident=%s 127.0.0.1:80 %s" % ("11" * 20, "22" * 20)


def network_of(text):
    with open(PATH, "w") as f:
        f.write(text)
    return minitor.load_network(PATH)


network = network_of("TestingTorNetwork 1\n" + line)
assert network.testing and network.authorities == [("127.0.0.1", 5000, b"\x22" * 20)]
assert network.identities == {b"\x11" * 20}
try:
    network_of(line.replace("orport", "port"))
    assert False
except minitor.ConfigError:
    pass
os.remove(PATH)
print("ok")
