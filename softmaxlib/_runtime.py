"""Which instructions and how many threads a call uses, and what this machine offers."""

from __future__ import annotations

import functools
import math
import operator
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from softmaxlib import _core

MAX_THREADS = 1024
_AUTO_ISA = _core.isas["auto"]
_ISA_NAMES = {code: name for name, code in _core.isas.items()}
_T = TypeVar("_T")

# 0: not chosen here. Context variables, so that a choice stays in its thread or asyncio task.
chosen_isa: ContextVar[int] = ContextVar("softmaxlib_isa", default=0)
chosen_threads: ContextVar[int] = ContextVar("softmaxlib_threads", default=0)
_process_threads = 0


@contextmanager
def setting(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    """Give a context variable a value inside a ``with`` block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class _Choice(AbstractContextManager[None]):
    """A choice that holds from its call on; a ``with`` block may give it an end.

    Leaving the block brings back the value itself and resets no token: a token is refused by any
    other context than its own, and an asynchronous generator may be closed in another one.
    """

    def __init__(self, call: str, variable: ContextVar[int], value: int) -> None:
        self._call = call
        self._variable = variable
        self._value = value
        self._before = variable.get()
        self._entered = False
        variable.set(value)

    def __enter__(self) -> None:
        if self._entered:
            raise RuntimeError(f"{self._call} serves one with block: call it again for another one")
        self._entered = True
        self._variable.set(self._value)  # again, since another choice may have come in between

    def __exit__(self, *error: object) -> None:
        self._variable.set(self._before)

    def __call__(self, function: object) -> NoReturn:
        self._variable.set(self._before)
        raise TypeError(
            f"{self._call} is no decorator: it would take effect where the function is defined; "
            f"write `with softmaxlib.{self._call}:` inside of the function"
        )


# ---- instruction sets ----------------------------------------------------------------------------


def available_isas() -> tuple[str, ...]:
    """Return the instruction sets that this CPU can run, best first.

    Returns
    -------
    tuple of str
        Some of ``"avx512"`` (F, BW, DQ, VL), ``"avx2"`` (with FMA and F16C), ``"scalar"``.
    """
    return _core.isas_available()


def use_isa(name: str) -> AbstractContextManager[None]:
    """Choose the instruction set for the calls that follow in this thread or asyncio task.

    It goes before the environment variable ``SOFTMAXLIB_ISA``. Without either, the best available
    one runs. All give the same bits.

    Parameters
    ----------
    name : str
        One of `available_isas`.

    Returns
    -------
    context manager
        The choice holds from this call on, also where the result is not used. At the end of a
        ``with`` block what held before this call holds again, however the block is left.

    Raises
    ------
    ValueError
        If there is no such instruction set, or this CPU lacks it.
    TypeError
        If name is not a str, or the result is used as a decorator.
    RuntimeError
        If the result is used in a second ``with`` block.

    Notes
    -----
    A task that is created later begins with the choice, a thread without it. Blocks may be nested.
    A generator shares the context of whoever advances it: until a block inside of it is left, the
    choice holds for its caller too.

    Examples
    --------
    >>> with softmaxlib.use_isa("scalar"):
    ...     y = softmaxlib.softmax(x)
    >>> softmaxlib.use_isa("avx2")  # until another is chosen
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of an ISA must be a str, got {type(name).__name__}")
    return _Choice(f"use_isa({name!r})", chosen_isa, _isa_code(name, "ISA"))


def _isa_code(name: str, what: str) -> int:
    available = available_isas()
    if name in available:
        return _core.isas[name]
    reason = "cannot run on this CPU" if name in _core.isas_compiled() else "is unknown"
    raise ValueError(f"{what} {name!r} {reason}; available: {', '.join(available)}")


@functools.cache  # read at first use; an error is not cached, so it lasts until it is fixed
def _environment_isa() -> int:
    name = os.environ.get("SOFTMAXLIB_ISA", "")
    code = _isa_code(name, "environment variable SOFTMAXLIB_ISA:") if name else _AUTO_ISA
    _core.known.isa = code
    return code


def current_isa() -> int:
    """Return the code of the instruction set for the next call, maybe that of "auto"."""
    return chosen_isa.get() or _environment_isa()


def isa_name(code: int) -> str:
    """Return the name of an instruction set's code."""
    return _ISA_NAMES[code]


# ---- threads -------------------------------------------------------------------------------------


def _check_threads(n: Any) -> int:
    if isinstance(n, bool):
        raise TypeError("the number of threads must be an int, got bool")
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"the number of threads must be an int, got {type(n).__name__}") from None
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"the number of threads must be from 1 to {MAX_THREADS}, got {count}")
    return count


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use, for the whole process.

    It goes before the environment variable ``SOFTMAXLIB_NUM_THREADS``. Small problems stay on the
    calling thread. The result does not depend on the number.

    Parameters
    ----------
    n : int
        From 1 to 1024.

    Raises
    ------
    ValueError
        If n is out of range.
    TypeError
        If n is not an integer.
    """
    global _process_threads
    _core.known.process_threads = _process_threads = _check_threads(n)


def threads(n: int) -> AbstractContextManager[None]:
    """Choose the number of threads for the calls that follow in this thread or asyncio task.

    It goes before `set_num_threads`, which is for the whole process.

    Parameters
    ----------
    n : int
        From 1 to 1024.

    Returns
    -------
    context manager
        The choice holds from this call on, also where the result is not used. At the end of a
        ``with`` block what held before this call holds again, however the block is left.

    Raises
    ------
    ValueError
        If n is out of range.
    TypeError
        If n is not an integer, or the result is used as a decorator.
    RuntimeError
        If the result is used in a second ``with`` block.

    Notes
    -----
    It reaches and ends as in `use_isa`.

    Examples
    --------
    >>> with softmaxlib.threads(1):
    ...     y = softmaxlib.softmax(x)
    """
    count = _check_threads(n)
    return _Choice(f"threads({count})", chosen_threads, count)


def get_num_threads() -> int:
    """Return how many threads the next call may use.

    Returns
    -------
    int
        The first that is given: `threads`, `set_num_threads`, the environment variable
        ``SOFTMAXLIB_NUM_THREADS``, or the number of CPUs in the process's affinity mask, at most
        its cgroup's CPU quota rounded up.

    Raises
    ------
    ValueError
        If ``SOFTMAXLIB_NUM_THREADS`` is to decide and is not a number from 1 to 1024.
    """
    return chosen_threads.get() or _process_threads or _default_threads()


@functools.cache
def _default_threads() -> int:
    text = os.environ.get("SOFTMAXLIB_NUM_THREADS", "")
    try:
        if text and not (text.isascii() and text.isdigit()):  # int() takes " 7", "1_0" and "+7"
            raise ValueError
        count = _check_threads(int(text)) if text else _usable_cpus()
    except ValueError:
        raise ValueError(
            f"environment variable SOFTMAXLIB_NUM_THREADS: {text!r} is not a number from 1 to "
            f"{MAX_THREADS}"
        ) from None
    _core.known.default_threads = count
    return count


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min(count, math.ceil(_cgroup_quota()), MAX_THREADS))


def _cgroup_quota(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float:
    """Return how many CPUs the cgroups of this process (v2 or v1) may use; many if no limit."""
    quotas = [float(MAX_THREADS)]
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers  # v2 has no controllers here
        # A container may see its own cgroup as the base, whatever the path says.
        for depth in range(len(Path(path).parts)):
            folder = base.joinpath(*Path(path).parts[1 : depth + 1])
            limit = _read(folder / "cpu.max") or " ".join(
                _read(folder / f"cpu.cfs_{part}_us") for part in ("quota", "period")
            )
            quota, _, period = limit.partition(" ")
            if quota.strip().isdigit() and period.strip().isdigit():  # neither "max" nor "-1"
                quotas.append(int(quota) / int(period))
    return min(quotas)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


# ---- reports -------------------------------------------------------------------------------------


def last_kernel() -> str | None:
    """Tell which kernel the last call in this thread really ran.

    Returns
    -------
    str or None
        Such as ``"avx512::softmax_two_pass_f32"``; None before the first call, and where an empty
        array left nothing to run.
    """
    isa, _, _, _, kernel = _core.last_report()
    return None if isa == _AUTO_ISA else f"{_ISA_NAMES[isa]}::{kernel}"


def info() -> dict[str, Any]:
    """Describe the library and what it found on this machine.

    Returns
    -------
    dict
        ``version``, ``isa`` (the one in effect), ``isas_available`` and ``isas_compiled`` (best
        first), ``cpu`` (model), ``caches`` (bytes by level, as one core sees them), ``threads``,
        ``cpus`` (in the machine), ``compiler``, ``platform``.

    Raises
    ------
    ValueError
        If ``SOFTMAXLIB_ISA`` or ``SOFTMAXLIB_NUM_THREADS`` is in effect and is nonsense.
    """
    isa = current_isa()
    return {
        "version": _core.version(),
        "isa": available_isas()[0] if isa == _AUTO_ISA else _ISA_NAMES[isa],
        "isas_available": available_isas(),
        "isas_compiled": _core.isas_compiled(),
        "cpu": _cpu_model(),
        "caches": dict(zip(("L1d", "L2", "L3"), _core.cache_sizes(), strict=True)),
        "threads": get_num_threads(),
        "cpus": os.cpu_count(),
        "compiler": _core.compiler(),
        "platform": platform.platform(),
    }


def _cpu_model() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
