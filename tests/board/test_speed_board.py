"""What makes a board fast: native code, and cells that leave no garbage."""

import ast
import os
import sys
from pathlib import Path

import pytest
import runtimes

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "benchmarks")]

import bench_instructions  # noqa: E402
import builds  # noqa: E402
import compress  # noqa: E402


def test_a_cell_leaves_nothing_in_the_heap(micropython):
    micropython(HERE / "cells_garbage.py")


@pytest.mark.parametrize("architecture", ["xtensawin", "rv32imc", "armv7emsp", "x86", "x64"])
def test_native_code(architecture):
    # The third byte of a .mpy says for which architecture its native code is, if there is any.
    native = dict(builds.build("board").modules(architecture))["minitor.mpy"][2] >> 2
    # On 64 bits the code is plain, as viper's integers are longer there.
    assert bool(native) == (architecture != "x64")


def test_assignments_make_no_tuples():
    # With brackets MicroPython makes one, and viper cannot.
    for line in "a, b = (b, a)", "a, b, c = (1, (2, 3), lambda: 4)", "a, b = (c, (yield))":
        short = ast.unparse(compress.bare(ast.parse(line)))
        assert not short.split(" = ")[1].startswith("(") and short != line
        assert ast.dump(ast.parse(short)) == ast.dump(ast.parse(line))


@pytest.mark.parametrize(
    "task, most", [("keccak", 130000), ("sha1", 16000), ("sha512", 120000)], ids=lambda x: str(x)
)
def test_instructions_of_a_block(task, most):
    # Counted, so that no machine's speed is in it; a collection's half a million is spread out.
    try:
        assert bench_instructions.count(task, 500) <= most
    except runtimes.Missing as e:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(e))
