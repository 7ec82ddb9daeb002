"""Section 12: bandwidth weights, path restrictions, guards, vanguards-lite."""

import base64
import ipaddress
import itertools
import json
import os
import random
import re
from pathlib import Path

import pytest

import minitor
from minitor import BADEXIT, EXIT, FAST, GUARD, MIDDLEONLY, NOEDCONSENSUS, STABLE, V2DIR

DAY = 86400
START = 1_800_000_000
NOWHERE = "missing-folder/guards.json"
REAL = Path(os.environ.get("MINITOR_REAL", Path(__file__).parents[2] / "shared" / "real"))
PROTOCOLS = (
    minitor.RELAY2
    | minitor.FLOWCTRL1
    | minitor.HSINTRO4
    | minitor.HSREND2
    | minitor.HSDIR2
)
PLAIN = FAST | STABLE | V2DIR | PROTOCOLS
# Those of the public network's consensus of 2024-05-17.
WEIGHTS = {
    "Wbd": 0, "Wbe": 0, "Wbg": 3248, "Wbm": 10000, "Wdb": 10000, "Web": 10000,
    "Wed": 10000, "Wee": 10000, "Weg": 10000, "Wem": 10000, "Wgb": 10000, "Wgd": 0,
    "Wgg": 6752, "Wgm": 6752, "Wmb": 10000, "Wmd": 0, "Wme": 0, "Wmg": 3248, "Wmm": 10000,
}  # fmt: skip


def rsa_id(n):
    return n.to_bytes(20, "big")


DEFAULT = lambda name, default, *_: default


def pareto(n, least, alpha, seed=1):
    rng = random.Random(seed)
    return [int(least * rng.random() ** (-1 / alpha)) for _ in range(n)]


def test_a_build_timeout_is_learned_after_a_hundred_circuits(tmp_path):
    times = minitor.BuildTimes(str(tmp_path / "times"))
    for ms in pareto(99, 1000, 2):
        assert times.learning(DEFAULT) and times.ms(DEFAULT) == 60000
        times.add(ms, DEFAULT)
    times.add(1500, DEFAULT)
    assert not times.learning(DEFAULT)
    # Eight of ten circuits are in time; circuits of other lengths get time accordingly.
    limit, seen = times.ms(DEFAULT), sorted(times.times)
    assert 70 < sum(ms <= limit for ms in seen) < 90
    assert times.ms(DEFAULT, 4) == pytest.approx(limit * 10 / 6)
    assert times.ms(DEFAULT, 1) == pytest.approx(limit / 6)
    # It is known after a restart, nearly.
    again = minitor.BuildTimes(str(tmp_path / "times"))
    assert again.times == times.times and again.ms(DEFAULT) == limit
    # Only the last thousand count.
    for ms in pareto(1000, 1000, 2, seed=2):
        times.add(ms, DEFAULT)
    assert len(times.times) == 1000 and times.times == pareto(1000, 1000, 2, seed=2)


@pytest.mark.parametrize("alpha,least", [(1.5, 800), (3, 2000), (10, 600)])
def test_the_estimate_is_paretos(alpha, least):
    times = minitor.BuildTimes("/nowhere/times")
    times.times = pareto(1000, least, alpha)
    exact = least * 0.2 ** (-1 / alpha)
    assert times.ms(DEFAULT) == pytest.approx(exact, rel=0.15)


def test_an_estimate_keeps_its_bounds():
    # Not above what was ever seen, nor below what this machine's own work may take.
    for stored, limit in (([1000] * 100, 1000), ([5] * 200, 500), ([1] * 10 + [4000] * 99, 4000)):
        times = minitor.BuildTimes("/nowhere/times")
        times.times = stored
        assert times.ms(DEFAULT) == pytest.approx(limit)
    off = lambda name, default, *_: 1 if name == "cbtdisabled" else default
    times = minitor.BuildTimes("/nowhere/times")
    times.times = [1000] * 200
    assert times.ms(off) == 60000 and not times.learning(off)


def test_another_network_is_learned_anew(tmp_path):
    times = minitor.BuildTimes(str(tmp_path / "times"))
    for _ in range(100):
        times.add(1000, DEFAULT)
    assert times.ms(DEFAULT) == 1000
    # What fails at once is not late.
    for _ in range(30):
        times.add(10, DEFAULT, False)
    assert len(times.times) == 100 and times.ms(DEFAULT) == 1000
    for i in range(18):
        assert times.ms(DEFAULT) <= 1001
        times.add(30000, DEFAULT, False)
    assert not times.times and times.ms(DEFAULT) == 60000
    # A timeout that is the first one doubles.
    for _ in range(18):
        times.add(60001, DEFAULT, False)
    assert times.ms(DEFAULT) == 120000


@pytest.mark.parametrize("text", ["", "{", "{}", "[1, \"x\"]", "[-5, 1e400]", "[null]", "7"])
def test_damaged_build_times(tmp_path, text):
    (tmp_path / "times").write_text(text)
    minitor.set_log(minitor.ERR)
    try:
        assert minitor.BuildTimes(str(tmp_path / "times")).ms(DEFAULT) == 60000
    finally:
        minitor.set_log(minitor.NOTICE)


def microdesc(n, policy=b"", family=(), family_ids=()):
    keys = b"e" + n.to_bytes(31, "big") + b"n" + n.to_bytes(31, "big")
    return keys, (policy, b"".join(rsa_id(m)[:4] for m in family), b"".join(family_ids))


def make_consensus(weights=WEIGHTS, **params):
    consensus = minitor.Consensus(
        b"network-status-version 3 microdesc\nvote-status consensus\nconsensus-method 33\n"
        b"valid-after 2026-01-01 00:00:00\nfresh-until 2026-01-01 01:00:00\n"
        b"valid-until 2026-01-01 03:00:00"
    )
    consensus.bandwidth_weights = dict(weights)
    consensus.params = {name.replace("_", "-"): value for name, value in params.items()}
    return consensus


class Net:
    """A table of relays that a test describes one by one."""

    def __init__(self, first=1):
        self.table = minitor.RelayTable()
        self._first = first

    def id(self, i):
        return self.table.relay(i).rsa_id

    def add(self, flags, weight=1000, address=None, net6=0, policy=b"", usable=True, **families):
        i = len(self.table)
        flags |= PLAIN
        self.table.add(
            rsa_id((i + self._first) << 130),
            bytes(32),
            address or bytes((10 + i // 256, i % 256, 0, 1)),
            9001,
            net6,
            flags,
            weight,
        )
        if flags & EXIT and not policy:
            policy = b"accept 80,443"
        if usable:
            members = [(m + self._first) << 130 for m in families.pop("family", ())]
            self.table.set_microdesc(i, *microdesc(i, policy, members, **families))
        return i


def network(guards=30, exits=10, middles=20):
    net = Net()
    for _ in range(guards):
        net.add(GUARD)
    for _ in range(exits):
        net.add(EXIT)
    for _ in range(middles):
        net.add(0)
    return net


@pytest.fixture
def clock(monkeypatch):
    """The time, in clock[0]; every random choice from one seed."""
    at = [START]
    monkeypatch.setattr(minitor, "now", lambda: at[0])
    monkeypatch.setattr(minitor, "randbelow", random.Random(12).randrange)
    return at


def selector(table, consensus=None, path=None):
    return minitor.PathSelector(table, consensus or make_consensus(), path or NOWHERE)


def indexes(path):
    return [relay.index for relay in path]


# ── weights ──


def factors(weights, position, *kinds):
    """Return the weights of relays of those flags, with a bandwidth of 1."""
    net = Net()
    for flags in kinds:
        net.add(flags, weight=1)
    chooser = minitor.PathSelector(net.table, make_consensus(weights), None)
    return [w for _, w in chooser.weigh(position, FAST)]


def test_weights_per_position():
    kinds = (GUARD, GUARD | EXIT, EXIT, 0)
    assert factors(WEIGHTS, "g", GUARD) == [6752]
    # Nothing has no chance at all, or a network where all weights are 0 had no path.
    assert factors(WEIGHTS, "m", *kinds) == [3248, 1, 1, 10000]
    assert factors(WEIGHTS, "e", *kinds) == [10000] * 4


@pytest.mark.parametrize("broken", [{}, dict(WEIGHTS, Wmg=-1), {"Wmg": 5}])
def test_malformed_weights_count_all_alike(broken):
    assert factors(broken, "m", GUARD, GUARD | EXIT, EXIT, 0) == [1] * 4


def chi_square(counts, expected):
    return sum((counts.get(k, 0) - e) ** 2 / e for k, e in expected.items())


def test_choice_follows_the_weights(clock):
    net = Net()
    for n in range(40):
        net.add((0, GUARD, EXIT, GUARD | EXIT)[n % 4], weight=1 + n * n)
    weights = dict(WEIGHTS, Wmd=700, Wme=1100)
    chooser = minitor.PathSelector(net.table, make_consensus(weights), None)
    exact = {}
    for n in range(40):
        factor = (10000, 3248, 1100, 700)[n % 4]
        exact[n] = (1 + n * n) * factor
    total, rounds = sum(exact.values()), 4000
    counts = {}
    for _ in range(rounds):
        i = chooser.pick("middle", lambda i: True)
        counts[i] = counts.get(i, 0) + 1
    expected = {i: w * rounds / total for i, w in exact.items() if w * rounds / total >= 5}
    # 0.999 quantile of chi square with 30 degrees of freedom: 59.7
    assert len(expected) > 20 and chi_square(counts, expected) < 60


def test_choice_among_few_acceptable_ones_follows_the_weights(clock):
    net = Net()
    for n in range(60):
        net.add(0, weight=1000 if n > 3 else 1 + n)
    chooser = minitor.PathSelector(net.table, make_consensus(), None)
    counts = {}
    for _ in range(1000):
        i = chooser.pick("middle", lambda i: i < 4)
        counts[i] = counts.get(i, 0) + 1
    assert chi_square(counts, {0: 100, 1: 200, 2: 300, 3: 400}) < 17


def test_choice_where_nothing_has_a_weight_is_uniform(clock):
    net = Net()
    for _ in range(4):
        net.add(0, weight=0)
    chooser = minitor.PathSelector(net.table, make_consensus(), None)
    picked = [chooser.pick("middle", lambda i: True) for _ in range(400)]
    assert chi_square({i: picked.count(i) for i in range(4)}, dict.fromkeys(range(4), 100)) < 17


def test_largest_weights_do_not_overflow(clock):
    net = Net()
    for _ in range(3):
        net.add(0, weight=0xFFFFFFFF)
    consensus = make_consensus(dict.fromkeys(WEIGHTS, 2**31 - 1), bwweightscale=2**31 - 1)
    chooser = minitor.PathSelector(net.table, consensus, None)
    assert {chooser.pick("middle", lambda i: True) for _ in range(60)} == {0, 1, 2}


def test_percent_counts_bandwidth_of_each_position(clock):
    net = Net()
    for usable in (True, True, False, True):
        net.add(GUARD, usable=usable, weight=100)
        net.add(EXIT, usable=True)
    chooser = minitor.PathSelector(net.table, make_consensus(dict(WEIGHTS, Wme=10000)), None)
    # 75 % of the guards, 99 % of the middles' bandwidth, all exits
    assert chooser.percent() == 74 or chooser.percent() == 73
    for i in range(len(net.table)):
        net.table.set_microdesc(i, *microdesc(i, b"accept 80"))
    assert chooser.percent() == 100


# ── restrictions ──


def test_exit_path_is_guard_middle_exit(clock):
    net = network()
    paths = selector(net.table)
    seen = set()
    for _ in range(100):
        guard, middle, last = paths.exit_path(443)
        assert guard.flags & GUARD and last.flags & EXIT and not middle.flags & EXIT
        assert len({guard.index, middle.index, last.index}) == 3
        seen.add(guard.index)
    assert len(seen) == 1


def test_bad_exits_are_no_exits(clock):
    net = network(exits=0)
    for flag in (BADEXIT, MIDDLEONLY, NOEDCONSENSUS):
        net.add(EXIT | flag)
    with pytest.raises(minitor.CircuitError) as error:
        selector(net.table).exit_path(80)
    assert "exit" in str(error.value)
    good = net.add(EXIT)
    assert selector(net.table).exit_path(80)[2].index == good


def test_exit_policy(clock):
    net = network()
    ssh = net.add(EXIT, policy=b"accept 22")
    rest = net.add(EXIT, policy=b"reject 22,80,443")
    paths = selector(net.table)
    for _ in range(20):
        assert paths.exit_path(22)[2].index == ssh
        assert paths.exit_path(8080)[2].index == rest
        assert paths.exit_path(80)[2].index not in (ssh, rest)


def test_exit_without_the_flag_serves_if_its_policy_does(clock):
    net = network()
    odd = net.add(0, policy=b"accept 6000")
    assert selector(net.table).exit_path(6000)[2].index == odd


def test_excluded_introduction_points(clock):
    net = network(exits=0, middles=0)
    paths = selector(net.table)
    used = [net.id(i) for i in range(29)]
    for _ in range(10):
        assert paths.pick("intro", lambda i: net.id(i) not in used, STABLE) == 29
    with pytest.raises(minitor.CircuitError):
        paths.pick("intro", lambda i: i < 29 and net.id(i) not in used, STABLE)


def test_stable_relays_are_preferred_except_for_web_pages(clock):
    net = Net()
    for _ in range(25):
        net.add(GUARD)
    for i in range(10):
        net.add(EXIT, policy=b"accept 22,80")
        net.add(0)
    for i in range(25, len(net.table) - 2):
        net.table.flags[i] &= ~STABLE
    paths = selector(net.table)
    for _ in range(20):
        assert all(relay.flags & STABLE for relay in paths.exit_path(22))
    assert not all(paths.exit_path(80)[2].flags & STABLE for _ in range(20))


def test_stable_and_fast_are_given_up_where_none_is_left(clock):
    net = Net()
    for _ in range(25):
        net.add(GUARD)
    for flag in (EXIT, EXIT, 0, 0):
        i = net.add(flag, policy=b"accept 22" if flag else b"")
        net.table.flags[i] &= ~(STABLE | FAST)
    assert selector(net.table).exit_path(22)[2].flags & EXIT


def test_relays_without_needed_protocols_are_passed_over(clock):
    net = network(exits=1)
    net.table.flags[30] &= ~minitor.FLOWCTRL1
    with pytest.raises(minitor.CircuitError):
        selector(net.table).exit_path(80)


def test_relays_without_microdescriptor_are_passed_over(clock):
    net = network(guards=21, exits=0, middles=0)
    missing = [net.add(EXIT, weight=10**6, usable=False) for _ in range(5)]
    net.add(EXIT)
    net.add(0)
    paths = selector(net.table)
    for _ in range(20):
        assert not set(missing) & set(indexes(paths.exit_path(80)))


@pytest.mark.parametrize("kind", ["net", "net6", "family", "family id"])
def test_related_relays_share_no_path(clock, kind):
    net = Net()
    related = {
        "net": {"address": b"\x20\x21\x01\x01"},
        "net6": {"net6": 0x20010DB8},
        "family": {"family": range(3)},
        "family id": {"family_ids": (b"12345678",)},
    }[kind]
    net.add(EXIT, **related)
    net.add(GUARD, **related)
    net.add(0, **related)
    for _ in range(2):
        net.add(GUARD)
        net.add(0)
    paths = selector(net.table)
    for _ in range(50):
        assert set(indexes(paths.exit_path(80))) & {1, 2} == set()


def test_one_sided_family_is_none(clock):
    net = Net()
    net.add(EXIT, family=(1,))
    net.add(GUARD)
    assert minitor.distinct(net.table, 0, 1)


def test_no_path_is_a_circuit_error(clock):
    for net in (Net(), network(guards=1, exits=1, middles=0), network(guards=0)):
        paths = selector(net.table)
        for choose in (
            lambda: paths.exit_path(80),
            lambda: paths.onion_path(),
        ):
            with pytest.raises(minitor.CircuitError):
                choose()
    with pytest.raises(minitor.CircuitError):
        selector(Net().table).guard()


# ── guards ──


def ids(guards):
    return [g.rsa_id for g in guards]


def test_sample_and_primary(clock):
    net = network(guards=200)
    paths = selector(net.table)
    assert len(paths.sample) == 20
    assert paths.primary() == paths.sample[:3]
    for g in paths.sample:
        assert net.table.flags[g.index] & GUARD
        assert START + 108 * DAY < g.until <= START + 120 * DAY
    assert {paths.guard().rsa_id for _ in range(20)} == {paths.sample[0].rsa_id}
    directories = {paths.guard(kind="dir-guards", use=3).rsa_id for _ in range(50)}
    assert directories == set(ids(paths.sample[:3]))


def test_parameters_of_the_consensus(clock):
    net = network(guards=200)
    consensus = make_consensus(
        guard_n_primary_guards_to_use=2,
        guard_n_primary_dir_guards_to_use=1,
        guard_min_filtered_sample_size=5,
        guard_n_primary_guards=4,
    )
    paths = selector(net.table, consensus)
    assert len(paths.sample) == 5 and len(paths.primary()) == 4
    assert {paths.guard().rsa_id for _ in range(50)} == set(ids(paths.sample[:2]))
    assert paths.guard(kind="dir-guards", use=3).rsa_id == paths.sample[0].rsa_id


def test_guards_need_their_flags(clock):
    for flag in (FAST, STABLE, V2DIR, GUARD):
        net = network(guards=1, middles=3)
        net.table.flags[0] &= ~flag
        with pytest.raises(minitor.CircuitError):
            selector(net.table).exit_path(80)


def test_guards_are_stored(clock, tmp_path):
    net = network(guards=100)
    path = str(tmp_path / "guards.json")
    first = selector(net.table, path=path)
    picked = first.guard().rsa_id
    assert first.succeeded(picked)
    again = selector(net.table, path=path)
    assert ids(again.sample) == ids(first.sample)
    assert [g.until for g in again.sample] == [g.until for g in first.sample]
    assert again.sample[0].confirmed and again.guard().rsa_id == picked
    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"nonsense",
        b"\xff\xfe",
        b"[1, 2]",
        b"[[1, 2, 3]]",
        b'[["zz", 1, 2]]',
        b'[["aa", 1, 2]]',
        b'[["' + b"a" * 32 + b'", null, 2]]',
        b'[["' + b"a" * 32 + b'", 1]]',
        b"[" * 100000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_damaged_file_is_not_believed(clock, tmp_path, text):
    path = tmp_path / "guards.json"
    path.write_bytes(text)
    net = network(guards=40)
    paths = selector(net.table, path=str(path))
    assert len(paths.sample) == 20
    assert len(json.loads(path.read_bytes())) == 20


def test_folder_that_cannot_be_written_does_not_stop_circuits(clock, tmp_path):
    net = network()
    paths = selector(net.table, path=str(tmp_path / "missing" / "guards.json"))
    assert len(paths.exit_path(80)) == 3


def test_guards_of_another_network_are_kept_and_not_in_the_way(clock, tmp_path):
    path = str(tmp_path / "guards.json")
    old = Net(1000)
    for _ in range(40):
        old.add(GUARD)
    before = ids(selector(old.table, path=path).primary())
    new = network(guards=30)
    paths = selector(new.table, path=path)
    # Unlisted guards count: others are sampled for the primary ones alone.
    assert len(paths._order()) == 3 and len(paths.exit_path(80)) == 3
    assert ids(selector(old.table, path=path).primary()) == before


def test_consensus_without_guards_does_not_cost_the_sample(clock):
    net = network(guards=30)
    paths = selector(net.table)
    before = ids(paths.sample)
    for i in range(30):
        net.table.flags[i] &= ~GUARD
    paths.update(net.table, make_consensus())
    assert ids(paths.sample) == before
    with pytest.raises(minitor.CircuitError):
        paths.exit_path(80)
    for i in range(30):
        net.table.flags[i] |= GUARD
    paths.update(net.table, make_consensus())
    assert ids(paths.sample) == before and len(paths.exit_path(80)) == 3


def test_unlisted_guard_is_passed_over_until_it_returns(clock):
    net = network(guards=100)
    paths = selector(net.table)
    gone = paths.sample[0]
    index = gone.index
    assert paths.succeeded(gone.rsa_id)
    net.table.flags[index] &= ~GUARD
    paths.update(net.table, make_consensus())
    assert gone.index == -1 and gone in paths.sample and gone not in paths.primary()
    assert len(paths._order()) == 19 and len(paths.primary()) == 3
    clock[0] += 10 * DAY
    net.table.flags[index] |= GUARD
    paths.update(net.table, make_consensus())
    assert gone.index == index and paths.primary()[0] is gone


@pytest.mark.parametrize("params, least, most", [
    ({}, 16, 20), ({"guard_remove_unlisted_guards_after_days": 5}, 4, 5),
])
def test_unlisted_guards_are_removed_after_some_days(clock, tmp_path, params, least, most):
    net, consensus, path = network(guards=100), make_consensus(**params), str(tmp_path / "guards")
    paths = selector(net.table, consensus, path)
    for g in list(paths.sample):
        assert paths.succeeded(g.rsa_id)
    gone = [net.table.rsa_id(g.index) for g in paths.sample]
    for g in paths.sample:
        net.table.flags[g.index] &= ~GUARD
    left = []
    for _ in range(most + 2):
        # A restart each day forgets nothing.
        paths = selector(net.table, consensus, path)
        left.append(len(set(gone) & set(ids(paths.sample))))
        assert len(paths._order()) >= 3
        clock[0] += DAY
    assert left[least - 1] == 20 and left[most] == 0 and sorted(left, reverse=True) == left
    # Not all at once, as dates are random.
    assert most - least == 1 or len(set(left)) > 3


def test_guard_that_returns_is_listed_as_long_as_ever(clock, tmp_path):
    net, path = network(guards=100), str(tmp_path / "guards")
    paths = selector(net.table, path=path)
    gone = paths.sample[0].rsa_id
    for day in range(60):
        # Away for nine days of ten.
        listed = GUARD if day % 10 == 9 else 0
        index = net.table.find(gone)
        net.table.flags[index] = net.table.flags[index] & ~GUARD | listed
        paths = selector(net.table, path=path)
        assert gone in ids(paths.sample)
        assert bool(listed) == (gone in ids(paths._order()))
        clock[0] += DAY


def test_guards_expire(clock):
    net = network(guards=100)
    paths = selector(net.table)
    confirmed = paths.sample[0]
    clock[0] += 100 * DAY
    assert paths.succeeded(paths.guard().rsa_id)
    # The date is random within a tenth of a guard's lifetime (guard-spec 4.3).
    assert START + 148 * DAY < confirmed.until <= START + 160 * DAY
    clock[0] += 21 * DAY
    others = paths.sample[1:]
    paths.update(net.table, make_consensus())
    # sampled 121 days ago: out, unless confirmed within 60 days
    assert confirmed in paths.sample and not set(others) & set(paths.sample)
    clock[0] += 60 * DAY
    paths.update(net.table, make_consensus())
    assert confirmed not in paths.sample


def test_dates_are_random(clock):
    for days, low, high in ((0, 108, 120), (100, 148, 160)):
        paths = selector(network(guards=100).table)
        clock[0] += days * DAY
        for g in list(paths.sample) if days else ():
            assert paths.succeeded(g.rsa_id)
        lives = sorted((g.until - START) / DAY for g in paths.sample)
        assert low < lives[0] < low + 4 and high - 4 < lives[-1] <= high
        assert len(set(lives)) == 20
        clock[0] = START


def test_parameters_for_the_lifetime_of_guards(clock):
    consensus = make_consensus(guard_lifetime_days=10, guard_confirmed_min_lifetime_days=30)
    paths = selector(network(guards=100).table, consensus)
    assert all(START + 9 * DAY < g.until <= START + 10 * DAY for g in paths.sample)
    first = paths.sample[0]
    assert paths.succeeded(first.rsa_id)
    assert START + 29 * DAY < first.until <= START + 30 * DAY
    paths.update(paths.table, consensus)
    assert START + 29 * DAY < first.until


def test_what_is_stored_of_guards_is_all_there_after_a_restart(clock, tmp_path):
    net, path = network(guards=100), str(tmp_path / "guards")
    paths = selector(net.table, path=path)
    for n in (7, 3):
        net.table.flags[paths.sample[n].index] &= ~GUARD
    for n in (5, 11):
        paths.online = minitor.now()
        for g in paths.primary():
            paths.failed(g.rsa_id)
        assert paths.succeeded(paths.sample[n].rsa_id)
    paths.update(net.table, make_consensus())
    again = selector(net.table, path=path)
    kept = "rsa_id until confirmed index unlisted".split()
    before, after = [[[getattr(g, name) for name in kept] for g in p.sample] for p in (paths, again)]
    assert before == after and len(before) == 20
    assert sum(g.confirmed for g in again.sample) == 2 and sum(g.index < 0 for g in again.sample) == 2


def test_guards_that_an_earlier_version_stored(clock, tmp_path):
    net, path = network(guards=100), tmp_path / "guards"
    first = selector(net.table, path=str(path)).sample
    stored = [[minitor.b32encode(g.rsa_id), g.until, int(g in first[:2])] for g in first]
    path.write_text(json.dumps(stored))
    again = selector(net.table, path=str(path))
    assert ids(again.sample) == ids(first) and [g.confirmed for g in again.sample][:3] == [1, 1, 0]
    assert not any(g.unlisted for g in again.sample)


def test_dates_that_a_wrong_clock_stored_do_not_keep_a_guard_for_ever(clock, tmp_path):
    net, path = network(guards=100), str(tmp_path / "guards")
    clock[0] += 3650 * DAY
    paths = selector(net.table, path=path)
    gone = paths.sample[0]
    net.table.flags[gone.index] &= ~GUARD
    paths.update(net.table, make_consensus())
    clock[0] = START
    paths = selector(net.table, path=path)
    assert max(g.until for g in paths.sample) <= START + 120 * DAY
    assert paths.sample[0].unlisted <= START
    clock[0] += 20 * DAY
    assert gone.rsa_id not in ids(selector(net.table, path=path).sample)


def test_what_is_a_primary_guard_remains_one_until_another_is_confirmed(clock):
    net = network(guards=100)
    paths = selector(net.table)
    a, b, c = paths.primary()
    index = a.index
    net.table.flags[index] &= ~GUARD
    paths.update(net.table, make_consensus())
    fourth = paths.primary()[2]
    assert paths.primary() == [b, c, fourth]
    net.table.flags[index] |= GUARD
    paths.update(net.table, make_consensus())
    assert a.index == index and paths.primary() == [b, c, fourth]
    fifth = paths.sample[10]
    paths.guard(lambda i: i == fifth.index)
    assert paths.succeeded(fifth.rsa_id)
    assert paths.primary() == [fifth, b, c] and not fourth.primary


def test_failed_guards_are_replaced_and_retried(clock):
    paths = selector(network(guards=100).table)
    paths.online = minitor.now()
    a, b, c = paths.primary()
    assert paths.succeeded(paths.guard().rsa_id)
    paths.failed(a.rsa_id)
    assert paths.guard().rsa_id == b.rsa_id
    paths.failed(b.rsa_id)
    assert paths.guard().rsa_id == c.rsa_id
    clock[0] += 601
    # The first is tried again after ten minutes.
    assert paths.guard().rsa_id == a.rsa_id
    paths.failed(a.rsa_id)
    clock[0] += 7 * 3600
    paths.guard()
    paths.failed(a.rsa_id)
    clock[0] += 5300
    # Failing for seven hours: after 90 minutes.
    assert paths.guard().rsa_id != a.rsa_id
    clock[0] += 200
    assert paths.guard().rsa_id == a.rsa_id
    assert paths.succeeded(a.rsa_id) and a.failing_since == 0


@pytest.mark.parametrize("hours, minutes, others", [
    (0, 10, 60), (4, 10, 60), (7, 90, 240), (91, 90, 240), (97, 240, 1080), (149, 240, 1080),
    (200, 540, 2160), (24 * 365, 540, 2160),
])
def test_guards_are_retried_on_schedule(clock, hours, minutes, others):
    paths = selector(network(guards=100).table)
    paths.primary()
    for guard, wait in ((paths.sample[0], minutes), (paths.sample[5], others)):
        clock[0] = guard.failing_since = START
        clock[0] += hours * 3600
        paths.failed(guard.rsa_id)
        clock[0] += wait * 60 - 1
        assert guard.down()
        clock[0] += 1
        assert not guard.down()


def test_clock_that_went_back_does_not_lock_a_guard_out(clock):
    paths = selector(network(guards=100).table)
    first = paths.guard().rsa_id
    paths.failed(first)
    clock[0] -= 3600
    assert paths.guard().rsa_id == first


def test_network_down_does_not_burn_guards(clock):
    net = network(guards=400)
    paths = selector(net.table)
    first = paths.guard().rsa_id
    assert paths.succeeded(first)
    sample = ids(paths.sample)
    clock[0] += 1000
    tried = set()
    for _ in range(200):
        picked = paths.guard().rsa_id
        tried.add(picked)
        paths.failed(picked)
        clock[0] += 30
        paths.update(net.table, make_consensus())
    assert ids(paths.sample) == sample and tried <= set(sample)
    # The network is back, and some other guard answers first: it is not used for that.
    for g in paths.sample:
        paths.failed(g.rsa_id)
    other = paths.sample[7]
    other.failed_at = 0
    assert paths.guard().rsa_id == other.rsa_id
    clock[0] += 10
    assert paths.succeeded(other.rsa_id) is False
    assert not other.confirmed
    # What failed meanwhile was not the guards' fault.
    paths.update(net.table, make_consensus())
    assert paths.guard().rsa_id == first and ids(paths.sample) == sample
    assert paths.succeeded(first)


@pytest.mark.parametrize("guards, most, params", [
    # A fifth of the guards, but not more than 60, nor less than 20 (guard-spec 4.1).
    (400, 60, {}), (200, 40, {}), (60, 20, {}), (15, 15, {}),
    (400, 25, {"guard_max_sample_size": 25}), (400, 20, {"guard_max_sample_size": 1}),
    (200, 30, {"guard_max_sample_threshold_percent": 15}),
    (200, 60, {"guard_max_sample_threshold_percent": 100}),
    (200, 50, {"guard_min_filtered_sample_size": 50}),
])
def test_guards_that_fail_while_the_network_is_up_are_replaced_up_to_a_limit(
        clock, guards, most, params):
    paths = selector(network(guards=guards).table, make_consensus(**params))
    for _ in range(10):
        for _ in range(30):
            paths.failed(paths.guard().rsa_id)
            paths.online = minitor.now()
        paths.update(paths.table, make_consensus(**params))
    assert len(paths.sample) == most


def test_where_all_guards_are_down_the_primary_ones_take_turns(clock):
    paths = selector(network(guards=20).table)
    paths.online = minitor.now()
    for g in paths.sample:
        paths.failed(g.rsa_id)
        clock[0] += 1
    for g in paths.primary() * 2:
        assert paths.guard().rsa_id == g.rsa_id
        clock[0] += 5
        paths.failed(g.rsa_id)


def test_any_relay_that_answers_brings_guards_back_after_a_silence(clock):
    paths = selector(network(guards=100).table)
    first = paths.guard().rsa_id
    assert paths.succeeded(bytes(20))
    paths.failed(first)
    clock[0] += 300
    assert paths.succeeded(bytes(20))
    assert paths.guard().rsa_id != first
    clock[0] += 650
    for _ in range(30):
        paths.failed(paths.guard().rsa_id)
    assert paths.succeeded(bytes(20))
    assert paths.guard().rsa_id == first and len(paths.sample) <= 22


def test_primary_guards_are_retried_when_the_network_returns_and_others_that_failed_in_between(clock):
    consensus = make_consensus(guard_internet_likely_down_interval=100)
    paths = selector(network(guards=100).table, consensus)
    paths.online = minitor.now()
    first, _, _, fourth, fifth, sixth = paths.sample[:6]
    clock[0] += 1
    for g in paths.primary() + [fourth]:
        paths.failed(g.rsa_id)
    # 100 seconds are no silence, 101 are.
    for wait in (10, 100):
        clock[0] += wait
        assert paths.succeeded(bytes(20)) and first.down() and fourth.down()
    clock[0] += 1
    paths.failed(fifth.rsa_id)
    clock[0] += 100
    # An answer by another is not used: a primary one may be there again.
    assert paths.guard().rsa_id == sixth.rsa_id
    assert paths.succeeded(sixth.rsa_id) is False and not sixth.confirmed
    assert fourth.down() and not first.down() and not fifth.down()
    for _ in range(3):
        picked = paths.guard().rsa_id
        assert picked in ids(paths.primary())
        paths.failed(picked)
    # Now it is known: they are down, and the best of the others may be used.
    assert paths.guard().rsa_id == fifth.rsa_id
    assert paths.succeeded(fifth.rsa_id) is True and paths.primary()[0] is fifth


def test_other_guard_is_used_and_confirmed_while_primaries_are_down(clock):
    paths = selector(network(guards=100).table)
    for g in paths.primary():
        paths.online = minitor.now()
        paths.failed(paths.guard().rsa_id)
    fourth = paths.guard()
    assert fourth.rsa_id == paths.sample[3].rsa_id
    clock[0] += 5
    assert paths.succeeded(fourth.rsa_id) is True
    assert paths.primary()[0].rsa_id == fourth.rsa_id


def test_confirmed_guards_keep_the_order_in_which_they_were_confirmed(clock):
    paths = selector(network(guards=100).table)
    first, second, third = paths.primary()
    for g in (third, first, third):
        assert paths.succeeded(g.rsa_id)
    assert paths.primary() == [third, first, second]


def test_guard_that_a_restriction_chose_counts_at_once(clock):
    paths = selector(network(guards=100).table)
    refused = {g.index for g in paths.primary()}
    other = paths.guard(lambda i: i not in refused)
    assert paths.succeeded(other.rsa_id) is True


def test_unknown_guards_are_ignored(clock):
    paths = selector(network().table)
    paths.failed(bytes(20))
    assert paths.succeeded(bytes(20)) is True


# ── onion circuits ──


def test_onion_paths_have_the_right_hops(clock):
    net = network()
    paths = selector(net.table)
    target = net.table.relay(50)
    assert len(paths.onion_path()) == 3
    path = paths.onion_path(target)
    assert len(path) == 4 and path[3] is target
    assert paths.guard(kind="dir-guards", use=3).rsa_id in ids(paths.primary())


class Stranger:
    """A rendezvous point that is not in the table."""

    rsa_id = b"\x77" * 20


def test_vanguards(clock):
    net = network()
    paths = selector(net.table)
    for _ in range(300):
        for path in (
            paths.onion_path(),
            paths.onion_path(Stranger()),
            paths.onion_path(net.table.relay(random.randrange(60))),
        ):
            assert path[0].rsa_id == paths.sample[0].rsa_id
            assert path[1].rsa_id in paths.layer_two
            # no A-B-A, and no relay twice except the guard as target
            names = [relay.rsa_id for relay in path]
            assert len(set(names[:3])) == 3 and len(set(names[1:])) == len(names) - 1
        assert len(paths.layer_two) == 4
    lives = [end - START for end in paths.layer_two.values()]
    assert all(DAY <= life <= 12 * DAY + 1 for life in lives)


def test_guard_can_be_the_target(clock):
    net = network()
    paths = selector(net.table)
    guard = paths.guard()
    path = paths.onion_path(guard)
    assert path[0].rsa_id == path[3].rsa_id == guard.rsa_id


def test_layer_two_is_replaced_when_due_or_gone(clock):
    net = network()
    paths = selector(net.table)
    paths.onion_path()
    first = dict(paths.layer_two)
    clock[0] += 12 * 3600
    paths.onion_path()
    assert paths.layer_two == first
    clock[0] = max(first.values())
    paths.onion_path()
    assert len(paths.layer_two) == 4 and all(end > clock[0] for end in paths.layer_two.values())

    before = dict(paths.layer_two)
    first = min(net.table.find(gone) for gone in before) + 2
    shorter = Net(first)
    for i in range(first - 1, 60):
        shorter.add(net.table.flags[i] & EXIT | GUARD)
    gone = [rsa_id for rsa_id in before if shorter.table.find(rsa_id) < 0]
    paths.update(shorter.table, make_consensus())
    paths.onion_path()
    assert gone and not set(gone) & set(paths.layer_two) and len(paths.layer_two) == 4
    assert set(before) - set(gone) <= set(paths.layer_two)


def test_layer_two_lifetimes_are_the_longer_of_two(clock):
    net = network()
    consensus = make_consensus(guard_hs_l2_number=19)
    lives = []
    for _ in range(30):
        paths = selector(net.table, consensus)
        paths.onion_path()
        assert len(paths.layer_two) == 19
        lives += [end - START for end in paths.layer_two.values()]
    # mean of the larger of two: 1 + 11 * 2/3 days
    assert abs(sum(lives) / len(lives) / DAY - 8.33) < 0.5


def test_vanguards_disabled_by_the_consensus(clock):
    net = Net()
    for n in range(60):
        net.add(GUARD if n < 30 else 0, address=bytes((10, n // 2, 0, 1 + n % 2)))
    paths = selector(net.table, make_consensus(vanguards_lite_enabled=0))
    target = net.table.relay(31)
    seconds = set()
    for _ in range(100):
        path = indexes(paths.onion_path(target))
        assert len({i // 2 for i in path}) == 4
        seconds.add(path[1])
    assert len(seconds) > 4 and not paths.layer_two


def test_client_rendezvous_point_and_intro_point_need_their_protocol(clock):
    net = network(exits=0, middles=12)
    for i in range(len(net.table)):
        if i != 35:
            net.table.flags[i] &= ~minitor.HSREND2
        if i != 36:
            net.table.flags[i] &= ~minitor.HSINTRO4
    paths = selector(net.table)
    assert paths.pick("intro", lambda i: True, STABLE) == 36
    paths.layer_two = {net.id(i): START + DAY for i in (37, 38, 39, 40)}
    assert paths.onion_path()[2].index == 35
    net.table.flags[35] &= ~minitor.HSREND2
    with pytest.raises(minitor.CircuitError):
        paths.onion_path()


# ── the public network ──


POLICIES = b"accept 80,443", b"accept 22,80,443,6667", b"reject 25", b"accept 443", b"reject 1-65535"


def in_text(text):
    """What the consensus says of each relay, by RSA identity; read without minitor's parser."""
    found, last = {}, None
    for line in text.decode().split("\n"):
        word, _, rest = line.partition(" ")
        if word == "r":
            _, identity, _, _, address, port = rest.split()[:6]
            last = found[base64.b64decode(identity + "=")] = {"v6": None, "flags": set()}
            last["v4"], last["port"] = ipaddress.IPv4Address(address), int(port)
        elif word == "a":
            last["v6"] = last["v6"] or ipaddress.IPv6Address(rest.rpartition(":")[0].strip("[]"))
        elif word == "s":
            last["flags"] = set(rest.split())
        elif word == "w":
            last["weight"] = int(re.search(r"Bandwidth=(\d+)", rest)[1])
        elif word == "pr":
            last["protocols"] = dict(item.split("=") for item in rest.split())
        elif word == "directory-footer":
            return found


def takes(policy, port):
    word, ports = policy.decode().split()
    spans = [(part.split("-") * 2)[:2] for part in ports.split(",")]
    return (word == "accept") == any(int(a) <= port <= int(b) for a, b in spans)


@pytest.fixture(scope="module")
def public():
    """The public network's table and consensus; policies and families are made up.

    Families: three neighbours in the table each; and who names its successor in vain.
    """
    file = REAL / "2024-05-17-17-00-consensus-microdesc"
    if not file.exists():
        pytest.skip("the real consensus is not here: %s (set MINITOR_REAL to its folder)" % file)
    table = minitor.RelayTable()
    parser = minitor.ConsensusParser(table.add)
    parser.feed(file.read_bytes())
    consensus = parser.finish()
    for i in range(len(table)):
        policy = POLICIES[i % 5] if table.flags[i] & EXIT else b""
        near = [i - i % 3 + k for k in range(3)] + [i + 3]
        members = [int.from_bytes(table.relay(k).rsa_id, "big") for k in near if k < len(table)]
        table.set_microdesc(i, *microdesc(i, policy, members))
    table.said = in_text(file.read_bytes())
    return table, consensus


class Checks:
    """What every path of a selector has to keep to, by the consensus's text."""

    NEEDED = {
        "guard": {"Guard", "Fast", "Stable", "V2Dir"}, "middle": {"Fast"}, "exit": {"Exit", "Fast"},
        "intro": {"Fast"}, "rend": {"Fast"},
    }
    REFUSED = {"guard": {"MiddleOnly"}, "exit": {"BadExit", "MiddleOnly"}, "intro": {"MiddleOnly"},
               "rend": {"MiddleOnly"}, "middle": set()}
    PROTOCOLS = {"intro": ("HSIntro", 4), "rend": ("HSRend", 2)}

    def __init__(self, table, paths):
        self.table, self.paths, self.said = table, paths, table.said
        self.sample = {g.rsa_id for g in paths.sample}

    def role(self, relay, role):
        said = self.said[relay.rsa_id]
        assert said["flags"] >= self.NEEDED[role] | {"Running", "Valid"}, role
        assert not said["flags"] & (self.REFUSED[role] | {"NoEdConsensus"}), role
        protocol, version = self.PROTOCOLS.get(role, ("Relay", 2))
        low, _, high = said["protocols"][protocol].rpartition(",")[2].partition("-")
        assert int(high or low) >= version
        if role == "guard":
            assert relay.rsa_id in self.sample

    def apart(self, relays):
        for a, b in itertools.combinations(relays, 2):
            assert a.rsa_id != b.rsa_id
            one, two = self.said[a.rsa_id], self.said[b.rsa_id]
            assert int(one["v4"]) >> 16 != int(two["v4"]) >> 16
            assert not (one["v6"] and two["v6"]) or int(one["v6"]) >> 96 != int(two["v6"]) >> 96
            assert a.index // 3 != b.index // 3

    def roles(self, relays, *roles):
        assert len(relays) == len(roles)
        for relay, role in zip(relays, roles):
            self.role(relay, role)

    def exit(self, port):
        path = self.paths.exit_path(port)
        self.roles(path, "guard", "middle", "exit")
        self.apart(path)
        assert takes(POLICIES[path[2].index % 5], port)
        return path

    def onion(self, target=None):
        path = self.paths.onion_path(target)
        self.roles(path[:3], "guard", "middle", "middle" if target else "rend")
        assert path[3:] == ([target] if target else [])
        ids = [relay.rsa_id for relay in path]
        # The target may be the guard, but else none is there twice.
        assert len(set(ids[:3])) == 3 and len(set(ids[1:])) == len(ids) - 1
        assert ids[1] in self.paths.layer_two and len(self.paths.layer_two) == 4
        return path


KINDS = {
    "exit": lambda checks, rng: checks.exit(rng.choice((22, 80, 443, 6667, 8080))),
    # What a client waits at, and what a service or a client has ready.
    "rendezvous": lambda checks, rng: checks.onion(),
    # Directories of descriptors, introduction points, others' rendezvous points.
    "target": lambda checks, rng: checks.onion(checks.table.relay(rng.randrange(len(checks.table)))),
    "introduction": lambda checks, rng: checks.role(
        checks.table.relay(checks.paths.pick("intro", lambda i: True)), "intro"),
    "directory": lambda checks, rng: checks.role(
        checks.paths.guard(kind="dir-guards", use=3), "guard"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_restrictions_hold_on_the_public_network(public, clock, kind):
    table, consensus = public
    assert minitor.PathSelector(table, consensus, None).percent() == 100
    rng = random.Random(kind)
    for n in range(1000):
        if n % 50 == 0:
            # Another client, in the end one whose guards fail.
            checks = Checks(table, minitor.PathSelector(table, consensus, NOWHERE))
            guards = set()
            checks.paths.online = START
            clock[0] += 1
        if n % 50 > 40:
            checks.paths.failed(checks.paths.guard().rsa_id)
        path = KINDS[kind](checks, rng)
        if path and n % 50 <= 40:
            guards.add(path[0].rsa_id)
            primary = [g.rsa_id for g in checks.paths.primary()]
            # As many as the consensus wants; others only where the exit is too near.
            use = consensus.param("guard-n-primary-guards-to-use", 1)
            assert guards <= set(primary[: use if kind != "exit" else 3])


def test_restrictions_hold_without_vanguards(public, clock):
    table, consensus = public
    params = dict(consensus.params, **{"vanguards-lite-enabled": 0})
    consensus = minitor.SimpleNamespace(
        bandwidth_weights=consensus.bandwidth_weights,
        param=lambda name, default, *_: params.get(name, default))
    checks, rng = Checks(table, minitor.PathSelector(table, consensus, NOWHERE)), random.Random(4)
    for n in range(300):
        target = table.relay(rng.randrange(len(table))) if n % 2 else None
        path = checks.paths.onion_path(target)
        checks.roles(path[:3], "guard", "middle", "middle" if target else "rend")
        checks.apart(path)


@pytest.mark.parametrize("role, position", [("middle", "m"), ("exit", "e"), ("guard", "g")])
def test_distribution_on_the_public_network(public, clock, role, position):
    table, consensus = public
    chooser = minitor.PathSelector(table, consensus, None)
    rounds, exact, counts = 1500, {}, {}
    w = consensus.bandwidth_weights
    need = {"middle": FAST, "exit": FAST | EXIT, "guard": FAST | STABLE | V2DIR | GUARD}[role]
    bad = {"middle": 0, "exit": BADEXIT | MIDDLEONLY, "guard": MIDDLEONLY}[role]
    names = {"m": ("Wmm", "Wmg", "Wme", "Wmd"), "e": ("Wem", "Weg", "Wee", "Wed")}
    names["g"] = ("Wgm", "Wgg", None, "Wgd")
    for i in range(len(table)):
        relay = table.relay(i)
        if relay.flags & need == need and not relay.flags & bad:
            is_exit = relay.flags & EXIT and not relay.flags & BADEXIT
            name = names[position][(1 if relay.flags & GUARD else 0) + (2 if is_exit else 0)]
            # by bandwidth class, so that each holds enough
            exact[i] = table.weights[i] * w[name]
    classes = {}
    order = sorted(exact, key=exact.get)
    total, running = sum(exact.values()), 0
    for i in order:
        classes[i] = running * 20 // total
        running += exact[i]
    expected = {}
    for i, c in classes.items():
        expected[c] = expected.get(c, 0) + exact[i] * rounds / total
    for _ in range(rounds):
        i = chooser.pick(role, lambda i: True, 0)
        counts[classes[i]] = counts.get(classes[i], 0) + 1
    assert sum(counts.values()) == rounds
    # 0.999 quantile for 19 degrees of freedom: 43.8
    assert len(expected) > 10 and chi_square(counts, expected) < 44


def test_relays_that_failed_lately_are_tried_last(clock):
    table = network(guards=4, exits=1, middles=4).table
    paths = selector(table)
    middles = [i for i in range(len(table)) if not table.flags[i] & (minitor.GUARD | minitor.EXIT)]
    for i in middles[1:]:
        paths.failed(table.rsa_id(i), 2)
    never = minitor.GUARD | minitor.EXIT
    for _ in range(20):
        assert paths.pick("middle", lambda i: not table.flags[i] & never) == middles[0]
    # Where nothing else is left they are chosen all the same, and after two minutes as ever.
    paths.failed(table.rsa_id(middles[0]), 2)
    assert paths.pick("middle", lambda i: not table.flags[i] & never) in middles
    clock[0] += 121
    picked = set(paths.pick("middle", lambda i: not table.flags[i] & never) for _ in range(99))
    assert picked == set(middles)
