"""softmaxlib for PyTorch: differentiable functions of CPU tensors, which share their memory.

Not imported by softmaxlib itself: ``import softmaxlib.torch``. docs/frameworks.md has more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

try:
    import torch
except ImportError as error:
    raise ImportError(
        "softmaxlib.torch needs torch: pip install torch, or pip install -e '.[torch]' in a clone "
        "of softmaxlib"
    ) from error

from torch import Tensor
from torch.autograd import forward_ad

import softmaxlib as sml
from softmaxlib import _core, _runtime
from softmaxlib._arrays import as_number

__all__ = [
    "OrthogonalGradient",
    "cross_entropy",
    "log_softmax",
    "log_stablemax",
    "logsumexp",
    "softmax",
    "stablemax",
    "take_log_softmax",
]

Dim: TypeAlias = int | Sequence[int]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CODES = {dtype: _core.dtypes[str(dtype).removeprefix("torch.")] for dtype in _FLOATS}
_LARGE = 1 << 22  # bytes; below, malloc itself keeps what it gets back


def softmax(
    input: Tensor, dim: Dim = -1, *, temperature: float = 1.0, where: Tensor | None = None
) -> Tensor:
    """Return `softmaxlib.softmax` of a tensor.

    Parameters
    ----------
    input : Tensor
        On the CPU; float16, bfloat16, float32 or float64; any strides.
    dim : int or sequence of int, default -1
        One distribution over these dimensions together.
    temperature : float, default 1.0
        Divides input; positive and finite.
    where : Tensor of bool, optional
        True takes part; elsewhere result and gradient are 0. Broadcasts against input.

    Returns
    -------
    Tensor
        Of the shape, dtype and layout of input.

    Raises
    ------
    TypeError, ValueError, IndexError
        If input is elsewhere or of another dtype; else as `softmaxlib.softmax`.
    RuntimeError
        If the tensors are not all on one device.
    """
    return _apply("softmax", input, dim, temperature, where)


def log_softmax(
    input: Tensor, dim: Dim = -1, *, temperature: float = 1.0, where: Tensor | None = None
) -> Tensor:
    """Return `softmaxlib.log_softmax` of a tensor.

    Parameters
    ----------
    input, dim, temperature, where
        As of `softmax`; where ``where`` is False the result is -inf.

    Returns
    -------
    Tensor
        Of the shape, dtype and layout of input.
    """
    return _apply("log_softmax", input, dim, temperature, where)


def stablemax(
    input: Tensor, dim: Dim = -1, *, temperature: float = 1.0, where: Tensor | None = None
) -> Tensor:
    """Return `softmaxlib.stablemax` of a tensor.

    Parameters
    ----------
    input, dim, temperature, where
        As of `softmax`.

    Returns
    -------
    Tensor
        Of the shape, dtype and layout of input.
    """
    return _apply("stablemax", input, dim, temperature, where)


def log_stablemax(
    input: Tensor, dim: Dim = -1, *, temperature: float = 1.0, where: Tensor | None = None
) -> Tensor:
    """Return `softmaxlib.log_stablemax` of a tensor.

    Parameters
    ----------
    input, dim, temperature, where
        As of `softmax`; where ``where`` is False the result is -inf.

    Returns
    -------
    Tensor
        Of the shape, dtype and layout of input.
    """
    return _apply("log_stablemax", input, dim, temperature, where)


def logsumexp(
    input: Tensor,
    dim: Dim = -1,
    keepdim: bool = False,
    *,
    temperature: float = 1.0,
    where: Tensor | None = None,
) -> Tensor:
    """Return `softmaxlib.logsumexp` of a tensor.

    Parameters
    ----------
    input, dim, temperature, where
        As of `softmax`; where ``where`` is False, elements are left out.
    keepdim : bool, default False
        Keep the reduced dimensions, with length 1.

    Returns
    -------
    Tensor
        Of the dtype of input.
    """
    dims = _dims(dim)
    y = _apply("logsumexp", input, dims, temperature, where)
    return y if keepdim or not y.ndim else y.squeeze(dims)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    dim: int | None = None,
    activation: Literal["softmax", "stablemax"] = "softmax",
    temperature: float = 1.0,
    where: Tensor | None = None,
) -> Tensor:
    """Return `softmaxlib.cross_entropy`, as `torch.nn.functional.cross_entropy` is called.

    Parameters
    ----------
    input : Tensor
        Logits on the CPU, with the classes along dim; any strides.
    target : Tensor
        Class indices (the shape of input without dim) or probabilities (the shape of input).
    weight : Tensor, optional
        A weight per class.
    ignore_index : int, default -100
        Rows of this class index add nothing.
    reduction : {"mean", "sum", "none"}
        What becomes of the losses of the rows.
    label_smoothing : float, default 0.0
        Share of the target that is spread over the classes, from 0 to 1.
    dim : int, optional
        Of the classes; default as in torch: 1, for a vector 0.
    activation : {"softmax", "stablemax"}
        What makes probabilities of the logits.
    temperature : float, default 1.0
        Divides input; positive and finite.
    where : Tensor of bool, optional
        True takes part; elsewhere the probability and the gradient are 0. Broadcasts against input.

    Returns
    -------
    Tensor
        The loss: a scalar, with ``reduction="none"`` of the shape of input without dim.

    Raises
    ------
    TypeError, ValueError, IndexError
        If input is elsewhere or of another dtype; else as `softmaxlib.cross_entropy`.
    RuntimeError
        If target or weight requires grad, the tensors are not all on one device, or the result is
        differentiated twice.

    Notes
    -----
    The gradient comes from the sums of the loss, in the forward call, and is what is kept for the
    backward pass.
    """
    _check(input, target=target, weight=weight, where=where)
    loss: Tensor
    loss, _ = _call_cross_entropy(
        input,
        target,
        weight,
        min(input.ndim - 1, 1) if dim is None else _one_dim(dim, input),
        activation,
        _number("label_smoothing", label_smoothing),
        _integer("ignore_index", ignore_index),
        reduction,
        _number("temperature", temperature),
        where,
    )
    return loss


def take_log_softmax(
    input: Tensor,
    indices: Tensor,
    dim: int = -1,
    *,
    temperature: float = 1.0,
    where: Tensor | None = None,
) -> Tensor:
    """Return `softmaxlib.take_log_softmax` of a tensor: selected elements of its log_softmax.

    Parameters
    ----------
    input, dim, temperature, where
        As of `log_softmax`; a single dim.
    indices : Tensor of int64
        Places along dim. Of the shape of input without dim: one for each row. Or of as many
        dimensions as input, as for `torch.take_along_dim`: k for each row.

    Returns
    -------
    Tensor
        Of the shape of indices (broadcast) and the dtype of input.

    Notes
    -----
    For a loss take `cross_entropy`: its gradient keeps its accuracy where a probability is near 1.
    The gradient of a selected element of probability 0 (-inf, or where is False) is 0, and counts
    nowhere else: it is the gradient that `log_softmax` has.
    """
    _check(input, indices=indices, where=where)
    dim = _one_dim(dim, input)
    one_each = indices.ndim == input.ndim - 1
    places = indices.unsqueeze(dim) if one_each else indices
    y: Tensor
    y, _ = _run(_TAKE, input, places, dim, _number("temperature", temperature), where)
    return y.squeeze(dim) if one_each else y


class OrthogonalGradient(torch.optim.Optimizer):
    """An optimizer that steps orthogonally to the weights.

    `softmaxlib.orthogonal_gradient` projects the gradient of every parameter in place, each by
    itself, then the wrapped optimizer steps; all else is the wrapped optimizer's.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Takes the step. Its parameters must be on the CPU, with dense floating gradients. Sharded
        ones (DTensor) are gathered, one at a time: all ranks must step.
    rescale : bool, default True
        Scale each projected gradient to the norm of the gradient.

    Examples
    --------
    >>> optimizer = OrthogonalGradient(torch.optim.AdamW(model.parameters()))
    >>> schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    """

    # GradScaler must unscale before step: its factor for a fused optimizer would end up here.
    _step_supports_amp_scaling = False

    def __init__(self, optimizer: torch.optim.Optimizer, *, rescale: bool = True) -> None:
        # Not Optimizer.__init__: groups, state and hooks are those of the wrapped one.
        self.optimizer = optimizer
        self.rescale = rescale

    def __getattr__(self, name: str) -> Any:
        """Return the wrapped optimizer's."""
        return getattr(self.__dict__["optimizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the wrapped optimizer's, but for methods, which schedulers wrap, and its own two."""
        if name in ("optimizer", "rescale") or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and copy need."""
        return {"optimizer": self.optimizer, "rescale": self.rescale}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo __getstate__."""
        self.__dict__.update(state)

    def __repr__(self) -> str:
        """Return the wrapped optimizer's, wrapped."""
        return f"OrthogonalGradient({self.optimizer!r}, rescale={self.rescale})"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project the gradients (those of every call of closure, if that is given) and step."""
        if closure is None:
            self._project()
            return self.optimizer.step()

        def projected() -> Any:
            loss = closure()
            self._project()
            return loss

        return self.optimizer.step(projected)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Call the wrapped optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return that of the wrapped optimizer."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Call the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Call the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def _project(self) -> None:
        for group in self.optimizer.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self._project_one(weights)

    def _project_one(self, weights: Tensor) -> None:
        name, grad = f"the gradient of a parameter of shape {tuple(weights.shape)}", weights.grad
        if hasattr(grad, "full_tensor"):  # a DTensor; its sums are over all shards
            from torch.distributed.tensor import Replicate

            everywhere = [Replicate()] * grad.device_mesh.ndim
            with torch.no_grad():
                whole = grad.redistribute(placements=everywhere)
                self._project_in_place(name, whole.to_local(), weights.full_tensor())
                weights.grad = whole.redistribute(placements=weights.placements)
            return
        if grad.is_neg():  # a view of memory with the other sign, such as z.conj().imag
            weights.grad = grad = grad.resolve_neg()
        self._project_in_place(name, grad, weights)

    def _project_in_place(self, name: str, grad: Tensor, weights: Tensor) -> None:
        if not grad.is_cpu:
            raise ValueError(f"{name} is on {grad.device}; softmaxlib computes on CPU tensors only")
        _check_floating(name, grad)
        array, weights = _array(name, grad), weights.detach().resolve_neg()
        sml.orthogonal_gradient(
            array, _array("the parameter", weights), rescale=self.rescale, out=array
        )
        torch.autograd.graph.increment_version(grad)


def _apply(
    function: str, input: Tensor, dim: Dim, temperature: float, where: Tensor | None
) -> Tensor:
    _check(input, where=where)
    y: Tensor = _run(
        _ACTIVATION, function, input, _dims(dim), _number("temperature", temperature), where
    )
    return y


# ---- what callers pass ---------------------------------------------------------------------------


def _check(input: Tensor, **others: Tensor | None) -> None:
    """Check input; of the others that they are tensors (_check_memory has the rest)."""
    _check_tensor("input", input)
    if not (input.is_cpu or input.is_meta):
        raise ValueError(f"input is on {input.device}; softmaxlib computes on CPU tensors only")
    _check_floating("input", input)
    for name, tensor in others.items():
        if tensor is not None:
            _check_tensor(name, tensor)
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for name, tensor in {"input": input, **others}.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{name}: forward-mode derivatives are not supported")


def _check_tensor(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        return
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    numpy = ""
    if isinstance(value, np.ndarray):
        numpy = ": torch.from_numpy shares its memory, and softmaxlib itself computes with arrays"
    raise TypeError(f"{name} is a {kind}; it must be a torch.Tensor{numpy}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; it must be float16, bfloat16, float32 or float64"
        )
    _check_dense(name, tensor)


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "torch.nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} has layout {layout}; it must be dense (torch.strided)")


def _check_memory(**tensors: Tensor | None) -> None:
    """Check in an operator that its tensors are dense and all where the first one is.

    The dispatcher does not: with one tensor on "meta" it takes all for shapes without memory.
    """
    (first_name, first), *_ = tensors.items()
    assert first is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        _check_dense(name, tensor)
        if tensor.device != first.device:
            raise RuntimeError(
                f"expected all tensors to be on the same device, but {first_name} is on "
                f"{first.device} and {name} on {tensor.device}"
            )


def _check_on_cpu(**tensors: Tensor | None) -> None:
    _check_memory(**tensors)
    (name, tensor), *_ = tensors.items()
    assert tensor is not None
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on {tensor.device}; softmaxlib computes on CPU tensors only")


def _dims(dim: Any) -> tuple[int, ...]:
    if type(dim) is int:  # nearly every call
        return (dim,)
    try:
        dims = list(dim)
    except TypeError:
        dims = [dim]
    return tuple([_integer("dim", d) for d in dims])


def _one_dim(dim: Any, input: Tensor) -> int:
    index = _integer("dim", dim)
    if not -input.ndim <= index < input.ndim:
        raise IndexError(f"dim is {index}; input has {input.ndim} dimensions")
    return index


def _integer(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} is {value!r}; it must be an int")


def _number(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, Tensor):  # torch would make it a number, without its gradient
        instead = ": else divide input by it" if name == "temperature" else ""
        raise TypeError(f"{name} is a Tensor; it must be a float{instead}")
    return as_number(name, value)


# ---- tensors and arrays --------------------------------------------------------------------------

# What __array_interface__ calls them; bfloat16 is read as int16 first.
_TYPES = {
    torch.bool: "|b1",
    torch.uint8: "|u1",
    torch.uint16: "<u2",
    torch.uint32: "<u4",
    torch.uint64: "<u8",
    torch.int8: "|i1",
    torch.int16: "<i2",
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.float16: "<f2",
    torch.bfloat16: "<i2",
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.complex64: "<c8",  # nothing takes them: softmaxlib's functions say so
    torch.complex128: "<c16",
}


class _Memory:
    """The memory of a tensor, for NumPy, which keeps this and with it the tensor alive.

    `Tensor.numpy` would forbid for ever that the tensor's storage is resized, as FSDP does.
    """

    def __init__(self, tensor: Tensor, interface: dict[str, Any]) -> None:
        self.tensor, self.__array_interface__ = tensor, interface


def _array(name: str, tensor: Tensor) -> NDArray[Any]:
    """Return the tensor's memory as an array."""
    typestr = _TYPES.get(tensor.dtype)
    if typestr is None:
        raise TypeError(f"{name} has dtype {tensor.dtype}, which softmaxlib cannot read")
    address, strides = tensor.data_ptr(), None
    if not address and tensor.numel():
        raise RuntimeError(
            f"{name} of shape {tuple(tensor.shape)} has no memory: its storage has size 0"
        )
    if not tensor.is_contiguous():
        size = tensor.element_size()
        strides = tuple([size * step for step in tensor.stride()])
    interface = {
        "version": 3,
        "data": (address, False),
        "typestr": typestr,
        "shape": tensor.shape,
        "strides": strides,
    }
    array = np.asarray(_Memory(tensor, interface))
    if tensor.dtype != torch.bfloat16:
        return array
    import ml_dtypes

    return array.view(ml_dtypes.bfloat16)


def _array_or_none(name: str, tensor: Tensor | None) -> NDArray[Any] | None:
    return None if tensor is None else _array(name, tensor)


def _empty_like(x: Tensor) -> Tensor:
    """Return torch.empty_like, if large in memory that softmaxlib keeps for the next result."""
    if x.nbytes < _LARGE or not x.is_contiguous():
        return torch.empty_like(x)
    memory = _core.with_kept_memory(x.nbytes, lambda: np.empty(x.nbytes, np.uint8))
    storage = torch.from_numpy(memory).untyped_storage()
    # Not a view, which could not be modified in place where it comes from an autograd.Function.
    return x.new_empty(0).set_(storage, 0, x.shape)


# ---- operators and autograd ----------------------------------------------------------------------
#
# A function is an operator for compilers, tracers, modes and subclasses of Tensor; an
# autograd.Function around it for torch.func, whose transforms operators do not take part in; and
# where nobody but autograd looks on, its kernel alone, without a dispatcher that takes longer than
# a small call. All three have the same setup_context, backward and vmap.

_are_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_keys = torch._C._dispatch_keys
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_plain_tensors = [torch.empty(0, device="cpu")]
with torch.inference_mode():
    _plain_tensors.append(torch.empty(0, device="cpu"))
# Those of dense tensors in CPU memory: not conjugate or negative, and not wrapped by a transform.
_PLAIN_KEYS = frozenset(_dispatch_keys(t).raw_repr() for t in _plain_tensors)


class _Ways(NamedTuple):
    """The ways to compute a function."""

    operator: Callable[..., Any]
    function: Any  # the autograd.Function; its forward is the operator
    kernel: Callable[..., Any]
    kernel_with_autograd: Callable[..., Any]


def _ways(function: Any, operator: Any, kernel: Callable[..., Any]) -> _Ways:
    function.forward = staticmethod(operator)
    plain = type(f"{function.__name__}Plain", (function,), {"forward": staticmethod(kernel)})
    # What Function.apply itself calls, once it has bound default arguments, which takes 30 us.
    return _Ways(operator, function, kernel, super(torch.autograd.Function, plain).apply)


def _run(ways: _Ways, *args: Any) -> Any:
    """Compute a function in the shortest way that everyone who looks on agrees with."""
    if torch.compiler.is_compiling():
        return ways.operator(*args)
    if _are_transforms_active():
        return ways.function.apply(*args)
    if _is_watched():
        return ways.operator(*args)
    needs_grad = False
    for value in args:
        if isinstance(value, Tensor):
            if not _is_plain(value):
                return ways.operator(*args)
            needs_grad = needs_grad or value.requires_grad
    if needs_grad and torch.is_grad_enabled():
        return ways.kernel_with_autograd(*args)
    return ways.kernel(*args)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN_TYPES and _dispatch_keys(tensor).raw_repr() in _PLAIN_KEYS


def _is_watched() -> bool:
    """Tell whether a mode, the tracer, the profiler or forward-mode autograd looks on."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def _mapped_first(size: int, tensor: Tensor, dim: int | None) -> Tensor:
    """Return the tensor with the dimension that vmap adds in front."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _mapped_mask(where: Tensor | None, dim: int | None, ndim: int) -> Any:
    """Return a mask that broadcasts against the ndim dimensions behind the one vmap adds."""
    if where is None or dim is None:
        return where
    where = where.movedim(dim, 0)
    return where[(slice(None), *[None] * (ndim + 1 - where.ndim))]


# ---- softmax and its relatives -------------------------------------------------------------------


class _Activation(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.function, x, ctx.dim, ctx.temperature, where = inputs
        needs_x = not ctx.function.endswith("softmax")
        ctx.save_for_backward(x if needs_x else None, output, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y, where = ctx.saved_tensors
        args = (ctx.function, grad, x, y, ctx.dim, ctx.temperature, where)
        return None, _run(_ACTIVATION_BACKWARD, *args), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        function, x, dim, temperature, where = args
        ndim = x.ndim - (in_dims[1] is not None)
        x = _mapped_first(info.batch_size, x, in_dims[1])
        where = _mapped_mask(where, in_dims[4], ndim)
        return _run(_ACTIVATION, function, x, _shifted(dim, ndim), temperature, where), 0


def _shifted(dim: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return the dimensions behind the one vmap adds; none of a scalar, which stands alone."""
    if ndim == 0:
        return ()
    for d in dim:
        if not -ndim <= d < ndim:
            raise IndexError(f"dim is {d}; input has {ndim} dimensions")
    return tuple(d % ndim + 1 for d in dim)


def _activate(
    function: str, input: Tensor, dim: Sequence[int], temperature: float, where: Tensor | None
) -> Tensor:
    reduces = function == "logsumexp"
    y = _reduced(input, dim) if reduces else _empty_like(input)
    getattr(sml, function)(
        _array("input", input),
        dim[0] if len(dim) == 1 else tuple(dim),  # the faster call
        temperature=temperature,
        where=_array_or_none("where", where),
        out=_array("y", y),
        **{"keepdims": True} if reduces else {},
    )
    return y


@torch.library.custom_op(
    "softmaxlib_torch::activation",
    mutates_args=(),
    schema="(str function, Tensor input, int[] dim, float temperature, Tensor? where) -> Tensor",
)
def _activation(
    function: str, input: Tensor, dim: Sequence[int], temperature: float, where: Tensor | None
) -> Tensor:
    _check_on_cpu(input=input, where=where)
    return _activate(function, input, dim, temperature, where)


@_activation.register_fake
def _(
    function: str, input: Tensor, dim: Sequence[int], temperature: float, where: Tensor | None
) -> Tensor:
    _check_memory(input=input, where=where)
    return _reduced(input, dim) if function == "logsumexp" else torch.empty_like(input)


def _reduced(x: Tensor, dim: Sequence[int]) -> Tensor:
    reduced = {d % max(x.ndim, 1) for d in dim}
    return x.new_empty([1 if d in reduced else n for d, n in enumerate(x.shape)])


_ACTIVATION = _ways(_Activation, _activation, _activate)
_activation.register_autograd(_Activation.backward, setup_context=_Activation.setup_context)


class _ActivationBackward(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.function, grad, x, y, ctx.dim, ctx.temperature, where = inputs
        ctx.save_for_backward(grad, x, y, where)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        grad, x, y, where = ctx.saved_tensors

        def backward(grad: Tensor, y: Tensor, x: Tensor | None = None) -> Tensor:
            return _plain_backward(ctx.function, grad, x, y, ctx.dim, ctx.temperature, where)

        arguments = (grad, y) if x is None else (grad, y, x)
        grad_grad, grad_y, *grad_x = torch.func.vjp(backward, *arguments)[1](grad_output)
        return None, grad_grad, grad_x[0] if grad_x else None, grad_y, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        function, grad, x, y, dim, temperature, where = args
        ndim = y.ndim - (in_dims[3] is not None)
        grad, x, y = (
            None if tensor is None else _mapped_first(info.batch_size, tensor, in_dim)
            for tensor, in_dim in zip((grad, x, y), in_dims[1:4], strict=True)
        )
        where = _mapped_mask(where, in_dims[6], ndim)
        dim = _shifted(dim, ndim)
        return _run(_ACTIVATION_BACKWARD, function, grad, x, y, dim, temperature, where), 0


def _activate_backward(
    function: str,
    grad: Tensor,
    input: Tensor | None,
    y: Tensor,
    dim: Sequence[int],
    temperature: float,
    where: Tensor | None,
) -> Tensor:
    result = _empty_like(y if input is None else input)
    tensors = (("grad", grad), ("input", input), ("y", y))
    getattr(sml, f"{function}_backward")(
        *(_array(name, tensor) for name, tensor in tensors if tensor is not None),
        tuple(dim),
        temperature=temperature,
        where=_array_or_none("where", where),
        out=_array("result", result),
    )
    return result


def _activate_backward_unchecked(
    function: str,
    grad: Tensor,
    input: Tensor | None,
    y: Tensor,
    dim: Sequence[int],
    temperature: float,
    where: Tensor | None,
) -> Tensor:
    """Do the same without its checks: the forward call has made them, and they take longer."""
    if where is not None or len(dim) != 1 or y.ndim == 0:
        return _activate_backward(function, grad, input, y, dim, temperature, where)
    x, axis = y if input is None else input, dim[0] % y.ndim
    result = _empty_like(x)
    incoming, outcome = _array("grad", grad), _array("y", y)
    if function == "logsumexp":
        incoming, outcome = incoming.squeeze(axis), outcome.squeeze(axis)
    _core.backward(
        _core.functions[function],
        incoming,
        _array("x", x),
        outcome,
        _array("result", result),
        _CODES[grad.dtype],
        _CODES[x.dtype],
        _CODES[y.dtype],
        _CODES[result.dtype],
        (axis,),
        temperature,
        None,
        None,
        _runtime.current_isa(),
        _runtime.get_num_threads(),
    )
    return result


@torch.library.custom_op(
    "softmaxlib_torch::activation_backward",
    mutates_args=(),
    schema="(str function, Tensor grad, Tensor? input, Tensor y, int[] dim, float temperature, "
    "Tensor? where) -> Tensor",
)
def _activation_backward(
    function: str,
    grad: Tensor,
    input: Tensor | None,
    y: Tensor,
    dim: Sequence[int],
    temperature: float,
    where: Tensor | None,
) -> Tensor:
    _check_on_cpu(y=y, input=input, grad=grad, where=where)
    return _activate_backward(function, grad, input, y, dim, temperature, where)


@_activation_backward.register_fake
def _(
    function: str,
    grad: Tensor,
    input: Tensor | None,
    y: Tensor,
    dim: Sequence[int],
    temperature: float,
    where: Tensor | None,
) -> Tensor:
    _check_memory(y=y, input=input, grad=grad, where=where)
    return torch.empty_like(y if input is None else input)


_ACTIVATION_BACKWARD = _ways(
    _ActivationBackward, _activation_backward, _activate_backward_unchecked
)
_activation_backward.register_autograd(
    _ActivationBackward.backward, setup_context=_ActivationBackward.setup_context
)


def _plain_backward(
    function: str,
    grad: Tensor,
    x: Any,  # None: for softmax and log_softmax
    y: Tensor,
    dim: Sequence[int],
    temperature: float,
    where: Tensor | None,
) -> Tensor:
    """Compute _activation_backward from what torch can differentiate: for second derivatives."""
    is_log = function.startswith("log_")
    absent = x == -torch.inf if function == "logsumexp" else y == (-torch.inf if is_log else 0)
    if where is not None:
        absent = absent | ~where
    if function == "logsumexp":
        return grad * (x / temperature - y).masked_fill(absent, -torch.inf).exp() / temperature
    grad = grad.masked_fill(absent, 0)
    p = (y.exp() if is_log else y).masked_fill(absent, 0)
    if is_log:
        d = grad - p * _sum(grad, dim)
    else:
        d = p * (grad - _sum(p * grad, dim))
    if x is not None:
        d = d / (1 + (x.masked_fill(absent, 0) / temperature).abs())
    return d / temperature


def _sum(x: Tensor, dim: Sequence[int]) -> Tensor:
    """Return the sum over the dimensions, kept; over none of them it is x, not the sum over all."""
    return x.sum(dim, keepdim=True) if dim else x


# ---- selected log-probabilities ------------------------------------------------------------------


class _Take(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, indices, ctx.dim, ctx.temperature, where = inputs
        ctx.set_materialize_grads(False)  # no zeros for the sums, which few differentiate
        ctx.save_for_backward(x, indices, *output, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_sums: Tensor | None) -> tuple[Any, ...]:
        x, indices, selected, sums, where = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(selected)
        # As log_softmax_backward has it: what comes in where a probability is 0 counts nowhere.
        grad = grad.masked_fill(selected == -torch.inf, 0)
        of_sums = -grad.sum(ctx.dim, keepdim=True)
        if grad_sums is not None:
            of_sums = of_sums + grad_sums
        args = ("logsumexp", of_sums, x, sums, (ctx.dim,), ctx.temperature, where)
        places = (indices.to(torch.int64) % x.shape[ctx.dim]).expand(grad.shape)
        grad_x = _run(_ACTIVATION_BACKWARD, *args)
        if ctx.temperature != 1:
            grad = grad / ctx.temperature
        grad_x = grad_x.scatter_add(ctx.dim, places, grad)
        undefined = sums.isinf()  # the log-probabilities are NaN
        if where is not None:
            undefined = undefined & where
        return grad_x.masked_fill(undefined, torch.nan), None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        x, indices, dim, temperature, where = args
        ndim = x.ndim - (in_dims[0] is not None)
        x = _mapped_first(info.batch_size, x, in_dims[0])
        indices = _mapped_first(info.batch_size, indices, in_dims[1])
        where = _mapped_mask(where, in_dims[4], ndim)
        return _run(_TAKE, x, indices, dim % ndim + 1, temperature, where), (0, 0)


def _take_selected(
    input: Tensor, indices: Tensor, dim: int, temperature: float, where: Tensor | None
) -> tuple[Tensor, Tensor]:
    selected, sums = _taken(input, indices, dim)
    _, found = sml.take_log_softmax(
        _array("input", input),
        _array("indices", indices),
        dim,
        return_logsumexp=True,
        temperature=temperature,
        where=_array_or_none("where", where),
        out=_array("selected", selected),
    )
    _array("sums", sums).squeeze(dim)[...] = found
    return selected, sums


@torch.library.custom_op(
    "softmaxlib_torch::take_log_softmax",
    mutates_args=(),
    schema="(Tensor input, Tensor indices, int dim, float temperature, Tensor? where) -> "
    "(Tensor selected, Tensor logsumexp)",
)
def _take(
    input: Tensor, indices: Tensor, dim: int, temperature: float, where: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_on_cpu(input=input, indices=indices, where=where)
    return _take_selected(input, indices, dim, temperature, where)


def _taken(x: Tensor, indices: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    k = indices.shape[dim] if indices.ndim == x.ndim else 1  # if neither, _take raises
    shape, reduced = list(x.shape), list(x.shape)
    shape[dim], reduced[dim] = k, 1
    return x.new_empty(shape), x.new_empty(reduced)


@_take.register_fake
def _(
    input: Tensor, indices: Tensor, dim: int, temperature: float, where: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_memory(input=input, indices=indices, where=where)
    return _taken(input, indices, dim)


_TAKE = _ways(_Take, _take, _take_selected)
_take.register_autograd(_Take.backward, setup_context=_Take.setup_context)


# ---- cross-entropy -------------------------------------------------------------------------------


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)  # no zeros for the gradient, and backward can tell
        ctx.save_for_backward(output[1])
        ctx.dim, ctx.with_grad = inputs[3], inputs[-1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, of_grad: Tensor | None) -> tuple[Any, ...]:
        # The gradient is an output as the loss is: who differentiates it arrives here.
        if of_grad is not None:
            raise RuntimeError(_ONCE)
        if upstream is None:
            return (None,) * 11
        if not ctx.with_grad:
            raise RuntimeError(_NO_GRADIENT)
        (grad,) = ctx.saved_tensors
        factor = upstream.unsqueeze(ctx.dim) if upstream.ndim else upstream
        return _scaled(grad, factor), *[None] * 10

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
        input, target, weight, dim, *options, where, with_grad = args
        ndim = input.ndim - (in_dims[0] is not None)
        dim %= ndim
        input = _mapped_first(info.batch_size, input, in_dims[0])
        target = _mapped_first(info.batch_size, target, in_dims[1])
        where = _mapped_mask(where, in_dims[9], ndim)
        reduction = options[3]
        if reduction == "none" and in_dims[2] is None:  # one call over the larger array
            result = _call_cross_entropy(
                input, target, weight, dim + 1, *options, where, with_grad=with_grad
            )
            return result, (0, 0 if result[1].ndim > 1 else None)
        if not info.batch_size:
            return (input.flatten(1).sum(1), input), (0, 0)
        each = [
            _call_cross_entropy(
                input[i],
                target[i],
                weight if in_dims[2] is None else weight.select(in_dims[2], i),
                dim,
                *options,
                where if in_dims[9] is None else where[i],
                with_grad=with_grad,
            )
            for i in range(info.batch_size)
        ]
        losses, grads = zip(*each, strict=True)
        return (torch.stack(losses), torch.stack(grads)), (0, 0)


def _call_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *options: Any,
    with_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Call it with the gradient where this input needs one: vmap hides that from its callers."""
    if torch.is_grad_enabled():
        for name, tensor in (("target", target), ("weight", weight)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{name} requires grad; cross_entropy has a gradient with respect to input "
                    f"only: pass {name}.detach()"
                )
        with_grad = with_grad or input.requires_grad
    result: tuple[Tensor, Tensor] = _run(_CROSS_ENTROPY, input, target, weight, *options, with_grad)
    return result


def _compute_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dim: int,
    activation: Any,
    label_smoothing: float,
    ignore_index: int,
    reduction: Any,
    temperature: float,
    where: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss = _losses(input, dim, reduction)
    grad = _empty_like(input) if with_grad else input.new_empty(0)
    sml.cross_entropy(
        _array("input", input),
        _array("target", target),
        axis=dim,
        activation=activation,
        label_smoothing=label_smoothing,
        weight=_array_or_none("weight", weight),
        ignore_index=ignore_index,
        reduction=reduction,
        temperature=temperature,
        where=_array_or_none("where", where),
        return_grad=with_grad,
        out=_array("loss", loss),
        grad_out=_array("grad", grad) if with_grad else None,
    )
    return loss, grad


@torch.library.custom_op(
    "softmaxlib_torch::cross_entropy",
    mutates_args=(),
    schema="(Tensor input, Tensor target, Tensor? weight, int dim, str activation, "
    "float label_smoothing, int ignore_index, str reduction, float temperature, Tensor? where, "
    "bool with_grad) -> (Tensor loss, Tensor grad)",
)
def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    _check_on_cpu(input=input, target=target, weight=weight, where=options[-2])
    return _compute_cross_entropy(input, target, weight, *options)


@_cross_entropy.register_fake
def _(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    dim, *_, reduction, _, where, with_grad = options
    _check_memory(input=input, target=target, weight=weight, where=where)
    loss = _losses(input, dim, reduction)
    return loss, torch.empty_like(input) if with_grad else input.new_empty(0)


def _losses(input: Tensor, dim: int, reduction: str) -> Tensor:
    kept = list(input.shape) if reduction == "none" else []
    if kept:
        del kept[dim]
    return input.new_empty(kept)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _CrossEntropy.setup_context(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])  # compilers differentiate all that they may


def _scale_gradient(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Any, ...]:
    grad, *nones = _CrossEntropy.backward(ctx, upstream, None)
    if grad is not None and torch.is_grad_enabled():  # create_graph=True
        grad = _Once.apply(grad.detach().requires_grad_())
    return grad, *nones


class _Once(torch.autograd.Function):
    """The identity, of a gradient that has no derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(_ONCE)


_ONCE = (
    "cross_entropy cannot be differentiated twice: use softmaxlib.torch.log_softmax or "
    "log_stablemax"
)
_NO_GRADIENT = (
    "cross_entropy was computed without its gradient: with_grad=False, or inside of torch.compile "
    "under vmap, which hides that input requires it"
)
_CROSS_ENTROPY = _ways(_CrossEntropy, _cross_entropy, _compute_cross_entropy)
_cross_entropy.register_autograd(_scale_gradient, setup_context=_save_gradient)

# Private to torch; without it nothing is done in place.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Return grad * factor; where the graph, and grad with it, is used up, in the place of grad."""
    in_place = _is_plain(grad) and _is_plain(factor) and not torch.is_grad_enabled()
    if not in_place or _graph_is_kept():
        return grad * factor
    grad = grad.detach()
    return grad if factor.ndim == 0 and factor.item() == 1 else grad.mul_(factor)
