"""The same bits over algorithms, ISAs, threads, stores, place in the batch, layout, alignment."""

import ml_dtypes
import numpy as np
import pytest

import softmaxlib as sml
from softmaxlib import _core

FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax")
ALGORITHMS = ("three_pass_recompute", "three_pass_reload", "two_pass", "two_pass_reload")
DTYPES = tuple(np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))
# One row's parts: groups of 64 or 32, chunks of 1,024 or 512, blocks of 16,384 or 8,192.
EDGES = [
    *range(1, 70),
    *(k + d for k in (128, 512, 1024, 2048, 8192, 16384, 32768) for d in (-17, -1, 0, 1, 16)),
    100_003,
]


def bits(array):
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def random_row(rng, n):
    """Return a row of one of the kinds that take different paths through the kernels."""
    x = rng.standard_normal(n) * 10 ** rng.uniform(-2, 2)
    match rng.integers(12):
        case 0:
            x *= 10 ** rng.uniform(0, 30)
        case 1:
            x[rng.random(n) < 0.4] = -np.inf
        case 2:
            x = np.sort(x * 30)
        case 3:
            x = np.sort(x * 3000)[::-1]
        case 4:
            x[rng.integers(n)] = rng.choice([np.nan, np.inf])
        case 5:
            x[:] = x[0]
        case 6:
            x *= 1e-40
        case 7:
            x = np.linspace(-5e4, 5e4, n)
        case 8:
            x += rng.choice([1e5, -1e5, 4e4, -3.2e4])
        case 9:
            x[rng.integers(n)] += rng.uniform(0, 120)
    return x


def variants(rng, isas, x, function):
    """Yield (name, result) of x's rows, computed in every way that must not matter."""
    compute = getattr(sml, function)
    for isa in isas:
        with sml.use_isa(isa):
            for algorithm in ALGORITHMS:
                yield f"{isa} {algorithm}", compute(x, algorithm=algorithm)
            algorithm = ALGORITHMS[rng.integers(4)]
            for threads in (2, 5):
                with sml.threads(threads):
                    yield f"{isa} {threads} threads", compute(x, algorithm=algorithm)
            # Another place in the batch, alone, another layout, another alignment, in place.
            order = rng.permutation(len(x))
            back = np.argsort(order)
            yield f"{isa} permuted", compute(x[order], algorithm=algorithm)[back]
            yield f"{isa} alone", np.stack([compute(row, algorithm=algorithm) for row in x])
            yield f"{isa} axis 0", np.asarray(compute(np.asfortranarray(x).T, axis=0)).T
            yield f"{isa} reversed memory", compute(x[:, ::-1].copy()[:, ::-1])
            moved = np.empty(x.nbytes + 64, np.uint8)[rng.integers(64) :][: x.nbytes]
            moved = moved.view(x.dtype).reshape(x.shape)
            moved[:] = x
            yield f"{isa} misaligned", compute(moved, algorithm=algorithm)
            yield f"{isa} all of where", compute(x, where=np.ones(x.shape, bool))
            yield f"{isa} bias 0", compute(x, bias=np.zeros(x.shape[-1], np.float32))
            if function != "logsumexp":
                yield f"{isa} in place", compute(moved, out=moved, algorithm=algorithm)
                yield f"{isa} streaming", streamed(x, function, algorithm, isa)


def streamed(x, function, algorithm, isa):
    """Compute through the compiled module, which takes the kind of stores."""
    y = np.empty_like(x)
    dtype = _core.dtypes[x.dtype.name]
    _core.run(
        _core.functions[function], x, y, dtype, dtype, (x.ndim - 1,), 1.0, None, None, 0, None,
        _core.algorithms[algorithm], _core.isas[isa], _core.stores["streaming"], 1,
    )  # fmt: skip
    return y


def check(rng, x, function, isas):
    reference = None
    for name, y in variants(rng, isas, x, function):
        if reference is None:
            first, reference = name, bits(y)
        different = bits(y) != reference
        assert not different.any(), (
            f"{function} of {x.dtype} {x.shape}: {name} differs from {first} "
            f"in {different.sum()} elements, first at {np.argwhere(different)[0]}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_around_every_edge(function, dtype):
    rng = np.random.default_rng([1, FUNCTIONS.index(function), DTYPES.index(dtype)])
    for n in EDGES:
        rows = 3 if n < 3000 else 1
        if n > 3000 and function not in ("softmax", "log_softmax"):
            continue
        with np.errstate(over="ignore"):
            x = np.stack([random_row(rng, n) for _ in range(rows)]).astype(dtype)
        check(rng, x, function, sml.available_isas())


def random_rows(seed, elements, isas):
    """Check batches of random rows until so many elements are done; return the number of rows."""
    rng = np.random.default_rng(seed)
    rows = done = 0
    while done < elements:
        n = int(np.exp(rng.uniform(0, np.log(100_000))))
        batch = int(rng.integers(1, 2 + min(3000, 30_000 // n)))
        dtype = DTYPES[rng.choice(4, p=[0.55, 0.15, 0.15, 0.15])]
        function = FUNCTIONS[rng.choice(5, p=[0.4, 0.2, 0.1, 0.15, 0.15])]
        with np.errstate(over="ignore"):
            x = np.stack([random_row(rng, n) for _ in range(min(batch, 64))])
            x = x[rng.integers(len(x), size=batch)]  # many rows cheaply, in another company
            x = (x * rng.uniform(0.5, 2, (batch, 1))).astype(dtype)
        check(rng, x, function, isas)
        rows += batch
        done += x.size
    return rows


def test_random_rows():
    assert random_rows(1, 12_000_000, sml.available_isas()) > 10_000


def masked_rows(rng, isas, elements=10_000):
    """Check a batch with a mask of its own per row, a bias and a temperature; return its rows."""
    n = int(np.exp(rng.uniform(0, np.log(5000))))
    rows = max(elements // n, 2)
    x = np.stack([random_row(rng, n) for _ in range(min(rows, 64))])
    x = x[rng.integers(len(x), size=rows)].astype(np.float32)
    where = rng.random((rows, n)) < rng.random()
    bias = rng.standard_normal(n).astype(np.float32)
    for function in FUNCTIONS:
        compute = getattr(sml, function)
        reference = None
        for isa in isas:
            with sml.use_isa(isa):
                for algorithm in ALGORITHMS:
                    y = bits(
                        compute(x, where=where, bias=bias, temperature=0.7, algorithm=algorithm)
                    )
                    reference = y if reference is None else reference
                    assert (y == reference).all(), (function, isa, algorithm, n)
                with sml.threads(5):
                    y = bits(compute(x, where=where, bias=bias, temperature=0.7))
                    assert (y == reference).all(), (function, isa, "5 threads", n)
    return rows


def test_masked_rows():
    rng = np.random.default_rng(4)
    for _ in range(25):
        masked_rows(rng, sml.available_isas())


@pytest.mark.slow
def test_a_million_random_rows():
    """Issue 2's number: 1 to 100,000 long, magnitudes up to 1e30, with infinities among them.

    Each batch runs in about 16 ways per ISA; the slow scalar leaf takes part in one batch of ten.
    """
    fast = [isa for isa in sml.available_isas() if isa != "scalar"] or ["scalar"]
    rows = masked = 0
    seed = 100
    while rows < 1_000_000:
        seed += 1
        isas = sml.available_isas() if seed % 10 == 0 else fast
        rows += random_rows(seed, 2_000_000, isas)
        masked += masked_rows(np.random.default_rng(seed), isas, 300_000)
    print(f"{rows:,} rows and {masked:,} with masks, no difference")
