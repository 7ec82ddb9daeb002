"""Section 18 over Tor: links between nodes whose circuits, relays and tor processes end."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from livekit import wait_for

import minitor

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
COUNT = 300


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def tors(tornet, tmp_path_factory):
    """Two Tors, each with a BlockingNode: (here, there)."""
    nodes = []
    for name in ("here", "there"):
        folder = tmp_path_factory.mktemp(name)
        tor = minitor.Tor(str(folder), str(tornet.network_file))
        key = minitor.load_identity(str(folder / "key"))
        node = minitor.BlockingNode(key, minitor.TorTransport(tor, key), tor=tor)
        nodes.append((tor, node))
    yield nodes
    for tor, node in nodes:
        node.close()
        tor.close()


def both(tors, link, back, during):
    """Send COUNT messages each way while `during()` runs: each comes once, in order."""
    heard = [], []

    async def end(link, heard):
        async def say():
            for i in range(COUNT):
                await link.send(i.to_bytes(4, "big") + os.urandom(3000))
                await asyncio.sleep(0.01)

        async def hear():
            while len(heard) < COUNT:
                heard.append(int.from_bytes((await link.receive(90))[:4], "big"))

        await asyncio.gather(say(), hear())
        await link.flush(60)

    futures = [asyncio.run_coroutine_threadsafe(end(link.link, h), tor._loop)
               for (tor, _), link, h in zip(tors, (link, back), heard)]
    during()
    for future in futures:
        future.result(120)
    # Sent 300, received 300; lost 0, twice 0.
    assert heard[0] == heard[1] == list(range(COUNT))


@pytest.fixture(scope="module")
def links(tors):
    (_, here), (_, there) = tors
    link = here.link(there.address).ready(90)
    back = next(there)
    assert back.peer == here.key
    return link, back


def circuit(link):
    return link.link._pipe.stream._writer.circuit


def test_a_link_is_back_soon_after_its_circuit_is_cut(tors, links):
    (tor, here), (_, there) = tors
    times = []

    def cut():
        for _ in range(3):
            time.sleep(0.5)
            start = time.monotonic()
            tor.run(tor._tor.open_connection(there.address.partition(":")[0], minitor.PEER_PORT, 60,
                                             object()))
            fresh = time.monotonic() - start
            pipe = links[0].link._pipe
            tor._loop.call_soon_threadsafe(circuit(links[0]).close)
            start = time.monotonic()
            wait_for(lambda: links[0].link._pipe not in (pipe, None), 60, "the link")
            times.append((time.monotonic() - start, fresh))

    both(tors, *links, cut)
    print("back after, and a new circuit takes:", times)


@pytest.fixture
def relays(tornet):
    """Kills relays, and starts them again after the test."""
    killed = []
    yield lambda relay: killed.append(tornet.kill(relay))
    for relay in killed:
        tornet.restart(relay)


def test_a_link_survives_the_loss_of_its_relays(tornet, tors, links, relays):
    def kill():
        time.sleep(1)
        # Neither the guard, which both share with all that comes after, nor an authority.
        path = [tornet.relay(relay.rsa_id.hex().upper()) for relay in circuit(links[0]).path[1:]]
        relays([relay for relay in path if relay.role != "authority"][-1])

    both(tors, *links, kill)


def test_a_link_through_a_running_tor_survives_its_end(tornet, tors):
    (_, (tor, there)), port = tors, free_port()
    client = tornet.client("SocksPort 127.0.0.1:%d ExtendedErrors" % port)
    with minitor.BlockingNode(b"s" * 32, minitor.SocksTransport(str(port))) as node:
        link = node.link(there.address).ready(90)
        back = next(there)
        assert back.peer == node.key and link.link._pipe._out is None

        def restart():
            time.sleep(1)
            client.stop()
            wait_for(lambda: isinstance(link.link.error, minitor.ProxyError), 30, "a refused dial")
            client.start()

        both(((node, node), (tor, there)), link, back, restart)
        # What it says of services that are not there.
        nobody = minitor.onion_address(minitor.load_identity(b"n" * 32)[1])
        with pytest.raises(minitor.PeerError) as e:
            node.link(nobody, retry=False).ready(90)
        assert e.value.reason >= 0xF0
    client.stop()


def test_a_node_behind_a_running_tor(tornet, tors, tmp_path):
    (tor, here), port = tors[0], free_port()
    service = tornet.onion_service({minitor.PEER_PORT: port})
    key = minitor.load_identity(service.hidden_service_dir)
    transport = minitor.SocksTransport("1", "127.0.0.1:%d" % port, service.address)
    with minitor.BlockingNode(key, transport) as node:
        link = here.link(node.address).ready(90)
        link.send(b"to C tor's service")
        assert next(node).receive(30) == b"to C tor's service"
        link.close()
    service.stop()


def test_chat(tornet, tmp_path):
    def chat(name, *arguments):
        environment = dict(os.environ, MINITOR_NETWORK=str(tmp_path / name), PYTHONUNBUFFERED="1")
        (tmp_path / name).write_text(Path(tornet.network_file).read_text())
        return subprocess.Popen(
            [sys.executable, str(EXAMPLES / "chat.py"), *arguments], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    addresses = [chat(name).communicate(timeout=30)[0].strip() for name in "ab"]
    first = chat("a", addresses[1])
    # Nobody is there yet.
    first.stdin.write("hello\n\x1b[2J\n")
    first.stdin.flush()
    second = chat("b", addresses[0])
    try:
        assert second.stdout.readline() == "> hello\n"
        assert second.stdout.readline() == "> ?[2J\n"
        out, err = second.communicate("so long\n", timeout=90)
        assert second.returncode == 0, err
        assert first.stdout.readline() == "> so long\n"
        out, err = first.communicate(timeout=60)
        assert first.returncode == 0 and "Traceback" not in err, err
    finally:
        first.kill()
        second.kill()
