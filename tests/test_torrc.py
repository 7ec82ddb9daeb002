"""torrc: tor's syntax, the options that minitor has, and what is refused."""

import io
import os
import random
import shutil
import subprocess

import pytest

import minitor
from test_paths import make_consensus, network

FINGERPRINT = "0123456789abcdef0123456789ABCDEF01234567"
TOR = shutil.which("tor", path=os.environ["PATH"] + ":/usr/sbin")
PARTS = [
    "SocksPort", "9050", " ", "\t", "\n", "\r\n", "#", '"', "\\", "\\\n", "\\x41", "\\101",
    "\\n", "\0", "%include", "+Log", "/Log", "notice", "stdout", "HiddenServiceDir", "/nowhere/h",
    "HiddenServicePort", "80", "unix:", "ExitNodes", "{de}", "10.0.0.0/8", "ü", "\udcff", "=", ":",
    "Log", "MaxCircuitDirtiness", "5 minutes", "Bridge", "1.2.3.4:5", "0", "-1", "[::1]:9",
    "HashedControlPassword", "ClientTransportPlugin", "obfs4 exec /x", "auto", "FallbackDir", "²",
    "ControlSocket", "SafeLogging", "DirAuthority", "v3ident=", "e", "99999999999999999999", "[",
]


def configure(text):
    return minitor.configure(list(minitor.parse_torrc(text)))


def lines(text):
    return [line[:2] for line in minitor.parse_torrc(text)]


# The syntax, as in tor's torrc_format.txt.

SYNTAX = [
    ("A b", [("A", "b")]),
    ("  A   b c\t\n\n\r\nD e  \r\n", [("A", "b c"), ("D", "e")]),
    ("# A b\nC d # e\nF g#h", [("C", "d"), ("F", "g")]),
    ("A\nB", [("A", ""), ("B", "")]),
    ("A#b\nC d", [("A", ""), ("C", "d")]),
    ("A b \\\n   c \\\nd\nE f", [("A", "b    c d"), ("E", "f")]),
    ("A b \\\n# comment\nc", [("A", "b c")]),
    ("A\\\nb\nC d", [("A", "b"), ("C", "d")]),
    ("A b\\c \\d", [("A", "b\\c \\d")]),
    ('A "b # c"  # d\nE f', [("A", "b # c"), ("E", "f")]),
    (r'A "\"\\\'\n\r\t\x41\X42\103\7x"', [("A", "\"\\'\n\r\tABC\7x")]),
    ('A "ü\\xc3\\xbc"', [("A", "üü")]),
    ('A "\\xff"', [("A", "\udcff")]),
    ('A b "c"', [("A", 'b "c"')]),
    ('A ""', [("A", "")]),
    ("", []),
    ("\n # \n\t", []),
]


@pytest.mark.parametrize("text, expected", SYNTAX)
def test_syntax(text, expected):
    assert lines(text) == expected


@pytest.mark.parametrize("text", [
    'A "b', 'A "b\nc"', 'A "\\q"', 'A "\\x4"', 'A "\\400"', 'A "b" c', 'A "b"c', '\nA "b\\', "A\0",
])
def test_bad_syntax_names_the_line(text):
    with pytest.raises(minitor.ConfigError, match="torrc:%d" % (1 + text.startswith("\n"))):
        lines(text)


def test_tor_reads_the_same(tmp_path):
    # What C tor makes of it, printed by itself.
    text = "".join([
        "DataDirectory %s\n" % tmp_path, "ContactInfo a \\\n# b\n c\n\n",
        'HashedControlPassword "16:%s" # d\n' % ("A1" * 29), "PidFile /a\\b  \n",
        'CookieAuthFile "/x\\x41\\102\\t\\"y" #z\n', "SocksPort 9050 #c\nMaxCircuitDirtiness 1 hour\n",
    ])
    torrc = tmp_path / "torrc"
    torrc.write_text(text)
    done = subprocess.run([TOR, "--dump-config", "short", "-f", torrc, "--defaults-torrc", "/none"],
                          stdout=subprocess.PIPE, universal_newlines=True, timeout=30)
    theirs = dict(lines("".join(l + "\n" for l in done.stdout.splitlines() if " [" not in l)))
    ours = dict(lines(text))
    assert ours["MaxCircuitDirtiness"] == "1 hour" and theirs.pop("MaxCircuitDirtiness") == "3600"
    for name, value in theirs.items():
        assert ours[name] == value
    assert len(theirs) >= 6


def test_include(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "b").write_text("B 2\n")
    (folder / "a").write_text("A 1\n%%include %s\n" % (tmp_path / "more*.conf"))
    (folder / ".hidden").write_text("Z 9\n")
    (folder / "deeper").mkdir()
    (tmp_path / "more1.conf").write_text("C 3")
    (tmp_path / "more2.conf").write_text("C 4")
    torrc = tmp_path / "torrc"
    torrc.write_text("X 0\n%%include %s\nY 5\n%%include %s/no*\n" % (folder, tmp_path))
    found = minitor.read_torrc(str(torrc))
    assert [line[:2] for line in found] == [
        ("X", "0"), ("A", "1"), ("C", "3"), ("C", "4"), ("B", "2"), ("Y", "5")]
    assert found[3][2] == "%s:1" % (tmp_path / "more2.conf")


def test_include_of_what_is_not_there_or_of_itself(tmp_path):
    torrc = tmp_path / "torrc"
    for text in ("%%include %s/no" % tmp_path, "%include", "%%include %s" % torrc):
        torrc.write_text(text)
        with pytest.raises(minitor.ConfigError):
            minitor.read_torrc(str(torrc))
    with pytest.raises(minitor.ConfigError, match="nothere"):
        minitor.read_torrc(str(tmp_path / "nothere"))


# Options.

def test_names_are_case_insensitive_and_may_be_shortened():
    assert configure("socksPORT 9")["SocksPort"] == [("9", "")]
    assert configure("MaxCirc 60")["MaxCircuitDirtiness"] == 60
    assert len(configure("l notice stdout")["Log"]) == 1
    with pytest.raises(minitor.ConfigError):
        configure("ControlPor 0\nControlP 0\nHiddenService 3")


@pytest.mark.parametrize("text, what", [
    ("\nNonsense 1", "torrc:2: Nonsense: unknown option"),
    ("ORPort 9001", "only relays"), ("ExitPolicy reject *:*", "only relays"),
    ("DirPort 1", "only relays"), ("BridgeRelay 1", "only relays"), ("Nickname x", "only relays"),
    ("AuthoritativeDirectory 1", "only relays"), ("ExitRelay 0", "only relays"),
    ("SocksPort x", "SocksPort x"), ("SocksPort 65536", "65536"), ("SocksPort 9050 Isolate", "Isolate"),
    ("SocksPort 9050 GroupWritable", "unix:PATH"), ("SocksPort 1.2.3.4", "1.2.3.4"),
    ("RunAsDaemon 2", "2"), ("RunAsDaemon yes", "yes"), ("SafeLogging 3", "SafeLogging"),
    ("MaxCircuitDirtiness 5", "10 seconds"), ("MaxCircuitDirtiness 5 parsecs", "interval"),
    ("Log loud stdout", "notice std"), ("Log notice file", "Log"),
    ("Log notice stdout x", "notice std"), ("HiddenServicePort 80", "HiddenServiceDir"),
    ("HiddenServiceDir /x", "no HiddenServicePort"), ("EntryNodes somebody", "somebody"),
    ("HiddenServiceDir /x\nHiddenServicePort 80\nHiddenServiceDir /x\n", "twice"),
    ("HiddenServiceDir /x\nHiddenServicePort 80-90", "torrc:2"),
    ("HiddenServiceDir /x\nHiddenServicePort 80 1-2", "torrc:2"),
    ("HiddenServiceDir /x\nHiddenServicePort 0", "torrc:2"),
    ("HiddenServiceDir /x\nHiddenServiceVersion 2", "torrc:2"),
    ("HiddenServiceDir /x\nHiddenServiceNumIntroductionPoints 2", "3 to 20"),
    ("HiddenServiceDir /x\nHiddenServiceExportCircuitID nginx", "haproxy"),
    ("HashedControlPassword secret", "hash-password"), ("ExcludeNodes {deu}", "deu"),
    ("DirAuthority x 1.2.3.4:5 " + "A" * 40, "v3ident"), ("FallbackDir 1.2.3.4:80", "orport"),
    ("Bridge obfs4", "port"), ("Bridge 1.2.3.4:5 xyz", "xyz"), ("ClientTransportPlugin x", "exec"),
    ("UseBridges 1\nBridge 1.2.3.4:5", "bridges yet"), ("ClientOnionAuthDir /x", "/x cannot be used"),
])
def test_what_is_wrong_is_refused_with_its_line(text, what):
    with pytest.raises(minitor.ConfigError) as caught:
        configure(text)
    assert what in str(caught.value) and "torrc:" in str(caught.value)


def test_an_error_shows_no_password():
    with pytest.raises(minitor.ConfigError) as caught:
        configure("HashedControlPassword my-secret")
    assert "my-secret" not in str(caught.value)


KEY = "descriptor:x25519:" + "M4" + 50 * "A"
SITE = minitor.onion_address(minitor.ed25519_public(minitor.ed25519_expand(b"s" * 32)))


def test_keys_for_client_authorization(tmp_path, capsys):
    def read(**files):
        for name, text in files.items():
            (tmp_path / (name + ".auth_private")).write_text(text)
        return minitor.load_onion_keys(str(tmp_path))

    good = "%s:%s" % (SITE[:56], KEY)
    identity, key = minitor.parse_onion_address(SITE), minitor.auth_key(KEY)
    assert key == b"g" + bytes(31)
    tmp_path.chmod(0o755)
    found = read(a=" %s \n" % good.replace(":x", " : x"), b="", c="x" + good, d=good[:-1],
                 e=good.replace("x25519", "x448"), f=good[:-52] + 52 * "a", g="\xff" * 100)
    assert found == {identity: (key, str(tmp_path / "a.auth_private"))}
    assert tmp_path.stat().st_mode & 0o777 == 0o700
    warned = capsys.readouterr().err
    assert warned.count("is passed over") == 6 and KEY[20:50] not in warned
    (tmp_path / "notes.txt").write_text(good)
    (tmp_path / ".auth_private").write_text(good)
    assert read() == found and "notes.txt is passed over" in capsys.readouterr().err
    configure("ClientOnionAuthDir %s" % tmp_path)
    with pytest.raises(minitor.ConfigError, match="two files"):
        read(h=good)
    with pytest.raises(minitor.ConfigError, match="torrc:1: ClientOnionAuthDir: two files"):
        configure("ClientOnionAuthDir %s" % tmp_path)
    assert minitor.auth_text(key) == KEY and minitor.auth_key(KEY[18:].lower()) == key


def test_listeners():
    def one(text, option="SocksPort"):
        found = configure("%s %s" % (option, text))[option]
        return found and found[0]

    assert one("0") == []
    assert one("auto") == ("auto", "")
    assert one("[::1]:auto  IsolateDestAddr ") == ("[::1]:auto", "IsolateDestAddr")
    assert one("0.0.0.0:9 SessionGroup=7 NoIPv6Traffic")[1] == "SessionGroup=7 NoIPv6Traffic"
    assert one("unix:/a/b GroupWritable") == ("unix:/a/b", "GroupWritable")
    assert one('unix:"/a b\\"c" WorldWritable') == ('unix:/a b"c', "WorldWritable")
    for text in ("/a/b", "unix:/a/b"):
        assert one(text, "ControlSocket") == ("unix:/a/b", "")


@pytest.mark.parametrize("text, seconds", [
    ("600", 600), ("10 minutes", 600), ("1 hour", 3600), ("1.5 HOURS", 5400), ("2 days", 172800),
    ("90seconds", 90), ("1 week", 604800), ("0.5 minute", 30),
])
def test_intervals(text, seconds):
    assert configure("MaxCircuitDirtiness " + text)["MaxCircuitDirtiness"] == seconds


@pytest.mark.parametrize("text, expected", [
    ("notice stdout", ({2, 3, 4}, "stdout", None)), ("info", ({1, 2, 3, 4}, "stdout", None)),
    ("debug-notice stderr", ({0, 1, 2}, "stderr", None)), ("err syslog", ({4}, "syslog", None)),
    ("warn file /a b/c", ({3, 4}, "file", "/a b/c")),
    ("[general,~net]debug-debug [*]err file /x", ({0, 4}, "file", "/x")),
])
def test_log_lines(text, expected):
    assert configure("Log " + text)["Log"] == [expected]


def test_services():
    config = configure("""
        HiddenServiceDir /a
        HiddenServicePort 80
        HiddenServicePort 81 8080
        HiddenServicePort 81 localhost:8081
        HiddenServicePort 82 [::1]:5
        HiddenServicePort 83 1.2.3.4
        HiddenServicePort 84 unix:/run/x
        HiddenServicePort 85 unix:"/run/x y"
        HiddenServiceMaxStreams 5
        HiddenServiceMaxStreamsCloseCircuit 1
        HiddenServiceDir /b
        HiddenServicePort 22
        HiddenServiceVersion 3
        HiddenServiceNumIntroductionPoints 4
        HiddenServiceExportCircuitID haproxy
    """)["HiddenServiceOptions"]
    a, b = config["/a"], config["/b"]
    assert a["HiddenServicePort"] == {
        80: [("127.0.0.1", 80)], 81: [("127.0.0.1", 8080), ("localhost", 8081)],
        82: [("::1", 5)], 83: [("1.2.3.4", 83)], 84: ["unix:/run/x"], 85: ["unix:/run/x y"]}
    service = minitor.Record()
    minitor.set_service(service, a)
    assert service.ports == a["HiddenServicePort"]
    assert (service.max_streams, service.strict, service.intro_points) == (5, True, 3)
    assert not service.export
    minitor.set_service(service, b)
    assert (service.max_streams, service.intro_points) == (65535, 4)
    assert service.export and not service.strict


def test_later_sources_override_and_add():
    first = [("SocksPort", "1", "a"), ("Log", "err stdout", "a"), ("PidFile", "/a", "a")]
    both = lambda *more: minitor.configure(first, [(k, v, "b") for k, v in more])
    places = lambda config: [int(where) for where, _ in config["SocksPort"]]
    assert places(both(("SocksPort", "2"), ("SocksPort", "3"))) == [2, 3]
    assert places(both(("+SocksPort", "2"), ("SocksPort", "3"))) == [1, 2, 3]
    assert places(both(("/SocksPort", ""))) == []
    assert both(("PidFile", "/b"))["PidFile"] == "/b"
    assert both(("PidFile", ""))["PidFile"] is None
    assert both(("Log", ""))["Log"] == both()["Log"] != []


def test_command_line():
    commands, found = minitor.parse_arguments(
        ["-f", "x", "--SocksPort", "9050", "+Log", "err stdout", "--/PidFile", "--verify-config",
         "-RunAsDaemon", "0"])
    assert commands == {"-f": "x", "--verify-config": ""}
    assert [line[:2] for line in found] == [
        ("SocksPort", "9050"), ("+Log", "err stdout"), ("/PidFile", ""), ("RunAsDaemon", "0")]
    with pytest.raises(minitor.ConfigError, match="--SocksPort"):
        minitor.parse_arguments(["--SocksPort"])
    for argv in (["-f", "x"], ["--socksport", "1"], ["SocksPort", "1"], ["--verify-config"]):
        assert minitor.is_for_daemon(argv)
    for argv in (["--serve"], ["--get", "x"], [], ["--address"], ["--version"]):
        assert not minitor.is_for_daemon(argv)


def test_verify_config(tmp_path, capsys):
    torrc = tmp_path / "torrc"
    torrc.write_text("SocksPort 0\n")
    assert minitor.main(["-f", str(torrc), "--verify-config"]) == 0
    assert capsys.readouterr()[0] == "Configuration was valid\n"
    assert minitor.main(["--verify-config", "-f", str(torrc), "--Nonsense", "1"]) == 1
    assert "Nonsense: unknown option" in capsys.readouterr()[1]
    torrc.write_text("\n\nORPort 1\n")
    assert minitor.main(["-f", str(torrc), "--verify-config"]) == 1
    assert "%s:3: ORPort: only relays" % torrc in capsys.readouterr()[1]
    assert minitor.main(["-f", str(tmp_path / "no"), "--verify-config"]) == 1
    assert minitor.main(
        ["-f", str(tmp_path / "no"), "--ignore-missing-torrc", "--verify-config"]) == 0


def test_torrc_from_standard_input(monkeypatch, capsys):
    for text, status in (("SocksPort 0", 0), ("SocksPort x", 1)):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert minitor.main(["-f", "-", "--verify-config"]) == status
    assert "-:1: SocksPort x" in capsys.readouterr()[1]


def test_a_user_that_is_not_there(tmp_path, capsys):
    argv = ["--User", "nobody-of-that-name", "--DataDirectory", str(tmp_path / "data")]
    assert minitor.main(argv) == 1
    assert "nobody-of-that-name" in capsys.readouterr()[1] and not (tmp_path / "data").exists()


def test_hash_password(capsys):
    done = subprocess.run([TOR, "--hash-password", "foo"], stdout=subprocess.PIPE, timeout=30)
    salt, digest = minitor.parse_password_hash(done.stdout.decode().split()[-1])
    assert minitor.hash_password(b"foo", salt) == digest
    assert minitor.main(["--hash-password", "secret"]) == 0
    salt, digest = minitor.parse_password_hash(capsys.readouterr()[0].strip())
    assert minitor.hash_password(b"secret", salt) == digest


def test_whatever_the_text_a_config_or_an_error():
    generator = random.Random(5)
    good = 0
    for _ in range(4000):
        text = "".join(generator.choice(PARTS) for _ in range(generator.randrange(1, 14)))
        if generator.random() < 0.5:
            text = " ".join([generator.choice(PARTS[:1] + PARTS[19:]) for _ in range(3)])
        try:
            assert isinstance(configure(text), dict)
            good += 1
        except minitor.ConfigError:
            pass
    assert good > 20


def test_whatever_the_bytes_of_the_file(tmp_path):
    generator = random.Random(6)
    for _ in range(300):
        (tmp_path / "t").write_bytes(bytes(generator.randrange(256) for _ in range(60)))
        try:
            minitor.configure(minitor.read_torrc(str(tmp_path / "t")))
        except minitor.ConfigError:
            pass


# Which relays are used.

def test_lists_of_relays():
    ids, networks, countries = minitor.parse_nodes(
        "$%s~nick, %s,{de} ,{??}, 10.1.0.0/16, 1.2.3.4/255.255.255.0" % (FINGERPRINT, "00" * 20))
    assert ids == {bytes.fromhex(FINGERPRINT), bytes(20)}
    assert countries == {"DE", "??"}
    assert networks == [(0x0A010000, 0xFFFF0000), (0x01020300, 0xFFFFFF00)]


def test_countries(tmp_path):
    file = tmp_path / "geoip"
    file.write_text("# x\n16777216,16777471,AU\n16777472,16778239,CN\n16778300,16778400,DE\n")
    geoip = minitor.load_geoip(str(file))
    addresses = 0, 16777216, 16777471, 16777472, 16778240, 16778300, 16778400, 16778401
    found = [minitor.country(geoip, a) for a in addresses]
    assert found == ["??", "AU", "AU", "CN", "??", "DE", "DE", "??"]
    for text in ("1,x,AU\n", "1,99999999999,AU\n"):
        file.write_text(text)
        with pytest.raises(minitor.ConfigError, match="geoip"):
            minitor.load_geoip(str(file))


def chosen(text, path=None):
    net = network()
    return net, minitor.ChosenPaths(configure(text), net.table, make_consensus(), path)


def found(selector, role):
    return {selector.pick(role, lambda i: True) for _ in range(200)}


def test_paths_keep_to_the_lists():
    # Of network(): guards are 0 to 29, exits 30 to 39; addresses 10.<index>.0.1.
    net, paths = chosen("ExitNodes 10.31.0.0/16,10.32.0.1\nExcludeNodes 10.32.0.0/16,10.45.0.1")
    assert found(paths, "exit") == {31}
    assert not found(paths, "middle") & {32, 45} and len(found(paths, "middle")) > 10
    assert paths.excluded(net.table.relay(45)) and not paths.excluded(net.table.relay(31))
    net, paths = chosen("ExcludeExitNodes $%s,10.30.0.0/15" % net.table.rsa_id(35).hex())
    assert found(paths, "exit") == set(range(32, 40)) - {35}
    assert 35 in {i for i, _ in paths.weigh("m", 0)}


def test_without_a_relay_that_fits_there_is_no_path():
    _, paths = chosen("ExitNodes 1.2.3.4")
    with pytest.raises(minitor.CircuitError, match="no exit is left"):
        paths.pick("exit", lambda i: True)


def test_entry_nodes_are_the_only_guards(tmp_path):
    file = str(tmp_path / "guards.json")
    net, paths = chosen("", file)
    first = {g.rsa_id for g in paths.sample}
    assert len(first) == 20
    text = "EntryNodes 10.3.0.1,10.4.0.1"
    net, paths = chosen(text, file)
    assert {paths.guard().index for _ in range(50)} <= {3, 4}
    # Those of before are kept for when they are allowed again.
    assert first <= {g.rsa_id for g in paths.sample}
    for i in (3, 4):
        paths.failed(net.table.rsa_id(i))
    assert paths.guard().index in (3, 4)
    paths.config = configure("")
    paths.update(net.table, make_consensus())
    assert {g.rsa_id for g in paths._order()} >= first


def test_countries_choose_relays(tmp_path):
    file = tmp_path / "geoip"
    start = 10 << 24 | 31 << 16
    file.write_text("%d,%d,DE\n" % (start, start + 65535))
    _, paths = chosen("GeoIPFile %s\nExitNodes {de}" % file)
    assert found(paths, "exit") == {31}
    _, paths = chosen("GeoIPFile %s\nExcludeNodes {??}" % file)
    assert found(paths, "exit") == {31}
    with pytest.raises(minitor.ConfigError, match="tor-geoipdb"):
        chosen("GeoIPFile %s\nExitNodes {de}" % (tmp_path / "no"))
