"""The command line and the web server behind --serve, without a network."""

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import minitor
import pytest

MINITOR = Path(__file__).resolve().parent.parent / "minitor.py"


@pytest.fixture(autouse=True)
def handlers():
    """`main` sets the handler of SIGTERM, for the process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


async def ask_async(target, request):
    """Send `request` to a handler as a visitor would; return all that comes back."""
    server = await asyncio.start_server(target, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    server.close()
    return answer


def ask(target, request):
    """Return status, headers and body of the answer."""
    head, _, body = asyncio.run(ask_async(target, request)).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines[1:])
    assert lines[0].startswith("HTTP/1.1 ")
    assert fields["connection"] == "close"
    return int(lines[0].split(" ")[1]), fields, body


def get(target, path, method="GET"):
    return ask(target, ("%s %s HTTP/1.1\r\nHost: x\r\n\r\n" % (method, path)).encode())


@pytest.fixture
def site(tmp_path):
    root = tmp_path / "public"
    (root / "sub").mkdir(parents=True)
    (root / "empty <dir>").mkdir()
    (root / ".git").mkdir()
    (root / ".well-known").mkdir()
    (root / "index.html").write_text("<p>start")
    (root / "sub" / "a b&c.txt").write_text("text")
    (root / "sub" / "<i>.html").write_text("x")
    (root / "data.tar.gz").write_bytes(os.urandom(300000))
    (root / ".git" / "config").write_text("secret")
    (root / ".well-known" / "security.txt").write_text("known")
    (tmp_path / "outside.txt").write_text("outside")
    (tmp_path / "public-too").mkdir()
    (tmp_path / "public-too" / "x.txt").write_text("outside")
    (root / "link.txt").symlink_to(tmp_path / "outside.txt")
    (root / "link").symlink_to(tmp_path / "public-too")
    (root / "inner.txt").symlink_to(root / "sub" / "a b&c.txt")
    (root / "sub" / "up").mkdir()
    (root / "sub" / "up" / "index.html").symlink_to(tmp_path / "outside.txt")
    return root


def test_socks_options(capsys, tmp_path):
    for arguments, text in ((["--serve", "--http-tunnel", "8118"], "goes with --socks"),
                            (["--socks", "x.y:9050"], "unix:PATH is needed"),
                            (["--socks", "9050 Isolate"], "no flag"),
                            (["--socks", "--serve"], "not allowed")):
        try:
            status = minitor.main(arguments + ["--data-dir", str(tmp_path)])
        except SystemExit as e:
            status = e.code
        assert status == 2 and text in capsys.readouterr().err, arguments


def test_own_page_says_what_it_is():
    status, fields, body = get(minitor.serve_target(""), "/")
    assert status == 200 and b"minitor" in body and b"onion service" in body
    assert fields["content-type"] == "text/html; charset=utf-8"
    assert int(fields["content-length"]) == len(body)
    assert "server" not in fields and "date" not in fields


def test_folder_files_and_types(site):
    target = minitor.serve_target(str(site))
    assert get(target, "/")[2] == b"<p>start"
    assert get(target, "/?q=1")[2] == b"<p>start"
    status, fields, body = get(target, "/sub/a%20b%26c.txt")
    assert (status, fields["content-type"], body) == (200, "text/plain; charset=utf-8", b"text")
    status, fields, body = get(target, "/data.tar.gz")
    assert body == (site / "data.tar.gz").read_bytes()
    assert fields["content-type"] == "application/octet-stream"
    assert get(target, "/.well-known/security.txt")[2] == b"known"
    assert get(target, "/inner.txt")[2] == b"text"


def test_folder_listing_is_escaped(site):
    target = minitor.serve_target(str(site))
    body = get(target, "/sub/")[2].decode()
    assert '<a href="./a%20b%26c.txt">a b&amp;c.txt</a>' in body
    assert '<a href="./%3Ci%3E.html">&lt;i&gt;.html</a>' in body
    assert '<a href="./up/">up/</a>' in body and "<i>" not in body
    title = get(target, "/empty%20%3Cdir%3E/")[2].decode()
    assert "&lt;dir&gt;" in title and "<dir>" not in title
    (site / "index.html").unlink()
    assert ".git" not in get(target, "/")[2].decode()


def test_folder_redirects_to_the_slash(site):
    target = minitor.serve_target(str(site))
    status, fields, _ = get(target, "/sub?x")
    assert (status, fields["location"]) == (301, "/sub/")
    # Never to another host.
    (site / "example.com").mkdir()
    status, fields, _ = get(target, "//example.com")
    assert (status, fields["location"]) == (301, "/example.com/")


@pytest.mark.parametrize("path", [
    "/../outside.txt", "/%2e%2e/outside.txt", "/sub/../../outside.txt", "/..%2foutside.txt",
    "/.git/config", "/.git/", "/sub/%2e%2e/", "/link.txt", "/link/", "/link/x.txt", "/sub/up/",
    "/nothing", "/%00", "/index.html%00.txt", "/" + "a" * 5000, "/%ff", "nonsense/",
    "/%2e%2e%2f%2e%2e%2fetc/passwd", "//etc/passwd",
])
def test_folder_gives_nothing_else(site, path):
    status, _, body = get(minitor.serve_target(str(site)), path)
    assert status in (404, 301)
    assert b"outside" not in body and b"secret" not in body and b"root:" not in body


def test_folder_hides_backslashes(site):
    assert get(minitor.serve_target(str(site)), "/..\\outside.txt")[0] == 404


def test_methods(site):
    target = minitor.serve_target(str(site))
    status, fields, body = get(target, "/", "HEAD")
    assert (status, fields["content-length"], body) == (200, "8", b"")
    status, fields, _ = get(target, "/", "POST")
    assert (status, fields["allow"], fields["content-length"]) == (405, "get, head", "0")
    assert ask(target, b"\r\n\r\n")[0] == 405
    assert ask(target, b"GET\r\n\r\n")[0] == 301
    assert ask(target, b"\xff\xfe\0 / \r\n\r\n")[0] == 405
    assert asyncio.run(ask_async(target, b"GET / HTTP/1.0\r\n\r\n")).endswith(b"start")


def test_unreadable_files_are_not_found(site):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (site / "index.html").chmod(0)
    assert get(minitor.serve_target(str(site)), "/")[0] == 404


def test_serve_target(tmp_path):
    assert minitor.serve_target("8080") == ("127.0.0.1", 8080)
    assert minitor.serve_target("example.com:80") == ("example.com", 80)
    assert minitor.serve_target("[::1]:80") == ("::1", 80)
    assert minitor.serve_target("unix:/run/x") == "unix:/run/x"
    for what in ("0", "65536", "no/such/folder", "a b:80", "host:", str(tmp_path / "x"), "²"):
        with pytest.raises(minitor.ConfigError):
            minitor.serve_target(what)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(MINITOR)] + list(arguments), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, universal_newlines=True, timeout=30,
        env=dict(os.environ, **environment))


@pytest.mark.parametrize("arguments", [
    [], ["--nonsense"], ["--get"], ["--serve", "--get", "x"], ["--serve", "no/such/folder"],
    ["--serve", "99999"], ["--port", "x", "--serve"], ["--port", "0", "--serve"], ["extra"],
    ["--serve", "1", "2"], ["--serv"], ["--make-client-key"], ["--make-client-key", "a", "b", "c"],
    ["--make-client-key", "../a"], ["--make-client-key", ""], ["--make-client-key", "a", "x.onion"],
])
def test_usage_errors_are_one_line(arguments, tmp_path):
    done = run(*arguments, "--data-dir", str(tmp_path / "data"))
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("minitor: ")
    assert not (tmp_path / "data").exists()


def test_no_such_network_file(tmp_path):
    done = run("--get", "x.onion", "--network", str(tmp_path / "nothing"),
               "--data-dir", str(tmp_path / "data"))
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1, done.stderr
    assert "nothing" in done.stderr


def test_version_and_help():
    assert run("--version").stdout == "minitor %s\n" % minitor.__version__
    done = run("--help")
    assert done.returncode == 0 and "--serve" in done.stdout and "--get" in done.stdout


def test_address_is_kept_and_private(tmp_path):
    data = tmp_path / "data"
    first = run("--address", "--data-dir", str(data))
    assert first.returncode == 0, first.stderr
    assert minitor.parse_onion_address(first.stdout.strip())
    assert run("--address", "--data-dir", str(data)).stdout == first.stdout
    keys = data / "onion_service"
    assert (keys / "hostname").read_text() == first.stdout
    assert data.stat().st_mode & 0o777 == 0o700 and keys.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in keys.iterdir())
    other = run("--address", "--data-dir", str(data), "--key-dir", str(tmp_path / "other"))
    assert other.stdout != first.stdout
    # The key of the private network is not the key of the public one.
    network = tmp_path / "network"
    network.write_text("TestingTorNetwork 1\n")
    assert run("--address", "--network", str(network)).returncode == 0
    assert (tmp_path / "network.minitor" / "onion_service" / "hostname").exists()


def test_client_keys(tmp_path):
    """The service's operator makes one, and a client does; neither overwrites anything."""
    hs, auth = tmp_path / "hs", tmp_path / "auth"
    site = run("--address", "--key-dir", str(hs), "--data-dir", str(tmp_path)).stdout.strip()
    at_service = "--make-client-key", "bob", "--key-dir", str(hs), "--data-dir", str(tmp_path)
    done = run(*at_service)
    assert done.returncode == 0, done.stderr
    bob = hs / "authorized_clients" / "bob.auth"
    assert bob.stat().st_mode & 0o777 == 0o600 and str(bob) in done.stderr
    secret = minitor.auth_key(done.stdout)
    assert done.stdout == "%s:%s\n" % (site[:56], minitor.auth_text(secret))
    assert bob.read_text() == minitor.auth_text(minitor.x25519(secret)) + "\n"
    assert minitor.load_clients(str(hs)) == [minitor.x25519(secret)]
    for _ in range(2):
        before = bob.read_text()
        again = run(*at_service, "--auth-dir", str(auth))
        assert again.returncode == 2 and "is there already" in again.stderr and not again.stdout
        assert bob.read_text() == before and os.listdir(str(auth)) == []
    # A client's own, for an address.
    at_client = "--make-client-key", "carol", site, "--data-dir", str(tmp_path)
    done = run(*at_client, "--auth-dir", str(auth))
    assert done.returncode == 0, done.stderr
    (file,) = auth.iterdir()
    assert file.name == site[:56] + ".auth_private" and file.stat().st_mode & 0o777 == 0o600
    ((identity, (secret, path)),) = minitor.load_onion_keys(str(auth)).items()
    assert (minitor.onion_address(identity), path) == (site, str(file))
    assert done.stdout == minitor.auth_text(minitor.x25519(secret)) + "\n"
    assert os.listdir(str(bob.parent)) == ["bob.auth"]
    before = file.read_text()
    again = run(*at_client, "--auth-dir", str(auth))
    assert again.returncode == 2 and "is there already" in again.stderr and not again.stdout
    assert file.read_text() == before
    # Nothing is written without a folder.
    lines = run(*at_client).stdout.splitlines()
    assert minitor.auth_text(minitor.x25519(minitor.auth_key(lines[0]))) == lines[1]
    assert lines[0].startswith(site[:56] + ":descriptor:x25519:")


def test_default_data_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("MINITOR_NETWORK", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert minitor.folders(None, None)[0] == str(tmp_path / "minitor")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert minitor.folders(None, None)[0] == "/home/someone/.local/state/minitor"
    assert minitor.folders(None, "a/network")[0] == "a/network.minitor"


class FakeTor:
    """Stands for Tor: whatever is fetched is the page of a local server."""

    def __init__(self, data_dir, network, progress):
        progress(45, "requesting_descriptors", "Asking for relay descriptors")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def create_onion_service(self, port, target, key_dir, clients=None):
        class Service:
            address = "x" * 56 + ".onion"

        return Service


def test_serve_prints_progress_and_the_address(monkeypatch, capsys, tmp_path):
    class Interrupted:
        def wait(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(minitor, "Tor", FakeTor)
    monkeypatch.setattr(minitor.threading, "Event", Interrupted)
    assert minitor.main(["--serve", "--data-dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == "x" * 56 + ".onion\n"
    assert err == "Bootstrapped 45% (requesting_descriptors): Asking for relay descriptors\n"


def test_errors_are_one_line(monkeypatch, capsys, tmp_path):
    class Failing(FakeTor):
        def urlopen(self, url):
            raise minitor.OnionError("not there")

    monkeypatch.setattr(minitor, "Tor", Failing)
    assert minitor.main(["--get", "x.onion", "--data-dir", str(tmp_path)]) == 1
    assert capsys.readouterr()[1].splitlines()[1:] == ["minitor: not there"]


# ─── --connect ───

# The command line over a made-up Tor: whatever is connected to is a port on this machine.
FAKE = """
import asyncio, sys, threading
sys.path.insert(0, %r)
import minitor

class Stream:
    def __init__(self, reader, writer):
        self.reader, self.writer, self.ended = reader, writer, asyncio.Event()
        self.write, self.drain = writer.write, writer.drain

    async def read(self, n):
        # As Tor's: it is over when this side closes, too.
        read, ended = [asyncio.ensure_future(c) for c in (self.reader.read(n), self.ended.wait())]
        await asyncio.wait([read, ended], return_when="FIRST_COMPLETED")
        try:
            return await read if read.done() else b""
        except OSError:
            raise minitor.StreamError("the stream ended: CONNRESET")

    def close(self):
        self.writer.close()
        self.ended.set()

    async def wait_closed(self):
        self.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass

class Tor:
    def __init__(self, *_):
        self._tor, self.loop = self, asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    async def open_connection(self, host, port):
        if port == 1:
            raise minitor.OnionError("there is no %%s" %% host)
        stream = Stream(*await asyncio.open_connection("127.0.0.1", port))
        return stream, stream

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    __enter__ = lambda self: self
    __exit__ = lambda self, *_: None

minitor.Tor = Tor
sys.exit(minitor.main())
"""
ONION = minitor.onion_address(minitor.ed25519_public(minitor.ed25519_expand(bytes(32))))


@pytest.fixture
def peer():
    """A server on this machine: `port`, and `answer`, a function(socket) that a test sets."""
    class Peer:
        server = socket.create_server(("127.0.0.1", 0))
        port = server.getsockname()[1]
        answer = None

        def serve(self):
            with self.server.accept()[0] as connection:
                self.answer(connection)

    peer = Peer()
    peer.server.settimeout(30)
    thread = threading.Thread(target=peer.serve, daemon=True)
    thread.start()
    yield peer
    thread.join(30 if peer.answer else 0)
    peer.server.close()


def connecting(tmp_path, *arguments):
    program = tmp_path / "fake.py"
    program.write_text(FAKE % str(MINITOR.parent))
    return subprocess.Popen(
        [sys.executable, str(program), "--data-dir", str(tmp_path), "--connect", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_connect_is_binary_safe_and_waits_for_the_other_side(peer, tmp_path):
    sent, back = os.urandom(3 << 20), os.urandom(3 << 20)
    there = bytearray()

    def answer(connection):
        while len(there) < len(sent):
            there.extend(connection.recv(1 << 16))
        # Standard input is at its end, what comes back is not.
        connection.sendall(back)

    peer.answer = answer
    client = connecting(tmp_path, "%s:%d" % (ONION, peer.port))
    out, err = client.communicate(sent, timeout=30)
    assert (client.returncode, out == back, there == sent) == (0, True, True), err


def test_connect_ends_after_its_input_if_told_to(peer, tmp_path):
    there = []

    def answer(connection):
        # It says nothing, and ends when the other side does.
        while data := connection.recv(1 << 16):
            there.append(data)

    peer.answer = answer
    client = connecting(tmp_path, ONION, "--port", str(peer.port), "-q", "0")
    out, err = client.communicate(b"x" * 500000, timeout=30)
    assert (client.returncode, out, len(b"".join(there))) == (0, b"", 500000), err


def test_connect_as_a_dialogue_until_interrupted(peer, tmp_path):
    def answer(connection):
        while data := connection.recv(1 << 16):
            connection.sendall(data.upper())

    peer.answer = answer
    client = connecting(tmp_path, "%s:%d" % (ONION, peer.port))
    for line in b"one\n", b"\0\xff\n", b"z\n":
        client.stdin.write(line)
        client.stdin.flush()
        assert client.stdout.readline() == line.upper()
    client.send_signal(signal.SIGINT)
    assert client.wait(30) == 130
    assert client.stderr.read() == b""
    client.stdin.close()


def test_connect_says_how_it_failed(peer, tmp_path):
    def answer(connection):
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    client = connecting(tmp_path, ONION + ":1")
    out, err = client.communicate(b"", timeout=30)
    assert (client.returncode, out) == (1, b"") and err.decode().startswith("minitor: there is no")
    # Reset by the other side.
    peer.answer = answer
    client = connecting(tmp_path, "%s:%d" % (ONION, peer.port))
    out, err = client.communicate(b"x", timeout=30)
    assert (client.returncode, out) == (1, b"") and b"CONNRESET" in err


def test_connect_to_a_pipe_that_is_closed(peer, tmp_path):
    peer.answer = lambda connection: connection.sendall(bytes(1 << 20))
    client = connecting(tmp_path, "%s:%d" % (ONION, peer.port))
    client.stdout.close()
    assert client.wait(30) == 1
    assert client.stderr.read().startswith(b"minitor: standard output: ")
    client.stdin.close()


@pytest.mark.parametrize("where", ["x" * 56 + ".onion", ONION[1:] + ":80", ONION + ":", ONION + ":x",
                                   ONION + ":0", ONION + ":65536", "a b:80", ":80", "x:y:80 "])
def test_connect_to_no_address(where, tmp_path):
    done = run("--connect", where, "--data-dir", str(tmp_path / "data"))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "data").exists()
