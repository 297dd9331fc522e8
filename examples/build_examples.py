"""Build the examples in C and C++ with CMake, against an installed softmaxlib.

    python examples/build_examples.py           # c, pytorch and jax_ffi into build/examples
    python examples/build_examples.py pytorch

CMake looks for softmaxlib in this Python's package; CMAKE_PREFIX_PATH=PREFIX in the environment
names another place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("c", "pytorch", "jax_ffi")


def build(name: str, directory: Path) -> Path:
    """Build one example below a directory, and return where."""
    work = directory / name
    configure = ["cmake", "-S", HERE / name, "-B", work, f"-DPython_EXECUTABLE={sys.executable}"]
    if "CMAKE_PREFIX_PATH" not in os.environ:
        package = [sys.executable, "-m", "softmaxlib", "--cmake-dir"]
        found = subprocess.run(package, check=True, capture_output=True, text=True)
        configure.append(f"-Dsoftmaxlib_DIR={found.stdout.strip()}")
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", work], check=True)
    return work


def library(work: Path) -> Path:
    """Return the module that an example of a runtime was built as."""
    (path,) = work.glob("libsoftmaxlib_*.so")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build examples into build/examples.")
    parser.add_argument("names", nargs="*", default=NAMES, metavar="name", help="default: all")
    for name in parser.parse_args().names:
        build(name, HERE.parent / "build" / "examples")
