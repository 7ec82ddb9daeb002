"""torrc: tor's syntax, the options that minitor has, and what is refused."""

import asyncio
import io
import ipaddress
import os
import random
import re
import shutil
import subprocess

import pytest

import minitor
from test_paths import KINDS, NOWHERE, Checks, Net, chi_square, make_consensus, network, public

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

def test_new_circuit_period():
    assert configure("")["NewCircuitPeriod"] == 30
    assert configure("NewCircuitPeriod 2 minutes")["NewCircuitPeriod"] == 120


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
    ("ClientOnionAuthDir /x", "/x cannot be used"),
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
    ids, patterns, countries = minitor.parse_nodes(
        "$%s~nick, %s,{de} ,{??},{a1}, 10.1.0.0/16, 1.2.3.4/255.255.255.0" % (
            FINGERPRINT, "00" * 20))
    assert ids == {bytes.fromhex(FINGERPRINT), bytes(20)}
    assert countries == {"DE", "??", "A1"}
    assert patterns == [(4, 0x0A010000, 0xFFFF0000, 1, 65535), (4, 0x01020300, 0xFFFFFF00, 1, 65535)]


@pytest.mark.parametrize("text, sizes, ports", [
    ("*", {4, 16}, (1, 65535)), ("*4", {4}, (1, 65535)), ("*6", {16}, (1, 65535)),
    ("*:9001", {4, 16}, (9001, 9001)), ("*4:80-90", {4}, (80, 90)), ("1.2.3.4:*", {4}, (1, 65535)),
    ("1.2.3.4:443", {4}, (443, 443)), ("1.2.0.0/16:1-2", {4}, (1, 2)), ("2a00::/12", {16}, (1, 65535)),
    ("[2a00:1::]/32", {16}, (1, 65535)), ("[2a00::]/16:443", {16}, (443, 443)),
])
def test_address_patterns(text, sizes, ports):
    _, patterns, _ = minitor.parse_nodes(text)
    assert {p[0] for p in patterns} == sizes and {p[3:] for p in patterns} == {ports}


@pytest.mark.parametrize("item, wrong", [
    ("somebody", "nicknames"), ("2a00::1", "32 bits"), ("[2a00::]/33", "32 bits"), ("{d}", "{d}"),
    ("1.2.3", "1.2.3"), ("1.2.3.4/33", "pattern"), ("1.2.3.4:x", "pattern"), ("[::1", "32 bits"),
    ("a.example", "a.example"), ("1.2.3.4:80-", "pattern"), ("*5", "pattern"), ("$12", "pattern"),
])
def test_lists_of_relays_that_cannot_be_named(item, wrong):
    with pytest.raises(minitor.ConfigError, match="torrc:2: ExcludeNodes .*" + re.escape(wrong)):
        configure("SocksPort 1\nExcludeNodes 1.2.3.4,%s" % item)


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


def ids(guards):
    return {g.rsa_id for g in guards}


def test_few_entry_nodes_have_a_sample_of_their_own(tmp_path):
    file = str(tmp_path / "guards.json")
    net, paths = chosen("", file)
    first = ids(paths.sample)
    assert len(first) == 20
    text = "EntryNodes 10.3.0.1,10.4.0.1"
    net, paths = chosen(text, file)
    assert {paths.guard().index for _ in range(50)} <= {3, 4}
    assert {g.index for g in paths.sample} == {3, 4}
    for i in (3, 4):
        paths.failed(net.table.rsa_id(i))
    assert paths.guard().index in (3, 4)
    # Those of before are kept for when they are allowed again.
    paths.config = configure("")
    paths.update(net.table, make_consensus())
    assert ids(paths._order()) == first
    paths.config = configure(text)
    paths.update(net.table, make_consensus())
    assert {g.index for g in paths.sample} == {3, 4}


def test_guards_are_sampled_first_and_chosen_from_afterwards(tmp_path):
    # As long as a fifth of them is left (guard-spec 2.B, 4.2).
    file, net = str(tmp_path / "guards.json"), network(guards=200)
    make = lambda text: minitor.ChosenPaths(configure(text), net.table, make_consensus(), file)
    first = ids(make("").sample)
    for _ in range(2):
        paths = make("ExcludeNodes 10.0.0.0/9")
        # All of them remain, and some are not used; others come until enough are usable, or
        # a fifth of all guards is sampled.
        usable = {g.index for g in paths._order()}
        assert first < ids(paths.sample) and min(usable) >= 128
        assert len(usable) == 20 or len(paths.sample) == 40
        for _ in range(60):
            assert 128 <= paths.exit_path(80)[0].index < 200
        # None is forgotten for that.
        assert all(g.index >= 0 and not g.unlisted for g in paths.sample)
    assert not paths._restricted and first < {g.rsa_id for g in make("")._order()}


def test_a_sample_is_not_given_up_for_a_guard_more_or_less(tmp_path):
    file = str(tmp_path / "guards.json")
    net = network(guards=1000, exits=0, middles=0)
    address = lambda i: "10.%d.0.0/16" % i if i < 256 else "%d.%d.0.0/16" % (10 + i // 256, i % 256)
    def left(n, paths=None):
        config = configure("EntryNodes " + ",".join(map(address, range(n))))
        if not paths:
            return minitor.ChosenPaths(config, net.table, make_consensus(), file)
        paths.config = config
        paths.update(net.table, make_consensus())
        return paths._restricted
    paths = left(200)
    assert not paths._restricted and left(199)._restricted
    assert [left(n, paths) for n in (190, 189, 209, 210, 195)] == [False, True, True, False, False]


def test_who_leaves_next_to_no_guard_is_warned(tmp_path):
    net, seen = network(guards=300, exits=0, middles=0), []
    minitor.set_log(minitor.WARN, lambda severity, text: seen.append(text))
    try:
        for text, warnings in (("10.1.0.1,10.2.0.1,10.3.0.1", 0), ("10.1.0.1,10.2.0.1", 1)):
            minitor.ChosenPaths(configure("EntryNodes " + text), net.table, make_consensus(),
                                str(tmp_path / "guards.json"))
            assert len(seen) == warnings
    finally:
        minitor.set_log(minitor.NOTICE)
    assert "leave 2 of 300 guards" in seen[0]


def test_relays_are_named_by_port_and_ipv6_network():
    net = Net()
    for n in range(8):
        net.add(minitor.EXIT, net6=0x2A000000 + n if n % 2 else 0)
    config = configure("ExitNodes [2a00::]/29,*:9000-9001\nExcludeExitNodes [2a00:3::]/32,*:9000")
    paths = minitor.ChosenPaths(config, net.table, make_consensus(), None)
    assert found(paths, "exit") == {0, 1, 2, 4, 5, 6, 7}
    config = configure("ExitNodes [2a00::]/30")
    paths = minitor.ChosenPaths(config, net.table, make_consensus(), None)
    assert found(paths, "exit") == {1, 3}


def test_relays_of_unknown_countries_are_excluded_with_any_country(tmp_path):
    file = tmp_path / "geoip"
    start = 10 << 24
    file.write_text("%d,%d,DE\n%d,%d,FR\n" % (
        start + (30 << 16), start + (33 << 16) - 1, start + (33 << 16), start + (36 << 16) - 1))
    # Exits 30 to 39: three in Germany, three in France, four unknown.
    for text, exits in (
        ("ExcludeNodes {de}", {33, 34, 35}), ("ExcludeExitNodes {de}", {33, 34, 35}),
        ("GeoIPExcludeUnknown 0\nExcludeNodes {de}", set(range(33, 40))),
        ("GeoIPExcludeUnknown 1", set(range(30, 36))), ("", set(range(30, 40))),
        ("ExitNodes {de}", {30, 31, 32}),
    ):
        _, paths = chosen("GeoIPFile %s\n%s" % (file, text))
        assert found(paths, "exit") == exits
    with pytest.raises(minitor.ConfigError, match="torrc:1: GeoIPExcludeUnknown"):
        configure("GeoIPExcludeUnknown 2")


def test_excluded_directories_are_asked_last_or_never():
    places = [("10.%d.0.1" % n, 80, bytes([n]) * 20) for n in range(4)]
    text = "ExcludeNodes 10.1.0.1,%s\nStrictNodes %d"
    for strict in (0, 1):
        config = configure(text % ("02" * 20, strict))
        assert minitor.mirrors(places, config) == [places[0], places[3]]
    assert minitor.mirrors(places, configure("ExcludeNodes *")) == places
    assert minitor.mirrors(places, configure("ExcludeNodes *\nStrictNodes 1")) == []
    # Those of the public network are packed.
    network = minitor.load_network()
    address, _, rsa_id = minitor.place(network.fallbacks[7])
    left = minitor.mirrors(network.fallbacks, configure("ExcludeNodes %s" % address))
    assert len(left) == 199 and network.fallbacks[7] not in left


def test_without_a_directory_to_ask_it_says_so(tmp_path):
    network = minitor.load_network()
    network.fallbacks = network.authorities = []
    directory = minitor.Directory(network, str(tmp_path), minitor.Channels(), None)
    with pytest.raises(minitor.DirectoryError, match="StrictNodes leave no directory"):
        asyncio.run(directory._circuit())


def test_excluded_relays_of_others_are_tried_last():
    net, paths = chosen("ExcludeNodes 10.31.0.1,10.200.0.1")
    assert paths.excluded(net.table.rsa_id(31)) and not paths.excluded(net.table.rsa_id(32))
    stranger = minitor.Record()
    stranger.rsa_id, stranger.address, stranger.port = bytes(20), "10.200.0.1", 1
    assert paths.excluded(stranger) and not paths.excluded(bytes(20))
    tor, order = minitor.SimpleNamespace(paths=paths), []

    async def use(item):
        order.append(item)
        raise minitor.CircuitError("no")

    for _ in range(20):
        items = [net.table.rsa_id(i) for i in range(29, 35)]
        with pytest.raises(minitor.OnionError):
            asyncio.run(minitor._try_each(tor, items, use, minitor.OnionError, "", 0))
        assert order.pop() == net.table.rsa_id(31)
        order.clear()


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


# The same on the public network, with real countries.

GEOIP = "/usr/share/tor/geoip"
assert public  # the fixture


@pytest.fixture(scope="module")
def countries(public):
    """{index: country} of the public network's relays, found by going through the file's lines."""
    table, _ = public
    if not os.path.exists(GEOIP):
        pytest.skip("Debian's tor-geoipdb is not installed: no " + GEOIP)
    wanted = sorted((int(table.said[table.rsa_id(i)]["v4"]), i) for i in range(len(table)))
    found = dict.fromkeys(range(len(table)), "??")
    with open(GEOIP) as f:
        for line in f:
            if line[0] != "#" and wanted:
                low, high, name = line.strip().split(",")
                while wanted and wanted[0][0] < int(low):
                    del wanted[0]
                while wanted and wanted[0][0] <= int(high):
                    found[wanted.pop(0)[1]] = name
    return found


def of_public(public, text):
    table, consensus = public
    return Checks(table, minitor.ChosenPaths(configure(text), table, consensus, NOWHERE))


def test_countries_are_found_as_the_file_has_them(public, countries):
    config = configure("")
    for i, name in countries.items():
        assert minitor.country_of(public[0].relay(i), config) == name
    assert len(set(countries.values())) > 40


@pytest.mark.parametrize("text", [
    "ExcludeNodes {de},{fr}", "ExitNodes {nl},{se}\nEntryNodes {de}", "ExcludeExitNodes {us}",
    "EntryNodes {fi},{is}\nExcludeNodes 65.108.0.0/16", "ExitNodes *:443\nExcludeNodes [2a00::]/12",
])
def test_restrictions_and_lists_hold_on_the_public_network(public, countries, text):
    checks, rng, table = of_public(public, text), random.Random(text), public[0]
    checks.sample |= {g.rsa_id for g in checks.paths.sample}
    lists = dict(line.split(" ", 1) for line in text.split("\n"))

    def among(relay, name):
        said, items = table.said[relay.rsa_id], lists.get(name, "").split(",")
        places = {"{%s}" % countries[relay.index].lower(), "*:%d" % said["port"]}
        if "{" in "".join(items) and name[:3] == "Exc" and "{??}" in places:
            return True
        if said["v4"] in ipaddress.ip_network("65.108.0.0/16"):
            places.add("65.108.0.0/16")
        if said["v6"] and said["v6"] in ipaddress.ip_network("2a00::/12"):
            places.add("[2a00::]/12")
        return bool(places & set(items))

    for kind in list(KINDS) * 40:
        path = KINDS[kind](checks, rng) or [checks.paths.guard()]
        ours = path[:3] if kind == "target" else path
        assert not any(among(relay, "ExcludeNodes") for relay in ours)
        assert "EntryNodes" not in lists or among(path[0], "EntryNodes")
        if kind == "exit":
            assert "ExitNodes" not in lists or among(path[2], "ExitNodes")
            assert not among(path[2], "ExcludeExitNodes")


def test_choice_among_exit_nodes_follows_the_weights(public, countries):
    checks, table = of_public(public, "ExitNodes {de},{nl}"), public[0]
    exits = [i for i in countries if countries[i] in ("DE", "NL")]
    exits = {i: table.weights[i] for i in exits if table.said[table.rsa_id(i)]["flags"] >= {"Exit", "Fast"}
             and "BadExit" not in table.said[table.rsa_id(i)]["flags"]}
    # Weights of exits that are guards, too, are others.
    w = public[1].bandwidth_weights
    exact = {i: n * w["Wed" if table.flags[i] & minitor.GUARD else "Wee"] for i, n in exits.items()}
    total, running, classes, expected, counts = sum(exact.values()), 0, {}, {}, {}
    for i in sorted(exact, key=exact.get):
        classes[i] = running * 10 // total
        running += exact[i]
        expected[classes[i]] = expected.get(classes[i], 0) + exact[i] * 1000 / total
    for _ in range(1000):
        c = classes[checks.paths.pick("exit", lambda i: True, 0)]
        counts[c] = counts.get(c, 0) + 1
    # The 0.999 quantile for 9 degrees of freedom is 27.9.
    assert len(expected) > 5 and chi_square(counts, expected) < 28


@pytest.mark.parametrize("kind", ["exit", "rendezvous", "target"])
def test_hops_in_different_countries(public, countries, kind):
    rng, table, seen = random.Random(kind), public[0], set()
    for n in range(200):
        if n % 20 == 0:
            checks = of_public(public, "EnforceDistinctCountries 1")
            guards = set()
        path = KINDS[kind](checks, rng)
        guards.add(path[0].rsa_id)
        # The target of an onion circuit is not ours to choose.
        found = [countries[relay.index] for relay in path[:3]]
        assert len(set(found)) == 3 and "??" not in found
        seen.add(tuple(found))
    assert len(seen) > 50
    # That is no reason to use more guards than else.
    use = public[1].param("guard-n-primary-guards-to-use", 1)
    assert guards <= {g.rsa_id for g in checks.paths.sample[:use]}


def test_where_too_few_countries_are_left_it_says_so(public, countries):
    for text, known in (("ExcludeNodes *4", 0), ("ExitNodes {de}\nEntryNodes {de}", None)):
        paths = of_public(public, text + "\nEnforceDistinctCountries 1").paths
        with pytest.raises(minitor.CircuitError, match="EnforceDistinctCountries .* another country"):
            paths.exit_path(80)


def test_distinct_countries_need_a_file(tmp_path):
    with pytest.raises(minitor.ConfigError, match="torrc:2: EnforceDist.*%s.*geoipdb" % tmp_path):
        configure("GeoIPFile %s/no\nEnforceDistinctCountries 1" % tmp_path)


def test_private_networks_are_in_no_country(tmp_path):
    file = tmp_path / "geoip"
    file.write_text("16777216,16777471,AU\n")
    _, paths = chosen("GeoIPFile %s\nEnforceDistinctCountries 1" % file, str(tmp_path / "guards"))
    for choose in (lambda: paths.exit_path(80), paths.onion_path):
        with pytest.raises(minitor.CircuitError, match="usable relays are in 0 by GeoIPFile"):
            choose()


def test_hops_in_different_countries_where_there_are_just_enough(tmp_path):
    # Guards are 0 to 29, exits 30 to 39, the rest 40 to 59.
    file, at = tmp_path / "geoip", lambda i: (10 << 24) + (i << 16)
    for spans, good in (
        ([(0, 30, "AA"), (30, 40, "BB"), (40, 60, "CC")], True),
        ([(0, 30, "AA"), (30, 40, "AA"), (40, 60, "CC")], False),
        ([(0, 15, "AA"), (15, 40, "BB"), (40, 60, "CC")], True),
        ([(0, 15, "AA"), (15, 40, "BB"), (40, 60, "??")], False),
    ):
        file.write_text("".join("%d,%d,%s\n" % (at(a), at(b) - 1, c) for a, b, c in spans))
        country = lambda relay: [c for a, b, c in spans if a <= relay.index < b][0]
        for _ in range(20):
            os.path.exists(tmp_path / "guards") and os.unlink(tmp_path / "guards")
            _, paths = chosen("GeoIPFile %s\nEnforceDistinctCountries 1" % file,
                              str(tmp_path / "guards"))
            for choose in (lambda: paths.exit_path(80), paths.onion_path):
                if good:
                    path = choose()
                    assert len({country(relay) for relay in path}) == 3
                else:
                    with pytest.raises(minitor.CircuitError, match="are in 2 by GeoIPFile"):
                        choose()


def test_diverse_is_an_option_of_the_command_line(monkeypatch):
    assert minitor.parse_arguments(["--SocksPort", "9", "--diverse"])[1] == [
        ("SocksPort", "9", "argument"), ("EnforceDistinctCountries", "1", "--diverse")]
    assert not minitor.is_for_daemon(["--socks", "--diverse"])
    monkeypatch.setattr(minitor.AsyncTor, "selector", minitor.PathSelector)
    minitor.diversify()
    net = network()
    paths = minitor.AsyncTor.selector(None, net.table, make_consensus(), None)
    assert paths.config["EnforceDistinctCountries"] is True
