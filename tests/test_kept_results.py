"""Memory of large results is kept for the next of the same size."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import softmaxlib as sml

MIB = 1 << 20
LARGE = np.zeros((1000, 2000), np.float32)  # 7.6 MiB


def address(array):
    return array.__array_interface__["data"][0]


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"import numpy as np, softmaxlib as sml\n{code}"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )


def test_freed_memory_is_used_again():
    gc.collect()
    first = sml.softmax(LARGE)
    place = address(first)
    second = sml.softmax(LARGE)
    assert address(second) != place  # still in use
    assert np.array_equal(first, second)
    view = first[10:]
    del first
    assert address(sml.softmax(LARGE)) != place  # by the view
    assert view[0, 0] == second[0, 0]
    del view
    gc.collect()
    third = sml.log_softmax(LARGE)
    assert address(third) == place
    assert np.allclose(np.exp(third), second)


def test_results_own_their_memory():
    y = sml.softmax(LARGE)
    assert y.base is None
    assert y.flags.owndata
    y.resize((3000, 2000), refcheck=False)
    assert y[2999, 1999] == 0
    assert y[0, 0] == sml.softmax(LARGE)[0, 0]
    y.resize(5, refcheck=False)
    del y
    assert np.isfinite(sml.softmax(LARGE)).all()


def test_other_arrays_are_numpys_own():
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    y = sml.softmax(LARGE)
    assert multiarray.get_handler_name(y) == "softmaxlib"
    assert multiarray.get_handler_name(np.empty_like(y)) == "default_allocator"
    assert multiarray.get_handler_name(sml.softmax(LARGE[:100])) == "default_allocator"


def test_the_environment_turns_it_off():
    code = """
y = sml.softmax(np.zeros((1000, 2000)))
from numpy import __version__ as v
m = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
print(m.get_handler_name(y))
"""
    assert run(code, SOFTMAXLIB_KEPT_BYTES="0").stdout.strip() == "default_allocator"
    assert run(code, SOFTMAXLIB_KEPT_BYTES=str(64 * MIB)).stdout.strip() == "softmaxlib"


@pytest.mark.parametrize("text", ["much", "-5", " -5", " 5", "+5", "1.5", "9" * 30])
def test_nonsense_in_the_environment(text):
    done = run("sml.softmax(np.zeros((1000, 2000)))", SOFTMAXLIB_KEPT_BYTES=text)
    assert done.returncode == 1
    assert "SOFTMAXLIB_KEPT_BYTES" in done.stderr
    assert f"'{text}' is not a number of bytes" in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_more_is_kept_than_allowed():
    code = """
import gc
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
sml.softmax(np.zeros((1024, 1024), np.float32))
before = resident()
for n in range(5, 40):
    sml.softmax(np.zeros((n, 1 << 18), np.float32))
gc.collect()
print((resident() - before) >> 20)
"""
    kept = int(run(code, SOFTMAXLIB_KEPT_BYTES=str(20 * MIB)).stdout)
    assert kept < 64


def test_many_threads():
    expected = sml.softmax(LARGE)
    wrong = []

    def work():
        for _ in range(20):
            if not np.array_equal(sml.softmax(LARGE), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_goes_on():
    code = """
import os
x = np.zeros((1000, 2000), np.float32)
y = sml.softmax(x); del y
child = os.fork()
if child == 0:
    with sml.threads(1):
        y = sml.softmax(x); del y; y = sml.softmax(x)
    os._exit(0 if np.isfinite(y).all() else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code).stdout.strip() == "0"
