"""Hypothesis over shapes, strides, axes, dtypes and options, against the oracle."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import DTYPES, FUNCTIONS, expected, mp_row, ulp_error, within_contract

import softmaxlib as sml

ALGORITHMS = ("auto", "three_pass_recompute", "three_pass_reload", "two_pass", "two_pass_reload")
FUNCTION = st.sampled_from(FUNCTIONS)
ISA = st.sampled_from(sml.available_isas())
DTYPE = st.sampled_from(DTYPES)

# The oracle is at its best up to 1e3 in float64; the other dtypes take all they can hold.
SPECIAL = (0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 1e-5, -1e-5)
LARGE = (3e38, -3e38, 6e4, -6e4, 1e6, -1e6, 1e30)


@st.composite
def values(draw, shape, dtype, *, special=SPECIAL + LARGE):
    """An array in C order: normal logits, mostly, among them what is special."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    scale = draw(st.sampled_from((0.1, 1.0, 5.0, 30.0, 100.0)), label="scale")
    x = np.asarray(rng.standard_normal(shape) * scale)
    if special and draw(st.booleans(), label="special values"):
        chosen = draw(
            st.lists(st.sampled_from(special), min_size=1, max_size=3), label="among them"
        )
        x = np.where(rng.random(shape) < 0.1, rng.choice(chosen, shape), x)
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(dtype, copy=False)


@st.composite
def strided(draw, array):
    """The same values behind other strides: transposed, negative, with steps, misaligned."""
    order = draw(st.permutations(range(array.ndim)), label="memory order")
    moved = array.transpose(order)
    steps = [draw(st.sampled_from((1, 1, 2, 3, -1, -2)), label="step") for _ in moved.shape]
    room = np.zeros([n * abs(s) for n, s in zip(moved.shape, steps, strict=True)], array.dtype)
    view = room[(..., *(slice(None, None, s) for s in steps))]
    view[...] = moved
    return view.transpose(np.argsort(order).astype(int))


SHAPE = st.one_of(
    st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple),
    st.tuples(st.integers(1, 4), st.integers(1, 150)),
    st.tuples(st.integers(1, 150), st.integers(1, 4)),
    st.tuples(st.integers(1, 2100)),
)


@st.composite
def axes(draw, ndim):
    if ndim == 0:
        return draw(st.sampled_from((None, -1, 0, ())))
    several = st.lists(st.integers(0, ndim - 1), unique=True).map(tuple)
    negative = several.map(lambda chosen: tuple(a - ndim for a in chosen))
    return draw(st.one_of(st.integers(-ndim, ndim - 1), st.none(), several, negative), label="axis")


@st.composite
def broadcastable(draw, shape):
    """A shape that broadcasts to shape."""
    kept = [n if draw(st.booleans()) else 1 for n in shape]
    return tuple(kept[draw(st.integers(0, len(kept))) :])


@st.composite
def calls(draw):
    function = draw(FUNCTION, label="function")
    dtype = draw(DTYPE, label="dtype")
    shape = draw(SHAPE, label="shape")
    axis = draw(axes(len(shape)))
    special = SPECIAL if dtype == np.float64 else SPECIAL + LARGE
    if len(shape) > 1 and draw(st.integers(0, 9), label="broadcast x") == 0:
        row = draw(values(shape[1:], dtype, special=special))
        x = np.broadcast_to(row, shape)
    else:
        x = draw(strided(draw(values(shape, dtype, special=special))))

    options = {}
    reduced = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    reduced = {a % max(len(shape), 1) for a in reduced}
    if draw(st.booleans(), label="temperature"):
        per_row = tuple(1 if a in reduced else n for a, n in enumerate(shape))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        temperature = rng.choice([0.25, 0.7, 1.0, 3.0, 10.0], draw(broadcastable(per_row)))
        options["temperature"] = temperature if draw(st.booleans()) else 0.7
    if draw(st.integers(0, 2), label="bias") == 0:
        options["bias"] = draw(values(draw(broadcastable(shape)), draw(DTYPE), special=special))
    if draw(st.integers(0, 2), label="where") == 0:
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        options["where"] = rng.random(draw(broadcastable(shape))) < draw(
            st.sampled_from((0.0, 0.3, 0.9))
        )
    if function == "logsumexp" and draw(st.booleans(), label="keepdims"):
        options["keepdims"] = True
    return function, x, axis, options


RELAXED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def leaves_float32(x, temperature=1.0, bias=0.0, **_):
    """Tell whether temperature and bias carry a finite argument out of the arithmetic's range."""
    with np.errstate(all="ignore"):
        z = np.abs(np.asarray(x, np.longdouble) / np.asarray(temperature, np.longdouble) + bias)
    return x.dtype != np.float64 and bool((np.isfinite(z) & (z > np.finfo(np.float32).max)).any())


def rounds_arguments(x, temperature=1.0, bias=None, **_):
    """Tell whether x / temperature and bias are too large for their sum to be kept."""
    if bias is None or (x.dtype != np.float64 and np.all(np.asarray(temperature) == 1)):
        return False
    with np.errstate(all="ignore"):
        parts = np.abs(np.asarray(x, np.longdouble) / np.asarray(temperature, np.longdouble))
        parts = parts + np.abs(np.asarray(bias, np.longdouble))
    limit = 2.0**50 if x.dtype == np.float64 else 2.0**75
    return bool((np.isfinite(parts) & (parts > limit)).any())


def check_call(call, isa, algorithm, threads):
    function, x, axis, options = call
    # Documented: there stablemax takes the argument as infinite.
    assume(not (function.endswith("stablemax") and leaves_float32(x, **options)))
    before = np.array(x, order="C")
    with sml.use_isa(isa), sml.threads(threads):
        y = getattr(sml, function)(x, axis, algorithm=algorithm, **options)
    exact = expected(function, x, axis, **options)
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    good = within_contract(function, y, exact, x.dtype)
    if rounds_arguments(x, **options) and function in ("softmax", "log_softmax"):
        # Still a distribution.
        p = np.exp(y.astype(np.float64)) if function == "log_softmax" else y.astype(np.float64)
        sums = p.sum(axis if axis is None else tuple(np.atleast_1d(axis)))
        good = (p >= 0) & (p <= 1.01) | np.isnan(p)
        ones = (np.abs(sums - 1) < 0.02) | np.isnan(sums) | (sums == 0)
        assert ones.all(), sums
    assert good.all(), (
        f"{(~good).sum()} of {good.size} wrong: {np.asarray(y)[~good][:3]} for "
        f"{exact[~good][:3]}, {ulp_error(y, exact, x.dtype)[~good][:3]} ULP"
    )
    bits = f"u{x.itemsize}"
    np.testing.assert_array_equal(np.array(x, order="C").view(bits), before.view(bits))


@given(
    call=calls(), isa=ISA, algorithm=st.sampled_from(ALGORITHMS), threads=st.sampled_from((1, 3))
)
@settings(max_examples=600, derandomize=True, **RELAXED)
def test_every_call_keeps_the_contract(call, isa, algorithm, threads):
    check_call(call, isa, algorithm, threads)


@pytest.mark.slow
@given(
    call=calls(), isa=ISA, algorithm=st.sampled_from(ALGORITHMS), threads=st.sampled_from((1, 3))
)
@settings(max_examples=30_000, **RELAXED)
def test_every_call_keeps_the_contract_at_length(call, isa, algorithm, threads):
    check_call(call, isa, algorithm, threads)


@given(call=calls(), isas=st.tuples(ISA, ISA), in_place=st.booleans(), data=st.data())
@settings(max_examples=300, derandomize=True, **RELAXED)
def test_neither_isa_nor_layout_nor_out_changes_the_bits(call, isas, in_place, data):
    function, x, axis, options = call
    with sml.use_isa(isas[0]):
        y = np.asarray(getattr(sml, function)(x, axis, **options))
    other = data.draw(strided(np.array(x)))
    out = other if in_place and function != "logsumexp" else np.zeros_like(y)
    with sml.use_isa(isas[1]):
        assert getattr(sml, function)(other, axis, out=out, **options) is out
    bits = f"u{y.itemsize}"
    np.testing.assert_array_equal(
        np.array(out, order="C").view(bits), np.array(y, order="C").view(bits)
    )


@given(
    function=FUNCTION,
    isa=ISA,
    row=st.integers(1, 40).flatmap(lambda n: values((n,), np.dtype(np.float64), special=())),
    temperature=st.sampled_from((1.0, 0.3, 7.0)),
    with_bias=st.booleans(),
)
@settings(max_examples=150, derandomize=True, **RELAXED)
def test_float64_against_mpmath(function, isa, row, temperature, with_bias):
    bias = np.sin(np.arange(row.size) * 7.0) * 30 if with_bias else None
    with sml.use_isa(isa):
        y = getattr(sml, function)(row, temperature=temperature, bias=bias)
    exact = mp_row(function, row, temperature, bias)
    good = within_contract(function, y, exact, np.float64)
    assert good.all(), (y, exact, ulp_error(y, exact, np.float64))


# ---- the oracle itself ---------------------------------------------------------------------------


@given(
    function=FUNCTION,
    row=st.integers(1, 30).flatmap(lambda n: values((n,), np.dtype(np.float64), special=())),
)
@settings(max_examples=100, derandomize=True, **RELAXED)
def test_the_two_oracles_agree(function, row):
    error = ulp_error(expected(function, row), mp_row(function, row), np.float64)
    if function == "logsumexp":
        error = np.where(abs(mp_row(function, row)) < 1e-2, 0, error)
    assert (error < 0.4).all(), error.max()


def test_ulp_error_counts_what_it_should():
    one, tiny = np.float32(1), np.float32(2.0**-149)
    up = np.nextafter(one, np.float32(2))
    cases = [
        (one, 1, 0), (up, 1, 1), (one, up, 1), (np.nextafter(one, np.float32(0)), 1, 0.5),
        (tiny, 0, 1), (0, tiny, 1), (0, 2.0**-151, 0.25), (np.nan, np.nan, 0), (np.nan, 1, np.inf),
        (1, np.nan, np.inf), (np.inf, np.inf, 0), (np.inf, -np.inf, np.inf), (np.inf, 1, np.inf),
        (1, np.inf, np.inf), (np.inf, np.longdouble(2) ** 128, 0), (np.inf, 2.0**127, np.inf),
        (-0.0, 0.0, 0), (2.0**-126, 2.0**-126 + 2.0**-150, 0.5),
    ]  # fmt: skip
    for actual, exact, want in cases:
        assert ulp_error(np.float32(actual), exact, np.float32) == want, (actual, exact)
    assert ulp_error(np.float16(6e-8), 0, np.float16) == 1
    assert ulp_error(DTYPES[1].type(1.0078125), 1, DTYPES[1]) == 1
