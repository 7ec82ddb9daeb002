"""board_boot.py boots the thermostat on 32-bit MicroPython, and C tor's client opens its page.

The browser is Debian's chromium; where there is none, its test is skipped.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from livekit import ADDRESS, Program, curl, curl_ok, retry

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
THERMOSTAT = ROOT / "examples" / "thermostat"
sys.path.insert(0, str(TESTS / "board"))

import runtimes  # noqa: E402


@pytest.fixture(scope="module")
def client(tornet):
    client = tornet.client()
    yield client
    client.stop()


@pytest.fixture(scope="module")
def board(tornet, tmp_path_factory):
    """A board after power-on, its files in a folder: a Program with the `.address` it printed."""
    flash = tmp_path_factory.mktemp("flash")
    try:
        line, environment = runtimes.command("32", "main.py", heap="1m")
    except runtimes.Missing as e:
        pytest.fail(str(e), pytrace=False)
    shutil.copy(ROOT / "board_boot.py", flash / "main.py")
    for name in ("thermostat.py", "page.html"):
        shutil.copy(THERMOSTAT / name, flash)
    settings = {"ssid": "home", "password": "secret", "app": "thermostat"}
    settings.update(network=str(tornet.network_file), data_dir="state")
    (flash / "settings.json").write_text(json.dumps(settings))
    (flash / "scene.json").write_text(json.dumps({"wifi": [2], "ntp": [None]}))
    environment["MICROPYPATH"] = "%s:%s" % (TESTS / "board/standins", environment["MICROPYPATH"])
    with Program(line, environment, flash, interpreter=()) as program:
        program.address = program.wait_out(ADDRESS, 240)[1]
        yield program
        assert program.running and "Starting anew" not in program.out, program.out[-3000:]


def use(client, address):
    """Read the page and the interface of a thermostat, and set it."""
    base = "http://%s" % address
    page = retry(lambda: curl_ok(client, base + "/", seconds=30), 60).decode()
    assert "<svg" in page and page.rstrip().endswith("</script>")
    set_to = curl_ok(client, base + "/api/setpoint", "--json", '{"setpoint": 23}')
    assert json.loads(set_to)["setpoint"] == 23
    state = json.loads(curl_ok(client, base + "/api"))
    assert state["heating"] and state["setpoint"] == 23
    assert len(json.loads(curl_ok(client, base + "/api/history"))["temperature"]) == 288
    assert "23.0" in curl_ok(client, base + "/setpoint", "-L", "-d", "setpoint=23").decode()
    assert curl(client, base + "/elsewhere").returncode == 22


def test_board(board, client):
    for text in ("WiFi: joined", "(asked pool.ntp.org: 2026)", "Bootstrapped 100% (done)"):
        assert text in board.out
    use(client, board.address)


def test_browser(board, client, tmp_path):
    """A real browser shows the page, and its script asks for news."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    base = "http://%s" % board.address
    retry(lambda: curl_ok(client, base + "/setpoint", "-L", "-d", "setpoint=21", seconds=30), 60)
    options = "headless no-sandbox disable-gpu disable-quic no-first-run hide-scrollbars"
    options += " disable-background-networking disable-component-update disable-sync dump-dom"
    command = [chromium] + ["--" + option for option in options.split()] + [
        "--proxy-server=socks5://127.0.0.1:%d" % client.socks_port,
        "--user-data-dir=%s" % (tmp_path / "profile"),
        "--window-size=1000,760",
        # It would ask port 443 at the same time, and a service ends the circuit of who asks for
        # a port that it has not (as tor does), the page with it.
        "--disable-features=HttpsUpgrades,HttpsFirstBalancedMode,HttpsFirstBalancedModeAutoEnable",
        # Of the page's clock, which waits for answers: its script asks once.
        "--virtual-time-budget=20000",
        "--screenshot=%s" % (tmp_path / "page.png"),
        base + "/",
    ]
    for _ in range(2):
        shutil.rmtree(str(tmp_path / "profile"), ignore_errors=True)
        browser = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, start_new_session=True)
        try:
            page, errors = [text.decode(errors="replace") for text in browser.communicate(None, 60)]
            break
        except subprocess.TimeoutExpired:
            os.killpg(browser.pid, signal.SIGKILL)
            page, errors = [text.decode(errors="replace") for text in browser.communicate()]
    assert "<h2>The last 24 hours</h2>" in page and "<svg" in page, errors[-2000:]
    assert "<span>updated " in page, page[-2000:]
    assert (tmp_path / "page.png").stat().st_size > 10000


def test_on_a_computer(tornet, client, tmp_path):
    """The same program under CPython."""
    network = tmp_path / "network"
    shutil.copy(tornet.network_file, network)
    environment = dict(os.environ, MINITOR_NETWORK=str(network))
    with Program([THERMOSTAT / "thermostat.py"], environment) as program:
        use(client, program.wait_out(ADDRESS, 90)[1])
        assert program.interrupt() == 0 and program.err == ""
