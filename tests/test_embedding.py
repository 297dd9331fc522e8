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
from softmaxlib import cli

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
    library = ctypes.CDLL(str(Path(sml.get_library_dir(), "libsoftmaxlib.so")))
    library.softmaxlib_version.restype = ctypes.c_char_p
    assert library.softmaxlib_version().decode() == sml.__version__


def test_options_print_in_the_order_given(capsys):
    assert cli.main(["--cmake-dir", "--includes"]) == 0
    expected = [sml.get_cmake_dir(), shlex.quote(f"-I{sml.get_include()}")]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("project", ["c", "cpp"])
def test_find_package(tmp_path, project):
    cmake, ctest = tool("cmake"), tool("ctest")
    tool(*(["cc", "gcc"] if project == "c" else ["c++", "g++"]))
    directory = printed("--cmake-dir").strip()
    run(cmake, "-S", TESTS / "install" / project, "-B", tmp_path, f"-Dsoftmaxlib_DIR={directory}")
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
