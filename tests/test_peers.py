"""Section 18, links: over a network in memory whose connections are cut, late, lost or hostile."""

import asyncio

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
def test_cuts_at_every_byte_lose_and_repeat_nothing(quick, private):
    async def cut_after(offset):
        # Both dial; cut after `offset` bytes, and again and again.
        net = Network(private=private)
        net.left = offset
        a, b = [await node(net, name).start() for name in ("anna", "berta")]
        link, back = a.link(b.key, "berta"), b.link(a.key, "anna")
        heard, echoed = [], []

        async def recut():
            while net.cuts < 5:
                await asyncio.sleep(0)
                if net.left is None and offset is not None:
                    net.left = 97 + offset

        cutting = asyncio.ensure_future(recut())
        await asyncio.gather(
            talk(link, 12, (1, 40)), talk(back, 12, (30, 2)), hear(back, 12, heard),
            hear(link, 12, echoed))
        cutting.cancel()
        net.left = None
        await link.flush(10)
        await back.flush(10)
        await a.close()
        await b.close()
        assert heard == echoed == list(range(12)), offset
        return net

    async def every():
        whole = (await cut_after(None)).moved
        assert whole > 1000
        for first in range(0, 1000, 100):
            nets = await asyncio.gather(*map(cut_after, range(first, first + 100)))
            assert all([net.cuts for net in nets])

    run(every())
