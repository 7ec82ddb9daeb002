"""The board's build under 32-bit MicroPython with little memory, and more clients than it can bear."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from httptarget import HELLO, payload
from livekit import ADDRESS, Program, curl_ok, retry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "board"))

import builds  # noqa: E402
import runtimes  # noqa: E402

HERE = Path(__file__).resolve().parent
HEAP = os.environ.get("MINITOR_TEST_HEAP", "160k")


@pytest.fixture(scope="module")
def client(tornet):
    client = tornet.client()
    yield client
    client.stop()


def test_more_clients_than_memory(tornet, target, client, tmp_path):
    """Some are refused, one reads nothing; afterwards the service answers as before."""
    (tmp_path / "minitor.mpy").write_bytes(builds.build("board").mpy("x86"))
    line = runtimes.micropython("32") + ["-X", "heapsize=" + HEAP, str(HERE / "board_host.py")]
    line += [str(tornet.network_file), str(tmp_path / "data"), str(target.port)]
    environment = dict(os.environ, MICROPYPATH="%s:.frozen" % tmp_path)
    with Program(line, environment, interpreter=()) as board:
        address = board.wait_out(ADDRESS, 240)[1]
        url = "http://%s" % address
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
                assert body in (payload(20000, n), payload(20000, n)[:len(body)])
                answered += one.returncode == 0
                refused += one.returncode != 0
            slow.kill()
            slow.wait()
        print("%d answered, %d not" % (answered, refused), board.err[-3000:], board.out[-300:])
        assert board.running and answered
        deadline = time.monotonic() + 120
        while True:
            try:
                assert curl_ok(client, url + "/", user="after") == HELLO
                break
            except AssertionError:
                assert time.monotonic() < deadline
        assert board.running
