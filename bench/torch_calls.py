"""What a small call from PyTorch takes, next to torch's own function: overhead, not arithmetic.

    pip install -e '.[torch,bench]' && python bench/torch_calls.py [--elements 10] [--seconds 20]

Microseconds of one vector of float32, on one thread, by the timing engine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import softmaxlib as sml
import softmaxlib.torch as st
from softmaxlib._tools import timing

Call = Callable[[], torch.Tensor]
Function = Callable[[torch.Tensor], torch.Tensor]


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--elements", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(args.elements)
    table = Table(title=f"{sml.info()['cpu']}, {args.elements} elements, us")
    for column in ("function", "forward", "torch", "and backward", "torch"):
        table.add_column(column, justify="left" if column == "function" else "right")
    with sml.threads(1):
        cases = {}
        for name, (ours, theirs) in pairs(args.elements).items():
            (forward, both), (their_forward, their_both) = ways(ours, x), ways(theirs, x)
            cases[name] = [
                timing.Case(name, timing.repeated(call), group=name)
                for call in (forward, their_forward, both, their_both)
            ]
        every = [case for group in cases.values() for case in group]
        timing.Engine(every, seconds=args.seconds, cpus=timing.choose_cpus(1)).run()
    for name, group in cases.items():
        found = [timing.time_of(case).scaled(1e-3) for case in group]
        table.add_row(name, *(f"{'~' if us.noisy else ''}{us.value:.1f}" for us in found))
    table.caption = f"torch {torch.__version__}"
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
