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
    (folder / "minitor.mpy").write_bytes(build.mpy(runtimes.ARCHITECTURES[bits]))
    (folder / "script").mkdir()
    (folder / "script" / "main.py").write_text(script)
    line = runtimes.micropython(bits) + ["-X", "heapsize=" + heap]
    line += [str(folder / "script" / "main.py")] + [str(a) for a in arguments]
    environment = dict(os.environ, MICROPYPATH="%s:.frozen" % folder)
    return runtimes.run_script(line, environment)


@pytest.mark.parametrize("script", sorted(path.name for path in HERE.glob("vectors_*.py")))
def test_vectors(bits, script, tmp_path):
    text = (HERE / script).read_text()
    # Whole, not cut to what a board needs of it.
    build = builds.build("board", builds.mentioned(True, text) + ("_PLACES",))
    run(bits, build, builds.translated(text, build.map), tmp_path, HERE.parent)


def test_import(bits, tmp_path):
    run(bits, builds.build("board"), IMPORT, tmp_path)


def heap(folder):
    return int(run("32", builds.build("board"), IMPORT, folder).split()[0])


def test_heap_after_import(tmp_path):
    assert heap(tmp_path) <= json.loads(SIZES.read_text())["board heap"] * 1.03


if __name__ == "__main__":
    import tempfile

    import test_compress

    with tempfile.TemporaryDirectory() as folder:
        test_compress.record({"board heap": heap(Path(folder))})
    print(SIZES.read_text())
