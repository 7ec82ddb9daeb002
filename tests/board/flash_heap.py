"""Prints the most heap that a table of COUNT relays needs, from consensus to paths and hash ring.

    flash_heap.py TESTS COUNT FOLDER
"""

import gc
import sys

sys.path.append(sys.argv[1] + "/board")

import flash as f
import minitor as m

count, path = int(sys.argv[2]), sys.argv[3] + "/relays"
phases, phase = {}, ""
HEAD = f.HEAD % (1, 0, 1, 0) + b"\ndir-source one\n"
ENTRY = "r relay%d %s 2038-01-01 00:00:00 %d.%d.0.1 9001 0\nm %s\ns %s\npr %s\nw Bandwidth=%d\n"
PROTOCOLS = "FlowCtrl=1-2 HSDir=2 HSIntro=4-5 HSRend=1-2 Link=1-5 Relay=1-4"


def sample(name=None):
    global phase
    phase = name or phase
    gc.collect()
    phases[phase] = max(phases.get(phase, 0), gc.mem_alloc() - base)


def refresh(hour, old):
    sample("consensus %d" % hour)
    table = m.new_table(path, bytes(32), old)
    parser = m.ConsensusParser(table.add)
    parser.feed(HEAD)
    for n, (rsa_id, digest) in enumerate(f.network(count, hour, 2)):
        flags = "Fast HSDir Running Stable V2Dir Valid " + ("Guard", "Exit", "")[n % 3]
        place = n, m.b64encode(rsa_id), 10 + n // 200, n % 200
        parser.feed((ENTRY % (place + (m.b64encode(digest), flags, PROTOCOLS, n))).encode())
        if n % 250 == 100:
            sample()
    parser.feed(b"directory-footer\nbandwidth-weights Wgg=6752\ndirectory-signature sha256 AA AA\n")
    sample()
    consensus = parser.finish()
    table.finish(consensus, old)
    chooser = m.PathSelector(table, consensus, None)
    sample("microdescriptors %d" % hour)
    for n, wanted in enumerate(table.missing(92)):
        if n % 8 == 0:
            chooser.percent()
            sample()
        for i in wanted:
            digest = table.digest(i)
            family = b"".join([digest[k : k + 4] for k in range(28)])
            table.set_microdesc(i, f.keys(digest), (b"accept 80,443", family, b""))
    table.save(path, bytes(32), consensus)
    assert len(table) == count and chooser.percent() == 100
    return table, consensus


def choices(table, consensus):
    times = [0]

    def count_to(number):
        times[0] += 1
        if times[0] % 250 == 1:
            sample()
        return times[0] > number

    sample("paths")
    paths = m.PathSelector(table, consensus, path + ".guards")
    for _ in range(3):
        assert len(paths.onion_path()) == 3
        sample()
    paths.pick("middle", lambda i: count_to(900))
    sample("ring")
    digest = m.sha256

    def sha3_256(data):
        # Another hash, for the sake of time.
        count_to(0)
        return digest(data)

    m.sha3_256 = sha3_256
    assert len(m.hsdir_ring(table, consensus, bytes(32), (1, 1440, bytes(32), 0), "store")) == 8


def run():
    table, consensus = refresh(0, None)
    table, consensus = refresh(1, table)
    choices(table, consensus)
    sample("start")
    table, consensus = None, None
    table, consensus = m.load_table(path, bytes(32))
    sample()
    assert len(table) == count


m.set_log(m.ERR)
gc.collect()
base = gc.mem_alloc()
run()
for name in sorted(phases):
    print("%6d bytes  %s" % (phases[name], name))
print("peak %d" % max(phases.values()))
print("ok")
