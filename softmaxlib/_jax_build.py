"""The custom calls of XLA: compiled at first use, kept where nobody else can put others."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib

from softmaxlib import _core
from softmaxlib._embedding import LIBRARY, get_include, get_library_dir

_SOURCE = Path(__file__).with_name("_jax_ffi.cpp")
# XLA's header names members after their types, which g++ only permits.
_OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fpermissive", "-w")
_SECONDS = 300  # for the compiler
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_DIGEST = hashlib.sha256().digest_size


def load() -> ctypes.CDLL:
    """Return the compiled custom calls, from the user's cache if they are there, whole and load."""
    # Found by its name when the next is loaded, which therefore keeps no path of an installation.
    ctypes.CDLL(str(Path(get_library_dir(), f"lib{LIBRARY}.so")))
    header = Path(get_include(), "softmaxlib", "softmaxlib.h")
    versions = (LIBRARY, _core.version(), jaxlib.__version__, platform.machine(), *_OPTIONS)
    key = hashlib.sha256(_SOURCE.read_bytes() + header.read_bytes() + repr(versions).encode())
    library = _cache() / f"jax-{jaxlib.__version__}-{key.hexdigest()[:20]}.so"
    kept = _kept(library, key.digest())
    if kept is not None:
        return kept
    _build(library, key.digest())
    return ctypes.CDLL(str(library))


def _cache() -> Path:
    """Return a directory that is the user's alone, and below no other that someone can exchange."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not home.is_absolute():  # the XDG specification: to be ignored
        home = Path.home() / ".cache"
    cache = Path(home, "softmaxlib").resolve()
    parents = list(cache.parents)
    for directory in (*reversed(parents), cache):
        directory.mkdir(mode=0o700, exist_ok=True)
    _check_owner(cache, cache.stat())
    for parent in parents:
        _check_owner(parent, parent.stat(), (os.getuid(), 0), stat.S_ISVTX)
    return cache


def _check_owner(
    path: Path, status: os.stat_result, owners: tuple[int, ...] = (), pardons: int = 0
) -> None:
    """Raise PermissionError if another user could have put something here for us to load."""
    owners = owners or (os.getuid(),)
    if status.st_uid not in owners:
        raise PermissionError(
            f"{path} belongs to user {status.st_uid}, not to {owners[0]}, who runs this: set "
            "XDG_CACHE_HOME to a directory of your own"
        )
    if status.st_mode & _OTHERS_WRITE and not status.st_mode & pardons:
        raise PermissionError(
            f"{path} has mode {stat.S_IMODE(status.st_mode):o}, so that others can write to it: "
            f"chmod go-w {shlex.quote(str(path))}, if you know its contents to be yours"
        )


def _kept(library: Path, key: bytes) -> ctypes.CDLL | None:
    """Return the library, or None if it is to be built.

    A digest follows it in its file, since loading one that is cut off ends in SIGBUS.
    """
    try:
        descriptor = os.open(library, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        _check_owner(library, os.fstat(descriptor))
        content = file.read()
    if _digest(key, content[:-_DIGEST]) != content[-_DIGEST:]:
        return None
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # built on another machine that shares this directory, say
        return None


def _digest(key: bytes, content: bytes) -> bytes:
    return hashlib.sha256(key + content).digest()


def _build(library: Path, key: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as directory:
        compiled, signed = Path(directory, "compiled.so"), Path(directory, "signed.so")
        subprocess.run(
            [
                *(shlex.split(os.environ.get("CXX", "")) or ["c++"]),
                *_OPTIONS,
                f"-isystem{jax.ffi.include_dir()}",
                f"-I{get_include()}",
                *("-o", str(compiled), str(_SOURCE), f"-L{get_library_dir()}", f"-l{LIBRARY}"),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        content = compiled.read_bytes()
        with open(os.open(signed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content + _digest(key, content))
            file.flush()
            os.fsync(file.fileno())
        signed.replace(library)  # whole or not at all, for other processes and after a crash
