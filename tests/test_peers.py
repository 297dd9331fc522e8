"""`softmaxlib bench --peers`: what it measures, judges, prints, and how it fails."""

import csv
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest

from softmaxlib import _bench, _core, _peers, _plots, cli
from softmaxlib._peer_calls import LIBRARIES, Library, _of_arrays
from softmaxlib._tools import timing

FEW = ["bench", "--peers", "--library", "numpy", "--library", "scipy", "--rounds", "2"]
TINY = [*FEW, "--shape", "2^3", "--shape", "300", "--shape", "4x50:0"]


def timed(*ns, disturbed=()):
    """Return what the engine would, of fabricated samples."""
    case = timing.Case("", lambda repeats: 0.0)
    case.samples = [
        timing.Sample(i, time, "something" if i in disturbed else None) for i, time in enumerate(ns)
    ]
    return case


def steady(ns, count=20):
    return timed(*(ns * (1 + 0.001 * (i % 5)) for i in range(count)))


def noisy(*ns):
    return timed(*ns * 5)


def formula(x, axis):
    """Return softmax in double, rounded."""
    e = np.exp(x.astype(np.float64) - x.max(axis, keepdims=True).astype(np.float64))
    return (e / e.sum(axis, keepdims=True)).astype(x.dtype)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def peer(monkeypatch):
    """Make a library of a function of an array and its axis."""

    def make(name, call, packages=("numpy",)):
        monkeypatch.setitem(
            LIBRARIES, name, Library(packages, lambda function, threads: _of_arrays(call))
        )

    return make


def run(*names, shapes=("4x50",), dtypes=("float32",), **settings):
    peers = _peers.Peers(
        _peers.Settings(
            libraries=names,
            shapes=tuple(map(_peers.parse_shape, shapes)),
            dtypes=dtypes,
            **{"rounds": 2, **settings},
        )
    )
    peers.run()
    return peers.report()


def results(report, library):
    found = [r for case in report["cases"] for r in case["results"] if r["library"] == library]
    assert len(found) == len(report["cases"])
    return found


# shapes


@pytest.mark.parametrize(
    ("text", "dims", "axis"),
    [
        ("8192x512", (8192, 512), 1),
        ("512x8x4096:1", (512, 8, 4096), 1),
        ("4096x4096:0", (4096, 4096), 0),
        ("2^20", (1 << 20,), 0),
        ("300", (300,), 0),
    ],
)
def test_shape_text(text, dims, axis):
    shape = _peers.parse_shape(text)
    assert (shape.dims, shape.axis, shape.text) == (dims, axis, text)


def test_default_shapes():
    shapes = {quick: _peers.default_shapes(quick) for quick in (False, True)}
    every = [shape.text for shape in shapes[False]]
    assert every[:29] == [f"2^{k}" for k in range(29)]
    assert len(set(every)) == len(every) == 42
    assert max(shape.elements for shape in shapes[True]) == 1 << 26
    (note,) = (n for n in _peers.Peers(_peers.Settings(quick=True)).notes if "--quick" in n)
    left_out = note.removeprefix("--quick leaves out ").split(", ")
    assert {*left_out, *(shape.text for shape in shapes[True])} == set(every)


# errors of results


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("text", ["1", "700", "30x40", "3x50x20:1", "50x60:0"])
@pytest.mark.parametrize("checked", [1 << 18, 512])  # all elements; some, sums in pieces
def test_reference(monkeypatch, function, dtype, text, checked):
    monkeypatch.setattr(_peers, "CHECKED", checked)
    shape = _peers.parse_shape(text)
    x = (np.random.default_rng(1).standard_normal(shape.dims) * 5).astype(dtype)
    exact = oracle.expected(function, x, shape.axis)
    reference = _peers.Reference(x, shape.axis, function)
    largest, mean, median = reference.errors(exact.astype(np.float64).astype(dtype))
    assert max(mean, median) <= largest <= 0.51
    y = exact.astype(np.float64).astype(dtype)
    off = y + 3 * np.spacing(np.abs(y))
    assert 2 <= reference.errors(off.astype(dtype))[2] <= 7  # a ULP halves at a power of two


def test_reference_checks_the_largest_and_the_last(monkeypatch):
    monkeypatch.setattr(_peers, "CHECKED", 64)
    x = np.random.default_rng(1).standard_normal(100_000, np.float32)
    y = formula(x, 0)
    reference = _peers.Reference(x, 0, "softmax")
    for i in (int(x.argmax()), x.size - 1):
        wrong = y.copy()
        wrong[i] *= 1.01
        assert reference.errors(wrong)[0] > 1000


def test_wrong_results_show(peer):
    peer("exact", formula)
    peer("inexact", lambda x, axis: formula(x, axis) * np.float32(1.001))
    peer("wrong", lambda x, axis: np.zeros_like(x))
    peer("nan", lambda x, axis: np.full_like(x, np.nan))
    peer("other_dtype", lambda x, axis: formula(x, axis).astype(np.float64))
    peer("other_shape", lambda x, axis: formula(x, axis)[1:])
    report = run("exact", "inexact", "wrong", "nan", "other_dtype", "other_shape")
    (case,) = report["cases"]
    assert results(report, "exact")[0]["max_ulp"] <= 0.51
    assert 5 < results(report, "inexact")[0]["max_ulp"] < 2e4
    assert results(report, "wrong")[0]["max_ulp"] > 1e6
    status = {r["library"]: r["status"] for r in case["results"]}
    assert status["exact"] == status["inexact"] == "ok"
    assert "does not count" in status["wrong"]
    assert status["nan"] == "returns what is not finite"
    assert status["other_dtype"] == "returns float64, not float32"
    assert "shape (3, 50), not (4, 50)" in status["other_shape"]
    assert set(case["outcomes"]) == {"exact", "inexact"}
    assert results(report, "wrong")[0]["ratio"]  # shown, though it does not count


def test_float32_called_float64_does_not_count(peer):
    peer("single", lambda x, axis: formula(x.astype(np.float32), axis).astype(np.float64))
    report = run("single", dtypes=("float64",))
    assert "does not count" in results(report, "single")[0]["status"]
    assert report["cases"][0]["best_peer"] is None
    assert report["summary"]["without_peer"] == 1


# who wins


@pytest.mark.parametrize(
    ("peer_time", "expected"),
    [
        (steady(110), "win"),
        (steady(90), "loss"),
        (steady(102), "tie"),
        (steady(98), "tie"),
        (noisy(90, 150, 95, 140), "cannot tell"),
        (noisy(80, 95), "loss"),  # always the faster
        (noisy(105, 180), "win"),
        (steady(90, count=7), "cannot tell"),  # too few pairs
        (timed(*[90.0] * 20, disturbed=range(14)), "cannot tell"),
        (timed(*[500.0] * 8, *[90.0] * 12, disturbed=range(8)), "loss"),
    ],
)
def test_outcome(peer_time, expected):
    assert _peers.judge(steady(100), {"a": peer_time})["outcome"] == expected


def test_disturbances_both_libraries_share_hide_nothing():
    slow = [1.0, 3.0, 1.0, 1.5, 2.0] * 4
    ours, peer_time = timed(*(100 * s for s in slow)), timed(*(90 * s for s in slow))
    found = _peers.judge(ours, {"a": peer_time})
    assert found["outcome"] == "loss"
    assert found["ratio"]["value"] == pytest.approx(0.9)
    assert found["ratio"]["low"] <= found["ratio"]["value"] <= found["ratio"]["high"]
    assert found["ratio"]["clean"] == 20


def test_noise_of_the_fastest_hides_no_loss():
    peers = {"noisy": noisy(60, 150, 70, 140), "steady": steady(90), "slow": steady(200)}
    found = _peers.judge(steady(100), peers)
    assert found["outcomes"] == {"noisy": "cannot tell", "steady": "loss", "slow": "win"}
    assert (found["best_peer"], found["outcome"]) == ("steady", "loss")
    del peers["steady"]
    found = _peers.judge(steady(100), peers)
    assert (found["best_peer"], found["outcome"]) == ("noisy", "cannot tell")
    peers["noisy"] = timed(*[900.0] * 20, disturbed=range(20))  # no rival even so
    found = _peers.judge(steady(100), peers)
    assert found["outcomes"]["noisy"] == "cannot tell"
    assert (found["best_peer"], found["outcome"]) == ("slow", "win")


def test_judge_without_us_or_without_peers():
    alone = _peers.judge(steady(100), {})
    assert (alone["best_peer"], alone["ratio"], alone["outcome"]) == (None, None, None)
    failed = _peers.judge(None, {"a": steady(90), "b": steady(80)})
    assert (failed["best_peer"], failed["ratio"], failed["outcome"]) == ("b", None, "loss")


def test_summary_lists_losses_worst_first():
    def case(name, outcome, ratio, dtype="float32"):
        return {
            "name": name,
            "dtype": dtype,
            "best_peer": "b",
            "ratio": None if ratio is None else {"value": ratio},
            "outcome": outcome,
        }

    found = _peers.summary(
        [
            case("a", "win", 2.0),
            case("b", "loss", 0.9),
            case("c", "loss", 0.5, "float64"),
            case("d", "loss", None),
            case("e", "tie", 0.99),
            case("f", "cannot tell", 0.8),
            case("g", None, None),
        ]
    )
    counts = {"wins": 1, "ties": 1, "losses": 3, "cannot_tell": 1, "without_peer": 1}
    assert {key: found[key] for key in counts} == counts
    assert found["by_dtype"]["float64"] == dict.fromkeys(counts, 0) | {"losses": 1}
    assert [loss["name"] for loss in found["losses_list"]] == ["d", "c", "b"]
    assert [untold["name"] for untold in found["cannot_tell_list"]] == ["f"]


# who takes part


def test_a_peer_that_raises_is_reported(peer):
    calls = 0

    def tires(x, axis):
        nonlocal calls
        calls += 1
        if calls > 100:
            raise RuntimeError("too tired\nto go on")
        return formula(x, axis)

    def raises(x, axis):
        raise ValueError("no such luck")

    peer("raises", raises)
    peer("tires", tires)
    report = run("raises", "tires", "numpy", rounds=60, shapes=("8",))
    assert report["complete"] is True
    assert results(report, "raises")[0]["status"] == "ValueError: no such luck"
    assert results(report, "tires")[0]["status"] == "RuntimeError: too tired"
    assert results(report, "tires")[0]["ns_per_1000"] is None
    assert results(report, "tires")[0]["samples"] == []
    assert len({visit for visit, _, _ in results(report, "numpy")[0]["samples"]}) == 60


def test_a_library_that_cannot_be_had_is_reported(peer, monkeypatch):
    def cannot_load(function, threads):
        raise ImportError("libfoo.so is missing")

    peer("absent", formula, packages=("numpy", "no_such_package"))
    monkeypatch.setitem(LIBRARIES, "broken", Library(("numpy",), cannot_load))
    report = run("absent", "broken")
    assert report["libraries"]["absent"] == "not installed"
    assert results(report, "absent")[0]["status"] == "not installed"
    assert results(report, "broken")[0]["status"] == (
        "cannot be imported: ImportError: libfoo.so is missing"
    )


def test_our_own_failure_is_a_loss(monkeypatch):
    monkeypatch.setitem(
        LIBRARIES,
        "softmaxlib",
        Library(("softmaxlib",), lambda *_: _of_arrays(lambda x, axis: np.zeros_like(x))),
    )
    report = run("numpy")
    assert report["summary"]["losses"] == 1
    assert report["summary"]["losses_list"][0]["ratio"] is None


def test_far_behind_and_slow_sits_out():
    peers = _peers.Peers(_peers.Settings(libraries=("numpy",)))
    case = _peers.Case(_peers.parse_shape("2^28"), np.dtype(np.float16))
    peers._check_pace(case, "numpy")  # nothing known yet
    peers._pace["softmaxlib", "float16"] = 0.5
    peers._pace["numpy", "float16"] = 2.0  # slow, but not far behind
    peers._check_pace(case, "numpy")
    peers._pace["numpy", "float16"] = 20.0
    with pytest.raises(_peers.RefusedError, match="40 times the time of softmaxlib"):
        peers._check_pace(case, "numpy")
    peers._check_pace(_peers.Case(_peers.parse_shape("2^20"), case.dtype), "numpy")


def test_batches_fit(monkeypatch):
    monkeypatch.setattr(_bench, "available_memory", lambda: 1 << 34)
    peers = _peers.Peers(_peers.Settings())
    batches = peers._batches()
    labels = [case.label for batch in batches for case in batch]
    assert sorted(labels) == sorted(case.label for case in peers.cases)
    assert all(len(batch) <= _peers.BATCH for batch in batches)
    limit = min(0.8 * (1 << 34) / 4, _peers.BATCH_BYTES)
    for batch in batches:
        assert len(batch) == 1 or _peers.ARRAYS * sum(case.bytes for case in batch) <= limit


def test_small_batches_give_the_same_report(monkeypatch):
    monkeypatch.setattr(_peers, "BATCH", 2)
    total, done = [], []
    settings = _peers.Settings(
        libraries=("numpy",),
        shapes=tuple(map(_peers.parse_shape, ("300", "8", "4x50"))),
        dtypes=("float64", "float32"),
        rounds=2,
    )
    peers = _peers.Peers(settings)
    peers.run(total.append, lambda label, seconds: done.append(seconds))
    report = peers.report()
    assert [(c["name"], c["dtype"]) for c in report["cases"]] == [
        (name, dtype) for dtype in settings.dtypes for name in ("300", "2^3", "4x50")
    ]
    samples = [r["samples"] for c in report["cases"] for r in c["results"]]
    assert all({visit for visit, _, _ in found} == {0, 1} for found in samples)
    assert sum(done) == pytest.approx(sum(total))
    entries = [entry for case in peers.cases for entry in case.entries.values()]
    assert all(entry.call is None for entry in entries)  # the arrays are free


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_peers_are_known_to_the_engine(monkeypatch, threads):
    cases = []
    monkeypatch.setattr(timing, "choose_cpus", lambda threads: [])
    monkeypatch.setattr(timing.Engine, "run", lambda engine, *_: cases.extend(engine.cases))
    run("numpy", threads=threads)
    ours, numpy = cases
    assert {ours.group, numpy.group} == {"4x50 float32"}
    assert (ours.threads, numpy.threads) == (threads, threads)
    assert not ours.spins and not ours.hands_over
    assert (numpy.spins, numpy.hands_over) == (threads > 1, threads == 1)


@pytest.mark.parametrize("hands_over", [False, True])
def test_who_hands_over_is_judged_by_the_process(monkeypatch, hands_over):
    clock = iter(range(0, 10**9, 10**6))  # the caller waits all the time, another thread computes
    monkeypatch.setattr(timing.time, "process_time_ns", lambda: next(clock))
    monkeypatch.setattr(timing.time, "thread_time_ns", lambda: 0)
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(clock))
    monkeypatch.setattr(timing, "_switches", lambda threads: 0)
    case = timing.Case("", lambda repeats: 1.0, hands_over=hands_over)
    sample = timing.Engine([case], seconds=1)._sample(case, 0)
    assert (sample.disturbed is None) == hands_over


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_equal_threads(peer):
    seen = []

    def spy(x, axis):
        seen.append((os.sched_getaffinity(0), os.environ["OMP_NUM_THREADS"]))
        return formula(x, axis)

    before = os.sched_getaffinity(0), os.environ.get("OMP_NUM_THREADS")
    peer("spy", spy)
    report = run("spy", threads=1)
    assert set(map(len, (cpus for cpus, _ in seen))) == {1}
    assert {threads for _, threads in seen} == {"1"}
    assert [list(cpus) for cpus, _ in seen[:1]] == [report["timed"]["cpus"]]
    assert (os.sched_getaffinity(0), os.environ.get("OMP_NUM_THREADS")) == before


def test_memory_is_respected(monkeypatch):
    monkeypatch.setattr(_bench, "available_memory", lambda: 1 << 24)
    peers = _peers.Peers(_peers.Settings(dtypes=("float32", "float64")))
    assert all(_peers.ARRAYS * case.bytes <= 0.8 * (1 << 24) for case in peers.cases)
    skipped = [note for note in peers.notes if "may need" in note]
    every = 2 * len(_peers.default_shapes(False))
    assert skipped and len(skipped) + len(peers.cases) == every


# the command


def test_bench_peers(here, capsys):
    files = ["--json", "a.json", "--csv", "a.csv", "--plot", "a.svg"]
    assert cli.main([*TINY, *files]) == 0
    printed = capsys.readouterr().out
    assert all(f"Wrote {name}" in printed for name in files[1::2])
    assert sorted(path.name for path in here.iterdir()) == ["a.csv", "a.json", "a.svg"]
    assert b"<svg" in Path("a.svg").read_bytes()

    report = json.loads(Path("a.json").read_text())
    assert report["schema"] == _peers.SCHEMA
    assert report["complete"] is True
    assert report["settings"]["shapes"] == ["2^3", "300", "4x50:0"]
    assert report["machine"]["compiler"] == _core.compiler()
    assert report["libraries"]["numpy"] == np.__version__
    assert [(c["name"], c["dtype"]) for c in report["cases"]] == [
        (name, dtype) for dtype in _peers.DTYPES for name in report["settings"]["shapes"]
    ]
    bounds = {"float32": 5, "float64": 5, "float16": 0.51, "bfloat16": 0.51}
    for case in report["cases"]:
        assert case["elements"] == np.prod(case["shape"])
        assert [r["library"] for r in case["results"]] == ["softmaxlib", "scipy", "numpy"]
        ours = case["results"][0]
        assert ours["status"] == "ok"
        assert 0 <= ours["mean_ulp"] <= ours["max_ulp"] <= bounds[case["dtype"]]
        for result in case["results"]:
            time = result["ns_per_1000"]
            assert time["low"] <= time["value"]
            assert time["high"] is None or time["taken"] > 2  # two samples have no upper end
            assert (time["taken"], result["noisy"]) == (len(result["samples"]), True)
            assert {visit for visit, _, _ in result["samples"]} == {0, 1}
            assert time["clean"] == sum(why is None for _, _, why in result["samples"])
            per_call = time["value"] * case["elements"] / 1e6
            assert result["us_per_call"] == pytest.approx(per_call)
        peers = {r["library"]: r["ratio"] for r in case["results"][1:] if r["status"] == "ok"}
        assert set(case["outcomes"]) == set(peers)
        assert case["ratio"] == peers[case["best_peer"]]
        assert case["outcome"] == case["outcomes"][case["best_peer"]] == "cannot tell"
    summary = report["summary"]
    assert summary["cannot_tell"] == len(summary["cannot_tell_list"]) == len(report["cases"])
    for case in summary["cannot_tell_list"]:
        assert f"? {case['name']} {case['dtype']}: {case['best_peer']}" in printed

    with Path("a.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * len(report["cases"])
    times = [r["ns_per_1000"]["value"] for c in report["cases"] for r in c["results"]]
    assert [float(line["ns_per_1000_value"]) for line in lines] == times
    assert {"ns_per_1000_high", "ratio_low", "noisy", "outcome"} <= set(lines[0])
    assert "samples" not in lines[0]


def test_log_softmax(here):
    arguments = ["--function", "log_softmax", "--dtype", "float64", "--no-plot", "--json", "a.json"]
    assert cli.main([*TINY, *arguments]) == 0
    report = json.loads(Path("a.json").read_text())
    assert report["settings"]["function"] == "log_softmax"
    assert all(case["results"][0]["max_ulp"] <= 5 for case in report["cases"])


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit(here, capsys, monkeypatch, peer, columns):
    for i in range(6):
        peer(f"library{i}", formula)
    names = [word for i in range(6) for word in ("--library", f"library{i}")]
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([*TINY, *names, "--dtype", "float32", "--no-plot"]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= columns
    assert all(f"library{i}" in printed for i in range(6))


def test_losses_and_reasons_are_printed(here, capsys, monkeypatch, peer):
    def raises(x, axis):
        raise ValueError("no such luck")

    def pretend(engine, plan, step):
        for case in engine.cases:
            factor = {"faster": 0.5, "unsure": 1.01}.get(case.label.split(", ")[1], 1.0)
            case.samples = steady(1e5 * factor, 9).samples
        plan(1.0)

    monkeypatch.setattr(timing.Engine, "run", pretend)
    for name in ("faster", "unsure"):
        peer(name, formula)
    peer("raises", raises)
    names = [word for name in ("faster", "unsure", "raises") for word in ("--library", name)]
    shape = ["--shape", "2^16", "--dtype", "float32"]
    assert cli.main(["bench", "--peers", *names, *shape, "--plot", "a.png"]) == 0
    printed = capsys.readouterr().out
    assert "LOSS 2^16 float32: faster 0.50x (0.50 to 0.50, 9 pairs)" in printed
    assert "!0.50x" in printed
    assert "raises, float32, 2^16: ValueError: no such luck" in printed
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_plots_of_what_cannot_be_told():
    report = run("numpy", shapes=("8", "16", "4x50"), rounds=1)
    assert b"<svg" in _plots.plot_peers(report, ".svg")
    for case in report["cases"]:
        case["ratio"] = {"value": np.nan, "low": 0.0, "high": np.inf, "clean": 0, "taken": 1}
    assert b"<svg" in _plots.plot_peers(report, ".svg")


def test_interrupted_keeps_what_it_has(here, capsys, monkeypatch, peer):
    def interrupted(x, axis):
        if x.size == 300:
            raise KeyboardInterrupt
        return formula(x, axis)

    monkeypatch.setattr(_peers, "BATCH", 1)
    peer("interrupted", interrupted)
    assert cli.main([*TINY, "--library", "interrupted", "--json", "a.json"]) == 130
    assert "measured so far" in capsys.readouterr().out
    report = json.loads(Path("a.json").read_text())
    assert report["complete"] is False
    assert report["cases"][0]["name"] == "2^3"
    assert Path("softmaxlib-peers.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--dtype", "float32"], "--dtype needs --peers"),
        (["bench", "--shape", "8"], "--shape needs --peers"),
        (["bench", "--library", "numpy"], "--library needs --peers"),
        (["bench", "--function", "softmax"], "--function needs --peers"),
        ([*TINY, "--isa", "scalar"], "--isa does not go with --peers"),
        ([*TINY, "--store", "both"], "--store does not go with --peers"),
        ([*TINY, "--sizes", "8"], "--sizes does not go with --peers"),
        ([*TINY, "--offset", "0"], "--offset does not go with --peers"),
        ([*TINY, "--dtype", "float8"], "invalid choice"),
        ([*TINY, "--library", "cupy"], "--library cupy"),
        ([*TINY, "--threads", "1000"], "may use"),
        ([*TINY, "--shape", "8y8"], "8y8: not a shape"),
        ([*TINY, "--shape", ""], "not a shape"),
        ([*TINY, "--shape", "0x8"], "at least 1"),
        ([*TINY, "--shape", "8x8:2"], "axis 2 of 2 dimensions"),
        ([*TINY, "--shape", "2^50"], "may be used"),
        ([*TINY, "--shape", "2^99999"], "2^99999: an array has at most 32 dimensions and fewer"),
        ([*TINY, "--shape", "2^9999999999999x2"], "fewer than 2^63 elements"),
        ([*TINY, "--shape", "2^32x2^31"], "fewer than 2^63 elements"),
        ([*TINY, "--shape", "x".join("1" * 33)], "at most 32 dimensions"),
        ([*TINY, "--plot", "a.bmp"], ".png or .svg"),
        ([*TINY, "--json", "no/such/a.json"], "cannot write"),
    ],
)
def test_bad_usage(here, capsys, monkeypatch, arguments, message):
    def measure(*args, **kwargs):
        raise AssertionError("measured before complaining")

    monkeypatch.setattr(_bench.Bench, "run", measure)
    monkeypatch.setattr(_peers.Peers, "run", measure)
    assert cli.main(arguments) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("softmaxlib")
    assert message in complaint
    assert not list(here.iterdir())


def test_missing_ml_dtypes(capsys, monkeypatch):
    find_spec = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util,
        "find_spec",
        lambda name: None if name == "ml_dtypes" else find_spec(name),
    )
    assert cli.main([*TINY, "--dtype", "bfloat16", "--no-plot"]) == 2
    assert "this needs ml_dtypes: run `pip install -e '.[bench]'`" in capsys.readouterr().err
    monkeypatch.setattr(_peers, "dtypes", lambda: {"float32": np.dtype(np.float32)})
    peers = _peers.Peers(_peers.Settings(quick=True))
    assert "bfloat16: not timed, it needs ml_dtypes" in peers.notes
    assert {case.dtype.name for case in peers.cases} == {"float32"}


def test_bfloat16_arrays_reach_peers(peer):
    seen = []

    def spy(x, axis):
        seen.append(x.dtype)
        return formula(x, axis)

    peer("spy", spy)
    run("spy", dtypes=("bfloat16",))
    assert set(seen) == {np.dtype(ml_dtypes.bfloat16)}
