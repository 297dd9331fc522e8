"""Rows whose results leave while the next row is read, and arguments made in loops per option.

Every result is compared bit by bit with that of rows computed one at a time: a row by itself takes
another kernel, and options that are not as usual (a bias of float64, for one) another way to its
arguments.
"""

import ml_dtypes
import numpy as np
import pytest

import softmaxlib as sml
from softmaxlib import _core

FUNCTIONS = ("softmax", "log_softmax", "stablemax", "log_stablemax")
DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


def bits(y):
    return np.where(np.isnan(y.astype(np.float64)), np.nan, y.astype(np.float64))


def streamed(isa, function, x, out, threads=1, **given):
    """Compute with streaming stores, however small x is; returns the kernel."""
    code = _core.dtypes[x.dtype.name]
    bias = given.get("bias")
    _core.run(
        _core.functions[function], x, out, code, code, (x.ndim - 1,),
        given.get("temperature", 1.0), given.get("temperatures"),
        bias, 0 if bias is None else _core.dtypes[bias.dtype.name], given.get("where"),
        _core.algorithms["auto"], _core.isas[isa], _core.stores["streaming"], threads,
    )  # fmt: skip
    return sml.last_kernel()


def options(rng, shape, dtype):
    rows, n = shape
    yield {}
    yield {"temperature": 0.7}
    yield {"temperatures": rng.uniform(0.5, 2, (rows, 1))}
    yield {"bias": rng.standard_normal(shape).astype(dtype)}
    yield {"bias": np.broadcast_to(rng.standard_normal(n).astype(dtype), shape)}
    yield {"bias": np.where(rng.random(shape) < 0.2, -np.inf, 0).astype(dtype)}
    yield {"where": rng.random(shape) < 0.7}
    yield {"temperature": 3, "bias": rng.standard_normal(shape), "where": rng.random(shape) < 0.5}


def alone(function, x, given):
    """Compute each row in a call of its own."""
    given = dict(given)
    temperatures = given.pop("temperatures", None)
    for r, row in enumerate(x):
        own = {k: v if np.ndim(v) == 0 else v[r] for k, v in given.items()}
        if temperatures is not None:
            own["temperature"] = float(temperatures[r, 0])
        yield getattr(sml, function)(row, **own)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_pipelined_has_the_bits_of_one_row(isa, function, dtype):
    rng = np.random.default_rng([7, FUNCTIONS.index(function)])
    n = 700 if dtype == np.float64 else 1_300
    shapes = [(4, n + 1), (3, 2 * n + 7)] if isa != "scalar" else [(3, n)]
    kernels = set()
    for shape in shapes:
        x = (3 * rng.standard_normal(shape)).astype(dtype)
        x[1, 5:9] = -np.inf
        x[2] *= 0.01
        x[2, -1] = 100  # raises the reference of what was summed before
        for given in options(rng, shape, dtype):
            expected = bits(np.stack(list(alone(function, x, given))))
            offset = np.empty(x.size + 3, dtype)[3:].reshape(shape)  # no row begins at a line
            in_place = x.copy()
            for out in (np.empty_like(x), offset, in_place):
                source = in_place if out is in_place else x
                kernels.add(streamed(isa, function, source, out, **given))
                np.testing.assert_array_equal(bits(out), expected, f"{shape} {list(given)}")
            kernels.add(streamed(isa, function, x, offset, threads=2, **given))
            np.testing.assert_array_equal(bits(offset), expected, f"{shape} {list(given)}, threads")
    if isa != "scalar":
        assert any("pipelined" in kernel for kernel in kernels), kernels


@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_without_a_sum_among_others(isa, function):
    """NaN rows, rows without a visible element or with one are written at once, not later."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((9, 1500)).astype(np.float32)
    where = rng.random(x.shape) < 0.9
    x[1, 3] = np.nan
    x[2, 7] = np.inf
    where[3] = False
    where[4] = np.arange(1500) == 1200
    x[5] -= 40_000  # far from 0: summed a second time, less its maximum
    x[6] = -np.inf
    for given in ({}, {"where": where}):
        out = np.full_like(x, 7)
        streamed(isa, function, x, out, **given)
        expected = np.stack(list(alone(function, x, given)))
        np.testing.assert_array_equal(bits(out), bits(expected))


@pytest.mark.parametrize("n", [7, 40, 64, 100, 1024, 1500])
@pytest.mark.parametrize("function", (*FUNCTIONS, "logsumexp"))
@pytest.mark.parametrize("axis", [0, 1])
def test_a_bias_of_float64_changes_no_bit(isa, function, n, axis):
    """It goes the careful way, element by element; one of float32 through the loops."""
    rng = np.random.default_rng([9, n])
    shape = (n, 21) if axis == 0 else (21, n)
    x = (4 * rng.standard_normal(shape)).astype(np.float32)
    x.flat[::37] = -np.inf
    bias = rng.standard_normal(shape).astype(np.float32)
    bias.flat[::41] = -np.inf
    bias.flat[5] = np.finfo(np.float32).min
    columns = [1, 1]
    columns[axis] = n
    wide = {"bias": bias.astype(np.float64)}
    compute = getattr(sml, function)
    for more in ({}, {"temperature": 0.3}, {"where": rng.random(shape) < 0.8}):
        np.testing.assert_array_equal(
            bits(np.asarray(compute(x, axis=axis, bias=bias, **more))),
            bits(np.asarray(compute(x, axis=axis, **wide, **more))),
        )
        column = rng.standard_normal(columns).astype(np.float32)
        np.testing.assert_array_equal(
            bits(np.asarray(compute(x, axis=axis, bias=column, **more))),
            bits(np.asarray(compute(x, axis=axis, bias=column.astype(np.float64), **more))),
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_mask_has_the_bits_of_minus_infinity(isa, dtype):
    """Masked rows keep to the window's upper end; those with -inf in x begin in the window."""
    rng = np.random.default_rng(10)
    for n in (300, 5000, 40_000 if isa != "scalar" else 6000):
        x = (3 * rng.standard_normal((3, n))).astype(dtype)
        x[1, n // 2] += 60
        where = rng.random(x.shape) < 0.6
        hidden = np.where(where, x, -np.inf).astype(dtype)
        for function in (*FUNCTIONS[:2], "logsumexp"):
            compute = getattr(sml, function)
            np.testing.assert_array_equal(
                bits(np.asarray(compute(x, where=where))), bits(np.asarray(compute(hidden)))
            )
