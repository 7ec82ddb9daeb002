"""Every pair of client and service through real relays, 20 MB each way, with checksums."""

import socket

import pytest
from httptarget import HELLO, payload
from livekit import (
    BIG, MB, PORTABLE, WORKER, ADDRESS, Program, both_ways, curl, curl_ok, get, minitor,
    serve, wait_for, work,
)

import minitor as module

AES = pytest.mark.parametrize("env", [{}, PORTABLE], ids=["aes", "portable-aes"])


@pytest.fixture(scope="module")
def client(tornet):
    """C tor's client."""
    client = tornet.client()
    yield client
    client.stop()


@pytest.fixture(scope="module")
def tor_service(tornet, target):
    """A service that C tor hosts, at port 80 and 8081."""
    service = tornet.onion_service({80: target.port, 8081: target.port})
    yield service
    service.stop()


@pytest.fixture(scope="module")
def our_service(tornet, target, tmp_path_factory):
    """A service that minitor.py --serve PORT hosts."""
    with serve(tornet, tmp_path_factory.mktemp("serve"), target.port) as program:
        yield program


@pytest.fixture(scope="module")
def tor(tornet, tmp_path_factory):
    """A blocking Tor in this process."""
    folder = tmp_path_factory.mktemp("tor")
    with module.Tor(data_dir=str(folder), network=tornet.network_file) as tor:
        yield tor


def test_private_network_works(client, tor_service, target):
    """C tor with C tor: what fails here is no fault of minitor."""
    assert curl_ok(client, "http://%s/" % tor_service.address) == HELLO
    assert curl_ok(client, "http://127.0.0.1:%d/" % target.port) == HELLO


@AES
def test_tor_client_to_our_service(tornet, target, client, tmp_path, env):
    with serve(tornet, tmp_path / "serve", target.port, env=env) as program:
        both_ways(client, "http://" + program.address, BIG, tmp_path)
        assert program.interrupt() == 0, program.err[-2000:]


@AES
def test_our_client_to_tor_service(tornet, tor_service, tmp_path, env):
    url = "http://%s/echo" % tor_service.address
    assert work(tornet, tmp_path, "echo", url, BIG, env=env)["errors"] == []


@AES
def test_our_client_to_our_service(tornet, our_service, tmp_path, env):
    url = "http://%s/echo" % our_service.address
    assert work(tornet, tmp_path, "echo", url, BIG, env=env)["errors"] == []


@AES
def test_our_client_to_exit(tornet, target, tmp_path, env):
    url = "http://127.0.0.1:%d/echo" % target.port
    assert work(tornet, tmp_path, "echo", url, BIG, env=env)["errors"] == []


def test_api_host(tornet, target, client, tmp_path):
    """A service from the API, in a process of its own; SIGTERM ends it cleanly."""
    program = Program([WORKER, tmp_path, "host", target.port],
                      {"MINITOR_NETWORK": tornet.network_file})
    with program:
        address = program.wait_out(ADDRESS, 60)[1]
        both_ways(client, "http://" + address, MB, tmp_path)
        program.process.terminate()
        assert program.wait(15) == 0, program.err[-2000:]


def test_get_to_file(tornet, tor_service, tmp_path):
    body = get(tornet, tmp_path / "data", "http://%s:8081/bytes/3000000" % tor_service.address,
               tmp_path / "file")
    assert body == payload(3000000)


def test_host_prints_the_page(tornet, tor_service, tmp_path):
    with minitor(tornet, tmp_path, "--host", tor_service.address) as program:
        assert program.wait(60) == 0, program.err[-2000:]
        assert HELLO.decode() in program.out
        assert "Bootstrapped 100% (done): Done" in program.err


def test_get_of_what_is_not_there(tornet, tor_service, tmp_path):
    """No service, no page, no port: one line on standard error and a status."""
    key = module.ed25519_public(module.ed25519_expand(bytes(32)))
    nobody = "http://" + module.onion_address(key) + "/"
    for url in (nobody, "http://%s/none" % tor_service.address,
                "http://%s:99/" % tor_service.address):
        with minitor(tornet, tmp_path, "--get", url) as program:
            assert program.wait(120) not in (0, 2), url
            assert "Traceback" not in program.err
            assert not program.out


def test_serve_page_and_folder(tornet, client, tmp_path):
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "index.html").write_text("<p>from a folder</p>")
    (tmp_path / "public" / "data").write_bytes(payload(MB))
    (tmp_path / "secret").write_text("secret")
    with serve(tornet, tmp_path / "one") as page, \
            serve(tornet, tmp_path / "two", tmp_path / "public") as folder:
        assert b"It works" in curl_ok(client, "http://%s/" % page.address)
        assert b"from a folder" in curl_ok(client, "http://%s/" % folder.address)
        assert curl_ok(client, "http://%s/data" % folder.address) == payload(MB)
        for path in ("/../secret", "/%2e%2e/secret", "/..%2fsecret", "//secret"):
            done = curl(client, "http://%s%s" % (folder.address, path), "--path-as-is")
            assert b"secret" not in done.stdout, path
        assert page.interrupt() == 0 and folder.interrupt() == 0


def test_blocking_api(tor, tor_service, target):
    assert tor.http_get("http://%s/" % tor_service.address) == HELLO.decode()
    assert tor.http_get(tor_service.address) == HELLO.decode()
    assert tor.http_get("http://127.0.0.1:%d/" % target.port) == HELLO.decode()
    with tor.urlopen("http://%s/bytes/2000000" % tor_service.address) as response:
        assert response.read() == payload(2000000)
    with pytest.raises(module.TorError):
        tor.http_get("http://%s/none" % tor_service.address)
    with pytest.raises(module.AddressError):
        tor.http_get("http://%s.onion/" % ("a" * 56))


def test_real_socket(tor, tor_service):
    sock = tor.create_connection((tor_service.address, 80), timeout=60)
    with sock:
        assert isinstance(sock, socket.socket) and sock.fileno() >= 0
        sock.sendall(b"GET /bytes/100000 HTTP/1.0\r\n\r\n")
        data = b""
        while True:
            piece = sock.recv(65536)
            if not piece:
                break
            data += piece
    assert data.endswith(payload(100000))


def test_resolve(tor):
    assert tor.resolve("some.name.test") == ["127.0.0.1"]
    with pytest.raises(module.TorError):
        tor.resolve("no.such.name")


def test_exit_resolves_the_name(tor, target):
    assert tor.http_get("http://target.test:%d/" % target.port) == HELLO.decode()
    with pytest.raises(module.TorError):
        tor.http_get("http://no.such.name:%d/" % target.port)


def test_targets_of_a_service(tor, tornet, target, client, tmp_path):
    """A coroutine, a UNIX socket, a TCP port, each at a port of one service; and no other."""

    async def handler(reader, writer):
        name = await reader.readline()
        writer.write(b"hello " + name)
        await writer.drain()
        writer.close()

    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        service = tor.create_onion_service(
            {7: handler, 8: "unix:" + path, 80: target.port}, key_dir=str(tmp_path / "keys"))
        try:
            assert curl_ok(client, "http://%s/" % service.address) == HELLO
            greeting = curl_ok(client, "telnet://%s:7" % service.address, "--upload-file",
                               str(_file(tmp_path, b"minitor\n")))
            assert greeting == b"hello minitor\n"
            sock = tor.create_connection((service.address, 8), timeout=60)
            with sock, listener.accept()[0] as inner:
                inner.sendall(b"from a unix socket\n")
                assert sock.recv(100) == b"from a unix socket\n"
            with pytest.raises(module.TorError):
                tor.create_connection((service.address, 9), timeout=60)
        finally:
            service.close()
    _modes(tmp_path / "keys")


def _file(folder, data):
    (folder / "input").write_bytes(data)
    return folder / "input"


def _modes(folder):
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in ("hs_ed25519_secret_key", "hs_ed25519_public_key", "hostname"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600, name


def test_end_of_stream_is_kept(tor, tmp_path):
    """No byte that was sent before END is lost, in either direction."""
    received = []

    async def takes(reader, writer):
        received.append(await reader.read())
        writer.close()

    async def gives(reader, writer):
        writer.write(payload(300000))
        await writer.drain()
        writer.close()

    service = tor.create_onion_service({1: takes, 2: gives}, key_dir=str(tmp_path / "keys"))
    try:
        for i in range(3):
            with tor.create_connection((service.address, 1), timeout=60) as sock:
                sock.sendall(payload(500000, i))
            wait_for(lambda: len(received) > i, 30, "the end of the stream")
            assert received[i] == payload(500000, i)
            with tor.create_connection((service.address, 2), timeout=60) as sock:
                data = b""
                while True:
                    piece = sock.recv(1 << 16)
                    if not piece:
                        break
                    data += piece
            assert data == payload(300000)
    finally:
        service.close()


def test_fifty_clients_at_once(tornet, our_service, client, tmp_path):
    """Fifty circuits of C tor's client to our service at once."""
    import concurrent.futures

    def one(i):
        url = "http://%s/bytes/200000?seed=%d" % (our_service.address, i % 4)
        done = curl(client, url, user="client%d" % i, seconds=150)
        return done.stdout == payload(200000, i % 4), done.stderr

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        results = list(pool.map(one, range(50)))
    assert [error for good, error in results if not good] == []


def test_fifty_streams_at_once(tornet, tor_service, tmp_path):
    """Fifty streams of our client on one rendezvous circuit."""
    url = "http://%s/echo" % tor_service.address
    assert work(tornet, tmp_path, "echo", url, 200000, 50)["errors"] == []


def test_served_nothing_twice(our_service, target, client):
    """A page that is fetched once is served once."""
    curl_ok(client, "http://%s/?once" % our_service.address)
    assert target.served["/?once"] == 1
