"""The command line: what it prints and writes, and how it fails."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from softmaxlib import _bench, _core, _verify, cli

TINY = ["bench", "--sizes", "1024,4096", "--rounds", "2"]


def softmaxlib(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "softmaxlib", *args],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# info


def test_info(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert _core.version() in printed
    assert _core.isas_available()[0] in printed


WITHOUT_EXTRAS = """
import sys
for name in ("rich", "matplotlib", "scipy", "ml_dtypes"): sys.modules[name] = None
from softmaxlib import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["info"], [_core.version(), "caches", "KiB"]),
        (["info", "--json"], [_core.version(), "caches"]),
        (["verify", "--quick", "--seconds", "0.5"], ["outputs sum to 1  ", "no ml_dtypes", "pass"]),
    ],
)
def test_info_and_verify_need_numpy_alone(here, command, words):
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert all(word in ran.stdout for word in words)


def test_info_json():
    ran = softmaxlib("info", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["version"] == _core.version()


# bench


def test_bench(here, capsys):
    files = ["--json", "a.json", "--csv", "a.csv", "--plot", "a.svg"]
    assert cli.main([*TINY, *files]) == 0
    printed = capsys.readouterr().out
    assert "two_pass" in printed
    assert all(f"Wrote {name}" in printed for name in files[1::2])
    assert sorted(path.name for path in here.iterdir()) == ["a.csv", "a.json", "a.svg"]
    assert b"<svg" in Path("a.svg").read_bytes()

    report = json.loads(Path("a.json").read_text())
    assert report["schema"] == _bench.SCHEMA
    assert report["complete"] is True
    assert report["settings"]["threads"] == 1
    assert report["machine"]["compiler"] == _core.compiler()
    assert set(report["machine"]) >= {"library", "caches_bytes", "page_bytes", "numpy"}
    assert set(report["definitions"]) == {"roofline", "traffic", "paper"}

    rows = report["rows"]
    algorithms = [row for row in rows if row["kind"] == "algorithm"]
    assert {row["name"] for row in algorithms} == {kernel.name for kernel in _bench.ALGORITHMS}
    assert {row["isa"] for row in algorithms} == set(_core.isas_available())
    assert {row["elements"] for row in rows} == {1024, 4096}
    for row in rows:
        assert {visit for visit, _, _ in row["samples"]} == {0, 1}
        assert all(ns > 0 for _, ns, _ in row["samples"])
        assert row["ns_per_1000"]["taken"] == len(row["samples"])
        assert row["noisy"] is True  # two samples tell nothing
    for row in algorithms:
        value = row["ns_per_1000"]["value"]
        traffic = next(k.traffic for k in _bench.ALGORITHMS if k.name == row["name"])
        assert row["gb_per_s"] == pytest.approx(4 * traffic * 1000 / value)
        rivals = {
            rival["name"]: rival["ns_per_1000"]["value"]
            for rival in algorithms
            if rival["name"].startswith("three_pass")
            and all(rival[key] == row[key] for key in ("elements", "isa", "store"))
        }
        assert row["best_three_pass"] == min(rivals, key=rivals.get)
        assert row["over_best_three_pass"]["verdict"] == "cannot tell"
    assert {c["isa"] for c in report["headline"]} == set(_core.isas_available())
    assert all(c["elements"] == 4096 for c in report["headline"])
    assert all(winner["names"] == [] for winner in report["winners"])
    assert report["timed"]["cpus"]

    with Path("a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        assert float(line["ns_per_1000_value"]) == row["ns_per_1000"]["value"]
        assert line["name"] == row["name"]


def test_bench_default_plot_threads_isa_store(here):
    arguments = ["--threads", "2", "--isa", "scalar", "--store", "streaming", "--offset", "16"]
    assert cli.main([*TINY, *arguments, "--json", "a.json"]) == 0
    assert Path("softmaxlib-bench.png").read_bytes().startswith(b"\x89PNG")
    algorithms = [
        row for row in json.loads(Path("a.json").read_text())["rows"] if row["kind"] == "algorithm"
    ]
    assert {(row["isa"], row["store"]) for row in algorithms} == {("scalar", "streaming")}


def test_bench_table_fits_80_columns(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*TINY, "--no-plot"]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert not list(here.iterdir())


def test_default_sizes():
    known = list(_bench.caches().values())
    for quick in (False, True):
        sizes = _bench.default_sizes(quick, 1 << 62)
        assert _bench.cache_level(sizes[0]) in ("L1", "DRAM")
        most = (1 if quick else 4) * known[-1] if known else 0
        assert 4 * sizes[-1] >= max(256 << 20, most)
        assert 8 * _bench.default_sizes(quick, 1 << 22)[-1] <= 1 << 22


def test_bench_notes_reduced_memory(monkeypatch):
    monkeypatch.setattr(_bench, "available_memory", lambda: 20 << 20)
    bench = _bench.Bench(_bench.Settings(isas=_core.isas_available()))
    assert 8 * max(bench.groups) <= 16 << 20
    assert any("reduced from" in note for note in bench.notes)


def test_bench_interrupted_keeps_what_it_has(here, monkeypatch, capsys):
    time_run, calls = _core.time_run, 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls > 200:
            raise KeyboardInterrupt
        return time_run(*args)

    monkeypatch.setattr(_core, "time_run", interrupted)
    assert cli.main(["bench", "--sizes", "1024", "--rounds", "1000", "--json", "a.json"]) == 130
    assert "measured so far" in capsys.readouterr().out
    report = json.loads(Path("a.json").read_text())
    assert report["complete"] is False
    assert report["rows"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize(
    "command",
    [["bench", "--no-plot"], ["bench", "--no-plot", "--peers", "--library", "numpy"], ["verify"]],
)
def test_ctrl_c(here, command):
    running = subprocess.Popen(
        [sys.executable, "-m", "softmaxlib", *command, "--json", "a.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job, such as CI's, would hand down a SIGINT that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(3)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in errors
    assert json.loads(Path("a.json").read_text())["complete"] is False


# bad usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["nonsense"], "invalid choice"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--libs", "info"], "does not go with a COMMAND"),
        ([*TINY, "--isa", "sse9"], "sse9"),
        ([*TINY, "--store", "wet"], "invalid choice"),
        ([*TINY, "--threads", "0"], "at least 1"),
        ([*TINY, "--threads", "99999999"], "99999999: must be at most 1024"),
        (["bench", "--peers", "--threads", "99999999"], "99999999: must be at most 1024"),
        ([*TINY, "--rounds", "x"], "x: must be an integer"),
        ([*TINY, "--rounds", str(1 << 63)], "less than 2^63"),
        (["bench", "--sizes", "1,0"], "at least 1"),
        (["bench", "--sizes", ""], "must be an integer"),
        (["bench", "--sizes", "1" + 400 * "0"], "less than 2^63"),
        (["bench", "--sizes", str(1 << 50)], "may be used"),
        ([*TINY, "--max-bytes", "3"], "64K"),
        ([*TINY, "--max-bytes", "infG"], "less than 2^63"),
        ([*TINY, "--max-bytes", "nanG"], "64K"),
        ([*TINY, "--max-bytes", "xG"], "must be a number"),
        ([*TINY, "--offset", "3"], "multiple of 4"),
        ([*TINY, "--plot", "a.bmp"], ".png or .svg"),
        ([*TINY, "--json", "no/such/a.json"], "cannot write"),
        ([*TINY, "--csv", "."], "directory"),
        ([*TINY, "--json", "a", "--csv", "./a"], "same file"),
        (["verify", "--seconds", "-1"], "positive"),
        (["verify", "--seconds", "soon"], "soon: must be a number"),
        (["verify", "--seed", "-1"], "negative"),
        (["verify", "--json", "no/such/a.json"], "cannot write"),
    ],
)
def test_bad_usage(here, capsys, monkeypatch, arguments, message):
    def measure(*args, **kwargs):
        raise AssertionError("measured before complaining")

    monkeypatch.setattr(_bench.Bench, "run", measure)
    monkeypatch.setattr(_verify, "run", measure)
    assert cli.main(arguments) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("softmaxlib")
    assert message in complaint
    assert not list(here.iterdir())


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_missing_extra(here, capsys, monkeypatch, module):
    find_spec = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == module else find_spec(name)
    )
    assert cli.main(TINY) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"this needs {module}: run `pip install -e '.[bench]'` in a clone" in said


@pytest.mark.parametrize(
    ("library", "packages"), [("torch", "torch"), ("onnxruntime", "onnxruntime onnx")]
)
def test_a_library_that_is_asked_for_and_missing(here, capsys, monkeypatch, library, packages):
    for name in packages.split():
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["bench", "--peers", "--library", library, "--no-plot"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"--library {library}: not installed; run `pip install {packages}`" in said


@pytest.mark.parametrize(
    "variable", ["SOFTMAXLIB_ISA", "SOFTMAXLIB_NUM_THREADS", "SOFTMAXLIB_KEPT_BYTES"]
)
def test_bad_environment(variable):
    ran = softmaxlib("info", **{variable: "nonsense"})
    assert ran.returncode == 2
    assert "nonsense" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


# verify


@pytest.fixture
def few_exps(monkeypatch):
    monkeypatch.setattr(_verify, "exp_pieces", lambda quick, seed: [(0x3F800000, 1000)])


def test_verify(here, capsys):
    assert cli.main(["verify", "--quick", "--seconds", "0.5", "--json", "a.json"]) == 0
    assert "FAIL" not in capsys.readouterr().out
    report = json.loads(Path("a.json").read_text())
    assert report["passed"] and report["complete"]
    kinds = {check["check"].split()[0] for check in report["checks"]}
    assert kinds >= {"exp", "same", "accuracy:", "gradient:"}


def test_exp_pieces_cover():
    pieces = _verify.exp_pieces(quick=False, seed=0)
    assert pieces[0][0] == 0
    assert all(a + n == b for (a, n), (b, _) in zip(pieces, pieces[1:], strict=False))
    assert sum(pieces[-1]) == 1 << 32
    assert all(a + n <= 1 << 32 for a, n in _verify.exp_pieces(quick=True, seed=0))


def test_verify_finds_a_wrong_bit(few_exps, monkeypatch, capsys):
    compute = _verify.compute

    def tampered(function, x, out, where, variant):
        compute(function, x, out, where, variant)
        if function == "stablemax" and variant.algorithm == "two_pass" and out.size > 1:
            bits = out.view(f"u{out.dtype.itemsize}")
            bits.flat[-1] ^= 1

    monkeypatch.setattr(_verify, "compute", tampered)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["verify", "--quick", "--seconds", "0.5"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAIL") == 1
    assert "same bits: stablemax" in printed
    _, reproducer = printed.split("shows again with:\n")
    again = io.StringIO()
    with contextlib.redirect_stdout(again):
        exec(reproducer, {})
    assert "array([])" not in again.getvalue()
    assert again.getvalue().startswith("(array([")


@pytest.mark.parametrize(("ulp", "checksum"), [(7.5, 0), (0.1, 1), (float("nan"), 0)])
def test_verify_finds_a_wrong_exp(few_exps, monkeypatch, capsys, ulp, checksum):
    if len(_core.isas_available()) < 2:
        pytest.skip("one ISA")
    scalar = _core.isas["scalar"]
    monkeypatch.setattr(
        _core,
        "exp_sweep",
        lambda isa, *rest: (ulp, 1, checksum) if isa == scalar else (0.1, 1, 0),
    )
    assert cli.main(["verify", "--quick", "--seconds", "0.1"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAIL") == len(_verify.EXP_BOUNDS)
    assert "_core.exp_sweep(" in printed


def test_verify_finds_inaccuracy(few_exps, monkeypatch, capsys):
    softmax = _verify.softmaxlib.softmax
    monkeypatch.setattr(
        _verify.softmaxlib, "softmax", lambda x, **options: softmax(x, **options) * 1.00001
    )
    assert cli.main(["verify", "--quick", "--seconds", "0.1"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAIL") == 3  # float32, float64, the sum
    assert "N(0, 0.1^2), n = 100" in printed


def test_verify_finds_a_wrong_gradient(few_exps, monkeypatch, capsys):
    if len(_core.isas_available()) < 2:
        pytest.skip("one ISA")
    backward = _verify.softmaxlib.stablemax_backward

    def tampered(*arguments):
        gradient = backward(*arguments)
        if _verify.softmaxlib.info()["isa"] == "scalar":
            gradient[-1, -1] *= 1 + np.finfo(gradient.dtype).eps
        return gradient

    monkeypatch.setattr(_verify.softmaxlib, "stablemax_backward", tampered)
    assert cli.main(["verify", "--quick", "--seconds", "0.1"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAIL") == 2  # float32, float64
    assert "gradient: stablemax" in printed
    assert "other bits: ['scalar']" in printed


def test_cases_are_reproducible_and_varied():
    shapes, kinds = set(), set()
    for seed in range(300):
        case = _verify.Case(seed, "softmax", "float32")
        x = case.x
        shapes.add(x.shape)
        kinds |= {
            name
            for name, there in {
                "where": case.where is not None,
                "nan": np.isnan(x).any(),
                "-inf": np.isneginf(x).any(),
                "huge": (np.abs(x) > 1e25).any(),
                "ties": x.size > 10 and len(np.unique(x)) < x.size // 4,
            }.items()
            if there
        }
    again = _verify.Case(299, "softmax", "float32").x
    assert np.array_equal(again, x, equal_nan=True)
    assert kinds == {"where", "nan", "-inf", "huge", "ties"}
    assert min(n for _, n in shapes) <= 3
    assert max(n for _, n in shapes) > 50_000
