"""Section 18, links: over a network in memory whose connections are cut, late, lost or hostile."""

import asyncio
import errno
import threading

import minitor
import pytest
from peernet import Network


def run(coroutine, seconds=60):
    """Run a test; what it leaves behind ends with it."""
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


def node(net, name, **options):
    """A Node with a key made of its name."""
    peer = minitor.Node(name.encode().ljust(32, b"."), net.transport(name), **options)
    peer.pauses = 0.001, 0.01
    return peer


async def pair(net, **options):
    """Two nodes, and the link between them as each sees it."""
    a, b = [await node(net, name, **options).start() for name in ("anna", "berta")]
    link = a.link(b.key, "berta")
    return a, b, link, await b.__anext__()


@pytest.mark.parametrize("transport", [
    lambda net, name: net.transport(name), lambda net, name: minitor.DirectTransport()],
    ids=["memory", "direct"])
def test_messages_both_ways(transport):
    async def test():
        net = Network()
        async with minitor.Node(b"a" * 32, transport(net, "a")) as a:
            async with minitor.Node(b"b" * 32, transport(net, "b")) as b:
                link = a.link(b.key, b.address)
                sizes = 0, 1, 65535, 65536, 65537, 1000000, 8 << 20
                for size in sizes:
                    await link.send(b"x" * size)
                async for back in b:
                    break
                await link.ready(5)
                assert back.peer == a.key and link.peer == b.key and link.up
                for size in sizes:
                    message = await back.receive(10)
                    assert message == b"x" * size
                    await back.send(b"got %d" % size)
                for size in sizes:
                    assert await link.receive(10) == b"got %d" % size
                await link.flush(10)
                await link.close()
                with pytest.raises(minitor.LinkError):
                    await back.receive(10)
                assert [message async for message in back] == []
                assert not a.links and not b.links

    run(test())


async def talk(link, count, sizes=(10,)):
    for i in range(count):
        await link.send(b"%d " % i + b"x" * sizes[i % len(sizes)])


async def hear(link, count, heard):
    while len(heard) < count:
        heard.append(int((await link.receive(30)).split(b" ")[0]))


@pytest.fixture
def small(monkeypatch):
    """Units, and what goes at once, of 50 bytes."""
    monkeypatch.setattr(minitor, "UNIT", 50)


@pytest.fixture
def quick(monkeypatch):
    """Signatures and keys that cost nothing: what is tested is what comes after them."""
    p = (1 << 127) - 1

    def agree(k, u=b"\3" + bytes(31)):
        return pow(int.from_bytes(u[:16], "little"), k[0] + 2, p).to_bytes(32, "little")

    monkeypatch.setattr(minitor, "x25519", agree)
    sign = lambda esk, public, message: minitor.sha512(b"signed" + public + message)
    monkeypatch.setattr(minitor, "ed25519_sign", sign)
    monkeypatch.setattr(
        minitor, "ed25519_verify", lambda public, *rest: sign(0, public, rest[0]) == rest[1])
    known = {}
    public = minitor.ed25519_public
    monkeypatch.setattr(minitor, "ed25519_public", lambda esk: known.get(esk) or known.setdefault(
        esk, public(esk)))


@pytest.mark.parametrize("private", [True, False], ids=["open", "sealed"])
def test_cuts_at_every_byte_lose_and_repeat_nothing(quick, small, private):
    async def cut_after(offset):
        # Both dial; cut after `offset` bytes, and again and again.
        net = Network(private=private)
        net.left = offset
        a, b = [await node(net, name).start() for name in ("anna", "berta")]
        link, back = a.link(b.key, "berta"), b.link(a.key, "anna")
        heard, echoed = [], []

        def cut_again():
            net.left = 97 + offset if net.cuts < 2 else None

        net.on_cut = cut_again
        await asyncio.gather(
            talk(link, 5, (1, 120)), talk(back, 5, (30, 2)), hear(back, 5, heard),
            hear(link, 5, echoed))
        net.left = None
        await link.flush(10)
        await back.flush(10)
        await a.close()
        await b.close()
        assert heard == echoed == list(range(5)), offset
        return net

    async def every():
        # Handshakes, two at once, take some 900 bytes.
        assert 1200 < (await cut_after(None)).moved
        step = 7 if private else 1
        for first in range(0, 1200, 100 * step):
            nets = await asyncio.gather(*map(cut_after, range(first, first + 100 * step, step)))
            assert all([net.cuts for net in nets])

    run(every())


def crash(peer):
    """End a node as the end of its process would."""
    peer.closed = True
    peer.transport.net.accepts.pop(peer.transport.address)
    for link in peer.links.values():
        link.closed = True
        if link._keeper:
            link._keeper.cancel()
        link._cut(link._pipe, None)
        if link._timer:
            link._timer.cancel()
        if link._journal:
            link._journal.close()


@pytest.mark.parametrize("who", ["anna", "berta", "both"])
def test_restarts_with_a_journal_lose_and_repeat_nothing(quick, small, tmp_path, who):
    names = ("anna", "berta") if who == "both" else (who,)
    count = 9

    async def restart_after(offset):
        # An application of each node that remembers what it sent and heard, and nothing else.
        net, nodes, sent, heard, tasks = Network(), {}, {}, {}, {}
        other = {"anna": "berta", "berta": "anna"}

        async def application(name):
            link = nodes[name].link(key[other[name]], other[name])

            async def tell():
                while len(sent[name]) < count:
                    i = len(sent[name])
                    await link.send(b"%d " % i + b"x" * (170 if i == 3 else 20))
                    sent[name].append(i)

            async def listen():
                async for message in link:
                    heard[name].append(int(message.split(b" ")[0]))

            await asyncio.gather(tell(), listen())

        async def begin(name):
            folder = str(tmp_path / ("%s%s" % (name, offset)))
            nodes[name] = await node(net, name, journal=folder).start()
            nodes[name].fsync = False
            tasks[name] = asyncio.ensure_future(application(name))

        key = {name: minitor.load_identity(name.encode().ljust(32, b"."))[1] for name in other}
        for name in other:
            sent[name], heard[name] = [], []
            await begin(name)
        for at in (offset, 300 + offset, 150):
            net.left, ended = at, []

            def end():
                ended.append(at)
                for name in names:
                    crash(nodes[name])
                    tasks[name].cancel()

            # At that byte, or a little later.
            if offset % 2:
                net.on_cut = end
            while net.left is not None and min(map(len, heard.values())) < count:
                await asyncio.sleep(0.001)
            if not ended:
                end()
            for name in names:
                await begin(name)
        net.left, net.on_cut = None, lambda: None
        while [len(h) for h in heard.values()] != [count, count]:
            await asyncio.sleep(0.01)
        for name in other:
            await nodes[name].link(key[other[name]], other[name]).flush(10)
        for name in other:
            tasks[name].cancel()
            await nodes[name].close()
        assert heard["anna"] == heard["berta"] == list(range(count)), offset

    async def every():
        # Handshakes, two at once, take some 900 bytes.
        offsets = list(range(0, 900, 36)) + list(range(900, 1900, 4 + 4 * (who != "both")))
        for first in range(0, len(offsets), 50):
            await asyncio.gather(*map(restart_after, offsets[first : first + 50]))

    run(every())


def test_a_torn_journal_is_what_was_whole(tmp_path):
    path, record = str(tmp_path / "link"), minitor._journal_record
    journal = minitor._Journal(path, False)
    ends = []
    for i in range(1, 6):
        journal.write(record(b"m" if i == 2 else b"M", i, b"unit %d" % i))
        ends.append(journal._size)
    journal.write(record(b"A", 1), record(b"T", 7, b"p" * 16))
    journal.close()
    whole = (tmp_path / "link").read_bytes()
    assert (tmp_path / "link").stat().st_mode & 0o777 == 0o600
    for size in range(33, len(whole) + 1):
        (tmp_path / "link").write_bytes(whole[:size])
        journal = minitor._Journal(path, False)
        count = sum([end <= size for end in ends])
        # Of a message that is torn, nothing is left that the next one would be joined to.
        count -= count == 2
        gone = size >= ends[-1] + 17
        assert sorted(journal.units) == list(range(1 + gone, count + 1))
        assert journal.taken == (7 if size == len(whole) else 0)
        # It goes on from there.
        journal.write(record(b"M", count + 1, b"next"))
        journal.close()
        again = minitor._Journal(path, False)
        assert again.units[count + 1] == (False, b"next") and again.id == journal.id
        again.close()
    with pytest.raises(minitor.ConfigError):
        one = minitor._Journal(path, False)
        minitor._Journal(path, False)
    one.close()


def test_a_journal_does_not_grow(quick, tmp_path):
    async def test():
        net = Network()
        a = await node(net, "anna", journal=str(tmp_path)).start()
        a.fsync = False
        b = await node(net, "berta").start()
        link, heard = a.link(b.key, "berta"), []
        back = b.link(a.key, "anna")
        await asyncio.gather(talk(link, 4000, (2000,)), hear(back, 4000, heard))
        await link.flush(10)
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size < 2 << 20 and file.stat().st_mode & 0o777 == 0o600
        crash(a)
        await b.close()

    run(test())


def test_a_full_disk_is_told_and_changes_nothing(quick, tmp_path, monkeypatch):
    async def test():
        net = Network()
        a = await node(net, "anna", journal=str(tmp_path)).start()
        link = a.link(bytes(31) + b"k", "nobody")
        await link.send(b"first")
        write = minitor.os.write
        monkeypatch.setattr(minitor.os, "write", lambda fd, data: write(fd, data[:-9]))
        with pytest.raises(minitor.LinkError, match="cannot be written"):
            await link.send(b"second" * 30000)
        monkeypatch.setattr(minitor.os, "write", write)
        await link.send(b"third")
        crash(a)
        a = await node(net, "anna", journal=str(tmp_path)).start()
        kept = a.link(bytes(31) + b"k", "nobody")._units
        assert [unit for _, unit in kept.values()] == [b"first", b"third"]
        crash(a)

    run(test())


def test_a_peer_that_came_back_with_less_room_is_told_of_and_waited_for(quick):
    """A message that it does not take any more would be in the way for ever."""

    async def test():
        net = Network()
        a, b, link, back = await pair(net)
        await link.send(b"small")
        assert await back.receive(5) == b"small"
        await link.flush(5)
        crash(b)
        await link.send(bytes(200000))
        less = node(net, "berta")
        less.largest = 100000
        await less.start()
        while "takes 100" not in str(link.error):
            await asyncio.sleep(0.001)
        crash(less)
        async with node(net, "berta") as again:
            back = await again.__anext__()
            assert await back.receive(5) == bytes(200000)
            await link.flush(5)
        await a.close()

    run(test(), 20)


def test_who_flushes_asks_for_the_acknowledgement(quick, monkeypatch):
    """By itself a peer says seldom what it took: over Tor each cell that goes back delays others."""
    monkeypatch.setattr(minitor, "_ACK_SECONDS", 3600)

    async def test():
        a, b, link, back = await pair(Network())
        for pause in (0, 0.01):
            for i in range(5):
                await link.send(b"%d" % i)
            flushing = asyncio.ensure_future(link.flush(5))
            await asyncio.sleep(0.05)
            assert not flushing.done()
            for i in range(5):
                assert await back.receive(5) == b"%d" % i
                await asyncio.sleep(pause)
            await flushing
        # Neither end asks by the clock meanwhile: the machine may be slow.
        link._pipe.pinged = back._pipe.pinged = float("inf")
        written, write = [], back._pipe.write
        back._pipe.write = lambda *pieces: written.append(pieces) or write(*pieces)
        for _ in range(8 << 20 >> 14):
            await link.send(bytes(1 << 14))
            await back.receive(5)
        assert 3 <= len(written) <= 4
        await link.flush(5)
        # So does who has no room for more.
        a.buffer, taken = 50000, []
        hearing = asyncio.ensure_future(hear(back, 20, taken))
        for i in range(20):
            await minitor.wait_for(link.send(b"%d " % i + bytes(1 << 14)), 5)
        await hearing
        await link.flush(5)
        await a.close()
        await b.close()

    run(test())


def test_who_flushed_before_the_link_was_up_asks_behind_the_last_message(quick, monkeypatch):
    monkeypatch.setattr(minitor, "_ACK_SECONDS", 3600)

    async def test():
        net = Network()
        a, b = await node(net, "anna").start(), node(net, "berta")
        link = a.link(b.key, "berta")
        for _ in range(10):
            await link.send(bytes(1 << 14))
        flushing = asyncio.ensure_future(link.flush(5))
        await asyncio.sleep(0)
        await b.start()
        back = await b.__anext__()
        for _ in range(10):
            await back.receive(5)
        await flushing
        await a.close()
        await b.close()

    run(test())


def test_a_peer_that_started_anew_without_journal_is_noticed(quick):
    async def test():
        net = Network()
        a, b, link, back = await pair(net)
        await link.send(b"taken")
        assert await back.receive(5) == b"taken"
        await link.flush(5)
        await link.send(b"x" * 70000)
        await link.send(b"small")
        while len(back._inbox) < 2:
            await asyncio.sleep(0.001)
        crash(b)
        b = await node(net, "berta").start()
        back = await b.__anext__()
        await link.ready(5)
        with pytest.raises(minitor.LinkError) as e:
            await link.send(b"not sent")
        assert e.value.lost == [b"x" * 70000, b"small"]
        # And it goes on.
        await link.send(b"new")
        assert await back.receive(5) == b"new"
        await back.send(b"answer")
        assert await link.receive(5) == b"answer"
        await a.close()
        await b.close()

    run(test())


def test_what_was_taken_and_not_acknowledged_is_not_sent_again_to_who_forgot(quick):
    async def test():
        net = Network()
        a, b, link, back = await pair(net)
        await link.send(b"pay")
        assert await back.receive(5) == b"pay"
        crash(b)
        b = await node(net, "berta").start()
        back = await b.__anext__()
        await link.ready(5)
        with pytest.raises(minitor.LinkError) as e:
            await link.flush(5)
        assert e.value.lost == [b"pay"]
        await link.send(b"again")
        assert await back.receive(5) == b"again"
        await a.close()
        await b.close()

    run(test())


def test_what_was_never_sent_is_not_lost_when_a_peer_starts_anew(quick):
    async def test():
        net = Network()
        a, b, link, back = await pair(net)
        await link.send(b"1")
        assert await back.receive(5) == b"1"
        await link.flush(5)
        crash(b)
        while link.up:
            await asyncio.sleep(0.001)
        for i in range(2, 5):
            await link.send(b"%d" % i)
        b = await node(net, "berta").start()
        back = await b.__anext__()
        assert [await back.receive(5) for _ in range(3)] == [b"2", b"3", b"4"]
        await link.flush(5)
        await a.close()
        await b.close()

    run(test())


def test_a_session_is_known_from_its_start_on(quick):
    """Until then the peer may think of another life of this end, which had taken some."""
    async def test():
        net = Network()
        b = await node(net, "berta").start()
        for start, known in (b"", bytes(16)), (START, bytes(16)), (b"", b"i" * 16):
            peer = await Hostile.dial(net, "berta", b.key)
            assert peer.hello.theirs == known
            if start:
                await peer.say(start, unit(b"one"))
                (link,) = b.links.values()
                while not link._inbox:
                    await asyncio.sleep(0)
            peer.pipe.stream.close()
        crash(b)

    run(test())


def test_dials_at_once_from_both_ends_become_one_link(quick):
    async def test(seed):
        net = Network(seed, delay=0.01, loss=0.2)
        a, b = [await node(net, name).start() for name in ("anna", "berta")]
        link, back = a.link(b.key, "berta"), b.link(a.key, "anna")
        heard, echoed = [], []
        await asyncio.gather(talk(link, 50), talk(back, 50), hear(back, 50, heard),
                             hear(link, 50, echoed))
        assert heard == echoed == list(range(50))
        await asyncio.sleep(0.1)
        assert list(a.links.values()) == [link] and list(b.links.values()) == [back]
        # One connection, the same one, and it stays.
        assert link._pipe.stream.other is back._pipe.stream
        before = net.dials, link._pipe
        await asyncio.sleep(0.1)
        assert (net.dials, link._pipe) == before
        await a.close()
        await b.close()

    async def every():
        await asyncio.gather(*map(test, range(40)))

    run(every())


def test_of_two_dials_at_once_one_connection_stays(quick):
    async def test(seed):
        net = Network(seed)
        a, b = [await node(net, name).start() for name in ("anna", "berta")]
        a.pauses = b.pauses = 0.2, 0.2
        link, back = a.link(b.key, "berta"), b.link(a.key, "anna")
        await link.ready(5)
        await back.ready(5)
        await asyncio.sleep(0.05)
        assert net.dials == 2 and link._pipe.stream.other is back._pipe.stream
        smaller = link._pipe.dialed == (a.key < b.key)
        await a.close()
        await b.close()
        return smaller

    async def every():
        # Another one stays where it was there before the second had begun.
        assert sum(await asyncio.gather(*map(test, range(60)))) > 30

    run(every())


def test_a_sender_waits_while_the_application_over_there_does_not_read(quick):
    async def test():
        net = Network()
        a, b, link, back = await pair(net)
        a.buffer = b.buffer = a.largest = b.largest = 100000
        sending = asyncio.ensure_future(talk(link, 500, (1000,)))
        await asyncio.sleep(0.2)
        assert not sending.done() and link.buffered <= 100000 and back._unread <= 101000
        heard = []
        await hear(back, 500, heard)
        assert heard == list(range(500))
        await sending
        await link.flush(5)
        assert link.buffered == back._unread == 0
        with pytest.raises(minitor.ConfigError, match="too large"):
            await link.send(bytes(100001))
        await a.close()
        await b.close()

    run(test())


def test_what_was_taken_is_acknowledged_when_the_link_is_closed(quick):
    async def test():
        net = Network()
        a, b, link, back = await pair(net)
        await link.send(b"one")
        assert await back.receive(5) == b"one"
        closing = asyncio.ensure_future(back.close())
        while not back._bye:
            await asyncio.sleep(0)
        with pytest.raises(minitor.LinkError, match="by this end"):
            await back.send(b"late")
        await closing
        while not link.closed:
            await asyncio.sleep(0.001)
        assert not link._lost and link._base == 2
        await a.close()
        await b.close()

    run(test())


def test_a_peer_that_takes_less_is_named(quick):
    async def test():
        net = Network()
        async with node(net, "anna") as a, node(net, "berta") as b:
            b.largest = 1000
            link = a.link(b.key, "berta")
            await link.send(bytes(1300))
            with pytest.raises(minitor.ProtocolError, match="1200 bytes at most"):
                await link.ready(0.2)
            with pytest.raises(minitor.LinkError):
                await link.close(0)
            link = a.link(b.key, "berta")
            await link.ready(5)
            with pytest.raises(minitor.ConfigError, match="too large"):
                await link.send(bytes(1300))
            # More than it takes at once waits here, and does not cost the connection.
            back, heard, net.dials = await b.__anext__(), [], 0
            await talk(link, 100, (990,))
            await asyncio.sleep(0.05)
            assert link._sent == 1 and link.up
            await hear(back, 100, heard)
            assert heard == list(range(100)) and not net.dials

    run(test())


def test_peers_together_leave_room_and_lose_nothing(quick):
    async def test():
        net, room, told = Network(), 200000, []
        b = await node(net, "berta", on_event=lambda *what: told.append(what[1])).start()
        b.room = room
        peers = [await node(net, "peer %d" % i).start() for i in range(3)]
        links = [peer.link(b.key, "berta") for peer in peers]
        sending = [talk(links[i], 400 * i + 20, (1000,)) for i in range(3)]
        sending = asyncio.ensure_future(asyncio.gather(*sending))
        kept = []
        while "down" not in told:
            kept.append(sum([link._unread for link in b.links.values()]))
            await asyncio.sleep(0)
        backs = [b.links[peer.key, ""] for peer in peers]
        # Who sends little is not troubled by those who send more than anybody takes.
        assert max(kept) <= room and links[0].up and len(backs[0]._inbox) == 20
        heard = [[] for _ in peers]
        await asyncio.gather(sending, *[hear(backs[i], 400 * i + 20, heard[i]) for i in range(3)])
        assert heard == [list(range(400 * i + 20)) for i in range(3)]
        for each in peers + [b]:
            await each.close()

    run(test())


def test_what_was_dropped_is_not_skipped(quick):
    async def test():
        net = Network()
        b = await node(net, "berta").start()
        peer = await Hostile.dial(net, "berta", b.key)
        link = await b.__anext__()
        await peer.say(START, unit(b"1"), unit(b"2"))
        while len(link._inbox) < 2:
            await asyncio.sleep(0)
        b.room = 100
        await peer.say(unit(b"3"), unit(b"4"))
        assert await peer.is_cut() and not link._inbox and link._got == 0
        # A handshake that was going on had said that more is here.
        b.room = 1000
        for number, cut in (2, True), (1, False):
            peer = await Hostile.dial(net, "berta", b.key)
            await peer.say(frame(minitor._START, number), unit(b"%d" % number))
            if cut:
                assert await peer.is_cut() and not link._inbox
        assert await link.receive(5) == b"1"
        crash(b)

    run(test())


def test_nothing_is_taken_after_the_end(quick, tmp_path):
    async def test():
        net = Network()
        taken = []

        def told(link, event, detail):
            if event == "closed":
                # It has the descriptor that the journal had.
                taken.append(open(tmp_path / "mine", "wb"))

        b = await node(net, "berta", journal=str(tmp_path / "b"), on_event=told).start()
        peer = await Hostile.dial(net, "berta", b.key)
        link = await b.__anext__()
        journal = link._journal._fd
        await link.send(b"one")
        while link._sent < 1:
            await asyncio.sleep(0)
        await peer.say(START, frame(minitor._BYE, 0), frame(minitor._ACK, 1), unit(b"late"))
        assert await peer.is_cut() and link.closed and not link._inbox
        assert taken[0].fileno() == journal and (tmp_path / "mine").stat().st_size == 0
        taken[0].close()
        await b.close()

    run(test())


def test_sessions_that_begin_a_message_and_end_leave_room(quick):
    async def test():
        net = Network()
        b = await node(net, "berta").start()
        b.buffer = b.largest = 100000
        link = None
        for i in range(5):
            peer = await Hostile.dial(net, "berta", b.key, id=b"%016d" % i)
            await peer.say(START, unit(bytes(50000), True))
            link = link or await b.__anext__()
            while link._unread < 50000:
                await asyncio.sleep(0.001)
        peer = await Hostile.dial(net, "berta", b.key, id=b"whole" + bytes(11))
        await peer.say(START, unit(bytes(60000)))
        assert len(await link.receive(5)) == 60000 and link._unread == 0
        await b.close(0)

    run(test())


def test_ten_thousand_messages_on_the_way_take_20_megabytes():
    import tracemalloc

    async def test():
        async with node(Network(), "anna") as a:
            link = a.link(bytes(31) + b"k", "nobody")
            link.retry = True
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            for i in range(10000):
                await link.send(i.to_bytes(4, "big") * 256)
            used = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            assert 10e6 < used < 20e6
            with pytest.raises(minitor.LinkError) as e:
                await link.close(0)
            assert len(e.value.lost) == 10000

    run(test())


def test_events_tell_of_up_down_and_lag(quick, monkeypatch):
    async def test():
        net, told = Network(), []
        a, b, link, back = await pair(net, on_event=lambda *what: told.append(what))
        await link.ready(5)
        a.keepalive = b.keepalive = 0.2
        net.cut()
        while net.dials < 2 or not (link.up and back.up):
            await asyncio.sleep(0.01)
        assert [event for l, event, _ in told if l is link] == ["up", "down", "up"]
        # A clock that is set changes nothing: silence is measured by another one.
        monkeypatch.setattr(minitor.time, "time", lambda: 0)
        # The other end takes what comes, and says nothing.
        monkeypatch.setattr(b.links[a.key, ""]._pipe.stream, "write", lambda data: asyncio.sleep(0))
        link._pipe.asked = link._pipe.pinged = minitor.time.monotonic() - 1
        while "down" not in [event for l, event, _ in told[5:] if l is link]:
            await asyncio.sleep(0.01)
        events = [(event, detail) for l, event, detail in told if l is link]
        assert events[3][0] == "lag" and events[3][1] > 1
        assert events[4][0] == "down" and isinstance(events[4][1], minitor.TorTimeout)
        await asyncio.sleep(0.1)
        await a.close(0)
        await b.close(0)

    run(test())


# ─── Hostile peers ───


class Hostile:
    """A peer that shakes hands as it should, and then says what it likes."""

    def __init__(self, pipe, key):
        self.pipe, self.key = pipe, key

    @classmethod
    async def dial(cls, net, address, peer_key, name="hostile", **state):
        key = minitor.load_identity(name.encode().ljust(32, b"."))
        pipe = minitor._Pipe(await net.dial(address), net.private)
        fields = dict(life=b"l" * 8, ups=0, id=b"i" * 16, theirs=bytes(16), taken=0, got=0,
                      limit=1 << 24, kept=False, **{})
        fields.update(state)
        packed = minitor.pack(minitor._STATE, *fields.values())
        peer = cls(pipe, key[1])
        peer.hello = minitor._parse_state(await minitor._greet(pipe, key, peer_key, lambda: packed))
        return peer

    async def say(self, *pieces):
        await self.pipe.write(*pieces)

    async def is_cut(self, seconds=5):
        async def read():
            while await self.pipe.stream.read(1 << 16):
                pass

        await asyncio.wait_for(read(), seconds)
        return True


def frame(kind, number):
    return minitor.pack(">BQ", kind, number)


def unit(data, more=False):
    return minitor.pack(">BI", minitor._MORE if more else minitor._LAST, len(data)) + data


START = frame(minitor._START, 1)
HOSTILE = {
    "an acknowledgement of what was not sent": frame(minitor._ACK, 4),
    "an acknowledgement of everything": frame(minitor._ACK, (1 << 64) - 1),
    "an answer to nothing": frame(minitor._PONG, 1) * 2,
    "a second start": START,
    "an unknown frame": frame(9, 1),
    "a frame of kind 0": bytes(9),
    "a truncated frame": frame(minitor._ACK, 0)[:8],
    "a truncated unit": unit(b"abc")[:-1],
    "a unit that is too long": unit(bytes((1 << 16) + 1)),
}


@pytest.mark.parametrize("said", list(HOSTILE.values()), ids=list(HOSTILE))
def test_what_a_peer_must_not_say_ends_the_connection_and_changes_nothing(quick, said):
    async def test():
        net = Network()
        b = await node(net, "berta").start()
        peer = await Hostile.dial(net, "berta", b.key)
        link = await b.__anext__()
        for i in range(3):
            await link.send(b"%d" % i)
        await peer.say(START, unit(b"good"))
        assert await link.receive(5) == b"good"
        await peer.say(said)
        assert await peer.is_cut() and not link.up
        assert isinstance(link.error, minitor.ProtocolError)
        assert link._base == 1 and len(link._units) == 3 and not link._inbox
        await b.close(0) if link.closed else crash(b)

    run(test())


@pytest.mark.parametrize("state", [
    {"theirs": None, "got": 9}, {"theirs": None, "got": 2, "taken": 3},
    {"theirs": None, "taken": 1 << 63, "got": 1 << 63}])
def test_a_state_of_what_was_never_sent_is_refused(quick, state):
    async def test():
        net = Network()
        b = await node(net, "berta").start()
        peer = await Hostile.dial(net, "berta", b.key)
        link = await b.__anext__()
        await link.send(b"one")
        peer.pipe.stream.close()
        state["theirs"] = link._id
        peer = await Hostile.dial(net, "berta", b.key, **state)
        assert await peer.is_cut() and not link.up and link._base == 1
        crash(b)

    run(test())


@pytest.mark.parametrize("number", [0, 1 << 62, (1 << 64) - 1])
def test_a_start_out_of_range_is_refused(quick, number):
    async def test():
        net = Network()
        b = await node(net, "berta").start()
        peer = await Hostile.dial(net, "berta", b.key)
        link = await b.__anext__()
        await peer.say(frame(minitor._START, number), unit(b"x"))
        assert await peer.is_cut() and isinstance(link.error, minitor.ProtocolError)
        crash(b)

    run(test())


def test_a_peer_that_hangs_up_after_the_handshake_is_a_TorError(quick):
    async def test():
        net = Network()
        key = minitor.load_identity(b"hostile".ljust(32, b"."))
        state = minitor.pack(minitor._STATE, b"l" * 8, 0, b"i" * 16, bytes(16), 0, 0, 1 << 24, 0)

        async def accept(stream):
            pipe = minitor._Pipe(stream, True)
            await minitor._welcome(pipe, key)
            await pipe.write(state)

        net.accepts["hostile:7717"] = accept
        async with node(net, "anna") as a:
            with pytest.raises(minitor.PeerError, match="the connection ended"):
                await a.link(key[1], "hostile:7717", retry=False).ready(5)
            found = minitor.Discovery.over(a, True)
            with pytest.raises(minitor.DiscoveryError):
                await found.join([(key[1], "hostile:7717")])
            assert await found.discover("x") == []

    run(test())


def test_a_dead_way_is_noticed_while_a_write_waits(quick, monkeypatch):
    monkeypatch.setattr(minitor.Node, "keepalive", 0.2)

    async def test():
        net, told = Network(), []
        a, b, link, back = await pair(net, on_event=lambda *what: told.append(what))
        await link.ready(5)
        await link.send(b"one")
        await back.receive(5)
        while link._pipe.asked is not None or not link._pipe.pinged:
            await asyncio.sleep(0)

        async def never(*_):
            await asyncio.Event().wait()

        stream, link._pipe.pinged = link._pipe.stream, minitor.time.monotonic()
        stream.write = stream.read = stream.other.read = stream.other.write = never
        a.transport.dial = never
        await link.send(b"two")
        while link.up or back.up:
            await asyncio.sleep(0.01)
        downs = [detail for who, event, detail in told if event == "down" and who is link]
        assert isinstance(downs[0], minitor.TorTimeout)
        crash(a)
        crash(b)

    run(test(), 10)


def test_who_is_sent_much_at_a_slow_pace_is_alive(quick, monkeypatch):
    """Its answer to a question waits behind that, and so does the question."""
    monkeypatch.setattr(minitor.Node, "keepalive", 1)

    async def test():
        net, told = Network(), []
        a, b, link, back = await pair(net, on_event=lambda *what: told.append(what[1]))
        await link.ready(5)
        stream = link._pipe.stream
        write = stream.write

        async def slowly(data):
            for i in range(0, len(data), 1000):
                await asyncio.sleep(0.1)
                await write(data[i : i + 1000])

        stream.write = slowly
        await link.send(bytes(60000))
        assert len(await back.receive(30)) == 60000 and "down" not in told
        await a.close()
        await b.close()

    run(test())


def test_a_link_survives_somebody_else_and_garbage(quick):
    async def test():
        net = Network()
        a, b, link, back = await pair(net)
        await link.ready(5)
        for data in b"", bytes(100), b"GET / HTTP/1.1\r\n\r\n" * 10, b"mnlink1" + bytes(49):
            end = await net.dial("berta")
            await end.write(data)
            if len(data) > 56:
                assert await asyncio.wait_for(end.read(10), 5) == b""
            end.close()
        peer = await Hostile.dial(net, "berta", b.key)
        assert (await b.__anext__()).peer == peer.key
        await talk(link, 3)
        heard = []
        await hear(back, 3, heard)
        assert heard == [0, 1, 2] and link.up and net.cuts == 0
        await a.close()
        crash(b)

    run(test())


@pytest.mark.parametrize("endless", ["one message", "empty units", "messages", "a record"])
def test_endless_messages_cost_no_more_than_was_agreed_on(quick, endless):
    async def test():
        net = Network()
        b = await node(net, "berta").start()
        b.buffer = b.largest = 300000
        peer = await Hostile.dial(net, "berta", b.key)
        link = await b.__anext__()
        await peer.say(START)
        said = {"one message": [unit(bytes(60000), True)], "empty units": [unit(b"", True)] * 1000,
                "messages": [unit(b"")] * 1000, "a record": [bytes(200000)]}[endless]
        with pytest.raises(OSError):
            for _ in range(20):
                await peer.say(*said)
                await asyncio.sleep(0)
        assert not link.up and link._unread <= 300000 + 60000 + 400
        # Again, and under another name of the session: what is unread counts.
        for i in range(5):
            try:
                peer = await Hostile.dial(net, "berta", b.key, id=b"%016d" % i)
                await peer.say(START)
                for _ in range(20):
                    await peer.say(*said)
                    await asyncio.sleep(0)
            except (OSError, EOFError):
                pass
        assert link._unread <= 3 * 360000
        crash(b)

    run(test())


def test_many_identities_find_an_end(quick):
    async def test():
        net = Network()
        b = await node(net, "berta").start()
        b.most = 5
        for i in range(20):
            peer = await Hostile.dial(net, "berta", b.key, "hostile%d" % i)
            peer.pipe.stream.close()
            await asyncio.sleep(0)
        assert len(b.links) <= 5 and len(b._new) <= 5
        # Though something is to be sent to those who are gone.
        for link in b.links.values():
            await link.send(b"welcome")
        held = [await Hostile.dial(net, "berta", b.key, "held%d" % i) for i in range(5)]
        with pytest.raises((OSError, EOFError)):
            await Hostile.dial(net, "berta", b.key, "late")
        assert len(b.links) == 5 and held
        await b.close(0)

    run(test())


def test_who_only_holds_places_keeps_nobody_out(quick):
    async def test():
        net = Network()
        async with node(net, "anna") as a, node(net, "berta") as b:
            silent = [await net.dial("berta") for _ in range(300)]
            await asyncio.sleep(0.05)
            assert len(b._greetings) <= minitor._GREETINGS + 1
            await a.link(b.key, "berta").ready(10)
            assert sum([not end.ended for end in silent]) <= minitor._GREETINGS

    run(test())


def test_a_peer_that_is_not_allowed_is_refused(quick):
    async def test():
        net = Network()
        async with node(net, "berta", allow=lambda key: False) as b, node(net, "anna") as a:
            with pytest.raises(minitor.PeerError, match="hung up"):
                await a.link(b.key, "berta", retry=False).ready(5)
            assert not b.links and not a.links
            # But whom it links to itself.
            back = b.link(a.key, "anna")
            await back.ready(5)
            with pytest.raises(minitor.PeerError):
                await a.link(b.key, "berta", "chat", retry=False).ready(5)

    run(test())


def test_the_wrong_peer_is_told_apart():
    async def test():
        net = Network()
        async with node(net, "anna") as a, node(net, "berta") as b, node(net, "carla") as c:
            link = a.link(c.key, "berta", retry=False)
            with pytest.raises(minitor.WrongPeer):
                await link.ready(5)
            with pytest.raises(minitor.LinkError):
                await link.send(b"for Carla")
            with pytest.raises(minitor.ConfigError):
                a.link(a.key, "anna")
            with pytest.raises(minitor.AddressError):
                a.link("a" * 56 + ".onion")
            assert not b.links

            # Who knows Carla's key, and has not her secret.
            async def false(stream):
                await minitor._welcome(minitor._Pipe(stream, True), (b.identity[0], c.key))

            net.accepts["carla"] = false
            with pytest.raises(minitor.WrongPeer):
                await a.link(c.key, "carla", retry=False).ready(5)

    run(test())


def test_nobody_is_who_signs_with_another_key():
    async def test():
        net = Network()
        async with node(net, "berta") as b:
            mallory = minitor.load_identity(b"m" * 32)
            anna = minitor.load_identity(b"a" * 32)
            pipe = minitor._Pipe(await net.dial("berta"), True)
            with pytest.raises(EOFError):
                await minitor._greet(pipe, (mallory[0], anna[1]), b.key, lambda: bytes(69))
            # Nor Berta herself.
            pipe = minitor._Pipe(await net.dial("berta"), True)
            with pytest.raises(EOFError):
                await minitor._greet(pipe, b.identity, b.key, lambda: bytes(69))
            assert not b.links

    run(test())


def test_a_handshake_that_is_replayed_is_none():
    async def test():
        net = Network()
        a, b, link, back = await pair(net)
        await link.send(b"pay")
        assert await back.receive(5) == b"pay"
        for which, address in ((0, "berta"), (1, "anna")):
            end = net.ends[0] if which == 0 else net.ends[0].other
            said = [data for who, data in net.seen if who is end]
            replayed = await net.dial(address)
            answered = 0
            try:
                for data in said:
                    await replayed.write(data)
                    await asyncio.sleep(0.01)
                while piece := await asyncio.wait_for(replayed.read(1 << 16), 5):
                    answered += len(piece)
            except OSError:
                pass
            # Berta's first answer; not the second.
            assert answered < 200
        assert link.up and back.up and not back._inbox and not link._inbox
        # Reflected: what Anna sends, she gets.
        net.accepts["mirror"] = net.accepts["anna"]
        with pytest.raises(minitor.WrongPeer):
            await a.link(minitor.load_identity(b"m" * 32)[1], "mirror", retry=False).ready(5)
        await a.close()
        await b.close()

    run(test())


def test_what_is_changed_on_the_way_never_arrives(quick, monkeypatch):
    # A length that was changed lets an end wait in vain.
    monkeypatch.setattr(minitor, "HANDSHAKE_SECONDS", 0.3)

    async def test(n):
        # Everything goes through somebody who changes one byte.
        offset, which = divmod(n, 2)
        net = Network(private=False)
        a, b = [await node(net, name).start() for name in ("anna", "berta")]
        a.keepalive = b.keepalive = 0.3
        count = [0, 0]

        async def between(stream):
            onward = await net.dial("berta")

            async def move(source, sink, way):
                try:
                    while data := bytearray(await source.read(1 << 16)):
                        at = offset - count[way]
                        count[way] += len(data)
                        if 0 <= at < len(data) and way == which:
                            data[at] ^= 1 + offset % 255
                        await sink.write(data)
                except OSError:
                    pass
                source.close()
                sink.close()

            await asyncio.gather(move(stream, onward, 0), move(onward, stream, 1))

        net.accepts["between"] = between
        link, heard = a.link(b.key, "between"), []
        await talk(link, 5)

        async def listen():
            async for back in b:
                assert back.peer == a.key
                return await hear(back, 5, heard)

        await asyncio.wait_for(listen(), 10)
        await link.flush(5)
        assert heard == list(range(5)), offset
        crash(a)
        crash(b)
        return count[which] > offset

    async def every():
        changed = []
        for first in range(0, 600, 100):
            changed += await asyncio.gather(*map(test, range(first, first + 100)))
        assert sum(changed) > 550

    run(every())


def test_two_who_flush_both_hear_of_what_is_lost(quick):
    async def test():
        net = Network()
        a, b, link, back = await pair(net)
        await link.send(b"one")
        while not back._inbox:
            await asyncio.sleep(0)
        flushing = asyncio.gather(link.flush(5), link.flush(5), return_exceptions=True)
        await asyncio.sleep(0)
        crash(b)
        b = await node(net, "berta").start()
        errors = await flushing
        assert [type(e) for e in errors] == [minitor.LinkError] * 2 and errors[0].lost == [b"one"]
        await a.close()
        await b.close()

    run(test())


def test_closing_tells_what_a_peer_that_started_anew_forgot(quick):
    async def test():
        net = Network()
        a, b, link, back = await pair(net)
        await link.send(b"one")
        while not back._inbox:
            await asyncio.sleep(0)
        crash(b)
        b = await node(net, "berta").start()
        while not link._lost:
            await asyncio.sleep(0.001)
        with pytest.raises(minitor.LinkError) as e:
            await link.close()
        assert e.value.lost == [b"one"]
        await a.close()
        await b.close()

    run(test())


def test_the_end_of_a_node_names_all_that_is_lost_and_leaves_nothing(quick):
    async def test():
        net = Network()
        a = await node(net, "anna").start()
        for i in range(3):
            await a.link(bytes([i]) * 32, "nobody").send(b"%d" % i)
        waiting = await net.dial("anna")
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(a.close(9))
        await asyncio.sleep(0.01)
        links = list(a.links.values())
        # Cancelled, it ends what it can no longer wait for.
        closing.cancel()
        await asyncio.wait([closing])
        assert waiting.ended and "anna" not in net.accepts and not a.links
        assert all(link.closed for link in links)

        b = await node(net, "berta").start()
        for i in range(3):
            await b.link(bytes([i]) * 32, "nobody").send(b"%d" % i)
        with pytest.raises(minitor.LinkError) as e:
            await b.close(0)
        assert sorted(e.value.lost) == [b"0", b"1", b"2"]

    run(test())


# ─── Blocking twins ───


def test_two_threads_close_a_node():
    with minitor.BlockingNode(b"b" * 32, minitor.DirectTransport()) as b:
        a = minitor.BlockingNode(b"a" * 32, minitor.DirectTransport())
        link = a.link(b.key, b.address).ready(5)
        link.send(b"last words")
        back, ends = next(b), []

        def close():
            a.close()
            ends.append(None)

        threads = [threading.Thread(target=close) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert back.receive(5) == b"last words"
        for thread in threads:
            thread.join(10)
        assert len(ends) == 2


def test_blocking_nodes_and_links():
    with minitor.BlockingNode(b"a" * 32, minitor.DirectTransport()) as a:
        with minitor.BlockingNode(b"b" * 32, minitor.DirectTransport()) as b:
            link = a.link(b.key, b.address).ready(5)
            back = next(b)
            assert back.peer == a.key
            for i in range(3):
                link.send(b"%d" % i)
            assert [back.receive(5) for _ in range(3)] == [b"0", b"1", b"2"]
            link.flush(5)
            back.send(b"last")
            assert next(link) == b"last"
            with pytest.raises(minitor.TorTimeout):
                link.receive(0.01)
            back.close()
            assert list(link) == []
            with pytest.raises(minitor.LinkError):
                link.send(b"late")
    with pytest.raises(minitor.ConfigError):
        a.link(b.key)
    with pytest.raises(minitor.ConfigError, match="cannot listen"):
        minitor.BlockingNode(b"a" * 32, minitor.DirectTransport("192.0.2.1:1"))


# ─── Transports ───

ONION = minitor.onion_address(minitor.ed25519_public(minitor.ed25519_expand(bytes(32))))
REPLIES = {
    "nobody there": (b"\5\4", minitor.PeerError), "refused": (b"\5\5", minitor.PeerError),
    "unreachable": (b"\5\3", minitor.NetworkError), "late": (b"\5\6", minitor.TorTimeout),
    "a failure": (b"\5\1", minitor.ProxyError), "not allowed": (b"\5\2", minitor.ProxyError),
    "no descriptor": (b"\5\xf0", minitor.PeerError), "no key": (b"\5\xf4", minitor.AuthorizationError),
    "another key": (b"\5\xf5", minitor.AuthorizationError),
    "a bad address": (b"\5\xf6", minitor.AddressError),
    "introduction": (b"\5\xf7", minitor.TorTimeout), "silence": (b"", minitor.ProxyError),
}


async def proxy(answers, asked):
    """A SOCKS proxy that answers so, and hangs up; its port."""

    async def serve(reader, writer):
        for answer in answers:
            asked.append(await reader.read(1000))
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return str(server.sockets[0].getsockname()[1])


@pytest.mark.parametrize("reply,kind", list(REPLIES.values()), ids=list(REPLIES))
def test_what_a_socks_proxy_says_is_told_apart(reply, kind):
    async def test():
        asked = []
        end = reply and reply + b"\0\1" + bytes(6)
        port = await proxy([b"\5\2", b"\1\0", end], asked)
        with pytest.raises(kind) as e:
            await minitor.SocksTransport(port).dial(ONION + ":99", 5)
        assert ONION in str(e.value) or kind is minitor.ProxyError
        name = ONION.encode()
        assert asked[0] == b"\5\2\0\2" and asked[1][:10] == b"\1\7minitor\x10" and len(asked[1]) == 26
        assert asked[2] == b"\5\1\0\3" + bytes([len(name)]) + name + b"\0\x63"

    run(test())


@pytest.mark.parametrize("answers", [[b"\5\xff"], [b"\5\2", b"\1\1"], [b"HTTP/1.0 400 x"], [b"\5\0"]])
def test_a_proxy_that_refuses(answers):
    async def test():
        with pytest.raises(minitor.ProxyError):
            await minitor.SocksTransport(await proxy(answers, [])).dial(ONION, 5)

    run(test())


def test_failures_of_transports_are_told_apart(monkeypatch):
    async def test():
        listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        free = listener.sockets[0].getsockname()[1]
        listener.close()
        await listener.wait_closed()
        direct, at = minitor.DirectTransport(), "127.0.0.1:%d" % free
        with pytest.raises(minitor.PeerError):
            await direct.dial(at, 5)
        for bad in ONION, "localhost:1", "example.com:80", "127.0.0.1:99999", "", ":1", "1.2.3.4:x":
            with pytest.raises(minitor.AddressError):
                await direct.dial(bad, 5)
        with pytest.raises(minitor.ProxyError):
            await minitor.SocksTransport(at).dial(ONION, 5)
        for bad in "127.0.0.1:1", "example.com", "x.onion":
            with pytest.raises(minitor.AddressError):
                await minitor.SocksTransport(at).dial(bad, 5)
        error = OSError(errno.ENETUNREACH, "no way")

        async def fails(*_, **__):
            raise error

        monkeypatch.setattr(minitor.asyncio, "open_connection", fails)
        with pytest.raises(minitor.NetworkError):
            await direct.dial(at, 5)
        with pytest.raises(minitor.ConfigError):
            minitor.Node(b"short", direct)
        with pytest.raises(minitor.ConfigError):
            await minitor.DirectTransport("192.0.2.1:1").listen(None)

    run(test())


class Tor:
    """What TorTransport needs of an AsyncTor, over a network in memory."""

    def __init__(self, net):
        self.net, self.isolations, self.error, self.services = net, [], None, []

    async def open_connection(self, host, port, timeout, isolation):
        self.isolations.append(isolation)
        if self.error:
            raise self.error
        end = await self.net.dial("%s:%d" % (host, port))
        end.drain = lambda: asyncio.sleep(0)
        wrote, end.write = end.write, lambda data: asyncio.ensure_future(wrote(data))
        return end, end

    async def create_onion_service(self, port, target, key_dir):
        async def accept(end):
            end.drain = lambda: asyncio.sleep(0)
            wrote, end.write = end.write, lambda data: asyncio.ensure_future(wrote(data))
            await target(end, end)

        address = minitor.onion_address(key_dir[1])
        self.net.accepts["%s:%d" % (address, port)] = accept
        self.services.append(self)
        return self

    async def close(self):
        self.services.pop()


TOLD = [
    (minitor.OnionError("x", 0xF0), minitor.PeerError),
    (minitor.StreamError("x", 6), minitor.PeerError),
    (minitor.AuthorizationError("x", 0xF4), minitor.AuthorizationError),
    (minitor.CircuitError("x"), minitor.NetworkError),
    (minitor.ChannelError("x"), minitor.NetworkError),
    (minitor.TorTimeout("x"), minitor.TorTimeout),
]


def test_a_node_over_tor():
    async def test():
        tor = Tor(Network())
        one, two = [minitor.load_identity(bytes([i]) * 32) for i in (1, 2)]
        a = await minitor.Node(one, minitor.TorTransport(tor, one)).start()
        b = await minitor.Node(two, minitor.TorTransport(tor, two, 99)).start()
        assert b.address == minitor.onion_address(two[1]) + ":99"
        link = a.link(b.address)
        await link.send(b"over Tor")
        back = await b.__anext__()
        assert await back.receive(5) == b"over Tor" and back.peer == a.key
        # Its end is protected already.
        await link.ready(5)
        assert link._pipe._out is None and back._pipe._in is None
        tor.net.cut()
        await link.send(b"again")
        assert await back.receive(5) == b"again"
        # A new circuit each time.
        assert len(set(tor.isolations)) == len(tor.isolations) == 2
        await a.close()
        await b.close()
        assert not tor.services
        for error, kind in TOLD:
            tor.error = error
            with pytest.raises(kind):
                await minitor.TorTransport(tor).dial(b.address, 5)
        with pytest.raises(minitor.AddressError):
            await minitor.TorTransport(tor).dial("127.0.0.1:80")

    run(test())


def test_anothers_onion_service_reads_nothing(quick):
    """What is private towards the address that was dialled, is not towards another peer."""
    async def test():
        tor, seen = Tor(Network()), []
        a, b, m = [minitor.load_identity(bytes([i]) * 32) for i in range(3)]
        anna = await minitor.Node(a, minitor.TorTransport(tor, a)).start()
        berta = await minitor.Node(b, minitor.TorTransport(tor, b)).start()
        middle = minitor.TorTransport(tor, m)

        async def accept(stream):
            on = await minitor.TorTransport(tor).dial(berta.address)

            async def move(source, sink):
                while data := await source.read(1 << 16):
                    seen.append(data)
                    await sink.write(data)

            await asyncio.gather(move(stream, on), move(on, stream))

        await middle.listen(accept)
        for address, hidden in (middle.address, True), (berta.address, False):
            link = anna.link(berta.key, address)
            await link.send(b"for Berta")
            assert await (await berta.__anext__()).receive(5) == b"for Berta"
            assert (link._pipe._out is not None) == hidden
            await link.close()
        assert seen and b"for Berta" not in b"".join(seen)
        await anna.close()
        await berta.close()

    run(test())


def test_a_connection_that_comes_about_as_nobody_wants_it_is_closed():
    closed = []

    async def test():
        there = asyncio.Event()

        class Writer:
            def close(self):
                closed.append(self)

        async def opening():
            await there.wait()
            return None, Writer()

        dialing = asyncio.ensure_future(minitor._told_apart(opening(), "somewhere", 5))
        for _ in range(5):
            await asyncio.sleep(0)
        there.set()
        for _ in range(3):
            await asyncio.sleep(0)
            if dialing.done():
                break
            dialing.cancel()
        await asyncio.wait([dialing])
        assert dialing.cancelled() and len(closed) == 1

    run(test())


def test_who_takes_nothing_keeps_no_socket(monkeypatch):
    monkeypatch.setattr(minitor, "_CLOSE_SECONDS", 0.05)

    async def test():
        ours = []

        async def accept(stream):
            ours.append(stream)
            await asyncio.wait([asyncio.ensure_future(stream.write(bytes(32 << 20)))], timeout=0.1)

        transport = minitor.DirectTransport()
        await transport.listen(accept)
        reader, writer = await asyncio.open_connection(*transport.address.split(":"))
        while not ours:
            await asyncio.sleep(0.01)
        socket = ours[0]._writer.get_extra_info("socket")
        ours[0].close()
        while socket.fileno() >= 0:
            await asyncio.sleep(0.01)
        writer.close()
        await transport.close()

    run(test(), 10)


def test_a_node_that_cannot_start_does_not_listen():
    class Failing:
        address = "nowhere"

        async def listen(self, accept):
            raise minitor.CircuitError("no network")

        async def close(self):
            pass

    async def test():
        direct = minitor.DirectTransport()
        with pytest.raises(minitor.CircuitError):
            await node_of(minitor.HybridTransport(Failing(), direct)).start()
        assert not direct._server.is_serving()

    node_of = lambda transport: minitor.Node(b"h" * 32, transport)
    run(test())


def test_a_direct_connection_is_made_only_where_it_was_allowed():
    async def test():
        tor = Tor(Network())
        one, two = [minitor.load_identity(bytes([i]) * 32) for i in (1, 2)]
        ours = minitor.HybridTransport(minitor.TorTransport(tor, one), minitor.DirectTransport())
        direct = minitor.DirectTransport()
        theirs = minitor.HybridTransport(minitor.TorTransport(tor, two), direct)
        async with minitor.Node(one, ours) as a, minitor.Node(two, theirs) as b:
            # By Tor, while that works; its stream is private, the other is not.
            ours.allow(b.address, direct.address)
            link = a.link(b.address)
            await link.ready(5)
            assert link._pipe._out is None
            tor.error = minitor.CircuitError("no guard")
            tor.net.cut()
            await link.send(b"now directly")
            back = await b.__anext__()
            assert await back.receive(5) == b"now directly"
            assert link._pipe._out and back._pipe._out
            await link.flush(5)
            ours.allow(b.address, None)
            link._cut(link._pipe, None)
            with pytest.raises(minitor.NetworkError):
                await a.link(b.address, protocol="other", retry=False).ready(5)
            assert not link.up

    run(test())


def test_a_stranger_who_is_there_at_the_end_leaves_no_traceback():
    warnings = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, what: warnings.append(what))
        async with minitor.Node(bytes(32), minitor.DirectTransport()) as node:
            host, port = minitor.split_address(node.address)
            await asyncio.open_connection(host, port)
            while not node._greetings:
                await asyncio.sleep(0.01)

    asyncio.run(main())
    assert not warnings
