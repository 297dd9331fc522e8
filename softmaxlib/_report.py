"""Measures what the page of ``softmaxlib bench --report`` shows, beside Bench's own sweep.

Functions, passes and limits on as much data, of one section of the page, are a group of the timing
engine (`_tools.timing`), which spreads the samples of all groups over the run: neighbours in a plot
were not neighbours in time.
"""

from __future__ import annotations

import collections
import datetime
import importlib
import importlib.util
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import softmaxlib
from softmaxlib import _bench, _core
from softmaxlib._tools import timing
from softmaxlib._tools.timing import Estimate

SCHEMA = "softmaxlib-report/2"
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
COPIES = ("copy", "streaming_copy")
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
    "or where a row takes a tenth less time, all of it, than the next shorter one. The intervals "
    "of the two must be apart, and nothing that this is concluded from may be noisy."
)

_PATTERN = 1 << 20  # elements after which the logits repeat


@dataclass(frozen=True)
class Settings:
    isas: tuple[str, ...]
    threads: int = 1
    quick: bool = False
    rounds: int | None = None  # None: as many as the time allows
    max_bytes: int | None = None  # of all arrays together
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

    @property
    def level(self) -> str:
        """Name the smallest cache that holds x and y."""
        return _bench.cache_level(self.bytes_per_array // 4)

    @property
    def group(self) -> tuple[str, int]:
        """What it is timed next to: of its section, what has as many bytes, or nearly so."""
        return self.section, _power_above(self.bytes_per_array)

    @property
    def label(self) -> str:
        return f"{self.section}: {self.name} {'x'.join(map(str, self.shape))}"


class Report:
    """Plans on construction, measures in run(); report() may be asked for at any time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        sweep, seconds = settings.seconds
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
        # An input of each dtype, and one output.
        self._bytes_per_array = min(settings.max_bytes or have, have) // (len(ITEM_BYTES) + 1)
        self.notes: list[str] = []
        self.complete = False
        self.peers: dict[str, Any] | None = None
        cases = list(dict.fromkeys(self._cases()))
        sizes = collections.Counter(case.group for case in cases)
        self.timed = {case: self._timed(case, sizes[case.group]) for case in cases}
        self._most_threads = max((case.threads for case in cases), default=1)
        self.engine = timing.Engine(
            list(self.timed.values()),
            seconds=seconds,
            rounds=settings.rounds,
            cpus=timing.choose_cpus(self._most_threads),
            seed=settings.seed,
        )

    def _timed(self, case: Case, group_size: int) -> timing.Case:
        return timing.Case(
            case.label,
            lambda repeats: self._arena.time(case, repeats, self._pool),
            group=case.group,
            warm=case.level != "DRAM",
            shared=case.level in ("L3", "DRAM"),
            threads=case.threads,
            weight=group_size,  # every case gets the same time
        )

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
                f"left out what needs arrays of {_bench.size_text(min(left_out))} or more: "
                f"{_bench.size_text(self._bytes_per_array)} may be used for each"
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

    def run(
        self,
        plan: timing.Plan = lambda seconds: None,
        step: timing.Step = lambda label, seconds: None,
    ) -> None:
        """Tell plan how many seconds each part of the run will take, and step what was done."""
        self.bench.run(plan, lambda what, done: step(f"sweep: {what}", done))
        step("filling the arrays", 0.0)
        self._arena = _Arena(self.timed, self.settings.seed)
        with ThreadPoolExecutor(self._most_threads) as self._pool:
            self.engine.run(plan, step)
        del self._arena
        if importlib.util.find_spec("softmaxlib._peers"):
            self._run_peers(plan, step)
        self.complete = True

    def _run_peers(self, plan: timing.Plan, step: timing.Step) -> None:
        peers: Any = importlib.import_module("softmaxlib._peers")
        settings = peers.Settings(quick=self.settings.quick, threads=self.settings.threads)
        side_by_side = peers.Peers(settings)
        try:
            side_by_side.run(plan, lambda what, done: step(f"peers: {what}", done))
        finally:
            self.peers = side_by_side.report()

    # ---- results ---------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Return all that is known, ready for JSON."""
        bench = self.bench.report()
        rows = list(_rows(self.timed))
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "date": bench["date"],
            "machine": bench["machine"],
            "timed": self.engine.state,
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
    """Input and output of every case: a stretch of memory for each dtype, and one for results."""

    def __init__(self, cases: Iterable[Case], seed: int) -> None:
        most: dict[str, int] = {}
        for case in cases:
            most[case.dtype] = max(most.get(case.dtype, 0), case.bytes_per_array)
        pattern = np.random.default_rng(seed).standard_normal(_PATTERN)
        self._x = {dtype: _filled(size, _as(dtype, pattern)) for dtype, size in most.items()}
        self._y = _bench.aligned(2 * -(-max(most.values(), default=0) // 8))  # whole doubles
        self._y.fill(0)  # the pages are there before the clock starts

    def _views(self, case: Case) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        x = self._x[case.dtype]
        shape = case.shape
        if case.name == "logsumexp":
            shape = shape[:-1]
        return (
            x[: case.elements].reshape(case.shape),
            self._y.view(x.dtype)[: math.prod(shape)].reshape(shape),
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


def _filled(size: int, pattern: npt.NDArray[Any]) -> npt.NDArray[Any]:
    x = _bench.aligned(-(-size // 4)).view(pattern.dtype)
    for start in range(0, len(x), len(pattern)):
        part = x[start : start + len(pattern)]
        part[:] = pattern[: len(part)]
    return x


def thread_counts() -> list[int]:
    """Return from 1 to what a call would use: each, or powers of two where they are many."""
    most = softmaxlib.get_num_threads()
    counts = range(1, most + 1) if most <= 8 else (1 << i for i in range(most.bit_length()))
    return sorted({*counts, most})


def floors(rows: Iterable[Mapping[str, Any]], section: str) -> dict[int, dict[str, Estimate]]:
    """Return ns per 1,000 floats by elements: of each limit, and of two passes, as "floor"."""
    found: dict[int, dict[str, Estimate]] = {}
    for row in rows:
        if row["section"] == section and row["kind"] == "limit":
            found.setdefault(row["elements"], {})[row["name"]] = Estimate(**row["ns_per_1000"])
    for limits in found.values():
        copies = [limits[name] for name in COPIES if name in limits]
        if copies:
            limits["best_copy"] = copy = min(copies, key=lambda limit: limit.value)
        if copies and "read" in limits:
            read = limits["read"]
            limits["floor"] = Estimate(
                read.value + copy.value,
                read.low + copy.low,
                read.high + copy.high,
                min(read.clean, copy.clean),
                min(read.taken, copy.taken),
            )
    return found


def batch_total(row: Mapping[str, Any]) -> int:
    """Return the power of two that a batch has for elements, but for the part of a last row."""
    return _power_above(row["elements"])


def steps(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Find the cliffs among rows and batches: see STEPS."""
    timed = floors(rows, "one_row").items()
    floor = {n: limits["floor"] for n, limits in timed if "floor" in limits}
    lengths = sorted(floor)
    known = [math.nan if floor[k].noisy else floor[k].value for k in lengths]

    def floor_at(row: Mapping[str, Any]) -> float:
        """Interpolate; not a number beside a noisy floor."""
        if row["section"] != "one_row" or not lengths:
            return 1.0
        return float(np.interp(math.log(row["bytes_per_array"] / 4), np.log(lengths), known))

    def line(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return (row["section"], row["dtype"], row["section"] == "batches" and batch_total(row))

    kept = [row for row in rows if row["section"] in ("one_row", "batches")]
    kept = sorted((row for row in kept if row["kind"] == "function"), key=line)
    for (section, dtype, _), members in itertools.groupby(kept, key=line):
        ordered = sorted(members, key=lambda row: row["length"])
        for a, b in zip(ordered[:-1], ordered[1:], strict=True):
            if a["noisy"] or b["noisy"]:
                continue
            before, after = a["ns_per_1000"], b["ns_per_1000"]
            rise = after["value"] / before["value"]
            floor_rise = floor_at(b) / floor_at(a)
            longer = b["length"] / a["length"]
            costs_more = (
                rise >= STEP * max(floor_rise, 1.0)  # never, where that is not a number
                and after["low"] > before["high"]
            )
            takes_less = rise * longer <= 0.9 and after["high"] * longer < before["low"]
            if costs_more or takes_less:
                yield {
                    "section": section,
                    "dtype": dtype,
                    "from": a["shape"],
                    "to": b["shape"],
                    "ns_per_1000_from": before["value"],
                    "ns_per_1000_to": after["value"],
                    "rise": rise,
                    "rise_of_floor": None if math.isnan(floor_rise) else max(floor_rise, 1.0),
                    "time_of_a_row": rise * longer,
                    "schedule_from": a["schedule"],
                    "schedule_to": b["schedule"],
                }


def _power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _half_caches() -> Iterator[int]:
    """Elements of two arrays that fill half of each level of cache."""
    for size in _bench.caches().values():
        yield 1 << ((size // 16).bit_length() - 1)


def _lengths(most: int, odd: bool) -> list[int]:
    """Return powers of two up to most, and odd numbers between them."""
    powers = [1 << i for i in range(most.bit_length())]
    between = [3] + [3 * n // 2 + 1 for n in powers if n >= 4]
    return sorted(n for n in (*powers, *(between if odd else ())) if n <= most)


def _rows(timed: Mapping[Case, timing.Case]) -> Iterator[dict[str, Any]]:
    taken = {case: run for case, run in timed.items() if run.samples}
    limits: dict[Any, dict[str, tuple[Case, timing.Case]]] = {}
    for case, run in taken.items():
        if case.kind == "limit":
            limits.setdefault((case.group, case.threads), {})[case.name] = case, run
    for case, run in taken.items():
        spread = _bench.per_1000(run, case.elements)
        traffic = None
        if case.kind != "function":
            traffic = (PASS_TRAFFIC if case.kind == "pass" else LIMIT_TRAFFIC)[case.name]
        one = taken.get(replace(case, threads=1)) if case.section == "threads" else None
        yield asdict(case) | {
            "shape": list(case.shape),
            "elements": case.elements,
            "length": case.length,
            "bytes_per_array": case.bytes_per_array,
            "level": case.level,
            "ns_per_1000": asdict(spread),
            "noisy": spread.noisy,
            "gb_per_s": None
            if traffic is None
            else 1000 * ITEM_BYTES[case.dtype] * traffic / spread.value,
            "over": _over(case, run, limits.get((case.group, case.threads), {})),
            "speedup": None if one is None else asdict(_bench.ratio_to(one, run)),
            **_explain(case),
            "samples": [(sample.visit, sample.ns, sample.disturbed) for sample in run.samples],
        }


def _over(
    case: Case, run: timing.Case, limits: Mapping[str, tuple[Case, timing.Case]]
) -> dict[str, Any]:
    """Return how many times the time of limits on as many bytes a function takes, from pairs."""
    runs: dict[str, timing.Case] = {}
    scale = 1.0
    for name, (limit, timed) in limits.items():
        scale = limit.bytes_per_array / case.bytes_per_array
        if case.kind == "function" and abs(scale - 1) <= 0.01:  # a batch may lack part of a row
            runs[name] = timed
    copies = [runs[name] for name in COPIES if name in runs]
    below = {name: [runs[name]] for name in ("streaming_copy",) if name in runs}
    if copies:
        below["best_copy"] = [min(copies, key=lambda copy: timing.time_of(copy).value)]
        if "read" in runs:
            below["floor"] = [runs["read"], *below["best_copy"]]
    found = {}
    for name, times in below.items():
        of = timing.ratio(run, times).scaled(scale)
        found[name] = asdict(_bench.Ratio(of.value, of.low, of.high, timing.verdict(of)))
    return found


def _explain(case: Case) -> dict[str, str | None]:
    """Ask the library what it chooses, and why the kernel."""
    if case.kind != "function":
        return {"schedule": None, "reason": None}
    with softmaxlib.threads(case.threads), softmaxlib.use_isa(case.isa):
        found = softmaxlib.explain(case.shape, case.dtype, case.axis, function=case.name)
    parts = [found.kernel, f"{found.stores} stores"] + ["parallel"] * (found.tasks > 1)
    return {"schedule": ", ".join(parts), "reason": found.why_kernel}


def _as(dtype: str, values: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) >> 16).astype(np.uint16)
