"""What compress.py builds, in the network of real relays: host builds, and a board's .mpy."""

import os
import sys
from pathlib import Path

import pytest
from httptarget import HELLO, payload
from livekit import ADDRESS, Program, curl_ok

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "board")]
pytest.importorskip("python_minifier")

import builds  # noqa: E402
import runtimes  # noqa: E402


@pytest.fixture(scope="module")
def client(tornet):
    client = tornet.client()
    yield client
    client.stop()


def test_service_and_client(tornet, target, tmp_path):
    """The packed service build hosts, the packed client build fetches."""
    for what in ("service", "client"):
        (tmp_path / what).mkdir()
        (tmp_path / what / "minitor.py").write_bytes(builds.build(what).packed())

    def start(what, *arguments):
        line = [tmp_path / what / "minitor.py", "--network", tornet.network_file]
        return Program(line + ["--data-dir", tmp_path / (what + "-data")] + list(arguments))

    with start("service", "--serve", target.port) as service:
        address = service.wait_out(ADDRESS, 90)[1]
        url = "http://%s/bytes/300000?seed=3" % address
        with start("client", "--get", url, "-o", tmp_path / "out") as program:
            assert program.wait(90) == 0, program.err[-3000:]
        assert (tmp_path / "out").read_bytes() == payload(300000, 3)
        assert service.interrupt() == 0


def test_board(tornet, target, client, tmp_path):
    """C tor's client opens what the board build hosts under 32-bit MicroPython."""
    builds.write(builds.build("board"), tmp_path, "x86")
    try:
        line = runtimes.micropython("32") + ["-X", "heapsize=1m", str(HERE / "board_host.py")]
    except runtimes.Missing as e:
        pytest.fail(str(e), pytrace=False)
    line += [str(tornet.network_file), str(tmp_path / "data"), str(target.port)]
    environment = dict(os.environ, MICROPYPATH="%s:.frozen" % tmp_path)
    with Program(line, environment, interpreter=()) as board:
        address = board.wait_out(ADDRESS, 240)[1]
        assert curl_ok(client, "http://%s/" % address) == HELLO
        body = curl_ok(client, "http://%s/bytes/100000?seed=4" % address, user="b")
        assert body == payload(100000, 4)
        assert board.running, board.out[-2000:] + board.err[-2000:]
