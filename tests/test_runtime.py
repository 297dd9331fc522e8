"""Instruction sets, threads, environment variables, fork and spawn, and interruption."""

import asyncio
import contextvars
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import softmaxlib as sml
from softmaxlib import _core, _runtime

LARGE = 1 << 19  # elements: enough for more than one thread


def large_rows(seed=0):
    return np.random.default_rng(seed).standard_normal((64, LARGE // 64), np.float32) * 4


def in_fresh_python(code, cwd, *, timeout=60, preexec=None, **environment):
    """Run code in a new interpreter, away from the sources."""
    return subprocess.run(
        [sys.executable, "-c", "import os, numpy as np, softmaxlib as sml\n" + code],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if not k.startswith("SOFTMAXLIB")} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        preexec_fn=preexec,
        check=False,
    )


def output_of(code, cwd, **options):
    done = in_fresh_python(code, cwd, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


# ---- instruction sets ----------------------------------------------------------------------------


def test_available_isas_are_compiled_and_end_with_scalar():
    available, compiled = sml.available_isas(), _core.isas_compiled()
    assert available[-1] == "scalar"
    assert list(available) == [isa for isa in compiled if isa in available]
    order = ("avx512", "avx2", "scalar")
    assert list(compiled) == [isa for isa in order if isa in compiled]


def test_use_isa_decides_which_kernel_runs(isa):
    x = np.ones((2, 100), np.float32)
    for function in ("softmax", "log_softmax", "stablemax", "log_stablemax", "logsumexp"):
        for dtype in (np.float16, np.float32, np.float64):
            getattr(sml, function)(x.astype(dtype))
            assert sml.last_kernel().startswith(f"{isa}::"), sml.last_kernel()


def test_every_call_says_which_kernel_ran(isa):
    x, target = np.ones((2, 100), np.float32), np.array([1, 2])
    y, log_y = sml.softmax(x), sml.log_softmax(x)
    calls = {
        "softmax_backward": lambda: sml.softmax_backward(x, y),
        "log_softmax_backward": lambda: sml.log_softmax_backward(x, log_y),
        "logsumexp_backward": lambda: sml.logsumexp_backward(x[:, 0], x, sml.logsumexp(x)),
        "stablemax_backward": lambda: sml.stablemax_backward(x, x, y),
        "log_stablemax_backward": lambda: sml.log_stablemax_backward(x, x, log_y),
        "cross_entropy": lambda: sml.cross_entropy(x, target),
        "stablemax_cross_entropy": lambda: sml.cross_entropy(x, target, activation="stablemax"),
        "take_log_softmax": lambda: sml.take_log_softmax(x, target),
        "sample": lambda: sml.sample(x, np.random.default_rng(0)),
        "topk_softmax": lambda: sml.topk_softmax(x, 3),
        "orthogonal_gradient": lambda: sml.orthogonal_gradient(x, y),
    }
    for name, call in calls.items():
        call()
        assert sml.last_kernel() == f"{isa}::{name}_f32"


def test_best_isa_runs_by_default(tmp_path):
    code = "sml.softmax([1.0]); print(sml.last_kernel().split('::')[0], sml.info()['isa'])"
    best = sml.available_isas()[0]
    assert output_of(code, tmp_path) == f"{best} {best}"


def test_use_isa_nests_and_restores():
    best, worst = sml.available_isas()[0], sml.available_isas()[-1]

    def ran():
        sml.softmax([1.0, 2.0])
        first = sml.last_kernel().split("::")[0]
        sml.softmax(np.ones(2))  # plain
        assert sml.last_kernel().split("::")[0] == first
        return first

    outside = ran()
    with sml.use_isa(worst):
        assert ran() == worst == sml.info()["isa"]
        with sml.use_isa(best):
            assert ran() == best
        assert ran() == worst
        with pytest.raises(KeyError), sml.use_isa(best):
            raise KeyError
        assert ran() == worst
    assert ran() == outside


def test_use_isa_stays_in_its_thread():
    with sml.use_isa("scalar"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(sml.info()["isa"]))
        thread.start()
        thread.join()
        inside = contextvars.copy_context().run(lambda: sml.info()["isa"])
    assert inside == "scalar"
    if not getattr(sys.flags, "thread_inherit_context", 0):
        assert seen == [sml.available_isas()[0]]


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", "auto", "avx512 "])
def test_unknown_isa_is_refused_when_named(name):
    with pytest.raises(ValueError, match="unknown; available: .*scalar"):
        sml.use_isa(name)
    with pytest.raises(TypeError, match="str"):
        sml.use_isa(2)


def test_unsupported_isa_is_refused(monkeypatch):
    monkeypatch.setattr(_core, "isas_available", lambda: ("scalar",))
    with pytest.raises(ValueError, match="'avx512' cannot run on this CPU; available: scalar"):
        sml.use_isa("avx512")


def test_last_kernel_before_any_call(tmp_path):
    code = "print(sml.last_kernel()); sml.softmax([]); print(sml.last_kernel())"
    assert output_of(code, tmp_path).split() == ["None", "None"]


def test_environment_chooses_the_isa(isa, tmp_path):
    code = "for _ in range(2): sml.softmax(np.ones(1)); print(sml.last_kernel(), sml.info()['isa'])"
    for said in output_of(code, tmp_path, SOFTMAXLIB_ISA=isa).splitlines():
        assert said.startswith(f"{isa}::softmax_") and said.endswith(f" {isa}")


def test_use_isa_goes_before_the_environment(tmp_path):
    code = "with sml.use_isa('scalar'): sml.softmax(np.ones(1)); print(sml.last_kernel())"
    for value in (sml.available_isas()[0], "nonsense"):
        assert output_of(code, tmp_path, SOFTMAXLIB_ISA=value).startswith("scalar::")


NONSENSE = """
for _ in range(2):  # every time, not only the first
    for call in (lambda: sml.softmax([1.0]), lambda: sml.softmax(np.ones(1)), sml.info):
        try: call()
        except ValueError as error: print(error)
del os.environ[{name!r}]
print(sml.softmax(np.ones(1))[0])
"""


def test_nonsense_in_softmaxlib_isa(tmp_path):
    said = output_of(NONSENSE.format(name="SOFTMAXLIB_ISA"), tmp_path, SOFTMAXLIB_ISA="sse9")
    *errors, last = said.splitlines()
    assert len(errors) == 6 and last == "1.0"
    for error in errors:
        assert "SOFTMAXLIB_ISA" in error and "'sse9'" in error and "scalar" in error


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "1025", " ", " 7", "+7", "1_0", "٧"])
def test_nonsense_in_softmaxlib_num_threads(value, tmp_path):
    said = output_of(
        NONSENSE.format(name="SOFTMAXLIB_NUM_THREADS"), tmp_path, SOFTMAXLIB_NUM_THREADS=value
    )
    *errors, last = said.splitlines()
    assert len(errors) == 6 and last == "1.0"
    for error in errors:
        assert "SOFTMAXLIB_NUM_THREADS" in error and repr(value) in error and "1024" in error


# ---- number of threads ---------------------------------------------------------------------------


@pytest.fixture
def restored_threads():
    before = sml.get_num_threads()
    yield
    sml.set_num_threads(before)


def test_precedence_of_thread_counts(restored_threads, tmp_path):
    sml.set_num_threads(3)
    assert sml.get_num_threads() == 3
    with sml.threads(5):
        assert sml.get_num_threads() == 5 == sml.info()["threads"]
        with sml.threads(np.int64(2)):
            assert sml.get_num_threads() == 2
        sml.set_num_threads(4)
        assert sml.get_num_threads() == 5
    assert sml.get_num_threads() == 4
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(sml.get_num_threads).result() == 4  # the whole process
    code = "print(sml.get_num_threads()); sml.set_num_threads(2); print(sml.get_num_threads())"
    assert output_of(code, tmp_path, SOFTMAXLIB_NUM_THREADS="7").split() == ["7", "2"]


@pytest.mark.parametrize("function", ["set_num_threads", "threads"])
def test_bad_thread_counts(function, restored_threads):
    before = sml.get_num_threads()
    for bad in (0, -1, 1025, 2**70):
        with pytest.raises(ValueError, match="from 1 to 1024"):
            getattr(sml, function)(bad)
    for bad in (True, 1.0, "2", None, [1]):
        with pytest.raises(TypeError, match="number of threads must be an int"):
            getattr(sml, function)(bad)
    assert sml.get_num_threads() == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_default_respects_affinity(tmp_path):
    one = {min(os.sched_getaffinity(0))}
    said = output_of(
        "print(sml.get_num_threads())", tmp_path, preexec=lambda: os.sched_setaffinity(0, one)
    )
    assert said == "1"
    limit = min(len(os.sched_getaffinity(0)), 1024)
    assert 1 <= int(output_of("print(sml.get_num_threads())", tmp_path)) <= limit


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/elsewhere\n", {"cpu.max": "50000 100000\n"}, 0.5),  # inside a container
        ("0::/\n", {"cpu.max": "max 100000\n"}, 1024),
        ("0::/\n", {"cpu.max": "what is this"}, 1024),
        ("0::/\n", {}, 1024),
        ("", {}, 1024),
        (
            "3:cpu,cpuacct:/x\n1:name=systemd:/\n",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            "1:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            1024,
        ),
        ("1:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "1", "cpuset/cpu.cfs_period_us": "1"}, 1024),
    ],
)
def test_cgroup_quota(membership, files, quota, tmp_path):
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert _runtime._cgroup_quota(tmp_path / "membership", tmp_path / "cgroup") == quota


def test_default_respects_the_quota(monkeypatch):
    monkeypatch.setattr(_runtime, "_cgroup_quota", lambda: 0.2)
    assert _runtime._usable_cpus() == 1
    monkeypatch.setattr(_runtime, "_cgroup_quota", lambda: 1.2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert _runtime._usable_cpus() == 2


def tasks_of_last_call():
    return _core.last_report()[3]


def test_large_calls_are_spread_and_small_ones_are_not():
    x = large_rows()
    with sml.threads(1):
        one = sml.softmax(x)
        assert tasks_of_last_call() == 1
    for count in (2, 5, 3):
        with sml.threads(count):
            np.testing.assert_array_equal(sml.softmax(x).view("u4"), one.view("u4"))
            assert tasks_of_last_call() > 1
            sml.softmax(x[0, :256])
            assert tasks_of_last_call() == 1


def test_the_threads_of_the_process_are_those_of_a_call(restored_threads):
    x = large_rows()
    for count in (1, 3, 1):
        sml.set_num_threads(count)
        sml.softmax(x)
        assert (tasks_of_last_call() > 1) == (count > 1)


def test_no_pool_before_it_is_needed(tmp_path):
    code = """
    def count(): return len(os.listdir('/proc/self/task'))
    before = count()
    with sml.threads(2): sml.softmax(np.ones(100))
    assert count() == before
    with sml.threads(2): sml.softmax(np.ones((64, 100_000)))
    assert count() == before + 1, (count(), before)
    with sml.threads(4): sml.softmax(np.ones((64, 100_000)))
    assert count() == before + 3, (count(), before)
    """
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs /proc")
    output_of("\n".join(line[4:] for line in code.splitlines()), tmp_path)


def test_concurrent_calls_from_eight_threads():
    """With pools that grow under them, and different ISAs and counts."""
    arrays = [large_rows(seed) for seed in range(4)]
    with sml.threads(1):
        want = [sml.softmax(x).view("u4") for x in arrays]
    isas = sml.available_isas()

    def work(worker):
        for i in range(6):
            k = (worker + i) % len(arrays)
            with sml.threads(1 + (worker + i) % 5), sml.use_isa(isas[(worker + i) % len(isas)]):
                np.testing.assert_array_equal(sml.softmax(arrays[k]).view("u4"), want[k])
                assert sml.last_kernel().split("::")[0] == isas[(worker + i) % len(isas)]

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, worker) for worker in range(8)]:
            future.result(timeout=60)


def test_the_gil_is_released():
    x = np.zeros((64, 1 << 17), np.float64)
    out = np.empty_like(x)
    elapsed = []
    done = threading.Event()

    def work():
        for _ in range(3):
            start = time.perf_counter()
            with sml.threads(1), sml.use_isa("scalar"):
                sml.softmax(x, out=out)
            elapsed.append(time.perf_counter() - start)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    turns = 0
    while not done.wait(0.001):
        turns += 1
    thread.join()
    # With the GIL held, this thread would wake up only between the calls.
    assert turns > 8, (turns, elapsed)


# ---- use_isa and threads, as statements and as blocks --------------------------------------------

CHOICES = pytest.mark.parametrize(
    ("choose", "values", "current"),
    [
        (sml.threads, (3, 5, 7), sml.get_num_threads),
        (sml.use_isa, sml.available_isas()[::-1], lambda: sml.info()["isa"]),
    ],
    ids=["threads", "use_isa"],
)


@pytest.fixture
def own_context():
    """Give a function that runs another in a context of its own: what it leaves behind is gone."""
    return lambda function: contextvars.Context().run(function)


@CHOICES
def test_a_choice_holds_from_its_call_on(choose, values, current, own_context):
    def body():
        for value in (values[0], values[-1], values[0]):
            choose(value)
            assert current() == value
        return True

    before = current()
    assert own_context(body)
    assert current() == before


def test_a_statement_reaches_the_kernels(own_context):
    def body():
        x = large_rows()
        sml.use_isa("scalar")
        sml.threads(1)
        sml.softmax(x)
        assert sml.last_kernel().startswith("scalar::") and tasks_of_last_call() == 1
        sml.threads(2)
        sml.softmax(x)
        assert tasks_of_last_call() > 1
        sml.softmax(x, temperature=2.0)  # not the compiled module's own path
        assert sml.last_kernel().startswith("scalar::") and tasks_of_last_call() > 1
        return True

    assert own_context(body)


@CHOICES
def test_a_block_restores_what_was_before_the_call(choose, values, current, own_context):
    def body():
        first, last = values[0], values[-1]
        choose(first)
        with choose(last):
            assert current() == last
            choose(first)
            assert current() == first
        assert current() == first
        choose(last)
        choice = choose(first)
        choose(last)
        with choice:
            assert current() == first
        assert current() == last  # before the call of choose(first), not before the block
        with pytest.raises(KeyError), choose(first):
            raise KeyError
        assert current() == last
        return True

    assert own_context(body)


@CHOICES
def test_a_choice_serves_one_block(choose, values, current):
    before, value = current(), values[0]
    choice = choose(value)
    with choice:
        with pytest.raises(RuntimeError, match=r"serves one with block: call it again"), choice:
            pass
        assert current() == value
    assert current() == before
    with pytest.raises(RuntimeError, match=rf"\({value!r}\) serves one with block"), choice:
        pass
    assert current() == before


@CHOICES
def test_a_choice_is_no_decorator(choose, values, current):
    before = current()
    with pytest.raises(TypeError, match=rf"\({values[0]!r}\) is no decorator.* inside of the func"):

        @choose(values[0])
        def function():
            pass

    assert current() == before


@CHOICES
def test_a_bad_choice_changes_nothing(choose, values, current):
    before = current()
    for bad in (0, "sse9", None):
        with pytest.raises((TypeError, ValueError)):
            choose(bad)
    assert current() == before


@CHOICES
def test_choices_of_tasks_are_apart(choose, values, current):
    async def work(value, turns):
        choose(value)
        for _ in range(turns):
            await asyncio.sleep(0)
            assert current() == value
        with choose(values[0]):
            await asyncio.sleep(0)
            assert current() == values[0]
        assert current() == value

    async def main():
        choose(values[-1])
        await asyncio.gather(*(work(value, 3) for value in values))
        assert current() == values[-1]

    before = current()
    asyncio.run(main())
    assert current() == before


@CHOICES
def test_a_choice_in_a_generator_holds_for_its_caller_until_its_block_is_left(
    choose, values, current
):
    def generate():
        with choose(values[0]):
            yield current()

    with choose(values[-1]):
        generator = generate()
        assert next(generator) == values[0] == current()
        generator.close()
        assert current() == values[-1]


@CHOICES
def test_a_block_may_be_left_in_another_context(choose, values, current, own_context):
    """As when the event loop closes an asynchronous generator in a task of its own."""

    async def generate():
        with choose(values[0]):
            yield current()

    async def main():
        choose(values[-1])
        generator = generate()
        assert await anext(generator) == values[0] == current()

        async def close():
            await generator.aclose()
            return current()

        assert await asyncio.create_task(close()) == values[-1]

    asyncio.run(main())


# ---- processes -----------------------------------------------------------------------------------


IN_PROCESSES = """
import multiprocessing, sys, warnings
import numpy as np, softmaxlib as sml
from softmaxlib import _core
warnings.filterwarnings('ignore', '.*fork', DeprecationWarning)

def work(seed):
    x = np.random.default_rng(seed).standard_normal((64, 8192), np.float32)
    with sml.threads(3): y = sml.softmax(x)
    assert _core.last_report()[3] > 1
    return y.tobytes()

if __name__ == '__main__':
    want = work(1)  # the pool runs in the parent
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        assert pool.map(work, [1, 1, 1]) == [want] * 3
    assert work(1) == want
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing_after_first_use(method, tmp_path):
    script = tmp_path / "in_processes.py"
    script.write_text(IN_PROCESSES)
    subprocess.run([sys.executable, script, method], cwd=tmp_path, check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_other_threads_compute(tmp_path):
    """Whatever they hold, the pool's mutex or the pool, the child does not hang on it."""
    code = """
    import threading, warnings, itertools
    warnings.simplefilter('ignore', DeprecationWarning)
    x = np.random.default_rng(0).standard_normal((64, 4096), np.float32)
    want = sml.softmax(x)
    stop = threading.Event()
    def work(counts):
        for n in itertools.cycle(counts):
            if stop.is_set(): return
            with sml.threads(n): sml.softmax(x)
    workers = [threading.Thread(target=work, args=(c,)) for c in ([2, 3], [4, 2])]
    for w in workers: w.start()
    for _ in range(30):
        pid = os.fork()
        if pid == 0:
            with sml.threads(3): same = (sml.softmax(x) == want).all()
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    stop.set()
    for w in workers: w.join()
    """
    output_of("\n".join(line[4:] for line in code.splitlines()), tmp_path)


def test_exit_with_a_pool_and_a_daemon_thread_that_computes(tmp_path):
    code = """
    import threading, time
    x = np.ones((64, 1 << 16), np.float32)
    def work():
        while True:
            with sml.threads(2): sml.softmax(x)
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
    """
    for _ in range(3):
        output_of("\n".join(line[4:] for line in code.splitlines()), tmp_path)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_keyboard_interrupt_is_honoured_at_the_end_of_the_call(tmp_path):
    code = """
    import signal, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    x = np.zeros((256, 1 << 16), np.float64)
    out = np.empty_like(x)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    try:
        with sml.threads(2), sml.use_isa('scalar'):
            while True:
                sml.softmax(x, out=out)
                assert time.perf_counter() - start < 20, 'never interrupted'
    except KeyboardInterrupt:
        print('interrupted')
    print(sml.softmax([1.0])[0])
    """
    said = output_of("\n".join(line[4:] for line in code.splitlines()), tmp_path)
    assert said.split() == ["interrupted", "1.0"]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_too_little_memory_is_an_error_and_passes(tmp_path):
    """Scratch, result and threads in turn; a call without threads runs in the caller's."""
    code = """
    import resource
    x = np.random.default_rng(0).standard_normal((32768, 40), np.float32)
    out, want = np.empty_like(x), sml.log_softmax(x[:16], axis=0)
    given = {'axis': 0, 'algorithm': 'two_pass'}  # by way of a tile
    scratch = sml.explain(x.shape, function='log_softmax', **given).scratch_bytes
    def used():
        with open('/proc/self/statm') as f: return int(f.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    assert scratch > 3 << 19
    resource.setrlimit(resource.RLIMIT_AS, (used() + (3 << 19), limits[1]))
    for options in {'out': out}, {}:
        try: sml.log_softmax(x, **given, **options)
        except MemoryError as error: print(str(error).split(' for ')[0])
    assert (sml.log_softmax(x[:16], axis=0) == want).all()
    with sml.threads(1000): sml.softmax(x, axis=1, out=out)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    want = sml.softmax(x, axis=1)
    assert (out == want).all()
    """
    said = output_of(textwrap.dedent(code), tmp_path)
    scratch, result = said.splitlines()
    assert scratch.startswith("cannot allocate") and scratch.endswith("of scratch memory")
    assert result.startswith("Unable to allocate")


def test_import_in_a_sub_interpreter_is_refused(tmp_path):
    """Before and after that of the main one, which goes on."""
    code = """
    try: import _interpreters as interpreters
    except ImportError: import _xxsubinterpreters as interpreters
    for _ in range(2):
        other = interpreters.create()
        try: failure = interpreters.{run}(other, 'import softmaxlib')
        except Exception as error: failure = error
        print(failure)
        interpreters.destroy(other)
        import numpy as np, softmaxlib as sml
        assert sml.softmax(np.ones(1))[0] == 1
    """
    run = "exec" if sys.version_info >= (3, 13) else "run_string"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code).format(run=run)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    first, second = done.stdout.strip().splitlines()
    assert "ImportError" in first and "ImportError" in second
    if sys.version_info < (3, 12):  # later ones may refuse it themselves
        assert "main interpreter" in first


def test_threads_that_end_while_others_compute(restored_threads):
    x = large_rows()
    sml.set_num_threads(1)
    want = sml.softmax(x)
    wrong = []

    def work(count):
        with sml.threads(count):
            if not np.array_equal(sml.softmax(x), want):
                wrong.append(count)

    running = []
    for i in range(40):
        running.append(threading.Thread(target=work, args=(1 + i % 4,)))
        running[-1].start()
        if len(running) > 3:
            running.pop(0).join()
    for thread in running:
        thread.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_stays_flat_over_many_calls(tmp_path):
    code = """
    import resource
    x = np.random.default_rng(0).standard_normal((4, 16), np.float32)
    half, rows = x.astype(np.float16), np.ones((512, 512), np.float32)
    def resident():
        with open('/proc/self/statm') as f: return int(f.read().split()[1]) * resource.getpagesize()
    def work(rounds):
        for i in range(rounds):
            sml.softmax(x)
            sml.log_softmax(x, bias=half, where=x > 0, temperature=2.0)
            sml.softmax(half, axis=0, out=half)
            sml.logsumexp(x, axis=(0, 1), keepdims=True)
            try: sml.softmax(x, axis=2)
            except ValueError: pass
            if i % 50 == 0:
                with sml.threads(2): sml.softmax(rows)
    work(2000)
    before = resident()
    work(100_000)
    print(resident() - before)
    """
    grown = int(output_of(textwrap.dedent(code), tmp_path, timeout=300))
    assert grown < 1 << 20


# ---- info ----------------------------------------------------------------------------------------


def test_info_is_complete_and_serializable():
    import json

    said = sml.info()
    keys = {"version", "isa", "isas_available", "isas_compiled", "cpu", "caches", "threads"}
    assert keys | {"compiler"} <= set(said)
    assert said["version"] == sml.__version__
    assert said["isa"] in said["isas_available"]
    assert set(said["caches"]) == {"L1d", "L2", "L3"}
    assert all(isinstance(size, int) and size >= 0 for size in said["caches"].values())
    assert said["cpu"] and said["compiler"]
    json.dumps(said)


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert version("softmaxlib") == sml.__version__
