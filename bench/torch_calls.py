"""What a small call from PyTorch takes, next to torch's own function: overhead, not arithmetic.

    pip install -e '.[torch,bench]' && python bench/torch_calls.py [--elements 10] [--rounds 1000]

Microseconds of one vector of float32, on one thread. Every round times each call of a row in turn;
of the rounds the least counts, which is what a call takes when nothing else runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import softmaxlib as sml
import softmaxlib.torch as st

Call = Callable[[], torch.Tensor]
Function = Callable[[torch.Tensor], torch.Tensor]

SAMPLE_NS = 5e5  # of each call in a round: shorter than what a busy machine gives at a time


def pairs(elements: int) -> dict[str, tuple[Function, Function]]:
    """Make ours and torch's of each function."""
    target, place = torch.tensor(elements // 2), torch.tensor([elements // 2])
    return {
        "softmax": (st.softmax, lambda x: torch.softmax(x, -1)),
        "log_softmax": (st.log_softmax, lambda x: torch.log_softmax(x, -1)),
        "logsumexp": (st.logsumexp, lambda x: torch.logsumexp(x, -1)),
        "take_log_softmax": (
            lambda x: st.take_log_softmax(x, place),
            lambda x: torch.log_softmax(x, -1).gather(-1, place),
        ),
        "cross_entropy": (
            lambda x: st.cross_entropy(x, target),
            lambda x: torch.nn.functional.cross_entropy(x, target),
        ),
    }


def ways(function: Function, x: torch.Tensor) -> tuple[Call, Call]:
    """Make the calls without and with a gradient."""
    leaf = x.clone().requires_grad_()
    upstream = torch.ones_like(function(x))
    return (
        lambda: function(x),
        lambda: torch.autograd.grad(function(leaf), leaf, upstream)[0],
    )


def least(calls: list[Call], rounds: int) -> list[float]:
    """Return microseconds per call."""
    best = [time_of(call, 1) for call in calls]
    for _ in range(rounds):
        for i, call in enumerate(calls):
            best[i] = min(best[i], time_of(call, max(1, round(SAMPLE_NS / best[i]))))
    return [ns / 1e3 for ns in best]


def time_of(call: Call, repeats: int) -> float:
    """Return nanoseconds per call."""
    begin = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - begin) / repeats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--elements", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(args.elements)
    table = Table(title=f"{sml.info()['cpu']}, {args.elements} elements, us")
    for column in ("function", "forward", "torch", "and backward", "torch"):
        table.add_column(column, justify="left" if column == "function" else "right")
    with sml.threads(1):
        for name, (ours, theirs) in pairs(args.elements).items():
            (forward, both), (their_forward, their_both) = ways(ours, x), ways(theirs, x)
            found = least([forward, their_forward, both, their_both], args.rounds)
            table.add_row(name, *(f"{us:.1f}" for us in found))
    table.caption = f"torch {torch.__version__}"
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
