"""Count a board's instructions on 32-bit MicroPython, and translate them to an ESP32's seconds.

    python tests/benchmarks/bench_instructions.py

Callgrind (of Debian trixie's valgrind, which apt fetches into ~/.cache/minitor) counts what
MicroPython for i386 executes, with minitor.py as it is compiled for tests; counted.py has the
tasks.  What is assumed:

- An ESP32's processor runs at 240 MHz and needs 1.5 cycles for what takes i386 one instruction.
- TLS, TCP/IP, WiFi and flash are not in it: mbedTLS leaves AES to the chip's own, and the rest
  runs on the other core.  AES is in it, in software: on the chip it takes less.
- Consensus and microdescriptors grow with the number of relays; a hundredth is counted.
- A circuit to a rendezvous point has four relays (vanguards-lite) that are all new to it, the
  service's layer is the fifth.
- Bootstrap fetches 2.6 MB of consensus and 8 MB of microdescriptors through a relay's BEGIN_DIR,
  one layer, and verifies 9 signatures of the consensus and 18 in authority certificates.

It ends with 1 if a goal is missed.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "board"))

import runtimes  # noqa: E402

HERTZ, CYCLES = 240e6, 1.5
RELAYS, DIRECTORIES, CELL = 7200, 4000, 498
FETCHED, SIGNATURES = 2.6e6 + 8e6, 27


def total(task, times):
    line, environment = runtimes.command("32", HERE / "counted.py", task, times)
    text = runtimes.run_script(runtimes.callgrind() + line, environment, tail=False)
    return int(re.search(r"Collected : (\d+)", text).group(1))


def count(task, times=1):
    """Return how many instructions the task takes, the first time aside."""
    return (total(task, 1 + times) - total(task, 1)) // times


def seconds(instructions):
    return instructions * CYCLES / HERTZ


def rows():
    """Yield (what, instructions, goal, whether it is met)."""
    keccak = count("keccak", 500)
    yield "Keccak-f", keccak, "130,000 instructions", keccak <= 130000
    yield "SHA-1, a block", count("sha1", 500), "", True
    yield "SHA-512, a block", count("sha512", 500), "", True
    ntor = count("ntor")
    yield "ntor handshake", ntor, "", True
    sent, received = count("sent", 20), count("received", 20)
    for name, n in (("sent", sent), ("received", received)):
        rate = CELL / seconds(n) / 1000
        yield "cell %s, five layers: %.0f KB/s" % (name, rate), n, "40 KB/s", rate >= 40
    service = count("hs_ntor")
    yield "INTRODUCE2 opened and answered", service, "", True
    n = service + 4 * ntor + sent
    yield "introduction to rendezvous", n, "8 s", seconds(n) < 8
    yield "hash ring of %d directories" % DIRECTORIES, 10 * count("ring"), "", True
    parts = (
        ("consensus of %d relays" % RELAYS, 100 * count("consensus")),
        ("their microdescriptors", 100 * count("microdescs")),
        ("%d RSA signatures" % SIGNATURES, SIGNATURES * count("rsa")),
        ("%.1f MB in cells of one layer" % (FETCHED / 1e6),
         int(FETCHED / CELL * count("received from a directory", 20))),
    )
    for name, n in parts:
        yield name, n, "", True
    n = sum([n for _, n in parts])
    yield "bootstrap", n, "300 s", seconds(n) < 300


def main():
    try:
        runtimes.callgrind()
    except runtimes.Missing as e:
        return print("skipped, as nothing can be counted here: %s" % e)
    print(__doc__[__doc__.index("- An ESP32") : __doc__.index("It ends")])
    print("%-36s %15s %10s  %s" % ("", "instructions", "seconds", "goal"))
    missed = False
    for what, n, goal, met in rows():
        missed |= not met
        mark = "" if met else "  MISSED"
        print("%-36s %15s %10.4f  %s%s" % (what, format(n, ","), seconds(n), goal, mark))
    sys.exit(missed)


if __name__ == "__main__":
    main()
