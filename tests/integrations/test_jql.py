"""Direct use, as in the JQL annotation pipeline's own README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jql_engine.errors import CacheError, DeviceError, HeadError
from jql_engine.integrations import export_cache as cache
from jql_engine.integrations.jql import RegressionHead, get_embedder_instance
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


def test_without_torch_embeddings_are_numpy_arrays(bundle, head_files, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails, as where it is not installed
    embeddings = get_embedder_instance("any", "cpu", bundle=bundle.path).embed(TEXTS)
    assert isinstance(embeddings, np.ndarray) and embeddings.shape == (len(TEXTS), 32)
    with pytest.raises(HeadError, match=r"read with torch, which is not installed; .* Engine\(bundle\)\.score"):
        RegressionHead.load_from_checkpoint(head_files["prose"])


@without_gpu
def test_a_device_that_is_not_there_is_an_error(bundle):
    with pytest.raises(DeviceError, match="cuda:0 was requested"):
        get_embedder_instance("any", torch.device("cuda:0"), bundle=bundle.path)


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_a_pickle_that_wants_to_run_code_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"layer1.weight": Trap()}}, "trap.ckpt")
    with pytest.raises(HeadError, match=r"trap\.ckpt holds more than tensors .* refused"):
        RegressionHead.load_from_checkpoint("trap.ckpt")
    assert not Path("trapped").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    file = tmp_path / "x.ckpt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(HeadError, match=r"x\.ckpt (cannot be read|is no checkpoint|holds more)"):
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


def test_a_checkpoint_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(HeadError, match=r"head edu: .*gone.ckpt cannot be read \(No such file or directory\)"):
        cache.exported(str(tmp_path), {"edu": tmp_path / "gone.ckpt"})


def test_a_bundle_that_somebody_else_can_have_put_there_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planted = tmp_path / "jql-engine/bundles" / cache._key("some/encoder", {}, False)
    planted.mkdir(parents=True)
    (planted / "bundle.json").touch()
    assert cache.exported("some/encoder", {}) == planted
    planted.parent.chmod(0o777)
    with pytest.raises(CacheError, match=r"has mode 0777: it must belong to user .* take the permission away"):
        cache.exported("some/encoder", {})


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"file/jql-engine/bundles.* cannot be read or written .*XDG_CACHE_HOME"):
        cache.exported("Snowflake/snowflake-arctic-embed-m-v2.0", {})


def test_what_the_export_said_comes_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        cache.BundleError, match=r"jql-export of .*empty failed with exit code 1; it said: jql-export: "
    ):
        cache.exported(str(tmp_path / "empty"), {"edu": write_head(tmp_path / "edu.ckpt")})
