"""The timing engine: intervals, disturbed samples, pairs, the order of a run."""

import math
import random
import subprocess
import sys
import time

import pytest

from softmaxlib._tools import timing
from softmaxlib._tools.timing import Case, Engine, Estimate, Sample


def case(label="a", run=lambda repeats: 1000.0, **options):
    return Case(label, run, **options)


def sampled(times, disturbed=()):
    """Return a case with these samples, those of some visits disturbed."""
    made = case()
    made.samples = [
        Sample(visit, ns, "by something" if visit in disturbed else None)
        for visit, ns in enumerate(times)
    ]
    return made


def loop(repeats):
    """Compute for some hundreds of microseconds, and claim a microsecond."""
    end = time.perf_counter_ns() + 200_000
    while time.perf_counter_ns() < end:
        pass
    return 1000.0


# Intervals


@pytest.mark.parametrize(
    ("n", "quantile", "confidence", "ranks"),
    [
        # Of 10 samples the median lies between the 2nd and the 9th with 97.9 %, as in every table.
        (10, 0.5, 0.95, (2, 9)),
        (20, 0.5, 0.95, (6, 15)),
        (8, 0.5, 0.99, (1, 8)),
        (7, 0.5, 0.99, (0, 8)),  # 2 / 2^7 is more than 1 %
        (11, 0.25, 0.9, (1, 6)),
        (1, 0.25, 0.9, (0, 2)),
    ],
)
def test_ranks(n, quantile, confidence, ranks):
    assert timing._ranks(n, quantile, confidence) == ranks


@pytest.mark.parametrize("quantile", [0.25, 0.5])
def test_intervals_hold_the_quantile_as_often_as_they_say(quantile):
    draw = random.Random(1)
    true = -math.log(1 - quantile)  # of the exponential distribution
    inside = 0
    for _ in range(2000):
        found = timing.estimate(
            (draw.expovariate(1) for _ in range(15)), quantile=quantile, confidence=0.9
        )
        inside += found.low <= true <= found.high
    assert inside >= 0.89 * 2000


def test_estimates_of_few_samples_have_no_ends():
    assert timing.estimate([]).clean == 0
    assert math.isnan(timing.estimate([]).value)
    found = timing.estimate([3.0, 5.0])
    assert (found.low, found.high) == (0.0, math.inf)
    assert found.noisy
    assert found.value == 3.5


def test_noisy():
    assert not Estimate(100, 97, 104, 20, 20).noisy
    assert Estimate(100, 90, 104, 20, 20).noisy
    assert Estimate(100, 99, 101, 4, 20).noisy
    assert Estimate(math.nan, 0, math.inf, 0, 0).noisy


def test_time_is_of_undisturbed_samples():
    times = [100.0] * 20 + [900.0] * 20
    assert timing.time_of(sampled(times, disturbed=range(20, 40))).value == 100
    all_disturbed = timing.time_of(sampled(times, disturbed=range(40)))
    assert all_disturbed.clean == 0
    assert all_disturbed.noisy


# Pairs


def test_ratios_are_of_pairs():
    """A drift that both share cancels."""
    drift = [1 + visit / 10 for visit in range(20)]
    a, b = sampled([100 * d for d in drift]), sampled([80 * d for d in drift])
    found = timing.ratio(a, b)
    assert found.value == pytest.approx(1.25)
    assert found.high - found.low < 1e-9
    assert timing.verdict(found) == "slower"
    assert timing.verdict(timing.ratio(b, a)) == "faster"


def test_pairs_of_disturbed_samples_do_not_count():
    a, b = sampled([100.0] * 20), sampled([50.0] * 10 + [500.0] * 10, disturbed=range(10, 20))
    found = timing.ratio(a, b)
    assert (found.value, found.clean, found.taken) == (2.0, 10, 20)
    few = timing.ratio(a, sampled([50.0] * 20, disturbed=range(5, 20)))
    assert timing.verdict(few) == "cannot tell"


def test_sums_of_cases():
    found = timing.ratio([sampled([10.0] * 9), sampled([20.0] * 9)], sampled([60.0] * 9))
    assert found.value == 0.5


@pytest.mark.parametrize(
    ("low", "value", "high", "margin", "said"),
    [
        (0.7, 0.8, 0.9, 0, "faster"),
        (0.7, 0.8, 0.9, 0.05, "faster"),
        (1.1, 1.2, 1.3, 0.05, "slower"),
        (0.98, 1.0, 1.02, 0.05, "same"),
        (0.97, 0.98, 0.99, 0.05, "same"),
        (0.97, 0.98, 0.99, 0, "faster"),
        (0.9, 1.0, 1.1, 0.05, "cannot tell"),
        (0.9, 0.97, 0.99, 0.05, "cannot tell"),
        (0.0, 0.5, math.inf, 0.05, "cannot tell"),
        (0.0, math.nan, math.inf, 0.05, "cannot tell"),
    ],
)
def test_verdicts(low, value, high, margin, said):
    assert timing.verdict(Estimate(value, low, high, 9, 9), margin) == said


# The engine


def test_every_case_gets_its_samples():
    cases = [case(f"{g}{i}", group=g) for g in range(3) for i in range(4)]
    done = []
    Engine(cases, seconds=0, rounds=7).run(step=lambda label, _: done.append(label))
    assert all(sorted({s.visit for s in c.samples}) == list(range(7)) for c in cases)
    assert sorted(done[12:]) == sorted([c.label for c in cases] * 7)  # after the calibration


def test_groups_stay_together_and_are_spread_over_the_run():
    cases = [case(f"{g}{i}", group=g) for g in range(5) for i in range(3)]
    done = []
    Engine(cases, seconds=0, rounds=20).run(step=lambda label, _: done.append(label))
    visits = [done[15:][i : i + 3] for i in range(0, 300, 3)]
    groups = [{label[0] for label in visit} for visit in visits]
    assert all(len(group) == 1 for group in groups)
    assert len({tuple(visit) for visit in visits}) > 5  # in any order
    order = [group.pop() for group in groups]
    assert all(set(order[i : i + 20]) == set("01234") for i in range(0, 100, 20))


def test_time_is_shared_out():
    slow = case("slow", lambda repeats: 1e7, group=1)
    fast = case("fast", lambda repeats: 1e3, group=2)
    asked = []
    Engine([slow, fast], seconds=0.6).run(plan=asked.append)
    assert len({sample.visit for sample in slow.samples}) == 30
    assert len({sample.visit for sample in fast.samples}) == timing.MAX_ROUNDS
    assert fast.repeats == 1000
    assert asked[0] == pytest.approx(0.3 + 0.101)


def test_who_leaves_the_cpu_is_disturbed():
    def sleeps(repeats):
        time.sleep(0.002)
        return 2e6

    sleeper = case("sleeper", sleeps)
    Engine([sleeper], seconds=0, rounds=3).run()
    assert all("off the CPU" in sample.disturbed for sample in sleeper.samples)
    assert timing.time_of(sleeper).clean == 0


def test_disturbed_samples_are_taken_again(monkeypatch):
    """Until one is not, or often enough; not when that would take much longer than planned."""
    taken = []

    def sample(self, case, visit):
        taken.append(visit)
        often = {0: 1, 1: 3, 2: 99}[visit]  # undisturbed at the so-manieth time
        return Sample(visit, 1.0, None if taken.count(visit) == often else "by something")

    monkeypatch.setattr(Engine, "_sample", sample)
    one = case()
    monkeypatch.setattr(timing, "RETAKEN", math.inf)
    Engine([one], seconds=0, rounds=3).run()
    assert [taken.count(visit) for visit in range(3)] == [1, 3, 1 + timing.RETAKES]
    assert [s.visit for s in one.samples] == taken  # every one is kept
    assert len(one.clean) == 2
    taken.clear()
    monkeypatch.setattr(timing, "RETAKEN", -math.inf)
    Engine([case()], seconds=0, rounds=3).run()
    assert [taken.count(visit) for visit in range(3)] == [1, 1, 1]


def test_work_of_other_processes_disturbs_what_is_shared(monkeypatch):
    busy = iter(range(0, 10**18, 10**9))  # a second of all CPUs at each look
    monkeypatch.setattr(timing, "_WINDOW_NS", 0)
    shared, own = case("shared", loop, shared=True), case("own", loop)
    engine = Engine([shared, own], seconds=0, rounds=3)
    # Nothing else disturbs them, whatever runs beside this test.
    monkeypatch.setattr(engine, "_sample", lambda case, visit: Sample(visit, 1.0, None))
    monkeypatch.setattr(engine._counters, "read", lambda: (0, next(busy)))
    engine.run()
    assert all("others used" in s.disturbed for s in shared.samples)
    assert not any("others" in (s.disturbed or "") for s in own.samples)


def test_an_interrupted_run_keeps_what_it_has():
    calls = []

    def stops(repeats):
        calls.append(repeats)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return 1e6

    stopped = case("stopped", stops)
    with pytest.raises(KeyboardInterrupt):
        Engine([stopped], seconds=0, rounds=50).run()
    assert 0 < len(stopped.samples) < 50


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux confines threads to CPUs")
def test_pinned_and_given_back():
    script = """
import os, threading
from softmaxlib._tools import timing
before = os.sched_getaffinity(0)
done = threading.Event()
other = threading.Thread(target=done.wait)
other.start()
cpus = timing.choose_cpus(1)
with timing.pinned(cpus):
    assert os.sched_getaffinity(0) == set(cpus), os.sched_getaffinity(0)
    if len(before) > 1:
        assert not set(cpus) & os.sched_getaffinity(other.native_id)
assert os.sched_getaffinity(0) == before
done.set()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_quiet():
    assert timing.wait_for_quiet() in (True, False)
    state = timing.machine_state([0])
    assert state["cpus"] == [0]
    assert state["mhz"] is None or state["mhz"] > 0
