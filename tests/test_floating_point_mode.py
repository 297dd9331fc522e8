"""Results and checks do not depend on the caller's floating-point mode.

A process may have made its thread take subnormals for 0 (``torch.set_flush_denormal(True)``), round
in another direction, or end it with a signal where an operation is inexact or invalid. Whatever
decides or rounds a value therefore belongs behind the C interface, which sets a mode of its own.
"""

import ctypes
import platform
import struct
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

import softmaxlib as sml

ml_dtypes = pytest.importorskip("ml_dtypes")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="the mode is set through glibc's fenv_t of x86-64",
)

MASKS = 0x1F80
MODES = {
    "flush to zero": MASKS | 0x8040,
    "round down": MASKS | 0x2000,
    "round up": MASKS | 0x4000,
    "truncate and flush": MASKS | 0x6000 | 0x8040,
}
# Not x86's own exception of subnormal operands: CPython itself compares every number that it takes.
NO_TRAPS, ALL_TRAPS = MASKS, 0x100
SERIOUS_TRAPS = 0x1900  # invalid operations, divisions by zero and overflows
_MXCSR = 28  # its offset in fenv_t


@contextmanager
def mode(mxcsr):
    """Set the thread's SSE control register inside a ``with`` block."""
    libm = ctypes.CDLL("libm.so.6")
    saved, changed = ctypes.create_string_buffer(32), ctypes.create_string_buffer(32)
    libm.fegetenv(saved)
    libm.fegetenv(changed)
    struct.pack_into("<I", changed, _MXCSR, mxcsr)
    set_mode = libm.fesetenv
    set_mode(changed)
    try:
        yield
    finally:
        set_mode(saved)


F16, F32, F64, BF16 = np.float16, np.float32, np.float64, ml_dtypes.bfloat16
_random = np.random.default_rng(5)
X = _random.normal(0, 4, (3, 7))
TINY = X * 1e-310  # subnormal in float64
XS = {dtype: X.astype(dtype) for dtype in (F16, BF16, F32, F64)}
TINY_XS = {F32: (X * 1e-38).astype(F32), BF16: (X * 1e-38).astype(BF16)}
TINY_GRAD, MAGNITUDES = (X * 1e-40).astype(F32), np.abs(X)
FAR, ONES_MORE, MASK, INTEGERS = X * 1e18, X + 1, X > -9, np.array([[3, 2**53 + 1, 2**53 - 1]])
GAP = np.array([[100, 0]], F32)
HALF_GAP = np.array([[9, 0]], F16)
LABELS = np.array([0, 3, 6])
SHARES = np.full((3, 7), 1 / 7)
WEIGHTS = np.array([1e-40, 2e-40, 1, 1e-39, 0, 2, 3e-41], F32)
Y, LOG_Y = sml.softmax(X), sml.log_softmax(X)
S, LOG_S = sml.stablemax(X), sml.log_stablemax(X)
LARGE = np.array([[2**62 + 1], [2**53 + 1], [3]])
FORWARD = (sml.softmax, sml.log_softmax, sml.logsumexp, sml.stablemax, sml.log_stablemax)

CASES = {
    f"{f.__name__} of {np.dtype(dtype)}": lambda f=f, dtype=dtype: f(XS[dtype])
    for f in FORWARD
    for dtype in XS
}
CASES |= {
    f"{f.__name__} {name}": lambda f=f, options=options: f(**({"x": X} | options))
    for f in FORWARD
    for name, options in {
        "of subnormals": {"x": TINY, "temperature": 1e-310},
        "with a subnormal temperature": {"x": TINY, "temperature": 5e-324},
        "with subnormal temperatures": {
            "x": TINY_XS[F32],
            "temperature": np.array([[1e-40], [1], [3e-45]], F32),
        },
        "with bfloat16 temperatures": {
            "x": TINY_XS[BF16],
            "temperature": np.array([[1e-40], [1], [2]], BF16),
        },
        "with temperatures beyond 2**53": {"x": FAR, "temperature": LARGE},
        "with integers as bias": {"bias": LARGE},
        "of integers": {"x": INTEGERS},
        "to a half": {"dtype": F16, "bias": X},
    }.items()
}
CASES |= {
    f"cross_entropy, {reduction}, {name}": lambda r=reduction, args=args, o=options: (
        sml.cross_entropy(*args, reduction=r, return_grad=True, **o)
    )
    for reduction in ("mean", "sum", "none")
    for name, args, options in (
        ("a tiny loss", (GAP, [0]), {}),
        ("a tiny loss of a half", (HALF_GAP, [0]), {}),
        ("of a half", (XS[F16], LABELS), {"label_smoothing": 0.1}),
        ("of bfloat16", (XS[BF16], LABELS), {"activation": "stablemax"}),
        ("weights", (XS[F32], LABELS), {"weight": WEIGHTS}),
        ("integer weights", (X, LABELS), {"weight": [2**53 + 1, 1, 2, 2**62 + 1, 3, 4, 5]}),
        ("weights and smoothing", (X, LABELS), {"weight": WEIGHTS, "label_smoothing": 0.3}),
        ("probabilities", (X, SHARES), {"label_smoothing": 5e-324}),
        ("a mask", (X, LABELS), {"where": MASK, "temperature": 1e-320}),
    )
}
CASES |= {
    "take_log_softmax": lambda: sml.take_log_softmax(XS[F16], LABELS, return_logsumexp=True),
    "sample": lambda: sml.sample(X, np.random.default_rng(1), top_p=5e-324, min_p=5e-324),
    "topk_softmax": lambda: sml.topk_softmax(XS[F16], 3, temperature=5e-324),
    "softmax_backward": lambda: sml.softmax_backward(TINY, Y, temperature=1e-3),
    "log_softmax_backward": lambda: sml.log_softmax_backward(TINY, LOG_Y, temperature=LARGE),
    "logsumexp_backward": lambda: sml.logsumexp_backward(TINY[:, 0], X, sml.logsumexp(X)),
    "stablemax_backward": lambda: sml.stablemax_backward(TINY, X, S),
    "log_stablemax_backward": lambda: sml.log_stablemax_backward(XS[F16], X, LOG_S),
    "orthogonal_gradient": lambda: sml.orthogonal_gradient(XS[F16], ONES_MORE),
    "orthogonal_gradient of subnormals": lambda: sml.orthogonal_gradient(TINY, X),
    "orthogonal_gradient of float32": lambda: sml.orthogonal_gradient(TINY_GRAD, MAGNITUDES),
}

# What is refused: the argument that the message names.
REFUSED = {
    "a temperature of 0": (lambda: sml.softmax(X, temperature=0.0), "temperature"),
    "a negative subnormal": (lambda: sml.softmax(X, temperature=-5e-324), "temperature"),
    "NaN": (lambda: sml.log_softmax(X, temperature=float("nan")), "temperature"),
    "NaN in an array": (
        lambda: sml.softmax(X, temperature=np.array([[1], [np.nan], [1]])),
        "temperature",
    ),
    "a NaN share": (lambda: sml.cross_entropy(X, LABELS, label_smoothing=np.nan), "label_smooth"),
    "a negative share": (lambda: sml.cross_entropy(X, LABELS, label_smoothing=-5e-324), "label"),
    "a NaN weight": (lambda: sml.cross_entropy(X, LABELS, weight=[np.nan] * 7), "weight"),
    "a negative weight": (lambda: sml.cross_entropy(X, LABELS, weight=[-5e-324] * 7), "weight"),
    "top_p of 0": (lambda: sml.sample(X, np.random.default_rng(1), top_p=0.0), "top_p"),
    "top_p of NaN": (lambda: sml.sample(X, np.random.default_rng(1), top_p=np.nan), "top_p"),
    "a negative min_p": (lambda: sml.sample(X, np.random.default_rng(1), min_p=-5e-324), "min_p"),
}


def bits(result):
    """Return all bits of a result, which may be a tuple of some."""
    if isinstance(result, tuple):
        return b"".join(bits(r) for r in result)
    return np.asarray(result).tobytes()


@pytest.mark.parametrize("name", CASES)
def test_results(name):
    call = CASES[name]
    expected = bits(call())
    for which, mxcsr in MODES.items():
        with mode(mxcsr):
            got = call()
        assert bits(got) == expected, which


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, argument = REFUSED[name]
    for mxcsr in (NO_TRAPS, *MODES.values()):
        with mode(mxcsr), pytest.raises(ValueError, match=argument):
            call()


def test_the_mode_is_the_callers_again():
    libm = ctypes.CDLL("libm.so.6")
    environment = ctypes.create_string_buffer(32)
    with mode(MODES["truncate and flush"]):
        CASES["cross_entropy, mean, weights"]()
        libm.fegetenv(environment)
    # But for the flags of what happened.
    assert struct.unpack_from("<I", environment, _MXCSR)[0] & ~0x3F == MODES["truncate and flush"]


def test_numpy_raises():
    with np.errstate(all="raise"):
        for call in CASES.values():
            call()


def test_trapped_exceptions():
    """A call does nothing that IEEE 754 lets the processor trap, inexact results included."""
    subprocess.run([sys.executable, __file__], check=True, timeout=120)


def run_with_traps():
    expected = {name: bits(call()) for name, call in CASES.items()}
    results, errors = {}, {}
    with mode(ALL_TRAPS):
        for name, call in CASES.items():
            results[name] = call()
    with mode(SERIOUS_TRAPS):  # CPython's own text of a number is inexact in between
        for name, (call, _) in REFUSED.items():
            try:
                call()
            except ValueError as error:
                errors[name] = error
    assert {name: bits(result) for name, result in results.items()} == expected
    assert errors.keys() == REFUSED.keys()


if __name__ == "__main__":
    run_with_traps()
