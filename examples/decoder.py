"""A small language model in NumPy, with softmaxlib for attention, training and sampling.

    python examples/decoder.py
    python examples/decoder.py --temperature 1.5 --top-p 0.9 --seed 7 "the dog that "

A transformer of random weights reads a nursery rhyme. Only its last layer is trained, which takes
a second or so. Then it goes on with a prompt, letter by letter, with a cache of keys and
values. The same seed gives the same text.
"""

from __future__ import annotations

import argparse
import time

try:
    import numpy as np
    from numpy.typing import NDArray

    import softmaxlib as sml
except ModuleNotFoundError as error:
    raise SystemExit(f"decoder.py needs {error.name}: in the clone, `pip install -e .`") from None

Array = NDArray[np.float32]

RHYME = (
    "this is the farmer sowing his corn, that kept the cock that crowed in the morn, that waked "
    "the priest all shaven and shorn, that married the man all tattered and torn, that kissed the "
    "maiden all forlorn, that milked the cow with the crumpled horn, that tossed the dog, that "
    "worried the cat, that killed the rat, that ate the malt that lay in the house that jack "
    "built. "
)
LAYERS, HEADS, WIDTH = 2, 8, 256
CONTEXT = 6  # short, so that it forgets which line it was in


def normalized(x: Array) -> Array:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)


class Cache:
    """Keys and values of the tokens so far, for every layer and head."""

    def __init__(self, tokens: int) -> None:
        shape = (LAYERS, HEADS, tokens, WIDTH // HEADS)
        self.keys, self.values = np.zeros((2, *shape), np.float32)
        self.length = 0


class Model:
    def __init__(self, text: str, rng: np.random.Generator) -> None:
        def random(*shape: int) -> Array:
            return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-2]))

        self.letters = sorted(set(text))
        self.embedding = random(len(self.letters), WIDTH)
        self.query_key_value = random(LAYERS, WIDTH, 3 * WIDTH)
        self.mixed = random(LAYERS, WIDTH, WIDTH)
        self.up, self.down = random(LAYERS, WIDTH, 2 * WIDTH), random(LAYERS, 2 * WIDTH, WIDTH)
        self.readout = np.zeros((WIDTH, len(self.letters)), np.float32)

    def tokens(self, text: str) -> NDArray[np.intp]:
        return np.array([self.letters.index(letter) for letter in text])

    def features(self, tokens: NDArray[np.intp], cache: Cache) -> Array:
        """Run new tokens, one or many, after those in the cache."""
        first, last = cache.length, cache.length + len(tokens)
        cache.length = last
        ago = np.arange(first, last)[:, None] - np.arange(last)  # of each query, each key
        seen = (ago >= 0) & (ago < CONTEXT)
        slopes = np.geomspace(0.05, 4, HEADS, dtype=np.float32)[:, None, None]  # ALiBi
        x = self.embedding[tokens]
        for layer in range(LAYERS):
            q, k, v = (
                part.reshape(len(tokens), HEADS, -1).swapaxes(0, 1)
                for part in np.split(normalized(x) @ self.query_key_value[layer], 3, axis=-1)
            )
            cache.keys[layer, :, first:last] = k
            cache.values[layer, :, first:last] = v
            scores = q @ cache.keys[layer, :, :last].swapaxes(1, 2)
            weights = sml.softmax(
                scores, temperature=np.sqrt(q.shape[-1]), bias=-slopes * ago, where=seen
            )
            heads = weights @ cache.values[layer, :, :last]
            x = x + heads.swapaxes(0, 1).reshape(len(tokens), WIDTH) @ self.mixed[layer]
            x = x + np.maximum(normalized(x) @ self.up[layer], 0) @ self.down[layer]
        return normalized(x)

    def train(self, text: str, steps: int) -> float:
        """Fit the last layer by gradient descent, and return the cross-entropy in nats."""
        tokens = self.tokens(text)
        x, y = self.features(tokens[:-1], Cache(len(tokens))), tokens[1:]
        truth = np.eye(len(self.letters), dtype=np.float32)[y]
        velocity = np.zeros_like(self.readout)
        for _ in range(steps):
            probabilities = sml.softmax(x @ self.readout)
            velocity = 0.9 * velocity - 1.0 * x.T @ (probabilities - truth) / len(y)
            self.readout += velocity
        return -float(sml.log_softmax(x @ self.readout)[np.arange(len(y)), y].mean())

    def generate(self, prompt: str, length: int, rng: np.random.Generator, **filters) -> str:
        cache, text = Cache(len(prompt) + length), prompt
        tokens = self.tokens(prompt)
        for _ in range(length):
            logits = self.features(tokens, cache)[-1] @ self.readout
            tokens = np.array([sml.sample(logits, rng, **filters)])
            text += self.letters[tokens[0]]
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="this is ")
    parser.add_argument("--length", type=int, default=300, help="in letters (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="%(default)s")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    arguments = vars(parser.parse_args())
    if not arguments["prompt"] or not set(arguments["prompt"]) <= set(RHYME):
        parser.error(
            f"prompt: {arguments['prompt']!r} is not made of {''.join(sorted(set(RHYME)))!r}"
        )

    model = Model(RHYME, np.random.default_rng(0))
    start = time.perf_counter()
    loss = model.train(RHYME * 2, steps=200)  # twice, so that it can begin again
    print(f"cross-entropy {loss:.3f} nats after {time.perf_counter() - start:.1f} s")
    rng = np.random.default_rng(arguments.pop("seed"))
    print(model.generate(**arguments, rng=rng))


if __name__ == "__main__":
    main()
