"""How softmaxlib.jax comes by its custom calls, and what it does without."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

needs_jax = pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="jax is not installed")
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")

SOFTMAX = """
import warnings
import softmaxlib.jax as smj
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(smj.backend(), smj.softmax([0.0, 0.0]), smj.log_softmax([0.0, 0.0])[0])
print(*(warning.message for warning in caught))
"""


def start(code, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("CXX", "SOFTMAXLIB_JAX")}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code, **environment):
    process = start(code, **environment)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def test_without_jax():
    """A module that is None in sys.modules cannot be imported."""
    status, _, errors = run("import sys; sys.modules['jax'] = None; import softmaxlib.jax")
    assert status == 1
    assert "ImportError: softmaxlib.jax needs jax: pip install 'softmaxlib[jax]'" in errors


@needs_jax
@needs_compiler
def test_processes_that_build_at_once(tmp_path):
    processes = [start(SOFTMAX, XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert output == "ffi [0.5 0.5] -0.6931472\n\n", errors
    (library,) = (tmp_path / "softmaxlib").iterdir()
    before = library.stat().st_mtime_ns
    assert run(SOFTMAX, XDG_CACHE_HOME=str(tmp_path), CXX="no-such-compiler")[1].startswith("ffi")
    assert library.stat().st_mtime_ns == before


@needs_jax
def test_fallback(tmp_path):
    """One warning, which says why, and the same results."""
    cache = tmp_path / "file"
    cache.touch()
    for environment, reason in (
        ({"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}, "no-such-compiler"),
        ({"CXX": "false", "XDG_CACHE_HOME": str(tmp_path)}, "exit status 1"),
        ({"XDG_CACHE_HOME": str(cache)}, "Not a directory"),
    ):
        status, output, errors = run(SOFTMAX, **environment)
        assert status == 0, errors
        result, warning = output.split("\n", 1)
        assert result == "callback [0.5 0.5] -0.6931472"
        assert warning.startswith("softmaxlib.jax runs through jax.pure_callback")
        assert warning.count("pure_callback") == 1 and reason in warning
        status, _, errors = run(SOFTMAX, **environment, SOFTMAXLIB_JAX="ffi")
        assert status == 1 and "RuntimeError: SOFTMAXLIB_JAX=ffi, but" in errors
        assert reason in errors


@needs_jax
def test_environment_variable():
    assert run(SOFTMAX, SOFTMAXLIB_JAX="callback")[1] == "callback [0.5 0.5] -0.6931472\n\n"
    status, _, errors = run(SOFTMAX, SOFTMAXLIB_JAX="fast")
    assert status == 1
    assert 'ValueError: SOFTMAXLIB_JAX must be "ffi" or "callback", got \'fast\'' in errors
