"""Section 18, journals of links: restarts by chance, full and torn ones, what was given up."""

import asyncio
import os
import random

import minitor
import pytest
from peernet import Network
from test_peers import Hostile, crash, hear, node, pair, quick, run, small, talk  # noqa: F401

PEER = bytes(31) + b"k"
COUNT = 12


class Talker:
    """A node that tells the other one COUNT numbers, and starts anew when it is told to."""

    def __init__(self, net, name, other, chance, journal):
        self.net, self.name, self.other, self.chance, self.journal = net, name, other, chance, journal
        self.key = minitor.load_identity(other.encode().ljust(32, b"."))[1]
        self.sent, self.heard, self.lost, self.tasks = 0, [], [], []

    async def start(self):
        self.node = node(self.net, self.name, journal=self.journal)
        self.node.fsync = False
        await self.node.start()
        self.link = self.node.link(self.key, self.other)
        self.tasks = [asyncio.ensure_future(work()) for work in (self.tell, self.listen)]

    async def restart(self):
        self.stop()
        await self.start()

    def stop(self):
        crash(self.node)
        for task in self.tasks:
            task.cancel()

    def told(self, error):
        self.lost += [int(message.split(b" ")[0]) for message in error.lost]

    async def tell(self):
        while self.sent < COUNT:
            size = 170 if self.sent % 4 == 3 else 20
            try:
                await self.link.send(b"%d " % self.sent + b"x" * size)
                self.sent += 1
            except minitor.LinkError as e:
                self.told(e)
        while True:
            try:
                await self.link.flush()
            except minitor.LinkError as e:
                self.told(e)
            await asyncio.sleep(0.005)

    async def listen(self):
        async for message in self.link:
            self.heard.append(int(message.split(b" ")[0]))
            if self.chance.random() < 0.3:
                await asyncio.sleep(0.002)


async def schedule(seed, folder, journals, restarts):
    """Cut and restart by chance; return the two."""
    net, chance = Network(seed), random.Random(seed)
    both = [Talker(net, name, other, chance, str(folder / name) if name in journals else None)
            for name, other in (("anna", "berta"), ("berta", "anna"))]
    for one in both:
        await one.start()
    for _ in range(4):
        await asyncio.sleep(chance.random() * 0.04)
        if chance.random() < 0.5:
            net.cut()
        for one in both:
            if one.name in restarts and chance.random() < 0.7:
                await one.restart()
    a, b = both
    # Who is started anew without a journal has forgotten what was not sent.
    sure = [pair for pair in ((a, b), (b, a))
            if pair[0].name in journals or pair[0].name not in restarts]
    for _ in range(4000):
        if all(set(taker.heard + sender.lost) == set(range(COUNT)) for sender, taker in sure):
            break
        await asyncio.sleep(0.005)
    for one in both:
        one.stop()
    return both, sure


@pytest.mark.parametrize("journals, restarts", [
    ("anna", "anna"), ("anna berta", "anna berta"), ("anna", "berta"), ("", "berta"),
    ("anna", "anna berta"), ("berta", "berta")])
def test_each_message_arrives_once_or_the_sender_is_told(
        quick, small, tmp_path, journals, restarts):  # noqa: F811
    async def test():
        seeds = range(int(os.environ.get("MINITOR_SCHEDULES", "1")) * 20)
        for first in seeds[::20]:
            for both, sure in await asyncio.gather(*[
                    schedule(seed, tmp_path / str(seed), journals, restarts)
                    for seed in range(first, first + 20)]):
                for one in both:
                    assert one.heard == sorted(set(one.heard))
                    # Nothing is given up where whoever forgets has a journal.
                    assert not one.lost or set(restarts.split()) - set(journals.split())
                for sender, taker in sure:
                    assert set(taker.heard + sender.lost) == set(range(COUNT))

    run(test(), 300)


def test_what_was_given_up_is_told_after_a_restart_and_told_once(quick, tmp_path):  # noqa: F811
    async def test():
        net = Network()
        a = await node(net, "anna", journal=str(tmp_path)).start()
        b = await node(net, "berta").start()
        link = a.link(b.key, "berta")
        for message in b"x" * 70000, b"small":
            await link.send(message)
        back = await b.__anext__()
        while len(back._inbox) < 2:
            await asyncio.sleep(0.001)
        crash(b)
        b = await node(net, "berta").start()
        while not link._lost:
            await asyncio.sleep(0.001)
        journal = link._journal
        journal._size = 2 << 20
        link._tidy()
        assert journal._size < 1 << 18
        crash(a)
        for told in True, False:
            a = await node(net, "anna", journal=str(tmp_path)).start()
            link = a.link(b.key, "berta")
            if told:
                with pytest.raises(minitor.LinkError) as e:
                    await link.send(b"not sent")
                assert e.value.lost == [b"x" * 70000, b"small"]
                # Who calls again has heard of it.
                await link.flush(5)
                crash(a)
        await link.send(b"new")
        assert await (await b.__anext__()).receive(5) == b"new"
        await a.close()
        await b.close()

    run(test())


def test_a_message_that_was_torn_is_not_joined_to_the_next(quick, tmp_path):  # noqa: F811
    async def test():
        net = Network()
        a = await node(net, "anna", journal=str(tmp_path)).start()
        b = await node(net, "berta").start()
        link = a.link(b.key, "nobody")
        await link.send(b"first")
        await link.send(b"A" * 200000)
        size, path = link._journal._size, link._journal._path
        crash(a)
        os.truncate(path, size - 70000)
        a = await node(net, "anna", journal=str(tmp_path)).start()
        link = a.link(b.key, "berta")
        await link.send(b"next")
        back = await b.__anext__()
        assert [await back.receive(5), await back.receive(5)] == [b"first", b"next"]
        await a.close()
        await b.close()

    run(test())


def test_who_only_listens_has_a_small_journal(quick, tmp_path):  # noqa: F811
    async def test():
        net = Network()
        a, b = await node(net, "anna").start(), await node(net, "berta", journal=str(tmp_path)).start()
        b.fsync = False
        link, heard = a.link(b.key, "berta"), []
        back = b.link(a.key, "anna")
        back._journal._least = 1 << 16
        await asyncio.gather(talk(link, 6000), hear(back, 6000, heard))
        assert back._journal._size < (1 << 20) - (1 << 16) and heard == list(range(6000))
        await a.close()
        crash(b)

    run(test())


def test_a_journal_that_cannot_be_written_anew_goes_on(quick, tmp_path, monkeypatch):  # noqa: F811
    async def test():
        net = Network()
        a, b, link, back = await pair(net, journal=str(tmp_path / "j"))
        a.fsync = b.fsync = False
        journal, fsync = link._journal, os.fsync

        def full(fd):
            raise OSError(28, "No space left on device")

        journal._least = 1000
        monkeypatch.setattr(minitor.os, "fsync", full)
        journal._size = 2 << 20
        link._tidy()
        journal._size = os.fstat(journal._fd).st_size
        monkeypatch.setattr(minitor.os, "fsync", fsync)
        assert not [f for f in os.listdir(tmp_path / "j") if f.endswith(".new")]
        assert os.fstat(journal._fd).st_ino == os.stat(journal._path).st_ino
        await link.send(b"kept")
        assert await back.receive(5) == b"kept" and net.dials == 1
        await a.close()
        await b.close()

    run(test())


def test_a_journal_that_cannot_be_made_is_not_locked(tmp_path, monkeypatch):
    def full(fd, data):
        raise OSError(28, "No space left on device")

    async def test():
        async with node(Network(), "anna", journal=str(tmp_path)) as a:
            with monkeypatch.context() as patch:
                patch.setattr(minitor.os, "write", full)
                with pytest.raises(minitor.ConfigError, match="No space left"):
                    a.link(PEER, "nobody")
            await a.link(PEER, "nobody").close()

    run(test())


def test_a_journal_with_nothing_in_it_goes(quick, tmp_path):  # noqa: F811
    async def test():
        net = Network()
        b = await node(net, "berta", journal=str(tmp_path)).start()
        b.most = 5
        for i in range(20):
            peer = await Hostile.dial(net, "berta", b.key, "hostile%d" % i)
            peer.pipe.stream.close()
            await asyncio.sleep(0)
        assert len(os.listdir(tmp_path)) <= 5
        await b.close(0)
        assert not os.listdir(tmp_path)

    run(test())


def test_what_was_not_synced_is_not_taken_for_synced(quick, tmp_path, monkeypatch):  # noqa: F811
    async def test():
        a = await node(Network(), "anna", journal=str(tmp_path)).start()
        link = a.link(PEER, "nobody")
        await link.send(b"one")
        synced, fsync = [], os.fsync
        monkeypatch.setattr(minitor.os, "fsync", lambda fd: synced.append(fsync(fd)))
        # The connection, and with it the task, ends meanwhile.
        task = asyncio.ensure_future(link._journal.sync())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await link._journal.sync()
        while len(synced) < 2:
            await asyncio.sleep(0.001)
        await link._journal.sync()
        assert len(synced) == 2
        crash(a)

    run(test())
