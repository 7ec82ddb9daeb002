import os

import pytest
import runtimes

TESTS = runtimes.REPO / "tests"


@pytest.fixture(scope="session", params=sorted(runtimes.ARCHITECTURES, reverse=True))
def bits(request):
    """The word size of a MicroPython that is here; where it cannot be had, CI fails."""
    try:
        runtimes.micropython(request.param)
        runtimes.compiled(request.param)
    except runtimes.Missing as e:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(e))
    return request.param


@pytest.fixture
def micropython(bits):
    """Return a function that runs a script under MicroPython, and returns what it printed.

    The script gets the folder tests/ as its argument, and ends by printing "ok".
    """

    def run(script, *arguments, heap="2m", seconds=300):
        line, environment = runtimes.command(bits, script, TESTS, *arguments, heap=heap)
        return runtimes.run_script(line, environment, seconds)

    return run
