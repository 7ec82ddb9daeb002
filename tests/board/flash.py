"""A board's flash for scripts under MicroPython: a block device, and a made-up network to keep there."""

import os

import minitor as m

try:
    import vfs
except ImportError:
    vfs = os

BLOCK = 4096
PLAIN = m.FAST | m.STABLE | m.V2DIR | m.HSDIR | m.HSDIR2 | m.RELAY2 | m.FLOWCTRL1 | m.HSINTRO4
HEAD = (
    b"network-status-version 3 microdesc\nvote-status consensus\nconsensus-method 33\n"
    b"valid-after 2026-01-0%d %02d:00:00\nfresh-until 2026-01-0%d %02d:30:00\n"
    b"valid-until 2026-01-09 00:00:00"
)


class Flash:
    """A block device of `count` blocks; `journal`: what was written, if it is a list."""

    def __init__(self, count, blocks=None):
        self.blocks = list(blocks) if blocks else [None] * count
        self.written, self.journal = 0, None

    def readblocks(self, n, data, at=0):
        block = self.blocks[n]
        data[:] = memoryview(block)[at : at + len(data)] if block else b"\xff" * len(data)

    def put(self, n, at, data):
        block = self.blocks[n] or b"\xff" * BLOCK
        if len(data) < BLOCK:
            data = block[:at] + data + block[at + len(data) :]
        self.blocks[n] = data

    def writeblocks(self, n, data, at=0):
        self.written += len(data)
        if self.journal is not None:
            self.journal.append((n, at, bytes(data)))
        self.put(n, at, bytes(data))

    def ioctl(self, op, argument):
        if op == 6 and self.journal is not None:
            self.journal.append((argument, 0, None))
        if op == 6:
            self.blocks[argument] = None
        return {4: len(self.blocks), 5: BLOCK, 6: 0}.get(op)


# Files, if minitor's `open` is note_open: what is still open at umount would be closed after it, on freed memory.
opened = []


def note_open(path, mode):
    opened.append(open(path, mode))
    return opened[-1]


def mount(flash):
    vfs.mount(vfs.VfsLfs2(flash, progsize=32, readsize=32), "/flash")


def umount():
    while m._writing:
        m._writing.pop()
    while opened:
        opened.pop().close()
    vfs.umount("/flash")


def new(count):
    flash = Flash(count)
    vfs.VfsLfs2.mkfs(flash)
    mount(flash)
    return flash


def used():
    """Return how many bytes of the file system are taken."""
    size, _, blocks, free = os.statvfs("/flash")[:4]
    return size * (blocks - free)


def consensus(hour):
    day, hour = 1 + hour // 24, hour % 24
    return m.Consensus(HEAD % (day, hour, day, hour))


def network(count, hour, percent):
    """Yield RSA identity and digest of the relays, in order.

    Each hour `percent` of 100 are other ones than before or have another microdescriptor.
    """

    def version(n):
        turn, cycle = int.from_bytes(m.sha256(b"turn %d" % n)[:2], "big") % 100, 100 // percent
        return (hour + cycle - 1 - turn // percent) // cycle if hour else 0

    for n in range(count):
        # Evenly spread, as SHA-1 does.
        v, start = version(n), (n << 24) // count
        rsa_id = start.to_bytes(3, "big") + m.sha256(b"%d %d" % (n, v & 1 and v))[:17]
        yield rsa_id, m.sha256(b"%d %d" % (n, v))


def add_all(table, count, hour, percent):
    for n, (rsa_id, digest) in enumerate(network(count, hour, percent)):
        flags = PLAIN | (m.GUARD, m.EXIT, 0)[n % 3] ^ (m.HSDIR if (n + hour) % 5 == 0 else 0)
        place = bytes((10 + n // 256, n % 256, 0, 1))
        table.add(rsa_id, digest, place, 9001, 0, flags, 100 + n % 1000 + hour)


def keys(digest):
    return m.sha256(digest) + digest


def fill(table):
    """Give the table the microdescriptors that it lacks; return how many, in how many parts."""
    number = parts = 0
    for wanted in table.missing(92):
        number, parts = number + len(wanted), parts + 1
        for i in wanted:
            digest = table.digest(i)
            family = digest[:4] * (digest[4] % 20)
            table.set_microdesc(i, keys(digest), (b"accept 80", family, b""))
    return number, parts


def refresh(hour, old, count, percent):
    """Return the table of that hour, put into force, and its consensus."""
    table, head = m.new_table("/flash/relays", bytes(32), old), consensus(hour)
    add_all(table, count, hour, percent)
    table.finish(head, old)
    fill(table)
    table.save("/flash/relays", bytes(32), head)
    return table, head
