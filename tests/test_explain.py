"""explain() tells what a call then does."""

import numpy as np
import pytest

import softmaxlib as sml
from softmaxlib import _core

SHAPES = (
    (1, 1),
    (1, 100_000),
    (70_000, 3),
    (3000, 40),
    (600, 700),
    (40, 5000),
    (3, 200_000),
    (20, 8, 50),
    (700, 90),
)


@pytest.mark.parametrize("axis", [-1, 0, None])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("function", list(_core.functions))
@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_does_what_explain_says(threads, function, dtype, axis):
    for shape in SHAPES:
        with sml.threads(threads):
            told = sml.explain(shape, dtype, axis, function=function)
            getattr(sml, function)(np.zeros(shape, dtype), axis)
        isa, _, store, tasks, kernel = _core.last_report()
        assert sml.last_kernel() == f"{told.isa}::{told.kernel}", shape
        assert (_core.isas[told.isa], told.kernel, told.tasks) == (isa, kernel, tasks), shape
        assert _core.stores[told.stores] == store, shape
        assert told.rows * told.n == np.prod(shape)
        assert all((told.why_kernel, told.why_stores, told.why_tasks))


def test_what_the_caller_fixes():
    with sml.use_isa("scalar"):
        told = sml.explain((8, 64), algorithm="three_pass_recompute")
    assert (told.isa, told.kernel) == ("scalar", "softmax_three_pass_recompute_f32")
    assert "caller" in told.why_kernel


def test_strides_and_place():
    assert sml.explain((64, 64)) == sml.explain((64, 64), strides=(256, 4))
    assert "in place" in sml.explain((1, 1 << 26), in_place=True).why_stores
    assert sml.explain(5, "bfloat16").kernel.endswith("bf16")


def test_its_text():
    text = str(sml.explain((512, 32_000)))
    assert "512 of 32,000 elements" in text
    assert [line.split()[0] for line in text.splitlines()] == ["rows", "kernel", "stores", "tasks"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (((2, -1),), ValueError, "negative"),
        (((2, 2), "int32"), TypeError, "float16"),
        (((2, 2), "f4", 2), sml._arrays.AxisError, "axis"),
        ((2**70,), ValueError, "shape and strides reach over more than 2.57 bytes"),
        ((2**99999,), ValueError, "shape and strides reach over"),
        (((2**40, 2**40),), ValueError, "shape and strides reach over"),
        (((0, 2**70),), ValueError, "shape and strides reach over"),
        ((2**55 + 1,), ValueError, "shape and strides reach over"),
        (((1,) * 65,), ValueError, "at most 64 lengths, got 65"),
        (((1,) * 64, "f4", ()), ValueError, "at most 63 dimensions, got one of 64"),
        (((2.5,),), TypeError, r"shape must be integers, got \(2.5,\)"),
        (("12",), TypeError, "shape must be integers, got '12'"),
        ((None,), TypeError, "shape must be integers, got None"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        sml.explain(*arguments)


def test_bad_names():
    with pytest.raises(ValueError, match="softmin"):
        sml.explain((2, 2), function="softmin")
    with pytest.raises(ValueError, match="four_pass"):
        sml.explain((2, 2), algorithm="four_pass")
    with pytest.raises(ValueError, match="strides"):
        sml.explain((2, 2), strides=(4,))
    with pytest.raises(TypeError, match="strides must be integers, got 8"):
        sml.explain((2, 2), strides=8)
    for strides in ((2**70, 4), (2**62, 4), (-(2**63), 4)):
        with pytest.raises(ValueError, match="shape and strides reach over"):
            sml.explain((3, 2), strides=strides)


def test_the_largest_array():
    for dtype, n in ((np.float16, 2**56), (np.float32, 2**55), (np.float64, 2**54)):
        told = sml.explain((1, n), dtype)
        assert told.rows * told.n == n
    assert sml.explain((2, 2**53), strides=(2**56, 4)).rows == 2
