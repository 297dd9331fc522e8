"""Results go to memory that overlaps an argument's as if it did not, in every function."""

import numpy as np
import pytest

import softmaxlib as sml

_random = np.random.default_rng(11)
ROWS, N = 5, 6
X = _random.normal(0, 3, (ROWS, N))
GRAD = _random.normal(0, 1, (ROWS, N))
BIAS = _random.normal(0, 1, (ROWS, N))
WHERE = _random.random((ROWS, N)) < 0.8
TEMPERATURE = _random.uniform(0.5, 2, (ROWS, 1))
LABELS = _random.integers(0, N, ROWS)
SHARES = _random.dirichlet(np.ones(N), ROWS)
WEIGHT = _random.uniform(0.5, 2, N)
PLACES = _random.integers(0, N, (ROWS, N))
Y, LOG_Y, SUMS = sml.softmax(X), sml.log_softmax(X), sml.logsumexp(X)
S, LOG_S = sml.stablemax(X), sml.log_stablemax(X)
OPTIONS = {"temperature": TEMPERATURE, "where": WHERE}
LOSS = OPTIONS | {"weight": WEIGHT, "label_smoothing": 0.1}

# function, its arguments by name, the parameter that takes a result
CALLS = {
    f.__name__: (f, {"x": X, "bias": BIAS} | OPTIONS, "out")
    for f in (sml.softmax, sml.log_softmax, sml.logsumexp, sml.stablemax, sml.log_stablemax)
}
CALLS |= {
    "logsumexp that keeps axes": (sml.logsumexp, {"x": X, "keepdims": True} | OPTIONS, "out"),
    "softmax_backward": (sml.softmax_backward, {"grad": GRAD, "y": Y} | OPTIONS, "out"),
    "log_softmax_backward": (
        sml.log_softmax_backward,
        {"grad": GRAD, "log_y": LOG_Y} | OPTIONS,
        "out",
    ),
    "logsumexp_backward": (
        sml.logsumexp_backward,
        {"grad": GRAD[:, 0].copy(), "x": X, "y": SUMS} | OPTIONS,
        "out",
    ),
    "stablemax_backward": (
        sml.stablemax_backward,
        {"grad": GRAD, "x": X, "y": S} | OPTIONS,
        "out",
    ),
    "log_stablemax_backward": (
        sml.log_stablemax_backward,
        {"grad": GRAD, "x": X, "log_y": LOG_S} | OPTIONS,
        "out",
    ),
    "take_log_softmax": (
        sml.take_log_softmax,
        {"x": X, "indices": PLACES} | OPTIONS,
        "out",
    ),
    "take_log_softmax of one": (sml.take_log_softmax, {"x": X, "indices": LABELS} | OPTIONS, "out"),
    "orthogonal_gradient": (sml.orthogonal_gradient, {"grad": GRAD, "weights": X}, "out"),
}
CALLS |= {
    f"cross_entropy, {reduction}, {name}, {out}": (
        sml.cross_entropy,
        {"logits": X, "target": target, "reduction": reduction, "return_grad": True} | LOSS,
        out,
    )
    for reduction in ("mean", "none")
    for name, target in (("classes", LABELS), ("probabilities", SHARES))
    for out in ("out", "grad_out")
}


def result_of(call, options, out):
    result = call(**options)
    return result[out == "grad_out"] if isinstance(result, tuple) else result


def strides_for(shape, item, step):
    """Return the strides of an array whose last axis goes by `step` items."""
    strides, at = [], item * step
    for n in reversed(shape):
        strides.insert(0, at)
        at *= n
    return tuple(strides)


def placed(memory, like, start, step):
    """Return a view of the memory, of a shape and dtype, from a byte on."""
    like = np.asarray(like)
    strides = strides_for(like.shape, like.itemsize, step)
    return np.ndarray(like.shape, like.dtype, memory, start, strides)


# Where the argument and the result start, and by how many of their elements they step.
PLACES_IN_MEMORY = {
    "the same": (0, 1, 0, 1),
    "one element on": (0, 1, 8, 1),
    "one element before": (8, 1, 0, 1),
    "half an element on": (0, 1, 4, 1),
    "an argument that is wider": (0, 2, 0, 1),
    "a result that is wider": (0, 1, 0, 2),
    "both, the same": (0, 2, 0, 2),
    "both, one element on": (0, 2, 16, 2),
    "at the other end": (0, 1, 232, 1),
}


@pytest.mark.parametrize("place", PLACES_IN_MEMORY)
@pytest.mark.parametrize("name", CALLS)
def test_result_over_an_argument(name, place):
    call, arguments, out = CALLS[name]
    expected = np.asarray(result_of(call, arguments, out))
    for argument, value in arguments.items():
        if not isinstance(value, np.ndarray):
            continue
        memory = np.zeros(1024, np.uint8)
        value_at, value_step, out_at, out_step = PLACES_IN_MEMORY[place]
        overlapping = placed(memory, value, value_at, value_step)
        target = placed(memory, expected, out_at, out_step)
        overlapping[...] = value
        result = result_of(call, arguments | {argument: overlapping, out: target}, out)
        assert result is target, argument
        assert target.tobytes() == expected.tobytes(), argument


@pytest.mark.parametrize("name", CALLS)
def test_result_over_an_argument_of_one_column(name):
    """There the result of what reduces has the shape and strides of its argument."""
    call, arguments, out = CALLS[name]
    columns = {
        key: value[..., :1].copy() if isinstance(value, np.ndarray) and value.ndim == 2 else value
        for key, value in arguments.items()
    }
    if "weight" in columns:
        columns["weight"] = WEIGHT[:1].copy()
    for key in ("target", "indices"):
        if key in columns and columns[key].dtype == np.int64:
            columns[key] = columns[key] * 0
    expected = np.asarray(result_of(call, columns, out))
    for argument, value in columns.items():
        if not isinstance(value, np.ndarray) or value.shape != expected.shape:
            continue
        if value.dtype != expected.dtype:
            continue
        target = value.copy()
        result = result_of(call, columns | {argument: target, out: target}, out)
        assert result is target, argument
        assert target.tobytes() == expected.tobytes(), argument


def test_loss_and_gradient_apart():
    memory = np.zeros((ROWS, N))
    with pytest.raises(ValueError, match="out and grad_out share memory"):
        sml.cross_entropy(
            X, LABELS, reduction="none", return_grad=True, out=memory[:, 2], grad_out=memory
        )
    assert not memory.any()
