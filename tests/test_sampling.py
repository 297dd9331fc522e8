"""Sampling and top-k from Python: the distribution, reproducibility, errors."""

import numpy as np
import pytest
from scipy import stats

import softmaxlib


def filtered(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Return the probabilities that sample() should draw from, by sorting."""
    z = np.asarray(logits, np.float64) / temperature
    p = np.exp(z - z.max())
    order = np.argsort(-z, kind="stable")
    keep = order[: top_k or None]
    if top_p is not None:
        share = np.cumsum(p[keep]) / p[keep].sum()
        keep = keep[: int(np.searchsorted(share, top_p)) + 1]
    keep = keep[p[keep] >= (min_p or 0)]
    result = np.zeros_like(p)
    result[keep] = p[keep] / p[keep].sum()
    return result


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0, "top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.15},
    {"temperature": 1.5, "top_k": 10, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_distribution_by_chi_square(options, dtype):
    logits = (2 * np.random.default_rng(1).standard_normal(20)).astype(dtype)
    draws = 20_000
    rows = np.broadcast_to(logits, (draws, logits.size))
    drawn = softmaxlib.sample(rows, np.random.default_rng(2), **options)
    expected = filtered(logits, **options) * draws
    observed = np.bincount(drawn, minlength=logits.size)
    assert (observed[expected == 0] == 0).all()
    some = expected > 0
    if some.sum() > 1:
        # Draws are seeded: either always passes or never does.
        assert stats.chisquare(observed[some], expected[some]).pvalue > 1e-3


def test_reproducible_and_the_same_for_any_batch_isa_and_threads():
    logits = 3 * np.random.default_rng(1).standard_normal((300, 1000)).astype(np.float32)
    options = {"temperature": 0.9, "top_k": 100, "top_p": 0.95}
    want = softmaxlib.sample(logits, np.random.default_rng(5), **options)
    assert want.dtype == np.int64
    assert want.shape == (300,)
    rng = np.random.default_rng(5)  # one number per row, in order
    one_by_one = [softmaxlib.sample(row, rng, **options) for row in logits]
    np.testing.assert_array_equal(one_by_one, want)
    for isa in softmaxlib.available_isas():
        for threads in (1, 2, 5):
            with softmaxlib.use_isa(isa), softmaxlib.threads(threads):
                got = softmaxlib.sample(
                    np.asfortranarray(logits), np.random.default_rng(5), **options
                )
            np.testing.assert_array_equal(got, want)


def test_axes_dtypes_and_temperature_per_row():
    rng = np.random.default_rng
    logits = rng(0).integers(-3, 3, (4, 7, 5))
    for axis in (0, 1, 2, -1, -3):
        moved = np.moveaxis(logits, axis, -1).copy()
        np.testing.assert_array_equal(
            softmaxlib.sample(logits, rng(1), axis=axis), softmaxlib.sample(moved, rng(1))
        )
    temperature = np.array([0.1, 1, 2, 50]).reshape(4, 1, 1)
    got = softmaxlib.sample(logits, rng(1), temperature=temperature)
    u = rng(1).random((4, 7))
    for i in range(4):
        for j in range(7):
            ends = np.cumsum(filtered(logits[i, j], temperature[i, 0, 0]))
            assert got[i, j] == np.searchsorted(ends, u[i, j], side="right")


def test_greedy_takes_the_first_of_the_largest():
    logits = np.array([[1.0, 7, 3, 7], [-np.inf, -2, -np.inf, -2]])
    for seed in range(20):
        rng = np.random.default_rng(seed)
        np.testing.assert_array_equal(softmaxlib.sample(logits, rng, top_k=1), [1, 1])
    one = softmaxlib.sample(logits[0], rng, top_k=1)
    assert one == 1
    assert isinstance(one, np.int64)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": [1.0, 2.0, 3.0]}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1; got 0"),
        ({"top_k": 2.5}, TypeError, "top_k must be an integer"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": float("nan")}, ValueError, "top_p"),
        ({"top_p": "0.5"}, TypeError, "top_p must be a number"),
        ({"min_p": True}, TypeError, "min_p must be a number"),
        ({"min_p": 1.5}, ValueError, "min_p must be in"),
        ({"axis": None}, TypeError, "axis must be an integer"),
        ({"axis": 2}, np.exceptions.AxisError, "axis 2"),
        ({"rng": np.random.RandomState(0)}, TypeError, "rng must be a numpy.random.Generator"),
        ({"rng": 7}, TypeError, "rng"),
        ({"logits": np.ones((2, 3), complex)}, TypeError, "logits has dtype complex128"),
        ({"logits": 1.0}, ValueError, "at least one dimension"),
        ({"logits": [[1.0, 2.0], [np.nan, 1.0]]}, ValueError, r"row \(1,\)"),
        ({"logits": [np.inf, 1.0]}, ValueError, r"row \(\) along axis -1 has no distribution"),
        ({"logits": np.ones((2, 0))}, ValueError, "it is empty"),
    ],
)
def test_sample_errors(options, error, words):
    arguments = {"logits": np.ones((2, 3)), "rng": np.random.default_rng(0), **options}
    with pytest.raises(error, match=words):
        softmaxlib.sample(arguments.pop("logits"), arguments.pop("rng"), **arguments)


def test_no_rows():
    assert softmaxlib.sample(np.ones((0, 3)), np.random.default_rng(0)).shape == (0,)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_topk_has_the_bits_of_softmax(dtype):
    x = np.random.default_rng(3).integers(-20, 20, (6, 9, 40)).astype(dtype)
    for axis in (0, 1, 2):
        n = x.shape[axis]
        for k in (0, 1, 4, n):
            k = min(k, n)
            weights, indices = softmaxlib.topk_softmax(x, k, axis)
            order = np.argsort(-x.astype(np.float64), axis, kind="stable")
            np.testing.assert_array_equal(indices, np.take(order, np.arange(k), axis))
            want = np.take_along_axis(softmaxlib.softmax(x, axis), indices, axis)
            assert weights.dtype == want.dtype
            np.testing.assert_array_equal(weights, want)


def test_topk_renormalizes():
    x = np.random.default_rng(3).standard_normal((50, 64))
    weights, indices = softmaxlib.topk_softmax(x, 8, temperature=2.0, renormalize=True)
    want = softmaxlib.softmax(np.take_along_axis(x, indices, -1), temperature=2.0)
    np.testing.assert_allclose(weights, want, rtol=1e-15)
    assert (softmaxlib.topk_softmax(x, 1, renormalize=True)[0] == 1).all()


def test_topk_of_rows_without_a_distribution():
    x = np.array([[1, np.nan, 3], [np.inf, 1, 2], [-np.inf] * 3, [1.0, 2.0, 3.0]])
    weights, indices = softmaxlib.topk_softmax(x, 2)
    assert np.isnan(weights[:3]).all()
    assert (indices[:3] == [0, 1]).all()
    assert (indices[3] == [2, 1]).all()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"k": 4}, ValueError, "k must be from 0 to 3, the length of axis; got 4"),
        ({"k": -1}, ValueError, "k must be"),
        ({"k": 1.0}, TypeError, "k must be an integer"),
        ({"k": 1, "axis": (0, 1)}, TypeError, "axis must be an integer"),
        ({"k": 1, "axis": 7}, np.exceptions.AxisError, "axis 7"),
        ({"k": 1, "renormalize": 1}, TypeError, "renormalize must be a bool"),
        ({"k": 1, "temperature": -1}, ValueError, "temperature must be positive"),
    ],
)
def test_topk_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        softmaxlib.topk_softmax(np.ones((2, 3)), **arguments)


def test_arguments_beyond_the_range_keep_their_order(isa):
    """x / temperature is beyond float32, its order is not."""
    x = np.array([1, 3, 2, -1], np.float32)
    weights, places = softmaxlib.topk_softmax(x, 1, temperature=1e-39)
    assert (weights.tolist(), places.tolist()) == ([1.0], [1])
    rng = np.random.default_rng(0)
    for options in ({}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.9}):
        assert softmaxlib.sample(x, rng, temperature=1e-39, **options) == 1
