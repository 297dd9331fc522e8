"""Where the C interface is: header, libraries and CMake files that the package carries."""

from __future__ import annotations

import shlex
from pathlib import Path

from softmaxlib import _core

# Beside the compiled module: in an editable install the Python sources are elsewhere.
_ROOT = Path(_core.__file__).resolve().parent
# Not the name that it has elsewhere: no other library in a process is taken for this one.
LIBRARY = "softmaxlib_python"


def get_include() -> str:
    """Return the directory of the C header, for ``#include <softmaxlib/softmaxlib.h>``.

    Returns
    -------
    str
        What a compiler's ``-I`` takes.
    """
    return str(_ROOT / "include")


def get_library_dir() -> str:
    """Return the directory of the shared C library, libsoftmaxlib_python.so.

    Returns
    -------
    str
        What a compiler's ``-L`` takes.
    """
    return str(_ROOT / "lib")


def get_cmake_dir() -> str:
    """Return the directory of the files for CMake's ``find_package(softmaxlib)``.

    Returns
    -------
    str
        What CMake's ``-Dsoftmaxlib_DIR=`` takes.
    """
    return str(_ROOT / "lib" / "cmake" / "softmaxlib")


def get_pkgconfig_dir() -> str:
    """Return the directory of softmaxlib.pc."""
    return str(_ROOT / "lib" / "pkgconfig")


def compiler_flags() -> str:
    """Return what a C or C++ compiler needs to find the header."""
    return shlex.quote(f"-I{get_include()}")


def linker_flags() -> str:
    """Return what links the shared library, and has it found at run time."""
    directory = get_library_dir()
    return shlex.join([f"-L{directory}", f"-Wl,-rpath,{directory}", f"-l{LIBRARY}"])
