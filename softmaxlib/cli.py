"""The command line: ``softmaxlib info``, ``bench``, ``verify``, and options for embedding."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

import softmaxlib
from softmaxlib import _core, _embedding, _runtime

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from softmaxlib import _bench, _peers, _verify

INTERRUPTED = 130

_PEERS_OPTIONS = ("dtype", "shape", "library", "function")
_STORES = {None: "", "plain": "plain", "streaming": "stream"}


class UsageError(Exception):
    """What the user asked for cannot be done: one line, exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        if args.show and args.run:
            parser.error("an option that prints where files are does not go with a COMMAND")
        if not args.show and not args.run:
            parser.error("the following arguments are required: COMMAND")
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else 2
    try:
        if args.show:
            print(*(show() for show in args.show), sep="\n")
            return 0
        _check_environment()
        status: int = args.run(args)
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, OSError, MemoryError) as error:
        print(f"softmaxlib: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("softmaxlib: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


def _check_environment() -> None:
    try:
        softmaxlib.info()
        _core.with_kept_memory(1 << 30, lambda: np.empty(0))  # large: reads SOFTMAXLIB_KEPT_BYTES
    except ValueError as error:
        raise UsageError(error) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softmaxlib", description="Softmax on CPUs, fast and the same bits on every ISA."
    )
    parser.add_argument("--version", action="version", version=f"softmaxlib {_core.version()}")
    embedding = parser.add_argument_group(
        "for programs in C and C++", "print what the package carries, instead of a COMMAND"
    )
    for option, show, text in (
        ("--includes", _embedding.compiler_flags, "compiler flags for <softmaxlib/softmaxlib.h>"),
        ("--libs", _embedding.linker_flags, "linker flags for the shared library, with its rpath"),
        ("--cmake-dir", _embedding.get_cmake_dir, "directory for CMake's -Dsoftmaxlib_DIR="),
        ("--pkgconfig-dir", _embedding.get_pkgconfig_dir, "directory for PKG_CONFIG_PATH"),
    ):
        embedding.add_argument(
            option, action="append_const", dest="show", const=show, default=[], help=text
        )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="COMMAND")

    info = commands.add_parser("info", help="what the library found on this machine")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    bench = commands.add_parser(
        "bench",
        help="the paper's comparison on this machine",
        description="Times the softmax algorithms on float32 rows of random normal logits, from L1 "
        "to at least 4x the last-level cache, next to a read pass, two copies and a triad in the "
        "same run.",
        epilog=_definitions(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument(
        "--peers",
        action="store_true",
        help="time softmax beside torch, ONNX Runtime, OpenVINO, JAX, SciPy, NumPy and numexpr "
        "where installed, over many shapes and dtypes, instead of the paper's comparison",
    )
    bench.add_argument(
        "--quick", action="store_true", help="about a minute in total, with --peers some more"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    bench.add_argument("--csv", type=Path, metavar="FILE", help="write the table here")
    bench.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="write the plot here, .png or .svg (default: softmaxlib-bench.png, with --peers "
        "softmaxlib-peers.png)",
    )
    bench.add_argument("--no-plot", action="store_true", help="write no plot")
    bench.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write DIR/index.html instead: a page of plots of all there is to measure, in about "
        "ten minutes (two with --quick); goes with --quick, --isa, --threads, --rounds, "
        "--max-bytes and --seed",
    )
    bench.add_argument(
        "--isa", action="append", metavar="NAME", help="time only this ISA (may be repeated)"
    )
    bench.add_argument(
        "--store",
        choices=("plain", "streaming", "both"),
        help="kind of stores; both: plain ones, and streaming ones too where x and y leave the "
        "caches (default)",
    )
    bench.add_argument("--threads", type=_threads, default=1, metavar="N", help="default: 1")
    bench.add_argument(
        "--sizes", type=_sizes, metavar="N,N,...", help="elements per row, instead of the usual"
    )
    bench.add_argument(
        "--rounds", type=_positive, metavar="N", help="samples per number, instead of timed"
    )
    bench.add_argument(
        "--max-bytes", type=_bytes, metavar="B", help="memory for all arrays, such as 512M or 2G"
    )
    bench.add_argument(
        "--offset",
        type=_offset,
        metavar="B",
        help="bytes past a page at which arrays begin; NumPy's large ones: 16 (default: 0)",
    )
    bench.add_argument("--seed", type=_natural, default=2020, metavar="N", help="of the logits")
    peers = bench.add_argument_group("with --peers")
    peers.add_argument(
        "--dtype",
        action="append",
        choices=("float32", "float64", "float16", "bfloat16"),
        help="only this (may be repeated)",
    )
    peers.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="SHAPE",
        help="only this, such as 8192x512, 512x8x4096:1 (axis 1) or 2^20 (may be repeated)",
    )
    peers.add_argument(
        "--library", action="append", metavar="NAME", help="beside this only (may be repeated)"
    )
    peers.add_argument("--function", choices=("softmax", "log_softmax"), help="default: softmax")
    bench.set_defaults(run=_run_bench, default=bench.get_default)

    verify = commands.add_parser(
        "verify",
        help="check the numerics contract on this machine",
        description="Checks the library's promises on this machine's own ISAs: the error of exp "
        "over all 2^32 floats, the same bits over ISAs, algorithms, threads, alignments and "
        "stores, the accuracy. Exit status 1 and a reproducer where one fails.",
    )
    verify.add_argument("--quick", action="store_true", help="samples instead of all floats")
    verify.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the random rows")
    verify.add_argument(
        "--seconds",
        type=_seconds,
        metavar="S",
        help="for the random rows of 'same bits' (default: 120, with --quick 15)",
    )
    verify.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    verify.set_defaults(run=_run_verify)
    return parser


# ---- info ----------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    found = softmaxlib.info()
    if args.json:
        print(json.dumps(found, indent=2, default=str))
        return 0
    width = max(map(len, found))
    for key, value in found.items():
        print(f"{key:{width}}  {_text(key, value)}")
    return 0


def _text(key: str, value: Any) -> str:
    from softmaxlib._bench import size_text

    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(f'{key} {name}', item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(key, item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool) and "cache" in key:
        return size_text(value)
    return str(value)


# ---- bench ---------------------------------------------------------------------------------------


def _run_bench(args: argparse.Namespace) -> int:
    foreign = ("isa", "store", "sizes", "offset") if args.peers else _PEERS_OPTIONS
    for name in foreign:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} {'does not go with' if args.peers else 'needs'} --peers")
    if args.report is not None:
        if args.peers:
            raise UsageError("--peers does not go with --report, which has them anyway")
        return _run_report(args)
    return _run_peers(args) if args.peers else _run_paper(args)


def _run_paper(args: argparse.Namespace) -> int:
    from softmaxlib import _bench

    console = _console()
    plot = _plot_path(args, "softmaxlib-bench.png")
    outputs = _outputs(args, plot)
    settings = _bench.Settings(
        isas=_isas(args.isa),
        stores=get_args(_bench.Store) if args.store in (None, "both") else (args.store,),
        sizes=args.sizes,
        threads=args.threads,
        quick=args.quick,
        rounds=args.rounds,
        seconds=45.0 if args.quick else 240.0,
        max_bytes=args.max_bytes,
        offset=args.offset or 0,
        seed=args.seed,
    )
    try:
        bench = _bench.Bench(settings)
    except _bench.TooLargeError as error:
        raise UsageError(error) from None
    status = 0
    try:
        with _progress() as progress:
            task = progress.add_task("filling the arrays", total=None)
            bench.run(
                plan=lambda seconds: progress.update(task, total=seconds),
                step=lambda what, done: progress.update(task, description=what, advance=done),
            )
    except KeyboardInterrupt:
        status = INTERRUPTED
        console.print("Interrupted: what follows is what was measured so far.")
    rows = bench.rows()
    report = bench.report()
    _print_rows(console, rows)
    _print_headline(console, _bench.headline(rows))
    _print_winners(console, bench.winners())
    for note in bench.notes:
        console.print(f"Note: {note}.", highlight=False)
    if args.json:
        _write(args.json, _json(report))
    if args.csv:
        _write(args.csv, _csv(_bench.flat(row) for row in report["rows"]))
    if plot is not None and any(row.kind == "algorithm" for row in rows):
        from softmaxlib import _plots

        threads = f"{args.threads} thread" + "s" * (args.threads > 1)
        title = f"softmax, float32, one row, {threads}: {_cpu(report)}"
        _write(plot, _plots.plot(rows, title, plot.suffix.lower()))
    _print_written(console, outputs)
    return status


def _run_peers(args: argparse.Namespace) -> int:
    console = _console()
    from softmaxlib import _bench, _peer_calls, _peers, _peers_table

    plot = _plot_path(args, "softmaxlib-peers.png")
    outputs = _outputs(args, plot)
    if "bfloat16" in (args.dtype or ()):
        _require("ml_dtypes")
    for name in args.library or ():
        if name not in _peer_calls.LIBRARIES:
            known = ", ".join(_peer_calls.LIBRARIES)
            raise UsageError(f"--library {name}: it must be one of {known}")
        if missing := _peer_calls.LIBRARIES[name].missing():
            packages = " ".join(missing)
            raise UsageError(f"--library {name}: not installed; run `pip install {packages}`")
    dtypes = tuple(args.dtype or _peers.DTYPES)
    settings = _peers.Settings(
        quick=args.quick,
        threads=args.threads,
        dtypes=dtypes,
        shapes=args.shape and tuple(args.shape),
        libraries=args.library and tuple(args.library),
        function=args.function or "softmax",
        seconds=(12.0 if args.quick else 100.0) * len(dtypes),
        rounds=args.rounds,
        seed=args.seed,
        max_bytes=args.max_bytes,
    )
    try:
        peers = _peers.Peers(settings)
    except (_bench.TooLargeError, _peers.TooManyThreadsError) as error:
        raise UsageError(error) from None
    status = 0
    try:
        with _progress() as progress:
            task = progress.add_task("", total=None)
            peers.run(
                plan=lambda total: progress.update(task, total=total),
                step=lambda what, done: progress.update(task, description=what, advance=done),
            )
    except KeyboardInterrupt:
        status = INTERRUPTED
        console.print("Interrupted: what follows is what was measured so far.")
    report = peers.report()
    for note in peers.notes:
        console.print(f"Note: {note}.", highlight=False)
    _peers_table.show(console, report)
    if args.json:
        _write(args.json, _json(report))
    if args.csv:
        _write(args.csv, _csv(_peers.flat(report)))
    if plot is not None and report["cases"]:
        from softmaxlib import _plots

        _write(plot, _plots.plot_peers(report, plot.suffix.lower()))
    _print_written(console, outputs)
    return status


def _plot_path(args: argparse.Namespace, default: str) -> Path | None:
    if args.no_plot:
        return None
    _require("matplotlib")
    plot: Path = args.plot or Path(default)
    if plot.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--plot {plot}: the name must end in .png or .svg")
    return plot


def _outputs(args: argparse.Namespace, plot: Path | None) -> list[Path]:
    """Return the files to write, checked."""
    outputs: list[Path] = [path for path in (args.json, args.csv, plot) if path is not None]
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UsageError("--json, --csv and --plot name the same file")
    for path in outputs:
        _check_writable(path)
    return outputs


def _print_written(console: Console, outputs: list[Path]) -> None:
    for path in outputs:
        if path.exists():
            console.print(f"Wrote {path}", soft_wrap=True, highlight=False, markup=False)


def _run_report(args: argparse.Namespace) -> int:
    console = _console()
    _require("matplotlib")
    from softmaxlib import _report, _report_page

    for name in ("json", "csv", "plot", "no_plot", "store", "sizes", "offset"):
        if getattr(args, name) != args.default(name):
            raise UsageError(f"--{name.replace('_', '-')} does not go with --report")
    directory: Path = args.report
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write --report {directory}: {error.strerror}") from None
    paths = [directory / "report.json", directory / "index.html"]
    for path in paths:
        _check_writable(path)
    isas = _isas(args.isa)
    if args.isa is None and len(isas) > 1:
        isas = tuple(isa for isa in isas if isa != "scalar")  # slow, and not what anyone runs
    report = _report.Report(
        _report.Settings(isas, args.threads, args.quick, args.rounds, args.max_bytes, args.seed)
    )
    status = 0
    try:
        with _progress() as progress:
            task = progress.add_task("filling the arrays", total=None)
            report.run(
                plan=lambda seconds: progress.reset(task, total=seconds),
                step=lambda what, done: progress.update(task, description=what, advance=done),
            )
    except KeyboardInterrupt:
        status = INTERRUPTED
        console.print("Interrupted: the report has what was measured so far.")
    found = report.report()
    pages = (_json(found), _report_page.page(found).encode())
    for path, content in zip(paths, pages, strict=True):
        _write(path, content)
        console.print(f"Wrote {path}", soft_wrap=True, highlight=False, markup=False)
    return status


def _print_rows(console: Console, rows: list[_bench.Row]) -> None:
    from rich import box
    from rich.table import Table

    from softmaxlib._bench import size_text

    wide = console.width >= 100
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for title in ("array", "level", "ISA", "algorithm", "stores"):
        table.add_column(title, no_wrap=True)
    for title in ("ns/1k", *(["interval"] if wide else []), "GB/s", "roof", "vs 3p"):
        table.add_column(title, justify="right", no_wrap=True)
    for _, group in itertools.groupby(rows, key=lambda row: row.elements):
        table.add_section()
        for i, row in enumerate(group):
            spread, share, ratio = row.ns_per_1000, row.roofline_share, row.over_best_three_pass
            style = "dim" if row.kind == "limit" else "bold" if row.name == "two_pass" else ""
            table.add_row(
                *((size_text(row.bytes_per_array), row.level) if i == 0 else ("", "")),
                row.isa,
                row.name,
                _STORES[row.store],
                f"{_noise(row.noisy)}{_digits(spread.value)}",
                *([f"{_digits(spread.low)}-{_digits(spread.high)}"] if wide else []),
                _digits(row.gb_per_s),
                "" if share is None or share != share else f"{share:.0%}",
                "" if ratio is None else _ratio(ratio, row.name == row.best_three_pass),
                style=style,
            )
    console.print(table)
    console.print(
        "level: what holds x and y. ns/1k: ns per 1,000 elements, lower quartile, with its 90 % "
        "interval; ~ an interval wider than 10 %. GB/s: moved by the paper's count (4N, 5N, 3N, "
        "4N). roof: (read + faster copy) / time. vs 3p: best three-pass time / time, same ISA and "
        "stores; ? it cannot be told which is faster. More in --help.",
        style="dim",
        highlight=False,
    )


def _noise(noisy: bool) -> str:
    return "~" if noisy else ""


def _ratio(ratio: _bench.Ratio, is_itself: bool) -> str:
    if is_itself:
        return "1.00x"
    if ratio.value != ratio.value:
        return "?"
    return f"{'?' if ratio.verdict == 'cannot tell' else ''}{ratio.value:.2f}x"


def _print_headline(console: Console, found: list[_bench.Comparison]) -> None:
    if not found:
        return
    from rich import box
    from rich.table import Table

    from softmaxlib._bench import PAPER, TIE, size_text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    console.print("\n[bold]Two-pass against the best three-pass with the same stores")
    for title in ("ISA", "stores", "array", "level"):
        table.add_column(title, no_wrap=True)
    for title in ("two-pass", "best 3p", "here", "paper"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("best 3p is", no_wrap=True)
    for c in found:
        speedup = c.speedup
        told = speedup.high - speedup.low <= 2 * TIE * speedup.value
        table.add_row(
            c.isa,
            _STORES[c.store],
            size_text(4 * c.elements),
            c.level,
            _digits(c.two_pass_ns_per_1000),
            _digits(c.best_three_pass_ns_per_1000),
            _gain(speedup, told, console.width >= 100),
            "" if c.paper_speedup is None else f"{c.paper_speedup - 1:+.0%}",
            c.best_three_pass.removeprefix("three_pass_"),
        )
    console.print(table)
    console.print(
        f"Times in ns per 1,000 elements. paper: {PAPER}. ? its interval of 99 % is "
        f"wider than {TIE:.0%} to either side.",
        style="dim",
        highlight=False,
    )


def _gain(speedup: _bench.Ratio, told: bool, wide: bool) -> str:
    if not math.isfinite(speedup.high):
        return "?"
    text = f"{speedup.value - 1:+.0%}"
    if wide:
        text += f" ({speedup.low - 1:+.0%} to {speedup.high - 1:+.0%})"
    return f"[bold]{text}" if told else f"?{text}"


def _print_winners(console: Console, found: list[_bench.Winner]) -> None:
    if not found:
        return
    from softmaxlib._bench import TIE, size_text

    console.print("\n[bold]Who wins in each level of cache")
    for w in found:
        names = " and ".join(w.names) or "cannot tell"
        stores = f", {w.store} stores" if w.level == "DRAM" else ""
        console.print(
            f"  {w.level} ({size_text(4 * w.elements)}), {w.isa}{stores}: {names}", highlight=False
        )
    console.print(
        f"Several: within {TIE:.0%} of each other. cannot tell: the samples do not say who is "
        "faster.",
        style="dim",
        highlight=False,
    )


def _digits(value: float) -> str:
    if not math.isfinite(value):
        return "?"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def _cpu(report: dict[str, Any]) -> str:
    library = report["machine"]["library"]
    return next((str(value) for key, value in library.items() if "cpu" in key.lower()), "this CPU")


def _json(report: Any) -> bytes:
    """Return JSON, with null for what is no number: an interval may have no end."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(report), indent=1, allow_nan=False).encode()


def _csv(rows: Iterable[dict[str, Any]]) -> bytes:
    listed = list(rows)
    text = io.StringIO(newline="")
    columns = dict.fromkeys(key for row in listed for key in row)
    writer = csv.DictWriter(text, list(columns) or ["elements"])
    writer.writeheader()
    writer.writerows(listed)
    return text.getvalue().encode()


# ---- verify --------------------------------------------------------------------------------------


def _run_verify(args: argparse.Namespace) -> int:
    from softmaxlib import _verify

    if args.json:
        _check_writable(args.json)
    seconds = args.seconds or (15.0 if args.quick else 120.0)
    checks = _verify.checks(args.quick, args.seed, seconds)
    results: list[_verify.Result] = []
    status = 0
    width = max(len(name) for name, _ in checks)
    print(f"{'check':{width}}            s  seen")
    try:
        for r in _verify.run(checks, lambda name, part: _show_progress(f"{name} {part:.0%}")):
            results.append(r)
            _show_progress("")
            verdict = "pass" if r.passed else "FAIL"
            print(f"{r.check:{width}}  {verdict}  {r.seconds:5.1f}  {r.detail}", flush=True)
    except KeyboardInterrupt:
        status = INTERRUPTED
        _show_progress("")
        print(f"Interrupted after {len(results)} of {len(checks)} checks.")
    print(f"ISAs: {', '.join(_core.isas_available())}; seed {args.seed}")
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(f"\n{result.check} shows again with:\n{result.reproducer}")
    if args.json:
        report = {"complete": status == 0, "seed": args.seed, **_verify.report(results)}
        _write(args.json, json.dumps(report, indent=1).encode())
    return 1 if failed else status


# ---- arguments -----------------------------------------------------------------------------------


def _definitions() -> str:
    import textwrap

    from softmaxlib._bench import ROOFLINE, TRAFFIC

    return "\n\n".join(textwrap.fill(text, 80) for text in (ROOFLINE, TRAFFIC))


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer") from None


def _positive(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    if value >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text}: must be less than 2^63")
    return value


def _threads(text: str) -> int:
    value = _positive(text)
    if value > _runtime.MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{text}: must be at most {_runtime.MAX_THREADS}")
    return value


def _natural(text: str) -> int:
    value = _integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must not be negative")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a number") from None


def _seconds(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a positive number")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _shape(text: str) -> _peers.Shape:
    from softmaxlib._peers import parse_shape

    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bytes(text: str) -> int:
    scale = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper())
    value = _integer(text) if scale is None else _number(text[:-1]) * 2**scale
    if not 1 << 16 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 64K and less than 2^63")
    return int(value)


def _offset(text: str) -> int:
    value = _integer(text)
    if value % 4 or not 0 <= value < 4096:
        raise argparse.ArgumentTypeError(f"{text}: must be a multiple of 4 below 4096")
    return value


def _isas(wanted: list[str] | None) -> tuple[str, ...]:
    available = _core.isas_available()
    for isa in wanted or ():
        if isa not in available:
            raise UsageError(f"--isa {isa}: this machine has {', '.join(available)}")
    return tuple(isa for isa in available if wanted is None or isa in wanted)


# ---- output --------------------------------------------------------------------------------------


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UsageError(
            f"this needs {module}: run `pip install -e '.[bench]'` in a clone of softmaxlib"
        )


def _show_progress(text: str) -> None:
    """Put this line in place of the last, on the error stream, where that is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _console() -> Console:
    _require("rich")
    from rich.console import Console

    return Console()


@contextmanager
def _progress() -> Iterator[Progress]:
    """On the error stream, so that the tables can be piped; gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description:36}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,  # drawing takes time from what is measured
        disable=not console.is_terminal,
    ) as progress:
        yield progress


def _check_writable(path: Path) -> None:
    """Before minutes of measuring, not after."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(None, "permission denied")
        if path.is_file() or not path.exists():
            _temporary(path).touch()
            _temporary(path).unlink()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def _write(path: Path, content: bytes) -> None:
    """All or nothing: a reader never sees half a file."""
    if path.exists() and not path.is_file():  # a device or a pipe
        path.write_bytes(content)
        return
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path.resolve())
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    path = path.resolve()
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
