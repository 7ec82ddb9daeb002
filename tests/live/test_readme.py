"""The README's programs, as printed there, in the private network."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import minitor
import pytest
from livekit import ADDRESS, MINITOR, Program

README = (Path(__file__).resolve().parent.parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)


@pytest.fixture(scope="module")
def place(tornet, tmp_path_factory):
    """The network with a data folder of these tests' own, and a page to fetch."""
    network = tmp_path_factory.mktemp("readme") / "network"
    shutil.copy(tornet.network_file, network)
    environment = {"MINITOR_NETWORK": str(network), "PYTHONPATH": str(MINITOR.parent)}
    with Program([MINITOR, "--serve", "--key-dir", network.parent / "page"], environment) as page:
        page.wait_out(ADDRESS, 90)
        yield environment, page.out.strip()


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_programs(place, number):
    environment, address = place
    code = BLOCKS[number]
    with Program(["-c", code.replace("….onion", address)], environment) as program:
        if "create_onion_service" in code:
            program.wait_out(ADDRESS, 90)
            program.interrupt()
            assert program.err.endswith("KeyboardInterrupt\n")
        else:
            assert program.wait(90) == 0, program.err
            assert "It works" in program.out


def test_options_are_those_of_the_program():
    table = README.partition("## Command line")[2].partition("## In a program")[0]
    told = set(re.findall(r"--[a-z][a-z-]*", table)) | {"-o", "-v"}
    shown = subprocess.run([sys.executable, str(MINITOR), "--help"], stdout=subprocess.PIPE)
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shown.stdout.decode()))
    assert told - {"-vv"} <= known, told - known
    assert {option for option in known if option.startswith("--")} <= told


def test_errors_are_those_of_the_module():
    for name in re.findall(r"`(\w+Error|TorTimeout)`", README):
        assert issubclass(getattr(minitor, name), minitor.TorError)
