"""softmaxlib.jax in jax.shard_map: jax_mesh.py, in a process that has four devices."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="jax.shard_map came with jax 0.6")
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ffi", "callback"])
def test_over_a_mesh(backend):
    if backend == "ffi" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("jax_mesh.py")],
        env=os.environ
        | {
            "SOFTMAXLIB_JAX": backend,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.stdout == f"{backend}\n", ran.stderr
