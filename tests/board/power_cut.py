"""The power is cut at every write of a board in turn, and in its midst; then it starts again.

The writes: the service's key, the table at bootstrap, guards, two hourly refreshes.
"""

import sys

sys.path.append(sys.argv[1] + "/board")

import flash as f
import minitor as m

START, COUNT, PERCENT = 1800000000, 100, 10
m.set_log(m.ERR)
m.open = f.note_open


def once(function):
    # What takes long, and depends on its arguments alone.
    known = {}

    def remembered(*args):
        if args not in known:
            known[args] = function(*args)
        return known[args]

    return remembered


m.ed25519_public, m.onion_address = once(m.ed25519_public), once(m.onion_address)
counter_at = once(m.revision_counter)


def promise(told, **what):
    told.append((len(device.journal), what))


def start():
    """What stands on flash: public key, revision counter, hour of the table (-1: none), table."""
    esk, public = m.load_service_key("/flash/onion_service")
    found = m.load_table("/flash/relays", bytes(32))
    if not found:
        return public, counter_at(esk[:32], m.now() - START), -1, None
    table, consensus = found
    hour = consensus.valid_after // 3600 % 24
    assert len(table) == COUNT
    for rsa_id, digest in f.network(COUNT, hour, PERCENT):
        i = table.find(rsa_id)
        assert table.rsa_id(i) == rsa_id and table.ed_id(i) == f.keys(digest)[:32]
        assert table.flags_of(i) & m.USABLE
    assert [w for _, _, w in table.rows()] == [100 + n + hour for n in range(COUNT)]
    guards = m.PathSelector(table, consensus, "/flash/guards.json")
    # Those that are gone keep their places in the sample for 20 days.
    assert len(guards.sample) == 20 and len(guards._order()) > 2
    return public, counter_at(esk[:32], m.now() - START), hour, table


# One life without a cut, of which every write is noted.
device, told, table = f.new(512), [(0, {"key": None, "counter": 0, "hour": -1, "now": START})], None
device.journal = []
first = list(device.blocks)
m.now = lambda: START
esk, public = m.load_service_key("/flash/onion_service")
promise(told, key=public)
for hour in range(3):
    table, consensus = f.refresh(hour, table, COUNT, PERCENT)
    promise(told, hour=hour)
    m.PathSelector(table, consensus, "/flash/guards.json")
    m.now = lambda: START + 3600 * hour
    promise(told, counter=counter_at(esk[:32], 3600 * hour), now=m.now())
journal = device.journal
f.umount()
print("%d writes" % len(journal))

# And its end at each of them.
state, known, hours = f.Flash(0, first), {}, set()
for n, (block, at, data) in enumerate(journal):
    for place, what in told:
        if place == n:
            known.update(what)
    m.now = lambda: known["now"]
    half = b"\xff" * (f.BLOCK // 2) if data is None else data[: len(data) // 2]
    for torn in (False, True):
        f_device = f.Flash(0, state.blocks)
        if torn:
            f_device.put(block, at, half)
        f.mount(f_device)
        public, counter, hour, table = start()
        assert known["key"] in (None, public), n
        assert counter >= known["counter"] and hour >= known["hour"], n
        hours.add(hour)
        if n % 16 == 0:
            # It goes on from there.
            table, _ = f.refresh(hour + 1, table, COUNT, PERCENT)
            assert start()[:1] + start()[2:3] == (public, hour + 1)
        f.umount()
    if data is None:
        state.blocks[block] = None
    else:
        state.put(block, at, data)
assert hours == {-1, 0, 1, 2}
print("ok")
