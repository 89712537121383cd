from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from jql_engine import engine_files
from jql_engine.data import Budget
from jql_engine.engine_files import EngineKey, EngineOptions, build_ahead, engine_for, key_of, provide
from jql_engine.errors import BundleError, DeviceError
from jql_engine.gpu import Gpu
from jql_engine.tensorrt import Built, Library, Target

KEY = EngineKey(
    "tensorrt-fp16", "ab" * 32, "tensorrt", "10.16.1", "NVIDIA A100-SXM4-80GB", "8.0", "fp16",
    [[32, 512], [64, 256]], "same-gpu", False,
)  # fmt: skip
TENSORRT = Library("tensorrt", "10.16.1", None)
RTX = Library("tensorrt-rtx", "1.7.1.116", None)
BUDGET = Budget(1024, "padded", (32, 64))
GPU = "NVIDIA H200"


def make(content=b"an engine"):
    return lambda: Built(content, None, True)


def never():
    raise AssertionError("built again")


def silent(_):
    pass


def gpu_is_missing():
    try:
        Gpu(0).close()
    except DeviceError:
        return True
    return False


def test_an_engine_is_built_once_and_found_again(tmp_path):
    lines = []
    file = provide(tmp_path / "engines", KEY, make(), lines.append)
    assert file.read_bytes() == b"an engine" and lines[-1].startswith(f"built {file.name}: ")
    assert provide(tmp_path / "engines", KEY, never, silent) == file
    assert provide(tmp_path / "engines", KEY, None, silent) == file


def test_the_name_can_be_read_and_the_file_beside_it_says_everything(tmp_path):
    file = provide(tmp_path, KEY, make(), silent)
    assert file.name.startswith("tensorrt-fp16_sm8.0_nvidia-a100-sxm4-80gb_tensorrt-10.16.1_")
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["key"] == asdict(KEY) and about["fused"] is True
    assert sorted(about) == ["fused", "key", "seconds", "sha256"]


@pytest.mark.parametrize(
    "other",
    [
        {"gpu": "NVIDIA A100-PCIE-40GB"}, {"compute_capability": "9.0"}, {"version": "10.17"}, {"precision": "bf16"},
        {"library": "tensorrt-rtx"}, {"graph": "cd" * 32}, {"profiles": [[32, 512]]}, {"hardware": "ampere-plus"},
        {"variant": "tensorrt-fp8"}, {"version_compatible": True},
    ],
    ids=str,
)  # fmt: skip
def test_every_field_of_the_key_asks_for_an_engine_of_its_own(tmp_path, other):
    file = provide(tmp_path, KEY, make(), silent)
    changed = replace(KEY, **other)
    (name,) = other
    with pytest.raises(BundleError, match=rf"building is not allowed; {file.stem}, the nearest, was built for {name} "):
        provide(tmp_path, changed, None, silent)
    assert provide(tmp_path, changed, make(b"another"), silent).read_bytes() == b"another"
    assert file.read_bytes() == b"an engine"


def test_without_any_engine_no_build_says_how_to_get_one(tmp_path):
    with pytest.raises(BundleError, match=r"holds no engine, and building is not allowed: run once without --no-build"):
        provide(tmp_path, KEY, None, silent)


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"half"), lambda file: file.unlink()])
def test_a_damaged_engine_is_built_again(tmp_path, damage):
    file = provide(tmp_path, KEY, make(), silent)
    damage(file)
    with pytest.raises(BundleError, match="the nearest, is damaged"):
        provide(tmp_path, KEY, None, silent)
    assert provide(tmp_path, KEY, make(b"new"), silent).read_bytes() == b"new"
    assert provide(tmp_path, KEY, never, silent) == file


def test_an_engine_without_its_description_is_none(tmp_path):
    provide(tmp_path, KEY, make(), silent).with_suffix(".json").unlink()
    assert provide(tmp_path, KEY, make(b"new"), silent).read_bytes() == b"new"


def test_a_build_that_fails_leaves_nothing_that_could_be_taken_for_an_engine(tmp_path):
    def fail():
        raise BundleError("no")

    with pytest.raises(BundleError, match="no"):
        provide(tmp_path, KEY, fail, silent)
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]
    assert provide(tmp_path, KEY, make(), silent).is_file(), "the lock was given back"


@pytest.mark.parametrize("blocked", ["parent is a file", "read-only"])
def test_a_folder_that_cannot_be_written_names_the_option_for_another(tmp_path, blocked):
    folder = tmp_path / "engines"
    if blocked == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        folder.mkdir(mode=0o555)
    else:
        folder.write_text("")
    with pytest.raises(BundleError, match=r"engines cannot be written there .*name another folder with --engine-cache"):
        provide(folder, KEY, make(), silent)


def test_processes_that_need_the_same_engine_build_it_once(tmp_path):
    builds, lines, begun = [], [], threading.Event()

    def slow():
        begun.set()
        builds.append(1)
        time.sleep(0.3)
        return Built(b"an engine", None, True)

    threads = [threading.Thread(target=provide, args=(tmp_path, KEY, slow, lines.append)) for _ in range(3)]
    threads[0].start()
    begun.wait()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert sum("another process is building this engine" in line for line in lines) == 2


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    lock = tmp_path / f".{KEY.name}.lock"
    code = (
        f"import fcntl, time; file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with lock.open("w") as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.kill()
    holder.wait()
    assert provide(tmp_path, KEY, make(), silent).is_file()


def test_an_engine_of_tensorrt_belongs_to_one_gpu_and_version(bundle):
    key = key_of(bundle, "standard-fp32", BUDGET, TENSORRT, Target("9.0"), GPU)
    assert (key.gpu, key.compute_capability, key.version) == (GPU, "9.0", "10.16.1")
    assert key.profiles == [[32, 32], [64, 16]] and key.precision == "fp32"


def test_an_engine_of_tensorrt_for_rtx_belongs_to_a_compute_capability(bundle):
    ahead = key_of(bundle, "standard-fp32", BUDGET, RTX, Target("8.0"), None)
    assert ahead == key_of(bundle, "standard-fp32", BUDGET, RTX, Target("8.0"), "NVIDIA A100-SXM4-80GB")
    assert "_sm8.0_any_tensorrt-rtx-1.7.1.116_" in ahead.name


@pytest.mark.parametrize(
    ("hardware", "gpu", "compute_capability"),
    [("same-gpu", GPU, "9.0"), ("same-compute-capability", None, "9.0"), ("ampere-plus", None, "8.0+")],
)
def test_a_hardware_compatible_engine_names_no_gpu(bundle, hardware, gpu, compute_capability):
    key = key_of(bundle, "standard-fp32", BUDGET, TENSORRT, Target("9.0", hardware), GPU)
    assert (key.gpu, key.compute_capability) == (gpu, compute_capability)


def test_a_version_compatible_engine_names_the_major_version(bundle):
    key = key_of(bundle, "standard-fp32", BUDGET, TENSORRT, Target("9.0", version_compatible=True), GPU)
    assert key.version == "10"


def test_another_graph_asks_for_another_engine(bundles):
    keys = [key_of(bundle, "standard-fp32", BUDGET, RTX, Target("8.0"), None) for bundle in bundles.values()]
    assert len({key.graph for key in keys}) == len({key.name for key in keys}) == 3


def test_an_engine_built_ahead_is_the_one_that_the_run_finds(bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt-rtx-cu13-bindings is not installed")
    lines = []
    options = EngineOptions(folder=tmp_path / "cache", batch_tokens=1024)
    file = build_ahead(bundle, "standard-fp32", "8.0", options, lines.append)
    assert file.parent == tmp_path / "cache" and not (bundle.path / "engines").exists()
    assert lines[-1].startswith(f"built {file.name}: ")
    no_build = replace(options, build=False, library="tensorrt-rtx")
    library, budget, found = engine_for(bundle, "standard-fp32", "8.0", "NVIDIA A100-SXM4-80GB", no_build, never)
    assert (found, library.name, budget.buckets) == (file, "tensorrt-rtx", (32, 64, 96))
    with pytest.raises(BundleError, match=r"the nearest, was built for compute_capability 8.0 instead of 8.6"):
        engine_for(bundle, "standard-fp32", "8.6", "NVIDIA A10", no_build, silent)


def test_by_default_engines_lie_in_the_bundle_which_stays_the_same(bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt-rtx-cu13-bindings is not installed")
    import shutil

    from jql_engine.bundle import Bundle

    copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))
    file = build_ahead(copy, "standard-fp32", "8.6", EngineOptions(batch_tokens=1024), silent)
    assert file.parent == copy.path / "engines"
    assert Bundle.open(copy.path) == copy, "engines are not listed in bundle.json"


@pytest.mark.skipif(not gpu_is_missing(), reason="there is a GPU")
def test_without_a_gpu_tensorrt_itself_cannot_build(bundle):
    with pytest.raises(DeviceError, match=r"device cuda:0: .*; to build for a GPU elsewhere give --compute-capability"):
        build_ahead(bundle, "standard-fp32", None, EngineOptions(), silent)
    with pytest.raises(DeviceError, match="device cuda:0"):
        build_ahead(bundle, "standard-fp32", "8.0", EngineOptions(library="tensorrt"), silent)


def test_a_signal_reaches_the_program_while_a_library_builds():
    class RangError(Exception): ...

    def ring(*_):
        raise RangError

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(RangError):
            engine_files._interruptible(lambda: time.sleep(2))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_long_build_says_that_it_goes_on(monkeypatch):
    monkeypatch.setattr(engine_files, "REPORT_SECONDS", 0.05)
    said = []
    assert engine_files._interruptible(lambda: time.sleep(0.3) or "built", said.append) == "built"
    assert said and all(line.startswith("still building, ") for line in said)


def test_an_error_of_a_build_is_the_callers():
    with pytest.raises(ZeroDivisionError):
        engine_files._interruptible(lambda: 1 / 0)
