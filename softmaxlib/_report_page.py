"""The page of the report: report.json as one HTML file that loads nothing."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from softmaxlib import _report_plots as plots
from softmaxlib._bench import size_text
from softmaxlib._report import PASS_TRAFFIC, batch_total
from softmaxlib._tools import timing

Report = Mapping[str, Any]
Row = Mapping[str, Any]

PAPER = '<a href="https://arxiv.org/abs/2001.04438">Dukhan &amp; Ablavatski 2020</a>'
NOTHING = (
    "<p>Not measured: the run was interrupted before, or there was too little memory "
    "(see the notes under <a href='#machine'>Machine and method</a>).</p>"
)
STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: #1b1b1b; background: #fff;
  font: 1rem/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 2px solid #0072b2; font-size: 1.35rem; }
h3 { margin-top: 1.6rem; font-size: 1.1rem; }
a { color: #005a8e; }
code { font-size: 0.92em; overflow-wrap: anywhere; }
nav ol { columns: 18rem; }
figure { margin: 1.2rem 0; break-inside: avoid; }
figure img { display: block; width: 100%; min-width: 40rem; height: auto; }
figcaption { margin-top: 0.4rem; }
.scroll { overflow-x: auto; }
.warning { padding: 0.6rem 0.9rem; border-left: 0.4rem solid #d55e00; background: #fdf1e8; }
dt { font-weight: 600; }
dd { margin: 0 0 0.5rem 1.5rem; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; color: #005a8e; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.3rem 0; font-style: italic; }
th, td { padding: 0.15rem 0.7rem 0.15rem 0; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; }
thead th { border-bottom: 2px solid #767676; vertical-align: bottom; }
th { font-weight: 600; }
tbody th { font-weight: normal; }
.n { text-align: right; white-space: nowrap; }
.loss { color: #a33f00; font-weight: bold; }
h2, h3 { break-after: avoid; }
@media print { body { max-width: none; font-size: 10pt; } figure img { min-width: 0; }
  nav { display: none; } .scroll { overflow: visible; } table { font-size: 7.5pt; }
  td { overflow-wrap: anywhere; } }
"""


def page(report: Report) -> str:
    """Return the whole page; sections without numbers say so."""
    sections = [(name, title, write(report) or NOTHING) for name, title, write in SECTIONS]
    contents = "".join(f'<li><a href="#{name}">{title}</a></li>\n' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{i}. {title}</h2>\n{content}</section>\n'
        for i, (name, title, content) in enumerate(sections, 1)
    )
    cpu = escape(str(report["machine"]["library"]["cpu"]))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>softmaxlib on {cpu}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>softmaxlib on {cpu}</h1>
<p>Measured {escape(report["date"])} by <code>softmaxlib bench --report</code>, version \
{escape(str(report["machine"]["library"]["version"]))}. Every number, with its interval \
and all of its samples, is in <a href="report.json">report.json</a> beside this page.</p>
{_warnings(report)}</header>
<nav aria-label="Contents">
<ol>
{contents}</ol>
</nav>
<main>
<section aria-labelledby="glance">
<h2 id="glance">At a glance</h2>
{_glance(report)}</section>
{body}</main>
</body>
</html>
"""


# ---- sections ------------------------------------------------------------------------------------


def _warnings(report: Report) -> str:
    notes = [f"Note: {escape(note)}." for note in report["notes"]]
    if not report["complete"]:
        notes.insert(0, "<strong>Incomplete:</strong> the run was interrupted.")
    return "".join(f'<p class="warning">{note}</p>\n' for note in notes)


def _glance(report: Report) -> str:
    points = []
    for found in report["sweep"]["headline"]:
        paper = found["paper_speedup"]
        beside = f" (the paper, on its CPU: {paper:.2f})" if paper else ""
        points.append(
            f'<a href="#speedup">Two-pass over the best three-pass</a>, {escape(found["isa"])}, '
            f"{found['store']} stores, {size_text(4 * found['elements'])}: "
            f"{_told(found['speedup'])}{beside}."
        )
    rows = _section(report, "one_row")
    long = [row for row in rows if row["dtype"] == "float32" and "floor" in row["over"]]
    if long:
        row = max(long, key=lambda row: int(row["elements"]))
        points.append(
            f'<a href="#lengths">One row of {row["elements"]:,} floats</a>: '
            f"{_value(row)} ns per 1,000 elements; over the floor (read + faster copy): "
            f"{_told(row['over']['floor'])}."
        )
    if rows:
        lines = (*rows, *_section(report, "batches"))
        noisy = [row["noisy"] for row in lines if row["kind"] == "function"]
        rest = f"; cannot tell beside {sum(noisy)} noisy of {len(noisy)} times" * any(noisy)
        points.append(
            f'<a href="#steps">Steps between lengths of rows</a>: '
            f"<strong>{len(report['steps'])}</strong>{rest}."
        )
    scaling = plots.scaling(_section(report, "threads"))
    if scaling:
        best = max(max(points) for points in scaling.values())
        reached = [points[best]["speedup"] for points in scaling.values() if best in points]
        told = [speedup["value"] for speedup in reached if _is_told(speedup)]
        if best > 1:
            texts = [f"{min(told):.2f} to {max(told):.2f} times as fast as one"] if told else []
            if len(told) < len(reached):
                texts.append(f"cannot tell for {len(reached) - len(told)} of {len(reached)}")
            points.append(f'<a href="#threads">{best} threads</a>: {", ".join(texts)}.')
    summary = (report["peers"] or {}).get("summary")
    if summary:
        points.append(f'<a href="#peers">Beside other libraries</a>: {_outcome(summary)}.')
    return f"<ul>\n{''.join(f'<li>{point}</li>{chr(10)}' for point in points)}</ul>\n"


def _machine(report: Report) -> str:
    machine, settings = report["machine"], report["settings"]
    library, timed = machine["library"], report["timed"]
    facts = {
        "CPU": library["cpu"],
        "CPUs": machine["cpus"],
        "Caches": ", ".join(f"{k} {size_text(v)}" for k, v in machine["caches_bytes"].items()),
        "Instruction sets": ", ".join(library["isas_available"]),
        "Measured": ", ".join(settings["isas"]),
        "Threads": f"{settings['threads']} (but for thread scaling)",
        "Compiler": machine["compiler"],
        "System": machine["os"],
        "Python, NumPy": f"{machine['python']}, {machine['numpy']}",
        "Page size": f"{machine['page_bytes']} bytes",
        "Transparent huge pages": machine["transparent_hugepages"],
        "Timed on CPUs": ", ".join(map(str, timed["cpus"])) or "any",
        "MHz at the start": timed["mhz"],
        "Governor": timed["governor"],
        "Boost": timed["boost"],
        "Settings": f"{'quick' if settings['quick'] else 'full'}, seed {settings['seed']}",
        "Took": f"{report['seconds']:.0f} s",
    }
    rows = [(name, str(value)) for name, value in facts.items() if value is not None]
    definitions = report["definitions"]
    times = [row["ns_per_1000"] for row in (*report["rows"], *report["sweep"]["rows"])]
    taken = [time["taken"] for time in times]
    each = f"{min(taken)} to {max(taken)}" if taken else "no"
    disturbed = sum(time["taken"] - time["clean"] for time in times)
    noisy = sum(row["noisy"] for row in (*report["rows"], *report["sweep"]["rows"]))
    return (
        _table("This machine", ("item", "value"), rows)
        + f"""<h3>How it was measured</h3>
<p>Logits are normal random numbers, in one array for each dtype; all results go to one other array;
each begins on a page. The samples of everything are spread over the whole run in random order, so
that what disturbs the machine for a while does not look like a property of one thing. What is
compared is timed side by side: a speedup, and a time over that of a limit, is the median over pairs
of samples. A sample repeats a call for about 1 ms; where input and output fit in a cache, one call
that is not timed goes before.</p>
<p>A sample is <em>disturbed</em> where its thread was off the CPU or was switched away, where the
hypervisor stole time, or, for what depends on the last cache or memory, where other processes were
busy. It is kept in report.json, with the reason, does not count, and is taken again, up to
{timing.RETAKES} times. A time is the lower quartile of the others, with
the interval that holds the true one with 90 % confidence (of all samples, where fewer than
{timing.MIN_CLEAN} were undisturbed); the interval of a ratio has 99 %. Here everything has {each}
samples; {disturbed:,} of {sum(taken):,} were disturbed.</p>
<p>A time is <em>noisy</em>, marked ~, where fewer than {timing.MIN_CLEAN} samples were undisturbed
or its interval is wider than 10 % of it: {noisy:,} of {len(times):,} are. Plots show such a time as
a pale point or bar, draw no line from or to it, and leave out a limit that is noisy; nothing is
concluded from it. A ratio marked ? has an interval that does not tell which of the two is
faster. Thin bars in plots of lines are the intervals.</p>
<dl>
<dt>ns per 1,000 elements</dt>
<dd>Time of a call over elements of its input, times 1,000.</dd>
<dt>GB/s</dt>
<dd>{escape(definitions["traffic"])}</dd>
<dt>STREAM</dt>
<dd>Reading, copying and triad over the same arrays in the same run, with the machine's best
instruction set: what memory gives to code that computes nothing or next to nothing.</dd>
<dt>floor</dt>
<dd>{escape(definitions["roofline"])}</dd>
<dt>full</dt>
<dd>L1, L2 or L3 <em>full</em> marks where input and output, of float32, together fill it; under the
length of a row, those of one row.</dd>
</dl>
"""
    )


def _algorithms(report: Report) -> str:
    sweep = report["sweep"]["rows"]
    caption = (
        "Bandwidth by the paper's tally of what each algorithm moves (three-pass recompute 4N, "
        "reload 5N, two-pass 3N, two-pass reload 4N), so a higher line is not a faster softmax: "
        "the speedup below compares times. Streaming stores are timed where input and output leave "
        "the caches."
    )
    parts: list[str] = []
    for isa in _isas(sweep, "algorithm"):
        shown = [row for row in sweep if row["isa"] == isa or row["kind"] == "limit"]
        table = _table(
            f"Bandwidth and time, {isa}",
            ("array", "level", "what", "stores", "GB/s", "ns per 1,000", "of roofline"),
            (
                (
                    size_text(row["bytes_per_array"]),
                    row["level"],
                    row["name"],
                    row["store"] or "",
                    _number(row["gb_per_s"]),
                    _spread(row),
                    _share(row["roofline_share"]),
                )
                for row in shown
            ),
        )
        parts.append(
            _figure(
                plots.algorithms(sweep, isa),
                f"Lines of bandwidth in GB/s against array size for the softmax algorithms on "
                f"{isa}, beside read, copy and triad.",
                f"The same on {isa}." if parts else caption,
                table,
            )
        )
    return _intro(
        parts,
        f"The comparison of {PAPER}: each algorithm on one float32 row, from L1 to memory. "
        "<code>two_pass_reload</code> is ours: it stores exponentials while it sums, then scales.",
    )


def _passes(report: Report) -> str:
    rows = _section(report, "passes")
    caption = (
        "Numbers in parentheses are the algorithms that a pass belongs to: 1 three-pass recompute "
        "(maximum, sum, write), 2 three-pass reload (maximum, store, scale), 3 two-pass (sum, "
        "write), 4 two-pass reload (store, scale). Sum and store of 1 and 2 know the maximum; "
        "those of 3 and 4 find their reference on the way. A pass that reaches STREAM read (if it "
        "reads) or copy (if it writes) is bound by memory, else by arithmetic."
    )
    parts: list[str] = []
    for isa in _isas(rows, "pass"):
        shown = [row for row in rows if row["isa"] == isa or row["kind"] == "limit"]
        table = _table(
            f"Each pass alone, {isa}",
            ("array", "level", "pass", "stores", "moves", "GB/s", "ns per 1,000"),
            (
                (
                    size_text(row["bytes_per_array"]),
                    row["level"],
                    row["name"] if row["kind"] == "pass" else f"STREAM {row['name']}",
                    row["store"] or "",
                    f"{PASS_TRAFFIC[row['name']]}N" if row["kind"] == "pass" else "",
                    _number(row["gb_per_s"]),
                    _spread(row),
                )
                for row in shown
            ),
        )
        parts.append(
            _figure(
                plots.passes(shown, isa),
                f"Bars of bandwidth in GB/s of each pass alone on {isa}, for arrays in each level "
                "of the memory, beside read, copy and triad.",
                f"The same on {isa}." if parts else caption,
                table,
            )
        )
    return _intro(parts, f"Every pass of the algorithms by itself, as in {PAPER}.")


def _speedup(report: Report) -> str:
    sweep = report["sweep"]["rows"]
    shown = [row for row in sweep if row["name"] == "two_pass" and row["over_best_three_pass"]]
    if not shown:
        return ""
    table = _table(
        "Two-pass over the best three-pass",
        ("array", "level", "ISA", "stores", "speedup"),
        (
            (
                size_text(row["bytes_per_array"]),
                row["level"],
                row["isa"],
                row["store"],
                _ratio(row["over_best_three_pass"]),
            )
            for row in shown
        ),
    )
    return _figure(
        plots.speedup(sweep),
        "Lines of the speedup of two-pass over the best three-pass against array size, with the "
        "paper's out-of-cache speedups of 1.28 for AVX-512 and 1.18 for AVX2 as reference lines.",
        "Above 1 the two-pass algorithm is faster than the best three-pass with the same "
        f"instruction set and the same kind of stores. Dotted: what {PAPER} published for arrays "
        "out of cache on Skylake-X. Two-pass trades a pass over memory for a second exponential "
        "per element, so it is out of cache that it should win.",
        table,
    )


def _lengths(report: Report) -> str:
    rows = _section(report, "one_row")
    timed = [row for row in rows if row["kind"] == "function"]
    parts = []
    if timed:
        parts.append(
            _figure(
                plots.one_row(rows),
                "Lines of time per 1,000 elements against the length of one row, for four dtypes, "
                "with the float32 floor; once for all lengths, once for those from 1,024 on.",
                "One row with what the library itself chooses. Left of some hundred elements the "
                "fixed cost of a call rules. " + _key(timed),
                _shape_table("One row", timed),
            )
        )
    for total, members in _batch_totals(_section(report, "batches")):
        timed = [row for row in members if row["kind"] == "function"]
        parts.append(
            _figure(
                plots.batches(members, total),
                f"Lines of time per 1,000 elements of batches of {total:,} elements against the "
                "length of their rows, for four dtypes, with copies of as many floats.",
                f"{total:,} elements as rows of 1 up to one row of all: the work is the same, the "
                "shape is not. " + _key(timed),
                _shape_table(f"Batches of {total:,}", timed),
            )
        )
    if not parts:
        return ""
    return _intro(
        [*parts, _steps(report)],
        "Time per element over the lengths of rows, across which kernels, stores and threads "
        "change over. A cliff shows as a jump that memory does not explain; those that the numbers "
        "have are listed below as steps.",
    )


def _steps(report: Report) -> str:
    steps = report["steps"]
    definition = escape(report["definitions"]["steps"])
    head = f'<h3 id="steps">Steps: {len(steps)}</h3>\n<p>{definition}</p>\n'
    if not steps:
        return head
    return head + _table(
        "Steps: ns per 1,000 elements before and after; rise = after / before, of the floor too; "
        "time of a longer row / time of a shorter one",
        (
            "from",
            "to",
            "dtype",
            "before",
            "after",
            "rise",
            "floor's rise",
            "row / row",
            "schedule before",
            "schedule after",
        ),
        (
            (
                _shape(step["from"]),
                _shape(step["to"]),
                step["dtype"],
                _number(step["ns_per_1000_from"]),
                _number(step["ns_per_1000_to"]),
                f"{step['rise']:.2f}",
                "?" if step["rise_of_floor"] is None else f"{step['rise_of_floor']:.2f}",
                f"{step['time_of_a_row']:.2f}",
                step["schedule_from"] or "",
                "same" if step["schedule_to"] == step["schedule_from"] else step["schedule_to"],
            )
            for step in steps
        ),
    )


def _short_rows(report: Report) -> str:
    rows = _section(report, "short_rows")
    timed = [row for row in rows if row["kind"] == "function"]
    parts = []
    if timed:
        table = _table(
            "Short rows",
            ("shape", "ISA", "ns per 1,000", "of streaming copy", "schedule"),
            (
                (
                    _shape(row["shape"]),
                    row["isa"],
                    _spread(row),
                    _ratio(row["over"].get("streaming_copy")),
                    row["schedule"] or "",
                )
                for row in timed
            ),
        )
        parts.append(
            _figure(
                plots.short_rows(rows),
                "Lines of time per 1,000 elements of rows of 1 to 1,024 floats, beside copies of "
                "as many floats.",
                "Rows so short that they stay in registers or in L1 between their passes: memory "
                "sees the input read once and the output written once, so the copy is the floor.",
                table,
            )
        )
    strided = _section(report, "strided")
    isas = _isas(strided, "function")
    caption = (
        "The same array along the named axis and along its last one. Where the elements of some "
        "rows side by side fit in registers or cache, one copy is the floor; where a row must be "
        "read twice, read + copy is."
    )
    for isa in isas:
        timed = [row for row in strided if row["isa"] == isa and row["kind"] == "function"]
        table = _table(
            f"Axes, {isa}",
            ("shape", "axis", "ns per 1,000", "of the faster copy", "of read + copy", "schedule"),
            (
                (
                    _shape(row["shape"]),
                    str(row["axis"]),
                    _spread(row),
                    *(_ratio(row["over"].get(name)) for name in ("best_copy", "floor")),
                    row["schedule"] or "",
                )
                for row in timed
            ),
        )
        parts.append(
            _figure(
                plots.strided(strided, isa),
                f"Bars of time per 1,000 elements along an axis that is not the last on {isa}, "
                "beside the last axis of the same shape and a copy.",
                f"The same on {isa}." if isa != isas[0] else caption,
                table,
            )
        )
    return _intro(parts, "Rows of a few elements, and axes whose elements lie apart in memory.")


def _threads(report: Report) -> str:
    rows = _section(report, "threads")
    if not rows:
        return (
            "<p>Not measured: calls have one thread here, the run was interrupted before, or there "
            "was too little memory.</p>\n"
        )
    scaling = plots.scaling(rows)
    table = _table(
        "Thread scaling",
        ("what", "threads", "speedup", "ns per 1,000"),
        (
            (name, str(threads), "1" if threads == 1 else _ratio(row["speedup"]), _spread(row))
            for name, points in scaling.items()
            for threads, row in points.items()
        ),
    )
    return _figure(
        plots.threads(rows),
        "Lines of the speedup over one thread against the number of threads, for single rows, "
        "batches, strided axes and a copy, beside the ideal.",
        "From one thread to as many as a call would use. The copy is what the memory itself gives "
        "to more threads: work out of cache that scales like it is bound by memory, not by how it "
        "is shared out. Small calls stay on one thread by design.",
        table,
    )


def _functions(report: Report) -> str:
    rows = _section(report, "functions")
    timed = [row for row in rows if row["kind"] == "function"]
    if not timed:
        return ""
    table = _table(
        "Functions and dtypes",
        ("function", "dtype", "elements", "level", "ns per 1,000", "of read + copy", "schedule"),
        (
            (
                row["name"],
                row["dtype"],
                f"{row['elements']:,}",
                row["level"],
                _spread(row),
                _ratio(row["over"].get("floor")),
                row["schedule"] or "",
            )
            for row in timed
        ),
    )
    return _figure(
        plots.functions(rows),
        "Bars of time per 1,000 elements of softmax, log_softmax, logsumexp, stablemax and "
        "log_stablemax in four dtypes, in cache and out of cache.",
        "All functions on one row. logsumexp writes nothing, so a read of its input is its floor; "
        "for the others it is a read and a copy. float64 moves twice the bytes of float32, the "
        "halves half of them: the table sets each beside the floor of its own bytes.",
        table,
    )


def _peers(report: Report) -> str:
    found = report["peers"]
    cases = (found or {}).get("cases")
    if not found or not cases:
        return (
            "<p>Not measured here. <code>softmaxlib bench --peers</code> times softmaxlib beside "
            "torch, ONNX Runtime, OpenVINO, JAX, SciPy, NumPy and numexpr, those of them that are "
            "installed.</p>\n"
        )
    parts = [f"<p>{_outcome(found['summary'])}.</p>\n"]
    losses = [case for case in cases if case["outcome"] == "loss"]
    if losses:
        parts.append(_losses(losses))
    for dtype in dict.fromkeys(case["dtype"] for case in cases):
        mine = [case for case in cases if case["dtype"] == dtype]
        table = _peer_table(dtype, mine)
        if not any(plots.relative_times(case) for case in mine):
            parts.append(table)
            continue
        parts.append(
            _figure(
                plots.peers(cases, dtype),
                f"Points of the time of each library over softmaxlib's, by shape, for {dtype}.",
                "Right of the line softmaxlib is faster, left of it slower. Same arrays, same "
                "threads, calls interleaved. Lost shapes are marked LOSS.",
                table,
            )
        )
    return "".join(parts)


def _losses(cases: Iterable[Row]) -> str:
    beaten = []
    for case in cases:
        times = plots.relative_times(case)
        best = min(times, key=lambda name: times[name], default="")
        ratio = f"{times[best]:.2f}" if best else ""
        beaten.append((_shape(case["shape"]), str(case["axis"]), case["dtype"], best, ratio))
    columns = ("shape", "axis", "dtype", "best library", "its time / softmaxlib's")
    return _table("Losses", columns, beaten)


def _peer_table(caption: str, cases: Sequence[Row]) -> str:
    libraries = list(dict.fromkeys(r["library"] for case in cases for r in case["results"]))

    def cell(case: Row, library: str) -> str:
        found = [result for result in case["results"] if result["library"] == library]
        if not found:
            return ""
        spread, error = (found[0].get(key) for key in ("ns_per_1000", "max_ulp"))
        if not spread:
            return str(found[0]["status"])
        mark = "~" if found[0].get("noisy") else ""
        return f"{mark}{_number(spread['value'])}" + (
            "" if error is None else f" ({_number(error)} ULP)"
        )

    return _table(
        f"{caption}: ns per 1,000 elements, with the largest error",
        ("shape", "axis", *libraries, "outcome"),
        (
            (
                _shape(case["shape"]),
                str(case["axis"]),
                *(cell(case, library) for library in libraries),
                case["outcome"] or "",
            )
            for case in cases
        ),
    )


SECTIONS: tuple[tuple[str, str, Callable[[Report], str]], ...] = (
    ("machine", "Machine and method", _machine),
    ("algorithms", "Bandwidth against size", _algorithms),
    ("passes", "Each pass alone", _passes),
    ("speedup", "Two-pass against three-pass", _speedup),
    ("lengths", "Row lengths and batch shapes", _lengths),
    ("shapes", "Short rows and strided axes", _short_rows),
    ("threads", "Thread scaling", _threads),
    ("functions", "Functions and dtypes", _functions),
    ("peers", "Beside other libraries", _peers),
)


# ---- parts of the page ---------------------------------------------------------------------------


def _intro(parts: Sequence[str], text: str) -> str:
    return f"<p>{text}</p>\n{''.join(parts)}" if parts else ""


def _figure(svg: bytes, alt: str, caption: str, table: str) -> str:
    data = base64.b64encode(svg).decode("ascii")
    return f"""<figure>
<div class="scroll" tabindex="0" role="group" aria-label="plot, scrolls sideways">
<img alt="{escape(alt)} The numbers are in the table below." src="data:image/svg+xml;base64,{data}">
</div>
<figcaption>{caption}</figcaption>
</figure>
<details>
<summary>The numbers</summary>
{table}</details>
"""


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    listed = [[escape(str(cell)) for cell in row] for row in rows]
    numeric = [
        all(row[i].lstrip("~?")[:1].isdigit() or row[i] in ("", "?") for row in listed)
        for i in range(len(columns))
    ]

    def cell(tag: str, i: int, text: str) -> str:
        return f"<{tag}{' class=n' if numeric[i] else ''}>{text}</{tag.split()[0]}>"

    head = "".join(cell("th scope=col", i, escape(column)) for i, column in enumerate(columns))
    body = "".join(
        "<tr>"
        + "".join(cell("td" if i else "th scope=row", i, text) for i, text in enumerate(row))
        + "</tr>\n"
        for row in listed
    )
    name = escape(caption)
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="table: {name}">
<table>
<caption>{name}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table>
</div>
"""


def _shape_table(caption: str, timed: Sequence[Row]) -> str:
    reasons = any(row["reason"] for row in timed)
    return _table(
        caption,
        ("shape", "dtype", "level", "ns per 1,000", "of read + copy", "schedule")
        + ("why",) * reasons,
        (
            (
                _shape(row["shape"]),
                row["dtype"],
                row["level"],
                _spread(row),
                _ratio(row["over"].get("floor")),
                row["schedule"] or "",
                *([row["reason"] or ""] * reasons),
            )
            for row in timed
        ),
    )


def _key(timed: Sequence[Row]) -> str:
    """Say what the letters of the strip above a plot stand for."""
    floats = sorted(
        (row for row in timed if row["dtype"] == "float32"), key=lambda row: int(row["length"])
    )
    stretches = plots.schedules(floats)
    texts: dict[str, str] = {}
    for letter, name, members in stretches:
        lengths = dict.fromkeys(f"{members[i]['length']:,}" for i in (0, -1))
        ends = " to ".join(lengths)
        text = f"<strong>{letter}</strong> <code>{escape(name)}</code> ({ends}"
        texts[letter] = f"{texts[letter]}, {ends}" if letter in texts else text
    listed = "; ".join(f"{text})" for text in texts.values())
    return f"The strip above tells what runs for float32: {listed}." if listed else ""


def _batch_totals(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    """Group batches, which may fall short of their total by a part of a row, and their copies."""
    timed = [row for row in rows if row["kind"] == "function"]
    found = []
    for total, members in itertools.groupby(sorted(timed, key=batch_total), key=batch_total):
        kept = list(members)
        sizes = {row["bytes_per_array"] // 4 for row in kept if row["elements"] == total}
        copies = [row for row in rows if row["kind"] == "limit" and row["elements"] in sizes]
        found.append((total, [*kept, *copies]))
    return found


def _outcome(summary: Mapping[str, Any]) -> str:
    shown = ("wins", "ties", "losses")
    texts = {
        name: f"{name.replace('_', ' ')} {count}"
        for name, count in summary.items()
        if name in shown or (count and isinstance(count, int))
    }
    if summary["losses"]:
        texts["losses"] = f'<span class="loss">{texts["losses"]}</span>'
    return ", ".join(texts.values())


def _section(report: Report, name: str) -> list[Row]:
    return [row for row in report["rows"] if row["section"] == name]


def _isas(rows: Iterable[Row], kind: str) -> list[str]:
    return list(dict.fromkeys(row["isa"] for row in rows if row["kind"] == kind))


def _shape(shape: Sequence[int]) -> str:
    return f"{' × '.join(f'{n:,}' for n in shape)}"


def _value(row: Row) -> str:
    return f"{'~' if row['noisy'] else ''}{_number(row['ns_per_1000']['value'])}"


def _spread(row: Row) -> str:
    low, high = (_number(row["ns_per_1000"][end]) for end in ("low", "high"))
    return f"{_value(row)} ({low} to {high})"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}" if math.isfinite(share) else "?"


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    """Return a cell, with a mark where the interval does not tell which of the two is faster."""
    if ratio is None or math.isnan(ratio["value"]):
        return "" if ratio is None else "?"
    return f"{'?' if ratio['verdict'] == 'cannot tell' else ''}{ratio['value']:.2f}"


def _is_told(ratio: Mapping[str, Any]) -> bool:
    return not plots.ratio_estimate(ratio).noisy


def _told(ratio: Mapping[str, Any]) -> str:
    """Return a ratio as a conclusion, which may be that there is none."""
    return f"<strong>{ratio['value']:.2f}</strong>" if _is_told(ratio) else "cannot tell"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "?"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
