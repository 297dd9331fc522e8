"""Rows of up to a chunk, many at a time: any function, option, dtype and axis.

And the arithmetic of options where it is hard, in all functions.
"""

import mpmath
import numpy as np
import oracle
import pytest

import softmaxlib as sml

FUNCTIONS = {
    f.__name__: f
    for f in (sml.softmax, sml.log_softmax, sml.logsumexp, sml.stablemax, sml.log_stablemax)
}
LENGTHS = (1, 2, 3, 8, 10, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 511, 512, 513, 1000, 1024)


def same(a, b):
    """Tell whether two arrays have the same bits, where NaN is NaN."""
    numbers = ~np.isnan(a.astype(np.float64))
    return (
        a.shape == b.shape
        and np.array_equal(numbers, ~np.isnan(b.astype(np.float64)))
        and a[numbers].tobytes() == b[numbers].tobytes()
    )


def rows_of(rng, n, dtype):
    """Return rows, some of which have to be computed alone."""
    x = (5 * rng.standard_normal((37, n))).astype(dtype)
    x[3] = -np.inf
    x[5, 0] = np.inf
    x[6, n // 2] = np.nan
    x[7] *= np.dtype(dtype).type(200)
    x[8] = 0
    x[9] = np.sort(x[9].astype(np.float32)).astype(dtype)
    x[10, -1] = 80
    return x


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_they_have_the_bits_of_the_algorithms(isa, name, dtype):
    """With and without options, along the last axis and another, in place and not."""
    function = FUNCTIONS[name]
    rng = np.random.default_rng(len(name))
    for n in LENGTHS:
        x = rows_of(rng, n, dtype)
        bias = rng.standard_normal((37, n))
        bias[:, 0] = -np.inf
        where = rng.random((37, n)) < 0.7
        where[11] = where[12] = False
        where[12, 0] = True
        of_class = rng.standard_normal(n).astype(np.float32)
        for options in (
            {},
            {"temperature": 0.7},
            {"temperature": rng.random((37, 1)) + 0.5},
            {"where": where},
            {"bias": of_class},
            {"bias": bias},
            {"bias": bias.astype(dtype), "where": where, "temperature": 0.3},
        ):
            y = function(x, **options)
            wanted = function(x, algorithm="two_pass", **options)
            assert same(y, wanted), (n, list(options))
            across = {
                key: np.ascontiguousarray(np.atleast_2d(value).T) if np.ndim(value) else value
                for key, value in options.items()
            }
            z = function(np.ascontiguousarray(x.T), axis=0, **across)
            assert same(z, wanted.T if name != "logsumexp" else wanted), (n, list(options))
        if name != "logsumexp":
            y = x.copy()
            function(y, out=y)
            assert same(y, function(x, algorithm="two_pass")), n


def test_any_problem_has_the_bits_of_the_algorithms():
    """Shapes, layouts, axes and options that broadcast in every way."""
    rng = np.random.default_rng(1)
    for _ in range(4000):
        ndim = rng.integers(1, 4)
        x = (3 * rng.standard_normal(rng.integers(1, 9, ndim))).astype(np.float32)
        order = rng.permutation(ndim)
        x = x.transpose(order) if rng.random() < 0.5 else np.ascontiguousarray(x.transpose(order))
        axis = tuple(sorted(rng.permutation(ndim)[: rng.integers(1, ndim + 1)].tolist()))

        def broadcastable(shape=x.shape, constant=()):
            return tuple(
                1 if i in constant or rng.random() < 0.4 else size for i, size in enumerate(shape)
            )

        options = {}
        if rng.random() < 0.5:
            dtype = (np.float32, np.float64, np.float16)[rng.integers(3)]
            options["bias"] = rng.standard_normal(broadcastable()).astype(dtype)
        if rng.random() < 0.5:
            options["where"] = rng.random(broadcastable()) < 0.6
        if rng.random() < 0.5:
            options["temperature"] = np.exp(rng.standard_normal(broadcastable(constant=axis)))
        name = list(FUNCTIONS)[rng.integers(len(FUNCTIONS))]
        y = FUNCTIONS[name](x, axis=axis, **options)
        wanted = FUNCTIONS[name](x, axis=axis, algorithm="two_pass", **options)
        described = (name, x.shape, x.strides, axis, {k: v.shape for k, v in options.items()})
        assert same(np.asarray(y), np.asarray(wanted)), described


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "logsumexp"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_the_result_of_one_element_is_known(isa, name, dtype):
    """Whatever a finite argument is; many rows, few of which have to be looked at."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((2600, 1)) * np.geomspace(1e-3, 1e4, 2600)[:, None]).astype(dtype)
    options = {
        "temperature": 0.5 + rng.random((2600, 1)),
        "bias": rng.standard_normal((2600, 1)).astype(np.float32),
        "where": rng.random((2600, 1)) < 0.7,
    }
    seen, hidden = (0, -np.inf) if name.startswith("log") else (1, 0)
    for given in ({}, *({key: value} for key, value in options.items()), options):
        wanted = np.full(x.shape, seen)
        if "where" in given:
            wanted = np.where(given["where"], seen, hidden)
        got = FUNCTIONS[name](x, **given)
        np.testing.assert_array_equal(got, wanted.astype(dtype))
        np.testing.assert_array_equal(np.signbit(got), wanted < 0)
        np.testing.assert_array_equal(
            FUNCTIONS[name](
                x.T.copy(), axis=0, **{key: value.T.copy() for key, value in given.items()}
            ).T,
            got,
        )
        np.testing.assert_array_equal(FUNCTIONS[name](np.repeat(x, 2, 0)[::2], **given), got)
    x[2599], x[1030], x[5] = np.nan, np.inf, -np.inf
    odd = ~np.isfinite(x)
    assert np.isnan(FUNCTIONS[name](x.copy())[[1030, 2599]]).all()
    in_place = x.copy()
    FUNCTIONS[name](in_place, out=in_place)
    np.testing.assert_array_equal(in_place, FUNCTIONS[name](x, algorithm="two_pass"))
    np.testing.assert_array_equal(in_place[~odd], np.full(x.shape, seen)[~odd])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logsumexp_of_one_element_each_in_place(isa, dtype):
    """Also of rows that are computed by themselves, whose results lie where x was."""
    x = np.linspace(-3, 3, 37).astype(dtype)
    x[[1, 5, 9, 20]] = np.inf, -np.inf, np.nan, 1e30
    x = x[:, None]
    wanted = x.copy()
    assert same(sml.logsumexp(x, axis=1, keepdims=True, out=x), wanted)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_temperatures_over_several_axes(isa, dtype):
    """Rows whose elements do not follow each other, as many as a vector has or not."""
    rng = np.random.default_rng(7)
    for shape in ((4, 5, 4, 3), (2, 5, 4, 17), (3, 7, 5, 3)):
        x = (3 * rng.standard_normal(shape)).astype(dtype)
        for of in ((shape[1], 1, shape[3]), (1, shape[1], 1, 1), (1, 1, shape[3]), ()):
            temperature = np.exp(rng.standard_normal(of))
            for function in FUNCTIONS.values():
                y = function(x, axis=(0, 2), temperature=temperature)
                wanted = function(x, axis=(0, 2), temperature=temperature, algorithm="two_pass")
                assert same(y, wanted), (function.__name__, shape, of)


# Gradients and losses

BACKWARD = ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax")


def backward(name, grad, x, y, **options):
    """Return the gradient, whatever the function reads."""
    function = getattr(sml, f"{name}_backward")
    if name in ("softmax", "log_softmax"):
        return function(grad, y, **options)
    return function(grad, x, y, **options)


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_gradients_have_the_bits_of_each_row_alone(isa, name, dtype):
    """With and without options, along any axis, strided, in place, and longer than a chunk."""
    rng = np.random.default_rng(len(name))
    for n in (1, 2, 7, 16, 33, 64, 100, 513, 1000, 1025, 2600):
        x = (3 * rng.standard_normal((37, n))).astype(dtype)
        x[4, n // 2] = -np.inf
        y = getattr(sml, name)(x, axis=-1)
        grad = rng.standard_normal(y.shape).astype(dtype)
        grad[1] = 0  # a sum that is not trusted at once, and some that never are
        grad[2] = (grad[2] * 1e-30).astype(dtype)
        grad[3] = {"float16": 6e4, "float64": 1e308}.get(np.dtype(dtype).name, 3e38)
        if name != "logsumexp":
            grad[4, n // 2] = np.inf  # takes no part
            grad[5, 0] = np.nan
        where = rng.random((37, n)) < 0.8
        for options in (
            {},
            {"where": where},
            {"temperature": 0.7},
            {"temperature": rng.random((37, 1)) + 0.5},
        ):
            of_row = [
                {k: v[r] if np.ndim(v) else v for k, v in options.items()} for r in range(len(x))
            ]
            for each in of_row:
                if np.ndim(each.get("temperature", 0)):
                    each["temperature"] = float(each["temperature"][0])
            wanted = np.stack(
                [backward(name, grad[r], x[r], y[r], **of_row[r]) for r in range(len(x))]
            )
            described = (n, list(options))
            assert same(backward(name, grad, x, y, **options), wanted), described
            across = {
                k: np.ascontiguousarray(np.swapaxes(v, 0, 1)) if np.ndim(v) else v
                for k, v in options.items()
            }
            of_column = [np.ascontiguousarray(np.moveaxis(a, -1, 0)) for a in (grad, x, y)]
            if name == "logsumexp":
                of_column[0], of_column[2] = grad, y
            got = backward(name, *of_column, axis=0, **across)
            assert same(got, wanted.T), described
            apart = [np.repeat(a, 2, -1)[..., ::2] for a in (grad, x, y)]
            assert same(backward(name, *apart, **options), wanted), described
            if name != "logsumexp":
                out = grad.copy()
                backward(name, out, x, y, out=out, **options)
                assert same(out, wanted), described


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_losses_have_the_bits_of_the_rows_kernel(isa, dtype):
    """Which a temperature per row asks for."""
    rng = np.random.default_rng(5)
    for n in LENGTHS:
        x = rows_of(rng, n, dtype)
        target = rng.integers(0, n, 37)
        target[20] = -100
        target[10] = n - 1  # nearly certain
        x[21, target[21]] = -np.inf
        weight = rng.random(n)
        weight[0] = 0
        where = rng.random((37, n)) < 0.8
        for options in ({}, {"weight": weight}, {"where": where}, {"temperature": 0.7}):
            one_per_row = {
                **options,
                "temperature": np.full((37, 1), options.get("temperature", 1)),
            }
            for how in ({"reduction": "none"}, {"reduction": "mean"}):
                loss, grad = sml.cross_entropy(x, target, return_grad=True, **options, **how)
                wanted, wanted_grad = sml.cross_entropy(
                    x, target, return_grad=True, **one_per_row, **how
                )
                described = (n, list(options), how)
                assert same(np.asarray(loss), np.asarray(wanted)), described
                assert same(grad, wanted_grad), described
                alone = sml.cross_entropy(x, target, **options, **how)
                assert same(np.asarray(alone), np.asarray(wanted)), described
                if not options:
                    columns = np.ascontiguousarray(x.T)
                    loss, grad = sml.cross_entropy(columns, target, axis=0, return_grad=True, **how)
                    assert same(np.asarray(loss), np.asarray(wanted)), described
                    assert same(grad, wanted_grad.T), described


# Arguments that are hard


def exact(x, temperature, bias=None):
    """Return softmax by mpmath."""
    with mpmath.workprec(4000):
        bias = np.zeros(len(x)) if bias is None else bias
        z = [
            mpmath.mpf(float(a)) / mpmath.mpf(temperature) + mpmath.mpf(float(b))
            for a, b in zip(x, bias, strict=True)
        ]
        terms = [mpmath.exp(v - max(z)) for v in z]
        return np.array([float(t / sum(terms)) for t in terms])


def error(y, wanted):
    """Return the largest error in ULP of the result's dtype."""
    return np.max(np.abs(y - wanted) / np.spacing(wanted.astype(y.dtype)).astype(np.float64))


@pytest.mark.parametrize("algorithm", ["auto", "two_pass", "three_pass_recompute"])
def test_temperature_and_bias_that_cancel(isa, algorithm):
    """Large parts cancel in float64: up to 2^50 within the bound, beyond a distribution."""
    x = np.array([-1.618343910845241e17, -2.466819730406531e17])
    bias = np.array([2.3119198726360586e17, 3.5240281862950445e17])
    y = sml.softmax(x, bias=bias, temperature=0.7, algorithm=algorithm)
    assert (y >= 0).all()
    assert y.sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = 2.0 ** rng.uniform(10, 49)
        x = size * rng.uniform(0.5, 1, 9)
        bias = 5 * rng.standard_normal(9) - x / 0.7
        y = sml.softmax(x, bias=bias, temperature=0.7, algorithm=algorithm)
        assert error(y, exact(x, 0.7, bias)) <= 5, size


@pytest.mark.parametrize("common", [-1e12, -(2.0**40), 2.0**60, np.finfo(np.float32).min])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_large_common_bias_changes_nothing(isa, common, dtype):
    x = np.random.default_rng(3).standard_normal((5, 100)).astype(dtype)
    x[0, 17] = 0
    x[0] -= x[0].max()  # the largest argument has nothing beside the bias
    bias = np.full(100, common, dtype)
    y = sml.softmax(x, bias=bias)
    if dtype == "float64" and abs(common) > 2.0**50:
        np.testing.assert_allclose(y.sum(-1), 1)
    else:
        for row, result in zip(x, y, strict=True):
            assert error(result, exact(row, 1, bias)) <= 5
    assert same(y, sml.softmax(x, bias=bias, algorithm="two_pass"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-39, 1e300, 1.7e308])
def test_temperatures_at_the_ends_of_the_range(isa, dtype, temperature):
    """In softmax, log_softmax, logsumexp, losses, sampling and gradients."""
    x = np.array([[1, 2, 3], [-3, -2, -1], [2, 2, 1]], dtype)
    wanted = np.array([exact(row, temperature) for row in x])
    y = sml.softmax(x, temperature=temperature)
    np.testing.assert_allclose(y, wanted, rtol=1e-6)
    logs = sml.log_softmax(x, temperature=temperature)
    np.testing.assert_allclose(np.exp(logs.astype(np.float64)), wanted, rtol=1e-6)
    with np.errstate(over="ignore"):
        large = (x.max(-1).astype(np.longdouble) / np.longdouble(temperature)).astype(dtype)
    sums = sml.logsumexp(x, temperature=temperature)
    if temperature < 1:
        np.testing.assert_array_equal(sums, large)
    else:
        np.testing.assert_allclose(sums, np.log(3), rtol=1e-6)
    loss, gradient = sml.cross_entropy(
        x, np.array([2, 2, 0]), temperature=temperature, return_grad=True, reduction="none"
    )
    np.testing.assert_allclose(np.exp(-loss), wanted[[0, 1, 2], [2, 2, 0]], rtol=1e-6)
    assert not np.isnan(gradient).any()
    assert not np.isnan(sml.softmax_backward(np.ones_like(x), y, temperature=temperature)).any()
    if temperature < 1:
        assert sml.sample(x, np.random.default_rng(0), temperature=temperature)[:2].tolist() == [
            2,
            2,
        ]
        weights, places = sml.topk_softmax(x, 1, temperature=temperature)
        assert places.ravel().tolist() == [2, 2, 0]
        np.testing.assert_allclose(weights.ravel(), [1, 1, 0.5])


def test_a_temperature_as_small_as_its_logits(isa):
    y = sml.softmax(np.array([1e-310, 2e-310]), temperature=1e-310)
    assert error(y, exact([1e-310, 2e-310], 1e-310)) <= 5


@pytest.mark.parametrize(
    "name", ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax")
)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_rows_that_see_nothing(isa, name, dtype):
    """Among others, whatever they hide: what one row after the other gives."""
    function = getattr(sml, name)
    rng = np.random.default_rng(12)
    nothing = 0 if name in ("softmax", "stablemax") else -np.inf
    for n in (1, 2, 3, 5, 17, 33, 64):
        x = (3 * rng.standard_normal((5, 37, n))).astype(dtype)
        where = rng.random(x.shape) < 0.7 / n
        blind = ~where.any(axis=-1)
        assert blind.any() and not blind.all()
        x[blind] = rng.choice([np.nan, np.inf, -np.inf, 1], (blind.sum(), n)).astype(dtype)
        for options in ({}, {"temperature": 0.6}, {"bias": rng.standard_normal(n)}):
            wanted = function(x, where=where, algorithm="two_pass", **options)
            assert (wanted[blind] == nothing).all()
            y = function(x, where=where, **options)
            assert n > 17 or isa == "scalar" or "in_lanes" in str(sml.last_kernel())
            assert same(y, wanted), (n, list(options))
            if name == "logsumexp":
                continue
            across, mask = (np.ascontiguousarray(a.transpose(0, 2, 1)) for a in (x, where))
            if "bias" in options:
                options = {"bias": options["bias"][:, None]}
            y = function(across, axis=1, where=mask, **options)
            assert same(y.transpose(0, 2, 1), wanted), (n, list(options))
            function(across, axis=1, where=mask, out=across, **options)
            assert same(across.transpose(0, 2, 1), wanted), (n, list(options))
