"""Rows with gaps between them, in what is read and in what is written: as without."""

import numpy as np
import oracle
import pytest
from test_short_rows import same

import softmaxlib as sml

FUNCTIONS = ("softmax", "log_softmax", "stablemax", "log_stablemax")
LENGTHS = (1, 2, 16, 32, 48, 64, 100, 128, 512, 1024, 1040, 2000)
ROWS, GAP = 21, 3


def with_gaps(values, fill=0):
    """Return a copy of rows as a part of longer ones, and these."""
    whole = np.full((len(values), values.shape[1] + GAP), fill, values.dtype)
    whole[:, : values.shape[1]] = values
    return whole[:, : values.shape[1]], whole


def check(out, whole, wanted, what):
    assert same(np.ascontiguousarray(out), wanted), (what, sml.last_kernel())
    assert (whole[:, out.shape[1] :].astype(np.float32) == 7).all(), what


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_functions_and_gradients(isa, n, dtype):
    rng = np.random.default_rng(n)
    rows = (3 * rng.standard_normal((ROWS, n))).astype(dtype)
    grad = rng.standard_normal((ROWS, n)).astype(dtype)
    x, g = with_gaps(rows)[0], with_gaps(grad)[0]
    where = rng.random((ROWS, n)) < 0.8
    where[:, 0] = True
    of_where = np.zeros((ROWS, n + GAP), bool)
    of_where[:, :n] = where
    for name in FUNCTIONS:
        for options, gapped in (
            ({}, {}),
            ({"temperature": 0.5}, {"temperature": 0.5}),
            ({"where": where}, {"where": of_where[:, :n]}),
        ):
            y = getattr(sml, name)(rows, **options)
            out, whole = with_gaps(np.zeros_like(rows), 7)
            getattr(sml, name)(x, out=out, **gapped)
            check(out, whole, y, (name, list(options)))
            backward = getattr(sml, name + "_backward")
            operands = ((grad, rows, y), (g, x, with_gaps(y)[0]))
            if not name.endswith("stablemax"):
                operands = tuple((a, c) for a, _, c in operands)
            wanted = backward(*operands[0], **options)
            for given in operands:
                out, whole = with_gaps(np.zeros_like(rows), 7)
                backward(*given, out=out, **gapped)
                check(out, whole, wanted, (name, "backward", list(options)))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_losses(isa, n, dtype):
    rng = np.random.default_rng(n)
    rows = (3 * rng.standard_normal((ROWS, n))).astype(dtype)
    target = rng.integers(0, n, ROWS)
    for options in ({}, {"label_smoothing": 0.1}, {"activation": "stablemax"}):
        loss, wanted = sml.cross_entropy(
            rows, target, return_grad=True, reduction="none", **options
        )
        for x in (rows, with_gaps(rows)[0]):
            out, whole = with_gaps(np.zeros_like(rows), 7)
            found, _ = sml.cross_entropy(
                x, target, return_grad=True, reduction="none", grad_out=out, **options
            )
            assert same(found, loss)
            check(out, whole, wanted, list(options))
