#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Regenerates the constants of the vector exp and log (needs only mpmath).

    python3 csrc/isa/math/coefficients.py > csrc/isa/math/coefficients.hpp

Every approximation is a polynomial q, and every error is *relative* to the
function computed, written as E(x) = u(x) * q(x) - v(x):

    exp   (1 + t q(t)) / e^t - 1               u = t / e^t    v = 1 - 1 / e^t
    log   (2 s + s z P(z)) / 2 atanh(s) - 1    u = z s / (2 atanh s)
          with z = s^2                         v = 1 - s / atanh s

Remez gives the best real coefficients. They are then rounded one by one, the
low order first, and after each the rest is refitted, so that later coefficients
absorb the rounding of earlier ones. Printed bounds are those of the rounded
polynomial in exact arithmetic; the rounding of its evaluation comes on top.
"""

import re
import struct
from bisect import insort

from mpmath import (
    atanh,
    ceil,
    cos,
    exp,
    floor,
    frexp,
    ldexp,
    log,
    lu_solve,
    matrix,
    mp,
    mpf,
    pi,
    polyval,
    sign,
    sqrt,
)

mp.dps = 70
FLOAT, DOUBLE = 24, 53  # a format is named by its number of significant bits
BEAM = 2  # partly rounded candidates kept at each step


# --- Number formats ---------------------------------------------------------


def neighbours(x, bits):
    """x rounded down and up to `bits` bits (no subnormals occur here)."""
    shift = bits - frexp(x)[1]
    return {ldexp(f(ldexp(x, shift)), -shift) for f in (floor, ceil)}


def nearest(x, bits):
    with mp.workprec(bits):
        return +x


def literal(x, bits):
    """A C++ hexadecimal literal; float() is exact, as x is already rounded."""
    return re.sub(r"\.?0*p", "p", float(x).hex()) + "f" * (bits == FLOAT)


def power(error):
    """An upper bound of the error as a power of two."""
    return f"2^{float(ceil(100 * log(error, 2)) / 100):.2f}"


# --- Approximation ----------------------------------------------------------


class Problem:
    """Minimise max |u(x) q(x) - v(x)| on [lo, hi], for q of a given degree.

    u and v vanish at 0 and nowhere else. q may have a prefix of coefficients
    that are already fixed; Remez finds the others.
    """

    def __init__(self, u, v, lo, hi, degree):
        self.u, self.v, self.degree = u, v, degree
        self.point = lambda angle: (lo + hi - (hi - lo) * cos(angle)) / 2
        # An even number of points, so that the grid avoids 0 inside [-a, a].
        self.count = 24 * (degree + 2)
        self.step = pi / (self.count - 1)
        self.grid = [
            (x, u(x), v(x)) for x in (self.point(i * self.step) for i in range(self.count))
        ]

    def error(self, q, x):
        return self.u(x) * polyval(q[::-1], x) - self.v(x)

    def worst(self, q):
        """The largest |E| and where: each peak of the grid, refined by the
        parabola through it and its neighbours (E is even in the angle at both
        ends of the interval, which therefore need no refinement)."""
        reversed_q = q[::-1]
        e = [abs(u * polyval(reversed_q, x) - v) for x, u, v in self.grid]
        peaks = [(e[i], self.grid[i][0]) for i in (0, -1)]
        for i in range(1, self.count - 1):
            a, b, c = e[i - 1 : i + 2]
            if a < b >= c:
                x = self.point((i + (a - c) / (a - 2 * b + c) / 2) * self.step)
                peaks.append(max((b, self.grid[i][0]), (abs(self.error(q, x)), x)))
        return max(peaks)

    def remez(self, fixed=()):
        """The best q that starts with `fixed`, and its error.

        Single-point exchange: the reference has one point more than there are
        free coefficients, and on it u(x) x^m (r(x) - target) alternates, where
        m = len(fixed) and r is the free part. The sign of u(x) x^m makes the
        alternation one of r itself, since x^m, x^(m+1), ... all vanish at 0.
        """
        q, m = list(fixed), len(fixed)
        free = range(m, self.degree + 1)
        if not free:
            return q, self.worst(q)[0]

        def side(x):
            return sign(self.u(x) * x**m)

        # Chebyshev nodes, skewed so that none is 0, where E is always 0.
        size = len(free) + 1
        ref = [self.point(pi * (i + mpf("0.4")) / size) for i in range(size)]
        while True:
            rows = [
                [self.u(x) * x**k for k in free] + [(-1) ** i * side(x)] for i, x in enumerate(ref)
            ]
            start = [-self.error(q[:m] or [0], x) for x in ref]
            *q[m:], level = lu_solve(matrix(rows), matrix(start))
            error, x = self.worst(q)
            if error <= abs(level) * (1 + mpf("1e-5")):
                return q, error
            # Let x in. Signs must still alternate: out goes the neighbour of the
            # same sign or, if x lies outside with the other sign, the far end.
            insort(ref, x)
            i = ref.index(x)
            same = [
                j
                for j in (i - 1, i + 1)
                if 0 <= j < len(ref)
                and side(x) * self.error(q, x) * side(ref[j]) * self.error(q, ref[j]) > 0
            ]
            del ref[same[0] if same else -1 if i == 0 else 0]

    def rounded(self, bits, fixed=()):
        """Coefficients in the format, and their error: a narrow beam search
        which tries both neighbours of each coefficient, low order first."""
        beam = [self.remez(fixed)]
        for k in range(len(fixed), self.degree + 1):
            tried = [self.remez(q[:k] + [c]) for q, _ in beam for c in neighbours(q[k], bits)]
            beam = sorted(tried, key=lambda result: result[1])[:BEAM]
        return beam[0]


def exp_problem(bound, degree):
    return Problem(lambda t: t * exp(-t), lambda t: 1 - exp(-t), -bound, bound, degree)


def log_problem(degree):
    def ratio(z):
        return sqrt(z) / atanh(sqrt(z)) if z else mpf(1)

    # 1 + f = sqrt(2) gives the largest s = f / (2 + f) = 3 - 2 sqrt(2).
    return Problem(
        lambda z: z * ratio(z) / 2, lambda z: 1 - ratio(z), mpf(0), (3 - 2 * sqrt(2)) ** 2, degree
    )


# --- Output -----------------------------------------------------------------


def show(name, values, bits, *comments):
    for comment in comments:
        print("//", comment)
    kind = "float" if bits == FLOAT else "double"
    print(f"constexpr {kind} {name}[{len(values)}] = {{")
    for value in values:
        print(f"    {literal(value, bits) + ',':<28}// {mp.nstr(value, 17)}")
    print("};\n")


def show_split(name, value, bits, hi=None):
    """value = hi + lo, with hi the nearest number unless it is given."""
    hi = nearest(value, bits) if hi is None else mpf(float.fromhex(hi))
    lo = nearest(value - hi, bits)
    kind = "float" if bits == FLOAT else "double"
    print(f"constexpr {kind} {name}Hi = {literal(hi, bits)};")
    print(
        f"constexpr {kind} {name}Lo = {literal(lo, bits)};"
        f"  // |hi + lo - exact| <= {power(abs(value - hi - lo))}"
    )


def show_exp(name, bits, bound, text, degree, modes):
    """The best of the given modes: c0 free, () or c0 == 1, (1,)."""
    problem = exp_problem(bound, degree)
    results = {fixed: problem.rounded(bits, fixed) for fixed in modes}
    best = min(modes, key=lambda fixed: results[fixed][1])
    label = {(): "c0 free", (1,): "c0 = 1"}
    show(
        name,
        results[best][0],
        bits,
        f"{name}: e^t = 1 + t q(t), |t| <= {text} = {mp.nstr(bound, 8)}, q of degree {degree}",
        *(
            f"{label[m]}: max relative error {power(results[m][1])} rounded,"
            f" {power(problem.remez(m)[1])} before rounding"
            + " (chosen)"
            * (m == best and len(modes) > 1)
            for m in modes
        ),
    )


def show_log(name, bits, target):
    """The lowest degree which keeps the rounded polynomial within target."""
    degree = 0
    while True:
        problem = log_problem(degree)
        ideal = problem.remez()[1]
        if ideal <= target:
            q, error = problem.rounded(bits)
            if error <= target:
                break
        print(f"// {name}: degree {degree} is not enough, {power(ideal)} before rounding")
        degree += 1
    show(
        name,
        q,
        bits,
        f"{name}: log(1 + f) = 2 s + s z P(z), s = f / (2 + f), z = s^2,",
        f"1 + f in [sqrt(1/2), sqrt(2)], 0 <= z <= {mp.nstr((3 - 2 * sqrt(2)) ** 2, 8)},"
        f" P of degree {degree}",
        f"max relative error {power(error)} rounded, {power(ideal)} before rounding",
    )


def main():
    ln2 = log(2)
    one = (mpf(1),)

    print("// Written by coefficients.py, to which it is compared by tests/test_coefficients.py.")
    print("// clang-format off")
    print("#pragma once\n\n#include <stdint.h>\n\nnamespace softmaxlib {\n")
    show_exp("kExp32", FLOAT, ln2 / 16 * mpf("1.02"), "1.02 ln2/16", 2, [(), one])
    show_exp("kExp32Accurate", FLOAT, ln2 / 16 * mpf("1.02"), "1.02 ln2/16", 3, [(), one])

    roots = [mpf(2) ** (mpf(j) / 8) for j in range(8)]
    floats = [nearest(root, FLOAT) for root in roots]
    print("// kExp32Table: bits of float(2^(j/8)), less those of 1 and j << 20: adding")
    print("// n << 20, n = 8 e + j, and the bits of 1 makes the bits of 2^e float(2^(j/8))")
    print("constexpr uint32_t kExp32Table[8] = {")
    for j, value in enumerate(floats):
        (bits,) = struct.unpack("<I", struct.pack("<f", float(value)))
        print(f"    {(bits - 0x3F800000 - (j << 20)) % 2**32:#010x}u,")
    print("};\n")
    show(
        "kExp32Delta",
        [nearest(log(r / f), FLOAT) for r, f in zip(roots, floats, strict=True)],
        FLOAT,
        "kExp32Delta: log(2^(j/8) / float(2^(j/8))), to be added to t",
    )

    print("// Range reduction of exp: the nearest number and its remainder")
    show_split("kLn2Over8", ln2 / 8, FLOAT)
    print(f"constexpr float k8Log2E = {literal(nearest(8 / ln2, FLOAT), FLOAT)};")
    show_split("kLn2", ln2, DOUBLE)
    print(f"constexpr double kLog2E = {literal(nearest(1 / ln2, DOUBLE), DOUBLE)};\n")

    for degree in 9, 11:
        problem = exp_problem(ln2 / 2 * mpf("1.01"), degree)
        print(
            f"// kExp64: degree {degree} would give {power(problem.rounded(DOUBLE, one)[1])}"
            f" rounded, {power(problem.remez(one)[1])} before rounding"
        )
    show_exp("kExp64", DOUBLE, ln2 / 2 * mpf("1.01"), "1.01 ln2/2", 10, [one])

    show_log("kLog32", FLOAT, mpf(2) ** -28)
    show_log("kLog64", DOUBLE, mpf(2) ** -58)

    print("// log: hi is short, so that e * hi is exact for any exponent e")
    show_split("kLogLn2Float", ln2, FLOAT, "0x1.62ep-1")
    show_split("kLogLn2Double", ln2, DOUBLE, "0x1.62e42feep-1")
    print("\n}  // namespace softmaxlib")


if __name__ == "__main__":
    main()
