"""The board's build with little heap, under 32-bit MicroPython, in networks of real relays.

In CI, with 112 KB, four clients are served, and relays are lost.  The rest by command:
    MINITOR_HEAP=112k python -m pytest tests/live/test_live_memory.py
    MINITOR_HEAP=112k MINITOR_PERIODS=6 python -m pytest tests/live/test_live_memory.py -k periods
In CI a board sees a time period change in test_live_sparse.py.
"""

import os
import time

import pytest
from bigdir import BigNet
from boardkit import CI_HEAP, Board, reach, requests, transfers
from livekit import MB, curl, forget, introduction_points, wait_for
from test_live_failures import _connections, reachable, relays  # noqa: F401
from test_live_sparse import shared_random
from tornet import TorNetError

HEAP = os.environ.get("MINITOR_HEAP", CI_HEAP)
RELAYS = int(os.environ.get("MINITOR_RELAYS", "7200"))
# What the peaks of two runs may differ by: lists that grow by halves, samples between two steps.
SAME = 4096
PERIODS = int(os.environ.get("MINITOR_PERIODS", "1"))

by_command = pytest.mark.skipif("MINITOR_HEAP" not in os.environ,
                                reason="runs where MINITOR_HEAP gives a heap")


@pytest.fixture
def clients(tornet):
    clients = [tornet.client() for _ in range(4)]
    yield clients
    for client in clients:
        client.stop()


def board_lives(board):
    assert board.running, board.out[-2000:] + board.err[-2000:]


def bootstrap(total, folder, target):
    """Return the peak of a board's bootstrap, from an empty file system, of `total` relays."""
    try:
        with BigNet(total) as net:
            assert total < 7000 or net.sizes["consensus"] > 2.4e6 and net.sizes["microdescs"] > 8e6
            with Board(folder, HEAP, net, target.port) as board:
                peak, seconds = board.phase("bootstrap", 120 + total // 10)
                print("%d relays: %d bytes at most, %.1f s" % (total, peak, seconds))
                # Circuits of those that it knows now work, and so does the service.
                assert reach(net.client(), board.address()) and board.running
                return peak
    except TorNetError as e:
        pytest.fail(str(e), pytrace=False)


@by_command
@pytest.mark.timeout(1800)
def test_peak_does_not_depend_on_the_number_of_relays(target, tmp_path):
    """A directory of the public network's size; and a small one needs no less memory."""
    peaks = [bootstrap(total, tmp_path / str(total), target) for total in (RELAYS // 7, RELAYS)]
    print("peaks of bootstrap in bytes, %d and %d relays: %s" % (RELAYS // 7, RELAYS, peaks))
    assert abs(peaks[1] - peaks[0]) < SAME


@pytest.mark.timeout(2400)
def test_serves_four_clients(tornet, target, clients, tmp_path):
    """100 requests, and 1 MB each way, by four clients at once; memory stays as it was."""
    # In CI an eighth of it, and two rounds.
    small = "MINITOR_HEAP" not in os.environ
    plan = ((100, MB // 8), (20, MB // 10)) if small else (
        (100, MB), (20, MB // 10), (20, MB // 10))
    with Board(tmp_path / "board", HEAP, tornet, target.port) as board:
        address = board.address()
        for client in clients:
            reach(client, address)
        rounds = []
        for count, size in plan:
            requests(clients, address, count)
            transfers(clients, address, tmp_path, size)
            board_lives(board)
            rounds.append(settled(board))
        print("live memory after each round in bytes:", rounds)
        # The first makes what stays: circuits, and room in lists.
        assert rounds[-1] - rounds[0] < SAME


def settled(board):
    """Return the least live memory of the samples of 10 s, with nothing under way."""
    seen = len(board.still())
    wait_for(lambda: len(board.still()) >= seen + 5, 60, "samples of memory")
    return min(live for live, _ in board.still()[seen:])


def _board_with_a_guard(net, target, folder):
    # One that is no authority, which would have to stay.
    for n in range(8):
        board = Board(folder / str(n), HEAP, net, target.port)
        board.address()
        if _connections(board.pid, net):
            return board
        board.kill()
    pytest.fail("eight boards have authorities as guards")


@by_command
@pytest.mark.timeout(900)
def test_loses_introduction_points_and_guard(tornet, target, relays, tmp_path):
    """The service comes back by itself, and takes no more memory for it."""
    client = tornet.client()
    try:
        with _board_with_a_guard(tornet, target, tmp_path) as board:
            address = board.address()
            reach(client, address)
            before = settled(board)
            points = introduction_points(tornet, client, address, 2)
            guards = _connections(board.pid, tornet)
            assert points and guards
            print("lost:", [r.nickname for r in points], "guard:", [r.nickname for r in guards])
            relays(*[relay for relay in points if relay not in guards][:2])
            reachable(client, address, 240)
            print("back without its introduction points:", board.still()[-1])
            relays(*_connections(board.pid, tornet))
            reachable(client, address, 240)
            board_lives(board)
            after = settled(board)
            print("live memory before and after in bytes:", before, after)
            assert after - before < 2 * SAME
    finally:
        client.stop()


@by_command
@pytest.mark.timeout(600 + 300 * PERIODS)
def test_time_periods(tornet_sparse, target, tmp_path):
    """It keeps serving while time periods pass (MINITOR_PERIODS of them), memory flat."""
    client = tornet_sparse.client()
    try:
        with Board(tmp_path / "board", HEAP, tornet_sparse, target.port) as board:
            address = board.address()
            reach(client, address)
            first, lives, results = shared_random(tornet_sparse)[1], {}, []
            end = time.monotonic() + 24 * tornet_sparse.interval * (PERIODS + 2) + 160
            period, changed = 0, time.monotonic()
            # Of the last period, too, there has to be time after it published.
            while len(lives) <= PERIODS or time.monotonic() < changed + 100:
                assert time.monotonic() < end, lives
                forget(client)
                done = curl(client, "http://%s/" % address, user=str(time.time_ns()), seconds=25)
                results.append(done.returncode == 0)
                number = shared_random(tornet_sparse)[1] - first
                if number != period:
                    period, changed = number, time.monotonic()
                if period not in lives and time.monotonic() > changed + 60:
                    # Without circuits of clients, which go when they are forgotten.
                    forget(client)
                    time.sleep(20)
                    lives[period] = settled(board)
                time.sleep(4)
            board_lives(board)
            print("least live memory by period in bytes:", lives)
            print("fetches:", "".join(".x"[not good] for good in results))
            # Away while it publishes anew, not longer.
            assert sum(results) >= 0.8 * len(results)
            assert "xxxx" not in "".join(".x"[not good] for good in results)
            # A client's circuit, 4.7 KB, may linger in one period or another; what leaks stays.
            values, half = [lives[n] for n in sorted(lives)], (len(lives) + 1) // 2
            assert min(values[half:]) - min(values[:half]) < SAME
    finally:
        client.stop()
