"""Sums skip clamps and comparisons where all arguments of a chunk are usual. With what is not, at
any place of a row, the bits are those of the scalar leaf, which never skips any."""

import itertools

import numpy as np
import pytest

import softmaxlib as sml

ISAS = [isa for isa in sml.available_isas() if isa != "scalar"]
FUNCTIONS = ("softmax", "log_softmax", "logsumexp")


def unusual_rows(n, dtype, seed):
    """Rows of N(0, 1), each with a few elements far from it: at an edge of the window or beyond."""
    rng = np.random.default_rng([seed, n])
    double = dtype == np.float64
    # Binades from the row's first elements at which results leave the window, raise the reference,
    # are clamped, or leave the range of the dtype.
    edges = [-1087, -500, -474, -64, 38, 39, 41, 64, 1000] if double else [-150, -91, -89, -40, 60]
    edges += [-153, -26, 37, 38, 39, 40, 41, 63, 67, 127]
    far = [e * np.log(2) + d for e, d in itertools.product(edges, (-0.4, 0, 0.4))]
    far += [np.inf, -np.inf, np.nan, 3e38, -3e38, 4e4, -4e4]
    x = rng.standard_normal((len(far) + 8, n)).astype(dtype)
    for row, value in zip(x, far, strict=False):
        count = rng.integers(1, 4)
        row[rng.integers(0, n, count)] = value
    for row in x[len(far) :]:  # several kinds in one row
        row[rng.integers(0, n, 6)] = rng.choice(far[:-7], 6)
    return x


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", [1025, 1100, 2048, 5000, 20_000])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_same_bits(function, n, dtype):
    x = unusual_rows(n, dtype, 1)
    call = getattr(sml, function)
    ways = [{}, {"temperature": 0.75}, {"temperature": np.full((len(x), 1), 0.75)}]
    ways += [{"algorithm": a} for a in ("two_pass", "two_pass_reload", "three_pass_reload")]
    for options in ways:
        with sml.use_isa("scalar"):
            wanted = np.asarray(call(x, **options))
        assert np.isnan(wanted).any(), "the rows with NaN"
        for isa in ISAS:
            with sml.use_isa(isa):
                results = {"out of place": call(x, **options)}
                # Rows that lie side by side go through tiles, where results replace arguments.
                down = np.ascontiguousarray(x.T)
                along = options | (
                    {"temperature": np.full((1, len(x)), 0.75)} if "temperature" in options else {}
                )
                results["side by side"] = np.asarray(call(down, 0, **along)).T
                if function != "logsumexp":
                    results["in place"] = call(y := x.copy(), out=y, **options)
            for way, result in results.items():
                same = (result == wanted) | (np.isnan(result) & np.isnan(wanted))
                assert same.all(), (isa, way, options, np.argwhere(~same)[:3])
