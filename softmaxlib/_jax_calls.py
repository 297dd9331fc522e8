"""One call of the library from JAX: of XLA's FFI, compiled at first use, else back into Python."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import threading
import warnings
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import numpy as np

from softmaxlib import _api, _core, _gradients, _jax_build, _runtime
from softmaxlib import _losses as _losses_of_numpy
from softmaxlib._arrays import as_doubles, dtype_code

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # jax < 0.6.1
    buffer_callback = None

Shape: TypeAlias = tuple[int, ...]

TARGETS = ("forward", "backward", "losses", "losses_and_gradient", "scale", "take")
# The result in the memory of the first operand, which is seldom of use afterwards: one large array
# less to allocate. Under vmap that takes an operand of the whole shape.
_IN_PLACE = {"vmap_method": "broadcast_all", "input_output_aliases": {0: 0}}
_ABSENT = np.zeros(0, np.bool_)  # an operand that is not given

_lock = threading.Lock()


class Call(NamedTuple):
    """What is known when JAX traces a call; of axes counted from the end, since vmap adds some."""

    function: str
    axes: tuple[int, ...]
    temperature: float
    isa: int
    threads: int
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "none"
    ndim: int = 0  # of x: under vmap, each of its elements is reduced by itself


# ---- The two mechanisms


def backend() -> str:
    """Return how calls are made: "ffi" or "callback".

    Returns
    -------
    str
        ``"ffi"``: custom calls of XLA, compiled when first needed, which takes seconds, and kept in
        the user's cache directory. ``"callback"``: the NumPy functions through
        ``jax.experimental.buffer_callback``, where that cannot be compiled. The environment
        variable ``SOFTMAXLIB_JAX`` forces one of them.

    Raises
    ------
    ValueError
        If ``SOFTMAXLIB_JAX`` is neither.
    RuntimeError
        If it is "ffi" and that cannot be compiled, or if that is so and jax, older than 0.6.1, has
        no ``buffer_callback``.
    """
    with _lock:
        return _backend()


@functools.cache
def _backend() -> str:
    forced = os.environ.get("SOFTMAXLIB_JAX", "")
    if forced not in ("", "ffi", "callback"):
        raise ValueError(f'SOFTMAXLIB_JAX must be "ffi" or "callback", got {forced!r}')
    reason = "SOFTMAXLIB_JAX=callback"
    if forced != "callback":
        try:
            _register(_jax_build.load())
            return "ffi"
        except Exception as error:  # of the compiler, the file system, the linker or JAX
            reason = _reason(error)
            if forced:
                raise RuntimeError(f"SOFTMAXLIB_JAX=ffi, but {reason}") from error
    if buffer_callback is None:
        # Not jax.pure_callback: it copies what goes in on threads that the callback may occupy.
        raise RuntimeError(
            "softmaxlib.jax needs a C++ compiler (c++, or what CXX says), or jax 0.6.1 or newer "
            f"for callbacks into Python; this is jax {jax.__version__}, and {reason}"
        )
    if not forced:
        warnings.warn(
            f"softmaxlib.jax runs through callbacks into Python, which is slower: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return "callback"


def _reason(error: Exception) -> str:
    message = f"the custom calls of XLA cannot be built: {error}"
    if isinstance(error, subprocess.CalledProcessError):
        message += f"\n{error.stderr[:2000]}"
    return message


def _register(handlers: ctypes.CDLL) -> None:
    for target in TARGETS:
        name = f"softmaxlib_jax_{target}"
        jax.ffi.register_ffi_target(
            name, jax.ffi.pycapsule(getattr(handlers, name)), platform="cpu"
        )


# ---- One call


def forward(call: Call, x: Any, where: Any, temperatures: Any) -> Any:
    """Return the function of x; of length 1 along the axes that it reduces."""
    shape = _reduced(x.shape, call) if call.function == "logsumexp" else x.shape
    return _call("forward", call, jax.ShapeDtypeStruct(shape, x.dtype), x, where, temperatures)


def backward(call: Call, grad: Any, x: Any, y: Any, where: Any, temperatures: Any) -> Any:
    """Return the gradient with respect to x, which may be None where y is enough."""
    x = y if x is None else x
    result = jax.ShapeDtypeStruct(x.shape, y.dtype)
    means = {}
    if (grad.shape, grad.dtype) == (x.shape, y.dtype):
        means = _IN_PLACE
    return _call("backward", call, result, grad, x, y, where, temperatures, **means)


def losses(call: Call, x: Any, target: Any, weight: Any, where: Any, temperatures: Any) -> Any:
    """Return the cross-entropy, reduced, or of each row: of length 1 along the axis."""
    return _call("losses", call, _loss_of(call, x), x, target, weight, where, temperatures)


def losses_and_gradient(
    call: Call, x: Any, target: Any, weight: Any, where: Any, temperatures: Any
) -> Any:
    """Return that, and the gradient of it, or of its sum, with respect to x."""
    results = _loss_of(call, x), jax.ShapeDtypeStruct(x.shape, x.dtype)
    operands = x, target, weight, where, temperatures
    return tuple(_call("losses_and_gradient", call, results, *operands))  # a list before jax 0.6


def _loss_of(call: Call, x: Any) -> jax.ShapeDtypeStruct:
    shape = _reduced(x.shape, call) if call.reduction == "none" else ()
    return jax.ShapeDtypeStruct(shape, x.dtype)


def scale(call: Call, x: Any, factors: Any) -> Any:
    """Return x times factors, which broadcast to it: exactly 0 where x is."""
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _call("scale", call, result, x, factors, **_IN_PLACE)


def take(call: Call, x: Any, indices: Any, where: Any, temperatures: Any) -> Any:
    """Return elements of log_softmax(x), as take_along_axis with these indices."""
    shape = _reduced(x.shape, call, indices.shape[call.axes[0]])
    result = jax.ShapeDtypeStruct(shape, x.dtype)
    return _call("take", call, result, x, indices, where, temperatures)


def _reduced(shape: Shape, call: Call, length: int = 1) -> Shape:
    """Return a shape with this length along the axes of the call."""
    axes = [len(shape) + axis for axis in call.axes]
    return tuple(length if d in axes else n for d, n in enumerate(shape))


def _call(target: str, call: Call, result: Any, *operands: Any, **means: Any) -> Any:
    if backend() == "callback":
        operands = matched(*operands)
        called = buffer_callback(_callback(target, call), result, vmap_method="expand_dims")
        results = called(*operands)
    else:
        operands = matched(*(_ABSENT if operand is None else operand for operand in operands))
        means = {"vmap_method": "expand_dims"} | means
        results = jax.ffi.ffi_call(f"softmaxlib_jax_{target}", result, **means)(
            *operands,
            function=np.int32(_core.functions[call.function]),
            axes=np.array(call.axes, np.int32),
            temperature=np.float64(call.temperature),
            isa=np.int32(call.isa),
            threads=np.int32(call.threads),
            label_smoothing=np.float64(call.label_smoothing),
            ignore_index=np.int64(call.ignore_index),
            reduction=np.int32(_core.reductions[call.reduction]),
            ndim=np.int32(call.ndim),
        )
    # Neither gives its results the axes of its operands in every version of JAX.
    axes = _varying(*operands)
    return jax.tree.map(lambda array: _vary(array, axes), results)


# ---- What differs from device to device of a mesh, in jax.shard_map


def matched(*operands: Any) -> tuple[Any, ...]:
    """Return operands that vary over the same axes of the mesh; None stands for one not given."""
    axes = _varying(*operands)
    return tuple(None if operand is None else _vary(operand, axes) for operand in operands)


def _varying(*operands: Any) -> frozenset[Any]:
    """Return the axes over which any of the operands varies: none but within jax.shard_map."""
    axes: frozenset[Any] = frozenset()
    if hasattr(jax, "typeof"):  # jax >= 0.6
        for kind in (jax.typeof(operand) for operand in operands if operand is not None):
            # As jax 0.10 has it, and as those before it had.
            axes |= kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    return axes


def _vary(array: Any, axes: frozenset[Any]) -> Any:
    """Return the array as one that varies over these axes; its gradient is the sum over them."""
    missing = tuple(axes - _varying(array))
    if not missing:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, missing, to="varying")
    return jax.lax.pvary(array, missing)


# ---- The other end of callbacks


@functools.cache  # the same function for the same call, or JAX would compile anew
def _callback(target: str, call: Call) -> Any:
    function: Any = globals()[f"_{target}"]

    def back(context: Any, buffers: Any, *operands: Any) -> None:
        with (
            _runtime.setting(_runtime.chosen_isa, call.isa),
            _runtime.setting(_runtime.chosen_threads, call.threads),
        ):
            results = function(call, *(None if x is None else np.asarray(x) for x in operands))
        jax.tree.map(lambda buffer, y: np.copyto(np.asarray(buffer), y), buffers, results)

    return back


def _whole(*operands: Any) -> Shape:
    return np.broadcast_shapes(*(operand.shape for operand in operands if operand is not None))


def _forward(call: Call, x: Any, where: Any, temperatures: Any) -> Any:
    return getattr(_api, call.function)(
        np.broadcast_to(x, _whole(x, where, temperatures)),
        call.axes,
        temperature=call.temperature if temperatures is None else temperatures,
        where=where,
        **({"keepdims": True} if call.function == "logsumexp" else {}),
    )


def _backward(call: Call, grad: Any, x: Any, y: Any, where: Any, temperatures: Any) -> Any:
    whole = _whole(grad, x, y, where, temperatures)
    of_result = _reduced(whole, call) if call.function == "logsumexp" else whole
    return _gradients._backward(
        call.function,
        np.broadcast_to(grad, of_result),
        np.broadcast_to(x, whole),
        "y",
        np.broadcast_to(y, of_result),
        call.axes,
        call.temperature if temperatures is None else temperatures,
        where,
        None,
    )


def _losses(
    call: Call,
    x: Any,
    target: Any,
    weight: Any,
    where: Any,
    temperatures: Any,
    return_grad: bool = False,
) -> Any:
    whole = _whole(x, target, where, temperatures)
    (axis,) = call.axes
    along = len(whole) + axis
    if weight is not None and weight.size != whole[along]:
        raise ValueError("weight is one for each class: vmap cannot map it")
    of_rows = _reduced(whole, call)
    if np.issubdtype(target.dtype, np.integer):
        target = np.broadcast_to(target, of_rows).squeeze(along)
    else:
        target = np.broadcast_to(target, whole)
    x = np.broadcast_to(x, whole)
    where = None if where is None else np.broadcast_to(where, whole)
    temperatures = None if temperatures is None else np.broadcast_to(temperatures, of_rows)

    # A reduction is of each element of vmap by itself; else these are so many more rows.
    reduces = call.reduction != "none"
    mapped = whole[: len(whole) - call.ndim] if reduces else ()
    losses = np.empty(mapped if reduces else whole[:along] + whole[along + 1 :], x.dtype)
    gradient = np.empty(whole, x.dtype) if return_grad else None
    for place in np.ndindex(mapped):
        at = (*place, ...)
        _losses_of_numpy.cross_entropy(
            x[at],
            target[at],
            axis=axis,
            activation=cast(Any, call.function),
            label_smoothing=call.label_smoothing,
            weight=None if weight is None else weight.reshape(-1),
            ignore_index=call.ignore_index,
            reduction=cast(Any, call.reduction),
            temperature=call.temperature if temperatures is None else temperatures[at],
            where=None if where is None else where[at],
            return_grad=return_grad,
            out=losses[at],
            grad_out=None if gradient is None else gradient[at],
        )
    loss = losses if reduces else np.expand_dims(losses, along)
    return loss if gradient is None else (loss, gradient)


_losses_and_gradient = functools.partial(_losses, return_grad=True)


def _scale(call: Call, x: Any, factors: Any) -> Any:
    if (factors == 1).all():
        return x
    # In double, and rounded by the library: in XLA's threads NumPy takes a subnormal number for 0.
    product, factors = (as_doubles(a, cast(int, dtype_code(a.dtype))) for a in (x, factors))
    product = np.where(product == 0, 0, product * factors)
    result = np.empty(product.shape, x.dtype)
    _core.convert(product, result, _core.dtypes["float64"], _core.dtypes[x.dtype.name])
    return result


def _take(call: Call, x: Any, indices: Any, where: Any, temperatures: Any) -> Any:
    (axis,) = call.axes
    rows = np.empty(_reduced(indices.shape, call, 0)).sum(axis, keepdims=True)
    whole = _whole(x, rows, where, temperatures)
    return _losses_of_numpy.take_log_softmax(
        np.broadcast_to(x, whole),
        np.broadcast_to(indices, _reduced(whole, call, indices.shape[axis])),
        axis,
        temperature=call.temperature if temperatures is None else temperatures,
        where=where,
    )
