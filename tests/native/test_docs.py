"""The programs of docs/native.md compile and print scores."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.binding import ROOT, library_path, package_file

PAGE = (ROOT / "docs" / "native.md").read_text()
BUILD = library_path().resolve().parent


@pytest.fixture
def environment(library, tmp_path) -> dict[str, str]:
    """One in which the loader finds ONNX Runtime by the name that libjql asks for first."""
    (tmp_path / "libonnxruntime.so.1").symlink_to(package_file("onnxruntime", "capi/libonnxruntime.so.*"))
    return {**os.environ, "LD_LIBRARY_PATH": f"{BUILD}:{tmp_path}"}


def program(language: str) -> str:
    return next(part for part in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL))


def run(*command: object, **settings) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True, **settings
    ).stdout


def test_the_program_in_c(environment, native, xlmr, tmp_path):
    source: Path = tmp_path / "main.c"
    source.write_text(program("c"))
    flags = ("-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{ROOT}/native/include", f"-L{BUILD}", "-ljql")
    run("cc", "-o", tmp_path / "main", source, *flags)
    (tmp_path / "bundle").symlink_to(xlmr.path)
    first, second = native.score(["Water boils at 100 degrees.", "buy now"]).values[:, 0]
    printed = run(tmp_path / "main", env=environment, cwd=tmp_path)
    assert printed == f"{native.heads[0]}: {first:.3f} and {second:.3f}\n"


@pytest.mark.skipif(shutil.which("rustc") is None, reason="rustc is not installed")
def test_the_program_in_rust(environment, native, xlmr, tmp_path):
    source: Path = tmp_path / "main.rs"
    source.write_text(program("rust"))
    run("rustc", "-L", BUILD, "-o", tmp_path / "main", source)
    printed = run(tmp_path / "main", xlmr.path, env=environment)
    expected = native.score(["Water boils at 100 degrees.", "buy now"]).values.ravel()
    assert [float(score) for score in re.findall(r"[-\d.]+", printed)] == pytest.approx(expected, abs=1e-5)
