"""Section 7: the table on flash: what it holds, refreshes, damage, and how little it keeps in memory."""

import os
import sys

import minitor as m

PATH = "table-%d" % m.randbelow(1 << 30)
NETWORK = bytes(32)
PLAIN = m.FAST | m.STABLE | m.V2DIR | m.HSDIR | m.HSDIR2 | m.RELAY2 | m.FLOWCTRL1
HEAD = (
    b"network-status-version 3 microdesc\nvote-status consensus\nconsensus-method 33\n"
    b"valid-after 2026-01-01 00:00:00\nfresh-until 2026-01-01 01:00:00\n"
    b"valid-until 2026-01-01 03:00:00"
)
consensus = m.Consensus(HEAD)


class Relay:
    """Number `n`; what `version` it is of shows in its microdescriptor."""

    def __init__(self, n, version=0):
        self.n, self.rsa_id = n, m.sha256(b"%d" % n)[:20]
        self.digest = m.sha256(b"%d %d" % (n, version))
        self.keys = m.sha256(self.digest) + m.sha256(b"ntor" + self.digest)
        self.address = bytes((10 + n // 200, n % 200, 0, 1))
        self.flags = PLAIN | (m.GUARD, m.EXIT, 0)[n % 3]
        self.policy = (b"accept 80,443,8000-9000", b"reject 1-65535", b"reject 25")[n % 3]
        # Fives list each other, but who is first names only himself.
        fellows = range(n - n % 5, n - n % 5 + 5) if n % 5 else (n,)
        self.family = b"".join([m.sha256(b"%d" % k)[:4] for k in fellows])
        self.ids = m.sha256(b"id %d" % (n // 7))[:8] if n % 2 else b""


def write(relays, old=None, hour=0):
    """Return a table on flash of the relays, in which no microdescriptor came yet."""
    table = m.FlashTable(PATH, NETWORK)
    table.begin(old)
    for r in sorted(relays, key=lambda r: r.rsa_id):
        flags = r.flags ^ (m.FAST if (r.n + hour) % 10 == 0 else 0)
        table.add(r.rsa_id, r.digest, r.address, 9001, r.n, flags, (r.n + 1) * (hour + 1))
    table.finish(consensus, old)
    return table


def fill(table, relays, lacking=()):
    """Give the table the microdescriptors; return how many it asked for."""
    asked, found = 0, {r.digest: r for r in relays}
    for wanted in table.missing(92):
        asked += len(wanted)
        for i in sorted(wanted, key=table.digest):
            r = found[table.digest(i)]
            if r.n not in lacking:
                table.set_microdesc(i, r.keys, (r.policy, r.family, r.ids))
    return asked


def check(table, relays, hour=0, lacking=()):
    assert len(table) == len(relays)
    index = {r.n: table.find(r.rsa_id) for r in relays}
    rows = {i: (flags, weight) for i, flags, weight in table.rows()}
    assert sorted(rows) == sorted(index.values())
    for r in relays:
        i = index[r.n]
        flags = r.flags ^ (m.FAST if (r.n + hour) % 10 == 0 else 0)
        usable = r.n not in lacking
        assert rows[i][0] == flags | (m.USABLE if usable else 0)
        assert table.flags_of(i) & m.USABLE == (m.USABLE if usable else 0)
        # Five significant bits less one in two thousand.
        weight = (r.n + 1) * (hour + 1)
        assert weight - weight // 1024 <= rows[i][1] <= weight
        assert table.rsa_id(i) == r.rsa_id and table.subnets(i)[1] == r.n
        if usable:
            relay = table.relay(i)
            assert (relay.ed_id, relay.ntor_key) == (r.keys[:32], r.keys[32:])
            assert relay.address == "%d.%d.0.1" % tuple(r.address[:2]) and relay.port == 9001
            assert table.exit_allows(i, 443) == (r.n % 3 != 1)
            assert table.exit_allows(i, 8500) == (r.n % 3 != 1)
            assert table.exit_allows(i, 25) is False and table.exit_allows(i, 22) == (r.n % 3 == 2)
    identities = dict([(i, ed_id) for i, ed_id in table.identities(m.USABLE)])
    assert identities == {index[r.n]: r.keys[:32] for r in relays if r.n not in lacking}
    for bad in (bytes(20), b"\xff" * 20, b"\x80" * 20):
        assert table.find(bad) == -1
    return index


def load():
    table = m.FlashTable(PATH, NETWORK)
    found = table.load()
    return table if found and found.valid_after == consensus.valid_after else None


def clean():
    for name in os.listdir(PATH + ".d"):
        os.remove(PATH + ".d/" + name)
    os.rmdir(PATH + ".d")


def files():
    return sorted(os.listdir(PATH + ".d"))


def life(count):
    relays = [Relay(n) for n in range(count)]
    table = write(relays)
    assert fill(table, relays) == count
    check(table, relays)
    # Until it is put into force, nothing is there for the next start.
    assert load() is None
    table.save(PATH, NETWORK, consensus)
    index = check(table, relays)
    check(load(), relays)
    assert index[1] != index[2] and fill(table, relays) == 0
    # Families: never missed among those who list each other; one who is not listed is not.
    missed = [n for n in range(1, count - 4) if n % 5 in (1, 2, 3)
              if not table.same_family(index[n], index[n + 1])]
    assert missed == [], missed
    assert table.same_family(index[1], index[3]) and table.same_family(index[7], index[11])
    wrong = [n for n in range(count - 15) if table.same_family(index[n], index[n + 15])]
    assert len(wrong) < count // 4
    table.use_family_lists = table.use_family_ids = 0
    assert not table.same_family(index[1], index[3]) and not table.same_family(index[7], index[11])

    # The next hours: some go, come, or change; in every one all flags and weights do.
    for hour in range(1, 6):
        old = table
        for n in range(hour, len(relays), 40):
            relays[n] = Relay(relays[n].n, hour) if n % 2 else Relay(count * hour + n)
        table = write(relays, old, hour)
        # The old one serves while the new one is filled, and while nothing is decided.
        kept = [r for r in relays if r.n < count]
        assert len([r for r in kept if old.find(r.rsa_id) >= 0]) >= len(kept) - 1
        changed = len(range(hour, len(relays), 40))
        lacking = [r.n for r in relays if hour == 3 and r.n % 40 == 3]
        assert fill(table, relays, lacking) == changed
        table.save(PATH, NETWORK, consensus)
        index = check(table, relays, hour, lacking)
        check(load(), relays, hour, lacking)
        assert fill(table, relays) == len(lacking)
        table.save(PATH, NETWORK, consensus)
        check(table, relays, hour)
    # One has another address, and the same microdescriptor.
    old, moved = table, relays[count // 2]
    moved.address = bytes((99, 1, 0, 1))
    table = write(relays, old, 5)
    assert fill(table, relays) == 1
    table.save(PATH, NETWORK, consensus)
    check(table, relays, 5)
    # An abandoned one (a forged consensus) leaves all as it was.
    m.FlashTable(PATH, NETWORK).begin(table)
    write([Relay(n, 9) for n in range(count)], table)
    check(table, relays, 5)
    check(load(), relays, 5)
    # One whose microdescriptors did not come has only skeletons.
    fewer = relays[: count // 2] + [Relay(9 * count + n) for n in range(5)]
    table = write(fewer, table)
    table.save(PATH, NETWORK, consensus)
    assert sum([1 for _ in table.rows(m.USABLE, 0)]) == 5
    assert fill(load(), fewer) == 5
    assert [name for name in files() if not name.isdigit()] == ["hot"]


def test_much_is_new():
    """More change at once than there is room beside the old ones: the rest comes next time."""
    relays = [Relay(n) for n in range(400)]
    table = write(relays)
    fill(table, relays)
    table.save(PATH, NETWORK, consensus)
    before = len(files())
    relays = [Relay(n, 1) for n in range(400)]
    table = write(relays, table)
    assert table.short and 0 < len(table) < 400
    fill(table, relays)
    table.save(PATH, NETWORK, consensus)
    table = write(relays, table)
    assert not table.short and len(table) == 400
    fill(table, relays)
    table.save(PATH, NETWORK, consensus)
    check(table, relays)
    assert len(files()) <= before + 3


def test_malformed_ones():
    relays = [Relay(n) for n in range(50)]
    table = write(relays)
    for wanted in table.missing():
        for i in wanted:
            table.set_microdesc(i, b"", (b"", b"", b""))
    table.save(PATH, NETWORK, consensus)
    assert next(table.missing(), None) is None and next(load().missing(), None) is None
    assert [i for i, _, _ in table.rows(m.USABLE, m.USABLE)] == []
    good = (bytes(20), bytes(32), bytes(4), 1, 0, 0, 0)
    for at, bad in ((2, bytes(3)), (3, 0), (3, 65536), (4, 1 << 32), (6, 1 << 32), (0, b"")):
        table = m.FlashTable(PATH, NETWORK)
        table.begin(load())
        table.add(*good)
        try:
            table.add(*(((b"\1" * 20,) + good[1:])[:at] + (bad,) + good[at + 1 :]))
            assert False, (at, bad)
        except m.ProtocolError:
            pass


def test_damage():
    relays = [Relay(n) for n in range(100)]
    table = write(relays)
    fill(table, relays)
    table.save(PATH, NETWORK, consensus)
    assert m.FlashTable(PATH, b"x" * 32).load() is None and load()
    for name in ("hot", "0", "1", "2"):
        path = PATH + ".d/" + name
        with open(path, "rb") as f:
            good = f.read()
        at = [0, 5, 16, 21, 200, len(good) // 2, len(good) - 41, len(good) - 1]
        spoilt = [good[:n] + bytes([good[n] ^ 4]) + good[n + 1 :] for n in at]
        for bad in spoilt + [good[:n] for n in at] + [b"", None]:
            if bad is None:
                os.remove(path)
            else:
                m.write_file(path, bad)
            assert load() is None, name
        m.write_file(path, good)
        check(load(), relays)
    # What was not believed is gone before another takes its slots.
    m.FlashTable(PATH, NETWORK).begin(None)
    assert "hot" not in files() and "0" not in files()


def weights():
    table = m.FlashTable(PATH, NETWORK)
    table.begin(None)
    values = [0, 1, 2047, 2048, 4095, 123456, (1 << 32) - 1]
    for n, weight in enumerate(values):
        table.add(bytes([n]) * 20, bytes(32), bytes((10, n, 0, 0)), 1, 0, n, weight)
    table.finish(consensus, None)
    for (_, flags, found), weight in zip(table.rows(), values):
        assert weight - (weight >> 11) <= found <= weight, (weight, found)
    assert [i for i, _, _ in table.rows(1, 1)] == [i for i, f, _ in table.rows() if f & 1]


try:
    for test in (lambda: life(120), lambda: life(630), test_much_is_new, test_malformed_ones):
        test()
        clean()
    for test in (test_damage, weights):
        test()
        clean()
finally:
    while m._writing:
        m._writing.pop().close()
print("ok")
