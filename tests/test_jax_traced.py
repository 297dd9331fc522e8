"""What the functions of NumPy say when JAX traces them, which they cannot be."""

import numpy as np
import pytest

import softmaxlib as sml

jax = pytest.importorskip("jax")

ROWS = np.ones((2, 3), np.float32)
CLASSES = np.zeros(2, np.int32)

# Every function, with an array in place of each argument that may be one.
CALLS = {
    "softmax": lambda a: sml.softmax(a),
    "log_softmax": lambda a: sml.log_softmax(a, axis=0),
    "logsumexp": lambda a: sml.logsumexp(a),
    "stablemax": lambda a: sml.stablemax(a),
    "log_stablemax": lambda a: sml.log_stablemax(a),
    "temperature": lambda a: sml.softmax(ROWS, temperature=a[:, :1]),
    "bias": lambda a: sml.softmax(ROWS, bias=a),
    "where": lambda a: sml.softmax(ROWS, where=a > 0),
    "softmax_backward": lambda a: sml.softmax_backward(a, ROWS),
    "log_softmax_backward": lambda a: sml.log_softmax_backward(ROWS, a),
    "logsumexp_backward": lambda a: sml.logsumexp_backward(a[:, 0], ROWS, ROWS[:, 0]),
    "stablemax_backward": lambda a: sml.stablemax_backward(ROWS, a, ROWS),
    "log_stablemax_backward": lambda a: sml.log_stablemax_backward(ROWS, ROWS, a),
    "cross_entropy": lambda a: sml.cross_entropy(a, CLASSES),
    "target": lambda a: sml.cross_entropy(ROWS, a),
    "weight": lambda a: sml.cross_entropy(ROWS, CLASSES, weight=a[0]),
    "take_log_softmax": lambda a: sml.take_log_softmax(a, CLASSES),
    "indices": lambda a: sml.take_log_softmax(ROWS, a[:, 0].astype(int)),
    "sample": lambda a: sml.sample(a, np.random.default_rng(0)),
    "topk_softmax": lambda a: sml.topk_softmax(a, 2),
    "orthogonal_gradient": lambda a: sml.orthogonal_gradient(a, ROWS),
    "weights": lambda a: sml.orthogonal_gradient([ROWS], [a]),
    "a list": lambda a: sml.softmax([a[0, 0], a[0, 1]]),
}


def test_no_function_is_forgotten():
    plain = {name for name in sml.__all__ if callable(getattr(sml, name))} - CALLS.keys()
    others = {name for name in plain if not name.startswith(("get_", "set_"))}
    assert others == {
        *("Explanation", "explain"),  # of shapes
        *("available_isas", "info", "last_kernel", "threads", "use_isa"),
    }


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
@pytest.mark.parametrize("name", CALLS)
def test_traced(name, transform):
    if transform == "grad" and name in ("where", "indices"):
        pytest.skip("grad alone does not trace what has no derivative")
    traced = getattr(jax, transform)(CALLS[name])
    x = ROWS if transform != "vmap" else np.stack([ROWS, ROWS])
    sentence = r"^\w+(\[0\])? is traced by JAX: use the functions of softmaxlib\.jax(\n|$)"
    with pytest.raises(TypeError, match=sentence):  # JAX adds a note of its own
        traced(x)
