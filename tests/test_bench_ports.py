"""bench/ports.py: which loop of a function it takes, and what it asks of llvm-mca."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "bench" / "ports.py"

FUNCTION = """
other:
\tret
\t.size\tother, .-other
work:
\t.cfi_startproc
\tmovq\t%rdi, %rax
.L1:
\tvmovups\t(%rax), %ymm9
.L2:
\tvaddps\t%ymm0, %ymm1, %ymm1
\tjg\t.L5
.L3:
\tvmulps\t%ymm1, %ymm2, %ymm3
\taddq\t$32, %rax
\tjne\t.L2
\tvaddps\t%ymm3, %ymm4, %ymm4
\tcmpq\t%rax, %rdx
\tjne\t.L1
\tret
.L5:
\tvxorps\t%ymm0, %ymm0, %ymm0
\tjmp\t.L3

\t.size\twork, .-work
"""


@pytest.fixture
def ports():
    if not FILE.exists():
        pytest.skip("bench/ is not here")
    spec = importlib.util.spec_from_file_location("bench_ports", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_innermost_loop_is_taken_whole(ports):
    """With the labels in it, without what lies around it and what is out of its way."""
    lines = ports.loop_of("work", FUNCTION).split()
    assert [word for word in lines if not word.startswith(("%", "$", "."))] == [
        *("vaddps", "jg", "vmulps", "addq", "jne"),
    ]


def test_a_function_without_a_loop_is_an_error(ports):
    with pytest.raises(SystemExit, match="no loop"):
        ports.loop_of("work", FUNCTION.replace("jne", "ret"))


def test_the_record_has_what_is_compared(ports):
    record = json.loads(ports.RECORD.read_text())
    assert list(record) == [f"{isa} {cpu}" for isa, cpus in ports.CPUS.items() for cpu in cpus]
    for row in record.values():
        assert list(row) == list(ports.LOOPS)
    assert ports.markdown(record) in ports.DOCS.read_text()


@pytest.mark.skipif(not shutil.which("llvm-mca-22"), reason="no llvm-mca-22")
def test_a_chain_takes_its_latency(ports):
    loop = "vaddps %ymm0, %ymm1, %ymm1\n"
    cycles, pipe = ports.predict(loop, "haswell", shutil.which("llvm-mca-22"))
    assert cycles == pytest.approx(3, abs=0.1)
    assert pipe == "HWPort1"
