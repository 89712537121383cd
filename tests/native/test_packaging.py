"""What `cmake --install` gives: a program in C99 by pkg-config, one by CMake, and nothing exported but jql_*."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jql_engine.probe_texts import SENTENCES
from tests.native.binding import ROOT, library_path, package_file

STRICT = ("-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror")
ONNXRUNTIME = str(package_file("onnxruntime", "capi/libonnxruntime.so.*"))
BUILD = library_path().parent


def run(*command: object, **settings) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True, **settings
    ).stdout


@pytest.fixture(scope="module")
def installed(library, tmp_path_factory) -> Path:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", BUILD, "--prefix", prefix)
    return prefix


def folder_of(prefix: Path, name: str) -> Path:
    return next(prefix.rglob(name)).parent


def test_files(installed):
    names = {path.name for path in installed.rglob("*") if path.is_file()}
    version = "0.1.0"
    assert names >= {"jql.h", f"libjql.so.{version}", "jql.pc", "jql-config.cmake", "jql-config-version.cmake"}
    link = next(installed.rglob("libjql.so"))
    links = [link.readlink().name, link.with_name("libjql.so.0").readlink().name]
    assert links == ["libjql.so.0", f"libjql.so.{version}"]


def test_only_the_api_is_exported_and_versioned(installed):
    header = next(installed.rglob("jql.h")).read_text()
    declared = set(re.findall(r"^JQL_API [^;(]*?(jql_\w+)\(", header, re.MULTILINE))
    lines = run("nm", "-D", "--defined-only", next(installed.rglob("libjql.so"))).splitlines()
    exported = {line.split()[-1] for line in lines if not line.endswith("JQL_0") or "@@" in line}
    assert exported == {f"{name}@@JQL_0" for name in declared}


def test_it_needs_nothing_but_the_c_library(installed):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", next(installed.rglob("libjql.so"))))
    assert {name.split(".")[0] for name in needed} <= {
        "libc",
        "libm",
        "libdl",
        "libpthread",
        "ld-linux-x86-64",
        "librt",
    }


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="pkg-config is not installed")
def test_the_example_in_c_by_pkg_config(installed, native, xlmr, tmp_path):
    pkg_config = folder_of(installed, "jql.pc")
    flags = run(
        "pkg-config", "--cflags", "--libs", "jql", env={**os.environ, "PKG_CONFIG_PATH": str(pkg_config)}
    ).split()
    rpath = f"-Wl,-rpath,{folder_of(installed, 'libjql.so')}"
    program = tmp_path / "score_lines"
    run("cc", *STRICT, "-o", program, ROOT / "examples" / "c" / "score_lines.c", *flags, rpath)
    lines = [*(sentence for sentence in SENTENCES if "\n" not in sentence), "", "last, without an end"]
    printed = run(program, xlmr.path, ONNXRUNTIME, input="\n".join(lines)).splitlines()
    expected = native.score(lines).values
    found = np.array([[float(score) for score in line.split("\t")] for line in printed])
    np.testing.assert_allclose(found, expected, atol=1e-4)


CANCELLED = """
#define _POSIX_C_SOURCE 200809L
#include <jql.h>
#include <pthread.h>
#include <stdio.h>
static int after;
static void *use(void *given) {
  char **arguments = given, err[512];
  jql_options options = JQL_OPTIONS_INIT;
  jql_engine *engine = NULL;
  options.onnxruntime = arguments[2];
  options.threads = 8;
  pthread_cancel(pthread_self());
  if (jql_open(arguments[1], &options, &engine, err, sizeof err) != JQL_OK) puts(err);
  after = 1;
  jql_close(engine);
  pthread_testcancel();
  return NULL;
}
int main(int n, char **arguments) {
  pthread_t thread;
  void *result = NULL;
  (void)n;
  pthread_create(&thread, NULL, use, arguments);
  pthread_join(thread, &result);
  printf("%d %d", after, result == PTHREAD_CANCELED);
  return 0;
}
"""


def test_a_thread_that_is_cancelled_ends_after_the_call(installed, xlmr, tmp_path):
    (tmp_path / "main.c").write_text(CANCELLED)
    library = folder_of(installed, "libjql.so")
    flags = [f"-I{ROOT}/native/include", f"-L{library}", "-ljql", "-pthread", f"-Wl,-rpath,{library}"]
    run("cc", *STRICT, "-o", tmp_path / "user", tmp_path / "main.c", *flags)
    assert run(tmp_path / "user", xlmr.path, ONNXRUNTIME) == "1 1"


def test_a_project_by_cmake(installed, tmp_path):
    (tmp_path / "main.c").write_text(
        "#include <jql.h>\n#include <stdio.h>\nint main(void) { puts(jql_version()); return 0; }\n"
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(user C)\nfind_package(jql 0.1 REQUIRED)\n"
        "add_executable(user main.c)\ntarget_link_libraries(user PRIVATE jql::jql)\n"
    )
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", tmp_path / "build")
    assert run(tmp_path / "build" / "user") == "0.1.0\n"


def test_the_header_is_c_plus_plus_as_well(tmp_path):
    source = tmp_path / "main.cpp"
    source.write_text(
        "#include <jql.h>\nint main() { jql_options options = JQL_OPTIONS_INIT; return options.threads; }\n"
    )
    run(
        "c++",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-pedantic",
        "-Werror",
        "-fsyntax-only",
        f"-I{ROOT}/native/include",
        source,
    )


@pytest.mark.skipif(not (BUILD / "score_parquet").exists(), reason="built without Arrow C++")
def test_the_example_in_c_plus_plus(native, xlmr, tmp_path):
    texts = [*SENTENCES, None, ""]
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), tmp_path / "in.parquet", row_group_size=7)
    run(BUILD / "score_parquet", xlmr.path, tmp_path / "in.parquet", tmp_path / "out.parquet", ONNXRUNTIME)
    found = pq.read_table(tmp_path / "out.parquet")
    expected = native.score(texts)
    for i, head in enumerate(native.heads):
        assert found[f"score_{head}"].null_count == 1
        values = found[f"score_{head}"].to_numpy()
        assert values == pytest.approx(expected.values[:, i], abs=1e-5, nan_ok=True)
