"""Bridges and pluggable transports: lines, plugins that misbehave, descriptors, paths."""

import ast
import asyncio
import contextlib
import json
import os
import random
import socket
import sys
from pathlib import Path

import pytest

import minitor
from test_paths import make_consensus, network

FINGERPRINT = "0123456789abcdef0123456789ABCDEF01234567"
ID = bytes.fromhex(FINGERPRINT)


def configure(text):
    return minitor.configure(list(minitor.parse_torrc(text)))


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(minitor, "_log", [minitor.DEBUG, lambda severity, text: lines.append(text)])
    return lines


# ── Lines of a torrc


@pytest.mark.parametrize("text, expected", [
    ("1.2.3.4:5", (None, ("1.2.3.4", 5), b"", [])),
    ("1.2.3.4", (None, ("1.2.3.4", 443), b"", [])),
    ("1.2.3.4:5 " + FINGERPRINT, (None, ("1.2.3.4", 5), ID, [])),
    ("1.2.3.4:5 $" + FINGERPRINT, (None, ("1.2.3.4", 5), ID, [])),
    ("1.2.3.4:5 %s %s" % (FINGERPRINT[:4], FINGERPRINT[4:]), (None, ("1.2.3.4", 5), ID, [])),
    ("[2001:db8::1]:5 " + FINGERPRINT, (None, ("2001:db8::1", 5), ID, [])),
    ("obfs4 1.2.3.4:5 %s cert=a+/= iat-mode=0" % FINGERPRINT,
     ("obfs4", ("1.2.3.4", 5), ID, ["cert=a+/=", "iat-mode=0"])),
    ("obfs4 1.2.3.4:5 a=", ("obfs4", ("1.2.3.4", 5), b"", ["a="])),
    ("_x9 [::1]:5", ("_x9", ("::1", 5), b"", [])),
])
def test_bridge_line(text, expected):
    config = configure("Bridge " + text)
    assert config["Bridge"] == [expected]


@pytest.mark.parametrize("text", [
    "obfs4", "obfs4 " + FINGERPRINT, "1.2.3.4:0", "1.2.3.4:65536", "example.com:443",
    "1.2.3.4:5 " + FINGERPRINT[1:], "1.2.3.4:5 %s x" % FINGERPRINT, "1.2.3.4:5 cert=x",
    "obfs4 1.2.3.4:5 %s x" % FINGERPRINT, "obfs4 1.2.3.4:5 xyz", "obfs4 1.2.3.4:5 a=b c",
    "obfs4 1.2.3.4:5 =b", "obfs-4 1.2.3.4:5", "obfs4 1.2.3.4:5 a=" + 509 * "x", "[::1:5",
    "1.2.3.4.5:6", "ü 1.2.3.4:5",
])
def test_bad_bridge_line_is_refused_with_its_line(text):
    with pytest.raises(minitor.ConfigError, match="torrc:2: Bridge "):
        configure("\nBridge " + text)


@pytest.mark.parametrize("text, expected", [
    ("obfs4 exec /x", (["obfs4"], "exec", ["/x"])),
    ("obfs4,meek  exec /x --log  y", (["obfs4", "meek"], "exec", ["/x", "--log", "y"])),
    ("a socks5 127.0.0.1:5", (["a"], "socks5", ("127.0.0.1", 5))),
    ("a socks4 [::1]:5", (["a"], "socks4", ("::1", 5))),
])
def test_plugin_line(text, expected):
    assert configure("ClientTransportPlugin " + text)["ClientTransportPlugin"] == [expected]


@pytest.mark.parametrize("text", [
    "obfs4", "obfs4 exec", "obfs4 run /x", "ob-fs exec /x", "a, exec /x", "* exec /x",
    "a,b socks5 127.0.0.1:5", "a socks5 127.0.0.1", "a socks5 proxy.example:5", "a socks5 1.2.3.4:x",
])
def test_bad_plugin_line_is_refused_with_its_line(text):
    with pytest.raises(minitor.ConfigError, match="torrc:2: ClientTransportPlugin "):
        configure("\nClientTransportPlugin " + text)


@pytest.mark.parametrize("text, what", [
    ("UseBridges 1", "torrc:1: UseBridges: no Bridge line"),
    ("UseBridges 1\nBridge 1.2.3.4:5\nEntryNodes " + FINGERPRINT, "torrc:3: EntryNodes: with"),
    ("UseBridges 1\nBridge obfs4 1.2.3.4:5", "torrc:2: Bridge obfs4 1.2.3.4:5: no ClientTransp"),
    ("UseBridges 1\nClientTransportPlugin x,y exec /x\nBridge z 1.2.3.4:5",
     "torrc:3: .*the transport z"),
])
def test_what_does_not_fit_together_is_refused(text, what):
    with pytest.raises(minitor.ConfigError, match=what):
        configure(text)
    configure(text.replace("UseBridges 1", "UseBridges 0"))


def test_a_transport_without_a_plugin_leaves_the_other_bridges(logged):
    config = configure("UseBridges 1\nBridge z 1.2.3.4:5\nBridge 1.2.3.5:6")
    assert [b.port for b in minitor.Bridges(config=config).bridges] == [6]
    assert any("torrc:2" in line and "transport z" in line for line in logged)


def test_excluded_bridges_are_not_used(logged):
    text = "UseBridges 1\nBridge 1.2.3.4:5\nBridge 1.2.9.5:6 %s\nBridge [::1]:7 %s\n" % (
        FINGERPRINT, "1" * 40)
    for nodes, left in (("1.2.3.0/24", [6, 7]), (FINGERPRINT, [5, 7]), ("1" * 40, [5, 6])):
        config = configure(text + "ExcludeNodes " + nodes)
        assert [b.port for b in minitor.Bridges(config=config).bridges] == left
    with pytest.raises(minitor.ConfigError, match="ExcludeNodes"):
        minitor.Bridges(config=configure(text + "ExcludeNodes 1.0.0.0/8," + "1" * 40))


def test_bridges_in_a_program():
    bridges = minitor.Bridges(["1.2.3.4:5", "o 1.2.3.5:6 a=b"], ["o exec /x"]).bridges
    assert [str(b) for b in bridges] == [
        "bridge 1.2.3.4:5 (bridge 1)", "bridge o 1.2.3.5:6 (bridge 2)"]
    with pytest.raises(minitor.ConfigError, match="bridge 2: Bridge 1.2.3:5"):
        minitor.Bridges(["1.2.3.4:5", "1.2.3:5"])
    with pytest.raises(minitor.ConfigError, match="transport 1: ClientTransportPlugin o"):
        minitor.Bridges(["1.2.3.4:5"], ["o"])
    with pytest.raises(minitor.ConfigError, match="no Bridge line"):
        minitor.Bridges()


def test_the_last_bridge_at_an_address_counts(logged):
    bridges = minitor.Bridges(["1.2.3.4:5 " + FINGERPRINT, "1.2.3.4:5"]).bridges
    assert [b.rsa_id for b in bridges] == [b""] and "again" in logged[-1]


# ── What a plugin says


def said(*lines):
    methods = {}
    return [minitor.take_plugin_line(line, methods) for line in lines][-1], methods


def test_what_a_plugin_says():
    done, methods = said(
        "STATUS TRANSPORT=x A=b", "hello", "", "VERSION 1", "PROXY DONE", "SMETHOD x",
        "CMETHOD obfs4 socks5 127.0.0.1:5", "CMETHOD meek socks4 [::1]:6",
        "CMETHOD-ERROR odd no rocks available", "CMETHODS DONE")
    assert done and methods == {
        "": "1", "obfs4": (5, ("127.0.0.1", 5)), "meek": (4, ("::1", 6)),
        "odd": "no rocks available"}
    assert not said("VERSION 1", "CMETHODS")[0]


@pytest.mark.parametrize("lines, what", [
    (("VERSION-ERROR no-version",), "VERSION-ERROR no-version"), (("ENV-ERROR x",), "ENV-ERROR x"),
    (("VERSION 2",), "another version"), (("CMETHOD a socks5 127.0.0.1:5",), "VERSION first"),
    (("CMETHODS DONE",), "VERSION first"), (("VERSION 1", "PROXY-ERROR x"), "PROXY-ERROR x"),
    (("VERSION 1", "CMETHOD a socks6 127.0.0.1:5"), "socks6"),
    (("VERSION 1", "CMETHOD a socks5 localhost:5"), "localhost"),
    (("VERSION 1", "CMETHOD a socks5"), "CMETHOD a"), (("VERSION 1", "CMETHOD a"), "CMETHOD a"),
    (("VERSION 1", "CMETHOD a socks5 127.0.0.1:x"), "CMETHOD a"),
])
def test_a_plugin_that_fails_says_why(lines, what):
    with pytest.raises(minitor.ProtocolError, match=what):
        said(*lines)


PLUGIN = """
import os, sys, time
%s
"""


@contextlib.asynccontextmanager
async def plugin(tmp_path, text, names=("a", "b")):
    script = tmp_path / "plugin.py"
    script.write_text(PLUGIN % text)
    found = minitor.Plugin(list(names), [sys.executable, str(script)], str(tmp_path / "state"))
    try:
        yield found
    finally:
        await found.close()


GOOD = """
print("VERSION 1\\nCMETHOD a socks5 127.0.0.1:5\\nCMETHOD-ERROR b broken\\nCMETHODS DONE")
sys.stdout.flush()
"""
WAIT = """
sys.stdin.read()
open(os.environ["TOR_PT_STATE_LOCATION"], "w").write(repr(sorted(
    i for i in os.environ.items() if i[0][:3] == "TOR")))
"""


def test_a_plugin_is_started_and_ended(tmp_path):
    async def run():
        async with plugin(tmp_path, GOOD + WAIT) as found:
            assert await found.method("a") == (5, ("127.0.0.1", 5))
            with pytest.raises(minitor.ChannelError, match="plugin .* has no b: broken"):
                await found.method("b")
            with pytest.raises(minitor.ChannelError, match="has no c: it does not offer"):
                await found.method("c")
            pid = found._process.pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(run())
    # It ended because its input did, and had what pt-spec 3.2 wants.
    assert eval((tmp_path / "state").read_text()) == [
        ("TOR_PT_CLIENT_TRANSPORTS", "a,b"), ("TOR_PT_EXIT_ON_STDIN_CLOSE", "1"),
        ("TOR_PT_MANAGED_TRANSPORT_VER", "1"), ("TOR_PT_STATE_LOCATION", str(tmp_path / "state"))]


def test_a_plugin_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(minitor, "_PLUGIN_END", 0.2)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + GOOD

    async def run():
        async with plugin(tmp_path, stubborn + "time.sleep(600)") as found:
            await found.method("a")
            pid = found._process.pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(run())


@pytest.mark.parametrize("text, what", [
    ("", "ended before it was ready"), ("print('hello')", "ended before it was ready"),
    ("os.write(1, bytes(range(256)) * 4000)", "ended before it was ready"),
    ("print('VERSION 7', flush=True); time.sleep(600)", "another version: 7"),
    ("print('VERSION 1', flush=True); time.sleep(600)", "not ready within 0.3 s"),
    ("sys.stdin.close(); time.sleep(600)", "not ready within 0.3 s"),
    ("while True: os.write(1, b'x' * 999)", "not ready within 0.3 s"),
    ("while True: os.write(1, b'x' * 99 + b'\\n')", "not ready within 0.3 s"),
])
def test_a_plugin_that_fails_is_told_about(tmp_path, monkeypatch, text, what):
    monkeypatch.setattr(minitor, "_PLUGIN_SECONDS", 0.3 if "0.3" in what else 30)
    monkeypatch.setattr(minitor, "_PLUGIN_END", 0.1)

    async def run():
        async with plugin(tmp_path, text) as found:
            with pytest.raises(minitor.ChannelError, match="the transport plugin .*" + what):
                await found.method("a")

    asyncio.run(run())


def test_a_plugin_that_is_not_there():
    async def run():
        found = minitor.Plugin(["a"], ["/nowhere/x"], "/tmp")
        with pytest.raises(minitor.ChannelError, match="plugin /nowhere/x cannot be started"):
            await found.method("a")
        await found.close()

    asyncio.run(run())


def test_a_plugin_that_dies_is_started_again_after_growing_pauses(tmp_path, monkeypatch, logged):
    # Who lives longer than the longest pause begins with the shortest again: not a slow start.
    monkeypatch.setattr(minitor, "_PLUGIN_PAUSES", (0.5, 2.0))
    count = "open(%r, 'a').write('x')\n" % str(tmp_path / "count")

    async def run():
        async with plugin(tmp_path, count + GOOD) as found:
            for _ in range(600):
                if len([line for line in logged if "again in" in line]) > 4:
                    break
                await asyncio.sleep(0.05)

    asyncio.run(run())
    pauses = [line.split()[-2] for line in logged if "started again in" in line]
    assert pauses[:4] == ["0.5", "1.0", "2.0", "2.0"]
    assert len((tmp_path / "count").read_text()) >= 5
    assert "plugin.py" not in logged[0] and any(
        line.endswith("ended; the last it said: CMETHODS DONE; it is started again in 0.5 s")
        for line in logged)


# ── SOCKS to a transport (pt-spec 3.5)


def through(version, answer, place=("1.2.3.4", 5), words=(), piece=99):
    """What a proxy that says `answer` hears from dial_through, and what comes of that."""
    heard = []

    async def serve(reader, writer):
        for i, part in enumerate(answer):
            heard.append(await reader.read(2000))
            for at in range(0, len(part), piece):
                writer.write(part[at : at + piece])
                await writer.drain()
                await asyncio.sleep(0)
        if answer[-1] != b"wait":
            writer.close()

    async def run():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            proxy = server.sockets[0].getsockname()
            words_ = minitor.socks_arguments(words)
            sock = await asyncio.wait_for(minitor.dial_through(version, proxy, place, words_), 5)
            sock.close()

    try:
        asyncio.run(run())
        return heard, None
    except minitor.ChannelError as e:
        return heard, str(e)


OK5, NONE = b"\5\0\0\1" + bytes(6), b"\5\0"


@pytest.mark.parametrize("piece", [1, 99])
def test_socks_5(piece):
    for answer in (OK5, b"\5\0\0\4" + bytes(18), b"\5\0\0\3\4abcd\0\0"):
        heard, error = through(5, [NONE, answer], piece=piece)
        assert heard == [b"\5\1\0", b"\5\1\0\1\1\2\3\4\0\5"] and not error
    heard, error = through(5, [NONE, OK5], ("2001:db8::1", 443))
    assert heard[1] == b"\5\1\0\4" + socket.inet_pton(socket.AF_INET6, "2001:db8::1") + b"\1\xbb"


@pytest.mark.parametrize("words, user, password", [
    (["a=b"], b"a=b", b"\0"), (["a=b;\\", "c==d"], b"a=b\\;\\\\;c==d", b"\0"),
    (["a=" + 253 * "x"], b"a=" + 253 * b"x", b"\0"),
    (["a=" + 254 * "x"], b"a=" + 253 * b"x", b"x"),
    (["a=" + 508 * "x"], b"a=" + 253 * b"x", 255 * b"x"),
])
def test_arguments_go_as_user_name_and_password(words, user, password):
    heard, error = through(5, [b"\5\2", b"\1\0", OK5], words=words)
    assert not error and heard[0] == b"\5\1\2"
    assert heard[1] == b"\1%c%s%c%s" % (len(user), user, len(password), password)


def test_socks_4():
    heard, error = through(4, [b"\0\x5a" + bytes(6)], words=["a=b", "c=d"])
    assert heard == [b"\4\1\0\5\1\2\3\4a=b;c=d\0"] and not error
    assert "no IPv6" in through(4, [b""], ("::1", 5))[1]
    assert "code 91" in through(4, [b"\0\x5b" + bytes(6)])[1]


@pytest.mark.parametrize("answer, words, what", [
    ([b"\5\xff"], [], "takes no arguments"), ([b"\5\0"], ["a=b"], "takes no arguments"),
    ([b"\5\2"], [], "takes no arguments"), ([b"\5\2", b"\1\1"], ["a=b"], "refuses the arguments"),
    ([NONE, b"\5\5\0\1" + bytes(6)], [], "connection refused"),
    ([NONE, b"\5\x63\0\1" + bytes(6)], [], "unknown reason 99"), ([NONE, b"\5\0"], [], "hung up"),
    ([b""], [], "hung up"), ([NONE, b"\5\4\0\1" + bytes(6)], [], "host unreachable"),
])
def test_a_transport_that_refuses(answer, words, what):
    assert what in through(5, answer, words=words)[1]


# ── Its descriptor, from the bridge itself (dir-spec 2.1.1)

MADE = json.loads((Path(__file__).resolve().parent / "bridge_made.json").read_text())
TEXT = MADE["text"].encode()
KEYS = bytes.fromhex(MADE["rsa_id"]), bytes.fromhex(MADE["ed_id"])


def test_descriptor_of_a_bridge():
    found = minitor.parse_router(TEXT, *KEYS, MADE["when"])
    assert b"\nntor-onion-key " + minitor.b64encode(found.ntor_key).encode() + b"\n" in TEXT
    assert found.family_ids == {minitor.sha256(MADE["family_id"].encode())[:8]}
    assert found.family == set()


def test_a_descriptor_that_is_anothers_is_refused():
    for keys in ((bytes(20), KEYS[1]), (KEYS[0], bytes(32))):
        with pytest.raises(minitor.ProtocolError, match="another relay's"):
            minitor.parse_router(TEXT, *keys, MADE["when"])
    with pytest.raises(minitor.ProtocolError, match="expired"):
        minitor.parse_router(TEXT, *KEYS, MADE["when"] + 90 * 86400)
    # There is no other behind it.
    for more, what in ((TEXT, "two"), (b"router x 1.2.3.4 1 0 0\n", "two router")):
        with pytest.raises(minitor.ProtocolError, match=what):
            minitor.parse_router(TEXT + more, *KEYS, MADE["when"])


def test_a_descriptor_that_was_changed_is_refused():
    end, chance = TEXT.index(b"\n-----BEGIN SIGNATURE"), random.Random(3)
    for _ in range(100):
        at = chance.randrange(end)
        changed = TEXT[:at] + bytes([chance.randrange(256)]) + TEXT[at + 1 :]
        if changed != TEXT:
            with pytest.raises(minitor.ProtocolError):
                minitor.parse_router(changed, *KEYS, MADE["when"])
    lines = TEXT.splitlines(True)
    for i in range(lines.index(b"router-signature\n") + 1):
        for changed in (lines[:i] + lines[i + 1 :], lines[:i], lines[: i + 1] + lines[i:]):
            with pytest.raises(minitor.ProtocolError):
                minitor.parse_router(b"".join(changed), *KEYS, MADE["when"])


@pytest.mark.parametrize("line, expected", [
    (b"family $%s $%s=name $%s~name name" % (b"0a" * 20, b"0b" * 20, b"0C" * 20), b"\n\v\f"),
    (b"family x $12", b""), (b"family", b""),
])
def test_family_of_a_bridge(monkeypatch, line, expected):
    for name in ("rsa_verify", "ed25519_verify"):
        monkeypatch.setattr(minitor, name, lambda *_: True)
    text = TEXT.replace(b"\nontact none", b"").replace(b"\ncontact none", b"\n" + line)
    found = minitor.parse_router(text, *KEYS, MADE["when"])
    assert found.family == {bytes([n]) * 4 for n in expected}


# ── Where circuits enter


class Fake:
    """What Bridges needs of an AsyncTor."""

    def __init__(self, folder):
        self.data_dir, self.bridges, self._channels = str(folder), None, minitor.Channels()
        self.directory = minitor.Record()
        self.directory._report = lambda *what: None


def bridges(tmp_path, *lines):
    found = minitor.Bridges(lines)
    found.attach(Fake(tmp_path))
    for bridge in found.bridges:
        bridge.ntor_key = bytes(32)
    found._list_guards()
    return found


def exit_paths(paths, count):
    # An exit that may not be with the only bridge is left for another, as circuit_to does.
    while count:
        with contextlib.suppress(minitor.CircuitError):
            yield paths.exit_path(80)
            count -= 1


IDS = [("%02x" % n) * 20 for n in range(1, 10)]


def test_guards_are_the_bridges(tmp_path):
    net = network()
    found = bridges(tmp_path, *["10.200.%d.1:5 %s" % (n, IDS[n]) for n in range(5)])
    paths = found.select(net.table, make_consensus(), None)
    places = {("10.200.%d.1" % n, 5) for n in range(5)}
    for _ in range(50):
        path = paths.exit_path(80)
        assert len(path) == 3 and (path[0].address, path[0].port) in places
        path = paths.onion_path(net.table.relay(3))
        assert len(path) == 4 and path[0].rsa_id.hex() in IDS
    # One is enough, as with guards, and the same after a restart.
    assert len({paths.guard().rsa_id for _ in range(50)}) == 1
    first = paths.guard().rsa_id
    assert paths.succeeded(first)
    again = bridges(tmp_path, *["10.200.%d.1:5 %s" % (n, IDS[n]) for n in range(5)])
    assert {again.guard().rsa_id for _ in range(9)} == {first}
    # Others when it fails; it itself when all do.
    for n in range(5):
        paths.failed(paths.guard().rsa_id)
    assert paths.guard().rsa_id.hex() in IDS
    unknown = minitor.Bridges(["1.2.3.4:5 " + FINGERPRINT])
    unknown.attach(Fake(tmp_path))
    with pytest.raises(minitor.CircuitError, match="no bridge can be used: none answered"):
        unknown.guard()


def test_bridges_are_for_one_tor(tmp_path):
    found = bridges(tmp_path, "1.2.3.4:5 " + FINGERPRINT)
    with pytest.raises(minitor.ConfigError, match="another AsyncTor's"):
        minitor.AsyncTor(str(tmp_path), bridges=found)


def test_state_that_is_damaged_or_of_other_bridges_is_left(tmp_path, logged):
    for text in ("x", '["zz"]', '{"a": 1}', '["%s"]' % ("ab" * 20)):
        (tmp_path / "bridges.json").write_text(text)
        assert bridges(tmp_path, "1.2.3.4:5 " + FINGERPRINT).guard().rsa_id == ID


def test_nothing_else_of_the_bridges_network_or_family_is_in_a_path(tmp_path):
    net = network(0, 6, 6)
    near = net.table.relay(1).address.rpartition(".")[0] + ".9"
    found = bridges(tmp_path, "%s:5 %s" % (near, IDS[0]))
    paths = found.select(net.table, make_consensus(), None)
    bridge = found.bridges[0]
    for path in exit_paths(paths, 60):
        assert 1 not in [relay.index for relay in path]
    bridge.family_ids = {b"12345678"}
    net.table._texts = lambda i: (b"accept 1-65535", b"", b"12345678" if i in (2, 8) else b"")
    for path in exit_paths(paths, 60):
        assert not {1, 2, 8} & {relay.index for relay in path}
    net.table._texts = lambda i: (b"accept 1-65535", bridge.rsa_id[:4] if i in (3, 9) else b"", b"")
    bridge.family = {net.table.rsa_id(3)[:4]}
    used = set()
    for path in exit_paths(paths, 200):
        used |= {relay.index for relay in path}
    # To be named is not enough: it has to name the other, too.
    assert 3 not in used and 9 in used


def test_a_listed_relay_as_bridge_is_in_no_other_place(tmp_path):
    net = network(0, 3, 6)
    listed = net.table.relay(4)
    found = bridges(tmp_path, "10.200.0.1:5 " + listed.rsa_id.hex())
    paths = found.select(net.table, make_consensus(), None)
    for _ in range(60):
        assert 4 not in [relay.index for relay in paths.exit_path(80)[1:]]
        assert 4 not in [relay.index for relay in paths.onion_path()[1:]]
    # Nor where it is asked for: its network is the same as its own.
    with pytest.raises(minitor.CircuitError):
        paths._path(listed, ["middle"], ())


def test_no_link_leads_elsewhere(tmp_path):
    found = bridges(tmp_path, "1.2.3.4:5 " + FINGERPRINT, "1.2.3.5:6")
    channels = found._tor._channels

    async def run():
        for place in (("1.2.3.4", 6, ID), ("1.2.3.9", 5, ID), ("1.2.3.4", 5, bytes(20)),
                      ("1.2.3.5", 6, b""), ("1.2.3.5", 6, bytes(20))):
            with pytest.raises(minitor.ChannelError, match="is no bridge"):
                await channels.get(*place)

    asyncio.run(run())
    assert not channels.open


def test_links_are_made_in_one_place():
    """What connects to a relay goes through Channels.get, and so through `link`."""
    makers, dialers = set(), set()
    # Builds have other names.
    source = Path(__file__).resolve().parents[1] / "minitor.py"
    for top in ast.parse(source.read_text()).body:
        for part in [top] + list(getattr(top, "body", [])):
            for node in ast.walk(part):
                name = getattr(part, "name", None)
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BridgeLink":
                    makers.add(name)
                if isinstance(node, ast.Name) and node.id in ("Channel", "tls_connect"):
                    (makers if node.id == "Channel" else dialers).add(name)
    assert makers - {None} == {"Channels", "get", "BridgeLink", "Bridges", "link", "_fetch", "enter_by"}
    assert dialers - {None} == {"Channel", "_run", "BridgeLink", "_dial"}


def test_a_program_is_told_why_no_bridge_can_be_used(tmp_path):
    lines = ["DirAuthority a orport=1 v3ident=%s 127.0.0.1:1 %s" % ("A" * 40, "B" * 40)]
    refused = "127.0.0.1:1 " + FINGERPRINT
    with pytest.raises(minitor.ChannelError) as caught:
        minitor.Tor(str(tmp_path), lines, bridges=minitor.Bridges(
            [refused, "x 127.0.0.1:2"], ["x exec /nowhere/x"]))
    assert "no bridge can be used: " in str(caught.value)
    assert "bridge 127.0.0.1:1 (bridge 1): cannot be reached" in str(caught.value)
    assert "(bridge 2): cannot be reached: the transport plugin /nowhere/x cannot" in str(
        caught.value)


def test_bridges_are_asked_again_when_one_comes_again(tmp_path, monkeypatch):
    """As the daemon does after pauses: it does not wait for the bridges' own, longer ones."""
    found = minitor.Bridges(["1.2.3.4:5 " + FINGERPRINT])
    found.attach(Fake(tmp_path))
    asked = []

    async def fetch(bridge):
        asked.append(bridge)
        if len(asked) < 3:
            raise minitor.ChannelError("not now")
        bridge.ntor_key = bytes(32)
        found._list_guards()

    found._fetch = fetch

    async def run():
        for _ in range(2):
            with pytest.raises(minitor.ChannelError, match="1.2.3.4:5 .*: not now"):
                await found.start()
        await found.start()
        await found.close()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert len(asked) == 3


def link_through(tmp_path, serve, seconds=0.5):
    """What becomes of a link to a bridge through a proxy that runs already, `serve`."""

    async def run():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            where = "127.0.0.1:%d" % server.sockets[0].getsockname()[1]
            found = minitor.Bridges(["x 1.2.3.4:5 %s a=b" % FINGERPRINT], ["x socks5 " + where])
            found.attach(Fake(tmp_path))
            found._fetch = lambda bridge: asyncio.sleep(600)
            found.begin()
            link = found.link("1.2.3.4", 5, ID, None, seconds)
            try:
                await link.opened.wait(20)
            finally:
                await found.close()
                await asyncio.sleep(0.1)

    with pytest.raises(minitor.ChannelError) as caught:
        asyncio.run(run())
    return str(caught.value)


def test_a_transport_that_never_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(minitor, "_TRANSPORT_SECONDS", 0.5)

    async def silent(reader, writer):
        await reader.read()
        writer.close()

    text = link_through(tmp_path, silent)
    assert text.startswith("bridge x 1.2.3.4:5 (bridge 1): cannot be reached: no answer within")


def test_what_comes_through_a_transport_is_no_bridge(tmp_path):
    heard = []

    async def garbage(reader, writer):
        for answer in (b"\5\2", b"\1\0", OK5, b"no TLS\r\n\r\n"):
            heard.append(await reader.read(2000))
            writer.write(answer)
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    text = link_through(tmp_path, garbage, 20)
    assert text.startswith("bridge x 1.2.3.4:5 (bridge 1): cannot be reached: [SSL")
    assert heard[:3] == [b"\5\1\2", b"\1\3a=b\1\0", b"\5\1\0\1\1\2\3\4\0\5"]
    # TLS, as to any relay.
    assert heard[3][:2] == b"\x16\3"


def test_what_a_plugin_logs_is_passed_on(tmp_path, monkeypatch):
    logged, told = [], []
    monkeypatch.setattr(minitor, "_log", [minitor.DEBUG, lambda *what: logged.append(what)])
    monkeypatch.setattr(minitor, "watchers", [lambda *what: told.append(what)])
    say = """print('LOG SEVERITY=warning MESSAGE="a \\\\n b"\\nSTATUS TRANSPORT=a K=v')
print('LOG SEVERITY=odd MESSAGE=x\\x07', file=sys.stderr, flush=True)
"""

    async def run():
        async with plugin(tmp_path, say + GOOD + WAIT) as found:
            await found.method("a")
            for _ in range(100):
                if len(told) == 3:
                    break
                await asyncio.sleep(0.05)

    asyncio.run(run())
    name = "the transport plugin %s: " % sys.executable
    assert (minitor.WARN, name + 'LOG SEVERITY=warning MESSAGE="a \\n b"') in logged
    assert (minitor.INFO, name + "STATUS TRANSPORT=a K=v") in logged
    assert (minitor.INFO, name + "LOG SEVERITY=odd MESSAGE=x?") in logged
    assert ("PT_LOG", sys.executable, 'SEVERITY=warning MESSAGE="a \\n b"') in told
    assert ("PT_STATUS", sys.executable, "TRANSPORT=a K=v") in told


@pytest.mark.parametrize("works", [True, False])
def test_a_bridge_that_served_before_is_waited_for(tmp_path, works):
    (tmp_path / "bridges.json").write_text(json.dumps([IDS[1]]))
    found = minitor.Bridges(["1.2.3.%d:5 %s" % (n, IDS[n]) for n in range(3)])
    found.attach(Fake(tmp_path))

    async def fetch(bridge):
        if bridge.rsa_id.hex() == IDS[1]:
            await asyncio.sleep(0.3)
            if not works:
                raise minitor.ChannelError("not now")
        bridge.ntor_key = bytes(32)
        found._list_guards()

    found._fetch = fetch

    async def run():
        await found.start()
        chosen = {found.guard().rsa_id.hex() for _ in range(9)}
        await found.close()
        return chosen

    chosen = asyncio.run(asyncio.wait_for(run(), 10))
    assert len(chosen) == 1 and (chosen == {IDS[1]}) == works
