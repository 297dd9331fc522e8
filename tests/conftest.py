"""Finds the installed package, and says which instruction sets the tests really ran."""

import collections
import functools
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` at the root would import ./softmaxlib, the sources without the compiled module.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
try:
    import softmaxlib as sml
    from softmaxlib import _core, _runtime
except ImportError as error:
    pytest.exit(f"softmaxlib is not installed ({error}): run `pip install -e '.[test]'`", 4)

ISAS = ("avx512", "avx2", "scalar")
_ran: collections.Counter[str] = collections.Counter()


def _counted(function):
    """Count the calls by the ISA that their kernels report, not by what was asked for."""

    @functools.wraps(function)
    def call(*args, **options):
        result = function(*args, **options)
        isa, *_ = _core.last_report()
        _ran[_runtime._ISA_NAMES[isa]] += 1
        return result

    return call


for _name in ("softmax", "log_softmax", "logsumexp", "stablemax", "log_stablemax"):
    setattr(sml, _name, _counted(getattr(sml, _name)))


def pytest_addoption(parser):
    parser.addoption(
        "--require-isa",
        action="append",
        default=[],
        choices=ISAS,
        help="fail where this CPU or build lacks the ISA (repeatable)",
    )


def pytest_configure(config):
    missing = [isa for isa in config.getoption("--require-isa") if isa not in sml.available_isas()]
    if missing:
        raise pytest.UsageError(f"required ISA missing on this machine: {', '.join(missing)}")


def pytest_report_header():
    idle = [isa for isa in _core.isas_compiled() if isa not in sml.available_isas()]
    return [
        f"softmaxlib: {sml.__version__}, {Path(sml.__file__).parent}",
        f"ISAs available: {', '.join(sml.available_isas())}; "
        f"compiled, not runnable here: {', '.join(idle) or 'none'}; "
        f"not compiled: {', '.join(i for i in ISAS if i not in _core.isas_compiled()) or 'none'}",
    ]


# Tests run in several processes (pytest-xdist): each tells the first what ran in it.
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["isas"] = dict(_ran)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _ran.update(getattr(node, "workeroutput", {}).get("isas", {}))


def pytest_terminal_summary(terminalreporter):
    ran = ", ".join(f"{isa} ({_ran[isa]:,} calls)" for isa in ISAS if isa in _ran)
    terminalreporter.write_line(f"ISAs that ran: {ran or 'none'}")
    idle = [isa for isa in ISAS if isa not in _ran]
    if idle:
        terminalreporter.write_line(f"ISAs that did NOT run: {', '.join(idle)}", yellow=True)


@pytest.fixture(scope="session", autouse=True)
def _outside_of_the_sources(tmp_path_factory):
    """Run in a directory where the subprocesses of tests do not find them either."""
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(ROOT)


@pytest.fixture(params=ISAS)
def isa(request):
    """Run the test once per instruction set, and prove that it did."""
    if request.param not in sml.available_isas():
        pytest.skip(f"{request.param} cannot run here (--require-isa makes this a failure)")
    with sml.use_isa(request.param):
        yield request.param
