"""Measures what the page of ``softmaxlib bench --report`` shows, beside Bench's own sweep.

Every round times every case once: those of one dtype in a new random order, then the next dtype.
So neighbours in a plot were not neighbours in time, and what disturbs the machine for some seconds
does not look like a property of one size. A result is a median over the rounds.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import softmaxlib
from softmaxlib import _bench, _core

SCHEMA = "softmaxlib-report/1"
ITEM_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
PASS_TRAFFIC = {
    "max": 1,
    "sum": 1,
    "sum_known": 1,
    "write": 2,
    "store": 2,
    "store_known": 2,
    "scale": 2,
}
LIMIT_TRAFFIC = {kernel.name: kernel.traffic for kernel in _bench.LIMITS}
Shapes = tuple[tuple[tuple[int, ...], int], ...]
SCALING: Shapes = (
    ((1, 1 << 16), -1),
    ((1, 1 << 20), -1),
    ((1, 1 << 26), -1),
    ((65536, 64), -1),
    ((512, 32000), -1),
    ((4096, 4096), 0),
    ((512, 8, 4096), 1),
)
STRIDED: Shapes = (
    ((512, 8, 4096), 1),
    ((4096, 4096), 0),
    ((1024, 1024), 0),
    ((32, 512, 64), 1),
)
SHORT = (*range(1, 17), 20, 24, 32, 48, 64, 77, 100, 128, 200, 256, 333, 512, 777, 1000, 1024)
STEP = 1.25
STEPS = (
    "A step is where a row costs a quarter more per element than the next shorter one that was "
    "timed, beyond what the floor rises between them (for batches it does not: as many elements); "
    "or where a row takes a tenth less time, all of it, than the next shorter one. The quartiles "
    "of the two must be apart."
)

_MAX_ROUNDS = 31
_PATTERN = 1 << 20  # elements after which the logits repeat

Plan = Callable[[float], None]
Step = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    isas: tuple[str, ...]
    threads: int = 1
    quick: bool = False
    rounds: int | None = None  # None: as many as the time allows
    max_bytes: int | None = None  # of both arrays together
    seed: int = 2020

    @property
    def seconds(self) -> tuple[float, float]:
        """How long the sweep of the algorithms may take, and all else."""
        return (30.0, 60.0) if self.quick else (180.0, 300.0)


@dataclass(frozen=True)
class Case:
    """One thing to time. Functions run as a call would: algorithm and stores are the library's."""

    section: str
    kind: Literal["function", "pass", "limit"]
    name: str
    isa: str
    shape: tuple[int, ...]
    axis: int = -1
    dtype: str = "float32"
    threads: int = 1
    store: Literal["plain", "streaming"] | None = None  # of a pass

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes_per_array(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def length(self) -> int:
        """Of a row."""
        return self.shape[self.axis]


@dataclass
class Timed:
    """A case, and its samples."""

    case: Case
    repeats: int = 1
    call_ns: float = 0.0  # of the calibration
    rounds: int = 0
    schedule: str | None = None  # what the library chose
    reason: str | None = None
    samples: list[float] = field(default_factory=list)  # ns per call

    @property
    def warm(self) -> bool:
        """In cache, a call before the sample: the case before may have left other lines."""
        return _level(self.case) != "DRAM"

    @property
    def seconds(self) -> float:
        """Time of one sample."""
        return 1e-9 * self.call_ns * (self.repeats + self.warm)


class Report:
    """Plans on construction, measures in run(); report() may be asked for at any time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        sweep, self._seconds = settings.seconds
        self.bench = _bench.Bench(
            _bench.Settings(
                isas=settings.isas,
                threads=settings.threads,
                quick=settings.quick,
                rounds=settings.rounds,
                seconds=sweep,
                max_bytes=settings.max_bytes,
                seed=settings.seed,
            )
        )
        have = int(0.8 * _bench.available_memory())
        self._bytes_per_array = min(settings.max_bytes or have, have) // 2
        self.notes: list[str] = []
        self.complete = False
        self.peers: dict[str, Any] | None = None
        self.timed = [Timed(case) for case in dict.fromkeys(self._cases())]

    # ---- what to time ----------------------------------------------------------------------------

    def _cases(self) -> Iterator[Case]:
        left_out = set()
        for case in itertools.chain(
            self._passes(),
            self._one_row(),
            self._batches(),
            self._short_rows(),
            self._strided(),
            self._threads(),
            self._functions(),
        ):
            if case.bytes_per_array <= self._bytes_per_array:
                yield case
            else:
                left_out.add(case.bytes_per_array)
        if left_out:
            self.notes.append(
                f"left out what needs two arrays of {_bench.size_text(min(left_out))} or more each:"
                f" {_bench.size_text(2 * self._bytes_per_array)} of memory may be used"
            )

    def _limits(self, section: str, elements: int, *names: str, threads: int = 0) -> Iterator[Case]:
        best = _core.isas_available()[0]
        for name in names or ("read", "copy", "streaming_copy"):
            yield Case(
                section, "limit", name, best, (elements,), threads=threads or self.settings.threads
            )

    def _function(
        self,
        section: str,
        shape: tuple[int, ...],
        axis: int = -1,
        *,
        name: str = "softmax",
        isa: str = "",
        dtype: str = "float32",
        threads: int = 0,
    ) -> Case:
        isa, threads = isa or self.settings.isas[0], threads or self.settings.threads
        return Case(section, "function", name, isa, shape, axis, dtype, threads)

    def _passes(self) -> Iterator[Case]:
        threads = self.settings.threads
        for elements in (*_half_caches(), max(self.bench.groups)):
            yield from self._limits("passes", elements, *LIMIT_TRAFFIC)
            in_cache = _bench.cache_level(elements) != "DRAM"
            for isa, name in itertools.product(self.settings.isas, PASS_TRAFFIC):
                streams = name in ("write", "scale") and not in_cache
                stores: tuple[Any, ...] = ("plain", "streaming") if streams else ("plain",)
                for store in stores:
                    yield Case(
                        "passes",
                        "pass",
                        name,
                        isa,
                        (elements,),
                        threads=threads,
                        store=store if PASS_TRAFFIC[name] > 1 else None,
                    )

    def _one_row(self) -> Iterator[Case]:
        quick = self.settings.quick
        for dtype, item in ITEM_BYTES.items():
            most = min(1 << (26 if quick else 28), self._bytes_per_array // item)
            for n in _lengths(most, odd=not quick):
                yield self._function("one_row", (1, n), dtype=dtype)
                if dtype == "float32" and n >= 1024 and n & (n - 1) == 0:
                    yield from self._limits("one_row", n)

    def _batches(self) -> Iterator[Case]:
        for total, (dtype, item) in itertools.product(self._totals(), ITEM_BYTES.items()):
            for n in _lengths(total, odd=not self.settings.quick):
                yield self._function("batches", (total // n, n), dtype=dtype)
            # The bytes of this dtype, copied as floats.
            yield from self._limits("batches", total * item // 4)

    def _short_rows(self) -> Iterator[Case]:
        total = self._totals()[-1]
        lengths = [n for n in SHORT if not self.settings.quick or n < 8 or n % 4 == 0]
        for isa, n in itertools.product(self.settings.isas, lengths):
            yield self._function("short_rows", (total // n, n), isa=isa)
        yield from self._limits("short_rows", total)

    def _strided(self) -> Iterator[Case]:
        for shape, axis in STRIDED:
            for isa in self.settings.isas:
                yield self._function("strided", shape, axis, isa=isa)
                yield self._function("strided", shape, isa=isa)
            yield from self._limits("strided", math.prod(shape))

    def _threads(self) -> Iterator[Case]:
        counts = thread_counts()
        for threads in counts if len(counts) > 1 else ():
            for shape, axis in SCALING:
                yield self._function("threads", shape, axis, threads=threads)
            yield from self._limits("threads", 1 << 26, "streaming_copy", threads=threads)

    def _functions(self) -> Iterator[Case]:
        inside, outside = 1 << 15, 1 << 26
        while outside > inside and 8 * outside > self._bytes_per_array:
            outside //= 2
        for elements in (inside, outside):
            for name, dtype in itertools.product(_core.functions, ITEM_BYTES):
                yield self._function("functions", (1, elements), name=name, dtype=dtype)
            for item in sorted(set(ITEM_BYTES.values())):
                yield from self._limits("functions", elements * item // 4)

    def _totals(self) -> tuple[int, ...]:
        """Elements of a batch, in cache and out of it: x and y 4x the last level, 2x if quick."""
        last = max(_bench.caches().values(), default=32 << 20)
        outside = max(1 << 24, 1 << (last // 2 - 1).bit_length()) // (
            2 if self.settings.quick else 1
        )
        while outside > 1 << 16 and 8 * outside > self._bytes_per_array:
            outside //= 2
        return tuple(sorted({1 << 16, outside}))

    # ---- measuring -------------------------------------------------------------------------------

    def run(self, plan: Plan = lambda seconds: None, step: Step = lambda what, done: None) -> None:
        """Tell plan how many seconds each part of the run will take, and step what was done."""
        self.bench.run(plan, lambda what, done: step(f"sweep: {what}", done))
        needed = max((timed.case.bytes_per_array for timed in self.timed), default=0)
        arena = _Arena(needed, self.settings.seed)
        most = max((timed.case.threads for timed in self.timed), default=1)
        with ThreadPoolExecutor(most) as pool:
            self._calibrate(arena, pool, step)
            plan(sum(timed.seconds * timed.rounds for timed in self.timed))
            order = random.Random(self.settings.seed)
            for i in range(max((timed.rounds for timed in self.timed), default=0)):
                for members in self._by_dtype():
                    members = [timed for timed in members if timed.rounds > i]
                    for timed in order.sample(members, len(members)):
                        if timed.warm:
                            arena.time(timed.case, 1, pool)
                        timed.samples.append(arena.time(timed.case, timed.repeats, pool))
                        step(_label(timed.case), timed.seconds)
        del arena
        if importlib.util.find_spec("softmaxlib._peers"):
            self._run_peers(plan, step)
        self.complete = True

    def _run_peers(self, plan: Plan, step: Step) -> None:
        peers: Any = importlib.import_module("softmaxlib._peers")
        settings = peers.Settings(quick=self.settings.quick, threads=self.settings.threads)
        side_by_side = peers.Peers(settings)
        try:
            side_by_side.run(plan, lambda what, done: step(f"peers: {what}", done))
        finally:
            self.peers = side_by_side.report()

    def _calibrate(self, arena: _Arena, pool: ThreadPoolExecutor, step: Step) -> None:
        for members in self._by_dtype():
            for timed in members:
                step(f"calibrating {_label(timed.case)}", 0.0)
                timed.schedule = arena.schedule(timed.case)
                timed.reason = _reason(timed.case)
                for _ in range(3):
                    timed.call_ns = max(1.0, arena.time(timed.case, timed.repeats, pool))
                    wanted = max(1, round(_bench.SAMPLE_NS / timed.call_ns))
                    if wanted < 2 * timed.repeats:
                        break
                    timed.repeats = wanted
                timed.repeats = wanted
        # Each case gets the same time, so that one of many seconds does not starve the others.
        fewest = 3 if self.settings.quick else _bench.MIN_ROUNDS
        share = self._seconds / max(1, len(self.timed))
        for timed in self.timed:
            fits = int(share / timed.seconds)
            timed.rounds = self.settings.rounds or min(max(fits, fewest), _MAX_ROUNDS)

    def _by_dtype(self) -> list[list[Timed]]:
        return [[t for t in self.timed if t.case.dtype == dtype] for dtype in ITEM_BYTES]

    # ---- results ---------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Return all that is known, ready for JSON."""
        bench = self.bench.report()
        rows = [_row(timed) for timed in self.timed if timed.samples]
        shared = ("date", "machine", "load_average")
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            **{key: bench[key] for key in shared},
            "seconds": round(time.time() - self.bench.started.timestamp(), 1),
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "settings": asdict(self.settings),
            "notes": [*self.bench.notes, *self.notes],
            "definitions": bench["definitions"] | {"steps": STEPS},
            "sweep": {key: bench[key] for key in ("complete", "rows", "headline")},
            "rows": rows,
            "steps": list(steps(rows)),
            "peers": self.peers,
        }


class _Arena:
    """Input and output of every case: the same two stretches of memory."""

    def __init__(self, bytes_per_array: int, seed: int) -> None:
        self._x, self._y = (_bench.aligned(-(-bytes_per_array // 4)) for _ in range(2))
        self._y.fill(0)  # the pages are there before the clock starts
        pattern = np.random.default_rng(seed).standard_normal(_PATTERN)
        self._patterns = {dtype: _as(dtype, pattern) for dtype in ITEM_BYTES}
        self._filled: tuple[str, int] | None = None

    def _fill(self, dtype: str, elements: int) -> None:
        if self._filled and self._filled[0] == dtype and self._filled[1] >= elements:
            return
        pattern = self._patterns[dtype]
        x = self._x.view(pattern.dtype)[:elements]
        for start in range(0, elements, _PATTERN):
            part = x[start : start + _PATTERN]
            part[:] = pattern[: len(part)]
        self._filled = (dtype, elements)

    def _views(self, case: Case) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        self._fill(case.dtype, case.elements)
        item = self._patterns[case.dtype].dtype
        shape = case.shape
        if case.name == "logsumexp":
            shape = shape[:-1]
        return (
            self._x.view(item)[: case.elements].reshape(case.shape),
            self._y.view(item)[: math.prod(shape)].reshape(shape),
        )

    def time(self, case: Case, repeats: int, pool: ThreadPoolExecutor) -> float:
        """Return ns per call."""
        x, y = self._views(case)
        isa = _core.isas[case.isa]
        if case.kind == "function":
            function, dtype = _core.functions[case.name], _core.dtypes[case.dtype]
            algorithm, store = _core.algorithms["auto"], _core.stores["auto"]
            return _core.time_run(
                function, x, y, dtype, algorithm, isa, store, case.threads, repeats, case.axis
            )

        def part(p: slice) -> float:
            if case.kind == "limit":
                return _core.time_roofline(_core.rooflines[case.name], isa, x[p], y[p], repeats)
            streaming = case.store == "streaming"
            return _core.time_pass(_core.passes[case.name], isa, x[p], y[p], streaming, repeats)

        if case.threads == 1:
            return part(slice(None))
        return max(pool.map(part, _bench.parts(case.elements, case.threads)))

    def schedule(self, case: Case) -> str | None:
        """Return what the library chooses for a function."""
        if case.kind != "function":
            return None
        x, y = self._views(case)
        dtype = _core.dtypes[case.dtype]
        _core.run(
            _core.functions[case.name],
            x,
            y,
            dtype,
            dtype,
            (case.axis % x.ndim,),
            1.0,
            None,
            None,
            0,
            None,
            _core.algorithms["auto"],
            _core.isas[case.isa],
            _core.stores["auto"],
            case.threads,
        )
        _, _, store, tasks, kernel = _core.last_report()
        names = [kernel, f"{_name(_core.stores, store)} stores"]
        return ", ".join(names + ["parallel"] * (tasks > 1))


def thread_counts() -> list[int]:
    """Return from 1 to what a call would use: each, or powers of two where they are many."""
    most = softmaxlib.get_num_threads()
    counts = range(1, most + 1) if most <= 8 else (1 << i for i in range(most.bit_length()))
    return sorted({*counts, most})


def floors(rows: Iterable[Mapping[str, Any]], section: str) -> dict[int, dict[str, float]]:
    """Return ns per 1,000 floats by elements: of each limit, and of two passes, as "floor"."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["section"] == section and row["kind"] == "limit":
            found.setdefault(row["elements"], {})[row["name"]] = row["ns_per_1000"]["median"]
    for limits in found.values():
        copies = [limits[name] for name in ("copy", "streaming_copy") if name in limits]
        if copies:
            limits["best_copy"] = min(copies)
        if copies and "read" in limits:
            limits["floor"] = limits["read"] + min(copies)
    return found


def batch_total(row: Mapping[str, Any]) -> int:
    """Return the power of two that a batch has for elements, but for the part of a last row."""
    return 1 << (int(row["elements"]) - 1).bit_length()


def steps(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Find the cliffs among rows and batches: see STEPS."""
    timed = floors(rows, "one_row").items()
    floor = {n: limits["floor"] for n, limits in timed if "floor" in limits}
    lengths = sorted(floor)

    def floor_at(row: Mapping[str, Any]) -> float:
        if row["section"] != "one_row" or not lengths:
            return 1.0
        n = row["bytes_per_array"] / 4
        return float(np.interp(math.log(n), np.log(lengths), [floor[k] for k in lengths]))

    def line(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return (row["section"], row["dtype"], row["section"] == "batches" and batch_total(row))

    kept = [row for row in rows if row["section"] in ("one_row", "batches")]
    kept = sorted((row for row in kept if row["kind"] == "function"), key=line)
    for (section, dtype, _), members in itertools.groupby(kept, key=line):
        ordered = sorted(members, key=lambda row: row["length"])
        for a, b in zip(ordered[:-1], ordered[1:], strict=True):
            before, after = a["ns_per_1000"], b["ns_per_1000"]
            rise = after["median"] / before["median"]
            expected = max(1.0, floor_at(b) / floor_at(a))
            longer = b["length"] / a["length"]
            costs_more = rise >= STEP * expected and after["q1"] > before["q3"]
            takes_less = rise * longer <= 0.9 and after["q3"] * longer < before["q1"]
            if costs_more or takes_less:
                yield {
                    "section": section,
                    "dtype": dtype,
                    "from": a["shape"],
                    "to": b["shape"],
                    "ns_per_1000_from": before["median"],
                    "ns_per_1000_to": after["median"],
                    "rise": rise,
                    "rise_of_floor": expected,
                    "time_of_a_row": rise * longer,
                    "schedule_from": a["schedule"],
                    "schedule_to": b["schedule"],
                }


def _half_caches() -> Iterator[int]:
    """Elements of two arrays that fill half of each level of cache."""
    for size in _bench.caches().values():
        yield 1 << ((size // 16).bit_length() - 1)


def _lengths(most: int, odd: bool) -> list[int]:
    """Return powers of two up to most, and odd numbers between them."""
    powers = [1 << i for i in range(most.bit_length())]
    between = [3] + [3 * n // 2 + 1 for n in powers if n >= 4]
    return sorted(n for n in (*powers, *(between if odd else ())) if n <= most)


def _level(case: Case) -> str:
    """Name the smallest cache that holds x and y."""
    return _bench.cache_level(case.bytes_per_array // 4)


def _label(case: Case) -> str:
    shape = "x".join(f"{n}" for n in case.shape)
    return f"{case.section}: {case.name} {shape}"


def _row(timed: Timed) -> dict[str, Any]:
    case = timed.case
    spread = _bench.spread_of(timed.samples, case.elements)
    traffic = None
    if case.kind != "function":
        traffic = (PASS_TRAFFIC if case.kind == "pass" else LIMIT_TRAFFIC)[case.name]
    return asdict(case) | {
        "shape": list(case.shape),
        "elements": case.elements,
        "length": case.length,
        "bytes_per_array": case.bytes_per_array,
        "level": _level(case),
        "ns_per_1000": asdict(spread),
        "gb_per_s": None
        if traffic is None
        else 1000 * ITEM_BYTES[case.dtype] * traffic / spread.median,
        "schedule": timed.schedule,
        "reason": timed.reason,
    }


def _reason(case: Case) -> str | None:
    """Ask the library why it chooses the kernel."""
    if case.kind != "function":
        return None
    with softmaxlib.threads(case.threads), softmaxlib.use_isa(case.isa):
        return softmaxlib.explain(case.shape, case.dtype, case.axis, function=case.name).why_kernel


def _name(codes: Mapping[str, int], code: int) -> str:
    return next(name for name, known in codes.items() if known == code)


def _as(dtype: str, values: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) >> 16).astype(np.uint16)
