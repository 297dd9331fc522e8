"""The plots of `softmaxlib bench`: time per element against size; ratios beside other libraries."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from softmaxlib._bench import Row, caches, size_text
from softmaxlib._tools.timing import Estimate

# Okabe & Ito's palette: told apart with every kind of colour vision.
STYLES = {
    "three_pass_recompute": ("three-pass, recompute", "#E69F00", "s"),
    "three_pass_reload": ("three-pass, reload", "#D55E00", "^"),
    "two_pass": ("two-pass", "#0072B2", "o"),
    "two_pass_reload": ("two-pass, reload", "#009E73", "D"),
}
LIMITS = {
    "read": ("read pass", ":"),
    "copy": ("copy, plain stores", "--"),
    "streaming_copy": ("copy, streaming stores", "-."),
}
LIBRARIES = {
    "softmaxlib": ("#000000", "o"),
    "torch": ("#D55E00", "s"),
    "onnxruntime": ("#0072B2", "^"),
    "openvino": ("#009E73", "v"),
    "jax": ("#CC79A7", "D"),
    "scipy": ("#E69F00", "P"),
    "numpy": ("#56B4E9", "X"),
    "numexpr": ("#999999", "*"),
}
DTYPES = {
    "float32": ("#0072B2", "o"),
    "float64": ("#D55E00", "s"),
    "float16": ("#009E73", "^"),
    "bfloat16": ("#CC79A7", "D"),
}


def plot(rows: Sequence[Row], title: str, suffix: str) -> bytes:
    """Draw a picture in the format of the suffix (".png" or ".svg")."""
    isas = list(dict.fromkeys(row.isa for row in rows if row.kind == "algorithm"))
    figure = Figure(figsize=(1.5 + 5.2 * len(isas), 5.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, len(isas), squeeze=False)[0]
    for panel, isa in zip(panels, isas, strict=True):
        _panel(panel, rows, isa)
    panels[0].set_ylabel("time per 1,000 elements (ns), lower is better")
    found = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=max(2, 2 * len(isas)),
        fontsize=9,
        frameon=False,
    )
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix.lstrip("."), dpi=150)
    return picture.getvalue()


def _panel(axes: Axes, rows: Sequence[Row], isa: str) -> None:
    mine = [row for row in rows if row.isa == isa and row.kind == "algorithm"]
    for name, (label, colour, marker) in STYLES.items():
        for store in ("plain", "streaming"):
            line = [row for row in mine if (row.name, row.store) == (name, store)]
            if not line:
                continue
            streaming = store == "streaming"
            plot_estimates(
                axes,
                [row.bytes_per_array for row in line],
                [row.ns_per_1000 for row in line],
                color=colour,
                marker=marker,
                markersize=6,
                markerfacecolor="white" if streaming else colour,
                linestyle="--" if streaming else "-",
                label=f"{label} (streaming stores)" if streaming else label,
            )
    limits = {name: [row for row in rows if row.name == name] for name in LIMITS}
    for name, (label, style) in LIMITS.items():
        plot_estimates(
            axes,
            [row.bytes_per_array for row in limits[name]],
            [row.ns_per_1000 for row in limits[name]],
            color="#666666",
            linestyle=style,
            linewidth=1.2,
            label=label,
        )
    floor = []
    for read, *copies in zip(*limits.values(), strict=False):
        copy = min(copies, key=lambda row: row.ns_per_1000.value)
        told = not (read.noisy or copy.noisy)
        floor.append(read.ns_per_1000.value + copy.ns_per_1000.value if told else math.nan)
    x = [row.bytes_per_array for row in limits["read"]][: len(floor)]
    axes.plot(x, floor, color="black", linewidth=1.2, label="floor: read + faster copy")

    ticks = sorted({row.bytes_per_array for row in rows})
    axes.set_title(isa, pad=16)
    axes.set_xlabel("size of the input; the output is as large again")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([float(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([size_text(tick) for tick in ticks], rotation=60, fontsize=8)
    axes.set_ylim(0, 1.1 * max(row.ns_per_1000.value for row in mine))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for level, size in caches().items():
        if ticks[0] <= size / 2 <= ticks[-1]:  # where x and y together fill the cache
            axes.axvline(size / 2, color="#999999", linewidth=0.8, zorder=0)
            axes.annotate(
                f"{level} full",
                (size / 2, 1.01),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=8,
                color="#666666",
            )


def plot_estimates(
    axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], **style: Any
) -> None:
    """Draw times with their intervals; no line from or to a point that is noisy."""
    bars = [
        (
            x,
            e.value,
            e.value - min(max(e.low, 0.0), e.value),
            (e.high if math.isfinite(e.high) else e.value) - e.value,
        )
        for x, e in zip(x, estimates, strict=True)
        if math.isfinite(e.value)
    ]
    if bars:
        at, value, below, above = zip(*bars, strict=True)
        axes.errorbar(
            at, value, (below, above), fmt="none", ecolor=style["color"], elinewidth=1, alpha=0.6
        )
    line = [math.nan if e.noisy else e.value for e in estimates]
    axes.plot(x, line, **style)
    if style.get("marker"):
        dots = style | {"linestyle": "", "alpha": 0.4}
        dots.pop("label", None)
        axes.plot(x, [e.value if e.noisy else math.nan for e in estimates], **dots)


def plot_peers(report: Mapping[str, Any], suffix: str) -> bytes:
    """Draw a report of `_peers`: one row by length, a panel per dtype, and the ratio of all."""
    cases = report["cases"]
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    rows = [dtype for dtype in dtypes if len(_lengths(cases, dtype)) > 1]
    across = min(2, len(rows))
    down = -(-len(rows) // 2)
    shapes = len({case["name"] for case in cases})
    widths = [4.8 * across] * bool(rows) + [6.5]
    figure = Figure(
        figsize=(sum(widths), max(4.6, 4.2 * down, 1.8 + 0.26 * shapes)), layout="constrained"
    )
    settings = report["settings"]
    threads = f"{settings['threads']} thread" + "s" * (settings["threads"] > 1)
    cpu = report["machine"]["library"]["cpu"]
    figure.suptitle(f"{settings['function']}, {threads}: {cpu}", fontsize=11)
    parts = figure.subfigures(1, len(widths), squeeze=False, width_ratios=widths)[0]
    if rows:
        panels = parts[0].subplots(down, across, squeeze=False).flat
        for panel, dtype in zip(panels, rows, strict=False):
            plot_rows_beside_peers(panel, cases, dtype)
        for panel in list(parts[0].axes)[len(rows) :]:
            panel.remove()
        handles = dict(
            pair
            for panel in parts[0].axes
            for pair in zip(*reversed(panel.get_legend_handles_labels()), strict=True)
        )
        parts[0].legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=2 + across,
            frameon=False,
        )
    ratios = parts[-1].subplots()
    plot_ratios(ratios, cases)
    if ratios.get_legend_handles_labels()[0]:
        parts[-1].legend(loc="outside lower center", ncols=3, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix.lstrip("."), dpi=150)
    return picture.getvalue()


def _lengths(cases: Sequence[Mapping[str, Any]], dtype: str) -> list[int]:
    return [c["elements"] for c in cases if c["dtype"] == dtype and len(c["shape"]) == 1]


def plot_rows_beside_peers(axes: Axes, cases: Sequence[Mapping[str, Any]], dtype: str) -> None:
    """Draw the time per element of one row against its length, a line per library."""
    lengths = _lengths(cases, dtype)
    for name, (colour, marker) in LIBRARIES.items():
        line = {
            case["elements"]: Estimate(**result["ns_per_1000"])
            for case in sorted(cases, key=lambda case: case["elements"])
            if case["dtype"] == dtype and len(case["shape"]) == 1
            for result in case["results"]
            if result["library"] == name and result["ns_per_1000"] and result["status"] == "ok"
        }
        if line:
            plot_estimates(
                axes,
                list(line),
                list(line.values()),
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=2.0 if name == "softmaxlib" else 1.0,
                zorder=3 if name == "softmaxlib" else 2,
                label=name,
            )
    axes.set_title(f"one row, {dtype}", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(min(lengths) / 1.5, max(lengths) * 1.5)
    axes.set_xlabel("elements in the row")
    axes.set_ylabel("time per 1,000 elements (ns), lower is better")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def plot_ratios(axes: Axes, cases: Sequence[Mapping[str, Any]]) -> None:
    """Draw the best peer's time over ours, dots on a line per shape.

    Those of losses are filled, those that cannot be told pale.
    """
    names = list(dict.fromkeys(case["name"] for case in cases))
    found = [case for case in cases if case["ratio"] and math.isfinite(case["ratio"]["value"])]
    for i, (dtype, (colour, marker)) in enumerate(DTYPES.items()):
        mine = [case for case in found if case["dtype"] == dtype]
        for outcome in ("win or tie", "loss", "cannot tell"):
            dots = [case for case in mine if case["outcome"] in outcome.split(" or ")]
            if dots:
                axes.scatter(
                    [case["ratio"]["value"] for case in dots],
                    [names.index(case["name"]) + 0.16 * (i - 1.5) for case in dots],
                    s=22,
                    marker=marker,
                    edgecolors=colour,
                    facecolors=colour if outcome == "loss" else "none",
                    alpha=0.3 if outcome == "cannot tell" else 1.0,
                    label=dtype if outcome == "win or tie" else f"{dtype}, {outcome}",
                )
    axes.axvline(1.0, color="black", linewidth=1.2)
    axes.set_title("best peer's time / softmaxlib's: right of 1 softmaxlib is faster", fontsize=10)
    axes.set_xscale("log")
    least = min([0.5, *(case["ratio"]["value"] for case in found)]) / 1.1
    most = max([2.0, *(case["ratio"]["value"] for case in found)]) * 1.1
    axes.set_xlim(least, most)
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
    axes.xaxis.set_major_locator(FixedLocator([step for step in steps if least <= step <= most]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_xlabel("ratio of the times, median over pairs of samples, logarithmic")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
