"""softmaxlib.torch: the bits of the package, derivatives, torch's contract of operators."""

import copy
import itertools
import math
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import softmaxlib as sml

torch = pytest.importorskip("torch")
st = pytest.importorskip("softmaxlib.torch")
F = torch.nn.functional

FUNCTIONS = ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPERATORS = torch.ops.softmaxlib_torch
DIMS = (
    ((5,), 0),
    ((3,), ()),
    ((3, 4), -1),
    ((3, 4), 0),
    ((2, 3, 4), 1),
    ((2, 3, 4), (0, 2)),
    ((), 0),
)

of_functions = pytest.mark.parametrize("name", FUNCTIONS)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_activations = pytest.mark.parametrize("activation", ["softmax", "stablemax"])
in_torch_deprecated = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def array(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def same_bits(y, z):
    assert (y.shape, y.dtype) == (z.shape, z.dtype)
    assert np.ascontiguousarray(y).tobytes() == np.ascontiguousarray(z).tobytes()


def views(x):
    """Views of all kinds, none of them a copy."""
    return x, x.transpose(0, -1), x[..., ::2], x.unsqueeze(1).expand(-1, 3, *x.shape[1:])


def plainly(name, x, dim):
    """Compute the function by its definition, for torch's own autograd."""
    if name in ("softmax", "log_softmax", "logsumexp"):
        return getattr(torch, name)(x, dim)
    s = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), x + 1)
    p = s / s.sum(dim, keepdim=True)
    return p.log() if name == "log_stablemax" else p


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


# ---- softmax and its relatives


@of_dtypes
@of_functions
def test_bits_of_the_package(name, dtype):
    for shape in ((7,), (5, 33), (3, 4, 5), (300, 4000)):
        for x, dim in itertools.product(views(torch.randn(shape).to(dtype)), (-1, 0)):
            y = getattr(st, name)(x, dim, temperature=0.7)
            same_bits(array(y), np.asarray(getattr(sml, name)(array(x), dim, temperature=0.7)))
            if name != "logsumexp":
                assert y.stride() == torch.empty_like(x).stride()


@of_functions
def test_shapes_at_the_edge(name):
    for shape, dim in ((), 0), ((), -1), ((0, 3), 1), ((4, 1), -1), ((2, 0, 3), 0):
        x = torch.ones(shape)
        want = plainly(name, x, dim)
        torch.testing.assert_close(getattr(st, name)(x, dim), want)
    x = torch.ones(2, 3, 4)
    assert st.logsumexp(x, (0, 2)).shape == (3,)
    assert st.logsumexp(x, (0, 2), keepdim=True).shape == (1, 3, 1)


@of_dtypes
def test_memory_is_shared(dtype, monkeypatch):
    calls = []

    def spy(module, name, arrays_of):
        function = getattr(module, name)

        def call(*arguments, **options):
            calls.append([a.__array_interface__ for a in arrays_of(*arguments, **options)])
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    x = torch.randn(60, 40).to(dtype)[:, ::2].T.requires_grad_()
    seen = x.detach()
    spy(sml, "softmax", lambda x, dim, *, out, **options: (x, out))
    spy(sml._core, "backward", lambda function, grad, x, y, out, *options: (grad, x, y, out))
    y = st.softmax(x, 0)
    upstream = torch.rand(20, 60).to(dtype)
    (grad,) = torch.autograd.grad(y, x, upstream)
    forward, backward = calls

    def at(interface, tensor):
        if interface["strides"] is not None:
            bytes_of_strides = tuple(tensor.element_size() * s for s in tensor.stride())
            assert interface["strides"] == bytes_of_strides
        return interface["data"][0] == tensor.data_ptr()

    assert len(forward) == 2 and len(backward) == 4
    for interface, tensor in zip(forward + backward, (seen, y, upstream, y, y, grad), strict=True):
        assert at(interface, tensor)


def test_negative_bit():
    z = torch.randn(3, 4, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    torch.testing.assert_close(st.softmax(x), torch.softmax(-z.imag, -1))


@of_functions
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(name, temperature, masked):
    """First and second, against finite differences; a mask leaves something in every row."""
    for shape, dim in DIMS:
        x = torch.randn(shape, dtype=torch.float64)
        where = (torch.rand(shape) > 0.4) | (x == x.amax(dim, keepdim=True)) if masked else None

        def function(x, dim=dim, where=where):
            y = getattr(st, name)(x, dim, temperature=temperature, where=where)
            return y if name == "logsumexp" or where is None else y.masked_fill(~where, 0)

        x.requires_grad_()
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@of_functions
@of_dtypes
def test_gradients_of_torch(name, dtype):
    """torch's own, computed in float64 of the same input."""
    x = (2 * torch.randn(5, 33)).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, want = getattr(st, name)(x), plainly(name, exact, -1)
    upstream = torch.randn(want.shape, dtype=torch.float64).to(dtype)
    y.backward(upstream)
    want.backward(upstream.double())
    assert x.grad.dtype == dtype
    tolerance = {"rtol": 1e-12, "atol": 1e-14}
    if dtype != torch.float64:
        eps = torch.finfo(dtype).eps
        tolerance = {"rtol": 4 * eps, "atol": 20 * eps}
    torch.testing.assert_close(x.grad.double(), exact.grad, **tolerance)


@of_functions
def test_zeros_of_masks_are_exact(name):
    x = torch.randn(4, 50)
    x[:, ::7] = -math.inf
    where = torch.rand(4, 50) > 0.3
    where[3] = False
    x[~where] = math.nan
    x.requires_grad_()
    y = getattr(st, name)(x, where=where)
    y.backward(torch.ones_like(y))
    absent = ~where | torch.isneginf(x)
    assert (x.grad[absent] == 0).all() and x.grad.isfinite().all()


@of_functions
def test_stablemax_at_one(name):
    """Where autograd through the published formula gives NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([[1.0, -2.0, 0.0, -0.0, 1.0]], dtype=dtype, requires_grad=True)
        getattr(st, name)(x).double().square().sum().backward()
        exact = x.detach().double().requires_grad_()
        plainly(name, exact, -1).square().sum().backward()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=10 * eps, atol=10 * eps)


# ---- Selected log-probabilities


@of_dtypes
def test_take_log_softmax(dtype):
    x = torch.randn(4, 3, 20).to(dtype).requires_grad_()
    for dim, shape in (
        (-1, (4, 3)),
        (-1, (4, 3, 5)),
        (-1, (4, 1, 5)),
        (0, (3, 20)),
        (1, (4, 2, 20)),
    ):
        indices = torch.randint(-x.shape[dim], x.shape[dim], shape)
        y = st.take_log_softmax(x, indices, dim, temperature=0.7)
        same_bits(
            array(y.detach()),
            sml.take_log_softmax(array(x.detach()), indices.numpy(), dim, temperature=0.7),
        )
        whole = st.log_softmax(x.double(), dim, temperature=0.7)
        places = indices % x.shape[dim]
        if indices.ndim < x.ndim:
            want = whole.take_along_dim(places.unsqueeze(dim), dim).squeeze(dim)
        else:
            want = whole.take_along_dim(places, dim)
        upstream = torch.randn(want.shape).to(dtype)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            torch.autograd.grad(y, x, upstream)[0],
            torch.autograd.grad(want, x, upstream.double())[0],
            rtol=20 * eps,
            atol=50 * eps,
        )


def test_take_log_softmax_derivatives():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    where = torch.rand(4, 6) > 0.3
    where[:, 2] = True
    for indices in (torch.tensor([2, 2, 2, 2]), torch.full((4, 3), 2)):
        for mask in (None, where):

            def function(x, indices=indices, mask=mask):
                return st.take_log_softmax(x, indices, temperature=0.6, where=mask)

            assert torch.autograd.gradcheck(function, x)
            assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("mask", [None, (True, True, False, True), (False,) * 4], ids=str)
def test_selected_elements_of_probability_zero(mask):
    """Their gradient is 0, and counts nowhere else: that of log_softmax, for rows of all kinds."""
    inf, nan = math.inf, math.nan
    rows = torch.tensor(
        [
            [1, 2, 3, 4],
            [-inf, 1, 2, 0],
            [-inf] * 4,
            [nan, 1, 2, 3],
            [inf, 1, 2, 3],
            [-3e38, 3e38, 0, 1],
        ]
    )
    where = None if mask is None else torch.tensor(mask)
    for i in range(4):
        indices = torch.full((6,), i)
        found = []
        for call in (
            lambda x, indices: st.take_log_softmax(x, indices, where=where),
            lambda x, indices: st.log_softmax(x, where=where).gather(1, indices[:, None])[:, 0],
        ):
            x = rows.clone().requires_grad_()
            found.append(gradient(call(x, indices).double() @ torch.arange(1.0, 7).double(), x))
        torch.testing.assert_close(*found, equal_nan=True)
        absent = torch.isneginf(rows[1]) if mask is None else ~where | torch.isneginf(rows[1])
        if absent[i]:
            assert (found[0][1] == 0).all()


def test_second_derivative_of_an_element_of_probability_zero():
    x = torch.tensor([[-math.inf, 1.0, 2.0, 0.5], [0.0, 1.0, 2.0, 0.5]], dtype=torch.float64)
    where = torch.tensor([[True] * 4, [True, False, True, True]])
    indices = torch.tensor([[0, 2], [1, 2]])
    found = []
    for call in (
        lambda x: st.take_log_softmax(x, indices, where=where),
        lambda x: st.log_softmax(x, where=where).gather(1, indices),
    ):
        z = x.clone().requires_grad_()
        upstream = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(call(z), z, upstream, create_graph=True)
        found.append((grad, *torch.autograd.grad(grad.square().sum(), (z, upstream))))
    torch.testing.assert_close(*found)
    assert (found[0][2][:, 0] == 0).all() and (found[0][2][:, 1] != 0).all()


# ---- Cross-entropy


def problem(shape, kind, dtype=torch.float64):
    """Logits, target and weight; one row ignored."""
    dim = min(len(shape) - 1, 1)
    x = (2 * torch.randn(shape)).to(dtype).requires_grad_()
    weight = torch.rand(shape[dim]).to(dtype)
    if kind == "probabilities":
        return x, torch.rand(shape).to(dtype).softmax(dim), weight
    target = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :])
    if target.ndim:
        target.view(-1)[0] = -100
    return x, target, weight


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(7,), (6, 5), (3, 4, 5), (2, 3, 4, 2)], ids=str)
def test_cross_entropy_is_that_of_torch(shape, reduction, kind):
    for weighted, smoothing in itertools.product((False, True), (0.0, 0.1)):
        x, target, weight = problem(shape, kind)
        arguments = (x, target, weight if weighted else None)
        options = {"reduction": reduction, "label_smoothing": smoothing}
        loss, want = (f.cross_entropy(*arguments, **options) for f in (st, F))
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(want)
        grads = [torch.autograd.grad(y, x, upstream)[0] for y in (loss, want)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)


def test_cross_entropy_options():
    x, target, _ = problem((4, 5, 6), "indices")
    torch.testing.assert_close(
        st.cross_entropy(x.mT, target, dim=-1), F.cross_entropy(x, target), rtol=1e-12, atol=0
    )
    target[0, 0] = 3
    torch.testing.assert_close(
        st.cross_entropy(x, target, ignore_index=3), F.cross_entropy(x, target, ignore_index=3)
    )
    every = torch.full_like(target, -100)
    assert st.cross_entropy(x, every).isnan() and F.cross_entropy(x, every).isnan()


@of_activations
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_cross_entropy_derivative(kind, reduction, activation):
    x, target, weight = problem((4, 5, 3), kind)
    where = torch.rand(x.shape) > 0.3
    if kind == "indices":  # elsewhere the loss is infinite
        where.scatter_(1, target.clamp(0).unsqueeze(1), True)
    else:
        target = target * where
    for mask in (None, where):

        def function(x, where=mask):
            return st.cross_entropy(
                x,
                target,
                weight,
                label_smoothing=0.1,
                reduction=reduction,
                activation=activation,
                temperature=0.7,
                where=where,
            )

        assert torch.autograd.gradcheck(function, x)


@of_dtypes
@of_activations
def test_cross_entropy_in_every_dtype(activation, dtype):
    x, target, _ = problem((6, 50), "indices", dtype)
    loss = st.cross_entropy(x, target, activation=activation)
    assert loss.dtype == dtype
    exact = x.detach().double().requires_grad_()
    want = F.nll_loss(plainly(f"log_{activation}", exact, 1), target)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), want, rtol=8 * eps, atol=0)
    torch.testing.assert_close(
        gradient(loss, x).double(), gradient(want, exact), rtol=8 * eps, atol=8 * eps
    )


def test_no_collapse():
    x = torch.tensor([[17.0, 0.0]], requires_grad=True)
    target = torch.tensor([0])
    assert F.cross_entropy(x, target) == 0
    loss = st.cross_entropy(x, target)
    loss.backward()
    small = math.log1p(math.exp(-17))
    assert loss.item() == pytest.approx(small, rel=4e-7)
    np.testing.assert_allclose(x.grad, [[-small, small]], rtol=4e-7)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_through_a_kept_graph(reduction, factor):
    """What was saved is handed out, or scaled in its place, only when it is used up."""
    x, target, _ = problem((6, 5), "indices")
    loss = factor * st.cross_entropy(x, target, reduction=reduction)
    upstream = torch.rand_like(loss) if reduction == "none" else torch.tensor(1.0).double()
    want = factor * F.cross_entropy(x, target, reduction=reduction)
    (want,) = torch.autograd.grad(want, x, upstream)
    for _ in range(3):
        (grad,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
        torch.testing.assert_close(grad, want)
        grad.zero_()
    for i in range(3):
        loss.backward(upstream, retain_graph=i < 2)
        torch.testing.assert_close(x.grad, (i + 1) * want)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(upstream)


def test_gradient_is_not_computed_in_vain(monkeypatch):
    wanted = []
    function = sml.cross_entropy

    def spy(*arguments, return_grad, **options):
        wanted.append(return_grad)
        return function(*arguments, return_grad=return_grad, **options)

    monkeypatch.setattr(sml, "cross_entropy", spy)
    x, target, _ = problem((6, 5), "indices")
    loss = st.cross_entropy(x, target)
    with torch.no_grad():
        assert torch.equal(st.cross_entropy(x, target), loss)
    with torch.inference_mode():
        assert torch.equal(st.cross_entropy(x, target), loss)
    st.cross_entropy(x.detach(), target)
    assert wanted == [True, False, False, False]


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_is_not_copied(reduction, factor, monkeypatch):
    written = []
    function = sml.cross_entropy

    def spy(*arguments, grad_out, **options):
        written.append(grad_out.__array_interface__["data"][0])
        return function(*arguments, grad_out=grad_out, **options)

    monkeypatch.setattr(sml, "cross_entropy", spy)
    x, target, _ = problem((600, 2000), "indices", torch.float32)
    loss = factor * st.cross_entropy(x, target, reduction=reduction)
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    assert [grad.data_ptr()] == written


def test_no_second_derivative():
    x, target, _ = problem((6, 5), "indices")
    (grad,) = torch.autograd.grad(st.cross_entropy(x, target), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


# ---- Operators


@of_functions
def test_contract_of_operators(name):
    """What torch itself checks: the schema, the fake kernel, autograd, dynamic shapes."""
    for view in torch.randn(4, 6), torch.randn(4, 6).T[..., ::2]:
        where = torch.rand(view.shape) > 0.2
        arguments = (name, view.detach().requires_grad_(), [-1], 0.5, where)
        torch.library.opcheck(OPERATORS.activation, arguments)
        y = getattr(st, name)(view, -1)
        if name == "logsumexp":
            y.unsqueeze_(-1)
        saved = None if name.endswith("softmax") else view
        arguments = (name, torch.rand_like(y).requires_grad_(), saved, y, [-1], 0.5, where)
        torch.library.opcheck(OPERATORS.activation_backward, arguments)


def test_contract_of_losses():
    x, target, weight = problem((4, 5, 6), "indices", torch.float32)
    for reduction, with_grad in ("none", True), ("mean", True), ("mean", False):
        arguments = (target, weight, 1, "softmax", 0.1, -100, reduction, 1.0, None, with_grad)
        logits = x if with_grad else x.detach()
        torch.library.opcheck(OPERATORS.cross_entropy, (logits, *arguments))
    indices = torch.randint(5, (4, 2, 6))
    torch.library.opcheck(OPERATORS.take_log_softmax, (x, indices, 1, 0.5, None))


def model(x, where, target):
    scores = [getattr(st, name)(x, -1, where=where) for name in FUNCTIONS if "log" not in name]
    scores.append(st.logsumexp(x * 0.5, 1, keepdim=True))
    losses = [
        st.cross_entropy(x.sin(), target, activation=activation, reduction=reduction)
        for activation, reduction in (("softmax", "mean"), ("stablemax", "none"))
    ]
    taken = st.take_log_softmax(x, target.clamp(0), temperature=2.0)
    return sum(s.square().sum() for s in scores) + 3 * losses[0] + (losses[1] + taken).mean()


@in_torch_deprecated
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for rows in (4, 7, 9):
        x, target, _ = problem((rows, 8), "indices")
        where = torch.rand(rows, 8) > 0.2
        got, want = (f(x, where, target) for f in (compiled, model))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradient(got, x), gradient(want, x))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, where, target), want)


@of_functions
def test_vmap(name):
    x = torch.randn(3, 4, 5)
    for batch, dim in itertools.product(range(3), (-1, 0)):

        def function(row, dim=dim):
            return getattr(st, name)(row, dim)

        mapped = torch.func.vmap(function, batch)(x)
        assert torch.equal(mapped, torch.stack([function(row) for row in x.unbind(batch)]))


@in_torch_deprecated
def test_no_forward_mode():
    """Not a tangent that is silently lost, of any argument."""
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(st.softmax, (x,), (x,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jacfwd(st.logsumexp)(x)
    with torch.autograd.forward_ad.dual_level():
        dual, weight = (torch.autograd.forward_ad.make_dual(t, t) for t in (x, torch.ones(4)))
        for name, call in (
            ("input", lambda: st.cross_entropy(dual, target)),
            ("weight", lambda: st.cross_entropy(x, target, weight)),
            ("target", lambda: st.cross_entropy(x, dual)),
            ("input", lambda: st.take_log_softmax(dual, target)),
        ):
            with pytest.raises(NotImplementedError, match=f"{name}: forward-mode"):
                call()
        with pytest.raises(RuntimeError):
            torch.func.vmap(st.softmax)(dual)


def test_operators_are_seen_by_who_looks_on():
    """The profiler and modes: only where nobody does, a kernel is called without its operator."""
    x, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    seen = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    def call():
        (st.softmax(x).sum() + st.take_log_softmax(x, target).sum()).backward()
        st.cross_entropy(x, target).backward()

    with Watching():
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    for names in set(seen), {event.name for event in profile.events()}:
        assert {name for name in names if name.startswith("softmaxlib_torch::")} == {
            f"softmaxlib_torch::{name}"
            for name in ("activation", "activation_backward", "take_log_softmax", "cross_entropy")
        }


@in_torch_deprecated
def test_tracing_records_the_operator():
    x = torch.randn(3, 4)
    traced = torch.jit.trace(lambda x: st.softmax(x, -1), (x,))
    assert torch.equal(traced(2 * x), st.softmax(2 * x))


def test_large_results_are_no_views():
    """Those in memory that is kept: a view from an autograd.Function refuses what is in place."""
    x = torch.randn(1100, 1000, requires_grad=True)
    y = st.softmax(x)
    y.mul_(2)
    y = st.softmax(x.exp())
    y.sum().backward()
    x.grad.mul_(2)
    assert y.nbytes > 1 << 22 and not y._is_view()


# ---- Errors


def test_errors_of_input():
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        x = torch.empty(3, device="cuda")
        with pytest.raises(ValueError, match="input is on cuda:0; softmaxlib computes on CPU"):
            st.softmax(x)
    with pytest.raises(TypeError, match="input has dtype torch.int64; it must be float16"):
        st.softmax(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="input has dtype torch.complex64"):
        st.cross_entropy(torch.ones(3, dtype=torch.complex64), torch.tensor(0))
    with pytest.raises(TypeError, match="temperature is a Tensor"):
        st.softmax(torch.ones(3), temperature=torch.tensor(2.0, requires_grad=True))
    with pytest.raises(ValueError, match="temperature must be positive"):
        st.softmax(torch.ones(3), temperature=0)
    with pytest.raises(IndexError):
        st.softmax(torch.ones(3), 1)
    with pytest.raises(TypeError, match="where has dtype"):
        st.softmax(torch.ones(3), where=torch.ones(3))
    with pytest.raises(TypeError, match="input has layout torch.sparse_coo; it must be dense"):
        st.softmax(torch.eye(3).to_sparse())


def test_dims_of_numpy():
    x, target = torch.randn(3, 3), torch.tensor([0, 1, 2])
    functions = [getattr(st, name) for name in FUNCTIONS]
    for call in (
        *functions,
        lambda x, dim: st.take_log_softmax(x, target, dim),
        lambda x, dim: st.cross_entropy(x, target, dim=dim),
    ):
        for dim in (np.int64(0), np.int32(-2), torch.tensor(0)):
            assert torch.equal(call(x, dim), call(x, 0))
        for dim in (True, np.True_, 1.0, "0", np.float64(1)):
            with pytest.raises(TypeError, match="dim is .*; it must be an int"):
                call(x, dim)
    for function in functions:
        for dims in (np.array([0, 1]), [np.int64(0), 1], range(2)):
            assert torch.equal(function(x, dims), function(x, (0, 1)))
        with pytest.raises(TypeError, match="dim is True; it must be an int"):
            function(x, (0, True))


def test_numbers_of_numpy():
    x, target = torch.randn(3, 3), torch.tensor([0, 1, 2])
    for name in FUNCTIONS:
        function = getattr(st, name)
        assert torch.equal(function(x, temperature=np.float32(0.5)), function(x, temperature=0.5))
    got = st.cross_entropy(
        x, target, ignore_index=np.int64(1), label_smoothing=np.float32(0.5), temperature=2
    )
    assert torch.equal(
        got, st.cross_entropy(x, target, ignore_index=1, label_smoothing=0.5, temperature=2.0)
    )
    for name, bad in (
        ("label_smoothing", torch.tensor(0.1)),
        ("label_smoothing", "much"),
        ("temperature", np.array([1.0, 2.0])),
        ("temperature", True),
        ("ignore_index", 1.5),
        ("ignore_index", True),
    ):
        with pytest.raises(TypeError, match=f"^{name} .*must be a"):
            st.cross_entropy(x, target, **{name: bad})


def test_arrays_for_tensors():
    """The same sentence for every argument of every function."""
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    where, weight = torch.ones(3, 4) > 0, torch.ones(4)
    arguments = {
        **{name: {"input": x, "where": where} for name in FUNCTIONS},
        "take_log_softmax": {"input": x, "indices": target, "where": where},
        "cross_entropy": {"input": x, "target": target, "weight": weight, "where": where},
    }
    for name, tensors in arguments.items():
        for side, tensor in tensors.items():
            for value, kind in ((tensor.numpy(), "numpy.ndarray"), (tensor.tolist(), "list")):
                with pytest.raises(TypeError, match=f"^{side} is a {kind}; it must be a torch.Te"):
                    getattr(st, name)(**{**tensors, side: value})
    with pytest.raises(TypeError, match="from_numpy shares its memory, and softmaxlib itself"):
        st.softmax(x.numpy())


def test_dtypes_of_side_tensors():
    """Every integer is a class; what cannot be one is named."""
    x, places = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    signed = (torch.int8, torch.int16, torch.int32, torch.int64)
    for dtype in (*signed, torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        for function in st.cross_entropy, st.take_log_softmax:
            got, want = (function(x, p).sum() for p in (places.to(dtype), places))
            assert torch.equal(got, want) and torch.equal(gradient(got, x), gradient(want, x))
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        for side, call in (
            ("target", lambda t: st.cross_entropy(x, t)),
            ("weight", lambda t: st.cross_entropy(x, places, t[0])),
            ("where", lambda t: st.softmax(x, where=t)),
            ("indices", lambda t: st.take_log_softmax(x, t)),
        ):
            with pytest.raises(TypeError, match=f"{side} has dtype "):
                call(torch.ones(3, 4).to(dtype))


def test_without_torch():
    """One sentence that says what to do, and nothing of what failed on the way."""
    code = "import sys; sys.modules['torch'] = None; import softmaxlib; import softmaxlib.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1
    assert last == (
        "ImportError: softmaxlib.torch needs torch: pip install torch, "
        "or pip install -e '.[torch]' in a clone of softmaxlib"
    )


def test_errors_of_targets():
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="target requires grad"):
        st.cross_entropy(x, torch.rand(2, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="weight requires grad"):
        st.cross_entropy(x, torch.tensor([0, 1]), torch.ones(3, requires_grad=True))
    with pytest.raises(ValueError, match="target at .* is 3"):
        st.cross_entropy(x, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="reduction"):
        st.cross_entropy(x, torch.tensor([0, 1]), reduction="max")
    with pytest.raises(IndexError, match="indices at .* is 3"):
        st.take_log_softmax(x, torch.tensor([0, 3]))
    for function in st.cross_entropy, st.take_log_softmax:
        with pytest.raises(IndexError, match="dim is 2; input has 2 dimensions"):
            function(x, torch.tensor([0, 1]), dim=2)
    with pytest.raises(RuntimeError, match="with_grad=False"):
        loss, _ = OPERATORS.cross_entropy(
            x, torch.tensor([0, 1]), None, 1, "softmax", 0.0, -100, "mean", 1.0, None, False
        )
        loss.backward()


# ---- The orthogonal gradient


def layer(dtype=torch.float32):
    linear = torch.nn.Linear(4, 3).to(dtype)
    linear(torch.randn(5, 4).to(dtype)).square().sum().backward()
    return linear


@of_dtypes
@pytest.mark.parametrize("rescale", [True, False])
def test_orthogonal_gradient(rescale, dtype):
    linear = layer(dtype)
    before = copy.deepcopy(linear.state_dict())
    grads = {name: p.grad.clone() for name, p in linear.named_parameters()}
    st.OrthogonalGradient(torch.optim.SGD(linear.parameters(), lr=0.25), rescale=rescale).step()
    for name, p in linear.named_parameters():
        want = sml.orthogonal_gradient(array(grads[name]), array(before[name]), rescale=rescale)
        same_bits(array(p.grad), want)
        assert torch.equal(p, before[name] - 0.25 * p.grad)
        tolerance = 10 * torch.finfo(dtype).eps
        cosine = torch.cosine_similarity(p.grad.flatten(), before[name].flatten(), dim=0)
        assert abs(cosine) < tolerance


def test_optimizers_with_closures():
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.LBFGS(p, max_iter=3),
        lambda p: torch.optim.AdamW(p),
    ):
        linear, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
        optimizer = st.OrthogonalGradient(make(linear.parameters()))
        at = []

        def closure(linear=linear, x=x, optimizer=optimizer, at=at):
            optimizer.zero_grad()
            loss = linear(x).square().sum()
            loss.backward()
            at[:] = [p.detach().clone() for p in linear.parameters()]
            return loss

        assert optimizer.step(closure) > 0
        for p, weights in zip(linear.parameters(), at, strict=True):
            assert abs(torch.cosine_similarity(p.grad.flatten(), weights.flatten(), dim=0)) < 1e-5


def test_it_is_the_optimizer():
    linear = layer()
    inner = torch.optim.AdamW(linear.parameters(), lr=0.5)
    optimizer = st.OrthogonalGradient(inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    stepped = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(True))
    optimizer.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.25 and stepped == [True]

    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert inner.state[linear.weight]["step"] == 2
    optimizer.load_state_dict(saved)
    assert inner.state[linear.weight]["step"] == 1 and optimizer.state is inner.state

    optimizer.zero_grad()
    assert linear.weight.grad is None
    optimizer.step()  # nothing to project
    optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    assert len(inner.param_groups) == 2
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.rescale and twin.param_groups[0]["lr"] == 0.25
    assert repr(optimizer).startswith("OrthogonalGradient(AdamW")


def test_attributes_that_are_set_reach_the_optimizer():
    linear = layer()
    inner = torch.optim.SGD(linear.parameters(), lr=0.5, momentum=0.9)
    optimizer = st.OrthogonalGradient(inner)
    for name, value in (
        ("state", {linear.weight: {"momentum_buffer": torch.ones(3, 4)}}),
        ("param_groups", copy.copy(inner.param_groups[:])),
        ("defaults", {"lr": 0.25}),
        ("of_its_own", 3),
    ):
        setattr(optimizer, name, value)
        assert getattr(inner, name) is value and getattr(optimizer, name) is value
    other = torch.optim.SGD(linear.parameters(), lr=0.125)
    optimizer.optimizer, optimizer.rescale = other, False
    assert optimizer.param_groups is other.param_groups and not hasattr(other, "rescale")
    assert "of_its_own" in vars(inner) and not hasattr(optimizer, "of_its_own")


def test_schedulers_wrap_the_step_of_the_wrapper():
    """They set optimizer.step, which must not become the wrapped optimizer's."""
    linear = layer()
    inner = torch.optim.SGD(linear.parameters(), lr=0.5)
    optimizer = st.OrthogonalGradient(inner)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    for p in linear.parameters():
        before = p.detach() + 0.5 * p.grad
        assert abs(torch.cosine_similarity(p.grad.flatten(), before.flatten(), dim=0)) < 1e-5


def test_gradient_with_the_negative_bit():
    """A view of memory of the other sign: read as it is, not as it lies there."""
    z = torch.randn(5, dtype=torch.complex64)
    weights = torch.nn.Parameter(z.conj().imag)
    weights.grad = torch.randn(5, dtype=torch.complex64).conj().imag
    assert weights.is_neg() and weights.grad.is_neg()
    want = sml.orthogonal_gradient((weights.grad + 0).numpy(), (weights.detach() + 0).numpy())
    st.OrthogonalGradient(torch.optim.SGD([weights], lr=0.1)).step()
    same_bits((weights.grad + 0).numpy(), want)


def test_grad_scaler():
    """Also around a fused optimizer, which would take over the unscaling."""
    after = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(1)
        linear = torch.nn.Linear(4, 3)
        inner = torch.optim.SGD(linear.parameters(), lr=0.1, fused=True)
        optimizer = st.OrthogonalGradient(inner)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(linear(torch.randn(5, 4)).square().mean()).backward()
        scaler.step(optimizer)
        after.append(linear.weight.detach())
    torch.testing.assert_close(*after)


def test_gradients_that_cannot_be_projected():
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"parameter of shape \(5, 3\) has layout torch.sparse_coo"):
        st.OrthogonalGradient(torch.optim.SGD(table.parameters(), lr=0.1)).step()
    z = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    z.abs().sum().backward()
    with pytest.raises(
        TypeError, match="gradient of a parameter of shape .* has dtype torch.complex64"
    ):
        st.OrthogonalGradient(torch.optim.SGD([z], lr=0.1)).step()
