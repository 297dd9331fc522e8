"""The examples, built and run as a reader would; inside of a runtime, the bits of the package."""

import dataclasses
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from oracle import DTYPES, bound
from threadpoolctl import threadpool_limits

import softmaxlib as sml

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FUNCTIONS = ("softmax", "log_softmax")
SHAPES = ((7,), (5, 33), (3, 40, 17), (2, 70_001), (300, 1000))  # the last two for many threads

of_functions = pytest.mark.parametrize("function", FUNCTIONS)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded  # dataclasses look there
    spec.loader.exec_module(loaded)
    return loaded


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- What is missing is said in a sentence

WITHOUT = """
import runpy, sys
program, missing, *arguments = sys.argv[1:]
sys.modules |= dict.fromkeys(missing.split(","))  # importing them fails
sys.argv[1:] = arguments
sys.path.insert(0, program.rpartition("/")[0])
runpy.run_path(program, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("command", "missing", "remedy"),
    [
        ("decoder.py", "softmaxlib", "pip install -e ."),
        ("digits.py", "sklearn", "pip install -e '.[test]'"),
        ("digits.py", "mpmath", "pip install -e '.[test]'"),
        ("grokking.py", "rich", "pip install -e '.[bench]'"),
        ("grokking.py", "matplotlib", "pip install -e '.[bench]'"),
        ("build_examples.py", "softmaxlib", "pip install -e ."),
        ("build_examples.py c pytorch", "torch", "pip install torch"),
        ("build_examples.py jax_ffi", "jax", "pip install jax"),
        ("embedding_speed.py", "softmaxlib", "pip install -e ."),
        ("embedding_speed.py", "torch,jax", "pip install torch"),
    ],
)
def test_without_what_it_needs(command, missing, remedy):
    if command.startswith("build") and shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    program, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(EXAMPLES / program), missing, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert missing.split(",")[0] in sentence and f"`{remedy}`" in sentence


def test_every_program_is_tested_without_what_it_needs():
    (mark,) = test_without_what_it_needs.pytestmark
    assert {row[0].split()[0] for row in mark.args[1]} == {p.name for p in EXAMPLES.glob("*.py")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a function that builds an example."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    directory = tmp_path_factory.mktemp("examples")
    build_examples = module(EXAMPLES / "build_examples.py")

    def build(name):
        try:
            return build_examples.build(name, directory)
        except subprocess.CalledProcessError as error:
            pytest.fail(f"{error}\n{error.stderr or ''}")

    return build


@pytest.fixture(scope="module")
def torch(built):
    torch = pytest.importorskip("torch")
    library = module(EXAMPLES / "build_examples.py").library(built("pytorch"))
    module(EXAMPLES / "pytorch" / "softmaxlib_torch.py").load(library)
    return torch


@pytest.fixture(scope="module")
def jax(built):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    library = module(EXAMPLES / "build_examples.py").library(built("jax_ffi"))
    jax.softmaxlib = module(EXAMPLES / "jax_ffi" / "softmaxlib_jax.py")
    jax.softmaxlib.load(library)
    return jax


def logits(shape, dtype):
    return (np.random.default_rng(0).standard_normal(shape) * 5).astype(dtype)


def same_bits(y, z):
    assert (y.shape, y.dtype) == (z.shape, z.dtype)
    assert np.ascontiguousarray(y).tobytes() == np.ascontiguousarray(z).tobytes()


def near(y, theirs, dtype):
    """Compare with a runtime's own result, whose error is larger than ours."""
    tolerance = {"float16": 2e-2, "bfloat16": 5e-2, "float32": 1e-4, "float64": 1e-12}[dtype.name]
    np.testing.assert_allclose(
        y.astype(np.float64), theirs.astype(np.float64), rtol=tolerance, atol=tolerance
    )


def test_c_attention(built):
    run(built("c") / "attention")  # fails where a weight is off, or only one thread works


# ---- The decoder


def test_decoder():
    """It has learnt the rhyme, and the same seed gives the same text."""
    decoder = module(EXAMPLES / "decoder.py")
    model = decoder.Model(decoder.RHYME, np.random.default_rng(0))
    assert model.train(decoder.RHYME * 2, steps=200) < 0.1

    def text(seed, **filters):
        return model.generate("this is ", 120, np.random.default_rng(seed), **filters)

    greedy = text(0, top_k=1)
    assert greedy.startswith("this is the ") and greedy[-8:] in decoder.RHYME
    assert greedy == text(1, temperature=1e-6)
    assert text(0, temperature=2) == text(0, temperature=2) != text(1, temperature=2)


def test_decoder_program():
    program = (sys.executable, EXAMPLES / "decoder.py", "--length", "40", "the cat ")
    options = ("--temperature", "0.5", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.01")
    loss, text = run(*program, *options).splitlines()
    assert loss.startswith("cross-entropy ") and text.startswith("the cat ") and len(text) == 48


def test_decoder_cache():
    """Token by token with the cache is all tokens at once."""
    decoder = module(EXAMPLES / "decoder.py")
    model = decoder.Model(decoder.RHYME, np.random.default_rng(0))
    tokens = model.tokens(decoder.RHYME[:50])
    whole = model.features(tokens, decoder.Cache(50))
    cache = decoder.Cache(50)
    parts = [model.features(part, cache) for part in np.split(tokens, (1, 2, 3, 20))]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-3, atol=1e-3)


# ---- Grokking


def test_grokking():
    """Modulo 31: plain losses collapse to 0, ours do not; the orthogonal gradient generalizes."""
    grokking = module(EXAMPLES / "grokking.py")
    settings = grokking.Settings(modulus=31, fraction=0.7, width=64)

    def records(name):
        variant = dataclasses.replace(grokking.VARIANTS[name], steps=400, beta2=0.9)
        return grokking.train(variant, settings, lambda record: None)

    with threadpool_limits(1):  # BLAS threads only spin on matrices this small
        results = {name: records(name) for name in grokking.VARIANTS}
        assert results == {name: records(name) for name in grokking.VARIANTS}
    last = {name: records[-1] for name, records in results.items()}
    assert all(r.step == 400 and r.train_accuracy > 0.9 for r in last.values())
    plain = last.pop("plain softmax")
    assert any(r.zero_losses > 0.3 and r.zero_at_label > 0.3 for r in results["plain softmax"])
    assert all(r.zero_losses == r.zero_at_label == 0 for r in last.values())
    assert last.pop("orthogonal gradient").test_accuracy > 0.8
    assert all(r.test_accuracy < 0.2 for r in (plain, *last.values()))


def test_grokking_gradients():
    """Against differences, in double."""
    grokking = module(EXAMPLES / "grokking.py")
    settings = grokking.Settings(modulus=5, width=7)
    network = grokking.Network(settings, np.random.default_rng(0))
    network.weights = [w.astype(np.float64) for w in network.weights]
    pairs = grokking.Pairs(np.array([0, 3, 7, 8, 24]), 5)  # no pair with some residues

    def loss():
        losses, gradient = grokking.stablemax_cross_entropy(network.logits(pairs), pairs.labels)
        return losses.sum(), gradient

    gradients = network.gradients(pairs, network.hidden(pairs), loss()[1])
    for w, gradient in zip(network.weights, gradients, strict=True):
        for index in np.ndindex(w.shape):
            before, differences = w[index], []
            for w[index] in (before + 1e-6, before - 1e-6):
                differences.append(loss()[0])
            w[index] = before
            slope = (differences[0] - differences[1]) / 2e-6
            np.testing.assert_allclose(gradient[index], slope, rtol=1e-5, atol=1e-7)


def test_grokking_program(tmp_path):
    picture = tmp_path / "grokking.png"
    options = ("--modulus", "11", "--width", "16", "--steps", "20", "--output", picture)
    settings, _, *rows, _ = run(sys.executable, EXAMPLES / "grokking.py", *options).splitlines()
    assert "modulus 11" in settings and "seed 0" in settings
    assert [row.split(" 0.9")[0].strip() for row in rows] == [
        "plain softmax",
        "softmaxlib softmax",
        "stablemax",
        "orthogonal gradient",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


# ---- PyTorch


def to_torch(torch, x):
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def from_torch(torch, y):
    if y.dtype == torch.bfloat16:
        return y.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return y.numpy()


@of_dtypes
@of_functions
def test_torch_operators(torch, function, dtype):
    ours, theirs = getattr(torch.ops.softmaxlib, function), getattr(torch, function)
    views = (
        lambda library, x: x,
        lambda library, x: x.swapaxes(0, -1),
        lambda library, x: x[..., ::3],
        lambda library, x: library.broadcast_to(x, (2, *x.shape)),
    )
    for shape, view, axis in itertools.product(SHAPES, views, (-1, 0)):
        x = logits(shape, dtype)
        tensor = view(torch, to_torch(torch, x))
        y = ours(tensor, axis)
        assert y.stride() == torch.empty_like(tensor).stride()
        same_bits(from_torch(torch, y), getattr(sml, function)(view(np, x), axis))
        near(from_torch(torch, y), from_torch(torch, theirs(tensor, axis)), dtype)


@of_functions
def test_torch_shapes_at_the_edge(torch, function):
    ours, theirs = getattr(torch.ops.softmaxlib, function), getattr(torch, function)
    for shape, axis in ((), 0), ((), -1), ((0,), 0), ((0, 3), 1), ((3, 0), 1), ((4, 1), -1):
        x = torch.ones(shape)
        assert torch.equal(ours(x, axis), theirs(x, axis))


@of_functions
def test_torch_threads(torch, function):
    x = torch.from_numpy(logits((37, 30_011), np.float32))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(getattr(torch.ops.softmaxlib, function)(x, -1))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results)


@of_functions
def test_torch_contract_of_operators(torch, function):
    """What torch itself checks: the schema, the fake kernel, autograd, dynamic shapes."""
    operator = getattr(torch.ops.softmaxlib, function)
    for shape, axis in ((5,), 0), ((4, 6), -1), ((2, 3, 4), 1):
        x = torch.randn(shape, dtype=torch.float64)
        for view in (x, x.swapaxes(0, -1)):
            view.requires_grad_()
            torch.library.opcheck(operator, (view, axis))
            assert torch.autograd.gradcheck(operator, (view, axis))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside of torch's compiler
def test_torch_compile(torch):
    def attention(scores):
        return torch.ops.softmaxlib.softmax(scores * 0.125, -1) + torch.ops.softmaxlib.log_softmax(
            scores.mT, 1
        )

    x = torch.randn(3, 8, 8)
    compiled = torch.compile(attention, fullgraph=True)
    torch.testing.assert_close(compiled(x), attention(x))


def test_torch_errors(torch):
    softmax = torch.ops.softmaxlib.softmax
    with pytest.raises(RuntimeError, match="dim is 2, x has 2 dimensions"):
        softmax(torch.ones(2, 3), 2)
    with pytest.raises(RuntimeError, match="x must be float32"):
        softmax(torch.ones(3, dtype=torch.int64), 0)


# ---- JAX


@of_dtypes
@of_functions
def test_jax_functions(jax, function, dtype):
    ours, theirs = getattr(jax.softmaxlib, function), getattr(jax.nn, function)
    for shape, axis in itertools.product(SHAPES, (-1, 0)):
        x = logits(shape, dtype)
        result = getattr(sml, function)(x, axis)
        same_bits(np.asarray(ours(x, axis)), result)
        same_bits(np.asarray(jax.jit(ours, static_argnums=1)(x, axis)), result)
        near(result, np.asarray(theirs(x, axis)), dtype)


@of_functions
def test_jax_vmap(jax, function):
    ours = getattr(jax.softmaxlib, function)
    x = logits((3, 4, 5, 6), np.float32)
    for batch, axis in itertools.product(range(4), (-1, 0, 1)):
        mapped = jax.jit(jax.vmap(lambda row, axis=axis: ours(row, axis), batch, batch))
        of_whole = [i for i in range(4) if i != batch][axis]
        same_bits(np.asarray(mapped(x)), getattr(sml, function)(x, of_whole))


@of_functions
def test_jax_derivatives(jax, function):
    ours, theirs = getattr(jax.softmaxlib, function), getattr(jax.nn, function)
    x = logits((4, 5), np.float64)
    for axis, derivative in itertools.product((-1, 0), (jax.jacfwd, jax.jacrev)):
        near(
            np.asarray(derivative(lambda x, axis=axis: ours(x, axis))(x)),
            np.asarray(derivative(lambda x, axis=axis: theirs(x, axis))(x)),
            np.dtype(np.float64),
        )


@of_functions
def test_jax_shard_map(jax, function):
    """A carry of a loop must keep its type, part of which is that it varies over the mesh."""
    if not hasattr(jax, "shard_map"):
        pytest.skip("jax.shard_map came with jax 0.6")
    ours = getattr(jax.softmaxlib, function)
    x = logits((4, 5), np.float32)
    twice = jax.shard_map(
        lambda x: jax.lax.scan(lambda x, _: (ours(x), None), x, None, 2)[0],
        mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]), ("i",)),
        in_specs=jax.sharding.PartitionSpec("i"),
        out_specs=jax.sharding.PartitionSpec("i"),
    )
    same_bits(np.asarray(twice(x)), getattr(sml, function)(getattr(sml, function)(x)))


def test_jax_calls_within_calls(jax):
    """More calls at once than XLA has threads: none may wait for a task that has no thread."""
    x = logits((64, 20_000), np.float32)
    temperatures = np.arange(1, 17, dtype=np.float32)
    # Not one call over a batch, but calls that do not depend on each other.
    all_at_once = jax.jit(lambda x: [jax.softmaxlib.softmax(x / t) for t in temperatures])
    results = [sml.softmax(x / t) for t in temperatures]
    failures = []

    def check():
        try:
            for y, result in zip(all_at_once(x), results, strict=True):
                near(np.asarray(y), result, x.dtype)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=check, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "the calls wait for each other"
    assert not failures


def test_jax_errors(jax):
    with pytest.raises(jax.errors.JaxRuntimeError, match="x must be float32"):
        jax.softmaxlib.softmax(jax.numpy.ones(3, "int32"))


# ---- The table


@pytest.mark.slow
def test_embedding_speed(tmp_path, built):
    """One round: the rows of every runtime that is installed, and our errors, not the times."""
    installed = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]
    if not installed:
        pytest.skip("neither torch nor jax is installed")
    program = EXAMPLES / "embedding_speed.py"
    output = run(sys.executable, program, "--rounds", "1", "--directory", tmp_path)
    print(output[output.index("runtime ") :])
    rows = re.findall(r"^(\w+) \S+ +(\(.*?\)) +\d+ +\w+ .* ([\d.]+)$", output, re.M)
    assert {row[:2] for row in rows} == {
        (name, shape) for name in installed for shape in ("(512, 32000)", "(32, 12, 512, 512)")
    }
    assert all(float(ulp) <= bound("softmax", np.float32) for *_, ulp in rows)
