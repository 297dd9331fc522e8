"""Times the paper's algorithms on this machine, next to the machine's own speed limits.

Everything of one size is a group of the timing engine (`_tools.timing`): timed side by side, and
compared by pairs of samples.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import softmaxlib
from softmaxlib import _core
from softmaxlib._tools import timing
from softmaxlib._tools.timing import Estimate, Verdict

Floats = npt.NDArray[np.float32]
Store = Literal["plain", "streaming"]

SCHEMA = "softmaxlib-bench/2"
ROOFLINE = (
    "floor = time of a read pass + time of the faster copy (plain or streaming stores) over arrays "
    "of the same size in the same run, with the machine's best ISA: two passes that compute "
    "nothing. Share of roofline = floor / time; in cache it is the arithmetic that keeps it low."
)
TRAFFIC = (
    "GB/s counts what the algorithm moves by the paper's tally, N elements of 4 bytes: "
    "three_pass_recompute 4N, three_pass_reload 5N, two_pass 3N, two_pass_reload 4N, read N, "
    "copies 2N, triad (y = a + 3b, a and b the halves of the array) 1.5N; traffic that plain "
    "stores add to fetch the lines they overwrite is not counted."
)
PAPER = "Dukhan & Ablavatski 2020, Skylake-X: two-pass over the best three-pass, out of cache"
PAPER_SPEEDUP = {"avx512": 1.28, "avx2": 1.18}

TIE = 0.05  # two algorithms whose times differ by less win together
HEADLINE_BYTES = 256 << 20


class TooLargeError(Exception):
    """The sizes asked for need more memory than there is, or than allowed."""


@dataclass(frozen=True)
class Kernel:
    name: str
    traffic: float  # arrays read or written per call


ALGORITHMS = (
    Kernel("three_pass_recompute", 4),
    Kernel("three_pass_reload", 5),
    Kernel("two_pass", 3),
    Kernel("two_pass_reload", 4),
)
LIMITS = (
    Kernel("read", 1),
    Kernel("copy", 2),
    Kernel("streaming_copy", 2),
    Kernel("triad", 1.5),
)


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


@dataclass(frozen=True)
class Series:
    """One variant at one size, and what times it."""

    elements: int
    kernel: Kernel
    isa: str
    store: Store | None
    limit: bool
    case: timing.Case


@dataclass(frozen=True)
class Ratio:
    """Another time over that of the row, from pairs of samples, and what it says of the row."""

    value: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Row:
    elements: int
    bytes_per_array: int
    level: str
    isa: str
    kind: Literal["algorithm", "limit"]
    name: str
    store: Store | None
    ns_per_1000: Estimate
    noisy: bool
    gb_per_s: float
    roofline_share: float | None
    best_three_pass: str | None  # of the same size, ISA and stores
    over_best_three_pass: Ratio | None  # its time / this one's
    samples: list[tuple[int, float, str | None]]  # visit, ns per call, what disturbed it


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
    speedup: Ratio
    paper_speedup: float | None


@dataclass(frozen=True)
class Winner:
    """The fastest algorithms of a level of cache, at the largest size that fits; none: no telling.

    More than one: their times differ by less than TIE.
    """

    isa: str
    store: Store
    elements: int
    level: str
    names: tuple[str, ...]


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
    # Of the largest, x alone is four times the last cache; when quick, as large as that: some have
    # hundreds of MiB, and --quick is the README's command.
    size = 1 << (max(HEADLINE_BYTES, known[-1] * (1 if quick else 4)) - 1).bit_length()
    while 2 * size > max_bytes and size > known[0]:
        size //= 2
    sizes = [size // 4]
    # Down to what fits in L1 with its results, or to a quarter of that.
    while size > known[0] // (2 if quick else 8):
        size //= 4 if quick else 2
        sizes.append(size // 4)
    return tuple(reversed(sizes))


def parts(elements: int, threads: int) -> list[slice]:
    """Return each thread's part of an array, in whole vectors but for the last."""
    edges = [i * elements // threads // 16 * 16 for i in range(threads)] + [elements]
    return [slice(*pair) for pair in zip(edges[:-1], edges[1:], strict=True)]


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


class Bench:
    """Plans on construction, measures in run(); report() may be asked for at any time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.notes: list[str] = []
        self.complete = False
        self.machine = machine()
        self.started = datetime.datetime.now(datetime.timezone.utc)
        self.cpus = timing.choose_cpus(settings.threads)
        self._x = self._y = np.empty(0, np.float32)  # until it runs
        self.groups = {n: list(self._variants(n)) for n in sorted(set(self._sizes()))}
        self.engine = timing.Engine(
            [series.case for group in self.groups.values() for series in group],
            seconds=settings.seconds,
            rounds=settings.rounds,
            cpus=self.cpus,
            seed=settings.seed,
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
            yield self._series(elements, kernel, best, None)
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
                    yield self._series(elements, kernel, isa, store)

    def _series(self, elements: int, kernel: Kernel, isa: str, store: Store | None) -> Series:
        level = cache_level(elements)
        case = timing.Case(
            " ".join((size_text(4 * elements), isa, kernel.name)),
            lambda repeats: self._time(series, repeats),
            group=elements,
            warm=level != "DRAM",
            shared=level in ("L3", "DRAM"),
            threads=self.settings.threads,
            weight=3 if level == "DRAM" else 1,
            # The scalar leaf is slow: it would use up the time of all others.
            most=timing.MIN_ROUNDS if isa == "scalar" and store else timing.MAX_ROUNDS,
        )
        series = Series(elements, kernel, isa, store, store is None, case)
        return series

    def run(
        self,
        plan: timing.Plan = lambda seconds: None,
        step: timing.Step = lambda label, seconds: None,
    ) -> None:
        """Tell plan how many seconds it will take, and step what was done and for how many."""
        settings = self.settings
        self._x, self._y = (aligned(max(self.groups), settings.offset) for _ in range(2))
        np.random.default_rng(settings.seed).standard_normal(out=self._x, dtype=np.float32)
        self._y.fill(0)  # the pages are there before the clock starts
        with timing.pinned(self.cpus), ThreadPoolExecutor(settings.threads) as self._pool:
            self.engine.run(plan, step)
        self._x = self._y = np.empty(0, np.float32)
        self.complete = True

    def _time(self, series: Series, repeats: int) -> float:
        """Return ns per call."""
        n, name, isa = series.elements, series.kernel.name, _core.isas[series.isa]
        threads = self.settings.threads
        x, y = self._x[:n], self._y[:n]
        if series.store is not None:
            algorithm, store = _core.algorithms[name], _core.stores[series.store]
            function, dtype = _core.functions["softmax"], _core.dtypes["float32"]
            return _core.time_run(function, x, y, dtype, algorithm, isa, store, threads, repeats)
        kind = _core.rooflines[name]
        if threads == 1:
            return _core.time_roofline(kind, isa, x, y, repeats)
        return max(
            self._pool.map(
                lambda p: _core.time_roofline(kind, isa, x[p], y[p], repeats), parts(n, threads)
            )
        )

    def rows(self) -> list[Row]:
        return [row for n, group in self.groups.items() for row in _rows(n, group)]

    def winners(self) -> list[Winner]:
        """Tell who wins in each level of cache, as far as that can be told."""
        largest = {cache_level(n): n for n in self.groups}  # in ascending order
        found = []
        for level, n in largest.items():
            variants: dict[tuple[str, Store], list[Series]] = {}
            for series in self.groups[n]:
                if series.store is not None:
                    variants.setdefault((series.isa, series.store), []).append(series)
            for (isa, store), rivals in variants.items():
                names = _winners(rivals)
                if names is not None:
                    found.append(Winner(isa, store, n, level, names))
        return found

    def report(self) -> dict[str, Any]:
        """Return all that is known, ready for JSON."""
        rows = self.rows()
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "date": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started.timestamp(), 1),
            "machine": self.machine,
            "timed": self.engine.state,
            "settings": asdict(self.settings),
            "notes": self.notes,
            "definitions": {"roofline": ROOFLINE, "traffic": TRAFFIC, "paper": PAPER},
            "rows": [asdict(row) for row in rows],
            "headline": [asdict(comparison) for comparison in headline(rows)],
            "winners": [asdict(winner) for winner in self.winners()],
        }


def _winners(rivals: Sequence[Series]) -> tuple[str, ...] | None:
    """Return those that nobody beats; none of them where that cannot be told."""
    timed = [series for series in rivals if series.case.samples]
    if not timed:
        return None
    first = min(timed, key=lambda series: timing.time_of(series.case).value)
    names = [first.kernel.name]
    for series in timed:
        if series is first:
            continue
        said = timing.verdict(timing.ratio(first.case, series.case), TIE)
        if said == "same":
            names.append(series.kernel.name)
        elif said != "faster":
            return ()
    return tuple(names)


def headline(rows: list[Row]) -> list[Comparison]:
    """Make the paper's comparison, at the largest size."""
    largest = max((row.elements for row in rows), default=0)
    timed = {(r.isa, r.store, r.name): r for r in rows if r.elements == largest}
    found = []
    for (isa, store, name), row in timed.items():
        if name != "two_pass" or store is None or row.over_best_three_pass is None:
            continue
        best = timed[isa, store, row.best_three_pass or ""]
        found.append(
            Comparison(
                isa,
                store,
                row.elements,
                row.level,
                row.ns_per_1000.value,
                best.name,
                best.ns_per_1000.value,
                row.over_best_three_pass,
                PAPER_SPEEDUP.get(isa),
            )
        )
    return found


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Spell out the numbers of a row of the report in columns, for CSV."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if key == "samples" or (key == "over_best_three_pass" and value is None):
            continue
        if isinstance(value, Mapping):
            found |= {f"{key}_{part}": number for part, number in value.items()}
        else:
            found[key] = value
    return found


def aligned(elements: int, offset: int = 0) -> Floats:
    """Return an array that begins so many bytes past a page."""
    raw = np.empty(4 * elements + 4096 + offset, np.uint8)
    start = -raw.ctypes.data % 4096 + offset
    return raw[start : start + 4 * elements].view(np.float32)


def per_1000(case: timing.Case, elements: int) -> Estimate:
    """Return nanoseconds per 1,000 elements."""
    return timing.time_of(case).scaled(1000 / elements)


def ratio_to(other: timing.Case, case: timing.Case) -> Ratio:
    """Return how many times the case's time the other takes."""
    of = timing.ratio(other, case)
    return Ratio(of.value, of.low, of.high, timing.verdict(timing.ratio(case, other)))


def _rows(elements: int, group: list[Series]) -> Iterator[Row]:
    timed = [(s, per_1000(s.case, elements)) for s in group if s.case.samples]
    limits = {s.kernel.name: (s.case, spread.value) for s, spread in timed if s.limit}
    copies = [limits[name] for name in ("copy", "streaming_copy") if name in limits]
    floor: list[timing.Case] = []
    if "read" in limits and copies:
        floor = [limits["read"][0], min(copies, key=lambda copy: copy[1])[0]]
    best: dict[tuple[str, Store | None], tuple[Series, float]] = {}
    for s, spread in timed:
        if s.kernel.name.startswith("three_pass"):
            key = (s.isa, s.store)
            if key not in best or spread.value < best[key][1]:
                best[key] = s, spread.value
    for s, spread in timed:
        rival = None if s.limit else best.get((s.isa, s.store), (None, 0.0))[0]
        yield Row(
            elements,
            4 * elements,
            cache_level(elements),
            s.isa,
            "limit" if s.limit else "algorithm",
            s.kernel.name,
            s.store,
            spread,
            spread.noisy,
            gb_per_s=4000 * s.kernel.traffic / spread.value,
            roofline_share=None if s.limit or not floor else timing.ratio(floor, s.case).value,
            best_three_pass=None if rival is None else rival.kernel.name,
            over_best_three_pass=None if rival is None else ratio_to(rival.case, s.case),
            samples=[(sample.visit, sample.ns, sample.disturbed) for sample in s.case.samples],
        )
