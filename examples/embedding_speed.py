"""softmaxlib inside of PyTorch and JAX, beside their own softmax: time and error, one table.

    python examples/embedding_speed.py        # needs cmake, a C++ compiler, torch or jax

Both are called through the runtime, on its tensors and its threads, and allocate their result. The
times are medians of interleaved rounds. Threads: the process is confined to as many CPUs before the
runtime starts. Malloc: glibc's, the default, takes new pages for every large result, which the
system clears during the call; tcmalloc, which servers preload, keeps what is freed (Debian's
libtcmalloc-minimal4). Errors are in units in the last place, against double.
"""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

try:
    import numpy as np
    from build_examples import HERE, build, library
except ModuleNotFoundError as error:
    raise SystemExit(
        f"embedding_speed.py needs {error.name}: in the clone, `pip install -e .`"
    ) from None

RUNTIMES = {"torch": "pytorch", "jax": "jax_ffi"}  # and its example
SHAPES = ((512, 32000), (32, 12, 512, 512))
TCMALLOC = "tcmalloc_minimal"


def torch_calls(library: str, function: str):
    import softmaxlib_torch
    import torch

    softmaxlib_torch.load(library)
    theirs, ours = (getattr(face, function) for face in (torch, torch.ops.softmaxlib))
    return torch.from_numpy, lambda x: theirs(x, -1), lambda x: ours(x, -1)


def jax_calls(library: str, function: str):
    import jax
    import softmaxlib_jax

    softmaxlib_jax.load(library)
    functions = (jax.jit(getattr(face, function)) for face in (jax.nn, softmaxlib_jax))
    theirs, ours = (lambda x, f=f: f(x).block_until_ready() for f in functions)
    return jax.device_put, theirs, ours


def largest_ulps(function: str, x: np.ndarray, y: np.ndarray) -> float:
    """Return the largest error of some rows."""
    rows = slice(None, None, max(1, x[..., 0].size // 64))
    x, y = (a.reshape(-1, a.shape[-1])[rows] for a in (x, y))
    shifted = x.astype(np.float64) - x.max(-1, keepdims=True)
    exact = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    if function == "softmax":
        exact = np.exp(exact)
    return float(np.max(np.abs(y - exact) / np.spacing(np.abs(exact).astype(x.dtype))))


def measure(runtime: str, library: str, function: str, shape, threads: int, rounds: int):
    """Return milliseconds and errors of both, of one runtime in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    sys.path.append(str(HERE / RUNTIMES[runtime]))
    place, theirs, ours = {"torch": torch_calls, "jax": jax_calls}[runtime](library, function)
    x = np.random.default_rng(0).standard_normal(shape, np.float32) * 5
    placed = place(x)
    calls = {"theirs": theirs, "ours": ours}
    result = {
        f"{name} ulp": largest_ulps(function, x, np.asarray(f(placed))) for name, f in calls.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            start = time.perf_counter()
            y = calls[name](placed)
            seconds[name].append(time.perf_counter() - start)
            del y
    for name in calls:
        result[f"{name} ms"] = 1e3 * statistics.median(seconds[name])
    return result


def in_process(preload: str, **case):
    """Measure in a process of its own: what is set here is read when a runtime starts."""
    command = [sys.executable, __file__, "--measure", json.dumps(case)]
    environment = os.environ | {"LD_PRELOAD": preload}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def print_table(function: str, rounds: int, directory: Path) -> None:
    libraries = {}
    for runtime, example in RUNTIMES.items():
        if importlib.util.find_spec(runtime) is None:
            print(f"{runtime} is not installed: left out")
        else:
            libraries[runtime] = str(library(build(example, directory)))
    if not libraries:
        sys.exit("embedding_speed.py needs torch or jax: `pip install torch`")
    mallocs = {"glibc": ""}
    if found := ctypes.util.find_library(TCMALLOC):
        mallocs["tcmalloc"] = found
    else:
        print(f"lib{TCMALLOC} is not installed: left out")
    cpus = len(os.sched_getaffinity(0))
    print(
        f"{'runtime':14} {'shape':>18} {'threads':>7} {'malloc':>8} {'its own ms':>10} "
        f"{'ours ms':>8} {'ratio':>5} {'its ULP':>8} {'our ULP':>7}"
    )
    cases = itertools.product(libraries, SHAPES, sorted({1, cpus}), mallocs)
    for runtime, shape, threads, malloc in cases:
        row = in_process(
            mallocs[malloc],
            runtime=runtime,
            library=libraries[runtime],
            function=function,
            shape=shape,
            threads=threads,
            rounds=rounds,
        )
        name = f"{runtime} {importlib.metadata.version(runtime).split('+')[0]}"
        print(
            f"{name:14} {shape!s:>18} {threads:7} {malloc:>8} {row['theirs ms']:10.1f} "
            f"{row['ours ms']:8.1f} {row['theirs ms'] / row['ours ms']:5.2f} "
            f"{row['theirs ulp']:8.2f} {row['ours ulp']:7.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--function", choices=("softmax", "log_softmax"), default="softmax")
    parser.add_argument("--rounds", type=int, default=15, help="of each row (%(default)s)")
    parser.add_argument(
        "--directory",
        type=Path,
        default=HERE.parent / "build" / "examples",
        help="where the examples are built (%(default)s)",
    )
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(**arguments.measure)))
    else:
        print_table(arguments.function, arguments.rounds, arguments.directory)


if __name__ == "__main__":
    main()
