"""softmaxlib for PyTorch: differentiable functions of CPU tensors, which share their memory.

Not imported by softmaxlib itself: ``import softmaxlib.torch``. docs/frameworks.md has more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

import softmaxlib as sml
from softmaxlib import _core

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
    y = _apply("logsumexp", input, dim, temperature, where)
    return y if keepdim else y.squeeze(dim if isinstance(dim, int) else tuple(dim))


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
        If target or weight requires grad, or where the result is differentiated twice.

    Notes
    -----
    The gradient comes from the sums of the loss, in the forward call, and is what is kept for the
    backward pass.
    """
    _check(input, temperature)
    if dim is None:
        dim = min(input.ndim - 1, 1)
    _check_dim(input, dim)
    needs_grad = torch.is_grad_enabled()
    for name, tensor in (("target", target), ("weight", weight)):
        if needs_grad and tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{name} requires grad; cross_entropy has a gradient with respect to input only: "
                f"pass {name}.detach()"
            )
    loss: Tensor
    loss, _ = _cross_entropy(
        input,
        target,
        weight,
        dim,
        activation,
        label_smoothing,
        ignore_index,
        reduction,
        temperature,
        where,
        needs_grad and input.requires_grad,
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
    """
    _check(input, temperature)
    _check_dim(input, dim)
    one_each = indices.ndim == input.ndim - 1
    y: Tensor
    y, _ = _take(input, indices.unsqueeze(dim) if one_each else indices, dim, temperature, where)
    return y.squeeze(dim) if one_each else y


class OrthogonalGradient(torch.optim.Optimizer):
    """An optimizer that steps orthogonally to the weights.

    `softmaxlib.orthogonal_gradient` projects the gradient of every parameter in place, each by
    itself, then the wrapped optimizer steps; all else is the wrapped optimizer's.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Takes the step. Its parameters must be on the CPU, with dense floating gradients.
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
                grad = weights.grad
                if grad is None:
                    continue
                _check(grad, name=f"the gradient of a parameter of shape {tuple(weights.shape)}")
                array = _array(grad)
                sml.orthogonal_gradient(array, _array(weights), rescale=self.rescale, out=array)
                torch.autograd.graph.increment_version(grad)


def _apply(
    function: str, input: Tensor, dim: Dim, temperature: float, where: Tensor | None
) -> Tensor:
    _check(input, temperature)
    dims = [dim] if isinstance(dim, int) else list(dim)
    y: Tensor = _activation(function, input, dims, temperature, where)
    return y


def _check(input: Tensor, temperature: float = 1.0, name: str = "input") -> None:
    if input.device.type not in ("cpu", "meta"):
        raise ValueError(f"{name} is on {input.device}; softmaxlib computes on CPU tensors only")
    if input.dtype not in _FLOATS:
        raise TypeError(
            f"{name} has dtype {input.dtype}; it must be float16, bfloat16, float32 or float64"
        )
    if input.layout != torch.strided:
        raise TypeError(f"{name} has layout {input.layout}; it must be dense (torch.strided)")
    if not torch.compiler.is_compiling() and unpack_dual(input).tangent is not None:
        raise NotImplementedError("forward-mode derivatives are not supported")
    if isinstance(temperature, Tensor):  # torch would make it a number, without its gradient
        raise TypeError("temperature is a Tensor; it must be a float: else divide input by it")


def _check_dim(input: Tensor, dim: int) -> None:
    if not -input.ndim <= dim < input.ndim:
        raise IndexError(f"dim is {dim}; input has {input.ndim} dimensions")


# ---- tensors and arrays --------------------------------------------------------------------------


def _array(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor's memory as an array."""
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype != torch.bfloat16:
        return np.asarray(tensor.numpy())
    import ml_dtypes

    return np.asarray(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)


def _array_or_none(tensor: Tensor | None) -> NDArray[Any] | None:
    return None if tensor is None else _array(tensor)


def _empty_like(x: Tensor) -> Tensor:
    """Return torch.empty_like, if large in memory that softmaxlib keeps for the next result."""
    if x.nbytes < _LARGE or not x.is_contiguous():
        return torch.empty_like(x)
    memory = _core.with_kept_memory(x.nbytes, lambda: np.empty(x.nbytes, np.uint8))
    return torch.from_numpy(memory).view(x.dtype).view(x.shape)


# ---- softmax and its relatives -------------------------------------------------------------------


@torch.library.custom_op(
    "softmaxlib_torch::activation",
    mutates_args=(),
    schema="(str function, Tensor x, int[] dim, float temperature, Tensor? where) -> Tensor",
)
def _activation(
    function: str, x: Tensor, dim: Sequence[int], temperature: float, where: Tensor | None
) -> Tensor:
    reduces = function == "logsumexp"
    y = _reduced(x, dim) if reduces else _empty_like(x)
    getattr(sml, function)(
        _array(x),
        dim[0] if len(dim) == 1 else tuple(dim),  # the faster call
        temperature=temperature,
        where=_array_or_none(where),
        out=_array(y),
        **{"keepdims": True} if reduces else {},
    )
    return y


@_activation.register_fake
def _(
    function: str, x: Tensor, dim: Sequence[int], temperature: float, where: Tensor | None
) -> Tensor:
    return _reduced(x, dim) if function == "logsumexp" else torch.empty_like(x)


def _reduced(x: Tensor, dim: Sequence[int]) -> Tensor:
    reduced = {d % max(x.ndim, 1) for d in dim}
    return x.new_empty([1 if d in reduced else n for d, n in enumerate(x.shape)])


@torch.library.custom_op(
    "softmaxlib_torch::activation_backward",
    mutates_args=(),
    schema="(str function, Tensor grad, Tensor? x, Tensor y, int[] dim, float temperature, "
    "Tensor? where) -> Tensor",
)
def _activation_backward(
    function: str,
    grad: Tensor,
    x: Tensor | None,
    y: Tensor,
    dim: Sequence[int],
    temperature: float,
    where: Tensor | None,
) -> Tensor:
    result = _empty_like(y if x is None else x)
    getattr(sml, f"{function}_backward")(
        *(_array(tensor) for tensor in (grad, x, y) if tensor is not None),
        tuple(dim),
        temperature=temperature,
        where=_array_or_none(where),
        out=_array(result),
    )
    return result


@_activation_backward.register_fake
def _(
    function: str,
    grad: Tensor,
    x: Tensor | None,
    y: Tensor,
    dim: Sequence[int],
    temperature: float,
    where: Tensor | None,
) -> Tensor:
    return torch.empty_like(y if x is None else x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.function, x, ctx.dim, ctx.temperature, where = inputs
    needs_x = not ctx.function.endswith("softmax")
    ctx.save_for_backward(x if needs_x else None, output, where)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y, where = ctx.saved_tensors
    grad_x = _activation_backward(ctx.function, grad, x, y, ctx.dim, ctx.temperature, where)
    return None, grad_x, None, None, None


_activation.register_autograd(_differentiate, setup_context=_save)


def _save_again(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.function, grad, x, y, ctx.dim, ctx.temperature, where = inputs
    ctx.save_for_backward(grad, x, y, where)


def _differentiate_again(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    grad, x, y, where = ctx.saved_tensors

    def backward(grad: Tensor, y: Tensor, x: Tensor | None = None) -> Tensor:
        return _plain_backward(ctx.function, grad, x, y, ctx.dim, ctx.temperature, where)

    arguments = (grad, y) if x is None else (grad, y, x)
    grad_grad, grad_y, *grad_x = torch.func.vjp(backward, *arguments)[1](grad_output)
    return None, grad_grad, grad_x[0] if grad_x else None, grad_y, None, None, None


_activation_backward.register_autograd(_differentiate_again, setup_context=_save_again)


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
        d = grad - p * grad.sum(dim, keepdim=True)
    else:
        d = p * (grad - (p * grad).sum(dim, keepdim=True))
    if x is not None:
        d = d / (1 + (x.masked_fill(absent, 0) / temperature).abs())
    return d / temperature


# ---- selected log-probabilities ------------------------------------------------------------------


@torch.library.custom_op(
    "softmaxlib_torch::take_log_softmax",
    mutates_args=(),
    schema="(Tensor x, Tensor indices, int dim, float temperature, Tensor? where) -> "
    "(Tensor selected, Tensor logsumexp)",
)
def _take(
    x: Tensor, indices: Tensor, dim: int, temperature: float, where: Tensor | None
) -> tuple[Tensor, Tensor]:
    selected, sums = _taken(x, indices, dim)
    _, found = sml.take_log_softmax(
        _array(x),
        _array(indices),
        dim,
        return_logsumexp=True,
        temperature=temperature,
        where=_array_or_none(where),
        out=_array(selected),
    )
    _array(sums).squeeze(dim)[...] = found
    return selected, sums


def _taken(x: Tensor, indices: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    k = indices.shape[dim] if indices.ndim == x.ndim else 1  # if neither, _take raises
    shape, reduced = list(x.shape), list(x.shape)
    shape[dim], reduced[dim] = k, 1
    return x.new_empty(shape), x.new_empty(reduced)


@_take.register_fake
def _(
    x: Tensor, indices: Tensor, dim: int, temperature: float, where: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _taken(x, indices, dim)


def _save_taken(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, indices, ctx.dim, ctx.temperature, where = inputs
    ctx.save_for_backward(x, indices, output[1], where)


def _scatter(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple[Any, ...]:
    x, indices, sums, where = ctx.saved_tensors
    of_sums = grad_sums - grad.sum(ctx.dim, keepdim=True)
    grad_x = _activation_backward("logsumexp", of_sums, x, sums, [ctx.dim], ctx.temperature, where)
    places = (indices % x.shape[ctx.dim]).to(torch.int64).expand(grad.shape)
    grad_x = grad_x.scatter_add(ctx.dim, places, grad / ctx.temperature)
    return grad_x, None, None, None, None


_take.register_autograd(_scatter, setup_context=_save_taken)


# ---- cross-entropy -------------------------------------------------------------------------------

_CROSS_ENTROPY = (
    "(Tensor input, Tensor target, Tensor? weight, int dim, str activation, float label_smoothing, "
    "int ignore_index, str reduction, float temperature, Tensor? where, bool with_grad)"
)


@torch.library.custom_op(
    "softmaxlib_torch::cross_entropy",
    mutates_args=(),
    schema=f"{_CROSS_ENTROPY} -> (Tensor loss, Tensor grad)",
)
def _cross_entropy(
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
        _array(input),
        _array(target),
        axis=dim,
        activation=activation,
        label_smoothing=label_smoothing,
        weight=_array_or_none(weight),
        ignore_index=ignore_index,
        reduction=reduction,
        temperature=temperature,
        where=_array_or_none(where),
        return_grad=with_grad,
        out=_array(loss),
        grad_out=_array(grad) if with_grad else None,
    )
    return loss, grad


def _losses(input: Tensor, dim: int, reduction: str) -> Tensor:
    kept = list(input.shape) if reduction == "none" else []
    if kept:
        del kept[dim]
    return input.new_empty(kept)


@_cross_entropy.register_fake
def _(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dim: int,
    activation: str,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    temperature: float,
    where: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss = _losses(input, dim, reduction)
    return loss, torch.empty_like(input) if with_grad else input.new_empty(0)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for it
    ctx.save_for_backward(output[1])
    ctx.dim, ctx.with_grad = inputs[3], inputs[-1]


def _scale_gradient(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 11
    if not ctx.with_grad:
        raise RuntimeError("cross_entropy was called with_grad=False: it has no gradient")
    (grad,) = ctx.saved_tensors
    result = _scaled(grad, upstream.unsqueeze(ctx.dim) if upstream.ndim else upstream)
    if torch.is_grad_enabled():  # create_graph=True
        result = _Once.apply(result.detach().requires_grad_())
    return result, *[None] * 10


class _Once(torch.autograd.Function):
    """The identity, of a gradient that has no derivative."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(
            "cross_entropy cannot be differentiated twice: use softmaxlib.torch.log_softmax or "
            "log_stablemax"
        )


_cross_entropy.register_autograd(_scale_gradient, setup_context=_save_gradient)

# Private to torch; without it nothing is done in place.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Return grad * factor; where the graph, and grad with it, is used up, in the place of grad."""
    if type(grad) is not Tensor or _graph_is_kept():  # compilers have tensors of their own types
        return grad * factor
    return grad if factor.ndim == 0 and factor == 1 else grad.mul_(factor)
