"""softmax and log_softmax through XLA's FFI: under jit, vmap and grad, on CPUs."""

import ctypes
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def load(library: Path) -> None:
    """Make XLA know the custom calls of the library."""
    handlers = ctypes.CDLL(str(library))
    for name in ("softmax", "log_softmax"):
        handler = jax.ffi.pycapsule(getattr(handlers, f"jax_{name}"))
        jax.ffi.register_ffi_target(f"softmaxlib_{name}", handler, platform="cpu")


def _call(name, x, axis):
    # Counted from the end, so that vmap may put its axis in front.
    axis = np.int32(axis if axis < 0 else axis - x.ndim)
    # The whole type of x: in jax.shard_map also over what it varies, not shape and dtype alone.
    type_of_x = jax.eval_shape(lambda x: x, x)
    call = jax.ffi.ffi_call(f"softmaxlib_{name}", type_of_x, vmap_method="broadcast_all")
    return call(x, axis=axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def softmax(x, axis=-1):
    return _call("softmax", x, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def log_softmax(x, axis=-1):
    return _call("log_softmax", x, axis)


@softmax.defjvp
def _softmax_jvp(axis, primals, tangents):
    y, (t,) = softmax(*primals, axis), tangents
    return y, y * (t - jnp.sum(y * t, axis, keepdims=True))


@log_softmax.defjvp
def _log_softmax_jvp(axis, primals, tangents):
    y, (t,) = log_softmax(*primals, axis), tangents
    return y, t - jnp.sum(jnp.exp(y) * t, axis, keepdims=True)
