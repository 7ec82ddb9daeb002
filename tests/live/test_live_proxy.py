"""The proxies with the programs that people use: curl, wget by torsocks, requests, Chromium."""

import asyncio
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from httptarget import HELLO, payload, sha256hex
from livekit import MB, minitor, wait_for

import minitor as module

LISTENING = r"(?m)^%s proxy at 127\.0\.0\.1:(\d+)$"


@pytest.fixture(scope="module")
def service(tornet, target):
    """A service that C tor hosts."""
    service = tornet.onion_service({80: target.port})
    yield service
    service.stop()


@pytest.fixture(scope="module")
def proxy(tornet, tmp_path_factory):
    """`minitor.py --socks … --http-tunnel …`, with its ports `socks` and `http`."""
    with minitor(tornet, tmp_path_factory.mktemp("proxy"), "--socks", "0 ExtendedErrors",
                 "--http-tunnel", "0", "-v") as program:
        program.socks = int(program.wait_out(LISTENING % "SOCKS", 60)[1])
        program.http = int(program.wait_out(LISTENING % "HTTP", 10)[1])
        assert "Bootstrapped 100% (done)" in program.err
        yield program
        assert program.running and "bug:" not in program.err and "Traceback" not in program.err


@pytest.fixture(scope="module")
def tor(tornet, tmp_path_factory):
    """A Tor in this process, with a proxy: `tor.proxy`."""
    folder = tmp_path_factory.mktemp("tor")
    with module.Tor(data_dir=str(folder), network=tornet.network_file) as tor:
        tor.proxy = tor.run(module.Proxy("socks", 0).start(tor))
        yield tor


def run(*command, env=None, seconds=60):
    return subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, timeout=seconds,
                          stderr=subprocess.PIPE, env=dict(os.environ, **(env or {})))


def curl(*arguments, status=0):
    done = run("curl", "-sS", "--fail", "--noproxy", "", "--max-time", 50, *arguments)
    assert done.returncode == status, done.stderr.decode()
    return done.stdout


def port_of(proxy):
    return int(proxy.address.rpartition(":")[2])


@pytest.mark.parametrize("way", ["--socks5-hostname", "--socks4a", "--socks5", "--socks4", "-x"])
def test_curl(proxy, service, target, way):
    options = [way, "127.0.0.1:%d" % (proxy.http if way == "-x" else proxy.socks)]
    options += ["--proxytunnel"] * (way == "-x")
    hosts = ["127.0.0.1:%d" % target.port]
    if way not in ("--socks5", "--socks4"):
        # Their names are for the exit to look up.
        hosts += ["web.test:%d" % target.port, service.address, "www." + service.address]
    for host in hosts:
        assert curl(*options, "http://%s/" % host) == HELLO, host


def test_curl_transfers(proxy, service, target, tmp_path):
    body = payload(5 * MB, 7)
    (tmp_path / "body").write_bytes(body)
    for host in ("web.test:%d" % target.port, service.address):
        back = curl("--socks5-hostname", "127.0.0.1:%d" % proxy.socks, "http://%s/echo" % host,
                    "-H", "Expect:", "--data-binary", "@%s" % (tmp_path / "body"))
        assert sha256hex(back) == sha256hex(body)


def test_curl_without_connect_is_refused_with_a_hint(proxy, target):
    curl("-x", "127.0.0.1:%d" % proxy.http, "http://web.test:%d/" % target.port, status=52)
    wait_for(lambda: "--proxytunnel" in proxy.err, 5, "a hint")
    assert "web.test" not in proxy.err


def test_curl_isolates_by_proxy_user(proxy, service):
    for user in ("alice:1", "bob:2", "<torS0X>0:x"):
        at = "%s@127.0.0.1:%d" % (user.replace("<", "%3C").replace(">", "%3E"), proxy.socks)
        assert curl("-x", "socks5h://" + at, "http://%s/" % service.address) == HELLO
    # What Arti would take for an object of its own.
    curl("-x", "socks5h://%%3CtorS0X%%3E1x:y@127.0.0.1:%d" % proxy.socks,
         "http://%s/" % service.address, status=97)


def test_torsocks_wget(proxy, service, tmp_path):
    done = run("torsocks", "-P", proxy.socks, "wget", "-q", "-O", tmp_path / "page",
               "http://%s/bytes/100000" % service.address)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "page").read_bytes() == payload(100000)


def test_requests(proxy, service, target):
    script = """if True:
        import requests, sys
        with requests.Session() as session:
            session.proxies = {"http": sys.argv[1], "https": sys.argv[1]}
            for url in sys.argv[2:]:
                print(session.get(url, timeout=50).text, end="")
    """
    urls = ["http://%s/" % service.address, "http://web.test:%d/" % target.port]
    for scheme in ("socks5h", "socks4a", "socks5h://user:word@"):
        at = scheme + ("" if "://" in scheme else "://") + "127.0.0.1:%d" % proxy.socks
        done = run(sys.executable, "-c", script, at, *urls)
        assert done.stdout == 2 * HELLO, done.stderr.decode()


def test_tor_resolve(proxy):
    where = "127.0.0.1:%d" % proxy.socks
    for version in ("-5", "-4"):
        done = run("tor-resolve", version, "some.name.test", where)
        assert done.stdout == b"127.0.0.1\n", done.stderr.decode()
    assert run("tor-resolve", "-x", "192.0.2.7", where).stdout == b"seven.test\n"
    done = run("tor-resolve", "none.example", where)
    assert done.returncode and not done.stdout


def test_chromium(proxy, service, tmp_path):
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    options = "headless no-sandbox disable-gpu disable-quic no-first-run dump-dom disable-sync"
    options += " disable-background-networking disable-component-update"
    # It would ask port 443, too, which the service ends the circuit for.
    options += " disable-features=HttpsUpgrades,HttpsFirstBalancedMode"
    options += ",HttpsFirstBalancedModeAutoEnable"
    command = [chromium] + ["--" + option for option in options.split()] + [
        "--proxy-server=socks5://127.0.0.1:%d" % proxy.socks,
        "--user-data-dir=%s" % (tmp_path / "profile"), "http://%s/page" % service.address]
    browser = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    try:
        page, errors = browser.communicate(None, 60)
    finally:
        try:
            os.killpg(browser.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert HELLO.strip() in page, errors.decode()[-2000:]


def socks5(host, port, command=1):
    host = host.encode()
    return b"\5\1\0" + bytes([5, command, 0, 3, len(host)]) + host + port.to_bytes(2, "big")


def test_extended_errors(proxy, service, target):
    """What goes wrong is told apart: SOCKS's reply of proposal 304, HTTP's status and header."""
    key = module.ed25519_public(module.ed25519_expand(bytes(range(32))))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        # tor's exits tell that a local port refuses, or nothing.
        cases = [("a" * 56 + ".onion", 80, [0xF6]), (module.onion_address(key), 80, [0xF0]),
                 ("none.example", 80, [4]), ("web.test", closed.getsockname()[1], [1, 5])]
        socks = [socket.create_connection(("127.0.0.1", proxy.socks), 60) for _ in cases]
        for s, (host, port, _) in zip(socks, cases):
            s.sendall(socks5(host, port))
        for s, (host, _, codes) in zip(socks, cases):
            answer = b""
            while len(answer) < 12:
                piece = s.recv(12)
                assert piece, (host, answer)
                answer += piece
            assert answer[:3] == b"\5\0\5" and answer[3] in codes, (host, answer)
            s.close()
        with socket.create_connection(("127.0.0.1", proxy.http), 60) as s:
            s.sendall(b"CONNECT web.test:%d HTTP/1.1\r\n\r\n" % closed.getsockname()[1])
            answer = s.makefile("rb").read()
    assert re.match(rb"HTTP/1.0 (403|500) [^\0]* end/(CONNECTREFUSED|MISC)\r\n", answer), answer


def test_many_at_once_among_bad_ones(proxy, service, target):
    """200 connections, while others stall, send garbage, and go away in mid-handshake."""
    hosts = [("web.test", target.port), (service.address, 80)]
    wanted = hashlib.sha256(payload(20000)).digest()

    async def good(i):
        host, port = hosts[i % 2]
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.socks)
        # With the data sent along, before any answer.
        request = b"GET /bytes/20000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        writer.write(socks5(host, port) + request)
        assert (await reader.readexactly(12))[:4] == b"\5\0\5\0", i
        try:
            await reader.readuntil(b"\r\n\r\n")
        except EOFError as e:
            raise AssertionError("%d: %s" % (i, e))
        body = await reader.readexactly(20000)
        writer.close()
        return hashlib.sha256(body).digest() == wanted

    async def bad(i):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.socks)
        whole = socks5(*hosts[i % 2])
        starts = os.urandom(600), whole[: i % len(whole)], whole, b"GET / HTTP/1.0\r\n"
        writer.write(starts[i % 4])
        if i % 3 == 0:
            await asyncio.sleep(0.01 * (i % 7))
            writer.transport.abort()
        elif i % 3 == 1:
            writer.write_eof()
        return writer

    async def main():
        stalled = [await bad(i) for i in range(60)]
        more = [bad(i) for i in range(60, 90)]
        done = await asyncio.gather(*[good(i) for i in range(200)], *more)
        assert all(done[:200])
        for writer in stalled + done[200:]:
            writer.close()

    asyncio.run(asyncio.wait_for(main(), 120))
    assert proxy.running


def test_half_closed(proxy):
    """All that was sent before the client closed its side arrives; then both sides end."""
    got = []

    def sink():
        peer, _ = server.accept()
        with peer:
            got.append(peer.makefile("rb").read())

    body = payload(300000, 5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=sink, daemon=True)
        thread.start()
        with socket.create_connection(("127.0.0.1", proxy.socks), 30) as s:
            s.sendall(socks5("web.test", server.getsockname()[1]))
            answer = s.makefile("rb")
            assert answer.read(12)[3] == 0
            s.sendall(body)
            s.shutdown(socket.SHUT_WR)
            assert answer.read() == b""
        thread.join(20)
    assert got == [body]


def test_the_first_stream_does_not_wait(tor, target):
    """Circuits are there before anyone asks; and one that was used is not shared with another."""
    inner, url = tor._tor, "http://web.test:%d/" % target.port
    ask = lambda user: curl("-x", "socks5h://%s:x@127.0.0.1:%d" % (user, port_of(tor.proxy)), url)
    # From now on there are two for this port, too: not every exit takes it.
    assert ask("zero") == HELLO
    before = [promise.value for promise in inner._shared.values()]
    find = lambda: [c for c in inner._exits if not c.closed and inner._allows(c, target.port)]
    ready = wait_for(lambda: len(find()) >= 2 and find(), 60, "circuits ahead")
    for user in ("one", "two", "one"):
        assert ask(user) == HELLO
    used = {promise.value for promise in inner._shared.values()} - set(before)
    assert len(used) == 2 and used <= set(ready)


def test_newnym(tor, target):
    inner, url = tor._tor, "http://web.test:%d/" % target.port
    at = "127.0.0.1:%d" % port_of(tor.proxy)
    assert curl("--socks5-hostname", at, url) == HELLO
    before = set(p.value for p in inner._shared.values())
    tor.newnym()
    assert curl("--socks5-hostname", at, url) == HELLO
    after = [p.value for p in inner._shared.values()]
    assert after and not before & set(after)


def test_names_and_addresses_by_the_api(tor):
    assert tor.resolve_ptr("192.0.2.7") == ["seven.test"]
    with pytest.raises(module.AddressError):
        tor.resolve_ptr("seven.test")
    with pytest.raises(module.StreamError):
        tor.resolve_ptr("192.0.2.8")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_end(tornet, tmp_path, end, target):
    with minitor(tornet, tmp_path, "--socks", "0") as program:
        port = int(program.wait_out(LISTENING % "SOCKS", 60)[1])
        with socket.create_connection(("127.0.0.1", port), 30) as s:
            s.sendall(socks5("web.test", target.port))
            assert s.makefile("rb").read(12)[3] == 0
            program.process.send_signal(end)
            assert program.wait(15) == 0, program.err
            assert s.recv(10) == b""
        assert "Traceback" not in program.err and "never" not in program.err
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), 5)


def test_a_taken_port_is_told_at_once(tornet, proxy, tmp_path):
    start = time.monotonic()
    with minitor(tornet, tmp_path, "--socks", str(proxy.socks)) as program:
        assert program.wait(20) == 2 and "Bootstrapped" not in program.err
        assert re.match(r"minitor: cannot listen at \d+: .*in use", program.err)
    assert time.monotonic() - start < 15


def test_verbose_shows_circuits_and_no_destination(tornet, service, tmp_path):
    """`--socks -v`: progress, a line per listener, circuits as they are built."""
    with minitor(tornet, tmp_path, "--socks", "0", "--http-tunnel", "0", "-v") as program:
        port = program.wait_out(LISTENING % "SOCKS", 60)[1]
        program.wait_out(LISTENING % "HTTP", 10)
        names = service.address, "x" + service.address[1:], "nowhere.test:1", "127.3.2.1:1"
        for name in names:
            subprocess.run(
                ["curl", "-sS", "-m", "30", "--socks5-hostname", "127.0.0.1:" + port,
                 "http://%s/" % name], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        program.process.terminate()
        assert program.wait(15) == 0
    shown = program.out + program.err
    assert program.err.index("Bootstrapped 5%") < program.err.index("Bootstrapped 100% (done)")
    built = r"\[info\] circuit \d+ over relay .* is built: 127\.[\d.]+:\d+, 127\.[\d.]+:\d+, 127"
    assert len(re.findall(built, program.err)) >= 2
    for secret in (service.address[:56], names[1][:56], "nowhere", "127.3.2.1"):
        assert secret not in shown
