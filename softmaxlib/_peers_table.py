"""What `softmaxlib bench --peers` prints."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from softmaxlib._peer_calls import OURS
from softmaxlib._peers import DEFINITIONS, MISSING

Report = Mapping[str, Any]

_WORDS = {"loss": "[bold red]LOSS", "cannot tell": "?"}

LEGEND = (
    "softmaxlib: ns per 1,000 elements, or us per call below 1,000 elements; peers: their time / "
    "ours. In brackets the largest error in ULP. ! faster than softmaxlib; ? the samples do not "
    "tell; ~ does not count; - not timed."
)


def show(console: Console, report: Report) -> None:
    """Print tables that fit the console, and what was won and lost."""
    for dtype, group in itertools.groupby(report["cases"], lambda case: case["dtype"]):
        cases = list(group)
        for i, table in enumerate(_tables(console, cases)):
            more = ", more peers" if i else ""
            console.print(f"[bold]{report['settings']['function']}, {dtype}{more}")
            console.print(table)
            console.print()
    if report["cases"]:
        console.print(LEGEND, style="dim", highlight=False)
    _show_libraries(console, report)
    _show_summary(console, report["summary"])


def _tables(console: Console, cases: Sequence[Report]) -> list[Table]:
    """Spread the peers over as few tables as the width allows."""
    timed = {r["library"] for case in cases for r in case["results"] if r["ns_per_1000"]}
    names = [r["library"] for r in cases[0]["results"] if r["library"] in timed - {OURS}]
    for count in range(1, len(names) + 1):
        size = -(-len(names) // count)
        parts = [names[i : i + size] for i in range(0, len(names), size)]
        tables = [_table(cases, part) for part in parts]
        free = console.options.update(max_width=10_000)
        if all(console.measure(table, options=free).maximum <= console.width for table in tables):
            return tables
    return [_table(cases, [name]) for name in names] or [_table(cases, [])]


def _table(cases: Sequence[Report], peers: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("shape", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in (OURS, *peers):
        table.add_column(name, justify="right", no_wrap=True)
    for one_row, group in itertools.groupby(cases, lambda case: len(case["shape"]) == 1):
        for case in group:
            results = {result["library"]: result for result in case["results"]}
            table.add_row(
                case["name"],
                _WORDS.get(case["outcome"], case["outcome"] or ""),
                _ours(results[OURS], case["elements"]),
                *(_peer(results[name], case["outcomes"].get(name)) for name in peers),
            )
        if one_row:
            table.add_section()
    return table


def _ours(result: Report, elements: int) -> str:
    if result["ns_per_1000"] is None:
        return "-"
    if elements < 1000:
        time = f"{result['us_per_call']:.2f}us"
    else:
        time = f"{result['ns_per_1000']['value']:.0f}"
    return f"{'?' if result['noisy'] else ''}{time} ({_ulp(result['max_ulp'])})"


def _peer(result: Report, outcome: str | None) -> str:
    if result["ratio"] is None:
        return "-"
    text = f"{_ratio(result['ratio'])} ({_ulp(result['max_ulp'])})"
    if outcome is None:
        return f"[dim]~{text}"
    return {"loss": f"[red]!{text}", "cannot tell": f"?{text}"}.get(outcome, text)


def _ratio(ratio: Report) -> str:
    value: float = ratio["value"]
    if value != value:  # no pair of samples was undisturbed
        return ""
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def _ulp(value: float) -> str:
    if value >= 9999.5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}"


def _show_libraries(console: Console, report: Report) -> None:
    versions = report["libraries"]
    there = [f"{name} {version}" for name, version in versions.items() if version != MISSING]
    missing = [name for name, version in versions.items() if version == MISSING]
    console.print(f"Libraries: {', '.join(there)}", highlight=False)
    if missing:
        console.print(f"Not installed: {', '.join(missing)}", highlight=False)
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for case in report["cases"]:
        for result in case["results"]:
            name, status = result["library"], result["status"]
            if status not in ("ok", MISSING):
                kind = status.partition(":")[0]
                reasons.setdefault((name, case["dtype"], kind), []).append(
                    f"{case['name']}: {status}"
                )
    for (name, dtype, _), seen in reasons.items():
        more = f" (and {len(seen) - 1} more)" if len(seen) > 1 else ""
        console.print(f"{name}, {dtype}, {seen[0]}{more}", highlight=False, markup=False)


def _show_summary(console: Console, summary: Report) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False)
    columns = {
        "wins": "wins",
        "ties": "ties",
        "losses": "losses",
        "cannot_tell": "cannot tell",
        "without_peer": "no peer",
    }
    table.add_column("dtype")
    for title in columns.values():
        table.add_column(title, justify="right")
    for dtype, counts in summary["by_dtype"].items():
        table.add_row(dtype, *(str(counts[key]) for key in columns))
    table.add_section()
    table.add_row("all", *(str(summary[key]) for key in columns))
    console.print("\n[bold]Against the best peer of each case")
    console.print(table)
    text = f"{DEFINITIONS['peer']} {DEFINITIONS['outcome']}"
    console.print(text, style="dim", highlight=False)
    losses, untold = summary["losses_list"], summary["cannot_tell_list"]
    console.print(f"\n[bold]Losses: {len(losses) or 'none'}", highlight=False)
    _list(console, "LOSS", losses, "red")
    if untold:
        console.print(f"\n[bold]Cannot tell: {len(untold)}", highlight=False)
        _list(console, "?", untold, "none")


def _list(console: Console, word: str, cases: Sequence[Report], style: str) -> None:
    for case in cases:
        of = case["ratio"]
        ratio = "softmaxlib failed" if of is None else _interval(of)
        text = f"  {word} {case['name']} {case['dtype']}: {case['best_peer']} {ratio}"
        console.print(text, style=style, highlight=False)


def _interval(of: Report) -> str:
    if of["value"] != of["value"]:
        return "no pair of samples was undisturbed"
    return f"{_ratio(of)} ({of['low']:.2f} to {of['high']:.2f}, {of['clean']} pairs)"
