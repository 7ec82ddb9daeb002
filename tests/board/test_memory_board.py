"""Memory that runs out: each allocation in turn fails, and the service goes on."""

import ast
import os
import sys

import pytest
import runtimes

sys.path.append(str(runtimes.REPO))

import compress  # noqa: E402

HERE = runtimes.REPO / "tests" / "board"
# From here on calls fail: what runs while a service is up.
FIRST = "=== 10. Channel"
ALSO = "Promise", "spawn", "lasting"
# These allocate nothing, or never fail for it.
SAFE = """cancel clear crowded current_task discard done find get getattr is_set isinstance items len
    max min now pop popitem randbelow remove room set super ticks_diff ticks_ms type values
    wanted""".split()


class Hurt(ast.NodeTransformer):
    """Have `_tick()` called before whatever may allocate, in the lines [first, last)."""

    def __init__(self, tree, first, last):
        self.lines = range(first, last)
        own = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        self.safe = set(SAFE + own) - {"sleep", "write"}

    def hurt(self, node):
        return ast.BoolOp(ast.Or(), [ast.Call(ast.Name("_tick", ast.Load()), [], []), node])

    def visit_Call(self, node):
        self.generic_visit(node)
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
        return node if name in self.safe else self.hurt(node)

    def visit_Subscript(self, node):
        self.generic_visit(node)
        load = isinstance(node.ctx, ast.Load) and isinstance(node.slice, ast.Slice)
        return self.hurt(node) if load else node

    def visit_List(self, node):
        self.generic_visit(node)
        return self.hurt(node) if isinstance(node.ctx, ast.Load) else node

    def visit_Module(self, node):
        kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
        for n in node.body:
            if isinstance(n, kinds) and (n.lineno in self.lines or n.name in ALSO):
                self.visit(n)
        return node

    def visit_FunctionDef(self, node):
        # Defaults run once.
        node.body = [self.visit(n) for n in node.body]
        return node

    visit_AsyncFunctionDef = visit_FunctionDef


def hurt_source(text):
    tree, lines = ast.parse(text), text.split("\n")
    first = [i for i, line in enumerate(lines) if FIRST in line][0]
    tree = ast.fix_missing_locations(Hurt(tree, first, len(lines)).visit(tree))
    return "_tick = lambda: None\n" + ast.unparse(compress.bare(tree)) + "\n"


@pytest.fixture(scope="module")
def hurt(tmp_path_factory):
    """The file of a minitor whose allocations fail when they are told to."""
    path = tmp_path_factory.mktemp("hurt") / "hurt.py"
    text = (runtimes.REPO / "minitor.py").read_text()
    path.write_text(hurt_source(runtimes.without_front_doors(text)))
    return path


def run(bits, hurt, script, *arguments, seconds=500):
    if bits:
        line, environment = runtimes.command(bits, HERE / script, *arguments)
        path = environment["MICROPYPATH"]
        environment["MICROPYPATH"] = "%s:%s" % (runtimes.compiled(bits, hurt), path)
    else:
        path = os.pathsep.join([str(hurt.parent), str(runtimes.REPO)])
        # Coroutines that never ran, as memory lacked, are reported.
        line = [sys.executable, "-W", "ignore", str(HERE / script)]
        line += [str(argument) for argument in arguments]
        environment = dict(os.environ, PYTHONPATH=path)
    return runtimes.run_script(line, environment, seconds)


@pytest.mark.parametrize("part", ["streams", "loops"])
def test_each_allocation_fails_once(bits, hurt, tmp_path, part):
    # Hashing is slow there: some of them.
    print(run(bits, hurt, "memory_each.py", part, tmp_path, 11, seconds=360))


@pytest.mark.parametrize("part", ["streams", "loops"])
def test_each_allocation_fails_once_on_a_host(hurt, tmp_path, part):
    print(run(None, hurt, "memory_each.py", part, tmp_path, 1))


def test_budget_and_floods(micropython):
    print(micropython(HERE / "memory_budget.py", heap="400k"))
