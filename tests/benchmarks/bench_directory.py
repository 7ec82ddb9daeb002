"""Ingest the real consensus, and start from the stored table: time and memory.

    python tests/benchmarks/bench_directory.py [FOLDER]

FOLDER (default: shared/real beside the repository) holds the public network's
microdescriptor consensus of 2024-05-17 17:00 and the authorities' certificates.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PIECE = 498  # what a relay cell carries
GOALS = {"ingest": 0.5, "memory": 45.0, "warm start": 0.03}


def memory():
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ingest(folder, path):
    import minitor

    started = time.perf_counter()
    network = minitor.load_network()
    text = (folder / "2024-05-17-certs").read_bytes().replace(b"\r", b"")
    certs = {}
    minitor.CertParser(certs, network.identities).feed(text)
    table = minitor.RelayTable()
    parser = minitor.ConsensusParser(table.add)
    with open(folder / "2024-05-17-17-00-consensus-microdesc", "rb") as f:
        piece = f.read(PIECE)
        while piece:
            parser.feed(piece)
            piece = f.read(PIECE)
    consensus = parser.finish()
    consensus.verify(certs, network.identities)
    consensus.check_times(consensus.valid_after)
    seconds = time.perf_counter() - started
    assert len(table) == 7195
    table.save(path, network.id, consensus)
    print(seconds, memory())


def fill(path):
    """Give every relay of the stored table a microdescriptor, with families as in 2022."""
    import minitor

    network = minitor.load_network()
    table, consensus = minitor.load_table(path, network.id)
    ids = [table.rsa_id(i) for i in range(len(table))]
    started, size = time.perf_counter(), 0
    for i in next(table.missing()):
        # Two in three belong to a family; the largest has 200 members.
        members = 200 if i % 10 == 0 else 30
        first = i // members * members
        family = b" ".join(b"$" + r.hex().upper().encode() for r in ids[first : first + members])
        text = b"onion-key\nntor-onion-key %s\n" % (b"A" * 42 + b"E")
        text += b"family %s\n" % family if i % 3 else b""
        text += b"p accept %d,80,443\nid ed25519 %s\n" % (i % 500 + 1, b"A" * 42 + b"E")
        size += len(text)
        parser = minitor.MicrodescParser(lambda _, *found, i=i: table.set_microdesc(i, *found))
        parser.feed(text)
        parser.finish()
    seconds = time.perf_counter() - started
    table.save(path, network.id, consensus)
    print(seconds, memory(), size / 1e6)


def warm(path):
    import minitor

    network = minitor.load_network()
    started = time.perf_counter()
    table, consensus = minitor.load_table(path, network.id)
    consensus.check_times(consensus.valid_after)
    seconds = time.perf_counter() - started
    assert len(table) == 7195 and all(flags & minitor.USABLE for flags in table.flags)
    print(seconds, memory())


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "real"
    with tempfile.TemporaryDirectory() as work:
        path = os.path.join(work, "relays")

        def run(*args):
            # Each in a process of its own: memory is measured over a process's life.
            command = [sys.executable, __file__, "--step"] + [str(a) for a in args]
            return [float(x) for x in subprocess.check_output(command).split()]

        best = min(run("ingest", folder, path) for _ in range(3))
        rows = [("ingest", best[0], "s"), ("memory", best[1], "MB")]
        filled = run("fill", path)
        rows.append(("%.1f MB of microdescriptors" % filled[2], filled[0], "s"))
        rows.append(("memory with them", filled[1], "MB"))
        rows.append(("table on disk", os.path.getsize(path) / 1e6, "MB"))
        best = min(run("warm", path) for _ in range(3))
        rows += [("warm start", best[0], "s"), ("memory after it", best[1], "MB")]
    missed = False
    for name, value, unit in rows:
        goal = GOALS.get(name)
        missed |= goal is not None and value > goal
        print("%-32s %8.4g %-3s%s" % (name, value, unit, goal and "  (goal: %g)" % goal or ""))
    sys.exit(missed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        step, args = sys.argv[2], sys.argv[3:]
        {"ingest": lambda: ingest(Path(args[0]), args[1]), "fill": fill, "warm": warm}[step](
            *([] if step == "ingest" else args)
        )
    else:
        main()
