"""Logits that nobody made up: two classifiers of handwritten digits, and how far off softmax is.

    python examples/digits.py        # needs `pip install -e '.[test]'`

The logits of scikit-learn's digits, test half, go through every function of softmaxlib, and through
SciPy's or, where SciPy has none, NumPy's formula. The reference is mpmath with 200 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import mpmath
    import numpy as np
    import scipy.special
    from numpy.typing import NDArray
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    import softmaxlib as sml
except ModuleNotFoundError as error:
    raise SystemExit(
        f"digits.py needs {error.name}: in the clone, `pip install -e '.[test]'`"
    ) from None

Array = NDArray[Any]
DTYPES = (np.float32, np.float64)


def numpy_stablemax(x: Array, axis: int) -> Array:
    s = np.where(x >= 0, x + 1, 1 / (1 - np.minimum(x, 0)))
    y: Array = s / s.sum(axis, keepdims=True)
    return y


def numpy_log_stablemax(x: Array, axis: int) -> Array:
    return np.log(numpy_stablemax(x, axis))


PEERS: dict[str, tuple[str, Callable[..., Array]]] = {
    "softmax": ("SciPy", scipy.special.softmax),
    "log_softmax": ("SciPy", scipy.special.log_softmax),
    "logsumexp": ("SciPy", scipy.special.logsumexp),
    "stablemax": ("NumPy", numpy_stablemax),
    "log_stablemax": ("NumPy", numpy_log_stablemax),
}


def classifiers() -> dict[str, tuple[Array, Array]]:
    """Return the test set's logits and labels for each classifier."""
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images / 16, labels, test_size=0.5, random_state=0, stratify=labels
    )
    with threadpool_limits(1):  # BLAS threads only spin on matrices this small
        linear = LogisticRegression(C=100, max_iter=2000).fit(train, train_labels)
        network = MLPClassifier((64,), alpha=0, tol=1e-5, max_iter=1000, random_state=0)
        network.fit(train, train_labels)

    hidden = np.maximum(test @ network.coefs_[0] + network.intercepts_[0], 0)
    logits = {
        "LogisticRegression": linear.decision_function(test),
        "MLPClassifier": hidden @ network.coefs_[1] + network.intercepts_[1],
    }
    return {name: (x, test_labels) for name, x in logits.items()}


def reference(function: str, x: Array) -> Array:
    """Return the function of every row in longdouble, from 200 bits."""
    with mpmath.workprec(200):
        return np.array([_reference_row(function, row) for row in x.tolist()])


def _reference_row(function: str, row: list[float]) -> Any:
    z = [mpmath.mpf(v) for v in row]
    if "stablemax" in function:
        terms = [v + 1 if v >= 0 else 1 / (1 - v) for v in z]
    else:
        terms = [mpmath.exp(v) for v in z]
    total = mpmath.fsum(terms)
    if function == "logsumexp":
        return _longdouble(mpmath.log(total))
    values = [t / total for t in terms]
    return [_longdouble(mpmath.log(v) if "log" in function else v) for v in values]


def _longdouble(value: mpmath.mpf) -> np.longdouble:
    high = float(value)
    return np.longdouble(high) + np.longdouble(float(value - high))


def ulps(y: Array, exact: Array) -> Array:
    """Return the error in units in the last place that the exact value has in y's dtype."""
    kind = np.finfo(y.dtype)
    exponent = np.maximum(np.frexp(exact)[1] - 1, kind.minexp)
    ulp = np.ldexp(np.longdouble(1), exponent - kind.nmant)
    error: Array = np.abs(y - exact) / ulp
    return error


def report(name: str, logits: Array, labels: Array) -> None:
    accuracy = (sml.softmax(logits).argmax(-1) == labels).mean()
    print(
        f"\n{name}: {accuracy:.1%} of {len(labels)} digits right, "
        f"logits from {logits.min():.1f} to {logits.max():.1f}"
    )
    print(f"{'':26}{'softmaxlib, ULP':>16}{'peer, ULP':>22}")
    print(f"{'function':15}{'dtype':8}{'max':>9}{'mean':>10}{'max':>12}{'mean':>10}  peer")
    for function, (peer, peer_function) in PEERS.items():
        for dtype in DTYPES:
            x = logits.astype(dtype)
            exact = reference(function, x)
            ours = ulps(getattr(sml, function)(x), exact)
            theirs = ulps(peer_function(x, axis=-1), exact)
            print(
                f"{function:15}{dtype.__name__:8}{ours.max():9.2f}{ours.mean():10.2f}"
                f"{short(theirs.max()):>12}{short(theirs.mean()):>10}  {peer}"
            )
    report_losses(logits.astype(np.float32), labels)


def short(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def report_losses(x: Array, labels: Array) -> None:
    """Tell how many losses, -log_softmax of the right class, vanish although none is 0."""

    def of_label(y: Array) -> Array:
        return -np.take_along_axis(y, labels[:, None], -1)[:, 0]

    exact = of_label(reference("log_softmax", x))
    print(f"{len(exact)} losses in float32, the smallest {exact.min():.1e} in truth:")
    rivals = {"softmaxlib": sml.log_softmax, "SciPy": scipy.special.log_softmax}
    for name, log_softmax in rivals.items():
        lost = exact[of_label(log_softmax(x, axis=-1)) == 0]
        which = f", {lost.min():.1e} to {lost.max():.1e} in truth" if lost.size else ""
        print(f"  {name} rounds {lost.size} of them to 0{which}")


def main() -> None:
    for name, (logits, labels) in classifiers().items():
        report(name, logits, labels)


if __name__ == "__main__":
    main()
