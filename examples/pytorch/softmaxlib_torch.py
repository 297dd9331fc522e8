"""torch.ops.softmaxlib: softmax and log_softmax, for eager mode, autograd and torch.compile."""

from pathlib import Path

import torch


def load(library: Path) -> None:
    """Load the operators, and register what torch wants to know about them."""
    torch.ops.load_library(library)
    for name in ("softmax", "log_softmax"):
        torch.library.register_fake(f"softmaxlib::{name}", lambda x, dim: torch.empty_like(x))
    torch.library.register_autograd(
        "softmaxlib::softmax", _softmax_backward, setup_context=_keep_result
    )
    torch.library.register_autograd(
        "softmaxlib::log_softmax", _log_softmax_backward, setup_context=_keep_result
    )


def _keep_result(ctx, inputs, output):
    ctx.dim = inputs[1]
    ctx.save_for_backward(output)


def _softmax_backward(ctx, grad):
    (y,) = ctx.saved_tensors
    return y * (grad - (y * grad).sum(ctx.dim, keepdim=True)), None


def _log_softmax_backward(ctx, grad):
    (y,) = ctx.saved_tensors
    return grad - y.exp() * grad.sum(ctx.dim, keepdim=True), None
