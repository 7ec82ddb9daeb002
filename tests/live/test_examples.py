"""The programs in examples/, in the private network, as processes of their own."""

import json
import shutil
import socket
from pathlib import Path

import minitor
import pytest
from livekit import ADDRESS, Program

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def environment(tornet, tmp_path):
    """The network, and a data folder of this test's own: the default one of FILE.minitor."""
    network = tmp_path / "network"
    shutil.copy(tornet.network_file, network)
    return {"MINITOR_NETWORK": str(network)}


def fetch(environment, url):
    with Program([EXAMPLES / "fetch_page.py", url], environment) as program:
        assert program.wait(90) == 0, program.err
        return program.out


def started(arguments, environment, cwd=None):
    program = Program(arguments, environment, cwd)
    try:
        program.address = program.wait_out(ADDRESS, 90)[1]
    except BaseException:
        program.kill()
        raise
    return program


def test_fetch_page(environment, target):
    assert fetch(environment, "http://127.0.0.1:%d/" % target.port) == "hello from behind the onion\n"


def test_fetch_page_says_what_is_wrong(environment):
    with Program([EXAMPLES / "fetch_page.py", "http://%s.onion/" % ("a" * 56)], environment) as program:
        assert program.wait(90) == 1
        assert program.err.splitlines()[-1].startswith("fetch_page: ")
        assert "Traceback" not in program.err


def test_host_page(environment):
    with started([EXAMPLES / "host_page.py"], environment) as program:
        assert program.out == program.address + "\n"
        assert fetch(environment, program.address).startswith("You are visitor 1 in ")
        assert fetch(environment, program.address).startswith("You are visitor 2 in ")
        assert program.interrupt() == 0 and program.err == ""


def test_host_asyncio_app(environment, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with started([EXAMPLES / "host_asyncio_app.py", port], environment) as program:
        with socket.create_connection(("127.0.0.1", port), 10) as local:
            local.sendall(b"I am here\n")
            while local.recv(1000):
                pass
        with minitor.Tor(str(tmp_path / "data"), environment["MINITOR_NETWORK"]) as tor:
            with tor.create_connection((program.address, 7000), timeout=60) as visitor:
                said = b""
                while b"Your line: " not in said:
                    said += visitor.recv(1000)
                assert said == b"> I am here\nYour line: "
                visitor.sendall(b"So am I\n")
                assert visitor.recv(1000) == b"Thank you.\n"
                assert visitor.recv(1000) == b""
        assert program.interrupt() == 0


def test_microdot_app(environment, tmp_path):
    pytest.importorskip("microdot", reason="python -m pip install microdot")
    with started([EXAMPLES / "microdot_app.py"], environment) as program:
        with minitor.Tor(str(tmp_path / "data"), environment["MINITOR_NETWORK"]) as tor:
            base = "http://" + program.address
            assert "<h1>0 notes</h1>" in tor.http_get(base)
            with tor.urlopen(base + "/notes", data="läuft".encode()) as response:
                assert response.status == 201
            assert json.loads(tor.http_get(base + "/notes")) == ["läuft"]
            with pytest.raises(minitor.StreamError, match="404"):
                tor.http_get(base + "/nothing")
        assert program.interrupt() == 0


def test_vendored(environment, tmp_path):
    shutil.copytree(EXAMPLES / "vendored" / "onionsay", tmp_path / "site" / "onionsay")
    package = tmp_path / "site" / "onionsay"
    # As the README there says.
    shutil.copy(ROOT / "minitor.py", package / "_minitor.py")
    with started(["-m", "onionsay", "serve"], environment, tmp_path / "site") as program:
        arguments = ["-m", "onionsay", "read", program.address]
        with Program(arguments, environment, tmp_path / "site") as reader:
            assert reader.wait(90) == 0, reader.err
            assert reader.out == "Hello from inside a package.\n"
        assert program.interrupt() == 0
