"""Section 17, proxies: requests, wherever they are cut; the server over a made-up Tor."""

import asyncio
import base64
import os
import random
import socket
import stat

import minitor
import pytest

HELLO5 = b"\5\2\0\2"
ONION = "a" * 56 + ".onion"


def name5(host, port=80, command=1):
    host = host.encode()
    return bytes([5, command, 0, 3, len(host)]) + host + port.to_bytes(2, "big")


def request4(host=b"", ip=b"\0\0\0\1", user=b"", port=80, command=1):
    text = bytes([4, command]) + port.to_bytes(2, "big") + ip + user + b"\0"
    return text + (host + b"\0" if ip[:3] == b"\0\0\0" else b"")


def auth5(user, password):
    return bytes([1, len(user)]) + user + bytes([len(password)]) + password


def connect(target, *fields):
    lines = ("CONNECT %s HTTP/1.1" % target,) + fields
    return "".join(line + "\r\n" for line in lines + ("",)).encode()


# ─── requests ───

GOOD = {
    # bytes, answer, and what is asked for: version, command, host, port, auth, literal
    "v5": (b"\5\1\0" + name5("example.com"), b"\5\0", (5, 1, "example.com", 80, None, False)),
    "v5 address": (b"\5\1\0\5\1\0\1\x7f\0\0\1\0\x50", b"\5\0", (5, 1, "127.0.0.1", 80, None, True)),
    "v5 ipv6": (b"\5\1\0\5\1\0\4" + bytes(15) + b"\1\1\xbb", b"\5\0",
                (5, 1, "::1", 443, None, True)),
    "v5 ipv6 as a name": (b"\5\1\0" + name5("[::1]"), b"\5\0", (5, 1, "::1", 80, None, False)),
    "v5 user": (HELLO5 + auth5(b"u", b"pw") + name5("x"), b"\5\2\1\0",
                (5, 1, "x", 80, (b"u", b"pw"), False)),
    "v5 empty user": (HELLO5 + auth5(b"", b"") + name5("x"), b"\5\2\1\0",
                      (5, 1, "x", 80, None, False)),
    "v5 user unasked": (b"\5\1\0" + auth5(b"u", b"") + name5("x"), b"\5\0\1\0",
                        (5, 1, "x", 80, (b"u", b""), False)),
    "v5 extended": (HELLO5 + auth5(b"<torS0X>0", b"iso") + name5("x"), b"\5\2\1\0",
                    (5, 1, "x", 80, (b"<torS0X>0", b"iso"), False)),
    "v5 resolve": (b"\5\1\0" + name5("x.y", 0, 0xF0), b"\5\0", (5, 0xF0, "x.y", 0, None, False)),
    "v5 resolve ptr": (b"\5\1\0\5\xf1\0\1\1\2\3\4\0\0", b"\5\0",
                       (5, 0xF1, "1.2.3.4", 0, None, True)),
    "v5 not ascii": (b"\5\1\0" + name5("ä"), b"\5\0", (5, 1, "ä", 80, None, False)),
    "v4": (request4(ip=b"\1\2\3\4"), b"", (4, 1, "1.2.3.4", 80, None, True)),
    "v4 user": (request4(ip=b"\1\2\3\4", user=b"me"), b"",
                (4, 1, "1.2.3.4", 80, (b"me", b""), True)),
    "v4a": (request4(b"example.com"), b"", (4, 1, "example.com", 80, None, False)),
    "v4a resolve": (request4(b"x", command=0xF0), b"", (4, 0xF0, "x", 80, None, False)),
}
HTTP_GOOD = {
    "http": (connect("example.com:443", "Host: example.com"), b"",
             ("HTTP", 1, "example.com", 443, None, False)),
    "http ipv6": (connect("[::1]:80"), b"", ("HTTP", 1, "::1", 80, None, False)),
    "http isolated": (connect("x:1", "tor-stream-isolation:  a ", "X-Tor-Stream-Isolation: b",
                              "Proxy-Authorization: Basic eDp5"), b"",
                      ("HTTP", 1, "x", 1, (b"Basic eDp5", b"a", b"b"), False)),
}
BAD = {
    "v5 no method in common": (b"\5\1\1", b"\5\xff", "offered"),
    "v5 no method": (b"\5\0", b"\5\xff", "offered"),
    "v5 extended, unknown": (HELLO5 + auth5(b"<torS0X>1x", b""), b"\5\2\1\1", "torS0X"),
    "v5 extended, more": (HELLO5 + auth5(b"<torS0X>0x", b""), b"\5\2\1\1", "torS0X"),
    "v5 extended, none": (HELLO5 + auth5(b"<torS0X>", b""), b"\5\2\1\1", "torS0X"),
    "v5 auth of another version": (HELLO5 + b"\5\1u\1p", b"\5\2\1\1", "format"),
    "v5 bind": (b"\5\1\0" + name5("x", command=2), b"\5\0\5\7", "command 2"),
    "v5 udp": (b"\5\1\0" + name5("x", command=3), b"\5\0\5\7", "command 3"),
    "v5 address type": (b"\5\1\0\5\1\0\2", b"\5\0\5\x08", "address type 2"),
    "v5 version": (b"\5\1\0\4" + name5("x")[1:], b"\5\0\5\1", "version 4"),
    "v5 resolve ptr of a name": (b"\5\1\0" + name5("x.y", 0, 0xF1), b"\5\0\5\x08", "address type"),
    "v4 bind": (request4(b"x", command=2), b"\0\x5b", "command 2"),
    "v4 nowhere": (request4(ip=bytes(4)), b"\0\x5b", "address"),
    "v4 endless user": (b"\4\1\0\x50\1\2\3\4" + b"u" * 300, b"\0\x5b", "too long"),
    "v4a endless host": (b"\4\1\0\x50\0\0\0\1\0" + b"h" * 300, b"\0\x5b", "too long"),
    "http": (b"GET / HTTP/1.1\r\n", b"HTTP/1.0 501", "not SOCKS"),
    "tls": (b"\x16\3\1", b"", "not SOCKS"),
}
HTTP_BAD = {
    "get": (b"GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n", b"", "no CONNECT"),
    "get here": (b"GET / HTTP/1.1\r\nHost: localhost:8118\r\n\r\n", b"HTTP/1.0 405", "no CONNECT"),
    "options": (b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"HTTP/1.0 200", "OPTIONS"),
    "options of another site": (b"OPTIONS * HTTP/1.1\r\nHost: x.y:1\r\n\r\n", b"", "no CONNECT"),
    "no host": (b"OPTIONS * HTTP/1.1\r\n\r\n", b"", "no CONNECT"),
    "rpc": (connect("x:1", "Tor-RPC-Target: o"), b"HTTP/1.0 501", "RPC"),
    "no port": (connect("x"), b"HTTP/1.0 400", "port"),
    "bad port": (connect("x:http"), b"HTTP/1.0 400", "port"),
    "garbage": (b"\0\1\2\r\n\r\n", b"", "no HTTP"),
    "long": (b"CONNECT x:1 HTTP/1.1\r\n" + b"a: b\r\n" * 2000, b"", "8192"),
}
KINDS = [minitor.parse_socks] * (len(GOOD) + len(BAD))
KINDS += [minitor.parse_http] * (len(HTTP_GOOD) + len(HTTP_BAD))
CASES = list({**GOOD, **{"bad " + k: v for k, v in BAD.items()}, **HTTP_GOOD,
              **{"bad " + k: v for k, v in HTTP_BAD.items()}}.items())
ALL = [(name, parse, case) for parse, (name, case) in zip(KINDS, CASES)]


def fields(request):
    return tuple(getattr(request, n) for n in "version command host port auth literal".split())


@pytest.mark.parametrize("parse,case", [a[1:] for a in ALL], ids=[a[0] for a in ALL])
def test_requests_wherever_they_are_cut(parse, case):
    data, answer, wanted = case
    said, found = parse(data)
    if isinstance(wanted, str):
        assert isinstance(found, str) and wanted in found and said.startswith(answer)
    else:
        assert said == answer and fields(found) == wanted and found.used == len(data)
    whole = None
    for n in range(1, len(data) + 1):
        part, request = parse(data[:n])
        assert said.startswith(part)
        # What was decided does not change with what follows.
        assert whole is None or (part, request) == whole
        whole = (part, request) if request is not None else None
    assert whole == (said, found)
    # What follows a good request is the stream's.
    if not isinstance(found, str):
        assert parse(data + b"GET / HTTP/1.0\r\n\r\n") == (said, found)


def test_a_user_name_is_asked_for_if_it_is_offered():
    assert minitor.parse_socks(HELLO5)[0] == b"\5\2"
    assert minitor.parse_socks(HELLO5, True)[0] == b"\5\0"
    assert minitor.parse_socks(b"\5\1\2", True)[0] == b"\5\2"


def test_garbage_is_refused_or_waits_for_a_little_more():
    random.seed(17)
    for parse, first in ((minitor.parse_socks, b"\4"), (minitor.parse_socks, b"\5"),
                         (minitor.parse_socks, b""), (minitor.parse_http, b"")):
        for _ in range(300):
            data = first + os.urandom(random.randrange(1, 1500))
            answer, request = parse(data)
            assert len(answer) < 1000
            if len(data) > 1100 and parse is minitor.parse_socks:
                assert request is not None
    assert minitor.parse_http(b"a" * 8193)[1]


def test_replies():
    reply = minitor.socks_reply
    assert reply(5, 0) == b"\5\0\0\1" + bytes(6)
    assert reply(5, 0, "1.2.3.4") == b"\5\0\0\1\1\2\3\4\0\0"
    assert reply(5, 0, "2001:db8:0:0:0:0:0:1") == b"\5\0\0\4 \1\r\xb8" + bytes(11) + b"\1\0\0"
    assert reply(5, 0, "a.b") == b"\5\0\0\3\3a.b\0\0"
    assert reply(5, 0xF0) == b"\5\xf0\0\1" + bytes(6)
    assert reply(4, 0) == b"\0\x5a" + bytes(6)
    assert reply(4, 0, "1.2.3.4") == b"\0\x5a\0\0\1\2\3\4"
    assert reply(4, 5) == reply(4, 0, "::1") == reply(4, 0, "a.b") == b"\0\x5b" + bytes(6)


END = minitor.StreamError
ERRORS = [
    (END("", 2), 4, 503), (END("", 3), 5, 403), (END("", 4), 2, 503), (END("", 5), 1, 502),
    (END("", 6), 5, 502), (END("", 7), 6, 504), (END("", 8), 4, 503), (END("", 12), 5, 503),
    (END("", 1), 1, 500), (END("", 99), 1, 500), (minitor.CircuitError("", 5), 1, 500),
    (minitor.TorTimeout(""), 6, 504), (minitor.AddressError(""), (1, 0xF6), 400),
    (minitor.DescriptorError("", 0xF0), (4, 0xF0), 503),
    (minitor.DescriptorError("", 0xF1), (4, 0xF1), 503),
    (minitor.OnionError("", 0xF2), (4, 0xF2), 503), (minitor.OnionError("", 0xF3), (4, 0xF3), 503),
    (minitor.OnionError(""), 4, 503),
]


@pytest.mark.parametrize("error,codes,status", ERRORS, ids=["%s %d" % (
    type(e[0]).__name__, e[0].reason) for e in ERRORS])
def test_errors_as_the_client_sees_them(error, codes, status):
    plain, extended = codes if isinstance(codes, tuple) else (codes, codes)
    request = minitor.parse_socks(b"\5\1\0" + name5(ONION))[1]
    assert minitor.proxy_error(request, error, False)[1] == plain
    assert minitor.proxy_error(request, error, True)[1] == extended
    request = minitor.parse_socks(b"\5\1\0" + name5(ONION, 0, 0xF0))[1]
    assert minitor.proxy_error(request, minitor.AddressError("no IP address"), True)[1] == 1
    request = minitor.parse_socks(request4(b"x"))[1]
    assert minitor.proxy_error(request, error, True) == b"\0\x5b" + bytes(6)
    request = minitor.parse_http(connect("x:1"))[1]
    head = minitor.proxy_error(request, error, True).decode()
    assert head.startswith("HTTP/1.0 %d " % status) and head.endswith("\r\n\r\n")
    assert "\r\nTor-Request-Failed: minitor/%s" % type(error).__name__ in head
    assert (" end/" in head) == (isinstance(error, END) and error.reason < 15)


# ─── listeners ───


def test_listeners_and_flags():
    parse = minitor.parse_listener
    assert (parse(9050).host, parse("9050").port) == ("127.0.0.1", 9050)
    assert parse("localhost:1").host == "127.0.0.1" and parse("auto").port == 0
    assert (parse("[::1]:9050").host, parse("0.0.0.0:auto").host) == ("::1", "0.0.0.0")
    assert parse("unix:/a b:c").path == "/a b:c"
    for bad in ("", "x", "x:1", "1.2.3.4", "70000", "1.2.3:1", "example.com:9050", "-1"):
        with pytest.raises(minitor.ConfigError):
            parse(bad)
    assert parse(1).on == {"isolateclientaddr", "isolatesocksauth", "ipv4traffic", "ipv6traffic",
                           "dnsrequest", "oniontraffic"}
    on = parse(1, "NoIsolateSOCKSAuth isolatedestaddrs ISOLATEDESTPORT NoIPv4Traffic CacheDNS").on
    assert {"isolatedestaddr", "isolatedestport", "prefersocksnoauth"} <= on
    assert not {"isolatesocksauth", "ipv4traffic"} & on
    assert parse(1, ["SessionGroup=7"]).group == 7 and parse(1).group is None
    assert not {"ipv4traffic", "ipv6traffic", "dnsrequest"} & parse(1, "OnionTrafficOnly").on
    assert "isolateclientaddr" not in parse("unix:/x").on
    for bad in ("Isolate", "SessionGroup=x", "NoOnionTrafficOnly", "WorldWritable", "Foo",
                "NoIsolateSOCKSAuth KeepAliveIsolateSOCKSAuth"):
        with pytest.raises(minitor.ConfigError):
            parse(1, bad)


class FakeStream:
    """A stream that is a TCP connection to this machine."""

    def __init__(self, reader, writer, circuit):
        self.read, self.circuit, self.early = reader.read, circuit, 0
        self.write, self.drain, self.close = writer.write, writer.drain, writer.close


class FakeTor:
    """Gives streams to `port` here, or raises `error`; notes what it was `asked` for."""

    def __init__(self):
        self.proxies, self.wanted, self.ready, self.asked = [], {}, True, []
        self.port, self.error, self.gate, self.went = 0, None, None, []
        self.circuit = minitor.SimpleNamespace(since=0)

    def _attach(self, proxy):
        self.proxies.append(proxy)

    async def open_connection(self, host, port, timeout, isolation, flags, early):
        self.asked.append((host, port, isolation, flags))
        try:
            if self.gate:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.went.append(host)
            raise
        if self.error:
            raise self.error
        stream = FakeStream(*await asyncio.open_connection("127.0.0.1", self.port), self.circuit)
        stream.early = len(early)
        stream.write(bytes(early))
        return stream, stream

    async def resolve(self, host, isolation):
        self.asked.append((host, isolation))
        if self.error:
            raise self.error
        return ["2001:db8:0:0:0:0:0:1", "1.2.3.4"]

    async def resolve_ptr(self, address, isolation):
        self.asked.append((address, isolation))
        return ["name.example"]


async def echo(reader, writer):
    while True:
        data = await reader.read(65536)
        if not data:
            break
        writer.write(data)
        await writer.drain()
    writer.close()


def serving(kind, flags, use, where="127.0.0.1:0"):
    """Run `use(tor, proxy, dial)` with a proxy before an echo server."""

    async def main():
        server, tor = await asyncio.start_server(echo, "127.0.0.1", 0), FakeTor()
        tor.port = server.sockets[0].getsockname()[1]
        proxy = await minitor.Proxy(kind, where, flags).start(tor)
        writers = []

        async def dial():
            if proxy.address[:5] == "unix:":
                pair = await asyncio.open_unix_connection(proxy.address[5:])
            else:
                host, _, port = proxy.address.rpartition(":")
                pair = await asyncio.open_connection(host.strip("[]"), int(port))
            writers.append(pair[1])
            return pair

        try:
            await asyncio.wait_for(use(tor, proxy, dial), 30)
        finally:
            for writer in writers:
                writer.close()
            proxy.close()
            server.close()
        await asyncio.sleep(0.05)
        assert not tor.proxies and not proxy._tasks

    asyncio.run(main())


async def ask(dial, data, size=10):
    reader, writer = await dial()
    writer.write(data)
    return await reader.readexactly(size), reader, writer


@pytest.mark.parametrize("where", ["127.0.0.1:0", "[::1]:0", "unix"])
def test_a_stream(where, tmp_path):
    where = "unix:%s/socks" % tmp_path if where == "unix" else where
    if "::1" in where:
        with socket.socket(socket.AF_INET6) as trial:
            if trial.connect_ex(("::1", 9)) == 99:
                pytest.skip("no IPv6 here")

    async def use(tor, proxy, dial):
        if where[:5] == "unix:":
            assert stat.S_IMODE(os.stat(where[5:]).st_mode) == 0o600
        for start in (HELLO5 + auth5(b"a", b"b") + name5("x.y"), b"\5\1\0" + name5("x.y"),
                      request4(b"x.y")):
            answer, reader, writer = await ask(dial, start, {4: 8, 5: 2}[start[0]])
            if start[0] == 5:
                rest = await reader.readexactly(12 if start[1] == 2 else 10)
                assert rest[-10:] == b"\5\0\0\1" + bytes(6)
            else:
                assert answer == b"\0\x5a" + bytes(6)
            for size in (1, 300000):
                body = os.urandom(size)
                writer.write(body)
                assert await reader.readexactly(size) == body
            writer.close()
        assert [a[:2] for a in tor.asked] == [("x.y", 80)] * 3
        assert tor.asked[0][3] == 1

    serving("socks", "", use, where)
    assert not (tmp_path / "socks").exists()


def test_a_stream_by_http():
    async def use(tor, proxy, dial):
        head, reader, writer = await ask(dial, connect("x.y:443") + b"early", 12)
        assert head == b"HTTP/1.0 200"
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5) == b"early"
        reader, writer = await dial()
        writer.write(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await reader.read()
        assert b"Allow: OPTIONS, CONNECT" in answer and b"Tor-Capabilities:" in answer
        assert b"\r\nServer: tor/1.0 (minitor" in answer
        tor.error = minitor.StreamError("x", 4)
        answer, reader, writer = await ask(dial, connect("x.y:443"), 12)
        assert answer == b"HTTP/1.0 503" and b"end/EXITPOLICY\r\n" in await reader.read()

    serving("http", "", use)


def test_data_before_the_answer_goes_along():
    async def use(tor, proxy, dial):
        tor.gate = asyncio.Event()
        reader, writer = await dial()
        body = os.urandom(150000)
        writer.write(b"\5\1\0" + name5("x.y") + body[:1000])
        await asyncio.sleep(0.05)
        writer.write(body[1000:])
        await asyncio.sleep(0.1)
        tor.gate.set()
        await reader.readexactly(12)
        assert await reader.readexactly(len(body)) == body

    serving("socks", "", use)


def test_one_who_goes_away_stops_the_work():
    async def use(tor, proxy, dial):
        tor.gate = asyncio.Event()
        for start in (b"", b"\5", b"\5\1\0", b"\5\1\0" + name5("x.y")[:7]):
            reader, writer = await dial()
            writer.write(start)
            await asyncio.sleep(0.02)
            writer.close()
        reader, writer = await dial()
        writer.write(b"\5\1\0" + name5("gone") + b"data")
        await asyncio.sleep(0.05)
        assert [a[0] for a in tor.asked] == ["gone"] and not tor.went
        writer.transport.abort()
        await asyncio.sleep(0.1)
        assert tor.went == ["gone"] and not proxy._tasks

    serving("socks", "", use)


def test_a_half_closed_connection_ends_when_all_was_sent():
    async def use(tor, proxy, dial):
        got = []

        async def sink(reader, writer):
            got.append(await reader.read())
            writer.close()

        server = await asyncio.start_server(sink, "127.0.0.1", 0)
        tor.port = server.sockets[0].getsockname()[1]
        _, reader, writer = await ask(dial, request4(b"x"), 8)
        body = os.urandom(200000)
        writer.write(body)
        writer.write_eof()
        assert await reader.read() == b""
        await asyncio.sleep(0.05)
        assert got == [body]
        server.close()

    serving("socks", "", use)


def test_one_that_stalls_is_let_go(monkeypatch):
    monkeypatch.setattr(minitor, "PROXY_SECONDS", 0.2)

    async def use(tor, proxy, dial):
        reader, _ = await dial()
        assert await reader.read() == b""
        reader, writer = await dial()
        writer.write(b"\5\1\0\5\1")
        assert await reader.read() == b"\5\0"
        # Tor does not get ready, either.
        tor.ready = False
        answer, reader, _ = await ask(dial, b"\5\1\0" + name5("x"), 12)
        assert answer[3] == 6 and await reader.read() == b""

    serving("socks", "", use)


def test_garbage_costs_one_connection():
    async def use(tor, proxy, dial):
        random.seed(3)
        for i in range(100):
            reader, writer = await dial()
            first = random.choice((b"", b"\4", b"\5", b"G"))
            writer.write(first + os.urandom(random.randrange(1, 600)))
            writer.write_eof()
            try:
                assert len(await reader.read()) < 1000
            except OSError:
                pass
        assert (await ask(dial, request4(b"x"), 8))[0][1] == 0x5A

    serving("socks", "", use)


def test_many_at_once():
    async def use(tor, proxy, dial):
        tor.gate = asyncio.Event()
        asks = [asyncio.ensure_future(ask(dial, request4(b"x%d" % i), 8)) for i in range(200)]
        while len(tor.asked) < 200:
            await asyncio.sleep(0.02)
        tor.gate.set()
        assert {(await a)[0] for a in asks} == {b"\0\x5a" + bytes(6)}

    serving("socks", "", use)


def test_resolving():
    async def use(tor, proxy, dial):
        assert (await ask(dial, b"\5\1\0" + name5("x.y", 0, 0xF0), 12))[0] == (
            b"\5\0\5\0\0\1\1\2\3\4\0\0")
        assert (await ask(dial, request4(b"x.y", command=0xF0), 8))[0] == b"\0\x5a\0\0\1\2\3\4"
        # What is an address is known without asking.
        before = len(tor.asked)
        assert (await ask(dial, b"\5\1\0" + name5("5.6.7.8", 0, 0xF0), 12))[0][-6:] == (
            b"\5\6\7\x08\0\0")
        assert len(tor.asked) == before
        answer = (await ask(dial, b"\5\1\0\5\xf1\0\1\1\2\3\4\0\0", 21))[0]
        assert answer == b"\5\0\5\0\0\3\x0cname.example\0\0"
        assert tor.asked[-1][0] == "1.2.3.4"
        tor.error = minitor.StreamError("none", 2)
        assert (await ask(dial, b"\5\1\0" + name5("x.y", 0, 0xF0), 12))[0][3] == 4

    serving("socks", "", use)


@pytest.mark.parametrize("flags,apart", [
    ("", {"group", "auth", "client"}), ("NoIsolateSOCKSAuth", {"group", "client"}),
    ("IsolateDestPort", {"group", "auth", "client", "port"}),
    ("IsolateDestAddr", {"group", "auth", "client", "host"}),
    ("IsolateClientProtocol NoIsolateClientAddr", {"group", "auth", "version"}),
    ("SessionGroup=1", {"auth", "client"}),
    ("NoIsolateSOCKSAuth SessionGroup=1 NoIsolateClientAddr", set()),
])
def test_what_shares_circuits(flags, apart):
    async def use(tor, proxy, dial):
        other = await minitor.Proxy("socks", 0, flags).start(tor)
        base = b"\5\1\0" + name5("x")
        starts = {"same": base, "port": b"\5\1\0" + name5("x", 81), "host": b"\5\1\0" + name5("y"),
                  "auth": HELLO5 + auth5(b"u", b"") + name5("x"), "version": request4(b"x")}

        async def key(start, port, source="127.0.0.1"):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, local_addr=(source, 0))
            writer.write(start)
            await reader.readexactly(8)
            writer.close()
            return tor.asked[-1][2]

        ports = [int(p.address.rpartition(":")[2]) for p in (proxy, other)]
        first = await key(base, ports[0])
        found = {name for name, start in starts.items() if await key(start, ports[0]) != first}
        found |= {"group"} if await key(base, ports[1]) != first else set()
        found |= {"client"} if await key(base, ports[0], "127.0.0.2") != first else set()
        assert found == apart
        other.close()

    serving("socks", flags, use)


def test_keep_alive():
    """With KeepAliveIsolateSOCKSAuth a circuit lives on from its last stream, not its first."""
    for flags, user, kept in (("", b"u", False), ("KeepAliveIsolateSOCKSAuth", b"u", True),
                              ("KeepAliveIsolateSOCKSAuth", b"", False)):
        async def use(tor, proxy, dial):
            _, reader, writer = await ask(dial, HELLO5 + auth5(user, b"") + name5("x"), 14)
            await asyncio.sleep(0.02)
            assert bool(tor.circuit.since) == kept
            tor.circuit.since = 0
            writer.close()
            await asyncio.sleep(0.05)
            assert bool(tor.circuit.since) == kept

        serving("socks", flags, use)


def test_flags_that_refuse_and_flags_of_begin():
    async def only(tor, proxy, dial):
        assert (await ask(dial, b"\5\1\0" + name5("example.com"), 12))[0][3] == 2
        assert (await ask(dial, b"\5\1\0\5\1\0\1\1\2\3\4\0\x50", 12))[0][3] == 2
        assert (await ask(dial, b"\5\1\0" + name5(ONION), 12))[0][3] == 0
        assert [a[0] for a in tor.asked] == [ONION]

    async def none(tor, proxy, dial):
        assert (await ask(dial, b"\5\1\0" + name5(ONION), 12))[0][3] == 2
        assert (await ask(dial, b"\5\1\0" + name5("x"), 12))[0][3] == 0
        assert tor.asked[0][3] == 1 | 2 | 4

    serving("socks", "OnionTrafficOnly", only)
    serving("socks", "NoOnionTraffic NoIPv4Traffic PreferIPv6", none)


# ─── warnings ───


@pytest.fixture
def logged():
    lines = []
    minitor.set_log(minitor.INFO, lambda severity, text: lines.append((severity, text)))
    yield lines
    minitor.set_log(minitor.NOTICE)


def test_addresses_are_warned_about_once_and_no_destination_is_logged(logged):
    async def use(tor, proxy, dial):
        for _ in range(2):
            await ask(dial, b"\5\1\0\5\1\0\1\x09\x08\x07\x06\x7a\x69", 12)
            await ask(dial, request4(ip=b"\x09\x08\x07\x06", port=31337), 8)
        warned = [text for severity, text in logged if severity == minitor.WARN]
        assert len(warned) == 2 and "SOCKS5" in warned[0] and "SOCKS4" in warned[1]
        await ask(dial, b"\5\1\0\5\xf1\0\1\1\2\3\4\0\0", 12)
        await ask(dial, b"\5\1\0" + name5("secret.example"), 12)
        tor.error = minitor.StreamError("secret.example:80: refused", 3)
        await ask(dial, HELLO5 + auth5(b"hidden", b"word") + name5("secret.example"), 14)
        await asyncio.sleep(0.05)
        assert len([1 for severity, _ in logged if severity == minitor.WARN]) == 2
        for _, text in logged:
            assert not [w for w in ("secret", "9.8.7.6", "31337", "hidden", "word:") if w in text]

    serving("socks", "", use)


def test_http_warnings(logged):
    async def use(tor, proxy, dial):
        new = "Proxy-Authorization: Basic " + base64.b64encode(b"tor:iso").decode()
        for field in (new, new.replace("dG9yOmlz", "dG9yLWlzbzpp"), "Tor-Stream-Isolation: x"):
            await ask(dial, connect("x:1", field), 12)
        assert not [text for severity, text in logged if severity == minitor.WARN]
        for value in ("Basic eDp5", "Basic !", "x"):
            await ask(dial, connect("x:1", "Proxy-Authorization: " + value), 12)
        reader, writer = await dial()
        writer.write(b"GET http://secret/ HTTP/1.1\r\nHost: secret\r\n\r\n")
        assert await reader.read() == b""
        warned = [text for severity, text in logged if severity == minitor.WARN]
        assert len(warned) == 2 and "Authorization" in warned[0] and "proxytunnel" in warned[1]
        assert "secret" not in str(logged)

    serving("http", "", use)


def test_addresses_that_others_reach_are_warned_about(logged):
    for where, warned in (("127.0.0.1:0", 0), ("0", 0), ("localhost:0", 0), ("0.0.0.0:0", 1)):
        del logged[:]
        minitor.Proxy("socks", where).close()
        assert len(logged) == warned, where


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(minitor.ConfigError, match="in use"):
            minitor.Proxy("socks", taken.getsockname()[1])
    path = str(tmp_path / "s")
    first = minitor.Proxy("socks", "unix:" + path, "GroupWritable")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    with pytest.raises(minitor.ConfigError, match="in use"):
        minitor.Proxy("socks", "unix:" + path)
    # What a process left that was killed gives way, a file does not.
    first._socket.close()
    minitor.Proxy("socks", "unix:" + path).close()
    assert not os.path.exists(path)
    (tmp_path / "s").write_text("mine")
    with pytest.raises(minitor.ConfigError):
        minitor.Proxy("socks", "unix:" + path)
    assert (tmp_path / "s").read_text() == "mine"
