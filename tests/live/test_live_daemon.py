"""A torrc starts minitor as it starts tor: what it serves, and the manners of a daemon."""

import os
import shutil
import signal
import socket
import subprocess
import threading

import pytest
from httptarget import HELLO
from livekit import MINITOR, Program, curl, curl_ok, retry, wait_for

TOR = shutil.which("tor", path=os.environ["PATH"] + ":/usr/sbin")
TORRC = """
%%include %(network)s
EnforceDistinctSubnets 1
datadirectory "%(folder)s/data"   # made by minitor
SocksPort auto
SocksPort unix:%(folder)s/socks
Log notice stdout
Log info file \\
    # in a line of its own
    %(folder)s/log
PidFile %(folder)s/pid
GeoIPFile %(folder)s/empty
HiddenServiceDir %(folder)s/proxied
HiddenServicePort 82 unix:%(folder)s/haproxy
HiddenServiceExportCircuitID haproxy
HiddenServiceDir %(folder)s/service
HiddenServicePort 80 %(port)d
HiddenServiceNumIntroductionPoints 4
"""


@pytest.fixture(scope="module")
def client(tornet):
    client = tornet.client()
    yield client
    client.stop()


class Started:
    """`folder`, `program`, `address` of a daemon; its service has keys that C tor made."""

    def __init__(self, net, folder, port):
        self.folder, self.torrc = folder, folder / "torrc"
        theirs = net.onion_service({80: port}, str(folder / "service"), wait=False)
        hostname = folder / "service" / "hostname"
        wait_for(lambda: hostname.exists() and hostname.read_text().strip(), 20, "C tor's key")
        theirs.stop()
        self.address = hostname.read_text().strip()
        (folder / "empty").write_text("")
        self.text = TORRC % {"network": net.network_file, "folder": folder, "port": port}
        self.torrc.write_text(self.text)
        self.program = Program([MINITOR, "-f", self.torrc])

    def log(self):
        return (self.folder / "log").read_text()


@pytest.fixture(scope="module")
def daemon(tornet, target, tmp_path_factory):
    started = Started(tornet, tmp_path_factory.mktemp("daemon"), target.port)
    started.program.wait_out(r"Bootstrapped 100% \(done\): Done", 60)
    started.program.wait_out("(?s)is reachable.*is reachable", 60)
    yield started
    started.program.kill()


def test_c_tor_takes_the_same_file(daemon):
    done = subprocess.run([TOR, "--verify-config", "-f", str(daemon.torrc)], timeout=30,
                          stdout=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0 and "Configuration was valid" in done.stdout, done.stdout


def test_service_with_the_keys_of_c_tor(daemon, client):
    assert (daemon.folder / "service" / "hostname").read_text().strip() == daemon.address
    assert curl_ok(client, "http://%s/" % daemon.address) == HELLO


def test_circuit_ids_are_exported(daemon, client):
    """The first line of each connection names the circuit, as HAProxy's protocol has it."""
    heads, address = [], (daemon.folder / "proxied" / "hostname").read_text().strip()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(daemon.folder / "haproxy"))
        server.listen()

        def answer():
            for _ in range(3):
                with server.accept()[0] as connection:
                    data = b""
                    while not data.endswith(b"\r\n\r\n"):
                        data += connection.recv(4096)
                    heads.append(data.split(b"\r\n")[0].decode())
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        for user in "aab":
            curl_ok(client, "http://%s:82/" % address, user=user)
        thread.join(10)
    words = [head.split() for head in heads]
    assert all(w[:2] == ["PROXY", "TCP6"] and w[3] == "::1" and w[5] == "82" for w in words)
    # Same circuit, same address; another circuit, another.
    addresses = [socket.inet_pton(socket.AF_INET6, w[2]) for w in words]
    assert addresses[0] == addresses[1] != addresses[2]


def test_log_names_no_service(daemon):
    assert "[notice] Bootstrapped 100% (done): Done" in daemon.log()
    assert daemon.address not in daemon.log() + daemon.program.out


def test_second_instance_is_refused(daemon):
    with Program([MINITOR, "-f", daemon.torrc, "--PidFile", daemon.folder / "pid2"]) as second:
        assert second.wait(20) == 1
        assert "another process uses the DataDirectory" in second.err
        assert not (daemon.folder / "pid2").exists()
    assert (daemon.folder / "data").stat().st_mode & 0o777 == 0o700


def test_hangup_reloads(daemon, client, target):
    """A log file that was moved away is made anew; a service gains a port, another one appears."""
    pid = int((daemon.folder / "pid").read_text())
    assert pid == daemon.program.pid
    (daemon.folder / "log").rename(daemon.folder / "log.1")
    more = "HiddenServicePort 81 %d\nHiddenServiceDir %s\nHiddenServicePort 80 %d\n" % (
        target.port, daemon.folder / "new", target.port)
    more += "ControlSocket %s\n" % (daemon.folder / "control")
    daemon.torrc.write_text(daemon.text + more)
    os.kill(pid, signal.SIGHUP)
    wait_for(lambda: (daemon.folder / "log").exists(), 10, "a new log")
    wait_for((daemon.folder / "control").exists, 10, "a new listener")
    assert retry(lambda: curl_ok(client, "http://%s:81/" % daemon.address, user="h"), 30) == HELLO
    daemon.program.wait_out("(?s)(is reachable.*){3}", 60)
    added = (daemon.folder / "new" / "hostname").read_text().strip()
    assert curl_ok(client, "http://%s/" % added) == HELLO
    # What is wrong changes nothing.
    daemon.torrc.write_text(daemon.text + "Nonsense 1\n")
    os.kill(pid, signal.SIGHUP)
    daemon.program.wait_out("stays as it was: .*Nonsense: unknown option", 10)
    assert curl_ok(client, "http://%s:81/" % daemon.address) == HELLO
    # The old file again: what it does not name is gone.
    daemon.torrc.write_text(daemon.text)
    os.kill(pid, signal.SIGHUP)
    wait_for(lambda: not (daemon.folder / "control").exists(), 10, "the listener's end")
    assert curl(client, "http://%s:81/" % daemon.address, user="i", seconds=20).returncode


def test_socks(daemon, target):
    port = daemon.program.wait_out(r"Opened Socks listener .* on 127\.0\.0\.1:(\d+)", 5)[1]
    url = "http://127.0.0.1:%d/" % target.port
    for proxy in (["--socks5-hostname", "127.0.0.1:" + port],
                  ["--socks5-hostname", "unix://%s" % (daemon.folder / "socks")]):
        if proxy[1][:4] == "unix":
            proxy[1] = "localhost" + proxy[1][7:]
        done = subprocess.run(["curl", "-sS", "--max-time", "60"] + proxy + [url],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.stdout == HELLO, done.stderr


def test_terminate(daemon):
    assert (daemon.folder / "socks").is_socket()
    daemon.program.process.terminate()
    assert daemon.program.wait(15) == 0, daemon.program.err[-2000:]
    assert not (daemon.folder / "pid").exists() and not (daemon.folder / "socks").exists()
    assert "exiting cleanly" in daemon.log()
    assert daemon.program.err == ""


def test_background(tornet, tmp_path):
    """RunAsDaemon: who started it goes on once it listens; all output goes to the log."""
    torrc = tmp_path / "torrc"
    torrc.write_text("%%include %s\nRunAsDaemon 1\nDataDirectory data\nPidFile pid\nSocksPort 0\n"
                     "Log notice file log\nLog notice stdout\n" % tornet.network_file)
    with Program([MINITOR, "-f", "torrc"], cwd=tmp_path) as program:
        assert program.wait(20) == 0, program.err
        assert program.out == program.err == ""
    pid = int((tmp_path / "pid").read_text())
    try:
        assert os.getsid(pid) != os.getsid(0) and pid != program.pid
        done = "Bootstrapped 100% (done): Done"
        wait_for(lambda: done in (tmp_path / "log").read_text(), 60, "the bootstrap")
        with Program([MINITOR, "-f", "torrc"], cwd=tmp_path) as second:
            assert second.wait(20) == 1
            assert "another process uses the DataDirectory" in second.err
        ask = lambda what: Program([MINITOR, what, "-f", "torrc"], cwd=tmp_path)
        with ask("--status") as asked, ask("--newnym") as told:
            assert asked.wait(20) == told.wait(20) == 0, asked.err + told.err
            assert "process/pid=%d\n" % pid in asked.out and "PROGRESS=100" in asked.out
        with ask("--stop") as asked:
            assert asked.wait(20) == 0, asked.err
        assert not (tmp_path / "pid").exists()
        wait_for(lambda: not os.path.exists("/proc/%d" % pid), 15, "the end of the process")
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        raise
    with ask("--status") as asked:
        assert asked.wait(20) == 1 and "no minitor answers" in asked.err
