"""Times softmax beside other libraries, on the same arrays: `softmaxlib bench --peers`.

The protocol is that of `_bench`: every round times all libraries once, in a new random order, and a
result is a median over the rounds. Outputs are checked against the exact values.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

import softmaxlib
from softmaxlib import _bench
from softmaxlib._peer_calls import LIBRARIES, OURS, Array, AsArray, Call, Function, Prepare
from softmaxlib._verify import dtypes, ulps

Outcome = Literal["win", "tie", "loss"]

SCHEMA = "softmaxlib-peers/1"
SCALE = 5.0  # of the normal logits
TIE = 0.03
DEFINITIONS = {
    "ratio": "time of the peer / time of softmaxlib, of the medians: above 1 softmaxlib is faster.",
    "tie": f"The ratio is within {TIE:.0%} of 1; or the quartiles of the two overlap and their "
    "minima do not differ in the same direction by more than that.",
    "peer": "The peer of a case is the fastest of those that win, else the fastest.",
    "call": "A call includes the allocation of its result. The input is made before: an array of "
    "NumPy's, a torch tensor that shares its memory, a copy of JAX's. Large results of NumPy "
    "and softmaxlib are new pages each time, as other libraries' are unless they keep them.",
    "threads": "The process is confined to as many CPUs as threads before the peers are imported; "
    "where a library has a setting, it is set too. OpenVINO computes in float32, not bfloat16.",
    "error": "In ULP of the dtype of the result, against double (long double for float64), of "
    "up to 2^18 elements of a case, with the sum over their whole rows.",
    "input": f"Normal logits times {SCALE:g}, rounded to the dtype.",
}

DTYPES = ("float32", "float64", "float16", "bfloat16")
SAMPLE_NS = 3e6
MIN_ROUNDS, MAX_ROUNDS = 5, 41
MIN_ROUNDS_QUICK, MOST_QUICK = 3, 1 << 26
MOST_DIMS = 32  # NumPy 1.x has no more
ARRAYS = 8  # of the size of x, at most, that a call of any library and its result need
CHECKED = 1 << 18
MISSING = "not installed"

# A median error beyond this is no result of the dtype: nothing right, or float32 called float64.
NO_RESULT = {"float32": 2.0**22, "float64": 2.0**24, "float16": 2.0**9, "bfloat16": 2.0**6}

FIRST_NS = 5e8  # a first call as long as this is not followed by others to find the repeats
SLOW, SLOW_ROUNDS = 4, 3  # who takes so many times as long as the fastest has enough samples
FAR, LONG_NS, LONG_NS_QUICK = 10, 1e9, 1e8  # who is as far behind and so slow is not called

# What a library may read when it is imported; the number of threads, whatever it was.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NPROC")


@dataclass(frozen=True)
class Shape:
    dims: tuple[int, ...]
    axis: int  # from 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def text(self) -> str:
        """Return what `parse_shape` reads."""
        if len(self.dims) == 1 and self.elements.bit_count() == 1:
            return f"2^{self.elements.bit_length() - 1}"
        dims = "x".join(map(str, self.dims))
        return dims if self.axis == len(self.dims) - 1 else f"{dims}:{self.axis}"


def parse_shape(text: str) -> Shape:
    """Read "8192x512", "512x8x4096:1" with the axis, or one row such as "1000" or "2^20"."""
    dims_text, _, axis_text = text.partition(":")
    try:
        parts = [part.partition("^") for part in dims_text.split("x")]
        # From 2^63 on a length is beyond any array, and may be beyond memory as a number.
        dims = tuple(int(base) ** min(int(power or 1), 63) for base, _, power in parts)
        axis = int(axis_text or -1)
    except ValueError:
        raise ValueError(f"{text}: not a shape such as 8192x512, 512x8x4096:1 or 2^20") from None
    if min(dims) < 1:
        raise ValueError(f"{text}: every length must be at least 1")
    if len(dims) > MOST_DIMS or math.prod(dims) >= 1 << 63:
        raise ValueError(
            f"{text}: an array has at most {MOST_DIMS} dimensions and fewer than 2^63 elements"
        )
    if not -len(dims) <= axis < len(dims):
        raise ValueError(f"{text}: axis {axis} of {len(dims)} dimensions")
    return Shape(dims, axis % len(dims))


def default_shapes(quick: bool) -> tuple[Shape, ...]:
    """Return one row of every length, a power of two (of four when quick), then many rows."""
    rows = [f"2^{k}" for k in range(0, 29, 2 if quick else 1)]
    batches = (
        "65536x8",
        "65536x64",
        "8192x100",
        "8192x512",
        "512x32000",
        "64x128256",
        "77x4096",
        "12888x256",
        "200000x1",
        "643251x3",
        "512x8x4096:1",
        "4096x4096:0",
        "32x12x512x512",
    )
    shapes = (parse_shape(text) for text in (*rows, *batches))
    return tuple(s for s in shapes if not quick or s.elements <= MOST_QUICK)


@dataclass(frozen=True)
class Settings:
    quick: bool = False
    threads: int = 1
    dtypes: tuple[str, ...] = DTYPES
    shapes: tuple[Shape, ...] | None = None  # None: all
    libraries: tuple[str, ...] | None = None  # beside our own; None: all
    function: Function = "softmax"
    seconds: float = 420.0  # of the rounds
    rounds: int | None = None  # None: as many as the time allows
    seed: int = 2020
    max_bytes: int | None = None


@dataclass
class Entry:
    """One library in one case."""

    status: str = "ok"  # or why it does not count
    max_ulp: float | None = None
    mean_ulp: float | None = None
    repeats: int = 1  # calls in a sample
    samples: list[float] = field(default_factory=list)  # ns per call

    def fail(self, error: Exception) -> None:
        self.status = _reason(error)
        self.samples.clear()


@dataclass
class Case:
    shape: Shape
    dtype: np.dtype[Any]
    entries: dict[str, Entry] = field(default_factory=dict)  # by library

    @property
    def bytes(self) -> int:
        return self.shape.elements * self.dtype.itemsize

    @property
    def label(self) -> str:
        return f"{self.shape.text} {self.dtype.name}"

    @property
    def is_judged(self) -> bool:
        """Tell whether we have been timed, or have failed."""
        ours = self.entries.get(OURS)
        return ours is not None and (bool(ours.samples) or ours.status != "ok")

    @property
    def weight(self) -> float:
        """Its part of the time, in no unit."""
        return 1 + self.bytes / (16 << 20)


class TooManyThreadsError(Exception):
    """More threads than CPUs: they would not be equal."""


class RefusedError(Exception):
    """Why a library that raises nothing does not take part in a case."""


class Reference:
    """The exact values of some elements; their sums over the whole row."""

    def __init__(self, x: Array, axis: int, function: Function) -> None:
        rng = np.random.default_rng(x.size)
        # Double is exact enough for what is narrower, and 30 times as fast as long double.
        wide: Any = np.longdouble if x.dtype == np.float64 else np.float64
        n, rows = x.shape[axis], x.size // x.shape[axis]
        self.like, self.axis = (x.shape, x.dtype), axis
        self.rows = np.sort(rng.choice(rows, min(rows, max(1, CHECKED // n)), replace=False))
        taken = self._take_rows(x)
        top = taken.argmax(-1)[:, None]
        largest = np.take_along_axis(taken, top, -1).astype(wide)
        rest = np.zeros_like(largest)  # the sum but for the largest, which is 1
        for start in range(0, n, CHECKED):
            terms = np.exp(taken[:, start : start + CHECKED].astype(wide) - largest)
            terms[np.arange(start, start + terms.shape[1]) == top] = 0
            rest += terms.sum(-1, keepdims=True)
        self.columns: Any = slice(None)
        if n > CHECKED:
            few = rng.integers(0, n, CHECKED)
            self.columns = np.unique(np.concatenate([few, top.ravel(), np.arange(n - 100, n)]))
        shifted = taken[:, self.columns].astype(wide) - largest
        logs = function == "log_softmax"
        self.exact = shifted - np.log1p(rest) if logs else np.exp(shifted) / (1 + rest)

    def _take_rows(self, y: Array) -> Array:
        y = np.moveaxis(y, self.axis, -1)
        if y.size == y.shape[-1]:
            return y.reshape(1, -1)  # not a copy: it may be large
        return np.asarray(y[np.unravel_index(self.rows, y.shape[:-1])])

    def errors(self, y: Array) -> tuple[float, float, float]:
        """Return the largest, mean and median error in ULP; raise where y is of another kind."""
        shape, dtype = self.like
        if y.dtype != dtype:
            raise RefusedError(f"returns {y.dtype}, not {dtype}")
        if y.shape != shape:
            raise RefusedError(f"returns the shape {y.shape}, not {shape}")
        error = ulps(self._take_rows(y)[:, self.columns], self.exact).astype(np.float64)
        if not np.isfinite(error).all():
            raise RefusedError("returns what is not finite")
        return float(error.max()), float(error.mean()), float(np.median(error))


class Peers:
    """Plans on construction, measures in run(); report() may be asked for at any time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.notes: list[str] = []
        self.complete = False
        self.machine = _bench.machine()
        self.started = datetime.datetime.now(datetime.timezone.utc)
        self.load_before = _bench.load_average()
        self.cpus = choose_cpus(settings.threads)
        names = settings.libraries or tuple(LIBRARIES)
        self.versions = {
            name: library.version() for name, library in LIBRARIES.items() if name in (OURS, *names)
        }
        self.cases = list(self._plan())
        self._pace: dict[tuple[str, str], tuple[float, str]] = {}  # ns per element, seen where
        if self.load_before is not None and self.load_before > 0.5:
            self.notes.append(
                f"load average {self.load_before} before the start: other work disturbs the timing"
            )
        if settings.quick and settings.shapes is None:
            every = {shape.text: None for shape in default_shapes(quick=False)}
            for shape in default_shapes(quick=True):
                del every[shape.text]
            self.notes.append(f"--quick leaves out {', '.join(every)}")
        if not self.cpus:
            self.notes.append("this system cannot confine a process to CPUs: threads may differ")

    def _plan(self) -> Iterator[Case]:
        settings, known = self.settings, dtypes()
        have = int(0.8 * _bench.available_memory())
        limit = min(settings.max_bytes or have, have)
        for name in settings.dtypes:
            if name not in known:
                self.notes.append(f"{name}: not timed, it needs ml_dtypes")
                continue
            for shape in settings.shapes or default_shapes(settings.quick):
                case = Case(shape, known[name])
                if ARRAYS * case.bytes <= limit:
                    yield case
                    continue
                needs = (
                    f"{case.label}: not timed, it may need {_bench.size_text(ARRAYS * case.bytes)} "
                    f"of memory and {_bench.size_text(limit)} may be used"
                )
                if settings.shapes is not None:
                    raise _bench.TooLargeError(needs)
                self.notes.append(needs)

    def run(
        self,
        plan: Callable[[float], None] = lambda total: None,
        step: Callable[[str, float], None] = lambda label, done: None,
    ) -> None:
        """Tell plan how much there is to do, and step what was done and how much of it."""
        plan(sum(case.weight for case in self.cases))
        order = random.Random(self.settings.seed)
        with _confined(self.cpus, self.settings.threads):
            prepares: dict[str, Prepare | str] = {}
            for name in self.versions:
                step(f"importing {name}", 0.0)
                prepares[name] = self._load(name)
            gc.freeze()  # what was imported stays
            for case in self.cases:
                self._measure(case, prepares, order, step)
        self.complete = True

    def _load(self, name: str) -> Prepare | str:
        """Return what prepares calls, or why nothing can."""
        if self.versions[name] is None:
            return MISSING
        try:
            return LIBRARIES[name].load(self.settings.function, self.settings.threads)
        except Exception as error:
            return f"cannot be imported: {_reason(error)}"

    def _measure(
        self,
        case: Case,
        prepares: Mapping[str, Prepare | str],
        order: random.Random,
        step: Callable[[str, float], None],
    ) -> None:
        step(f"checking {case.label}", 0.0)
        gc.collect()
        x = self._input(case)
        reference = Reference(x, case.shape.axis, self.settings.function)
        calls: dict[str, Call] = {}
        for name, prepare in prepares.items():
            entry = case.entries[name] = Entry()
            try:
                if isinstance(prepare, str):
                    raise RefusedError(prepare)
                self._check_pace(case, name)
                call, as_array = prepare(x, case.shape.axis)
                _begin(entry, call, as_array, reference)
                calls[name] = call
            except Exception as error:
                entry.fail(error)
        del reference
        step(case.label, 0.0)
        warm = 2 * case.bytes <= max(_bench.caches().values(), default=0)
        for names in self._rounds(case, calls):
            for name in order.sample(names, len(names)):
                entry, call = case.entries[name], calls[name]
                try:
                    if self.settings.threads > 1:
                        time.sleep(0.01)  # the workers of the one before may still spin
                    if warm:
                        call()
                    entry.samples.append(_sample(call, entry.repeats))
                except Exception as error:
                    entry.fail(error)
                    del calls[name]
        for name, entry in case.entries.items():
            if entry.samples and case.shape.elements >= 1 << 16:
                pace = float(np.median(entry.samples)) / case.shape.elements
                self._pace[name, case.dtype.name] = pace, case.shape.text
        step(case.label, case.weight)

    def _input(self, case: Case) -> Array:
        rng = np.random.default_rng([self.settings.seed, case.shape.elements])
        wide: Any = np.float64 if case.dtype == np.float64 else np.float32
        x = rng.standard_normal(case.shape.dims, wide)
        x *= SCALE
        return x.astype(case.dtype, copy=False)

    def _check_pace(self, case: Case, library: str) -> None:
        """Refuse long calls that cannot win: the pace so far says so."""
        dtype, n = case.dtype.name, case.shape.elements
        ours, _ = self._pace.get((OURS, dtype), (math.inf, ""))
        pace, seen = self._pace.get((library, dtype), (0.0, ""))
        if pace * n > (LONG_NS_QUICK if self.settings.quick else LONG_NS) and pace > FAR * ours:
            raise RefusedError(
                f"sat out: {pace / ours:.0f} times the time of {OURS} at {seen}, "
                f"about {1e-9 * pace * n:.1f} s a call here"
            )

    def _rounds(self, case: Case, calls: Mapping[str, Call]) -> Iterator[list[str]]:
        """Name who takes part in the next round, as many rounds as the time allows."""
        settings = self.settings
        share = case.weight / sum(case.weight for case in self.cases)
        end = time.monotonic() + share * settings.seconds
        least = MIN_ROUNDS_QUICK if settings.quick else MIN_ROUNDS
        most = settings.rounds or MAX_ROUNDS
        for done in range(most):
            if settings.rounds is None and done >= least and time.monotonic() > end:
                break
            best = {name: min(case.entries[name].samples, default=0.0) for name in calls}
            limit = max(SAMPLE_NS, SLOW * min(best.values(), default=0.0))
            yield [
                name
                for name in calls
                if done < SLOW_ROUNDS or name == OURS or best[name] <= limit or settings.rounds
            ]

    def report(self) -> dict[str, Any]:
        """Return all that is known, ready for JSON."""
        settings = asdict(self.settings)
        if self.settings.shapes is not None:
            settings["shapes"] = [shape.text for shape in self.settings.shapes]
        cases = [_row(case) for case in self.cases if case.is_judged]
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "date": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started.timestamp(), 1),
            "machine": self.machine,
            "settings": settings,
            "cpus": self.cpus,
            "load_average": {"before": self.load_before, "after": _bench.load_average()},
            "notes": self.notes,
            "definitions": DEFINITIONS,
            "libraries": {name: version or MISSING for name, version in self.versions.items()},
            "cases": cases,
            "summary": summary(cases),
        }


def outcome(ours: _bench.Spread, peer: _bench.Spread) -> Outcome:
    """Tell a difference from noise: see the definition of a tie."""
    faster, slower = sorted((ours, peer), key=lambda time: time.median)
    near = slower.median - faster.median <= TIE * ours.median
    overlap = slower.q1 <= faster.q3
    confirmed = slower.minimum > faster.minimum * (1 + TIE)
    if near or (overlap and not confirmed):
        return "tie"
    return "win" if faster is ours else "loss"


def judge(times: Mapping[str, _bench.Spread]) -> dict[str, Any]:
    """Set our time against the hardest peer's; not having one of our own is a loss."""
    ours = times.get(OURS)
    peers = {name: time for name, time in times.items() if name != OURS}
    outcomes = {name: "loss" if ours is None else outcome(ours, t) for name, t in peers.items()}
    best = min(peers, key=lambda name: (outcomes[name] != "loss", peers[name].median), default=None)
    return {
        "best_peer": best,
        "ratio": peers[best].median / ours.median if best and ours else None,
        "outcome": outcomes[best] if best else None,
        "outcomes": outcomes,
    }


def summary(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count wins, ties and losses; list, worst first, the losses and what only noise saved."""

    def listed(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        keys = ("name", "dtype", "best_peer", "ratio")
        worst_first = sorted(found, key=lambda case: case["ratio"] or 0.0)
        return [{key: case[key] for key in keys} for case in worst_first]

    names = dict.fromkeys(case["dtype"] for case in cases)
    ties = (case for case in cases if case["outcome"] == "tie")
    return {
        **_counts(cases),
        "by_dtype": {n: _counts([case for case in cases if case["dtype"] == n]) for n in names},
        "losses_list": listed(case for case in cases if case["outcome"] == "loss"),
        "ties_behind_list": listed(case for case in ties if case["ratio"] < 1 - TIE),
    }


def _counts(cases: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    found = [case["outcome"] for case in cases]
    counts = {f"{name}s": found.count(name) for name in ("win", "tie")}
    return {**counts, "losses": found.count("loss"), "without_peer": found.count(None)}


def flat(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Spell out a report as one row per case and library, for CSV."""
    untimed = dict.fromkeys((f.name for f in fields(_bench.Spread)), None)
    for case in report["cases"]:
        head = {"shape": case["name"], "dtype": case["dtype"], "elements": case["elements"]}
        for result in case["results"]:
            timed = {**result, "ns_per_1000": result["ns_per_1000"] or untimed}
            yield head | _bench.flat(timed) | {"outcome": case["outcomes"].get(result["library"])}


def _row(case: Case) -> dict[str, Any]:
    n, entries = case.shape.elements, case.entries
    times = {name: _bench.spread_of(e.samples, n) for name, e in entries.items() if e.samples}
    return {
        "name": case.shape.text,
        "shape": list(case.shape.dims),
        "axis": case.shape.axis,
        "dtype": case.dtype.name,
        "elements": n,
        "results": [
            _result(name, entry, n, times.get(name), times.get(OURS))
            for name, entry in entries.items()
        ],
        **judge({name: time for name, time in times.items() if entries[name].status == "ok"}),
    }


def _result(
    name: str,
    entry: Entry,
    elements: int,
    time: _bench.Spread | None,
    ours: _bench.Spread | None,
) -> dict[str, Any]:
    return {
        "library": name,
        "status": "interrupted" if entry.status == "ok" and time is None else entry.status,
        "ns_per_1000": None if time is None else asdict(time),
        "us_per_call": None if time is None else time.median * elements * 1e-6,
        "ratio": time.median / ours.median if time and ours and name != OURS else None,
        "max_ulp": entry.max_ulp,
        "mean_ulp": entry.mean_ulp,
    }


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, RefusedError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}"[:200]


def _begin(entry: Entry, call: Call, as_array: AsArray, reference: Reference) -> None:
    """Make the first call, check its result, find the number of calls in a sample."""
    start = time.perf_counter_ns()
    y = as_array(call())
    first = time.perf_counter_ns() - start
    entry.max_ulp, entry.mean_ulp, median = reference.errors(y)
    if median > NO_RESULT[y.dtype.name]:
        entry.status = f"does not count: half of its results are {median:.0e} ULP off or more"
    del y
    for _ in range(0 if first > FIRST_NS else 3):
        wanted = max(1, round(SAMPLE_NS / max(1.0, _sample(call, entry.repeats))))
        settled = wanted < 2 * entry.repeats
        entry.repeats = wanted
        if settled:
            break


def _sample(call: Call, repeats: int) -> float:
    """Return ns per call."""
    rest = itertools.repeat(None, repeats)
    start = time.perf_counter_ns()
    for _ in rest:
        call()
    return (time.perf_counter_ns() - start) / repeats


def choose_cpus(threads: int) -> list[int]:
    """Choose as many CPUs of those this process may use, cores before their second threads."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0), reverse=True)  # the first CPU serves interrupts
    if threads > len(allowed):
        raise TooManyThreadsError(f"--threads {threads}: this process may use {len(allowed)} CPUs")
    cores: dict[str, list[int]] = {}
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text() if siblings.exists() else str(cpu), []).append(cpu)
    by_rank = itertools.zip_longest(*cores.values())
    return sorted([cpu for cpus in by_rank for cpu in cpus if cpu is not None][:threads])


@contextmanager
def _confined(cpus: Collection[int], threads: int) -> Iterator[None]:
    """Hold this thread, and those it starts, on the CPUs; collect no garbage meanwhile."""
    kept = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    allowed = os.sched_getaffinity(0) if cpus else ()
    gc.collect()
    gc.disable()
    try:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
        if cpus:
            os.sched_setaffinity(0, cpus)
        with softmaxlib.threads(threads), np.errstate(all="ignore"):
            yield
    finally:
        gc.enable()
        gc.unfreeze()
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        if cpus:
            os.sched_setaffinity(0, allowed)
