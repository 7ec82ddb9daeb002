"""What the tests share: the paths, and two private Tor networks that start when first needed."""

import sys
import threading
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# Before anything installed: the tests are for the file beside them.
sys.path[:0] = [str(ROOT), str(TESTS)]

from tornet import SPARSE, TorNet, TorNetError  # noqa: E402


class Lazy:
    """Something that takes long to make: `begin` starts making it in a thread, `get` waits."""

    def __init__(self, make):
        self.make, self.thread, self.value, self.error = make, None, None, None

    def begin(self):
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def _run(self):
        try:
            self.value = self.make()
        except BaseException as e:
            self.error = e

    def get(self):
        self.begin()
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.value

    def stop(self):
        if self.thread is not None:
            self.thread.join()
            if self.value is not None:
                self.value.stop()


def _sparse():
    # Descriptors lie at one directory, so a wrong hash ring finds nothing; and with votes every
    # ten seconds a time period lasts four minutes.  Shared random values come at the end of one, so
    # a network that was slow to start, or has just a minute until then, is too old to see the first.
    for left in (2, 1, 0):
        net = TorNet(interval=10, params=SPARSE)
        if not left or "shared-rand-" not in net.consensus() and time.time() % 240 < 170:
            return net
        net.stop()


NETWORKS = {"tornet": Lazy(TorNet), "tornet_sparse": Lazy(_sparse)}


def pytest_collection_modifyitems(items):
    # What is quick first, what kills relays late.  Time periods take minutes: they are watched
    # from the first live test (which is marked early) to the last.
    def order(item):
        part = Path(str(item.fspath)).relative_to(TESTS).parts[0]
        if "soak" in item.fixturenames:
            return 2 if item.get_closest_marker("early") else 5
        if "relays" in item.fixturenames:
            # A C tor that starts to host after relays died may not upload for minutes.
            return 3.5 if "tor_service" in item.fixturenames else 4
        return {"live": 3, "board": 1}.get(part, 0)

    items.sort(key=order)
    for item in items:
        if "relays" in item.fixturenames:
            # Which relays die is chance, and C tor may need minutes.  The summary names reruns.
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_collection_finish(session):
    # The network starts while the pure tests run.  Not the other one: what is watched there
    # begins with its first vote.
    if not session.config.option.collectonly:
        # Nor this one while that starts: its first minutes are watched.
        early = session.items and session.items[0].get_closest_marker("early")
        if not early and any("tornet" in item.fixturenames for item in session.items):
            NETWORKS["tornet"].begin()


def pytest_sessionfinish(session):
    for network in NETWORKS.values():
        network.stop()


def _network(name):
    try:
        return NETWORKS[name].get()
    except TorNetError as e:
        pytest.fail(str(e), pytrace=False)


@pytest.fixture(scope="session")
def tornet():
    """A private Tor network as on the public one: two replicas, a spread of four."""
    return _network("tornet")


@pytest.fixture(scope="session")
def tornet_sparse():
    """A private Tor network with one replica and a spread of one, voting every 10 s."""
    return _network("tornet_sparse")


@pytest.fixture(scope="session")
def target():
    """An HTTP server (tests/httptarget.py) on this machine: `port`, `served`."""
    from httptarget import Target

    server = Target()
    yield server
    server.stop()
