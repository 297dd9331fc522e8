"""StableMax at its corners: x exactly 1 (NaN in the published formula's float32 gradient), -inf,
the largest and the smallest numbers, zeros of both signs; forward and gradients."""

import numpy as np
import pytest
from oracle import (
    DTYPES,
    gradient_bound,
    gradient_error,
    mp_gradient,
    mp_row,
    ulp_error,
    within_contract,
)

import softmaxlib as sml

LARGEST = {"float16": 65504, "bfloat16": 3.3895314e38, "float32": 3.4028235e38}
SMALLEST = {"float16": 2**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 5e-324}


def rows(dtype):
    top = LARGEST.get(dtype.name, np.finfo(np.float64).max)
    low = SMALLEST[dtype.name]
    return {
        "one": [1.0],
        "ones": [1.0] * 3,
        "around one": [1.0, -1.0, 1 - 2**-7, 1 + 2**-7, 0.5, 2.0],
        "one of many": [1.0, *(-0.25 * i for i in range(40))],
        "zeros": [0.0, -0.0, 0.0],
        "subnormals": [low, -low, 3 * low, 0.0, -0.0, 1.0, -1.0],
        "the largest": [top, 1.0, 0.0, -1.0],
        "many of the largest": [top] * 37,
        "both ends": [top, -top, 1.0, -0.0, top / 2, -top / 2],
        "the lowest": [-top] * 19,
        "the lowest and one": [-top, -top, -top / 2, 1.0],
    }


def check(name, x, y, grad, got, at=slice(None)):
    """Compare the row's finite part with the formula."""
    dtype = x.dtype
    assert got.dtype == dtype
    assert np.isfinite(got.astype(float)).all()
    want, scale = mp_gradient(name, grad[at], x[at], y[at])
    error = gradient_error(got[at], want, scale, dtype)
    assert error.max() <= gradient_bound(name, dtype), (name, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["stablemax", "log_stablemax"])
def test_corners(isa, name, dtype):
    rng = np.random.default_rng(7)
    function, backward = getattr(sml, name), getattr(sml, f"{name}_backward")
    for label, values in rows(dtype).items():
        x = np.array(values).astype(dtype)
        y = function(x)
        assert within_contract(name, y, mp_row(name, x), dtype).all(), label
        for grad in (rng.standard_normal(x.size).astype(dtype), np.eye(1, x.size)[0].astype(dtype)):
            check(name, x, y, grad, backward(grad, x, y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["stablemax", "log_stablemax"])
def test_masked_corners(isa, name, dtype):
    """-inf and `where` take elements out, whatever the gradient holds there."""
    rng = np.random.default_rng(8)
    for label, values in rows(dtype).items():
        x = np.repeat(np.array(values).astype(dtype), 3)
        x[1::3] = -np.inf
        x[2::3] = np.nan
        where = ~np.isnan(x.astype(float))
        y = getattr(sml, name)(x, where=where)
        assert (y[1::3] == (-np.inf if "log" in name else 0)).all(), label
        alone = mp_row(name, x[::3])
        assert within_contract(name, y[::3], alone, dtype).all(), label
        grad = rng.standard_normal(x.size).astype(dtype)
        grad[1::3], grad[2::3] = np.inf, np.nan
        got = getattr(sml, f"{name}_backward")(grad, x, y, where=where)
        assert (got[1::3] == 0).all()
        assert (got[2::3] == 0).all()
        check(name, x, y, grad, got, slice(0, None, 3))


def test_gradient_of_the_definition(isa):
    """From x alone, in float32: the errors of forward and backward together."""
    rng = np.random.default_rng(9)
    for n in (2, 50, 700):
        x = (4 * rng.standard_normal(n)).astype(np.float32)
        x[0] = 1
        grad = rng.standard_normal(n).astype(np.float32)
        got = sml.stablemax_backward(grad, x, sml.stablemax(x))
        want, scale = mp_gradient("stablemax", grad, x, mp_row("stablemax", x))
        assert gradient_error(got, want, scale, np.float32).max() <= 9


def test_loss_near_zero(isa):
    """The label's gradient where nearly all probability is the label's."""
    for gap in (1e2, 1e4, 1e6, 1e12):
        x = np.array([0.0, gap, -1.0], np.float32)
        log_y = sml.log_stablemax(x)
        got = sml.log_stablemax_backward(np.array([0, -1, 0], np.float32), x, log_y)
        exact = np.expm1(mp_row("log_stablemax", x)[1]) / (1 + np.longdouble(gap))
        assert got[1] < 0
        assert ulp_error(got[1], exact, np.float32) <= 10


def test_published_formula_at_one():
    """With its guard, float32's autograd gives NaN; float64's agrees with our float32."""
    torch = pytest.importorskip("torch")
    values = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
    grad = np.array([0.5, -1.0, 2.0, 0.25], np.float32)

    def published(dtype):
        x = torch.tensor(values, dtype=dtype, requires_grad=True)
        s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
        (s / s.sum()).backward(torch.tensor(grad, dtype=dtype))
        return x.grad.numpy()

    assert np.isnan(published(torch.float32)[0])
    got = sml.stablemax_backward(grad, values, sml.stablemax(values))
    np.testing.assert_allclose(got, published(torch.float64), rtol=1e-6)
