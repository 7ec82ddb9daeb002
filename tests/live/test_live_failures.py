"""Relays that die, services that restart, caches that are damaged."""

import os
import shutil
import threading
import time

import pytest
from httptarget import HELLO, payload, sha256hex
from livekit import (
    BIG, MB, busiest, curl, curl_ok, forget, get, introduction_points, minitor, retry, serve, wait_for,
)

import minitor as module


@pytest.fixture(scope="module")
def client(tornet):
    client = tornet.client()
    yield client
    client.stop()


@pytest.fixture(scope="module")
def tor_service(tornet, target):
    service = tornet.onion_service({80: target.port})
    yield service
    service.stop()


RESTARTED = []


@pytest.fixture
def relays(tornet):
    """Kills relays, and starts them again after the test."""
    # C tor does not connect for a minute to what refused it (OR_CONNECT_FAILURE_LIFETIME): relays
    # of the test before are still unreachable until then.
    if RESTARTED:
        time.sleep(max(0, RESTARTED.pop() + 61 - time.monotonic()))
    killed = []

    def kill(*some):
        killed.extend([tornet.kill(relay) for relay in some])
        tornet.settle()

    yield kill
    for relay in killed:
        tornet.restart(relay)
    RESTARTED.append(time.monotonic())


def reachable(client, address, seconds):
    """Assert that a client that knows nothing of the service reaches it within `seconds`."""

    def fetch():
        forget(client)
        assert curl(client, "http://%s/" % address, user="u%d" % time.time_ns(),
                    seconds=15).stdout == HELLO

    retry(fetch, seconds)


def test_restart_with_the_same_key(tornet, target, client, tmp_path):
    with serve(tornet, tmp_path, target.port) as first:
        address = first.address
        assert curl_ok(client, "http://%s/" % address) == HELLO
        assert first.interrupt() == 0, first.err[-2000:]
    tornet.settle(client)
    for end in ("interrupt", "kill"):
        with serve(tornet, tmp_path, target.port) as again:
            assert again.address == address
            # This client still has the descriptor with the introduction points of before.
            retry(lambda: curl_ok(client, "http://%s/" % address, seconds=30), 60)
            reachable(client, address, 30)
            getattr(again, end)()
        tornet.settle(client)


def test_key_moves_to_tor_and_back(tornet, target, client, tmp_path):
    """HSDirs take no descriptor whose revision counter is lower than the one they have."""
    with serve(tornet, tmp_path / "data", target.port) as ours:
        address = ours.address
        assert curl_ok(client, "http://%s/" % address) == HELLO
        ours.interrupt()
    keys = next((tmp_path / "data").rglob("hs_ed25519_secret_key")).parent
    moved = tmp_path / "hs"
    shutil.copytree(keys, moved)
    moved.chmod(0o700)
    service = tornet.onion_service({80: target.port}, hidden_service_dir=str(moved))
    try:
        assert service.address == address
        reachable(client, address, 60)
    finally:
        service.stop()
    shutil.rmtree(keys)
    shutil.copytree(moved, keys)
    with serve(tornet, tmp_path / "data", target.port) as back:
        assert back.address == address
        reachable(client, address, 60)


def _files(folder):
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and "hs_ed25519" not in p.name
            and p.name != "hostname"]


def _flip(data):
    return bytes(b ^ 255 if i % 97 == 50 else b for i, b in enumerate(data))


DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[:len(data) // 2],
    "flipped": _flip,
    "one bit": lambda data: data[:len(data) // 3] + bytes([data[len(data) // 3] ^ 1])
    + data[len(data) // 3 + 1:] if data else data,
    "longer": lambda data: data + b"x" * 100,
    "text": lambda data: b"no such thing\n",
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_damaged_cache(tornet, tor_service, tmp_path, kind):
    """A cache that is damaged, in whole or one file of it, is fetched anew."""
    url, data, out = "http://%s/" % tor_service.address, tmp_path / "data", tmp_path / "out"
    assert get(tornet, data, url, out) == HELLO
    files = _files(data)
    assert files, "nothing is cached"
    for path in files:
        path.write_bytes(DAMAGE[kind](path.read_bytes()))
    assert get(tornet, data, url, out) == HELLO
    for path in _files(data):
        good = path.read_bytes()
        path.write_bytes(DAMAGE[kind](good))
        assert get(tornet, data, url, out) == HELLO, path.name


def test_cache_of_another_network(tornet, tornet_sparse, tor_service, tmp_path):
    """Its authorities are not ours: nothing of it is believed."""
    data, out = tmp_path / "data", tmp_path / "out"
    nobody = "http://%s/" % tor_service.address
    with module.Tor(data_dir=str(data), network=tornet_sparse.network_file):
        pass
    assert get(tornet, data, nobody, out) == HELLO


def test_wrong_authorities(tornet, tmp_path):
    """A consensus that a majority of the given authorities did not sign is refused."""
    text = open(tornet.network_file).read()
    lines = []
    for i, line in enumerate(text.splitlines()):
        if line.startswith("DirAuthority auth0") or line.startswith("DirAuthority auth1"):
            head, _, tail = line.partition("v3ident=")
            line = head + "v3ident=" + "%040X" % (i + 1) + tail[40:]
        lines.append(line)
    wrong = tmp_path / "network"
    wrong.write_text("\n".join(lines) + "\n")

    class Net:
        network_file = str(wrong)

    with minitor(Net, tmp_path / "data", "--get", "http://127.0.0.1:1/") as program:
        wait_for(lambda: not program.running or "ignature" in program.err
                 or "authorit" in program.err, 60, "the refusal")
        assert "Bootstrapped 100%" not in program.err


def test_dead_introduction_point(tornet, target, client, relays, tmp_path):
    with serve(tornet, tmp_path, target.port) as service:
        points = introduction_points(tornet, client, service.address)
        assert points, "no introduction point seen"
        relays(points[0])
        reachable(client, service.address, 90)
        # Every introduction point of the descriptor works, not only the two that lived on.
        deadline = time.monotonic() + 120
        while points[0] in introduction_points(tornet, client, service.address, 4):
            assert time.monotonic() < deadline, "a dead introduction point stays published"
            forget(client)
        for _ in range(5):
            reachable(client, service.address, 40)


def test_guard_of_the_service_dies(tornet, target, client, relays, tmp_path):
    """All circuits of the service go through its guard: it comes back through another."""
    with serve(tornet, tmp_path, target.port) as service:
        url = "http://%s/bytes/%d" % (service.address, 3 * MB)

        assert sha256hex(curl_ok(client, url)) == sha256hex(payload(3 * MB))
        before = _connections(service.pid, tornet)
        assert before, "the service has no link to a relay"
        relays(*before)
        reachable(client, service.address, 120)


def _connections(pid, net):
    """Return the relays that process `pid` has TCP connections to."""
    sockets = set()
    for name in os.listdir("/proc/%d/fd" % pid):
        try:
            sockets.add(os.readlink("/proc/%d/fd/%s" % (pid, name)))
        except OSError:
            pass
    peers = set()
    with open("/proc/%d/net/tcp" % pid) as f:
        for line in f.readlines()[1:]:
            fields = line.split()
            if "socket:[%s]" % fields[9] in sockets and fields[3] == "01":
                number = bytes.fromhex(fields[2].partition(":")[0])
                peers.add(".".join(str(b) for b in reversed(number)))
    return [r for r in net.relays if r.address in peers and r.role != "authority"]


def test_relay_dies_in_mid_transfer_of_ours(tornet, tor_service, target, relays, tmp_path):
    """The stream ends with an error, not silently and not never; the next one works."""
    with module.Tor(data_dir=str(tmp_path / "get"), network=tornet.network_file) as tor:
        for kind in ("onion", "exit"):
            name = tor_service.address if kind == "onion" else "127.0.0.1:%d" % target.port
            base = "http://" + name
            assert tor.http_get(base + "/") == HELLO.decode()
            found = busiest(tornet, lambda: _fetch(tor, base, 6 * MB), 1)
            outcome = []

            def transfer():
                try:
                    outcome.append(len(_fetch(tor, base, 40 * MB)))
                except Exception as e:
                    outcome.append(e)

            thread = threading.Thread(target=transfer)
            thread.start()
            time.sleep(1)
            relays(found[0])
            thread.join(90)
            assert outcome, "the transfer hangs"
            # The relay that was busiest may not be on this path any more; then all of it came.
            assert outcome[0] == 40 * MB or isinstance(outcome[0], Exception)
            tornet.restart(found[0])
            if kind == "exit":
                retry(lambda: _again(tor, base), 60)
        # C tor's own service may need minutes to come back from the loss of a relay: one of ours.
        with serve(tornet, tmp_path / "serve", target.port) as service:
            retry(lambda: _again(tor, "http://" + service.address), 60)


def _fetch(tor, base, size):
    # A relay does not always say that the next one has gone: a silence of this long ends it too.
    with tor.urlopen(base + "/bytes/%d" % size, timeout=20) as response:
        data = response.read()
    assert len(data) == size
    return data


def _again(tor, base):
    try:
        assert tor.http_get(base + "/") == HELLO.decode()
    except module.TorError as e:
        raise AssertionError(e)


def test_relay_dies_in_mid_transfer_of_the_service(tornet, target, client, relays, tmp_path):
    with serve(tornet, tmp_path / "serve", target.port) as service:
        url = "http://%s/bytes/%d" % (service.address, 40 * MB)
        curl_ok(client, "http://%s/" % service.address)
        results = []
        thread = threading.Thread(target=lambda: results.append(curl(client, url)))
        found = busiest(tornet, lambda: (thread.start(), time.sleep(2)), 1)
        relays(found[0])
        thread.join(150)
        assert results, "the transfer hangs"
        down = retry(lambda: curl_ok(client, "http://%s/bytes/%d" % (service.address, BIG),
                                     seconds=60), 120)
        assert sha256hex(down) == sha256hex(payload(BIG))


def test_get_while_relays_are_down(tornet, target, relays, tmp_path):
    """Two relays of the consensus do not answer: service and client find other paths."""
    with serve(tornet, tmp_path / "serve", target.port) as service:
        relays(tornet.relay("relay7"), tornet.relay("relay1family"))
        for i in range(3):
            folder = tmp_path / str(i)
            assert get(tornet, folder / "data", "http://%s/" % service.address,
                       tmp_path / "out", seconds=120) == HELLO
