"""What compress.py --image puts in the flash, mounted by both MicroPythons as a board does it."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import runtimes

pytest.importorskip("littlefs")
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import compress  # noqa: E402
import test_image  # noqa: E402

MOUNT = """
import hashlib, json, os, sys, vfs


class Flash:
    # As esp32.Partition: blocks of 4096 bytes, from `start` to the end of the file.
    def __init__(self, path, start):
        self.f, self.start = open(path, "r+b"), start
        self.count = (self.f.seek(0, 2) - start) // 4096

    def readblocks(self, n, buf, offset=0):
        self.f.seek(self.start + n * 4096 + offset)
        self.f.readinto(buf)

    def writeblocks(self, n, buf, offset=0):
        self.f.seek(self.start + n * 4096 + offset)
        self.f.write(buf)

    def ioctl(self, op, arg):
        if op == 6:
            self.f.seek(self.start + arg * 4096)
            self.f.write(b"\\xff" * 4096)
        return {4: self.count, 5: 4096}.get(op, 0)


def look(folder):
    for name, kind in [entry[:2] for entry in os.ilistdir(folder)]:
        path = folder + "/" + name
        if kind == 0x4000:
            yield from look(path)
        else:
            with open(path, "rb") as f:
                yield path, f.read()


image, start, wanted = sys.argv[1:]
with open(wanted) as f:
    wanted = json.load(f)
# Without VfsLfs2: MicroPython finds out which file system it is.
vfs.mount(Flash(image, int(start)), "/flash")
os.chdir("/flash")
found = {}
for path, data in look("/flash"):
    found[path[7:]] = [len(data), list(hashlib.sha256(data).digest())]
assert found == wanted, [(p, found.get(p), wanted.get(p)) for p in set(found) | set(wanted)
                         if found.get(p) != wanted.get(p)]
sys.path.insert(0, "/flash")
import device
assert device.TEXT == b"the page"
# It takes writes, and what was there stays.
os.mkdir("minitor")
with open("minitor/state", "wb") as f:
    f.write(b"x" * 300000)
os.remove("sizes/512.bin")
# What the firmware starts; the modules are those of a board.
os.remove("settings.json")
for name in "machine", "network", "ntptime":
    sys.modules[name] = sys
with open("main.py") as f:
    exec(f.read())
os.chdir("/")
vfs.umount("/flash")
vfs.mount(Flash(image, int(start)), "/flash")
again = dict(look("/flash"))
assert again.pop("/flash/minitor/state") == b"x" * 300000
assert "/flash/sizes/512.bin" not in again and len(again) == len(wanted) - 2
for path, data in again.items():
    assert list(hashlib.sha256(data).digest()) == wanted[path[7:]][1], path
print("ok")
"""


def test_mount(bits, tmp_path):
    made, flash, place, size = test_image.CASES["1.26, 4 MB"]
    compress.main(test_image.command(tmp_path, "--flash-size", flash,
                                     data=test_image.firmware(**made)))
    image = (tmp_path / "out.bin").read_bytes()
    start = len(image) - size
    files = test_image.files_in(image[start:])
    wanted = {p: [len(d), list(hashlib.sha256(d).digest())] for p, d in files.items()}
    (tmp_path / "wanted").write_text(json.dumps(wanted))
    (tmp_path / "mount.py").write_text(MOUNT)
    line = runtimes.micropython(bits) + ["-X", "heapsize=4m", str(tmp_path / "mount.py")]
    line += [str(tmp_path / "out.bin"), str(start), str(tmp_path / "wanted")]
    assert "settings.json is missing" in runtimes.run_script(line, None)
    # LittleFS for Python reads what MicroPython wrote.
    files = test_image.files_in((tmp_path / "out.bin").read_bytes()[start:])
    assert len(files["minitor/state"]) == 300000 and "main.py" in files
