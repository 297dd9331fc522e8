"""Sampling from logits, and the softmax of the k largest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from softmaxlib import _core, _runtime
from softmaxlib._arrays import (
    as_input,
    as_integer,
    as_number,
    as_temperature,
    in_unit_interval,
    one_axis,
    result_dtype,
)


def sample(
    logits: ArrayLike,
    rng: np.random.Generator,
    *,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    axis: int = -1,
) -> NDArray[np.int64]:
    """Draw one index per row from ``softmax(logits / temperature)``.

    Works from the logits themselves, without a sorted or normalized copy. The filters act in the
    order of the parameters; each renormalizes what it leaves.

    Parameters
    ----------
    logits : array_like
        Real numbers of any shape: float16, bfloat16, float32 or float64; integers and bool compute
        in float64. -inf: never drawn.
    rng : numpy.random.Generator
        Gives one float64 uniform number per row, ``rng.random(shape of the result)``: the same
        generator state gives the same indices, on every instruction set and number of threads.
    temperature : float or array_like, default 1.0
        Divides the logits; positive and finite. An array broadcasts against logits, with length 1
        along axis. For the most likely index use ``top_k=1``.
    top_k : int, optional
        Keeps the ``top_k`` most likely; at least 1.
    top_p : float, optional
        Keeps the fewest most likely that together have at least this probability; in (0, 1].
    min_p : float, optional
        Keeps those at least ``min_p`` times as likely as the most likely one; in [0, 1].
    axis : int, default -1
        Along which the distributions lie.

    Returns
    -------
    ndarray of int64
        Indices along axis, in the shape of logits without it; a scalar for one row.

    Raises
    ------
    TypeError
        If rng is no Generator, the dtype of logits is none of the above, or a parameter is no
        number.
    ValueError
        If a parameter is out of its range, or a row has no distribution: it holds NaN or +inf, or
        nothing but -inf. The generator has advanced then.
    numpy.exceptions.AxisError
        If axis is out of range.

    Notes
    -----
    By inversion: the index is the first at which the running sum of weights exceeds the uniform
    number times their sum, in double precision; weights have the error of `softmax` before its
    last rounding (float32: 2 ULP). Of equal logits, the one with the smaller index counts as more
    likely. The result for a row depends on that row and its number alone, not on the batch.

    References
    ----------
    .. [1] A. Fan, M. Lewis and Y. Dauphin, "Hierarchical Neural Story Generation", 2018 (top-k).
    .. [2] A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020 (top-p).
    .. [3] M. Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM
       Outputs", 2024 (min-p).

    Examples
    --------
    >>> logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    >>> softmaxlib.sample(logits, np.random.default_rng(7), top_k=1)
    array([0, 1])
    """
    if not isinstance(rng, np.random.Generator):
        raise TypeError(
            f"rng must be a numpy.random.Generator, such as numpy.random.default_rng(seed), "
            f"got {type(rng).__name__}"
        )
    x, x_code = as_input("logits", logits)
    along = one_axis("logits", axis, x.ndim)
    scalar, temperatures = as_temperature(temperature, x.shape, (along,))
    count = 0 if top_k is None else as_integer("top_k", top_k, 1, None)
    share = 1.0 if top_p is None else as_number("top_p", top_p)
    if not in_unit_interval(share, or_zero=False):
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    least = 0.0 if min_p is None else as_number("min_p", min_p)
    if not in_unit_interval(least):
        raise ValueError(f"min_p must be in [0, 1], got {min_p}")

    shape = x.shape[:along] + x.shape[along + 1 :]
    uniforms = np.asarray(rng.random(shape))
    indices = np.empty(shape, np.int64)
    _core.sample(
        x,
        uniforms,
        indices,
        x_code,
        along,
        scalar,
        temperatures,
        min(count, np.iinfo(np.int64).max),
        share,
        least,
        _runtime.current_isa(),
        _runtime.get_num_threads(),
    )
    if indices.size and indices.min() < 0:
        row = tuple(int(i) for i in np.argwhere(indices < 0)[0])
        why = "it holds NaN or +inf, or nothing but -inf" if x.shape[along] else "it is empty"
        raise ValueError(f"logits: row {row} along axis {axis} has no distribution: {why}")
    return indices if indices.ndim else indices[()]


def topk_softmax(
    x: ArrayLike,
    k: int,
    axis: int = -1,
    *,
    temperature: ArrayLike = 1.0,
    renormalize: bool = False,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the k largest elements' softmax, largest first, and their indices.

    The gating of a mixture of experts, without the softmax of all.

    Parameters
    ----------
    x : array_like
        Real numbers of any shape: float16, bfloat16, float32 or float64; integers and bool compute
        in float64.
    k : int
        How many; from 0 to the length of axis.
    axis : int, default -1
        Along which the distributions lie.
    temperature : float or array_like, default 1.0
        Divides x; positive and finite. An array broadcasts against x, with length 1 along axis.
    renormalize : bool, default False
        Divide by the sum of the k weights: the softmax of these k alone. Default: their share of
        the whole row, the bits of ``softmax(x)``.

    Returns
    -------
    weights : ndarray
        In the shape of x with k along axis, of its dtype (float64 for integers and bool).
    indices : ndarray of int64
        Of the same shape: places along axis. Of equal elements the smaller index comes first.

    Raises
    ------
    TypeError
        If a dtype is none of the above, or k is no integer.
    ValueError
        If k or temperature is out of range.
    numpy.exceptions.AxisError
        If axis is out of range.

    Notes
    -----
    Error as for `softmax`: at most 5 ULP in float32 and float64. A row with NaN or +inf, or of -inf
    alone, has weights NaN and indices 0, 1, 2... The time grows with k / 128.

    Examples
    --------
    >>> weights, experts = softmaxlib.topk_softmax([1.0, 3.0, 2.0, 3.0], 2)
    >>> experts
    array([1, 3])
    """
    values, x_code = as_input("x", x)
    along = one_axis("x", axis, values.ndim)
    scalar, temperatures = as_temperature(temperature, values.shape, (along,))
    count = as_integer("k", k, 0, values.shape[along])
    if not isinstance(renormalize, (bool, np.bool_)):
        raise TypeError(f"renormalize must be a bool, got {renormalize!r}")
    dtype, code = result_dtype(None, values.dtype, x_code)
    shape = (*values.shape[:along], count, *values.shape[along + 1 :])
    weights, indices = np.empty(shape, dtype), np.empty(shape, np.int64)
    _core.topk_softmax(
        values,
        weights,
        indices,
        x_code,
        code,
        along,
        bool(renormalize),
        scalar,
        temperatures,
        _runtime.current_isa(),
        _runtime.get_num_threads(),
    )
    return weights, indices
