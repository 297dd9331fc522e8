"""The page of `bench --report`: every section, well-formed, loads nothing; its report.json."""

import base64
import html.parser
import importlib.machinery
import json
import math
import random
import re
import sys
import types
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

import softmaxlib as sml
from softmaxlib import _core, _report, _report_page, _report_plots, cli
from softmaxlib._tools import timing

BEST = _core.isas_available()[0]
TINY = ["--quick", "--rounds", "1", "--max-bytes", "4M", "--isa", BEST, "--threads", "2"]
SECTIONS = [name for name, _, _ in _report_page.SECTIONS]
VOID = {"img", "meta", "br", "link", "hr", "input"}


def spread(value, half=0.0):
    return {"value": value, "low": value - half, "high": value + half, "clean": 12, "taken": 13}


def peers():
    def case(shape, dtype, outcome, times):
        results = [
            {"library": name, "status": "ok", "ns_per_1000": spread(time), "max_ulp": 3.5}
            for name, time in times.items()
        ]
        results.append({"library": "a<b", "status": "has no such dtype", "ns_per_1000": None})
        return {
            "shape": shape,
            "axis": -1,
            "dtype": dtype,
            "elements": 1,
            "results": results,
            "best_peer": "torch",
            "ratio": 1,
            "outcome": outcome,
        }

    return {
        "cases": [
            case([1, 1024], "float32", "win", {"softmaxlib 0.1": 200.0, "torch": 500.0}),
            case([77, 4096], "float32", "loss", {"softmaxlib 0.1": 200.0, "torch": 160.0}),
            case([1, 4], "float64", "tie", {"softmaxlib 0.1": 200.0, "torch": 201.0}),
        ],
        "summary": {"wins": 1, "ties": 1, "losses": 1},
    }


class Peers:
    def __init__(self, settings):
        self.settings = settings

    def run(self, plan, step):
        plan(1.0)
        step("torch", 1.0)

    def report(self):
        return peers() | {"settings": vars(self.settings)}


def small(patch):
    """Samples of microseconds, small arrays, peers that only pretend."""
    module = types.ModuleType("softmaxlib._peers")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    module.Peers, module.Settings = Peers, types.SimpleNamespace
    patch.setitem(sys.modules, module.__name__, module)
    patch.setattr(timing, "SAMPLE_NS", 1e3)
    patch.setattr(_report, "STRIDED", (((4, 3, 64), 1), ((64, 64), 0)))
    patch.setattr(_report, "SCALING", (((1, 1 << 16), -1), ((64, 64), 0)))
    patch.setattr(_report, "thread_counts", lambda: [1, 2])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "not" / "there"
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        assert cli.main(["bench", "--report", str(path), *TINY]) == 0
    return path


@pytest.fixture(scope="module")
def report(directory):
    return json.loads((directory / "report.json").read_text(), object_hook=numbers)


def numbers(found):
    """Read null, in an interval, as what it stands for."""
    if "high" in found:
        for end, value in (("value", math.nan), ("high", math.inf)):
            found[end] = value if found[end] is None else found[end]
    return found


@pytest.fixture
def page(directory):
    return Page((directory / "index.html").read_text())


class Page(html.parser.HTMLParser):
    """Checks nesting while it reads; afterwards knows tags, ids, text by section."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []
        self.ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), (tag, "repeats an attribute")
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        section = next((name for tag, name in self.open if tag == "section"), None)
        self.text[section] = self.text.get(section, "") + data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_is_self_contained(directory, page):
    assert sorted(path.name for path in directory.iterdir()) == ["index.html", "report.json"]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.of("img"))
    assert not re.search(r"url\(|@import", (directory / "index.html").read_text())
    for attributes in page.of("a"):
        target = attributes["href"]
        if target.startswith("#"):
            assert target[1:] in page.ids
        else:
            assert target in ("report.json", "https://arxiv.org/abs/2001.04438")


def test_page_is_accessible(page):
    assert len(page.ids) == len(set(page.ids))
    assert page.of("html")[0]["lang"] == "en"
    assert all(len(image["alt"]) > 40 for image in page.of("img"))
    assert all(head["scope"] in ("col", "row") for head in page.of("th"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))


def test_every_section_has_what_it_is_for(page):
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert not any("Not measured" in text for text in page.text.values())
    assert len(page.of("figure")) == len(page.of("details")) == 11
    assert "wins 1, ties 1, losses 1" in page.text["peers"]
    assert "a<b" in page.text["peers"] and "has no such dtype" in page.text["peers"]
    assert "0.80" in page.text["peers"]  # the lost case: its time over ours
    assert sml.explain((1, 1)).why_kernel in page.text["lengths"]


def test_plots_are_pictures_that_load_nothing(page):
    for image in page.of("img"):
        svg = base64.b64decode(image["src"].split(",")[1])
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg")
        for element in root.iter():
            assert not element.tag.endswith(("image", "script"))
            for name, value in element.items():
                if name.endswith("href"):
                    assert value.startswith("#")


def test_report_json(report):
    assert report["schema"] == _report.SCHEMA
    assert report["complete"] is True
    assert report["settings"]["threads"] == 2
    assert report["peers"]["settings"] == {"quick": True, "threads": 2}
    assert {row["name"] for row in report["sweep"]["rows"]} >= {"two_pass", "triad"}
    assert any("memory may be used" in note for note in report["notes"])
    rows = report["rows"]
    assert {row["section"] for row in rows} == {
        "passes",
        "one_row",
        "batches",
        "short_rows",
        "strided",
        "threads",
        "functions",
    }
    for row in rows:
        times = row["ns_per_1000"]
        assert 0 <= times["low"] <= times["value"] <= times["high"] and times["value"] > 0
        visits, all_ns, disturbed = zip(*row["samples"], strict=True)
        assert times["taken"] == len(visits) and times["clean"] == disturbed.count(None) <= 1
        assert row["noisy"] is True  # one undisturbed sample tells nothing
        assert set(visits) == {0}
        ns = times["value"] * row["elements"] / 1000
        assert 0.999 * min(all_ns) <= ns <= 1.001 * max(all_ns)
        assert 5 * row["bytes_per_array"] <= 4 << 20
        assert (row["gb_per_s"] is None) == (row["schedule"] is not None)
        assert row["kind"] == "function" or row["schedule"] is None
        assert (row["speedup"] is not None) == (row["section"] == "threads")
        for ratio in (*row["over"].values(), *filter(None, [row["speedup"]])):
            assert ratio["low"] <= ratio["high"]
            assert ratio["verdict"] == "cannot tell"
    assert not report["steps"]
    assert set(report["timed"]) == {"cpus", "mhz", "governor", "boost"}
    for name in ("short_rows", "strided", "functions"):
        mine = [row for row in rows if row["section"] == name and row["kind"] == "function"]
        assert all({"streaming_copy", "best_copy", "floor"} == set(row["over"]) for row in mine)
    assert {row["name"] for row in rows if row["kind"] == "pass"} == set(_core.passes)
    functions = [row for row in rows if row["section"] == "functions" and row["kind"] == "function"]
    assert {row["name"] for row in functions} == set(_core.functions)
    assert {row["dtype"] for row in functions} == set(_report.ITEM_BYTES)
    assert {row["threads"] for row in rows if row["section"] == "threads"} == {1, 2}
    for dtype, item in _report.ITEM_BYTES.items():
        mine = [r for r in rows if (r["section"], r["dtype"]) == ("one_row", dtype)]
        lengths = [row["length"] for row in mine if row["kind"] == "function"]
        assert lengths == [1 << i for i in range(20) if 5 * (item << i) <= 4 << 20]


def test_traffic(report):
    for row in report["rows"]:
        if row["kind"] != "function":
            kind = _report.PASS_TRAFFIC if row["kind"] == "pass" else _report.LIMIT_TRAFFIC
            moved = kind[row["name"]] * row["bytes_per_array"]
            seconds = 1e-12 * row["ns_per_1000"]["value"] * row["elements"]
            assert row["gb_per_s"] == pytest.approx(1e-9 * moved / seconds)


def one(length, value, section="one_row", kind="function", half=0.0, noisy=False, **rest):
    rows = 1 if section == "one_row" else (1 << 16) // length
    if noisy:
        half = value
    return {
        "section": section,
        "kind": kind,
        "name": "softmax",
        "dtype": "float32",
        "shape": [rows, length],
        "length": length,
        "elements": rows * length,
        "bytes_per_array": 4 * rows * length,
        "ns_per_1000": spread(value, half),
        "noisy": noisy,
        "schedule": "x",
    } | rest


def floor(length, read, copy, **rest):
    return [
        one(length, value, kind="limit", name=name, **rest)
        for name, value in (("read", read), ("copy", copy), ("streaming_copy", 9 * copy))
    ]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([one(8, 100), one(16, 120)], False),
        ([one(8, 100), one(16, 130)], True),
        ([one(8, 100, half=20), one(16, 130, half=20)], False),
        ([one(8, 100, noisy=True), one(16, 130)], False),
        ([one(8, 100), one(16, 30, noisy=True)], False),
        ([one(8, 100), one(16, 200), *floor(8, 10, 10, noisy=True), *floor(16, 15, 15)], False),
        ([one(8, 100), one(16, 44), *floor(8, 10, 10, noisy=True), *floor(16, 15, 15)], True),
        ([one(8, 100), one(16, 130), *floor(8, 10, 10), *floor(16, 15, 15)], False),
        ([one(8, 100), one(16, 200), *floor(8, 10, 10), *floor(16, 15, 15)], True),
        ([one(8, 100), one(16, 55)], False),
        ([one(8, 100), one(16, 44)], True),
        ([one(8, 100), one(16, 130, dtype="float64")], False),
        ([one(8, 100, "batches"), one(16, 130, "batches")], True),
        ([one(8, 100, "batches"), one(16, 130)], False),
        ([one(4, 100), one(16, 130), one(8, 110)], False),
    ],
)
def test_steps(rows, found):
    steps = list(_report.steps(rows))
    assert bool(steps) == found
    for step in steps:
        assert step["rise"] == step["ns_per_1000_to"] / step["ns_per_1000_from"]


def fabricated(case, times):
    """Return what times a case, with these samples; None: disturbed."""
    run = timing.Case(case.label, lambda repeats: 1.0, group=case.group)
    run.samples = [
        timing.Sample(i, ns or 1e9, None if ns else "time was stolen") for i, ns in enumerate(times)
    ]
    return run


def test_ratios_are_of_pairs():
    function = _report.Case("short_rows", "function", "softmax", BEST, (341, 3))
    parallel = _report.Case("threads", "function", "softmax", BEST, (1, 1024), threads=2)
    limit = _report.Case("short_rows", "limit", "read", BEST, (1024,))
    slow = [4.0 if i % 2 else 2.0 for i in range(24)]  # a machine that is slow every other time
    timed = {
        function: [6 * ns for ns in slow],
        limit: [None, *slow[1:]],
        replace(limit, name="copy"): [3 * ns for ns in slow],
        replace(limit, name="streaming_copy"): [2 * ns for ns in slow],
        parallel: slow,
        replace(parallel, threads=1): [1.01 * ns * (1 + i % 2) for i, ns in enumerate(slow)],
    }
    rows = _report._rows({case: fabricated(case, times) for case, times in timed.items()})
    first, read, _, _, fast, one = rows
    assert first["over"].keys() == {"floor", "best_copy", "streaming_copy"}
    of = first["over"]["floor"]
    assert of["value"] == of["low"] == of["high"] == pytest.approx(2 * 1024 / 1023)
    assert of["verdict"] == "slower"
    assert read["over"] == {} and read["speedup"] is None
    assert (read["ns_per_1000"]["clean"], read["ns_per_1000"]["taken"]) == (23, 24)
    assert read["samples"][0] == (0, 1e9, "time was stolen")
    assert one["speedup"]["value"] == 1
    assert fast["speedup"]["low"] == pytest.approx(1.01)
    assert fast["speedup"]["high"] == pytest.approx(2.02)
    assert not _report_page._is_told(fast["speedup"])
    assert _report_page._told(of) == "<strong>2.00</strong>"


def test_no_line_from_or_to_a_noisy_point():
    _, (axes,) = _report_plots._figure("", 3)
    rows = [one(4, 100), one(8, 110, noisy=True), one(16, 120)]
    _report_plots._line(axes, rows, "length", _report_plots.time_estimate, color="b", marker="o")
    line, dots = (list(drawn.get_ydata()) for drawn in axes.lines)
    assert line[::2] == [100, 120] and math.isnan(line[1])
    assert dots[1] == 110 and math.isnan(dots[0]) and math.isnan(dots[2])


def test_lengths():
    assert _report._lengths(16, odd=False) == [1, 2, 4, 8, 16]
    assert _report._lengths(16, odd=True) == [1, 2, 3, 4, 7, 8, 13, 16]
    every = _report._lengths(1 << 28, odd=True)
    assert every[-1] == 1 << 28
    assert max(b / a for a, b in zip(every, every[1:], strict=False)) <= 2


def test_not_measured_says_so(report):
    page = Page(_report_page.page(report | {"peers": None}))
    assert "bench --peers" in page.text["peers"]
    empty = report | {"rows": [], "steps": [], "peers": None}
    empty["sweep"] = {"complete": False, "rows": [], "headline": []}
    page = Page(_report_page.page(empty))
    assert not page.of("figure")
    assert all("Not measured" in page.text[name] for name in SECTIONS if name != "machine")


@pytest.mark.parametrize("seed", range(4))
def test_any_part_of_the_rows_makes_a_page(report, seed):
    draw = random.Random(seed).sample
    rows = draw(report["rows"], 12)
    sweep = {key: draw(report["sweep"][key], 1) for key in ("rows", "headline")}
    part = report | {"rows": rows, "sweep": sweep, "steps": list(_report.steps(rows))}
    assert Page(_report_page.page(part)).of("figure")


@pytest.mark.parametrize("after", [0, 20])
def test_interrupted(tmp_path, monkeypatch, capsys, after):
    small(monkeypatch)
    calls, take = 0, timing.Engine._take

    def interrupted(self, case, visit):
        nonlocal calls
        calls += self is report.engine
        if calls > after:
            raise KeyboardInterrupt
        take(self, case, visit)

    class Known(_report.Report):
        def __init__(self, settings):
            nonlocal report
            super().__init__(settings)
            report = self

    report = None
    monkeypatch.setattr(_report, "Report", Known)
    monkeypatch.setattr(timing.Engine, "_take", interrupted)
    assert cli.main(["bench", "--report", str(tmp_path), *TINY]) == 130
    assert "measured so far" in capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["complete"] is False and found["peers"] is None
    assert found["sweep"]["complete"] is True
    assert bool(found["rows"]) == bool(after)
    page = Page((tmp_path / "index.html").read_text())
    assert "Incomplete" in page.text[None]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("file", [], "cannot write --report file: File exists"),
        ("file/below", [], "cannot write --report file/below: Not a directory"),
        ("taken", [], "it is a directory"),
        ("new", ["--csv", "a.csv"], "--csv does not go with --report"),
        ("new", ["--no-plot"], "--no-plot does not go with --report"),
        ("new", ["--sizes", "8"], "--sizes does not go with --report"),
        ("new", ["--isa", "sse9"], "sse9"),
    ],
)
def test_bad_usage(tmp_path, monkeypatch, capsys, path, options, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("taken/index.html").mkdir(parents=True)
    monkeypatch.setattr(_report.Report, "run", lambda *args, **kwargs: pytest.fail("measured"))
    assert cli.main(["bench", "--report", path, *options]) == 2
    complaint = capsys.readouterr().err.strip()
    assert message in complaint and len(complaint.splitlines()) == 1
