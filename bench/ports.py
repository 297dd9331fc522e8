"""What the hot loops take on CPUs that are not at hand, as llvm-mca predicts it.

    apt-get install llvm-22 && python bench/ports.py

bench/ports.cpp is compiled to assembly with the flags of a release; the loop of each of its
functions goes to llvm-mca for every CPU below. The table gives cycles per 64 bytes of x, all in the
first level cache, and the pipe or unit that is busiest. Nothing is measured: it is how work on one
CPU sees what users of others get.

--check compares with bench/results/ports.json and fails where a loop takes over 3 % more than it
says; --update writes that file and the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "results" / "ports.json"
DOCS = ROOT / "docs" / "performance.md"
TABLE = re.compile(r"(?<=<!-- ports -->\n).*?(?=<!-- /ports -->)", re.DOTALL)

FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c "
    "-mmove-max=512 -mstore-max=512".split(),
    "avx2": "-mavx2 -mfma -mf16c -mmove-max=256 -mstore-max=256".split(),
}
CPUS = {
    "avx512": ("skylake-avx512", "icelake-server", "sapphirerapids", "znver4"),
    "avx2": ("haswell", "znver2", "znver3", "znver4"),
}
# Vectors of 64 bytes of x that an iteration takes; kInStep of the leaf decides for results.
VECTORS = {"known_sum": 4, "sum": 4, "store_sum": 4, "log_sum": 4, "stable_sum": 4, "sum_f64": 4}
VECTORS |= {"scale": 2, "log_write": 2, "gradient_sum": 4, "gradient_write": 1}
AT_ONCE = {"avx512": 4, "avx2": 2}
LOOPS = (
    *("known_sum", "sum", "store_sum", "write", "scale", "log_sum", "log_write", "stable_sum"),
    *("gradient_sum", "gradient_write", "sum_f64", "write_f64"),
)
WORSE = 1.03


def assembly(isa: str, compiler: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ports.s"
        command = [compiler, "-std=c++17", "-O2", "-fpeel-loops", "-DNDEBUG"]
        command += ["--param=max-completely-peel-times=8"]
        command += ["-fno-align-jumps", "-fno-align-labels", "-falign-functions=1"]
        command += ["-ffp-contract=off", "-fno-fast-math"]
        command += ["-fno-exceptions", "-fno-asynchronous-unwind-tables", "-w", *FLAGS[isa]]
        leaf = f'"isa/simd/{isa}.hpp"'
        command += [f"-DSOFTMAXLIB_PORTS_ISA={isa}", f"-DSOFTMAXLIB_PORTS_LEAF={leaf}"]
        command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        subprocess.run([*command, "-S", "-o", out, ROOT / "bench" / "ports.cpp"], check=True)
        return out.read_text()


def loop_of(function: str, text: str) -> str:
    """Return the innermost loop of a function with the most vector instructions."""
    body = text.split(f"\n{function}:\n", 1)[1].split(f"\n\t.size\t{function},", 1)[0]
    lines = [line for line in body.split("\n") if not re.match(r"\s*\.(?!L)|\s*#", line)]
    best: list[str] = []
    labels: dict[str, int] = {}
    inner = -1  # where the last loop begins: what lies around it is none of the innermost
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = i
        jump = re.match(r"\s+j(?!mp)\w+\s+(\.L\w+)", line)
        if jump and labels.get(jump[1], -1) > inner:
            inner = labels[jump[1]]
            block = [each for each in lines[inner : i + 1] if not each.startswith(".")]
            if count(block) > count(best):
                best = block
    if not best:
        raise SystemExit(f"{function}: no loop was found in its assembly")
    return "\n".join(best) + "\n"


def count(block: list[str]) -> int:
    return sum("mm" in line for line in block)


def predict(loop: str, cpu: str, tool: str) -> tuple[float, str]:
    """Return the cycles of an iteration, and what is busiest."""
    command = [tool, "-mtriple=x86_64", f"-mcpu={cpu}", "-iterations=500", "-instruction-info=0"]
    done = subprocess.run(command, input=loop, capture_output=True, text=True, check=True)
    cycles = float(re.findall(r"Total Cycles:\s+(\d+)", done.stdout)[0]) / 500
    names = dict(re.findall(r"^\[([\d.]+)\]\s+- (\w+)", done.stdout, re.MULTILINE))
    after = done.stdout.split("Resource pressure per iteration:\n", 1)[1].split("\n")
    keys, values = re.findall(r"\[([\d.]+)\]", after[0]), after[1].split()
    busy = {
        names[key]: float(value)
        for key, value in zip(keys, values, strict=True)
        if value != "-" and key in names
    }
    return cycles, max(busy, key=lambda name: busy[name])


def measure(compiler: str, tool: str) -> dict[str, dict[str, dict[str, object]]]:
    found: dict[str, dict[str, dict[str, object]]] = {}
    for isa, cpus in CPUS.items():
        text = assembly(isa, compiler)
        for function in LOOPS:
            loop = loop_of(function, text)
            vectors = VECTORS.get(function, AT_ONCE[isa])
            for cpu in cpus:
                cycles, pipe = predict(loop, cpu, tool)
                row = found.setdefault(f"{isa} {cpu}", {})
                row[function] = {"cycles": round(cycles / vectors, 2), "pipe": pipe}
    return found


def markdown(found: dict[str, dict[str, dict[str, object]]]) -> str:
    lines = ["| loop | " + " | ".join(found) + " |", "|---|" + "--:|" * len(found)]
    for function in LOOPS:
        cells = [f"{row[function]['cycles']:.1f}" for row in found.values()]
        lines.append(f"| {function} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail where a loop got worse")
    parser.add_argument(
        "--update", action="store_true", help="write the record and the docs' table"
    )
    parser.add_argument("--compiler", default="g++")
    args = parser.parse_args()
    tool = shutil.which("llvm-mca-22") or shutil.which("llvm-mca")
    if not tool:
        parser.error("llvm-mca is missing: apt-get install llvm-22")
    if not shutil.which(args.compiler):
        parser.error(f"--compiler {args.compiler}: there is no such command")
    if args.check and not RECORD.exists():
        parser.error(f"{RECORD} is missing: --update writes it")
    try:
        found = measure(args.compiler, tool)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed with exit status {error.returncode}")
    table = Table("cycles per 64 bytes", *found)
    for function in LOOPS:
        cells = [f"{row[function]['cycles']:.1f} {row[function]['pipe']}" for row in found.values()]
        table.add_row(function, *cells)
    Console().print(table)
    if args.update:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        DOCS.write_text(TABLE.sub(lambda _: markdown(found), DOCS.read_text(), count=1))
    if args.check:
        before = json.loads(RECORD.read_text())
        worse = [
            f"{cpu}: {name} takes {row[name]['cycles']}, it took {before[cpu][name]['cycles']}"
            for cpu, row in found.items()
            for name in LOOPS
            if row[name]["cycles"] > WORSE * before[cpu][name]["cycles"]
        ]
        sys.exit("\n".join(worse) if worse else 0)


if __name__ == "__main__":
    main()
