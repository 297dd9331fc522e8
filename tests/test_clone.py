"""What the README and docs/embedding.md have a reader do in the root of a clone."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import softmaxlib as sml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(sml.__file__).parent


@pytest.fixture
def root(tmp_path):
    """Return the clone's root, or another folder where the package is installed without -e."""
    return ROOT if PACKAGE.parent == ROOT else tmp_path


def run(command, folder, **options):
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False, **options
    )


def test_the_readme(root):
    _, *blocks = (ROOT / "README.md").read_text().split("```python\n")
    assert blocks
    for block in blocks:
        done = run([sys.executable, "-"], root, input=block.split("```")[0])
        assert done.returncode == 0, done.stderr
        assert not done.stderr


def test_the_package_as_a_command(root):
    done = run([sys.executable, "-m", "softmaxlib", "info"], root)
    assert done.returncode == 0, done.stderr
    assert sml.__version__ in done.stdout


def test_the_compile_line(root, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("no cc on this machine")
    lines = (ROOT / "docs" / "embedding.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("cc app.c $(python -m softmaxlib")]
    line = line.replace("app.c", f"'{ROOT}/tests/c/smoke.c' -o '{tmp_path}/smoke'")
    line = line.replace("$(python ", f"$('{sys.executable}' ") + " -lm"
    done = run(["sh", "-c", f"{line} && '{tmp_path}/smoke'"], root)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout


ALONE = """
import importlib.machinery as m, sys
sys.meta_path[:] = [m.BuiltinImporter, m.FrozenImporter, m.PathFinder]  # not that of an install -e
sys.path.insert(0, {folder!r})
import softmaxlib
"""


@pytest.fixture
def sources(tmp_path):
    """Copy what a clone has in softmaxlib/: no compiled module."""
    shutil.copytree(
        PACKAGE,
        tmp_path / "softmaxlib",
        ignore=lambda _, names: {name for name in names if not name.endswith((".py", ".pyi"))},
    )
    return tmp_path


def test_the_sources_alone_say_what_to_do(sources, tmp_path):
    done = run([sys.executable, "-c", ALONE.format(folder=str(sources))], tmp_path)
    assert done.returncode == 1
    *frames, sentence = done.stderr.strip().splitlines()
    assert sentence == (
        f"ImportError: {sources}/softmaxlib has the sources of softmaxlib but not its compiled "
        f"module: run `pip install -e {sources}` or, where softmaxlib is installed, start Python "
        "in another folder"
    )
    assert "During handling" not in done.stderr and "circular" not in done.stderr


def test_a_compiled_module_that_fails_speaks_for_itself(sources, tmp_path):
    (sources / "softmaxlib" / "_core.py").write_text("import a_missing_module")
    done = run([sys.executable, "-c", ALONE.format(folder=str(sources))], tmp_path)
    assert done.stderr.endswith("No module named 'a_missing_module'\n")
