"""Client authorization with C tor on the other side, both ways, and who is not admitted."""

import base64
import signal
import socket
import sys
import time
from pathlib import Path

import minitor
import pytest
from httptarget import HELLO
from livekit import ADDRESS, MINITOR, Program, curl, curl_ok, retry, wait_for
from stem.control import Controller

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "board"))

import runtimes  # noqa: E402

TORRC = """
%%include %(network)s
EnforceDistinctSubnets 1
DataDirectory %(folder)s/data
SocksPort auto ExtendedErrors
ControlPort auto
ClientOnionAuthDir %(folder)s/keys
HiddenServiceDir %(folder)s/service
HiddenServicePort 80 %(port)d
"""
MISSING, WRONG = 0xF4, 0xF5
ALICE, BOB, EVE = [minitor.sha256(name) for name in (b"alice", b"bob", b"eve")]


def admit(folder, name, secret):
    clients = folder / "authorized_clients"
    clients.mkdir(0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    (clients / (name + ".auth")).write_text(minitor.auth_text(minitor.x25519(secret)) + "\n")


def give(folder, address, secret):
    folder.mkdir(0o700, exist_ok=True)
    text = "%s:%s\n" % (address[:56], minitor.auth_text(secret))
    (folder / "a.auth_private").write_text(text)


@pytest.fixture(scope="module")
def daemon(tornet, target, tmp_path_factory):
    """minitor with a service for Alice: `folder`, `address`, `control`, `socks` (ports)."""
    folder = tmp_path_factory.mktemp("auth")
    admit(folder / "service", "alice", ALICE)
    (folder / "keys").mkdir(0o700)
    names = {"network": tornet.network_file, "folder": folder, "port": target.port}
    (folder / "torrc").write_text(TORRC % names)
    with Program([MINITOR, "-f", folder / "torrc"]) as program:
        program.folder = folder
        opened = r"Opened %s listener connection \(ready\) on 127\.0\.0\.1:(\d+)"
        program.control = int(program.wait_out(opened % "Control", 30)[1])
        program.socks = int(program.wait_out(opened % "Socks", 30)[1])
        program.address = (folder / "service" / "hostname").read_text().strip()
        yield program
        assert "bug:" not in program.out and "Traceback" not in program.err


@pytest.fixture(scope="module")
def theirs(daemon, tornet, target, tmp_path_factory):
    """C tor's service for Alice."""
    folder = tmp_path_factory.mktemp("theirs") / "hs"
    admit(folder, "alice", ALICE)
    service = tornet.onion_service({80: target.port}, str(folder))
    yield service
    service.stop()


@pytest.fixture(scope="module")
def clients(tornet, daemon, tmp_path_factory):
    """C tor's clients: Alice, by a file, and Bob, whose key controllers give."""
    folder = tmp_path_factory.mktemp("clients")
    give(folder / "alice", daemon.address, ALICE)
    alice = tornet.client("ClientOnionAuthDir %s/alice" % folder, wait=False)
    bob = tornet.client()
    wait_for(alice.bootstrapped, 60, "a client's bootstrap")
    daemon.wait_out("is reachable", 60)
    yield alice, bob
    alice.stop()
    bob.stop()


def added(address, secret):
    key = base64.b64encode(secret).decode()
    return "ONION_CLIENT_AUTH_ADD %s x25519:%s" % (address[:56], key)


def tell(client, address, secret):
    """Give a C tor client its key."""
    control = client.control()
    control.command(added(address, secret))
    control.close()


def answer(daemon, host):
    """Return the code of the SOCKS reply for `host`, and what a request of HTTP brings."""
    request = b"\5\1\0\5\1\0\3" + bytes([len(host)]) + host.encode() + b"\0\x50"
    with socket.create_connection(("127.0.0.1", daemon.socks), 60) as s:
        s.sendall(request)
        with s.makefile("rb") as f:
            code = f.read(12)[3]
            if code:
                return code, b""
            s.sendall(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
            return code, f.read().partition(b"\r\n\r\n")[2]


def test_c_tor_at_a_service_for_some(daemon, clients):
    """Alice comes in; who has no key, or another one, learns nothing."""
    alice, bob = clients
    url = "http://%s/" % daemon.address
    assert retry(lambda: curl_ok(alice, url, user="a", seconds=20), 40) == HELLO
    assert curl(bob, url, seconds=20).returncode != 0
    assert "likely requiring client authorization" in bob.log()
    tell(bob, daemon.address, EVE)
    assert curl(bob, url, user="eve", seconds=20).returncode != 0
    assert "Client authorization for requested onion address is invalid" in bob.log()


def test_who_is_admitted_changes_with_sighup(daemon, clients):
    """Bob instead of Alice: she has a descriptor, but its introduction points are gone."""
    alice, bob = clients
    url = "http://%s/" % daemon.address
    (daemon.folder / "service" / "authorized_clients" / "alice.auth").unlink()
    admit(daemon.folder / "service", "bob", BOB)
    daemon.process.send_signal(signal.SIGHUP)
    tell(bob, daemon.address, BOB)
    assert retry(lambda: curl_ok(bob, url, user="bob", seconds=20), 40) == HELLO

    def refused():
        # A circuit that is open stays.  Where it does not hear that a point is gone, C tor waits.
        user = "again%d" % time.time_ns()
        assert curl(alice, url, user=user, seconds=10).returncode != 0
        assert "Client authorization for requested onion address is invalid" in alice.log()

    retry(refused, 60)


def test_a_service_of_c_tor_for_some(daemon, theirs):
    """Without a key, with a wrong one, by a controller's, by that of a file."""
    daemon.wait_out("is reachable", 60)
    name = theirs.address[:56]
    assert answer(daemon, theirs.address) == (MISSING, b"")

    def add(secret, *more):
        return controller.msg(" ".join((added(name, secret),) + more)).content()[0]

    with Controller.from_port(port=daemon.control) as controller:
        controller.authenticate()
        assert add(EVE)[0] == "250"
        assert answer(daemon, theirs.address) == (WRONG, b"")
        # What came is kept, and the right key opens it.
        assert add(ALICE, "ClientName=alice")[0] == "252"
        assert answer(daemon, theirs.address) == (0, HELLO)
        view = str(controller.msg("ONION_CLIENT_AUTH_VIEW " + name)).split("\n")
        kept = added(name, ALICE).replace("ONION_CLIENT_AUTH_ADD", "CLIENT")
        assert view[1] == kept + " ClientName=alice"
        assert controller.msg("ONION_CLIENT_AUTH_REMOVE " + name).is_ok()
        controller.signal("NEWNYM")
        assert answer(daemon, theirs.address) == (MISSING, b"")
        give(daemon.folder / "keys", theirs.address, ALICE)
        controller.signal("RELOAD")
        wait_for(lambda: "Flags=Permanent" in str(controller.msg("ONION_CLIENT_AUTH_VIEW")), 10)
    assert answer(daemon, theirs.address) == (0, HELLO)


def board(net, script, *arguments):
    line, environment = runtimes.command(
        "32", HERE / script, net.network_file, *arguments, heap="1m")
    return Program(line, environment, interpreter=())


def test_a_board_for_some(daemon, clients, theirs, tornet, target, tmp_path):
    """32-bit MicroPython hosts for Bob alone, and Alice uses it."""
    _, bob = clients
    key = minitor.auth_text(minitor.x25519(BOB))
    with board(tornet, "board_host.py", tmp_path / "data", target.port, key) as host, \
            board(tornet, "board_get.py", tmp_path / "other", theirs.address, 80, "/",
                  minitor.auth_text(ALICE)) as client:
        address = host.wait_out(ADDRESS, 240)[1]
        tell(bob, address, BOB)
        assert retry(lambda: curl_ok(bob, "http://%s/" % address, seconds=30), 60) == HELLO
        assert answer(daemon, address) == (MISSING, b"")
        assert client.wait_out(r"fetched (\d+)", 120)[1] == str(len(HELLO))


def test_a_controllers_service_for_some(daemon, clients, target):
    """stem's: for who has the key, until it goes."""
    _, bob = clients
    with Controller.from_port(port=daemon.control) as controller:
        controller.authenticate()
        service = controller.create_ephemeral_hidden_service(
            {80: target.port}, await_publication=True, timeout=60,
            client_auth_v3=minitor.auth_text(minitor.x25519(BOB))[18:])
        url = "http://%s.onion/" % service.service_id
        tell(bob, service.service_id, BOB)
        assert retry(lambda: curl_ok(bob, url, user="stem", seconds=20), 40) == HELLO
        assert answer(daemon, service.service_id + ".onion") == (MISSING, b"")
