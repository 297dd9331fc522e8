"""softmaxlib.jax: values, derivatives and transformations, through XLA's FFI and as callbacks."""

import functools
import itertools
import shutil

import numpy as np
import pytest
from oracle import DTYPES

import softmaxlib as sml

jax = pytest.importorskip("jax")
jax.config.update("jax_enable_x64", True)
jnp = jax.numpy
test_util = pytest.importorskip("jax.test_util")
smj = pytest.importorskip("softmaxlib.jax")

FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax")
of_functions = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.fixture(scope="module", autouse=True, params=["ffi", "callback"])
def mechanism(request):
    """Run every test of this module with both."""
    if request.param == "ffi" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    if request.param == "callback" and smj._jax_calls.buffer_callback is None:
        pytest.skip("jax < 0.6.1 has no callbacks that softmaxlib.jax can use")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTMAXLIB_JAX", request.param)
        for cache in (smj._jax_calls._backend.cache_clear, jax.clear_caches):
            cache()
        yield request.param


def logits(*shape, dtype=np.float64, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(dtype)


def without_64_bits():
    return jax.enable_x64(False) if hasattr(jax, "enable_x64") else jax.experimental.disable_x64()


def same_bits(y, z):
    y, z = np.asarray(y), np.asarray(z)
    assert (y.shape, y.dtype) == (z.shape, z.dtype)
    assert np.ascontiguousarray(y).tobytes() == np.ascontiguousarray(z).tobytes()


def near(y, z):
    np.testing.assert_allclose(np.asarray(y), np.asarray(z), rtol=1e-12, atol=1e-14)


def in_jax(function):
    """Return the definition in JAX's own operations."""

    def stable(x, **options):
        s = jnp.where(x < 0, 1 / (1 - jnp.minimum(x, 0)), x + 1)
        s = jnp.where(options.get("where", True), s, 0)
        return s / s.sum(options.get("axis", -1), keepdims=True)

    def log(p):
        return jnp.log(jnp.where(p > 0, p, 1))

    return {
        "softmax": jax.nn.softmax,
        "log_softmax": jax.nn.log_softmax,
        "logsumexp": lambda x, **options: jax.nn.logsumexp(x, **{"axis": -1} | options),
        "stablemax": stable,
        "log_stablemax": lambda x, **options: log(stable(x, **options)),
    }[function]


def test_backend(mechanism):
    assert smj.backend() == mechanism


@of_functions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_those_of_numpy(function, dtype):
    ours, reference = getattr(smj, function), getattr(sml, function)
    gradient = getattr(sml, f"{function}_backward")
    options = {"temperature": 0.7}
    for axis in (-1, 0, (0, 2), None, ()):
        x = logits(4, 5, 6, dtype=dtype)
        where = logits(5, 6, seed=1) > -2
        y = reference(x, axis, where=where, **options)
        grad = logits(*y.shape, dtype=dtype, seed=2)
        got, pull = jax.vjp(lambda x, axis=axis, where=where: ours(x, axis, where, **options), x)
        same_bits(got, y)
        arguments = [grad, x, y] if "stable" in function or function == "logsumexp" else [grad, y]
        same_bits(pull(grad)[0], gradient(*arguments, axis, where=where, **options))


@of_functions
def test_derivatives_are_those_of_jax(function):
    x, where = logits(4, 5), logits(5, seed=1) > -1

    def derivative(f, axis, **options):
        kept = options.get("where", True) if function != "logsumexp" else True
        return jax.jit(jax.jacrev(lambda x: jnp.where(kept, f(x, axis=axis, **options), 0)))(x)

    for axis, options in (-1, {"where": where}), (0, {}):
        near(
            derivative(getattr(smj, function), axis, **options),
            derivative(in_jax(function), axis, **options),
        )
    test_util.check_grads(getattr(smj, function), (x,), 1, modes=["rev"])


@of_functions
def test_vmap(function):
    """Over x, over the mask alone, over both; of derivatives too; nested; every axis."""
    ours, reference = getattr(smj, function), getattr(sml, function)
    x, where = logits(3, 4, 5), logits(3, 4, 5, seed=1) > -2
    for batch, axis in itertools.product(range(3), (-1, 0)):
        rows = [reference(row, axis) for row in np.moveaxis(x, batch, 0)]
        same_bits(jax.jit(jax.vmap(lambda row, a=axis: ours(row, a), batch))(x), np.stack(rows))
    of_mask = jax.vmap(lambda where: ours(x[0], where=where))
    same_bits(of_mask(where), np.stack([reference(x[0], where=w) for w in where]))
    of_both = jax.vmap(jax.vmap(lambda row, where: ours(row, where=where)))
    same_bits(of_both(x, where), reference(x, where=where))

    def total(row, where, weights):
        y = ours(row, where=where)
        return jnp.sum(jnp.where(where if y.ndim else True, y, 0) * weights)

    weights = logits(4, seed=2)
    gradient = jax.jit(jax.vmap(jax.grad(total), (None, 0, 0)))(x[0, 0], where[0], weights)
    near(
        gradient,
        np.stack([jax.grad(total)(x[0, 0], *of) for of in zip(where[0], weights, strict=True)]),
    )


@of_functions
def test_traced_temperature(function):
    ours, reference = getattr(smj, function), getattr(sml, function)
    x, temperatures = logits(4, 5), np.array([[0.5], [1.0], [2.0], [3.0]])
    compiled = jax.jit(lambda x, t: ours(x, temperature=t))
    for t in (temperatures, 0.3):
        same_bits(compiled(x, t), reference(x, temperature=t))
        test_util.check_grads(lambda x, t: ours(x, temperature=t), (x, t), 1, modes=["rev"])
    per_row = jax.vmap(lambda row, t: ours(row, temperature=t))
    same_bits(per_row(x, temperatures[:, 0]), reference(x, temperature=temperatures))
    masked = jax.grad(lambda t: jnp.exp(ours(jnp.array([1.0, -jnp.inf]), temperature=t)).sum())
    assert np.isfinite(masked(2.0))


@of_functions
def test_empty_and_scalar(function):
    ours, reference = getattr(smj, function), getattr(sml, function)
    for shape, axis in ((), None), ((0,), 0), ((0, 3), -1), ((3, 0), 1), ((4, 1), 0):
        x = np.ones(shape)
        same_bits(ours(x, axis), np.asarray(reference(x, axis)))
        assert jax.grad(lambda x, axis=axis: ours(x, axis).sum())(x).shape == shape


def test_keepdims():
    x = logits(3, 4, 5)
    for axis in (1, (0, 2), None):
        same_bits(smj.logsumexp(x, axis, keepdims=True), sml.logsumexp(x, axis, keepdims=True))


def test_many_rows_and_threads():
    """Large enough for more than one thread; several calls at once."""
    x = logits(300, 3000, dtype=np.float32)
    several = jax.jit(lambda x: [smj.softmax(x * i) for i in range(1, 4)])
    for i, y in enumerate(several(x), 1):
        same_bits(y, sml.softmax(x * np.float32(i)))
    with sml.threads(1):
        same_bits(smj.softmax(x), sml.softmax(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stablemax_where_x_is_1(dtype):
    """Autograd through the published formula gives NaN there in float32 and bfloat16."""
    x = np.array([1.0, -2.0, 1.0, 3.0], dtype)
    gradient = jax.jit(jax.grad(lambda x: smj.log_stablemax(x)[0].astype(float)))(x)
    exact = np.array([1.0, -2.0, 1.0, 3.0])
    p = sml.stablemax(exact)
    expected = ((np.arange(4) == 0) - p) / (1 + np.abs(exact))
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64), expected, rtol=4 * float(jnp.finfo(dtype).eps)
    )


@of_functions
def test_second_derivatives(function):
    ours, theirs = getattr(smj, function), in_jax(function)
    x, where = logits(2, 5), np.array([True, True, False, True, True])
    weights = logits(2, 5, seed=1)

    def total(f, x):
        y = f(x, where=where)
        return jnp.sum(jnp.where(where, y * weights, 0) if y.ndim == 2 else y**2)

    hessians = [
        jax.jit(jax.jacrev(jax.grad(lambda x, f=f: total(f, x))))(x) for f in (ours, theirs)
    ]
    near(*hessians)

    def of_temperature(x, t):
        return jnp.exp(ours(jnp.append(x, -jnp.inf), temperature=t)).sum()

    test_util.check_grads(of_temperature, (x[0], 1.3), 2, modes=["rev"])


# ---- Cross-entropy

LOSSES = (
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "weight": np.arange(5) / 2},
    {"weight": np.arange(5) / 2, "label_smoothing": 0.3, "ignore_index": 3, "temperature": 0.7},
    {"activation": "stablemax"},
    {"activation": "stablemax", "reduction": "none", "label_smoothing": 1.0, "temperature": 2},
    {"where": np.array([True, True, True, False, True]), "ignore_index": 3},
)
REDUCTIONS = ("mean", "sum", "none")
of_losses = pytest.mark.parametrize("options", LOSSES, ids=lambda options: "-".join(options))


def targets(*shape):
    return np.random.default_rng(5).integers(0, 5, shape)


def shares(*shape):
    weights = np.random.default_rng(6).random(shape)
    return weights / weights.sum(-1, keepdims=True)


def cross_entropy_in_jax(
    x,
    target,
    activation="softmax",
    label_smoothing=0.0,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    temperature=1.0,
    where=True,
):
    log_p = in_jax(f"log_{activation}")(x / temperature, where=jnp.broadcast_to(where, x.shape))
    log_p = jnp.where(where, log_p, 0)
    weight = jnp.ones(x.shape[-1]) if weight is None else weight
    rows = jnp.ones(x.shape[:-1])
    counts = rows
    if jnp.issubdtype(target.dtype, jnp.integer):
        rows = jnp.where(target == ignore_index, 0, 1)
        counts = rows * weight[target]
        target = jax.nn.one_hot(target, x.shape[-1], dtype=x.dtype)
    spread = jnp.where(where, 1, 0) / jnp.sum(jnp.broadcast_to(where, x.shape[-1:]))
    q = weight * ((1 - label_smoothing) * target + label_smoothing * spread)
    losses = -jnp.sum(q * log_p, -1) * rows
    if reduction == "none":
        return losses
    return losses.sum() / (counts.sum() if reduction == "mean" else 1)


@of_losses
@pytest.mark.parametrize("target", [targets(3, 4), shares(3, 4, 5)], ids=["classes", "shares"])
def test_cross_entropy(options, target):
    x, weights = logits(3, 4, 5), logits(3, 4, seed=1)
    if target.ndim == 3 and "where" in options:
        target = np.where(options["where"], target, 0)

    def result(f):
        def total(x):
            y = f(x, target, **options)
            return (y * weights).sum() if y.ndim else y

        return jax.jit(jax.value_and_grad(total))(x)

    for ours, theirs in zip(result(smj.cross_entropy), result(cross_entropy_in_jax), strict=True):
        near(ours, theirs)


@pytest.mark.parametrize("activation", ["softmax", "stablemax"])
def test_cross_entropy_is_differentiable_in_all_that_it_says(activation):
    options = {"activation": activation, "weight": np.arange(5) / 2, "label_smoothing": 0.3}
    temperatures = jnp.array([[0.5], [1.0], [2.0]])

    def loss(x, t, q):
        return smj.cross_entropy(
            x.T, q.T, axis=0, temperature=jnp.transpose(t), reduction="sum", **options
        )

    test_util.check_grads(loss, (logits(3, 5), temperatures, shares(3, 5)), 1, modes=["rev"])
    near(
        loss(logits(3, 5), 0.5, shares(3, 5)),
        cross_entropy_in_jax(
            logits(3, 5), shares(3, 5), temperature=0.5, reduction="sum", **options
        ),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@of_losses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_has_the_bits_of_numpy(options, dtype, reduction):
    x, target = logits(7, 5, dtype=dtype), targets(7)
    options = options | {"reduction": reduction}
    y, pull = jax.vjp(lambda x: smj.cross_entropy(x, target, **options), x)
    loss, gradient = sml.cross_entropy(x, target, **options, return_grad=True)
    same_bits(y, loss)
    same_bits(pull(jnp.ones_like(y))[0], gradient)
    for other in (np.int8, np.int32, np.uint16, np.uint64):
        same_bits(smj.cross_entropy(x, target.astype(other), **options), loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@of_losses
def test_cross_entropy_under_vmap(options, reduction):
    """Each element is reduced by itself, whichever operands are mapped, with classes and shares."""
    options = options | {"reduction": reduction}
    x, target = logits(3, 4, 5), targets(3, 4)

    def loss(x, target):
        return smj.cross_entropy(x, target, **options)

    def expected(x, target):
        return sml.cross_entropy(x, target, **options, return_grad=True)

    losses, gradients = zip(*map(expected, x, target), strict=True)
    same_bits(jax.jit(jax.vmap(loss))(x, target), np.stack(losses))
    nested = jax.vmap(jax.vmap(loss, (None, 0)), (0, None))(x, target[:2])
    same_bits(nested, np.stack([[expected(row, t)[0] for t in target[:2]] for row in x]))
    gradient = jax.vmap(jax.grad(lambda x, target: loss(x, target).sum()), (None, 0))
    same_bits(gradient(x[0], target), np.stack([expected(x[0], t)[1] for t in target]))
    if "where" not in options:
        q = shares(3, 4, 5)
        losses, gradients = zip(*map(expected, x, q), strict=True)
        got = jax.vmap(jax.value_and_grad(lambda x, q: loss(x, q).sum()))(x, q)
        same_bits(got[1], np.stack(gradients))
        same_bits(jax.vmap(loss)(x, q), np.stack(losses))


def test_cross_entropy_under_vmap_of_its_options():
    """A mask and a temperature for each element, and one element whose labels are all ignored."""
    x, target = logits(4, 5), targets(3, 4)
    target[1] = -100
    where, t = targets(3, 5) > 0, np.array([0.5, 1.0, 2.0])

    def loss(target, where, t):
        return smj.cross_entropy(x, target, where=where, temperature=t)

    rows = [sml.cross_entropy(x, target[i], where=where[i], temperature=t[i]) for i in range(3)]
    got = jax.vmap(loss)(target, where, t)
    assert np.isnan(got[1])
    same_bits(got, np.stack(rows))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_keeps_subnormal_numbers(reduction):
    """XLA takes them for 0 around the call: in a sum of rows, or a product with the cotangent."""
    x, target = np.array([[100, 0]], np.float32), np.array([0])
    loss, gradient = sml.cross_entropy(x, target, reduction=reduction, return_grad=True)
    assert 0 < loss < np.finfo(np.float32).tiny
    for transform in (jax.jit, lambda f: f):
        f = transform(lambda x: smj.cross_entropy(x, target, reduction=reduction))
        y, pull = jax.vjp(f, x)
        same_bits(y, loss)
        for factor in (1, 2, 0.5):
            expected = (gradient.astype(np.float64) * factor).astype(np.float32)
            same_bits(pull(jnp.full_like(y, factor))[0], expected)
            assert expected.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_of_no_rows(reduction):
    for target in np.zeros(0, int), np.zeros((0, 5)):
        x = np.zeros((0, 5))
        loss, gradient = sml.cross_entropy(x, target, reduction=reduction, return_grad=True)
        y, pull = jax.vjp(lambda x, q=target: smj.cross_entropy(x, q, reduction=reduction), x)
        same_bits(y, loss)
        same_bits(pull(jnp.ones_like(y))[0], gradient)


def test_ignore_index_and_the_type_of_the_target():
    """An ignore_index that this type cannot hold ignores nothing; no target is cut off to be it."""
    x, target = logits(3, 5), np.array([0, 4, 2])
    loss = sml.cross_entropy(x, target)
    for ignored in (2**31, 2**40, -(2**63), 2**63 - 1, 2**32 - 100):
        for dtype in (np.int32, np.int64, np.uint32):
            same_bits(smj.cross_entropy(x, target.astype(dtype), ignore_index=ignored), loss)
    ignored = 2**40
    target[0] = ignored
    same_bits(
        smj.cross_entropy(x, target, ignore_index=ignored),
        sml.cross_entropy(x, target, ignore_index=ignored),
    )
    with pytest.raises(
        ValueError, match="ignore_index must be within int64, got 9223372036854775808"
    ):
        smj.cross_entropy(x, target, ignore_index=2**63)
    for dtype, wrong in (np.uint32, 2**32 - 100), (np.uint64, 2**64 - 100):  # -100, cut off
        target = np.array([0, wrong, 2], dtype)
        with pytest.raises(jax.errors.JaxRuntimeError, match="target|beyond int64"):
            jax.block_until_ready(smj.cross_entropy(x, target))
    with without_64_bits():
        x = x.astype(np.float32)
        y = smj.cross_entropy(x, [0, 4, 2], ignore_index=ignored)
        same_bits(y, sml.cross_entropy(x, [0, 4, 2]))
        target = np.array([0, 2**32, 2])
        with pytest.raises(
            ValueError, match=r"target holds 4294967296, which is beyond int32, all"
        ):
            smj.cross_entropy(x, target)
        with pytest.raises(ValueError, match=r"indices holds 4294967296, which is beyond int32"):
            smj.take_log_softmax(x, target)


def test_second_derivatives_of_cross_entropy():
    """None of its gradient, and said so; of whatever else depends on loss and gradient, all."""
    x, target, direction = logits(3, 5), targets(3), logits(3, 5, seed=1)
    for activation in ("softmax", "stablemax"):
        loss = functools.partial(smj.cross_entropy, target=target, activation=activation)
        with pytest.raises(NotImplementedError, match=f"softmaxlib.jax.log_{activation}, which"):
            jax.grad(lambda x, f=loss: jnp.vdot(jax.grad(f)(x), direction))(x)
        with pytest.raises(NotImplementedError, match="cross_entropy has no second derivative"):
            jax.jacrev(jax.jit(jax.grad(loss)))(x)

        def alike(x, f=loss):
            """A step of gradient descent whose direction counts as constant."""
            value, gradient = jax.value_and_grad(f)(x)
            return value**2 + f(x - jax.lax.stop_gradient(gradient))

        def by_hand(x, f=loss):
            constant = x - jax.grad(f)(x)
            return 2 * f(x) * jax.grad(f)(x) + jax.grad(f)(constant)

        near(jax.jit(jax.grad(alike))(x), by_hand(x))
        of_factor = jax.grad(lambda c, f=loss: jnp.vdot(jax.grad(lambda x: c * f(x))(x), direction))
        near(of_factor(3.0), np.vdot(jax.grad(loss)(x), direction))


def test_cross_entropy_does_not_collapse():
    """At a gap of 17 float32's softmax of the label is 1, its logarithm 0."""
    x = jnp.array([17.0, 0.0], jnp.float32)
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: smj.cross_entropy(x, 0)))(x)
    exact = np.log1p(np.exp(-17.0))
    np.testing.assert_allclose(loss, exact, rtol=3e-7)
    np.testing.assert_allclose(gradient, [-exact, exact], rtol=3e-7)


def test_cross_entropy_of_ignored_rows():
    x, target = logits(4, 5), np.full(4, -100)
    loss, gradient = jax.value_and_grad(smj.cross_entropy)(x, target)
    assert np.isnan(loss)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    ("target", "options", "error", "words"),
    [
        (np.zeros(3, int), {}, ValueError, "target has dtype int64 and shape"),
        (np.zeros((2, 4)), {}, ValueError, "probabilities must have the shape"),
        (np.zeros(2, bool), {}, TypeError, "target has dtype bool"),
        (np.zeros(2, int), {"weight": np.ones(2)}, ValueError, "weight has shape"),
        (np.zeros(2, int), {"weight": -np.ones(3)}, ValueError, "weight must be finite"),
        (np.zeros(2, int), {"label_smoothing": 2}, ValueError, "label_smoothing must be in"),
        (np.zeros(2, int), {"reduction": "all"}, ValueError, "reduction must be"),
        (np.zeros(2, int), {"activation": "max"}, ValueError, "activation must be"),
        (np.zeros(2, int), {"axis": 2}, np.exceptions.AxisError, "axis 2 is out of bounds"),
        (np.array([0, 3]), {}, jax.errors.JaxRuntimeError, "target .*1.* is 3; it must be"),
    ],
)
def test_cross_entropy_errors(target, options, error, words):
    with pytest.raises(error, match=words):
        jax.block_until_ready(smj.cross_entropy(jnp.ones((2, 3)), target, **options))


def test_weights_are_not_mapped():
    loss = jax.vmap(
        lambda weight: smj.cross_entropy(jnp.ones((2, 3)), np.zeros(2, int), weight=weight)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmap cannot map it"):
        jax.block_until_ready(loss(jnp.ones((4, 3))))


# ---- Selected log-probabilities


@pytest.mark.parametrize("axis", [-1, 0])
def test_take_log_softmax(axis):
    x, where = logits(4, 5), np.arange(5) != 1
    where = where if axis else where[:4, None]
    n = x.shape[axis]
    per_row = np.random.default_rng(3).integers(-n, n, x.shape[:1] if axis else x.shape[1:])
    several = np.random.default_rng(4).integers(-n, n, (4, 3) if axis else (3, 5))
    for indices in per_row, several:
        y = smj.take_log_softmax(x, indices, axis, where, temperature=0.7)
        same_bits(y, sml.take_log_softmax(x, indices, axis, where=where, temperature=0.7))

        def total(f, x, t, indices=indices):
            y = jnp.where(where, f(x, axis=axis, where=where, temperature=t), 0)
            kept = jnp.expand_dims(indices, axis) if indices.ndim == 1 else indices
            return jnp.sum(jnp.take_along_axis(y, kept % n, axis) ** 2)

        def ours(x, t, indices=indices):
            y = smj.take_log_softmax(x, indices, axis, where, temperature=t)
            return jnp.sum(jnp.where(jnp.isfinite(y), y, 0) ** 2)

        of_all = functools.partial(total, smj.log_softmax)
        near(jax.jit(jax.grad(ours))(x, 0.7), jax.jit(jax.grad(of_all))(x, 0.7))
        near(jax.grad(ours, 1)(x, 0.7), jax.grad(of_all, 1)(x, 0.7))


def test_take_log_softmax_of_what_is_not_there():
    """The gradient is that of log_softmax: 0 there, and what comes in there is in no sum."""
    x = np.array([[-np.inf, 1.0, 0.0], [2.0, 1.0, 0.0]])
    where = np.array([[True, True, True], [False, True, True]])
    for options in {}, {"where": where}, {"temperature": 0.7, "where": where}:
        for indices in np.array([0, 0]), np.array([[0, 1], [1, 0]]), np.array([[0, 0], [2, 2]]):

            def ours(x, t, indices=indices, options=options):
                y = smj.take_log_softmax(x, indices, **{"temperature": t} | options)
                return jnp.sum(y * jnp.array(0.5))

            def theirs(x, t, indices=indices, options=options):
                y = smj.log_softmax(x, **{"temperature": t} | options)
                kept = indices[:, None] if indices.ndim == 1 else indices
                return jnp.sum(jnp.take_along_axis(y, kept, 1) * jnp.array(0.5))

            got, expected = (jax.grad(f, (0, 1))(x, 1.3) for f in (ours, theirs))
            near(got[0], expected[0])
            near(got[1], expected[1])
            assert np.isfinite(got[0]).all() and np.isfinite(got[1])
    alone = jax.grad(lambda a: smj.take_log_softmax(a, 0))(x[0])
    np.testing.assert_array_equal(alone, [0, 0, 0])
    masked = jax.grad(lambda a: smj.take_log_softmax(a, 0, where=where[1]))(x[1])
    np.testing.assert_array_equal(masked, [0, 0, 0])
    both = jax.grad(lambda a: smj.take_log_softmax(a, np.array([0, 1])).sum())(x[0])
    np.testing.assert_array_equal(
        both, sml.log_softmax_backward([7.0, 1.0, 0.0], sml.log_softmax(x[0]))
    )


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_take_log_softmax_with_indices_of_any_type(dtype):
    """Along an axis that is longer than the largest index of some."""
    x, last = logits(2, 300), 299 if np.iinfo(dtype).max >= 299 else np.iinfo(dtype).max
    indices = np.array([0, -1 if np.iinfo(dtype).min < 0 else last]).astype(dtype)
    same_bits(smj.take_log_softmax(x, indices), sml.take_log_softmax(x, indices))
    gradient = jax.grad(lambda x: smj.take_log_softmax(x, indices).sum())(x)
    np.testing.assert_array_equal(np.argmax(gradient, -1), indices.astype(int) % 300)


def test_take_log_softmax_under_vmap():
    x, indices = logits(3, 4, 5), targets(3, 4)
    expected = sml.take_log_softmax(x, indices)
    same_bits(jax.jit(jax.vmap(smj.take_log_softmax))(x, indices), expected)
    of_indices = jax.vmap(smj.take_log_softmax, (None, 0))(x[0], indices)
    same_bits(of_indices, np.stack([sml.take_log_softmax(x[0], i) for i in indices]))


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        (np.zeros(3, int), ValueError, "indices has shape"),
        (np.zeros((1, 1), int), ValueError, "indices has shape"),
        (np.zeros(2), TypeError, "indices has dtype float64"),
        (np.array([0, 3]), jax.errors.JaxRuntimeError, "ind"),
    ],
)
def test_take_log_softmax_errors(indices, error, words):
    with pytest.raises(error, match=words):
        jax.block_until_ready(smj.take_log_softmax(jnp.ones((2, 3)), indices))


# ---- Compiled for elsewhere


def test_export(mechanism):
    """JAX wants to be told of custom calls that it does not know; callbacks it refuses."""
    export, x = pytest.importorskip("jax.export"), logits(4, 5)
    functions = {
        "forward": smj.softmax,
        "losses_and_gradient": jax.grad(lambda x: smj.cross_entropy(x, jnp.zeros(4, int))),
        "take": lambda x: smj.take_log_softmax(x, jnp.zeros(4, int)),
    }
    for target, function in functions.items():
        names = [f"softmaxlib_jax_{name}" for name in (target, "scale")]
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in names]
        if mechanism == "callback":
            with pytest.raises(NotImplementedError):
                export.export(jax.jit(function), disabled_checks=checks)(x)
            continue
        with pytest.raises(ValueError, match=f"(?s)custom calls .*softmaxlib_jax_{target}"):
            export.export(jax.jit(function))(x)
        exported = export.export(jax.jit(function), disabled_checks=checks)(x)
        same_bits(exported.call(x), function(x))


# ---- Errors


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: smj.softmax(x, 2), np.exceptions.AxisError, "axis 2 is out of bounds"),
        (lambda x: smj.softmax(x, (0, 0)), ValueError, "repeats an axis"),
        (lambda x: smj.softmax(x.astype(int)), TypeError, "x has dtype int64; it must be float16"),
        (lambda x: smj.softmax(x, where=np.ones(4)), TypeError, "where has dtype float64"),
        (lambda x: smj.softmax(x, where=jnp.ones((2, 1, 3), bool)), ValueError, "where of shape"),
        (lambda x: smj.softmax(x, temperature=0), ValueError, "temperature must be positive"),
        (lambda x: smj.softmax(x, temperature=jnp.ones(3)), ValueError, "varies along axis"),
        (lambda x: smj.softmax(x, temperature=jnp.int32(1)), TypeError, "temperature has dtype"),
        (
            lambda x: smj.softmax(x, temperature=jnp.float32(-1)).block_until_ready(),
            jax.errors.JaxRuntimeError,
            "temperature must be positive",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call(jnp.ones((2, 3)))
