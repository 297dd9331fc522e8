"""Checks the numerics contract on this machine: `softmaxlib verify`.

Every failure comes with a few lines of Python that show it again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

import softmaxlib
from softmaxlib import _core
from softmaxlib._bench import available_memory

Array = npt.NDArray[Any]

# The largest error over all 2^32 float32 inputs; csrc/isa/math/exp.hpp states the same.
EXP_BOUNDS = {"softmax": 1.19, "accurate": 0.16}

FUNCTIONS = tuple(_core.functions)
ALGORITHMS = ("three_pass_recompute", "three_pass_reload", "two_pass", "two_pass_reload")
STORES = ("auto", "plain", "streaming")
THREADS = (1, 2, 5)

# (largest error in ULP, mean, absolute error near zero that counts as none)
ACCURACY = {
    ("softmax", "float32"): (5.0, 1.0, 0.0),
    ("log_softmax", "float32"): (4.0, 4.0, 0.0),
    ("logsumexp", "float32"): (2.0, 2.0, 2.0**-23),
    ("stablemax", "float32"): (4.0, 4.0, 0.0),
    ("log_stablemax", "float32"): (4.0, 4.0, 0.0),
    ("softmax", "float64"): (5.0, 5.0, 0.0),
}
# Largest error of a gradient in ULP of the sum of its terms' magnitudes.
GRADIENTS = {
    **{(function, "float32"): 4.0 for function in ("log_softmax", "log_stablemax")},
    **{(function, "float32"): 5.0 for function in ("softmax", "stablemax")},
    ("logsumexp", "float32"): 1.0,
    **{(function, "float64"): 8.0 for function in FUNCTIONS},
}
SUM_BOUND = 1e-6


@dataclass(frozen=True)
class Result:
    check: str
    passed: bool
    detail: str
    seconds: float
    reproducer: str | None = None


class ContractError(Exception):
    """A promise broken: what was seen, and the lines that show it again."""

    def __init__(self, detail: str, reproducer: str) -> None:
        super().__init__(detail)
        self.reproducer = reproducer


Advance = Callable[[float], None]  # the part of the check that is done, 0 to 1
Check = Callable[[Advance], str]  # returns what it saw, or raises ContractError


def dtypes() -> dict[str, np.dtype[Any]]:
    found = {name: np.dtype(name) for name in ("float32", "float64", "float16")}
    try:
        import ml_dtypes

        found["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
    except ImportError:
        pass
    return found


# ---- same bits -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One of the ways to compute the same thing."""

    isa: str
    algorithm: str = "auto"
    threads: int = 1
    store: str = "auto"
    offset: int = 0  # elements past a 64-byte boundary
    in_place: bool = False
    axis: int = -1  # 0: rows lie down as columns
    row: int | None = None  # this row alone, away from its batch


@dataclass(frozen=True)
class Case:
    """Random rows, the same for the same seed."""

    seed: int
    function: str
    dtype: str

    @cached_property
    def drawn(self) -> tuple[Array, npt.NDArray[np.bool_] | None]:
        rng = np.random.default_rng(self.seed)
        n = round(10 ** rng.uniform(0, 5))
        rows = int(rng.integers(1, 5))
        x = np.stack([_row(rng, n) for _ in range(rows)])
        dtype = dtypes()[self.dtype]
        top = 6e4 if self.dtype == "float16" else 3e38
        finite = np.isfinite(x)
        x[finite] = np.clip(x[finite], -top, top)
        where = rng.random((rows, n)) < rng.random() if rng.random() < 0.25 else None
        return x.astype(dtype), where

    @property
    def x(self) -> Array:
        return self.drawn[0]

    @property
    def where(self) -> npt.NDArray[np.bool_] | None:
        return self.drawn[1]

    def run(self, variant: Variant) -> Array:
        """Return the bits of the result, as integers."""
        x, where = self.drawn
        if variant.row is not None:
            keep = slice(variant.row, variant.row + 1)
            x, where = x[keep], None if where is None else where[keep]
        if variant.axis == 0:
            x, where = x.T, None if where is None else where.T
        x = _placed(x, variant.offset)
        if variant.in_place and self.function != "logsumexp":
            out = x
        else:
            shape = x.shape
            if self.function == "logsumexp":
                shape = shape[:1] if variant.axis else shape[1:]
            out = _placed(np.empty(shape, x.dtype), variant.offset)
        compute(self.function, x, out, where, variant)
        y = out.T if variant.axis == 0 and out.ndim == 2 else out
        return np.ascontiguousarray(y).view(f"u{y.dtype.itemsize}")


def compute(
    function: str, x: Array, out: Array, where: npt.NDArray[np.bool_] | None, variant: Variant
) -> None:
    """Let random rows reach the kernels: the one door."""
    dtype, isa = _core.dtypes[x.dtype.name], _core.isas[variant.isa]
    _core.run(
        _core.functions[function],
        x,
        out,
        dtype,
        dtype,
        (variant.axis % x.ndim,),
        1.0,
        None,
        None,
        0,
        where,
        _core.algorithms[variant.algorithm],
        isa,
        _core.stores[variant.store],
        variant.threads,
    )
    ran, *_ = _core.last_report()
    if ran != isa:
        raise RuntimeError(f"asked for {variant.isa}, ran on ISA {ran}")


def _row(rng: np.random.Generator, n: int) -> npt.NDArray[np.float64]:
    """Draw logits of every temper, up to 1e30 in magnitude."""
    x = rng.standard_normal(n) * 10 ** rng.uniform(-3, 2)
    match rng.integers(10):
        case 0:
            x = np.sort(x)
        case 1:
            x = np.sort(x)[::-1].copy()
        case 2:
            x = np.round(x)  # ties
        case 3:
            x *= 10 ** rng.uniform(0, 28)
        case 4:
            x[rng.random(n) < rng.random()] = -np.inf
        case 5:
            x += rng.choice([-1, 1]) * 10 ** rng.uniform(0, 30)
        case 6:
            x[rng.integers(n)] = 10 ** rng.uniform(0, 30)  # a spike
        case 7:
            x = np.linspace(rng.uniform(-2000, 2000), rng.uniform(-2000, 2000), n)  # a steep ramp
        case 8 if rng.random() < 0.3:
            x[rng.integers(n)] = rng.choice([np.nan, np.inf])
        case 9 if rng.random() < 0.3:
            x[:] = rng.choice([-np.inf, 0.0, 1e-40])
    return x


def _placed(x: Array, offset: int) -> Array:
    """Copy to C order, this many elements past a 64-byte boundary."""
    size = x.dtype.itemsize
    raw = np.empty(x.size * size + 64 + offset * size, np.uint8)
    start = -raw.ctypes.data % 64 + offset * size
    placed: Array = raw[start : start + x.size * size].view(x.dtype).reshape(x.shape)
    placed[...] = x
    return placed


def variants(rng: np.random.Generator, rows: int) -> Iterator[Variant]:
    """Draw for every ISA and algorithm the rest at random."""
    for isa, algorithm in itertools.product(_core.isas_available(), ALGORITHMS):
        yield Variant(
            isa=isa,
            algorithm=algorithm,
            threads=int(rng.choice(THREADS)),
            store=str(rng.choice(STORES)),
            offset=int(rng.integers(16)),
            in_place=bool(rng.random() < 0.3),
            axis=int(rng.choice([-1, -1, 0])),
            row=int(rng.integers(rows)) if rng.random() < 0.2 else None,
        )


def same_bits(function: str, seed: int, seconds: float) -> Check:
    def check(advance: Advance) -> str:
        start, rows, runs = time.perf_counter(), 0, 0
        known = dtypes()
        for number in itertools.count():
            spent = time.perf_counter() - start
            if number >= len(known) and spent >= seconds:
                break
            advance(min(1.0, spent / seconds))
            dtype = list(known)[number % len(known)]
            # a seed of its own for every function and case, also when run alone
            case = Case(seed * 1_000_003 + 5 * number + FUNCTIONS.index(function), function, dtype)
            first = Variant(_core.isas_available()[0])
            expected = case.run(first)
            for variant in variants(np.random.default_rng([case.seed, 1]), len(case.x)):
                wanted = expected if variant.row is None else expected[variant.row, None]
                differ = int(np.count_nonzero(case.run(variant) != wanted))
                runs += 1
                if differ:
                    raise ContractError(
                        f"{dtype} {case.x.shape}: {differ} of {wanted.size} results differ",
                        _bits_reproducer(case, first, variant),
                    )
            rows += len(case.x)
        missing = "" if "bfloat16" in known else " (bfloat16 left out: no ml_dtypes)"
        return f"{rows:,} rows, {runs:,} runs, {len(known)} dtypes{missing}: none differs"

    return check


def _bits_reproducer(case: Case, first: Variant, second: Variant) -> str:
    row = f"[{second.row}, None]" if second.row is not None else ""
    return "\n".join(
        (
            "from softmaxlib._verify import Case, Variant",
            f"case = {case}  # x of shape {case.x.shape}",
            f"a = case.run({first}){row}",
            f"b = case.run({second})",
            "print((a != b).nonzero(), a[a != b], b[a != b])",
        )
    )


# ---- the exponential -----------------------------------------------------------------------------


def exp_pieces(quick: bool, seed: int) -> list[tuple[int, int]]:
    """Return all 2^32 floats, or one stretch out of every half binade."""
    if not quick:
        return [(first, 1 << 24) for first in range(0, 1 << 32, 1 << 24)]
    starts = np.random.default_rng(seed).integers(0, (1 << 22) - (1 << 13), 1 << 10)
    return [((i << 22) + int(start), 1 << 13) for i, start in enumerate(starts)]


def exp_errors(exp: str, quick: bool, seed: int) -> Check:
    """Check the bound on every ISA, and that they agree."""

    def check(advance: Advance) -> str:
        isas = _core.isas_available()
        pieces = exp_pieces(quick, seed)
        jobs = [(isa, piece) for piece in pieces for isa in isas]
        accurate, bound = exp == "accurate", EXP_BOUNDS[exp]
        worst = 0.0
        call = "_core.exp_sweep({}, {}, {:#x}, {})"

        def sweep(job: tuple[str, tuple[int, int]]) -> tuple[float, int, int]:
            isa, (first, count) = job
            return _core.exp_sweep(_core.isas[isa], accurate, first, count)

        pool = ThreadPoolExecutor(softmaxlib.get_num_threads())
        try:
            outcomes = zip(jobs, pool.map(sweep, jobs), strict=True)
            for done, ((isa, (first, count)), (ulp, bits, checksum)) in enumerate(outcomes):
                advance(done / len(jobs))
                if not ulp <= bound:
                    value = np.array(bits, np.uint32).view(np.float32)
                    raise ContractError(
                        f"{isa}: {ulp:.4g} ULP at {value!s}, bound {bound}",
                        "from softmaxlib import _core\nprint("
                        + call.format(_core.isas[isa], accurate, bits, 1)
                        + ")  # ULP",
                    )
                worst = max(worst, ulp)
                if isa == isas[0]:
                    reference = checksum
                elif checksum != reference:
                    both = (_core.isas[isas[0]], _core.isas[isa])
                    sweeps = ", ".join(call.format(i, accurate, first, count) for i in both)
                    raise ContractError(
                        f"{isa} and {isas[0]} differ",
                        f"from softmaxlib import _core\nprint({sweeps})  # checksums",
                    )
        finally:
            pool.shutdown(cancel_futures=True)
        inputs = sum(count for _, count in pieces)
        return f"{inputs:,} inputs, {len(isas)} ISAs alike, {worst:.4f} ULP (bound {bound})"

    return check


# ---- accuracy ------------------------------------------------------------------------------------


def reference(function: str, x: Array) -> npt.NDArray[np.longdouble]:
    """Compute rows in long double."""
    x = x.astype(np.longdouble)
    if "stablemax" in function:
        s = np.where(x >= 0, x + 1, 1 / (1 - np.minimum(x, 0)))
        total = s.sum(-1, keepdims=True)
        y = np.sign(x) * np.log1p(np.abs(x)) - np.log(total) if "log" in function else s / total
    else:
        top = x.max(-1, keepdims=True)
        e = np.exp(x - top)
        np.put_along_axis(e, x.argmax(-1)[:, None], 0, -1)
        rest = e.sum(-1, keepdims=True)
        if function == "logsumexp":
            y = (top + np.log1p(rest))[:, 0]
        elif function == "log_softmax":
            y = x - top - np.log1p(rest)
        else:
            np.put_along_axis(e, x.argmax(-1)[:, None], 1, -1)
            y = e / (1 + rest)
    return np.asarray(y, np.longdouble)


def ulps(y: Array, exact: npt.NDArray[np.longdouble]) -> npt.NDArray[np.longdouble]:
    """Return the error in units in the last place of y's dtype, subnormals included."""
    error = np.abs(y - exact)
    unit = np.spacing(np.abs(exact).astype(y.dtype))
    return np.asarray(error / unit, np.longdouble)


def accuracy(function: str, dtype: str, quick: bool, seed: int) -> Check:
    def check(advance: Advance) -> str:
        most, mean_bound, absolute = ACCURACY[function, dtype]
        lengths = (100, 1000, 20_000) if quick else (100, 1000, 20_000, 1 << 22)
        cases = list(itertools.product((0.1, 1, 5, 30, 100), lengths))
        worst, worst_mean = 0.0, 0.0
        for done, (scale, n) in enumerate(cases):
            advance(done / len(cases))
            rows = max(1, (200_000 if quick else 2_000_000) // n)
            rng = np.random.default_rng([seed, n])
            x = (rng.standard_normal((rows, n)) * scale).astype(dtype)
            y = getattr(softmaxlib, function)(x)
            exact = reference(function, x)
            error = ulps(y, exact)
            error[np.abs(y - exact) <= absolute] = 0
            worst = max(worst, float(error.max()))
            worst_mean = max(worst_mean, float(error.mean()))
            if not (worst <= most and worst_mean <= mean_bound):
                raise ContractError(
                    f"N(0, {scale}^2), n = {n:,}: {error.max():.2f} ULP, mean {error.mean():.2f}",
                    "import numpy as np, softmaxlib\n"
                    "from softmaxlib._verify import reference, ulps\n"
                    f"x = np.random.default_rng([{seed}, {n}]).standard_normal(({rows}, {n}))\n"
                    f"x = (x * {scale}).astype(np.{dtype})\n"
                    f"error = ulps(softmaxlib.{function}(x), reference({function!r}, x))\n"
                    "print(error.max(), error.mean())",
                )
        return f"{worst:.2f} ULP, mean {worst_mean:.2f} (bounds {most:g}, {mean_bound:g})"

    return check


def backward(function: str, grad: Array, x: Array, y: Array) -> Array:
    """Call the gradient of a function."""
    reads_x = function not in ("softmax", "log_softmax")
    arguments = (grad, x, y) if reads_x else (grad, y)
    result: Array = getattr(softmaxlib, f"{function}_backward")(*arguments)
    return result


def gradient_reference(
    function: str, grad: Array, x: Array, y: Array
) -> tuple[npt.NDArray[np.longdouble], npt.NDArray[np.longdouble]]:
    """Compute the gradient of rows in long double, and the sum of its terms' magnitudes."""
    grad, x, y = (a.astype(np.longdouble) for a in (grad, x, y))
    if function == "logsumexp":
        exact = grad[:, None] * np.exp(x - y[:, None])
        return exact, np.abs(exact)
    if function.startswith("log"):
        p, terms = np.exp(y), grad
        exact = grad - p * terms.sum(-1, keepdims=True)
        size = np.abs(grad) + p * np.abs(terms).sum(-1, keepdims=True)
    else:
        terms = y * grad
        exact = y * (grad - terms.sum(-1, keepdims=True))
        size = y * (np.abs(grad) + np.abs(terms).sum(-1, keepdims=True))
    slope = 1 / (1 + np.abs(x)) if "stablemax" in function else 1
    return exact * slope, size * slope


def gradients(function: str, dtype: str, quick: bool, seed: int) -> Check:
    """Check accuracy and, on every ISA, the same bits."""

    def check(advance: Advance) -> str:
        bound = GRADIENTS[function, dtype]
        cases = list(itertools.product((0.1, 1, 5, 30), (100, 1003, 20_000)))
        worst, isas = 0.0, _core.isas_available()
        for done, (scale, n) in enumerate(cases):
            advance(done / len(cases))
            rng = np.random.default_rng([seed, n])
            x = (
                rng.standard_normal((max(2, (50_000 if quick else 500_000) // n), n)) * scale
            ).astype(dtype)
            y = getattr(softmaxlib, function)(x)
            grad = rng.standard_normal(y.shape).astype(dtype)
            found = []
            for isa in isas:
                with softmaxlib.use_isa(isa):
                    found.append(backward(function, grad, x, y))
            exact, size = gradient_reference(function, grad, x, y)
            error = float((np.abs(found[0] - exact) / np.spacing(size.astype(dtype))).max())
            worst = max(worst, error)
            differ = [
                isa for isa, other in zip(isas, found, strict=True) if (other != found[0]).any()
            ]
            if differ or not error <= bound:
                raise ContractError(
                    f"N(0, {scale}^2), n = {n:,}: {error:.2f} ULP; other bits: {differ or 'none'}",
                    "import numpy as np, softmaxlib\n"
                    "from softmaxlib._verify import backward, gradient_reference\n"
                    f"rng = np.random.default_rng([{seed}, {n}])\n"
                    f"x = (rng.standard_normal({x.shape}) * {scale}).astype(np.{dtype})\n"
                    f"y = softmaxlib.{function}(x)\n"
                    f"grad = rng.standard_normal(y.shape).astype(np.{dtype})\n"
                    f"exact, size = gradient_reference({function!r}, grad, x, y)\n"
                    f"error = np.abs(backward({function!r}, grad, x, y) - exact)\n"
                    f"print((error / np.spacing(size.astype(np.{dtype}))).max())\n"
                    f"for isa in {list(isas)}:\n"
                    "    with softmaxlib.use_isa(isa):\n"
                    f"        print(isa, hash(backward({function!r}, grad, x, y).tobytes()))",
                )
        return f"{worst:.2f} ULP (bound {bound:g}), {len(isas)} ISAs alike"

    return check


def sums(quick: bool, seed: int) -> Check:
    def check(advance: Advance) -> str:
        n = 1 << (22 if quick else 28)
        while n > 1 << 16 and 8 * n > available_memory() // 2:
            n //= 2
        worst = 0.0
        for done, scale in enumerate((0.1, 5.0)):
            advance(done / 2)
            x = np.random.default_rng(seed).standard_normal(n, np.float32) * np.float32(scale)
            off = abs(float(softmaxlib.softmax(x, out=x).sum(dtype=np.float64)) - 1)
            worst = max(worst, off)
            if not off <= SUM_BOUND:
                raise ContractError(
                    f"N(0, {scale}^2), n = {n:,}: the sum is off by {off:.2g}",
                    "import numpy as np, softmaxlib\n"
                    f"x = np.random.default_rng({seed}).standard_normal({n}, np.float32)\n"
                    f"y = softmaxlib.softmax(x * np.float32({scale}))\n"
                    "print(y.sum(dtype=np.float64) - 1)",
                )
        return f"n = {n:,}: off by {worst:.1g} (bound {SUM_BOUND:g})"

    return check


# ---- all of it -----------------------------------------------------------------------------------


def checks(quick: bool, seed: int, seconds: float) -> list[tuple[str, Check]]:
    """List what to check; seconds are for the random rows of "same bits"."""
    found: list[tuple[str, Check]] = [
        (f"exp ({exp})", exp_errors(exp, quick, seed)) for exp in EXP_BOUNDS
    ]
    found += [
        (f"same bits: {function}", same_bits(function, seed, seconds / len(FUNCTIONS)))
        for function in FUNCTIONS
    ]
    # Where long double is no wider than double, there is nothing to compare double with.
    wide = np.finfo(np.longdouble).nmant > 60
    found += [
        (f"accuracy: {function} {dtype}", accuracy(function, dtype, quick, seed))
        for function, dtype in ACCURACY
        if dtype == "float32" or wide
    ]
    found += [
        (f"gradient: {function} {dtype}", gradients(function, dtype, quick, seed))
        for function, dtype in GRADIENTS
        if dtype == "float32" or wide
    ]
    found.append(("outputs sum to 1", sums(quick, seed)))
    return found


def run(
    todo: Iterable[tuple[str, Check]], step: Callable[[str, float], None] = lambda name, part: None
) -> Iterator[Result]:
    for name, check in todo:
        start = time.perf_counter()
        step(name, 0.0)
        passed, reproducer = True, None
        try:
            detail = check(partial(step, name))
        except ContractError as failure:
            passed, detail, reproducer = False, str(failure), failure.reproducer
        yield Result(name, passed, detail, round(time.perf_counter() - start, 2), reproducer)


def report(results: Iterable[Result]) -> dict[str, Any]:
    listed = [asdict(result) for result in results]
    return {
        "schema": "softmaxlib-verify/1",
        "passed": all(result["passed"] for result in listed),
        "isas": list(_core.isas_available()),
        "library": softmaxlib.info(),
        "checks": listed,
    }
