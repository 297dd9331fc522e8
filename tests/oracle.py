"""What the functions ought to return: in longdouble, in mpmath, and how far off an answer is.

The longdouble oracle (64-bit significand on x86) is wrong by less than 2^-28 ULP of float32, and by
less than 0.4 ULP of float64 while the arguments stay below 1e3 in magnitude; beyond that, and for
tight bounds on float64, ask `mp_row`.
"""

import ml_dtypes
import mpmath
import numpy as np

FUNCTIONS = ("softmax", "log_softmax", "stablemax", "log_stablemax", "logsumexp")
DTYPES = tuple(np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))

# Bits of the significand, least and largest exponent of a normal number.
FORMATS = {
    "float16": (11, -14, 15),
    "bfloat16": (8, -126, 127),
    "float32": (24, -126, 127),
    "float64": (53, -1022, 1023),
}

# The contract's largest errors (numerics.md).
FLOAT32_ULP = {"softmax": 5, "log_softmax": 4, "stablemax": 4, "log_stablemax": 4, "logsumexp": 2}
FLOAT64_ULP = 5
HALF_ULP = 0.5 + 2.0**-10


def bound(function, dtype):
    """Return the contract's largest error in ULP."""
    if dtype == np.float64:
        return FLOAT64_ULP
    return FLOAT32_ULP[function] if dtype == np.float32 else HALF_ULP


def within_contract(function, actual, exact, dtype):
    """Tell of each element whether it is as near as the contract says."""
    good = ulp_error(actual, exact, dtype) <= bound(function, dtype)
    if function == "logsumexp":  # its absolute bound near 0
        near = 2.0 ** -(51 if dtype == np.float64 else 23)
        with np.errstate(invalid="ignore"):
            good |= np.abs(np.asarray(actual).astype(np.longdouble) - exact) <= near
    return good


def expected(
    function, x, axis=-1, *, temperature=1.0, bias=None, where=None, dtype=None, keepdims=False
):
    """Return the function's value in longdouble."""
    x = np.asarray(x)
    with np.errstate(all="ignore"):
        if dtype is not None:
            x = x.astype(dtype)
        z = x.astype(np.longdouble) / np.asarray(temperature).astype(np.longdouble)
        rest = np.zeros_like(z)  # what z + bias rounds away, which a large common bias leaves
        if bias is not None:
            of_x, of_bias = z, np.asarray(bias).astype(np.longdouble)
            z = of_x + of_bias
            tail = z - of_x
            rest = np.where(np.isfinite(z), (of_x - (z - tail)) + (of_bias - tail), 0)
    taken = np.ones(z.shape, bool) if where is None else np.broadcast_to(where, z.shape)

    # One distribution per row.
    axes = _axes(axis, z.ndim)
    kept = [a for a in range(z.ndim) if a not in axes]
    order = [*kept, *axes]
    matrix = [int(np.prod([z.shape[a] for a in group], dtype=int)) for group in (kept, axes)]
    moved_shape = [z.shape[a] for a in order]
    z, rest, taken = (array.transpose(order).reshape(matrix) for array in (z, rest, taken))

    with np.errstate(all="ignore"):
        if function in ("softmax", "log_softmax"):
            z = [_shifted(row, r, t) for row, r, t in zip(z, rest, taken, strict=True)]
        values = [_ROW[function](row[t]) for row, t in zip(z, taken, strict=True)]
    if function == "logsumexp":
        shape = [1 if a in axes else n for a, n in enumerate(x.shape) if keepdims or a in kept]
        return np.array(values, np.longdouble).reshape(shape)
    y = np.full(matrix, -np.inf if function.startswith("log") else 0, np.longdouble)
    for row, t, value in zip(y, taken, values, strict=True):
        row[t] = value
    return y.reshape(moved_shape).transpose(np.argsort(order).astype(int))


def _shifted(row, rest, taken):
    """Return a row less its maximum, both being unevaluated sums; as it is where that is none."""
    seen = np.flatnonzero(taken)
    if seen.size == 0:
        return row
    top = seen[np.lexsort((rest[seen], row[seen]))[-1]]  # NaN is last
    if not np.isfinite(row[top]):
        return row
    return (row - row[top]) + (rest - rest[top])


def _axes(axis, ndim):
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(a % ndim for a in axes) if ndim else ()


def _without_one_max(terms, z):
    """Sum the terms of all elements but one of those with the largest z."""
    return np.delete(terms, np.argmax(z)).sum()


def _undefined(z):
    return z.size and (np.isnan(z).any() or np.isinf(z.max()))


def _softmax(z):
    if _undefined(z):
        return np.full_like(z, np.nan)
    e = np.exp(z - z.max(initial=-np.inf))
    return e / e.sum()


def _log_softmax(z):
    if not z.size or _undefined(z):
        return np.full_like(z, np.nan)
    shifted = z - z.max()
    return shifted - np.log1p(_without_one_max(np.exp(shifted), z))


def _logsumexp(z):
    largest = z.max(initial=-np.inf)
    if not np.isfinite(largest):
        return largest
    return largest + np.log1p(_without_one_max(np.exp(z - largest), z))


def _s(z):
    return np.where(z >= 0, z + 1, 1 / (1 - z))


def _stablemax(z):
    if _undefined(z):
        return np.full_like(z, np.nan)
    s = _s(z)
    return s / s.sum()


def _log_stablemax(z):
    if not z.size or _undefined(z):
        return np.full_like(z, np.nan)
    s, log_s = _s(z), np.sign(z) * np.log1p(np.abs(z))
    rest = _without_one_max(s, z) / s.max()
    return (log_s - log_s[np.argmax(z)]) - np.log1p(rest)


_ROW = {
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "stablemax": _stablemax,
    "log_stablemax": _log_stablemax,
    "logsumexp": _logsumexp,
}


def mp_row(function, x, temperature=1.0, bias=None):
    """Return the function of one row of finite numbers, rounded to longdouble from 300 bits."""
    with mpmath.workprec(300):
        bias = [0.0] * len(x) if bias is None else bias
        z = [
            mpmath.mpf(float(v)) / float(temperature) + float(b)
            for v, b in zip(x, bias, strict=True)
        ]
        if function.endswith("stablemax"):
            terms = [v + 1 if v >= 0 else 1 / (1 - v) for v in z]
        else:
            terms = [mpmath.exp(v) for v in z]
        total = mpmath.fsum(terms)
        if function == "logsumexp":
            return _to_longdouble(mpmath.log(total))
        values = (t / total for t in terms)
        if function.startswith("log"):  # log1p of the others where one element has nearly all
            values = (
                -mpmath.log1p(mpmath.fsum(terms[:i] + terms[i + 1 :]) / t)
                for i, t in enumerate(terms)
            )
        return np.array([_to_longdouble(v) for v in values])


# A gradient's largest error, in ULP of the scale that `gradient` returns.
GRADIENT_FLOAT32_ULP = {
    "softmax": 5,
    "stablemax": 5,
    "log_softmax": 4,
    "log_stablemax": 4,
    "logsumexp": 1,
}
GRADIENT_FLOAT64_ULP = 8


def gradient_bound(function, dtype):
    """Return the contract's largest error of a gradient in ULP of its scale."""
    if dtype == np.float64:
        return GRADIENT_FLOAT64_ULP
    return GRADIENT_FLOAT32_ULP[function] if dtype == np.float32 else HALF_ULP


def gradient(function, grad, x, y, axis=-1, *, temperature=1.0, where=True):
    """Return the gradient in longdouble and the scale of its error, from x and y as they are."""
    g, x, y, t = (np.asarray(a).astype(np.longdouble) for a in (grad, x, y, temperature))
    axes = _axes(axis, x.ndim)
    with np.errstate(all="ignore"):
        z = x / t
        if function == "logsumexp":
            g, y = (np.expand_dims(a, axes) for a in (g, y))
            d = np.where(np.logical_and(where, z > -np.inf), g * np.exp(z - y), 0) / t
            return d, np.abs(d)
        is_log = function.startswith("log")
        taken = np.logical_and(where, y != (-np.inf if is_log else 0))
        g = np.where(taken, g, 0)
        p = np.where(taken, np.exp(y) if is_log else y, 0)
        terms = g if is_log else p * g
        total, size = (a.sum(axes, keepdims=True) for a in (terms, np.abs(terms)))
        if is_log:
            d, scale = g - p * total, np.abs(g) + p * size
        else:
            d, scale = p * (g - total), p * (np.abs(g) + size)
        factor = 1 / (t * (1 + np.abs(z)) if "stable" in function else t)
        return np.where(taken, d * factor, 0), np.where(taken, scale * factor, 0)


def mp_gradient(function, grad, x, y):
    """Return the same for one row of finite numbers, from 300 bits."""
    with mpmath.workprec(300):
        g, x, y = ([mpmath.mpf(float(v)) for v in a] for a in (grad, x, y))
        is_log = function.startswith("log")
        p = [mpmath.exp(v) for v in y] if is_log else y
        terms = g if is_log else [a * b for a, b in zip(p, g, strict=True)]
        total, size = mpmath.fsum(terms), mpmath.fsum(terms, absolute=True)
        factor = [1 / (1 + abs(v)) if "stable" in function else mpmath.mpf(1) for v in x]
        if is_log:
            d = [a - b * total for a, b in zip(g, p, strict=True)]
            scale = [abs(a) + b * size for a, b in zip(g, p, strict=True)]
        else:
            d = [b * (a - total) for a, b in zip(g, p, strict=True)]
            scale = [b * (abs(a) + size) for a, b in zip(g, p, strict=True)]
        return tuple(
            np.array([_to_longdouble(v * f) for v, f in zip(values, factor, strict=True)])
            for values in (d, scale)
        )


def gradient_error(actual, exact, scale, dtype):
    """Return how many ULP of its scale a gradient is off; inf where it is of another kind."""
    actual = np.asarray(actual).astype(np.longdouble)
    with np.errstate(all="ignore"):
        error = np.abs(actual - exact) / unit_of(scale, dtype)
    same = (actual == exact) | (np.isnan(actual) & np.isnan(exact))
    return np.where(same, 0, np.where(np.isfinite(actual) & np.isfinite(exact), error, np.inf))


def _to_longdouble(value):
    return np.longdouble(mpmath.nstr(value, 25))


def unit_of(exact, dtype):
    """Return the unit in the last place of dtype at each value."""
    bits, least, _ = FORMATS[np.dtype(dtype).name]
    exponent = np.where(exact == 0, least, np.frexp(exact)[1] - 1)
    return np.ldexp(np.longdouble(1), np.maximum(exponent, least) - (bits - 1))


def ulp_error(actual, exact, dtype):
    """Return how many ULP of dtype actual is off, elementwise; inf where it is of another kind.

    The ULP is that of the exact value: below the normal numbers that of the subnormals, and an
    infinity is right where the exact value rounds to it.
    """
    bits, _, largest = FORMATS[np.dtype(dtype).name]
    actual = np.asarray(actual).astype(np.longdouble)
    exact = np.asarray(exact, np.longdouble)
    with np.errstate(all="ignore"):
        error = np.abs(actual - exact) / unit_of(exact, dtype)
        too_large = np.longdouble(2) ** (largest + 1) - np.longdouble(2) ** (largest - bits)
        overflowed = np.isinf(actual) & (np.sign(actual) == np.sign(exact))
        overflowed &= np.abs(exact) >= too_large
    same = (actual == exact) | (np.isnan(actual) & np.isnan(exact)) | overflowed
    error = np.where(same, 0, error)
    return np.where(np.isnan(error) | (np.isnan(actual) != np.isnan(exact)), np.inf, error)
