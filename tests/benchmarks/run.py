"""Measures minitor beside C tor, torpy and torquests on one private network of real relays.

    python tests/benchmarks/run.py [--rounds N] [--size MB] [--only SECTION,...] [--json FILE]

Sections: import, exit, onion, start, delay.  Every client fetches the same file in turn, each
round in a new process, over relays that are all alike; figures are medians over the rounds, and
the column "ratio" compares with C tor in this run.  torpy and torquests take part where they can
and where they are installed (python -m pip install '.[bench]'); torpy knows neither onion
services of version 3 nor authenticated SENDMEs, so this network asks for none.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from httptarget import Target, payload, sha256hex  # noqa: E402
from livekit import serve  # noqa: E402
from tornet import TorNet  # noqa: E402

ADAPTERS = Path(__file__).resolve().parent / "adapters.py"
KINDS = ("minitor", "tor", "torpy", "torquests")
MB = 1000 * 1000
GOALS = (  # figure, client, least ratio to C tor's, or most when negative
    ("exit download", "minitor", 0.8),
    ("onion download, minitor hosts", "tor", 0.8),
    ("exit download CPU", "minitor", -3),
    ("start to first onion byte, cold", "minitor", -1),
)


def say(text):
    print("bench: " + text, file=sys.stderr, flush=True)


def cpu(pid):
    """Return the processor time of all threads of `pid`, in seconds."""
    total = 0
    for task in os.listdir("/proc/%d/task" % pid):
        try:
            with open("/proc/%d/task/%s/schedstat" % (pid, task)) as f:
                total += int(f.read().split()[0])
        except OSError:
            pass
    return total / 1e9


def memory(pid):
    """Return the most memory that `pid` ever held, in MB."""
    with open("/proc/%d/status" % pid) as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1000


class Client:
    """One client program, running; `pid` is the process that speaks Tor."""

    def __init__(self, kind, net, data_dir):
        self.kind, self.started, self.tor = kind, time.monotonic(), None
        where = str(data_dir)
        if kind == "tor":
            self.tor = net.client(folder=where, wait=False)
            where = str(self.tor.socks_port)
        self.process = subprocess.Popen(
            [sys.executable, str(ADAPTERS), kind, net.network_file, where],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.pid = self.tor.pid if self.tor else self.process.pid

    def ask(self, command, size=None, digest=None):
        """Return the report on one command; RuntimeError if it failed or the bytes are wrong."""
        before = cpu(self.pid)
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            report = json.loads(self.process.stdout.readline() or '{"error": "it ended"}')
        except OSError as e:
            report = {"error": str(e)}
        if "error" in report:
            raise RuntimeError("%s: %s: %s" % (self.kind, command, report["error"]))
        if size is not None and (report["bytes"], report["sha256"]) != (size, digest):
            raise RuntimeError("%s: %s: wrong bytes" % (self.kind, command))
        report["cpu"] = cpu(self.pid) - before
        return report

    def stop(self):
        self.process.kill()
        self.process.communicate()
        if self.tor:
            self.tor.stop()


class Bench:
    def __init__(self, options):
        self.options, self.size = options, options.size * MB
        self.folder = Path(tempfile.mkdtemp(prefix="minitor-bench-"))
        self.figures = {}  # (figure, unit) → {client: [values]}
        self.kinds = [k for k in KINDS if k in ("minitor", "tor") or importlib.util.find_spec(k)]
        for kind in KINDS:
            if kind not in self.kinds:
                say("%s is not installed (python -m pip install '.[bench]')" % kind)
        self.digest = sha256hex(payload(self.size))
        self.sum_digest = sha256hex(sha256hex(payload(MB, 3) * options.size).encode())
        self.target = Target()

    def note(self, figure, unit, client, value):
        self.figures.setdefault((figure, unit), {}).setdefault(client, []).append(value)

    def attempt(self, what, action, times=3):
        # Others choose relays whose exit policy says no, and give up where a retry helps.
        for left in range(times - 1, -1, -1):
            try:
                return action()
            except RuntimeError as e:
                say("%s: %s%s" % (what, e, "" if left else ": given up"))
        return None

    def transfer(self, figure, kind, net, base, service_pid=None, upload=True):
        """Download and upload once, in a new process; note rates, processor time and memory."""

        def once():
            client = Client(kind, net, self.folder / ("data-" + kind))
            try:
                client.ask("get %s/bytes/1000" % base)
                served = cpu(service_pid) if service_pid else 0
                down = client.ask("get %s/bytes/%d" % (base, self.size), self.size, self.digest)
                served = cpu(service_pid) - served if service_pid else None
                most = memory(client.pid)
                up = upload and client.ask("put %s/sum %d" % (base, self.options.size), 64,
                                           self.sum_digest)
                return down, up, served, most
            finally:
                client.stop()

        done = self.attempt(figure, once)
        if done is None:
            return
        down, up, served, most = done
        mb = self.size / MB
        self.note(figure + " download", "MB/s", kind, mb / down["seconds"])
        self.note(figure + " download CPU", "ms/MB", kind, 1000 * down["cpu"] / mb)
        if up:
            self.note(figure + " upload", "MB/s", kind, mb / up["seconds"])
            self.note(figure + " upload CPU", "ms/MB", kind, 1000 * up["cpu"] / mb)
        if served is not None:
            self.note(figure + " CPU of the host", "ms/MB", kind, 1000 * served / mb)
        self.note(figure + " memory", "MB", kind, most)

    # ── Sections

    def imports(self):
        code = "import sys, time; sys.path.insert(0, %r); t = time.perf_counter(); " \
               "import %%s; print(time.perf_counter() - t)" % str(TESTS.parent)
        module = {"torpy": "torpy.client"}
        for kind in self.kinds:
            if kind == "tor":
                continue
            for _ in range(self.options.rounds + 2):
                out = subprocess.run([sys.executable, "-c", code % module.get(kind, kind)],
                                     stdout=subprocess.PIPE, check=True).stdout
                self.note("import", "ms", kind, 1000 * float(out))

    def exits(self, net):
        base = "http://127.0.0.1:%d" % self.target.port
        for turn in range(self.options.rounds):
            for kind in self.kinds:
                say("exit, round %d, %s" % (turn + 1, kind))
                self.transfer("exit", kind, net, base)

    def onions(self, net):
        hosts = [("C tor", net.onion_service({80: self.target.port}))]
        ours = self.attempt("hosting", lambda: self.host(net))
        if ours:
            hosts.append(("minitor", ours))
        for turn in range(self.options.rounds):
            for name, service in hosts:
                for kind in self.kinds:
                    # Two interpreters on two processors, and the relays: not what is asked here.
                    if kind == "torpy" or kind == "torquests" and name == "minitor":
                        continue
                    say("onion service of %s, round %d, %s" % (name, turn + 1, kind))
                    figure = "onion" if name == "C tor" else "onion, minitor hosts,"
                    self.transfer(figure, kind, net, "http://" + service.address, service.pid)
        hosts[0][1].stop()
        if ours:
            ours.kill()

    def host(self, net):
        try:
            return serve(net, self.folder / "host", self.target.port)
        except AssertionError as e:
            raise RuntimeError(str(e))

    def starts(self, net):
        service = net.onion_service({80: self.target.port})
        urls = [("exit", "http://127.0.0.1:%d/bytes/1000" % self.target.port),
                ("onion", "http://%s/bytes/1000" % service.address)]
        for turn in range(self.options.rounds):
            for kind in self.kinds:
                for name, url in urls:
                    if kind == "torpy" and name == "onion":
                        continue
                    say("start, round %d, %s, %s" % (turn + 1, kind, name))
                    folder = self.folder / ("start-%s-%s-%d" % (kind, name, turn))
                    for state in ("cold", "warm"):
                        took = self.attempt("start", lambda: self.first(kind, net, folder, url, state))
                        if took is not None:
                            self.note("start to first %s byte, %s" % (name, state), "s", kind, took)
        service.stop()

    def first(self, kind, net, folder, url, state):
        if state == "cold":
            shutil.rmtree(folder, ignore_errors=True)
        client = Client(kind, net, folder)
        try:
            started = client.started
            client.ask("get " + url)
            return time.monotonic() - started
        finally:
            client.stop()

    def delayed(self):
        say("starting a network with 200 ms of round trip over three relays")
        with TorNet(params={"sendme_accept_min_version": 0}, delay=0.2 / 6) as net:
            base = "http://127.0.0.1:%d" % self.target.port
            service = net.onion_service({80: self.target.port})
            size, self.size = self.size, 5 * MB
            digest, self.digest = self.digest, sha256hex(payload(5 * MB))
            for turn in range(self.options.rounds):
                for kind in self.kinds:
                    shutil.rmtree(self.folder / ("data-" + kind), ignore_errors=True)
                    say("200 ms, round %d, %s" % (turn + 1, kind))
                    self.transfer("exit, 200 ms", kind, net, base, upload=False)
                    if kind != "torpy":
                        self.transfer("onion, 400 ms", kind, net, "http://" + service.address,
                                      upload=False)
            self.size, self.digest = size, digest

    # ── Report

    def table(self):
        rows = [["", "unit"] + [k for kind in self.kinds for k in (kind, "ratio") if
                                not (kind == "tor" and k == "ratio")]]
        for (figure, unit), found in self.figures.items():
            row, base = [figure, unit], statistics.median(found.get("tor", [0]))
            for kind in self.kinds:
                value = statistics.median(found[kind]) if kind in found else None
                row.append("-" if value is None else "%.3g" % value)
                if kind != "tor":
                    row.append("-" if value is None or not base else "%.2f" % (value / base))
            rows.append(row)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            print("  ".join(text.ljust(w) if i < 2 else text.rjust(w)
                            for i, (text, w) in enumerate(zip(row, widths))))

    def goals(self):
        medians = {f: {k: statistics.median(v) for k, v in found.items()}
                   for (f, _), found in self.figures.items()}
        print()
        for figure, client, bound in GOALS:
            base = medians.get("onion download" if "hosts" in figure else figure, {}).get("tor")
            value = medians.get(figure.replace("hosts", "hosts,") if "hosts" in figure else figure,
                                {}).get(client)
            if "hosts" in figure:
                value = medians.get("onion, minitor hosts, download", {}).get(client)
            if not base or value is None:
                continue
            ratio = value / base
            met = ratio >= bound if bound > 0 else ratio <= -bound
            print("%s: %s, %s %.2f of C tor's (%s %.2g)" % (
                "reached" if met else "MISSED", figure, client, ratio,
                "at least" if bound > 0 else "at most", abs(bound)))
        downloads = medians.get("exit download", {})
        if "torpy" in downloads and "minitor" in downloads:
            met = downloads["minitor"] > downloads["torpy"]
            print("%s: exit download, minitor above torpy" % ("reached" if met else "MISSED"))

    def run(self):
        only = self.options.only.split(",")
        try:
            if "import" in only:
                self.imports()
            if {"exit", "onion", "start"} & set(only):
                say("starting a network")
                with TorNet(params={"sendme_accept_min_version": 0}) as net:
                    for name, section in (("exit", self.exits), ("onion", self.onions),
                                          ("start", self.starts)):
                        if name in only:
                            section(net)
            if "delay" in only:
                self.delayed()
        finally:
            self.target.stop()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.table()
            self.goals()
            if self.options.json:
                Path(self.options.json).write_text(json.dumps(
                    [[f, unit, found] for (f, unit), found in self.figures.items()], indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=20, metavar="MB")
    parser.add_argument("--only", default="import,exit,onion,start,delay", metavar="SECTION,...")
    parser.add_argument("--clients", help="of minitor,tor,torpy,torquests (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write all single values to FILE")
    options = parser.parse_args()
    bench = Bench(options)
    if options.clients:
        bench.kinds = [k for k in bench.kinds if k in options.clients.split(",")]
    bench.run()


if __name__ == "__main__":
    main()
