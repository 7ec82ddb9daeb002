"""Controllers as they are: stem, from PyPI, talks to minitor as to tor."""

import queue
import socket
import subprocess
import time

import pytest
import stem
import stem.connection
import stem.control
from httptarget import HELLO
from livekit import MINITOR, Program, curl_ok, retry, wait_for
from stem.control import Controller, EventType

import minitor

TORRC = """
%%include %s
EnforceDistinctSubnets 1
DataDirectory %s/data
SocksPort auto
ControlPort auto
ControlSocket %s/control
ControlPortWriteToFile %s/ports
CookieAuthentication 1
HashedControlPassword %s
GeoIPFile %s/geoip
"""


@pytest.fixture(scope="module")
def client(tornet):
    client = tornet.client()
    yield client
    client.stop()


@pytest.fixture(scope="module")
def daemon(tornet, tmp_path_factory):
    """minitor with a control port: a Program with `.folder`, `.control`, `.socks` (ports)."""
    folder = tmp_path_factory.mktemp("control")
    (folder / "geoip").write_text("2130706432,2147483647,XL\n")
    hashed = "16:" + (b"saltsalt\x60" + minitor.hash_password(b"secret", b"saltsalt\x60")).hex()
    torrc = folder / "torrc"
    torrc.write_text(TORRC % (tornet.network_file, folder, folder, folder, hashed, folder))
    with Program([MINITOR, "-f", torrc]) as program:
        program.folder, program.torrc = folder, torrc
        opened = r"Opened %s listener connection \(ready\) on 127\.0\.0\.1:(\d+)"
        program.control = int(program.wait_out(opened % "Control", 30)[1])
        program.socks = int(program.wait_out(opened % "Socks", 30)[1])
        program.wait_out(r"Bootstrapped 100% \(done\): Done", 60)
        yield program


@pytest.fixture
def controller(daemon):
    with Controller.from_port(port=daemon.control) as controller:
        controller.authenticate()
        yield controller


def fetch(daemon, url):
    done = subprocess.run(
        ["curl", "-sS", "--max-time", "60", "--socks5-hostname", "127.0.0.1:%d" % daemon.socks, url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def events(controller, *kinds):
    """A Queue of the events of these kinds from now on."""
    found = queue.Queue()
    controller.add_event_listener(found.put, *kinds)
    return found


def next_event(found, fits, seconds=30):
    end = time.monotonic() + seconds
    seen = []
    while True:
        try:
            event = found.get(timeout=max(end - time.monotonic(), 0.01))
        except queue.Empty:
            raise AssertionError("no such event among %s" % seen)
        if fits(event):
            return event
        seen.append(str(event).strip())


def test_authentication(daemon):
    assert "PORT=127.0.0.1:%d\n" % daemon.control in (daemon.folder / "ports").read_text()
    with Controller.from_socket_file(str(daemon.folder / "control")) as controller:
        info = stem.connection.get_protocolinfo(controller)
        methods = {str(method) for method in info.auth_methods}
        assert methods == {"Cookie", "Safecookie", "Password"}
        stem.connection.authenticate_safecookie(controller, info.cookie_path)
        assert controller.is_authenticated() or controller.get_version()
    for login in (
        lambda c: stem.connection.authenticate_cookie(c, info.cookie_path),
        lambda c: stem.connection.authenticate_password(c, "secret"),
        lambda c: c.authenticate("secret"),
    ):
        with Controller.from_port(port=daemon.control) as controller:
            login(controller)
            assert controller.get_version() >= stem.version.Version("0.4.8.1")
    with Controller.from_port(port=daemon.control) as controller:
        with pytest.raises(stem.connection.IncorrectPassword):
            stem.connection.authenticate_password(controller, "wrong")
    with Controller.from_port(port=daemon.control) as controller:
        with pytest.raises(stem.connection.AuthenticationFailure):
            stem.connection.authenticate_none(controller)


def test_hops_in_different_countries(daemon, controller, tornet, target):
    """EnforceDistinctCountries, set while it runs, holds for what is built from then on."""
    def known():
        found = [c for c in controller.get_circuits() if c.status == "BUILT" and len(c.path) > 2]
        return {c.id: [country[fingerprint] for fingerprint, _ in c.path[:3]] for c in found}

    country = {r.fingerprint: "AA BB CC DD".split()[n % 4] for n, r in enumerate(tornet.relays)}
    lines = []
    for relay in tornet.relays:
        start = 127 << 24 | int(relay.address.split(".")[1]) << 16
        lines.append("%d,%d,%s\n" % (start, start + 65535, country[relay.fingerprint]))
    (daemon.folder / "countries").write_text("".join(sorted(lines)))
    before, seen = set(known()), {}
    controller.set_options(
        {"GeoIPFile": str(daemon.folder / "countries"), "EnforceDistinctCountries": "1"})
    try:
        while len(seen) < 8:
            assert fetch(daemon, "http://127.0.0.1:%d/" % target.port) == HELLO
            wait_for(lambda: set(known()) - before - set(seen), 30, "a new circuit")
            seen.update({n: path for n, path in known().items() if n not in before})
            controller.signal("NEWNYM")
        assert all(len(set(path)) == 3 for path in seen.values()), seen
    finally:
        controller.set_options(
            {"GeoIPFile": str(daemon.folder / "geoip"), "EnforceDistinctCountries": "0"})


def test_what_stem_asks(daemon, controller):
    assert controller.get_pid() == daemon.pid
    assert controller.get_listeners(stem.control.Listener.SOCKS) == [("127.0.0.1", daemon.socks)]
    assert controller.get_listeners(stem.control.Listener.CONTROL) == [
        ("127.0.0.1", daemon.control)]
    assert int(controller.get_info("traffic/read")) > 5000
    assert int(controller.get_info("traffic/written")) > 1000
    assert controller.get_info("status/bootstrap-phase").startswith(
        "NOTICE BOOTSTRAP PROGRESS=100 TAG=done")
    assert controller.get_info("ip-to-country/127.0.0.1") == "xl"
    assert controller.get_conf("CookieAuthentication") == "1"
    assert controller.get_conf("ControlPort") == "auto"
    assert controller.get_conf("ExitNodes") is None
    assert controller.get_hidden_service_conf() == {}
    with pytest.raises(stem.InvalidArguments):
        controller.get_conf("Nonsense")
    with pytest.raises(stem.InvalidArguments):
        controller.get_info("nonsense")
    assert controller.is_alive() and controller.is_newnym_available()
    assert "SafeLogging" in controller.get_info("config/names")
    # Relays, as the consensus has them.
    relays = list(controller.get_network_statuses())
    assert len(relays) == 12 and {"Guard", "Running"} <= set(relays[-1].flags)
    assert controller.get_network_status(relays[0].fingerprint).address == relays[0].address
    guards = controller.get_info("entry-guards").split("\n")
    assert any(" up" in line for line in guards)


def test_circuits_and_streams(daemon, controller, target):
    found = events(controller, EventType.CIRC, EventType.STREAM, EventType.ORCONN, EventType.BW)
    controller.signal(stem.Signal.NEWNYM)
    url = "http://127.0.0.1:%d/" % target.port
    assert fetch(daemon, url) == HELLO
    new = next_event(found, lambda e: e.type == "STREAM" and e.status == "NEW")
    assert new.target == url[7:-1]
    succeeded = next_event(found, lambda e: e.type == "STREAM" and e.status == "SUCCEEDED")
    assert succeeded.id == new.id and succeeded.target == new.target
    circuit = {c.id: c for c in controller.get_circuits()}[succeeded.circ_id]
    assert circuit.status == "BUILT" and len(circuit.path) == 3
    listed = {r.fingerprint for r in controller.get_network_statuses()}
    assert {fingerprint for fingerprint, _ in circuit.path} <= listed
    closed = next_event(found, lambda e: e.type == "STREAM" and e.status == "CLOSED")
    assert closed.id == new.id
    assert next_event(found, lambda e: e.type == "BW" and e.read).written >= 0
    controller.close_circuit(circuit.id)
    gone = next_event(
        found, lambda e: e.type == "CIRC" and e.status == "CLOSED" and e.id == circuit.id)
    assert gone.reason == "REQUESTED"
    with pytest.raises(stem.InvalidArguments):
        controller.close_circuit("7777777")
    # A new one is built before it is needed.
    built = next_event(found, lambda e: e.type == "CIRC" and e.status == "BUILT", 60)
    assert len(built.path) >= 3


def test_circuits_of_a_controller(daemon, controller, target):
    relays = [r.fingerprint for r in controller.get_network_statuses()
              if "Guard" in r.flags][:3]
    number = controller.new_circuit(relays, await_build=True)
    assert [f for f, _ in controller.get_circuit(number).path] == relays
    other = controller.new_circuit(relays[:2], await_build=True)
    assert controller.extend_circuit(other, relays[2:], await_build=True) == other
    assert [f for f, _ in controller.get_circuit(other).path] == relays
    for bad in ("A" * 40, "nickname"):
        with pytest.raises(stem.InvalidRequest):
            controller.new_circuit([bad])
    for number in (number, other):
        controller.close_circuit(number)
    # A stream that waits for more.
    found = events(controller, EventType.STREAM, EventType.ADDRMAP)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        curl = subprocess.Popen(
            ["curl", "-sS", "--socks5-hostname", "127.0.0.1:%d" % daemon.socks,
             "http://127.0.0.1:%d/" % server.getsockname()[1]], stderr=subprocess.DEVNULL)
        with server.accept()[0]:
            stream = next_event(found, lambda e: e.type == "STREAM" and e.status == "SUCCEEDED")
            assert [s.id for s in controller.get_streams()] == [stream.id]
            controller.close_stream(stream.id)
            assert curl.wait(10) != 0
    with pytest.raises(stem.InvalidArguments):
        controller.close_stream("7777777")
    assert controller.msg("RESOLVE relay.test").is_ok()
    mapped = next_event(found, lambda e: e.type == "ADDRMAP")
    assert (mapped.hostname, mapped.destination) == ("relay.test", "127.0.0.1")


def test_configuration(daemon, controller):
    found = events(controller, EventType.CONF_CHANGED, EventType.NOTICE)
    controller.set_conf("MaxCircuitDirtiness", "900")
    assert next_event(found, lambda e: e.type == "CONF_CHANGED").changed == {
        "MaxCircuitDirtiness": ["900"]}
    assert controller.get_conf("MaxCircuitDirtiness") == "900"
    with pytest.raises(stem.InvalidRequest):
        controller.set_conf("MaxCircuitDirtiness", "soon")
    with pytest.raises(stem.InvalidArguments):
        controller.set_conf("Nonsense", "1")
    controller.reset_conf("MaxCircuitDirtiness")
    assert controller.get_conf("MaxCircuitDirtiness") == "600"
    before = controller.get_listeners(stem.control.Listener.SOCKS)
    controller.set_conf("SocksPort", ["auto", "auto IsolateDestAddr"])
    assert len(controller.get_listeners(stem.control.Listener.SOCKS)) == 2
    controller.set_conf("SocksPort", "auto")
    after = controller.get_listeners(stem.control.Listener.SOCKS)
    assert before == after
    next_event(found, lambda e: e.type == "NOTICE" and "Closing the Socks" in e.message)
    # The torrc's again.
    controller.signal(stem.Signal.RELOAD)
    next_event(found, lambda e: e.type == "NOTICE" and "Reloading config" in e.message)


def test_onion_of_a_controller(daemon, controller, client, target):
    """stem's ephemeral services: published, reached by C tor, with the same key again, gone."""
    service = controller.create_ephemeral_hidden_service(
        {80: target.port}, await_publication=True, timeout=60)
    assert service.private_key_type == "ED25519-V3"
    url = "http://%s.onion/" % service.service_id
    # Published means: at one directory.
    assert retry(lambda: curl_ok(client, url, user="first", seconds=20), 60) == HELLO
    assert controller.list_ephemeral_hidden_services() == [service.service_id]
    assert controller.remove_ephemeral_hidden_service(service.service_id)
    assert not controller.remove_ephemeral_hidden_service(service.service_id)
    again = controller.create_ephemeral_hidden_service(
        {80: target.port}, key_type="ED25519-V3", key_content=service.private_key, detached=True,
        await_publication=True, timeout=60)
    assert again.service_id == service.service_id
    assert controller.list_ephemeral_hidden_services(detached=True) == [service.service_id]
    assert retry(lambda: curl_ok(client, url, user="again", seconds=20), 60) == HELLO
    assert controller.remove_ephemeral_hidden_service(again.service_id)


def test_descriptor_events(daemon, controller, tornet, target):
    theirs = tornet.onion_service({80: target.port})
    found = events(controller, EventType.HS_DESC)
    assert fetch(daemon, "http://%s/" % theirs.address) == HELLO
    name = theirs.address[:56]
    next_event(found, lambda e: e.action == "REQUESTED" and e.address == name)
    next_event(found, lambda e: e.action == "RECEIVED" and e.address == name)
    theirs.stop()


def test_owner_takes_it_along(daemon):
    """After TAKEOWNERSHIP, minitor ends with its controller."""
    with Controller.from_port(port=daemon.control) as controller:
        controller.authenticate()
        assert controller.msg("TAKEOWNERSHIP").is_ok()
    assert daemon.wait(15) == 0, daemon.err[-2000:]
    assert not (daemon.folder / "ports").exists()
    wait_for(lambda: not (daemon.folder / "control").exists(), 5)
