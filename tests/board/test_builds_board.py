"""Board builds by compress.py, under both MicroPythons: vectors, and memory after import.

    python tests/board/test_builds_board.py       records that memory in tests/sizes.json
"""

import json
import os
import sys
from pathlib import Path

import pytest
import runtimes

HERE = Path(__file__).parent
SIZES = HERE.parent / "sizes.json"
sys.path[:0] = [str(HERE.parent)]

import builds  # noqa: E402

IMPORT = """
import gc, asyncio, tls


def load():
    # Within a function: what is left on the stack otherwise keeps 12 KB alive.
    import minitor


load()
gc.collect()
gc.collect()
print(gc.mem_alloc())
print("ok")
"""


def run(bits, build, script, folder, *arguments, heap="2m"):
    builds.write(build, folder, runtimes.ARCHITECTURES[bits])
    (folder / "script").mkdir()
    (folder / "script" / "main.py").write_text(script)
    line = runtimes.micropython(bits) + ["-X", "heapsize=" + heap]
    line += [str(folder / "script" / "main.py")] + [str(a) for a in arguments]
    environment = dict(os.environ, MICROPYPATH="%s:.frozen" % folder)
    return runtimes.run_script(line, environment)


# It calls what is in overlays so often that these stay, or it would take three minutes.
HELD = {"vectors_table.py"}


@pytest.mark.parametrize("script", sorted(path.name for path in HERE.glob("vectors_*.py")))
def test_vectors(bits, script, tmp_path):
    text = (HERE / script).read_text()
    # Whole, not cut to what a board needs of it.
    build = builds.build("board", builds.mentioned(True, text) + ("_PLACES",))
    text = builds.translated(text, build.map)
    if script in HELD:
        names = len(build.overlays), build.map["names"]["_hold"]
        text = "import minitor\nfor i in range(%d):\n    minitor.%s(i)\n" % names + text
    run(bits, build, text, tmp_path, HERE.parent)


def test_import(bits, tmp_path):
    run(bits, builds.build("board"), IMPORT, tmp_path)


TABLE = "_TABLE = [%s]\n" % ", ".join(["'row %d of many'" % i for i in range(400)])
SOURCE = """
import asyncio
import gc
__version__ = "1.0"
MICROPYTHON = True

def row(i):
    return rows()[i]

def rows():
    return _TABLE

async def slowly(i, event, also):
    await event.wait()
    return row(i) + also

class OnionService:
    async def start(self, i, event, also=""):
        try:
            return await slowly(i, event, also)
        finally:
            self.ended = True

    def fails(self, i):
        self.error = row(i)
"""
LOADED = """
import asyncio, gc, os, sys
import minitor

here = lambda: sorted([name for name in sys.modules if name[:7] == "minitor"])


def used():
    gc.collect()
    gc.collect()
    return gc.mem_alloc()


def again():
    assert minitor.row(7) == "row 7 of many" and here() == ["minitor"]


async def main():
    events = asyncio.Event(), asyncio.Event()
    machine = minitor.OnionService()
    tasks = [asyncio.create_task(machine.start(i, events[i])) for i in range(2)]
    tasks.append(asyncio.create_task(machine.start(2, asyncio.Event(), also="!")))
    await asyncio.sleep(0)
    assert here() == ["minitor", "minitor0", "minitor1"], here()
    full = used()
    events[0].set()
    assert await tasks[0] == "row 0 of many" and machine.ended
    machine.ended = False
    tasks[2].cancel()
    try:
        await tasks[2]
    except asyncio.CancelledError:
        assert machine.ended
    assert here() == ["minitor", "minitor0", "minitor1"], here()
    assert minitor.row(9) == "row 9 of many"
    try:
        machine.fails(400)
    except IndexError:
        events[1].set()
    assert await tasks[1] == "row 1 of many" and here() == ["minitor"]
    await asyncio.sleep(0)
    return full


def foreign(number, content, kind):
    # An overlay that is missing, or of another build; nothing of it stays, nor of what it needs.
    name = "minitor%d.mpy" % number
    os.rename(name, name + ".away")
    if content:
        with open(name, "wb") as f:
            f.write(content)
    for _ in range(2):
        try:
            minitor.OnionService().fails(1) if number else minitor.row(1)
        except (ImportError, ValueError) as e:
            assert kind in str(e), e
        else:
            assert False
        assert here() == ["minitor"]
    os.rename(name + ".away", name)
    again()


again()
before = used()
for _ in range(100):
    again()
assert used() < before + 1000, (used(), before)
full = asyncio.run(main())
between = used()
assert full > between + 10000
asyncio.run(main())
assert used() < between + 500, (between, used())
os.chdir(sys.argv[1])
for number in 0, 1:
    foreign(number, None, "minitor%d" % number)
    foreign(number, b"This is no module.", "mpy")
    with open("other%d.mpy" % number, "rb") as f:
        foreign(number, f.read(), "E%s %d" % (sys.argv[2], number))
print("ok")
"""


def test_overlays_stay_as_long_as_they_run(bits, tmp_path, monkeypatch):
    """Tasks share one that is loaded; ended, cancelled or failed, it is dropped, and its memory."""
    compress = builds.compress
    monkeypatch.setitem(compress.PRESETS, "small", (True, "row OnionService", "", ""))
    monkeypatch.setattr(compress, "OVERLAYS", ("row", "OnionService.start OnionService.fails"))
    build = compress.Build(SOURCE + TABLE, "small")
    other = compress.Build(SOURCE + TABLE.replace("many", "more"), "small")
    for name, content in other.modules(runtimes.ARCHITECTURES[bits]):
        (tmp_path / name.replace("minitor", "other")).write_bytes(content)
    script, code = builds.translated(LOADED, build.map), build.codes.index(compress.STALE)
    run(bits, build, script, tmp_path, tmp_path, code)


def heap(folder):
    return int(run("32", builds.build("board"), IMPORT, folder).split()[0])


def test_heap_after_import(tmp_path):
    most = json.loads(SIZES.read_text())["board heap"] * 1.03
    assert heap(tmp_path) <= min(most, 58000)


if __name__ == "__main__":
    import tempfile

    import test_compress

    with tempfile.TemporaryDirectory() as folder:
        test_compress.record({"board heap": heap(Path(folder))})
    print(SIZES.read_text())
