"""Heap of the board's build by phase, under 32-bit MicroPython.

    python tests/benchmarks/bench_memory.py [--heap 112k 96k] [--relays N] [--least]

For each heap size the phases import, bootstrap (from an empty file system), publish and serve (4
clients of C tor at once: 100 requests, 1 MB each way) with the memory that lives at most, as a
sampler in the program sees it after collections, and the first phase that fails.  --relays: the
directory lists so many (default: the 12 that run).  --least: the smallest heap, in steps of 4 KB,
in which each phase passes: what a collection cannot free at the worst moment, and holes.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS)]

import bigdir  # noqa: E402
import boardkit  # noqa: E402
import tornet  # noqa: E402
from httptarget import Target  # noqa: E402

PHASES = ("import", "bootstrap", "publish", "serve")
STEP, MOST = 4, 512  # KB
COUNT, SIZE = 100, 1000000


def kilobytes(text):
    return int(text.rstrip("k"))


class Bench:
    def __init__(self, net, folder, seconds):
        self.net, self.folder, self.seconds = net, folder, seconds
        self.target, self.clients, self.count = Target(), [], 0

    def run(self, heap, last="serve"):
        """Return [(phase, peak in bytes or None if it fails, what it says)] with `heap` KB."""
        self.count += 1
        folder, found = self.folder / ("board%d" % self.count), []
        board = boardkit.Board(folder, "%dk" % heap, self.net, self.target.port)
        try:
            for phase in PHASES[:PHASES.index(last) + 1]:
                try:
                    if phase == "serve":
                        found.append((phase,) + self.serve(board))
                    else:
                        peak, took = board.phase(phase, self.seconds)
                        found.append((phase, peak, "%.1f s" % took))
                except AssertionError as e:
                    # A program that ended says why in its last line.
                    failed = re.findall(r"^\w*Error.*", board.out + board.err, re.M)
                    text = (failed or [str(e)])[-1][-160:]
                    return found + [(phase, None, "%s; %d allocations failed" % (
                        text, board.refusals()))]
            return found
        finally:
            board.kill()
            shutil.rmtree(str(folder), ignore_errors=True)

    def serve(self, board):
        while len(self.clients) < 4:
            self.clients.append(self.net.client())
        address = board.address()
        for client in self.clients:
            boardkit.reach(client, address)
        boardkit.requests(self.clients, address, COUNT)
        boardkit.transfers(self.clients, address, self.folder, SIZE)
        peak = max(peak for _, peak in board.still())
        return peak, "%d allocations failed" % board.refusals()

    def least(self, phase, low):
        """Return the smallest heap, from `low` KB on, in which `phase` passes."""

        def passes(heap):
            name, peak, _ = self.run(heap, phase)[-1]
            return name == phase and peak is not None

        high = low
        while not passes(high):
            low, high = high + STEP, high + 8 * STEP
            if high > MOST:
                return None
        while low < high:
            middle = (low + high) // 2 // STEP * STEP
            low, high = (low, middle) if passes(middle) else (middle + STEP, high)
        return high


def main():
    parser = argparse.ArgumentParser(description="Heap of the board's build by phase.")
    parser.add_argument("--heap", nargs="+", type=kilobytes, default=[112, 96], metavar="112k")
    parser.add_argument("--relays", type=int, default=0, metavar="N")
    parser.add_argument("--least", action="store_true")
    options = parser.parse_args()
    say = lambda text: print(text, file=sys.stderr, flush=True)
    network = lambda: bigdir.BigNet(options.relays, progress=say) if options.relays \
        else tornet.TorNet(progress=say)
    with tempfile.TemporaryDirectory() as folder, network() as net:
        bench = Bench(net, Path(folder), 120 + options.relays // 4)
        try:
            for heap in options.heap:
                print("heap %d KB" % heap)
                for phase, peak, text in bench.run(heap):
                    if peak is None:
                        print("  %-10s fails: %s" % (phase, text), flush=True)
                    else:
                        print("  %-10s %6.1f KB live at most, %5.1f KB free (%s)" % (
                            phase, peak / 1024, heap - peak / 1024, text), flush=True)
            low = 64
            for phase in PHASES if options.least else ():
                low = bench.least(phase, low)
                print("  %-10s passes with %s KB" % (phase, low), flush=True)
                if not low:
                    break
        finally:
            bench.target.stop()


if __name__ == "__main__":
    main()
