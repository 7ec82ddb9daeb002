"""Rounds a second and latency of examples/federation.py: four members, a process each.

    python tests/benchmarks/bench_federation.py [--seconds N] [--only SETTING,...] [--json FILE]

Settings: direct, direct-cut, tor, tor-delay, tor-cut.  Every member has an entry come into the log,
waits until its own log has it, and goes on with the next: latency is the time of that, and a round
mostly has an entry of each.  Tor is the private network (tests/tornet.py), all on this machine.
delay: 100 ms more for each round trip between two members, by netem in a network namespace of its
own where the kernel has that (a fourteenth on each of seven links, each way), else in
the members' transports; it says which.  cut: one member is cut off for a third of the time; told
are the other three, and how long it takes the one to have all they had when it was let back.
Whether all logs are the same is checked.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent / "examples"), str(TESTS.parent), str(TESTS)]

import federation  # noqa: E402
import minitor  # noqa: E402
from tornet import TorNet, TorNetError  # noqa: E402

SETTINGS = ("direct", "direct-cut", "tor", "tor-delay", "tor-cut")
DELAY = 0.1
# Of this run alone: others may be measuring, too.
SPACE = "minitor-bench-%d" % os.getpid()


def say(text):
    print("bench: " + text, file=sys.stderr, flush=True)


# A member


class Late:
    """A stream whose bytes leave after `seconds`."""

    def __init__(self, stream, seconds):
        self.stream, self.seconds, self.waiting, self.size = stream, seconds, deque(), 0
        self.read, self.private, self.changed = stream.read, stream.private, asyncio.Event()
        self.task = asyncio.ensure_future(self.carry())

    async def write(self, data):
        if self.task.done():
            raise OSError("the connection is cut")
        self.waiting.append((time.monotonic() + self.seconds, bytes(data)))
        self.size += len(data)
        self.changed.set()
        while self.size > 1 << 20:
            await asyncio.sleep(0.01)

    async def carry(self):
        while True:
            while not self.waiting:
                self.changed.clear()
                await self.changed.wait()
            due, data = self.waiting.popleft()
            await asyncio.sleep(max(0, due - time.monotonic()))
            await self.stream.write(data)
            self.size -= len(data)

    def close(self):
        self.task.cancel()
        self.stream.close()


class Way:
    """A transport that takes `seconds` longer, each way, and can be cut off."""

    def __init__(self, transport, seconds):
        self.transport, self.seconds, self.shut, self.streams = transport, seconds, False, []

    address = property(lambda self: self.transport.address)

    def led(self, stream):
        stream = Late(stream, self.seconds) if self.seconds else stream
        self.streams.append(stream)
        return stream

    async def dial(self, address, seconds=120):
        if self.shut:
            raise minitor.NetworkError("cut off")
        return self.led(await self.transport.dial(address, seconds))

    async def listen(self, accept):
        async def admit(stream):
            if not self.shut:
                await accept(self.led(stream))

        await self.transport.listen(admit)

    async def close(self):
        await self.transport.close()

    def set(self, shut):
        self.shut = shut
        for stream in self.streams:
            stream.close()
        self.streams = []


class Worker:
    """Takes part for a while; `report` has all that was seen."""

    def __init__(self, seed, members, seconds, delay, cut):
        self.seed, self.seconds, self.delay, self.cut = bytes.fromhex(seed), seconds, delay, cut
        self.members = {bytes.fromhex(key): address for key, address in members.items()}
        self.report = {"latency": [], "rounds": [], "digests": {}, "trips": []}
        self.mine, self.done = None, asyncio.Event()

    def result(self, number, batches, digest):
        now = time.time()
        self.report["digests"][number] = digest.hex()[:16]
        self.report["rounds"].append(now)
        for _, line in federation.entries(batches or ()):
            if line == self.mine:
                self.done.set()

    async def run(self, transport):
        loop = asyncio.get_running_loop()
        way = Way(transport, self.delay)
        node = minitor.Node(self.seed, way)
        node.pauses = 0.25, 2
        async with federation.Federation(node, self.members, self.result) as self.it:
            while len(self.it.links) < 3:
                await asyncio.sleep(0.01)
            for link in self.it.links.values():
                await link.ready(170)
            print("ready", flush=True)
            await loop.run_in_executor(None, sys.stdin.readline)
            start = time.time()
            adding = asyncio.ensure_future(self.add(start + self.seconds))
            if self.cut:
                await self.away(way)
            await adding
            print("over", flush=True)
            await loop.run_in_executor(None, sys.stdin.readline)
            self.report["trips"] = [link.round_trip for link in self.it.links.values()]
        print(json.dumps(self.report), flush=True)

    async def add(self, end):
        number = 0
        while time.time() < end:
            number += 1
            self.mine, started = "%s %d" % (self.seed.hex()[:2], number), time.time()
            self.done.clear()
            await self.it.propose(self.mine)
            await asyncio.wait_for(self.done.wait(), 120)
            self.report["latency"].append((started, time.time() - started))

    async def away(self, way):
        await asyncio.sleep(self.seconds / 3)
        way.set(True)
        self.report["cut"] = time.time()
        await asyncio.sleep(self.seconds / 3)
        way.set(False)
        self.report["back"] = time.time()


async def work(options):
    worker = Worker(options["seed"], options["members"], options["seconds"], options["delay"],
                    options["cut"])
    if not options["network"]:
        where = worker.members[minitor.load_identity(worker.seed)[1]]
        return await worker.run(minitor.DirectTransport(where))
    async with minitor.AsyncTor(options["folder"], options["network"]) as tor:
        await worker.run(minitor.TorTransport(tor, worker.seed))


# All of them


def keys():
    seeds = [bytes([i + 1]) * 32 for i in range(4)]
    return {seed: minitor.load_identity(seed)[1] for seed in seeds}


def measure(setting, seconds, net, delay, folder):
    """Run four members; return their reports."""
    members = {}
    for i, key in enumerate(keys().values()):
        here = "127.0.0.1:%d" % (17811 + i)
        members[key.hex()] = minitor.onion_address(key) if net else here
    workers = []
    try:
        for i, seed in enumerate(keys()):
            options = {"seed": seed.hex(), "members": members, "seconds": seconds, "delay": delay,
                       "cut": setting.endswith("-cut") and i == 3,
                       "network": net and net.network_file, "folder": "%s/%d" % (folder, i)}
            workers.append(subprocess.Popen(
                [sys.executable, __file__, "--member", json.dumps(options)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for word in ("ready", "over"):
            for worker in workers:
                line = worker.stdout.readline()
                if line != word + "\n":
                    raise RuntimeError("%s: a member failed: %r" % (setting, line))
            for worker in workers:
                worker.stdin.write("go\n")
                worker.stdin.flush()
        return [json.loads(worker.stdout.readline()) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def figures(name, reports, start, end):
    """Return a row: what members saw between two times."""
    whole = [(began, t) for r in reports for began, t in r["latency"]]
    took = sorted(t for began, t in whole if start <= began < end)
    if not took:
        raise RuntimeError("%s: no entry got into the log: more --seconds are needed" % name)
    rounds = [sum(start <= t < end for t in r["rounds"]) for r in reports]
    trips = [t for r in reports for t in r["trips"] if t]
    return {"setting": name, "rounds": statistics.median(rounds) / (end - start),
            "entries": len(took) / (end - start), "median": statistics.median(took),
            "95": took[len(took) * 95 // 100], "trip": statistics.median(trips)}


def judge(setting, reports):
    """Return the rows of a setting; RuntimeError if there is a fork."""
    seen = {}
    for report in reports:
        for number, digest in report["digests"].items():
            if seen.setdefault(number, digest) != digest:
                raise RuntimeError("%s: a fork at round %s" % (setting, number))
    start = max(r["latency"][0][0] for r in reports)
    end = min(r["latency"][-1][0] for r in reports[:3])
    if not setting.endswith("-cut"):
        return [figures(setting, reports, start, end)]
    one, others = reports[3], reports[:3]
    cut, back = one["cut"], one["back"]
    had = max(sum(t < back for t in r["rounds"]) for r in others)
    rows = [figures(setting + ", before", reports, start, cut),
            figures(setting + ", while cut", others, cut, back),
            figures(setting + ", after", others, back, end)]
    rows[2]["caught up, s"] = sorted(one["rounds"])[had - 1] - back
    rows[2]["rounds missed"] = had - sum(t < back for t in one["rounds"])
    return rows


def netem():
    """Make a network namespace in which all that goes to or from a relay is late; why not."""
    enter = ["ip", "netns", "exec", SPACE]
    tc = enter + ["tc"]
    # Three relays, another three, and the rendezvous point.
    late = "%dus" % (DELAY / 14 * 1e6)
    commands = [
        ["ip", "netns", "add", SPACE], enter + ["ip", "link", "set", "lo", "up"],
        tc + "qdisc add dev lo root handle 1: prio bands 4 priomap".split() + ["0"] * 16,
        tc + "qdisc add dev lo parent 1:4 handle 40: netem delay".split() + [late]]
    for way in ("src", "dst"):
        # Relays, too, dial from there: tor binds to no address where it is for loopback.
        rule = "filter add dev lo parent 1: protocol ip u32 match ip %s 127.0.0.1/32 flowid 1:4"
        commands.append(tc + (rule % way).split())
    if not (shutil.which("ip") and shutil.which("tc")):
        return "ip and tc are not installed (Debian: apt-get install iproute2)"
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            return "%s: %s" % (" ".join(command), done.stdout.decode().strip())
    return None


def in_namespace(seconds):
    """Return the reports of tor-delay there, or None and why it cannot be."""
    try:
        why = netem()
        if why:
            return None, why
        with tempfile.NamedTemporaryFile("r") as file:
            subprocess.run(["ip", "netns", "exec", SPACE, sys.executable, __file__, "--inside",
                            "--only", "tor-delay", "--seconds", str(seconds), "--json", file.name],
                           check=True, stdout=subprocess.DEVNULL)
            return json.load(file)["reports"]["tor-delay"], None
    finally:
        if shutil.which("ip"):
            subprocess.run(["ip", "netns", "del", SPACE], stderr=subprocess.DEVNULL)


def table(rows):
    print("| setting | rounds/s | entries/s | latency, median | 95 % | link's round trip |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print("| %s | %.1f | %.1f | %.0f ms | %.0f ms | %.0f ms |" % (
            row["setting"], row["rounds"], row["entries"], 1000 * row["median"], 1000 * row["95"],
            1000 * row["trip"]))
    for row in rows:
        if "caught up, s" in row:
            print("\n%s: the member that was away had missed %d rounds, and had them after %.1f s."
                  % (row["setting"], row["rounds missed"], row["caught up, s"]))


def run(options):
    reports, rows, net = {}, [], None
    only = options.only.split(",")
    with tempfile.TemporaryDirectory(prefix="minitor-bench-") as folder:
        try:
            for setting in [s for s in SETTINGS if s in only]:
                say(setting)
                delay, name = 0, setting
                if setting == "tor-delay" and not options.inside:
                    reports[setting], why = in_namespace(options.seconds)
                    name += ", by %s" % ("the transport" if why else "netem")
                    if why:
                        say("the transport delays, as netem cannot: " + why)
                        delay = DELAY / 2
                if not reports.get(setting):
                    if setting.startswith("tor") and not net:
                        net = TorNet(progress=say)
                    reports[setting] = measure(setting, options.seconds, net, delay, folder)
                for row in judge(setting, reports[setting]):
                    row["setting"] = row["setting"].replace(setting, name)
                    rows.append(row)
        finally:
            if net:
                net.stop()
            if options.json:
                Path(options.json).write_text(json.dumps({"rows": rows, "reports": reports}))
    table(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30, help="for each setting (30)")
    parser.add_argument("--only", default=",".join(SETTINGS), metavar="SETTING,...")
    parser.add_argument("--json", metavar="FILE", help="write all single values to FILE")
    parser.add_argument("--member", help=argparse.SUPPRESS)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.member:
            return asyncio.run(work(json.loads(options.member)))
        run(options)
    except (RuntimeError, TorNetError, minitor.TorError, subprocess.CalledProcessError) as e:
        sys.exit("bench: %s" % e)


if __name__ == "__main__":
    main()
