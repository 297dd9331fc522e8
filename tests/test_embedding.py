"""The header, libraries, CMake and pkg-config files that the package carries."""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import softmaxlib as sml
from softmaxlib import _core, cli

TESTS = Path(__file__).resolve().parent
C11 = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", str(TESTS / "c" / "smoke.c")]


def tool(*names):
    """Return the path of the first of these programs that there is."""
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip(f"no {' or '.join(names)} on this machine")


def run(*command, **environment):
    ran = subprocess.run(
        list(map(str, command)),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def printed(*options):
    return run(sys.executable, "-m", "softmaxlib", *options)


def declared():
    """Return the names of the header's functions."""
    header = Path(sml.get_include(), "softmaxlib", "softmaxlib.h").read_text()
    names = re.findall(r"SOFTMAXLIB_API [^(;]*?(softmaxlib_\w+)\(", header)
    assert len(names) >= 28
    return names


def test_documented_code_compiles(tmp_path):
    text = (TESTS.parent / "docs" / "embedding.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```c\n")[1:]]
    assert len(blocks) >= 4
    source = tmp_path / "documented.c"
    source.write_text(
        "#include <softmaxlib/softmaxlib.h>\n"
        + "\n".join(
            block.replace("softmaxlib_status ", f"softmaxlib_status block_{i}_", 1)
            for i, block in enumerate(blocks)
        )
    )
    flags = [*C11[:-1], "-Wno-missing-prototypes", f"-I{sml.get_include()}", "-fsyntax-only"]
    run(tool("cc", "gcc"), *flags, source)


def test_every_struct_that_grows_has_an_initializer():
    header = Path(sml.get_include(), "softmaxlib", "softmaxlib.h").read_text()
    structs = re.findall(r"typedef struct (\w+) \{\s*size_t struct_size;", header)
    assert len(structs) >= 5
    for name in structs:
        assert re.search(rf"#define {name.upper()}_INIT\W*\{{\s*sizeof\({name}\),", header), name


def test_directories():
    assert Path(sml.get_include(), "softmaxlib", "softmaxlib.h").is_file()
    assert Path(sml.get_cmake_dir(), "softmaxlib-config.cmake").is_file()
    library = ctypes.CDLL(str(Path(sml.get_library_dir(), "libsoftmaxlib_python.so")))
    library.softmaxlib_version.restype = ctypes.c_char_p
    assert library.softmaxlib_version().decode() == sml.__version__


def test_kernels_are_in_the_package_once():
    root = Path(_core.__file__).resolve().parent
    compiled = [path for path in root.rglob("*") if path.suffix in (".a", ".so")]
    holders = [path for path in compiled if b"softmax_two_pass_f32" in path.read_bytes()]
    assert holders == [Path(sml.get_library_dir(), "libsoftmaxlib_python.so")]


def test_no_other_library_is_taken_for_that_of_the_package(tmp_path):
    # One that came first into the process, as where a program that embeds Python links its own.
    names = declared()
    source, script, other = (tmp_path / name for name in ("other.c", "map", "libsoftmaxlib.so"))
    source.write_text("".join(f"void {n}(void) {{ __builtin_trap(); }}\n" for n in names))
    script.write_text("SOFTMAXLIB_0.1 { softmaxlib_*; };\n")
    link = [f"-Wl,--version-script={script}", "-Wl,-soname,libsoftmaxlib.so"]
    run(tool("cc", "gcc"), "-shared", "-fPIC", *link, source, "-o", other)
    code = "import softmaxlib as s; print(s.softmax([0.0, 0.0]), s.available_isas())"
    assert "[0.5 0.5]" in run(sys.executable, "-c", code, LD_PRELOAD=str(other))


def test_exports():
    nm = tool("nm")
    library = Path(sml.get_library_dir(), "libsoftmaxlib_python.so")
    lines = run(nm, "-D", "-C", "--defined-only", library).splitlines()
    named = [line.split(" ", 2)[2] for line in lines if " T " in line]
    private = {name.split("(")[0] for name in named if name.startswith("softmaxlib::")}
    assert private == {
        f"softmaxlib::{name}"
        for name in ("explain", "exp_sweep", "pass_scratch", "roofline", "run_pass")
    }
    version = re.match(r"\d+\.\d+", sml.__version__)[0]
    public = {name for name in named if not name.startswith("softmaxlib::")}
    assert public == {f"{name}@@SOFTMAXLIB_PYTHON_{version}" for name in declared()}


def test_options_print_in_the_order_given(capsys):
    assert cli.main(["--cmake-dir", "--includes"]) == 0
    expected = [sml.get_cmake_dir(), shlex.quote(f"-I{sml.get_include()}")]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("project", ["c", "cpp"])
def test_find_package(tmp_path, project):
    cmake, ctest = tool("cmake"), tool("ctest")
    tool(*(["cc", "gcc"] if project == "c" else ["c++", "g++"]))
    found = f"-Dsoftmaxlib_DIR={printed('--cmake-dir').strip()}"
    run(cmake, "-S", TESTS / "install" / project, "-B", tmp_path, found, "-DKINDS=shared")
    run(cmake, "--build", tmp_path)
    assert "100% tests passed" in run(ctest, "--test-dir", tmp_path)


def test_command_line(tmp_path):
    flags = shlex.split(printed("--includes", "--libs"))
    run(tool("cc", "gcc"), *C11, *flags, "-lm", "-o", tmp_path / "smoke")
    assert "passed" in run(tmp_path / "smoke")


def test_pkg_config(tmp_path):
    pkg_config = tool("pkg-config", "pkgconf")
    directory = printed("--pkgconfig-dir").strip()
    words = run(pkg_config, "--cflags", "--libs", "softmaxlib", PKG_CONFIG_PATH=directory)
    run(tool("cc", "gcc"), *C11, *shlex.split(words), "-lm", "-o", tmp_path / "smoke")
    assert "passed" in run(tmp_path / "smoke", LD_LIBRARY_PATH=sml.get_library_dir())
