"""softmaxlib.torch under torch.func and batched gradients: torch's own values, in float64."""

import functools
import itertools

import pytest

import softmaxlib as sml

torch = pytest.importorskip("torch")
st = pytest.importorskip("softmaxlib.torch")
F = torch.nn.functional
func = torch.func

of_activations = pytest.mark.parametrize("activation", ["softmax", "stablemax"])
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def stablemax(x, dim):
    s = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), x + 1)
    return s / s.sum(dim, keepdim=True)


def log_stablemax(x, dim):
    return stablemax(x, dim).log()


TARGET = torch.tensor([[1, 0, 3, 2, 2], [0, 1, 2, 3, 0], [-100, 3, 1, 1, 2]])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
MASK = torch.arange(60).reshape(3, 4, 5) % 7 != 0


def taken(x, dim):
    return torch.log_softmax(x, dim).gather(dim, TARGET.clamp(0).unsqueeze(dim)).squeeze(dim)


def loss_of(module, reduction):
    """Of the same arguments for both; a row is ignored."""
    return lambda x: module.cross_entropy(
        x, TARGET, WEIGHT, reduction=reduction, label_smoothing=0.1
    )


def masked(x):
    return torch.softmax(x.masked_fill(~MASK, -torch.inf), 1)


# Of x of shape (3, 4, 5): ours, and by torch.
PAIRS = {
    "softmax": (lambda x: st.softmax(x, 1), lambda x: torch.softmax(x, 1)),
    "softmax, two dims": (
        lambda x: st.softmax(x, (0, -1)),
        lambda x: torch.softmax(x.transpose(0, 1).flatten(1), 1).view(4, 3, 5).transpose(0, 1),
    ),
    "softmax, masked": (lambda x: st.softmax(x, 1, where=MASK), masked),
    "log_softmax": (lambda x: st.log_softmax(x, 1), lambda x: torch.log_softmax(x, 1)),
    "logsumexp": (lambda x: st.logsumexp(x, 1), lambda x: torch.logsumexp(x, 1)),
    "stablemax": (lambda x: st.stablemax(x, 1), lambda x: stablemax(x, 1)),
    "log_stablemax": (lambda x: st.log_stablemax(x, 1), lambda x: log_stablemax(x, 1)),
    "take_log_softmax": (
        lambda x: st.take_log_softmax(x, TARGET.clamp(0), 1),
        lambda x: taken(x, 1),
    ),
    **{
        f"cross_entropy, {reduction}": (loss_of(st, reduction), loss_of(F, reduction))
        for reduction in ("mean", "sum", "none")
    },
}
TWICE = [name for name in PAIRS if not name.startswith("cross_entropy")]


def squared(f):
    return lambda x: f(x).square().sum()


def batched(f, x):
    x.requires_grad_()
    y = f(x)
    upstream = torch.linspace(-1, 1, 7 * y.numel(), dtype=y.dtype).view(7, *y.shape)
    return torch.autograd.grad(y, x, upstream, is_grads_batched=True)[0]


def trained(f, x):
    """Gradients behind a vmap over each dimension: what an ensemble of models trains with."""
    found = []
    for d in range(4):
        many = torch.stack([x, x + 1, 2 * x], d).requires_grad_()
        y = func.vmap(f, d)(many)
        found += [y.detach(), *torch.autograd.grad(y.square().sum(), many)]
    return found


TRANSFORMS = {
    "grad": lambda f, x: func.grad(squared(f))(x),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "vjp, called outside": lambda f, x: func.vjp(squared(f), x)[1](torch.tensor(3.0).double())[0],
    "jacobian, vectorized": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "batched gradients": batched,
    "vmap, trained": trained,
    "vmap of grad": lambda f, x: func.vmap(func.grad(squared(f)))(torch.stack([x, 2 * x])),
    "vmap of vmap of grad": lambda f, x: func.vmap(func.vmap(func.grad(squared(f))), 1)(
        torch.stack([x, 2 * x, -x])[None]
    ),
    "grad of vmap": lambda f, x: func.grad(squared(func.vmap(f)))(torch.stack([x, 2 * x])),
}
SECOND = {
    "jacrev of jacrev": lambda f, x: func.jacrev(func.jacrev(squared(f)))(x),
    "jacrev of grad of vmap": lambda f, x: func.jacrev(func.grad(squared(func.vmap(f))))(x[None]),
    "hessian, vectorized": lambda f, x: torch.autograd.functional.hessian(
        squared(f), x, vectorize=True
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", PAIRS)
def test_transforms(name, transform):
    x = random(3, 4, 5)
    got, want = (TRANSFORMS[transform](f, x.clone()) for f in PAIRS[name])
    close(got, want)


@pytest.mark.parametrize("transform", SECOND)
@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives(name, transform):
    x = random(3, 4, 5)
    got, want = (SECOND[transform](f, x.clone()) for f in PAIRS[name])
    close(got, want)


@pytest.mark.parametrize("transform", SECOND)
def test_cross_entropy_is_differentiated_once(transform):
    """An error, and not the zeros of a constant."""
    with pytest.raises(RuntimeError, match="differentiated twice"):
        SECOND[transform](PAIRS["cross_entropy, none"][0], random(3, 4, 5))


def spied(monkeypatch, name, module=sml, place=0):
    calls = []
    function = getattr(module, name)

    def spy(*arguments, **options):
        calls.append(arguments[place].shape)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, spy)
    return calls


def test_vmap_is_one_call(monkeypatch):
    """Over the larger array; of a loss that is reduced, or weighted by its own, one each."""
    x, target = random(6, 4), torch.randint(4, (6,))
    calls = {
        name: spied(monkeypatch, name) for name in ("softmax", "take_log_softmax", "cross_entropy")
    }
    calls["backward"] = spied(monkeypatch, "backward", sml._core, 1)
    upstream = random(6, 4)
    func.vmap(lambda x, g: func.vjp(st.softmax, x)[1](g))(x, upstream)
    func.vmap(st.take_log_softmax)(x, target)
    func.vmap(lambda x, t: st.cross_entropy(x, t, reduction="none"))(x, target)
    assert calls.pop("cross_entropy") == [(6, 4)]
    assert calls == {name: [(6, 4)] for name in calls}
    more = spied(monkeypatch, "cross_entropy")
    func.vmap(st.cross_entropy)(x, target)
    assert more == [(4,)] * 6


def each(f, in_dims, *args):
    """Compute what vmap does, one by one."""
    size = next(a.shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    return torch.stack(
        [
            f(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(size)
        ]
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@of_activations
def test_mapped_arguments(activation, reduction):
    """Every argument mapped or not, along any dimension; masks of fewer dimensions than input."""

    def loss(x, target, weight, where):
        return st.cross_entropy(
            x, target, weight, where=where, reduction=reduction, activation=activation
        )

    target = torch.zeros(3, dtype=torch.int64)
    for dims in itertools.product((None, 1), repeat=4):
        if dims == (None,) * 4:
            continue
        x, labels, weight, where = random(3, 5), target, torch.rand(5).double(), torch.ones(5) > 0
        where[2] = False
        args = [
            a if d is None else torch.stack([a, a.flip(0) if a is x else a], d)
            for a, d in zip((x, labels, weight, where), dims, strict=True)
        ]
        if dims[1] is not None:
            args[1][:, 1] = 3
        args[0].requires_grad_()
        got, want = func.vmap(loss, dims)(*args), each(loss, dims, *args)
        close(got, want)
        close(*(torch.autograd.grad(y.square().sum(), args[0])[0] for y in (got, want)))


def test_mapped_masks_and_indices():
    x = random(3, 5).requires_grad_()
    where = torch.rand(4, 5) > 0.3
    where[:, 1] = True
    functions = [
        *(
            functools.partial(lambda f, x, where: f(x, where=where), getattr(st, name))
            for name in ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax")
        ),
        lambda x, where: st.take_log_softmax(x, torch.ones(3, dtype=torch.int64), where=where),
    ]
    for f in functions:
        got, want = func.vmap(f, (None, 0))(x, where), each(f, (None, 0), x, where)
        assert torch.equal(got, want)
        got, want = (
            torch.autograd.grad(y.masked_fill(y.isinf(), 0).square().sum(), x)[0]
            for y in (got, want)
        )
        close(got, want)
    indices = torch.randint(-5, 5, (4, 3, 2))
    dims = (None, 0)
    got, want = (
        m(st.take_log_softmax, dims, x, indices)
        for m in (lambda f, d, *a: func.vmap(f, d)(*a), each)
    )
    assert torch.equal(got, want)


def test_scalars_and_empty_batches():
    x = random(4)
    for name in ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax"):
        f = getattr(st, name)
        close(func.vmap(f)(x), each(f, (0,), x))
        close(func.vmap(func.grad(f))(x), each(func.grad(f), (0,), x))
        close(func.vmap(func.grad(func.grad(f)))(x), torch.zeros(4).double())
        assert func.vmap(f)(x[:0]).shape == (0,)
        with pytest.raises(IndexError, match="dim is 1; input has 1 dimensions"):
            func.vmap(lambda row, f=f: f(row, 1))(x[None])
    for reduction in ("mean", "none"):
        none, labels = random(0, 3, 5).requires_grad_(), torch.empty(0, 3, dtype=torch.int64)
        loss = func.vmap(functools.partial(st.cross_entropy, reduction=reduction))(none, labels)
        assert loss.shape == ((0, 3) if reduction == "none" else (0,))
        assert torch.autograd.grad(loss.sum(), none)[0].shape == none.shape


def test_targets_that_require_grad_below_vmap():
    """vmap says that nothing requires grad; the loss still refuses rather than lose a gradient."""
    x, weight = random(2, 3), torch.rand(2, 3).double().requires_grad_()
    target = torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="weight requires grad"):
        func.vmap(st.cross_entropy)(x, target, weight)
    probabilities = torch.rand(2, 3).double().requires_grad_()
    with pytest.raises(RuntimeError, match="target requires grad"):
        func.vmap(functools.partial(st.cross_entropy, reduction="none"))(x, probabilities)
    with pytest.raises(RuntimeError, match="weight requires grad"):
        func.grad(lambda w: st.cross_entropy(x, target, w))(weight[0].detach())


def test_no_gradient_is_computed_where_none_is_needed(monkeypatch):
    wanted = []
    function = sml.cross_entropy

    def spy(*arrays, return_grad, **options):
        wanted.append(return_grad)
        return function(*arrays, return_grad=return_grad, **options)

    monkeypatch.setattr(sml, "cross_entropy", spy)
    x, target = random(1, 3, 4), torch.tensor([[0, 1, 2]])
    func.vmap(st.cross_entropy)(x, target)
    func.vmap(st.cross_entropy)(x.requires_grad_(), target)
    with torch.no_grad():
        func.vmap(st.cross_entropy)(x, target)
    assert wanted == [False, True, False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_transforms_inside_of_compiled_functions():
    """Operators know vmap alone; all else is an error, and no gradient that is silently lost."""
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    x, target = random(3, 4), torch.tensor([0, 1, 2])
    mapped = func.vmap(st.cross_entropy)
    assert torch.equal(compiled(mapped)(x, target), mapped(x, target))
    with pytest.raises(Exception, match="must override the setup_context"):
        compiled(func.grad(squared(st.softmax)))(x)
    with pytest.raises(Exception, match="under vmap, which hides that input requires it"):
        compiled(mapped)(x.requires_grad_(), target)
