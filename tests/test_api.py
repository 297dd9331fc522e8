"""Signatures, dtypes, axes, strides, options, out, and every kind of bad input."""

import ctypes
import inspect
import itertools
import pickle
import subprocess
import sys
from decimal import Decimal

import ml_dtypes
import numpy as np
import pytest
from oracle import DTYPES, FUNCTIONS, expected, ulp_error, within_contract

import softmaxlib as sml
from softmaxlib import _api, _core, _gradients, _losses, _runtime

try:
    from numpy.exceptions import AxisError
except ImportError:
    from numpy import AxisError

BF16 = np.dtype(ml_dtypes.bfloat16)
REDUCING = ("logsumexp",)
ELEMENTWISE = tuple(f for f in FUNCTIONS if f not in REDUCING)
ALGORITHMS = ("auto", "three_pass_recompute", "three_pass_reload", "two_pass", "two_pass_reload")
EVERY = pytest.mark.parametrize("function", FUNCTIONS)


def call(function, x, *args, **options):
    return getattr(sml, function)(x, *args, **options)


def logits(*shape, dtype=np.float32, scale=3, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def assert_right(function, x, *args, actual=None, **options):
    exact = expected(function, x, *args, **options)
    if actual is None:
        actual = call(function, x, *args, **options)
    assert actual.shape == exact.shape
    wrong = ~within_contract(function, actual, exact, actual.dtype)
    error = ulp_error(actual, exact, actual.dtype)
    assert not wrong.any(), f"{wrong.sum()} wrong, first {error[wrong][0]} ULP off"


def assert_same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    as_bits = f"u{a.dtype.itemsize}"
    np.testing.assert_array_equal(
        np.ascontiguousarray(a).view(as_bits), np.ascontiguousarray(b).view(as_bits)
    )


# ---- signature -----------------------------------------------------------------------------------


@EVERY
def test_signature_is_the_one_of_api_md(function):
    options = {"temperature": 1.0, "bias": None, "where": None, "dtype": None, "out": None}
    options["algorithm"] = "auto"
    if function in REDUCING:
        options = {"keepdims": False, **options}
    parameters = inspect.signature(getattr(sml, function)).parameters
    assert list(parameters) == ["x", "axis", *options]
    assert parameters["axis"].default == -1
    for name, default in options.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default


def test_every_public_name_has_a_docstring():
    for name in sml.__all__:
        assert getattr(sml, name).__doc__, name


@EVERY
def test_docstring_examples_hold(function):
    import doctest

    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    tests = doctest.DocTestFinder().find(
        getattr(sml, function), function, globs={"softmaxlib": sml}
    )
    assert sum(len(test.examples) for test in tests) >= 1
    with np.printoptions(legacy=False):
        if function == "logsumexp" and int(np.__version__.split(".")[0]) < 2:
            pytest.skip("NumPy 1 prints scalars without their type")
        assert sum(runner.run(test).failed for test in tests) == 0


# ---- dtypes --------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floats_keep_their_dtype(function, dtype, isa):
    x = logits(3, 200, dtype=dtype)
    y = call(function, x)
    assert y.dtype == dtype
    assert sml.last_kernel().startswith(f"{isa}::")
    assert_right(function, x, actual=y)


@EVERY
@pytest.mark.parametrize("dtype", ["bool", *"bhilqBHILQ"])
def test_integers_and_bool_compute_in_float64(function, dtype):
    x = (np.arange(60).reshape(3, 20) * 7 % 23).astype(dtype)
    y = call(function, x)
    assert y.dtype == np.float64
    assert_same_bits(y, call(function, x.astype(np.float64)))
    assert_right(function, x, actual=y)


@EVERY
def test_integers_at_the_ends_of_their_range(function):
    for dtype in (np.int64, np.uint64):
        ends = np.iinfo(dtype)
        x = np.array([ends.min, ends.max, ends.max - 1], dtype)
        assert_same_bits(call(function, x), call(function, x.astype(np.float64)))


@EVERY
@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("source", [*DTYPES, np.dtype(np.int32), np.dtype(bool)], ids=str)
def test_dtype_converts_x_on_reading(function, source, to):
    x = logits(4, 70).astype(source)
    y = call(function, x, dtype=to)
    assert y.dtype == to
    # The arithmetic's type: halves are computed in float32 and rounded only at the end.
    computed = np.float64 if to == np.float64 else np.float32
    assert_same_bits(y, call(function, x.astype(computed), dtype=to))


def test_dtype_spellings():
    x = [1.0, 2.0]
    assert sml.softmax(x, dtype="float32").dtype == np.float32
    assert sml.softmax(x, dtype="bfloat16").dtype == BF16
    assert sml.softmax(x, dtype=ml_dtypes.bfloat16).dtype == BF16
    assert sml.softmax(x, dtype=">f4").dtype == np.dtype("=f4")


@EVERY
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", ">i4", "<f4"])
def test_byte_order_does_not_matter(function, dtype):
    x = logits(3, 40).astype(dtype)
    swapped_bias = logits(40, seed=1).astype(">f4")
    native = x.astype(x.dtype.newbyteorder("="))
    y = call(function, x, bias=swapped_bias, temperature=np.full((3, 1), 2.0, ">f8"))
    assert y.dtype.isnative
    assert_same_bits(
        y, call(function, native, bias=swapped_bias.astype("=f4"), temperature=np.float32(2))
    )


@EVERY
@pytest.mark.parametrize(
    "x",
    [
        np.ones(3, complex),
        np.ones(3, np.complex64),
        np.ones(3, object),
        np.array(["a", "b"]),
        np.array([b"a"]),
        np.ones(3, "m8[s]"),
        np.ones(3, "M8[s]"),
        np.zeros(3, "f4,f4"),
        np.zeros(3, ml_dtypes.float8_e4m3fn),
        "text",
        None,
        [Decimal(1)],
        2**70,
        1j,
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}",
)
def test_unsupported_dtypes_are_named(function, x):
    name = str(np.asarray(x).dtype)
    with pytest.raises(TypeError) as raised:
        call(function, x)
    assert name in str(raised.value) and "x has dtype" in str(raised.value)


@EVERY
def test_longdouble_is_refused(function):
    if np.dtype(np.longdouble) == np.float64:
        pytest.skip("longdouble is float64 here")
    with pytest.raises(TypeError, match=str(np.dtype(np.longdouble))):
        call(function, np.ones(3, np.longdouble))


@EVERY
@pytest.mark.parametrize("dtype", [np.int32, bool, complex, np.longdouble, object, "nonsense", "U"])
def test_unsupported_result_dtypes(function, dtype):
    with pytest.raises(TypeError, match="dtype must be"):
        call(function, [1.0, 2.0], dtype=dtype)


# ---- what x may be -------------------------------------------------------------------------------


def test_array_likes():
    want = sml.softmax(np.array([1.0, 2.0, 4.0]))
    for x in ([1.0, 2.0, 4.0], (1, 2, 4), range(0), memoryview(np.array([1.0, 2.0, 4.0]))):
        if len(x):
            assert_same_bits(sml.softmax(x), want)
    assert sml.softmax([]).shape == (0,)


def test_ragged_list_keeps_numpys_words():
    with pytest.raises(ValueError, match="inhomogeneous"):
        sml.softmax([[1.0], [1.0, 2.0]])


def test_scalars_give_scalars():
    for axis in (-1, 0, None, ()):
        y = sml.softmax(np.float32(3), axis)
        assert type(y) is np.float32 and y == 1
        assert sml.logsumexp(3.5, axis) == 3.5
        assert sml.log_softmax(np.array(3.5), axis) == 0
    assert type(sml.logsumexp(np.ones(4, np.float32))) is np.float32
    assert type(sml.logsumexp(np.ones(4, np.float32), keepdims=True)) is np.ndarray
    with pytest.raises(AxisError):
        sml.softmax(3.0, axis=1)


class OnlyDLPack:
    """A tensor of some other library."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Bfloat16Tensor(OnlyDLPack):
    """What torch gives out for torch.bfloat16: DLPack's type code 4."""

    def __array__(self, *args, **kwargs):
        raise TypeError("Got unsupported ScalarType BFloat16")

    def __dlpack__(self, **options):
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        ctypes.c_uint8.from_address(pointer(capsule, b"dltensor") + 20).value = 4
        return capsule


class OnTheGpu:
    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __dlpack__(self, **options):
        raise BufferError("not in CPU memory")

    def __dlpack_device__(self):
        return (2, 0)


def test_dlpack_tensors():
    x = logits(5, 7)[:, ::-2]
    assert_same_bits(sml.softmax(OnlyDLPack(x)), sml.softmax(x))


@pytest.mark.parametrize(
    "index", [np.s_[:], np.s_[::2, ::-1], np.s_[1], np.s_[:0], np.s_[2, 3, ...]]
)
def test_bfloat16_tensors_that_numpy_refuses(index):
    x = logits(5, 7, dtype=BF16)[index]
    tensor = Bfloat16Tensor(x.view(np.uint16))
    assert_same_bits(np.asarray(sml.softmax(tensor)), np.asarray(sml.softmax(x)))


def test_tensors_elsewhere_are_refused_by_name():
    with pytest.raises(TypeError, match="^x .*OnTheGpu.*CPU memory"):
        sml.softmax(OnTheGpu())
    with pytest.raises(TypeError, match="^bias .*OnTheGpu"):
        sml.softmax([1.0], bias=OnTheGpu())


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    x = logits(4, 6)
    assert_same_bits(sml.softmax(torch.from_numpy(x)), sml.softmax(x))
    half = torch.from_numpy(x).to(torch.bfloat16)
    assert sml.softmax(half).dtype == BF16
    signs = torch.from_numpy(x * np.complex64(1j)).conj().imag
    assert signs.is_neg()
    assert_same_bits(sml.softmax(signs), sml.softmax(-x))


def test_torch_tensors_that_are_no_arrays():
    """A sentence that says what to pass instead, from every function and for every parameter."""
    torch = pytest.importorskip("torch")
    x, one = logits(3, 4), np.ones((3, 1))
    places, where = np.arange(3), np.ones((3, 4), bool)
    arguments = {
        **{f: {"x": x, "temperature": one, "bias": x, "where": where} for f in FUNCTIONS},
        **{f"{f}_backward": {"grad": x, "y": x} for f in ("softmax", "stablemax")},
        **{f"log_{f}_backward": {"grad": x, "log_y": x} for f in ("softmax", "stablemax")},
        "logsumexp_backward": {"grad": x[:, 0], "x": x, "y": x[:, 0]},
        "cross_entropy": {"logits": x, "target": places, "weight": x[0] * 0 + 1, "where": where},
        "take_log_softmax": {"x": x, "indices": places, "temperature": one, "where": where},
        "sample": {"logits": x, "temperature": one},
        "topk_softmax": {"x": x},
        "orthogonal_gradient": {"grad": x, "weights": x},
    }
    others = {
        "sample": {"rng": np.random.default_rng(0)},
        "topk_softmax": {"k": 2},
        "stablemax_backward": {"x": x},
        "log_stablemax_backward": {"x": x},
    }
    for name, arrays in arguments.items():
        function = getattr(sml, name)
        function(**arrays, **others.get(name, {}))
        for side, array in arrays.items():
            tensor = torch.from_numpy(array)
            unreadable = {
                f"{side} is a torch.Tensor on meta; it must be in CPU memory": tensor.to("meta"),
                f"layout torch.sparse_coo; it must be dense: pass {side}.to_d": tensor.to_sparse(),
            }
            if tensor.is_floating_point():
                message = f"{side} .* requires grad, .* softmaxlib.torch, or pass {side}.detach"
                unreadable[message] = tensor.clone().requires_grad_()
            for message, value in unreadable.items():
                with pytest.raises(TypeError, match=message):
                    function(**{**arrays, side: value}, **others.get(name, {}))


@EVERY
def test_subclasses_give_plain_arrays(function, tmp_path):
    x = logits(4, 6)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    for like in (mapped, x.view(np.recarray)):
        y = call(function, like)
        assert type(y) is np.ndarray
        assert_same_bits(y, call(function, x))


@EVERY
def test_masked_arrays_are_told_what_to_do(function):
    masked = np.ma.masked_less([1.0, 2.0], 1.5)
    with pytest.raises(TypeError, match=r"x\.data.*where=~mask"):
        call(function, masked)
    for name in ("temperature", "bias", "where"):
        with pytest.raises(TypeError, match=rf"^{name} is a masked .* pass {name}\.filled\("):
            call(function, [1.0, 2.0], **{name: masked})


def test_a_hint_at_where_only_where_there_is_one():
    x, masked = np.ones(2), np.ma.masked_less([1.0, 2.0], 1.5)
    places = np.ma.array([[0]], mask=[[True]])
    for has_where, name, call_it in (
        (True, "logits", lambda: sml.cross_entropy(masked, 0)),
        (True, "x", lambda: sml.take_log_softmax(masked, 0)),
        (True, "x", lambda: sml.stablemax_backward(x, masked, x)),
        (False, "target", lambda: sml.cross_entropy(x, masked)),
        (False, "weight", lambda: sml.cross_entropy(x, 0, weight=masked)),
        (False, "indices", lambda: sml.take_log_softmax(x[None], places)),
        (False, "grad", lambda: sml.softmax_backward(masked, x)),
        (False, "y", lambda: sml.softmax_backward(x, masked)),
        (False, "logits", lambda: sml.sample(masked, np.random.default_rng(0))),
        (False, "x", lambda: sml.topk_softmax(masked, 1)),
        (False, "grad", lambda: sml.orthogonal_gradient(masked, x)),
        (False, "weights", lambda: sml.orthogonal_gradient(x, masked)),
    ):
        with pytest.raises(TypeError, match=f"^{name} is a masked array") as caught:
            call_it()
        assert ("where=~mask" in str(caught.value)) == has_where, caught.value


def test_as_many_dimensions_as_numpy_has():
    most = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32
    x = np.arange(4.0).reshape((1,) * (most - 2) + (2, 2))
    for axis in (-1, 0, None, (0, most - 1)):
        assert np.isclose(sml.softmax(x, axis).sum(axis), 1).all()
    np.testing.assert_array_equal(sml.softmax(x[0], axis=()), np.ones(x[0].shape))
    words = rf"^axis \(\) takes an array of at most {most - 1} dimensions, got one of {most}$"
    for function in (sml.softmax, sml.log_softmax, sml.logsumexp, sml.stablemax, sml.log_stablemax):
        with pytest.raises(ValueError, match=words):
            function(x, axis=())
    for backward in (sml.softmax_backward, sml.log_softmax_backward):
        with pytest.raises(ValueError, match=words):
            backward(x, x, axis=())
    for backward in (
        sml.logsumexp_backward,
        sml.stablemax_backward,
        sml.log_stablemax_backward,
    ):
        with pytest.raises(ValueError, match=words):
            backward(x, x, x, axis=())


@EVERY
def test_x_is_never_written_to(function):
    x = logits(6, 30)
    before = x.copy()
    x.flags.writeable = False
    call(function, x, temperature=2.0, bias=x, where=x > 0)
    np.testing.assert_array_equal(x, before)


# ---- axes and strides ----------------------------------------------------------------------------

AXES = [-1, 0, 1, 2, -3, None, (), (0,), (0, 2), (2, 0), (-1, -2), (0, 1, 2), np.int64(1)]


@EVERY
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_axes(function, axis):
    x = logits(3, 4, 5)
    assert_right(function, x, axis)
    if function in REDUCING:
        assert_right(function, x, axis, keepdims=True)


@EVERY
@pytest.mark.parametrize("axis", [-1, 0, (0, 1), ()], ids=str)
def test_axes_do_not_change_the_bits(function, axis, isa):
    """A row has the same bits wherever it lies in memory."""
    x = logits(70, 90)
    y = call(function, x, axis)
    for moved in (np.asfortranarray(x), np.pad(x, 1)[1:-1, 1:-1], np.repeat(x, 2, 1)[:, ::2]):
        assert_same_bits(call(function, moved, axis), y)
    if function not in REDUCING:
        assert_same_bits(call(function, x[::-1], axis)[::-1], y) if axis == -1 else None
        swapped = {-1: 0, 0: 1}.get(axis)
        if swapped is not None:
            assert_same_bits(call(function, x.T, swapped).T, y)


@EVERY
def test_broadcast_and_misaligned_x(function):
    row = logits(33)
    assert_right(function, np.broadcast_to(row, (4, 33)))
    assert_right(function, np.broadcast_to(row[:, None], (33, 4)))
    for dtype in ("<f2", "<f4", "<f8"):
        buffer = np.zeros(33 * np.dtype(dtype).itemsize + 1, np.uint8)
        x = buffer[1:].view(dtype)
        assert not x.flags.aligned or x.dtype.itemsize == 1
        x[:] = row
        assert_same_bits(call(function, x), call(function, row.astype(dtype)))


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_result_keeps_the_memory_order_of_x(function):
    assert call(function, logits(4, 5)).flags.c_contiguous
    assert call(function, np.asfortranarray(logits(4, 5))).flags.f_contiguous


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_size_zero(function, dtype):
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 3)):
        x = np.empty(shape, dtype)
        for axis in (-1, 0, None):
            y = call(function, x, axis)
            assert y.dtype == dtype
            assert y.shape == expected(function, x, axis).shape
            if function in REDUCING:
                assert (np.asarray(y, float) == -np.inf).all()


@EVERY
@pytest.mark.parametrize("axis", [3, -4, (0, 3), 2**40])
def test_axis_out_of_range(function, axis):
    with pytest.raises(AxisError, match="out of bounds for array of dimension 3"):
        call(function, logits(2, 3, 4), axis)


@EVERY
def test_axis_repeated(function):
    for axis in ((0, 0), (1, -2)):
        with pytest.raises(ValueError, match="repeats"):
            call(function, logits(2, 3, 4), axis)


@EVERY
@pytest.mark.parametrize(
    "axis", [1.0, "0", True, np.bool_(False), [0], (0, 1.0), (True,)], ids=repr
)
def test_axis_of_the_wrong_type(function, axis):
    with pytest.raises(TypeError, match="axis"):
        call(function, logits(2, 3, 4), axis)


# ---- options -------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature(function, dtype, isa):
    x = logits(3, 50, dtype=dtype)
    for temperature in (0.3, 7, np.float32(2.5), np.array(3), np.array([0.1]), np.int8(2)):
        assert_right(function, x, temperature=temperature)
    for temperature in ([[0.5], [1], [3.0]], np.array([[2], [3], [4]], np.uint8)):
        assert_right(function, x, temperature=temperature)
    per_row = np.array([0.5, 1.0, 3.0], dtype)
    assert_right(function, x, temperature=per_row[:, None])
    assert_right(function, x.T, 0, temperature=per_row)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_where(function, dtype, isa):
    x = logits(4, 3, 50, dtype=dtype)
    where = np.random.default_rng(1).random((3, 50)) < 0.7
    for bias_dtype in DTYPES:
        bias = logits(3, 50, dtype=bias_dtype, seed=2)
        assert_right(function, x, bias=bias)
        assert_right(function, x, bias=bias[:, :1], where=where, temperature=0.7)
        assert_right(function, x, (0, 2), bias=bias, where=where[:, ::-1], temperature=3)
    assert_right(function, x, bias=1, where=True)
    assert_right(function, x, bias=np.arange(50), where=where[0])
    assert_right(function, x, (), bias=bias, where=where, temperature=np.full((3, 50), 2.0))


@EVERY
def test_where_hides_what_x_holds(function, isa):
    x = logits(40)
    where = np.arange(40) % 3 > 0
    spoiled = np.where(where, x, np.resize([np.nan, np.inf, -np.inf], 40)).astype(np.float32)
    assert_same_bits(
        np.asarray(call(function, spoiled, where=where)),
        np.asarray(call(function, x, where=where)),
    )
    nothing = call(function, spoiled, where=False)
    assert (nothing == (-np.inf if function.startswith("log") else 0)).all()


@EVERY
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithms_return_the_same_bits(function, algorithm, isa):
    x = logits(3, 5000)
    y = call(function, x, algorithm=algorithm)
    assert_same_bits(y, call(function, x))
    assert_right(function, x, actual=y)


@pytest.mark.parametrize("algorithm", ALGORITHMS[1:])
def test_algorithm_asked_for_is_the_one_that_runs(algorithm, isa):
    sml.softmax(logits(3, 100), algorithm=algorithm)
    assert sml.last_kernel() == f"{isa}::softmax_{algorithm}_f32"


@EVERY
@pytest.mark.parametrize("bad", ["", "fast", "TWO_PASS"])
def test_unknown_algorithm(function, bad):
    with pytest.raises(ValueError, match="two_pass_reload"):
        call(function, [1.0], algorithm=bad)
    with pytest.raises(TypeError, match="algorithm"):
        call(function, [1.0], algorithm=3)


BAD_NUMBERS = [0, 0.0, -0.0, -1, -1e-300, np.nan, np.inf, -np.inf, np.float32(0), np.array(np.nan)]


@EVERY
@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=repr)
def test_temperature_not_positive_and_finite(function, bad):
    with pytest.raises(ValueError, match="temperature must be positive and finite, got "):
        call(function, [[1.0, 2.0]], temperature=bad)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got "):
        call(function, [[1.0, 2.0], [1.0, 2.0]], temperature=[[1.0], [bad]])


@EVERY
def test_temperature_of_the_wrong_shape(function):
    x = logits(3, 4)
    for axis, shape in ((-1, (4,)), (-1, (3, 4)), (0, (3, 1)), (None, (3, 1)), ((0, 1), (4,))):
        with pytest.raises(ValueError, match="temperature of shape .* varies along axis"):
            call(function, x, axis, temperature=np.ones(shape))
    for shape in ((3,), (2, 1), (1, 3, 1), (1, 1, 1)):
        with pytest.raises(ValueError, match=r"temperature of shape .* does not broadcast.*\(3, 4"):
            call(function, x, temperature=np.ones(shape))


@EVERY
@pytest.mark.parametrize("bad", [True, np.True_, 1j, "1", None, [[True], [True]]], ids=repr)
def test_temperature_of_the_wrong_type(function, bad):
    with pytest.raises(TypeError, match="temperature"):
        call(function, logits(2, 3), temperature=bad)


@EVERY
@pytest.mark.parametrize("option", ["bias", "where"])
def test_bias_and_where_that_do_not_broadcast(function, option):
    x = logits(3, 4)
    for shape in ((3,), (2, 4), (1, 3, 4), (2, 3, 4), (0,)):
        value = np.ones(shape, bool if option == "where" else np.float32)
        with pytest.raises(ValueError) as raised:
            call(function, x, **{option: value})
        for said in (option, str(shape), "(3, 4)"):
            assert said in str(raised.value)


@EVERY
def test_bias_and_where_of_the_wrong_dtype(function):
    for bad in (np.ones(3, complex), np.ones(3, bool), np.ones(3, object), "x", np.longdouble(1)):
        with pytest.raises(TypeError, match="bias has dtype"):
            call(function, [1.0, 2.0, 3.0], bias=bad)
    for bad in (np.ones(3), np.ones(3, np.uint8), np.ones(3, object), "x", 1):
        with pytest.raises(TypeError, match="where has dtype"):
            call(function, [1.0, 2.0, 3.0], where=bad)


# ---- out -----------------------------------------------------------------------------------------


def result_like(function, x, axis=-1, **options):
    return np.zeros_like(call(function, x, axis, **options))


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_filled_and_returned(function, dtype):
    x = logits(3, 40, dtype=dtype)
    y = call(function, x)
    out = np.zeros_like(y)
    assert call(function, x, out=out) is out
    assert_same_bits(out, y)
    out = np.zeros((2 * y.size,), dtype).reshape(*y.shape, 2)[..., 1]  # strided
    assert call(function, x, out=out, dtype=dtype) is out
    assert_same_bits(np.ascontiguousarray(out), y)
    assert not out.base.reshape(-1, 2)[:, 0].any()


@pytest.mark.parametrize("axis", [-1, 0, None, (), (0, 1)], ids=str)
@pytest.mark.parametrize("keepdims", [False, True])
def test_out_of_logsumexp(axis, keepdims):
    x = logits(3, 4)
    y = np.asarray(sml.logsumexp(x, axis, keepdims=keepdims))
    out = np.zeros(y.shape, y.dtype)
    assert sml.logsumexp(x, axis, keepdims=keepdims, out=out) is out
    assert_same_bits(out, y)


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_out_of_a_scalar(function):
    out = np.full((), 9.0)
    assert call(function, 3.0, out=out) is out
    assert out == (0 if function.startswith("log") else 1)


@EVERY
def test_out_of_foreign_byte_order(function):
    x = logits(3, 4)
    y = call(function, x)
    out = np.zeros(y.shape, ">f4")
    assert call(function, x, out=out) is out
    assert out.dtype == ">f4"
    np.testing.assert_array_equal(out, y)
    swapped = x.astype(">f4")
    if function not in REDUCING:
        assert call(function, swapped, out=swapped) is swapped
        np.testing.assert_array_equal(swapped, y)


@EVERY
def test_out_of_a_subclass(function, tmp_path):
    x = logits(3, 4)
    y = call(function, x)
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=y.shape)
    assert call(function, x, out=out) is out
    assert_same_bits(np.asarray(out), y)


@pytest.mark.parametrize("function", ELEMENTWISE)
@pytest.mark.parametrize("axis", [-1, 0, None, ()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(function, axis, dtype, isa):
    for order in "CF":
        x = np.array(logits(30, 50, dtype=dtype), order=order)
        y = call(function, x, axis)
        view = x[:]
        assert call(function, x, axis, out=view) is view  # the same memory, another object
        assert_same_bits(x, y)


def overlapping(name, n=60):
    """An array and a view of the same memory that is neither it nor apart from it."""
    memory = logits(4 * n + 8)
    cases = {
        "shifted forward": (memory[:n], memory[1 : n + 1]),
        "shifted backward": (memory[8 : n + 8], memory[:n]),
        "reversed": (memory[:n], memory[:n][::-1]),
        "stretched": (memory[:n], memory[: 2 * n : 2]),
        "squeezed": (memory[: 2 * n : 2], memory[:n]),
        "transposed": (memory[: n * 2].reshape(n // 6, 12), None),
        "bytes": (memory[:n], memory.view(np.uint8)[2 : 2 + 4 * n].view(np.float32)),
        "row of broadcast": (np.broadcast_to(memory[:12], (5, 12)), memory[:60].reshape(5, 12)),
        "interleaved": (memory[: 2 * n : 2], memory[1 : 2 * n : 2]),
    }
    x, out = cases[name]
    if name == "transposed":
        square = memory[:144].reshape(12, 12)
        return square, square.T
    return x, out


@pytest.mark.parametrize("function", ELEMENTWISE)
@pytest.mark.parametrize(
    "name",
    "shifted forward,shifted backward,reversed,stretched,squeezed,transposed,bytes,"
    "row of broadcast,interleaved".split(","),
)
def test_overlap_of_out_and_x_does_no_harm(function, name):
    x, out = overlapping(name)
    want = call(function, x.copy())
    assert call(function, x, out=out) is out
    assert_same_bits(np.ascontiguousarray(out), np.ascontiguousarray(want))


@EVERY
def test_overlap_of_out_and_options_does_no_harm(function):
    x = logits(5, 5)
    shape = call(function, x).shape
    for option in ("bias", "temperature"):
        value = np.abs(logits(5, 5, dtype=np.float64, seed=1)) + 1
        value = value if option == "bias" else value[:, :1]
        x64 = x.astype(np.float64)
        want = call(function, x64, **{option: value.copy()})
        out = value if value.shape == shape else (value if shape == (5, 5) else value[:, 0])
        if out.shape != shape:
            out = np.lib.stride_tricks.as_strided(value.base, shape, value.base.strides)
        assert call(function, x64, out=out, **{option: value}) is out
        assert_same_bits(np.ascontiguousarray(out), want)
    memory = np.zeros(100, np.uint8)
    out = memory.view(np.float32)[: int(np.prod(shape))].reshape(shape)
    where = memory[:25].view(bool).reshape(5, 5)
    where[:] = np.eye(5, dtype=bool) | (x > 0)
    want = call(function, x, where=where.copy())
    assert_same_bits(call(function, x, where=where, out=out), want)


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_out_that_overlaps_itself(function):
    x = logits(3, 4)
    row = np.zeros(4, np.float32)
    windows = np.lib.stride_tricks.as_strided(np.zeros(9, np.float32), (3, 4), (4, 4))
    for out in (np.lib.stride_tricks.as_strided(row, (3, 4), (0, 4)), windows):
        with pytest.raises(ValueError, match="out has elements that share memory"):
            call(function, x, out=out)
    woven = np.lib.stride_tricks.as_strided(np.zeros(20, np.float32), (4, 3), (8, 12))
    with pytest.raises(ValueError, match="share memory"):  # 3 steps of 8 bytes, 2 of 12
        call(function, x.T, out=woven)
    apart = np.lib.stride_tricks.as_strided(np.zeros(20, np.float32), (2, 3), (12, 8))
    assert_same_bits(
        np.ascontiguousarray(call(function, x[:2, :3], out=apart)), call(function, x[:2, :3])
    )


@EVERY
def test_out_of_the_wrong_kind(function):
    x = logits(3, 4)
    right = result_like(function, x)
    for dtype in (np.float64, np.float16, BF16, np.int32, np.complex64):
        with pytest.raises(TypeError, match=f"out has dtype {np.dtype(dtype)}.*float32"):
            call(function, x, out=right.astype(dtype))
    with pytest.raises(TypeError, match="out has dtype float32.*float64"):
        call(function, x, out=right, dtype=np.float64)
    with pytest.raises(TypeError, match="out has dtype float32.*float64"):
        call(function, [[1, 2], [3, 4]], out=right)
    for shape in ((3, 5), (4, 3), (12,), (1, 3, 4), ()):
        with pytest.raises(ValueError) as raised:
            call(function, x, out=np.zeros(shape, np.float32))
        assert str(shape) in str(raised.value) and str(right.shape) in str(raised.value)
    right.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        call(function, x, out=right)
    for bad in ([0.0] * 4, (right,), "out", np.float32(0), np.ma.zeros(right.shape, np.float32)):
        with pytest.raises(TypeError, match="out must be a numpy.ndarray"):
            call(function, x, out=bad)


@EVERY
def test_bad_input_leaves_out_alone(function):
    out = np.full(call(function, logits(3, 4)).shape, 7, np.float32)
    for options in ({"temperature": 0}, {"algorithm": "x"}, {"where": 1}, {"bias": "x"}):
        with pytest.raises((TypeError, ValueError)):
            call(function, logits(3, 4), out=out, **options)
    assert (out == 7).all()


@pytest.mark.parametrize("function", ELEMENTWISE)
def test_memory_that_cannot_be_allocated(function):
    huge = np.broadcast_to(np.float32(1), (2**46,))
    with pytest.raises(MemoryError, match="allocate"):
        call(function, huge)


# ---- plain calls ---------------------------------------------------------------------------------


def evaluate(function, x, axis=-1, *, evaluate=_api._evaluate, **options):
    """Call what stands behind a public function, by default the Python code that knows all."""
    defaults = {"temperature": 1.0, "bias": None, "where": None, "dtype": None, "out": None}
    defaults |= {"algorithm": "auto", "keepdims": False}
    return evaluate(_core.functions[function], x, axis, *(defaults | options).values())


def is_plain(function, x, axis=-1, **options):
    """Tell whether the compiled module computes the call without the Python code."""
    reached = []
    call = _core.with_plain_calls(
        lambda *arguments: reached.append(arguments), _runtime.chosen_isa, _runtime.chosen_threads
    )
    evaluate(function, x, axis, evaluate=call, **options)
    return not reached


def outcome(call, out=None):
    """Describe all that a caller can see."""
    try:
        y = call()
    except Exception as error:
        return type(error), str(error)
    fresh = out is None
    seen = [type(y), y.dtype, y.dtype.metadata, y.shape, y.tobytes(), _core.last_report()]
    if isinstance(y, np.ndarray) and fresh:
        seen += [y.strides, str(y.flags), y.base is None]
    return [*seen, fresh or y is out]


def twice(make, function, axis=-1, **options):
    """Make x and out anew for the public function and for the Python code; compare."""
    outcomes = []
    for through in (call, evaluate):
        x, out = make()
        outcomes.append(
            outcome(lambda f=through, x=x, out=out: f(function, x, axis, out=out, **options), out)
        )
    assert outcomes[0] == outcomes[1]


INPUTS = {
    **{f"{dtype}": lambda dtype=dtype: logits(6, 8, dtype=dtype) for dtype in DTYPES},
    "one row": lambda: logits(8),
    "one element": lambda: logits(1),
    "length 1 in front": lambda: logits(1, 8),
    "length 1 behind": lambda: logits(8, 1),
    "odd stride of length 1": lambda: np.lib.stride_tricks.as_strided(logits(8), (1, 8), (12, 4)),
    "three axes": lambda: logits(3, 4, 5),
    "many axes": lambda: logits(*[1, 2] * 8),
    "more than keeps the GIL": lambda: logits(5, 1 << 14),
    "special values": lambda: np.array([[np.nan, 1], [np.inf, 1], [-np.inf] * 2], np.float32),
    "unpickled": lambda: pickle.loads(pickle.dumps(logits(6, 8))),
    "metadata": lambda: logits(6, 8).astype(np.dtype("f4", metadata={"unit": "nat"})),
    "read-only": lambda: np.frombuffer(logits(48).tobytes(), np.float32).reshape(6, 8),
    "Fortran order": lambda: np.asfortranarray(logits(6, 8)),
    "transposed": lambda: logits(4, 5, 6).transpose(1, 0, 2),
    "strided": lambda: logits(6, 16)[:, ::2],
    "reversed": lambda: logits(6, 8)[::-1],
    "broadcast": lambda: np.broadcast_to(logits(8), (6, 8)),
    "misaligned": lambda: np.frombuffer(bytes(193), np.uint8)[1:].view("f4").reshape(6, 8),
    "other byte order": lambda: logits(6, 8).astype(logits(1).dtype.newbyteorder()),
    "subclass": lambda: logits(6, 8).view(np.recarray),
    "masked": lambda: np.ma.array(logits(6, 8)),
    "0-d": lambda: logits(1)[0, ...],
    "scalar": lambda: np.float32(3),
    "no element": lambda: logits(0),
    "no row": lambda: logits(0, 8),
    "no column": lambda: logits(8, 0),
    "integers": lambda: np.arange(48).reshape(6, 8),
    "bool": lambda: logits(6, 8) > 0,
    "longdouble": lambda: logits(6, 8).astype("g"),
    "complex": lambda: logits(6, 8).astype("F"),
    "list": lambda: [[1.0, 2.0], [3.0, 4.0]],
}
PLAIN_INPUTS = list(itertools.takewhile(lambda name: name != "Fortran order", INPUTS))
ODD_AXES = [-3, 2, 2**70, (), (0,), (-1, 0), np.int64(0), True, np.True_, 1.0, "0", [0]]


@EVERY
@pytest.mark.parametrize("name", INPUTS)
def test_plain_calls_equal_all_others(function, name, isa):
    for axis in (-1, 0, 1, -2, None, *ODD_AXES):
        for keepdims in (False, True) if function in REDUCING else (None,):
            options = {} if keepdims is None else {"keepdims": keepdims}
            twice(lambda: (INPUTS[name](), None), function, axis, **options)


OPTIONS = {
    "temperature": [1, True, np.float64(1), np.float32(2), 0.0, -0.0, -1.0, np.nan, np.inf, None]
    + ["1", [1.0], np.ones((1, 1)), np.ones((6, 1), np.float16), np.ones((6, 1), np.int64)]
    + [np.zeros((6, 1)), np.full((6, 1), np.nan, np.float32), np.ones((6, 8)), np.ones(7)]
    + [np.ones((12, 1))[::2], np.ones((1, 6, 1)), np.ones((6, 1)).astype(">f8")],
    "bias": [0.0, "x", logits(6, 16)[:, ::2], logits(7), logits(1, 6, 8), np.ones((6, 8), bool)]
    + [np.ones((6, 8), np.int32)],
    "where": [True, 1, np.ones((6, 8), np.uint8), np.ones((8, 6), bool).T, np.ones((1, 6, 8), bool)]
    + [np.ones((6, 16), bool)[:, ::2], np.ones((8, 6), bool), [[True] * 8] * 6],
    "dtype": ["f4", np.float64, np.float16, BF16, ">f4", "i4"],
    "algorithm": ["two_pass", "AUTO", "", None, b"auto", np.str_("auto")],
}


# Of rows of 8 elements: what plain calls take beside the defaults.
PLAIN_OPTIONS = {
    "temperature": [0.7, 2.0, 1e300, 1e-310, 5e-324, np.arange(1.0, 7).reshape(6, 1)]
    + [np.geomspace(1e-30, 1e30, 6, dtype=np.float32)[:, None]],
    "bias": [logits(8), logits(6, 1), logits(6, 8), logits(6, 8, dtype="f8"), logits(1, dtype=BF16)]
    + [logits(6, 8, dtype="f2"), np.full((6, 8), -np.inf, np.float32)],
    "where": [np.arange(48).reshape(6, 8) % 5 > 1, np.arange(48).reshape(6, 8) > 11]
    + [np.arange(8) > 3, np.arange(6)[:, None] > 2, np.zeros((), bool), np.ones(1, bool)],
}


@EVERY
@pytest.mark.parametrize("axis", [-1, 0, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_calls_take_options_as_all_others(function, axis, dtype):
    def arrays():
        return logits(6, 8, dtype=dtype), None

    for temperature in [*PLAIN_OPTIONS["temperature"], np.geomspace(0.1, 8, 8)]:
        twice(arrays, function, axis, temperature=temperature)
        for mask in PLAIN_OPTIONS["where"]:
            twice(arrays, function, axis, temperature=temperature, where=mask)
            twice(lambda: (logits(6, 8), logits(6, 8, seed=1)), function, axis, where=mask)
    for bias in PLAIN_OPTIONS["bias"]:
        twice(arrays, function, axis, bias=bias)
        twice(arrays, function, axis, bias=bias, temperature=0.7, where=np.arange(8) > 3)


@EVERY
@pytest.mark.parametrize("option", PLAIN_OPTIONS)
def test_plain_calls_write_nothing_that_they_read(function, option):
    """Where out shares memory with an option, the result is that of arrays apart."""
    if option == "where":
        memory = np.zeros(48 * 4 + 48, np.uint8)
        given = memory[96:144].view(bool).reshape(6, 8)
        given[:] = np.arange(48).reshape(6, 8) % 3 > 0
        outs = [memory[:192].view(np.float32)]
    else:
        memory = np.linspace(0.5, 2, 96, dtype=np.float32)
        given = (
            memory[40:46].reshape(6, 1) if option == "temperature" else memory[40:88].reshape(6, 8)
        )
        outs = [memory[:48], memory[40:88], memory[45:93]]
    x = logits(6, 8)
    expected = call(function, x, **{option: given.copy()})
    before = memory.copy()
    for out in outs:
        memory[:] = before
        out = out.reshape(6, 8)[:, 0] if function in REDUCING else out.reshape(6, 8)
        assert np.array_equal(call(function, x, out=out, **{option: given}), expected)


@EVERY
@pytest.mark.parametrize(("option", "value"), [(k, v) for k in OPTIONS for v in OPTIONS[k]])
def test_plain_calls_leave_options_to_all_others(function, option, value):
    twice(lambda: (logits(6, 8), None), function, **{option: value})
    if function in REDUCING:
        for keepdims in (0, 1, np.True_, "yes", None, np.ones(2)):
            twice(lambda: (logits(6, 8), None), function, keepdims=keepdims)


def shared(size, first, second):
    """Two overlapping pieces of the same memory."""
    memory = logits(size)
    return tuple(memory[start : start + 48].reshape(6, 8) for start in (first, second))


def in_place(x):
    return x, x


def read_only(x):
    x.flags.writeable = False
    return x


OUTS = {
    "apart": lambda: (logits(6, 8), logits(6, 8, seed=1)),
    "x": lambda: in_place(logits(6, 8)),
    "read-only x": lambda: in_place(read_only(logits(6, 8))),
    "the same memory": lambda: shared(48, 0, 0),
    "just after": lambda: shared(96, 0, 48),
    "just before": lambda: shared(96, 48, 0),
    "a bit after": lambda: shared(95, 0, 47),
    "a bit before": lambda: shared(95, 47, 0),
    "reversed": lambda: (lambda x: (x, x[::-1]))(logits(6, 8)),
    "transposed": lambda: (lambda x: (x, x.T))(logits(8, 8)),
    "Fortran order": lambda: (logits(6, 8), np.asfortranarray(logits(6, 8))),
    "strided": lambda: (logits(6, 8), logits(6, 16)[:, ::2]),
    "read-only": lambda: (logits(6, 8), read_only(logits(6, 8))),
    "warns when written": lambda: (logits(1, 8), np.broadcast_arrays(logits(8), logits(1, 8))[0]),
    "subclass": lambda: (logits(6, 8), logits(6, 8).view(np.recarray)),
    "masked": lambda: (logits(6, 8), np.ma.array(logits(6, 8))),
    "other byte order": lambda: (logits(6, 8), logits(6, 8).astype(">f4")),
    "other dtype": lambda: (logits(6, 8), logits(6, 8).astype("f8")),
    "other shape": lambda: (logits(6, 8), logits(8, 6)),
    "longer": lambda: (logits(6, 8), logits(6, 9)),
    "more axes": lambda: (logits(6, 8), logits(1, 6, 8)),
    "fewer axes": lambda: (logits(6, 8), logits(48)),
    "result of logsumexp": lambda: (logits(6, 8), logits(6)),
    "with keepdims": lambda: (logits(6, 8), logits(6, 1)),
    "first of x": lambda: (lambda x: (x, x[0, :6]))(logits(6, 8)),
    "rows of x": lambda: (lambda x: (x, x[:, :1]))(logits(6, 8)),
    "0-d": lambda: (logits(8), np.array(np.float32(0))),
    "0-d in x": lambda: (lambda x: (x, x[0, ...]))(logits(8)),
    "list": lambda: (logits(6, 8), [0.0] * 8),
}


@EVERY
@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize("axis", [-1, 0, None])
def test_plain_calls_take_out_as_all_others(function, name, axis):
    for keepdims in (False, True) if function in REDUCING else (None,):
        twice(OUTS[name], function, axis, **({} if keepdims is None else {"keepdims": keepdims}))


@EVERY
def test_which_calls_are_plain(function):
    sml.softmax(np.ones(1, BF16))  # BF16 is known from now on, and so are the settings
    for name in PLAIN_INPUTS:
        for axis in (-1, 0, None):
            assert is_plain(function, INPUTS[name](), axis), name
    for name in set(INPUTS) - set(PLAIN_INPUTS):
        assert not is_plain(function, INPUTS[name]()), name
    x = logits(6, 8)
    for axis in ODD_AXES:
        assert not is_plain(function, x, axis), axis
    assert is_plain(function, x, algorithm="".join(("au", "to")))  # not the default's object
    for option, values in OPTIONS.items():
        for value in values:
            assert not is_plain(function, x, **{option: value}), (option, value)
    for option, values in PLAIN_OPTIONS.items():
        for value in values:
            assert is_plain(function, x, **{option: value}), (option, value)
            out = logits(6) if function in REDUCING else logits(6, 8)
            assert is_plain(function, x, out=out, **{option: value})
    for name in (
        "apart",
        "just after",
        "just before",
        *(["x"] if function not in REDUCING else []),
    ):
        x, out = OUTS[name]()
        assert is_plain(function, x, out=out if function not in REDUCING else out[:, 0].copy())


GRADIENTS = {"softmax": sml.softmax_backward, "log_softmax": sml.log_softmax_backward}


def gradient_twice(function, grad, y, axis=-1, temperature=1.0, where=None, out=None):
    """Compare a gradient's public function with the Python code; return whether it was plain."""
    reached = []

    def python_code(*arguments):
        reached.append(arguments)
        return _gradients._evaluate(*arguments)

    through = _core.with_plain_gradients(python_code, _runtime.chosen_isa, _runtime.chosen_threads)
    arguments = (_core.functions[function], grad, y, axis, temperature, where, out)
    named = {"axis": axis, "temperature": temperature, "where": where, "out": out}
    outcomes = [
        outcome(lambda: GRADIENTS[function](grad, y, **named)),
        outcome(lambda: _gradients._evaluate(*arguments)),
        outcome(lambda: through(*arguments)),
    ]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    return not reached


@pytest.mark.parametrize("function", GRADIENTS)
@pytest.mark.parametrize("name", INPUTS)
def test_plain_gradients_equal_all_others(function, name, isa):
    grad, y = INPUTS[name](), INPUTS[name]()
    for axis in (-1, 0, 1, None, *ODD_AXES):
        gradient_twice(function, grad, y, axis)
        gradient_twice(function, logits(6, 8), y, axis)
        gradient_twice(function, grad, logits(6, 8, dtype=BF16), axis)
    sml.softmax(np.ones(1, BF16))  # as below
    assert gradient_twice(function, grad, y) == (name in PLAIN_INPUTS)


@pytest.mark.parametrize("function", GRADIENTS)
def test_which_gradients_are_plain(function):
    grad, y = logits(6, 8), sml.softmax(logits(6, 8, seed=1))
    for option in ("temperature", "where"):
        for value in PLAIN_OPTIONS[option]:
            assert gradient_twice(function, grad, y, **{option: value})
            assert gradient_twice(function, grad, y, **{option: value}, out=np.zeros_like(y))
        for value in OPTIONS[option]:
            assert not gradient_twice(function, grad, y, **{option: value})
    assert gradient_twice(function, grad, y, out=np.zeros_like(y))
    read_only = np.zeros_like(y)
    read_only.flags.writeable = False
    for out in (
        np.zeros((6, 9), np.float32),
        np.zeros((6, 8)),
        np.zeros((8, 6), np.float32).T,
        read_only,
        [0.0],
    ):
        assert not gradient_twice(function, grad, y, out=out)
    assert not gradient_twice(function, logits(6, 9), y)
    assert not gradient_twice(function, logits(6, 8, dtype="f8"), y)
    with sml.threads(2):
        assert gradient_twice(function, logits(512, 256), sml.softmax(logits(512, 256)))


def loss_twice(x, target, **options):
    """Compare cross_entropy with its Python code; return whether it was plain."""
    reached = []

    def python_code(*arguments):
        reached.append(arguments)
        return _losses._evaluate(*arguments)

    through = _core.with_plain_losses(python_code, _runtime.chosen_isa, _runtime.chosen_threads)
    defaults = {
        "axis": -1,
        "activation": "softmax",
        "label_smoothing": 0.0,
        "weight": None,
        "ignore_index": -100,
        "reduction": "mean",
        "temperature": 1.0,
        "where": None,
        "return_grad": False,
        "out": None,
        "grad_out": None,
    }
    arguments = (x, target, *(defaults | options).values())
    outcomes = [
        parts(lambda: sml.cross_entropy(x, target, **options)),
        parts(lambda: _losses._evaluate(*arguments)),
        parts(lambda: through(*arguments)),
    ]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    return not reached


def parts(call):
    """The outcome of a call that may return a tuple."""
    result = []

    def first():
        found = call()
        result.extend(found if isinstance(found, tuple) else (found,))
        return result[0]

    return [outcome(first), *(outcome(lambda one=one: one) for one in result[1:])]


@pytest.mark.parametrize("activation", ["softmax", "stablemax"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("return_grad", [False, True])
def test_plain_losses_equal_all_others(activation, reduction, return_grad, isa):
    options = {"activation": activation, "reduction": reduction, "return_grad": return_grad}
    target = np.array([0, 7, 3, -100, 2, 5])
    for name in INPUTS:
        for axis in (-1, 0, 1, None, *ODD_AXES):
            loss_twice(INPUTS[name](), target, axis=axis, **options)
    sml.softmax(np.ones(1, BF16))  # bfloat16 is known from here on
    for dtype in ("f2", "f4", "f8", BF16):
        assert loss_twice(logits(6, 8, dtype=dtype), target, **options)
        assert loss_twice(logits(6, 8, dtype=dtype), target % 8, ignore_index=7, **options)
        assert loss_twice(logits(2, 3, 8, dtype=dtype), target.reshape(2, 3), **options)
        assert loss_twice(logits(8, dtype=dtype), np.array(3), **options)
        assert loss_twice(logits(6, 8, dtype=dtype), target, temperature=0.5, **options)
    with sml.threads(2):
        assert loss_twice(logits(512, 256), np.arange(512) % 256, **options)


def test_which_losses_are_plain():
    x, target = logits(6, 8), np.array([0, 7, 3, -100, 2, 5])
    for options in (
        {"axis": 0},
        {"axis": np.int64(-1)},
        {"axis": None},
        {"activation": "max"},
        {"activation": None},
        {"label_smoothing": 0.1},
        {"label_smoothing": -0.0},
        {"label_smoothing": 0},
        {"label_smoothing": 2.0},
        {"weight": np.ones(8)},
        {"ignore_index": 2**70},
        {"ignore_index": 1.5},
        {"ignore_index": True},
        {"reduction": "average"},
        {"reduction": None},
        {"temperature": 2},
        {"temperature": 0.0},
        {"temperature": np.ones((6, 1))},
        {"where": np.ones((6, 8), bool)},
        {"return_grad": 1},
        {"out": np.zeros((), np.float32)},
        {"grad_out": np.zeros((6, 8), np.float32)},
        {"grad_out": np.zeros((6, 8), np.float32), "return_grad": True},
    ):
        assert not loss_twice(x, target, **options), options
    for wrong in (
        target.astype(np.int32),
        target.astype(">i8"),
        target.astype(np.uint64),
        target[::-1],
        target[:5],
        list(target),
        target.reshape(6, 1),
        sml.softmax(x),
        np.array([0, 8, 3, -100, 2, 5]),
        np.array([0, -1, 3, -100, 2, 5]),
    ):
        assert not loss_twice(x, wrong), wrong
    assert not loss_twice(x[:, ::2], target % 4)
    assert not loss_twice(x[:0], target[:0])
    assert not loss_twice(x.tolist(), target)


@pytest.mark.parametrize("function", GRADIENTS)
def test_gradients_in_memory_of_arguments(function):
    for shape in ((6, 8), (3, 5000)):
        grad, y = logits(*shape), sml.softmax(logits(*shape, seed=1))
        want = GRADIENTS[function](grad, y)
        for place in (0, 1):
            both = [grad.copy(), y.copy()]
            got = GRADIENTS[function](*both, out=both[place])
            assert got is both[place]
            np.testing.assert_array_equal(got, want)
        # Memory that a result shares with what it is made of, without being it.
        for place in (0, 1):
            memory = np.zeros(grad.size + 4, np.float32)
            both = [grad, y]
            both[place] = memory[:-4].reshape(shape)
            np.copyto(both[place], (grad, y)[place])
            got = GRADIENTS[function](*both, out=memory[4:].reshape(shape))
            np.testing.assert_array_equal(got, want)


@EVERY
@pytest.mark.parametrize("shape", [(8,), (6, 8)], ids=str)
def test_plain_calls_keep_no_reference(function, shape):
    x = logits(*shape)
    result = np.zeros_like(call(function, x))
    held = (x, x.dtype, np.float32, result, x.shape)

    def counts():
        return [sys.getrefcount(thing) for thing in held]

    before = counts()
    for _ in range(100):
        y = call(function, x)
        if shape != (8,) or function not in REDUCING:
            call(function, x, out=result)
        with pytest.raises(AxisError):
            call(function, x, 7)
    other = np.zeros(1)
    assert sys.getrefcount(y) == sys.getrefcount(other)
    del y
    assert counts() == before


def test_no_framework_is_imported():
    """softmaxlib.torch and softmaxlib.jax are imported by name only."""
    code = "import softmaxlib, sys; print(sorted({'torch', 'jax'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
