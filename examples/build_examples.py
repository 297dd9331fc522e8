"""Build the examples in C and C++ with CMake, against the softmaxlib package of this Python.

    python examples/build_examples.py           # c, pytorch and jax_ffi into build/examples
    python examples/build_examples.py pytorch

Needs CMake and a compiler, and for the last two their runtimes.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import softmaxlib
except ModuleNotFoundError as error:
    raise SystemExit(
        f"build_examples.py needs {error.name}: in the clone, `pip install -e .`"
    ) from None

HERE = Path(__file__).resolve().parent
RUNTIMES = {"c": None, "pytorch": "torch", "jax_ffi": "jax"}


def build(name: str, directory: Path) -> Path:
    """Build one example below a directory, and return where."""
    work = directory / name
    found = (
        f"-Dsoftmaxlib_DIR={softmaxlib.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    )
    subprocess.run(
        ["cmake", "--no-warn-unused-cli", "-S", HERE / name, "-B", work, *found], check=True
    )
    subprocess.run(["cmake", "--build", work], check=True)
    return work


def library(work: Path) -> Path:
    """Return the module that an example of a runtime was built as."""
    (path,) = work.glob("libsoftmaxlib_*.so")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build examples into build/examples.")
    parser.add_argument("names", nargs="*", default=RUNTIMES, metavar="name", help="default: all")
    names = parser.parse_args().names
    if shutil.which("cmake") is None:
        sys.exit("build_examples.py needs cmake: `pip install cmake`")
    for name in names:
        runtime = RUNTIMES.get(name)
        if runtime and importlib.util.find_spec(runtime) is None:
            sys.exit(f"the example {name} needs {runtime}: `pip install {runtime}`")
    for name in names:
        build(name, HERE.parent / "build" / "examples")
