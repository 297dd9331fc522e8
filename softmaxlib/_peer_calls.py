"""softmax and log_softmax of other libraries, called as their users call them.

What a library needs once (a session, a compiled model, a tensor that shares the array's memory) is
made before; what a call allocates for its result is part of the call.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

import softmaxlib

Function = Literal["softmax", "log_softmax"]
Array: TypeAlias = npt.NDArray[Any]
Call = Callable[[], Any]
AsArray = Callable[[Any], Array]
Prepare = Callable[[Array, int], tuple[Call, AsArray]]  # of an array and its axis


@dataclass(frozen=True)
class Library:
    packages: tuple[str, ...]  # the first names the version
    load: Callable[[Function, int], Prepare]  # of the number of threads

    def missing(self) -> list[str]:
        """Name the packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def version(self) -> str | None:
        """Return the version, None where a package is not installed."""
        return None if self.missing() else importlib.metadata.version(self.packages[0])


def _of_arrays(call: Callable[[Array, int], Any]) -> Prepare:
    """Make calls of a function that takes an array and returns one."""
    return lambda x, axis: (lambda: call(x, axis), np.asarray)


def _softmaxlib(function: Function, threads: int) -> Prepare:
    return _of_arrays(getattr(softmaxlib, function))


def _torch(function: Function, threads: int) -> Prepare:
    torch: Any = import_module("torch")
    torch.set_num_threads(threads)
    call = getattr(torch, function)

    def prepare(x: Array, axis: int) -> tuple[Call, AsArray]:
        if x.dtype.name != "bfloat16":
            tensor = torch.from_numpy(x)
            return lambda: call(tensor, axis), lambda y: np.asarray(y.numpy())
        tensor = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return lambda: call(tensor, axis), lambda y: y.view(torch.int16).numpy().view(x.dtype)

    return prepare


def _onnxruntime(function: Function, threads: int) -> Prepare:
    onnx: Any = import_module("onnx")
    onnxruntime: Any = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised as well
    operator = {"softmax": "Softmax", "log_softmax": "LogSoftmax"}[function]
    names = {"float32": "FLOAT", "float64": "DOUBLE", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}

    def prepare(x: Array, axis: int) -> tuple[Call, AsArray]:
        kind = getattr(onnx.TensorProto, names[x.dtype.name])
        dims = [f"n{i}" for i in range(x.ndim)]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(operator, ["x"], ["y"], axis=axis)],
            function,
            [onnx.helper.make_tensor_value_info("x", kind, dims)],
            [onnx.helper.make_tensor_value_info("y", kind, dims)],
        )
        opset = [onnx.helper.make_opsetid("", 13)]
        model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return lambda: session.run(None, {"x": x})[0], np.asarray

    return prepare


def _openvino(function: Function, threads: int) -> Prepare:
    openvino: Any = import_module("openvino")
    operators: Any = import_module("openvino.opset13")
    core = openvino.Core()
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # all are confined to the same CPUs
        "INFERENCE_PRECISION_HINT": "f32",  # not bfloat16 for float32, the default of some CPUs
    }
    names = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}

    def prepare(x: Array, axis: int) -> tuple[Call, AsArray]:
        kind = getattr(openvino.Type, names[x.dtype.name])
        parameter = operators.parameter(list(x.shape), kind)
        result = getattr(operators, function)(parameter, axis=axis)
        compiled = core.compile_model(openvino.Model([result], [parameter]), "CPU", config)
        if x.dtype.name != "bfloat16":
            return lambda: compiled(x)[0], np.asarray
        tensor = openvino.Tensor(x.view(np.uint16), list(x.shape), kind)
        return lambda: compiled(tensor)[0], lambda y: np.asarray(y).view(x.dtype)

    return prepare


def _jax(function: Function, threads: int) -> Prepare:
    jax: Any = import_module("jax")
    jax.config.update("jax_enable_x64", True)  # else float64 becomes float32
    cpu = jax.devices("cpu")[0]
    call = getattr(jax.nn, function)

    def prepare(x: Array, axis: int) -> tuple[Call, AsArray]:
        array = jax.device_put(x, cpu)
        compiled = jax.jit(functools.partial(call, axis=axis))
        return lambda: compiled(array).block_until_ready(), np.asarray

    return prepare


def _scipy(function: Function, threads: int) -> Prepare:
    return _of_arrays(getattr(import_module("scipy.special"), function))


def _numpy(function: Function, threads: int) -> Prepare:
    def softmax(x: Array, axis: int) -> Array:
        e = np.exp(x - x.max(axis, keepdims=True))
        return np.asarray(e / e.sum(axis, keepdims=True))

    def log_softmax(x: Array, axis: int) -> Array:
        shifted = x - x.max(axis, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis, keepdims=True)))

    return _of_arrays(softmax if function == "softmax" else log_softmax)


def _numexpr(function: Function, threads: int) -> Prepare:
    numexpr: Any = import_module("numexpr")
    numexpr.set_num_threads(threads)

    def softmax(x: Array, axis: int) -> Array:
        e = numexpr.evaluate("exp(x - m)", {"x": x, "m": x.max(axis, keepdims=True)})
        return np.asarray(numexpr.evaluate("e / s", {"e": e, "s": e.sum(axis, keepdims=True)}))

    def log_softmax(x: Array, axis: int) -> Array:
        m = x.max(axis, keepdims=True)
        s = numexpr.evaluate("exp(x - m)", {"x": x, "m": m}).sum(axis, keepdims=True)
        return np.asarray(numexpr.evaluate("x - m - log(s)", {"x": x, "m": m, "s": s}))

    return _of_arrays(softmax if function == "softmax" else log_softmax)


OURS = "softmaxlib"
LIBRARIES = {
    OURS: Library(("softmaxlib",), _softmaxlib),
    "torch": Library(("torch",), _torch),
    "onnxruntime": Library(("onnxruntime", "onnx"), _onnxruntime),
    "openvino": Library(("openvino",), _openvino),
    "jax": Library(("jax",), _jax),
    "scipy": Library(("scipy",), _scipy),
    "numpy": Library(("numpy",), _numpy),
    "numexpr": Library(("numexpr",), _numexpr),
}
