"""softmax of one float32 row beside SciPy, NumPy, and torch and ONNX Runtime where installed.

One thread, the same array, interleaved rounds, medians; errors in ULP against numpy.longdouble.

    pip install scipy torch onnxruntime onnx && python bench/peers.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import special

import softmaxlib as sml

Array = np.ndarray[Any, Any]
SIZES = (1024, 1 << 14, 1 << 16, 1 << 22, 1 << 26)
SCALE = 5.0  # of the normal logits


def peers() -> dict[str, Callable[[Array], Array]]:
    """Return softmax over the last axis, by library."""

    def numpy_formula(x: Array) -> Array:
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    found: dict[str, Callable[[Array], Array]] = {
        f"softmaxlib {sml.__version__}": sml.softmax,
        "SciPy": lambda x: special.softmax(x, axis=-1),
        f"NumPy {np.__version__}": numpy_formula,
    }
    try:
        import torch

        torch.set_num_threads(1)
        found[f"torch {torch.__version__}"] = lambda x: torch.softmax(
            torch.from_numpy(x), -1
        ).numpy()
    except ImportError:
        pass
    try:
        found["ONNX Runtime"] = onnxruntime_softmax()
    except ImportError:
        pass
    return found


def onnxruntime_softmax() -> Callable[[Array], Array]:
    import onnx
    import onnxruntime

    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Softmax", ["x"], ["y"], axis=-1)],
        "softmax",
        [value("x", onnx.TensorProto.FLOAT, ["n"])],
        [value("y", onnx.TensorProto.FLOAT, ["n"])],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x})[0]


def ulp(y: Array, x: Array) -> tuple[float, float]:
    wide = x.astype(np.longdouble)
    e = np.exp(wide - wide.max())
    exact = e / e.sum()
    error = np.abs(y - exact) / np.spacing(exact.astype(np.float32))
    return float(error.max()), float(error.mean())


def measure(calls: dict[str, Callable[[Array], Array]], x: Array) -> dict[str, float]:
    """Return the median time of a call in ns per 1,000 elements."""
    repeats = max(1, (1 << 20) // x.size)
    rounds = 5 if x.size > 1 << 24 else 15
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call(x)
            start = time.perf_counter()
            for _ in range(repeats):
                call(x)
            samples[name].append((time.perf_counter() - start) / repeats / x.size * 1e12)
    return {name: float(np.median(times)) for name, times in samples.items()}


def main() -> None:
    calls = peers()
    rng = np.random.default_rng(0)
    arrays = [(rng.standard_normal(n) * SCALE).astype(np.float32) for n in SIZES]
    table = Table(title="softmax of one float32 row, 1 thread, result allocated by the library")
    table.add_column("library")
    for n in SIZES:
        table.add_column(f"{n:,}\nns/1,000", justify="right")
    for n in (1 << 16, 1 << 22):
        table.add_column(f"{n:,}\nULP max (mean)", justify="right")
    with sml.threads(1):
        times = [measure(calls, x) for x in arrays]
        for name, call in calls.items():
            errors = [ulp(call(x), x) for x in arrays if x.size in (1 << 16, 1 << 22)]
            table.add_row(
                name,
                *(f"{t[name]:,.0f}" for t in times),
                *(f"{worst:,.1f} ({mean:,.2f})" for worst, mean in errors),
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
