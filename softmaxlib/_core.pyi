"""The compiled module: csrc/python/module.cpp."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

from numpy.typing import NDArray

functions: dict[str, int]
algorithms: dict[str, int]
isas: dict[str, int]
stores: dict[str, int]
reductions: dict[str, int]
rooflines: dict[str, int]
passes: dict[str, int]
dtypes: dict[str, int]

class Known:
    isa: int
    process_threads: int
    default_threads: int
    bfloat16: int

known: Known

_Evaluate = TypeVar("_Evaluate", bound=Callable[..., Any])

def with_plain_calls(
    evaluate: _Evaluate, chosen_isa: ContextVar[int], chosen_threads: ContextVar[int]
) -> _Evaluate: ...
def with_plain_gradients(
    evaluate: _Evaluate, chosen_isa: ContextVar[int], chosen_threads: ContextVar[int]
) -> _Evaluate: ...
def with_plain_losses(
    evaluate: _Evaluate, chosen_isa: ContextVar[int], chosen_threads: ContextVar[int]
) -> _Evaluate: ...
def run(
    function: int,
    x: NDArray[Any],
    out: NDArray[Any],
    x_dtype: int,
    out_dtype: int,
    axes: tuple[int, ...],
    temperature: float,
    temperatures: NDArray[Any] | None,
    bias: NDArray[Any] | None,
    bias_dtype: int,
    where: NDArray[Any] | None,
    algorithm: int,
    isa: int,
    store: int,
    num_threads: int,
) -> None: ...
def backward(
    function: int,
    grad: NDArray[Any],
    x: NDArray[Any],
    y: NDArray[Any],
    out: NDArray[Any],
    grad_dtype: int,
    x_dtype: int,
    y_dtype: int,
    out_dtype: int,
    axes: tuple[int, ...],
    temperature: float,
    temperatures: NDArray[Any] | None,
    where: NDArray[Any] | None,
    isa: int,
    num_threads: int,
) -> None: ...
def orthogonal_gradient(
    grad: NDArray[Any],
    weights: NDArray[Any],
    out: NDArray[Any],
    grad_dtype: int,
    weights_dtype: int,
    out_dtype: int,
    rescale: bool,
    isa: int,
    num_threads: int,
) -> None: ...
def sample(
    x: NDArray[Any],
    uniforms: NDArray[Any],
    indices: NDArray[Any],
    x_dtype: int,
    axis: int,
    temperature: float,
    temperatures: NDArray[Any] | None,
    top_k: int,
    top_p: float,
    min_p: float,
    isa: int,
    num_threads: int,
) -> None: ...
def topk_softmax(
    x: NDArray[Any],
    weights: NDArray[Any],
    indices: NDArray[Any],
    x_dtype: int,
    dtype: int,
    axis: int,
    renormalize: bool,
    temperature: float,
    temperatures: NDArray[Any] | None,
    isa: int,
    num_threads: int,
) -> None: ...
def cross_entropy(
    activation: int,
    x: NDArray[Any],
    target: NDArray[Any],
    losses: NDArray[Any],
    total: NDArray[Any] | None,
    grad: NDArray[Any] | None,
    x_dtype: int,
    target_dtype: int,
    dtype: int,
    axis: int,
    label_smoothing: float,
    reduction: int,
    weight: NDArray[Any] | None,
    ignore_index: int,
    temperature: float,
    temperatures: NDArray[Any] | None,
    where: NDArray[Any] | None,
    isa: int,
    num_threads: int,
) -> None: ...
def convert(x: NDArray[Any], out: NDArray[Any], x_dtype: int, out_dtype: int) -> None: ...
def take_log_softmax(
    x: NDArray[Any],
    indices: NDArray[Any],
    out: NDArray[Any],
    logsumexp: NDArray[Any] | None,
    x_dtype: int,
    dtype: int,
    axis: int,
    temperature: float,
    temperatures: NDArray[Any] | None,
    where: NDArray[Any] | None,
    isa: int,
    num_threads: int,
) -> None: ...
def with_kept_memory(nbytes: int, make: Callable[[], NDArray[Any]]) -> NDArray[Any]: ...
def last_report() -> tuple[int, int, int, int, str]: ...  # isa, algorithm, store, tasks, kernel
def explain(
    function: int,
    x_dtype: int,
    out_dtype: int,
    shape: Sequence[int],
    out_shape: Sequence[int],
    strides: Sequence[int],
    axes: Sequence[int],
    in_place: bool,
    algorithm: int,
    isa: int,
    num_threads: int,
) -> dict[str, Any]: ...
def time_run(
    function: int,
    x: NDArray[Any],
    out: NDArray[Any],
    dtype: int,
    algorithm: int,
    isa: int,
    store: int,
    num_threads: int,
    repeats: int,
    axis: int = -1,
) -> float: ...
def time_pass(
    pass_: int, isa: int, x: NDArray[Any], out: NDArray[Any], streaming: bool, repeats: int
) -> float: ...
def time_roofline(
    kind: int, isa: int, x: NDArray[Any], out: NDArray[Any], repeats: int
) -> float: ...
def exp_sweep(isa: int, accurate: bool, first: int, count: int) -> tuple[float, int, int]: ...
def isas_compiled() -> tuple[str, ...]: ...
def isas_available() -> tuple[str, ...]: ...
def cache_sizes() -> tuple[int, int, int]: ...
def version() -> str: ...
def compiler() -> str: ...
def bfloat16_from_dlpack(producer: object) -> NDArray[Any]: ...
