"""What makes a board fast: native code, and cells that leave no garbage."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

import builds  # noqa: E402


def test_a_cell_leaves_nothing_in_the_heap(micropython):
    micropython(HERE / "cells_garbage.py")


@pytest.mark.parametrize("architecture", ["xtensawin", "rv32imc", "armv7emsp", "x86", "x64"])
def test_native_code(architecture):
    # The third byte of a .mpy says for which architecture its native code is, if there is any.
    native = builds.build("board").mpy(architecture)[2] >> 2
    # On 64 bits the code is plain, as viper's integers are longer there.
    assert bool(native) == (architecture != "x64")
