"""How much a table of 7,200 relays takes, and an hourly refresh writes, on a LittleFS of 2 MB.

    flash_size.py TESTS [COUNT [PERCENT [HOURS]]]
"""

import sys

sys.path.append(sys.argv[1] + "/board")

import flash as f
import minitor as m

count, percent, hours = [int(x) for x in sys.argv[2:]] or (7200, 2, 4)
device, table = f.new(512), None
empty = f.used()
most = [0, 0]
for hour in range(hours + 1):
    before = device.written
    table = m.new_table("/flash/relays", bytes(32), table)
    f.add_all(table, count, hour, percent)
    table.finish(f.consensus(hour), table._old if hour else None)
    new, parts = f.fill(table)
    most[1] = max(most[1], f.used() - empty)
    table.save("/flash/relays", bytes(32), f.consensus(hour))
    written = device.written - before
    print("hour %d: %d new in %d parts, %d bytes written, %d kept" % (
        hour, new, parts, written, f.used() - empty))
    assert len(table) == count and not table.short
    if hour:
        assert new >= count * percent * 3 // 400, new
        most[0] = max(most[0], written)
print("most: %d written in an hour, %d kept" % tuple(most))
assert m.load_table("/flash/relays", bytes(32))
assert most[0] <= 150000 and most[1] <= 1200000, most
print("ok")
