"""Gradients: formulas in extended precision, finite differences, autograd, exact zeros, the same
bits."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    FUNCTIONS,
    gradient,
    gradient_bound,
    gradient_error,
    mp_gradient,
    ulp_error,
)

import softmaxlib as sml


def forward(name, x, axis=-1, **options):
    return getattr(sml, name)(x, axis, **options)


def backward(name, grad, x, y, axis=-1, **options):
    arguments = (grad, y) if name in ("softmax", "log_softmax") else (grad, x, y)
    return getattr(sml, f"{name}_backward")(*arguments, axis, **options)


def assert_close(got, name, grad, x, y, axis=-1, **options):
    want, scale = gradient(name, grad, x, y, axis, **options)
    error = gradient_error(got, want, scale, got.dtype)
    assert error.max(initial=0) <= gradient_bound(name, got.dtype), (name, float(error.max()))


def sample(shape, dtype, seed=0, spread=3.0):
    rng = np.random.default_rng(seed)
    x = (spread * rng.standard_normal(shape)).astype(dtype)
    return x, rng


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


def search_short_rows(name, dtype, rows, seed):
    """Many rows whose sums round as badly as chance makes them: terms of one sign and size."""
    rng = np.random.default_rng(seed)
    for n in (2, 3, 5, 8, 9, 12, 16, 17, 24, 32, 33, 64, 100):
        for spread in (2.0**-10, 0.1, 1, 5):
            x = (spread * rng.standard_normal((rows, n))).astype(dtype)
            grad = np.abs(rng.standard_normal((rows, n))).astype(dtype)
            y = forward(name, x)
            assert_close(backward(name, grad, x, y), name, grad, x, y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "stablemax", "log_stablemax"])
def test_error_of_many_short_rows(name, dtype):
    search_short_rows(name, dtype, 300, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_error_of_very_many_short_rows(name, dtype):
    for seed in range(5):
        search_short_rows(name, dtype, 10_000, 100 + seed)


LARGEST = np.finfo(np.float64).max


@pytest.mark.parametrize("temperature", [1.0, 3.0, 1e-3, 1e150])
@pytest.mark.parametrize("sizes", ["one sign", "both signs", "one large", "all sizes"])
@pytest.mark.parametrize("n", [2, 5, 600])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_near_the_end_of_the_range(name, n, sizes, temperature):
    """Nothing in between overflows where the result does not."""
    rng = np.random.default_rng(n)
    x = rng.normal(0, 2, n) * min(temperature, 1e100)
    y = forward(name, x, temperature=temperature)
    grad = rng.uniform(0.5, 1, np.shape(y)) * LARGEST
    if sizes == "both signs":
        grad = grad * rng.choice([-1, 1], np.shape(y))
    elif sizes == "one large" and np.ndim(y):
        grad[1:] *= 1e-290
    elif sizes == "all sizes":
        grad = grad * 10.0 ** rng.uniform(-600, 0, np.shape(y))
    got = backward(name, grad, x, y, temperature=temperature)
    want, scale = gradient(name, grad, x, y, temperature=temperature)
    finite = np.abs(want) <= LARGEST
    beyond = got[~finite]
    np.testing.assert_array_equal(beyond, np.where(want[~finite] > 0, np.inf, -np.inf))
    # The unit is a share of what is added, which itself may be beyond the range.
    unit = np.maximum(scale[finite] * np.longdouble(2) ** -52, np.longdouble(2) ** -1074)
    error = np.abs(got[finite] - want[finite]) / unit
    assert error.max(initial=0) <= gradient_bound(name, got.dtype)


def test_gradients_that_overflowed_in_between():
    grad, p, x = [-1.2e308, 1.2e308], [0.05, 0.95], [1.0, 2.0]
    np.testing.assert_allclose(sml.softmax_backward(grad, p), [-1.14e307, 1.14e307], rtol=1e-15)
    np.testing.assert_allclose(sml.stablemax_backward(grad, x, p), [-5.7e306, 3.8e306], rtol=1e-15)
    # x / temperature is beyond the range, the gradient is not.
    far = sml.stablemax_backward([1.0, 2.0], [1e300, 1e300], [0.5, 0.5], temperature=1e-9)
    np.testing.assert_allclose(far, [-2.5e-301, 2.5e-301], rtol=1e-15)
    far = sml.log_stablemax_backward(
        [1.0, 2.0], [1e300, -1e300], np.log([0.5, 0.5]), temperature=1e-9
    )
    np.testing.assert_allclose(far, [-5e-301, 5e-301], rtol=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 0.75])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_finite_differences(name, temperature):
    """The derivative of the definition itself, in 50 digits, but for elements that take no part."""
    x = np.array([0.5, -1.25, 1.0, np.nan, 0.0, -0.0, 3.0, -np.inf, -7.5])
    where = ~np.isnan(x)
    taken = np.flatnonzero(np.isfinite(x))
    rng = np.random.default_rng(1)
    options = {"temperature": temperature, "where": where}
    y = forward(name, x, **options)
    grad = np.asarray(rng.standard_normal(y.shape))
    weights = grad if name == "logsumexp" else grad[taken]

    def s(v):
        return v + 1 if v >= 0 else 1 / (1 - v)

    def scalar(values):
        z = [v / mpmath.mpf(temperature) for v in values]
        terms = [s(v) if "stable" in name else mpmath.exp(v) for v in z]
        total = mpmath.fsum(terms)
        if name == "logsumexp":
            return mpmath.mpf(float(weights)) * mpmath.log(total)
        share = [mpmath.log(t / total) if name.startswith("log") else t / total for t in terms]
        return mpmath.fsum(mpmath.mpf(float(g)) * p for g, p in zip(weights, share, strict=True))

    got = backward(name, grad, x, y, **options)
    assert (np.delete(got, taken) == 0).all()
    with mpmath.workdps(50):
        point = [mpmath.mpf(float(v)) for v in x[taken]]
        step = mpmath.mpf(10) ** -20
        for i, k in enumerate(taken):
            up, down = list(point), list(point)
            up[i] += step
            down[i] -= step
            want = (scalar(up) - scalar(down)) / (2 * step)
            assert abs(got[k] - want) <= 1e-14, k


def with_torch(name, x, grad, axis, temperature, where):
    torch = pytest.importorskip("torch")
    t = torch.tensor(x, requires_grad=True)
    z = torch.where(torch.tensor(where), t / temperature, -torch.inf)
    s = torch.where(z < 0, 1 / (1 - z.clamp(max=0)), z.clamp(min=0) + 1)
    total = s.sum(axis, keepdim=True)
    result = {
        "softmax": lambda: torch.softmax(z, axis),
        "log_softmax": lambda: torch.log_softmax(z, axis),
        "logsumexp": lambda: torch.logsumexp(z, axis),
        "stablemax": lambda: s / total,
        "log_stablemax": lambda: torch.log(torch.where(z > -torch.inf, s, 1) / total),
    }[name]()
    result.backward(torch.tensor(grad))
    return t.grad.numpy()


def with_jax(name, x, grad, axis, temperature, where):
    jax = pytest.importorskip("jax")
    jnp = jax.numpy

    def function(t):
        z = jnp.where(where, t / temperature, -jnp.inf)
        s = jnp.where(z < 0, 1 / (1 - jnp.minimum(z, 0)), jnp.maximum(z, 0) + 1)
        total = s.sum(axis, keepdims=True)
        return {
            "softmax": lambda: jax.nn.softmax(z, axis),
            "log_softmax": lambda: jax.nn.log_softmax(z, axis),
            "logsumexp": lambda: jax.nn.logsumexp(z, axis),
            "stablemax": lambda: s / total,
            "log_stablemax": lambda: jnp.log(jnp.where(z > -jnp.inf, s, 1) / total),
        }[name]()

    with jax.enable_x64(True):
        _, vjp = jax.vjp(function, jnp.asarray(x))
        return np.asarray(vjp(jnp.asarray(grad))[0])


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("autograd", [with_torch, with_jax])
def test_autograd(autograd, name, masks):
    """In float64; where something is masked it gets a gradient of 0 from above."""
    x, rng = sample((5, 33, 4), np.float64, spread=2)
    x[0, 0] = 1
    where = rng.random(x.shape) < 0.7 if masks else np.ones(x.shape, bool)
    options = {"temperature": 0.8, "where": where}
    y = forward(name, x, 1, **options)
    grad = np.asarray(rng.standard_normal(y.shape))
    if name != "logsumexp":
        grad[~where] = 0
    want = autograd(name, x, grad, 1, 0.8, where)
    got = backward(name, grad, x, y, 1, **options)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
    assert (got[~where] == 0).all()


def test_gap_of_17(isa):
    """The label's gradient where float32's 1 - p is 0."""
    for gap in (17, 40, 80):
        for temperature in (1, 0.5):
            x = np.array([0.0, gap * temperature, -5.0], np.float32)
            log_y = sml.log_softmax(x, temperature=temperature)
            grad = np.array([0, -1, 0], np.float32)
            got = sml.log_softmax_backward(grad, log_y, temperature=temperature)
            exact = np.expm1(np.longdouble(log_y[1])) / temperature
            assert exact < 0
            assert ulp_error(got[1], exact, np.float32) <= 2


@pytest.mark.parametrize("temperature", [0.24, 0.01, 1e-5, 1e-60])
def test_log_softmax_of_tiny_probabilities(isa, temperature):
    """Whose products with a sum are subnormal, and with the temperature are not."""
    rng = np.random.default_rng(7)
    for incoming in (1.0, 2.0**-30, 1e100):
        y = np.concatenate([np.zeros((8, 1)), rng.uniform(-744, -690, (8, 20))], axis=1)
        grad = np.zeros_like(y)
        grad[:, 0] = incoming * rng.standard_normal(8)
        grad[4:, 1:] = 1e-310 * rng.standard_normal((4, 20))
        for place in (np.ascontiguousarray, np.asfortranarray):
            grad, y = place(grad), place(y)
            got = sml.log_softmax_backward(grad, y, temperature=temperature)
            assert_close(got, "log_softmax", grad, y, y, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_logsumexp_far_below_its_elements(isa, dtype):
    """As a result that was rounded to a half may be: by 64 of 20,000."""
    x = np.array([[60.0, 20, 5, -40, 0, -np.inf], [39.5, 40.5, 46, 47, 80, 85]]).astype(dtype)
    y = np.array([5.0, 0]).astype(dtype)
    for size in (1.0, -0.5, 2.0**-14, 0.0):
        grad = np.full(2, size).astype(dtype)
        got = sml.logsumexp_backward(grad, x, y)
        with np.errstate(over="ignore"):
            want = (grad[:, None] * np.exp((x - y[:, None]).astype(np.longdouble))).astype(dtype)
        finite = np.isfinite(want)
        assert (got[~finite] == want[~finite]).all()
        assert ulp_error(got[finite], want[finite].astype(np.longdouble), dtype).max() <= 1


def test_logsumexp_far_below_its_elements_in_float64(isa):
    x = np.array([[599.0, 601, 660, 668, 700, 720, 1000, 1400, 1499, 1600]])
    for incoming in (1e-200, -1e-300, 5e-324, 1.0, 0.0):
        for temperature in (1.0, 0.5):
            got = sml.logsumexp_backward(
                np.array([incoming]), x * temperature, np.zeros(1), temperature=temperature
            )
            want = [
                mpmath.mpf(incoming) * mpmath.exp(mpmath.mpf(z)) / temperature
                for z in x[0].tolist()
            ]
            for value, exact in zip(got[0].tolist(), want, strict=True):
                if abs(exact) > 1.7e308:
                    assert value == np.copysign(np.inf, incoming)
                else:
                    assert abs(value - exact) <= 8 * np.spacing(abs(float(exact)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "stablemax", "log_stablemax"])
def test_rows_side_by_side_of_any_width(isa, name, dtype):
    """Whole vectors of rows, what is left of a run, in place, by tasks: as rows by themselves."""
    for n in (1, 2, 3, 4, 7, 8, 9, 16, 17, 33):
        for width in (1, 7, 15, 16, 17, 49, 520):
            x, rng = sample((2, n, width), dtype)
            grad = rng.standard_normal(x.shape).astype(dtype)
            y = forward(name, x, axis=1)
            want = np.moveaxis(
                backward(name, *(np.moveaxis(a, 1, -1).copy() for a in (grad, x, y))), -1, 1
            )
            np.testing.assert_array_equal(backward(name, grad, x, y, axis=1), want)
            for place in (grad, y):
                given = [a.copy() for a in (grad, x, y)]
                out = given[0] if place is grad else given[2]
                np.testing.assert_array_equal(backward(name, *given, axis=1, out=out), want)
    with sml.threads(2):
        x, rng = sample((3, 10, 5003), dtype)
        grad, y = rng.standard_normal(x.shape).astype(dtype), forward(name, x, axis=1)
        got = backward(name, grad, x, y, axis=1)
    np.testing.assert_array_equal(backward(name, grad, x, y, axis=1), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "stablemax", "log_stablemax"])
def test_gradients_of_every_size(isa, name, dtype):
    """From the smallest to nearly the largest that comes in, and sums that cancel."""
    x, rng = sample(100, dtype)
    y = forward(name, x)
    top = 2.0 ** (10 if dtype == np.float16 else 120 if dtype.itemsize < 8 else 1000)
    least = np.finfo(np.float64).tiny if dtype.itemsize == 8 else 2.0**-149
    for size in (top, 1.0, 2.0**-20, 1 / top, least):
        for signs in (rng.standard_normal(100), np.ones(100), np.tile([1.0, -1.0], 50)):
            grad = np.array(signs * size).astype(dtype)
            want, scale = mp_gradient(name, grad, x, y)
            error = gradient_error(backward(name, grad, x, y), want, scale, dtype)
            assert error.max() <= gradient_bound(name, dtype), (size, float(error.max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_gradients_stay_in_their_row(isa, name, dtype):
    """An infinity or NaN that takes part: NaN but for exact zeros, in that row only."""
    x, rng = sample((3, 70), dtype)
    x[:, 5] = -np.inf
    y = forward(name, x)
    clean = rng.standard_normal(y.shape).astype(dtype)
    want = backward(name, clean, x, y)
    for bad in (np.nan, np.inf):
        grad = clean.copy()
        grad[(1,) if name == "logsumexp" else (1, 9)] = bad
        got = backward(name, grad, x, y)
        assert (got[:, 5] == 0).all()
        assert not np.isfinite(np.delete(got[1], 5).astype(float)).any()
        np.testing.assert_array_equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "stablemax", "log_stablemax"])
def test_many_short_rows(isa, name, dtype):
    """More rows than are transposed at once; out and grad may be wider than y."""
    for n in (1, 2, 3, 5, 8, 12, 13, 17, 33, 64):
        x, rng = sample((1100, n), dtype)
        if n > 1:
            x[::9, 0] = -np.inf
        y = forward(name, x)
        grad = rng.standard_normal(y.shape).astype(dtype)
        grad[7] = np.finfo(y.dtype).max if dtype.itemsize > 2 else 6e4
        if n > 1:
            grad[::9, 0] = np.inf
        want = backward(name, *(np.repeat(a, 2, -1)[:, ::2] for a in (grad, x, y)))
        np.testing.assert_array_equal(backward(name, grad, x, y), want)
        got = backward(name, *(np.asfortranarray(a) for a in (grad, x, y)))
        np.testing.assert_array_equal(got, want)
        if dtype.itemsize < 8:
            got = backward(name, grad.astype(np.float32), x, y)
            np.testing.assert_array_equal(got, want)
        out = grad.copy()
        arguments = (out, x, y) if "stable" in name else (out, y)
        getattr(sml, f"{name}_backward")(*arguments, out=out)
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "stablemax", "log_stablemax"])
def test_hidden_results_take_no_part(isa, name, dtype):
    """Whatever y is where `where` is False, in rows of any length and layout."""
    for n in (2, 40, 100, 1100):
        x, rng = sample((35, n), dtype)
        where = rng.random(x.shape) < 0.7
        y = forward(name, x, where=where)
        grad = rng.standard_normal(y.shape).astype(dtype)
        want = backward(name, grad, x, y, where=where)
        for hidden in (np.nan, np.inf, -np.inf):
            bad = np.where(where, y, hidden).astype(dtype)
            np.testing.assert_array_equal(backward(name, grad, x, bad, where=where), want)
            columns = [np.ascontiguousarray(a.T) for a in (grad, x, bad)]
            got = backward(name, *columns, axis=0, where=np.ascontiguousarray(where.T))
            np.testing.assert_array_equal(got.T, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_single_hidden_result_takes_no_part(isa, name, dtype):
    """Where a mask need not be looked at, as y is 0 there already, one element may not be."""
    for rows, n in ((1500, 1), (700, 3), (515, 33), (70, 600), (3, 40000)):
        x, rng = sample((rows, n), dtype)
        where = rng.random(x.shape) < 0.7
        along = np.broadcast_to(rng.random(n) < 0.5, x.shape)
        for mask, passed in ((where, where), (along, along[:1])):
            y = forward(name, x, where=mask)
            grad = rng.standard_normal(y.shape).astype(dtype)
            want = backward(name, grad, x, y, where=passed)
            assert (want[~mask].view(np.uint8) == 0).all()
            for bad in (np.nan, 0.5, -0.0):
                places = np.argwhere(~mask)
                for i in (0, -1, rng.integers(len(places))) if len(places) else ():
                    wrong = y.copy()
                    wrong[tuple(places[i])] = bad
                    got = backward(name, grad, x, wrong, where=passed)
                    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
                    operands = [np.ascontiguousarray(a.T) for a in (grad, x, wrong)]
                    got = backward(name, *operands, axis=0, where=np.ascontiguousarray(passed.T))
                    np.testing.assert_array_equal(got.T, want)


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


def laid_out(array, layout):
    """Return equal elements in another layout of memory."""
    if layout == "fortran":
        return np.array(array, order="F")
    if layout == "reversed":
        return array[::-1].copy()[::-1] if array.ndim else array.copy()
    if layout == "spread":
        wide = np.zeros((*array.shape, 2), array.dtype)
        wide[..., 0] = array
        return wide[..., 0]
    return array.copy()


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_call(data):
    """Shapes, axes, masks, dtypes, temperatures, layouts, ISAs, out; rubbish where it may be."""
    draw = data.draw
    name = draw(st.sampled_from(FUNCTIONS))
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    axes = draw(
        st.one_of(
            st.none(),
            st.integers(-len(shape), len(shape) - 1),
            st.sets(st.integers(0, len(shape) - 1), min_size=1).map(tuple),
        )
    )
    x, rng = sample(shape, dtype, draw(st.integers(0, 99)), draw(st.sampled_from([0.1, 3, 30])))
    x[rng.random(shape) < draw(st.sampled_from([0, 0.3]))] = -np.inf
    where = None
    if draw(st.booleans()):
        where = rng.random(tuple(n if rng.random() < 0.8 else 1 for n in shape)) < 0.8
        x[~np.broadcast_to(where, shape)] = np.nan
    every = tuple(range(len(shape))) if axes is None else np.atleast_1d(axes) % len(shape)
    per_row = rng.uniform(0.5, 2, [1 if d in every else n for d, n in enumerate(shape)])
    temperature = draw(st.sampled_from([1.0, 0.7, per_row]))
    options = {"temperature": temperature, "where": where}
    with sml.use_isa(draw(st.sampled_from(sml.available_isas()))):
        y = forward(name, x, axes, **options)
        grad = np.asarray(rng.standard_normal(np.shape(y)))
        grad = grad.astype(draw(st.sampled_from([dtype, *DTYPES])))
        if name != "logsumexp":
            grad[y == (-np.inf if name.startswith("log") else 0)] = draw(
                st.sampled_from([np.nan, np.inf, 1.0])
            )
        arrays = [
            laid_out(a, draw(st.sampled_from("C fortran reversed spread".split())))
            for a in (grad, x, np.asarray(y))
        ]
        out = draw(st.sampled_from([None, "new", 0, 1, 2]))
        if out == "new":
            out = laid_out(np.zeros(shape, dtype), draw(st.sampled_from(["C", "spread"])))
        elif out is not None:
            fits = arrays[out].shape == shape and arrays[out].dtype == dtype
            out = arrays[out] if fits else None
        got = backward(name, *arrays, axes, out=out, **options)
    assert out is None or got is out
    where = True if where is None else where
    # As the kernel does: one of a row is read as a double, others in the arithmetic's dtype.
    wide = dtype == np.float64 or name == "logsumexp"
    read = grad.astype(np.float64 if wide else np.float32)
    assert_close(got, name, read, x, y, axes, temperature=temperature, where=where)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_temperatures(isa, name, dtype):
    """Usual temperatures and others, one for all rows and one per row, in any layout."""
    rng = np.random.default_rng(8)
    ordinary = [0.25, 0.7, 1.0, 1.0001, 3.0, 1e5, 2.0**20]
    for n in (1, 2, 10, 16, 40, 100, 1100):
        for kind in ("ordinary", "small", "any", "one"):
            temperature = {
                "ordinary": rng.choice(ordinary[1:], (35, 1)),
                "small": rng.choice([0.01, 0.07, 0.25, 0.9], (35, 1)),
                "any": rng.choice([1e-3, *ordinary, 2.0**21, 1e9], (35, 1)),
                "one": rng.choice([0.01, *ordinary]),
            }[kind]
            # Also results that are hardly above 0, and gradients near the end of the range.
            x = (rng.normal(0, 20, (35, n)) * np.minimum(temperature, 100)).astype(dtype)
            y = forward(name, x, temperature=temperature)
            grad = rng.standard_normal(y.shape) / (1 if dtype.itemsize > 2 else 64)
            grad.flat[::7] *= np.exp2(rng.integers(-60, 60 if dtype.itemsize > 2 else 1))
            grad = grad.astype(dtype)
            got = backward(name, grad, x, y, temperature=temperature)
            assert_close(got, name, grad, x, y, temperature=temperature)
            columns = [np.ascontiguousarray(a.T) for a in (grad, x, y)]
            across = backward(name, *columns, axis=0, temperature=np.transpose(temperature))
            np.testing.assert_array_equal(across.T, got)
            for r in (0, 17, 34):
                alone = np.broadcast_to(temperature, (35, 1))[r, 0]
                one = backward(name, grad[r], x[r], y[r], temperature=alone)
                np.testing.assert_array_equal(one, got[r])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0, 4.0])
def test_small_probabilities_of_large_sums(isa, dtype, temperature):
    """What an exponential near the end of the range is multiplied by brings it back."""
    for size in (1e5, 1e9, 1e11, 1e16, 1e30) if dtype.itemsize > 2 else (3e3,):
        for least in (-80.0, -100.0, -129.0, -130.0, -150.0):
            log_y = np.array([[0, least, least / 2, -3]] * 20, dtype)
            grad = np.array([[size, 0, 1, -size / 3]] * 20, dtype)
            for rows, axis in ((20, 1), (1, 1), (20, 0)):
                g, y = (a[:rows] if axis else np.ascontiguousarray(a.T) for a in (grad, log_y))
                got = sml.log_softmax_backward(g, y, axis, temperature=temperature)
                assert_close(got, "log_softmax", g, y, y, axis, temperature=temperature)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "stablemax"])
@pytest.mark.parametrize("n", [1, 3, 8, 40, 530])
def test_past_the_caches_side_by_side(name, n):
    """Results that exceed the caches, from any place of a line on: the bits of the same rows."""
    rng = np.random.default_rng(8)
    beside = 3_600_000 // n + 5
    x = rng.standard_normal((1, n, beside), np.float32)
    grad = rng.standard_normal(x.shape, np.float32)
    grad[0, 0, 7] = np.nan
    y = getattr(sml, name)(x, axis=1)
    backward = getattr(sml, f"{name}_backward")
    given = (grad, x, y) if name == "stablemax" else (grad, y)
    along = [np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in given]
    wanted = np.moveaxis(backward(*along), -1, 1)
    for offset in (0, 5):
        out = np.empty(x.size + 64, np.float32)
        out = out[-out.ctypes.data % 64 // 4 + offset :][: x.size].reshape(x.shape)
        backward(*given, axis=1, out=out)
        assert np.array_equal(out, wanted, equal_nan=True), offset
