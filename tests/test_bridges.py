"""Bridges and pluggable transports: lines, plugins that misbehave, descriptors, paths."""

import asyncio
import contextlib
import os
import socket
import sys
import time

import pytest

import minitor

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


def test_a_plugin_that_does_not_listen_is_killed(tmp_path):
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
    ("print('VERSION 1', flush=True); time.sleep(600)", "not ready within 1 s"),
    ("sys.stdin.close(); time.sleep(600)", "not ready within 1 s"),
    ("while True: os.write(1, b'x' * 999)", "not ready within 1 s"),
    ("while True: os.write(1, b'x' * 99 + b'\\n')", "not ready within 1 s"),
])
def test_a_plugin_that_fails_is_told_about(tmp_path, monkeypatch, text, what):
    monkeypatch.setattr(minitor, "_PLUGIN_SECONDS", 1)

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
    monkeypatch.setattr(minitor, "_PLUGIN_PAUSES", (0.1, 0.4))
    count = "open(%r, 'a').write('x')\n" % str(tmp_path / "count")

    async def run():
        async with plugin(tmp_path, count + GOOD) as found:
            for _ in range(600):
                if len([line for line in logged if "again in" in line]) > 4:
                    break
                await asyncio.sleep(0.05)

    asyncio.run(run())
    pauses = [line.split()[-2] for line in logged if "started again in" in line]
    assert pauses[:4] == ["0.1", "0.2", "0.4", "0.4"]
    assert len((tmp_path / "count").read_text()) >= 5
    assert any(line.endswith("ended; it is started again in 0.1 s") for line in logged)
