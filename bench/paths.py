"""Every path of the library next to its peers and to plain softmax: a grid that cannot hide.

    pip install -e '.[bench]' torch onnxruntime onnx && python bench/paths.py --quick

A path is a function with options, a dtype, an axis and a number of columns. It is timed on one
thread next to what torch and ONNX Runtime need for the same result, the NumPy formula, and plain
softmax of the same shape; each ratio is that of pairs of samples of one run of the timing engine,
with its interval. The list begins with the worst: a path is lost where a peer is surely faster, won
where it is surely slower, and else one cannot tell. A path without a peer is compared with plain
softmax alone.

--quick takes a sample in which every two values of any two properties meet (a pairwise design).
The full grid takes hours: each path is added to --out when it is measured, and a run that finds the
file goes on where the last one ended. --show prints what the file has.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import softmaxlib as sml
from softmaxlib import _bench, _peer_calls
from softmaxlib._tools import timing

try:
    import torch
except ImportError:
    torch = None

Array = np.ndarray[Any, Any]
Call = Callable[[], object]

FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax")
GRADIENTS = ("softmax_backward", "log_softmax_backward")
LOSSES = ("cross_entropy", "take_log_softmax")
OPTIONS = ("none", "temperature", "temperatures", "bias", "column bias", "where", "all")
OF_GRADIENTS = ("none", "temperature", "temperatures", "where")  # a bias does not change them
DTYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "float32": np.float32,
        "float64": np.float64,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
    }.items()
}
AXES = ("last", "middle", "wide")  # wide: a middle one with many elements after it
COLUMNS = (1, 2, 10, 32, 64, 100, 128, 512, 1000, 4096, 32000, 50257, 128256, 1 << 20, 1 << 26)
ELEMENTS = 1 << 20  # of a path, at least
INNER = 64  # elements after a middle axis; after one of the longest two
WIDE, WIDE_COLUMNS = 4096, 4096  # those after a wide one, as of pictures, and its most columns
MOST_ELEMENTS = 1 << 27  # of a path, so that its arrays and what peers make of them fit in memory
# Paths whose samples are spread over the same time: at most so many, and so many elements.
BATCH, BATCH_ELEMENTS = 12, 1 << 25


@dataclass(frozen=True)
class Route:
    """One path."""

    function: str
    options: str
    dtype: str
    axis: str
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows of so many columns, along the last axis or the one before it."""
        rows = max(1, ELEMENTS // self.columns)
        if self.axis == "last":
            return rows, self.columns
        beside = WIDE if self.axis == "wide" else INNER
        inner = min(beside, MOST_ELEMENTS // self.columns)
        return max(1, rows // inner), self.columns, inner

    @property
    def along(self) -> int:
        return 1


def grid() -> list[Route]:
    paths = [
        Route(*values) for values in itertools.product(FUNCTIONS, OPTIONS, DTYPES, AXES, COLUMNS)
    ]
    for functions, options in ((GRADIENTS, OF_GRADIENTS), (LOSSES, ("none",))):
        more = itertools.product(functions, options, DTYPES, AXES, COLUMNS)
        paths += [Route(*values) for values in more]
    return [path for path in paths if path.axis != "wide" or path.columns <= WIDE_COLUMNS]


def pairwise(paths: Sequence[Route], seed: int) -> list[Route]:
    """Return paths, few of them, in which every two values that meet in some path do."""
    rng = random.Random(seed)

    def pairs(path: Route) -> set[Any]:
        return set(itertools.combinations(asdict(path).items(), 2))

    left = set().union(*(pairs(path) for path in paths))
    chosen = []
    while left:
        some = rng.sample(paths, min(400, len(paths)))
        best = max(some, key=lambda path: len(pairs(path) & left))
        if not pairs(best) & left:  # none of the sample has what is missing
            best = next(path for path in paths if pairs(path) & left)
        chosen.append(best)
        left -= pairs(best)
    return chosen


# ---- What is called


def operands(path: Route) -> dict[str, Array]:
    rng = np.random.default_rng(path.columns)
    shape, dtype = path.shape, DTYPES[path.dtype]
    found = {"x": (3 * rng.standard_normal(shape, np.float32)).astype(dtype)}
    if path.options == "temperatures":
        found["temperature"] = 0.5 + rng.random(
            [1 if i == path.along else size for i, size in enumerate(shape)], np.float32
        )
    if path.options in ("bias", "all"):
        found["bias"] = rng.standard_normal(shape, np.float32).astype(dtype)
    if path.options == "column bias":
        found["bias"] = rng.standard_normal(
            [size if i == path.along else 1 for i, size in enumerate(shape)], np.float32
        ).astype(dtype)
    if path.options in ("where", "all"):
        found["where"] = rng.random(shape, np.float32) < 0.8
    if path.function.endswith("_backward"):
        found["grad"] = rng.standard_normal(shape, np.float32).astype(dtype)
    if path.function in ("cross_entropy", "take_log_softmax"):
        rows = [size for i, size in enumerate(shape) if i != path.along]
        found["target"] = rng.integers(0, path.columns, rows)
    return found


def keywords(path: Route, of: dict[str, Array]) -> dict[str, Any]:
    found: dict[str, Any] = {k: v for k, v in of.items() if k in ("temperature", "bias", "where")}
    if path.options in ("temperature", "all"):
        found["temperature"] = 0.7
    return found


def ours(path: Route, of: dict[str, Array]) -> Call:
    x, axis, options = of["x"], path.along, keywords(path, of)
    if path.function in FUNCTIONS:
        function = getattr(sml, path.function)
        return lambda: function(x, axis=axis, **options)
    if path.function == "cross_entropy":
        return lambda: sml.cross_entropy(x, of["target"], axis=axis, return_grad=True)
    if path.function == "take_log_softmax":
        return lambda: sml.take_log_softmax(x, of["target"], axis=axis)
    y = getattr(sml, path.function.removesuffix("_backward"))(x, axis=axis, **options)
    backward = getattr(sml, path.function)
    return lambda: backward(of["grad"], y, axis=axis, **options)


def tensor(x: Array) -> Any:
    if x.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def in_torch(path: Route, of: dict[str, Array]) -> Call:
    given = {key: tensor(value) for key, value in of.items()}
    x, axis = given["x"], path.along
    temperature: Any = 0.7 if path.options in ("temperature", "all") else None
    if path.options == "temperatures":
        temperature = given["temperature"].to(x.dtype)
    bias = given.get("bias")
    hidden = None if "where" not in given else ~given["where"]

    def arguments() -> Any:
        z = x if temperature is None else x / temperature
        z = z if bias is None else z + bias
        return z if hidden is None else z.masked_fill(hidden, -torch.inf)

    def stable() -> Any:
        z = arguments()
        return torch.where(z < 0, 1 / (1 - z), z + 1)

    def stablemax() -> Any:
        s = stable()
        return s / s.sum(axis, keepdim=True)

    def loss() -> Any:
        x.grad = None
        torch.nn.functional.cross_entropy(x, given["target"]).backward()

    def taken() -> Any:
        return torch.log_softmax(x, axis).gather(axis, given["target"].unsqueeze(axis))

    if path.function == "cross_entropy":
        x.requires_grad_()
    calls: dict[str, Call] = {
        "softmax": lambda: torch.softmax(arguments(), axis),
        "log_softmax": lambda: torch.log_softmax(arguments(), axis),
        "logsumexp": lambda: torch.logsumexp(arguments(), axis),
        "stablemax": stablemax,
        "log_stablemax": lambda: torch.log(stablemax()),
        "cross_entropy": loss,
        "take_log_softmax": taken,
    }
    if not path.function.endswith("_backward"):
        return calls[path.function]
    name = path.function.removesuffix("_backward")
    y, backward = getattr(torch, name)(arguments(), axis), getattr(torch, f"_{path.function}_data")

    def gradient() -> Any:
        grad = given["grad"]
        if hidden is not None and name == "log_softmax":  # what comes in there counts for nothing
            grad = grad.masked_fill(hidden, 0)
        d = backward(grad, y, axis, x.dtype)
        if hidden is not None and name == "softmax":  # as autograd does behind softmax
            d = d.masked_fill(hidden, 0)
        return d if temperature is None else d / temperature

    return gradient


def peers(path: Route, of: dict[str, Array]) -> dict[str, Callable[[], Call]]:
    """Return what prepares the call of each peer that has the function."""
    found: dict[str, Callable[[], Call]] = {}
    if torch:
        found["torch"] = lambda: in_torch(path, of)
    function: Any = path.function
    if path.options == "none" and function in ("softmax", "log_softmax"):
        for name in ("onnxruntime", "numpy"):
            library = _peer_calls.LIBRARIES[name]
            if not library.missing():
                prepare = library.load(function, 1)
                found[name] = functools.partial(_prepared, prepare, of["x"], path.along)
    return found


def _prepared(prepare: _peer_calls.Prepare, x: Array, axis: int) -> Call:
    return prepare(x, axis)[0]


def batches(paths: Sequence[Route]) -> Iterator[list[Route]]:
    batch: list[Route] = []
    for path in paths:
        elements = sum(int(np.prod(p.shape)) for p in (*batch, path))
        if batch and (len(batch) == BATCH or elements > BATCH_ELEMENTS):
            yield batch
            batch = []
        batch.append(path)
    if batch:
        yield batch


# ---- The run


def measure(paths: Sequence[Route], seconds: float, cpus: Sequence[int]) -> list[dict[str, Any]]:
    """Time some paths, whose samples are spread over the same time."""
    groups: dict[Route, dict[str, timing.Case]] = {}
    for path in paths:
        of = operands(path)
        calls = {"ours": ours(path, of)}
        if (path.function, path.options) != ("softmax", "none"):
            calls["plain"] = functools.partial(sml.softmax, of["x"], 1)
        for name, prepare in peers(path, of).items():
            try:
                call = prepare()
                call()
            except Exception as error:  # it does not have the dtype, say
                print(f"{name} left out of {path}: {str(error).splitlines()[0]}", file=sys.stderr)
            else:
                calls[name] = call
        level = _bench.cache_level(of["x"].nbytes // 4)
        groups[path] = {}
        for name, call in calls.items():
            groups[path][name] = timing.Case(
                f"{path} {name}",
                timing.repeated(call),
                group=path,
                warm=level != "DRAM",
                shared=level in ("L3", "DRAM"),
                hands_over=name not in ("ours", "plain"),
            )
    timed = [case for group in groups.values() for case in group.values()]
    timing.Engine(timed, seconds=seconds * len(paths), cpus=cpus).run()
    return [result(path, group) for path, group in groups.items()]


def result(path: Route, group: dict[str, timing.Case]) -> dict[str, Any]:
    case = group["ours"]
    ratios = {
        name: asdict(timing.ratio(case, other)) for name, other in group.items() if name != "ours"
    }
    time = _bench.per_1000(case, int(np.prod(path.shape)))
    return {**asdict(path), "shape": path.shape, "ns_per_1000": asdict(time), "ratios": ratios}


def hardest(row: dict[str, Any]) -> tuple[str, dict[str, float]] | None:
    """Return the peer that is fastest beside us, and our time over its."""
    found = {name: ratio for name, ratio in row["ratios"].items() if name != "plain"}
    found = {name: ratio for name, ratio in found.items() if ratio["value"] == ratio["value"]}
    return max(found.items(), key=lambda item: item[1]["value"], default=None)


def show(console: Console, rows: Sequence[dict[str, Any]], worst: int) -> None:
    judged = [(row, peer) for row in rows if (peer := hardest(row))]
    judged.sort(key=lambda item: -item[1][1]["value"])
    lost = [item for item in judged if item[1][1]["low"] > 1]
    won = [item for item in judged if item[1][1]["high"] < 1]
    table = Table("path", "ns/1k", "peer", "ours / peer", "interval", "ours / plain softmax")
    for row, (name, ratio) in judged[:worst]:
        of_plain = row["ratios"].get("plain")
        what = [row["function"], row["options"], row["dtype"], "x".join(map(str, row["shape"]))]
        table.add_row(
            " ".join(what).replace(" none ", " "),
            f"{row['ns_per_1000']['value']:.0f}",
            name,
            f"{ratio['value']:.2f}",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}",
            f"{of_plain['value']:.2f}" if of_plain else "",
        )
    console.print(table)
    console.print(
        f"{len(judged)} paths with a peer: {len(won)} won, {len(lost)} lost, "
        f"{len(judged) - len(won) - len(lost)} cannot be told; the {min(worst, len(judged))} worst "
        "are listed. The axis is 1 of all shapes."
    )
    for function in (*FUNCTIONS, *GRADIENTS, *LOSSES):
        of = [peer[1]["value"] for row, peer in judged if row["function"] == function]
        if of:
            console.print(f"  {function}: median {np.median(of):.2f} of the fastest peer's time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a pairwise design")
    parser.add_argument("--out", type=Path, help="JSON lines: goes on where the file ends")
    parser.add_argument("--show", action="store_true", help="what --out has; measure nothing")
    parser.add_argument("--seconds", type=float, default=0.5, help="per path (0.5)")
    parser.add_argument("--seed", type=int, default=2020)
    parser.add_argument("--worst", type=int, default=40, help="so many are listed (40)")
    args = parser.parse_args()
    console = Console()
    if args.show and not (args.out and args.out.exists()):
        parser.error("--show needs --out with a file of results")
    paths = [] if args.show else pairwise(grid(), args.seed) if args.quick else grid()
    rows: list[dict[str, Any]] = []
    if args.out and args.out.exists():
        try:
            rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        except ValueError as error:
            parser.error(f"--out {args.out} is no result of this program: {error}")
    keys = [field for field in Route.__dataclass_fields__]
    done = {tuple(row[key] for key in keys) for row in rows}
    left = [path for path in paths if tuple(asdict(path).values()) not in done]
    left.sort(key=lambda path: path.columns)
    cpus = timing.choose_cpus(1)
    if torch:
        torch.set_num_threads(1)
    console.print(f"{_bench.machine()['library']['cpu']}, {len(left)} paths, one thread")
    try:
        with timing.pinned(cpus), sml.threads(1), Progress(console=console) as progress:
            task = progress.add_task("paths", total=len(left))
            for batch in batches(left):
                found = measure(batch, args.seconds, cpus)
                rows += found
                if args.out:
                    with args.out.open("a") as file:
                        file.writelines(json.dumps(row) + "\n" for row in found)
                progress.advance(task, len(found))
    except KeyboardInterrupt:
        console.print("interrupted: what was measured so far")
    show(console, rows, args.worst)
    sys.exit(0 if rows else 1)


if __name__ == "__main__":
    main()
