"""The five functions: arguments checked, then one call of the compiled module."""

from __future__ import annotations

from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from softmaxlib import _core, _runtime
from softmaxlib._arrays import (
    as_bias,
    as_input,
    as_temperature,
    as_where,
    can_write_directly,
    check_out,
    is_apart,
    normalize_axes,
    result_dtype,
)

Axis: TypeAlias = SupportsIndex | tuple[SupportsIndex, ...] | None
Algorithm: TypeAlias = Literal[
    "auto", "three_pass_recompute", "three_pass_reload", "two_pass", "two_pass_reload"
]

_SOFTMAX = _core.functions["softmax"]
_LOG_SOFTMAX = _core.functions["log_softmax"]
_LOGSUMEXP = _core.functions["logsumexp"]
_STABLEMAX = _core.functions["stablemax"]
_LOG_STABLEMAX = _core.functions["log_stablemax"]
_AUTO_STORE = _core.stores["auto"]


def softmax(
    x: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: ArrayLike = 1.0,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    algorithm: Algorithm = "auto",
) -> NDArray[Any]:
    """Return ``exp(x) / sum(exp(x))``.

    Parameters
    ----------
    x : array_like
        Real numbers: float16, bfloat16 (ml_dtypes), float32 or float64; integers and bool compute
        in float64. Any strides; CPU tensors share their memory through DLPack or ``__array__``.
    axis : int, tuple of int or None, default -1
        One distribution over these axes together; with ``()`` every element stands alone. None:
        over the whole array, which is the default of ``scipy.special.softmax``.
    temperature : float or array_like, default 1.0
        Divides x; positive and finite. An array broadcasts against x, with length 1 along axis.
    bias : array_like, optional
        Added to ``x / temperature``; broadcasts against x.
    where : array_like of bool, optional
        True takes part; elsewhere the result is 0. Broadcasts against x.
    dtype : {float16, bfloat16, float32, float64}, optional
        Of the result, and of the arithmetic: double for float64, float for the others; x is
        converted to that on reading, not rounded to a half. Default: that of x.
    out : ndarray, optional
        Takes the result; of its shape and dtype; may be x itself or overlap any argument.
    algorithm : str, default "auto"
        "auto", "three_pass_recompute", "three_pass_reload", "two_pass" or "two_pass_reload": all
        give the same bits and differ in speed.

    Returns
    -------
    ndarray
        Of the shape of x, and out itself if that is given; a scalar if x is 0-dimensional.

    Raises
    ------
    TypeError
        If a dtype is not supported (complex, longdouble, object, str, ...), x is a masked array, or
        out has the wrong dtype.
    ValueError
        If temperature is not positive and finite or varies along axis; bias, where or temperature
        does not broadcast to the shape of x; out has the wrong shape, is read-only or shares memory
        among its own elements; an axis is repeated; the algorithm is unknown; ``SOFTMAXLIB_ISA`` or
        ``SOFTMAXLIB_NUM_THREADS`` is nonsense.
    numpy.exceptions.AxisError
        If an axis is out of range.
    MemoryError
        If the result or scratch memory cannot be allocated.

    Notes
    -----
    Error in float32: at most 5 ULP, 1 ULP on average, for ordinary rows of any length up to 2^30
    [1]_, and 7 ULP for any row at all; in float64 at most 5 ULP.
    float16 and bfloat16 are computed in float32 and rounded once (0.5 ULP + 2^-10 ULP).

    Every finite x is valid. -inf gives 0. A row with NaN or +inf, or of -inf alone, is all NaN;
    that row only. A single finite element gives exactly 1. Where ``where`` is False the result
    is 0, whatever x holds there. The bits of a row's result depend on that row alone: not on
    algorithm, instruction set, threads, memory layout, nor on the other rows.

    References
    ----------
    .. [1] M. Dukhan and A. Ablavatski, "The Two-Pass Softmax Algorithm", 2020, arXiv:2001.04438.

    Examples
    --------
    >>> softmaxlib.softmax([1.0, 2.0, 3.0])
    array([0.09003057, 0.24472847, 0.66524096])
    """
    return _call(_SOFTMAX, x, axis, temperature, bias, where, dtype, out, algorithm, False)


def log_softmax(
    x: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: ArrayLike = 1.0,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    algorithm: Algorithm = "auto",
) -> NDArray[Any]:
    """Return ``log(softmax(x))``, accurate also where a probability is near 1.

    Parameters
    ----------
    x : array_like
        Real numbers: float16, bfloat16 (ml_dtypes), float32 or float64; integers and bool compute
        in float64. Any strides; CPU tensors share their memory through DLPack or ``__array__``.
    axis : int, tuple of int or None, default -1
        One distribution over these axes together; with ``()`` every element stands alone. None:
        over the whole array, which is the default of ``scipy.special.log_softmax``.
    temperature : float or array_like, default 1.0
        Divides x; positive and finite. An array broadcasts against x, with length 1 along axis.
    bias : array_like, optional
        Added to ``x / temperature``; broadcasts against x.
    where : array_like of bool, optional
        True takes part; elsewhere the result is -inf. Broadcasts against x.
    dtype : {float16, bfloat16, float32, float64}, optional
        Of the result, and of the arithmetic: double for float64, float for the others; x is
        converted to that on reading, not rounded to a half. Default: that of x.
    out : ndarray, optional
        Takes the result; of its shape and dtype; may be x itself or overlap any argument.
    algorithm : str, default "auto"
        "auto", "three_pass_recompute", "three_pass_reload", "two_pass" or "two_pass_reload": all
        give the same bits and differ in speed.

    Returns
    -------
    ndarray
        Of the shape of x, and out itself if that is given; a scalar if x is 0-dimensional.

    Raises
    ------
    TypeError
        If a dtype is not supported (complex, longdouble, object, str, ...), x is a masked array, or
        out has the wrong dtype.
    ValueError
        If temperature is not positive and finite or varies along axis; bias, where or temperature
        does not broadcast to the shape of x; out has the wrong shape, is read-only or shares memory
        among its own elements; an axis is repeated; the algorithm is unknown; ``SOFTMAXLIB_ISA`` or
        ``SOFTMAXLIB_NUM_THREADS`` is nonsense.
    numpy.exceptions.AxisError
        If an axis is out of range.
    MemoryError
        If the result or scratch memory cannot be allocated.

    Notes
    -----
    Error in float32: at most 4 ULP (5 for any row at all), also of results near 0, since the
    maximum is held out of the sum: ``(x - max) - log1p(rest)`` [1]_; in float64 at most 5 ULP.
    float16 and bfloat16 are computed in float32 and rounded once (0.5 ULP + 2^-10 ULP).

    Every finite x is valid. -inf gives -inf. A row with NaN or +inf, or of -inf alone, is all NaN.
    A single finite element gives exactly 0. Where ``where`` is False the result is -inf. The bits
    of a row's result depend on that row alone.

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and
       softmax functions", IMA Journal of Numerical Analysis 41(4), 2021, 2311-2330.

    Examples
    --------
    >>> softmaxlib.log_softmax([0.0, 50.0])
    array([-5.00000000e+01, -1.92874985e-22])
    """
    return _call(_LOG_SOFTMAX, x, axis, temperature, bias, where, dtype, out, algorithm, False)


def stablemax(
    x: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: ArrayLike = 1.0,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    algorithm: Algorithm = "auto",
) -> NDArray[Any]:
    """Return ``s(x) / sum(s(x))``, where s(x) is x + 1 for x >= 0, else 1 / (1 - x).

    Parameters
    ----------
    x : array_like
        Real numbers: float16, bfloat16 (ml_dtypes), float32 or float64; integers and bool compute
        in float64. Any strides; CPU tensors share their memory through DLPack or ``__array__``.
    axis : int, tuple of int or None, default -1
        One distribution over these axes together; with ``()`` every element stands alone. None:
        over the whole array, which is the default of ``scipy.special.softmax``.
    temperature : float or array_like, default 1.0
        Divides x; positive and finite. An array broadcasts against x, with length 1 along axis.
    bias : array_like, optional
        Added to ``x / temperature``; broadcasts against x.
    where : array_like of bool, optional
        True takes part; elsewhere the result is 0. Broadcasts against x.
    dtype : {float16, bfloat16, float32, float64}, optional
        Of the result, and of the arithmetic: double for float64, float for the others; x is
        converted to that on reading, not rounded to a half. Default: that of x.
    out : ndarray, optional
        Takes the result; of its shape and dtype; may be x itself or overlap any argument.
    algorithm : str, default "auto"
        "auto", "three_pass_recompute", "three_pass_reload", "two_pass" or "two_pass_reload": all
        give the same bits and differ in speed.

    Returns
    -------
    ndarray
        Of the shape of x, and out itself if that is given; a scalar if x is 0-dimensional.

    Raises
    ------
    TypeError
        If a dtype is not supported (complex, longdouble, object, str, ...), x is a masked array, or
        out has the wrong dtype.
    ValueError
        If temperature is not positive and finite or varies along axis; bias, where or temperature
        does not broadcast to the shape of x; out has the wrong shape, is read-only or shares memory
        among its own elements; an axis is repeated; the algorithm is unknown; ``SOFTMAXLIB_ISA`` or
        ``SOFTMAXLIB_NUM_THREADS`` is nonsense.
    numpy.exceptions.AxisError
        If an axis is out of range.
    MemoryError
        If the result or scratch memory cannot be allocated.

    Notes
    -----
    A softmax without exp [1]_. It is not shift-invariant, so the maximum is never subtracted.

    Error in float32: at most 4 ULP; in float64 at most 5 ULP.
    float16 and bfloat16 are computed in float32 and rounded once (0.5 ULP + 2^-10 ULP).

    Every finite x is valid; sums beyond the range of the dtype do not overflow. An argument that
    temperature or bias carries beyond the range of the arithmetic (float32, or float64 for float64)
    counts as infinite. -inf gives 0. A row
    with NaN or +inf, or of -inf alone, is all NaN. Where ``where`` is False the result is 0. The
    bits of a row's result depend on that row alone.

    References
    ----------
    .. [1] L. Prieto, M. Barsbey, P. A. M. Mediano and T. Birdal, "Grokking at the Edge of Numerical
       Stability", 2025, arXiv:2501.04697.

    Examples
    --------
    >>> softmaxlib.stablemax([-1.0, 0.0, 2.0])
    array([0.11111111, 0.22222222, 0.66666667])
    """
    return _call(_STABLEMAX, x, axis, temperature, bias, where, dtype, out, algorithm, False)


def log_stablemax(
    x: ArrayLike,
    axis: Axis = -1,
    *,
    temperature: ArrayLike = 1.0,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    algorithm: Algorithm = "auto",
) -> NDArray[Any]:
    """Return ``log(stablemax(x))``: ``sign(x) * log1p(abs(x)) - log(sum(s(x)))``.

    Parameters
    ----------
    x : array_like
        Real numbers: float16, bfloat16 (ml_dtypes), float32 or float64; integers and bool compute
        in float64. Any strides; CPU tensors share their memory through DLPack or ``__array__``.
    axis : int, tuple of int or None, default -1
        One distribution over these axes together; with ``()`` every element stands alone. None:
        over the whole array, which is the default of ``scipy.special.softmax``.
    temperature : float or array_like, default 1.0
        Divides x; positive and finite. An array broadcasts against x, with length 1 along axis.
    bias : array_like, optional
        Added to ``x / temperature``; broadcasts against x.
    where : array_like of bool, optional
        True takes part; elsewhere the result is -inf. Broadcasts against x.
    dtype : {float16, bfloat16, float32, float64}, optional
        Of the result, and of the arithmetic: double for float64, float for the others; x is
        converted to that on reading, not rounded to a half. Default: that of x.
    out : ndarray, optional
        Takes the result; of its shape and dtype; may be x itself or overlap any argument.
    algorithm : str, default "auto"
        "auto", "three_pass_recompute", "three_pass_reload", "two_pass" or "two_pass_reload": all
        give the same bits and differ in speed.

    Returns
    -------
    ndarray
        Of the shape of x, and out itself if that is given; a scalar if x is 0-dimensional.

    Raises
    ------
    TypeError
        If a dtype is not supported (complex, longdouble, object, str, ...), x is a masked array, or
        out has the wrong dtype.
    ValueError
        If temperature is not positive and finite or varies along axis; bias, where or temperature
        does not broadcast to the shape of x; out has the wrong shape, is read-only or shares memory
        among its own elements; an axis is repeated; the algorithm is unknown; ``SOFTMAXLIB_ISA`` or
        ``SOFTMAXLIB_NUM_THREADS`` is nonsense.
    numpy.exceptions.AxisError
        If an axis is out of range.
    MemoryError
        If the result or scratch memory cannot be allocated.

    Notes
    -----
    For s see `stablemax` [1]_.

    Error in float32: at most 4 ULP; in float64 at most 5 ULP.
    float16 and bfloat16 are computed in float32 and rounded once (0.5 ULP + 2^-10 ULP).

    Every finite x is valid; sums beyond the range of the dtype do not overflow. An argument that
    temperature or bias carries beyond the range of the arithmetic (float32, or float64 for float64)
    counts as infinite. -inf gives -inf. A
    row with NaN or +inf, or of -inf alone, is all NaN. Where ``where`` is False the result is -inf.
    The bits of a row's result depend on that row alone.

    References
    ----------
    .. [1] L. Prieto, M. Barsbey, P. A. M. Mediano and T. Birdal, "Grokking at the Edge of Numerical
       Stability", 2025, arXiv:2501.04697.

    Examples
    --------
    >>> softmaxlib.log_stablemax([-1.0, 0.0, 2.0])
    array([-2.19722458, -1.5040774 , -0.40546511])
    """
    return _call(_LOG_STABLEMAX, x, axis, temperature, bias, where, dtype, out, algorithm, False)


def logsumexp(
    x: ArrayLike,
    axis: Axis = -1,
    *,
    keepdims: bool = False,
    temperature: ArrayLike = 1.0,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    algorithm: Algorithm = "auto",
) -> Any:
    """Return ``log(sum(exp(x)))``.

    Parameters
    ----------
    x : array_like
        Real numbers: float16, bfloat16 (ml_dtypes), float32 or float64; integers and bool compute
        in float64. Any strides; CPU tensors share their memory through DLPack or ``__array__``.
    axis : int, tuple of int or None, default -1
        One distribution over these axes together; with ``()`` every element stands alone. None:
        over the whole array, which is the default of ``scipy.special.logsumexp``.
    keepdims : bool, default False
        Keep the reduced axes, with length 1.
    temperature : float or array_like, default 1.0
        Divides x; positive and finite. An array broadcasts against x, with length 1 along axis.
    bias : array_like, optional
        Added to ``x / temperature``; broadcasts against x.
    where : array_like of bool, optional
        True takes part; the others are left out. Broadcasts against x.
    dtype : {float16, bfloat16, float32, float64}, optional
        Of the result, and of the arithmetic: double for float64, float for the others; x is
        converted to that on reading, not rounded to a half. Default: that of x.
    out : ndarray, optional
        Takes the result; of its shape and dtype.
    algorithm : str, default "auto"
        "auto", "three_pass_recompute", "three_pass_reload", "two_pass" or "two_pass_reload": all
        give the same bits and differ in speed.

    Returns
    -------
    ndarray or scalar
        Of the shape of x without axis (or, with keepdims, with length 1 there), and out itself if
        that is given; a scalar if the shape is ``()``.

    Raises
    ------
    TypeError
        If a dtype is not supported (complex, longdouble, object, str, ...), x is a masked array, or
        out has the wrong dtype.
    ValueError
        If temperature is not positive and finite or varies along axis; bias, where or temperature
        does not broadcast to the shape of x; out has the wrong shape, is read-only or shares memory
        among its own elements; an axis is repeated; the algorithm is unknown; ``SOFTMAXLIB_ISA`` or
        ``SOFTMAXLIB_NUM_THREADS`` is nonsense.
    numpy.exceptions.AxisError
        If an axis is out of range.
    MemoryError
        If the result or scratch memory cannot be allocated.

    Notes
    -----
    Error in float32: at most 2 ULP (3 for any row at all), or 2^-23 absolute where the result is
    near 0 [1]_; in float64 at most 5 ULP, or 2^-51 absolute.
    float16 and bfloat16 are computed in float32 and rounded once (0.5 ULP + 2^-10 ULP).

    Every finite x is valid. A row of -inf alone, of no elements or with ``where`` False throughout
    gives -inf; a row with +inf gives +inf, with NaN gives NaN. A single element gives itself. The
    bits of a row's result depend on that row alone.

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and
       softmax functions", IMA Journal of Numerical Analysis 41(4), 2021, 2311-2330.

    Examples
    --------
    >>> softmaxlib.logsumexp([1000.0, 1000.0])
    np.float64(1000.6931471805599)
    """
    return _call(_LOGSUMEXP, x, axis, temperature, bias, where, dtype, out, algorithm, keepdims)


def _evaluate(
    function: int,
    x: Any,
    axis: Any,
    temperature: Any,
    bias: Any,
    where: Any,
    dtype: Any,
    out: Any,
    algorithm: Any,
    keepdims: Any,
) -> NDArray[Any]:
    x, x_code = as_input("x", x, has_where=True)
    result, result_code = result_dtype(dtype, x.dtype, x_code)
    axes = normalize_axes(axis, x.ndim)
    scalar, temperatures = as_temperature(temperature, x.shape, axes)
    bias_code = 0
    if bias is not None:
        bias, bias_code = as_bias(bias, x.shape)
    if where is not None:
        where = as_where(where, x.shape)
    algorithm_code = _algorithm_code(algorithm)
    isa = _runtime.current_isa()
    num_threads = _runtime.get_num_threads()

    reduces = function == _LOGSUMEXP
    shape = _reduced_shape(x.shape, axes, keepdims) if reduces else x.shape
    if out is None:
        target = (
            np.empty(shape, result)
            if reduces
            else _core.with_kept_memory(
                x.size * result.itemsize, lambda: np.empty_like(x, result, subok=False)
            )
        )
    else:
        target = plain_out = check_out(out, shape, result)
        others = (temperatures, bias, where)
        if not (
            is_apart(plain_out, x, *others)
            if reduces
            else can_write_directly(plain_out, x, *others)
        ):
            target = np.empty(shape, result)

    written = target.squeeze(axes) if keepdims and axes else target
    if not axes:  # every element stands alone: along an axis of its own
        axes = (x.ndim,)
        x, temperatures, bias, where = (
            None if array is None else array[..., None] for array in (x, temperatures, bias, where)
        )
        written = written if reduces else written[..., None]
    _core.run(
        function,
        x,
        written,
        x_code,
        result_code,
        axes,
        scalar,
        temperatures,
        bias,
        bias_code,
        where,
        algorithm_code,
        isa,
        _AUTO_STORE,
        num_threads,
    )
    if out is None:
        return target if target.ndim else target[()]
    if target is not plain_out:
        plain_out[...] = target
    return out  # type: ignore[no-any-return]


# What the public functions call: plain arrays without options the compiled module computes itself,
# exactly as _evaluate would; all else it leaves to _evaluate.
_call = _core.with_plain_calls(_evaluate, _runtime.chosen_isa, _runtime.chosen_threads)


def _algorithm_code(algorithm: Any) -> int:
    if not isinstance(algorithm, str):
        raise TypeError(f"algorithm must be a str, got {type(algorithm).__name__}")
    code = _core.algorithms.get(algorithm)
    if code is None:
        raise ValueError(
            f"unknown algorithm {algorithm!r}; it must be one of {', '.join(_core.algorithms)}"
        )
    return code


def _reduced_shape(
    shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool
) -> tuple[int, ...]:
    if keepdims:
        return tuple(1 if axis in axes else n for axis, n in enumerate(shape))
    return tuple(n for axis, n in enumerate(shape) if axis not in axes)
