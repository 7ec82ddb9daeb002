"""What the tests of compress.py share: builds of minitor.py, kept while a test run lasts."""

import ast
import functools
import re
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(TESTS.parent),) if path not in sys.path]

import compress  # noqa: E402

SOURCE = compress.SOURCE.read_text(encoding="utf-8")


@functools.lru_cache(None)
def build(what, more=()):
    """Return the Build for `what` that keeps the names `more` (a tuple), too."""
    return compress.Build(SOURCE, what, more)


def write(build, folder, architecture):
    """Put a board's build, minitor.mpy and its overlays, into `folder`."""
    for name, data in build.modules(architecture):
        (folder / name).write_bytes(data)


def mentioned(micropython, *texts):
    """Return the names of minitor, on that runtime, that the texts of tests mention.

    For a board with `.` before them: methods, too.
    """
    tree = compress.fold(ast.parse(SOURCE), micropython)[0]
    names = compress.module_names(tree)
    if micropython:
        # Threads and the command line are for hosts.
        names -= {"Tor", "main"}
        names |= {"." + name for c, s in compress.parts(tree) if c for name in compress.binds(s)}
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    words |= {word for text in texts for word in re.findall(r"\.\w+", text)}
    return tuple(sorted(names & words))


class Translate(compress.Rename):
    """Give the attributes in a script the names that they have in a board's build."""

    def visit(self, node):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", 0) in ("minitor", "m"):
            return node
        return compress.Rename.visit(self, node)


def translated(text, map):
    """Return a script for the module as it is for one for the build with that `map`."""
    return ast.unparse(Translate({}, map["attributes"]).visit(ast.parse(text))) + "\n"
