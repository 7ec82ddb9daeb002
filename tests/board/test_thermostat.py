"""examples/thermostat without Tor, under both MicroPythons and under CPython."""

import sys
from pathlib import Path

import runtimes

SCRIPT = Path(__file__).parent / "thermostat_script.py"
FOLDER = runtimes.REPO / "examples" / "thermostat"


def test_micropython(bits):
    heap = {"32": "100k", "64": "250k"}[bits]
    line = runtimes.micropython(bits) + ["-X", "heapsize=" + heap, str(SCRIPT), str(FOLDER)]
    runtimes.run_script(line, None)


def test_cpython():
    runtimes.run_script([sys.executable, str(SCRIPT), str(FOLDER)], None)
