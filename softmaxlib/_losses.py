"""Losses, with their gradients, and selected log-probabilities."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from softmaxlib import _core, _runtime
from softmaxlib._arrays import (
    as_array,
    as_input,
    as_integer,
    as_number,
    as_temperature,
    as_weight,
    as_where,
    can_write_directly,
    check_out,
    dtype_code,
    in_unit_interval,
    is_apart,
    is_float,
    native,
    one_axis,
    result_dtype,
)

_INT64 = np.iinfo(np.int64)
_INT64_CODE = _core.dtypes["int64"]


def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    axis: int = -1,
    activation: Literal["softmax", "stablemax"] = "softmax",
    label_smoothing: float = 0.0,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    return_grad: bool = False,
    out: NDArray[Any] | None = None,
    grad_out: NDArray[Any] | None = None,
) -> Any:
    """Return the cross-entropy of logits with targets, and its gradient.

    Loss and gradient come from the same sums, without an array of log-probabilities, and do not
    collapse: where the label has nearly all of the probability, both keep their relative accuracy.

    Parameters
    ----------
    logits : array_like
        Real numbers of any shape: float16, bfloat16, float32 or float64; integers and bool compute
        in float64.
    target : array_like
        Classes: integers of the shape of logits without axis. Or probabilities: floating, of the
        shape of logits; taken as they are.
    axis : int, default -1
        Along which the classes lie.
    activation : {"softmax", "stablemax"}, default "softmax"
        What makes probabilities p of logits; "stablemax" gives the loss of [1]_, in the dtype of
        logits: with ``reduction="none"`` what its users call stablemax_cross_entropy.
    label_smoothing : float, default 0.0
        In [0, 1]: this share of the target is spread evenly over the classes.
    weight : array_like, optional
        One factor for each class, not negative; one-dimensional.
    ignore_index : int, default -100
        A class that counts for nothing: loss and gradient of its row are 0, and its logits are not
        read. Of no effect with probabilities.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides the sum by the weights of the labels that count, or with probabilities by
        the number of rows; "none" gives the loss of each row.
    temperature : float or array_like, default 1.0
        Divides the logits; positive and finite. An array broadcasts against logits, with length 1
        along axis.
    where : array_like of bool, optional
        Broadcasts against logits. Where False there is no class: probability and gradient are 0,
        smoothing spreads nothing there, and a target there has an infinite loss.
    return_grad : bool, default False
        Also return the gradient with respect to logits.
    out : ndarray, optional
        Takes the loss; of its shape and dtype.
    grad_out : ndarray, optional
        Takes the gradient; of the shape and dtype of logits (float64 for integers and bool); may
        be logits or target. Needs return_grad.

    Returns
    -------
    loss : ndarray or scalar
        Of the dtype of logits (float64 for integers and bool): a scalar, or with "none" of the
        shape of logits without axis.
    grad : ndarray
        With return_grad: gradient of the loss, with "none" of the sum of the losses, in the shape
        of logits.

    Raises
    ------
    TypeError
        If the dtype of logits is none of the above, target is neither integer nor floating, or
        another parameter has a wrong type.
    ValueError
        If shapes do not match, a class is out of range, or a parameter is.
    numpy.exceptions.AxisError
        If axis is out of range.

    See Also
    --------
    take_log_softmax : log-probabilities of selected classes.

    Notes
    -----
    With ``q = weight * ((1 - label_smoothing) * target + label_smoothing / classes)``, target
    one-hot for a class, and Q the sum of q, the loss of a row is ``-sum(q * log(p))`` and its
    gradient ``(Q * p - q) / temperature``, for StableMax also divided by ``1 + |logits|``. Without
    smoothing and weights the loss of a label has the bits of ``-log_softmax`` (``-log_stablemax``).
    In float32 the loss of a label has at most 4 ULP, and so has its gradient, computed as minus the
    sum of the other probabilities; the gradient of another class has at most 5 (StableMax: 7). For
    any other q: the loss 5, the gradient 5 ULP of ``Q p + q``. In float64 all of these 8. That is
    so where -log p itself is normal, before weights and temperature. Losses are added in float64,
    with compensation.

    Where the definitions agree, so do the results with those of
    torch.nn.functional.cross_entropy: rows that are all ignored have the mean NaN, and a label of
    logit -inf the loss inf. But a class with q = 0 and logit -inf adds 0, not NaN, and a class of
    logit -inf has gradient 0, also where it is the label. Rows with NaN or +inf, or of -inf alone,
    have loss and gradient NaN, unless they are ignored. The same bits on every instruction set and
    number of threads.

    References
    ----------
    .. [1] L. Prieto et al., "Grokking at the Edge of Numerical Stability", 2025 (arXiv:2501.04697).

    Examples
    --------
    >>> logits = np.array([[17.0, 0.0], [1.0, 3.0]], np.float32)
    >>> loss, grad = softmaxlib.cross_entropy(logits, [0, 0], reduction="none", return_grad=True)
    >>> loss
    array([4.1399375e-08, 2.1269281e+00], dtype=float32)
    >>> grad[0]
    array([-4.1399375e-08,  4.1399375e-08], dtype=float32)
    """
    return _cross_entropy(
        logits,
        target,
        axis,
        activation,
        label_smoothing,
        weight,
        ignore_index,
        reduction,
        temperature,
        where,
        return_grad,
        out,
        grad_out,
    )


def _evaluate(
    logits: Any,
    target: Any,
    axis: Any,
    activation: Any,
    label_smoothing: Any,
    weight: Any,
    ignore_index: Any,
    reduction: Any,
    temperature: Any,
    where: Any,
    return_grad: Any,
    out: Any,
    grad_out: Any,
) -> Any:
    x, x_code = as_input("logits", logits, has_where=True)
    along = one_axis("logits", axis, x.ndim)
    if not isinstance(activation, str) or activation not in ("softmax", "stablemax"):
        raise ValueError(f'activation must be "softmax" or "stablemax", got {activation!r}')
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    smoothing = as_number("label_smoothing", label_smoothing)
    if not in_unit_interval(smoothing):
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    ignored = as_integer("ignore_index", ignore_index, _INT64.min, None)
    if ignored > _INT64.max:
        raise ValueError(f"ignore_index must be within int64, got {ignored}")
    if not isinstance(return_grad, (bool, np.bool_)):
        raise TypeError(f"return_grad must be a bool, got {return_grad!r}")
    if grad_out is not None and not return_grad:
        raise ValueError("grad_out takes the gradient: it needs return_grad=True")
    targets, target_code = as_target(target, x.shape, along)
    weights = None if weight is None else as_weight(weight, x.shape[along])
    scalar, temperatures = as_temperature(temperature, x.shape, (along,))
    mask = None if where is None else as_where(where, x.shape)
    dtype, dtype_number = result_dtype(None, x.dtype, x_code)
    rows = _without(x.shape, along)
    read = (x, targets, weights, temperatures, mask)

    grad = None
    if return_grad:
        if grad_out is None:
            grad = _core.with_kept_memory(
                x.size * dtype.itemsize, lambda: np.empty_like(x, dtype, subok=False)
            )
        else:
            grad = check_out(grad_out, x.shape, dtype, "grad_out")
            others = (a for a in read[1:] if a is not grad_out)
            if not can_write_directly(grad, x, *others):
                grad = np.empty(x.shape, dtype)
    result = np.empty(rows if reduction == "none" else (), dtype)
    if out is not None:
        given = check_out(out, result.shape, dtype)
        if grad_out is not None and np.shares_memory(given, grad_out):
            raise ValueError("out and grad_out share memory; each must have its own")
        if is_apart(given, *read, grad):
            result = given

    total, losses = None, result
    if reduction != "none":
        total, losses = result, np.empty(rows, np.float64)
    try:
        _core.cross_entropy(
            _core.functions[activation],
            x,
            targets,
            losses,
            total,
            grad,
            x_code,
            target_code,
            dtype_number,
            along,
            smoothing,
            _core.reductions[reduction],
            weights,
            ignored,
            scalar,
            temperatures,
            mask,
            _runtime.current_isa(),
            _runtime.get_num_threads(),
        )
    except ValueError:
        if not is_float(target_code):
            _check_classes(
                "target", targets, x.shape[along], f", or ignore_index {ignored}", ignored
            )
        raise
    if out is None:
        loss = result if result.ndim else result[()]
    else:
        loss = out
        if result is not given:
            given[...] = result
    if grad is None:
        return loss
    if grad_out is None:
        return loss, grad
    if grad is not grad_out and not np.may_share_memory(grad, grad_out):
        grad_out[...] = grad
    return loss, grad_out


# As in _api: plain arrays without options the compiled module computes itself.
_cross_entropy = _core.with_plain_losses(_evaluate, _runtime.chosen_isa, _runtime.chosen_threads)


def take_log_softmax(
    x: ArrayLike,
    indices: ArrayLike,
    axis: int = -1,
    *,
    return_logsumexp: bool = False,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    dtype: Any = None,
    out: NDArray[Any] | None = None,
) -> Any:
    """Return selected elements of ``log_softmax(x)``, in one read of x.

    Scores of tokens, actions or labels, without the array of all log-probabilities.

    Parameters
    ----------
    x : array_like
        Real numbers of any shape: float16, bfloat16, float32 or float64; integers and bool compute
        in float64.
    indices : array_like of int
        Places along axis; negative ones count from its end. Of the shape of x without axis: one
        for each row. Or of as many dimensions as x, as for `numpy.take_along_axis`: k for each row,
        the other dimensions of x's lengths or 1.
    axis : int, default -1
        Along which the distributions lie.
    return_logsumexp : bool, default False
        Also return ``logsumexp(x)`` of each row.
    temperature : float or array_like, default 1.0
        Divides x; positive and finite. An array broadcasts against x, with length 1 along axis.
    where : array_like of bool, optional
        Broadcasts against x; elements where it is False take no part: their results are -inf.
    dtype : dtype, optional
        Of the results: float16, bfloat16, float32 or float64; default: that of x, or float64 for
        integers and bool.
    out : ndarray, optional
        Takes the selected elements; of their shape and dtype.

    Returns
    -------
    selected : ndarray
        One log-probability for each index, in the shape of indices (broadcast).
    logsumexp : ndarray
        With return_logsumexp: of each row, in the shape of x without axis.

    Raises
    ------
    TypeError
        If a dtype is none of the above, or indices are no integers.
    ValueError
        If shapes do not match, or temperature is out of range.
    IndexError
        If an index is out of range.
    numpy.exceptions.AxisError
        If axis is out of range.

    Notes
    -----
    The bits of `log_softmax` and `logsumexp`; their accuracy and special values.

    Examples
    --------
    >>> x = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    >>> np.exp(softmaxlib.take_log_softmax(x, [0, 1]))
    array([0.5, 0.8])
    """
    values, x_code = as_input("x", x, has_where=True)
    along = one_axis("x", axis, values.ndim)
    if not isinstance(return_logsumexp, (bool, np.bool_)):
        raise TypeError(f"return_logsumexp must be a bool, got {return_logsumexp!r}")
    scalar, temperatures = as_temperature(temperature, values.shape, (along,))
    mask = None if where is None else as_where(where, values.shape)
    result, code = result_dtype(dtype, values.dtype, x_code)
    rows = _without(values.shape, along)
    places = _as_places("indices", indices)
    shape = places.shape
    if places.ndim == values.ndim:
        full = (*values.shape[:along], places.shape[along], *values.shape[along + 1 :])
        try:
            places = np.broadcast_to(places, full)
        except ValueError:
            shape = ()
        else:
            shape = full
    elif shape == rows:
        places = np.expand_dims(places, along)
    if places.ndim != values.ndim or _without(places.shape, along) != rows:
        raise ValueError(
            f"indices has shape {np.shape(indices)}; it must have the shape {rows} or be k along "
            f"axis {axis} of x of shape {values.shape}"
        )
    n = values.shape[along]
    if places.size and not (0 <= places.min() and places.max() < n):
        _check_classes("indices", places, n, "", 0, least=-n, error=IndexError)
        places = np.where(places < 0, places + n, places)

    target = np.empty(shape, result) if out is None else check_out(out, shape, result)
    if out is not None and not is_apart(target, values, places, temperatures, mask):
        target = np.empty(shape, result)
    sums = np.empty(rows, result) if return_logsumexp else None
    _core.take_log_softmax(
        values,
        places,
        target if target.ndim == values.ndim else np.expand_dims(target, along),
        sums,
        x_code,
        code,
        along,
        scalar,
        temperatures,
        mask,
        _runtime.current_isa(),
        _runtime.get_num_threads(),
    )
    selected: Any = target if target.ndim else target[()]
    if out is not None:
        selected = out
        if not np.may_share_memory(target, out):
            out[...] = target
    if sums is None:
        return selected
    return selected, (sums if sums.ndim else sums[()])


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _as_places(name: str, value: Any) -> NDArray[np.int64]:
    array = native(as_array(name, value))
    if array.dtype.kind not in "iu":
        if array.size == 0 and not hasattr(value, "dtype"):  # an empty list
            return array.astype(np.int64)
        raise TypeError(f"{name} has dtype {array.dtype}; it must be an integer type")
    if array.dtype == np.uint64 and array.size and array.max() > _INT64.max:
        raise ValueError(f"{name} holds {array.max()}, which is beyond int64")
    return array.astype(np.int64, copy=False)


def as_target(value: Any, shape: tuple[int, ...], along: int) -> tuple[NDArray[Any], int]:
    array = as_array("target", value)
    rows = _without(shape, along)
    if array.dtype == _INT64.dtype and array.shape == rows:  # nearly every call
        return array, _INT64_CODE
    code = dtype_code(native(array).dtype)
    if code is not None and is_float(code) and (array.size or array.shape == shape):
        if array.shape != shape:
            raise ValueError(
                f"target has dtype {array.dtype} and shape {array.shape}; probabilities must have "
                f"the shape {shape} of logits, and classes must be integers of shape {rows}"
            )
        return native(array), code
    if array.dtype == np.bool_:
        raise TypeError("target has dtype bool; it must be classes (integers) or probabilities")
    places = _as_places("target", value)
    if places.shape != rows:
        raise ValueError(
            f"target has dtype {places.dtype} and shape {places.shape}; classes must have the "
            f"shape {rows} of logits without axis, and probabilities must be floating"
        )
    return places, _INT64_CODE


def _check_classes(
    name: str,
    places: NDArray[np.int64],
    n: int,
    also: str,
    ignored: int,
    least: int = 0,
    error: type[Exception] = ValueError,
) -> None:
    bad = ((places < least) | (places >= n)) & (also == "" or places != ignored)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        classes = f"from {least} to {n - 1}{also}" if n else f"left out{also}, as axis has length 0"
        raise error(f"{name} at {where} is {places[where]}; it must be {classes}")
