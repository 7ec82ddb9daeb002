"""MicroPython, 32-bit (an ESP32's word size) and 64-bit, in the network of real relays."""

import sys
from pathlib import Path

import pytest
from httptarget import HELLO, payload, sha256hex
from livekit import ADDRESS, Program, both_ways, curl_ok, forget, retry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "board"))

import runtimes  # noqa: E402

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def client(tornet):
    client = tornet.client()
    yield client
    client.stop()


def start(bits, heap, script, *arguments):
    try:
        line, environment = runtimes.command(bits, HERE / script, *arguments, heap=heap)
    except runtimes.Missing as e:
        pytest.fail(str(e), pytrace=False)
    return Program(line, environment, interpreter=())


@pytest.mark.parametrize("bits,heap", [("32", "1m"), ("64", "2m")])
def test_board_hosts(tornet, target, client, tmp_path, bits, heap):
    """C tor's client opens a service that MicroPython hosts."""
    with start(bits, heap, "board_host.py", tornet.network_file, tmp_path / "data",
               target.port) as board:
        address = board.wait_out(ADDRESS, 240)[1]
        assert curl_ok(client, "http://%s/" % address) == HELLO
        (tmp_path / "line").write_bytes(b"a line\n")
        assert curl_ok(client, "telnet://%s:7" % address, "--upload-file",
                       str(tmp_path / "line")) == b"the board read a line\n"
        both_ways(client, "http://" + address, 200000, tmp_path)
        for i in range(5):
            body = curl_ok(client, "http://%s/bytes/20000?seed=%d" % (address, i), user="b%d" % i)
            assert body == payload(20000, i)
        forget(client)
        retry(lambda: curl_ok(client, "http://%s/" % address, user="again"), 30)
        assert board.running, board.out[-2000:] + board.err[-2000:]


def test_board_restarts_with_the_same_key(tornet, target, client, tmp_path):
    addresses = []
    for _ in range(2):
        with start("32", "1m", "board_host.py", tornet.network_file, tmp_path / "data",
                   target.port) as board:
            addresses.append(board.wait_out(ADDRESS, 240)[1])
            forget(client)
            retry(lambda: curl_ok(client, "http://%s/" % addresses[0], seconds=30), 60)
        tornet.settle(client)
    assert addresses[0] == addresses[1]


@pytest.mark.parametrize("bits,heap", [("32", "1m"), ("64", "2m")])
def test_board_fetches(tornet, target, tmp_path, bits, heap):
    """MicroPython opens a service that C tor hosts."""
    service = tornet.onion_service({80: target.port})
    try:
        with start(bits, heap, "board_get.py", tornet.network_file, tmp_path / "data",
                   service.address, 80, "/bytes/300000") as board:
            size, digest = board.wait_out(r"fetched (\d+) (\w+)", 240).groups()
            assert (int(size), digest) == (300000, sha256hex(payload(300000)))
            assert board.wait(30) == 0, board.out[-2000:] + board.err[-2000:]
    finally:
        service.stop()
