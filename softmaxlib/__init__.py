"""Softmax and its relatives on CPUs: fast, accurate, the same bits on every ISA."""

try:
    from softmaxlib import _core
except ImportError as error:
    if error.name != __name__:  # the compiled module is there, and has said what it lacks
        raise
    from pathlib import Path

    folder = Path(__file__).parent
    raise ImportError(
        f"{folder} has the sources of softmaxlib but not its compiled module: run `pip install -e "
        f"{folder.parent}` or, where softmaxlib is installed, start Python in another folder"
    ) from None
from softmaxlib._api import log_softmax, log_stablemax, logsumexp, softmax, stablemax
from softmaxlib._embedding import get_cmake_dir, get_include, get_library_dir
from softmaxlib._explain import Explanation, explain
from softmaxlib._gradients import (
    log_softmax_backward,
    log_stablemax_backward,
    logsumexp_backward,
    softmax_backward,
    stablemax_backward,
)
from softmaxlib._losses import cross_entropy, take_log_softmax
from softmaxlib._orthogonal import orthogonal_gradient
from softmaxlib._runtime import (
    available_isas,
    get_num_threads,
    info,
    last_kernel,
    set_num_threads,
    threads,
    use_isa,
)
from softmaxlib._sampling import sample, topk_softmax

__version__: str = _core.version()

__all__ = [
    "Explanation",
    "available_isas",
    "cross_entropy",
    "explain",
    "get_cmake_dir",
    "get_include",
    "get_library_dir",
    "get_num_threads",
    "info",
    "last_kernel",
    "log_softmax",
    "log_softmax_backward",
    "log_stablemax",
    "log_stablemax_backward",
    "logsumexp",
    "logsumexp_backward",
    "orthogonal_gradient",
    "sample",
    "set_num_threads",
    "softmax",
    "softmax_backward",
    "stablemax",
    "stablemax_backward",
    "take_log_softmax",
    "threads",
    "topk_softmax",
    "use_isa",
]
