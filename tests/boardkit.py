"""The board's build under 32-bit MicroPython with little heap: what tests and benchmarks share."""

import re
import sys
import threading
from pathlib import Path

from httptarget import payload, sha256hex
from livekit import ADDRESS, MB, Program, curl_ok, retry

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "board")]

import builds  # noqa: E402
import runtimes  # noqa: E402

# What a board in the tests has of heap.
CI_HEAP = "112k"
# For one transfer: a busy machine takes its time.
SECONDS = 900
PHASE = r"phase (\w+) live (\d+) peak (\d+) seconds (\S+)"
STILL = r"still live (\d+) peak (\d+)"
REFUSED = re.compile("MemoryError|memory allocation failed")


def install(folder):
    """Write what a board's flash holds of minitor into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, data in builds.build("board").files(["x86"]):
        (folder / Path(path).name).write_bytes(data)


class Board(Program):
    """tests/live/board_meter.py, which hosts a service for a local port.

    folder: the board's files, among them its state; one that is there already is used again.
    """

    def __init__(self, folder, heap, net, port=80, period=2):
        install(folder)
        line = runtimes.micropython("32") + [
            "-X", "heapsize=%s" % heap, str(TESTS / "live" / "board_meter.py"),
            str(net.network_file), str(folder / "state"), str(port), str(period)]
        super().__init__(line, {"MICROPYPATH": "%s:.frozen" % folder}, interpreter=())

    def phase(self, name, seconds):
        """Wait for the end of a phase; return its peak and how many seconds it took."""
        found = self.wait_out(PHASE.replace(r"(\w+)", name, 1), seconds)
        return int(found[2]), float(found[3])

    def address(self, seconds=SECONDS):
        return self.wait_out(ADDRESS, seconds)[1]

    def still(self):
        """Return (live, peak) of each sample since the service is there."""
        return [tuple(map(int, pair)) for pair in re.findall(STILL, self.out)]

    def said(self, lines=40):
        """Return the end of its log, codes explained: what is no mere information, with times."""
        codes = builds.build("board").codes
        found = self.err.splitlines()[-lines:]
        return "\n".join(builds.compress.explain(line, codes) for line in found)

    def __exit__(self, kind, *_):
        if kind:
            print("the board said:", self.out[-6000:], self.said())
        super().__exit__()

    def refusals(self):
        """Return how often the output tells of an allocation that failed."""
        return len(REFUSED.findall(self.out + self.err))


def at_once(works):
    """Run functions at the same time; AssertionError with what the first that fails raised."""
    errors = []

    def run(work):
        try:
            work()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise AssertionError("%d of %d failed: %s" % (len(errors), len(works), errors[0]))


def requests(clients, address, count, size=2000):
    """Fetch `count` bodies, each client in its turn and all clients at once; check them."""

    def one(client, numbers):
        for i in numbers:
            url = "http://%s/bytes/%d?seed=%d" % (address, size, i)
            assert curl_ok(client, url) == payload(size, i)

    works = [lambda c=client, n=n: one(c, range(n, count, len(clients)))
             for n, client in enumerate(clients)]
    at_once(works)


def transfers(clients, address, folder, size=MB):
    """Download `size` bytes and upload as many with every client at once; check the sums."""

    def one(n, client):
        body = payload(size, 100 + n)
        url = "http://%s/bytes/%d?seed=%d" % (address, size, 100 + n)
        down = curl_ok(client, url, seconds=SECONDS)
        assert sha256hex(down) == sha256hex(body)
        path = Path(folder) / ("upload%d" % n)
        path.write_bytes(body)
        answer = curl_ok(client, "http://%s/sum" % address, "--data-binary", "@%s" % path,
                         "-H", "Expect:", seconds=SECONDS)
        assert answer.decode().strip() == sha256hex(body)

    at_once([lambda n=n, c=client: one(n, c) for n, client in enumerate(clients)])


def reach(client, address, seconds=90):
    """Return once a client of C tor reaches the service."""
    return retry(lambda: curl_ok(client, "http://%s/" % address, seconds=30), seconds)
