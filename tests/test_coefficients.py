"""The constants of exp and log are those that their script computes."""

import subprocess
import sys
from pathlib import Path

import pytest

MATH = Path(__file__).resolve().parent.parent / "csrc" / "isa" / "math"


@pytest.mark.slow
def test_constants_are_those_of_the_script():
    script = MATH / "coefficients.py"
    printed = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, timeout=300
    )
    assert printed.stdout == (MATH / "coefficients.hpp").read_text()
