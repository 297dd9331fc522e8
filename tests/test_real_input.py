"""The contract on logits that nobody made up: those of examples/digits.py."""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.special
from oracle import DTYPES, FUNCTIONS, bound, expected, mp_row, ulp_error, within_contract

import softmaxlib as sml

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "digits.py"
CLASSIFIERS = ("LogisticRegression", "MLPClassifier")
WIDE = (np.dtype(np.float32), np.dtype(np.float64))
ROWS_FOR_MPMATH = 150  # longdouble sees to the others
MEAN_ULP = 1

function_of_contract = pytest.mark.parametrize("function", FUNCTIONS)
classifier_of_example = pytest.mark.parametrize("classifier", CLASSIFIERS)
probabilities = pytest.mark.parametrize("function", ("softmax", "stablemax"))
wide = pytest.mark.parametrize("dtype", WIDE, ids=str)


@functools.cache
def example():
    spec = importlib.util.spec_from_file_location("digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def classifiers():
    return example().classifiers()


def logits_of(classifier, dtype):
    return classifiers()[classifier][0].astype(dtype)


@functools.cache
def exact(function, classifier, dtype):
    """Return the function of the first rows, from mpmath."""
    rows = logits_of(classifier, dtype)[:ROWS_FOR_MPMATH]
    return np.array([mp_row(function, row) for row in rows])


def test_the_classifiers_have_learned():
    assert set(classifiers()) == set(CLASSIFIERS)
    for logits, labels in classifiers().values():
        assert logits.shape == (899, 10)
        assert (logits.argmax(-1) == labels).mean() > 0.9
        assert np.ptp(logits) > 20  # sure enough of itself to make softmax work


@function_of_contract
@classifier_of_example
@wide
def test_error_against_mpmath(function, classifier, dtype, isa):
    x = logits_of(classifier, dtype)[:ROWS_FOR_MPMATH]
    y = getattr(sml, function)(x)
    assert y.dtype == dtype
    error = ulp_error(y, exact(function, classifier, dtype), dtype)
    good = within_contract(function, y, exact(function, classifier, dtype), dtype)
    assert good.all(), f"{error.max():.2f} ULP, bound {bound(function, dtype)}"
    if function == "softmax":
        assert error.mean() <= MEAN_ULP


@function_of_contract
@classifier_of_example
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_longdouble(function, classifier, dtype, isa):
    x = logits_of(classifier, dtype)
    y = getattr(sml, function)(x)
    good = within_contract(function, y, expected(function, x), dtype)
    assert good.all(), ulp_error(y, expected(function, x), dtype).max()


@pytest.mark.parametrize("function", ("softmax", "log_softmax", "logsumexp"))
@classifier_of_example
@wide
def test_agreement_with_scipy(function, classifier, dtype):
    x = logits_of(classifier, dtype)
    theirs = getattr(scipy.special, function)(x, axis=-1)
    # SciPy rounds x - max, some 50 in magnitude; near 0 its log_softmax keeps no relative accuracy.
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(getattr(sml, function)(x), theirs, rtol=50 * eps, atol=4 * eps)


@classifier_of_example
@wide
def test_bounds_can_tell_good_from_bad(classifier, dtype):
    x = logits_of(classifier, dtype)[:ROWS_FOR_MPMATH]
    for function in ("softmax", "log_softmax"):
        theirs = getattr(scipy.special, function)(x, axis=-1)
        assert not within_contract(
            function, theirs, exact(function, classifier, dtype), dtype
        ).all()


@probabilities
@classifier_of_example
@wide
def test_distributions(function, classifier, dtype, isa):
    x = logits_of(classifier, dtype)
    y = getattr(sml, function)(x)
    np.testing.assert_array_equal(y.argmax(-1), x.argmax(-1))
    sums = y.sum(-1, dtype=np.longdouble)
    np.testing.assert_allclose(sums, 1, rtol=0, atol=min(1e-6, 10 * np.finfo(dtype).eps))
    log_y = getattr(sml, f"log_{function}")(x)
    np.testing.assert_array_equal(log_y.argmax(-1), x.argmax(-1))


@classifier_of_example
def test_no_loss_vanishes(classifier, isa):
    logits, labels = classifiers()[classifier]
    x = logits.astype(np.float32)
    loss = -np.take_along_axis(sml.log_softmax(x), labels[:, None], -1)
    theirs = -np.take_along_axis(scipy.special.log_softmax(x, axis=-1), labels[:, None], -1)
    assert (loss > 0).all()
    assert (loss[theirs == 0] < 2e-7).all()
    assert (theirs == 0).any()  # the reason why this is worth a test


def test_the_example_prints_its_table():
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for classifier in CLASSIFIERS:
        assert f"\n{classifier}: 9" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(FUNCTIONS)]
    assert len(rows) == len(CLASSIFIERS) * len(FUNCTIONS) * len(WIDE)
    for function, dtype, worst, mean, *_, peer in rows:
        assert float(mean) <= float(worst) <= bound(function, np.dtype(dtype))
        assert peer == ("NumPy" if "stablemax" in function else "SciPy")
    assert done.stdout.count("softmaxlib rounds 0 of them to 0\n") == len(CLASSIFIERS)
