"""The functions for JAX: differentiable, under ``jit``, ``grad`` and ``vmap``, on CPUs.

Each is a ``custom_vjp`` around calls of the library; an axis that ``vmap`` adds is part of one call
over the larger array. docs/frameworks.md has more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import numpy as np

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError(
        "softmaxlib.jax needs jax: pip install jax, or pip install -e '.[jax]' in a clone"
    ) from error

from softmaxlib import _jax_calls, _runtime
from softmaxlib._arrays import (
    as_integer,
    as_number,
    as_temperature,
    as_weight,
    as_where,
    normalize_axes,
    one_axis,
)
from softmaxlib._jax_calls import Call, backend
from softmaxlib._losses import as_target as as_target

__all__ = [
    "backend",
    "cross_entropy",
    "log_softmax",
    "log_stablemax",
    "logsumexp",
    "softmax",
    "stablemax",
    "take_log_softmax",
]

Axis: TypeAlias = int | tuple[int, ...] | None


def softmax(x: Any, axis: Axis = -1, where: Any = None, *, temperature: Any = 1.0) -> jax.Array:
    """Return ``exp(x) / sum(exp(x))``.

    Parameters
    ----------
    x : array_like
        float16, bfloat16, float32 or, where JAX has 64 bits enabled, float64.
    axis : int, tuple of int or None, default -1
        One distribution over these axes together; None: over the whole array.
    where : array_like of bool, optional
        True takes part; elsewhere result and derivative are 0. Broadcasts against x.
    temperature : float or array_like, default 1.0
        Divides x; positive and finite. An array, which may be traced and has a derivative,
        broadcasts against x with length 1 along axis.

    Returns
    -------
    jax.Array
        Of the shape and dtype of x.

    Raises
    ------
    TypeError, ValueError
        As `softmaxlib.softmax`. What depends on traced values is an error of JAX when it runs.

    See Also
    --------
    softmaxlib.softmax : errors and special values.
    """
    return _apply("softmax", x, axis, where, temperature)


def log_softmax(x: Any, axis: Axis = -1, where: Any = None, *, temperature: Any = 1.0) -> jax.Array:
    """Return ``log(softmax(x))``, accurate also where a probability is near 1.

    Parameters
    ----------
    x, axis, where, temperature
        As of `softmax`; where ``where`` is False the result is -inf and the derivative 0.

    Returns
    -------
    jax.Array
        Of the shape and dtype of x.

    See Also
    --------
    softmaxlib.log_softmax : errors and special values.
    """
    return _apply("log_softmax", x, axis, where, temperature)


def logsumexp(
    x: Any, axis: Axis = -1, where: Any = None, *, keepdims: bool = False, temperature: Any = 1.0
) -> jax.Array:
    """Return ``log(sum(exp(x)))``.

    Parameters
    ----------
    x, axis, where, temperature
        As of `softmax`.
    keepdims : bool, default False
        Keep the reduced axes, with length 1.

    Returns
    -------
    jax.Array
        Of the dtype of x.

    See Also
    --------
    softmaxlib.logsumexp : errors and special values.
    """
    return _apply("logsumexp", x, axis, where, temperature, keepdims)


def stablemax(x: Any, axis: Axis = -1, where: Any = None, *, temperature: Any = 1.0) -> jax.Array:
    """Return ``s(x) / sum(s(x))``, where s(x) is x + 1 for x >= 0, else 1 / (1 - x).

    Parameters
    ----------
    x, axis, where, temperature
        As of `softmax`.

    Returns
    -------
    jax.Array
        Of the shape and dtype of x. The derivative is finite also where x is 1.

    See Also
    --------
    softmaxlib.stablemax : errors and special values.
    """
    return _apply("stablemax", x, axis, where, temperature)


def log_stablemax(
    x: Any, axis: Axis = -1, where: Any = None, *, temperature: Any = 1.0
) -> jax.Array:
    """Return ``log(stablemax(x))``.

    Parameters
    ----------
    x, axis, where, temperature
        As of `softmax`; where ``where`` is False the result is -inf and the derivative 0.

    Returns
    -------
    jax.Array
        Of the shape and dtype of x.

    See Also
    --------
    softmaxlib.log_stablemax : errors and special values.
    """
    return _apply("log_stablemax", x, axis, where, temperature)


def cross_entropy(
    logits: Any,
    target: Any,
    *,
    axis: int = -1,
    activation: Literal["softmax", "stablemax"] = "softmax",
    label_smoothing: float = 0.0,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    temperature: Any = 1.0,
    where: Any = None,
) -> jax.Array:
    """Return the cross-entropy of logits with targets.

    The gradient comes from the same sums as the loss, when that is computed, and neither collapses:
    where the label has nearly all of the probability, both keep their relative accuracy.

    Parameters
    ----------
    logits : array_like
        As x of `softmax`.
    target : array_like
        Classes: integers of the shape of logits without axis. Or probabilities: floating, of the
        shape of logits.
    axis : int, default -1
        Along which the classes lie.
    activation : {"softmax", "stablemax"}, default "softmax"
        What makes probabilities of logits.
    label_smoothing : float, default 0.0
        In [0, 1]: this share of the target is spread evenly over the classes.
    weight : array_like, optional
        One factor for each class, not negative; a constant: no derivative with respect to it, and
        ``vmap`` cannot map it.
    ignore_index : int, default -100
        A class that counts for nothing: loss and gradient of its row are 0.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides the sum by the weights of the labels that count, or with probabilities by
        the number of rows; "none" gives the loss of each row.
    temperature : float or array_like, default 1.0
        As of `softmax`.
    where : array_like of bool, optional
        Broadcasts against logits. Where False there is no class.

    Returns
    -------
    jax.Array
        Of the dtype of logits: a scalar, or with "none" of the shape of logits without axis.

    Raises
    ------
    TypeError, ValueError
        As `softmaxlib.cross_entropy`. What depends on traced values or on classes is an error of
        JAX when it runs.
    NotImplementedError
        If its gradient is differentiated: `log_softmax` and `log_stablemax` have second
        derivatives.

    See Also
    --------
    softmaxlib.cross_entropy : definition, errors and special values.
    """
    x = _floating("logits", logits)
    along = one_axis("logits", axis, x.ndim)
    if activation not in ("softmax", "stablemax"):
        raise ValueError(f'activation must be "softmax" or "stablemax", got {activation!r}')
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    smoothing = as_number("label_smoothing", label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    ignored = as_integer("ignore_index", ignore_index, -(2**63), None)
    if ignored >= 2**63:
        raise ValueError(f"ignore_index must be within int64, got {ignored}")
    number, temperatures = _as_temperature(temperature, x, (along,))
    call = _call(activation, [along - x.ndim], number)
    call = call._replace(
        label_smoothing=smoothing, ignore_index=ignored, reduction=reduction, ndim=x.ndim
    )

    targets = _in_full("target", target)
    as_target(_without_values(targets), x.shape, along)
    classes = jnp.issubdtype(targets.dtype, jnp.integer)
    weights = None
    if weight is not None:
        traced = isinstance(weight, jax.Array)
        checked = as_weight(_without_values(weight) if traced else weight, x.shape[along])
        widest = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
        weights = jax.lax.stop_gradient(jnp.asarray(weight if traced else checked, widest))
    operands = _jax_calls.matched(
        x,
        jnp.expand_dims(targets, along) if classes else targets,
        weights,
        _as_where(where, x),
        temperatures,
    )
    losses = _compiled_losses(call, *operands)
    return jnp.squeeze(losses, along) if reduction == "none" else losses


def take_log_softmax(
    x: Any, indices: Any, axis: int = -1, where: Any = None, *, temperature: Any = 1.0
) -> jax.Array:
    """Return selected elements of ``log_softmax(x)``, in one read of x.

    Parameters
    ----------
    x, where, temperature
        As of `softmax`.
    indices : array_like of int
        Places along axis; negative ones count from its end. Of the shape of x without axis: one
        for each row. Or of the shape of x with length k along axis: k for each row.
    axis : int, default -1
        Along which the distributions lie.

    Returns
    -------
    jax.Array
        Of the shape of indices and the dtype of x. Where it is -inf, what comes in counts for
        nothing in the derivative.

    Raises
    ------
    TypeError, ValueError
        As `softmax`; if indices are no integers, or have another shape. A wrong index is an error
        of JAX when it runs.

    See Also
    --------
    softmaxlib.take_log_softmax : errors and special values.
    """
    x = _floating("x", x)
    along = one_axis("x", axis, x.ndim)
    places = _in_full("indices", indices)
    if not jnp.issubdtype(places.dtype, jnp.integer):
        raise TypeError(f"indices has dtype {places.dtype}; it must be an integer type")
    rows = x.shape[:along] + x.shape[along + 1 :]
    one_each = places.shape == rows
    if one_each:
        places = jnp.expand_dims(places, along)
    if places.ndim != x.ndim or places.shape[:along] + places.shape[along + 1 :] != rows:
        raise ValueError(
            f"indices has shape {places.shape}; it must have the shape {rows} or be k along "
            f"axis {axis} of x of shape {x.shape}"
        )
    if places.dtype.itemsize < 4:  # the length of axis may be beyond such a type
        places = places.astype(jnp.int32)
    number, temperatures = _as_temperature(temperature, x, (along,))
    call = _call("softmax", [along - x.ndim], number)
    operands = _jax_calls.matched(x, places, _as_where(where, x), temperatures)
    y = _compiled_take(call, *operands)
    return jnp.squeeze(y, along) if one_each else y


def _apply(
    function: str, x: Any, axis: Axis, where: Any, temperature: Any, keepdims: bool = True
) -> Any:
    x = _floating("x", x)
    axes = normalize_axes(axis, x.ndim)
    number, temperatures = _as_temperature(temperature, x, axes)
    mask = _as_where(where, x)
    if not axes:  # every element stands alone: along an axis of its own
        x, mask, temperatures = (
            None if a is None else a[..., None] for a in (x, mask, temperatures)
        )
    call = _call(function, [axis - x.ndim for axis in axes or (x.ndim - 1,)], number)
    y = _compiled(call, *_jax_calls.matched(x, mask, temperatures))
    if not axes:
        return y[..., 0]
    return y if keepdims else jnp.squeeze(y, axes)


# ---- What callers pass


def _floating(name: str, value: Any) -> Any:
    array = jnp.asarray(value)
    if array.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(
            f"{name} has dtype {array.dtype}; it must be float16, bfloat16, float32 or float64"
        )
    return array


def _in_full(name: str, value: Any) -> Any:
    """Return the value as an array of JAX, which without 64 bits cuts off integers in silence."""
    array = jnp.asarray(value)
    if isinstance(value, (np.ndarray, np.generic)) and array.dtype.kind in "iu":
        cut = np.asarray(value)[value.astype(array.dtype) != value]
        if cut.size:
            raise ValueError(
                f"{name} holds {cut[0]}, which is beyond {array.dtype}, all that JAX has unless "
                "jax_enable_x64 is set"
            )
    return array


def _without_values(array: Any) -> Any:
    """Return an array of the same shape and dtype, for checks: a traced one has no values."""
    return np.broadcast_to(np.ones((), array.dtype), array.shape)


def _as_where(where: Any, x: Any) -> Any:
    if where is None:
        return None
    traced = isinstance(where, jax.Array)
    mask = as_where(_without_values(where) if traced else where, x.shape)
    return _of_rank(where if traced else mask, x.ndim)


def _as_temperature(value: Any, x: Any, axes: tuple[int, ...]) -> tuple[float, Any]:
    """Return a number, or 1.0 and an array of temperatures of as many dimensions as x."""
    if isinstance(value, jax.Array):
        as_temperature(_without_values(_floating("temperature", value)), x.shape, axes)
    else:
        number, value = as_temperature(value, x.shape, axes)
        if value is None:
            return number, None
    return 1.0, _of_rank(jnp.asarray(value, _arithmetic(x)), x.ndim)


def _of_rank(array: Any, ndim: int) -> Any:
    array = jnp.asarray(array)
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def _arithmetic(x: Any) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _call(function: str, axes: Iterable[int], temperature: float) -> Call:
    isa, threads = _runtime.current_isa(), _runtime.get_num_threads()
    return Call(function, tuple(axes), temperature, isa, threads)


# ---- Derivatives


def _forward(call: Call, x: Any, where: Any, temperatures: Any) -> Any:
    y = _function(call, x, where, temperatures)
    reads_x = call.function not in ("softmax", "log_softmax") or temperatures is not None
    return y, (x if reads_x else None, y, where, temperatures)


def _backward(call: Call, residuals: Any, grad: Any) -> Any:
    x, y, where, temperatures = residuals
    of_x = _gradient(call, grad, x, y, where, temperatures)
    return of_x, None, _of_temperatures(x, of_x, temperatures)


def _of_temperatures(x: Any, of_x: Any, temperatures: Any) -> Any:
    """Return the gradient with respect to the temperatures, by the chain rule of x / T."""
    if temperatures is None:
        return None
    products = jnp.where(of_x == 0, 0, x * of_x.astype(temperatures.dtype))
    rows = [d for d, n in enumerate(temperatures.shape) if n == 1]
    return -jnp.sum(products, rows, keepdims=True) / temperatures


def _losses_forward(
    call: Call, x: Any, target: Any, weight: Any, where: Any, temperatures: Any
) -> Any:
    losses, of_x = _losses_and_gradient(call, x, target, weight, where, temperatures)
    shares = target if jnp.issubdtype(target.dtype, jnp.floating) else None
    reads_x = shares is not None or temperatures is not None
    return losses, (of_x, x if reads_x else None, shares, weight, where, temperatures)


def _losses_backward(call: Call, residuals: Any, grad: Any) -> Any:
    of_x, x, shares, weight, where, temperatures = residuals
    grad = grad.reshape(grad.shape or (1,) * of_x.ndim)
    of_x = _scale(call, of_x, grad)
    of_target = None
    if shares is not None:
        log_p = _function(call._replace(function=f"log_{call.function}"), x, where, temperatures)
        grad = grad.astype(_arithmetic(x))
        if call.reduction == "mean":
            grad = grad / (x.size // max(x.shape[call.axes[0]], 1))
        of_target = (call.label_smoothing - 1) * grad * log_p.astype(grad.dtype)
        if weight is not None:
            rest = -1 - call.axes[0]  # axes after that of the classes
            of_target *= weight.reshape(weight.shape + (1,) * rest).astype(grad.dtype)
        if where is not None:
            of_target = jnp.where(where, of_target, 0)
        of_target = of_target.astype(shares.dtype)
    return of_x, of_target, None, None, _of_temperatures(x, of_x, temperatures)


def _losses_and_gradient_forward(call: Call, *operands: Any) -> Any:
    """Return what is needed for the derivative of the loss, and none of the gradient's."""
    losses, residuals = _losses_forward(call, *(None if a is None else a.value for a in operands))
    return (losses, residuals[0]), residuals


def _losses_and_gradient_backward(call: Call, residuals: Any, grads: Any) -> Any:
    grad, of_gradient = grads
    if not isinstance(of_gradient, jax.custom_derivatives.SymbolicZero):
        raise NotImplementedError(
            "cross_entropy has no second derivative: write the loss with softmaxlib.jax."
            f"log_{call.function}, which has one"
        )
    return _losses_backward(call, residuals, grad)


def _scale_forward(call: Call, x: Any, factors: Any) -> Any:
    return _scale(call, x, factors), (x, factors)


def _scale_backward(call: Call, residuals: Any, grad: Any) -> Any:
    x, factors = residuals
    products = jnp.where(x == 0, 0, x.astype(_arithmetic(x)) * grad)
    alike = [d for d, n in enumerate(factors.shape) if n == 1]
    return grad * factors, jnp.sum(products, alike, keepdims=True).astype(factors.dtype)


def _gradient_forward(call: Call, *operands: Any) -> Any:
    return _gradient(call, *operands), operands


def _gradient_backward(call: Call, operands: Any, grad: Any) -> Any:
    """Return second derivatives, which the library does not have, by JAX's own operations."""
    *differentiated, where, temperatures = operands
    _, pull = jax.vjp(functools.partial(_formula, call, where), *differentiated, temperatures)
    *of_differentiated, of_temperatures = pull(grad)
    return *of_differentiated, None, of_temperatures


def _formula(call: Call, where: Any, grad: Any, x: Any, y: Any, temperatures: Any) -> Any:
    """Return what `_gradient` does; by no path of differentiation NaN where it is 0."""
    dtype = y.dtype
    t = call.temperature if temperatures is None else temperatures
    grad, x, y = (None if a is None else a.astype(_arithmetic(y)) for a in (grad, x, y))
    log = call.function.startswith("log")
    counts = (x if call.function == "logsumexp" else y) != (-jnp.inf if log else 0)
    if where is not None:
        counts = counts & where
    x = None if x is None else jnp.where(counts, x, 0)
    if call.function == "logsumexp":
        result = grad * jnp.exp(x / t - jnp.where(counts, y, 0))
    else:
        grad, y = jnp.where(counts, grad, 0), jnp.where(counts, y, 0)
        total = functools.partial(jnp.sum, axis=call.axes, keepdims=True)
        result = grad - jnp.exp(y) * total(grad) if log else y * (grad - total(y * grad))
    if "stable" in call.function:
        result = result / (1 + jnp.abs(x / t))
    return jnp.where(counts, result / t, 0).astype(dtype)


def _take_forward(call: Call, x: Any, places: Any, where: Any, temperatures: Any) -> Any:
    return _take(call, x, places, where, temperatures), (x, places, where, temperatures)


def _take_backward(call: Call, residuals: Any, grad: Any) -> Any:
    """Return the gradient of log_softmax where grad is 0 but at the places."""
    x, places, where, temperatures = residuals
    (axis,) = call.axes
    at = list(jnp.indices(places.shape, sparse=True))
    at[axis] = places
    grad = jnp.zeros(x.shape, _arithmetic(x)).at[tuple(at)].add(grad)
    of_log = call._replace(function="log_softmax")
    log_p = _function(of_log, x, where, temperatures)
    of_x = _gradient(of_log, grad, x, log_p, where, temperatures)
    return of_x, None, None, _of_temperatures(x, of_x, temperatures)


_function = jax.custom_vjp(_jax_calls.forward, nondiff_argnums=(0,))
_function.defvjp(_forward, _backward)
_gradient = jax.custom_vjp(_jax_calls.backward, nondiff_argnums=(0,))
_gradient.defvjp(_gradient_forward, _gradient_backward)
_compiled = jax.jit(_function, static_argnums=0)
_scale = jax.custom_vjp(_jax_calls.scale, nondiff_argnums=(0,))
_scale.defvjp(_scale_forward, _scale_backward)
_losses_and_gradient = jax.custom_vjp(_jax_calls.losses_and_gradient, nondiff_argnums=(0,))
_losses_and_gradient.defvjp(
    _losses_and_gradient_forward, _losses_and_gradient_backward, symbolic_zeros=True
)
_losses = jax.custom_vjp(_jax_calls.losses, nondiff_argnums=(0,))
_losses.defvjp(_losses_forward, _losses_backward)
_compiled_losses = jax.jit(_losses, static_argnums=0)
_take = jax.custom_vjp(_jax_calls.take, nondiff_argnums=(0,))
_take.defvjp(_take_forward, _take_backward)
_compiled_take = jax.jit(_take, static_argnums=0)
