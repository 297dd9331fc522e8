"""The speed targets of this library, each measured and compared in one interleaved run.

    pip install -e '.[bench]' && python bench/targets.py [--isa avx2] [--minutes 4] [--mib 256]

Every line is a ratio of pairs of samples, with its interval: the parts of a line are a group of the
timing engine. A target is met or missed where the interval lies on one side of it. What the library
takes next to torch and ONNX Runtime is in paths.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import softmaxlib as sml
from softmaxlib import _bench, _core
from softmaxlib._tools import timing

Array = np.ndarray[Any, Any]
Timer = Callable[[int], float]  # ns of one of so many calls

BEST = sml.available_isas()[0]


@dataclass
class Line:
    case: str
    target: dict[str, float]  # by ISA
    parts: dict[str, timing.Case]
    numerator: str
    denominator: tuple[str, ...]  # the sum of these

    @property
    def wants_more(self) -> bool:
        """Whether the ratio should be at least the target."""
        return self.case.startswith("paper") or self.case.endswith("threads")


_memory: dict[tuple[str, bool], Array] = {}


def memory(dtype: Any, is_out: bool, size: int) -> Array:
    """Return so many elements of memory that all lines share: apart, they would not fit at once."""
    key = (np.dtype(dtype).name, is_out)
    have = _memory.get(key)
    if have is None or have.size < size:
        if is_out:
            have = np.zeros(size, dtype)
        else:
            wide = np.float64 if dtype == np.float64 else np.float32
            have = np.random.default_rng(2020).standard_normal(size, wide).astype(dtype, copy=False)
        _memory[key] = have
    return have[:size]


def array(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    return memory(dtype, False, int(np.prod(shape))).reshape(shape)


def kernel(
    x: Array,
    isa: str,
    function: str = "softmax",
    algorithm: str = "auto",
    store: str = "auto",
    threads: int = 1,
    axis: int = -1,
) -> Timer:
    shape = tuple(np.delete(x.shape, axis)) if function == "logsumexp" else x.shape
    out = memory(x.dtype, True, int(np.prod(shape))).reshape(shape)
    codes = (
        _core.algorithms[algorithm],
        _core.isas[isa],
        _core.stores[store],
    )
    dtype = _core.dtypes[x.dtype.name]
    return lambda n: _core.time_run(
        _core.functions[function], x, out, dtype, *codes, threads, n, axis=axis
    )


def limit(x: Array, kind: str) -> Timer:
    out = memory(x.dtype, True, x.size).reshape(x.shape)
    return lambda n: _core.time_roofline(_core.rooflines[kind], _core.isas[BEST], x, out, n)


def in_isa(isa: str, call: Callable[[], object]) -> Timer:
    timer = timing.repeated(call)

    def run(n: int) -> float:
        with sml.use_isa(isa):
            return timer(n)

    return run


def lines(isa: str, mib: int) -> Iterator[Line]:
    def both(avx512: float, avx2: float) -> dict[str, float]:
        return {"avx512": avx512, "avx2": avx2}

    def line(
        case: str, target: dict[str, float], parts: dict[str, Timer], size: int, *sums: str
    ) -> Line:
        level = _bench.cache_level(size)
        cases = {
            name: timing.Case(
                f"{case}: {name}",
                timer,
                group=case,
                warm=level != "DRAM",
                shared=level in ("L3", "DRAM"),
                threads=2 if name == "2 threads" else 1,
                weight=3 if level == "DRAM" else 1,
            )
            for name, timer in parts.items()
        }
        names = list(parts)
        return Line(case, target, cases, names[0], sums or (names[1],))

    total = (mib << 20) // 4  # floats of an array far beyond the caches

    x = array((total,))
    parts = {
        "softmax": kernel(x, isa),
        "read": limit(x, "read"),
        "streaming copy": limit(x, "streaming_copy"),
    }
    yield line(f"one row, {mib} MiB", both(1.05, 1.2), parts, total, "read", "streaming copy")
    for store in ("plain", "streaming"):
        for rival in ("three_pass_recompute", "three_pass_reload"):
            parts = {
                rival: kernel(x, isa, algorithm=rival, store=store),
                "two_pass": kernel(x, isa, algorithm="two_pass", store=store),
            }
            yield line(f"paper's gain, {mib} MiB, {store}", both(1.28, 1.18), parts, total)
    parts = {"logsumexp": kernel(x, isa, "logsumexp"), "read": limit(x, "read")}
    yield line(f"logsumexp, {mib} MiB", both(1.15, 1.15), parts, total)
    rows = array((total // 32768, 32768))
    first = np.zeros(len(rows), np.int64)
    parts = {
        "take_log_softmax": in_isa(isa, lambda: sml.take_log_softmax(rows, first)),
        "read": limit(rows, "read"),
    }
    yield line(f"take_log_softmax, {rows.shape}", both(1.15, 1.15), parts, total)
    wide = array((total // 2,), np.float64)
    parts = {
        "float64": kernel(wide, isa),
        "read": limit(wide, "read"),
        "streaming copy": limit(wide, "streaming_copy"),
    }
    yield line(f"float64, {mib} MiB", both(1.5, 1.5), parts, total // 2, "read", "streaming copy")
    del wide

    def against_copy(
        shape: tuple[int, ...],
        target: dict[str, float],
        axis: int = -1,
        function: str = "softmax",
        *sums: str,
    ) -> Line:
        x = array(shape)
        parts = {function: kernel(x, isa, function, axis=axis)}
        for kind in sums or ("streaming copy",):
            parts[kind] = limit(x, kind.replace(" ", "_"))
        place = "" if axis == -1 else f" axis {axis}"
        return line(f"{function} {shape}{place}", target, parts, x.size, *sums)

    for n in (256, 512, 1024, 4096, 32768, 131072):
        yield against_copy((total // n, n), both(1.3, 1.5))
    for n in (64, 100, 128):
        yield against_copy((total // n, n), both(1.4, 1.8))
    for n in (8, 16, 32):
        yield against_copy((total // n, n), both(2.0, 2.4))
    for function in _core.functions:
        yield against_copy((512, 8, 4096), both(1.4, 1.4), 1, function)
    for function in _core.functions:
        sums = ("read", "streaming copy")
        yield against_copy((4096, 4096), both(1.5, 1.5), 0, function, *sums)

    # A path next to plain softmax of the same shape: short and long rows in cache, and rows that
    # memory has to bring.
    for shape in ((2048, 64), (512, 1000), (16, 32000), (total // 32000, 32000)):
        yield from against_plain(shape, isa, line)

    for shape in ((1, 1 << 16), (1, 1 << 18), (1, 1 << 20), (64, 1024), (1024, 1024), (1, total)):
        if (os.cpu_count() or 1) < 2:
            break
        x = array(shape)
        parts = {"1 thread": kernel(x, isa), "2 threads": kernel(x, isa, threads=2)}
        most = 1.4 if x.size < 1 << 18 else 1.8
        yield line(f"{shape}, threads", both(most, most), parts, x.size)


def against_plain(shape: tuple[int, ...], isa: str, line: Callable[..., Line]) -> Iterator[Line]:
    x = array(shape)
    rng = np.random.default_rng(7)
    rows, n = shape
    temperatures = 0.5 + rng.random((rows, 1), np.float32)
    bias, where = rng.standard_normal(n, np.float32), rng.random(shape, np.float32) < 0.8
    full = array(shape)[::-1].copy()
    everything = {"temperature": temperatures, "bias": full, "where": where}
    short, beyond = n < 1024, 4 * x.size > 1 << 25
    wanted: list[tuple[str, str, dict[str, Any], float]] = [
        ("softmax", "temperature", {"temperature": 0.7}, 1.4),
        ("softmax", "temperatures", {"temperature": temperatures}, 1.4),
        ("softmax", "where", {"where": where}, 1.5),
        ("softmax", "bias", {"bias": full}, 1.8),
        ("softmax", "column bias", {"bias": bias}, 1.8),
        ("softmax", "all", everything, 2.0),
        ("log_softmax", "", {}, 1.3 if short else 1.15),
        ("logsumexp", "", {}, 0.85),
        ("stablemax", "", {}, 1.2),
        ("log_stablemax", "", {}, 2.0),
    ]
    out = memory(np.float32, True, x.size).reshape(shape)
    plain = in_isa(isa, lambda: sml.softmax(x, out=out))

    def timer(function: str, options: dict[str, Any]) -> Timer:
        call = getattr(sml, function)
        to = out[:, 0].copy() if function == "logsumexp" else out
        return in_isa(isa, lambda: call(x, out=to, **options))

    for function, name, options, target in wanted:
        parts = {f"{function} {name}".strip(): timer(function, options), "plain": plain}
        yield line(
            f"{function} {name} / plain, {shape}".replace("  ", " "),
            {"avx512": target, "avx2": target},
            parts,
            x.size,
        )
    for dtype in ("float16", "bfloat16"):
        try:
            import ml_dtypes
        except ImportError:
            if dtype == "bfloat16":
                continue
        half = array(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
        target = 1.0 if beyond else 1.2
        yield line(
            f"softmax {dtype} / float32, {shape}",
            {"avx512": target, "avx2": target},
            {dtype: kernel(half, isa), "float32": kernel(x, isa)},
            x.size,
        )


def calls(isa: str) -> Iterator[tuple[str, float, timing.Case]]:
    """Calls of (64, 10) elements: what, at most how many microseconds, the case."""
    x = array((64, 10)).copy()
    labels, where = np.arange(64) % 10, np.ones(x.shape, bool)
    for name, target, call in (
        ("softmax", 1.2, lambda: sml.softmax(x)),
        ("log_softmax", 1.2, lambda: sml.log_softmax(x)),
        ("softmax, where", 1.2, lambda: sml.softmax(x, where=where)),
        ("cross_entropy", 5.0, lambda: sml.cross_entropy(x, labels)),
    ):
        yield name, target, timing.Case(f"call, {name}", in_isa(isa, call), group="calls")


def judged(found: timing.Estimate, target: float, wants_more: bool) -> str:
    """Tell on which side of the target the interval lies."""
    if found.high <= target:
        return "MISSED" if wants_more else "met"
    if found.low >= target:
        return "met" if wants_more else "MISSED"
    return "cannot tell"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--isa", default=BEST, choices=sml.available_isas())
    parser.add_argument("--minutes", type=float, default=4.0, help="of timing")
    parser.add_argument("--mib", type=int, default=256, help="of an array beyond the caches")
    args = parser.parse_args()
    (
        memory(np.float32, False, (args.mib << 20) // 4),
        memory(np.float32, True, (args.mib << 20) // 4),
    )
    found, of_calls = list(lines(args.isa, args.mib)), list(calls(args.isa))
    cases = [case for line in found for case in line.parts.values()]
    cases += [case for _, _, case in of_calls]
    two = {case.group for case in cases if case.threads > 1}
    with sml.threads(1):
        for threads in (1, 2):  # lines of two threads are timed by themselves, on two CPUs
            some = [case for case in cases if (case.group in two) == (threads == 2)]
            engine = timing.Engine(
                some,
                seconds=60 * args.minutes * len(some) / len(cases),
                cpus=timing.choose_cpus(threads),
            )
            engine.run(step=lambda label, _: print(f"\r\x1b[K{label}", end="", file=sys.stderr))
    print(file=sys.stderr)
    state = f"{engine.state['mhz']:.0f} MHz" if engine.state["mhz"] else "unknown frequency"
    table = Table(
        title=f"{args.isa} on {sml.info()['cpu']} ({state}), 1 thread but for the last lines"
    )
    for column in ("case", "us per call", "ratio", "interval", "target", ""):
        table.add_column(column, justify="left" if column in ("case", "") else "right")
    for line in found:
        ratio = timing.ratio(
            line.parts[line.numerator], [line.parts[name] for name in line.denominator]
        )
        times = ", ".join(
            f"{name} {timing.time_of(case).value / 1000:,.1f}" for name, case in line.parts.items()
        )
        target, sign = line.target.get(args.isa), ">=" if line.wants_more else "<="
        table.add_row(
            line.case,
            times,
            f"{ratio.value:.2f}" if ratio.clean else "?",
            f"{ratio.low:.2f}-{ratio.high:.2f}" if ratio.clean else "",
            "" if target is None else f"{sign} {target:.2f}",
            "" if target is None else judged(ratio, target, line.wants_more),
        )
    for name, most, case in of_calls:
        us = timing.time_of(case).scaled(1e-3)
        table.add_row(
            f"call of (64, 10) float32, {name}",
            f"{us.value:.2f}",
            "",
            f"{us.low:.2f}-{us.high:.2f}",
            f"<= {most} us",
            judged(us, most, False),
        )
    Console(width=132).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
