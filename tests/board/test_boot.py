"""board_boot.py under both MicroPythons, with stand-ins for what a board's firmware has.

standins/ has `network`, `machine`, `ntptime` and `time`, which play the scene that a test writes
(scene.json) faster than it happens; `minitor` is a stand-in here, and the real one in tests/live.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import runtimes

STANDINS = Path(__file__).parent / "standins"
SETTINGS = {"ssid": "home", "password": "secret", "app": "application"}
# At the speed of the scenes a busy machine delays the feeding, too.
SLOW = dict(SETTINGS, watchdog_seconds=900)
ADDRESS = "a" * 56 + ".onion"
MINITOR = """
class Service:
    address = "%s"


class AsyncTor:
    def __init__(self, *arguments):
        print("(tor %%s %%s, budget %%d)" %% (arguments[:2] + arguments[3:]))
        self.progress = arguments[2]

    async def __aenter__(self):
        self.progress(100, "done", "Done")
        return self

    async def __aexit__(self, *_):
        print("(tor closed)")

    async def create_onion_service(self, port, target):
        print("(service: %%d)" %% port)
        return Service
""" % ADDRESS
HANDLER = "async def handler(reader, writer):\n    pass\n"
FAILS = """
import asyncio

async def main(tor):
    # In 30 steps: so a busy machine lets the others run meanwhile.
    for _ in range(30):
        await asyncio.sleep(%d / 30)
    raise ValueError("what the application raised")
"""
CONTRADICTS = """

class ClockError(Exception):
    pass


async def judge(tor):
    tor.progress(30, "clock_skew", "60 hours ahead")
    if %s:
        raise ClockError("60 hours ahead")


AsyncTor.judge = judge
"""
ALWAYS = """
import asyncio

async def always():
    await asyncio.sleep(%d)
"""


class Board:
    """The file system of a board, and what it prints from power-on or reset to the next."""

    def __init__(self, bits, folder):
        self.line, self.folder = runtimes.micropython(bits) + ["main.py"], folder
        shutil.copy(runtimes.REPO / "board_boot.py", folder / "main.py")
        self.write(MINITOR, "minitor.py")
        self.write(FAILS % 1)
        self.settings(**SLOW)
        self.scene()

    def write(self, text, name="application.py"):
        (self.folder / name).write_text(text)

    def settings(self, **settings):
        self.write(json.dumps(settings), "settings.json")

    def scene(self, speed=200, **scene):
        self.write(json.dumps(dict(scene, speed=speed)), "scene.json")

    def boot(self, seconds=20):
        environment = dict(os.environ, MICROPYPATH="%s:.frozen" % STANDINS)
        done = subprocess.run(
            self.line,
            cwd=str(self.folder),
            env=environment,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture
def board(bits, tmp_path):
    return Board(bits, tmp_path)


def test_length():
    assert len((runtimes.REPO / "board_boot.py").read_text().splitlines()) < 150


def test_starts(board):
    board.write(HANDLER + FAILS % 30)
    out = board.boot()
    assert "WiFi: joined as 192.0.2.7\n" in out
    expected = [
        "(watchdog of 900000 ms)",
        "(connect to home with secret)",
        "(asked pool.ntp.org: 2026)",
        "(tor minitor None, budget 0)",
        "Bootstrapped 100% (done): Done",
        "(service: 80)",
        "This board is at %s, port 80" % ADDRESS,
        "(watchdog fed)",
        "(tor closed)",
        "ValueError: what the application raised",
        "Starting anew in 5 s",
        "(reset)",
    ]
    assert [line for line in out.splitlines() if line in expected] == expected


def test_all_settings(board):
    more = {"port": 8080, "watchdog_seconds": 0, "ntp_host": "192.0.2.1", "data_dir": "state"}
    board.settings(network="torrc", heap_budget=90000, **SETTINGS, **more)
    board.write(HANDLER + FAILS % 1)
    out = board.boot()
    assert "watchdog" not in out and "(asked 192.0.2.1: 2026)" in out
    assert "(tor state torrc, budget 90000)" in out and "(service: 8080)" in out


@pytest.mark.parametrize(
    "text,error",
    [
        (None, "settings.json is missing"),
        ("{ssid: home}", 'settings.json is not of the form {"name": value, "name": value}'),
        ("[]", 'settings.json is not of the form {"name": value, "name": value}'),
        ('{"ssid": "home", "app": "application"}', 'settings.json: "password" is missing'),
        (dict(SETTINGS, ssid=7), 'settings.json: "ssid" has to be a text'),
        (dict(SETTINGS, ssid=None), 'settings.json: "ssid" has to be a text'),
        (dict(SETTINGS, port="80"), 'settings.json: "port" has to be a number'),
        (dict(SETTINGS, port=True), 'settings.json: "port" has to be a number'),
        (dict(SETTINGS, watchdog=1), 'settings.json: "watchdog" is not known'),
        (dict(SETTINGS, app="elsewhere"), "no module named 'elsewhere'"),
    ],
)
def test_wrong_settings(board, text, error):
    """One line on the console, and no start anew, which would not help."""
    if text is None:
        (board.folder / "settings.json").unlink()
    else:
        board.write(text if isinstance(text, str) else json.dumps(text), "settings.json")
    assert board.boot() == "Not started: %s\n" % error


def test_wifi_that_comes_late(board):
    board.scene(wifi=[100])
    out = board.boot()
    assert out.count("WiFi: not joined yet\n") == out.count("(connect to ") - 1 > 0
    assert out.rindex("(connect to ") < out.index("(asked ")


def test_wifi_with_a_wrong_password(board):
    board.scene(wifi=[100], wrong_password=True)
    assert "WiFi: not joined yet: wrong password?\n" in board.boot()


def test_wifi_that_goes_away(board):
    board.scene(speed=100, wifi=[0, 30, 30, 30, 60])
    board.write(HANDLER + FAILS % 180)
    out = board.boot()
    assert out.count("WiFi: joined") == 3 and out.count("WiFi: lost") == 2
    # Tor deals with it by itself.
    assert out.count("(service") == 1 and out.count("Starting anew") == 1


def test_time_that_comes_late(board):
    board.scene(year=2000, ntp=[None] * 7 + [1999])
    out = board.boot()
    assert out.count("Clock: no time from pool.ntp.org yet: ") == 8
    assert "yet: this is the year 1999\n" in out
    assert out.rindex("(asked pool.ntp.org: 2026)") < out.index("(tor ")


def test_time_that_a_reset_left(board):
    board.scene(ntp=[None] * 9)
    out = board.boot()
    assert out.count("(asked ") == 5 and "(tor " in out


@pytest.mark.parametrize("when", ["start", "later"])
def test_time_that_the_network_contradicts(board, when):
    """No try goes on with it: NTP is asked until it answers, and after a pause all begins anew."""
    text = MINITOR.replace('self.progress(100, "done", "Done")', "await self.judge()")
    board.write(text + CONTRADICTS % (when == "start"), "minitor.py")
    board.write(HANDLER)
    # What a reset left would do otherwise.
    board.scene(ntp=[None] * 5)
    out = board.boot()
    assert out.count("(asked ") == 5 and "Bootstrapped 30% (clock_skew): 60 hours ahead\n" in out
    assert out.count("ClockError: 60 hours ahead") == (when == "start")
    assert out.endswith("Starting anew in 5 s\n(reset)\n") and "(clock set to 2000)\n" in out
    board.scene(ntp=[None] * 7)
    out = board.boot()
    assert out.count("(asked ") == 8 and out.index("(asked pool.ntp.org: 2026)") < out.index("(tor ")
    assert "Starting anew in 10 s\n" in out


def test_pauses_grow(board):
    board.settings(watchdog_seconds=0, **SETTINGS)
    board.scene(speed=2000)
    pauses = [int(board.boot().split("Starting anew in ")[1].split(" s\n")[0]) for _ in range(9)]
    assert pauses == [5, 10, 20, 40, 80, 160, 320, 600, 600]
    # What ran for long has no failure in starting.
    board.write(FAILS % 700)
    assert "Starting anew in 5 s\n" in board.boot()
    assert "Starting anew in 10 s\n" in (board.write(FAILS % 1), board.boot())[1]


@pytest.mark.parametrize("text", ["1 / 0", "raise MemoryError", "raise OSError(12)"])
def test_application_that_raises_when_imported(board, text):
    board.write(text)
    out = board.boot()
    assert "Traceback" in out and out.endswith("Starting anew in 5 s\n(reset)\n")


def test_application_that_ends(board):
    board.write("async def main(tor):\n    pass\n")
    out = board.boot()
    assert "(tor closed)\nThe application ended\nStarting anew in 5 s\n" in out


def test_application_without_functions(board):
    board.write("")
    assert "'main'" in board.boot()


def test_always_runs_without_a_network(board):
    board.scene(wifi=[900])
    board.write(HANDLER + ALWAYS % 100)
    out = board.boot()
    assert "The application ended\n" in out and "(tor " not in out


def test_watchdog_is_fed_while_waiting(board):
    """The default one of 120 s, over a pause of 160 s."""
    (board.folder / "rtc").write_bytes(b"\x05")
    board.settings(**SETTINGS)
    board.scene(speed=40)
    out = board.boot()
    assert out.startswith("(watchdog of 120000 ms)\n")
    assert "Starting anew in 160 s\n" in out and out.endswith("(watchdog fed)\n(reset)\n")
