"""Losses and selected log-probabilities: mpmath, PyTorch's semantics, no collapse, bad input."""

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import softmaxlib as sml

ACTIVATIONS = ["softmax", "stablemax"]
mp = mpmath.mp.clone()
mp.dps = 40


def exact(z, q, activation, temperature=1.0, visible=None):
    """Return the loss of one row, its gradient and what the gradient's error scales with."""
    z = [mp.mpf(float(v)) / mp.mpf(temperature) for v in z]
    visible = [True] * len(z) if visible is None else visible
    s = [mp.exp(v) if activation == "softmax" else v + 1 if v >= 0 else 1 / (1 - v) for v in z]
    s = [v if seen else mp.mpf(0) for v, seen in zip(s, visible, strict=True)]
    others = [mp.fsum(s[:j] + s[j + 1 :]) for j in range(len(s))]
    total = mp.fsum(s)
    loss = mp.fsum(
        qj * mp.log1p(rest / sj) for qj, sj, rest in zip(q, s, others, strict=True) if qj
    )
    big_q = mp.fsum(q)
    slope = [1 / (mp.mpf(temperature) * (1 if activation == "softmax" else 1 + abs(v))) for v in z]
    gradient, scale = [], []
    for j, qj in enumerate(q):
        p, rest_q = s[j] / total, mp.fsum(q[:j] + q[j + 1 :])
        d = big_q * p - qj if 2 * p < 1 else rest_q - big_q * others[j] / total
        gradient.append(d * slope[j] if visible[j] else mp.mpf(0))
        scale.append((big_q * p + qj) * slope[j])
    return loss, gradient, scale


def ulps(got, want, of=None):
    """Return the error in units of the last place of `of`, or of the exact value."""
    of = max(abs(float(want if of is None else of)), float(np.finfo(got.dtype).tiny))
    return float(abs(mp.mpf(float(got)) - want) / float(np.spacing(np.asarray(of, got.dtype))))


def rows_of_logits(dtype, seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        n = int(rng.integers(2, 50))
        x = rng.standard_normal(n) * rng.choice([0.1, 1, 5, 30])
        if rng.random() < 0.5:
            x[rng.integers(n)] += rng.choice([10, 17, 40, 80])
        label = int(x.argmax()) if rng.random() < 0.6 else int(rng.integers(n))
        yield x.astype(dtype), label, rng


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_class_against_mpmath(activation, dtype, temperature):
    for x, label, _ in rows_of_logits(dtype, 1):
        loss, grad = sml.cross_entropy(
            x, label, activation=activation, temperature=temperature, return_grad=True
        )
        one_hot = [mp.mpf(j == label) for j in range(x.size)]
        want, gradient, _ = exact(x, one_hot, activation, temperature)
        assert loss.dtype == grad.dtype == dtype
        label_bound, bound = (
            (8, 8) if dtype == np.float64 else (4, 5 + 2 * (activation != "softmax"))
        )
        assert ulps(loss, want) <= label_bound
        assert ulps(grad[label], gradient[label]) <= label_bound
        others = np.delete(np.arange(x.size), label)
        assert max(ulps(grad[j], gradient[j]) for j in others) <= bound


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["smoothed", "probabilities", "one-hot", "both"])
@pytest.mark.parametrize("masked", [False, True])
def test_distribution_against_mpmath(activation, dtype, kind, masked):
    for x, label, rng in rows_of_logits(dtype, 2):
        n = x.size
        smoothing = 0.125 if kind in ("smoothed", "both") else 0.0
        weight = rng.random(n) if kind != "one-hot" else None
        visible = rng.random(n) < 0.7 if masked else np.ones(n, bool)
        visible[label] = True
        if kind == "smoothed":
            target = label
        elif kind == "one-hot":
            target = np.eye(n, dtype=dtype)[label]
        else:
            target = np.where(visible, rng.dirichlet(np.ones(n)), 0).astype(dtype)
        q = np.eye(n)[label] if kind == "smoothed" else target
        spread = mp.mpf(smoothing) / int(visible.sum())
        q = [
            (mp.mpf(float(qj)) * (1 - mp.mpf(smoothing)) + (spread if seen else 0))
            * mp.mpf(1 if weight is None else weight[j])
            for j, (qj, seen) in enumerate(zip(q, visible, strict=True))
        ]
        want, gradient, scale = exact(x, q, activation, 0.7, visible)
        loss, grad = sml.cross_entropy(
            x,
            target,
            activation=activation,
            label_smoothing=smoothing,
            weight=weight,
            reduction="sum",
            temperature=0.7,
            where=visible if masked else None,
            return_grad=True,
        )
        bound = 5 if dtype == np.float32 else 8
        assert ulps(loss, want) <= bound
        assert max(ulps(g, d, s) for g, d, s in zip(grad, gradient, scale, strict=True)) <= bound
        assert (grad[~visible] == 0).all()
        if kind == "one-hot":  # 1 - p of the label, however small
            assert ulps(grad[label], gradient[label]) <= (4 if dtype == np.float32 else 8)
        alone = sml.cross_entropy(
            x,
            target,
            activation=activation,
            label_smoothing=smoothing,
            weight=weight,
            reduction="sum",
            temperature=0.7,
            where=visible if masked else None,
        )
        assert alone == loss


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_collapse_in_float32(activation):
    tiny = np.finfo(np.float32).tiny
    for gap in [17, 20, 50, 87] if activation == "softmax" else [17, 1e6, 1e20, 1e37]:
        for other in (0.0, -3.0):
            x = np.array([gap + other, other, other], np.float32)
            loss, grad = sml.cross_entropy(x, 0, activation=activation, return_grad=True)
            want, gradient, _ = exact(x, [mp.mpf(1), mp.mpf(0), mp.mpf(0)], activation)
            assert ulps(loss, want) <= 4
            if abs(gradient[0]) > 2 * tiny:
                assert ulps(grad[0], gradient[0]) <= 4
            assert loss > 0
    assert ulps(sml.cross_entropy(np.float32([17, 0]), 0), mp.log1p(mp.exp(-17))) <= 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_halves_are_rounded_once(activation, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x, labels = logits_and_labels((30, 40), dtype)
    loss, grad = sml.cross_entropy(
        x, labels, activation=activation, reduction="none", return_grad=True
    )
    wide_loss, wide_grad = sml.cross_entropy(
        x.astype(np.float32), labels, activation=activation, reduction="none", return_grad=True
    )
    assert loss.dtype == grad.dtype == x.dtype
    np.testing.assert_array_equal(loss, wide_loss.astype(dtype))
    np.testing.assert_array_equal(grad, wide_grad.astype(dtype))


def logits_and_labels(shape, dtype, axis=-1, seed=0):
    rng = np.random.default_rng(seed)
    x = (4 * rng.standard_normal(shape)).astype(dtype)
    rows = list(shape)
    del rows[axis]
    return x, rng.integers(0, shape[axis], rows)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loss_of_a_label_is_minus_its_log_softmax(axis, dtype):
    x, labels = logits_and_labels((7, 40, 9), dtype, axis)
    for activation, function in (("softmax", sml.log_softmax), ("stablemax", sml.log_stablemax)):
        loss = sml.cross_entropy(x, labels, axis=axis, activation=activation, reduction="none")
        index = np.expand_dims(labels, axis)
        want = -np.take_along_axis(function(x, axis), index, axis).squeeze(axis)
        np.testing.assert_array_equal(loss, want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("probabilities", [False, True])
def test_same_bits_on_isas_threads_and_layouts(activation, smoothing, probabilities):
    x, target = logits_and_labels((64, 5000), np.float32)
    if probabilities:
        target = sml.softmax(x[::-1] * np.float32(0.3))

    def run(logits, labels, **options):
        return sml.cross_entropy(
            logits,
            labels,
            activation=activation,
            label_smoothing=smoothing,
            reduction="none",
            return_grad=True,
            **options,
        )

    loss, grad = run(x, target)
    for isa in sml.available_isas():
        for count in (1, 2, 3):
            with sml.use_isa(isa), sml.threads(count):
                again = run(x, target)
                np.testing.assert_array_equal(again[0], loss)
                np.testing.assert_array_equal(again[1], grad)
    columns = run(np.asfortranarray(x), target)
    np.testing.assert_array_equal(columns[0], loss)
    np.testing.assert_array_equal(columns[1], grad)
    transposed = run(x.T, target.T if probabilities else target, axis=0)
    np.testing.assert_array_equal(transposed[1], grad.T)
    ones = run(x, target, temperature=np.ones((64, 1)))
    np.testing.assert_array_equal(ones[0], loss)
    unmasked = run(x, target, where=np.ones(5000, bool))
    np.testing.assert_array_equal(unmasked[0], loss)
    for row in (0, 63):
        alone = run(x[row], target[row])
        assert alone[0] == loss[row]
        np.testing.assert_array_equal(alone[1], grad[row])
    place = x.copy()
    returned = run(place, target, grad_out=place)[1]
    assert returned is place
    np.testing.assert_array_equal(place, grad)
    if probabilities:
        place = target.copy()
        run(x, place, grad_out=place)
        np.testing.assert_array_equal(place, grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_memory_that_overlaps_is_as_if_it_did_not(activation):
    n = 1500  # more than a chunk
    rng = np.random.default_rng(6)
    x, labels = logits_and_labels((2, n), np.float64)
    q = rng.random((2, n))
    warmth = rng.uniform(0.5, 2, (2, 1))
    mask = rng.random((2, n)) < 0.8

    def run(logits, target, **options):
        options = {"activation": activation, "reduction": "none", "return_grad": True} | options
        return sml.cross_entropy(logits, target, **options)

    def at(memory, start, array):  # a copy of array in memory, from byte 8 * start on
        view = memory[start:].view(array.dtype)[: array.size].reshape(array.shape)
        view[...] = array
        return view

    for shift in (0, 1, 700, n):
        for place in (
            "logits",
            "probabilities",
            "labels",
            "temperature",
            "weight",
            "where",
            "both",
        ):
            memory = np.zeros(4 * n)
            grad_out = memory[: n * 2].reshape(2, n)
            if place == "logits":
                want = run(x, labels)
                got = run(at(memory, shift, x), labels, grad_out=grad_out)
            elif place == "probabilities":
                want = run(x, q)
                got = run(x, at(memory, shift, q), grad_out=grad_out)
            elif place == "labels":
                want = run(x, labels)
                got = run(x, at(memory, shift, labels), grad_out=grad_out)
            elif place == "weight":
                weight = rng.random(n)
                want = run(x, labels, weight=weight)
                got = run(x, labels, weight=at(memory, shift, weight), grad_out=grad_out)
            elif place == "temperature":
                want = run(x, labels, temperature=warmth)
                got = run(x, labels, temperature=at(memory, shift, warmth), grad_out=grad_out)
            elif place == "where":
                want = run(x, labels, where=mask)
                got = run(x, labels, where=at(memory, shift, mask), grad_out=grad_out)
            else:
                want = run(x, x)
                both = at(memory, shift, x)
                got = run(both, both, grad_out=grad_out)
            assert got[1] is grad_out
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n", [2, 17, 1025, 16385])  # beyond a vector, a chunk, a block
def test_one_special_value_anywhere(activation, dtype, n):
    rng = np.random.default_rng(7)
    for value in (np.nan, np.inf, -np.inf):
        for place in (0, n // 2, n - 1):
            x = rng.standard_normal(n).astype(dtype)
            x[place] = value
            label = (place + 1) % n
            others = np.arange(n) != place
            for options in ({}, {"temperature": 0.5}, {"where": np.ones(n, bool)}):
                loss, grad = sml.cross_entropy(
                    x, label, activation=activation, return_grad=True, **options
                )
                if value == -np.inf:
                    assert np.isfinite(loss)
                    assert np.isfinite(grad).all()
                    assert grad[place] == 0
                else:
                    assert np.isnan(loss)
                    assert np.isnan(grad).all()
            loss, grad = sml.cross_entropy(
                x, label, activation=activation, return_grad=True, where=others, label_smoothing=0.1
            )
            assert np.isfinite(loss)
            assert np.isfinite(grad).all()
            assert grad[place] == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_properties(data):
    ndim = data.draw(st.integers(1, 3))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=ndim, max_size=ndim)))
    axis = data.draw(st.integers(-ndim, ndim - 1))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    x, labels = logits_and_labels(shape, dtype, axis, int(rng.integers(1000)))
    x = x[tuple(slice(None, None, data.draw(st.sampled_from([1, -1]))) for _ in shape)]
    where = rng.random(shape) < 0.8 if data.draw(st.booleans()) else None
    ignored = rng.random(labels.shape) < 0.3
    labels = np.where(ignored, -100, labels)
    options = {"axis": axis, "activation": activation, "where": where}
    options["label_smoothing"] = data.draw(st.sampled_from([0.0, 0.3]))
    loss, grad = sml.cross_entropy(x, labels, reduction="none", return_grad=True, **options)
    np.testing.assert_array_equal(loss, sml.cross_entropy(x, labels, reduction="none", **options))
    hidden = np.zeros(shape, bool) if where is None else ~where
    assert (loss[ignored] == 0).all()
    assert (loss >= 0).all()
    assert not np.isnan(grad).any()
    assert (grad[np.broadcast_to(np.expand_dims(ignored, axis), shape) | hidden] == 0).all()
    # The probabilities of one class each, smoothed by hand.
    index = np.expand_dims(np.where(ignored, 0, labels), axis)
    q = np.zeros(shape)
    np.put_along_axis(q, index, 1, axis)
    same_loss, same_grad = sml.cross_entropy(x, q, reduction="none", return_grad=True, **options)
    unit = np.finfo(dtype).eps
    np.testing.assert_allclose(loss[~ignored], same_loss[~ignored], rtol=12 * unit)
    keep = ~np.broadcast_to(np.expand_dims(ignored, axis), shape)
    np.testing.assert_allclose(grad[keep], same_grad[keep], rtol=12 * unit, atol=4 * unit)
    if activation == "softmax" and where is None:  # a row's gradient adds up to 0
        total = grad.astype(np.float64).sum(axis)
        np.testing.assert_allclose(total, 0, atol=12 * unit)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
def test_semantics_of_torch(reduction, smoothing, weighted, probabilities):
    torch = pytest.importorskip("torch")
    x, labels = logits_and_labels((6, 5, 4), np.float64, 1)
    rng = np.random.default_rng(3)
    weight = rng.random(5) if weighted else None
    target = np.moveaxis(rng.dirichlet(np.ones(5), (6, 4)), -1, 1) if probabilities else labels
    if not probabilities:
        target[2] = -100
    logits = torch.tensor(x, requires_grad=True)
    want = torch.nn.functional.cross_entropy(
        logits,
        torch.tensor(target),
        weight=None if weight is None else torch.tensor(weight),
        label_smoothing=smoothing,
        reduction=reduction,
    )
    want.sum().backward()
    loss, grad = sml.cross_entropy(
        x,
        target,
        axis=1,
        weight=weight,
        label_smoothing=smoothing,
        reduction=reduction,
        return_grad=True,
    )
    np.testing.assert_allclose(loss, want.detach().numpy(), rtol=1e-14)
    np.testing.assert_allclose(grad, logits.grad.numpy(), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("smoothing", [1.0, 1 - 2**-53, 0.999999, 0.5, 1e-9, 5e-324])
def test_label_smoothing_up_to_1(dtype, activation, smoothing):
    """The label's gradient is a small difference where its share and its probability are alike."""
    rng = np.random.default_rng(3)
    for n in (2, 3, 100, 1000):
        x = rng.normal(0, 0.5, n).astype(dtype)
        for label in (0, int(x.argmax())):
            _, got = sml.cross_entropy(
                x, label, activation=activation, label_smoothing=smoothing, return_grad=True
            )
            spread = mp.mpf(smoothing) / n
            q = [spread + (1 - mp.mpf(smoothing) if j == label else 0) for j in range(n)]
            _, want, scale = exact(x, q, activation)
            most = 8 if dtype == np.float64 else 5 if activation == "softmax" else 7
            assert ulps(got[label], want[label], scale[label]) <= most, (n, label)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_label_smoothed_away_is_a_class_like_any_other(activation, masked, weighted):
    rng = np.random.default_rng(4)
    x = rng.normal(0, 1, 10_000)
    x[1::2] = x[::2]  # every logit twice
    options = {"where": np.repeat(rng.random(5000) < 0.9, 2)} if masked else {}
    if weighted:
        options["weight"] = np.repeat(rng.uniform(0.1, 2, 5000), 2)
    _, grad = sml.cross_entropy(
        x,
        1234,
        activation=activation,
        label_smoothing=1,
        return_grad=True,
        reduction="sum",
        **options,
    )
    np.testing.assert_array_equal(grad[::2], grad[1::2])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_reductions_are_rounded_once(dtype, reduction, smoothing, weighted):
    rng = np.random.default_rng(6)
    x = rng.normal(0, 5, (300, 5)).astype(dtype)
    labels = rng.integers(0, 5, 300)
    labels[::7] = -100
    weight = rng.uniform(0, 2, 5) if weighted else np.ones(5)
    got = sml.cross_entropy(
        x, labels, reduction=reduction, label_smoothing=smoothing, weight=weight
    )
    total, count = mp.mpf(0), mp.mpf(0)
    for row, label in zip(x, labels, strict=True):
        if label == -100:
            continue
        shares = [(1 - smoothing) * (j == label) + smoothing / 5 for j in range(5)]
        q = [mp.mpf(float(w)) * share for w, share in zip(weight, shares, strict=True)]
        total += exact(row, q, "softmax")[0]
        count += mp.mpf(float(weight[label]))
    want = total / count if reduction == "mean" else total
    assert got.dtype == dtype
    # The rows' losses are those of floats; their errors add up to less than one's own.
    assert ulps(got, want) <= {np.float16: 0.51, np.float32: 1, np.float64: 4}[dtype]


@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_in_any_order(weighted):
    """Sums are compensated: rows of very different losses leave nothing of the order."""
    rng = np.random.default_rng(8)
    x = rng.normal(0, 1, (1000, 3)) * 10 ** rng.uniform(-8, 8, (1000, 1))
    labels = rng.integers(0, 3, 1000)
    weight = [1e-9, 1, 1e9] if weighted else None
    order = rng.permutation(1000)
    for reduction in ("mean", "sum"):
        a = sml.cross_entropy(x, labels, reduction=reduction, weight=weight)
        b = sml.cross_entropy(x[order], labels[order], reduction=reduction, weight=weight)
        assert abs(a - b) <= np.spacing(a)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "weight",
    [
        [1e-200, 1e120, 1],
        [1e-200, 1e100, 1],
        [1e-308, 1e308, 1],
        [5e-324, 1e308, 5e-324],
        [1e308, 1e308, 1e308],
        [1e-308, 1e-308, 1e-308],
        [5e-324, 5e-324, 5e-324],
        [0, 1e308, 1],
        [1e300, 0, 1e-300],
    ],
)
@pytest.mark.parametrize("labels", [[0, 0], [0, 1], [2, 0], [1, 1]])
def test_weights_of_any_size(weight, labels, smoothing):
    """In a mean the unit of the weights cancels, whatever it is: only the result may overflow."""
    x = np.array([[0.5, 1, 2], [-1, 3, 0]])
    loss, grad = sml.cross_entropy(
        x, labels, weight=weight, label_smoothing=smoothing, return_grad=True
    )
    w = [mp.mpf(v) for v in weight]
    total, count, rows = mp.mpf(0), mp.mpf(0), []
    for row, label in zip(x, labels, strict=True):
        q = [w[j] * ((1 - smoothing) * (j == label) + mp.mpf(smoothing) / 3) for j in range(3)]
        rows.append(exact(row, q, "softmax"))
        total += rows[-1][0]
        count += w[label]
    if count == 0:
        assert np.isnan(loss)
        return
    largest = mp.mpf(np.finfo(float).max)

    def check(got, want, scale):
        if abs(want) > largest:
            assert got == (np.inf if want > 0 else -np.inf)
        else:
            assert ulps(got, want, min(scale, largest)) <= 8

    check(loss, total / count, total / count)
    for got, (_, gradient, scale) in zip(grad, rows, strict=True):
        for g, want, of in zip(got, gradient, scale, strict=True):
            check(g, want / count, of / count)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_class_with_the_gradient_in_the_place_of_the_target(activation):
    target = np.array([[0.0, 1, 0], [0, 0, 0]])
    loss, grad = sml.cross_entropy(
        np.zeros((2, 3)),
        target,
        activation=activation,
        where=False,
        reduction="none",
        return_grad=True,
        grad_out=target,
    )
    assert loss.tolist() == [np.inf, 0]
    assert grad is target
    assert not grad.any()


def test_rows_that_are_all_ignored_have_the_mean_nan():
    x = np.ones((3, 4), np.float32)
    loss, grad = sml.cross_entropy(x, np.full(3, -100), return_grad=True)
    assert np.isnan(loss)
    assert (grad == 0).all()
    assert sml.cross_entropy(x, np.full(3, -100), reduction="sum") == 0
    assert (sml.cross_entropy(x, np.full(3, 7), ignore_index=7, reduction="none") == 0).all()
    loss, grad = sml.cross_entropy(x, [0, 1, -100], weight=np.zeros(4), return_grad=True)
    assert np.isnan(loss)
    assert np.isnan(grad[:2]).all()
    assert (grad[2] == 0).all()


def test_ignored_rows_are_not_read():
    x = np.full((2, 4), np.nan)
    x[1] = [1, 2, 3, 4]
    loss, grad = sml.cross_entropy(x, [-100, 0], return_grad=True)
    assert np.isfinite(loss)
    assert (grad[0] == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(activation):
    inf, nan = np.inf, np.nan

    def run(x, target, **options):
        return sml.cross_entropy(
            np.array(x, np.float32), target, activation=activation, return_grad=True, **options
        )

    for bad in ([1, nan], [1, inf], [-inf, -inf]):
        loss, grad = run(bad, 0)
        assert np.isnan(loss)
        assert np.isnan(grad).all()
    for options in ({}, {"label_smoothing": 0.1}, {"weight": [2, 1, 1]}, {"where": [True] * 3}):
        loss, grad = run([-inf, 1, 2], 0, **options)  # a label that cannot be
        assert loss == inf
        assert grad[0] == 0
        assert (grad[1:] > 0).all()
    loss, grad = run([-inf, 1, 2], np.array([0.5, 0.5, 0]))
    assert loss == inf
    assert grad[0] == 0
    loss, grad = run([-inf, 1, 2], 1)
    assert np.isfinite(loss)
    assert grad[0] == 0
    assert not np.signbit(grad[0])
    loss, grad = run([-inf, 1, 2], np.array([0, 1, 0]) / 1.0)  # q = 0 there: not 0 * inf
    assert np.isfinite(loss)
    assert grad[0] == 0
    loss, grad = run([-inf, 1, 2], 1, label_smoothing=0.1)
    assert loss == inf
    assert grad[0] == 0
    mask = np.array([False, True, True])
    loss, grad = run([nan, 1, 2], 1, where=mask, label_smoothing=0.1)
    assert np.isfinite(loss)
    assert grad[0] == 0
    loss, grad = run([nan, 1, 2], 0, where=mask)
    assert loss == inf
    assert grad[0] == 0
    loss, grad = run([1, 2, 3], 0, where=np.zeros(3, bool))
    assert loss == inf
    assert (grad == 0).all()
    none = {"where": np.zeros(3, bool), "reduction": "sum"}
    assert run([1, 2, 3], 0, weight=[0, 1, 1], **none)[0] == 0  # nor has any class a weight
    assert run([1, 2, 3], np.zeros(3), **none)[0] == 0
    assert run([1, 2, 3], np.ones(3), **none)[0] == inf
    for only in ([5.0], [-inf, 5.0]):
        loss, grad = run(only, len(only) - 1)
        assert loss == 0
        assert (grad == 0).all()
        assert not np.signbit(loss)
    huge = np.finfo(np.float32).max
    for x in ([huge, -huge], [huge, huge], [1.0, 0.0], [-0.0, 0.0], [1e-45, -1e-45]):
        for label in (0, 1):
            loss, grad = run(x, label)
            want, gradient, _ = exact(x, [mp.mpf(label == 0), mp.mpf(label == 1)], activation)
            if want < huge:
                assert ulps(loss, want) <= 4
            assert not np.isnan(loss)
            for got, d in zip(grad, gradient, strict=True):
                assert ulps(got, d) <= 5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_factors_that_leave_the_range_of_float(activation):
    for x, factor in [
        ([-3e37, -3e37, 1], 10.0),
        ([-3e38, -3e38, -3e38], 10.0),
        ([0, -1, -2], 1e50),
        ([0, -200, -60], 1e30),
        ([0, 0, 0], 1e-33),
        ([-110, 0, 1], 1e10),
        ([3e38, 3e38, 1e38], 1e-3),
    ]:
        x = np.array(x, np.float32)
        for where in (None, np.array([True, True, False])):
            visible = np.ones(3, bool) if where is None else where
            _, grad = sml.cross_entropy(
                x,
                0,
                activation=activation,
                weight=[factor] * 3,
                reduction="sum",
                where=where,
                return_grad=True,
            )
            q = [mp.mpf(factor), mp.mpf(0), mp.mpf(0)]
            _, gradient, _ = exact(x, q, activation, 1.0, visible)
            for got, want in zip(grad, gradient, strict=True):
                if abs(want) <= np.finfo(np.float32).max:
                    assert ulps(got, want) <= 7
                else:
                    assert np.isinf(got)
    # The scale of weights does not matter to a mean.
    x = np.array([1.0, 2.0, 3.0])
    for scale, other in ((1e-310, 1e-310), (1e308, 1e308), (1e-310, 1.0), (1e-310, 1e300)):
        loss, grad = sml.cross_entropy(x, 1, weight=[other, scale, other], return_grad=True)
        want = sml.cross_entropy(x, 1, return_grad=True)
        assert loss == pytest.approx(want[0], rel=1e-15)
        np.testing.assert_allclose(grad, want[1], rtol=1e-14)


def test_no_warnings():
    with np.errstate(all="raise"):
        loss = sml.cross_entropy(np.array([6e4, -6e4], np.float16), 1, reduction="none")
        assert loss == np.inf
        assert np.isnan(sml.cross_entropy(np.ones((2, 3)), [-100, -100]))


def test_shapes_and_dtypes():
    x = np.arange(12).reshape(3, 4)  # integers compute in float64
    loss, grad = sml.cross_entropy(x, [0, 1, 2], return_grad=True)
    assert isinstance(loss, np.float64)
    assert grad.dtype == np.float64
    assert sml.cross_entropy(x[0], 2).shape == ()
    for dtype in (np.int8, np.uint64, np.int32, ">i8"):
        assert sml.cross_entropy(x, np.array([0, 1, 2], dtype)) == loss
    assert sml.cross_entropy(np.zeros((0, 4)), np.zeros(0, int), reduction="none").shape == (0,)
    assert np.isnan(sml.cross_entropy(np.zeros((0, 4)), []))
    assert sml.cross_entropy(np.zeros((3, 0)), np.zeros((3, 0)), reduction="sum") == 0
    grad = sml.cross_entropy(np.zeros((3, 0)), np.full(3, -100), return_grad=True)[1]
    assert grad.shape == (3, 0)
    x = x.astype(np.float32)
    losses, out = np.empty(3, np.float32), np.empty((4, 3), np.float32).T
    got = sml.cross_entropy(
        x, [0, 1, 2], reduction="none", return_grad=True, out=losses, grad_out=out
    )
    assert got[0] is losses
    assert got[1] is out
    mean = sml.cross_entropy(x, [0, 1, 2], return_grad=True)[1]
    np.testing.assert_allclose(out, mean * 3, rtol=3e-7)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((np.ones((3, 4)), [0, 4, 1]), {}, ValueError, r"target at \(1,\) is 4; .* from 0 to 3"),
        ((np.ones((3, 4)), [0, -1, 1]), {}, ValueError, r"target at \(1,\) is -1"),
        ((np.ones((3, 4)), [0, 1]), {}, ValueError, r"target .* shape \(2,\)"),
        ((np.ones((3, 4)), [0.0, 1, 2]), {}, ValueError, "probabilities must have the shape"),
        ((np.ones((3, 4)), np.ones((3, 5))), {}, ValueError, r"shape \(3, 5\)"),
        ((np.ones((3, 4)), np.ones((3, 4), int)), {}, ValueError, "probabilities must be floating"),
        ((np.ones((3, 4)), [True, False, True]), {}, TypeError, "target has dtype bool"),
        ((np.ones((3, 4)), ["a", "b", "c"]), {}, TypeError, "target has dtype"),
        ((np.ones((3, 4), complex), [0, 1, 2]), {}, TypeError, "logits has dtype complex128"),
        ((np.ones((3, 0)), [0, 0, 0]), {}, ValueError, "left out, or ignore_index -100, as axis"),
        ((1.0, 0), {}, ValueError, "logits must have at least one dimension"),
        ((np.ones(4), 0), {"axis": 1}, Exception, "axis 1"),
        ((np.ones(4), 0), {"axis": None}, TypeError, "axis"),
        ((np.ones(4), 0), {"activation": "relu"}, ValueError, "activation"),
        ((np.ones(4), 0), {"reduction": "max"}, ValueError, "reduction"),
        ((np.ones(4), 0), {"label_smoothing": 1.5}, ValueError, r"\[0, 1\], got 1.5"),
        ((np.ones(4), 0), {"label_smoothing": -0.1}, ValueError, "label_smoothing"),
        ((np.ones(4), 0), {"label_smoothing": np.nan}, ValueError, "label_smoothing"),
        ((np.ones(4), 0), {"label_smoothing": "0"}, TypeError, "label_smoothing"),
        ((np.ones(4), 0), {"weight": np.ones(3)}, ValueError, r"weight has shape \(3,\)"),
        ((np.ones(4), 0), {"weight": [1, -1, 1, 1]}, ValueError, "got -1.0 of class 1"),
        ((np.ones(4), 0), {"weight": [1, 1, np.nan, 1]}, ValueError, "got nan of class 2"),
        ((np.ones(4), 0), {"weight": [True] * 4}, TypeError, "weight has dtype bool"),
        ((np.ones(4), 0), {"ignore_index": 1.5}, TypeError, "ignore_index"),
        ((np.ones(4), 0), {"ignore_index": True}, TypeError, "ignore_index"),
        ((np.ones(4), 0), {"ignore_index": 2**63}, ValueError, "ignore_index must be within int64"),
        ((np.ones(4), 0), {"label_smoothing": 10**400}, ValueError, "label_smoothing"),
        ((np.ones(4), 0), {"temperature": 0}, ValueError, "temperature"),
        ((np.ones(4), 0), {"temperature": np.ones(4)}, ValueError, "varies along"),
        ((np.ones(4), 0), {"where": np.ones(3, bool)}, ValueError, "where"),
        ((np.ones(4), 0), {"return_grad": 1}, TypeError, "return_grad"),
        ((np.ones(4), 0), {"grad_out": np.ones(4)}, ValueError, "return_grad=True"),
        (
            (np.ones(4), 0),
            {"grad_out": np.ones(4, np.float32), "return_grad": True},
            TypeError,
            "grad_out has dtype float32",
        ),
        ((np.ones(4), 0), {"out": np.ones(4)}, ValueError, "out has shape"),
    ],
)
def test_bad_input(arguments, options, error, match):
    with pytest.raises(error, match=match):
        sml.cross_entropy(*arguments, **options)


# ---- take_log_softmax


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_taken_are_the_bits_of_log_softmax(dtype, axis):
    rng = np.random.default_rng(4)
    x, one = logits_and_labels((6, 300, 7), dtype, axis)
    k = 5
    shape = list(x.shape)
    shape[axis] = k
    many = rng.integers(-x.shape[axis], x.shape[axis], shape)
    where = rng.random(x.shape) < 0.7
    for options in ({}, {"temperature": 0.6}, {"where": where}):
        log_y = sml.log_softmax(x, axis, **options)
        got, sums = sml.take_log_softmax(x, many, axis, return_logsumexp=True, **options)
        np.testing.assert_array_equal(got, np.take_along_axis(log_y, many, axis))
        np.testing.assert_array_equal(sums, sml.logsumexp(x, axis, **options))
        got = sml.take_log_softmax(x, one, axis, **options)
        index = np.expand_dims(one, axis)
        np.testing.assert_array_equal(got, np.take_along_axis(log_y, index, axis).squeeze(axis))
    for isa in sml.available_isas():
        with sml.use_isa(isa), sml.threads(2):
            again = sml.take_log_softmax(x, many, axis)
        np.testing.assert_array_equal(
            again, np.take_along_axis(sml.log_softmax(x, axis), many, axis)
        )


def test_taken_shapes_dtypes_and_out():
    x, labels = logits_and_labels((6, 9), np.float32)
    assert isinstance(sml.take_log_softmax(x[0], 3), np.float32)
    assert sml.take_log_softmax(x, [[0, 1, 8]]).shape == (6, 3)  # the same for every row
    assert sml.take_log_softmax(x, np.zeros((6, 0), int)).shape == (6, 0)
    none, sums = sml.take_log_softmax(x, np.zeros((6, 0), int), return_logsumexp=True)
    assert none.shape == (6, 0)
    np.testing.assert_array_equal(sums, sml.logsumexp(x))
    half = x.astype(np.float16)
    got = sml.take_log_softmax(half, labels, dtype=np.float32)
    want = sml.log_softmax(half, dtype=np.float32)[np.arange(6), labels]
    np.testing.assert_array_equal(got, want)
    out = np.empty(12, np.float32)[::2]
    assert sml.take_log_softmax(x, labels, out=out) is out
    np.testing.assert_array_equal(out, sml.log_softmax(x)[np.arange(6), labels])
    out = x[:, 0]  # shares memory with x
    want = sml.take_log_softmax(x, labels)
    sml.take_log_softmax(x, labels, out=out)
    np.testing.assert_array_equal(out, want)
    special = np.array([[np.nan, 1], [np.inf, 1], [-np.inf, 1], [-np.inf, -np.inf]])
    for k in (0, 1):
        got, sums = sml.take_log_softmax(special, np.full(4, k), return_logsumexp=True)
        np.testing.assert_array_equal(got, sml.log_softmax(special)[:, k])
        np.testing.assert_array_equal(sums, sml.logsumexp(special))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((np.ones((2, 3)), [0, 3]), {}, IndexError, r"indices at \(1, 0\) is 3; .* -3 to 2"),
        ((np.ones((2, 3)), [0, -4]), {}, IndexError, "is -4"),
        ((np.ones((2, 3)), [0.0, 1.0]), {}, TypeError, "indices has dtype float64"),
        ((np.ones((2, 3)), [0, 1, 2]), {}, ValueError, r"indices has shape \(3,\)"),
        ((np.ones((2, 3)), np.zeros((3, 1), int)), {}, ValueError, r"indices has shape \(3, 1\)"),
        ((np.ones((2, 0)), [0, 0]), {}, IndexError, "left out, as axis has length 0"),
        ((np.ones(3), 0), {"temperature": -1}, ValueError, "temperature"),
        ((np.ones(3), 0), {"return_logsumexp": 1}, TypeError, "return_logsumexp"),
        ((np.ones(3), 0), {"out": np.ones(3)}, ValueError, "out has shape"),
        ((np.ones(3), 0), {"dtype": int}, TypeError, "dtype"),
        ((1.0, 0), {}, ValueError, "at least one dimension"),
    ],
)
def test_bad_indices(arguments, options, error, match):
    with pytest.raises(error, match=match):
        sml.take_log_softmax(*arguments, **options)
