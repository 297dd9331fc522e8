"""Gradients without their part along the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from softmaxlib import _core, _runtime
from softmaxlib._arrays import Array, can_write_directly, check_out
from softmaxlib._gradients import _floating

_FLOAT64 = np.dtype(np.float64)


@overload
def orthogonal_gradient(
    grad: list[Any] | tuple[Any, ...],
    weights: list[Any] | tuple[Any, ...],
    *,
    rescale: bool = True,
    out: Sequence[NDArray[Any]] | None = None,
) -> list[NDArray[Any]]: ...
@overload
def orthogonal_gradient(
    grad: ArrayLike,
    weights: ArrayLike,
    *,
    rescale: bool = True,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]: ...
def orthogonal_gradient(
    grad: Any,
    weights: Any,
    *,
    rescale: bool = True,
    out: Any = None,
) -> Any:
    """Return the part of a gradient that is orthogonal to the weights.

    A step along the weights of a homogeneous network only scales its logits: the loss falls,
    nothing is learned, and training ends in softmax collapse [1]_. This is the gradient without it.

    Parameters
    ----------
    grad : array_like, or list or tuple of arrays
        Gradient of a parameter: float16, bfloat16, float32 or float64. All elements are one vector.
        Of a list each array is projected by itself.
    weights : array_like, or list or tuple of arrays
        The parameter, of the shape of grad, of any of these dtypes.
    rescale : bool, default True
        Give the result the length of grad, as the paper does.
    out : ndarray, or list or tuple of ndarray, optional
        Takes the result; of the shape and dtype of grad; may be grad itself.

    Returns
    -------
    ndarray, or list of ndarray
        ``d = grad - (weights . grad) / (weights . weights) * weights``, times ``|grad| / |d|`` with
        rescale. Of the shape and dtype of grad.

    Raises
    ------
    TypeError
        If a dtype is none of the above, rescale is no bool, or a list meets what is none.
    ValueError
        If shapes or lengths of lists differ, or an array of a list out shares memory with another
        one of out or with what belongs to another parameter. Nothing has been written then.

    Notes
    -----
    Error: at most 1 ULP (float64: 4 ULP) of ``|g_i| + |w_i| |grad| / |weights|``, with rescale
    times ``|grad| / |d|``. Sums are in double, of float64 compensated; where d is short, what
    rounding left along the weights is taken out once more. Sums neither overflow nor underflow.

    Where ``|d|`` is at most the machine epsilon of the coarser input times ``|grad|``, as it is for
    parallel vectors, a single element and a gradient of zeros, d is rounding noise and the result
    is 0, rescaled or not. Weights of zeros leave grad as it is. A NaN or an infinity in grad or
    weights makes all of the result NaN. An empty array gives an empty one.

    The same bits on every instruction set and number of threads. Elements are summed in their order
    in memory where that is the same in grad and weights, else in C order.

    References
    ----------
    .. [1] L. Prieto, M. Barsbey, P. A. M. Mediano and T. Birdal, "Grokking at the Edge of Numerical
       Stability", 2025, arXiv:2501.04697 (the update is its ⊥Grad).

    Examples
    --------
    >>> softmaxlib.orthogonal_gradient(np.array([3.0, 4.0]), np.array([1.0, 0.0]))
    array([0., 5.])
    >>> softmaxlib.orthogonal_gradient(np.array([3.0, 4.0]), np.array([1.0, 0.0]), rescale=False)
    array([0., 4.])
    """
    if not isinstance(rescale, (bool, np.bool_)):
        raise TypeError(f"rescale must be a bool, got {rescale!r}")
    if isinstance(grad, (list, tuple)):
        return _project_all(grad, weights, bool(rescale), out)
    for name, value in (("weights", weights), ("out", out)):
        if isinstance(value, (list, tuple)):
            raise TypeError(
                f"{name} is a {type(value).__name__}, grad is not: both must be lists of arrays"
            )
    projection = _Projection("", grad, weights, out)
    result = projection.run(bool(rescale))
    return result if out is not None or result.ndim else result[()]


def _project_all(grads: Any, weights: Any, rescale: bool, outs: Any) -> list[Array]:
    for name, values in (("grad", grads), ("weights", weights), ("out", outs)):
        if name == "out" and values is None:
            continue
        if not isinstance(values, (list, tuple)):
            raise TypeError(
                f"grad is a {type(grads).__name__}, so {name} must be a list of arrays too, "
                f"got {type(values).__name__}"
            )
        if len(values) != len(grads):
            raise ValueError(f"{name} has {len(values)} arrays, grad has {len(grads)}")
        for i, value in enumerate(values):
            if not hasattr(value, "__array__") and not hasattr(value, "__dlpack__"):
                raise TypeError(
                    f"{name}[{i}] must be an array, got {type(value).__name__}: "
                    "a list holds one array per parameter"
                )
    projections = [
        _Projection(f"[{i}]", g, w, None if outs is None else outs[i])
        for i, (g, w) in enumerate(zip(grads, weights, strict=True))
    ]
    if outs is not None:
        _check_apart(projections)
    return [p.run(rescale) for p in projections]


class _Projection:
    """One parameter's arguments, checked."""

    def __init__(self, index: str, grad: Any, weights: Any, out: Any) -> None:
        self.grad, self.grad_code = _floating(f"grad{index}", grad)
        self.weights, self.weights_code = _floating(f"weights{index}", weights)
        if self.weights.shape != self.grad.shape:
            raise ValueError(
                f"weights{index} has shape {self.weights.shape}, grad{index} has shape "
                f"{self.grad.shape}; they must be the same"
            )
        self.given = out
        self.out = None
        if out is not None:
            try:
                self.out = check_out(out, self.grad.shape, self.grad.dtype)
            except (TypeError, ValueError) as error:
                raise type(error)(str(error).replace("out", f"out{index}", 1)) from None

    def run(self, rescale: bool) -> Array:
        """Compute the result, into out where it is given."""
        grad, weights, target = self.grad, self.weights, self.out
        # In double where one input is: only its rounding to the dtype of grad is left.
        wide = _FLOAT64 if _FLOAT64 in (grad.dtype, weights.dtype) else grad.dtype
        if target is None or wide != grad.dtype or not can_write_directly(target, grad, weights):
            target = _core.with_kept_memory(
                grad.size * wide.itemsize, lambda: np.empty_like(grad, wide, subok=False)
            )
        order = _order(grad)
        if order != _order(weights):
            order = list(range(grad.ndim))
        _core.orthogonal_gradient(
            grad.transpose(order),
            weights.transpose(order),
            target.transpose(order),
            self.grad_code,
            self.weights_code,
            self.grad_code if wide == grad.dtype else _core.dtypes["float64"],
            rescale,
            _runtime.current_isa(),
            _runtime.get_num_threads(),
        )
        if wide != grad.dtype:
            exact, target = target, np.empty_like(grad, subok=False)
            _core.convert(exact, target, _core.dtypes["float64"], self.grad_code)
        if self.out is None:
            return target
        if target is not self.out:
            self.out[...] = target
        return self.given  # type: ignore[no-any-return]


def _order(array: Array) -> list[int]:
    """Return the axes from the longest step in memory to the shortest."""
    return sorted(
        range(array.ndim),
        key=lambda d: -abs(array.strides[d]) if array.shape[d] > 1 else 0,
    )


def _check_apart(projections: list[_Projection]) -> None:
    """Refuse an out that another parameter's projection reads or writes."""
    spans = [
        (*_bounds(array), i, name, array)
        for i, p in enumerate(projections)
        for name, array in (("out", p.out), ("grad", p.grad), ("weights", p.weights))
        if array is not None and array.size
    ]
    spans.sort(key=lambda span: span[0])
    open_spans: list[tuple[int, int, int, str, Array]] = []
    for span in spans:
        low, _, i, name, array = span
        open_spans = [s for s in open_spans if s[1] > low]
        for _, _, j, other_name, other in open_spans:
            if i != j and "out" in (name, other_name) and np.shares_memory(array, other):
                first, second = sorted(((name, i), (other_name, j)), key=lambda n: n[0] != "out")
                raise ValueError(
                    f"out[{first[1]}] shares memory with {second[0]}[{second[1]}]: "
                    "each parameter must have its own"
                )
        open_spans.append(span)


def _bounds(array: Array) -> tuple[int, int]:
    low = high = array.__array_interface__["data"][0]
    for n, stride in zip(array.shape, array.strides, strict=True):
        low += min(0, (n - 1) * stride)
        high += max(0, (n - 1) * stride)
    return low, high + array.itemsize
