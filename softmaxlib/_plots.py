"""The plot of `softmaxlib bench`: time per element against size, a panel per ISA."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from softmaxlib._bench import Row, caches, size_text

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
            x = [row.bytes_per_array for row in line]
            axes.fill_between(
                x,
                [row.ns_per_1000.q1 for row in line],
                [row.ns_per_1000.q3 for row in line],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
            streaming = store == "streaming"
            axes.plot(
                x,
                [row.ns_per_1000.median for row in line],
                color=colour,
                marker=marker,
                markersize=6,
                markerfacecolor="white" if streaming else colour,
                linestyle="--" if streaming else "-",
                label=f"{label} (streaming stores)" if streaming else label,
            )
    limits = {name: [row for row in rows if row.name == name] for name in LIMITS}
    for name, (label, style) in LIMITS.items():
        x = [row.bytes_per_array for row in limits[name]]
        y = [row.ns_per_1000.median for row in limits[name]]
        axes.plot(x, y, color="#666666", linestyle=style, linewidth=1.2, label=label)
    floor = [
        read.ns_per_1000.median + min(copy.ns_per_1000.median for copy in copies)
        for read, *copies in zip(*limits.values(), strict=False)
    ]
    x = [row.bytes_per_array for row in limits["read"]][: len(floor)]
    axes.plot(x, floor, color="black", linewidth=1.2, label="floor: read + faster copy")

    ticks = sorted({row.bytes_per_array for row in rows})
    axes.set_title(isa, pad=16)
    axes.set_xlabel("size of the input; the output is as large again")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([float(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([size_text(tick) for tick in ticks], rotation=60, fontsize=8)
    axes.set_ylim(0, 1.1 * max(row.ns_per_1000.median for row in mine))
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
