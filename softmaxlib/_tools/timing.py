"""The one engine that times everything this project says about speed.

A shared machine disturbs what is timed, and a mean or a median does not show it. So

- the samples of all cases are spread over the whole run in random order: what disturbs the machine
  for some seconds hits no case alone;
- a sample that was disturbed is recognized and taken again, a limited number of times: its thread
  was off the CPU (its CPU time is short of the wall clock), was switched away, the hypervisor stole
  time, or other processes used what the cases share with them, the last cache and memory;
- a result is a lower quantile of the undisturbed samples with its confidence interval, by order
  statistics, which assume nothing about the noise;
- cases that are compared stand in one group and are timed next to each other: a ratio is that of
  pairs, and where its interval does not decide, the answer is that one cannot tell.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import random
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

try:
    import resource
except ImportError:  # Windows, where samples are judged by their CPU time alone
    resource = None  # type: ignore[assignment]

Plan = Callable[[float], None]
Step = Callable[[str, float], None]
Verdict = Literal["faster", "slower", "same", "cannot tell"]

SAMPLE_NS = 1e6  # shorter than a scheduler's turn, so that some fit between two interruptions
MIN_ROUNDS, MAX_ROUNDS = 12, 101
RETAKES, RETAKEN = 4, 1.5  # of one sample; and only until so many times the planned time is over
QUANTILE, CONFIDENCE = 0.25, 0.99
MIN_CLEAN = 5  # undisturbed samples, for a time to be one

_LOST_NS, _LOST_SHARE = 2e4, 0.01  # off the CPU, beyond which a sample is disturbed
_WINDOW_NS = 2e8  # over which the load of others is seen: the kernel counts in steps of 10 ms
_OTHERS = 0.1  # CPUs that other processes may use
_QUIET_NS, _QUIET_TRIES = 5e5, 40  # how long other threads of this process may go on spinning


@dataclass
class Sample:
    """One measurement."""

    visit: int  # which of the group's; pairs have the same, and so has one taken again
    ns: float  # per call
    disturbed: str | None = None  # by what


@dataclass(eq=False)
class Case:
    """One thing to time.

    ``run`` makes so many calls and returns nanoseconds per call. Cases of one ``group`` are timed
    next to each other. ``warm``: one call before each sample, since the case before may have left
    other lines in the cache. ``shared``: it depends on what all cores share, the last cache or
    memory. ``spins``: it may leave threads behind that go on for a while. ``hands_over``: on the
    one CPU it is timed on, another thread may compute while the caller waits.
    """

    label: str
    run: Callable[[int], float]
    group: Hashable = None
    warm: bool = False
    shared: bool = False
    threads: int = 1
    spins: bool = False
    hands_over: bool = False
    weight: float = 1.0  # of its group's share of the time: the largest counts
    least: int = MIN_ROUNDS
    most: int = MAX_ROUNDS
    repeats: int = 1
    call_ns: float = 0.0  # of the calibration
    samples: list[Sample] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """About how long a sample takes."""
        return 1e-9 * self.call_ns * (self.repeats + self.warm)

    @property
    def clean(self) -> list[Sample]:
        """The samples that nothing disturbed."""
        return [sample for sample in self.samples if sample.disturbed is None]


def repeated(call: Callable[[], object]) -> Callable[[int], float]:
    """Return the ``run`` of a case that calls a Python function."""

    def run(repeats: int) -> float:
        rest = itertools.repeat(None, repeats)
        start = time.perf_counter_ns()
        for _ in rest:
            call()
        return (time.perf_counter_ns() - start) / repeats

    return run


# ---- Estimates


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that holds the true one with the stated confidence."""

    value: float
    low: float
    high: float
    clean: int  # samples that it rests on
    taken: int

    @property
    def noisy(self) -> bool:
        """Whether there are too few samples, or they are too far apart, to tell 5 %."""
        return self.clean < MIN_CLEAN or not self.high - self.low <= 0.1 * self.value

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate in another unit."""
        return Estimate(
            self.value * factor, self.low * factor, self.high * factor, self.clean, self.taken
        )


def _ranks(n: int, quantile: float, confidence: float) -> tuple[int, int]:
    """Return the order statistics, from 1, between which a quantile lies; 0 and n + 1: none.

    How many of n samples are below a quantile q is binomial: the k-th smallest is above it with the
    probability of fewer than k.
    """
    tail = (1 - confidence) / 2
    chances = [math.comb(n, k) * quantile**k * (1 - quantile) ** (n - k) for k in range(n + 1)]
    below = list(itertools.accumulate(chances))
    low = max((k for k in range(1, n + 1) if below[k - 1] <= tail), default=0)
    high = min((k for k in range(1, n + 1) if 1 - below[k - 1] <= tail), default=n + 1)
    return low, high


def estimate(
    values: Iterable[float],
    *,
    taken: int | None = None,
    quantile: float = QUANTILE,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Return a quantile of some values with its interval.

    Where the values are too few for the confidence, an end of the interval is 0 or infinite.
    """
    ordered = sorted(values)
    n = len(ordered)
    if n == 0:
        return Estimate(math.nan, 0.0, math.inf, 0, taken or 0)
    low, high = _ranks(n, quantile, confidence)
    place = quantile * (n - 1)
    below = ordered[int(place)]
    above = ordered[min(int(place) + 1, n - 1)]
    return Estimate(
        below + (place - int(place)) * (above - below),
        ordered[low - 1] if low >= 1 else 0.0,
        ordered[high - 1] if high <= n else math.inf,
        n,
        n if taken is None else taken,
    )


def time_of(case: Case) -> Estimate:
    """Return the time of one call in nanoseconds: of all samples, where none was undisturbed."""
    used = case.clean if len(case.clean) >= MIN_CLEAN else case.samples
    found = estimate((sample.ns for sample in used), taken=len(case.samples), confidence=0.9)
    return Estimate(found.value, found.low, found.high, len(case.clean), found.taken)


def ratio(times: Case | Sequence[Case], unit: Case | Sequence[Case]) -> Estimate:
    """Return how many times the second one's time the first one takes, from pairs of samples.

    Of several cases the times are added, as of a read pass and a copy. A pair counts where none of
    its samples was disturbed; the value is the median over the pairs.
    """
    above, below = (_by_visit([c] if isinstance(c, Case) else c) for c in (times, unit))
    common = above.keys() & below.keys()
    taken = min(len(c.samples) for c in ([times] if isinstance(times, Case) else times))
    return estimate((above[v] / below[v] for v in common), taken=taken, quantile=0.5)


def _by_visit(cases: Sequence[Case]) -> dict[int, float]:
    found = [{sample.visit: sample.ns for sample in case.clean} for case in cases]
    common = set.intersection(*(set(times) for times in found))
    return {visit: sum(times[visit] for times in found) for visit in common}


def verdict(of: Estimate, margin: float = 0.0) -> Verdict:
    """Tell what a ratio of times says of its first case: within the margin it is the same."""
    if of.high < 1 and of.value <= 1 / (1 + margin):
        return "faster"
    if of.low > 1 and of.value >= 1 + margin:
        return "slower"
    if margin and of.low >= 1 / (1 + margin) and of.high <= 1 + margin:
        return "same"
    return "cannot tell"


# ---- The machine


def choose_cpus(threads: int) -> list[int]:
    """Choose as many CPUs of those this process may use, cores before their second threads.

    None where the system cannot confine a process; fewer than asked for where it has fewer.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0), reverse=True)  # the first CPU serves interrupts
    cores: dict[str, list[int]] = {}
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text() if siblings.exists() else str(cpu), []).append(cpu)
    by_rank = itertools.zip_longest(*cores.values())
    return sorted([cpu for cpus in by_rank for cpu in cpus if cpu is not None][:threads])


@contextlib.contextmanager
def pinned(cpus: Sequence[int]) -> Iterator[None]:
    """Hold this thread, and those it starts, on some CPUs; collect no garbage meanwhile.

    With one CPU, threads that the process has already are kept from it.
    """
    before = os.sched_getaffinity(0) if cpus else set()
    gc.collect()
    gc.disable()
    try:
        if cpus:
            os.sched_setaffinity(0, cpus)
            if len(cpus) == 1 and before - set(cpus):
                _keep_others_from(cpus[0], before)
        yield
    finally:
        gc.enable()
        if cpus:
            os.sched_setaffinity(0, before)


def _keep_others_from(cpu: int, allowed: Iterable[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        if int(thread.name) != threading.get_native_id():
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(int(thread.name), set(allowed) - {cpu})


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def machine_state(cpus: Sequence[int]) -> dict[str, Any]:
    """Describe the CPUs that are timed and what is known of their frequency."""
    cpu = cpus[0] if cpus else 0
    base = f"/sys/devices/system/cpu/cpu{cpu}/cpufreq"
    khz = _read(f"{base}/scaling_cur_freq")
    mhz = None if khz is None else float(khz) / 1000
    if mhz is None:  # a virtual machine names that of the host's base clock
        for line in (_read("/proc/cpuinfo") or "").splitlines():
            if line.startswith("cpu MHz"):
                mhz = float(line.partition(":")[2])
                break
    boost = _read("/sys/devices/system/cpu/cpufreq/boost")
    return {
        "cpus": list(cpus),
        "mhz": mhz,
        "governor": _read(f"{base}/scaling_governor"),
        "boost": None if boost is None else boost == "1",
    }


class _Counters:
    """What the kernel counts of CPU time: stolen, and used by all processes. Linux alone has it."""

    def __init__(self, cpus: Sequence[int]) -> None:
        self._names = {f"cpu{cpu}" for cpu in cpus}
        self._tick_ns = 1e9 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else math.inf
        try:
            self._file: int | None = os.open("/proc/stat", os.O_RDONLY)
        except OSError:
            self._file = None

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            os.close(self._file)

    def read(self) -> tuple[int, float]:
        """Return the ticks stolen from our CPUs, and the nanoseconds that all CPUs were busy."""
        if self._file is None:
            return 0, 0.0
        stolen, busy = 0, 0
        for line in os.pread(self._file, 1 << 16, 0).decode().splitlines():
            name, *numbers = line.split()
            if not name.startswith("cpu"):
                break
            user, nice, system, _, _, irq, softirq, steal = (int(n) for n in numbers[:8])
            if name == "cpu":
                busy = user + nice + system + irq + softirq
            elif name in self._names:
                stolen += steal
        return stolen, busy * self._tick_ns


def _switches(threads: int) -> int:
    """Return how often this thread, or of several the process, was made to leave its CPU."""
    if resource is None:
        return 0
    whose = getattr(resource, "RUSAGE_THREAD", None)
    if threads > 1 or whose is None:
        whose = resource.RUSAGE_SELF
    return resource.getrusage(whose).ru_nivcsw


def wait_for_quiet() -> bool:
    """Wait until no other thread of this process computes; False where one does not stop.

    Workers of OpenMP and its like spin for some milliseconds after a call, in case of another.
    """
    for _ in range(_QUIET_TRIES):
        before = time.process_time_ns() - time.thread_time_ns()
        time.sleep(1e-9 * _QUIET_NS)
        if time.process_time_ns() - time.thread_time_ns() - before < 0.1 * _QUIET_NS:
            return True
    return False


# ---- The engine


class Engine:
    """Times cases; results are of whatever has been taken so far.

    Parameters
    ----------
    cases : sequence of Case
    seconds : float
        Of all samples together, about, if nothing disturbs them. Every case gets its least number
        of samples all the same.
    rounds : int, optional
        So many samples of every case instead.
    cpus : sequence of int
        Those that the timed threads are held on; `choose_cpus`. Empty: any.
    seed : int
        Of the order.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        seconds: float,
        rounds: int | None = None,
        cpus: Sequence[int] = (),
        seed: int = 2020,
    ) -> None:
        self.cases = cases
        self.cpus = list(cpus)
        self.state = machine_state(cpus)
        self._seconds, self._rounds = seconds, rounds
        self._order = random.Random(seed)
        self._counters = _Counters(cpus)
        self._window: list[tuple[Case, Sample]] = []
        self._retake_until = 0.0
        self._window_from = (0, 0.0, 0)  # wall clock, busy, of which ours

    def run(
        self,
        plan: Plan = lambda seconds: None,
        step: Step = lambda label, seconds: None,
    ) -> None:
        """Tell plan how many seconds it will take, and step what was done and for how many."""
        groups: dict[Hashable, list[Case]] = {}
        for case in self.cases:
            groups.setdefault(case.group, []).append(case)
        with pinned(self.cpus):
            try:
                for case in self.cases:
                    step(f"calibrating {case.label}", 0.0)
                    self._calibrate(case)
                visits = self._visits(groups)
                seconds = sum(case.seconds for _, _, members in visits for case in members)
                plan(seconds)
                self._retake_until = time.monotonic() + RETAKEN * seconds
                self._open_window()
                for _, visit, members in visits:
                    for case in self._order.sample(members, len(members)):
                        self._take(case, visit)
                        step(case.label, case.seconds)
            finally:
                self._close_window()
                self._counters.close()

    def _calibrate(self, case: Case) -> None:
        for _ in range(3):
            case.call_ns = max(1.0, case.run(case.repeats))
            wanted = max(1, round(SAMPLE_NS / case.call_ns))
            settled = wanted < 2 * case.repeats
            case.repeats = wanted
            if settled:
                break

    def _visits(self, groups: dict[Hashable, list[Case]]) -> list[tuple[float, int, list[Case]]]:
        """Spread what every group is due evenly over the run; who has enough sits out."""
        weights = {key: max(case.weight for case in cases) for key, cases in groups.items()}
        whole, visits = sum(weights.values()), []
        for key, cases in groups.items():
            share = self._seconds * weights[key] / whole
            counts = [self._rounds or self._count(case, share / len(cases)) for case in cases]
            for i in range(max(counts)):
                place = (i + self._order.random()) / max(counts)
                members = [c for c, count in zip(cases, counts, strict=True) if count > i]
                visits.append((place, i, members))
        return sorted(visits, key=lambda visit: visit[0])

    @staticmethod
    def _count(case: Case, share: float) -> int:
        return min(max(int(share / case.seconds), case.least), case.most)

    def _take(self, case: Case, visit: int) -> None:
        """Take a sample, again while it is disturbed; those that were are kept as what they are."""
        for _ in range(1 + RETAKES):
            sample = self._sample(case, visit)
            case.samples.append(sample)
            self._window.append((case, sample))
            if sample.disturbed is None or time.monotonic() > self._retake_until:
                break
        if case.spins:
            wait_for_quiet()
        if time.perf_counter_ns() - self._window_from[0] > _WINDOW_NS:
            self._close_window()
            self._open_window()

    def _sample(self, case: Case, visit: int) -> Sample:
        if case.warm:
            case.run(1)
        stolen, _ = self._counters.read()
        used = time.process_time_ns if case.hands_over else time.thread_time_ns
        switches, cpu = _switches(case.threads), used()
        start = time.perf_counter_ns()
        ns = case.run(case.repeats)
        wall = time.perf_counter_ns() - start
        lost = wall - (used() - cpu)
        switches = 0 if case.hands_over else _switches(case.threads) - switches
        stolen = self._counters.read()[0] - stolen
        disturbed = None
        if case.threads == 1 and lost > max(_LOST_NS, _LOST_SHARE * wall):
            disturbed = f"off the CPU for {lost / wall:.0%}"
        elif switches:
            disturbed = f"switched away {switches} times"
        elif stolen:
            disturbed = "time was stolen"
        return Sample(visit, ns, disturbed)

    def _open_window(self) -> None:
        _, busy = self._counters.read()
        self._window_from = (time.perf_counter_ns(), busy, time.process_time_ns())

    def _close_window(self) -> None:
        """Judge the samples since the window was opened by what other processes used."""
        start, busy, ours = self._window_from
        span = time.perf_counter_ns() - start
        others = self._counters.read()[1] - busy - (time.process_time_ns() - ours)
        if start and others > _OTHERS * span + 1e7:  # one step of the kernel's
            for case, sample in self._window:
                if case.shared and sample.disturbed is None:
                    sample.disturbed = f"others used {others / span:.1f} CPUs"
        self._window.clear()
