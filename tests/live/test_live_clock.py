"""A clock that is wrong, on a host and on a board, in the network of real relays.

Nobody has to say what time it is: relays' certificates and the consensus contradict the clock, and
authorities tell by how much.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from livekit import ADDRESS, Program

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS / "board"))

import runtimes  # noqa: E402

SCRIPT = TESTS / "live" / "wrong_clock.py"
AHEAD = "%d ClockError the clock of this machine is about %s ahead: set it, as by NTP told"
BEHIND = "%d ClockError the clock of this machine is at least %s behind: set it, as by NTP told"
# Hours, first without a directory in the cache, then with one: what comes of it.
CLOCKS = (
    # Within a day of its validity a consensus is used, as by tor.
    (31, AHEAD % (31, "31 hours")),
    # tor's certificates for links live two days, those behind them a month.
    (60, AHEAD % (60, "60 hours")),
    (9600, AHEAD % (9600, "400 days")),
    (-31, BEHIND % (-31, "31 hours")),
    # As after power-on.
    (-230000, BEHIND % (-230000, "9583 days")),
    (0, "0 started"),
    (20, "20 started"),
    (-20, "-20 started"),
    (60, AHEAD % (60, "60 hours")),
    (-31, BEHIND % (-31, "31 hours")),
    (0, "0 started"),
)


def command(runtime):
    if runtime == "CPython":
        return [sys.executable], {"PYTHONPATH": str(ROOT)}
    try:
        line, environment = runtimes.command("32", SCRIPT)
    except runtimes.Missing as e:
        pytest.fail(str(e), pytrace=False)
    return line[:-1], environment


@pytest.mark.parametrize("runtime", ["CPython", "MicroPython"])
def test_wrong_clock(tornet, tmp_path, runtime):
    """Too wrong for Tor it ends in an error that says by how much, and is right again at once."""
    line, environment = command(runtime)
    arguments = [SCRIPT, tornet.network_file, tmp_path / "state"] + [h for h, _ in CLOCKS]
    with Program(arguments, environment, interpreter=line) as program:
        assert program.wait(240) == 0, program.err[-3000:]
        assert program.out.splitlines() == [text for _, text in CLOCKS], program.err[-3000:]


def test_board_that_got_a_wrong_time(tornet, tmp_path):
    """It goes on only once NTP has told another one."""
    try:
        line, environment = runtimes.command("32", "main.py", heap="1m")
    except runtimes.Missing as e:
        pytest.fail(str(e), pytrace=False)
    environment["MICROPYPATH"] = "%s:%s" % (TESTS / "board/standins", environment["MICROPYPATH"])
    shutil.copy(ROOT / "board_boot.py", tmp_path / "main.py")
    (tmp_path / "application.py").write_text("async def handler(reader, writer):\n    pass\n")
    settings = {"ssid": "home", "password": "secret", "app": "application", "data_dir": "state"}
    settings["network"] = str(tornet.network_file)
    (tmp_path / "settings.json").write_text(json.dumps(settings))

    def scene(**scene):
        (tmp_path / "scene.json").write_text(json.dumps(scene))
        return Program(line, environment, tmp_path, interpreter=())

    with scene(ahead=60 * 3600) as board:
        assert board.wait(120) == 0
        assert re.search(r"\(clock_skew\): the clock .* is about 60 hours ahead", board.out)
        assert "ClockError: the clock" in board.out and "This board is at" not in board.out
        assert "Starting anew in 5 s\n" in board.out and board.out.endswith("(reset)\n")
    with scene(ntp=[None] * 6) as board:
        board.wait_out(ADDRESS, 240)
        assert board.out.count("(asked ") == 7
