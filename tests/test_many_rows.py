"""The kernels over many rows give the bits of those that take one row at a time."""

import numpy as np
import pytest

import softmaxlib as sml
from softmaxlib import _bench

BITS = {np.float16: np.uint16, np.float32: np.uint32, np.float64: np.uint64}
LENGTHS = (*range(1, 70), 100, 128, 200, 255, 256, 257, 383, 384, 385, 500, 511, 512, 513, 600)
LENGTHS += (1000, 1023, 1024, 1025, 2000, 5000, 20_000)
LAST_AXIS = [((rows, n), 1) for n in LENGTHS for rows in (1, 2, 5, 15, 16, 17, 33, 70)]
COLUMNS = [
    ((n, columns), 0)
    for n in (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 40, 48, 63, 64, 65, 100, 127, 128, 129, 1000)
    + (1024, 1025, 2047, 16_384, 16_385, 20_000)
    for columns in (1, 2, 7, 16, 17, 33, 100)
]
COLUMNS += [((3, n, columns), 1) for n in (4, 64, 65, 300) for columns in (5, 16, 257)]
COLUMNS += [((1100, 4097), 0), ((2, 90, 3000), 1), ((4, 5, 6, 7), 2), ((4, 5, 6, 7), 0)]

DIFFICULT = (
    lambda row, rng: np.put(row, rng.integers(row.size), np.nan),
    lambda row, rng: np.put(row, rng.integers(row.size), np.inf),
    lambda row, rng: np.put(row, rng.integers(row.size), -np.inf),
    lambda row, rng: np.put(row, rng.integers(row.size), 200),
    lambda row, rng: np.copyto(row, -np.inf),
    lambda row, rng: np.copyto(row, np.linspace(-3000, 3000, row.size)),  # raises every reference
    lambda row, rng: np.copyto(row, row * 2e4, casting="unsafe"),  # beyond the safe range
    lambda row, rng: np.copyto(row, row - 90),
    lambda row, rng: np.copyto(row, -(row.astype(np.float64) ** 4), casting="unsafe"),  # subnormals
)


def rows_of(shape, axis, dtype, rng):
    x = (rng.standard_normal(shape) * 4).astype(dtype)
    by_row = np.moveaxis(x, axis, -1)
    places = list(np.ndindex(by_row.shape[:-1]))
    with np.errstate(all="ignore"):
        for k in range(min(len(places), 2 * len(DIFFICULT)) * int(rng.integers(2))):
            place = places[rng.integers(len(places))]
            row = by_row[place].copy()
            DIFFICULT[k % len(DIFFICULT)](row, rng)
            by_row[place] = row
    return x


def assert_same(found, expected, what):
    bits = BITS[found.dtype.type]
    same = (found.view(bits) == expected.view(bits)) | (np.isnan(found) & np.isnan(expected))
    assert same.all(), (what, np.argwhere(~same)[:3], sml.last_kernel())


@pytest.mark.parametrize("cases", [LAST_AXIS, COLUMNS], ids=["last axis", "columns"])
@pytest.mark.parametrize("dtype", list(BITS))
def test_same_bits_as_row_by_row(isa, dtype, cases):
    rng = np.random.default_rng(31)
    kernels = set()
    for shape, axis in cases:
        size = int(np.prod(shape))
        if size > (300_000 if dtype == np.float32 and isa != "scalar" else 20_000):
            continue
        x = rows_of(shape, axis, dtype, rng)
        with sml.use_isa(isa), sml.threads(int(rng.integers(1, 4))):
            expected = sml.softmax(x, axis, algorithm="two_pass")
            assert_same(sml.softmax(x, axis), expected, (shape, axis))
            kernels.add(sml.last_kernel())
            in_place = x.copy()
            assert_same(sml.softmax(in_place, axis, out=in_place), expected, (shape, axis, "place"))
            # Wider in memory than it is, and not aligned to its own elements.
            wide = np.empty((*shape[:-1], shape[-1] + 3), dtype)[..., 1:-2]
            wide[...] = x
            assert_same(sml.softmax(wide, axis), expected, (shape, axis, "wide"))
            odd = np.empty(x.nbytes + 1, np.uint8)[1:].view(dtype).reshape(shape)
            odd[...] = x
            assert_same(sml.softmax(odd, axis, out=odd), expected, (shape, axis, "odd"))
    names = {"columns"} if cases is COLUMNS else {"in_lanes", "batched", "pipelined"}
    found = {kernel.split("softmax_")[1].rpartition("_")[0] for kernel in kernels}
    if isa == "scalar":  # it has none of them
        assert not names & found
    else:
        assert names <= found


@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1_600_000, 3), 1),
        ((100_000, 50), 1),
        ((9000, 530), 1),
        ((40, 130_000), 1),
        ((60, 90_000), 0),
    ],
)
def test_streaming_stores(shape, axis, dtype):
    rng = np.random.default_rng(7)
    x = (rng.standard_normal(shape, np.float32) * 4).astype(dtype)
    x[1::97] *= 0.125
    x[5, 1] = np.nan
    for offset in (0, 3):
        out = np.empty(x.size + 64, dtype)[offset : x.size + offset].reshape(shape)
        with sml.threads(1 + offset):
            sml.softmax(x, axis, out=out)
            expected = sml.softmax(x, axis, algorithm="two_pass")
        assert_same(out, expected, (shape, axis, offset))


def test_one_column():
    x = np.array([[1.0], [-np.inf], [np.inf], [np.nan], [-3e38]] * 9, np.float32)
    y = sml.softmax(x)
    assert (y[0::5] == 1).all()
    assert np.isnan(y[1::5]).all()
    assert np.isnan(y[2::5]).all()
    assert np.isnan(y[3::5]).all()
    assert (y[4::5] == 1).all()


@pytest.mark.slow
def test_more_rows_than_32_bits_count():
    """Rows of one element, 2^31 and some, over the same few KiB of x: their sums are x itself."""
    few = np.linspace(-9, 9, 4096).astype(np.float16)
    repeats = 2**31 // few.size + 1
    if _bench.available_memory() < 3 * repeats * few.nbytes // 2:
        pytest.skip("not enough memory for 2^31 results")
    x = np.broadcast_to(few[:, None], (repeats, few.size, 1))
    out = np.empty(x.shape[:2], np.float16)
    with sml.threads(1):  # one task counts all of them
        sml.logsumexp(x, out=out)
    assert all((out[i : i + 4096] == few).all() for i in range(0, repeats, 4096))


@pytest.mark.slow
def test_a_row_longer_than_32_bits_count():
    """A broadcast row: the sum of 2^31 and some equal terms."""
    n = 2**31 + 5
    x = np.broadcast_to(np.float32(1.5), (n,))
    assert abs(sml.logsumexp(x) - (1.5 + np.log(float(n)))) < 2e-6
