"""Rows along an axis that is not the last: the bits of the same rows where they are contiguous."""

import numpy as np
import oracle
import pytest
from test_short_rows import same

import softmaxlib as sml
from softmaxlib import _core

FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax")
# (rows before, elements, rows beside): short and long, whole vectors of rows and less, runs of few.
SHAPES = (
    (3, 2, 20),
    (9, 1, 33),
    (2, 64, 40),
    (5, 7, 3),
    (2, 65, 18),
    (2, 130, 83),
    (1, 1025, 35),
    (2, 3000, 5),
)


def elements(rng, shape, dtype):
    """Return x with rows that are not usual: NaN, infinite, far from 0, steep."""
    x = (4 * rng.standard_normal(shape)).astype(dtype)
    x[0, -1, 0] = np.nan
    x[0, 0, 1] = np.inf
    x[0, :, 2] = -np.inf
    x[-1, :, -1] *= np.dtype(dtype).type(250)
    x[-1, 0, 0] = -60
    return x


def options_of(rng, shape):
    before, n, beside = shape
    where = rng.random(shape) < 0.6
    where[0, :, 1] = False
    bias = rng.standard_normal(shape).astype(np.float32)
    return (
        {},
        {"temperature": 0.7},
        {"temperature": rng.random((before, 1, beside)) + 0.5},
        {"temperature": 1e-310},
        {"where": where},
        {"where": rng.random((1, n, 1)) < 0.8},
        {"bias": bias},
        {"bias": rng.standard_normal((1, n, 1))},
        {"bias": rng.standard_normal((before, 1, beside)).astype(np.float16), "where": where},
        {"bias": bias, "where": where, "temperature": 1.5},
        {"bias": bias, "where": where, "temperature": rng.random((before, 1, beside)) + 0.5},
    )


def moved(options, shape):
    """Return the options of the same rows along a last axis."""
    found = {}
    for key, value in options.items():
        if np.ndim(value):
            value = np.ascontiguousarray(np.moveaxis(np.broadcast_to(value, shape), 1, -1))
            if key == "temperature":
                value = value[..., :1]
        found[key] = value
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_any_function_and_option(isa, name, dtype):
    function = getattr(sml, name)
    rng = np.random.default_rng(3)
    for shape in SHAPES:
        x = elements(rng, shape, dtype)
        rows = np.ascontiguousarray(np.moveaxis(x, 1, -1))
        for options in options_of(rng, shape):
            wanted = function(rows, **moved(options, shape))
            y = function(x, axis=1, **options)
            if name != "logsumexp":
                wanted = np.moveaxis(wanted, -1, 1)
            assert same(y, wanted), (shape, list(options), sml.last_kernel())
            if name == "logsumexp":
                continue
            in_place = x.copy()
            function(in_place, axis=1, out=in_place, **options)
            assert same(in_place, wanted), (shape, list(options), sml.last_kernel())
            out = np.empty_like(rows)
            function(x, axis=1, out=np.moveaxis(out, -1, 1), **options)
            assert same(np.moveaxis(out, -1, 1), wanted), (shape, list(options))


@pytest.mark.parametrize("algorithm", ("three_pass_recompute", "three_pass_reload", "two_pass"))
def test_named_algorithms(isa, algorithm):
    rng = np.random.default_rng(4)
    for shape in SHAPES:
        x = elements(rng, shape, np.float32)
        for options in options_of(rng, shape):
            wanted = sml.softmax(x, axis=1, **options)
            assert same(sml.softmax(x, axis=1, algorithm=algorithm, **options), wanted)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("threads", (1, 3))
def test_losses_samples_and_top_k(isa, dtype, threads):
    rng = np.random.default_rng(5)
    with sml.threads(threads):
        for shape in ((2, 65, 18), (2, 130, 83), (1, 1025, 35), (2, 3000, 5), (1, 70, 2000)):
            x = elements(rng, shape, dtype)
            x[0, :, 2] = 1  # a sum there is
            rows = np.ascontiguousarray(np.moveaxis(x, 1, -1))
            n = shape[1]
            target = rng.integers(0, n, (shape[0], shape[2]))
            where = rng.random(shape) < 0.9
            for options in (
                {},
                {"label_smoothing": 0.1},
                {"activation": "stablemax"},
                {"where": where, "label_smoothing": 0.1, "temperature": 0.6},
            ):
                along = moved({"where": where}, shape) if "where" in options else {}
                loss, grad = sml.cross_entropy(
                    x, target, axis=1, return_grad=True, reduction="none", **options
                )
                wanted, wanted_grad = sml.cross_entropy(
                    rows, target, return_grad=True, reduction="none", **{**options, **along}
                )
                assert same(loss, wanted), (shape, list(options))
                assert same(np.moveaxis(grad, 1, -1), wanted_grad), (shape, list(options))
                assert same(
                    sml.cross_entropy(x, target, axis=1, reduction="none", **options), wanted
                )
            taken = sml.take_log_softmax(x, target[:, None], axis=1)
            wanted = sml.take_log_softmax(rows, target[..., None])
            assert same(taken[:, 0], wanted[..., 0])
            finite = np.where(np.isfinite(x.astype(np.float64)), x, 0).astype(dtype)
            contiguous = np.ascontiguousarray(np.moveaxis(finite, 1, -1))
            drawn = sml.sample(finite, np.random.default_rng(1), axis=1, top_p=0.9)
            assert np.array_equal(
                drawn, sml.sample(contiguous, np.random.default_rng(1), top_p=0.9)
            )
            weights, indices = sml.topk_softmax(finite, 3, axis=1)
            wanted, wanted_indices = sml.topk_softmax(contiguous, 3)
            assert same(np.moveaxis(weights, 1, -1), wanted)
            assert np.array_equal(np.moveaxis(indices, 1, -1), wanted_indices)


@pytest.mark.parametrize("n", [40, 64, 100, 200])
def test_biases_that_overlap(isa, n):
    """A bias whose blocks are windows of one array: where one block ends another goes on."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((5, n, 20)).astype(np.float32)
    window = rng.standard_normal(64 * 5 + n).astype(np.float32)
    bias = np.lib.stride_tricks.as_strided(window, (5, n, 1), (64 * 4, 4, 4))
    for name in FUNCTIONS:
        function = getattr(sml, name)
        wanted = function(x, axis=1, bias=np.broadcast_to(bias, x.shape).copy())
        assert same(function(x, axis=1, bias=bias), wanted), sml.last_kernel()


def computed(isa, name, x, store, threads=1, out=None, **options):
    """Compute along axis 1 with the stores that are asked for; returns the results."""
    if out is None:
        shape = (x.shape[0], x.shape[2]) if name == "logsumexp" else x.shape
        out = np.empty(x.size + 64, x.dtype)
        out = out[-out.ctypes.data % 64 // x.itemsize + 4 :][: np.prod(shape)].reshape(shape)
    code, bias, temperature = (
        _core.dtypes[x.dtype.name],
        options.get("bias"),
        options.get("temperature", 1.0),
    )
    scalar = np.ndim(temperature) == 0
    _core.run(
        _core.functions[name], x, out, code, code, (1,),
        temperature if scalar else 1.0, None if scalar else temperature,
        bias, 0 if bias is None else _core.dtypes[bias.dtype.name], options.get("where"),
        _core.algorithms["auto"], _core.isas[isa], _core.stores[store], threads,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", (np.float32, np.float64, np.float16), ids=str)
@pytest.mark.parametrize("store", ("plain", "streaming"))
def test_columns(isa, name, dtype, store):
    """Columns of more than a block, some of which raise their reference on the way."""
    if isa == "scalar":
        pytest.skip("the scalar leaf computes rows one after the other")
    rng = np.random.default_rng(6)
    for shape, offset in (((1, 16_500, 37), 0), ((2, 1_100, 150), 4), ((1, 530, 300), 3)):
        n = shape[1]
        x = rng.standard_normal(shape).astype(dtype)
        steps = np.linspace(-1, 1, n)
        x[0, :, 3] = 400 * steps  # upwards, downwards, all at once, at the end
        x[0, :, 4] = -400 * steps
        x[0, :, 5] = np.where(steps > 0.1, 300, -300)
        x[0, n // 2 :, 6] += 50
        x[0, -1, 7] = 80
        x[0, : n - 1, 8] = -np.inf
        x[0, n // 3, 20] = np.nan
        where = rng.random(shape) < 0.5
        where[0, :, 9] = False
        where[0, :, 10] = np.arange(n) == n - 2
        bias = rng.standard_normal(shape).astype(np.float32)
        temperature = rng.random((shape[0], 1, shape[2])) + 0.5
        room = np.empty(x.size + 64 + offset, dtype)
        room = room[-room.ctypes.data % 64 // x.itemsize + offset :][: x.size].reshape(shape)
        rows = np.ascontiguousarray(np.moveaxis(x, 1, -1))
        column = rng.standard_normal((1, n, 1)).astype(np.float32)
        for options in (
            {},
            {"where": where},
            {"bias": bias, "temperature": temperature},
            {
                "bias": np.broadcast_to(column, shape),
                "where": np.broadcast_to(where[:, :, :1], shape),
                "temperature": 3.0,
            },
        ):
            wanted = getattr(sml, name)(rows, **moved(options, shape))
            if name != "logsumexp":
                wanted = np.moveaxis(wanted, -1, 1)
            room[...] = x
            for threads in (1, 3):
                y = computed(isa, name, room, store, threads, **options)
                assert sml.last_kernel().startswith(f"{isa}::{name}_columns"), sml.last_kernel()
                assert same(y, wanted), (shape, list(options))
            if name != "logsumexp":
                computed(isa, name, room, store, out=room, **options)
                assert same(room, wanted), (shape, list(options), "in place")
