"""What callers pass, as the plain arrays and codes that the compiled module reads."""

from __future__ import annotations

import numbers
import operator
import struct
import sys
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from softmaxlib import _core

try:
    from numpy.exceptions import AxisError
except ImportError:  # NumPy < 1.25
    from numpy import AxisError  # type: ignore[attr-defined, no-redef]

Array: TypeAlias = NDArray[Any]
Axes: TypeAlias = tuple[int, ...]

_MAX_NDIM = 64 if int(np.__version__.partition(".")[0]) >= 2 else 32
_FLOATS = "float16, bfloat16, float32 or float64"
_LAST_FLOAT_CODE = max(_core.dtypes[name] for name in ("float16", "bfloat16", "float32", "float64"))
_BOOL = _core.dtypes["bool"]
_FLOAT64 = np.dtype(np.float64)
_codes: dict[np.dtype[Any], int] = {
    np.dtype(name): code for name, code in _core.dtypes.items() if name != "bfloat16"
}


def dtype_code(dtype: np.dtype[Any]) -> int | None:
    """Return the compiled module's code of a native dtype, None where it has none."""
    code = _codes.get(dtype)
    if code is None and dtype.name == "bfloat16":  # ml_dtypes, known only once it is met
        code = _codes[dtype] = _core.dtypes["bfloat16"]
        _core.known.bfloat16 = dtype.num
    return code


def is_float(code: int) -> bool:
    """Tell whether a code is one of the four floating dtypes."""
    return code <= _LAST_FLOAT_CODE


def as_array(name: str, value: Any, *, has_where: bool = False) -> Array:
    """Return the value as a base-class ndarray, without a copy where it has memory to share.

    has_where: whether the argument ``where`` may say which of its elements take part.
    """
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        instead = (
            f"pass {name}.data, and its mask as where=~mask"
            if has_where
            else f"pass {name}.filled(...) with what its masked elements stand for"
        )
        raise TypeError(f"{name} is a masked array, and its mask would be lost: {instead}")
    torch = sys.modules.get("torch")
    if isinstance(value, getattr(torch, "Tensor", ())):
        assert torch is not None
        value = _plain_tensor(name, value)
        if type(value) in (torch.Tensor, torch.nn.Parameter):  # others' memory need not be theirs
            try:  # Tensor.numpy would forbid for ever that the tensor's storage is resized
                return np.asarray(np.from_dlpack(value))
            except Exception:
                pass  # bfloat16, or bool in an old NumPy
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.asarray(np.from_dlpack(value))
        return np.asarray(value)
    except Exception as error:
        if type(error).__module__.startswith("jax"):  # in jit, grad or vmap: without values yet
            message = f"{name} is traced by JAX: use the functions of softmaxlib.jax"
            raise TypeError(message) from None
        if not hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            raise  # a ragged list, say: NumPy's own words are the best
        try:
            return _bfloat16_tensor(value)
        except Exception:
            raise TypeError(
                f"{name} ({type(value).__name__}) cannot be read as an array in CPU memory: {error}"
            ) from error


def _plain_tensor(name: str, tensor: Any) -> Any:
    """Return torch's tensor as one whose memory holds its elements, or say what to pass instead."""
    if tensor.requires_grad:
        raise TypeError(
            f"{name} is a torch.Tensor that requires grad, and an array has no gradient: "
            f"use the functions of softmaxlib.torch, or pass {name}.detach()"
        )
    if tensor.device.type != "cpu":
        raise TypeError(
            f"{name} is a torch.Tensor on {tensor.device}; it must be in CPU memory"
            + ("" if tensor.is_meta else f": pass {name}.cpu()")
        )
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested torch.Tensor; it must be dense")
    if str(tensor.layout) != "torch.strided":
        raise TypeError(
            f"{name} is a torch.Tensor of layout {tensor.layout}; it must be dense: "
            f"pass {name}.to_dense()"
        )
    return tensor.resolve_conj().resolve_neg()


def _bfloat16_tensor(value: Any) -> Array:
    """Import a bfloat16 tensor, such as torch's, which NumPy refuses."""
    bits = _core.bfloat16_from_dlpack(value)
    import ml_dtypes

    return bits.view(ml_dtypes.bfloat16)


def native(array: Array) -> Array:
    """Return the array in native byte order, itself where it is."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def as_input(name: str, value: Any, *, has_where: bool = False) -> tuple[Array, int]:
    """Return the value as a native array of a dtype that can be read, and the dtype's code."""
    array = as_array(name, value, has_where=has_where)
    code = _codes.get(array.dtype)
    if code is None:  # another byte order, bfloat16 met for the first time, or nothing we read
        array = native(array)
        code = dtype_code(array.dtype)
    if code is None:
        raise TypeError(
            f"{name} has dtype {array.dtype}; it must be {_FLOATS}, an integer type or bool"
        )
    return array, code


def result_dtype(dtype: Any, x_dtype: np.dtype[Any], x_code: int) -> tuple[np.dtype[Any], int]:
    """Return the dtype of the result and its code."""
    if dtype is None:
        return (x_dtype, x_code) if is_float(x_code) else (_FLOAT64, _codes[_FLOAT64])
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise TypeError("dtype 'bfloat16' needs the package ml_dtypes") from None
        dtype = ml_dtypes.bfloat16
    try:
        wanted = np.dtype(dtype).newbyteorder("=")
    except TypeError:
        raise TypeError(f"dtype must be {_FLOATS}, got {dtype!r}") from None
    code = dtype_code(wanted)
    if code is None or not is_float(code):
        raise TypeError(f"dtype must be {_FLOATS}, got {wanted}")
    return wanted, code


def _normalize_axis(axis: Any, ndim: int) -> int:
    if isinstance(axis, (bool, np.bool_)):
        raise TypeError("axis must be an integer, a tuple of integers or None, got a bool")
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(
            f"axis must be an integer, a tuple of integers or None, got {axis!r}"
        ) from None
    limit = max(ndim, 1)  # as in NumPy, a scalar accepts the axes of a vector
    if not -limit <= index < limit:
        raise AxisError(index, ndim)
    return index % limit


def normalize_axes(axis: Any, ndim: int) -> Axes:
    """Return the axes as distinct numbers from 0; none where every element stands alone."""
    if type(axis) is int and -ndim <= axis < ndim:  # nearly every call
        return (axis % ndim,)
    if axis is None:
        return tuple(range(ndim))
    axes = (
        tuple(_normalize_axis(a, ndim) for a in axis)
        if isinstance(axis, tuple)
        else (_normalize_axis(axis, ndim),)
    )
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis {axis} repeats an axis of an array of {ndim} dimensions")
    if not axes and ndim >= _MAX_NDIM:  # there would be one axis more, of length 1
        raise ValueError(
            f"axis () takes an array of at most {_MAX_NDIM - 1} dimensions, got one of {ndim}"
        )
    return axes if ndim else ()


def one_axis(name: str, axis: Any, ndim: int) -> int:
    """Return the one axis of a function along an axis, from 0."""
    if ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")
    if axis is None or isinstance(axis, tuple):
        raise TypeError(f"axis must be an integer, got {axis!r}")
    return normalize_axes(axis, ndim)[0]


def as_integer(name: str, value: Any, low: int, high: int | None) -> int:
    """Return an integer within its bounds."""
    if type(value) is int and low <= value and (high is None or value <= high):
        return value  # nearly every call
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}, the length of axis"
        if high == low:
            bounds = f"{low}, the length of axis"
        raise ValueError(f"{name} must be {bounds}; got {number}")
    return number


def as_number(name: str, value: Any) -> float:
    """Return a real number."""
    if type(value) is float:  # nearly every call
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite; the integer given is beyond float64") from None


def _check_broadcasts(name: str, array: Array, shape: Axes) -> None:
    surplus = array.ndim - len(shape)
    if surplus > 0 or any(
        have not in (1, want) for have, want in zip(array.shape, shape[-surplus:], strict=True)
    ):
        raise ValueError(
            f"{name} of shape {array.shape} does not broadcast to the shape {shape} of x"
        )


def as_doubles(array: Array, code: int) -> Array:
    """Return a readable array as float64, converted by the library itself.

    NumPy converts in the caller's floating-point mode, which may take a subnormal for 0, round in
    another direction or trap what is inexact.
    """
    if array.dtype == _FLOAT64:
        return array
    doubles = _core.with_kept_memory(8 * array.size, lambda: np.empty(array.shape))
    # As one row: of temperatures the last axis has but one element.
    _core.convert(array.reshape(-1), doubles.reshape(-1), code, _codes[_FLOAT64])
    return doubles


# Ranges are checked by bits, too: where subnormals are taken for 0, none is positive, and where
# exceptions are trapped, comparing with NaN ends the process.
_LARGEST = 0x7FEF_FFFF_FFFF_FFFF  # the bits of the largest finite number
_SIGN = 1 << 63
_ONE = 0x3FF0_0000_0000_0000


_pack, _unpack = struct.Struct("d").pack, struct.Struct("Q").unpack


def _bits(number: float) -> int:
    bits: int = _unpack(_pack(number))[0]
    return bits


def in_unit_interval(number: float, *, or_zero: bool = True) -> bool:
    """Tell whether a number is from 0 to 1, or above 0 and at most 1."""
    bits = _bits(number)
    return (bits <= _ONE and (or_zero or bits > 0)) or (or_zero and bits == _SIGN)


def as_temperature(value: Any, shape: Axes, axes: Axes) -> tuple[float, Array | None]:
    """Return a scalar temperature, or 1.0 and an array of temperatures, checked."""
    if type(value) is float or type(value) is int:
        number = as_number("temperature", value)
        if 0 < _bits(number) <= _LARGEST:
            return number, None
        raise ValueError(f"temperature must be positive and finite, got {value}")
    array, code = as_input("temperature", value)
    if code == _BOOL:
        raise TypeError("temperature has dtype bool; it must be a real number")
    _check_broadcasts("temperature", array, shape)
    offset = len(shape) - array.ndim
    if any(axis >= offset and array.shape[axis - offset] != 1 for axis in axes):
        raise ValueError(
            f"temperature of shape {array.shape} varies along axis {axes} of x of shape {shape}: "
            "it must have length 1 there"
        )
    temperatures = as_doubles(array, code)
    bits = temperatures.view(np.uint64)  # two passes, and no memory for what they find
    if bits.size and not (0 < int(bits.min()) and int(bits.max()) <= _LARGEST):
        bad = temperatures[bits - np.uint64(1) >= np.uint64(_LARGEST)]  # 0 becomes the largest
        raise ValueError(f"temperature must be positive and finite, got {bad.flat[0]}")
    return (float(temperatures.item()), None) if array.size == 1 else (1.0, temperatures)


def as_bias(value: Any, shape: Axes) -> tuple[Array, int]:
    """Return the bias as a floating array that broadcasts to shape, and its dtype's code."""
    array, code = as_input("bias", value)
    if code == _BOOL:
        raise TypeError("bias has dtype bool; a boolean mask goes to where")
    _check_broadcasts("bias", array, shape)
    return (array, code) if is_float(code) else (as_doubles(array, code), _codes[_FLOAT64])


def as_weight(value: Any, n: int) -> NDArray[np.float64]:
    """Return the weights of n classes, finite and not negative, as contiguous doubles."""
    array, code = as_input("weight", value)
    if code == _BOOL:
        raise TypeError("weight has dtype bool; it must be a real number")
    if array.shape != (n,):
        raise ValueError(
            f"weight has shape {array.shape}; it must have the shape ({n},): a class each"
        )
    weights = np.ascontiguousarray(as_doubles(array, code))
    bits = weights.view(np.uint64)
    bad = (bits > np.uint64(_LARGEST)) & (bits != np.uint64(_SIGN))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"weight must be finite and not negative, got {weights[i]} of class {i}")
    return weights


def as_where(value: Any, shape: Axes) -> Array:
    """Return the mask as a boolean array that broadcasts to shape."""
    array = as_array("where", value)
    if array.dtype != np.bool_:
        raise TypeError(f"where has dtype {array.dtype}; it must be bool")
    _check_broadcasts("where", array, shape)
    return array


def check_out(out: Any, shape: Axes, dtype: np.dtype[Any], name: str = "out") -> Array:
    """Return out as a base-class array, or say why it cannot take the result."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a numpy.ndarray, got {type(out).__name__}")
    if out.dtype != dtype and out.dtype.newbyteorder("=") != dtype:
        raise TypeError(f"{name} has dtype {out.dtype}; the result has dtype {dtype}")
    if out.shape != shape:
        raise ValueError(f"{name} has shape {out.shape}; the result has shape {shape}")
    if not out.flags.writeable:
        raise ValueError(f"{name} is read-only; it must be writeable")
    if _overlaps_itself(out):
        raise ValueError(f"{name} has elements that share memory; each must have its own")
    return out if type(out) is np.ndarray else np.asarray(out)


def _overlaps_itself(array: Array) -> bool:
    if array.flags.c_contiguous or array.flags.f_contiguous or array.size < 2:
        return False
    steps = sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1)
    span = array.itemsize
    for step, n in steps:
        if step < span:
            break
        span += step * (n - 1)
    else:
        return False  # every dimension steps over all smaller ones: the usual case
    offsets = np.zeros((), np.intp)
    for step, n in steps:
        offsets = np.add.outer(offsets, step * np.arange(n))
    return bool(np.diff(np.sort(offsets, axis=None)).min() < array.itemsize)


def is_apart(out: Array, *others: Array | None) -> bool:
    """Tell whether out is native and apart from all of these, so that a result can go there."""
    return out.dtype.isnative and not any(
        other is not None and np.may_share_memory(out, other) for other in others
    )


def can_write_directly(out: Array, x: Array, *others: Array | None) -> bool:
    """Tell the same where the result, of the shape of x, may also take its place."""
    return is_apart(out, *others) and (
        out is x or not np.may_share_memory(out, x) or _is_same_view(out, x)
    )


def _is_same_view(a: Array, b: Array) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.strides == b.strides
        and a.__array_interface__["data"] == b.__array_interface__["data"]
    )
