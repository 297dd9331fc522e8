"""The plots of the report: each a function from rows of report.json to an SVG picture."""

from __future__ import annotations

import io
import itertools
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from softmaxlib._bench import PAPER_SPEEDUP, cache_level, caches, size_text
from softmaxlib._plots import STYLES, plot_estimates
from softmaxlib._report import floors
from softmaxlib._tools.timing import MIN_CLEAN, Estimate

Row = Mapping[str, Any]
Rows = Sequence[Row]
Bar = tuple[str, Estimate, str, bool]  # label, length, colour, hatched

# Okabe & Ito's palette: told apart with every kind of colour vision. Its yellow is left out.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#767676"
SEVERAL = (
    (BLUE, "o", "-"),
    (RED, "s", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "D", ":"),
    (ORANGE, "v", "-"),
    (SKY, "P", "--"),
    (BLACK, "X", "-."),
    (GREY, "<", ":"),
)
DTYPES = dict(zip(("float32", "float64", "float16", "bfloat16"), SEVERAL, strict=False))
HATCHES = dict(zip(DTYPES, ("", "//", "..", "xx"), strict=True))
LIMITS = {
    "read": ("read", ":"),
    "copy": ("copy", "--"),
    "streaming_copy": ("copy, streaming", "-."),
    "triad": ("triad", (0, (6, 1, 1, 1, 1, 1))),
}
PASSES = {
    "max": "max (1)",
    "sum_known": "sum, max known (1)",
    "store_known": "store, max known (2)",
    "sum": "sum (3)",
    "store": "store (4)",
    "write": "write (1, 3)",
    "scale": "scale (2, 4)",
}
WIDTH = 9.6
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 5.5,
    "svg.hashsalt": "softmaxlib",
}
STRIP = 0.055  # height, of the height of the plot
PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # keeps lines out of numbers


def algorithms(sweep: Rows, isa: str) -> bytes:
    """Bandwidth of each algorithm against size, with the machine's limits."""
    figure, (axes,) = _figure(f"Bandwidth of the softmax algorithms, float32, one row, {isa}", 5.4)
    mine = [row for row in sweep if row["isa"] == isa and row["kind"] == "algorithm"]
    for name, (label, colour, marker) in STYLES.items():
        for store in ("plain", "streaming"):
            line = [row for row in mine if (row["name"], row["store"]) == (name, store)]
            streaming = store == "streaming"
            _line(
                axes,
                line,
                "bytes_per_array",
                _bandwidth,
                color=colour,
                marker=marker,
                markerfacecolor="white" if streaming else colour,
                linestyle="--" if streaming else "-",
                label=f"{label}, streaming" if streaming else label,
            )
    for name, (label, style) in LIMITS.items():
        line = [row for row in sweep if row["name"] == name]
        _line(
            axes,
            line,
            "bytes_per_array",
            _bandwidth,
            color=BLACK if name == "triad" else GREY,
            linestyle=style,
            label=f"STREAM: {label}",
        )
    _size_axis(axes, [row["bytes_per_array"] for row in sweep])
    _log_y(axes, "bandwidth (GB/s), higher is better")
    return _svg(figure, legend=3)


def passes(rows: Rows, isa: str) -> bytes:
    """Bandwidth of each pass alone, a panel per level of the memory."""
    sizes = sorted({row["elements"] for row in rows})
    tall = math.ceil(len(sizes) / 2)
    figure, panels = _figure(
        f"Bandwidth of each pass alone, float32, {isa}",
        0.9 + 3.9 * tall,
        (tall, min(2, len(sizes))),
    )
    for panel, elements in zip(panels, sizes, strict=False):
        here = [row for row in rows if row["elements"] == elements]
        bars: list[Bar] = []
        for name, label in PASSES.items():
            for row in here:
                if row["kind"] == "pass" and row["name"] == name and row["isa"] == isa:
                    streaming = row["store"] == "streaming"
                    writes = row["store"] is not None
                    text = f"{label}, streaming" if streaming else label
                    bars.append((text, _bandwidth(row), RED if writes else BLUE, streaming))
        for name, (label, _) in LIMITS.items():
            for row in here:
                if row["kind"] == "limit" and row["name"] == name:
                    bars.append((label, _bandwidth(row), GREY, name == "streaming_copy"))
        _bars(panel, bars)
        level = here[0]["level"]
        panel.set_title(f"{size_text(4 * elements)} per array ({level})", loc="left")
        panel.set_xlabel("bandwidth (GB/s), higher is better")
    for panel in panels[len(sizes) :]:
        panel.set_visible(False)
    return _svg(
        figure,
        legend=4,
        handles=(
            Patch(color=BLUE, label="reads"),
            Patch(color=RED, label="reads and writes"),
            Patch(color=GREY, label="STREAM"),
            Patch(facecolor="white", edgecolor=GREY, hatch="////", label="streaming stores"),
        ),
    )


def speedup(sweep: Rows) -> bytes:
    """Two-pass against the best three-pass over size, and what the paper published."""
    figure, (axes,) = _figure("Two-pass against the best three-pass, float32, one row", 4.8)
    colours = dict(zip(_distinct(sweep, "isa", kind="algorithm"), (BLUE, RED, GREEN), strict=False))
    for isa, colour in colours.items():
        for store in ("plain", "streaming"):
            line = [
                row
                for row in sweep
                if (row["name"], row["isa"], row["store"]) == ("two_pass", isa, store)
                and row["over_best_three_pass"] is not None
            ]
            streaming = store == "streaming"
            _line(
                axes,
                line,
                "bytes_per_array",
                lambda row: ratio_estimate(row["over_best_three_pass"]),
                color=colour,
                marker="os^"[list(colours).index(isa)],
                markerfacecolor="white" if streaming else colour,
                linestyle="--" if streaming else "-",
                label=f"{isa}, {store} stores",
            )
        if isa in PAPER_SPEEDUP:
            axes.axhline(
                PAPER_SPEEDUP[isa],
                color=colour,
                linestyle=":",
                linewidth=1.4,
                label=f"the paper, {isa}, out of cache: {PAPER_SPEEDUP[isa]}",
            )
    axes.axhline(1, color=BLACK, linewidth=0.9)
    _size_axis(axes, [row["bytes_per_array"] for row in sweep])
    axes.set_ylabel("speedup: time of the best three-pass\n/ time of two-pass")
    return _svg(figure, legend=2)


def one_row(rows: Rows) -> bytes:
    """Time per element over the length of one row: all lengths, and the long ones closer."""
    parts = [(first, [row for row in rows if row["length"] >= first]) for first in (1, 1024)]
    parts = [part for part in parts if part[1]]
    title = "softmax of one row, the library's own choice"
    figure, panels = _figure(title, 0.4 + 4.5 * len(parts), (len(parts), 1))
    for panel, (first, kept) in zip(panels, parts, strict=True):
        for dtype, look in DTYPES.items():
            line = _of(kept, kind="function", dtype=dtype)
            _line(
                panel,
                line,
                "length",
                time_estimate,
                label=dtype,
                **_style(look),
            )
        limits = sorted(floors(kept, "one_row").items())
        for name, label, dashes in (
            ("floor", "floor in float32: read + faster copy", "-"),
            ("best_copy", "faster copy in float32", ":"),
        ):
            shown = {n: found[name] for n, found in limits if name in found}
            style = {"color": BLACK, "linestyle": dashes, "linewidth": 1.2, "label": label}
            if shown:
                plot_estimates(panel, list(shown), list(shown.values()), **style)
        _length_axis(panel, [row["length"] for row in kept])
        panel.set_xlabel("length of the row (elements; K = 1,024)")
        _cache_lines(panel, 4)
        _strip(panel, _of(kept, kind="function", dtype="float32"))
        if first == 1:
            panel.set_title("All lengths, logarithmic", loc="left", pad=40)
            _log_y(panel, "ns per 1,000 elements, lower is better")
        else:
            panel.set_title(f"From {first:,} elements on, linear", loc="left", pad=40)
            panel.set_ylim(0, 1.15 * max(row["ns_per_1000"]["value"] for row in kept))
            panel.set_ylabel("ns per 1,000 elements, lower is better")
    return _svg(figure, legend=3)


def batches(rows: Rows, total: int) -> bytes:
    """Time per element over the shapes of a batch with a constant number of elements."""
    figure, (axes,) = _figure(
        f"softmax of a batch of {total:,} elements, by the length of its rows", 5.2
    )
    for dtype, style in DTYPES.items():
        line = _of(rows, kind="function", dtype=dtype)
        _line(
            axes,
            line,
            "length",
            time_estimate,
            label=dtype,
            **_style(style),
        )
    found = floors(rows, "batches").get(total, {})
    _level_lines(axes, found)
    _length_axis(axes, [row["length"] for row in rows if row["kind"] == "function"])
    axes.set_xlabel("length of a row (elements; K = 1,024)")
    _cache_lines(axes, 4)
    _strip(axes, _of(rows, kind="function", dtype="float32"))
    _log_y(axes, "ns per 1,000 elements, lower is better")
    return _svg(figure, legend=3)


def short_rows(rows: Rows) -> bytes:
    """Time per element of short rows, against the copies."""
    functions = [row for row in rows if row["kind"] == "function"]
    total = max(row["elements"] for row in functions)
    figure, (axes,) = _figure(f"softmax of short rows, float32, {total:,} elements in all", 5.0)
    for isa, style in zip(_distinct(functions, "isa"), SEVERAL, strict=False):
        line = _of(functions, isa=isa)
        _line(
            axes,
            line,
            "length",
            time_estimate,
            label=isa,
            **_style(style),
        )
    _level_lines(axes, next(iter(floors(rows, "short_rows").values()), {}))
    _length_axis(axes, [row["length"] for row in functions], every=1)
    axes.set_xlabel("length of a row (elements)")
    _log_y(axes, "ns per 1,000 elements, lower is better")
    return _svg(figure, legend=3)


def strided(rows: Rows, isa: str) -> bytes:
    """Axes that are not the last beside the last one of the same shape, and the copy."""
    timed = _of(rows, kind="function", isa=isa)
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in timed))
    figure, panels = _figure(
        f"softmax along an axis that is not the last, float32, {isa}",
        0.9 + 2.1 * math.ceil(len(shapes) / 2),
        (math.ceil(len(shapes) / 2), min(2, len(shapes))),
    )
    limits = floors(rows, "strided")
    for panel, shape in zip(panels, shapes, strict=False):
        bars: list[Bar] = []
        for row in sorted(_of(timed, shape=list(shape)), key=lambda row: -int(row["axis"])):
            last = row["axis"] == -1
            label, colour = ("last axis", BLUE) if last else (f"axis {row['axis']}", RED)
            bars.append((label, time_estimate(row), colour, False))
        found = limits.get(math.prod(shape), {})
        for name, label in (("floor", "read + faster copy"), ("best_copy", "faster copy")):
            if name in found:
                bars.append((label, found[name], GREY, False))
        _bars(panel, bars)
        size = size_text(4 * math.prod(shape))
        panel.set_title(f"{_shape(shape)}, {size}", loc="left")
        panel.set_xlabel("ns per 1,000 elements, lower is better")
    for panel in panels[len(shapes) :]:
        panel.set_visible(False)
    return _svg(figure)


def threads(rows: Rows) -> bytes:
    """Speedup over one thread."""
    figure, (axes,) = _figure("Speedup by threads, softmax, float32", 5.0)
    counts = sorted({row["threads"] for row in rows})
    axes.plot(counts, counts, color=BLACK, linewidth=1.2, linestyle="--", label="ideal")
    for (name, points), style in zip(scaling(rows).items(), SEVERAL, strict=False):
        _line(
            axes,
            list(points.values()),
            "threads",
            lambda row: ratio_estimate(row["speedup"]),
            label=name,
            **_style(style),
        )
    axes.xaxis.set_major_locator(FixedLocator([float(count) for count in counts]))
    axes.set_xlim(0.9, counts[-1] + 0.1)
    axes.set_ylim(0, 1.05 * max(counts[-1], axes.get_ylim()[1] / 1.05))
    axes.set_xlabel("threads")
    axes.set_ylabel("speedup: time with one thread / time")
    return _svg(figure, legend="right")


def scaling(rows: Rows) -> dict[str, dict[int, Row]]:
    """Return the rows that have a speedup by what is timed and number of threads."""
    found: dict[str, dict[int, Row]] = {}
    known = (row for row in rows if row["speedup"])
    for row in sorted(known, key=lambda row: int(row["threads"])):
        if row["kind"] == "limit":
            name = f"copy, streaming stores, {size_text(row['bytes_per_array'])}"
        elif len(row["shape"]) == 2 and row["shape"][0] == 1:
            name = f"one row of {row['length']:,}"
        else:
            name = _shape(row["shape"])
            name += f" along axis {row['axis']}" if row["axis"] >= 0 else ""
        found.setdefault(name, {})[row["threads"]] = row
    return found


def functions(rows: Rows) -> bytes:
    """Every function and dtype, in cache and out of cache."""
    timed = [row for row in rows if row["kind"] == "function"]
    sizes = sorted({row["elements"] for row in timed})
    figure, panels = _figure(
        "Functions and dtypes, one row", 1.2 + 4.2 * len(sizes), (len(sizes), 1)
    )
    names = _distinct(timed, "name")
    limits = floors(rows, "functions")
    for panel, elements in zip(panels, sizes, strict=True):
        here = _of(timed, elements=elements)
        dtypes = [dtype for dtype in DTYPES if _of(here, dtype=dtype)]
        width = 0.8 / len(dtypes)
        for i, dtype in enumerate(dtypes):
            mine = _of(here, dtype=dtype)
            times = [time_estimate(row) for row in mine]
            shift = (i - (len(dtypes) - 1) / 2) * width
            drawn = panel.bar(
                [names.index(row["name"]) + shift for row in mine],
                [time.value for time in times],
                0.92 * width,
                color=DTYPES[dtype][0],
                hatch=HATCHES[dtype],
                edgecolor="white",
                linewidth=0.5,
                label=dtype,
            )
            texts = [_mark_noisy(drawn[j], time) for j, time in enumerate(times)]
            panel.bar_label(drawn, texts, fontsize=9, padding=3, zorder=3, bbox=PLATE)
        _level_lines(
            panel,
            limits.get(elements, {}),
            ("floor", "floor in float32: read + faster copy", "-"),
            ("read", "read in float32", ":"),
        )
        panel.set_xticks(range(len(names)), names)
        panel.grid(axis="x", visible=False)
        panel.margins(y=0.12)
        panel.set_title(f"{elements:,} elements (float32: {cache_level(elements)})", loc="left")
        panel.set_ylabel("ns per 1,000 elements\nlower is better")
    return _svg(figure, legend=3)


def peers(cases: Rows, dtype: str) -> bytes:
    """Time of every library over ours, a line per shape."""
    kept = [case for case in cases if case["dtype"] == dtype]
    timed = [(case, relative_times(case)) for case in kept]
    names = list(dict.fromkeys(name for _, times in timed for name in times))
    figure, (axes,) = _figure(
        f"Time of other libraries over softmaxlib's, softmax, {dtype}", 1.6 + 0.27 * len(timed)
    )
    for i, name in enumerate(names):
        colour, marker, _ = SEVERAL[i % len(SEVERAL)]
        places = [j for j, (_, times) in enumerate(timed) if name in times]
        axes.plot(
            [timed[j][1][name] for j in places],
            places,
            color=colour,
            marker=marker,
            markerfacecolor="white" if i >= len(SEVERAL) else colour,
            linestyle="none",
            label=name,
        )
    axes.axvline(1, color=BLACK, linewidth=1.2, label="softmaxlib")
    axes.set_yticks(range(len(timed)), [case_text(case) for case in kept])
    for text, case in zip(axes.get_yticklabels(), kept, strict=True):
        if case["outcome"] == "loss":
            text.set(color="#A33F00", fontweight="bold")
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.set_xlabel("time / softmaxlib's time; right of the line softmaxlib is faster")
    return _svg(figure, legend=4)


def relative_times(case: Row) -> dict[str, float]:
    """Return the time of each other library over that of softmaxlib."""
    times = {
        result["library"]: result["ns_per_1000"]["value"]
        for result in case["results"]
        if result.get("ns_per_1000")
    }
    ours = next((time for name, time in times.items() if name.startswith("softmaxlib")), None)
    if ours is None:
        return {}
    return {name: time / ours for name, time in times.items() if not name.startswith("softmaxlib")}


def case_text(case: Row) -> str:
    """Name the shape and axis of a case of peers, and a loss."""
    shape = case["shape"]
    last = case["axis"] in (-1, len(shape) - 1)
    text = _shape(shape) if last else f"{_shape(shape)} axis {case['axis']}"
    return f"LOSS {text}" if case["outcome"] == "loss" else text


# ---- parts of plots ------------------------------------------------------------------------------


def _figure(
    title: str, height: float, panels: tuple[int, int] = (1, 1)
) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08, hspace=0.03)
        figure = Figure(figsize=(WIDTH, height), layout=layout)
        figure.suptitle(title, fontsize=13)
        return figure, list(figure.subplots(*panels, squeeze=False).flat)


def _svg(figure: Figure, legend: int | str = 0, handles: Sequence[Patch] = ()) -> bytes:
    """Save it, with one legend outside of the panels: in so many columns below, or to the right."""
    found = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    } | {handle.get_label(): handle for handle in handles}
    with matplotlib.rc_context(STYLE):
        if legend:
            figure.legend(
                found.values(),
                found.keys(),
                loc="outside right center" if legend == "right" else "outside lower center",
                ncols=legend if isinstance(legend, int) else 1,
                handlelength=3.2,
            )
        picture = io.BytesIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(picture, format="svg", metadata=metadata)
    return picture.getvalue()


def _line(axes: Axes, rows: Rows, along: str, of: Callable[[Row], Estimate], **style: Any) -> None:
    if rows:
        plot_estimates(axes, [row[along] for row in rows], [of(row) for row in rows], **style)


def time_estimate(row: Row) -> Estimate:
    """Return ns per 1,000 elements."""
    return Estimate(**row["ns_per_1000"])


def ratio_estimate(ratio: Mapping[str, Any]) -> Estimate:
    """Return a ratio, which is noisy as a time is: by its interval."""
    return Estimate(ratio["value"], ratio["low"], ratio["high"], MIN_CLEAN, MIN_CLEAN)


def _bandwidth(row: Row) -> Estimate:
    time = time_estimate(row)
    low, high = (time.value / end if end else math.inf for end in (time.high, time.low))
    at = row["gb_per_s"]
    return Estimate(at, at * low, at * high, time.clean, time.taken)


def _style(style: tuple[str, str, str]) -> dict[str, Any]:
    return dict(zip(("color", "marker", "linestyle"), style, strict=True))


def _bars(axes: Axes, bars: Sequence[Bar]) -> None:
    """Draw them from top to bottom, with the value at the end; pale where it is noisy."""
    for i, (_, of, colour, hatched) in enumerate(bars):
        hatch = "///" if hatched else ""
        drawn = axes.barh(
            i, of.value, 0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0
        )
        axes.bar_label(drawn, [_mark_noisy(drawn[0], of)], padding=3, fontsize=9.5)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.14)


def _mark_noisy(bar: Patch, of: Estimate) -> str:
    """Make the bar pale where it is noisy; return its label."""
    bar.set_alpha(0.35 if of.noisy else None)
    return f"{'~' if of.noisy else ''}{of.value:.{0 if of.value >= 10 else 1}f}"


def _level_lines(axes: Axes, limits: Mapping[str, Estimate], *lines: tuple[str, str, str]) -> None:
    """Draw those limits that are known and not noisy."""
    for name, label, style in lines or (
        ("floor", "read + faster copy, float32", "-"),
        ("copy", "copy, plain stores, float32", "--"),
        ("streaming_copy", "copy, streaming stores, float32", ":"),
    ):
        if name in limits and not limits[name].noisy:
            at = limits[name].value
            axes.axhline(at, color=BLACK, linewidth=1.2, linestyle=style, label=label)


def _size_axis(axes: Axes, sizes: Iterable[float]) -> None:
    every = sorted(set(sizes))
    axes.set_xscale("log", base=2)
    octaves = math.log2(every[-1] / every[0])
    factor = 2 if octaves <= 8 else 4 if octaves <= 17 else 8
    ticks = [every[-1]]
    while ticks[-1] / factor >= every[0]:
        ticks.append(ticks[-1] / factor)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_text(size)))
    axes.set_xlabel("size of the input; the output is as large again")
    axes.set_xlim(every[0] / 1.5, every[-1] * 1.5)  # also where no point can be drawn
    _cache_lines(axes, 1)


def _length_axis(axes: Axes, lengths: Sequence[int], every: int | None = None) -> None:
    axes.set_xscale("log", base=2)
    last = max(lengths).bit_length()
    step = every or (2 if last <= 18 else 4 if min(lengths) == 1 else 2)
    first = (min(lengths) - 1).bit_length()
    axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in range(first, last + 1, step)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _count(n)))
    axes.set_xlim(min(lengths) / 1.5, max(lengths) * 1.5)


def _cache_lines(axes: Axes, bytes_per_unit: int) -> None:
    """Mark where x and y together fill a cache."""
    left, right = axes.get_xlim()
    for level, size in caches().items():
        place = size / 2 / bytes_per_unit
        if left < place < right:
            axes.axvline(place, color="#999999", linewidth=0.9, zorder=0)
            axes.annotate(
                f"{level} full",
                (place, 1.01),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=9,
                color="#595959",
            )
    axes.set_xlim(left, right)


def schedules(rows: Rows) -> list[tuple[str, str, list[Row]]]:
    """Return the stretches of lengths that have one schedule: a letter for it, it, the rows."""
    letters: dict[str, str] = {}
    found: list[tuple[str, str, list[Row]]] = []
    for name, members in itertools.groupby(rows, key=lambda row: str(row["schedule"])):
        letter = letters.setdefault(name, string.ascii_uppercase[len(letters) % 26])
        found.append((letter, name, list(members)))
    return found


def _strip(axes: Axes, rows: Rows) -> None:
    """Above the plot, the letters of the schedules of float32 over the lengths they have."""
    left, right = axes.get_xlim()
    across = axes.get_xaxis_transform()
    edge = left
    stretches = schedules(rows)
    for i, (letter, _, members) in enumerate(stretches):
        last = i + 1 == len(stretches)
        after = right if last else stretches[i + 1][2][0]["length"]
        end = right if last else math.sqrt(members[-1]["length"] * after)
        axes.add_patch(
            Rectangle(
                (edge, 1.1),
                end - edge,
                STRIP,
                transform=across,
                facecolor=("#D6E6F2", "#F3F3F3")[i % 2],
                edgecolor="#8A8A8A",
                linewidth=0.5,
                clip_on=False,
            )
        )
        axes.text(
            math.sqrt(edge * end),
            1.1 + STRIP / 2,
            letter,
            transform=across,
            ha="center",
            va="center_baseline",
            fontsize=9,
        )
        edge = end


def _log_y(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_ylabel(label)


def _plain_numbers(axis: Any) -> None:
    low, high = sorted(axis.get_view_interval())
    few = high / low > 300
    axis.set_major_locator(
        LogLocator(10, (1,) if few else (1, 2, 5) if high / low > 12 else "auto")
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _count(n: float) -> str:
    for unit in ("", "K", "M"):
        if n < 1024:
            return f"{n:.4g}{unit}"
        n /= 1024
    return f"{n:.4g}G"


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(str(n) for n in shape)}{',' * (len(shape) == 1)})"


def _of(rows: Rows, **wanted: Any) -> list[Row]:
    """Return those with these values, by the length of their rows."""
    kept = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return sorted(kept, key=lambda row: int(row["length"]))


def _distinct(rows: Rows, key: str, **wanted: Any) -> list[str]:
    return list(
        dict.fromkeys(
            row[key] for row in rows if all(row[name] == value for name, value in wanted.items())
        )
    )
