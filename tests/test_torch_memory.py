"""softmaxlib.torch and the memory of what callers pass: theirs to resize, and all on one device."""

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import softmaxlib as sml

torch = pytest.importorskip("torch")
st = pytest.importorskip("softmaxlib.torch")

OPERATORS = torch.ops.softmaxlib_torch
FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def arguments(dtype=torch.float32):
    """What each function takes, by its parameters' names."""
    x, where = torch.randn(3, 4).to(dtype), torch.ones(3, 4, dtype=torch.bool)
    places = torch.tensor([0, 1, 2])
    return {
        **{name: {"input": x.clone(), "where": where.clone()} for name in FUNCTIONS},
        "take_log_softmax": {"input": x.clone(), "indices": places, "where": where.clone()},
        "cross_entropy": {
            "input": x,
            "target": places.clone(),
            "weight": torch.rand(4).to(dtype),
            "where": where,
        },
    }


CALLS = list(arguments())
SIDES = [(name, side) for name, tensors in arguments().items() for side in tensors]


def resize(tensor):
    """Free the memory and allocate it anew, as FSDP does; then make the tensor larger."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    if not tensor.requires_grad:
        tensor.resize_(2 * tensor.numel())


@of_dtypes
@pytest.mark.parametrize("name", CALLS)
def test_storages_stay_resizable(name, dtype):
    function = getattr(st, name)
    for requires_grad in (False, True):
        tensors = arguments(dtype)[name]
        x = tensors["input"].requires_grad_(requires_grad)
        y = function(**tensors)
        made = [y]
        if requires_grad:
            upstream = torch.ones_like(y)
            made = [upstream, *torch.autograd.grad(y, x, upstream)]
            del y
        for tensor in (*tensors.values(), *made):
            resize(tensor)


def test_storages_stay_resizable_behind_probabilities_and_projections():
    x, target = torch.randn(3, 4), torch.rand(3, 4)
    st.cross_entropy(x, target)
    weights = torch.randn(3, 4, requires_grad=True)
    weights.grad = torch.randn(3, 4)
    st.OrthogonalGradient(torch.optim.SGD([weights], lr=0.1)).step()
    for tensor in (x, target, weights, weights.grad):
        resize(tensor)


@of_dtypes
def test_storages_stay_resizable_behind_functions_of_arrays(dtype):
    x, where, weight = torch.randn(3, 4).to(dtype), torch.ones(3, 4) > 0, torch.rand(4)
    target, temperature = torch.tensor([0, 1, 2]), torch.rand(3, 1) + 1
    for name in FUNCTIONS:
        y = torch.from_numpy(np.array(getattr(sml, name)(x, where=where), np.float32))
        before = (x,) if "stable" in name or name == "logsumexp" else ()
        getattr(sml, f"{name}_backward")(y.clone(), *before, y.clone(), where=where)
    sml.cross_entropy(x, target, weight=weight, temperature=temperature, where=where)
    sml.take_log_softmax(x, target)
    sml.topk_softmax(x, 2)
    sml.sample(x, np.random.default_rng(0))
    sml.orthogonal_gradient(x, x)
    for tensor in (x, where, weight, target, temperature):
        resize(tensor)


@of_dtypes
def test_an_array_keeps_the_memory_of_its_tensor(dtype):
    x = torch.arange(1 << 18).remainder(100).to(dtype)
    array, memory = st._array("x", x), x.data_ptr()
    del x
    gc.collect()
    taken = [torch.full((1 << 18,), 7.0, dtype=dtype) for _ in range(4)]
    assert memory not in {tensor.data_ptr() for tensor in taken}
    assert (array.astype(np.float64) == np.arange(1 << 18) % 100).all()


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_memory_that_is_not_there(name, side):
    tensors = arguments()[name]
    tensors[side].untyped_storage().resize_(0)
    message = f"{side} of shape .* has no memory: its storage has size 0|storage of size 0"
    with pytest.raises(RuntimeError, match=message):  # the last: torch's, of a view of indices
        getattr(st, name)(**tensors)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_fully_sharded(world, tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch is built without torch.distributed or gloo")
    script = Path(__file__).with_name("torch_sharded.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), tmp_path / "store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)


# ---- Devices


@pytest.mark.parametrize(("name", "side"), SIDES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_on_other_devices(name, side, requires_grad):
    """Uninitialized memory would come back from the fake kernels."""
    tensors = arguments()[name]
    tensors[side] = tensors[side].to("meta")
    tensors["input"].requires_grad_(requires_grad)
    other = next(n for n in tensors if n != side) if side == "input" else side
    places = ("meta", "cpu") if side == "input" else ("cpu", "meta")
    message = "expected all tensors to be on the same device, but input is on {} and {} on {}"
    with pytest.raises(RuntimeError, match=message.format(places[0], other, places[1])):
        getattr(st, name)(**tensors)


@pytest.mark.parametrize("name", CALLS)
def test_everything_on_meta(name):
    tensors = {n: t.to("meta") for n, t in arguments()[name].items()}
    want = getattr(st, name)(**arguments()[name])
    y = getattr(st, name)(**tensors)
    assert (y.device.type, y.shape, y.dtype) == ("meta", want.shape, want.dtype)
    x = tensors["input"].requires_grad_()
    (grad,) = torch.autograd.grad(getattr(st, name)(**tensors).sum(), x)
    assert (grad.device.type, grad.shape, grad.dtype) == ("meta", x.shape, x.dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators_of_gradients_on_other_devices(name):
    y = getattr(st, name)(torch.ones(3, 4), keepdim=True) if name == "logsumexp" else None
    tensors = {
        "y": torch.ones(3, 4) if y is None else y,
        "grad": torch.ones(3, 4) if y is None else y,
        "input": None if name.endswith("softmax") else torch.ones(3, 4),
        "where": torch.ones(3, 4) > 0,
    }

    def call(tensors):
        y, grad, x, where = tensors.values()
        return OPERATORS.activation_backward(name, grad, x, y, [-1], 1.0, where)

    assert call(tensors).shape == (3, 4)
    for side in tensors:
        if tensors[side] is not None:
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                call({**tensors, side: tensors[side].to("meta")})


def test_upstream_on_another_device():
    for name, tensors in arguments().items():
        x = tensors["input"].requires_grad_()
        y = getattr(st, name)(**tensors)
        with pytest.raises(RuntimeError, match="device|meta"):
            torch.autograd.grad(y, x, torch.ones_like(y, device="meta"))


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_tensors_that_are_not_dense(name, side):
    tensors = arguments()[name]
    tensors[side] = tensors[side].to_sparse()
    with pytest.raises(TypeError, match=f"{side} has layout torch.sparse_coo; it must be dense"):
        getattr(st, name)(**tensors)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_other_devices_of_fake_tensors(name, side):
    """As under a compiler: what is not on the CPU is refused before anything is computed."""
    with torch._subclasses.FakeTensorMode():
        tensors = arguments()[name]
        tensors[side] = torch.empty(tensors[side].shape, device="cuda", dtype=tensors[side].dtype)
        with pytest.raises((RuntimeError, ValueError), match="device|input is on cuda:0"):
            getattr(st, name)(**tensors)


def test_strided_arguments():
    """Every one in turn, with steps and an offset of its own."""
    for name, tensors in arguments(torch.float64).items():
        want = getattr(st, name)(**tensors)
        for side, tensor in tensors.items():
            strided = torch.stack([tensor, tensor], -1)[..., 1]
            assert not strided.is_contiguous() and strided.storage_offset()
            assert torch.equal(getattr(st, name)(**{**tensors, side: strided}), want)
