"""The orthogonal gradient: exact arithmetic, what is defined for special vectors, the same bits."""

import math

import ml_dtypes
import mpmath
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import softmaxlib as sml

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), BF16, np.dtype(np.float32), np.dtype(np.float64)]
LARGE = 256 * 16384 + 16384 + 7  # parts of more than one block


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def as_mpf(array):
    return [mpmath.mpf(float(v)) for v in np.ravel(array)]


def exact(grad, weights, rescale=True):
    """Return the projection, the scale of its error per element, and |d| / |grad|."""
    g, w = as_mpf(grad), as_mpf(weights)
    ww, gg = mpmath.fdot(w, w), mpmath.fdot(g, g)
    c = mpmath.fdot(w, g) / ww
    d = [a - c * b for a, b in zip(g, w, strict=True)]
    sine = mpmath.sqrt(mpmath.fdot(d, d) / gg)
    s = 1 / sine if rescale and sine else mpmath.mpf(1)
    length = mpmath.sqrt(gg / ww)
    return (
        [a * s for a in d],
        [(abs(a) + abs(b) * length) * s for a, b in zip(g, w, strict=True)],
        sine,
    )


def epsilon(*dtypes):
    return max(float(ml_dtypes.finfo(d).eps) for d in dtypes)


def ulp(scale, dtype):
    """Return the unit in the last place of a magnitude; mpmath.frexp knows no range."""
    info = ml_dtypes.finfo(dtype)
    exponent = max(mpmath.frexp(scale)[1] - 1, info.minexp) if scale else info.minexp
    return mpmath.ldexp(1, int(exponent) - info.nmant)


def assert_close(got, grad, weights, rescale=True):
    """Within the bound of the docstring, or 0 where the rest is shorter than epsilon."""
    dtype = grad.dtype
    assert got.dtype == dtype
    assert got.shape == grad.shape
    with mpmath.workdps(100):
        want, scale, sine = exact(grad, weights, rescale)
        eps = epsilon(dtype, weights.dtype)
        if sine < 0.99 * eps:
            assert (got == 0).all()
            return
        if sine < 1.01 * eps and (got == 0).all():
            return
        bound = 4 if dtype == np.float64 else 1
        for a, e, s in zip(as_mpf(got), want, scale, strict=True):
            if mpmath.isinf(a):
                assert abs(e) > float(ml_dtypes.finfo(dtype).max)
            else:
                assert abs(a - e) <= bound * ulp(s, dtype), (float(abs(a - e) / ulp(s, dtype)), a)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 3, 15, 16, 63, 65, 1000, 1025, 2100])
def test_formula(dtype, n, rescale):
    weights = normal(n, dtype, n)
    for along in (0, -1, 30, 1e3, 1e6, 1e12):
        grad = normal(n, np.float64, n + 1) + along * weights.astype(np.float64)
        if abs(grad).max() > float(ml_dtypes.finfo(dtype).max):
            continue
        grad = grad.astype(dtype)
        assert_close(
            sml.orthogonal_gradient(grad, weights, rescale=rescale), grad, weights, rescale
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orthogonal_and_of_the_same_length(dtype):
    for n, along in ((2, 1), (100, 0), (5000, 3), (70000, -40)):
        weights = normal(n, dtype, 1)
        grad = (normal(n, np.float64, 2) + along * weights.astype(np.float64)).astype(dtype)
        w, g, d = (
            np.asarray(a, np.longdouble)
            for a in (weights, grad, sml.orthogonal_gradient(grad, weights))
        )
        length = np.sqrt(w @ w) * np.sqrt(d @ d)
        assert abs(w @ d) <= 2 * epsilon(dtype) * length
        assert abs(np.sqrt(d @ d) - np.sqrt(g @ g)) <= 2 * epsilon(dtype) * np.sqrt(g @ g)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_vectors(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    info = ml_dtypes.finfo(dtype)
    # Bits of the range, so that elements of one vector may be far apart.
    room = (info.maxexp - info.minexp) // 4
    n = data.draw(st.integers(2, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))

    def draw():
        middle = data.draw(st.integers(info.minexp + room, info.maxexp - room - 3))
        spread = data.draw(st.sampled_from([0, 1, min(room, 60)]))
        values = np.ldexp(rng.standard_normal(n), middle + rng.integers(-spread, spread + 1, n))
        values = np.clip(values, float(info.min), float(info.max))
        return np.where(rng.random(n) < data.draw(st.sampled_from([0, 0.3])), 0, values)

    weights, grad = draw().astype(dtype), draw().astype(dtype)
    assume(weights.any() and grad.any())
    if data.draw(st.booleans()):
        with np.errstate(over="ignore"):
            mixed = (grad.astype(np.float64) + weights.astype(np.float64)).astype(dtype)
        if np.isfinite(mixed.astype(np.float64)).all() and mixed.any():
            grad = mixed
    rescale = data.draw(st.booleans())
    assert_close(sml.orthogonal_gradient(grad, weights, rescale=rescale), grad, weights, rescale)


@pytest.mark.parametrize("of_grad", [1e-310, 1e-200, 1.0, 1e200, 1e307])
@pytest.mark.parametrize("of_weights", [1e-310, 1e-200, 1.0, 1e200, 1e307])
def test_squares_beyond_the_range(of_grad, of_weights):
    rng = np.random.default_rng(3)
    free, along = rng.uniform(-1, 1, (2, 300))
    weights = of_weights * along
    for g in (of_grad * free, of_grad * (along + 1e-4 * free)):
        assert_close(sml.orthogonal_gradient(g, weights), g, weights)
        assert_close(sml.orthogonal_gradient(g, weights, rescale=False), g, weights, False)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_range_of_floats(dtype):
    rng = np.random.default_rng(4)
    for of_grad in (1e-40, 1.0, 1e38):
        for of_weights in (1e-40, 1.0, 1e38):
            grad = (of_grad * rng.uniform(-1, 1, 100)).astype(dtype)
            weights = (of_weights * rng.uniform(-1, 1, 100)).astype(dtype)
            assert_close(sml.orthogonal_gradient(grad, weights), grad, weights)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parallel_vectors_give_zeros(dtype, rescale):
    for n in (1, 2, 17, 300, 5000):
        weights = normal(n, dtype, n)
        for factor in (1.0, -1.0, 2.5, 1 / 3, -0.007):
            grad = (factor * weights.astype(np.float64)).astype(dtype)
            got = sml.orthogonal_gradient(grad, weights, rescale=rescale)
            np.testing.assert_array_equal(got, np.zeros(n, dtype))
            assert not np.signbit(got.astype(np.float64)).any()
    # Just longer than the noise: the rest counts.
    weights = np.ones(4, dtype)
    grad = np.array([1, 1, 1, 1 + 8 * epsilon(dtype)], dtype)
    assert sml.orthogonal_gradient(grad, weights, rescale=rescale).all()
    assert_close(sml.orthogonal_gradient(grad, weights, rescale=rescale), grad, weights, rescale)


def test_noise_is_that_of_the_coarser_input():
    weights = normal(300, np.float64)
    grad = (3 * weights).astype(np.float16)
    assert not sml.orthogonal_gradient(grad, weights).any()
    assert not sml.orthogonal_gradient(3 * weights, weights.astype(BF16)).any()
    assert sml.orthogonal_gradient(3 * weights, weights + 1e-6).all()


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros(dtype, rescale):
    grad = normal(50, dtype)
    zeros = np.zeros(50, dtype)
    np.testing.assert_array_equal(sml.orthogonal_gradient(grad, zeros, rescale=rescale), grad)
    np.testing.assert_array_equal(sml.orthogonal_gradient(zeros, grad, rescale=rescale), zeros)
    np.testing.assert_array_equal(sml.orthogonal_gradient(zeros, zeros, rescale=rescale), zeros)


@pytest.mark.parametrize("wide", [1e300, 1e-300])
def test_zero_weights_leave_any_gradient(wide):
    grad = np.array([wide, -1e-310, 5e-324, 1.0])
    np.testing.assert_array_equal(sml.orthogonal_gradient(grad, np.zeros(4)), grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(dtype, bad):
    for n in (1, 20, 3000):
        for where in (0, n // 2, n - 1):
            spoiled = normal(n, dtype)
            spoiled[where] = bad
            for other in (normal(n, dtype, 1), np.zeros(n, dtype), spoiled):
                for grad, weights in ((spoiled, other), (other, spoiled)):
                    got = sml.orthogonal_gradient(grad, weights)
                    assert np.isnan(got.astype(np.float64)).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2)])
def test_empty(shape):
    got = sml.orthogonal_gradient(np.ones(shape, np.float32), np.ones(shape))
    assert got.shape == shape
    assert got.dtype == np.float32
    assert sml.orthogonal_gradient([], []) == []


def test_scalars():
    assert sml.orthogonal_gradient(3.0, 2.0) == 0
    assert sml.orthogonal_gradient(np.float32(3), -0.0) == 3
    assert np.isscalar(sml.orthogonal_gradient(np.float32(3), np.float32(0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_everywhere(dtype):
    for n in (100, 5001, 300_000):
        weights, grad = normal(n, dtype, 5), normal(n, dtype, 6)
        for g in (grad, (1e-3 * grad.astype(np.float64) + weights.astype(float)).astype(dtype)):
            want = sml.orthogonal_gradient(g, weights).tobytes()
            for isa in sml.available_isas():
                for threads in (1, 2, 5):
                    with sml.use_isa(isa), sml.threads(threads):
                        assert sml.orthogonal_gradient(g, weights).tobytes() == want
                        assert (
                            sml.last_kernel()
                            == f"{isa}::orthogonal_gradient_"
                            + {
                                "float16": "f16",
                                "bfloat16": "bf16",
                                "float32": "f32",
                                "float64": "f64",
                            }[str(dtype)]
                        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_bits_of_many_blocks(dtype):
    weights, grad = normal(LARGE, dtype, 7), normal(LARGE, dtype, 8)
    want = sml.orthogonal_gradient(grad, weights)
    memory = np.empty(LARGE + 1, dtype)
    for isa in sml.available_isas():
        for threads in (1, 3):
            with sml.use_isa(isa), sml.threads(threads):
                memory[1:] = grad
                out = sml.orthogonal_gradient(memory[1:], weights, out=memory[1:])
                np.testing.assert_array_equal(out, want)
    w, g, d = (np.asarray(a, np.longdouble) for a in (weights, grad, want))
    d_exact = g - (w @ g) / (w @ w) * w
    d_exact *= np.sqrt((g @ g) / (d_exact @ d_exact))
    np.testing.assert_allclose(d, d_exact, rtol=2 * epsilon(dtype), atol=4 * epsilon(dtype))


def test_layouts():
    weights, grad = normal((30, 40, 50), np.float32, 1), normal((30, 40, 50), np.float32, 2)
    want = sml.orthogonal_gradient(grad, weights)
    # Alike in memory, whatever the order of axes: the vector is the same.
    for axes in ((2, 1, 0), (1, 0, 2), (0, 2, 1)):
        got = sml.orthogonal_gradient(grad.transpose(axes), weights.transpose(axes))
        np.testing.assert_array_equal(got, want.transpose(axes))
        assert got.strides == want.transpose(axes).strides
    # Not alike: C order.
    mixed = sml.orthogonal_gradient(np.asfortranarray(grad), weights)
    np.testing.assert_array_equal(mixed, want)
    # With gaps, backwards, of other strides each.
    wide = np.zeros((60, 40, 100), np.float32)
    wide[::2, :, ::-2] = weights
    np.testing.assert_array_equal(sml.orthogonal_gradient(grad, wide[::2, :, ::-2]), want)
    out = np.zeros((30, 80, 50), np.float32)[:, ::2]
    assert sml.orthogonal_gradient(grad, weights, out=out) is out
    np.testing.assert_array_equal(out, want)
    # One element for all.
    row = np.broadcast_to(weights[0, 0], grad.shape)
    np.testing.assert_array_equal(
        sml.orthogonal_gradient(grad, row), sml.orthogonal_gradient(grad, row.copy())
    )
    big_endian = weights.astype(">f4")
    np.testing.assert_array_equal(sml.orthogonal_gradient(grad, big_endian), want)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_strides_do_not_matter(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=0, max_size=4)))
    dtype = data.draw(st.sampled_from(DTYPES))

    def draw(seed):
        order = data.draw(st.permutations(range(len(shape))))
        steps = data.draw(st.tuples(*[st.sampled_from([1, 2, -1]) for _ in shape]))
        memory = np.zeros([shape[d] * abs(steps[d]) for d in order], dtype)
        view = memory.transpose(np.argsort(order))[(*(slice(None, None, s) for s in steps), ...)]
        view[...] = normal(shape, dtype, seed)
        return view

    grad, weights = draw(1), draw(2)
    got = sml.orthogonal_gradient(grad, weights)
    if grad.size > 1:
        assert_close(got, grad, weights)
    out = draw(3)
    sml.orthogonal_gradient(grad, weights, out=out)
    np.testing.assert_array_equal(out, got)
    sml.orthogonal_gradient(grad, weights, out=grad)
    np.testing.assert_array_equal(grad, got)


@pytest.mark.parametrize("of_weights", DTYPES, ids=str)
@pytest.mark.parametrize("of_grad", DTYPES, ids=str)
def test_mixed_dtypes(of_grad, of_weights):
    grad, weights = normal(700, of_grad, 1), normal(700, of_weights, 2)
    got = sml.orthogonal_gradient(grad, weights)
    assert_close(got, grad, weights)
    out = grad.copy()
    assert sml.orthogonal_gradient(out, weights, out=out) is out
    np.testing.assert_array_equal(out, got)


def test_out_may_be_any_argument_or_overlap():
    weights, grad = normal(1000, np.float32, 1), normal(1000, np.float32, 2)
    want = sml.orthogonal_gradient(grad, weights)
    for which in (0, 1):
        arrays = [grad.copy(), weights.copy()]
        assert sml.orthogonal_gradient(*arrays, out=arrays[which]) is arrays[which]
        np.testing.assert_array_equal(arrays[which], want)
        memory = np.empty(1001, np.float32)
        memory[:1000] = (grad, weights)[which]
        arrays = [grad, weights]
        arrays[which] = memory[:1000]
        sml.orthogonal_gradient(*arrays, out=memory[1:])
        np.testing.assert_array_equal(memory[1:], want)


def test_lists():
    shapes = [(3, 4), (5,), (), (2, 0), (300,)]
    dtypes = [np.float32, np.float64, np.float32, np.float16, np.float16]
    weights = [normal(s, d, 1) for s, d in zip(shapes, dtypes, strict=True)]
    weights[2] = np.array(1, np.float32)
    grads = [np.asarray(normal(s, d, 2)) for s, d in zip(shapes, dtypes, strict=True)]
    want = [sml.orthogonal_gradient(g, w) for g, w in zip(grads, weights, strict=True)]
    for kind in (list, tuple):
        got = sml.orthogonal_gradient(kind(grads), weights)
        assert isinstance(got, list)
        for a, b in zip(got, want, strict=True):
            assert isinstance(a, np.ndarray)
            np.testing.assert_array_equal(a, b)
    got = sml.orthogonal_gradient(grads, tuple(weights), out=grads)
    for a, b, c in zip(got, want, grads, strict=True):
        assert a is c
        np.testing.assert_array_equal(a, b)
    # Side by side in one buffer, and in one another's gaps.
    buffer = np.random.default_rng(1).standard_normal(40)
    parts = [buffer[:10], buffer[10:20], buffer[20::2], buffer[21::2]]
    others = [normal(10, np.float64, i) for i in range(4)]
    want = [sml.orthogonal_gradient(g.copy(), w) for g, w in zip(parts, others, strict=True)]
    sml.orthogonal_gradient(parts, others, out=parts)
    for a, b in zip(parts, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_update_of_the_paper():
    torch = pytest.importorskip("torch")
    w, g = torch.tensor(normal((20, 30), np.float32, 1)), torch.tensor(normal((20, 30), np.float32))
    d = g.flatten() - torch.dot(w.flatten(), g.flatten()) / (w.square().sum() + 1e-30) * w.flatten()
    d = d * (g.norm() / (d.norm() + 1e-30))
    got = sml.orthogonal_gradient(g, w)
    np.testing.assert_allclose(got, d.view(20, 30).numpy(), rtol=1e-4, atol=1e-6)


ONE, TWO, HALF = np.ones(3), np.ones((3, 2)), np.ones(3, np.float16)
LOCKED = np.ones(3)
LOCKED.flags.writeable = False


@pytest.mark.parametrize(
    ("grad", "weights", "options", "error", "words"),
    [
        (ONE, TWO, {}, ValueError, r"weights has shape \(3, 2\), grad has shape \(3,\)"),
        (np.ones(3, int), ONE, {}, TypeError, "grad has dtype int64; it must be float16"),
        (ONE, np.ones(3, bool), {}, TypeError, "weights has dtype bool; it must be float16"),
        (ONE, ONE, {"rescale": 1}, TypeError, "rescale must be a bool, got 1"),
        (ONE, ONE, {"out": TWO}, ValueError, r"out has shape \(3, 2\)"),
        (ONE, ONE, {"out": HALF}, TypeError, "out has dtype float16; the result has dtype float64"),
        (ONE, ONE, {"out": LOCKED}, ValueError, "out is read-only"),
        (ONE, ONE, {"out": 3}, TypeError, "out must be a numpy.ndarray, got int"),
        (ONE, ONE, {"out": np.broadcast_to(1.0, 3)}, ValueError, "out is read-only"),
        (ONE, [ONE], {}, TypeError, "weights is a list, grad is not"),
        (ONE, ONE, {"out": [ONE]}, TypeError, "out is a list, grad is not"),
        ([ONE], ONE, {}, TypeError, "so weights must be a list of arrays too, got ndarray"),
        ([ONE], [ONE], {"out": ONE.copy()}, TypeError, "so out must be a list of arrays too"),
        ([ONE], [ONE, ONE], {}, ValueError, "weights has 2 arrays, grad has 1"),
        ([ONE], [ONE], {"out": []}, ValueError, "out has 0 arrays, grad has 1"),
        ([1.0, 2.0], [1.0, 2.0], {}, TypeError, r"grad\[0\] must be an array, got float"),
        ([ONE], [[1.0, 2.0, 3.0]], {}, TypeError, r"weights\[0\] must be an array, got list"),
        ([ONE, ONE], [ONE, TWO], {}, ValueError, r"weights\[1\] has shape .*, grad\[1\] has"),
        ([HALF, ONE], [HALF, ONE > 0], {}, TypeError, r"weights\[1\] has dtype bool"),
        ([ONE], [ONE], {"out": [LOCKED]}, ValueError, r"out\[0\] is read-only"),
        ([ONE], [ONE], {"out": [None]}, TypeError, r"out\[0\] must be an array, got NoneType"),
    ],
)
def test_errors(grad, weights, options, error, words):
    with pytest.raises(error, match=words):
        sml.orthogonal_gradient(grad, weights, **options)


def test_out_of_a_list_that_overlaps():
    a, b, w = np.arange(1.0, 9), np.arange(2.0, 10), np.linspace(1, 3, 8)
    kept = a.copy()
    for out, words in (
        ([a, a], r"out\[0\] shares memory with (out|grad)\[1\]|out\[1\]"),
        ([b, np.empty(8)], r"out\[0\] shares memory with grad\[1\]"),
        ([np.empty(8), w], r"out\[1\] shares memory with weights\[0\]"),
    ):
        with pytest.raises(ValueError, match=words):
            sml.orthogonal_gradient([a, b], [w, w.copy()], out=out)
    np.testing.assert_array_equal(a, kept)
    # Nothing is written before everything is checked.
    with pytest.raises(ValueError, match=r"out\[1\] has shape"):
        sml.orthogonal_gradient([a, b], [w, w], out=[a, np.empty(3)])
    np.testing.assert_array_equal(a, kept)


def test_inputs_stay_as_they_are():
    weights, grad = normal(2000, np.float32, 1), normal(2000, np.float32, 2)
    for array in (weights, grad):
        array.flags.writeable = False
    copies = weights.copy(), grad.copy()
    assert math.isfinite(float(sml.orthogonal_gradient(grad, weights).sum()))
    np.testing.assert_array_equal((weights, grad), copies)
