"""A private Tor network of real relays on this machine, without internet.

    python tests/tornet.py -- COMMAND...    run COMMAND with MINITOR_NETWORK naming the network file
    python tests/tornet.py                  keep the network up until Ctrl-C; prints the file's path

From Python:

    with TorNet() as net:
        net.network_file                    # torrc lines: for minitor --network, or tor's %include
        net.client().socks_port             # a C tor client
        net.onion_service({80: 8080}).address
        net.bridge(obfs4="/usr/bin/obfs4proxy").line

Three authorities and nine relays start in about half a minute: two name each other in MyFamily,
two share a FamilyId, one is no HSDir, one is no exit, one exits to ports 80 and 443 only, the
others are plain.  Each has an address 127.N.0.1 of its own, from a range that no other network on
this machine uses.  Authorities publish the same bandwidth for every relay, so that none is
preferred, and none for themselves, so that clients use them as directories only.  Exits resolve
names under .test to 127.0.0.1, and no others.  Every tor
process watches this one and ends with it (__OwningControllerProcess), even when it is killed.
"""

import argparse
import atexit
import base64
import collections
import concurrent.futures
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

AUTHORITIES = 3
RELAYS = 9
# By place; those after them are plain.
ROLES = ("family", "family", "familyid", "familyid", "nohsdir", "noexit", "web")
OR_PORT, DIR_PORT = 9001, 9030
HIDDEN_PORT = 9101  # where a relay listens that is reached with a delay
SEATS = 16  # nodes in one range of addresses
START_SECONDS = 180
HUM_SECONDS = 4


class TorNetError(Exception):
    """The network could not be started, or a tor process did not do what it should."""


def require_tor():
    """Return the paths of tor and tor-gencert; TorNetError, saying what to do, without them."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/usr/local/bin"
    found = [shutil.which(name, path=path) for name in ("tor", "tor-gencert")]
    if None in found:
        raise TorNetError(
            "tor and tor-gencert are needed (Debian: apt-get install tor; 0.4.9 is in the security"
            " archive), or let tests/setup.sh install what the tests need"
        )
    return found


def _wait(condition, seconds, what, process=None, step=0.05):
    """Return the first true value of `condition()`; TorNetError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if process is not None and process.poll() is not None:
            raise TorNetError("%s: tor ended with status %s" % (what, process.returncode))
        if time.monotonic() > end:
            raise TorNetError("%s: nothing after %d s" % (what, seconds))
        time.sleep(step)


def _write(path, text):
    with open(path, "w") as f:
        f.write(text)


def _read(path):
    try:
        with open(path, errors="replace") as f:
            return f.read()
    except OSError:
        return ""


class Process:
    """A tor process with its folder: `dir`, `pid`, `running`, `log()`, `stop()`."""

    def __init__(self, tor, folder, torrc):
        self.tor, self.dir = tor, folder
        os.makedirs(folder, 0o700, exist_ok=True)
        self.torrc = os.path.join(folder, "torrc")
        self.log_file = os.path.join(folder, "log")
        common = "DataDirectory %s\nLog notice file %s\n__OwningControllerProcess %d\n" % (
            folder, self.log_file, os.getpid())
        common += "ControlSocket %s\nCookieAuthentication 0\n" % os.path.join(folder, "control")
        common += "ShutdownWaitLength 0\nDisableDebuggerAttachment 0\n"
        _write(self.torrc, common + torrc)
        self.process = None

    def start(self):
        """Start it, if it is not running."""
        if not self.running:
            with open(os.path.join(self.dir, "stdout"), "ab") as out:
                self.process = subprocess.Popen(
                    [self.tor, "-f", self.torrc, "--defaults-torrc", self.dir + "/none",
                     "--ignore-missing-torrc", "--quiet"],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.dir,
                    # Ctrl-C is for the program that holds the network; that one ends the relays.
                    preexec_fn=os.setpgrp)
        return self

    @property
    def running(self):
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self):
        return self.process.pid if self.process else None

    def log(self):
        return _read(self.log_file)

    def stop(self):
        """End it at once and wait until it is gone; its folder stays."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()

    def control(self):
        """Open a control connection (a Control)."""
        path = os.path.join(self.dir, "control")

        def connect():
            try:
                return Control(path)
            except (FileNotFoundError, ConnectionRefusedError):
                return None  # not there, or bound and not yet listening

        return _wait(connect, 20, "control socket of " + self.dir, self.process)

    def bootstrapped(self):
        return "Bootstrapped 100%" in self.log()

    def cpu_seconds(self):
        """Return the processor time used so far, in seconds (0 when it is not running)."""
        return cpu_seconds(self.pid) if self.running else 0.0


def cpu_seconds(pid):
    """Return the processor time (user and system) of process `pid`, in seconds."""
    try:
        with open("/proc/%d/stat" % pid) as f:
            fields = f.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Control:
    """A connection to tor's control socket."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        try:
            self.socket.connect(path)
        except OSError:
            self.socket.close()
            raise
        self.file = self.socket.makefile("rb")
        self.events = collections.deque()
        self.command("AUTHENTICATE")

    def close(self):
        self.file.close()
        self.socket.close()

    def _reply(self):
        lines = []
        while True:
            line = self.file.readline().decode(errors="replace").rstrip("\r\n")
            if not line:
                raise TorNetError("the control connection was closed")
            lines.append(line[4:])
            if line[3] == "+":
                while True:
                    data = self.file.readline().decode(errors="replace").rstrip("\r\n")
                    if data == ".":
                        break
                    lines.append(data)
            elif line[3] == " ":
                return line[:3], lines

    def command(self, text):
        """Send one command and return its reply's lines; TorNetError if tor refuses it."""
        self.socket.sendall(text.encode() + b"\r\n")
        while True:
            code, lines = self._reply()
            if code != "650":
                if code[0] != "2":
                    raise TorNetError("%s: %s %s" % (text, code, lines[0]))
                return lines
            self.events.append(lines)

    def event(self, seconds):
        """Return the lines of the next event (after SETEVENTS), or None after `seconds`."""
        if not self.events:
            self.socket.settimeout(max(seconds, 0.01))
            try:
                self.events.append(self._reply()[1])
            except socket.timeout:
                # A buffered file that timed out once is of no use any more.
                self.file = self.socket.makefile("rb")
                return None
            finally:
                self.socket.settimeout(30)
        return self.events.popleft()


class Relay(Process):
    """A relay or authority: `nickname`, `fingerprint`, `address`, `or_port`, `role`, `pid`."""


class Client(Process):
    """A C tor client: `socks_port`."""


class Service(Process):
    """A C tor that hosts an onion service: `address`, `hidden_service_dir`."""


class NameServer:
    """A DNS server: every name under .test is 127.0.0.1, and 192.0.2.7 is seven.test."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                query, peer = self.socket.recvfrom(2048)
                if len(query) > 16:
                    self.socket.sendto(self._answer(query), peer)
            except OSError:
                return

    def _answer(self, query):
        end = query.index(b"\0", 12) + 5
        name, kind = query[12:end - 4].lower(), int.from_bytes(query[end - 4:end - 2], "big")
        known = name.endswith(b"\4test\0") or name.startswith(b"\x017\x012\x010\x03192")
        data = socket.inet_aton("127.0.0.1") if known and kind == 1 else b""
        if known and kind == 12:
            data = b"\5seven\4test\0"
        # A response, recursion available, of the first question alone; 3 is "no such name".
        head = query[:2] + bytes([0x81, 0x80 if known else 0x83, 0, 1, 0, bool(data), 0, 0, 0, 0])
        record = b"\xc0\x0c\0%c\0\1\0\0\0\x3c\0%c" % (kind, len(data)) + data
        record = record if data else b""
        return head + query[12:end] + record

    def stop(self):
        # Closing alone does not wake a thread that waits in recvfrom.
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.socket.close()


class TorNet:
    """A running private network; use it as a context manager, or `stop()` it.

    relays: number of relays beside the three authorities.  interval: voting interval in seconds
    (10 or more; time periods and shared random values run for 24 of them).  params: consensus
    parameters, a dictionary.  relay_torrc: more torrc lines for every relay.  delay: seconds that
    what is sent to a relay, or by it in answer, takes longer.  progress: a function that gets lines
    of text.
    """

    def __init__(self, relays=RELAYS, interval=20, params=None, relay_torrc="", delay=0,
                 progress=None):
        self.tor, self.gencert = require_tor()
        self.interval, self.relay_torrc, self.delay = interval, relay_torrc, delay
        self.params = {"sendme_accept_min_version": 1}
        if interval * 24 >= 5 * 60:
            # The least that every implementation accepts is five minutes.
            self.params["hsdir_interval"] = interval * 24 // 60
        self.params.update(params or {})
        self.progress = progress or (lambda text: None)
        self.relays, self.others = [], []
        self.stopped, self.count, self.bridges, self.delayer = False, 0, 0, None
        self.lock, self.base = self._take_range()
        self.dir = tempfile.mkdtemp(prefix="tornet-")
        self.names = NameServer()
        atexit.register(self.stop)
        started = time.monotonic()
        try:
            self._make(relays)
            self.delayer = self._start_delay() if delay else None
            # A relay whose descriptor no authority took yet tries again only after a minute.
            for node in self.relays[:AUTHORITIES]:
                self._start_relay(node)
            for node in self.relays[AUTHORITIES:]:
                node.start()
            self._wait_usable(relays)
            self.hummer = self.client()
        except BaseException:
            self.stop()
            raise
        threading.Thread(target=self._hum, daemon=True).start()
        self.progress("the network is usable after %.0f s" % (time.monotonic() - started))

    def _build(self, client, paths, pause=0):
        # Have `client` build circuits, and drop them.
        control, ours, states = client.control(), set(), {}
        for path in paths:
            time.sleep(pause)
            try:
                ours.add(control.command("EXTENDCIRCUIT 0 " + path)[0].split()[1])
            except TorNetError:
                # A relay that was killed.
                pass
        for _ in range(50):
            known = [line.split() for line in control.command("GETINFO circuit-status")]
            states = {words[0]: words[1] for words in known if words[0] in ours}
            if set(states.values()) <= {"BUILT"}:
                break
            time.sleep(0.1)
        for circuit in states:
            try:
                control.command("CLOSECIRCUIT " + circuit)
            except TorNetError:
                # It has ended already.
                pass
        control.close()

    def _pairs(self):
        return [",".join(pair) for pair in
                itertools.permutations([r.fingerprint for r in self.relays], 2)]

    def _hum(self):
        pairs = self._pairs()
        while not self.stopped:
            try:
                self._build(self.hummer, pairs, HUM_SECONDS / len(pairs))
            except (OSError, TorNetError):
                # The network is being stopped.
                return

    def settle(self, *clients):
        """Return when relays and `clients` have heard of circuits that ended, as on a busy network.

        tor (0.4.9.11) leaves a DESTROY in its queue when the one before has not left the buffer
        (circuitmux_append_destroy_cell), until another cell goes the same way.  Without traffic
        introduction points acknowledge for a service that has gone, and clients wait for minutes.
        So this sends cells over every link, once for each hop of a circuit; in the background
        they hum along at a slower pace.  Two relays have two links here, one from either end: tor
        does not bind what it connects to on loopback, so from 127.0.0.1 comes nobody it knows.
        """
        for _ in range(4):
            self._build(self.hummer, self._pairs())
        for client in clients:
            self._build(client, [""] * 4)

    def _take_range(self):
        # An abstract socket is a lock that ends with its process, whoever that belonged to.
        for base in range(SEATS, 256 - SEATS, SEATS):
            lock = socket.socket(socket.AF_UNIX)
            try:
                lock.bind("\0minitor-tornet-%d" % base)
                return lock, base
            except OSError:
                lock.close()
        raise TorNetError("all address ranges are taken by other networks")

    def address(self, place):
        return "127.%d.0.1" % (self.base + place)

    # ── Keys and configuration

    def _make(self, count):
        if AUTHORITIES + count > SEATS:
            raise TorNetError("at most %d relays" % (SEATS - AUTHORITIES))
        self.network_file = os.path.join(self.dir, "network")
        self.empty = os.path.join(self.dir, "empty")
        _write(self.empty, "")
        _write(self.dir + "/resolv.conf", "nameserver 127.0.0.1:%d\n" % self.names.port)
        names = [("auth%d" % i, "authority") for i in range(AUTHORITIES)]
        for i in range(count):
            role = ROLES[i] if i < len(ROLES) else "plain"
            names.append(("relay%d%s" % (i, "" if role == "plain" else role), role))
        self.progress("making the keys of %d relays" % len(names))
        for place, (nickname, role) in enumerate(names):
            node = Relay(self.tor, os.path.join(self.dir, nickname), "")
            node.nickname, node.role, node.address = nickname, role, self.address(place)
            node.or_port, node.dir_port = OR_PORT, DIR_PORT if role == "authority" else 0
            self.relays.append(node)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 2) as pool:
            list(pool.map(self._make_keys, self.relays))
        family = self._family_id()
        _write(self.network_file, self._network_text())
        _write(os.path.join(self.dir, "bandwidths"), "%d\n" % time.time() + "".join(
            "node_id=$%s bw=10000 nick=%s\n" % (r.fingerprint, r.nickname) for r in self.relays))
        for node in self.relays:
            with open(node.torrc, "a") as f:
                f.write(self._relay_text(node, family))

    def _make_keys(self, node):
        keys = os.path.join(node.dir, "keys")
        os.makedirs(keys, 0o700, exist_ok=True)
        if node.role == "authority":
            file = os.path.join(keys, "authority_")
            self._run([self.gencert, "--create-identity-key", "--passphrase-fd", "0", "-m", "12",
                       "-i", file + "identity_key", "-s", file + "signing_key",
                       "-c", file + "certificate"], b"minitor\n")
            node.v3ident = re.search(r"^fingerprint (\w+)", _read(file + "certificate"), re.M)[1]
        text = self._run([self.tor, "--list-fingerprint", "--DataDirectory", node.dir, "-f",
                          self.empty, "--defaults-torrc", self.empty, "--Nickname", node.nickname,
                          "--ORPort", "9001", "--ExitRelay", "0", "--Log", "err stderr"])
        node.fingerprint = text.strip().rpartition("%s " % node.nickname)[2].replace(" ", "")
        node.ed25519 = _read(os.path.join(node.dir, "fingerprint-ed25519")).split()[-1]

    def _family_id(self):
        base = os.path.join(self.dir, "family")
        self._run([self.tor, "--keygen-family", base, "-f", self.empty, "--defaults-torrc",
                   self.empty, "--Log", "err stderr"])
        for node in self.relays:
            if node.role == "familyid":
                shutil.copy(base + ".secret_family_key", os.path.join(node.dir, "keys"))
        return _read(base + ".public_family_id").strip()

    def _run(self, arguments, data=b""):
        done = subprocess.run(arguments, input=data, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        if done.returncode:
            raise TorNetError("%s: %s" % (" ".join(arguments), done.stdout.decode()))
        return done.stdout.decode()

    def _network_text(self):
        lines = ["TestingTorNetwork 1"]
        for node in self.relays[:AUTHORITIES]:
            lines.append("DirAuthority %s orport=%d no-v2 v3ident=%s %s:%d %s" % (
                node.nickname, node.or_port, node.v3ident, node.address, node.dir_port,
                node.fingerprint))
        return "\n".join(lines) + "\n"

    def _common_text(self):
        # Everybody: without the first line two relays of one /16 could meet in a path.
        return "%%include %s\nEnforceDistinctSubnets 1\nAssumeReachable 1\n" \
            "ExtendAllowPrivateAddresses 1\nServerDNSDetectHijacking 0\nServerDNSTestAddresses\n" \
            "ClientRejectInternalAddresses 0\nClientDNSRejectInternalAddresses 0\n" \
            "SafeLogging 0\nLogTimeGranularity 1\n" \
            "GeoIPFile %s\nGeoIPv6File %s\n" % (self.network_file, self.empty, self.empty)

    def _relay_text(self, node, family):
        text = self._common_text() + (
            "Nickname {0.nickname}\nAddress {0.address}\n"
            "SocksPort 0\nAddressDisableIPv6 1\nExitPolicyRejectPrivate 0\nDirCache 1\n"
            "ServerDNSResolvConfFile {1}/resolv.conf\n"
            "OutboundBindAddress {0.address}\nContactInfo none\n".format(node, self.dir))
        if self.delay:
            text += "ORPort %s:%d NoListen\n" % (node.address, node.or_port)
            text += "ORPort %s:%d NoAdvertise\n" % (node.address, HIDDEN_PORT)
        else:
            text += "ORPort %s:%d\n" % (node.address, node.or_port)
        if node.role in ("authority", "noexit"):
            text += "ExitRelay 0\nExitPolicy reject *:*\n"
        else:
            # OutboundBindAddress keeps them from reaching anything but this machine.
            ports = ("80", "443") if node.role == "web" else ("*",)
            text += "ExitRelay 1\nIPv6Exit 0\n"
            text += "".join("ExitPolicy accept *:%s\n" % port for port in ports)
            text += "ExitPolicy reject *:*\n"
        if node.role == "family":
            text += "MyFamily %s\n" % ",".join(
                "$" + r.fingerprint for r in self.relays if r.role == "family")
        if node.role == "familyid":
            text += "FamilyId %s\n" % family
        if node.role == "authority":
            text += self._authority_text(node)
        return text + self.relay_torrc

    def _authority_text(self, node):
        delay = 2 if self.interval < 20 else 4
        votes = [r.fingerprint for r in self.relays if r.role != "nohsdir"]
        exits = [r.fingerprint for r in self.relays if r.role not in ("authority", "noexit")]
        params = " ".join("%s=%d" % item for item in sorted(self.params.items()))
        return (
            "AuthoritativeDirectory 1\nV3AuthoritativeDirectory 1\n"
            "DirPort {a}:{p}\nConsensusParams {params}\nV3BandwidthsFile {d}/bandwidths\n"
            "TestingV3AuthInitialVotingInterval 10\nTestingV3AuthInitialVoteDelay 2\n"
            "TestingV3AuthInitialDistDelay 2\nV3AuthVotingInterval {i}\nV3AuthVoteDelay {v}\n"
            "V3AuthDistDelay {v}\nV3AuthNIntervalsValid 10\nTestingMinExitFlagThreshold 0\n"
            "TestingDirAuthVoteGuard *\nTestingDirAuthVoteExit {e}\nTestingDirAuthVoteExitIsStrict 1"
            "\nTestingDirAuthVoteHSDir {h}\nTestingDirAuthVoteHSDirIsStrict 1\n"
            "AuthDirMaxServersPerAddr 0\nMinUptimeHidServDirectoryV2 0\n"
        ).format(a=node.address, p=node.dir_port, params=params, d=self.dir, i=self.interval,
                 v=delay, e=",".join(exits), h=",".join(votes))

    # ── Life

    def _start_delay(self):
        pairs = ["{0}:{1}={0}:{2}".format(r.address, r.or_port, HIDDEN_PORT) for r in self.relays]
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "benchmarks", "delay.py")
        delayer = subprocess.Popen([sys.executable, script, str(self.delay)] + pairs,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   preexec_fn=os.setpgrp)
        if delayer.stdout.readline() != b"ready\n":
            raise TorNetError("delay.py did not start")
        return delayer

    def _wait_usable(self, count):
        everybody = AUTHORITIES + count
        self.progress("waiting for the first votes")

        def dead():
            for node in self.relays:
                if not node.running:
                    raise TorNetError("%s ended: %s%s" % (
                        node.nickname, node.log()[-2000:], _read(os.path.join(node.dir, "stdout"))))

        def knows(node):
            # Whoever is asked has a consensus with everybody in it, and all microdescriptors.
            text = self.consensus(node)
            if len(re.findall("^r ", text, re.M)) < everybody or "\ns Exit" not in text:
                return False
            cache = [_read(os.path.join(node.dir, "cached-microdescs" + s)) for s in ("", ".new")]
            return len(set(re.findall(r"^id ed25519 (\S+)", "".join(cache), re.M))) >= everybody

        def all_know(nodes):
            dead()
            return all(knows(node) for node in nodes)

        def missing(node):
            # A base64 identity in the consensus has no padding.
            digest = base64.b64encode(bytes.fromhex(node.fingerprint)).decode().rstrip("=")
            return any(self.consensus(a) and " %s " % digest not in self.consensus(a)
                       for a in self.relays[:AUTHORITIES])

        what, started, end = "a consensus with %d relays" % everybody, {}, time.monotonic()
        end += START_SECONDS
        while not all_know(self.relays):
            if time.monotonic() > end:
                raise TorNetError("%s: not after %d s: %s" % (what, START_SECONDS, "; ".join(
                    "%s %s" % (n.nickname, "is missing" if missing(n) else "knows less")
                    for n in self.relays if missing(n) or not knows(n))))
            # Who asked or published in vain does it again after longer and longer pauses, but at
            # once when it is new.
            if all_know(self.relays[:AUTHORITIES]):
                again, pause = [n for n in self.relays if not knows(n)], 1
            else:
                again, pause = [n for n in self.relays[AUTHORITIES:] if missing(n)], 12
            for node in again:
                if time.monotonic() > started.setdefault(node, time.monotonic() + pause):
                    node.stop()
                    node.start()
                    started[node] = time.monotonic() + 15
            time.sleep(0.2)

    def consensus(self, node=None):
        """Return the text of the microdescriptor consensus that `node` (an authority) holds."""
        node = node or next(n for n in self.relays if n.running)
        return _read(os.path.join(node.dir, "cached-microdesc-consensus"))

    def relay(self, name):
        """Return the relay with this nickname, fingerprint or base64 Ed25519 identity."""
        for node in self.relays:
            if name in (node.nickname, node.fingerprint, node.ed25519):
                return node
        raise KeyError(name)

    def kill(self, relay):
        """Kill a relay (an item of `relays`, or its name) as a crash would."""
        relay = relay if isinstance(relay, Relay) else self.relay(relay)
        relay.stop()
        return relay

    def restart(self, relay):
        """Start a relay that was killed, with its keys and address, and wait until it listens."""
        relay = relay if isinstance(relay, Relay) else self.relay(relay)
        self._start_relay(relay)
        return relay

    def _start_relay(self, relay):
        port = HIDDEN_PORT if self.delay else relay.or_port

        def listens():
            with socket.socket() as s:
                return s.connect_ex((relay.address, port)) == 0

        relay.start()
        _wait(listens, 30, relay.nickname, relay.process)

    def _folder(self, kind):
        self.count += 1
        return os.path.join(self.dir, "%s%d" % (kind, self.count))

    def client(self, torrc="", folder=None, wait=True, seconds=60):
        """Start a C tor client with more lines of `torrc`; return it with `.socks_port`.

        folder: its data directory; one that is given again makes a warm start.
        """
        # It would wait for a minute and more until it has learned from a hundred circuits.
        text = self._common_text() + "LearnCircuitBuildTimeout 0\nCircuitBuildTimeout 5\n"
        client = Client(self.tor, folder or self._folder("client"), text
                        + "SocksPort 127.0.0.1:auto\nClientOnly 1\n" + torrc + "\n")
        if os.path.exists(client.log_file):
            os.unlink(client.log_file)
        self.others.append(client.start())
        opened = r"Opened Socks listener connection \(ready\) on 127\.0\.0\.1:(\d+)"
        client.socks_port = int(_wait(lambda: re.search(opened, client.log()), 20,
                                      "a client's SOCKS port", client.process)[1])
        if wait:
            _wait(client.bootstrapped, seconds, "a client's bootstrap", client.process)
        return client

    def onion_service(self, ports, hidden_service_dir=None, torrc="", wait=True, seconds=90):
        """Start a C tor that hosts a v3 service; return it with `.address` ("….onion").

        ports: {virtual port: target}, the target a local port or "host:port".
        hidden_service_dir: where its keys are or shall be.  With `wait`, its descriptors (two
        periods) have been uploaded.
        """
        folder = self._folder("service")
        keys = hidden_service_dir or os.path.join(folder, "hs")
        text = self._common_text() + "SocksPort 0\nHiddenServiceDir %s\n" % keys
        for port, target in ports.items():
            target = "127.0.0.1:%d" % target if isinstance(target, int) else target
            text += "HiddenServicePort %d %s\n" % (port, target)
        service = Service(self.tor, folder, text + torrc + "\n")
        service.hidden_service_dir = keys
        self.others.append(service.start())
        control = service.control()
        try:
            control.command("SETEVENTS HS_DESC")
            name = os.path.join(keys, "hostname")
            service.address = _wait(lambda: _read(name).strip(), 20, "a service's key",
                                    service.process)
            if wait:
                self._wait_uploaded(control, seconds)
        finally:
            control.close()
        return service

    def bridge(self, torrc="", obfs4="", wait=True, seconds=60):
        """Start a bridge; return it with `.address`, `.or_port`, `.fingerprint` and `.line`.

        obfs4: the path of obfs4proxy, through which alone `.line` then leads.  A network has four.
        """
        self.bridges += 1
        place = len(self.relays) + self.bridges - 1
        if place >= SEATS:
            raise TorNetError("no address is left for a bridge")
        node = Relay(self.tor, self._folder("bridge"), "")
        node.nickname, node.role, node.address = "bridge%d" % place, "bridge", self.address(place)
        node.or_port, port = OR_PORT, OR_PORT + 1
        self._make_keys(node)
        text = self._common_text() + (
            "Nickname {0.nickname}\nAddress {0.address}\nORPort {0.address}:{0.or_port}\n"
            "AddressDisableIPv6 1\nBridgeRelay 1\nPublishServerDescriptor 0\n"
            "BridgeDistribution none\nSocksPort 0\nContactInfo none\nExitRelay 0\n"
            "OutboundBindAddress {0.address}\n").format(node)
        node.line = "%s:%d %s" % (node.address, node.or_port, node.fingerprint)
        if obfs4:
            text += "ServerTransportPlugin obfs4 exec %s\nExtORPort auto\n" % obfs4
            text += "ServerTransportListenAddr obfs4 %s:%d\n" % (node.address, port)
        with open(node.torrc, "a") as f:
            f.write(text + torrc + "\n")
        self.others.append(node.start())
        if wait:
            _wait(node.bootstrapped, seconds, "a bridge's bootstrap", node.process)
        if obfs4:
            made = os.path.join(node.dir, "pt_state", "obfs4_bridgeline.txt")
            found = _wait(lambda: re.search("^Bridge obfs4 .*(cert=.*)", _read(made), re.M), 20,
                          "an obfs4 bridge's line", node.process)
            node.line = "obfs4 %s:%d %s %s" % (node.address, port, node.fingerprint, found[1])
        return node

    def _wait_uploaded(self, control, seconds):
        # Two periods, so two blinded keys.  A directory that does not answer is not waited for.
        keys, waiting, uploaded, end = set(), set(), 0, time.monotonic() + seconds
        quiet = time.monotonic() + 10
        while len(keys) < 2 or waiting and (not uploaded or time.monotonic() < quiet):
            if time.monotonic() > end:
                raise TorNetError("a service did not upload its descriptors: %d keys, %d directories"
                                  " have one, %d do not answer" % (len(keys), uploaded, len(waiting)))
            for line in control.event(0.5) or ():
                words = line.split()
                quiet = time.monotonic() + 10
                if words[1] == "UPLOAD":
                    keys.add(words[5])
                    waiting.add(words[4])
                else:
                    uploaded += words[1] == "UPLOADED"
                    waiting.discard(words[4])

    def stop(self):
        """Kill every process, and remove the files."""
        if self.stopped:
            return
        self.stopped = True
        atexit.unregister(self.stop)
        for process in self.others + self.relays:
            process.stop()
        if self.delayer is not None:
            self.delayer.kill()
            self.delayer.communicate()
        self.names.stop()
        shutil.rmtree(self.dir, ignore_errors=True)
        self.lock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


# ── Command line


def _terminate(number, frame):
    raise SystemExit(128 + number)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    command = None
    if "--" in arguments:
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1:]
    parser = argparse.ArgumentParser(
        prog="tornet.py", usage="python tests/tornet.py [options] [-- COMMAND...]",
        description="Start a private Tor network; run COMMAND in it (MINITOR_NETWORK names the"
        " network file), or keep it up until Ctrl-C.")
    parser.add_argument("--relays", type=int, default=RELAYS, help="beside three authorities")
    parser.add_argument("--interval", type=int, default=20, help="voting interval in seconds")
    parser.add_argument("--param", action="append", default=[], metavar="NAME=N",
                        help="a consensus parameter")
    parser.add_argument("--sparse", action="store_true",
                        help="one replica and a spread of one, where a wrong hash ring shows")
    parser.add_argument("--torrc", default="", help="a torrc line for every relay")
    parser.add_argument("--delay", type=float, default=0, metavar="SECONDS",
                        help="for each relay and direction: three relays add six times this")
    options = parser.parse_args(arguments)
    if command is not None and not command:
        parser.error("no command after --")
    params = dict((name, int(n)) for name, _, n in (p.partition("=") for p in options.param))
    if options.sparse:
        params = dict(SPARSE, **params)
    # A shell that puts a command into the background lets it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)

    def say(text):
        print("tornet: " + text, file=sys.stderr, flush=True)

    try:
        with TorNet(options.relays, options.interval, params, options.torrc + "\n",
                    options.delay, say) as net:
            if command:
                environment = dict(os.environ, MINITOR_NETWORK=net.network_file)
                return _run_command(command, environment)
            print(net.network_file, flush=True)
            say("Ctrl-C ends it")
            while True:
                time.sleep(3600)
    except TorNetError as e:
        say(str(e))
        return 1
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        return 130


def _run_command(command, environment):
    child = subprocess.Popen(command, env=environment)
    try:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            # The terminal sent it to the command as well, which may want to end in its own way.
            status = child.wait(10)
        return status if status >= 0 else 128 - status
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


SPARSE = {"hsdir_n_replicas": 1, "hsdir_spread_store": 1, "hsdir_spread_fetch": 1}

if __name__ == "__main__":
    sys.exit(main())
