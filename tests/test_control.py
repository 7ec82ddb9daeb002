"""The control port without a network: who may use it, tor's error codes, options."""

import asyncio
import os
import random
import socket

import pytest

import minitor

ESK = bytes(range(8, 72))
SITE = minitor.onion_address(minitor.ed25519_public(ESK))[:56]
OTHER = minitor.onion_address(minitor.ed25519_public(minitor.ed25519_expand(b"o" * 32)))[:56]
SECRET = bytes(range(1, 33))
BLOB = "x25519:AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="
PUBLIC = minitor.auth_text(minitor.x25519(SECRET))[18:]


class Wire:
    """Stands for a writer: what a controller was sent."""

    def __init__(self):
        self.data, self.transport, self.aborted = b"", self, False

    def write(self, data):
        self.data += data

    def get_write_buffer_size(self):
        return 0

    async def drain(self):
        await asyncio.sleep(0)


class FakeDaemon(minitor.Daemon):
    """A Daemon whose DataDirectory and logs stay out of it, and that never connects."""

    def __init__(self, text, folder):
        self.texts = "DataDirectory %s\nSocksPort 0\nLog err stdout\n%s" % (folder, text)
        super().__init__(minitor.configure(list(minitor.parse_torrc(self.texts))), None)


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """talk(torrc, *lines): the replies to a controller's lines, split."""
    monkeypatch.setattr(minitor, "_log", list(minitor._log))

    def talk(torrc, *lines, known=True):
        async def run():
            daemon = FakeDaemon(torrc, tmp_path)
            await daemon.use(daemon.config)
            reader, wire = asyncio.StreamReader(limit=1 << 16), Wire()
            control = minitor.Control(daemon, reader, wire)
            control.known = known
            reader.feed_data(b"".join(
                (line if isinstance(line, bytes) else line.encode()) + b"\r\n" for line in lines))
            reader.feed_eof()
            try:
                await control.serve()
            except EOFError:
                pass
            assert daemon.controls == []
            await daemon.tor.aclose()
            daemon._lock.close()
            talk.daemon = daemon
            return wire.data.decode(errors="replace").replace("\r\n", "\n").rstrip("\n").split("\n")

        return asyncio.run(run())

    return talk


def test_without_authentication_little_is_answered(talk):
    assert talk("", "GETINFO version", known=False) == ["514 Authentication required."]
    # The connection is closed after it.
    assert talk("", "GETINFO version", "AUTHENTICATE", known=False)[1:] == []
    assert talk("", "QUIT", known=False) == ["250 closing connection"]
    assert talk("", "AUTHENTICATE", "GETINFO dormant", known=False) == [
        "250 OK", "250-dormant=0", "250 OK"]


def test_protocolinfo(talk, tmp_path):
    assert talk("", "PROTOCOLINFO 1", known=False) == [
        "250-PROTOCOLINFO 1", "250-AUTH METHODS=NULL",
        '250-VERSION Tor="%s"' % minitor.TOR_VERSION, "250 OK"]
    found = talk("CookieAuthentication 1\nHashedControlPassword 16:%s" % ("00" * 29),
                 "PROTOCOLINFO", "PROTOCOLINFO 1", known=False)
    assert found[1] == ('250-AUTH METHODS=COOKIE,SAFECOOKIE,HASHEDPASSWORD COOKIEFILE='
                        '"%s/control_auth_cookie"' % tmp_path)
    assert found[4][:3] == "513"


def test_password(talk, tmp_path):
    salt = b"saltsalt\x60"
    hashed = (salt + minitor.hash_password(b'pass "word"', salt)).hex().upper()
    torrc = "HashedControlPassword 16:" + hashed
    for given in (r'"pass \"word\""', b'pass "word"'.hex()):
        assert talk(torrc, "AUTHENTICATE " + given, known=False) == ["250 OK"]
    for given in ("", '"wrong"', "00", '"pass', "zz"):
        found = talk(torrc, "AUTHENTICATE " + given, "GETINFO version", known=False)
        assert len(found) == 1 and found[0][:4] == "515 "


def test_cookies(talk, tmp_path):
    torrc = "CookieAuthentication 1\nCookieAuthFile %s/cookie" % tmp_path
    assert talk(torrc, "AUTHENTICATE " + "00" * 32, known=False)[0][:3] == "515"
    cookie = (tmp_path / "cookie").read_bytes()
    assert len(cookie) == 32 and (tmp_path / "cookie").stat().st_mode & 0o777 == 0o600
    # A later daemon makes its own.
    assert talk(torrc, "AUTHENTICATE " + cookie.hex(), known=False)[0][:3] == "515"


def test_safecookie_needs_the_challenge(talk):
    torrc = "CookieAuthentication 1"
    found = talk(torrc, "AUTHCHALLENGE SAFECOOKIE " + "ab" * 32, "AUTHENTICATE " + "00" * 32,
                 known=False)
    assert found[0].startswith("250 AUTHCHALLENGE SERVERHASH=") and "SERVERNONCE=" in found[0]
    assert found[1][:3] == "515"
    for text in ("AUTHCHALLENGE", "AUTHCHALLENGE SAFECOOKIE abc", "AUTHCHALLENGE COOKIE ab"):
        assert talk(torrc, text, known=False)[0][:3] == "513"
    assert talk("", "AUTHCHALLENGE SAFECOOKIE ab", known=False)[0][:3] == "513"


@pytest.mark.parametrize("line, reply", [
    ("NONSENSE", '510 Unrecognized command "NONSENSE"'),
    ("GETINFO nonsense", '552 Unrecognized key "nonsense"'),
    ("GETCONF Nonsense", '552 Unrecognized configuration key "Nonsense"'),
    ("SETCONF Nonsense=1", "552 Unrecognized option: Unknown option 'Nonsense'.  Failing."),
    ("SETCONF ORPort=1", "552 Unrecognized option: Unknown option 'ORPort'.  Failing."),
    ("SETCONF SafeLogging=7", "513 Unacceptable option value:"),
    ('SETCONF SafeLogging="1', "512 "),
    ("SETEVENTS CIRC NONSENSE", '552 Unrecognized event "NONSENSE"'),
    ("SIGNAL NONSENSE", '552 Unrecognized signal code "NONSENSE"'),
    ("CLOSECIRCUIT 7", '552 Unknown circuit "7"'),
    ("DEL_ONION xyz", "552 Unknown Onion Service id"),
    ("ADD_ONION", "513 Invalid key type"),
    ("ADD_ONION NEW:RSA1024 Port=80", "513 Invalid key type"),
    ("ADD_ONION ED25519-V3:AAAA Port=80", "5"),
    ("ADD_ONION NEW:BEST", "5"),
    ("ADD_ONION NEW:BEST Port=0", "5"),
    ("ADD_ONION NEW:BEST Flags=V3Auth Port=80 ClientAuthV3=x", "512 Cannot decode v3 client auth"),
    ("ADD_ONION NEW:BEST Flags=V3Auth Port=80", "512 No auth clients specified"),
    ("ADD_ONION NEW:BEST Port=80 ClientAuthV3=" + PUBLIC, "512 No auth type specified"),
    ("ONION_CLIENT_AUTH_ADD", "512 Incomplete ONION_CLIENT_AUTH_ADD command"),
    ("ONION_CLIENT_AUTH_ADD " + SITE, "512 Incomplete ONION_CLIENT_AUTH_ADD command"),
    ("ONION_CLIENT_AUTH_ADD x%s %s" % (SITE[1:], BLOB), '512 Invalid v3 address "x%s"' % SITE[1:]),
    ("ONION_CLIENT_AUTH_ADD %s.onion %s" % (SITE, BLOB), "512 Invalid v3 address"),
    ("ONION_CLIENT_AUTH_ADD %s x25519" % SITE, "512 "),
    ("ONION_CLIENT_AUTH_ADD %s x25519:AAAA" % SITE, "512 Failed to decode x25519 private key"),
    ("ONION_CLIENT_AUTH_ADD %s x25519:%s" % (SITE, "\xe9" * 43), "512 Failed to decode"),
    ("ONION_CLIENT_AUTH_ADD %s x448%s" % (SITE, BLOB[6:]), '552 Unrecognized key type "x448"'),
    ("ONION_CLIENT_AUTH_ADD %s x25519:%s=" % (SITE, "A" * 43), "553 Invalid private key"),
    ("ONION_CLIENT_AUTH_ADD %s x25519:AQ%s=" % (SITE, "A" * 41), "553 Invalid private key"),
    ("ONION_CLIENT_AUTH_ADD %s %s Flags=Eternal" % (SITE, BLOB), "512 Invalid 'Flags' argument"),
    ("ONION_CLIENT_AUTH_ADD %s %s ClientName=%s" % (SITE, BLOB, "x" * 17), "512 ClientName longer"),
    ("ONION_CLIENT_AUTH_ADD %s %s Flags=Permanent" % (SITE, BLOB), "553 Unable to store creds"),
    ("ONION_CLIENT_AUTH_REMOVE", "512 Incomplete ONION_CLIENT_AUTH_REMOVE command"),
    ("ONION_CLIENT_AUTH_REMOVE x", '512 Invalid v3 address "x"'),
    ("ONION_CLIENT_AUTH_REMOVE " + SITE, '251 No credentials for "%s"' % SITE),
    ("ONION_CLIENT_AUTH_VIEW x", '512 Invalid v3 address "x"'),
    ("ADD_ONION NEW:BEST Flags=NonAnonymous Port=80", "512 Invalid flag"),
    ("GETINFO ip-to-country/1.2.3.256", "5"),
    ("GETINFO ns/id/xyz", '552 Unrecognized key "ns/id/xyz"'),
    ("SAVECONF", "551 Unable to write configuration to disk."),
])
def test_error_codes(talk, line, reply):
    found = talk("", line, "GETINFO dormant")
    assert found[0].startswith(reply), found
    assert found[1:] == ["250-dormant=0", "250 OK"]


def test_getconf(talk):
    assert talk("MaxCircuitDirtiness 10 minutes\nSocksPort 0\n", "GETCONF maxcircuitdirtiness",
                "GETCONF SafeLogging User SocksPort HiddenServiceOptions") == [
        "250 MaxCircuitDirtiness=600", "250-SafeLogging=1", "250-User", "250-SocksPort=0",
        "250-SocksPort=0", "250 HiddenServiceOptions"]


def test_setconf(talk, tmp_path):
    found = talk(
        "", 'SETCONF MaxCircuitDirtiness=700 ExitNodes="{de}, 1.2.3.4"',
        "GETCONF MaxCircuitDirtiness ExitNodes",
        # What is wrong changes nothing.
        "SETCONF MaxCircuitDirtiness=800 SafeLogging=9", "GETCONF MaxCircuitDirtiness",
        "RESETCONF MaxCircuitDirtiness ExitNodes", "GETCONF MaxCircuitDirtiness ExitNodes",
        'SETCONF HiddenServiceDir="%s/hs" HiddenServicePort="80 81" HiddenServicePort=82' % tmp_path,
        "GETCONF HiddenServicePort", "SETCONF HiddenServiceDir", "GETCONF HiddenServicePort")
    assert found == [
        "250 OK", "250-MaxCircuitDirtiness=700", "250 ExitNodes={de}, 1.2.3.4",
        found[3], "250 MaxCircuitDirtiness=700",
        "250 OK", "250-MaxCircuitDirtiness=600", "250 ExitNodes",
        "250 OK", "250-HiddenServicePort=80 81", "250 HiddenServicePort=82",
        "250 OK", "250 HiddenServicePort"]
    assert found[3][:3] == "513"
    assert talk.daemon.services == {} and (tmp_path / "hs" / "hostname").exists()


def test_loadconf_takes_lines_of_data(talk):
    found = talk("", "+LOADCONF", "MaxCircuitDirtiness 900", "# ..", "..", ".",
                 "GETCONF MaxCircuitDirtiness")
    assert found[0][:3] == "513"
    found = talk("", "+LOADCONF", "MaxCircuitDirtiness 900", "SocksPort 0", ".",
                 "GETCONF MaxCircuitDirtiness")
    assert found == ["250 OK", "250 MaxCircuitDirtiness=900"]


def test_saveconf_writes_what_can_be_read(tmp_path):
    config = minitor.configure(list(minitor.parse_torrc(
        'Log notice stdout\nControlSocket "unix:\\"/a # b\\""\nHiddenServiceDir /x\n'
        "HiddenServicePort 80\nMaxCircuitDirtiness 5 minutes\n")))
    again = minitor.configure(list(minitor.parse_torrc(minitor.config_text(config))))
    assert {k: v for k, v in again.items() if k != "HiddenServiceOptions"} == {
        k: v for k, v in config.items() if k != "HiddenServiceOptions"}
    assert list(again["HiddenServiceOptions"]) == ["/x"]


def test_onions(talk):
    found = talk("", "ADD_ONION NEW:BEST Port=80,8080 Port=81", "GETINFO onions/current",
                 "GETINFO onions/detached")
    name = found[0].partition("=")[2]
    assert found[0].startswith("250-ServiceID=") and len(name) == 56
    assert found[1].startswith("250-PrivateKey=ED25519-V3:") and found[2] == "250 OK"
    assert found[3:] == ["250-onions/current=" + name, "250 OK", "250-onions/detached=", "250 OK"]
    # It goes with its controller.
    assert talk.daemon.onions == {}


def test_onions_of_a_given_key(talk):
    blob = minitor.binascii.b2a_base64(ESK).decode().strip()
    line = "ADD_ONION ED25519-V3:%s Flags=Detach,DiscardPK MaxStreams=3 Port=80" % blob
    found = talk("", line, line, "GETINFO onions/detached")
    address = minitor.onion_address(minitor.ed25519_public(ESK))
    assert found[:3] == ["250-ServiceID=" + address[:56], "250 OK", "550 Onion address collision"]
    assert found[3] == "250-onions/detached=" + address[:56]
    assert talk.daemon.onions[address][0].max_streams == 3
    found = talk("", line, "DEL_ONION " + address[:56], "DEL_ONION " + address[:56])
    assert found[2:] == ["250 OK", "552 Unknown Onion Service id"]


def test_onions_for_some_clients(talk):
    keys = [minitor.auth_text(minitor.x25519(bytes([n]) * 32))[18:] for n in (1, 2, 3)]
    line = "ADD_ONION NEW:BEST Flags=V3Auth,DiscardPK,Detach Port=80 " + " ".join(
        ["ClientAuthV3=" + key for key in keys])
    found = talk("", line)
    address = found[0].partition("=")[2] + ".onion"
    assert found[1:] == ["250-ClientAuthV3=" + key for key in keys] + ["250 OK"]
    assert talk.daemon.onions[address][0].clients == [minitor.auth_key(key) for key in keys]


def test_keys_of_clients(talk):
    view = "ONION_CLIENT_AUTH_VIEW"
    found = talk(
        "", "%s" % view, "ONION_CLIENT_AUTH_ADD %s %s ClientName=bob" % (SITE, BLOB),
        "ONION_CLIENT_AUTH_ADD %s %s" % (OTHER.upper(), BLOB.rstrip("=")), view,
        view + " " + OTHER, "ONION_CLIENT_AUTH_ADD %s %s" % (SITE, BLOB),
        "ONION_CLIENT_AUTH_REMOVE " + SITE, "ONION_CLIENT_AUTH_REMOVE " + SITE, view + " " + SITE)
    assert found == [
        "250-" + view, "250 OK", "250 OK", "250 OK", "250-" + view] + sorted([
            "250-CLIENT %s %s ClientName=bob" % (SITE, BLOB),
            "250-CLIENT %s %s" % (OTHER, BLOB)]) + [
        "250 OK", "250-%s %s" % (view, OTHER), "250-CLIENT %s %s" % (OTHER, BLOB), "250 OK",
        "251 Client for onion existed and replaced", "250 OK",
        '251 No credentials for "%s"' % SITE, "250-%s %s" % (view, SITE), "250 OK"]
    assert list(talk.daemon.tor.onion_keys.values()) == [SECRET]


def test_permanent_keys_of_clients(talk, tmp_path):
    folder, line = tmp_path / "auth", "ONION_CLIENT_AUTH_ADD %s %s" % (SITE, BLOB)
    folder.mkdir()
    torrc, path = "ClientOnionAuthDir %s" % folder, folder / (SITE + ".auth_private")
    assert talk(torrc, line + " Flags=Permanent ClientName=bob") == ["250 OK"]
    assert path.read_text() == "%s:%s\n" % (SITE, minitor.auth_text(SECRET))
    assert path.stat().st_mode & 0o777 == 0o600
    # Another one, and a name of its own: known again after a start, and replaced in its file.
    path.rename(folder / "bob.auth_private")
    kept = "250-CLIENT %s %s Flags=Permanent" % (SITE, BLOB)
    found = talk(torrc, "ONION_CLIENT_AUTH_VIEW", line + " Flags=Permanent",
                 "ONION_CLIENT_AUTH_ADD %s %s" % (OTHER, BLOB), "SIGNAL NEWNYM",
                 "ONION_CLIENT_AUTH_VIEW " + SITE)
    assert found[1:4] == [kept, "250 OK", "251 Client for onion existed and replaced"]
    assert found[-2:] == [kept, "250 OK"] and os.listdir(str(folder)) == ["bob.auth_private"]
    assert talk(torrc, "ONION_CLIENT_AUTH_REMOVE " + SITE) == ["250 OK"]
    assert os.listdir(str(folder)) == []
    # Without the folder.
    folder.rmdir()
    found = talk("", "SETCONF ClientOnionAuthDir=%s" % folder, "GETCONF ClientOnionAuthDir")
    assert found[0][:3] == "513" and found[1] == "250 ClientOnionAuthDir"


def test_newnym_forgets_the_keys_of_controllers(talk):
    found = talk("", "ONION_CLIENT_AUTH_ADD %s %s" % (SITE, BLOB), "SIGNAL NEWNYM",
                 "GETINFO dormant", "ONION_CLIENT_AUTH_VIEW")
    assert found[-2:] == ["250-ONION_CLIENT_AUTH_VIEW", "250 OK"]


def test_a_key_that_reads_a_descriptor(talk, monkeypatch):
    """What was fetched without the key is kept until there is one."""
    plain = minitor.Record()
    monkeypatch.setattr(minitor, "parse_descriptor", lambda *what: what[0] or refuse())

    def refuse():
        raise minitor.AuthorizationError("no", 0xF5)

    tries = []

    class Sealed(dict):
        def pop(self, key, *default):
            tries.append(key)
            return (plain if len(tries) > 1 else b""), b"", b""

    start = FakeDaemon.__init__

    def init(self, *args):
        start(self, *args)
        self.tor._sealed = Sealed()

    monkeypatch.setattr(FakeDaemon, "__init__", init)
    line = "ONION_CLIENT_AUTH_ADD %s %s" % (SITE, BLOB)
    assert talk("", line, line) == ["250 OK", "252 Registered client and decrypted desc"]
    key = minitor.parse_onion_address(SITE + ".onion")
    assert talk.daemon.tor.descriptors == {key: plain} and tries == [key, key]


def test_every_key_of_getinfo_is_answered(talk):
    keys = [key for key in minitor._INFO if key[-1] != "/"]
    for key, found in zip(keys, [talk("", "GETINFO " + key) for key in keys]):
        good = found[-1] == "250 OK" and found[0].startswith(("250-" + key, "250+" + key))
        assert good or found == ["551 There is no consensus yet"], found
    found = talk("GeoIPFile /none\nControlPort auto", "GETINFO net/listeners/control",
                 "GETINFO net/listeners/socks", "GETINFO net/listeners/or")
    assert found[0].startswith('250-net/listeners/control="127.0.0.1:')
    assert found[2] == "250-net/listeners/socks=" and found[4] == "250-net/listeners/or="


def test_arguments():
    assert minitor.parse_words('a=b "c d"  e="f \\"g\\"" h i=') == [
        ("a", "b"), (None, "c d"), ("e", 'f "g"'), (None, "h"), ("i", "")]
    for text in ('"a', 'a="b', 'a"b"', '"a"b'):
        with pytest.raises(minitor.TorError):
            minitor.parse_words(text)


def test_garbage_ends_no_more_than_its_connection(talk):
    generator = random.Random(7)
    words = [w.encode() for w in minitor._CONTROL] + [
        b" ", b"=", b'"', b"\\", b"\0", b"\xff", b"+", b".", b"1", b"NEW:BEST", b"Port=", b"version"]
    for _ in range(40):
        lines = [b"".join(generator.choice(words) for _ in range(generator.randrange(1, 7)))
                 for _ in range(12)]
        for reply in talk("", *lines):
            assert reply[:1] in "256" or reply == "." or "=" in reply or " " in reply
    # A line, or data, without end.
    assert talk("", "GETINFO " + "x" * (1 << 17)) == [""]
    assert talk("", "+LOADCONF", "x" * 1000, known=False) == [""]


def test_what_cannot_be_opened_changes_nothing(talk, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        found = talk("ControlSocket %s/c" % tmp_path, "SETCONF ControlPort=%d" % port,
                     "GETCONF ControlPort", "GETINFO net/listeners/control")
    assert found[0][:3] == "513" and str(port) in found[0]
    assert found[1:] == ["250 ControlPort", '250-net/listeners/control="unix:%s/c"' % tmp_path,
                         "250 OK"]


def test_some_options_stay(talk, tmp_path, capsys):
    found = talk("Log warn stdout", "SETCONF DataDirectory=/elsewhere", "GETINFO dormant")
    assert found[0] == "250 OK" and "DataDirectory cannot change" in capsys.readouterr()[0]
    assert talk.daemon.folder == str(tmp_path) and not os.path.exists("/elsewhere")


def test_events_of_the_log(talk):
    found = talk("", "SETEVENTS WARN NOTICE", "SIGNAL DUMP", "SIGNAL RELOAD", "GETINFO dormant")
    assert found[:2] == ["250 OK", "250 OK"]
    assert any(line.startswith("650 NOTICE 0 links, 0 circuits") for line in found)


def test_signal_debug_reaches_the_logs(talk, capsys):
    talk("", "SIGNAL DEBUG", "SETEVENTS", "SIGNAL DUMP", "GETINFO dormant", "GETINFO dormant")
    assert "[notice] 0 links" in capsys.readouterr()[0]
