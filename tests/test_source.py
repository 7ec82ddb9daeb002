"""What the text of minitor.py has to keep to: its size, Python 3.9, and MicroPython's limits."""

import ast
import re
from pathlib import Path

import pytest

import minitor

SOURCE = (Path(__file__).resolve().parents[1] / "minitor.py").read_text()
TREE = ast.parse(SOURCE, feature_version=(3, 9))
# What MicroPython has not, or gets wrong without an error.
ATTRIBUTES = "bit_length bit_count hexdigest removeprefix removesuffix zfill ljust rjust"
ATTRIBUTES = set((ATTRIBUTES + " casefold maketrans expandtabs cast").split())
NAMES = set(
    "ConnectionError ConnectionResetError BrokenPipeError TimeoutError FileNotFoundError"
    " FileExistsError PermissionError InterruptedError aiter anext breakpoint".split()
)
POSITIONAL = set("from_bytes to_bytes split rsplit splitlines encode decode".split())


def test_size():
    # The client and the host of onion services took 150 KB; 56 came for boards: hashes and AES in
    # viper, the relay table on flash, admission by memory; 110 for proxies, torrc and control port;
    # 14 for client authorization, 27 for bridges and their transports, 12 for guards as in
    # guard-spec, node lists and diversity; 92 for links, advertisements and their table.
    # A new feature raises it knowingly.
    assert len(SOURCE.encode()) <= 470 * 1024


def test_lines_are_short():
    assert not [i for i, line in enumerate(SOURCE.split("\n"), 1) if len(line) > 100]


def test_functions_fit_a_screen():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    sizes = {f.name: f.end_lineno - f.lineno + 1 for f in ast.walk(TREE) if isinstance(f, kinds)}
    assert not {name: size for name, size in sizes.items() if size > 60}


def stored(statement):
    """Yield the names that a statement of the module binds."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Assign, ast.AugAssign)):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def test_no_section_hides_a_name_of_another():
    seen, twice = set(), set()
    for statement in TREE.body:
        for name in stored(statement):
            (twice if name in seen else seen).add(name)
    assert not twice


def on_the_board(node):
    """Yield `node` and what is below it, except what stands in a branch for CPython."""
    if getattr(node, "name", "") == "_http_opener":
        # Only Tor calls it, which is for threads.
        return
    yield node
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If):
        test = ast.unparse(node.test)
        if test == "MICROPYTHON":
            children = node.body
        elif test == "not MICROPYTHON":
            children = node.orelse
    for child in children:
        yield from on_the_board(child)


def trap(node):
    """Return what is wrong with `node` for MicroPython, or None."""
    if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
        return "." + node.attr
    if isinstance(node, ast.Name) and node.id in NAMES:
        return node.id
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        if any(isinstance(e, ast.Starred) for e in node.elts):
            return "starred display"
    if isinstance(node, ast.Dict) and None in node.keys:
        return "** in a display"
    if isinstance(node, ast.comprehension) and node.is_async:
        return "asynchronous comprehension"
    if isinstance(node, ast.arguments) and node.posonlyargs:
        return "/ in parameters"
    if isinstance(node, ast.AsyncFunctionDef):
        if any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in ast.walk(node)):
            return "asynchronous generator"
    if isinstance(node, ast.AnnAssign) or isinstance(node, ast.arg) and node.annotation:
        return "annotation"
    if isinstance(node, ast.ClassDef) and len(node.bases) > 1:
        return "multiple inheritance"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if name in POSITIONAL and node.keywords:
            return "keyword to .%s" % name
        if name in ("encode", "decode") and node.args and "latin" in ast.unparse(node.args[0]):
            return "latin-1"
        # Found only where a class has one of its own: exceptions have not.
        if name == "__init__" and ast.unparse(node.func.value).endswith(("Error", "Exception")):
            return "__init__ of an exception"
        if name in ("pack", "unpack", "unpack_from", "calcsize", "iter_unpack") and node.args:
            form = node.args[0]
            if isinstance(form, ast.Constant) and str(form.value)[:1] == "=":
                return "struct format ="
    if isinstance(node, ast.Delete):
        if any(isinstance(getattr(t, "slice", None), ast.Slice) for t in node.targets):
            return "del of a slice"
    return None


def test_nothing_that_micropython_lacks():
    found = ["line %d: %s" % (n.lineno, trap(n)) for n in on_the_board(TREE) if trap(n)]
    assert not found


@pytest.mark.parametrize(
    "text",
    "[*a, 1]|{**a}|(1).bit_length()|TimeoutError|f(a, to_bytes(1))|del a[:2]"
    "|struct.pack('=I', 1)|x.split(sep='a')|TorError.__init__(self, 1)".split("|"),
)
def test_the_check_itself(text):
    traps = [trap(n) for n in on_the_board(ast.parse(text)) if trap(n)]
    assert bool(traps) == ("to_bytes" not in text)
    hidden = ast.parse("if MICROPYTHON:\n    pass\nelse:\n    " + text)
    assert not [n for n in on_the_board(hidden) if trap(n)]
