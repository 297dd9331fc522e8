"""The bounds for any row at all, by a search for rows that come near them.

Random rows are kind: their rounding errors cancel. Here rows repeat a few values, as long as a
vector or a group is, so that all lanes round alike; some have a spike, a tail or steps. The worst
rows are varied, and kept where that makes them worse.
"""

import numpy as np
import oracle
import pytest

import softmaxlib as sml

FUNCTIONS = {"softmax": sml.softmax, "log_softmax": sml.log_softmax, "logsumexp": sml.logsumexp}
# docs/numerics.md has these beside those for ordinary rows, which are 5, 4 and 2.
ANY_ROW = {"softmax": 7, "log_softmax": 5, "logsumexp": 3}
LENGTHS = (64, 192, 1216, 4096, 17_000)
WORST = 8  # so many rows are varied


def row_of(values, repeats, n):
    return np.resize(np.repeat(values, repeats), n).astype(np.float32)


def fresh(rng, n):
    """Return a row of one of the kinds above."""
    row = row_of(rng.uniform(-4, 4, rng.integers(1, 9)), (1, 16, 64)[rng.integers(3)], n)
    kind = rng.integers(4)
    if kind == 0:
        row[rng.integers(n)] = rng.uniform(0, 12)
    elif kind == 1:  # a tail far below, of many
        row[n // 8 :] -= np.float32(rng.uniform(5, 25))
    elif kind == 2:
        row += np.linspace(0, rng.uniform(-30, 30), n, dtype=np.float32)
    return row


def varied(rng, row):
    """Return the row with one of its values, or all of them, changed a little."""
    row = row.copy()
    change = np.float32(rng.normal() * 10.0 ** rng.uniform(-6, 0))
    if rng.random() < 0.2:
        return row + change
    row[row == row[rng.integers(len(row))]] += change
    return row


def errors(name, rows):
    """Return the largest error of each row, in ULP."""
    exact = oracle.expected(name, rows)
    actual = FUNCTIONS[name](rows)
    if name != "logsumexp":
        return oracle.ulp_error(actual, exact, np.float32).max(-1)
    size = np.maximum(np.abs(exact), 1)  # its ULP is that of no less than 1
    return np.abs(actual - exact) / np.spacing(size.astype(np.float32))


def search(name, n, rounds, seed):
    """Return the worst row that is found, and its error."""
    rng = np.random.default_rng(seed)
    rows = np.stack([fresh(rng, n) for _ in range(4 * WORST)])
    found = errors(name, rows)
    for _ in range(rounds):
        best = np.argsort(-found)[:WORST]
        others = [fresh(rng, n) for _ in range(WORST)]
        others += [varied(rng, rows[i]) for i in best for _ in range(2)]
        rows = np.concatenate([rows[best], np.stack(others)])
        found = np.concatenate([found[best], errors(name, rows[WORST:])])
    return rows[found.argmax()], found.max()


def check(name, rounds, seed):
    for n in LENGTHS:
        row, error = search(name, n, rounds if n < 10_000 else rounds // 4, seed)
        assert error <= ANY_ROW[name], (name, n, np.unique(row).tolist())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_row_exceeds_the_bounds_for_any(isa, name):
    check(name, 15, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_row_that_a_long_search_finds_does(name, seed):
    check(name, 60, seed)


def test_a_row_that_is_worse_than_ordinary_ones(isa):
    """Beyond 5, the bound for ordinary rows: the two numbers are not one."""
    values = (1.5569404363632202, 0.17028608918190002, -1.2539368867874146, 0.858715295791626)
    row = row_of(values, 16, 1216)
    row[0] = 3.0057036876678467
    assert 5 < errors("softmax", row[None])[0] <= ANY_ROW["softmax"]


def test_log_softmax_of_many_far_below_one(isa):
    """The terms of 2^20 - 1 elements, each below the least float's ULP of 1, still count."""
    row = np.full(1 << 20, -106.5, np.float32)
    row[0] = 0
    assert sml.log_softmax(row)[0] == pytest.approx(-5.8646e-41, rel=1e-3)
