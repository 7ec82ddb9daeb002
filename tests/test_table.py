"""Section 7: the relay table, in memory and on disk."""

import hashlib
import random

import pytest

import minitor
from fakenet import FakeNet, FakeRelay

NETWORK = bytes(range(32))


def make(relays, take=None):
    """Return the table of `relays`, with the microdescriptors of those that `take` accepts."""
    net = FakeNet(0, 1)
    net.relays = relays
    table = minitor.RelayTable()
    parser = minitor.ConsensusParser(table.add)
    parser.feed(net.consensus())
    consensus = parser.finish()
    fill(table, [r for r in relays if take is None or take(r)])
    return table, consensus


def fill(table, relays):
    wanted = {table.digest(i): i for i in next(table.missing(), ())}
    parser = minitor.MicrodescParser(lambda digest, *md: table.set_microdesc(wanted[digest], *md))
    for r in relays:
        parser.feed(r.microdesc())
    parser.finish()


def at(table, relay):
    return table.find(relay.rsa_id)


def test_records():
    relays = [FakeRelay(i, weight=i, policy="accept 80" if i % 2 else "") for i in range(50)]
    table, _ = make(relays, lambda r: r.n != 7)
    assert len(table) == 50 and minitor._SIZE + 8 <= 128
    ordered = sorted(relays, key=lambda r: r.rsa_id)
    for i, r in enumerate(ordered):
        relay = table.relay(i)
        assert table.find(r.rsa_id) == i == relay.index
        assert (relay.rsa_id, relay.address, relay.port) == (r.rsa_id, r.address, 9001)
        assert table.rsa_id(i) == r.rsa_id
        assert table.weights[i] == r.weight and bool(relay.flags & minitor.USABLE) == (r.n != 7)
        net6 = 0x20010000 | int("db%x" % (r.n % 16), 16)
        assert table.subnets(i) == (10 << 8 | r.n // 200, net6)
        if r.n != 7:
            assert (relay.ed_id, relay.ntor_key) == (r.ed_id, r.ntor_key)
            assert table.ed_id(i) == r.ed_id
            assert table.exit_allows(i, 80) == bool(r.n % 2)
    [i] = next(table.missing())
    assert i == table.find(relays[7].rsa_id) and table.digest(i) == relays[7].digest()
    for missing in (bytes(20), b"\xff" * 20, hashlib.sha1(b"other").digest()):
        assert table.find(missing) == -1
    assert minitor.RelayTable().find(bytes(20)) == -1


def test_a_malformed_microdescriptor_is_asked_for_once():
    table, _ = make([FakeRelay(1, extra="id ed25519 broken\n"), FakeRelay(2)])
    assert list(table.missing()) == []
    assert [bool(table.relay(i).flags & minitor.USABLE) for i in range(2)] == [
        table.rsa_id(i) == FakeRelay(2).rsa_id for i in range(2)
    ]


def test_exit_policies():
    policies = {
        "accept 80,443,8000-9000": ({80, 443, 8000, 8500, 9000}, {1, 81, 7999, 9001, 65535}),
        "reject 25,119-120": ({1, 24, 26, 118, 121, 65535}, {25, 119, 120}),
        "accept 1-65535": ({1, 65535}, set()),
        "reject 1-65535": (set(), {1, 80, 65535}),
        "": (set(), {1, 80}),
        "accept x": (set(), {80}),
        "permit 80": (set(), {80}),
        "accept": (set(), {80}),
    }
    relays = [FakeRelay(i, policy=p) for i, p in enumerate(policies)]
    table, _ = make(relays)
    for r in relays:
        allowed, refused = policies[r.policy]
        i = at(table, r)
        for port in allowed:
            assert table.exit_allows(i, port), (r.policy, port)
        for port in refused:
            assert not table.exit_allows(i, port), (r.policy, port)
    for port in range(1, 100):
        assert table.exit_allows(at(table, relays[2]), port)


def test_families():
    a, b, c, d, e, f = relays = [FakeRelay(i) for i in range(6)]
    a.family = [a, b, c, FakeRelay(99)]
    b.family = [a, b, c]
    c.family = [b]
    d.family_ids, e.family_ids = ["ed25519:one", "ed25519:two"], ["ed25519:two"]
    d.family = [a]
    f.family_ids = ["ed25519:three"]
    table, _ = make(relays)

    def same(x, y):
        result = table.same_family(at(table, x), at(table, y))
        assert result == table.same_family(at(table, y), at(table, x))
        return result

    assert same(a, b) and same(b, c) and same(d, e)
    # Only one of the two lists the other.
    assert not same(a, c) and not same(a, d)
    assert not same(d, f) and not same(a, e) and not same(f, a)
    table.use_family_ids = 0
    assert same(a, b) and not same(d, e)
    table.use_family_ids, table.use_family_lists = 1, 0
    assert not same(a, b) and same(d, e)


def test_families_are_kept_once_and_bounded(monkeypatch):
    relays = [FakeRelay(i) for i in range(60)]
    for r in relays:
        r.family, r.policy = relays, "accept 80"
    table, _ = make(relays)
    assert len(table._beside) == 3
    assert all(table.same_family(0, i) for i in range(60))
    monkeypatch.setattr(minitor, "_MAX_BESIDE", 500)
    for i, r in enumerate(relays):
        r.family = relays[: i + 1]
    table, _ = make(relays)
    assert sum(map(len, table._beside)) <= 500
    assert all(table.relay(i).flags & minitor.USABLE for i in range(60))


def test_save_and_load(tmp_path):
    relays = [FakeRelay(i, policy="accept %d" % (i % 5 + 1)) for i in range(40)]
    relays[3].family = relays[4].family = relays[3:5]
    table, consensus = make(relays, lambda r: r.n % 9)
    path = str(tmp_path / "relays")
    table.save(path, NETWORK, consensus)
    other, again = minitor.load_table(path, NETWORK)
    assert again.head == consensus.head and again.params == consensus.params
    assert other.records == table.records
    assert (other.flags, other.weights) == (table.flags, table.weights)
    assert list(other.missing()) == list(table.missing())
    for i in range(40):
        for port in range(7):
            assert other.exit_allows(i, port) == table.exit_allows(i, port)
        for j in range(40):
            assert other.same_family(i, j) == table.same_family(i, j)
    # Loaded, it can be filled up.
    fill(other, [r for r in relays if r.n % 9 == 0])
    assert list(other.missing()) == [] and len(other._beside) == 7
    other.save(path, NETWORK, consensus)
    assert minitor.load_table(path, NETWORK)[0].records == other.records
    assert [p.name for p in tmp_path.iterdir()] == ["relays"]


def test_damaged_truncated_or_foreign(tmp_path):
    path = tmp_path / "relays"
    table, consensus = make([FakeRelay(i) for i in range(10)])
    assert minitor.load_table(str(path), NETWORK) is None
    table.save(str(path), NETWORK, consensus)
    good = path.read_bytes()
    assert minitor.load_table(str(path), bytes(32)) is None
    rng = random.Random(1)
    for n in list(range(80)) + rng.sample(range(len(good)), 100):
        path.write_bytes(good[:n])
        assert minitor.load_table(str(path), NETWORK) is None
        changed = bytearray(good)
        changed[n] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        assert minitor.load_table(str(path), NETWORK) is None
    path.write_bytes(good + b"x")
    assert minitor.load_table(str(path), NETWORK) is None
    path.write_bytes(good)
    assert minitor.load_table(str(path), NETWORK)


def test_of_a_build_with_other_flags_or_records(tmp_path, monkeypatch):
    path = str(tmp_path / "relays")
    table, consensus = make([FakeRelay(i) for i in range(3)])
    table.save(path, NETWORK, consensus)
    layout = minitor._LAYOUT
    for part in (minitor._RECORD, minitor.sys.byteorder, "MiddleOnly", "Relay=2"):
        other = layout.replace(part.encode(), part.encode() + b"x")
        assert other != layout
        monkeypatch.setattr(minitor, "_LAYOUT", other)
        assert minitor.load_table(path, NETWORK) is None
    monkeypatch.setattr(minitor, "_LAYOUT", layout)
    assert minitor.load_table(path, NETWORK)
    # The words are numbered as the constants are.
    for n, word in enumerate(minitor.FLAG_WORDS):
        name = "" + word.replace("=", "") if "=" in word else word
        assert getattr(minitor, name.upper()) == 1 << n
    assert (minitor.KNOWN, minitor.USABLE) == (1 << n + 1, 1 << n + 2)


def test_carry_over(tmp_path):
    old = [FakeRelay(i, policy="accept %d" % (i + 1)) for i in range(30)]
    for r in old[:6]:
        r.family = old[:6]
    old_table, consensus = make(old)
    # Some go, some come, some change their microdescriptor, one had a malformed one.
    bad = FakeRelay(50, extra="id ed25519 broken\n")
    old_table, consensus = make(old + [bad])
    new = [FakeRelay(i, policy="accept %d" % (i + 1)) for i in range(3, 33)] + [bad]
    for r in new[:3]:
        r.family = old[:6]
    new[10].policy = "reject 25"
    new[11].weight = 77
    table, _ = make(new, lambda r: False)
    table.carry_over(old_table)
    missing = {table.rsa_id(i) for wanted in table.missing() for i in wanted}
    assert missing == {new[10].rsa_id} | {FakeRelay(i).rsa_id for i in (30, 31, 32)}
    for r in new:
        i = at(table, r)
        relay = table.relay(i)
        if r.rsa_id in missing or r is bad:
            assert not relay.flags & minitor.USABLE
        else:
            assert relay.flags & minitor.USABLE
            assert (relay.ed_id, relay.ntor_key) == (r.ed_id, r.ntor_key)
            assert table.exit_allows(i, r.n + 1) and not table.exit_allows(i, r.n + 2)
    assert table.weights[at(table, new[11])] == 77
    assert table.same_family(at(table, new[0]), at(table, new[2]))
    # A relay that comes back belongs to its family again.
    back, _ = make(new + old[:1], lambda r: False)
    back.carry_over(table)
    fill(back, old[:1])
    assert back.same_family(at(back, old[0]), at(back, new[0]))
    # What only relays that are gone had is gone.
    assert b"accept 1" not in table._beside


def test_too_many_relays():
    table = minitor.RelayTable()
    for i in range(65535):
        table.add(i.to_bytes(20, "big"), bytes(32), bytes(4), 1, 0, 0, 0)
    with pytest.raises(minitor.ProtocolError, match="too many"):
        table.add(b"x" * 20, bytes(32), bytes(4), 1, 0, 0, 0)
