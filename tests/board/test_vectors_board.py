"""Runs each vectors_*.py beside this file under both MicroPythons and under CPython.

Such a script is plain: it imports minitor, takes the folder tests/ as its
argument, asserts, and prints "ok" at its end.
"""

import os
import sys
from pathlib import Path

import pytest
import runtimes

HERE = Path(__file__).parent
SCRIPTS = sorted(path.name for path in HERE.glob("vectors_*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_micropython(script, micropython):
    micropython(HERE / script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_cpython(script):
    environment = dict(os.environ, PYTHONPATH=str(runtimes.REPO))
    line = [sys.executable, str(HERE / script), str(HERE.parent)]
    runtimes.run_script(line, environment)
