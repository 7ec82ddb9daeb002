"""Section 12: choices by weight, paths, guards and their file."""

import os

import minitor as m

PLAIN = m.FAST | m.STABLE | m.V2DIR
PLAIN |= m.RELAY2 | m.FLOWCTRL1 | m.HSINTRO4 | m.HSREND2
FILE = "guards-%d.json" % m.randbelow(1 << 30)


def network(count):
    table = m.RelayTable()
    for i in range(count):
        flags = PLAIN | (m.GUARD, m.EXIT, 0)[i % 3]
        rsa_id = (i + 1).to_bytes(4, "big") + bytes(16)
        address = bytes((10 + i // 256, i % 256, 0, 1))
        table.add(rsa_id, bytes(32), address, 9001, 0, flags, 1 << i % 32)
        policy = b"accept 80,443" if flags & m.EXIT else b""
        table.set_microdesc(i, rsa_id + bytes(12) + bytes(32), (policy, b"", b""))
    return table


def refused(function, *args):
    try:
        function(*args)
    except m.CircuitError:
        return True
    return False


consensus = m.Consensus(
    b"network-status-version 3 microdesc\nvote-status consensus\nconsensus-method 33\n"
    b"valid-after 2026-01-01 00:00:00\nfresh-until 2026-01-01 01:00:00\n"
    b"valid-until 2026-01-01 03:00:00"
)
consensus.params, consensus.bandwidth_weights = {}, {}
table = network(66)

# Weights above the width of the machine: relay 31 of 32 has half of all.
weights = m.PathSelector(table, consensus, None)
names = ("Wgg", "Wgm", "Wgd", "Wmg", "Wmm", "Wme", "Wmd", "Weg", "Wem", "Wee", "Wed")
consensus.bandwidth_weights = {
    name: 0x7FFFFFFF for name in names + ("Wgb", "Wmb", "Web", "Wdb")}
for chooser in (weights, m.PathSelector(table, consensus, None)):
    picked = [chooser.pick("middle", lambda i: i < 32) for _ in range(60)]
    assert 12 < picked.count(31) < 48 and min(picked) > 10, picked
assert weights.percent() == 100

# Paths.
try:
    paths = m.PathSelector(table, consensus, FILE)
    guard = paths.guard().rsa_id
    for _ in range(10):
        path = paths.exit_path(443)
        assert len(path) == 3 and path[0].rsa_id == guard
        assert path[2].flags & m.EXIT and len(set([r.index for r in path])) == 3
        assert len(paths.onion_path()) == 3
        target = table.relay(5)
        assert paths.onion_path(target)[3] is target
    assert len(paths.layer_two) == 4 and refused(paths.exit_path, 25)
    assert refused(m.PathSelector(network(2), consensus, FILE + "2").exit_path, 443)

    # Guards are stored, and a damaged file is not believed.
    assert paths.succeeded(guard)
    again = m.PathSelector(table, consensus, FILE)
    assert [g.rsa_id for g in again.sample] == [g.rsa_id for g in paths.sample]
    assert len(again.sample) == 20 and again.sample[0].confirmed
    m.set_log(m.ERR)
    for text in ("nonsense", "[[1,2,3]]", '[["zz",1,2]]', '{"a":1}', "[[", '[["aaaaaaaa",1e999]]'):
        m.write_file(FILE, text.encode())
        assert m.PathSelector(m.RelayTable(), consensus, FILE).sample == [], text
finally:
    os.remove(FILE)
    os.remove(FILE + "2")

print("ok")
