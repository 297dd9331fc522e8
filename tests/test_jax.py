"""softmaxlib.jax: values, derivatives and transformations, through XLA's FFI and as callbacks."""

import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest
from oracle import DTYPES

import softmaxlib as sml


def test_core_does_not_import_jax():
    loaded = (
        "import sys, softmaxlib, softmaxlib.cli; assert not {'jax', 'jaxlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", loaded], check=True)


def test_without_jax():
    """A module that is None in sys.modules cannot be imported."""
    code = "import sys; sys.modules['jax'] = None; import softmaxlib.jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: softmaxlib.jax needs jax: pip install 'softmaxlib[jax]'" in done.stderr


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTMAXLIB_JAX", request.param)
        for cache in (smj._jax_calls._backend.cache_clear, jax.clear_caches):
            cache()
        yield request.param


def logits(*shape, dtype=np.float64, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(dtype)


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

    for axis, options in itertools.product((-1, 0), ({}, {"where": where})):
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
