"""The place of a bundle: taken once all went well, and what is there is never lost."""

from __future__ import annotations

import os
import shutil

import pytest

from jql_engine.bundle import MANIFEST, Bundle
from jql_engine.errors import BundleError
from jql_export.place import written_aside
from tests.export.test_bundle import names


def silent(line):
    pytest.fail(f"nothing is to be reported, but: {line}")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("is_folder", [False, True])
def test_what_comes_to_the_place_during_an_export_is_kept(tmp_path, is_folder, overwrite):
    out = tmp_path / "out"
    thesis = out / "thesis.tex" if is_folder else out
    with (
        pytest.raises(BundleError, match="out exists and is no bundle; choose another --out"),
        written_aside(out, overwrite, silent) as folder,
    ):
        (folder / MANIFEST).write_text("{}")
        if is_folder:
            out.mkdir()
        thesis.write_text("ten years")
    assert thesis.read_text() == "ten years" and names(tmp_path) == ["out"]


def test_a_bundle_that_comes_to_the_place_during_an_export_is_kept_without_overwrite(bundle, tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(BundleError, match="out exists and is a bundle; give --overwrite"),
        written_aside(out, False, silent),
    ):
        shutil.copytree(bundle.path, out)
    assert Bundle.open(out).hash == bundle.hash and names(tmp_path) == ["out"]
    with written_aside(out, True, silent) as folder:
        (folder / MANIFEST).write_text("{}")
    assert names(out) == [MANIFEST] and names(tmp_path) == ["out"]


def test_what_a_killed_export_has_left_is_named_and_does_not_block_the_next(tmp_path):
    """In a container each export may have the process id 1."""
    lines, out = [], tmp_path / "out[1]"
    left = [tmp_path / f".out[1].{os.getpid()}.{state}" for state in ("replaced", "writing")]
    for folder in (out, *left):
        folder.mkdir()
        (folder / MANIFEST).write_text("old")
    with written_aside(out, True, lines.append) as folder:
        (folder / MANIFEST).write_text("new")
    assert (out / MANIFEST).read_text() == "new"
    assert [line.partition(" is of another export to ")[0] for line in lines] == [str(folder) for folder in left]
    assert all((folder / MANIFEST).read_text() == "old" for folder in left)
    assert names(tmp_path) == sorted(file.name for file in (out, *left))


def test_a_name_that_leaves_no_room_for_that_of_the_folder_aside_is_an_error(tmp_path):
    with pytest.raises(BundleError, match="cannot be created: File name too long; choose another --out"):
        with_content(tmp_path / ("x" * 240))
    with pytest.raises(BundleError, match="cannot be looked at: File name too long; choose another --out"):
        with_content(tmp_path / ("x" * 300))
    assert names(tmp_path) == []


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    with (
        pytest.raises(
            BundleError, match=r"out cannot be written: No space left on device; what was written is removed"
        ),
        written_aside(tmp_path / "out", False, silent) as folder,
    ):
        (folder / "graph").write_text("half of it")
        with open("/dev/full", "wb") as file:  # noqa: PTH123
            file.write(b"the rest")
    assert names(tmp_path) == []


def with_content(out):
    with written_aside(out, False, silent) as folder:
        (folder / MANIFEST).write_text("{}")


def test_what_cannot_be_read_during_an_export_is_not_called_an_output(tmp_path):
    with (
        pytest.raises(BundleError, match=r"^.*enc/training_args\.bin cannot be read: No such file"),
        written_aside(tmp_path / "out", False, print),
    ):
        (tmp_path / "enc/training_args.bin").read_bytes()
    with (
        pytest.raises(BundleError, match=r"out cannot be written: .*graph\.onnx: Is a directory"),
        written_aside(tmp_path / "out", False, print) as folder,
    ):
        (folder / "graph.onnx").mkdir()
        (folder / "graph.onnx").write_bytes(b"x")
