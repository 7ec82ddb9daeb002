"""The control port without a network: who may use it, tor's error codes, options."""

import asyncio
import os
import random
import shutil
import socket
import subprocess
import time

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


@pytest.fixture(autouse=True)
def log():
    """Daemons log where theirs says, and others after them as before."""
    before = list(minitor._log)
    yield
    minitor._log[:] = before


@pytest.fixture
def talk(tmp_path):
    """talk(torrc, *lines): the replies to a controller's lines, split."""

    def talk(torrc, *lines, known=True, setup=lambda daemon: None):
        async def run():
            daemon = FakeDaemon(torrc, tmp_path)
            await daemon.use(daemon.config)
            setup(daemon)
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
    for text in ("AUTHCHALLENGE SAFECOOKIE abc", "AUTHCHALLENGE COOKIE ab"):
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
    ("DEL_ONION xyz", "512 Malformed Onion Service id"),
    ("ADD_ONION", "512 Bad arguments to ADD_ONION: Need at least 1 argument(s)"),
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
    ("ADD_ONION NEW:BEST Flags=NonAnonymous Port=80", "512 Invalid 'Flags' argument"),
    ("GETINFO ip-to-country/1.2.3.256", "5"),
    ("GETINFO ns/id/xyz", '552 Unrecognized key "ns/id/xyz"'),
    ("SAVECONF", "551 Unable to write configuration to disk."),
])
def test_error_codes(talk, line, reply):
    found = talk("", line, "GETINFO dormant")
    assert found[0].startswith(reply), found
    assert found[1:] == ["250-dormant=0", "250 OK"]


ONION = "pg6mmjiyjmcrsslvykfwnntlaru7p5svn6y2ymmju6nubxndf4pscryd"
NOBODY = "0" * 40
# What is wrong, or empty, in every way; a fresh tor and a fresh minitor, without a network, agree.
LINES = [line.replace("@", ONION).replace("~", NOBODY) for line in """
NONSENSE|GETINFO|GETINFO nonsense|GETINFO version nonsense other|GETINFO desc/id/~
GETINFO desc/name/x|GETINFO desc/all-recent|GETINFO md/id/~|GETINFO md/all|GETINFO md/name/x
GETINFO ns/all|GETINFO ns/purpose/bridge|GETINFO dir/status-vote/current/consensus
GETINFO accounting/enabled|GETINFO fingerprint|GETINFO address|GETINFO address/v4
GETINFO exit-policy/full|GETINFO address-mappings/all|GETINFO address-mappings/x
GETINFO config/defaults|GETINFO config-can-saveconf|GETINFO bw-event-cache
GETINFO status/version/recommended|GETINFO status/version/current|GETINFO status/nonsense
GETINFO status/circuit-established|GETINFO status/bootstrap-phase|GETINFO sr/current
GETINFO process/descriptor-limit|GETINFO limits/max-mem-in-queues|GETINFO current-time/local
GETINFO hs/client/desc/id/xyz|GETINFO hs/client/desc/id/@|GETINFO hs/service/desc/id/xyz
GETINFO onions/current|GETINFO onions/detached|GETINFO consensus/valid-after
GETINFO net/listeners/socks|GETINFO net/listeners/nonsense|GETINFO ip-to-country/x
GETINFO ip-to-country/ipv6-available|GETINFO helper-nodes|GETINFO entry-guards
GETINFO network-status|GETINFO extra-info/digest/xyz|GETINFO md/download-enabled
GETCONF|GETCONF Nonsense|GETCONF SocksPort Nonsense|SETCONF|SETCONF Nonsense=1
SETCONF SafeLogging=7|SETCONF SafeLogging="1|SETCONF MaxCircuitDirtiness=soon
SETCONF DataDirectory=/elsewhere|SETCONF HiddenServicePort=80|SETCONF HiddenServiceDir=/nowhere
RESETCONF Nonsense|RESETCONF|SETEVENTS CIRC NONSENSE|SETEVENTS|SIGNAL|SIGNAL NONSENSE|SIGNAL A B
CLOSECIRCUIT|CLOSECIRCUIT 7|CLOSECIRCUIT x|CLOSECIRCUIT 7 IfUnused
CLOSESTREAM|CLOSESTREAM 7|CLOSESTREAM 7 1|CLOSESTREAM x 1|CLOSESTREAM 7 x
EXTENDCIRCUIT|EXTENDCIRCUIT 7|EXTENDCIRCUIT 7 ~|EXTENDCIRCUIT 0 ~|EXTENDCIRCUIT 0 nickname
EXTENDCIRCUIT 0 $~=name|EXTENDCIRCUIT 0 ~~x,~|EXTENDCIRCUIT 0 purpose=x|EXTENDCIRCUIT x y
EXTENDCIRCUIT 0 y purpose=x|EXTENDCIRCUIT 0|EXTENDCIRCUIT 0 purpose=controller
SETCIRCUITPURPOSE 7|SETCIRCUITPURPOSE 7 purpose=general|SETCIRCUITPURPOSE 7 purpose
SETROUTERPURPOSE 7 x|ATTACHSTREAM|ATTACHSTREAM 7|ATTACHSTREAM 7 0|ATTACHSTREAM 7 7
ATTACHSTREAM 7 7 HOP=x|ATTACHSTREAM 7 7 NOP=1|ATTACHSTREAM 7 7 HOP|RESOLVE
MAPADDRESS|MAPADDRESS x|MAPADDRESS a.test=b.test|MAPADDRESS a.test=b#x|MAPADDRESS a.test=
MAPADDRESS a.test=b.test c.test=|MAPADDRESS 0.0.0.0=b.test|MAPADDRESS .=b.test|MAPADDRESS ::=b.test
MAPADDRESS *.a.test=*.b.test|MAPADDRESS a.test=*.b.test|MAPADDRESS "a.test=b.test"
MAPADDRESS a.test=a.test|MAPADDRESS 192.0.2.1=a.test|MAPADDRESS *=5.6.7.8|MAPADDRESS ::1=5.6.7.8
HSFETCH|HSFETCH xyz|HSFETCH xyz SERVER=x|HSFETCH @ SERVER=x|HSFETCH @ SERVER=~|HSFETCH @ X=x
HSFETCH @ x|HSFETCH @.onion|HSPOST x|POSTDESCRIPTOR x|LOADCONF x|+LOADCONF;Nonsense 1;.
+LOADCONF;.|+GETINFO version;x;.|ADD_ONION|ADD_ONION NEW:BEST|ADD_ONION x|ADD_ONION x Port=80
ADD_ONION NEW:RSA1024 Port=80|ADD_ONION RSA1024:AAAA Port=80|ADD_ONION ED25519-V3:AAAA Port=80
ADD_ONION NEW:BEST Port=0|ADD_ONION NEW:BEST Port=80,x:y|ADD_ONION NEW:BEST Port=80,unix:/x
ADD_ONION NEW:BEST Port|ADD_ONION NEW:BEST X=1 Port=80|ADD_ONION NEW:BEST Flags=X Port=80
ADD_ONION NEW:BEST Flags= Port=80|ADD_ONION NEW:BEST Flags=NonAnonymous Port=80
ADD_ONION NEW:BEST Flags=BasicAuth Port=80|ADD_ONION NEW:BEST MaxStreams=99999 Port=80
ADD_ONION NEW:BEST MaxStreams=x Port=80|ADD_ONION new:best Port=80
DEL_ONION|DEL_ONION xyz|DEL_ONION @|DEL_ONION a b|USEFEATURE NONSENSE|USEFEATURE
USEFEATURE VERBOSE_NAMES EXTENDED_EVENTS|DROPGUARDS|DROPGUARDS x|DROPTIMEOUTS|DROPTIMEOUTS x
ADD_ONION NEW:BEST Flags=V3Auth Port=80|ADD_ONION NEW:BEST ClientAuthV3=x Port=80
ONION_CLIENT_AUTH_ADD|ONION_CLIENT_AUTH_ADD xyz x25519:AAAA|ONION_CLIENT_AUTH_ADD @ x25519:AAAA
ONION_CLIENT_AUTH_ADD @ x448:AAAA|ONION_CLIENT_AUTH_REMOVE|ONION_CLIENT_AUTH_REMOVE xyz
ONION_CLIENT_AUTH_REMOVE @|ONION_CLIENT_AUTH_VIEW|ONION_CLIENT_AUTH_VIEW xyz
TAKEOWNERSHIP x|DROPOWNERSHIP x|PROTOCOLINFO 2|PROTOCOLINFO x|AUTHCHALLENGE|AUTHENTICATE 00
""".strip().replace("\n", "|").split("|")]


def first_lines(lines):
    """The first line of each of the replies in `lines`."""
    found, fresh, data = [], True, False
    for line in lines:
        found += [line] * (fresh and not data)
        fresh = data and fresh or not data and line[3:4] == " "
        data = line != "." and (data or line[3:4] == "+")
    return found


def ask_tor(tor, folder, lines):
    """What a tor answers to these lines."""
    (folder / "empty").write_text("")
    where = str(folder / "socket")
    process = subprocess.Popen(
        [tor, "-f", str(folder / "empty"), "--DataDirectory", str(folder / "tor"), "--SocksPort",
         "0", "--DisableNetwork", "1", "--ControlSocket", where, "--Log", "err stderr"],
        stdout=subprocess.DEVNULL)
    try:
        with socket.socket(socket.AF_UNIX) as s:
            for _ in range(200):
                if not s.connect_ex(where):
                    break
                time.sleep(0.05)
            s.settimeout(20)
            s.sendall("".join([line + "\r\n" for line in lines + ["QUIT"]]).encode())
            with s.makefile() as f:
                return f.read().splitlines()
    finally:
        process.terminate()
        process.wait()


def test_codes_are_those_of_tor(talk, tmp_path):
    tor = shutil.which("tor", path=os.environ["PATH"] + ":/usr/sbin")
    if not tor:
        pytest.skip("there is no tor to compare with")
    lines = ["AUTHENTICATE"] + [piece for line in LINES for piece in line.split(";")]
    theirs = first_lines(ask_tor(tor, tmp_path, lines))[1:-1]
    ours = first_lines(talk("", *lines))[1:]
    assert len(theirs) == len(ours) == len(LINES)
    assert [pair for pair in zip(LINES, ours, theirs) if pair[1][:3] != pair[2][:3]] == []


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
    assert found[0].startswith("552 Invalid config file: ")
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


def test_onions_have_a_limit(talk):
    line = "ADD_ONION ED25519-V3:%s Flags=Detach Port=80" % (
        minitor.binascii.b2a_base64(ESK).decode().strip())

    class Full(dict):
        __len__ = lambda self: 1000

    assert talk("", line, setup=lambda daemon: setattr(daemon, "onions", Full()))[0][:3] == "551"
    assert talk("", line)[-1] == "250 OK"


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
    # Those of relays, and what is not kept.
    refused = {"address": 551, "fingerprint": 551, "exit-policy/full": 552}
    refused.update({"dir/status-vote/current/consensus" + end: 551 for end in ("", "-microdesc")})
    keys = [key for key in minitor._INFO if key[-1] != "/"]
    for key, found in zip(keys, [talk("", "GETINFO " + key) for key in keys]):
        good = found[-1] == "250 OK" and found[0].startswith(("250-" + key, "250+" + key))
        assert good != (key in refused) and (good or found[0][:3] == str(refused[key])), found
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


def test_some_options_stay(talk, tmp_path):
    found = talk("Log warn stdout", "SETCONF DataDirectory=/elsewhere", "GETINFO dormant")
    assert found[0].startswith("553 Transition not allowed: DataDirectory cannot change")
    assert talk.daemon.folder == str(tmp_path) and not os.path.exists("/elsewhere")


def test_events_of_the_log(talk):
    found = talk("", "SETEVENTS WARN NOTICE", "SIGNAL DUMP", "SIGNAL RELOAD", "GETINFO dormant")
    assert found[:2] == ["250 OK", "250 OK"]
    assert any(line.startswith("650 NOTICE 0 links, 0 circuits") for line in found)


def test_signal_debug_reaches_the_logs(talk, capsys):
    talk("", "SIGNAL DEBUG", "SETEVENTS", "SIGNAL DUMP", "GETINFO dormant", "GETINFO dormant")
    assert "[notice] 0 links" in capsys.readouterr()[0]


def test_addresses_are_mapped(talk):
    found = talk(
        "", "SETEVENTS ADDRMAP", "MAPADDRESS a.test=b.test B.test=c.test *.d.test=*.e.test",
        "MAPADDRESS *.f.test=%s.onion x.d.test=a.test bad=a#b" % ONION,
        "MAPADDRESS 0.0.0.0=h.test ::=h.test .=h.test", "MAPADDRESS 0.0.0.0=h.test",
        "GETINFO address-mappings/all", "MAPADDRESS a.test=A.test", "MAPADDRESS 1.2.3.4=1.2.3.4")
    assert found[:8] == [
        "250 OK", '650 ADDRMAP a.test b.test NEVER CACHED="YES"',
        '650 ADDRMAP B.test c.test NEVER CACHED="YES"',
        '650 ADDRMAP *.d.test *.e.test NEVER CACHED="YES"',
        "250-a.test=b.test", "250-B.test=c.test", "250 *.d.test=*.e.test", found[7]]
    assert "512 syntax error: invalid address 'a#b'" in found
    replies = [line[4:].partition("=") for line in found if line[:4] in ("250-", "250 ")]
    virtual = [old for old, _, new in replies if new == "h.test"]
    v4, v6, name, again = [old.strip("[]") for old in virtual]
    assert v4 == again and minitor.packed_address(v4)[:1] == b"\x7f"
    assert minitor.packed_address(v4)[1] & 0xC0 == 0xC0 and v4.rpartition(".")[2] not in "0 255"
    packed = minitor.packed_address(v6)
    assert packed[0] == 0xFE and packed[1] & 0xC0 == 0x80
    assert name[16:] == ".virtual" and not set(name[:16]) - set(minitor._BASE32)
    assert "b.test c.test NEVER" in found
    mapped = talk.daemon.mapped
    assert [mapped(name) for name in (v4, v6, name, "b.test", "a.test", "A.test", "B.TEST")] == [
        "h.test"] * 3 + ["c.test", "a.test", "A.test", "c.test"]
    assert mapped("deep.in.d.test") == "deep.in.e.test" and mapped("d.test") == "e.test"
    assert mapped("x.d.test") == "a.test" and mapped("y.f.test") == ONION + ".onion"
    assert mapped("xd.test") == "xd.test"


def test_mappings_in_a_circle_and_without_end(talk):
    lines = ["MAPADDRESS a.test=b.test b.test=a.test *.c.test=x.c.test"]
    lines += ["MAPADDRESS " + " ".join(["%d.n.test=z" % (1000 * j + i) for i in range(1000)])
              for j in range(11)]
    found = talk("", *lines)
    assert talk.daemon.mapped("a.test") in ("a.test", "b.test")
    assert talk.daemon.mapped("c.test") == "x.c.test"
    assert len(talk.daemon.mapping) == 10000
    assert found[-1].startswith("451 resource exhausted")


class FakeCircuit:
    """Stands for a Circuit that is built."""

    closed, on_begin, built, made = None, None, True, 0

    def __init__(self, hops=3):
        self.path, self.streams, self.since, self.opened = [None] * hops, {}, 0, []


def test_streams_wait_for_controllers(tmp_path, monkeypatch):
    """__LeaveStreamsUnattached: NEW, ATTACHSTREAM, a second try, and what is refused."""

    async def run():
        daemon = FakeDaemon("", tmp_path)
        await daemon.use(daemon.config)
        tor, events, circuits = daemon.tor, [], [FakeCircuit(), FakeCircuit(1)]
        daemon.event = lambda name, text: events.append("%s %s" % (name, text))
        daemon.circuits = lambda: circuits
        control = minitor.Control(daemon, None, Wire())
        own = FakeCircuit()

        async def take(key, port, isolation):
            assert isolation == ("x",) and type(isolation) is tuple
            return own

        async def opens(host, port, timeout, isolation):
            while True:
                circuit = await tor._circuit(None, port, isolation)
                circuit.opened.append(host)
                if len(circuit.opened) < 3:
                    stream = minitor.SimpleNamespace(circuit=circuit)
                    return stream, stream
                circuit.refusal = 4

        tor._circuit, tor.open_connection = take, opens
        daemon._watch_streams(tor)
        daemon.config["__LeaveStreamsUnattached"] = True
        isolation = minitor.Isolation(("x",))
        isolation.source = " SOURCE_ADDR=127.0.0.1:5"

        async def ask(line):
            name, _, text = line.partition(" ")
            return (await control._answer(name, text, None) or [""])[0]

        control.known, replies = True, []
        await ask("MAPADDRESS a.test=b.test")
        first = asyncio.ensure_future(tor.open_connection("a.test", 80, 9, isolation))
        await asyncio.sleep(0.01)
        (number,) = daemon.opening
        good, short = [minitor.numbered(circuit) for circuit in circuits]
        status = await ask("GETINFO stream-status")
        for line in ("%d 99" % number, "%d %d HOP=x" % (number, good), "%d %d" % (number, short),
                     "%d %d HOP=1" % (number, good), "%d %d HOP=4" % (number, good),
                     "%d %d HOP=2" % (number, good), "%d %d HOP=3" % (number, good),
                     "%d %d" % (number, good)):
            replies.append((await ask("ATTACHSTREAM " + line))[:3])
        stream, _ = await first
        assert stream.circuit is circuits[0] and stream.number == number
        # A circuit that fails it twice, and then minitor's own.
        circuits[0].opened += [1, 2]
        second = asyncio.ensure_future(tor.open_connection("c.test", 80, 9, isolation))
        for circuit in (good, 0):
            await asyncio.sleep(0.01)
            (other,) = daemon.opening
            assert await ask("ATTACHSTREAM %d %d" % (other, circuit)) == "250 OK"
        assert (await second)[0].circuit is own
        # A name that would be more words of an event.
        with pytest.raises(minitor.AddressError):
            await tor.open_connection("a.test:1 REASON=DONE", 80, 9, isolation)
        # One for an onion service, which a controller closes.
        third = asyncio.ensure_future(tor.open_connection(ONION + ".onion", 80, 9, isolation))
        await asyncio.sleep(0.01)
        (last,) = daemon.opening
        assert (await ask("ATTACHSTREAM %d %d" % (last, good)))[:3] == "551"
        assert (await ask("CLOSESTREAM %d x" % last))[:3] == "552"
        assert await ask("CLOSESTREAM %d 3" % last) == "250 OK"
        with pytest.raises(minitor.StreamError):
            await third
        # One that no controller attaches.
        with monkeypatch.context() as patch:
            patch.setattr(minitor, "PROXY_SECONDS", 0.01)
            with pytest.raises(minitor.TorTimeout):
                await tor.open_connection("e.test", 80, 9, isolation)
        # One whose client goes away.
        fourth = asyncio.ensure_future(tor.open_connection("d.test", 80, 9, isolation))
        await asyncio.sleep(0.01)
        fourth.cancel()
        await asyncio.wait({fourth})
        assert daemon.opening == {} and fourth.cancelled()
        await daemon.tor.aclose()
        daemon._lock.close()
        return number, status, replies, events, (good, other, last)

    number, status, replies, events, (good, other, last) = asyncio.run(run())
    assert status == "250+stream-status=\r\n%d CONTROLLER_WAIT 0 b.test:80\r\n." % number
    assert replies == ["552", "552", "551", "551", "551", "551", "250", "555"]
    told = [event for event in events if event.startswith("STREAM ")]
    assert told[:5] == ["STREAM %d %s" % (number, text) for text in (
        "NEW 0 a.test:80 SOURCE_ADDR=127.0.0.1:5 PURPOSE=USER", "REMAP 0 b.test:80 SOURCE=CACHE",
        "CONTROLLER_WAIT 0 b.test:80", "SENTCONNECT %d b.test:80" % good,
        "SUCCEEDED %d b.test:80" % good)]
    assert [event.split()[2] for event in told[5:12]] == [
        "NEW", "CONTROLLER_WAIT", "SENTCONNECT", "DETACHED", "CONTROLLER_WAIT", "SENTCONNECT",
        "SUCCEEDED"]
    assert told[8].endswith(" REASON=END REMOTE_REASON=EXITPOLICY")
    assert told[14] == "STREAM %d CLOSED 0 %s.onion:80 REASON=CONNECTREFUSED" % (last, ONION)
    assert told[-1].endswith(" CLOSED 0 d.test:80 REASON=DONE")


def test_who_does_not_read_is_let_go(tmp_path):
    async def run():
        daemon = FakeDaemon("", tmp_path)
        await daemon.use(daemon.config)
        wire, reader = Wire(), Wire()
        wire.get_write_buffer_size = lambda: len(wire.data)
        wire.abort = lambda: setattr(wire, "aborted", True)
        stalled, other = [minitor.Control(daemon, None, w) for w in (wire, reader)]
        daemon.controls += [stalled, other]
        for control in daemon.controls:
            control.events = {"BW"}
        for _ in range(6):
            daemon.event("BW", "1" * (1 << 20))
        assert wire.aborted and len(wire.data) < 5 << 20 and len(reader.data) > 6 << 20
        # Nor does one find room for tasks without end.
        for _ in range(1000):
            other.spawn(asyncio.sleep(0.01))
        found = await other._answer("RESOLVE", "a.test", None)
        assert found[0].startswith("514")
        other.known = True
        assert (await other._answer("RESOLVE", "a.test", None))[0].startswith("451")
        await asyncio.wait(other.tasks)
        await asyncio.sleep(0)
        assert other.tasks == set()
        await daemon.tor.aclose()
        daemon._lock.close()

    asyncio.run(run())


def test_words_of_events(tmp_path):
    """HS_DESC_CONTENT, also of what begins with a dot; CIRC_MINOR; REASONs."""
    daemon = FakeDaemon("", tmp_path)
    daemon.controls, key = [minitor.Control(daemon, None, Wire())], minitor.ed25519_public(ESK)
    daemon.controls[0].events = {"HS_DESC", "HS_DESC_CONTENT"}
    daemon._watch("HS_DESC", key, "RECEIVED", bytes(20), bytes(32), b"hs-descriptor 3\n.x\n")
    daemon._watch("HS_DESC", key, "FAILED", bytes(20), bytes(32), "NOT_FOUND")
    daemon._watch("HS_DESC", key, "UPLOADED", bytes(20))
    daemon._lock.close()
    site, blinded = minitor.onion_address(key)[:56], "A" * 43
    directory = "$" + NOBODY
    assert daemon.controls[0]._writer.data.decode().split("\r\n") == [
        "650 HS_DESC RECEIVED %s UNKNOWN %s %s" % (site, directory, blinded),
        "650+HS_DESC_CONTENT %s %s %s" % (site, blinded, directory),
        "hs-descriptor 3", "..x", ".", "650 OK",
        "650 HS_DESC FAILED %s UNKNOWN %s %s REASON=NOT_FOUND" % (site, directory, blinded),
        "650+HS_DESC_CONTENT %s %s %s" % (site, blinded, directory), "", ".", "650 OK",
        "650 HS_DESC UPLOADED %s UNKNOWN %s" % (site, directory), ""]
    assert [minitor.end_name(e) for e in (
        None, minitor.StreamError("", 4), minitor.TorTimeout(""), minitor.OnionError("", 0xF0))] == [
        "DONE", "END REMOTE_REASON=EXITPOLICY", "TIMEOUT", "MISC"]
