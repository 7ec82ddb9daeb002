"""Controllers as they are talk to minitor as to tor: stem, OnionShare, txtorcon, nyx."""

import base64
import fcntl
import json
import os
import pty
import queue
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import stem
import stem.connection
import stem.control
from httptarget import HELLO
from livekit import MINITOR, Program, curl, curl_ok, retry, wait_for
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


def program(name):
    """Where a program of Debian's is, or skip the test."""
    found = shutil.which(name, path="/usr/bin:" + os.environ["PATH"])
    return found or pytest.skip("%s is not installed (tests/setup.sh)" % name)


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


def test_to_russia_with_love(daemon, controller, target, tornet):
    """stem's tutorial: an exit of one's choice, and a path of one's own for each stream."""
    url, found = "http://127.0.0.1:%d/" % target.port, events(controller, EventType.STREAM)
    exits = [r.fingerprint for r in tornet.relays if r.role == "plain"][:3]
    try:
        controller.set_conf("ExitNodes", exits[0])
        controller.signal(stem.Signal.NEWNYM)
        assert fetch(daemon, url) == HELLO
        stream = next_event(found, lambda e: e.status == "SUCCEEDED")
        assert controller.get_circuit(stream.circ_id).path[-1][0] == exits[0]
    finally:
        controller.reset_conf("ExitNodes")
    # Custom path selection.
    number = controller.new_circuit(exits, await_build=True)

    def attach(stream):
        if stream.status == "NEW":
            controller.attach_stream(stream.id, number)

    controller.add_event_listener(attach, EventType.STREAM)
    try:
        controller.set_conf("__LeaveStreamsUnattached", "1")
        assert fetch(daemon, url) == HELLO
        stream = next_event(found, lambda e: e.status == "SUCCEEDED" and e.circ_id == number)
        controller.remove_event_listener(attach)
        # Nobody attaches this one: it waits, and may be left to minitor.
        curl = subprocess.Popen(
            ["curl", "-sS", "--socks5-hostname", "127.0.0.1:%d" % daemon.socks, url],
            stdout=subprocess.PIPE)
        waiting = next_event(found, lambda e: e.status == "NEW" and e.id > stream.id)
        retry(lambda: _is(controller.get_streams()[0].status, "CONTROLLER_WAIT"), 5)
        for circuit, hop, error in (
            ("7777777", None, stem.InvalidRequest), (number, "1", stem.OperationFailed),
            (number, "9", stem.OperationFailed),
        ):
            with pytest.raises(error):
                controller.attach_stream(waiting.id, circuit, hop)
        controller.attach_stream(waiting.id, "0")
        assert curl.communicate(timeout=30)[0] == HELLO
    finally:
        controller.reset_conf("__LeaveStreamsUnattached")
    controller.repurpose_circuit(number, "controller")
    assert controller.get_circuit(number).purpose == "CONTROLLER"
    controller.close_circuit(number, "IfUnused")


def _is(value, wanted):
    assert value == wanted


def test_mapped_addresses(daemon, controller, target, tornet):
    theirs = tornet.onion_service({80: target.port})
    found = events(controller, EventType.ADDRMAP, EventType.STREAM)
    mapped = controller.map_address({
        "0.0.0.0": theirs.address, "site.test": "127.0.0.1", "*.wild.test": "site.test"})
    (virtual,) = [old for old, new in mapped.items() if new == theirs.address]
    assert next_event(found, lambda e: e.type == "ADDRMAP").expiry is None
    assert fetch(daemon, "http://%s/" % virtual) == HELLO
    assert next_event(found, lambda e: e.type == "STREAM" and e.status == "REMAP").target == (
        theirs.address + ":80")
    assert fetch(daemon, "http://a.wild.test:%d/" % target.port) == HELLO
    assert controller.get_info("address-mappings/all").count(" NEVER") == 3
    controller.map_address({old: old for old in mapped})
    assert controller.get_info("address-mappings/all") == ""
    # Fetched by name, and from a directory that was named.
    found = events(controller, EventType.HS_DESC, EventType.HS_DESC_CONTENT)
    name = theirs.address[:56]
    assert controller.msg("HSFETCH " + name).is_ok()
    received = next_event(found, lambda e: e.type == "HS_DESC" and e.action == "RECEIVED")
    assert received.address == name
    # stem itself reads those of version 2 alone.
    content = next_event(found, lambda e: e.type == "HS_DESC_CONTENT").raw_content()
    assert "\nhs-descriptor 3\r\n" in content and "\nsignature " in content
    server = received.directory_fingerprint
    assert controller.msg("HSFETCH %s SERVER=%s" % (name, server)).is_ok()
    again = next_event(found, lambda e: e.type == "HS_DESC" and e.action == "RECEIVED")
    assert again.directory_fingerprint == server
    theirs.stop()


def test_mirror_mirror_and_over_the_river(daemon, controller, client, target, tmp_path):
    """stem's tutorials: descriptors, which are refused as by tor, and a service on disk."""
    for ask in (controller.get_microdescriptors, controller.get_server_descriptors):
        with pytest.raises(stem.ControllerError):
            list(ask())
    assert controller.get_user() and controller.is_user_traffic_allowed().inbound is False
    made = controller.create_hidden_service(
        str(tmp_path / "site"), 80, target_port=target.port)
    assert made.hostname == (tmp_path / "site" / "hostname").read_text().strip()
    url = "http://%s/" % made.hostname
    assert retry(lambda: curl_ok(client, url, user="river", seconds=20), 60) == HELLO
    assert controller.remove_hidden_service(made.path)
    assert controller.get_hidden_service_conf() == {}


def test_down_the_rabbit_hole(daemon, tmp_path):
    """stem's tutorial: its prompt."""
    lines = ["GETINFO version", "GETCONF MaxCircuitDirtiness", "SETCONF Foo=1", "/info", "/quit"]
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [program("tor-prompt"), "-s", daemon.folder / "control", "--run", tmp_path / "lines"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    shown = done.stdout.decode()
    for wanted in ("250-version=" + minitor.TOR_VERSION, "250 MaxCircuitDirtiness=600",
                   "552 Unrecognized option", "We aren't a relay"):
        assert wanted in shown, shown + done.stderr.decode()


@pytest.mark.parametrize("public", [True, False])
def test_onionshare(daemon, client, public, tmp_path):
    """onionshare-cli shares a file through minitor; C tor's client fetches it."""
    data, settings = os.urandom(300000), {
        "connection_type": "control_port", "control_port_port": daemon.control,
        "auth_type": "password", "auth_password": "secret"}
    if not public:
        settings = {"connection_type": "socket_file", "auth_type": "no_auth",
                    "socket_file_path": str(daemon.folder / "control")}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "file").write_bytes(data)
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    arguments = ["--config", tmp_path / "config.json", "--no-autostop-sharing", tmp_path / "file"]
    with Program(["--public"] * public + arguments, home, None,
                 (program("onionshare-cli"),)) as share:
        address = share.wait_out(r"http://([a-z2-7]{56})\.onion\s", 60)[1]
        url = "http://%s.onion/download" % address
        if not public:
            key = share.wait_out(r"Private key: ([A-Z2-7]{52})\s", 10)[1]
            assert curl(client, url, user="stranger", seconds=20).returncode != 0
            control = client.control()
            control.command("ONION_CLIENT_AUTH_ADD %s x25519:%s" % (
                address, base64.b64encode(base64.b32decode(key + "====")).decode()))
            control.close()
        fetched = retry(lambda: curl_ok(client, url, user=address, seconds=20), 60)
        assert fetched == data
        share.interrupt()
    assert "Traceback" not in share.out + share.err


def test_txtorcon(tornet, daemon, target):
    """It reads the state, builds a circuit, has a request attached to that, hosts a service."""
    python = next((path for path in ("/usr/bin/python3", sys.executable) if subprocess.run(
        [path, "-c", "import txtorcon"], stderr=subprocess.DEVNULL).returncode == 0), None)
    if not python:
        pytest.skip("txtorcon is not installed (tests/setup.sh)")
    script = Path(__file__).parent / "with_txtorcon.py"
    # One exits to ports 80 and 443 alone.
    web = next(relay.fingerprint for relay in tornet.relays if relay.role == "web")
    arguments = [script, daemon.folder / "control", daemon.socks, target.port, web]
    with Program(arguments, None, None, (python,)) as done:
        assert done.wait(60) == 0, done.err
        found = json.loads(done.out)
    assert found["relays"] == 12 and found["guards"] and found["pid"] == daemon.pid
    assert found["dirtiness"] == 600 and found["path"] == found["wanted"]
    assert found["attached"] == [found["circuit"]] and found["body"].encode() == HELLO
    assert found["current"] == found["onion"]


def test_nyx(daemon, tmp_path):
    """nyx, in a terminal, shows each of its pages."""
    home = dict(os.environ, TERM="xterm", HOME=str(tmp_path))
    pages = [
        ("", "Bandwidth", "Events"), ("\x1bOC", "Connections", r"\d circuit"),
        ("\x1bOC", "MaxCircuitDirtiness"), ("\x1bOC", "File", "HashedControlPassword"),
        ("\x1bOC", "Control Interpreter"), ("\n", "enter .?/help"),
        ("GETINFO version\n", re.escape(minitor.TOR_VERSION)),
    ]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    nyx = subprocess.Popen(
        [program("nyx"), "-s", str(daemon.folder / "control")], env=home, stdin=theirs,
        stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        for keys, *wanted in pages:
            os.write(ours, keys.encode())
            shown, end = "", time.monotonic() + 30
            while not all(re.search(pattern, shown) for pattern in wanted):
                assert time.monotonic() < end and nyx.poll() is None, (wanted, shown[:1500])
                if select.select([ours], [], [], 0.2)[0]:
                    text = os.read(ours, 65536).decode(errors="replace")
                    shown += re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|[()].|[=>])", "", text)
                    assert "Traceback" not in shown, shown[-3000:]
    finally:
        nyx.terminate()
        nyx.wait()
        os.close(ours)


def test_owner_takes_it_along(daemon):
    """After TAKEOWNERSHIP, minitor ends with its controller."""
    with Controller.from_port(port=daemon.control) as controller:
        controller.authenticate()
        assert controller.msg("TAKEOWNERSHIP").is_ok()
        assert controller.msg("DROPOWNERSHIP").is_ok()
    with Controller.from_port(port=daemon.control) as controller:
        controller.authenticate()
        assert controller.msg("TAKEOWNERSHIP").is_ok()
    assert daemon.wait(15) == 0, daemon.err[-2000:]
    assert not (daemon.folder / "ports").exists()
    wait_for(lambda: not (daemon.folder / "control").exists(), 5)
