"""What the live tests use: minitor as a process, curl through a tor, transfers with checksums."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from httptarget import payload, sha256hex

TESTS = Path(__file__).resolve().parent
MINITOR = TESTS.parent / "minitor.py"
WORKER = TESTS / "live" / "worker.py"
MB = 1000 * 1000
BIG = 20 * MB
ADDRESS = re.compile(r"\b([a-z2-7]{56}\.onion)\b")
PORTABLE = {"MINITOR_PORTABLE_AES": "1"}


def wait_for(condition, seconds, what="it"):
    """Return the first true value of `condition()`; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "%s did not happen in %d s" % (what, seconds)
        time.sleep(0.1)


class Program:
    """A program under test: its output so far, its end."""

    def __init__(self, arguments, env=None, cwd=None, interpreter=(sys.executable,)):
        self.arguments = [str(a) for a in arguments]
        self.files = [tempfile.TemporaryFile() for _ in range(2)]
        # Unbuffered, as the tests wait for lines.
        environment = dict(os.environ, **(env or {}))
        environment["PYTHONUNBUFFERED"] = "1"
        self.process = subprocess.Popen(
            list(interpreter) + self.arguments, stdin=subprocess.DEVNULL, stdout=self.files[0],
            stderr=self.files[1], env=environment, cwd=cwd, preexec_fn=_listen_to_interrupts)

    @property
    def pid(self):
        return self.process.pid

    def _text(self, i):
        file = self.files[i]
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")

    @property
    def out(self):
        return self._text(0)

    @property
    def err(self):
        return self._text(1)

    @property
    def running(self):
        return self.process.poll() is None

    def wait_out(self, pattern, seconds):
        """Wait until standard output matches `pattern` and return the match."""

        def found():
            match = re.search(pattern, self.out)
            assert match or self.running, "%s ended: %s" % (self.arguments, self.err[-3000:])
            return match

        try:
            return wait_for(found, seconds, "%r on standard output" % pattern)
        except AssertionError:
            print(self.err[-3000:], file=sys.stderr)
            raise

    def wait(self, seconds):
        """Wait for the end and return the status; a program that does not end is killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("%s ran longer than %d s: %s" % (
                self.arguments, seconds, self.err[-3000:]))

    def interrupt(self, seconds=15):
        """Press Ctrl-C and return the status."""
        if self.running:
            self.process.send_signal(signal.SIGINT)
        return self.wait(seconds)

    def kill(self):
        if self.running:
            self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def _listen_to_interrupts():
    # A test run in the background of a shell inherits that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def minitor(net, data_dir, *arguments, env=None):
    """Start `python minitor.py` in the network `net`."""
    return Program([MINITOR, "--network", net.network_file, "--data-dir", data_dir,
                    *arguments], env)


def serve(net, data_dir, *what, env=None, seconds=90):
    """Start `minitor.py --serve …` and return the Program, with its `.address`, once it is up."""
    program = minitor(net, data_dir, "--serve", *what, env=env)
    try:
        program.address = program.wait_out(ADDRESS, seconds)[1]
    except BaseException:
        program.kill()
        raise
    return program


def get(net, data_dir, url, output, env=None, seconds=90):
    """Run `minitor.py --get URL -o FILE` and return the bytes of FILE."""
    with minitor(net, data_dir, "--get", url, "-o", output, env=env) as program:
        assert program.wait(seconds) == 0, program.err[-3000:]
    return Path(output).read_bytes()


def work(net, data_dir, *arguments, env=None, seconds=180):
    """Run tests/live/worker.py, which uses the API, and return what it reports."""
    environment = dict(env or {}, MINITOR_NETWORK=str(net.network_file))
    with Program([WORKER, data_dir, *arguments], environment) as program:
        assert program.wait(seconds) == 0, program.err[-3000:]
        return json.loads(program.out.splitlines()[-1])


def curl(client, url, *arguments, user=None, seconds=90):
    """Run curl through a C tor client; return its CompletedProcess (stdout is bytes).

    user: streams of different users never share a circuit.
    """
    at = "127.0.0.1:%d" % client.socks_port
    command = ["curl", "-sS", "--fail", "--max-time", str(seconds), "--socks5-hostname", at]
    if user:
        command += ["--proxy-user", "%s:x" % user]
    return subprocess.run(command + list(arguments) + [url], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=seconds + 30)


def curl_ok(client, url, *arguments, **named):
    """As `curl`, and return the body; AssertionError if it fails."""
    done = curl(client, url, *arguments, **named)
    assert done.returncode == 0, "curl %s: %s" % (url, done.stderr.decode())
    return done.stdout


def both_ways(client, base, size, folder, **named):
    """Send `size` bytes through a C tor client and have them back."""
    body = payload(size, 1)
    path = Path(folder) / "upload"
    path.write_bytes(body)
    back = curl_ok(client, base + "/echo", "--data-binary", "@%s" % path, "-H", "Expect:",
                   "-H", "Content-Type: application/octet-stream", **named)
    assert sha256hex(back) == sha256hex(body)


def retry(action, seconds, pause=1.0):
    """Call `action` until it returns (AssertionError: again) for `seconds`; return its value."""
    end = time.monotonic() + seconds
    while True:
        try:
            return action()
        except AssertionError:
            if time.monotonic() > end:
                raise
            time.sleep(pause)


def forget(client):
    """Make a C tor client forget descriptors and circuits."""
    control = client.control()
    try:
        control.command("SIGNAL NEWNYM")
    finally:
        control.close()


def introduction_points(net, client, address, tries=6):
    """Return the relays that a C tor client used as introduction points of `address`."""
    found = set()
    control = client.control()
    try:
        control.command("SETEVENTS CIRC CIRC_MINOR")
        for i in range(tries):
            curl(client, "http://%s/" % address, user="intro%d%d" % (os.getpid(), time.time_ns()))
            while True:
                event = control.event(0.3)
                if event is None:
                    break
                words = event[0].split()
                if "PURPOSE=HS_CLIENT_INTRO" in event[0] and words[2] == "BUILT":
                    last = words[3].split(",")[-1]
                    found.add(last.lstrip("$").partition("~")[0])
    finally:
        control.close()
    return [net.relay(fingerprint) for fingerprint in found]


def busiest(net, action, count=3):
    """Run `action` and return the relays that used most processor time meanwhile, most first."""
    before = {r.nickname: r.cpu_seconds() for r in net.relays}
    action()
    used = [(r.cpu_seconds() - before[r.nickname], r.nickname) for r in net.relays
            if r.role != "authority"]
    return [net.relay(name) for _, name in sorted(used, reverse=True)[:count]]
