"""One replica, a spread of one: a wrong hash ring finds nothing.  And what time does to it."""

import re
import threading
import time
from base64 import b64decode

import pytest
from boardkit import CI_HEAP, Board
from httptarget import HELLO
from livekit import ADDRESS, curl, forget, get, retry, serve, wait_for

STATES = {(False, False), (False, True), (True, True)}  # previous and current value are there


def shared_random(net):
    """Return which shared random values the consensus has, and the number of its time period."""
    text = net.consensus()
    found = re.search(r"^valid-after (.*)$", text, re.M)
    when = time.mktime(time.strptime(found[1] + " UTC", "%Y-%m-%d %H:%M:%S %Z")) - time.timezone
    values = tuple(bool(re.search("^shared-rand-%s-value" % name, text, re.M))
                   for name in ("previous", "current"))
    run = 24 * net.interval
    return values, int((when - run // 2) // run)


class Soak:
    """Fetches again and again, with every memory of descriptors gone, in a thread.

    `results`: for each pair of client and service, a list of (seconds since the start, state of
    the shared random values, time period, worked).
    """

    def __init__(self, net, target, folder):
        self.net, self.target, self.folder = net, target, folder
        self.results = {"tor-tor": [], "tor-ours": [], "ours-tor": [], "ours-ours": []}
        # What lived at least in the memory of a board, in each time period.
        self.results["tor-board"], self.lives, self.samples = [], {}, 0
        self.states, self.periods = set(), set()
        self.stopped, self.error = threading.Event(), None
        self.started = time.monotonic()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        try:
            self.client = self.net.client()
            self.tor_service = self.net.onion_service({80: self.target.port}, wait=False)
            self.ours = serve(self.net, self.folder / "serve", self.target.port)
            self.board = Board(self.folder / "board", CI_HEAP, self.net, self.target.port)
            while not self.stopped.wait(4):
                self._round()
        except BaseException as e:
            self.error = e

    def _round(self):
        for name, service in (("tor", self.tor_service), ("ours", self.ours)):
            url = "http://%s/" % service.address
            done = self._fetch(service.address)
            self._note("tor-" + name, done.stdout == HELLO, done.stderr)
            try:
                out = self.folder / "out"
                out.unlink() if out.exists() else None
                body = get(self.net, self.folder / "client", url, out, seconds=40)
                self._note("ours-" + name, body == HELLO, "")
            except AssertionError as e:
                self._note("ours-" + name, False, str(e)[-300:])
        # It takes its time; the first state shall not be over meanwhile.
        address = re.search(ADDRESS, self.board.out)
        if address:
            done = self._fetch(address[1])
            self._note("tor-board", done.stdout == HELLO, done.stderr)
        _, period = shared_random(self.net)
        for live, _ in self.board.still()[self.samples:]:
            self.samples += 1
            self.lives[period] = min(live, self.lives.get(period, live))

    def _fetch(self, address):
        forget(self.client)
        return curl(self.client, "http://%s/" % address, user="s%d" % time.time_ns(), seconds=25)

    def _note(self, pair, worked, why):
        state, period = shared_random(self.net)
        self.states.add(state)
        self.periods.add(period)
        self.results[pair].append((time.monotonic() - self.started, state, period, worked, why))

    def tell(self):
        """Print what failed, and the board's log."""
        for pair, results in self.results.items():
            for when, state, period, worked, why in results:
                if not worked:
                    print("%s failed at %.0f s in state %s, period %d: %s" % (
                        pair, when, state, period, why))
        ago = time.monotonic() - self.started
        began = time.strftime("%H:%M:%S", time.gmtime(time.time() - ago))
        print("second 0 was at %s (UTC); the board's last samples of memory, and its log:" % began,
              self.board.still()[-3:], self.board.said(), sep="\n")

    def stop(self):
        self.stopped.set()
        self.thread.join(120)
        for process in ("client", "tor_service"):
            if hasattr(self, process):
                getattr(self, process).stop()
        for program in ("ours", "board"):
            if hasattr(self, program):
                getattr(self, program).kill()


@pytest.fixture(scope="session")
def soak(tornet_sparse, target, tmp_path_factory):
    soak = Soak(tornet_sparse, target, tmp_path_factory.mktemp("soak"))
    yield soak
    soak.stop()


# The first test starts the soak; the others run beside it.
@pytest.mark.early
def test_soak_starts(soak):
    wait_for(lambda: soak.error or hasattr(soak, "board"), 120, "the services' start")
    assert soak.error is None


def test_tor_client_finds_our_service(tornet_sparse, target, tmp_path):
    client = tornet_sparse.client()
    try:
        for i in range(3):
            with serve(tornet_sparse, tmp_path / str(i), target.port) as service:
                retry(lambda: _fetched(client, service.address), 30)
    finally:
        client.stop()


def _fetched(client, address):
    assert curl(client, "http://%s/" % address, seconds=20).stdout == HELLO


def test_our_client_finds_tors_services(tornet_sparse, target, tmp_path):
    for i in range(3):
        service = tornet_sparse.onion_service({80: target.port})
        try:
            assert get(tornet_sparse, tmp_path / "data", "http://%s/" % service.address,
                       tmp_path / "out") == HELLO
        finally:
            service.stop()


@pytest.mark.timeout(900)
def test_time_periods_and_shared_random_values(soak):
    """Reachable in all three states of the shared random values, and over period changes."""
    # A run of the protocol takes 24 votes; there is a value after the first whole one.
    limit = 24 * soak.net.interval * 3 + 60

    def seen():
        return soak.error or (soak.states >= STATES and len(soak.periods) >= 2) \
            or time.monotonic() - soak.started > limit

    wait_for(seen, limit + 60)
    assert soak.error is None
    time.sleep(20)
    assert soak.states >= STATES and len(soak.periods) >= 2, (soak.states, soak.periods)
    soak.tell()
    for pair, results in soak.results.items():
        for state in STATES:
            tried = [r for r in results if r[1] == state]
            late = pair == "tor-board" and state == (False, False) and not tried
            assert late or any(r[3] for r in tried), (pair, state)
        # A service may be away while it publishes anew, not longer, and not again and again.
        good = sum(r[3] for r in results)
        assert good >= 0.8 * len(results), "%s: %d of %d" % (pair, good, len(results))
        assert not _streak(results, 4), pair
    # The board's memory is the same in each time period, but for circuits of clients that linger.
    print("least live memory of the board by period in bytes:", soak.lives)
    lives = [soak.lives[period] for period in sorted(soak.lives)]
    assert max(lives) - lives[0] < 3 * 4096


def _streak(results, n):
    text = "".join("." if r[3] else "x" for r in results)
    return "x" * n in text


def test_consensus_decodes(tornet_sparse):
    """The values are 32 bytes, so that the states above are what they seem."""
    for value in re.findall(r"^shared-rand-\w+-value \d+ (\S+)", tornet_sparse.consensus(), re.M):
        assert len(b64decode(value)) == 32
