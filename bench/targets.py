"""The speed targets of this library, each measured and compared in one interleaved run.

    pip install -e '.[bench]' && python bench/targets.py [--isa avx2] [--rounds 9] [--mib 256]

Every line is a ratio of medians: the parts of a line are timed in turn, so that whatever else the
machine does falls on all of them. torch and ONNX Runtime take part where they are installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import softmaxlib as sml
from softmaxlib import _core

Array = np.ndarray[Any, Any]
Timer = Callable[[], float]  # ns of one call

SAMPLE_NS = 3e6
BEST = sml.available_isas()[0]


@dataclass
class Line:
    case: str
    target: dict[str, float]  # by ISA
    numerator: str
    denominator: str
    timers: dict[str, Timer]  # in ns
    elements: int
    sums: tuple[str, ...] = ()  # the denominator is the sum of these


def array(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    rng = np.random.default_rng(2020)
    x = rng.standard_normal(shape, dtype=np.float64 if dtype == np.float64 else np.float32)
    return x.astype(dtype, copy=False)


def repeated(run: Callable[[int], float]) -> Timer:
    """Choose how often to call in a row, so that a sample lasts some milliseconds."""
    once = max(run(1), run(1))
    repeats = max(1, round(SAMPLE_NS / max(once, 1.0)))
    return lambda: run(repeats)


def kernel(
    x: Array,
    isa: str,
    function: str = "softmax",
    algorithm: str = "auto",
    store: str = "auto",
    threads: int = 1,
    axis: int = -1,
) -> Timer:
    out = np.zeros_like(x)
    if function == "logsumexp":
        out = np.zeros(np.delete(x.shape, axis), x.dtype)
    codes = (
        _core.algorithms[algorithm],
        _core.isas[isa],
        _core.stores[store],
    )
    dtype = _core.dtypes[x.dtype.name]
    return repeated(
        lambda n: _core.time_run(
            _core.functions[function], x, out, dtype, *codes, threads, n, axis=axis
        )
    )


def limit(x: Array, kind: str) -> Timer:
    out = np.zeros_like(x)
    return repeated(
        lambda n: _core.time_roofline(_core.rooflines[kind], _core.isas[BEST], x, out, n)
    )


def python(call: Callable[[], object]) -> Timer:
    def run(n: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(n):
            call()
        return (time.perf_counter_ns() - start) / n

    return repeated(run)


def peers(x: Array) -> dict[str, Timer]:
    found: dict[str, Timer] = {}
    try:
        import torch

        torch.set_num_threads(1)
        tensor = torch.from_numpy(x)
        found["torch"] = python(lambda: torch.softmax(tensor, -1))
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
    found["onnxruntime"] = python(lambda: session.run(None, {"x": x}))
    return found


def lines(isa: str, mib: int) -> Iterator[Line]:
    def both(avx512: float, avx2: float) -> dict[str, float]:
        return {"avx512": avx512, "avx2": avx2}

    def line(
        case: str, target: dict[str, float], parts: dict[str, Timer], size: int, *sums: str
    ) -> Line:
        names = list(parts)
        return Line(case, target, names[0], " + ".join(sums) or names[1], parts, size, sums)

    total = (mib << 20) // 4  # floats of an array far beyond the caches

    for n in (1 << 14, 1 << 16, 1 << 17):
        x = array((n,))
        for name, timer in peers(x).items():
            target = both(0.57, 0.57) if name == "onnxruntime" else both(0.30, 0.30)
            with sml.use_isa(isa):
                ours = python(lambda x=x: sml.softmax(x))  # type: ignore[misc]
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


def measure(line: Line, rounds: int) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in line.timers}
    for _ in range(rounds):
        for name, timer in line.timers.items():
            samples[name].append(timer())
    return {name: statistics.median(times) for name, times in samples.items()}


def calls(isa: str, table: Table) -> None:
    x = array((64,))
    out = np.empty_like(x)
    with sml.use_isa(isa):
        given = python(lambda: sml.softmax(x, out=out))
        allocated = python(lambda: sml.softmax(x))
        for name, timer, target in (("out given", given, 0.8), ("allocated", allocated, 1.0)):
            us = statistics.median(timer() for _ in range(25)) / 1000
            verdict = "met" if us <= target else "MISSED"
            table.add_row(
                f"call, 64 float32, {name}", f"{us:.2f} us", "", f"<= {target} us", verdict
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--isa", default=BEST, choices=sml.available_isas())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=256, help="of an array beyond the caches")
    args = parser.parse_args()
    console = Console(width=118)
    table = Table(title=f"{args.isa} on {sml.info()['cpu']}, 1 thread but for the last lines")
    for column in ("case", "ns per 1,000 elements", "ratio", "target", ""):
        table.add_column(column, justify="left" if column in ("case", "") else "right")
    with sml.threads(1):
        for line in lines(args.isa, args.mib):
            found = measure(line, args.rounds)
            below = sum(found[name] for name in line.sums) if line.sums else found[line.denominator]
            ratio = found[line.numerator] / below
            times = ", ".join(f"{k} {v * 1000 / line.elements:,.0f}" for k, v in found.items())
            faster = line.case.startswith("paper") or line.case.endswith("threads")
            target = line.target.get(args.isa)
            verdict = ""
            if target is not None:
                met = ratio >= target if faster else ratio <= target
                verdict = "met" if met else "MISSED"
            sign = ">=" if faster else "<="
            shown = "" if target is None else f"{sign} {target:.2f}"
            table.add_row(line.case, times, f"{ratio:.2f}", shown, verdict)
            print(f"{line.case}: {ratio:.2f}", file=sys.stderr)
        calls(args.isa, table)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
