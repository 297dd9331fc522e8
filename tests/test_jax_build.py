"""How softmaxlib.jax comes by its custom calls, and what it does without."""

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

needs_jax = pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="jax is not installed")
needs_callbacks = pytest.mark.skipif(
    not importlib.util.find_spec("jax")
    or not importlib.util.find_spec("jax.experimental.buffer_callback"),
    reason="jax < 0.6.1 has no callbacks that softmaxlib.jax can use",
)
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")

SOFTMAX = """
import warnings
import softmaxlib.jax as smj
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(smj.backend(), smj.softmax([0.0, 0.0]), smj.log_softmax([0.0, 0.0])[0])
print(*(warning.message for warning in caught))
"""
FFI = "ffi [0.5 0.5] -0.6931472\n\n"  # what that prints with the custom calls
NOBODY = 65534


def start(code, command=(sys.executable,), **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("CXX", "SOFTMAXLIB_JAX")}
    return subprocess.Popen(
        [*command, "-c", code],
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
    sentence = "softmaxlib.jax needs jax: pip install jax, or pip install -e '.[jax]' in a clone"
    assert f"ImportError: {sentence}" in errors


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The compiled custom calls, in a cache of several processes that found none."""
    home = tmp_path_factory.mktemp("cache")
    processes = [start(SOFTMAX, XDG_CACHE_HOME=str(home)) for _ in range(3)]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert output == FFI, errors
    (library,) = Path(home, "softmaxlib").iterdir()
    return library


@pytest.fixture
def cached(library, tmp_path):
    """A copy of it in a cache that a test may spoil."""
    cache = tmp_path / "softmaxlib"
    cache.mkdir(mode=0o700)
    return Path(shutil.copy2(library, cache))


def used(cached, **environment):
    """Return what a process prints that must take the library of the cache, having no compiler."""
    home = str(cached.parent.parent)
    return run(SOFTMAX, XDG_CACHE_HOME=home, CXX="no-such-compiler", **environment)[1]


@needs_jax
@needs_compiler
def test_the_cache_is_used_and_private(cached):
    before = cached.stat()
    assert used(cached) == FFI
    assert cached.stat().st_mtime_ns == before.st_mtime_ns
    assert stat.S_IMODE(before.st_mode) == 0o600


@needs_jax
@needs_compiler
@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"no library" * 1000,
        lambda content: content[:5000] + b"?" + content[5001:],
    ],
    ids=["empty", "half", "cut", "longer", "garbage", "changed"],
)
def test_what_does_not_verify_is_built_anew(cached, spoil):
    """A cut library that is loaded is SIGBUS, for ever."""
    content = cached.read_bytes()
    cached.write_bytes(spoil(content))
    assert "no-such-compiler" in used(cached)  # not loaded, and nothing to build with
    if spoil(content) == b"":  # once: a build takes seconds
        assert run(SOFTMAX, XDG_CACHE_HOME=str(cached.parent.parent))[1] == FFI
        assert cached.stat().st_size > 0 and list(cached.parent.iterdir()) == [cached]


@needs_jax
@needs_compiler
def test_what_does_not_load_is_built_anew(cached):
    """As a library that another machine has put into a home that both have."""
    code = """
from softmaxlib import _jax_build as build
garbage = b"no library"
build._build = lambda library, key: library.write_bytes(garbage + build._digest(key, garbage))
build.load()
"""
    home = {"XDG_CACHE_HOME": str(cached.parent.parent)}
    cached.unlink()
    status, _, errors = run(code, **home)
    assert status == 1 and "OSError" in errors
    assert cached.exists()
    assert "no-such-compiler" in used(cached)
    assert run(SOFTMAX, **home)[1] == FFI


@needs_jax
@needs_compiler
@pytest.mark.parametrize(
    ("which", "mode"), [("library", 0o620), ("library", 0o602), ("cache", 0o770), ("home", 0o707)]
)
def test_what_others_can_write_is_refused(cached, which, mode):
    path = {"library": cached, "cache": cached.parent, "home": cached.parent.parent}[which]
    before = path.stat().st_mode
    path.chmod(mode)
    output = used(cached)
    assert output.startswith("callback [0.5 0.5]")
    assert f"{path} has mode {mode:o}, so that others can write to it: chmod go-w" in output
    path.chmod(before)
    assert used(cached) == FFI


@needs_jax
@needs_compiler
def test_a_sticky_directory_above_is_none_where_others_exchange_things(cached):
    cached.parent.parent.chmod(0o1777)
    assert used(cached) == FFI
    cached.parent.chmod(0o1777)
    assert "has mode 1777" in used(cached)


@needs_jax
@needs_compiler
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["library", "cache", "home"])
def test_what_belongs_to_others_is_refused(cached, which):
    path = {"library": cached, "cache": cached.parent, "home": cached.parent.parent}[which]
    os.chown(path, NOBODY, NOBODY)
    output = used(cached)
    assert output.startswith("callback [0.5 0.5]")
    assert f"{path} belongs to user {NOBODY}, not to 0, who runs this: set XDG_CACHE_HOME" in output


@needs_jax
@needs_compiler
def test_a_link_is_not_followed(cached, library):
    cached.unlink()
    cached.symlink_to(library)
    assert "symbolic links" in used(cached)


@needs_jax
@needs_compiler
def test_read_only_cache(cached):
    """One that has the library serves; what cannot be written is said."""
    command = [sys.executable]
    if os.getuid() == 0:  # who may write everywhere, but for this
        if shutil.which("setpriv") is None:
            pytest.skip("root without setpriv")
        command = ["setpriv", "--bounding-set", "-dac_override", *command]

    def output():
        home = str(cached.parent.parent)
        return run(SOFTMAX, command=command, XDG_CACHE_HOME=home)[1]

    cached.parent.chmod(0o500)
    assert output() == FFI
    cached.parent.chmod(0o700)
    cached.unlink()
    cached.parent.chmod(0o500)
    assert "callback [0.5" in output() and f"Permission denied: '{cached.parent}" in output()
    cached.parent.rmdir()
    cached.parent.parent.chmod(0o500)
    assert "callback [0.5" in output() and f"Permission denied: '{cached.parent}" in output()
    cached.parent.parent.chmod(0o700)


@needs_jax
@needs_compiler
@pytest.mark.parametrize("given", ["relative", ""])
def test_a_relative_cache_home_is_ignored(cached, tmp_path, monkeypatch, given):
    """As the XDG specification has it: a library would be loaded from the current directory."""
    monkeypatch.chdir(tmp_path)
    Path(".cache").mkdir(mode=0o700)
    cached.parent.rename(Path(".cache", "softmaxlib"))
    output = run(SOFTMAX, XDG_CACHE_HOME=given, HOME=str(tmp_path), CXX="no-such-compiler")[1]
    assert output == FFI
    assert not Path("relative").exists()


@needs_jax
@needs_compiler
def test_directories_are_made_private(library, tmp_path):
    home = tmp_path / "of" / "mine"
    code = "import os; os.umask(0)\nfrom softmaxlib import _jax_build; _jax_build._cache()"
    status, _, errors = run(code, XDG_CACHE_HOME=str(home))
    assert status == 0, errors
    for directory in (home.parent, home, home / "softmaxlib"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@needs_jax
@needs_callbacks
def test_fallback(tmp_path):
    """One warning, which says why, and the same results."""
    cache = tmp_path / "file"
    cache.touch()
    for environment, reason in (
        ({"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}, "no-such-compiler"),
        ({"CXX": "false", "XDG_CACHE_HOME": str(tmp_path)}, "exit status 1"),
        ({"XDG_CACHE_HOME": str(cache)}, "File exists"),
    ):
        status, output, errors = run(SOFTMAX, **environment)
        assert status == 0, errors
        result, warning = output.split("\n", 1)
        assert result == "callback [0.5 0.5] -0.6931472"
        assert warning.startswith("softmaxlib.jax runs through callbacks into Python")
        assert warning.count("callbacks") == 1 and reason in warning
        status, _, errors = run(SOFTMAX, **environment, SOFTMAXLIB_JAX="ffi")
        assert status == 1 and "RuntimeError: SOFTMAXLIB_JAX=ffi, but" in errors
        assert reason in errors


@needs_jax
@needs_compiler
@pytest.mark.skipif(
    not importlib.util.find_spec("flatbuffers"), reason="jax.export writes with flatbuffers"
)
def test_exported(cached, tmp_path):
    """What one process exports another calls, once that has its custom calls, too."""
    file = tmp_path / "exported"
    start = "import sys, jax, jax.numpy as jnp, jax.export, softmaxlib.jax as smj, pathlib\n"
    start += f"file = pathlib.Path({str(file)!r})\n"
    export = """
check = jax.export.DisabledSafetyCheck.custom_call("softmaxlib_jax_forward")
exported = jax.export.export(jax.jit(smj.softmax), disabled_checks=[check])(jnp.zeros(2))
file.write_bytes(exported.serialize())
"""
    call = "print(jax.export.deserialize(bytearray(file.read_bytes())).call(jnp.zeros(2)))"
    home = {"XDG_CACHE_HOME": str(cached.parent.parent)}
    status, _, errors = run(start + export, **home)
    assert status == 0, errors
    status, output, errors = run(start + "smj.backend()\n" + call, **home)
    assert output == "[0.5 0.5]\n", errors
    status, _, errors = run(start + call, **home)
    assert status == 1 and "softmaxlib_jax_forward" in errors


@needs_jax
@needs_callbacks
@pytest.mark.parametrize("backend", ["ffi", "callback"])
def test_one_cpu(backend):
    """XLA has one thread then, and what waits there for it hangs, as in jax.pure_callback."""
    if backend == "ffi" and not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    code = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import jax
import jax.numpy as jnp
import softmaxlib.jax as smj
weights = jnp.ones((2000, 2000))
for i in range(20):  # what goes in is not ready, and large enough to be copied by another task
    y = smj.softmax(smj.softmax(jnp.sin(jnp.ones((300, 2000)) * i) @ weights))
print(float(jax.block_until_ready(y)[0, 0]) * 2000)
"""
    status, output, errors = run(code, SOFTMAXLIB_JAX=backend)
    assert status == 0 and abs(float(output) - 1) < 1e-6, errors


@needs_jax
@needs_callbacks
def test_jax_without_buffer_callback():
    code = f"""
import sys
sys.modules["jax.experimental.buffer_callback"] = None
{SOFTMAX}"""
    for environment, reason in (
        ({"SOFTMAXLIB_JAX": "callback"}, "and SOFTMAXLIB_JAX=callback"),
        ({"XDG_CACHE_HOME": "/proc/self", "CXX": "false"}, "and the custom calls of XLA cannot be"),
    ):
        status, _, errors = run(code, **environment)
        assert (
            status == 1 and "needs a C++ compiler (c++, or what CXX says), or jax 0.6.1" in errors
        )
        assert reason in errors


@needs_jax
@needs_callbacks
def test_environment_variable():
    assert run(SOFTMAX, SOFTMAXLIB_JAX="callback")[1] == "callback [0.5 0.5] -0.6931472\n\n"
    status, _, errors = run(SOFTMAX, SOFTMAXLIB_JAX="fast")
    assert status == 1
    assert 'ValueError: SOFTMAXLIB_JAX must be "ffi" or "callback", got \'fast\'' in errors
