"""What training asks for, next to torch and to the limits of the machine, in one interleaved run.

    pip install -e '.[bench]' torch && python bench/training.py [--quick] [--seconds 12]

All parts of a case are a group of the timing engine, on one thread: ratios are of pairs of samples,
with their intervals, and ? stands where other work disturbed too many. Cases follow each other,
since their arrays would not fit in memory together. The same inputs for all: torch's tensors share
the memory of the arrays. "fresh" allocates the gradient in the call, as torch does (its logits.grad
is None before each call, its default of zero_grad); "given" writes into an array that is there.
Floors are of the traffic alone, from a read pass (read) and a copy with streaming stores (copy).
torch has its large arrays from the system anew in every call; --kept lets the C library keep them,
as a process with an allocator for that would.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import softmaxlib as sml
from softmaxlib import _core
from softmaxlib._tools import timing

try:
    import torch
except ImportError:
    torch = None

Array = np.ndarray[Any, Any]
Call = Callable[[], object]

TARGETS = {"torch": 1.5, "float64": 5.0, "floor": 1.2}


@dataclass
class Case:
    name: str
    ours: dict[str, Call]
    theirs: dict[str, Call]
    x: Array  # as large as what is read
    floor: tuple[int, int] | None = None  # so many reads and copies of x
    target: str = ""


def array(shape: tuple[int, ...], seed: int = 2020) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def published(logits: Any, labels: Any) -> Any:
    """StableMax's cross entropy as its paper's users write it, in float64."""
    x = logits.to(torch.float64)
    s = torch.where(x < 0, 1 / (1 - x), x + 1)
    log_p = torch.log(s / s.sum(-1, keepdim=True))
    return -log_p.gather(-1, labels[:, None]).mean()


def projected(grad: Any, weights: Any) -> Any:
    """The orthogonal gradient, plainly."""
    g, w = grad.view(-1), weights.view(-1)
    rest = g - torch.dot(w, g) / torch.dot(w, w) * w
    return (rest * (g.norm() / rest.norm())).view_as(grad)


def losses(shape: tuple[int, int], activation: str) -> Case:
    x, out = 4 * array(shape), np.zeros(shape, np.float32)
    labels = np.random.default_rng(1).integers(0, shape[1], shape[0])

    def ours(grad_out: Array | None) -> Call:
        return lambda: sml.cross_entropy(
            x, labels, activation=activation, return_grad=True, grad_out=grad_out
        )

    theirs: dict[str, Call] = {}
    if torch:
        logits, targets = torch.from_numpy(x).requires_grad_(), torch.from_numpy(labels)
        loss = published if activation == "stablemax" else torch.nn.functional.cross_entropy

        def forward_and_backward() -> None:
            logits.grad = None
            loss(logits, targets).backward()

        name = "torch, float64 formula" if activation == "stablemax" else "torch"
        theirs[name] = forward_and_backward
    return Case(
        f"cross_entropy, {activation}, loss and gradient, {shape}",
        {"fresh": ours(None), "given": ours(out)},
        theirs,
        x,
        (0 if fits(2 * x[0].nbytes) else 1, 1),
        "float64" if activation == "stablemax" else "torch",
    )


def fits(row_bytes: int) -> bool:
    """Tell whether what a row needs twice stays in the second level cache."""
    return row_bytes <= (_core.cache_sizes()[1] or 1 << 20)


def backwards(name: str, shape: tuple[int, int]) -> Case:
    x, grad, out = array(shape), array(shape, 1), np.zeros(shape, np.float32)
    y = getattr(sml, name)(x)
    ours = getattr(sml, f"{name}_backward")
    theirs: dict[str, Call] = {}
    if torch:
        leaf, incoming = torch.from_numpy(x).requires_grad_(), torch.from_numpy(grad)
        result = getattr(torch, name)(leaf, -1)
        theirs["torch"] = lambda: torch.autograd.grad(result, leaf, incoming, retain_graph=True)
    return Case(
        f"{name}_backward, {shape}",
        {"fresh": lambda: ours(grad, y), "given": lambda: ours(grad, y, out=out)},
        theirs,
        x,
        (1 if fits(2 * x[0].nbytes) else 3, 1),
        "floor",
    )


def selected(shape: tuple[int, int]) -> Case:
    x = 4 * array(shape)
    indices = np.random.default_rng(1).integers(0, shape[1], (shape[0], 1))
    theirs: dict[str, Call] = {}
    if torch:
        logits, places = torch.from_numpy(x), torch.from_numpy(indices)
        theirs["torch"] = lambda: torch.log_softmax(logits, -1).gather(-1, places)
    return Case(
        f"take_log_softmax, one of each row, {shape}",
        {"fresh": lambda: sml.take_log_softmax(x, indices)},
        theirs,
        x,
        (1, 0),
        "floor",
    )


def orthogonal(shape: tuple[int, int]) -> Case:
    grad, weights, out = array(shape), array(shape, 1), np.zeros(shape, np.float32)
    theirs: dict[str, Call] = {}
    if torch:
        g, w = torch.from_numpy(grad), torch.from_numpy(weights)
        theirs["torch"] = lambda: projected(g, w)
    return Case(
        f"orthogonal_gradient, {shape}",
        {
            "fresh": lambda: sml.orthogonal_gradient(grad, weights),
            "given": lambda: sml.orthogonal_gradient(grad, weights, out=out),
        },
        theirs,
        grad,
        (1 if fits(2 * grad.nbytes) else 3, 1),
    )


def cases(quick: bool) -> Iterator[Case]:
    """Make them one at a time: together they would not fit in memory."""
    share = 4 if quick else 1
    logits = [(8192 // share, 512), (512 // share, 32000), (64 // share, 128256)]
    for shape in logits:
        yield losses(shape, "softmax")
    for shape in logits:
        yield losses(shape, "stablemax")
    for name in ("softmax", "log_softmax"):
        yield backwards(name, (8192 // share, 4096))
        yield backwards(name, (64 // share, 1 << 20))
    for shape in logits[1:]:
        yield selected(shape)
    yield orthogonal((4096 // share, 4096))


def limit(x: Array, kind: str) -> Callable[[int], float]:
    out, isa = np.zeros_like(x), _core.isas[sml.available_isas()[0]]
    return lambda repeats: _core.time_roofline(_core.rooflines[kind], isa, x, out, repeats)


def measure(case: Case, seconds: float, cpus: list[int]) -> dict[str, timing.Case]:
    timers = {name: timing.repeated(call) for name, call in {**case.ours, **case.theirs}.items()}
    timers |= {"read": limit(case.x, "read"), "copy": limit(case.x, "streaming_copy")}
    parts = {name: timing.Case(name, run, shared=True) for name, run in timers.items()}
    timing.Engine(list(parts.values()), seconds=seconds, cpus=cpus).run()
    return parts


def shown(ratio: timing.Estimate) -> str:
    if ratio.clean < timing.MIN_CLEAN:
        return "?"
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def row_of(case: Case, parts: dict[str, timing.Case]) -> list[str]:
    """Return name, times, ratio to torch, floor, ratio to it, target and verdict."""
    ms = {name: timing.time_of(part).value / 1e6 for name, part in parts.items()}
    times = ", ".join(f"{name} {ms[name]:.3f}" for name in (*case.ours, *case.theirs))
    faster = floor = ratio = target = verdict = ""
    best = parts["given" if "given" in case.ours else "fresh"]
    if case.theirs:
        theirs = parts[next(iter(case.theirs))]
        faster = ", ".join(shown(timing.ratio(theirs, parts[name])) for name in case.ours)
    if case.floor:
        reads, copies = case.floor
        below = [parts["read"]] * reads + [parts["copy"]] * copies
        words = [f"{reads} read"] * (reads > 0) + ["copy"] * (copies > 0)
        floor = f"{reads * ms['read'] + copies * ms['copy']:.3f} ({' + '.join(words)})"
        of_floor = timing.ratio(best, below)
        ratio = shown(of_floor)
    if case.target == "floor":
        target = f"<= {TARGETS['floor']} of the floor"
        verdict = judged(of_floor, TARGETS["floor"])
    elif case.target:
        target = f">= {TARGETS[case.target]}x torch"
        if case.theirs:
            verdict = judged(timing.ratio(parts["fresh"], theirs), 1 / TARGETS[case.target])
    return [case.name, times, faster, floor, ratio, target, verdict]


def judged(ratio: timing.Estimate, most: float) -> str:
    """Tell on which side of the target the interval lies."""
    return "met" if ratio.high <= most else "MISSED" if ratio.low >= most else "cannot tell"


def keep_memory() -> None:
    """Have glibc neither map large blocks by themselves nor give memory back."""
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1)):
        raise RuntimeError("this C library cannot be told to keep memory")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the rows (some stay in cache)"
    )
    parser.add_argument(
        "--kept", action="store_true", help="glibc: freed memory stays with the process"
    )
    parser.add_argument("--seconds", type=float, help="of each case (default: 12, with --quick 4)")
    args = parser.parse_args()
    seconds = args.seconds or (4 if args.quick else 12)
    cpus = timing.choose_cpus(1)
    if args.kept:
        keep_memory()
    table = Table(title=f"{sml.info()['cpu']}, float32, 1 thread")
    for column in ("case", "ms", "torch / ours", "floor, ms", "ours / floor", "target", ""):
        table.add_column(column, justify="left" if column in ("case", "target", "") else "right")
    if torch:
        torch.set_num_threads(1)
        table.caption = f"torch {torch.__version__}. "
    else:
        table.caption = "torch is not installed: nothing to compare with. "
    if args.kept:
        table.caption += "Freed memory is kept. "
    table.caption += "ours / floor: with the gradient's memory given, where it can be."
    with sml.threads(1):
        for case in cases(args.quick):
            row = row_of(case, measure(case, seconds, cpus))
            print("; ".join(part for part in row if part), file=sys.stderr)
            table.add_row(*row)
    Console(width=170).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
