"""Direct use, as in the JQL annotation pipeline's own README."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from jql_engine.errors import DeviceError, HeadError
from jql_engine.integrations import export_cache as cache
from jql_engine.integrations.checkpoints import read_tensors
from jql_engine.integrations.jql import HEAD_TENSORS, RegressionHead, get_embedder_instance
from jql_export import probes
from jql_export.tolerances import TOLERANCES
from tests.conftest import without_gpu, write_head

TEXTS = [*probes.SENTENCES[:6], ""]


def test_the_snippet_of_the_original_readme_gives_the_engines_scores(bundle, engine, head_files):
    # The lines below are the original's but for the imports, the names of files, and fp32 for bf16.
    device = "cpu"
    embedder = get_embedder_instance("Snowflake/snowflake-arctic-embed-m-v2.0", device, torch.float32, bundle.path)
    regression_heads = {}
    for name, path in head_files.items():
        regression_heads[name] = RegressionHead.load_from_checkpoint(path, map_location=device).to(torch.float32)
    embeddings = embedder.embed(TEXTS)
    scores = {}
    with torch.no_grad():
        for name, regression_head in regression_heads.items():
            scores[f"score_{name}"] = regression_head(embeddings).cpu().squeeze(1)
    expected = engine.score(TEXTS)
    for i, head in enumerate(engine.heads):
        np.testing.assert_allclose(
            scores[f"score_{head}"].numpy(), expected.values[:, i], rtol=0, atol=TOLERANCES["fp32"].batch
        )


def test_bfloat16_as_in_the_original(bundle, engine, head_files):
    embedder = get_embedder_instance("any", torch.device("cpu"), torch.bfloat16, bundle.path)
    head = RegressionHead.load_from_checkpoint(head_files["edu"], map_location="cpu").to(torch.bfloat16)
    embeddings = embedder.embed(TEXTS)
    assert embeddings.dtype == torch.bfloat16 and embeddings.shape == (len(TEXTS), 32)
    score = head.eval()(embeddings).cpu().squeeze(1)
    assert score.dtype == torch.bfloat16
    wanted = engine.score(TEXTS).values[:, engine.heads.index("edu")]
    assert np.abs(score.float().numpy() - wanted).max() < 0.1 * np.abs(wanted).max()


def test_without_torch_there_are_numpy_arrays(bundle, engine, head_files, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails, as where it is not installed
    embeddings = get_embedder_instance("any", "cpu", bundle=bundle.path).embed(TEXTS)
    score = RegressionHead.load_from_checkpoint(head_files["prose"])(embeddings)
    assert isinstance(embeddings, np.ndarray) and isinstance(score, np.ndarray)
    wanted = engine.score(TEXTS).values[:, engine.heads.index("prose")]
    np.testing.assert_allclose(score[:, 0], wanted, rtol=0, atol=TOLERANCES["fp32"].batch)
    assert RegressionHead.load_from_checkpoint(head_files["prose"]).to(np.float16)(embeddings).dtype == np.float32


@without_gpu
def test_a_device_that_is_not_there_is_an_error(bundle):
    with pytest.raises(DeviceError, match="cuda:0 was requested"):
        get_embedder_instance("any", torch.device("cuda:0"), bundle=bundle.path)


def test_tensors_are_those_that_torch_reads(head_files):
    for file in head_files.values():
        state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        found = read_tensors(file, HEAD_TENSORS)
        assert all(np.array_equal(found[name], state[name].numpy()) for name in HEAD_TENSORS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float32])
def test_tensors_of_other_types_and_strides_are_read(tmp_path, dtype):
    whole = torch.arange(24, dtype=dtype).reshape(4, 6)
    state = {"a": whole[1:3, ::2], "b": whole.T, "c": torch.zeros(0, 3, dtype=dtype), "d": torch.tensor(5, dtype=dtype)}
    torch.save({"state_dict": state, "other": object}, tmp_path / "x.ckpt")
    found = read_tensors(tmp_path / "x.ckpt", list(state))
    assert all(np.array_equal(found[name], value.float().numpy()) for name, value in state.items())


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_a_pickle_that_wants_to_run_code_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"layer1.weight": Trap()}}, "trap.ckpt")
    with pytest.raises(HeadError, match=r"lacks layer1\.weight"):
        RegressionHead.load_from_checkpoint("trap.ckpt")
    assert not Path("trapped").exists()


STORAGE = object()


def forged(file: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Path:
    """A checkpoint whose tensor claims more than its storage holds."""
    torch.save({"w": torch.arange(4.0)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    stream = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if obj is STORAGE else None

    class Forged:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor_v2, (STORAGE, offset, size, stride, False, None))

    Pickler(stream, 2).dump({"w": Forged()})
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, stream.getvalue() if name.endswith("data.pkl") else content)
    return file


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((5,), (1,), 0), ((2, 2), (4, 1), 0), ((4,), (-1,), 0), ((4,), (1,), 1), ((1,), (1,), -1)],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, size, stride, offset):
    with pytest.raises(HeadError, match="does not fit its storage of 4"):
        read_tensors(forged(tmp_path / "x.ckpt", size, stride, offset), ["w"])
    assert read_tensors(forged(tmp_path / "y.ckpt", (2, 2), (2, 1)), ["w"])["w"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    file = tmp_path / "x.ckpt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(HeadError, match=r"x\.ckpt (cannot be read|is no checkpoint)"):
        RegressionHead.load_from_checkpoint(file)


def test_an_encoder_is_exported_once_for_all_processes(encoders, head_files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    for file in encoders["gte"].iterdir():
        (encoder / file.name).write_bytes(file.read_bytes())
    (encoder / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling", "path": "p"}]')
    (encoder / "p").mkdir()
    (encoder / "p" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (encoder / "tokenizer_config.json").write_text('{"model_max_length": 96}')
    heads = {name: str(file) for name, file in head_files.items()}
    code = f"""
from jql_engine.integrations.export_cache import exported
print(exported({str(encoder)!r}, {heads!r}))
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {run.communicate(timeout=120)[0].strip() for run in runs}
    assert len(paths) == 1 and [run.returncode for run in runs] == [0, 0]
    [path] = map(Path, paths)
    modified = (path / "bundle.json").stat().st_mtime_ns
    assert cache.exported(str(encoder), head_files) == path
    assert (path / "bundle.json").stat().st_mtime_ns == modified
    other = write_head(tmp_path / "other.ckpt", seed=9)
    assert cache._key(str(encoder), {"edu": other}, False) != cache._key(str(encoder), head_files, False)


@pytest.mark.parametrize("changed", ["config.json", "1_Pooling/config.json", "linked/config.json", "a/b/config.json"])
def test_a_changed_file_of_an_encoder_is_another_bundle(tmp_path, changed):
    encoder, elsewhere = tmp_path / "encoder", tmp_path / "elsewhere"
    for folder in (encoder / "1_Pooling", encoder / "a/b", encoder / ".git", elsewhere):
        folder.mkdir(parents=True)
    (encoder / "linked").symlink_to(elsewhere)
    (encoder / changed).write_text("1")
    before = cache._key(str(encoder), None, False)
    (encoder / ".git" / "index").write_text("not of the encoder")
    assert cache._key(str(encoder), None, False) == before
    (encoder / changed).write_text("22")
    assert cache._key(str(encoder), None, False) != before


def test_what_the_export_said_comes_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        cache.BundleError, match=r"jql-export of .*empty failed with exit code 1; it said: jql-export: "
    ):
        cache.exported(str(tmp_path / "empty"), {"edu": write_head(tmp_path / "edu.ckpt")})
