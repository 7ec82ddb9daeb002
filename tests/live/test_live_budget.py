"""The board's build under 32-bit MicroPython with little memory, and more clients than it can bear."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from httptarget import payload
from livekit import ADDRESS, Program, curl_ok, retry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "board"))

import builds  # noqa: E402
import runtimes  # noqa: E402

HERE = Path(__file__).resolve().parent
HEAP = os.environ.get("MINITOR_TEST_HEAP", "400k")


@pytest.fixture(scope="module")
def client(tornet):
    client = tornet.client()
    yield client
    client.stop()


@pytest.fixture(scope="module")
def board(tornet, target, tmp_path_factory):
    """The board's build, hosting; its `address`."""
    folder = tmp_path_factory.mktemp("board")
    for name, content in builds.build("board").modules("x86"):
        (folder / name).write_bytes(content)
    line = runtimes.micropython("32") + ["-X", "heapsize=" + HEAP, str(HERE / "board_host.py")]
    line += [str(tornet.network_file), str(folder / "data"), str(target.port)]
    environment = dict(os.environ, MICROPYPATH="%s:.frozen" % folder)
    with Program(line, environment, interpreter=()) as board:
        board.address = board.wait_out(ADDRESS, 240)[1]
        yield board


def test_a_flood_costs_one_stream(tornet, board, tmp_path):
    """A client that heeds no window loses the stream, and nothing else on its circuit."""
    line = [HERE / "flood.py", tornet.network_file, tmp_path / "flood", board.address]
    environment = {"PYTHONPATH": str(HERE.parent.parent)}
    with Program(line, environment) as flood:
        flood.wait_out(r"lost the stream: 11\nthe board read a line\n", 180)
    assert board.running


def test_more_clients_than_memory(board, client):
    """Some are refused, one reads nothing; afterwards the service answers as before."""
    url = "http://%s" % board.address
    retry(lambda: curl_ok(client, url + "/"), 60)
    proxy = ["curl", "-sS", "-m", "60", "--proxy"]
    socks = "socks5h://u%%d:x@127.0.0.1:%d" % client.socks_port
    answered = refused = 0
    for _ in range(2):
        # A circuit for each user, and one that takes 1 KB a second.
        slow = subprocess.Popen(proxy + [socks % 99, "--limit-rate", "1k", "-o", os.devnull,
                                         url + "/bytes/1000000"])
        load = [subprocess.Popen(proxy + [socks % n, url + "/bytes/20000?seed=%d" % n],
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                for n in range(12)]
        for n, one in enumerate(load):
            body = one.communicate()[0]
            assert body == payload(20000, n)[: len(body)]
            answered += one.returncode == 0
            refused += one.returncode != 0
        slow.kill()
        slow.wait()
    how = "%d answered, %d not; it ended with %s" % (answered, refused, board.process.poll())
    print(how, board.err[-3000:])
    assert board.running and answered, how
    retry(lambda: curl_ok(client, url + "/", user="after"), 120)
    assert board.running
