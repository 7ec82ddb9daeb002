"""--connect, --advertise and --discover in the private network, with C tor at the other end."""

import shutil
import socket
import subprocess
import sys
import threading

import pytest
from httptarget import payload
from livekit import ADDRESS, MB, MINITOR, Program, minitor, wait_for

AGENTS = MINITOR.parent / "examples" / "agents.py"
OURS, THEIRS = payload(MB, 1), payload(2 * MB, 2)


class Counterpart:
    """A server on this machine that takes OURS, answers THEIRS, and hangs up."""

    def __init__(self):
        self.server, self.good = socket.create_server(("127.0.0.1", 0)), []
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection:
                there = bytearray()
                while len(there) < len(OURS) and (data := connection.recv(1 << 16)):
                    there += data
                self.good.append(there == OURS)
                connection.sendall(THEIRS)


@pytest.fixture(scope="module")
def counterpart(tornet):
    """A service that C tor hosts at port 7: `address`, `good`."""
    server = Counterpart()
    service = tornet.onion_service({7: server.port})
    server.address = service.address
    yield server
    service.stop()
    server.server.close()


def connect(tornet, folder, where, data, *options):
    done = subprocess.run(
        [sys.executable, MINITOR, "--network", tornet.network_file, "--data-dir", folder,
         "--connect", where, *options],
        input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=90)
    return done.returncode, done.stdout, done.stderr.decode()


def test_peers_find_each_other(tornet, tmp_path):
    first = minitor(tornet, tmp_path / "1", "--advertise", "page", "wiki=%s" % tmp_path)
    with first:
        one = first.wait_out(ADDRESS.pattern + ":7717", 90)[1]
        with minitor(tornet, tmp_path / "2", "--advertise", "page", "--port", "81",
                     "--peer", one) as second:
            two = second.wait_out(ADDRESS.pattern + ":7717", 90)[1]
            wait_for(lambda: "Advertised at 1 peers" in second.err, 60, "an advertisement")
            folder = tmp_path / "3"
            with minitor(tornet, folder, "--discover", "page", "--peer", two) as seeker:
                assert seeker.wait(90) == 0, seeker.err
                found = sorted(seeker.out.splitlines())
            assert found == sorted([one + ":80 page", two + ":81 page"])
            # What it needs to know it knows by now.
            with minitor(tornet, folder, "--discover", one) as seeker:
                assert seeker.wait(90) == 0, seeker.err
                assert seeker.out == "%s:80 page\n%s:81 wiki\n" % (one, one)
            request = b"GET / HTTP/1.0\r\n\r\n"
            status, out, err = connect(tornet, folder, two + ":81", request)
            assert status == 0 and b"It works" in out, err
            assert second.interrupt() == 0 and first.interrupt() == 0
            for program in first, second:
                assert "bug" not in program.err and "Traceback" not in program.err, program.err


def test_connect_to_a_service_of_tor(tornet, counterpart, tmp_path):
    status, out, err = connect(tornet, tmp_path / "a", counterpart.address + ":7", OURS)
    assert (status, out == THEIRS, counterpart.good) == (0, True, [True]), err


def test_connect_says_what_is_wrong(tornet, counterpart, tmp_path):
    status, out, err = connect(tornet, tmp_path / "a", counterpart.address + ":8", b"")
    assert (status, out) == (1, b"") and err.splitlines()[-1].startswith("minitor: "), err


def test_agents(tornet, tmp_path):
    network = tmp_path / "network"
    shutil.copy(tornet.network_file, network)
    with Program([AGENTS], {"MINITOR_NETWORK": str(network)}) as agents:
        assert agents.wait(120) == 0, agents.err
        lines = agents.out.splitlines()
    assert len({ADDRESS.search(line)[1] for line in lines[:3]}) == 3
    assert lines[3:5] == ["words: 4", "total: 6.5"] and "ValueError" in lines[5]
    assert agents.err == ""
