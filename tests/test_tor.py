"""AsyncTor and Tor over a network of one process: circuits whose streams are TCP connections."""

import asyncio
import gc
import http.client
import os
import socket
import ssl
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import minitor
import pytest


class FakeStream:
    """A TCP connection with the methods of a Tor stream."""

    def __init__(self, reader, writer):
        self.read, self.readuntil = reader.read, reader.readuntil
        self.write, self.drain, self.close = writer.write, writer.drain, writer.close


class FakeCircuit:
    closed, since = False, 0

    def __init__(self, tor):
        self.tor = tor

    async def open_stream(self, command, body, seconds):
        if command == minitor.RESOLVE:
            return await self.resolve(body)
        host, port = body.partition(b":")[0].decode(), minitor.parse_begin(body)
        self.tor.asked.append((host, port))
        if self.tor.failures:
            raise self.tor.failures.pop(0)
        return FakeStream(*await asyncio.open_connection("127.0.0.1", self.tor.where(port)))

    async def resolve(self, body):
        assert body == b"example.com\0"
        if self.tor.failures:
            raise self.tor.failures.pop(0)
        stream = minitor.SimpleNamespace(circuit=self, stream_id=7, opened=minitor.Promise())
        stream.opened.set(self.tor.answer)
        self.streams = {7: stream}
        return stream


AsyncTor = minitor.AsyncTor


class FakeTor(AsyncTor):
    """AsyncTor whose exits lead to this machine: `ports` maps port 80, 443, … to local ones."""

    ports = {}
    made = []

    def __init__(self, *args):
        AsyncTor.__init__(self, *args)
        self.asked, self.failures, self.circuits, self.answer = [], [], [], b""
        self.closed = False
        FakeTor.made.append(self)

    def where(self, port):
        return self.ports.get(port, port)

    async def _bootstrap(self):
        self.directory._report(100, "done", "Done")

    async def _circuit(self, key, port, isolation=None):
        self.circuits.append(FakeCircuit(self))
        return self.circuits[-1]

    async def aclose(self):
        self.closed = True
        await AsyncTor.aclose(self)


class Pages(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **fields):
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def raw(self, data):
        self.wfile.write(data)
        self.close_connection = True

    def do_GET(self):
        self.server.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        path = self.path.partition("?")[0]
        if path == "/latin":
            self.reply(200, "größer".encode("latin-1"), Content_Type="text/plain; charset=latin-1")
        elif path == "/odd":
            self.reply(200, b"odd", Content_Type="text/plain; charset=klingon")
        elif path == "/chunks":
            self.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                     b"5\r\nhello\r\n6;x=y\r\n there\r\n0\r\nTrailer: x\r\n\r\n")
        elif path == "/until-end":
            self.raw(b"HTTP/1.0 200 OK\r\n\r\nto the end")
        elif path == "/short":
            self.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
        elif path == "/endless":
            self.raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000000)
        elif path == "/headers":
            self.raw(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 100000)
        elif path == "/half-chunk":
            self.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhello")
        elif path == "/without-end":
            self.raw(b"HTTP/1.0 200 OK\r\n\r\n")
            for _ in range(70):
                self.wfile.write(bytes(1 << 20))
        elif path == "/garbage":
            self.raw(b"SSH-2.0-OpenSSH\r\n\r\n")
        elif path == "/silence":
            time.sleep(3)
            self.reply(200)
        elif path == "/redirect":
            self.reply(302, Location="/final?a=b")
        elif path == "/away":
            self.reply(302, Location="http://other.example/final")
        elif path == "/loop":
            self.reply(302, Location="/loop")
        elif path == "/ftp":
            self.reply(302, Location="ftp://other.example/x")
        elif path == "/file":
            self.reply(302, Location="file:///etc/passwd")
        elif path == "/data":
            self.reply(302, Location="data:text/plain,x")
        elif path == "/slow-redirect":
            self.raw(b"HTTP/1.1 302 Found\r\nLocation: /final\r\n\r\nand")
            time.sleep(3)
        elif path == "/missing":
            self.reply(404, b"nothing here")
        else:
            self.reply(200, self.path.encode(), Content_Type="text/plain")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        if self.path == "/303":
            self.reply(303, Location="/final")
        elif self.path == "/307":
            self.reply(307, Location="/echo")
        else:
            self.reply(200, body)


@pytest.fixture(scope="module")
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tor(monkeypatch, tmp_path, web):
    monkeypatch.delenv("MINITOR_NETWORK", raising=False)
    monkeypatch.setattr(minitor, "AsyncTor", FakeTor)
    monkeypatch.setattr(FakeTor, "ports", {80: web.server_address[1]})
    with minitor.Tor(str(tmp_path / "data")) as tor:
        yield tor


def test_data_dir_is_private(tor, tmp_path):
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_http_get(tor):
    assert tor.http_get("example.com") == "/"
    assert tor.http_get("http://example.com/a%20b?c=d&e#f") == "/a%20b?c=d&e"
    assert tor.http_get("HTTP://EXAMPLE.com:80/%41?http://x") == "/%41?http://x"
    assert tor.http_get("http://example.com/latin") == "größer"
    with pytest.raises(minitor.TorError, match="klingon"):
        tor.http_get("http://example.com/odd")
    assert tor.http_get("http://example.com/chunks") == "hello there"
    assert tor.http_get("http://example.com/until-end") == "to the end"
    assert FakeTor.made[-1].asked[0] == ("example.com", 80)
    with pytest.raises(minitor.TorError, match="404"):
        tor.http_get("http://example.com/missing")


def test_names_are_resolved_by_the_exit_alone(tor, monkeypatch):
    def never(*args, **named):
        raise AssertionError("a name was looked up here: %r" % (args,))

    asked = FakeTor.made[-1].asked
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo",
        lambda host, *args, **named: real(host, *args, **named) if host == "127.0.0.1" else never(host))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:1/")
    assert tor.http_get("http://name.example/") == "/"
    assert asked[-1] == ("name.example", 80)
    assert tor.http_get("http://name.example/away") == "/final"
    assert asked[-1] == ("other.example", 80)


def test_urlopen(tor, web):
    assert tor.urlopen("example.com/x").read() == b"/x"
    assert web.seen[-1][1]["user-agent"] == "Mozilla/5.0"
    request = urllib.request.Request(
        "http://example.com/x", headers={"X-Own": "1", "User-Agent": "me"})
    with tor.urlopen(request) as response:
        assert (response.status, response.reason) == (200, "OK")
        assert response.headers["content-type"] == "text/plain"
        assert response.read(1) == b"/" and response.read() == b"x"
    path, headers = web.seen[-1]
    assert (headers["host"], headers["x-own"], headers["user-agent"]) == ("example.com", "1", "me")
    body = os.urandom(300000)
    assert tor.urlopen("http://example.com/echo", body).read() == body
    with pytest.raises(minitor.TorError, match="404") as caught:
        tor.urlopen("http://example.com/missing")
    assert caught.value.__context__.read() == b"nothing here"


def test_redirects(tor, web):
    def request(url, **headers):
        return urllib.request.Request(url, headers=headers)

    response = tor.urlopen(request("http://example.com/redirect", Cookie="a", X="1"))
    assert response.url == "http://example.com/final?a=b" and response.read() == b"/final?a=b"
    assert web.seen[-1][1]["cookie"] == "a"
    # To another server without what was meant for the first.
    assert tor.urlopen(request("http://example.com/away", Cookie="a")).read() == b"/final"
    assert web.seen[-1][1]["host"] == "other.example" and "cookie" not in web.seen[-1][1]
    assert tor.urlopen("http://example.com/303", b"data").read() == b"/final"
    # urllib does not send data again that was sent elsewhere.
    with pytest.raises(minitor.TorError, match="307"):
        tor.urlopen("http://example.com/307", b"data")
    before = len(FakeTor.made[-1].asked)
    for path in ("ftp", "file", "data", "loop"):
        with pytest.raises(minitor.TorError):
            tor.urlopen("http://example.com/" + path)
    # Each was asked once, and the loop a few times.
    assert len(FakeTor.made[-1].asked) - before < 3 + 12


def test_the_body_of_a_redirect_is_not_read(tor, web):
    start = time.monotonic()
    assert tor.http_get("http://example.com/slow-redirect") == "/final"
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("path", [
    "short", "endless", "headers", "garbage", "half-chunk", "without-end"])
def test_bad_servers(tor, path):
    with pytest.raises(minitor.TorError):
        tor.http_get("http://example.com/" + path)


def test_silence_is_a_timeout(tor):
    with pytest.raises(minitor.TorTimeout):
        tor.urlopen("http://example.com/silence", timeout=0.5)


@pytest.mark.parametrize("url", [
    "ftp://example.com/", "file:///etc/passwd", "http://", "http:///x", "http://a b/",
    "http://example.com:99999/", "http://example.com:x/", "",
    "http://exämple.com/", "http://[::1/", "javascript:alert(1)",
])
def test_bad_urls(tor, url):
    with pytest.raises(minitor.TorError):
        tor.http_get(url)
    assert FakeTor.made[-1].asked == []


def test_headers_cannot_be_injected(tor):
    for headers in ({"X": "a\r\nY: b"}, {"X\r\nY": "a"}):
        with pytest.raises(minitor.TorError):
            tor.urlopen(urllib.request.Request("http://example.com/", headers=headers))
    for path in ("a b", "ü", "\r\nHost: other", "a\0b"):
        with pytest.raises(minitor.TorError):
            tor.http_get("http://example.com/" + path)


def test_https(tor, tmp_path, monkeypatch):
    certificate, key = make_certificate(tmp_path, "secure.example")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.seen = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(FakeTor.ports, 443, server.server_address[1])
    trusted = ssl.create_default_context(cafile=str(certificate))
    url = "https://secure.example/x"
    assert tor.urlopen(url, context=trusted).read() == b"/x"
    assert server.seen[-1][1]["host"] == "secure.example"
    with pytest.raises(minitor.TorError, match="(?i)certificate"):
        tor.urlopen(url)
    with pytest.raises(minitor.TorError, match="(?i)certificate|hostname"):
        tor.urlopen("https://other.example/", context=trusted)
    server.shutdown()
    server.server_close()


def make_certificate(folder, name):
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    start = datetime.datetime(2020, 1, 1)
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
        .public_key(key.public_key()).serial_number(1).not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36500))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        .sign(key, hashes.SHA256()))
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption()))
    return paths


def test_create_connection_is_a_real_socket(tor):
    sock = tor.create_connection(("example.com", 80), timeout=5)
    assert isinstance(sock, socket.socket) and sock.fileno() >= 0 and sock.gettimeout() == 5
    connection = http.client.HTTPConnection("example.com")
    connection.sock = sock
    for path in ("/one", "/two"):
        connection.request("GET", path)
        assert connection.getresponse().read() == path.encode()
    connection.close()


def test_socket_carries_much_and_ends(tor, monkeypatch):
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setitem(FakeTor.ports, 7, listener.getsockname()[1])
    sock = tor.create_connection(("example.com", 7))
    peer, _ = listener.accept()
    data = os.urandom(3000000)
    thread = threading.Thread(target=sock.sendall, args=(data,))
    thread.start()
    assert b"".join(iter_exactly(peer, len(data))) == data
    thread.join()
    thread = threading.Thread(target=lambda: (peer.sendall(data), peer.close()))
    thread.start()
    # The reader is slow, and what came before the end is not lost.
    time.sleep(0.2)
    assert b"".join(iter_exactly(sock, len(data))) == data
    assert sock.recv(1) == b""
    thread.join()
    sock.close()
    # And when the local end closes, so does the stream.
    sock = tor.create_connection(("example.com", 7))
    peer, _ = listener.accept()
    sock.close()
    peer.settimeout(5)
    assert peer.recv(1) == b""
    peer.close()
    listener.close()


def iter_exactly(sock, n):
    while n:
        piece = sock.recv(min(n, 1 << 16))
        assert piece
        n -= len(piece)
        yield piece


def test_connecting_takes_no_longer_than_allowed(tor, monkeypatch):
    async def never(self, host, port, seconds):
        await asyncio.sleep(60)

    monkeypatch.setattr(FakeCircuit, "open_stream", never)
    start = time.monotonic()
    with pytest.raises(minitor.TorTimeout):
        tor.create_connection(("example.com", 80), timeout=0.3)
    assert time.monotonic() - start < 5


def test_another_exit_is_asked(tor):
    inner = FakeTor.made[-1]
    inner.failures = [minitor.StreamError("policy", 4), minitor.StreamError("hibernating", 9)]
    assert tor.http_get("example.com") == "/"
    assert len(inner.asked) == 3
    # Those that failed get no new stream.
    assert [circuit.since < -minitor.DIRTY_MS for circuit in inner.circuits] == [True, True, False]
    inner.failures = [minitor.StreamError("refused", 3)]
    with pytest.raises(minitor.StreamError, match="refused"):
        tor.http_get("example.com")
    inner.failures = [minitor.StreamError("policy", 4)] * 3
    with pytest.raises(minitor.StreamError, match="policy"):
        tor.http_get("example.com")


def test_what_was_sent_early_is_sent_again_on_another_circuit(tor, monkeypatch):
    inner, sent, early = FakeTor.made[-1], [], bytearray(b"one")

    async def open_stream(self, command, body, seconds, data=b""):
        sent.append(bytes(data))
        early.extend(b" more")
        if len(sent) < 3:
            raise minitor.StreamError("policy", 4)
        return "stream"

    monkeypatch.setattr(FakeCircuit, "open_stream", open_stream)
    assert tor.run(inner.open_connection("a.b", 80, early=early))[0] == "stream"
    assert sent == [b"one", b"one more", b"one more more"]


def test_isolation_and_newnym(tor, monkeypatch):
    inner, asked = FakeTor.made[-1], []
    circuit = FakeTor._circuit

    async def note(self, key, port, isolation=None):
        asked.append(isolation)
        return await circuit(self, key, port, isolation)

    monkeypatch.setattr(FakeTor, "_circuit", note)
    for isolation in ({}, {"isolation": ("me", 1)}):
        tor.create_connection(("a.b", 80), **isolation).close()
    inner.answer = b"\4\4\xc0\0\2\1" + bytes(4)
    tor.resolve("example.com", "you")
    assert asked == [None, ("me", 1), "you"]
    inner.descriptors["k"] = 1
    tor.newnym()
    tor.run(asyncio.sleep(0))
    assert not inner.descriptors


def test_reverse_resolve(tor, monkeypatch):
    inner, asked = FakeTor.made[-1], []

    async def resolve(self, body):
        asked.append(body)
        stream = minitor.SimpleNamespace(circuit=self, stream_id=7, opened=minitor.Promise())
        stream.opened.set(inner.answer)
        self.streams = {7: stream}
        return stream

    monkeypatch.setattr(FakeCircuit, "resolve", resolve)
    inner.answer = b"\0\5a.b.c" + bytes(4) + b"\4\4\1\2\3\4" + bytes(4)
    assert tor.resolve_ptr("192.0.2.1") == ["a.b.c"]
    assert tor.resolve_ptr("2001:db8::1") == ["a.b.c"]
    assert asked == [b"1.2.0.192.in-addr.arpa\0",
                     b"1" + b".0" * 23 + b".8.b.d.0.1.0.0.2.ip6.arpa\0"]
    for bad in ("a.b.c", "", "1.2.3", "::1%lo", "1.2.3.4\0"):
        with pytest.raises(minitor.AddressError):
            tor.resolve_ptr(bad)
    inner.answer = b"\xf1\0" + bytes(4)
    with pytest.raises(minitor.StreamError):
        tor.resolve_ptr("192.0.2.1")


def test_resolve(tor):
    inner = FakeTor.made[-1]
    addresses = b"\4\4\xc0\0\2\1" + bytes(4) + b"\0\4name" + bytes(4)
    inner.answer = addresses + b"\6\x10" + bytes([0x20, 1, 0xD, 0xB8]) + bytes(11) + b"\1" + bytes(4)
    assert tor.resolve("example.com") == ["192.0.2.1", "2001:db8:0:0:0:0:0:1"]
    inner.answer = b"\xf1\0" + bytes(4)
    with pytest.raises(minitor.StreamError):
        tor.resolve("example.com")
    for bad in ("exa mple.com", "a" * 56 + ".onion", "A.ONION."):
        with pytest.raises(minitor.AddressError):
            tor.resolve(bad)


@pytest.mark.parametrize("address", [
    ("example.com", 0), ("example.com", 65536), ("example.com", "80"), ("", 80), ("a\0b", 80),
    ("a:80\0", 80), ("x" * 256, 80), ("short.onion", 80), ("a" * 56 + ".onion", 80),
    ("a" * 56 + ".onion.", 80), ("www." + "a" * 56 + ".Onion.", 80),
])
def test_bad_addresses(tor, address):
    with pytest.raises(minitor.AddressError):
        tor.create_connection(address)


def test_closing_from_several_threads(tor):
    failed = []

    def close():
        try:
            tor.close()
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=close) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and tor._loop.is_closed()


def test_closed_means_closed(tor):
    inner = FakeTor.made[-1]
    tor.close()
    tor.close()
    assert inner.closed and not [t for t in threading.enumerate() if t is tor._thread]
    for call in (lambda: tor.http_get("example.com"), lambda: tor.resolve("example.com"),
                 lambda: tor.create_connection(("example.com", 80))):
        with pytest.raises(minitor.ConfigError):
            call()


def test_closing_ends_calls_that_wait(tor, monkeypatch):
    async def never(self, host):
        await asyncio.sleep(60)

    monkeypatch.setattr(FakeCircuit, "resolve", never)
    errors = []

    def call():
        try:
            tor.resolve("example.com")
        except minitor.TorError as e:
            errors.append(e)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.2)
    tor.close()
    thread.join(5)
    assert len(errors) == 1


def test_interrupting_a_call(tor, monkeypatch):
    async def never(self, host):
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    ended = threading.Event()
    monkeypatch.setattr(FakeCircuit, "resolve", never)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), 2))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        tor.resolve("example.com")
    assert ended.wait(5)
    monkeypatch.undo()


def test_cancelling_what_waits():
    warnings = []

    async def fail(started):
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            raise OSError("at its end")

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, what: warnings.append(what))
        # As the work is done; while it goes on.
        done, started = asyncio.Event(), asyncio.Event()
        works = done.wait(), fail(started)
        tasks = [asyncio.ensure_future(minitor.wait_for(work, 60)) for work in works]
        await started.wait()
        done.set()
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        assert await asyncio.wait(tasks, timeout=5) == (set(tasks), set())
        assert all(task.cancelled() for task in tasks)
        with pytest.raises(asyncio.TimeoutError):
            await minitor.wait_for(fail(started), 0.01)

    asyncio.run(main())
    gc.collect()
    assert not warnings


def test_loop_must_not_wait_for_itself(tor):
    async def inside():
        tor.resolve("example.com")

    with pytest.raises(minitor.ConfigError):
        tor.run(inside())


def test_failed_start_leaves_no_thread(monkeypatch, tmp_path):
    async def fail(self):
        raise minitor.DirectoryError("no")

    monkeypatch.setattr(minitor, "AsyncTor", FakeTor)
    monkeypatch.setattr(FakeTor, "_bootstrap", fail)
    before = threading.active_count()
    with pytest.raises(minitor.DirectoryError):
        minitor.Tor(str(tmp_path))
    assert threading.active_count() == before and FakeTor.made[-1].closed


def test_interrupting_the_start(monkeypatch, tmp_path):
    async def stubborn(self):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass  # as `wait_for` does at times before Python 3.12
        await asyncio.sleep(60)

    monkeypatch.setattr(minitor, "AsyncTor", FakeTor)
    monkeypatch.setattr(FakeTor, "_bootstrap", stubborn)
    before, start = threading.active_count(), time.monotonic()
    threading.Timer(0.3, lambda: os.kill(os.getpid(), 2)).start()
    with pytest.raises(KeyboardInterrupt):
        minitor.Tor(str(tmp_path))
    assert threading.active_count() == before and FakeTor.made[-1].closed
    assert time.monotonic() - start < 3


class FakeService:
    made = []

    def __init__(self, tor, key_dir, ports, clients=None):
        self.tor, self.key_dir, self.ports, self.events = tor, key_dir, ports, []
        self.clients = clients
        self.address = "x" * 56 + ".onion"
        FakeService.made.append(self)

    async def start(self):
        self.events.append("start")
        if 13 in self.ports:
            raise minitor.OnionError("no")

    async def close(self):
        self.events.append("close")
        if self in self.tor.services:
            self.tor.services.remove(self)


def test_onion_services(tor, monkeypatch, tmp_path):
    monkeypatch.setattr(minitor, "OnionService", FakeService)

    async def handler(reader, writer):
        pass

    service = tor.create_onion_service(80)
    inner = FakeService.made[-1]
    assert service.address.endswith(".onion") and inner.ports == {80: 80}
    assert inner.key_dir == str(tmp_path / "data") + "/onion_service"
    with pytest.raises(minitor.ConfigError, match="key_dir"):
        tor.create_onion_service(80, 8080)
    tor.create_onion_service(
        {80: handler, 22: ("10.0.0.1", 22)}, key_dir=str(tmp_path / "k"), clients=[b"k" * 32])
    other = FakeService.made[-1]
    assert (inner.clients, other.clients) == (None, [b"k" * 32])
    assert other.ports == {80: handler, 22: ("10.0.0.1", 22)}
    for port in (0, 65536, "80", {80: 1, 0: 1}):
        with pytest.raises(minitor.AddressError):
            tor.create_onion_service(port, key_dir="unused")
    # One that is closed, or failed, frees its key.
    service.close()
    assert inner.events == ["start", "close"]
    with pytest.raises(minitor.OnionError):
        tor.create_onion_service(13)
    assert FakeService.made[-1].events == ["start", "close"]
    tor.create_onion_service(80)
    tor.close()
    assert inner.events == ["start", "close"] and other.events == ["start", "close"]
    assert FakeService.made[-1].events == ["start", "close"]


def test_a_closed_service_frees_its_key(tor, tmp_path):
    async def go():
        async_tor = FakeTor.made[-1]
        service = minitor.OnionService(async_tor, str(tmp_path / "key"), {80: 80})
        async_tor.services.append(service)
        await service.close()
        assert async_tor.services == []
        await service.close()

    tor.run(go())


def test_async(monkeypatch, tmp_path, web):
    monkeypatch.setattr(FakeTor, "ports", {80: web.server_address[1]})
    progress = []

    async def go():
        async with FakeTor(str(tmp_path), None, lambda *what: progress.append(what)) as tor:
            reader, writer = await tor.open_connection("example.com", 80)
            writer.write(b"GET /raw HTTP/1.0\r\n\r\n")
            await writer.drain()
            answer = await reader.read()
            writer.close()
            return tor, answer

    inner, answer = asyncio.run(go())
    assert inner.closed and progress == [(100, "done", "Done")]
    assert answer.endswith(b"/raw")


def test_network_comes_from_the_environment(monkeypatch, tmp_path):
    network = tmp_path / "network"
    seen = []
    monkeypatch.setattr(minitor, "load_network", seen.append)
    monkeypatch.setattr(minitor, "Directory", lambda network, data_dir, *_: seen.append(data_dir))
    monkeypatch.setenv("MINITOR_NETWORK", str(network))
    minitor.AsyncTor()
    minitor.AsyncTor("data", "other")
    assert seen == [str(network), str(network) + ".minitor", "other", "data"]


def test_urllib_is_not_imported_until_needed():
    import subprocess
    import sys

    code = "import sys, minitor; assert 'http.client' not in sys.modules and 'argparse' not in sys.modules"
    folder = os.path.dirname(os.path.abspath(minitor.__file__))
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


def test_a_data_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    before = threading.active_count()
    with pytest.raises(minitor.ConfigError, match="file/data"):
        minitor.Tor(str(tmp_path / "file" / "data"))
    assert threading.active_count() == before
