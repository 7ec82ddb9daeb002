"""Agents that advertise what they can do, find each other, and call each other.

    python examples/agents.py             over Tor, each at an onion address of its own
    python examples/agents.py --direct    on this machine alone, without Tor, to try it

Three of them: one counts words, one adds numbers, one asks for both. They know the address of the
first and nothing else. To let them run on machines of their own, give each its `main` and the
address that the first prints.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path

# To run from a clone; not needed where minitor is installed, or lies beside the program.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import minitor

# ── What the agents can do: functions from JSON to JSON ──


def words(text):
    return len(str(text).split())


def total(numbers):
    return sum(float(n) for n in numbers)


# ── An agent ──


class Agent:
    """`skills`: {name: function}; `tor`: None for direct connections."""

    def __init__(self, skills, tor=None):
        key = os.urandom(32)  # or a folder, where it is kept
        transport = minitor.TorTransport(tor, key) if tor else minitor.DirectTransport()
        self.skills, self.direct, self.node = skills, not tor, minitor.Node(key, transport)

    async def start(self, contacts):
        """Listen, get to know the others by `contacts`, tell what this agent can do."""
        await self.node.start()
        self.calls = minitor.Calls(self.node, "agents", self.answer)
        self.peers = minitor.Discovery.over(self.node, self.direct)
        self.contact = self.node.key, self.node.address
        # Where to call an agent over Tor follows from its key; else its advertisement says it.
        where = self.node.address.encode() if self.direct else b""
        port = int(self.node.address.rpartition(":")[2])
        services = {name: (port, where) for name in self.skills}
        self.staying = asyncio.ensure_future(self.peers.stay(contacts, services))

    async def close(self):
        self.staying.cancel()
        await self.node.close(1)

    def answer(self, caller, request):
        """Do what another agent asks for; `caller`: its key, which it has proven."""
        try:
            name, argument = json.loads(request)
            return json.dumps({"result": self.skills[name](argument)}).encode()
        except (KeyError, TypeError, ValueError) as e:
            return json.dumps({"error": "%s: %s" % (type(e).__name__, e)}).encode()

    async def ask(self, name, argument, seconds=120):
        """Find agents who can do `name`, and return the first answer; TorError."""
        end = time.monotonic() + seconds
        while True:
            error = None
            for found in await self.peers.discover(name):
                port, where = found.services[name]
                where = where.decode() if self.direct else "%s:%d" % (found.address, port)
                try:
                    request = json.dumps([name, argument]).encode()
                    reply = json.loads(await self.calls.call((found.key, where), request))
                    return reply["result"] if "result" in reply else reply
                except (minitor.TorError, ValueError, TypeError) as e:
                    error = e  # the next, then
            if time.monotonic() > end:
                raise error or minitor.DiscoveryError("nobody can do " + name)
            await asyncio.sleep(1)


async def main(direct):
    async with contextlib.AsyncExitStack() as stack:
        tor = None if direct else await stack.enter_async_context(minitor.AsyncTor())
        agents = [Agent(skills, tor) for skills in ({"words": words}, {"total": total}, {})]
        for agent in agents:
            await agent.start([agents[0].contact] if agent is not agents[0] else [])
            stack.push_async_callback(agent.close)
            print("an agent at", agent.node.address, flush=True)
        asker = agents[2]
        print("words:", await asker.ask("words", "the quick brown fox"))
        print("total:", await asker.ask("total", [1, 2, 3.5]))
        print("of nothing:", await asker.ask("total", "x"))


if __name__ == "__main__":
    try:
        asyncio.run(main("--direct" in sys.argv[1:]))
    except KeyboardInterrupt:
        pass
    except minitor.TorError as e:
        sys.exit("agents: %s" % e)
