"""Four members (or 3f + 1) agree on one log, over Tor, though one of them (f) may be faulty.

    python examples/federation.py --key DIR                     prints the address of a new member
    python examples/federation.py --key DIR ADDRESS...          the addresses of all members, or
    python examples/federation.py --key DIR --members FILE      a file with one in each line
    python examples/federation.py --key DIR --direct 192.0.2.1:7717 --members FILE

Each line of standard input becomes an entry of the log (--every SECONDS makes some up); all
members print the same entries in the same order, with the round and a digest of all up to there.
--direct is for a network where everybody may see who talks with whom: there a member's line in the
file is ADDRESS.onion HOST:PORT, as the onion address is its key.

Agreement is asynchronous: no clock decides anything, a slow network only makes it slow.  A round is
a common subset (Ben-Or, Kelmer, Rabin: Asynchronous secure computations with optimal resilience,
PODC 1994) of the members' batches, by the reliable broadcast and the binary consensus of Bracha
(Asynchronous Byzantine agreement protocols, Information and Computation 75, 1987), with a coin of
its own for each member.  No signatures but those of the links.  What holds, with at most f of
3f + 1 members faulty, silent or lying: all have the same log; each round has the batches of f + 1
honest members at least; each round ends with probability 1.  Of four members that is true even
where an adversary who sees the coins chooses the order of all messages: which value more than half
can name is settled before the first coin falls, so each phase is the last but one with probability
1/8 at least; mostly the first is the last.  (Many members would want common coins, and so keys
that somebody deals out.)

A member that was cut off goes on where it was: links keep up to 1 MB for it, and what it missed
beyond that are results that f + 1 members tell alike.  Who was away for more than 500 to 1000
rounds gets the digest of all before, and says which it has missed.  A member that was started anew
has forgotten what it said in the round that goes on, and counts as faulty until that is over; what
it had not got into the log is lost.  If all are started anew, so is the log.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import minitor

# Characters of a batch; phases, and rounds, that messages may be ahead; rounds that a member may be
# ahead of all but f; results told at once; rounds from one mark to the next.
BATCH, PHASES, AHEAD, LEAD, BURST, KEEP = 4096, 8, 2, 16, 16, 500
PLAIN = 2


class Agreement:
    """Binary consensus (Bracha 1987, section 4) of `n` members: `decided` is None, 0 or 1.

    A phase has three steps; `place` counts them all.  cast(place, value) broadcasts reliably, and
    take(...) gets what was; toss() returns 0 or 1.  Values of the third step: 0 or 1 (which more
    than half of the members said), or PLAIN.
    """

    def __init__(self, n, cast, toss):
        self.n, self.f, self.cast, self.toss = n, (n - 1) // 3, cast, toss
        self.place = self.decided = None
        self.due, self.last = False, None
        # {place: {member: value}}: what came, and of that what a member may say by the rules.
        self.came, self.valid = {}, {}

    def enter(self, value):
        if self.place is None:
            self.place, self.value, self.due = 0, value, True
            self.go()

    def take(self, member, place, value):
        self.came.setdefault(place, {})[member] = value
        self.go()

    def counts(self, values):
        return [values.count(value) for value in (0, 1, PLAIN)]

    def possible(self, place, value):
        """Whether some n - f valid messages of the step before lead to `value`."""
        n, f = self.n, self.f
        if value == PLAIN and place % 3 < 2:
            return False
        if not place:
            return True
        count = self.counts(list(self.valid.get(place - 1, {}).values()))
        if sum(count) < n - f:
            return False
        if place % 3 == 1:
            return count[value] > f
        if place % 3 == 2 and value == PLAIN:
            return sum(min(c, n // 2) for c in count[:2]) >= n - f
        if place % 3 == 2:
            return 2 * count[value] > n
        return count[value] > f or count[PLAIN] + min(f, count[0] + count[1]) >= n - f

    def go(self):
        for place in sorted(self.came):
            rest = self.came[place]
            for member in [m for m in rest if self.possible(place, rest[m])]:
                self.valid.setdefault(place, {})[member] = rest.pop(member)
        while self.place is not None and self.place != self.last:
            # Who has decided goes on only if somebody else has to.
            if self.due and (self.decided is None or self.place <= max(self.came)):
                self.due = False
                self.cast(self.place, self.value)
            votes = list(self.valid.get(self.place, {}).values())[: self.n - self.f]
            if self.due or len(votes) < self.n - self.f:
                break
            self.step(self.counts(votes))

    def step(self, count):
        best = int(count[1] > count[0])
        if self.place % 3 == 0:
            self.value = best
        elif self.place % 3 == 1:
            self.value = best if 2 * count[best] > self.n else PLAIN
        else:
            self.value = best if count[best] > self.f else self.toss()
            if count[best] > 2 * self.f and self.decided is None:
                # All decide in the next phase at the latest.
                self.decided, self.last = best, self.place + 4
        self.place, self.due = self.place + 1, True


class Round:
    """The batches of one round: a reliable broadcast of each, and an agreement whether it counts.

    tell(kind, tag, value) sends to all members, this one too.  A tag is (who broadcasts, which
    agreement, place in it); -1 for the agreement means the batch itself.  `result`: the batches,
    None for those that do not count.
    """

    def __init__(self, n, me, tell, toss):
        self.n, self.f, self.me, self.tell = n, (n - 1) // 3, me, tell
        # What this member said, {(kind, tag): value}, and what each did, {… : {member: value}}.
        self.said, self.heard, self.batches, self.result = {}, {}, {}, None
        self.agreements = [Agreement(n, self.caster(i), toss) for i in range(n)]

    def caster(self, i):
        return lambda place, value: self.say("send", (self.me, i, place), value)

    def say(self, kind, tag, value):
        if (kind, tag) not in self.said:
            self.said[kind, tag] = value
            self.tell(kind, tag, value)

    def fits(self, sender, kind, tag, value):
        origin, i, place = tag
        if not (0 <= origin < self.n and -1 <= i < self.n) or kind == "send" and sender != origin:
            return False
        if i < 0:
            return place == 0 and type(value) is str and len(value) <= BATCH
        most = (self.agreements[i].place or 0) + 3 * PHASES
        return 0 <= place <= most and type(value) is int and 0 <= value <= PLAIN

    def hear(self, sender, kind, tag, value):
        """Bracha 1987, section 3."""
        if not self.fits(sender, kind, tag, value):
            return
        votes = self.heard.setdefault((kind, tag), {})
        if sender in votes:
            return
        votes[sender] = value
        count = list(votes.values()).count(value)
        if kind == "send":
            self.say("echo", tag, value)
        elif kind == "echo" and 2 * count > self.n + self.f or kind == "ready" and count > self.f:
            self.say("ready", tag, value)
        if kind == "ready" and count == 2 * self.f + 1:
            self.accept(tag, value)

    def accept(self, tag, value):
        origin, i, place = tag
        if i < 0:
            self.batches[origin] = value
            self.agreements[origin].enter(1)
        else:
            self.agreements[i].take(origin, place, value)
        decided = [a.decided for a in self.agreements]
        if decided.count(1) >= self.n - self.f:
            for agreement in self.agreements:
                agreement.enter(0)
        if None not in decided and all(i in self.batches for i in range(self.n) if decided[i]):
            self.result = [self.batches[i] if decided[i] else None for i in range(self.n)]


class Member:
    """The log of member `me` of `n`, without a network: messages in, messages out.

    sendings(): what is to be sent, as (member, or None for all others; a list for JSON).
    on_result(number, batches, digest); batches None: rounds up to this one were missed.
    """

    def __init__(self, n, me, on_result, toss=random.SystemRandom().getrandbits):
        self.n, self.f, self.me, self.on_result = n, (n - 1) // 3, me, on_result
        self.toss = lambda: toss(1)
        self.number, self.digest, self.rounds, self.passed = 0, bytes(32), {}, [0] * n
        # Results and, every KEEP rounds, the digest; what others claim that these are.
        self.results, self.marks, self.claims, self.jumps = {}, {0: bytes(32)}, {}, {}
        self.pending, self.mine, self.out, self.own, self.answered = [], None, [], [], set()
        self.seen, self.still = 0, 0

    # Messages

    def propose(self, line):
        self.pending.append(line[: BATCH // 8])
        self.settle()

    def sendings(self):
        out, self.out = self.out, []
        self.answered.clear()
        return out

    def handle(self, sender, messages):
        """Take messages; what is none is dropped."""
        for message in messages if type(messages) is list else ():
            try:
                self.take(sender, *message)
            except (ValueError, TypeError):
                continue
        self.settle()

    def take(self, sender, kind, number, *rest):
        if type(number) is not int or not 0 <= number < 1 << 60:
            return
        if kind in ("send", "echo", "ready"):
            (origin, i, place), value = rest
            if all(type(x) is int for x in (origin, i, place)):
                self.hear(sender, kind, number, (origin, i, place), value)
        elif kind in ("done", "want", "result", "jump"):
            getattr(self, kind)(sender, number, *rest)

    def hear(self, sender, kind, number, tag, value):
        if number in self.rounds or self.number <= number <= self.number + AHEAD:
            self.round(number).hear(sender, kind, tag, value)

    def done(self, sender, number):
        self.passed[sender] = max(self.passed[sender], number)

    def want(self, sender, number):
        """Tell `sender`, who is at `number`, what it needs from there on."""
        if sender in self.answered:
            return
        self.answered.add(sender)
        self.greet(sender)
        first = min(self.marks)
        if number < first:
            self.out.append((sender, ["jump", first, self.marks[first].hex()]))
        for n in range(max(number, first), min(number + BURST, self.number)):
            self.out.append((sender, ["result", n, self.results[n]]))
        for n in self.rounds:
            if n >= number:
                self.repeat(sender, n)

    def repeat(self, who, number):
        said = self.rounds[number].said.items()
        self.out += [(who, [kind, number, tag, value]) for (kind, tag), value in said]

    def result(self, sender, number, batches):
        fits = type(batches) is list and len(batches) == self.n
        if fits and all(b is None or type(b) is str and len(b) <= BATCH for b in batches):
            if self.number <= number < self.number + BURST:
                self.claims.setdefault(number, {})[sender] = batches

    def jump(self, sender, number, digest):
        self.jumps[sender] = number, bytes.fromhex(digest)
        if number > self.number and list(self.jumps.values()).count(self.jumps[sender]) > self.f:
            self.number, self.digest = self.jumps[sender]
            self.rounds = {n: r for n, r in self.rounds.items() if n >= number}
            self.results, self.marks, self.claims, self.mine = {}, {number: self.digest}, {}, None
            self.on_result(number - 1, None, self.digest)
            self.ask()

    # Inside

    def round(self, number):
        if number not in self.rounds:
            def tell(kind, tag, value):
                self.own.append((kind, number, tag, value))
                self.out.append((None, [kind, number, tag, value]))

            self.rounds[number] = Round(self.n, self.me, tell, self.toss)
        return self.rounds[number]

    def behind(self):
        return sorted(self.passed)[-1 - self.f] > self.number

    def settle(self):
        """Go on as far as what was heard leads."""
        told = False
        while True:
            while self.own:
                kind, number, tag, value = self.own.pop(0)
                self.hear(self.me, kind, number, tag, value)
            claims = list(self.claims.get(self.number, {}).values())
            result = [batches for batches in claims if claims.count(batches) > self.f][:1]
            told |= bool(result)
            if self.number in self.rounds and self.rounds[self.number].result:
                result = [self.rounds[self.number].result]
            if result:
                self.finish(result[0])
            elif not self.begin():
                break
        if told and self.number not in self.claims:
            # What was said meanwhile in the round that goes on was too far ahead.
            self.ask()

    def begin(self):
        """Broadcast the batch of this round, once there is a reason; whether that was done."""
        ready = sum(p + LEAD >= self.number for p in self.passed) >= self.n - self.f
        begun = self.mine and self.mine[0] == self.number
        if begun or not ready or not (self.pending or self.number in self.rounds):
            return False
        lines, size = [], 2
        for line in self.pending:
            size += len(json.dumps(line)) + 2
            if size > BATCH:
                break
            lines.append(line)
        batch = json.dumps(lines)
        self.mine = self.number, batch, len(lines)
        self.round(self.number).say("send", (self.me, -1, 0), batch)
        return True

    def finish(self, batches):
        text = json.dumps(batches)
        self.digest = hashlib.sha256(self.digest + text.encode()).digest()
        self.results[self.number] = batches
        if self.mine and self.mine[0] == self.number and batches[self.me] == self.mine[1]:
            del self.pending[: self.mine[2]]
        self.claims.pop(self.number, None)
        self.number += 1
        self.passed[self.me] = self.number
        self.greet(None)
        if self.number % KEEP == 0:
            self.marks[self.number] = self.digest
            while len(self.marks) > 2:
                self.marks.pop(min(self.marks))
            self.results = {n: r for n, r in self.results.items() if n >= min(self.marks)}
        # When n - f have passed a round, f + 1 honest ones can tell its result.
        past = min(sorted(self.passed)[self.f], self.number)
        self.rounds = {n: r for n, r in self.rounds.items() if n >= past}
        self.on_result(self.number - 1, batches, self.digest)

    # When messages may have been lost

    def greet(self, who):
        """Tell how far this member is: who is behind will ask."""
        self.out.append((who, ["done", self.number]))

    def ask(self, who=None):
        self.out.append((who, ["want", self.number]))

    def tick(self):
        """To be called every second or so: where nothing goes on, say and ask all again."""
        going = self.number in self.rounds
        waits = self.seen == self.number and (going or self.behind())
        self.seen, self.still = self.number, self.still + 1 if waits else 0
        # After 2, 4, 8, 12 … ticks.
        if self.still > 1 and not self.still & min(self.still - 1, 3):
            if going:
                self.repeat(None, self.number)
            self.ask()


def entries(batches):
    """Yield (member, line) of a result."""
    for i, batch in enumerate(batches):
        try:
            lines = json.loads(batch or "[]")
        except (ValueError, RecursionError):
            continue
        for line in lines if type(lines) is list else ():
            if type(line) is str:
                yield i, "".join(c if c.isprintable() else "?" for c in line)


class Federation:
    """A Member at a minitor.Node (which it starts and closes): async with, `propose`.

    `members`: {key: address that is dialled}, the own one too.  on_result: see Member.
    """

    # Bytes that wait for a member that does not take them: what comes on top it will ask for.
    MOST = 1 << 20

    def __init__(self, node, members, on_result):
        self.node, self.members, self.keys = node, members, sorted(members)
        if node.key not in members or len(members) < 4 or len(members) % 3 != 1:
            raise minitor.ConfigError("4, 7, 10 … members are needed, and this one among them")
        self.member = Member(len(members), self.keys.index(node.key), on_result)
        node.allow, node.on_event = members.__contains__, self.happened
        self.links, self.tasks, self.wake, self.missed = {}, [], asyncio.Event(), set()
        # Links that others open are found by `listen`.
        node.serve("federation", lambda link: asyncio.sleep(0))

    async def __aenter__(self):
        await self.node.start()
        for i, key in enumerate(self.keys):
            if key != self.node.key:
                self.tasks.append(asyncio.ensure_future(self.listen(i)))
        self.tasks += [asyncio.ensure_future(self.speak()), asyncio.ensure_future(self.tick())]
        return self

    async def __aexit__(self, *_):
        for task in self.tasks:
            task.cancel()
        try:
            await self.node.close(1)
        except minitor.LinkError:
            # Whoever is away asks the others.
            pass

    async def propose(self, line):
        """Have `line` come into the log; waits while many do not get there."""
        while len(self.member.pending) >= 1000:
            await asyncio.sleep(0.1)
        self.member.propose(line)
        self.wake.set()

    def happened(self, link, event, detail):
        if event == "up" and link.peer in self.members:
            self.member.ask(self.keys.index(link.peer))
            self.wake.set()

    async def listen(self, i):
        key = self.keys[i]
        while True:
            self.links[i] = self.node.link(key, self.members[key], "federation")
            async for data in self.links[i]:
                try:
                    messages = json.loads(data)
                except (ValueError, RecursionError):
                    continue
                self.member.handle(i, messages)
                self.wake.set()
            # It was closed in order; the member may come back.
            await asyncio.sleep(0.1)

    async def speak(self):
        while True:
            await self.wake.wait()
            self.wake.clear()
            out = self.member.sendings()
            for i, link in list(self.links.items()):
                messages = [message for to, message in out if to in (None, i)]
                if messages and link.buffered < self.MOST:
                    try:
                        await link.send(json.dumps(messages, separators=(",", ":")).encode())
                        continue
                    except minitor.LinkError:
                        # It was started anew, or has left.
                        pass
                if messages:
                    self.missed.add(i)

    async def tick(self):
        while True:
            await asyncio.sleep(1)
            self.member.tick()
            for i in [i for i in self.missed if self.links[i].buffered < self.MOST]:
                self.missed.discard(i)
                self.member.greet(i)
            self.wake.set()


def read_members(lines):
    """{key: address} from lines of "….onion[:port] [HOST:PORT]"."""
    members = {}
    for line in lines:
        words = line.split("#")[0].split()
        if words:
            key = minitor.parse_onion_address(minitor.split_address(words[0])[0])
            members[key] = words[-1]
    return members


async def take_lines(federation, every):
    if every:
        for i in range(1 << 60):
            await federation.propose("entry %d, %s" % (i + 1, time.strftime("%H:%M:%S")))
            await asyncio.sleep(every)
    loop = asyncio.get_running_loop()

    def read():
        for line in sys.stdin:
            if line.strip():
                asyncio.run_coroutine_threadsafe(federation.propose(line.strip()), loop).result()

    # None that the end of the program waits for.
    threading.Thread(target=read, daemon=True).start()
    await asyncio.Event().wait()


async def run(key, members, direct, every):
    with contextlib.suppress(NotImplementedError):  # Windows
        # Before Python 3.11 KeyboardInterrupt would come in the midst of any task, and end them
        # all before what they have to say to the others is said.
        cancel = asyncio.current_task().cancel
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, cancel)
    names = [minitor.onion_address(key)[:8] for key in sorted(members)]

    def show(number, batches, digest):
        if batches is None:
            print("(rounds up to %d were missed)" % number, flush=True)
        for i, line in entries(batches or ()):
            print("%d %s %s: %s" % (number, digest.hex()[:8], names[i], line), flush=True)

    async def serve(transport):
        node = minitor.Node(key, transport)
        async with Federation(node, members, show) as federation:
            print("this member is %s" % names[federation.member.me], file=sys.stderr)
            await take_lines(federation, every)

    if direct:
        await serve(minitor.DirectTransport(direct))
    else:
        def progress(percent, tag, summary):
            print("%d%% (%s)" % (percent, summary), file=sys.stderr)

        async with minitor.AsyncTor(os.path.join(key, "tor"), progress=progress) as tor:
            await serve(minitor.TorTransport(tor, key))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("addresses", nargs="*", metavar="ADDRESS", help="of all members")
    parser.add_argument("--key", required=True, metavar="DIR", help="this member's key; is made")
    parser.add_argument("--members", metavar="FILE", help="addresses, one in each line")
    parser.add_argument("--direct", metavar="HOST:PORT", help="no Tor: listen there")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="add an entry that often")
    options = parser.parse_args()
    try:
        _, public = minitor.load_identity(options.key)
        lines = options.addresses
        if options.members:
            lines = lines + Path(options.members).read_text().splitlines()
        if not lines:
            return print(minitor.onion_address(public))
        asyncio.run(run(options.key, read_members(lines), options.direct, options.every))
    except (minitor.TorError, OSError) as e:
        sys.exit("federation: %s" % e)
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass


if __name__ == "__main__":
    main()
