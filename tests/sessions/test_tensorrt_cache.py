from __future__ import annotations

import hashlib
import json
import shutil
import signal
import stat
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest

from jql_engine.bundle import MANIFEST, Bundle, EngineKey, describe_file
from jql_engine.data import Budget
from jql_engine.errors import BundleError, CacheError, DeviceError
from jql_engine.sessions.base import EngineOptions
from jql_engine.sessions.gpu import Gpu
from jql_engine.sessions.tensorrt import cache as engine_files
from jql_engine.sessions.tensorrt.build import Built, Library, load_library
from jql_engine.sessions.tensorrt.cache import (
    build_ahead,
    engine_for,
    from_bundle,
    from_cache,
    key_of,
    name_of,
    provide,
    why_none,
)
from jql_engine.sessions.tensorrt.profiles import budget_for

KEY = EngineKey(
    "tensorrt-fp16", "ab" * 32, "tensorrt", "10.16.1", "NVIDIA A100-SXM4-80GB", "8.0", "fp16", [[32, 512], [64, 256]]
)
TENSORRT = Library("tensorrt", "10.16.1", None)
RTX = Library("tensorrt-rtx", "1.7.1.116", None)
BUDGET = Budget(1024, "padded", (32, 64))
GPU = "NVIDIA H200"
VARIANT = "standard-fp32"
OPENED: list[list[str]] = []  # paths that Python opens or lists, while a test asks for them


def _note(event, arguments):
    if OPENED and event in ("open", "os.listdir", "os.scandir"):
        OPENED[-1].append(str(arguments[0]))


sys.addaudithook(_note)  # cannot be taken away again


@contextmanager
def opened_paths():
    """Every path that is opened or listed meanwhile."""
    OPENED.append([])
    try:
        yield OPENED[-1]
    finally:
        OPENED.pop()


def make(content=b"an engine"):
    return lambda: Built(content, None, True)


def never(*_):
    raise AssertionError("built again")


def silent(_):
    pass


def gpu_is_missing():
    try:
        Gpu(0).close()
    except DeviceError:
        return True
    return False


def snapshot(folder):
    """Everything that is in a folder."""
    return {
        file.relative_to(folder): (file.stat().st_mtime_ns, file.read_bytes() if file.is_file() else None)
        for file in folder.rglob("*")
    }


def plant(folder, key, content=b"planted"):
    """An engine beside its description, as a cache has them."""
    file = folder / f"{name_of(key)}.engine"
    file.write_bytes(content)
    about = {"key": asdict(key), "sha256": hashlib.sha256(content).hexdigest()}
    file.with_suffix(".json").write_text(json.dumps(about))
    return file


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle to change, with an empty folder of engines."""
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    (folder / "engines").mkdir()
    return Bundle.open(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache of engines, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "jql-engine" / "engines"


def listing(bundle, key, content=b"made ahead", name="engines/a.engine"):
    """The bundle with an engine that its manifest lists."""
    (bundle.path / name).write_bytes(content)
    files = bundle.manifest.files | {name: describe_file(bundle.path / name)}
    manifest = replace(bundle.manifest, files=files, engines=bundle.manifest.engines | {name: key})
    (bundle.path / MANIFEST).write_text(manifest.to_json())
    return Bundle.open(bundle.path)


def test_an_engine_is_built_once_and_found_again(cache):
    lines = []
    engine = provide(cache, KEY, make(), lines.append)
    assert engine.content == engine.path.read_bytes() == b"an engine"
    assert engine.sha256 == hashlib.sha256(b"an engine").hexdigest()
    assert len(lines) == 1 and lines[0].startswith(f"built {engine.path.name}: ")
    assert provide(cache, KEY, never, silent) == engine
    assert from_cache(cache, KEY, silent) == engine


def test_the_name_can_be_read_and_the_file_beside_it_says_everything(cache):
    file = provide(cache, KEY, make(), silent).path
    assert file.name.startswith("tensorrt-fp16_sm8.0_nvidia-a100-sxm4-80gb_tensorrt-10.16.1_")
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["key"] == asdict(KEY) and about["fused"] is True
    assert sorted(about) == ["fused", "key", "seconds", "sha256"]


@pytest.mark.parametrize("variant", ["../../x", "/x", "a/b", "..", "", "a\0b", "Ü"])
def test_whatever_a_variant_is_called_its_engine_lies_in_the_folder(cache, variant):
    engine = provide(cache, replace(KEY, variant=variant), make(), silent)
    assert engine.path.parent == cache and engine.path.resolve().parent == cache.resolve()


@pytest.mark.parametrize(
    "other",
    [
        {"gpu": "NVIDIA A100-PCIE-40GB"}, {"gpu": None}, {"compute_capability": "9.0"}, {"version": "10.17"},
        {"precision": "bf16"}, {"library": "tensorrt-rtx"}, {"graph": "cd" * 32}, {"profiles": [[32, 512]]},
        {"variant": "tensorrt-fp8"},
    ],
    ids=str,
)  # fmt: skip
def test_every_field_of_the_key_asks_for_an_engine_of_its_own(copy, cache, other):
    file, changed = provide(cache, KEY, make(), silent).path, replace(KEY, **other)
    (name,) = other
    nearest = rf"building is not allowed; %s, the nearest, was built for {name} "
    assert from_cache(cache, changed, silent) is None and from_bundle(listing(copy, KEY), changed) is None
    assert nearest % file.stem in why_none({}, cache, changed)
    assert nearest % "a" in why_none({"engines/a.engine": KEY}, cache / "absent", changed)
    assert provide(cache, changed, make(b"another"), silent).content == b"another"
    assert file.read_bytes() == b"an engine"


def test_without_any_engine_no_build_says_how_to_get_one(cache):
    assert "holds an engine, and building is not allowed: run once without --no-build" in why_none({}, cache, KEY)
    assert not cache.exists()


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"half"), lambda file: file.unlink()])
def test_a_damaged_engine_is_built_again(cache, damage):
    engine = provide(cache, KEY, make(), silent)
    damage(engine.path)
    assert from_cache(cache, KEY, silent) is None
    assert "the nearest, is damaged" in why_none({}, cache, KEY)
    new = provide(cache, KEY, make(b"new"), silent)
    assert (new.path, new.content) == (engine.path, b"new")
    assert provide(cache, KEY, never, silent) == new


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"key": 1}', b'{"key": {"hardware": 1}}', b"null"])
def test_an_engine_without_its_description_is_none(cache, content):
    about = provide(cache, KEY, make(), silent).path.with_suffix(".json")
    about.unlink()
    if content is not None:
        about.write_bytes(content)
    assert provide(cache, KEY, make(b"new"), silent).content == b"new"


def test_a_build_that_fails_leaves_nothing_that_could_be_taken_for_an_engine(cache):
    def fail():
        raise BundleError("no")

    with pytest.raises(BundleError, match="no"):
        provide(cache, KEY, fail, silent)
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    assert provide(cache, KEY, make(), silent).path.is_file(), "the lock was given back"


def test_processes_that_need_the_same_engine_build_it_once(cache):
    builds, lines, begun = [], [], threading.Event()

    def slow():
        begun.set()
        builds.append(1)
        time.sleep(0.3)
        return Built(b"an engine", None, True)

    threads = [threading.Thread(target=provide, args=(cache, KEY, slow, lines.append)) for _ in range(3)]
    threads[0].start()
    begun.wait()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert sum("another process is building this engine" in line for line in lines) == 2


def test_a_cache_that_others_can_write_is_neither_read_nor_built_in(cache):
    cache.mkdir(mode=0o700, parents=True)
    plant(cache, KEY)
    cache.chmod(0o777)
    for find in (
        lambda: from_cache(cache, KEY, silent),
        lambda: provide(cache, KEY, never, silent),
        lambda: why_none({}, cache, KEY),
    ):
        with pytest.raises(CacheError, match=rf"{cache} belongs to user \d+ and has mode 0777"):
            find()


@pytest.mark.parametrize("suffix", [".engine", ".json"])
def test_a_link_that_was_planted_in_the_cache_is_not_followed(cache, tmp_path, suffix):
    file = provide(cache, KEY, make(), silent).path.with_suffix(suffix)
    file.rename(tmp_path / file.name)
    file.symlink_to(tmp_path / file.name)
    with pytest.raises(CacheError, match=rf"{file} in the cache cannot be read"):
        provide(cache, KEY, make(), silent)


def test_what_was_planted_in_a_bundle_is_neither_used_nor_read(copy, cache):
    pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt-rtx-cu13-bindings is not installed")
    options = EngineOptions(build=False, library="tensorrt-rtx", batch_tokens=1024)
    plant(
        copy.path / "engines", key_of(copy, VARIANT, budget_for(copy, 1024), load_library("tensorrt-rtx"), "8.0", None)
    )
    with opened_paths() as opened:
        bundle = Bundle.open(copy.path)
        with pytest.raises(BundleError, match=rf"neither the bundle nor {cache} holds an engine, and building is not"):
            engine_for(bundle, VARIANT, "8.0", None, options, silent)
    assert str(copy.path / "tokenizer.json") in opened, "what is opened is noted"
    assert not [path for path in opened if path.startswith(str(copy.path / "engines"))]


def test_an_engine_that_the_bundle_lists_is_used_from_there(copy, cache):
    bundle = listing(copy, KEY)
    engine = from_bundle(bundle, KEY)
    assert (engine.path, engine.content) == (bundle.path / "engines" / "a.engine", b"made ahead")
    assert not cache.exists()


def test_a_listed_engine_that_was_changed_is_refused_at_opening(copy):
    bundle = listing(copy, KEY)
    (bundle.path / "engines" / "a.engine").write_bytes(b"made AHEAD")
    with pytest.raises(BundleError, match=r"engines/a.engine was changed"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"made AHEAD", "was changed"), (b"longer than it was", "bytes"), (None, "is missing")]
)
def test_a_listed_engine_that_was_changed_since_the_opening_is_not_loaded(copy, content, message):
    bundle = listing(copy, KEY)
    file = bundle.path / "engines" / "a.engine"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(BundleError, match=rf"engines/a.engine .*{message}"):
        from_bundle(bundle, KEY)


def test_an_engine_of_tensorrt_belongs_to_one_gpu_and_version(bundle):
    key = key_of(bundle, VARIANT, BUDGET, TENSORRT, "9.0", GPU)
    assert (key.gpu, key.compute_capability, key.version) == (GPU, "9.0", "10.16.1")
    assert key.profiles == [[32, 32], [64, 16]] and key.precision == "fp32"


def test_an_engine_of_tensorrt_for_rtx_belongs_to_a_compute_capability(bundle):
    ahead = key_of(bundle, VARIANT, BUDGET, RTX, "8.0", None)
    assert ahead == key_of(bundle, VARIANT, BUDGET, RTX, "8.0", "NVIDIA A100-SXM4-80GB")
    assert "_sm8.0_any_tensorrt-rtx-1.7.1.116_" in name_of(ahead)


def test_another_graph_asks_for_another_engine(bundles):
    keys = [key_of(bundle, VARIANT, BUDGET, RTX, "8.0", None) for bundle in bundles.values()]
    assert len({key.graph for key in keys}) == len({name_of(key) for key in keys}) == 3


def test_what_a_run_builds_goes_to_the_cache_and_nothing_into_the_bundle(copy, cache):
    pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt-rtx-cu13-bindings is not installed")
    options = EngineOptions(library="tensorrt-rtx", batch_tokens=1024)
    before = snapshot(copy.path)
    _, budget, built = engine_for(copy, VARIANT, "8.6", "NVIDIA A10", options, silent)
    assert built.path.parent == cache and stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert snapshot(copy.path) == before and budget.buckets == (32, 64, 96)
    no_build = replace(options, build=False)
    assert engine_for(copy, VARIANT, "8.6", "NVIDIA A10", no_build, never)[2].sha256 == built.sha256
    with pytest.raises(BundleError, match=r"the nearest, was built for compute_capability 8.6 instead of 8.0"):
        engine_for(copy, VARIANT, "8.0", GPU, no_build, silent)
    named = replace(options, folder=cache.parent / "named")
    assert engine_for(copy, VARIANT, "8.6", "NVIDIA A10", named, silent)[2].path.parent == cache.parent / "named"


def test_an_engine_built_ahead_is_the_one_that_the_run_finds(copy, cache):
    pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt-rtx-cu13-bindings is not installed")
    lines = []
    name, key = build_ahead(copy, VARIANT, "8.0", "tensorrt-rtx", lines.append, batch_tokens=1024)
    file = copy.path / name
    assert list((copy.path / "engines").iterdir()) == [file] and not cache.exists()
    assert lines[-1].startswith(f"built {file.name}: ")
    bundle = listing(copy, key, file.read_bytes(), name)
    no_build = EngineOptions(build=False, library="tensorrt-rtx", batch_tokens=1024)
    library, budget, engine = engine_for(bundle, VARIANT, "8.0", "NVIDIA A100-SXM4-80GB", no_build, never)
    assert (engine.path, library.name, budget.buckets) == (file, "tensorrt-rtx", (32, 64, 96))
    assert not cache.exists()


@pytest.mark.skipif(not gpu_is_missing(), reason="there is a GPU")
def test_without_a_gpu_tensorrt_itself_cannot_build(bundle, monkeypatch):
    monkeypatch.setattr(engine_files, "load_library", lambda _: TENSORRT)
    with pytest.raises(
        DeviceError, match=r"device cuda:0: .*; TensorRT builds on the GPU itself: .* --library tensorr"
    ):
        build_ahead(bundle, VARIANT, "8.0", "tensorrt", silent)


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
