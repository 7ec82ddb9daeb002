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
