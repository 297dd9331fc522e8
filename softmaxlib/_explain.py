"""Which schedule a call would run, and why."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from softmaxlib import _core, _runtime
from softmaxlib._api import Algorithm, Axis, _algorithm_code, _reduced_shape
from softmaxlib._arrays import normalize_axes, result_dtype

_MOST_DIMENSIONS = 64  # of the C interface
_MOST_BYTES = 2**57  # all that x86-64 can address


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns; ``str()`` of it is a table of four lines."""

    isa: str
    kernel: str
    why_kernel: str
    stores: str
    why_stores: str
    tasks: int
    split: bool
    why_tasks: str
    rows: int
    n: int
    scratch_bytes: int

    def __str__(self) -> str:
        share = "blocks of a row" if self.split else "rows"
        tasks = "1 task" if self.tasks == 1 else f"{self.tasks} tasks of {share}"
        return (
            f"rows    {self.rows:,} of {self.n:,} elements; scratch {self.scratch_bytes:,} bytes\n"
            f"kernel  {self.isa}::{self.kernel} ({self.why_kernel})\n"
            f"stores  {self.stores} ({self.why_stores})\n"
            f"tasks   {tasks} ({self.why_tasks})"
        )


def explain(
    shape: int | Sequence[int],
    dtype: DTypeLike = np.float32,
    axis: Axis = -1,
    *,
    function: str = "softmax",
    strides: Sequence[int] | None = None,
    in_place: bool = False,
    algorithm: Algorithm = "auto",
) -> Explanation:
    """Tell how a call on an array of this layout would run, and why; without an array, in no time.

    The choice depends on the layout, the cache sizes, the number of threads and the instruction set
    in effect. It never changes a bit of a result.

    Parameters
    ----------
    shape : int or sequence of int
        Of x.
    dtype : dtype, default float32
        Of x and of the result.
    axis : int, tuple of int or None, default -1
        As in `softmax`.
    function : str, default "softmax"
        "softmax", "log_softmax", "logsumexp", "stablemax" or "log_stablemax".
    strides : sequence of int, optional
        Of x, in bytes; default: C order. The result is in C order.
    in_place : bool, default False
        Whether the result replaces x.
    algorithm : str, default "auto"
        As in `softmax`.

    Returns
    -------
    Explanation
        With ``isa``, ``kernel``, ``stores`` ("plain" or "streaming"), ``tasks`` (1: serial),
        ``split`` (whether tasks share a row), ``scratch_bytes``, ``rows``, ``n`` (elements of a
        row), and the reasons ``why_kernel``, ``why_stores``, ``why_tasks``.

    Raises
    ------
    TypeError
        If the dtype is not supported, or shape or strides has what is not an integer.
    ValueError
        If shape or strides is invalid or larger than any array, or function or algorithm unknown.
    numpy.exceptions.AxisError
        If an axis is out of range.

    Examples
    --------
    >>> print(softmaxlib.explain((512, 32000)))
    rows    512 of 32,000 elements; scratch 128,128 bytes
    kernel  avx512::softmax_pipelined_f32 (rows fit in L2, their sum does not in the caches)
    stores  streaming (x and y exceed 3/4 of the last cache: a plain store would first read y)
    tasks   1 task (one thread)
    """
    lengths = (int(shape),) if isinstance(shape, (int, np.integer)) else _integers("shape", shape)
    if any(length < 0 for length in lengths):
        raise ValueError(f"shape must not be negative, got {lengths}")
    if len(lengths) > _MOST_DIMENSIONS:
        raise ValueError(f"shape must have at most {_MOST_DIMENSIONS} lengths, got {len(lengths)}")
    if function not in _core.functions:
        raise ValueError(
            f"unknown function {function!r}; it must be one of {', '.join(_core.functions)}"
        )
    if isinstance(dtype, str) and dtype == "bfloat16":  # needs no ml_dtypes here
        item, code = 2, _core.dtypes["bfloat16"]
    else:
        wanted, code = result_dtype(dtype, np.dtype(np.float32), _core.dtypes["float32"])
        item = wanted.itemsize
    axes = normalize_axes(axis, len(lengths))
    if strides is None:
        steps = [item] * len(lengths)
        for i in range(len(lengths) - 1, 0, -1):
            steps[i - 1] = steps[i] * max(lengths[i], 1)
    else:
        steps = list(_integers("strides", strides))
        if len(steps) != len(lengths):
            raise ValueError(f"strides has {len(steps)} numbers, shape {len(lengths)}")
    sides = [max(length, 1) for length in lengths]  # as in NumPy, a 0 makes no other any smaller
    reach = sum(abs(step) * (side - 1) for step, side in zip(steps, sides, strict=True))
    if max(math.prod(sides) * item, reach + item, *map(abs, steps)) > _MOST_BYTES:
        raise ValueError("shape and strides reach over more than 2^57 bytes, as no array can")
    reduces = function == "logsumexp"
    out_shape = _reduced_shape(lengths, axes, False) if reduces else lengths
    if not axes:  # every element stands alone: along an axis of its own
        axes, lengths, steps = (len(lengths),), (*lengths, 1), [*steps, item]
        out_shape = out_shape if reduces else lengths
    found: dict[str, Any] = _core.explain(
        _core.functions[function],
        code,
        code,
        lengths,
        out_shape,
        steps,
        axes,
        in_place and not reduces,
        _algorithm_code(algorithm),
        _runtime.current_isa(),
        _runtime.get_num_threads(),
    )
    found["isa"] = _runtime.isa_name(found["isa"])
    return Explanation(**found)


def _integers(name: str, values: Any) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, values))
    except TypeError:
        raise TypeError(f"{name} must be integers, got {values!r}") from None
