"""Grokking without regularization, where float32 does not end it: addition modulo 113.

    python examples/grokking.py        # needs `pip install -e '.[bench]'`; minutes on two cores

The experiment of "Grokking at the Edge of Numerical Stability" (Prieto et al., 2025), in NumPy: a
network of two hidden layers sees some of the pairs (i, j), as one-hot vectors, and is to give
(i + j) mod p for all. Full batches, Adam, no regularization, all in float32. The same split and
first weights for each variant:

    plain softmax         cross-entropy by the log-softmax of the textbook, in float32
    softmaxlib softmax    the same loss by softmaxlib, whose losses and gradients do not vanish
    stablemax             cross-entropy of StableMax, by softmaxlib
    orthogonal gradient   plain softmax, each gradient made orthogonal to its weights

Each variant runs on one thread, and BLAS too, so that the same machine gives the same numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# Read when NumPy is imported.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

try:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    import softmaxlib as sml
except ModuleNotFoundError as error:
    raise SystemExit(
        f"grokking.py needs {error.name}: in the clone, `pip install -e '.[bench]'`"
    ) from None

Array = NDArray[np.float32]
Loss = Callable[[Array, NDArray[np.intp]], tuple[Array, Array]]


def plain_cross_entropy(logits: Array, labels: NDArray[np.intp]) -> tuple[Array, Array]:
    """Return losses and their gradients as frameworks compute them."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    gradient = np.exp(log_p)
    rows = np.arange(len(labels))
    gradient[rows, labels] -= 1
    return -log_p[rows, labels], gradient


def cross_entropy(logits: Array, labels: NDArray[np.intp]) -> tuple[Array, Array]:
    return sml.cross_entropy(logits, labels, reduction="none", return_grad=True)


def stablemax_cross_entropy(logits: Array, labels: NDArray[np.intp]) -> tuple[Array, Array]:
    return sml.cross_entropy(
        logits, labels, activation="stablemax", reduction="none", return_grad=True
    )


@dataclasses.dataclass
class Variant:
    loss: Loss
    steps: int = 8_000
    beta2: float = 0.99
    orthogonal: bool = False


VARIANTS = {
    "plain softmax": Variant(plain_cross_entropy),
    "softmaxlib softmax": Variant(cross_entropy),
    "stablemax": Variant(stablemax_cross_entropy, steps=40_000, beta2=0.995),
    "orthogonal gradient": Variant(plain_cross_entropy, steps=500, orthogonal=True),
}


@dataclasses.dataclass
class Settings:
    modulus: int = 113
    fraction: float = 0.4  # of the pairs, for training
    width: int = 200
    rate: float = 0.01
    beta1: float = 0.9
    epsilon: float = 1e-25
    seed: int = 0


class Pairs:
    """Numbers p * i + j, as rows of the first layer: those of i, and after them those of j."""

    def __init__(self, numbers: NDArray[np.intp], modulus: int) -> None:
        i, j = np.divmod(numbers, modulus)
        self.rows = (i, modulus + j)
        self.labels = (i + j) % modulus
        self._groups = []
        for rows in self.rows:
            order = np.argsort(rows, kind="stable")
            self._groups.append((order, *np.unique(rows[order], return_index=True)))

    def sums(self, x: Array, out: Array) -> Array:
        """Add up the rows of x that belong to each row of the first layer."""
        for order, rows, starts in self._groups:
            out[rows] = np.add.reduceat(x[order], starts)
        return out


class Network:
    """Two hidden layers with ReLU, without biases."""

    def __init__(self, settings: Settings, rng: np.random.Generator) -> None:
        sizes = (2 * settings.modulus, settings.width, settings.width, settings.modulus)
        self.weights = [
            rng.uniform(-1, 1, (n, m)).astype(np.float32) / np.float32(np.sqrt(n))
            for n, m in zip(sizes, sizes[1:], strict=False)
        ]

    def hidden(self, pairs: Pairs) -> tuple[Array, Array]:
        first, second, _ = self.weights
        # The product with two one-hot vectors is the sum of two rows.
        x = first[pairs.rows[0]]
        x += first[pairs.rows[1]]
        np.maximum(x, 0, out=x)
        y = x @ second
        return x, np.maximum(y, 0, out=y)

    def logits(self, pairs: Pairs) -> Array:
        return self.hidden(pairs)[-1] @ self.weights[-1]

    def gradients(self, pairs: Pairs, hidden: tuple[Array, Array], of_logits: Array) -> list[Array]:
        first, second, third = self.weights
        x, y = hidden
        of_third = y.T @ of_logits
        of_y = of_logits @ third.T
        of_y *= y > 0
        of_second = x.T @ of_y
        of_x = of_y @ second.T
        of_x *= x > 0
        return [pairs.sums(of_x, out=np.zeros_like(first)), of_second, of_third]


class Adam:
    """Adam; it keeps the root of the second moment, which float32 holds where squares underflow."""

    def __init__(self, settings: Settings, beta2: float, weights: list[Array]) -> None:
        self.settings, self.beta2, self.weights, self.step = settings, beta2, weights, 0
        self.means = [np.zeros_like(w) for w in weights]
        self.roots = [np.zeros_like(w) for w in weights]

    def update(self, gradients: list[Array]) -> None:
        self.step += 1
        s = self.settings
        rate = s.rate / (1 - s.beta1**self.step)
        scale = 1 / np.sqrt(1 - self.beta2**self.step)
        for w, gradient, mean, root in zip(
            self.weights, gradients, self.means, self.roots, strict=True
        ):
            mean *= np.float32(s.beta1)
            mean += np.float32(1 - s.beta1) * gradient
            root *= np.float32(np.sqrt(self.beta2))
            np.hypot(root, np.float32(np.sqrt(1 - self.beta2)) * gradient, out=root)
            w -= np.float32(rate) * mean / (np.float32(scale) * root + np.float32(s.epsilon))


@dataclasses.dataclass
class Record:
    """What is so before the step; shares of the training set where nothing else is said."""

    step: int
    train_accuracy: float
    test_accuracy: float
    loss: float  # mean
    zero_losses: float
    zero_at_label: float  # the gradient at the label
    zero_rows: float  # the whole gradient of a sample
    largest_logit: float


def train(variant: Variant, settings: Settings, advance: Callable[[Record], None]) -> list[Record]:
    """Return records at some hundred steps, evenly spaced on a logarithmic axis."""
    rng, steps = np.random.default_rng(settings.seed), variant.steps
    numbers = rng.permutation(settings.modulus**2)
    count = int(settings.fraction * len(numbers))
    seen, unseen = (
        Pairs(np.sort(part), settings.modulus) for part in (numbers[:count], numbers[count:])
    )
    network = Network(settings, rng)
    adam = Adam(settings, variant.beta2, network.weights)
    recorded = {0, *np.geomspace(1, max(steps, 1), 300).astype(int).tolist(), steps}
    records = []
    for step in range(steps + 1):
        hidden = network.hidden(seen)
        logits = hidden[-1] @ network.weights[-1]
        losses, gradient = variant.loss(logits, seen.labels)
        if step in recorded:
            at_label = gradient[np.arange(count), seen.labels]
            records.append(
                Record(
                    step,
                    float(np.mean(logits.argmax(-1) == seen.labels)),
                    float(np.mean(network.logits(unseen).argmax(-1) == unseen.labels)),
                    float(losses.mean(dtype=np.float64)),
                    float(np.mean(losses == 0)),
                    float(np.mean(at_label == 0)),
                    float(np.mean(~gradient.any(-1))),
                    float(np.abs(logits).max()),
                )
            )
        advance(records[-1])
        if step < steps:
            gradient /= count  # of the mean
            gradients = network.gradients(seen, hidden, gradient)
            if variant.orthogonal:
                gradients = sml.orthogonal_gradient(gradients, network.weights)
            adam.update(gradients)
    return records


@contextmanager
def progress_bars(variants: dict[str, Variant]) -> Iterator[dict[str, Callable[[Record], None]]]:
    """Show a bar for each variant and one for all, with the time left, on a terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description:20}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        whole = progress.add_task("all", total=sum(v.steps + 1 for v in variants.values()), note="")

        def bar(name: str) -> Callable[[Record], None]:
            task = progress.add_task(name, total=variants[name].steps + 1, note="", start=False)

            def advance(record: Record) -> None:
                if not progress.tasks[task].started:
                    progress.start_task(task)
                progress.advance(task)
                progress.advance(whole)
                progress.update(task, note=f"test accuracy {record.test_accuracy:.1%}")

            return advance

        yield {name: bar(name) for name in variants}


def run(variants: dict[str, Variant], settings: Settings, jobs: int) -> dict[str, list[Record]]:
    """Train the variants, as many at once as there are jobs."""
    sml.set_num_threads(1)
    stopped = threading.Event()

    def work(name: str, advance: Callable[[Record], None]) -> list[Record]:
        def advance_or_stop(record: Record) -> None:
            if stopped.is_set():
                raise KeyboardInterrupt
            advance(record)

        return train(variants[name], settings, advance_or_stop)

    with progress_bars(variants) as bars, ThreadPoolExecutor(jobs) as pool:
        futures = {name: pool.submit(work, name, bars[name]) for name in variants}
        try:
            return {name: future.result() for name, future in futures.items()}
        finally:  # after Ctrl-C the pool would wait for all steps
            stopped.set()


def table(variants: dict[str, Variant], results: dict[str, list[Record]]) -> str:
    """Return the last record of each variant, when the test set was mastered, the most zeros."""
    lines = [
        f"{'':20} {'beta2':>5} {'steps':>6} {'train':>7} {'test':>7} {'99% at':>6} "
        f"{'mean loss':>9} {'logit':>7} "
        f"{'zero losses, most':>17} {'gradients of labels':>19} {'of rows':>7}"
    ]
    for name, records in results.items():
        last = records[-1]
        mastered = next((r.step for r in records if r.test_accuracy >= 0.99), "never")
        most = max(r.zero_losses for r in records)
        lines.append(
            f"{name:20} {variants[name].beta2:5} {last.step:6} "
            f"{last.train_accuracy:7.2%} {last.test_accuracy:7.2%} {mastered:>6} "
            f"{last.loss:9.1e} {last.largest_logit:7.0e} "
            f"{last.zero_losses:9.2%} {most:7.2%} {last.zero_at_label:19.2%} {last.zero_rows:7.2%}"
        )
    return "\n".join(lines)


def plot(results: dict[str, list[Record]], title: str, path: Path) -> None:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, (name, records) in zip(panels, results.items(), strict=False):
        steps = [r.step for r in records[1:]]
        for label, field, style in (
            ("training accuracy", "train_accuracy", "C0--"),
            ("test accuracy", "test_accuracy", "C1-"),
            ("share of zero losses", "zero_losses", "C3:"),
        ):
            axes.plot(steps, [getattr(r, field) for r in records[1:]], style, label=label)
        axes.set(title=name, xscale="log", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
        axes.set_xlabel("steps")
    for axes in list(panels):
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS, help="may be repeated (all of them)"
    )
    parser.add_argument("--steps", type=int, help="of each variant (its own)")
    parser.add_argument("--beta2", type=float, help="of Adam, for each variant (its own)")
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name}", type=type(field.default), default=field.default, help="%(default)s"
        )
    parser.add_argument("--output", type=Path, help="where the plot goes (no plot)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="variants at once, a thread each (%(default)s)",
    )
    arguments = vars(parser.parse_args())
    names, output, jobs = (arguments.pop(key) for key in ("variant", "output", "jobs"))
    own = {key: arguments.pop(key) for key in ("steps", "beta2")}
    own = {key: value for key, value in own.items() if value is not None}
    variants = {name: dataclasses.replace(VARIANTS[name], **own) for name in names or VARIANTS}
    settings = Settings(**arguments)

    start = time.perf_counter()
    results = run(variants, settings, jobs)
    print(", ".join(f"{name} {value}" for name, value in arguments.items()))
    print(table(variants, results))
    print(f"{time.perf_counter() - start:.0f} s, {jobs} variants at once")
    if output:
        plot(results, f"addition modulo {settings.modulus}", output)


if __name__ == "__main__":
    main()
