"""The speed targets of this library, each measured and compared in one interleaved run.

    pip install -e '.[bench]' && python bench/targets.py [--isa avx2] [--minutes 4] [--mib 256]

Every line is a ratio of pairs of samples, with its interval: the parts of a line are a group of the
timing engine. A target is met or missed where the interval lies on one side of it. torch and ONNX
Runtime take part where they are installed.
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


def peers(x: Array) -> dict[str, Timer]:
    found: dict[str, Timer] = {}
    try:
        import torch

        torch.set_num_threads(1)
        tensor = torch.from_numpy(x)
        found["torch"] = timing.repeated(lambda: torch.softmax(tensor, -1))
    except ImportError:
        pass
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return found
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Softmax", ["x"], ["y"], axis=-1)],
        "softmax",
        [value("x", onnx.TensorProto.FLOAT, [None] * x.ndim)],
        [value("y", onnx.TensorProto.FLOAT, [None] * x.ndim)],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found["onnxruntime"] = timing.repeated(lambda: session.run(None, {"x": x}))
    return found


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

    for n in (1 << 14, 1 << 16, 1 << 17):
        x = array((n,))
        for name, timer in peers(x).items():
            target = both(0.57, 0.57) if name == "onnxruntime" else both(0.30, 0.30)
            ours = in_isa(isa, lambda x=x: sml.softmax(x))  # type: ignore[misc]
            yield line(f"one row of {n:,} / {name}", target, {"ours": ours, name: timer}, n)
        if isa == "avx2" and BEST == "avx512":
            parts = {"avx2": kernel(x, isa), "avx512": kernel(x, BEST)}
            yield line(f"one row of {n:,}", both(1.2, 1.2), parts, n)
    for n in (1024, 2048, 4096, 8192):
        parts = {
            "rows": kernel(array((65536 // n, n)), isa),
            "one row": kernel(array((65536,)), isa),
        }
        yield line(f"({65536 // n}, {n}) in L2", both(0.85, 0.85), parts, 65536)

    x = array((total,))
    parts = {
        "softmax": kernel(x, isa),
        "read": limit(x, "read"),
        "streaming copy": limit(x, "streaming_copy"),
    }
    yield line(f"one row, {mib} MiB", both(1.02, 1.10), parts, total, "read", "streaming copy")
    for store in ("plain", "streaming"):
        for rival in ("three_pass_recompute", "three_pass_reload"):
            parts = {
                rival: kernel(x, isa, algorithm=rival, store=store),
                "two_pass": kernel(x, isa, algorithm="two_pass", store=store),
            }
            yield line(f"paper's gain, {mib} MiB, {store}", both(1.28, 1.18), parts, total)
    for function in ("log_softmax", "stablemax", "log_stablemax"):
        parts = {function: kernel(x, isa, function), "softmax": kernel(x, isa)}
        yield line(f"{function}, {mib} MiB", both(1.1, 1.1), parts, total)
    parts = {"logsumexp": kernel(x, isa, "logsumexp"), "read": limit(x, "read")}
    yield line(f"logsumexp, {mib} MiB", both(1.1, 1.1), parts, total)
    for dtype in ("float16", "bfloat16"):
        if dtype == "bfloat16":
            try:
                import ml_dtypes
            except ImportError:
                continue
            half = array((total,), ml_dtypes.bfloat16)
        else:
            half = array((total,), np.float16)
        parts = {dtype: kernel(half, isa), "float32": kernel(x, isa)}
        yield line(f"{dtype}, {total:,} elements", both(1.0, 1.2), parts, total)
    wide = array((total // 2,), np.float64)
    parts = {
        "float64": kernel(wide, isa),
        "read": limit(wide, "read"),
        "streaming copy": limit(wide, "streaming_copy"),
    }
    yield line(f"float64, {mib} MiB", both(1.35, 1.5), parts, total // 2, "read", "streaming copy")
    del wide

    def against_copy(shape: tuple[int, ...], target: dict[str, float], axis: int = -1) -> Line:
        x = array(shape)
        copy = "streaming copy" if 2 * x.nbytes > 1 << 25 else "copy"
        parts = {
            "softmax": kernel(x, isa, axis=axis),
            copy: limit(x, copy.replace(" ", "_")),
        }
        place = "" if axis == -1 else f" axis {axis}"
        return line(f"{shape}{place}", target, parts, x.size)

    for n in (256, 512, 1024, 4096, 32768, 131072):
        yield against_copy((total // n, n), both(1.35, 1.5))
    for n in (64, 100, 128):
        yield against_copy((total // n, n), both(1.3, 1.6))
    for n in (8, 16, 32):
        yield against_copy((total // n, n), both(1.7, 2.0))
    yield against_copy((512, 8, 4096), both(1.25, 1.4), 1)
    x = array((4096, 4096))
    parts = {
        "softmax": kernel(x, isa, axis=0),
        "read": limit(x, "read"),
        "streaming copy": limit(x, "streaming_copy"),
    }
    yield line("(4096, 4096) axis 0", both(1.5, 1.7), parts, x.size, "read", "streaming copy")

    for shape in ((1, 1 << 16), (1, 1 << 18), (1, 1 << 20), (64, 1024), (1024, 1024), (1, total)):
        if (os.cpu_count() or 1) < 2:
            break
        x = array(shape)
        parts = {"1 thread": kernel(x, isa), "2 threads": kernel(x, isa, threads=2)}
        yield line(f"{shape}, threads", both(1.8, 1.8), parts, x.size)


def calls(isa: str) -> Iterator[tuple[str, float, timing.Case]]:
    """Calls of 64 elements: what, at most how many microseconds, the case."""
    x = array((64,))
    out = np.empty_like(x)
    for name, target, call in (
        ("out given", 0.8, lambda: sml.softmax(x, out=out)),
        ("allocated", 1.0, lambda: sml.softmax(x)),
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
            f"call, 64 float32, {name}",
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
