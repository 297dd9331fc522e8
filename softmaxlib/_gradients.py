"""Gradients: vector-Jacobian products of the functions of _api.py."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from softmaxlib import _core, _runtime
from softmaxlib._arrays import (
    as_input,
    as_temperature,
    as_where,
    can_write_directly,
    check_out,
    is_float,
    normalize_axes,
)

Axis: TypeAlias = int | tuple[int, ...] | None
_SOFTMAX = _core.functions["softmax"]
_LOG_SOFTMAX = _core.functions["log_softmax"]
_NAMES = {code: name for name, code in _core.functions.items()}


def softmax_backward(
    grad: ArrayLike,
    y: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `softmax` with respect to x.

    Parameters
    ----------
    grad : array_like
        Gradient of a scalar with respect to the result, of the shape of y. Floating.
    y : array_like
        The result of the forward call: float16, bfloat16, float32 or float64.
    axis : int, tuple of int or None, default -1
        As in the forward call.
    temperature : float or array_like, default 1.0
        As in the forward call.
    where : array_like of bool, optional
        As in the forward call; where False, the gradient is 0.
    out : ndarray, optional
        Takes the result; of its shape and dtype; may be any of the arguments.

    Returns
    -------
    ndarray
        Gradient with respect to x: ``y * (grad - sum(y * grad)) / temperature``. Of the shape and
        dtype of y.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As the forward function; also if shapes differ.

    Notes
    -----
    The error is at most 5 ULP of ``y (|grad| + sum |y grad|)`` in float32, 8 ULP in float64, 0.5 +
    2^-10 ULP in float16 and bfloat16. Exactly 0 where y is 0, whatever grad holds there. The same
    bits on every instruction set, number of threads and layout.
    """
    return _call(_SOFTMAX, grad, y, axis, temperature, where, out)


def log_softmax_backward(
    grad: ArrayLike,
    log_y: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `log_softmax` with respect to x.

    Parameters
    ----------
    grad : array_like
        Gradient of a scalar with respect to the result, of the shape of log_y. Floating.
    log_y : array_like
        The result of the forward call: float16, bfloat16, float32 or float64.
    axis : int, tuple of int or None, default -1
        As in the forward call.
    temperature : float or array_like, default 1.0
        As in the forward call.
    where : array_like of bool, optional
        As in the forward call; where False, the gradient is 0.
    out : ndarray, optional
        Takes the result; of its shape and dtype; may be any of the arguments.

    Returns
    -------
    ndarray
        Gradient with respect to x: ``(grad - exp(log_y) * sum(grad)) / temperature``. Of the shape
        and dtype of log_y.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As the forward function; also if shapes differ.

    Notes
    -----
    The error is at most 4 ULP of ``|grad| + exp(log_y) sum |grad|`` in float32, 8 ULP in float64,
    0.5 + 2^-10 ULP in float16 and bfloat16. Exactly 0 where log_y is -inf, whatever grad holds
    there. The same bits on every instruction set, number of threads and layout.
    """
    return _call(_LOG_SOFTMAX, grad, log_y, axis, temperature, where, out)


def logsumexp_backward(
    grad: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `logsumexp` with respect to x.

    Parameters
    ----------
    grad : array_like
        Gradient of a scalar with respect to the result, of the shape of y. Floating.
    x : array_like
        The argument of the forward call.
    y : array_like
        The result of the forward call, with or without keepdims.
    axis : int, tuple of int or None, default -1
        As in the forward call.
    temperature : float or array_like, default 1.0
        As in the forward call.
    where : array_like of bool, optional
        As in the forward call; where False, the gradient is 0.
    out : ndarray, optional
        Takes the result; of its shape and dtype; may be any of the arguments.

    Returns
    -------
    ndarray
        Gradient with respect to x: ``grad * exp(x / temperature - y) / temperature``. Of the shape
        of x, of its dtype (float64 for integers).

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As the forward function; also if shapes differ.

    Notes
    -----
    The error is at most 1 ULP of itself for exact y (an error of y is passed on) in float32, 8 ULP
    in float64, 0.5 + 2^-10 ULP in float16 and bfloat16. Exactly 0 where x is -inf, whatever grad
    holds there. The same bits on every instruction set, number of threads and layout.
    """
    return _backward("logsumexp", grad, x, "y", y, axis, temperature, where, out)


def stablemax_backward(
    grad: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `stablemax` with respect to x.

    Parameters
    ----------
    grad : array_like
        Gradient of a scalar with respect to the result, of the shape of y. Floating.
    x : array_like
        The argument of the forward call; of the shape of y.
    y : array_like
        The result of the forward call: float16, bfloat16, float32 or float64.
    axis : int, tuple of int or None, default -1
        As in the forward call.
    temperature : float or array_like, default 1.0
        As in the forward call.
    where : array_like of bool, optional
        As in the forward call; where False, the gradient is 0.
    out : ndarray, optional
        Takes the result; of its shape and dtype; may be any of the arguments.

    Returns
    -------
    ndarray
        Gradient with respect to x: ``y * (grad - sum(y * grad)) / (1 + |x / temperature|) /
        temperature``. Of the shape and dtype of y.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As the forward function; also if shapes differ.

    Notes
    -----
    The error is at most 5 ULP of ``y (|grad| + sum |y grad|) / (1 + |x|)`` in float32, 8 ULP in
    float64, 0.5 + 2^-10 ULP in float16 and bfloat16. Exactly 0 where y is 0, whatever grad holds
    there. The same bits on every instruction set, number of threads and layout.
    """
    return _backward("stablemax", grad, x, "y", y, axis, temperature, where, out)


def log_stablemax_backward(
    grad: ArrayLike,
    x: ArrayLike,
    log_y: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the gradient of `log_stablemax` with respect to x.

    Parameters
    ----------
    grad : array_like
        Gradient of a scalar with respect to the result, of the shape of log_y. Floating.
    x : array_like
        The argument of the forward call; of the shape of log_y.
    log_y : array_like
        The result of the forward call: float16, bfloat16, float32 or float64.
    axis : int, tuple of int or None, default -1
        As in the forward call.
    temperature : float or array_like, default 1.0
        As in the forward call.
    where : array_like of bool, optional
        As in the forward call; where False, the gradient is 0.
    out : ndarray, optional
        Takes the result; of its shape and dtype; may be any of the arguments.

    Returns
    -------
    ndarray
        Gradient with respect to x: ``(grad - exp(log_y) * sum(grad)) / (1 + |x / temperature|) /
        temperature``. Of the shape and dtype of log_y.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As the forward function; also if shapes differ.

    Notes
    -----
    The error is at most 4 ULP of ``(|grad| + exp(log_y) sum |grad|) / (1 + |x|)`` in float32, 8 ULP
    in float64, 0.5 + 2^-10 ULP in float16 and bfloat16. Exactly 0 where log_y is -inf, whatever
    grad holds there. The same bits on every instruction set, number of threads and layout.
    """
    return _backward("log_stablemax", grad, x, "log_y", log_y, axis, temperature, where, out)


def _backward(
    function: str,
    grad: ArrayLike,
    x: ArrayLike | None,
    name: str,
    y: ArrayLike,
    axis: Axis,
    temperature: ArrayLike,
    where: ArrayLike | None,
    out: NDArray[Any] | None,
) -> NDArray[Any]:
    result, result_code = _floating(name, y)
    incoming, grad_code = _floating("grad", grad)
    if x is None:
        argument, x_code = result, result_code
    else:
        argument, x_code = as_input("x", x, has_where=True)
    axes = normalize_axes(axis, argument.ndim)
    shape = argument.shape
    dtype = result.dtype
    if function == "logsumexp":
        dtype = argument.dtype if is_float(x_code) else np.dtype(np.float64)
        result, incoming = (
            _without(axes, n, a, shape) for n, a in ((name, result), ("grad", incoming))
        )
    else:
        _check_shape(name, result, shape)
        _check_shape("grad", incoming, shape)
    scalar, temperatures = as_temperature(temperature, shape, axes)
    mask = None if where is None else as_where(where, shape)
    if out is None:
        target = _core.with_kept_memory(
            argument.size * dtype.itemsize, lambda: np.empty_like(argument, dtype, subok=False)
        )
    else:
        target = check_out(out, shape, dtype)
    if out is not None and not can_write_directly(
        target, argument, *(a for a in (result, incoming, temperatures, mask) if a is not out)
    ):
        target = np.empty(shape, dtype)
    written = target
    if not axes:  # every element stands alone: along an axis of its own
        axes = (argument.ndim,)
        argument, written = argument[..., None], written[..., None]
        if function != "logsumexp":
            result, incoming = result[..., None], incoming[..., None]
        if temperatures is not None:
            temperatures = temperatures[..., None]
        if mask is not None:
            mask = mask[..., None]
    _core.backward(
        _core.functions[function],
        incoming,
        argument,
        result,
        written,
        grad_code,
        x_code,
        result_code,
        _core.dtypes[dtype.name],
        axes,
        scalar,
        temperatures,
        mask,
        _runtime.current_isa(),
        _runtime.get_num_threads(),
    )
    if out is None:
        return target if target.ndim else target[()]
    if target is not out:
        out[...] = target
    return out


def _evaluate(
    function: int, grad: Any, y: Any, axis: Any, temperature: Any, where: Any, out: Any
) -> NDArray[Any]:
    name = _NAMES[function]
    of_y = "log_y" if name.startswith("log_") else "y"
    return _backward(name, grad, None, of_y, y, axis, temperature, where, out)


# As in _api: plain arrays without options the compiled module computes itself.
_call = _core.with_plain_gradients(_evaluate, _runtime.chosen_isa, _runtime.chosen_threads)


def _floating(name: str, value: ArrayLike) -> tuple[NDArray[Any], int]:
    array, code = as_input(name, value)
    if not is_float(code):
        raise TypeError(
            f"{name} has dtype {array.dtype}; it must be float16, bfloat16, float32 or float64"
        )
    return array, code


def _check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must have the shape {shape}")


def _without(
    axes: tuple[int, ...], name: str, array: NDArray[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    kept = tuple(1 if d in axes else n for d, n in enumerate(shape))
    reduced = tuple(n for d, n in enumerate(shape) if d not in axes)
    if array.shape == kept and axes:
        return array.reshape(reduced)
    if array.shape != reduced:
        raise ValueError(
            f"{name} has shape {array.shape}; it must have the shape {reduced} or {kept}"
        )
    return array
