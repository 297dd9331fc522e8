"""Times softmax beside other libraries, on the same arrays: `softmaxlib bench --peers`.

A case, a shape and a dtype, is a group of the timing engine (`_tools.timing`): all libraries are
timed side by side and compared by pairs of samples. Outputs are checked against the exact values.

The arrays of all cases do not fit in memory at once. So cases are timed in batches, small arrays
first: as many as may need BATCH_BYTES, or a quarter of the memory that may be used, together; one
beyond that is alone. Each batch has its share of the seconds, and its samples are spread over the
batch, not over the whole run.

The libraries are imported on the CPUs that are timed, and their threads stay there. Moved away
from a timed CPU, JAX's, which computes in another thread than the caller's, would have a second
CPU; imported before, it would start a thread for each. Nothing of theirs disturbs that CPU: with
one thread torch and ONNX Runtime start none that computes, and those of JAX sleep between calls.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np

import softmaxlib
from softmaxlib import _bench
from softmaxlib._peer_calls import LIBRARIES, OURS, Array, Call, Function, Prepare
from softmaxlib._tools import timing
from softmaxlib._tools.timing import Estimate, Verdict
from softmaxlib._verify import dtypes, ulps

Outcome = Literal["loss", "cannot tell", "tie", "win"]

SCHEMA = "softmaxlib-peers/2"
SCALE = 5.0  # of the normal logits
TIE = 0.03
DEFINITIONS = {
    "time": "A time is the lower quartile of the samples that nothing disturbed, with its 90 % "
    "interval; of all samples where fewer than "
    f"{timing.MIN_CLEAN} were undisturbed. It is noisy where that is so or the interval is wider "
    "than 10 % of it.",
    "ratio": "A ratio is the time of a peer over that of softmaxlib: above 1 softmaxlib is faster. "
    "It is the median over pairs of undisturbed samples that were taken next to each other, with "
    "its 99 % interval.",
    "outcome": "A win or a loss is a ratio whose interval excludes 1 and which is more than "
    f"{TIE:.0%} from it. A tie is a ratio whose interval lies within {TIE:.0%} of 1. All else "
    "cannot be told from the samples.",
    "peer": "The peer of a case is the fastest of those softmaxlib loses to, else the fastest. "
    "One of which the outcome cannot be told counts with the fastest of its samples, since it "
    "might be as fast as that. The outcome of a case is that against its peer.",
    "call": "A call includes the allocation of its result. The input is made before: it is an "
    "array of NumPy's, a torch tensor that shares its memory, or a copy of JAX's. Large results of "
    "NumPy and softmaxlib are new pages each time, and so are those of the other libraries unless "
    "they keep them.",
    "threads": "The process is confined to as many CPUs as threads before the peers are imported. "
    "Where a library has a setting for the number of threads, it is set too. OpenVINO is told to "
    "compute in float32, not bfloat16.",
    "error": "An error is counted in ULP of the dtype of the result, against values computed in "
    "double, or long double for float64. It is that of up to 2^18 elements of a case, with the sum "
    "over their whole rows.",
    "input": f"The input is normal logits times {SCALE:g}, rounded to the dtype.",
}
_OUTCOMES: dict[Verdict, Outcome] = {
    "slower": "loss",
    "cannot tell": "cannot tell",
    "same": "tie",
    "faster": "win",
}

DTYPES = ("float32", "float64", "float16", "bfloat16")
MOST_QUICK = 1 << 26
MOST_DIMS = 32  # NumPy 1.x has no more
ARRAYS = 8  # of the size of x, at most, that a call of any library and its result need
BATCH, BATCH_BYTES = 48, 4 << 30  # cases at most, and what they may need
CHECKED = 1 << 18
MISSING = "not installed"

# A median error beyond this is no result of the dtype: nothing right, or float32 called float64.
NO_RESULT = {"float32": 2.0**22, "float64": 2.0**24, "float16": 2.0**9, "bfloat16": 2.0**6}

FIRST_NS = 5e8  # a first call as long as this tells the pace as well as a second
FAR, LONG_NS, LONG_NS_QUICK = 5, 5e8, 1e8  # who is as far behind and so slow is not called

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
    seconds: float = 420.0  # of all samples
    rounds: int | None = None  # None: as many as the time allows
    seed: int = 2020
    max_bytes: int | None = None


@dataclass
class Entry:
    """One library in one case."""

    status: str = "ok"  # or why it does not count
    max_ulp: float | None = None
    mean_ulp: float | None = None
    call: Call | None = None  # while the arrays are there
    timed: timing.Case | None = None

    def fail(self, error: Exception) -> None:
        self.status, self.call, self.timed = _reason(error), None, None

    def run(self, repeats: int) -> float:
        """Return ns per call; NaN of what has failed."""
        call, rest = self.call, itertools.repeat(None, repeats)
        if call is None:
            return math.nan
        try:
            start = time.perf_counter_ns()
            for _ in rest:
                call()
            return (time.perf_counter_ns() - start) / repeats
        except Exception as error:
            self.fail(error)
            return math.nan

    @property
    def sampled(self) -> timing.Case | None:
        return self.timed if self.timed is not None and self.timed.samples else None


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
        return ours is not None and (ours.sampled is not None or ours.status != "ok")

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
        self.cpus = timing.choose_cpus(settings.threads)
        if 0 < len(self.cpus) < settings.threads:
            raise TooManyThreadsError(
                f"--threads {settings.threads}: this process may use {len(self.cpus)} CPUs"
            )
        self.timed = timing.machine_state(self.cpus)
        have = int(0.8 * _bench.available_memory())
        self._limit = min(settings.max_bytes or have, have)
        names = settings.libraries or tuple(LIBRARIES)
        self.versions = {
            name: library.version() for name, library in LIBRARIES.items() if name in (OURS, *names)
        }
        self.cases = list(self._plan())
        self._pace: dict[tuple[str, str], float] = {}  # ns per element, the least seen
        if settings.quick and settings.shapes is None:
            every = {shape.text: None for shape in default_shapes(quick=False)}
            for shape in default_shapes(quick=True):
                del every[shape.text]
            self.notes.append(f"--quick leaves out {', '.join(every)}")
        if not self.cpus:
            self.notes.append("this system cannot confine a process to CPUs: threads may differ")

    def _plan(self) -> Iterator[Case]:
        settings, known = self.settings, dtypes()
        limit = self._limit
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

    def _batches(self) -> list[list[Case]]:
        limit = min(self._limit // 4, BATCH_BYTES)
        found: list[list[Case]] = []
        needed = math.inf
        for case in sorted(self.cases, key=lambda case: case.bytes):
            needed += ARRAYS * case.bytes
            if needed > limit or len(found[-1]) == BATCH:
                found.append([])
                needed = ARRAYS * case.bytes
            found[-1].append(case)
        return found

    def run(
        self,
        plan: timing.Plan = lambda seconds: None,
        step: timing.Step = lambda label, seconds: None,
    ) -> None:
        """Tell plan how many seconds it will take, and step what was done and for how many."""
        plan(self.settings.seconds)
        with _confined(self.cpus, self.settings.threads):
            prepares: dict[str, Prepare | str] = {}
            for name in self.versions:
                step(f"importing {name}", 0.0)
                prepares[name] = self._load(name)
            gc.freeze()  # what was imported stays
            for batch in self._batches():
                self._measure(batch, prepares, step)
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
        self, batch: Sequence[Case], prepares: Mapping[str, Prepare | str], step: timing.Step
    ) -> None:
        for case in batch:
            step(f"checking {case.label}", 0.0)
            self._check(case, prepares)
        entries = [entry for case in batch for entry in case.entries.values()]
        timed = [entry.timed for entry in entries if entry.timed is not None]
        whole = sum(case.weight for case in self.cases)
        share = self.settings.seconds * sum(case.weight for case in batch) / whole
        engine = timing.Engine(
            timed,
            seconds=share,
            rounds=self.settings.rounds,
            cpus=self.cpus,
            seed=self.settings.seed,
        )
        scale = 1.0  # of what it takes to what was announced

        def announce(seconds: float) -> None:
            nonlocal scale
            scale = share / max(seconds, 1e-9)

        engine.run(announce, lambda label, seconds: step(label, scale * seconds))
        for entry in entries:
            entry.call = None
        gc.collect()

    def _check(self, case: Case, prepares: Mapping[str, Prepare | str]) -> None:
        """Prepare all calls of a case, and check what they return."""
        x = self._input(case)
        reference = Reference(x, case.shape.axis, self.settings.function)
        level = _bench.cache_level(case.bytes // 4)
        several = self.settings.threads > 1
        for name, prepare in prepares.items():
            entry = case.entries[name] = Entry()
            try:
                if isinstance(prepare, str):
                    raise RefusedError(prepare)
                self._check_pace(case, name)
                entry.call, as_array = prepare(x, case.shape.axis)
                start = time.perf_counter_ns()
                y = as_array(entry.call())
                took: float = time.perf_counter_ns() - start
                entry.max_ulp, entry.mean_ulp, median = reference.errors(y)
            except Exception as error:
                entry.fail(error)
                continue
            del y
            if median > NO_RESULT[case.dtype.name]:
                entry.status = (
                    f"does not count: half of its results are {median:.0e} ULP off or more"
                )
            entry.timed = timing.Case(
                f"{case.label}, {name}",
                entry.run,
                group=case.label,
                warm=level != "DRAM",
                shared=level in ("L3", "DRAM"),
                threads=self.settings.threads,
                spins=several and name != OURS,
                hands_over=not several and name != OURS,
                weight=case.weight,
            )
            if case.shape.elements >= 1 << 16:
                took = took if took > FIRST_NS else entry.run(1)
                key = name, case.dtype.name
                self._pace[key] = min(took / case.shape.elements, self._pace.get(key, math.inf))

    def _input(self, case: Case) -> Array:
        rng = np.random.default_rng([self.settings.seed, case.shape.elements])
        wide: Any = np.float64 if case.dtype == np.float64 else np.float32
        x = rng.standard_normal(case.shape.dims, wide)
        x *= SCALE
        return x.astype(case.dtype, copy=False)

    def _check_pace(self, case: Case, library: str) -> None:
        """Refuse long calls that cannot win: the pace so far says so."""
        dtype, n = case.dtype.name, case.shape.elements
        ours = self._pace.get((OURS, dtype), math.inf)
        pace = self._pace.get((library, dtype), 0.0)
        if pace * n > (LONG_NS_QUICK if self.settings.quick else LONG_NS) and pace > FAR * ours:
            raise RefusedError(
                f"sat out: at best {pace / ours:.0f} times the time of {OURS} so far, "
                f"about {1e-9 * pace * n:.1f} s a call here"
            )

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
            "timed": self.timed,
            "notes": self.notes,
            "definitions": DEFINITIONS,
            "libraries": {name: version or MISSING for name, version in self.versions.items()},
            "cases": cases,
            "summary": summary(cases),
        }


def judge(ours: timing.Case | None, peers: Mapping[str, timing.Case]) -> dict[str, Any]:
    """Set our time against the hardest peer's; not having one of our own is a loss."""
    outcomes: dict[str, Outcome] = {
        name: "loss" if ours is None else _OUTCOMES[timing.verdict(timing.ratio(ours, peer), TIE)]
        for name, peer in peers.items()
    }

    def hardest_first(name: str) -> tuple[bool, float]:
        peer, outcome = peers[name], outcomes[name]
        if outcome == "cannot tell":
            return True, min(sample.ns for sample in peer.samples)
        return outcome != "loss", timing.time_of(peer).value

    best = min(peers, key=hardest_first, default=None)
    return {
        "best_peer": best,
        "ratio": asdict(timing.ratio(peers[best], ours)) if best and ours else None,
        "outcome": outcomes[best] if best else None,
        "outcomes": outcomes,
    }


def summary(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count the outcomes; list, worst first, the losses and what cannot be told."""

    def listed(outcome: Outcome) -> list[dict[str, Any]]:
        keys = ("name", "dtype", "best_peer", "ratio")
        found = [{key: c[key] for key in keys} for c in cases if c["outcome"] == outcome]
        return sorted(found, key=lambda c: c["ratio"]["value"] if c["ratio"] else 0.0)

    names = dict.fromkeys(case["dtype"] for case in cases)
    return {
        **_counts(cases),
        "by_dtype": {n: _counts([case for case in cases if case["dtype"] == n]) for n in names},
        "losses_list": listed("loss"),
        "cannot_tell_list": listed("cannot tell"),
    }


def _counts(cases: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    found = [case["outcome"] for case in cases]
    keys: dict[str, Outcome | None] = {
        "wins": "win",
        "ties": "tie",
        "losses": "loss",
        "cannot_tell": "cannot tell",
        "without_peer": None,
    }
    return {key: found.count(outcome) for key, outcome in keys.items()}


def flat(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Spell out a report as one row per case and library, for CSV."""
    none = dict.fromkeys((f.name for f in fields(Estimate)), None)
    for case in report["cases"]:
        head = {"shape": case["name"], "dtype": case["dtype"], "elements": case["elements"]}
        for result in case["results"]:
            full = {key: result[key] or none for key in ("ns_per_1000", "ratio")}
            outcome = case["outcomes"].get(result["library"])
            yield head | _bench.flat({**result, **full}) | {"outcome": outcome}


def _row(case: Case) -> dict[str, Any]:
    entries = case.entries
    counted = {name: e.sampled for name, e in entries.items() if e.sampled and e.status == "ok"}
    return {
        "name": case.shape.text,
        "shape": list(case.shape.dims),
        "axis": case.shape.axis,
        "dtype": case.dtype.name,
        "elements": case.shape.elements,
        "results": [
            _result(name, entry, case.shape.elements, entries[OURS].sampled)
            for name, entry in entries.items()
        ],
        **judge(counted.pop(OURS, None), counted),
    }


def _result(name: str, entry: Entry, elements: int, ours: timing.Case | None) -> dict[str, Any]:
    timed = entry.sampled
    time = None if timed is None else _bench.per_1000(timed, elements)
    return {
        "library": name,
        "status": "interrupted" if entry.status == "ok" and time is None else entry.status,
        "ns_per_1000": None if time is None else asdict(time),
        "noisy": None if time is None else time.noisy,
        "us_per_call": None if time is None else time.value * elements * 1e-6,
        "ratio": asdict(timing.ratio(timed, ours)) if timed and ours and name != OURS else None,
        "max_ulp": entry.max_ulp,
        "mean_ulp": entry.mean_ulp,
        "samples": [(s.visit, s.ns, s.disturbed) for s in timed.samples] if timed else [],
    }


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, RefusedError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}"[:200]


@contextmanager
def _confined(cpus: Sequence[int], threads: int) -> Iterator[None]:
    """Hold this thread, and those it starts, on the CPUs, and tell libraries their number."""
    kept = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    try:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
        with timing.pinned(cpus), softmaxlib.threads(threads), np.errstate(all="ignore"):
            yield
    finally:
        gc.unfreeze()
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
