"""Through bridges alone, plain and with obfs4: everything, and nothing beside them."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from httptarget import HELLO
from livekit import ADDRESS, MINITOR, Program, curl, curl_ok, retry, wait_for

OBFS4 = shutil.which("obfs4proxy") or "/usr/bin/obfs4proxy"
HERE = Path(__file__).resolve().parent
TORRC = """
%%include %(network)s
EnforceDistinctSubnets 1
DataDirectory %(folder)s/data
SocksPort auto
ControlPort unix:%(folder)s/control
Log info stdout
UseBridges %(use)d
ClientTransportPlugin obfs4 exec %(obfs4)s
HiddenServiceDir %(folder)s/service
HiddenServicePort 80 %(port)d
"""


@pytest.fixture(scope="module")
def bridges(tornet):
    """A plain bridge and one with obfs4, of C tor."""
    found = [tornet.bridge(wait=False), tornet.bridge(obfs4=OBFS4, wait=False)]
    wait_for(lambda: all(node.bootstrapped() for node in found), 60, "two bridges")
    yield found
    for node in found:
        node.stop()


class Bridged:
    """minitor with a torrc of Bridge lines; `connected()`: where it connected to."""

    def __init__(self, net, folder, port, *lines):
        self.folder, self.torrc, self.notes = folder, folder / "torrc", folder / "notes"
        self.text = TORRC % {
            "network": net.network_file, "folder": folder, "obfs4": OBFS4, "port": port,
            "use": bool(lines)}
        self.write(*lines)
        self.program = Program([HERE / "bridged.py", self.notes, MINITOR, "-f", self.torrc])

    def write(self, *lines):
        self.torrc.write_text(self.text + "".join(["Bridge %s\n" % line for line in lines]))

    def connected(self):
        return self.notes.read_text().splitlines()

    def ask(self, *requests):
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(20)
            s.connect(str(self.folder / "control"))
            s.sendall("".join([r + "\r\n" for r in ("AUTHENTICATE",) + requests]).encode()
                      + b"QUIT\r\n")
            return b"".join(iter(lambda: s.recv(4096), b"")).decode()

    def proxy(self):
        pattern = r"Opened Socks listener connection \(ready\) on 127\.0\.0\.1:(\d+)"
        return SimpleNamespace(socks_port=int(self.program.wait_out(pattern, 20)[1]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.program.kill()


def place(bridge):
    return "%s:%d" % (bridge.address, bridge.or_port)


def children(pid):
    found = set()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
            if fields[1] == str(pid):
                found.add(int(name))
    return found


def peers(pid):
    """Return the addresses that a process has connections to, those on 127.0.0.1 left out."""
    sockets = set()
    for fd in Path("/proc/%d/fd" % pid).iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(str(fd)))
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if "socket:[%s]" % fields[9] in sockets and fields[3] == "01":
            address, _, port = fields[2].partition(":")
            packed = bytes.fromhex(address)[::-1]
            found.add("%s:%d" % (socket.inet_ntoa(packed), int(port, 16)))
    return {address for address in found if not address.startswith("127.0.0.1:")}


def test_nothing_goes_to_other_relays(tornet, bridges, target, tmp_path):
    """Bootstrap, use, hosting, loss of the bridge; then another bridge, after SIGHUP."""
    plain, obfs4 = bridges
    client = tornet.client()
    with Bridged(tornet, tmp_path, target.port, plain.line) as daemon:
        daemon.program.wait_out(r"Bootstrapped 100% \(done\): Done", 60)
        proxy, page = daemon.proxy(), "http://127.0.0.1:%d/" % target.port
        assert curl_ok(proxy, page) == HELLO
        address = daemon.program.wait_out(r"\[notice\] \S+ is reachable", 60) and (
            tmp_path / "service" / "hostname").read_text().strip()
        assert curl_ok(client, "http://%s/" % address) == HELLO
        assert curl_ok(proxy, "http://%s/" % address) == HELLO
        answer = daemon.ask("GETINFO entry-guards orconn-status circuit-status")
        assert "$%s up\r\n" % plain.fingerprint in answer
        assert "$%s CONNECTED\r\n" % plain.fingerprint in answer
        assert answer.count("CONNECTED") == 1
        links = re.findall(r" BUILT \$(\w+)", answer)
        assert set(links) == {plain.fingerprint}
        plain.stop()
        assert curl(proxy, page, seconds=8).returncode
        plain.start()
        wait_for(lambda: "up to 100%" in plain.log() or plain.log().count("100%") > 1, 30)
        assert retry(lambda: curl_ok(proxy, page, seconds=10), 60) == HELLO
        own = "127.0.0.1:%d" % target.port
        assert set(daemon.connected()) - {own} == {place(plain)}

        daemon.write(obfs4.line)
        before = len(daemon.connected())
        daemon.program.process.send_signal(signal.SIGHUP)
        assert retry(lambda: curl_ok(proxy, page, seconds=10), 60) == HELLO
        answer = daemon.ask("GETINFO orconn-status entry-guards")
        assert answer.count(" CONNECTED\r\n") == 1 and obfs4.fingerprint in answer
        assert plain.fingerprint not in answer
        plugins = children(daemon.program.pid)
        assert len(plugins) == 1
        # The rest goes to the plugin, and the plugin to the bridge.
        rest = set(daemon.connected()[before:]) - {own}
        assert rest and all(address.startswith("127.0.0.1:") for address in rest)
        assert peers(*plugins) == {obfs4.line.split()[1]}
        assert not peers(daemon.program.pid)
        # It ends with minitor, however that ends.
        daemon.program.kill()
        wait_for(lambda: not os.path.exists("/proc/%d" % list(plugins)[0]), 10)
    client.stop()


def test_a_controller_turns_bridges_on_and_off(tornet, bridges, target, tmp_path):
    """What was open to other relays is closed, and nothing new goes there."""
    plain, page = bridges[0], "http://127.0.0.1:%d/" % target.port
    with Bridged(tornet, tmp_path, target.port) as daemon:
        daemon.program.wait_out(r"Bootstrapped 100% \(done\): Done", 60)
        proxy = daemon.proxy()
        assert "no Bridge line" in daemon.ask("SETCONF UseBridges=1")
        daemon.ask('SETCONF UseBridges=1 Bridge="%s"' % plain.line)
        before = len(daemon.connected())
        assert retry(lambda: curl_ok(proxy, page, seconds=10), 60) == HELLO
        own = "127.0.0.1:%d" % target.port
        assert set(daemon.connected()[before:]) - {own} <= {place(plain)}
        answer = daemon.ask("GETINFO orconn-status")
        assert answer.count(" CONNECTED\r\n") == 1 and plain.fingerprint in answer
        daemon.ask("SETCONF UseBridges=0")
        assert retry(lambda: curl_ok(proxy, page, seconds=10), 60) == HELLO
        # A circuit that was begun by the bridge may still be open.
        assert plain.fingerprint not in daemon.ask("GETINFO entry-guards")


def test_bridges_that_are_not_what_they_should_be(tornet, bridges, target, tmp_path):
    """Among a wrong fingerprint, a closed port and none that is known, one serves: by options."""
    plain, obfs4 = bridges
    wrong = "%s %s" % (obfs4.line.split()[1].replace(":9002", ":9001"), "A" * 40)
    dead = "127.0.0.1:1 " + "B" * 40
    with Program([HERE / "bridged.py", tmp_path / "notes", MINITOR, "--DataDirectory", tmp_path,
                  "-f", tornet.network_file, "--SocksPort", "auto", "--UseBridges", "1",
                  "--Bridge", wrong, "--+Bridge", dead, "--+Bridge", place(plain)]) as program:
        program.wait_out("Learned fingerprint %s for bridge" % plain.fingerprint, 30)
        program.wait_out(r"Bootstrapped 100% \(done\): Done", 60)
        text = r"bridge %s \(argument\): .*its fingerprint is %s, which"
        program.wait_out(text % (wrong.split()[0], obfs4.fingerprint), 10)
        program.wait_out(r"bridge 127\.0\.0\.1:1 \(argument\): cannot be reached", 10)
    places = {wrong.split()[0], "127.0.0.1:1", place(plain)}
    assert set((tmp_path / "notes").read_text().splitlines()) == places


def test_obfs4_in_a_program(tornet, bridges, target, tmp_path):
    """Its plugin is killed, too, and started again."""
    line = bridges[1].line
    with Program([HERE / "bridged.py", tmp_path / "notes", HERE / "bridge_worker.py",
                  tmp_path / "data", "http://127.0.0.1:%d/" % target.port, line],
                 {"MINITOR_NETWORK": str(tornet.network_file)}) as program:
        assert program.wait(90) == 0, program.err[-3000:]
    made = json.loads(program.out.splitlines()[-1])
    assert [page.encode() for page in made["pages"]] == [HELLO, HELLO]
    assert made["pids"][0] != made["pids"][1] and made["ended"]
    assert any(re.search("obfs4proxy ended; .* it is started again in 1 s", text)
               for severity, text in made["logged"] if severity == 3)
    ports = set((tmp_path / "notes").read_text().splitlines())
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert "127.0.0.1:%d" % made["method"][1][1] in ports


def test_ipv6(tornet, target, tmp_path):
    port = 20000 + tornet.base
    bridge = tornet.bridge("ORPort [::1]:%d IPv6Only\nAddressDisableIPv6 0" % port)
    line = "[::1]:%d %s" % (port, bridge.fingerprint)
    with Bridged(tornet, tmp_path, target.port, line) as daemon:
        daemon.program.wait_out(r"Bootstrapped 100% \(done\): Done", 60)
        assert curl_ok(daemon.proxy(), "http://127.0.0.1:%d/" % target.port) == HELLO
        assert "::1:%d" % port in daemon.connected()
        assert not [a for a in daemon.connected() if a.split(":")[0] not in ("", "127.0.0.1")]
    bridge.stop()
