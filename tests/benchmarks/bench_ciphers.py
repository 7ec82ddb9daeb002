"""Throughput of the relay cell's ciphers and hashes, both ways where there are two.

    python tests/benchmarks/bench_ciphers.py
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import minitor  # noqa: E402

CELL = 509


def seconds(call, least=0.15):
    """Return the shortest of five means of `call`."""
    best, count = None, 1
    for _ in range(5):
        while True:
            start = time.perf_counter()
            for _ in range(count):
                call()
            taken = time.perf_counter() - start
            if taken > least / 5:
                break
            count *= 2
        best = min(best or taken, taken / count)
    return best


def main():
    print("cipher          key  cells     us/call     MB/s")
    rates = {}
    for size in (16, 32):
        for kind in (minitor.AesCtrOpenssl, minitor.AesCtrPortable):
            for cells in (1, 32, 64, 128):
                cipher, data = kind(os.urandom(size)), os.urandom(CELL * cells)
                cipher.crypt(data)
                # The portable cipher makes its key stream in stretches: whole ones are timed.
                repeat = 64 if cells == 1 else 4
                taken = seconds(lambda: [cipher.crypt(data) for _ in range(repeat)]) / repeat
                rates[kind, size, cells] = rate = len(data) / taken / 1e6
                row = kind.__name__, 8 * size, cells, taken * 1e6, rate
                print("%-14s %4d %6d %11.2f %8.1f" % row)
    ratio = rates[minitor.AesCtrOpenssl, 16, 64] / rates[minitor.AesCtrPortable, 16, 64]
    print("OpenSSL is %.0f times the portable cipher at 64 cells" % ratio)
    for name in ("Sha1", "Sha3_256"):
        state, data = getattr(minitor, name)(), os.urandom(CELL)

        def cell():
            state.update(data)
            state.copy().digest()

        print("%-8s update, copy, digest of a cell: %.2f us" % (name, seconds(cell) * 1e6))


if __name__ == "__main__":
    main()
