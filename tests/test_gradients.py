"""Gradients: formulas in extended precision, finite differences, exact zeros, the same bits."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import softmaxlib as sml

FUNCTIONS = ["softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax"]
DTYPES = [np.float16, np.float32, np.float64]
Real = np.longdouble


def forward(name, x, axis=-1, **options):
    return getattr(sml, name)(x, axis, **options)


def backward(name, grad, x, y, axis=-1, **options):
    arguments = (grad, y) if name in ("softmax", "log_softmax") else (grad, x, y)
    return getattr(sml, f"{name}_backward")(*arguments, axis, **options)


def exact(name, grad, x, y, axis=-1, temperature=1.0, where=True):
    """Return the gradient and the scale of its error, from x and y as they are."""
    g, z, y = (np.asarray(a, Real) for a in (grad, np.asarray(x, Real) / temperature, y))
    if name == "logsumexp":
        g, y = (np.expand_dims(a, axis) for a in (g, y))
        d = np.where(where & (z > -np.inf), g * np.exp(z - y), 0) / temperature
        return d, np.abs(d)
    is_log = name.startswith("log")
    in_sum = where & (y > -np.inf if is_log else y > 0)
    g = np.where(in_sum, g, 0)
    weight = np.where(in_sum, np.exp(y) if is_log else y, 0)
    if is_log:
        d = g - weight * g.sum(axis, keepdims=True)
        scale = np.abs(g) + weight * np.abs(g).sum(axis, keepdims=True)
    else:
        d = weight * (g - (weight * g).sum(axis, keepdims=True))
        scale = weight * (np.abs(g) + np.abs(weight * g).sum(axis, keepdims=True))
    over = 1 / (temperature * (1 + np.abs(np.where(in_sum, z, 0)) if "stable" in name else 1))
    return np.where(in_sum, d * over, 0), np.where(in_sum, scale * np.abs(over), 0)


def assert_close(got, name, grad, x, y, **options):
    want, scale = exact(name, grad, x, y, **options)
    ulps = 1.01 if got.dtype != np.float64 else (40 if name == "logsumexp" else 4)
    unit = np.spacing(np.maximum(scale.astype(got.dtype), np.finfo(got.dtype).tiny))
    error = np.abs(got.astype(Real) - want) / unit
    assert error.max(initial=0) <= ulps, (name, got.dtype, float(error.max()))


def sample(shape, dtype, seed=0, spread=3.0):
    rng = np.random.default_rng(seed)
    x = (spread * rng.standard_normal(shape)).astype(dtype)
    return x, rng


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("n", [1, 2, 15, 64, 1000, 1025, 5000])
def test_formula(name, dtype, n):
    x, rng = sample((3, n), dtype)
    y = forward(name, x)
    grad = rng.standard_normal(y.shape).astype(dtype)
    got = backward(name, grad, x, y)
    assert got.dtype == dtype
    assert got.shape == x.shape
    assert_close(got, name, grad, x, y)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_finite_differences(name):
    """The derivative of the definition itself, in 50 digits."""
    x = np.array([0.5, -1.25, 1.0, 0.0, -0.0, 3.0, -7.5])
    rng = np.random.default_rng(1)
    y = forward(name, x)
    grad = np.asarray(rng.standard_normal(y.shape))

    def s(v):
        return v + 1 if v >= 0 else 1 / (1 - v)

    def scalar(values):
        if "stable" in name:
            terms = [s(v) for v in values]
        else:
            terms = [mpmath.exp(v) for v in values]
        total = mpmath.fsum(terms)
        if name == "logsumexp":
            return mpmath.mpf(float(grad)) * mpmath.log(total)
        share = [mpmath.log(t / total) if name.startswith("log") else t / total for t in terms]
        return mpmath.fsum(mpmath.mpf(float(g)) * p for g, p in zip(grad, share, strict=True))

    got = backward(name, grad, x, y)
    with mpmath.workdps(50):
        point = [mpmath.mpf(float(v)) for v in x]
        step = mpmath.mpf(10) ** -20
        for i in range(x.size):
            up, down = list(point), list(point)
            up[i] += step
            down[i] -= step
            want = (scalar(up) - scalar(down)) / (2 * step)
            assert abs(got[i] - want) <= 1e-14, i


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_of_torch(name):
    torch = pytest.importorskip("torch")
    x, rng = sample((5, 33), np.float64, spread=2)
    y = forward(name, x)
    grad = np.asarray(rng.standard_normal(y.shape))
    t = torch.tensor(x, requires_grad=True)
    s = torch.where(t < 0, 1 / (1 - t.clamp(max=0)), t + 1)
    result = {
        "softmax": lambda: torch.softmax(t, -1),
        "log_softmax": lambda: torch.log_softmax(t, -1),
        "logsumexp": lambda: torch.logsumexp(t, -1),
        "stablemax": lambda: s / s.sum(-1, keepdim=True),
        "log_stablemax": lambda: torch.log(s / s.sum(-1, keepdim=True)),
    }[name]()
    result.backward(torch.tensor(grad))
    np.testing.assert_allclose(backward(name, grad, x, y), t.grad.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_zeros_are_exact(name, dtype):
    x, _ = sample((4, 50), dtype)
    x[:, ::7] = -np.inf
    where = np.ones(x.shape, bool)
    where[:, 3::5] = False
    where[3] = False
    x[where == 0] = np.nan
    y = forward(name, x, where=where)
    grad = np.ones(y.shape, dtype)
    if name != "logsumexp":
        grad[~where] = np.nan
        grad[np.isneginf(x)] = np.inf
    got = backward(name, grad, x, y, where=where)
    assert (got[~where | np.isneginf(x)] == 0).all()
    assert np.isfinite(got).all()
    clean = np.where(where, x, 0)
    if name == "logsumexp":
        y = np.where(np.isfinite(y), y, 0).astype(dtype)
    assert_close(got[:3], name, grad[:3], clean[:3], y[:3], where=where[:3])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_bits_everywhere(name):
    for dtype in DTYPES:
        x, rng = sample((70, 2500), dtype, 5)
        y = forward(name, x, temperature=1.7)
        grad = rng.standard_normal(y.shape).astype(dtype)
        want = backward(name, grad, x, y, temperature=1.7)
        xt, yt, gt = (np.asfortranarray(a) for a in (x, y, grad))
        for isa in sml.available_isas():
            for threads in (1, 2, 5):
                with sml.use_isa(isa), sml.threads(threads):
                    np.testing.assert_array_equal(backward(name, grad, x, y, temperature=1.7), want)
                    np.testing.assert_array_equal(backward(name, gt, xt, yt, temperature=1.7), want)
        for r in (0, 33):
            np.testing.assert_array_equal(
                backward(name, grad[r], x[r], y[r], temperature=1.7), want[r]
            )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_out_may_be_any_argument(name):
    x, rng = sample((6, 200), np.float32)
    y = forward(name, x)
    grad = rng.standard_normal(y.shape).astype(np.float32)
    want = backward(name, grad, x, y)
    for which in range(3):
        arrays = [grad.copy(), x.copy(), y.copy()]
        out = arrays[which]
        if out.shape != x.shape:
            continue
        assert backward(name, *arrays, out=out) is out
        np.testing.assert_array_equal(out, want)
    memory = np.empty((7, 200), np.float32)
    memory[:6] = grad if grad.shape == x.shape else x
    arrays = [memory[:6], x, y] if grad.shape == x.shape else [grad, memory[:6], y]
    out = memory[1:]
    backward(name, *arrays, out=out)
    np.testing.assert_array_equal(out, want)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_axes_and_temperatures(data):
    name = data.draw(st.sampled_from(FUNCTIONS))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    axes = data.draw(
        st.one_of(
            st.none(),
            st.integers(-len(shape), len(shape) - 1),
            st.sets(st.integers(0, len(shape) - 1)).map(tuple),
        )
    )
    x, rng = sample(shape, np.float64, data.draw(st.integers(0, 99)))
    if axes is None:
        every = tuple(range(len(shape)))
    else:
        every = axes if isinstance(axes, tuple) else (axes % len(shape),)
    rows = tuple(1 if d in every else n for d, n in enumerate(shape))
    temperature = data.draw(st.sampled_from([1.0, 0.5, rng.uniform(0.5, 2, rows)]))
    y = forward(name, x, axes, temperature=temperature)
    grad = np.asarray(rng.standard_normal(np.shape(y)))
    got = backward(name, grad, x, y, axes, temperature=temperature)
    want, _ = exact(name, grad, x, y, every, temperature)
    np.testing.assert_allclose(got, want.astype(np.float64), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (((2, 4), (2, 3)), ValueError, "grad has shape"),
        ((np.ones((2, 3), int), (2, 3)), TypeError, "grad has dtype int64"),
        (((2, 3), np.ones((2, 3), bool)), TypeError, "y has dtype bool"),
    ],
)
def test_errors(arguments, error, words):
    grad, y = (np.ones(a) if isinstance(a, tuple) else a for a in arguments)
    with pytest.raises(error, match=words):
        sml.softmax_backward(grad, y)


def test_more_errors():
    y = np.ones((2, 3))
    with pytest.raises(ValueError, match="temperature"):
        sml.softmax_backward(y, y, temperature=0)
    with pytest.raises(np.exceptions.AxisError):
        sml.softmax_backward(y, y, 2)
    with pytest.raises(ValueError, match="y has shape"):
        sml.stablemax_backward(y, np.ones((2, 4)), y)
    with pytest.raises(ValueError, match=r"y has shape \(3,\); it must have the shape \(2,\)"):
        sml.logsumexp_backward(np.ones(2), y, np.ones(3))
    with pytest.raises(TypeError, match="out has dtype float32"):
        sml.softmax_backward(y, y, out=np.empty((2, 3), np.float32))
    with pytest.raises(TypeError, match="where"):
        sml.softmax_backward(y, y, where=np.ones((2, 3)))
