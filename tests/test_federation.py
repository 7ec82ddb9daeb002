"""examples/federation.py: under random schedules, with a member that lies; over real links."""

import asyncio
import os
import random
import re
import signal
import socket
import sys
import time
from pathlib import Path

import minitor
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import federation  # noqa: E402
from federation import PLAIN, Agreement, Federation, Member, Round, entries  # noqa: E402
from livekit import Program, wait_for  # noqa: E402

# Times as many schedules.
MORE = int(os.environ.get("MINITOR_SCHEDULES", 1))


def delivered(bag, rnd):
    """Yield what is in `bag`, and comes into it, in an order that `rnd` chooses."""
    style, starved = rnd.choice(["random", "last first", "starve"]), rnd.randrange(4)
    while bag:
        k = rnd.randrange(len(bag)) if style != "last first" or rnd.random() < 0.1 else len(bag) - 1
        if style == "starve":
            # One is as slow as can be.
            for _ in range(20):
                if starved not in bag[k][:2]:
                    break
                k = rnd.randrange(len(bag))
        bag[k], bag[-1] = bag[-1], bag[k]
        yield bag.pop()


def test_what_is_broadcast_all_get_alike():
    for seed in range(2000 * MORE):
        rnd, bag, rounds = random.Random(seed), [], []

        def sayer(i):
            def say(kind, tag, value):
                if tag[1] < 0:
                    bag.extend((i, j, kind, tag, value) for j in range(3))

            return say

        rounds = [Round(4, i, sayer(i), int) for i in range(3)]
        tag = rnd.choice([0, 3]), -1, 0
        if not tag[0]:
            rounds[0].say("send", tag, "a")
        # Member 3 says something else to each, at times twice.
        for kind in ("send", "echo", "ready") * 2:
            for j in range(3):
                if rnd.random() < 0.7:
                    bag.append((3, j, kind, tag, rnd.choice("ab")))
        for sender, to, kind, tag, value in delivered(bag, rnd):
            rounds[to].hear(sender, kind, tag, value)
        got = [list(one.batches.values()) for one in rounds]
        possible = [["a"]] if not tag[0] else [[], ["a"], ["b"]]
        assert got[0] == got[1] == got[2] and got[0] in possible, seed


def test_all_decide_alike():
    for seed in range(1000 * MORE):
        rnd, bag, members = random.Random(seed), [], []

        def caster(i):
            return lambda place, value: bag.extend((i, j, place, value) for j in range(3))

        members = [Agreement(4, caster(i), lambda: rnd.getrandbits(1)) for i in range(3)]
        # Broadcasts are reliable: what member 3 says all hear, if one does, sooner or later.
        inputs = [rnd.getrandbits(1) for _ in members]
        worst = [int(sum(inputs) < 2)] * 2 + [PLAIN]
        for place in range(30):
            value = rnd.choice([worst[place % 3], worst[place % 3], rnd.randrange(3)])
            if rnd.random() < 0.9:
                bag += [(3, j, place, value) for j in range(3)]
        for one, value in zip(members, inputs):
            one.enter(value)
        for sender, to, place, value in delivered(bag, rnd):
            members[to].take(sender, place, value)
        decided = {one.decided for one in members}
        assert decided in ({0}, {1}) and decided <= set(inputs), seed


class Honest:
    """A member that follows the rules: `log` is what it agreed to."""

    def __init__(self, n, me, rnd, name=""):
        self.log, self.digests = [], []
        self.member = Member(n, me, self.result, rnd.getrandbits)
        self.lines = ["%d%s says %d" % (me, name, k) for k in range(rnd.randrange(1, 4))]
        for line in self.lines:
            self.member.propose(line)

    def result(self, number, batches, digest):
        assert batches is not None and number == len(self.digests)
        self.digests.append(digest)
        self.log += entries(batches)

    def handle(self, sender, messages):
        self.member.handle(sender, messages)

    def sendings(self):
        n, me = self.member.n, self.member.me
        for to, message in self.member.sendings():
            for j in range(n) if to is None else [to]:
                if j != me:
                    yield j, message


class Silent:
    """A faulty member that says nothing, or nothing any more after some messages."""

    def __init__(self, n, me, rnd):
        self.honest, self.left = Honest(n, me, rnd), rnd.choice([0, 0, 50, 200, 500])

    def handle(self, sender, messages):
        self.honest.handle(sender, messages)

    def sendings(self):
        for j, message in self.honest.sendings():
            self.left -= 1
            if self.left >= 0:
                yield j, message


class Equivocating:
    """A faulty member that is two, with different batches and coins, one for some of the others."""

    def __init__(self, n, me, rnd):
        self.both = [Honest(n, me, rnd, name) for name in ("a", "b")]
        self.rnd, self.mixed, self.left = rnd, rnd.random() < 0.5, 1500
        self.side = [rnd.randrange(2) for _ in range(n)]

    def handle(self, sender, messages):
        for one in self.both:
            one.handle(sender, messages)

    def sendings(self):
        for i, one in enumerate(self.both):
            for j, message in one.sendings():
                side = self.rnd.randrange(2) if self.mixed else self.side[j]
                if side == i and self.left:
                    self.left -= 1
                    yield j, message


class Forging:
    """A faulty member that changes what it should say, and invents more."""

    KINDS = "send", "echo", "ready", "done", "want", "result", "jump"

    def __init__(self, n, me, rnd):
        self.honest, self.n, self.rnd, self.left = Honest(n, me, rnd), n, rnd, 1000

    def handle(self, sender, messages):
        self.honest.handle(sender, messages)

    def invented(self, message):
        rnd = self.rnd
        kind, number = rnd.choice(self.KINDS), message[1] + rnd.randrange(-1, 3)
        tag = [rnd.randrange(self.n), rnd.randrange(-1, self.n), rnd.randrange(7)]
        batches = [rnd.choice([None, '["forged"]', "[", "7"]) for _ in range(self.n)]
        rest = {"done": [], "want": [], "result": [batches], "jump": ["ab" * 32]}
        forged = [kind, number] + rest.get(kind, [tag, rnd.choice([0, 1, 2, '["forged"]'])])
        if rnd.random() < 0.1:
            forged[rnd.randrange(len(forged))] = rnd.choice([None, -1, {}, [], 1 << 70, "x", 0.5])
        return forged

    def sendings(self):
        for j, message in self.honest.sendings():
            # Then silent: as no batch of its may ever count, it would want rounds for ever.
            self.left -= 1
            if self.left < 0:
                continue
            message = list(message)
            if len(message) == 4 and self.rnd.random() < 0.5:
                values = '["forged"]', '["lie"]'
                value = message[3]
                if type(value) is int:
                    message[3] = self.rnd.choice([v for v in range(3) if v != value])
                else:
                    message[3] = self.rnd.choice(values)
            yield j, message
            yield j, self.invented(message)


def everything(members, rnd):
    """Deliver all messages, in an order that `rnd` chooses."""
    bag, count = [], 0

    def collect(i):
        bag.extend((i, j, message) for j, message in members[i].sendings())

    for i in range(len(members)):
        collect(i)
    for sender, to, message in delivered(bag, rnd):
        members[to].handle(sender, [message])
        collect(to)
        count += 1
        assert count < 200000, "it does not end"


def schedule(n, faulty, seed):
    """Run it until all is agreed on; return the honest ones."""
    rnd = random.Random(seed)
    f = (n - 1) // 3
    liars = rnd.sample(range(n), f) if faulty else []
    members = [faulty(n, i, rnd) if i in liars else Honest(n, i, rnd) for i in range(n)]
    honest = [one for one in members if isinstance(one, Honest)]
    for _ in range(40):
        everything(members, rnd)
        if not any(one.member.pending for one in honest):
            break
        # What was said too early was not kept: it is asked for.
        for one in honest:
            one.member.tick()
    return honest


def agreed(honest, seed):
    least = min(len(one.digests) for one in honest)
    assert least and len({tuple(one.digests[:least]) for one in honest}) == 1, seed
    for one in honest:
        assert not one.member.pending, (seed, "an entry is left")
        assert len(one.member.rounds) <= federation.LEAD + federation.AHEAD + 1, seed
    whole = max(honest, key=lambda one: len(one.log)).log
    for one in honest:
        lines = [line for i, line in whole if i == one.member.me]
        assert lines == one.lines, (seed, "its entries, once, in order, and no others")


@pytest.mark.parametrize("faulty", [None, Silent, Equivocating, Forging])
def test_four_agree(faulty):
    for seed in range(30 * MORE):
        agreed(schedule(4, faulty, seed), seed)


@pytest.mark.parametrize("faulty", [Silent, Equivocating, Forging])
def test_seven_agree_with_two_that_lie(faulty):
    for seed in range(MORE):
        agreed(schedule(7, faulty, seed), seed)


@pytest.mark.parametrize("missed", range(1, 40, 5))
def test_who_comes_back_takes_part_while_the_others_go_on(missed):
    counted = [[] for _ in range(4)]

    def noting(i):
        return lambda number, batches, digest: counted[i].append((number, batches))

    rnd = random.Random(missed)
    members, way, now = [Member(4, i, noting(i), rnd.getrandbits) for i in range(4)], {}, [0]
    late = [[rnd.randrange(2, 9) for _ in range(4)] for _ in range(4)]

    def hop(away=()):
        # Each way between two members takes its time; all have always something to say.
        for i, one in enumerate(members):
            for to, message in one.sendings():
                for j in range(4) if to is None else [to]:
                    if j != i and not {i, j} & set(away):
                        due = now[0] + late[i][j]
                        way.setdefault((due, i, j), []).append(message)
            if not one.pending:
                one.propose("more")
        now[0] += 1
        for i in range(4):
            for j in range(4):
                members[j].handle(i, way.pop((now[0], i, j), []))

    while members[0].number < missed:
        hop([3])
    for i in range(3):
        members[i].ask(3)
        members[3].ask(i)
    # Nobody ticks: no clock is needed.
    while members[0].number < missed + 12:
        hop()
    assert members[0].number - members[3].number <= 1
    assert all(batches[3] is not None for _, batches in counted[0][-3:])


# Over links


class Gate:
    """A transport that can be cut off: `shut`, and what there was is closed."""

    def __init__(self, transport):
        self.transport, self.shut, self.streams = transport, False, set()

    address = property(lambda self: self.transport.address)

    async def dial(self, address, seconds=120):
        if self.shut:
            raise minitor.NetworkError("cut off")
        stream = await self.transport.dial(address, seconds)
        self.streams.add(stream)
        return stream

    async def listen(self, accept):
        async def admit(stream):
            if not self.shut:
                self.streams.add(stream)
                await accept(stream)

        await self.transport.listen(admit)

    async def close(self):
        await self.transport.close()

    def set(self, shut):
        self.shut = shut
        for stream in self.streams:
            stream.close()
        self.streams.clear()


class Four:
    """Four members on this machine: `logs`, `missed`, `gates`."""

    def __init__(self):
        self.seeds = [bytes([65 + i]) * 32 for i in range(4)]
        self.seeds.sort(key=lambda seed: minitor.load_identity(seed)[1])
        self.keys = [minitor.load_identity(seed)[1] for seed in self.seeds]
        self.members, self.all, self.gates = {}, [None] * 4, [None] * 4
        self.logs, self.missed = [[] for _ in range(4)], [0] * 4

    async def start(self, i):
        self.gates[i] = Gate(minitor.DirectTransport(self.members[self.keys[i]]))
        node = minitor.Node(self.seeds[i], self.gates[i])
        node.pauses = 0.05, 0.2

        def result(number, batches, digest):
            self.logs[i].append((number, digest, list(entries(batches or ()))))
            self.missed[i] += batches is None

        self.all[i] = await Federation(node, self.members, result).__aenter__()

    async def up(self):
        # Ports are known before anyone dials.
        for key in self.keys:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.members[key] = "127.0.0.1:%d" % free.getsockname()[1]
        for i in range(4):
            await self.start(i)
        return self

    async def down(self):
        for one in self.all:
            await one.__aexit__()

    def lines(self, i):
        return [line for _, _, said in self.logs[i] for _, line in said]

    async def have(self, line, whom=range(4), seconds=60):
        """Wait until the last entry of all of `whom` is `line`, and nobody has another log."""
        async def wait():
            while any(self.lines(i)[-1:] != [line] for i in whom):
                await asyncio.sleep(0.01)

        await asyncio.wait_for(wait(), seconds)
        digests = {}
        for log in self.logs:
            for number, digest, said in log:
                assert digests.setdefault(number, digest) == digest, "a fork"


def four(test):
    async def run():
        members = await Four().up()
        try:
            await test(members)
        finally:
            await members.down()

    asyncio.run(asyncio.wait_for(run(), 120))


def test_a_member_that_is_cut_off_comes_back():
    async def test(m):
        await m.all[0].propose("first")
        await m.have("first")
        for junk in (b"", b"\xff", b"[" * 100000, b"7", b'[7, null, [], ["done"], ["want", "x"]]'):
            await m.all[1].links[0].send(junk)
        m.gates[3].set(True)
        await m.all[3].propose("from afar")
        for k in range(10):
            await m.all[k % 3].propose("without it %d" % k)
            await m.have("without it %d" % k, range(3))
        assert m.lines(3) == ["first"]
        m.gates[3].set(False)
        await m.have("from afar")
        assert len(m.lines(0)) == 12 and len({tuple(m.lines(i)) for i in range(4)}) == 1
        # Everyone is cut off from everyone, again and again.
        for k in range(20):
            await m.all[k % 4].propose("bumpy %d" % k)
            await asyncio.sleep(0.05)
            m.gates[k * 7 % 4].set(False)
        for i in range(4):
            await m.all[i].propose("done")
        while any(m.lines(i).count("done") < 4 for i in range(4)):
            await asyncio.sleep(0.01)
        assert len({tuple(m.lines(i)) for i in range(4)}) == 1
        assert sorted(m.lines(0)[12:]) == sorted(["bumpy %d" % k for k in range(20)] + ["done"] * 4)

    four(test)


def test_what_a_link_did_not_keep_is_asked_for(monkeypatch):
    monkeypatch.setattr(Federation, "MOST", 20000)

    async def test(m):
        m.gates[3].set(True)
        for k in range(15):
            await m.all[k % 3].propose("entry %d" % k)
            await m.have("entry %d" % k, range(3))
        assert all(link.buffered < 60000 for i in range(3) for link in m.all[i].links.values())
        m.gates[3].set(False)
        await m.have("entry 14")
        assert m.lines(3) == m.lines(0) and not any(m.missed)

    four(test)


def test_who_starts_anew_gets_what_is_kept(monkeypatch):
    monkeypatch.setattr(federation, "KEEP", 5)

    async def test(m):
        await m.all[0].propose("early")
        await m.have("early")
        await m.all[3].__aexit__()
        for k in range(17):
            await m.all[k % 3].propose("entry %d" % k)
            await m.have("entry %d" % k, range(3))
        assert all(len(m.all[i].member.results) <= 10 for i in range(3))
        m.logs[3].clear()
        await m.start(3)
        await m.have("entry 16")
        assert m.missed[3] == 1 and m.lines(3) == m.lines(0)[-len(m.lines(3)):]
        await m.all[3].propose("here again")
        await m.have("here again")

    four(test)


# KeyboardInterrupt comes wherever the program is, as before Python 3.11.
OLD = """import runpy, signal, sys
signal.signal(signal.SIGINT, lambda *args: signal.default_int_handler(*args))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_program(tmp_path):
    program, lines, ports = [Path(federation.__file__), "--key"], [], []
    for i in range(4):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append("127.0.0.1:%d" % free.getsockname()[1])
        with Program(program + [tmp_path / str(i)]) as one:
            assert one.wait(30) == 0, one.err
            lines.append("%s %s\n" % (one.out.strip(), ports[i]))
    (tmp_path / "members").write_text("# ours\n" + "".join(lines))
    rest = ["--members", tmp_path / "members", "--every", 0.2, "--direct"]
    old = {"interpreter": (sys.executable, "-c", OLD)}
    four = [Program(program + [tmp_path / str(i)] + rest + [ports[i]], **old if i % 2 else {})
            for i in range(4)]
    try:
        wait_for(lambda: all(one.out.count("\n") > 8 for one in four), 60, "agreement")
        assert four[0].interrupt() == 0
        # While these wait for the one that left, they are interrupted again.
        for one in four[1:]:
            one.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        for one in four:
            assert one.interrupt() == 0 and re.match("this member is .{8}\n$", one.err), one.err
        assert len({tuple(one.out.splitlines()[:8]) for one in four}) == 1
    finally:
        for one in four:
            one.kill()
