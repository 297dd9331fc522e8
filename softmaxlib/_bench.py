"""Times the paper's algorithms on this machine, next to the machine's own speed limits.

All variants of one size are timed round-robin, in a new random order each round, so that whatever
else the machine does falls on all of them alike; a result is a median over the rounds.
"""

from __future__ import annotations

import datetime
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import softmaxlib
from softmaxlib import _core

Floats = npt.NDArray[np.float32]
Store = Literal["plain", "streaming"]

SCHEMA = "softmaxlib-bench/1"
ROOFLINE = (
    "floor = time of a read pass + time of the faster copy (plain or streaming stores) over arrays "
    "of the same size in the same run, with the machine's best ISA: two passes that compute "
    "nothing. Share of roofline = floor / time; in cache it is the arithmetic that keeps it low."
)
TRAFFIC = (
    "GB/s counts what the algorithm moves by the paper's tally, N elements of 4 bytes: "
    "three_pass_recompute 4N, three_pass_reload 5N, two_pass 3N, two_pass_reload 4N, read N, "
    "copies 2N; traffic that plain stores add to fetch the lines they overwrite is not counted."
)
PAPER = "Dukhan & Ablavatski 2020, Skylake-X: two-pass over the best three-pass, out of cache"
PAPER_SPEEDUP = {"avx512": 1.28, "avx2": 1.18}

SAMPLE_NS = 2e6
MIN_ROUNDS, MAX_ROUNDS = 5, 101
HEADLINE_BYTES = 256 << 20


class TooLargeError(Exception):
    """The sizes asked for need more memory than there is, or than allowed."""


@dataclass(frozen=True)
class Kernel:
    name: str
    traffic: int  # arrays read or written per call


ALGORITHMS = (
    Kernel("three_pass_recompute", 4),
    Kernel("three_pass_reload", 5),
    Kernel("two_pass", 3),
    Kernel("two_pass_reload", 4),
)
LIMITS = (Kernel("read", 1), Kernel("copy", 2), Kernel("streaming_copy", 2))


@dataclass(frozen=True)
class Settings:
    isas: tuple[str, ...]
    stores: tuple[Store, ...] = ("plain", "streaming")
    sizes: tuple[int, ...] | None = None  # elements; None: from L1 to 4x the last-level cache
    threads: int = 1
    quick: bool = False
    rounds: int | None = None  # None: as many as the time allows
    seconds: float = 240.0
    max_bytes: int | None = None  # of both arrays together
    offset: int = 0  # bytes past a page at which both arrays begin
    seed: int = 2020


@dataclass
class Series:
    """One variant at one size, and its samples."""

    elements: int
    kernel: Kernel
    isa: str
    store: Store | None
    limit: bool
    repeats: int = 1
    call_ns: float = 0.0  # of the calibration
    samples: list[float] = field(default_factory=list)  # ns per call

    @property
    def warm(self) -> bool:
        """In cache, a call before the sample: the variant before may have left other lines."""
        return cache_level(self.elements) != "DRAM"

    @property
    def seconds(self) -> float:
        """Time of one sample."""
        return 1e-9 * self.call_ns * (self.repeats + self.warm)

    @property
    def label(self) -> str:
        return " ".join(filter(None, (size_text(4 * self.elements), self.isa, self.kernel.name)))


@dataclass(frozen=True)
class Spread:
    median: float
    q1: float
    q3: float
    minimum: float
    samples: int


@dataclass(frozen=True)
class Row:
    elements: int
    bytes_per_array: int
    level: str
    isa: str
    kind: Literal["algorithm", "limit"]
    name: str
    store: Store | None
    ns_per_1000: Spread
    gb_per_s: float
    roofline_share: float | None
    over_best_three_pass: float | None  # same size, ISA and stores


@dataclass(frozen=True)
class Comparison:
    """Two-pass against the best three-pass at the largest size, with the same kind of stores."""

    isa: str
    store: Store
    elements: int
    level: str
    two_pass_ns_per_1000: float
    best_three_pass: str
    best_three_pass_ns_per_1000: float
    speedup: float
    paper_speedup: float | None


def size_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def caches() -> dict[str, int]:
    """Return the bytes of each level of data cache that this machine has."""
    levels = zip(("L1", "L2", "L3"), _core.cache_sizes(), strict=True)
    return {name: size for name, size in levels if size > 0}


def cache_level(elements: int) -> str:
    """Name the smallest cache that holds x and y."""
    return next((name for name, size in caches().items() if 8 * elements <= size), "DRAM")


def available_memory() -> int:
    """Return the bytes this process may still take: of the machine, or of its cgroup."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) << 10)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            paths = (Path("/sys/fs/cgroup", name) for name in (limit, used))
            most, now = (int(path.read_text()) for path in paths)
            limits.append(most - now)
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return max(0, min(limits, default=4 << 30))


def default_sizes(quick: bool, max_bytes: int) -> tuple[int, ...]:
    """Return powers of two (of four when quick) down from the headline's size to L1."""
    known = tuple(caches().values()) or (32 << 10,)
    size = 1 << (max(HEADLINE_BYTES, 4 * known[-1]) - 1).bit_length()
    while 2 * size > max_bytes and size > known[0]:
        size //= 2
    sizes = []
    while size >= known[0] // (4 if quick else 8):
        sizes.append(size // 4)
        size //= 4 if quick else 2
    return tuple(reversed(sizes))


def machine() -> dict[str, Any]:
    def read(path: str) -> str | None:
        return Path(path).read_text().strip() if Path(path).exists() else None

    return {
        "library": softmaxlib.info(),
        "caches_bytes": caches(),
        "compiler": _core.compiler(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "page_bytes": os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
        "transparent_hugepages": read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "cpus": os.cpu_count(),
    }


def load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class Bench:
    """Plans on construction, measures in run(); report() may be asked for at any time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.notes: list[str] = []
        self.complete = False
        self.machine = machine()
        self.started = datetime.datetime.now(datetime.timezone.utc)
        self.load_before = load_average()
        self.groups = {n: list(self._variants(n)) for n in sorted(set(self._sizes()))}
        if self.load_before is not None and self.load_before > 0.5:
            self.notes.append(
                f"load average {self.load_before} before the start: other work disturbs the timing"
            )

    def _sizes(self) -> tuple[int, ...]:
        have = int(0.8 * available_memory())
        limit = min(self.settings.max_bytes or have, have)
        if self.settings.sizes is not None:
            if 8 * max(self.settings.sizes) > limit:
                raise TooLargeError(
                    f"two arrays of {max(self.settings.sizes):,} elements take "
                    f"{size_text(8 * max(self.settings.sizes))}; {size_text(limit)} may be used"
                )
            return self.settings.sizes
        sizes = default_sizes(self.settings.quick, limit)
        wanted = default_sizes(self.settings.quick, 1 << 62)[-1]
        if sizes[-1] < wanted:
            self.notes.append(
                f"largest array reduced from {size_text(4 * wanted)} to {size_text(4 * sizes[-1])}:"
                f" {size_text(limit)} of memory may be used"
            )
        return sizes

    def _variants(self, elements: int) -> Iterator[Series]:
        level = cache_level(elements)
        best = _core.isas_available()[0]
        for kernel in LIMITS:
            yield Series(elements, kernel, best, None, limit=True)
        for isa in self.settings.isas:
            # The portable leaf is bound by arithmetic, and slow: stores make no difference to it.
            if isa == "scalar" and self.settings.quick and level in ("L3", "DRAM"):
                note = "scalar: not timed beyond L2 with --quick"
                if len(self.settings.isas) > 1:
                    if note not in self.notes:
                        self.notes.append(note)
                    continue
            stores = self.settings.stores
            if len(stores) > 1 and (level != "DRAM" or isa == "scalar"):
                stores = ("plain",)
            for store in stores:
                for kernel in ALGORITHMS:
                    yield Series(elements, kernel, isa, store, limit=False)

    def run(
        self,
        plan: Callable[[float], None] = lambda seconds: None,
        step: Callable[[str, float], None] = lambda label, seconds: None,
    ) -> None:
        """Tell plan how many seconds it will take, and step what was done and for how many."""
        settings = self.settings
        x, y = (_aligned(max(self.groups), settings.offset) for _ in range(2))
        np.random.default_rng(settings.seed).standard_normal(out=x, dtype=np.float32)
        y.fill(0)  # the pages are there before the clock starts
        order = random.Random(settings.seed)
        with ThreadPoolExecutor(settings.threads) as pool:
            for group in self.groups.values():
                for series in group:
                    step(f"calibrating {size_text(4 * series.elements)}", 0.0)
                    self._calibrate(series, x, y, pool)
            rounds = {n: self._rounds(n) for n in self.groups}
            plan(sum(s.seconds for n in self.groups for r in rounds[n] for s in r))
            for n in self.groups:
                for members in rounds[n]:
                    for series in order.sample(members, len(members)):
                        if series.warm:
                            self._sample(series, x, y, pool, 1)
                        ns = self._sample(series, x, y, pool, series.repeats)
                        series.samples.append(ns)
                        step(series.label, series.seconds)
        self.complete = True

    def _calibrate(self, series: Series, x: Floats, y: Floats, pool: ThreadPoolExecutor) -> None:
        for _ in range(3):
            series.call_ns = max(1.0, self._sample(series, x, y, pool, series.repeats))
            wanted = max(1, round(SAMPLE_NS / series.call_ns))
            if wanted < 2 * series.repeats:
                break
            series.repeats = wanted
        series.repeats = wanted

    def _sample(
        self, series: Series, x: Floats, y: Floats, pool: ThreadPoolExecutor, repeats: int
    ) -> float:
        """Return ns per call."""
        n, name, isa = series.elements, series.kernel.name, _core.isas[series.isa]
        threads = self.settings.threads
        if series.store is not None:
            algorithm, store = _core.algorithms[name], _core.stores[series.store]
            function, dtype = _core.functions["softmax"], _core.dtypes["float32"]
            return _core.time_run(
                function, x[:n], y[:n], dtype, algorithm, isa, store, threads, repeats
            )
        kind = _core.rooflines[name]
        if threads == 1:
            return _core.time_roofline(kind, isa, x[:n], y[:n], repeats)
        edges = [i * n // threads // 16 * 16 for i in range(threads)] + [n]
        parts = [slice(*pair) for pair in zip(edges[:-1], edges[1:], strict=True)]
        return max(pool.map(lambda p: _core.time_roofline(kind, isa, x[p], y[p], repeats), parts))

    def _rounds(self, elements: int) -> list[list[Series]]:
        """Choose who takes part in each round, as many rounds as the time allows."""
        group = self.groups[elements]
        if self.settings.rounds is not None:
            return [group] * self.settings.rounds
        weights = {n: 3 if cache_level(n) == "DRAM" else 1 for n in self.groups}
        share = self.settings.seconds * weights[elements] / sum(weights.values())
        # The scalar leaf would use up the time of all others: it sits out when it has enough.
        quick = [series for series in group if series.isa != "scalar"] or group
        fits = int((share - MIN_ROUNDS * _seconds(group)) / _seconds(quick))
        return [group] * MIN_ROUNDS + [quick] * min(max(fits, 0), MAX_ROUNDS - MIN_ROUNDS)

    def rows(self) -> list[Row]:
        return [row for n, group in self.groups.items() for row in _rows(n, group)]

    def report(self) -> dict[str, Any]:
        """Return all that is known, ready for JSON."""
        rows = self.rows()
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "date": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started.timestamp(), 1),
            "machine": self.machine,
            "settings": asdict(self.settings),
            "load_average": {"before": self.load_before, "after": load_average()},
            "notes": self.notes,
            "definitions": {"roofline": ROOFLINE, "traffic": TRAFFIC, "paper": PAPER},
            "rows": [asdict(row) for row in rows],
            "headline": [asdict(comparison) for comparison in headline(rows)],
        }


def headline(rows: list[Row]) -> list[Comparison]:
    """Make the paper's comparison, at the largest size."""
    largest = max((row.elements for row in rows), default=0)
    timed = [row for row in rows if row.elements == largest]
    found = []
    for row in timed:
        if row.name != "two_pass" or row.store is None or row.over_best_three_pass is None:
            continue
        rivals = (
            rival
            for rival in timed
            if rival.name.startswith("three_pass")
            and (rival.isa, rival.store) == (row.isa, row.store)
        )
        best = min(rivals, key=lambda rival: rival.ns_per_1000.median)
        found.append(
            Comparison(
                row.isa,
                row.store,
                row.elements,
                row.level,
                row.ns_per_1000.median,
                best.name,
                best.ns_per_1000.median,
                row.over_best_three_pass,
                PAPER_SPEEDUP.get(row.isa),
            )
        )
    return found


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Spell out the spread of a row of the report in columns, for CSV."""
    spread = {f"ns_per_1000_{key}": value for key, value in row["ns_per_1000"].items()}
    return {key: value for key, value in row.items() if key != "ns_per_1000"} | spread


def _aligned(elements: int, offset: int) -> Floats:
    raw = np.empty(4 * elements + 4096 + offset, np.uint8)
    start = -raw.ctypes.data % 4096 + offset
    return raw[start : start + 4 * elements].view(np.float32)


def _seconds(group: list[Series]) -> float:
    return sum(series.seconds for series in group)


def summarize(samples: Sequence[float], elements: int) -> Spread:
    """Return the spread, per 1,000 elements, of samples in ns per call."""
    per_1000 = np.asarray(samples) * (1000 / elements)
    q1, median, q3 = (float(q) for q in np.quantile(per_1000, (0.25, 0.5, 0.75)))
    return Spread(median, q1, q3, float(per_1000.min()), len(samples))


def _rows(elements: int, group: list[Series]) -> Iterator[Row]:
    timed = [(series, summarize(series.samples, elements)) for series in group if series.samples]
    limits = {s.kernel.name: spread.median for s, spread in timed if s.limit}
    copies = [limits[name] for name in ("copy", "streaming_copy") if name in limits]
    floor = limits["read"] + min(copies) if "read" in limits and copies else None
    best: dict[tuple[str, Store | None], float] = {}
    for s, spread in timed:
        if s.kernel.name.startswith("three_pass"):
            key = (s.isa, s.store)
            best[key] = min(best.get(key, spread.median), spread.median)
    for s, spread in timed:
        rival = best.get((s.isa, s.store))
        yield Row(
            elements,
            4 * elements,
            cache_level(elements),
            s.isa,
            "limit" if s.limit else "algorithm",
            s.kernel.name,
            s.store,
            spread,
            gb_per_s=4000 * s.kernel.traffic / spread.median,
            roofline_share=None if s.limit or floor is None else floor / spread.median,
            over_best_three_pass=None if s.limit or rival is None else rival / spread.median,
        )
