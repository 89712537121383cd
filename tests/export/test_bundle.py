from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from jql_engine import Engine
from jql_engine.bundle import MANIFEST, PROBES, Bundle, describe_files, sha256_of
from jql_engine.errors import BundleError, CheckpointError, HeadError, ParityError
from jql_engine.readouts import Readouts
from jql_export import probes
from jql_export.bundle import Checkpoint, export_bundle
from jql_export.families.read import read_encoder
from jql_export.hub import find_checkpoint
from jql_export.readouts.head_file import read_head
from jql_export.tolerances import TOLERANCES
from tests.conftest import FAMILIES, MAX_TOKENS, POOLING, export, write_head

FP32 = TOLERANCES["fp32"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_manifest_describes_the_encoder(bundles, encoders, family):
    manifest = bundles[family].manifest
    assert (manifest.encoder.id, manifest.encoder.architecture, manifest.encoder.layers) == (family, family, 2)
    assert (manifest.encoder.hidden_size, manifest.pooling, manifest.max_tokens) == (32, POOLING[family], MAX_TOKENS)
    pooler = [] if family == "gte" else ["pooler.dense.bias", "pooler.dense.weight"]
    assert manifest.encoder.unused_tensors == pooler
    names = ("config.json", "model.safetensors", "tokenizer.json")
    assert manifest.encoder.files == {name: sha256_of(encoders[family] / name) for name in names}


def test_the_manifest_lists_every_file_with_its_true_hash(bundle):
    names = ["graphs/cpu-fp32.onnx", "graphs/standard-fp32.onnx", "readouts.safetensors", PROBES, "tokenizer.json"]
    assert sorted([*names, *(f"{name}.data" for name in names[:2])]) == sorted(bundle.manifest.files)
    assert bundle.manifest.files == describe_files(bundle.path)
    assert Bundle.open(bundle.path) == bundle
    assert bundle.hash == sha256_of(bundle.path / MANIFEST)


def test_the_manifest_records_where_the_heads_came_from(bundle, head_files):
    found = [(head.name, head.outputs, head.sha256) for head in bundle.manifest.readouts]
    assert found == [(name, [name], sha256_of(head_files[name])) for name in ("edu", "prose")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["cpu-fp32", "standard-fp32"])
def test_recorded_parity_is_within_the_recorded_tolerance(bundles, family, variant):
    recorded = bundles[family].manifest.variants[variant]
    assert recorded.tolerance == {
        name: getattr(FP32, name) for name in ("embedding", "embedding_long", "score", "batch")
    }
    assert all(0 <= recorded.parity[f"max_abs_{name}"] <= limit for name, limit in recorded.tolerance.items())
    assert recorded.parity["documents"] > 50 and recorded.parity["longest"] == MAX_TOKENS


def test_stored_heads_score_embeddings_as_the_graph_does(bundle, engine):
    scores = Readouts.of(bundle).score(engine.embed(probes.SENTENCES))
    np.testing.assert_allclose(scores, engine.score(probes.SENTENCES).values, rtol=0, atol=FP32.score)


def test_scores_follow_their_heads_when_the_order_changes(encoders, head_files, engine, tmp_path):
    turned = Engine(export(encoders["gte"], dict(reversed(head_files.items())), tmp_path / "bundle").path, device="cpu")
    assert (engine.heads, turned.heads) == (("edu", "prose"), ("prose", "edu"))
    expected = engine.score(probes.SENTENCES).values[:, ::-1]
    np.testing.assert_allclose(turned.score(probes.SENTENCES).values, expected, rtol=0, atol=FP32.batch)


def test_the_same_export_writes_the_same_files_again(bundle, encoders, head_files, tmp_path):
    again = export(encoders["gte"], head_files, tmp_path / "again", list(bundle.manifest.variants))
    assert again.manifest.files == bundle.manifest.files


def test_every_file_of_a_bundle_has_the_mode_that_the_umask_leaves(encoders, head_files, tmp_path):
    umask = 0o007
    before = os.umask(umask)
    try:
        export(encoders["gte"], head_files, tmp_path / "out", ["cpu-fp32", "openvino-bf16"])
    finally:
        os.umask(before)
    modes = {file: oct(file.stat().st_mode & 0o777) for file in [tmp_path / "out", *(tmp_path / "out").rglob("*")]}
    assert modes == {file: oct((0o777 if file.is_dir() else 0o666) & ~umask) for file in modes}


def test_a_checkpoint_that_changes_texts_first_is_refused(encoders, head_files, tmp_path):
    encoder = shutil.copytree(encoders["gte"], tmp_path / "encoder")
    (encoder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(CheckpointError, match="do_lower_case = true"):
        export(encoder, head_files, tmp_path / "out")


def test_an_existing_bundle_is_kept_without_overwrite(bundle, encoders, head_files, tmp_path):
    out = shutil.copytree(bundle.path, tmp_path / "out")
    with pytest.raises(BundleError, match=r"out exists and is a bundle; give --overwrite"):
        export(encoders["bert"], head_files, out)
    assert Bundle.open(out).hash == bundle.hash
    assert names(tmp_path) == ["out"]


def test_overwrite_replaces_a_bundle(bundle, encoders, head_files, tmp_path):
    out = shutil.copytree(bundle.path, tmp_path / "out")
    replaced = export_bert(encoders, head_files, out, overwrite=True)
    assert Bundle.open(out) == replaced and replaced.manifest.encoder.architecture == "bert"
    assert not (out / "graphs" / "standard-fp32.onnx").exists(), "the old bundle's second graph"
    assert names(tmp_path) == ["out"]


def test_overwrite_fills_an_empty_folder(encoders, head_files, tmp_path):
    (tmp_path / "out").mkdir()
    export_bert(encoders, head_files, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / MANIFEST).is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_bundle_is_never_replaced(encoders, head_files, tmp_path, overwrite):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("ten years")
    with pytest.raises(BundleError, match="out exists and is no bundle; choose another --out"):
        export_bert(encoders, head_files, tmp_path / "out", overwrite=overwrite)
    assert names(tmp_path / "out") == ["thesis.tex"] and names(tmp_path) == ["out"]


def test_a_file_at_the_place_of_the_bundle_is_never_replaced(encoders, head_files, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(BundleError, match="out exists and is no bundle"):
        export_bert(encoders, head_files, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "a file"


def test_a_place_that_cannot_be_written_is_an_error(encoders, head_files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be created: Not a directory"):
        export_bert(encoders, head_files, tmp_path / "file" / "out")


def test_out_of_tolerance_leaves_nothing_behind(encoders, head_files, tmp_path, monkeypatch):
    misread_a_bias(monkeypatch)
    with pytest.raises(ParityError, match="variant cpu-fp32 is out of tolerance"):
        export(encoders["gte"], head_files, tmp_path / "out")
    assert names(tmp_path) == []


def test_out_of_tolerance_keeps_the_bundle_that_was_to_be_replaced(bundle, encoders, head_files, tmp_path, monkeypatch):
    out = shutil.copytree(bundle.path, tmp_path / "out")
    misread_a_bias(monkeypatch)
    with pytest.raises(ParityError):
        export_bert(encoders, head_files, out, overwrite=True)
    assert Bundle.open(out).hash == bundle.hash and names(tmp_path) == ["out"]


def test_an_unknown_variant_is_an_error_before_anything_is_read(tmp_path):
    with pytest.raises(BundleError, match="variant 'cuda-fp8' is unknown; known are cpu-fp32, openvino-fp32"):
        export_bundle(
            Checkpoint(tmp_path / "none", "none", None), [], tmp_path / "out", variants=["cpu-fp32", "cuda-fp8"]
        )


def test_heads_are_checked_before_anything_is_written(encoders, tmp_path):
    wide = write_head(tmp_path / "wide.ckpt", input_size=48)
    with pytest.raises(HeadError, match="head wide reads embeddings of size 48"):
        export(encoders["gte"], {"wide": wide}, tmp_path / "out")
    assert names(tmp_path) == ["wide.ckpt"]


def test_a_directory_is_a_checkpoint_named_after_itself(encoders, monkeypatch):
    assert find_checkpoint(str(encoders["gte"])) == Checkpoint(encoders["gte"], "gte", None)
    monkeypatch.chdir(encoders["gte"])
    assert find_checkpoint(".").id == "gte"


@pytest.mark.parametrize("encoder", ["/none/such", "not a hub id!"])
def test_what_is_neither_directory_nor_hub_id_is_an_error(encoder):
    with pytest.raises(CheckpointError, match=f"{encoder} is neither a directory here nor a model"):
        find_checkpoint(encoder)


def export_bert(encoders, head_files, out, overwrite=False):
    heads = [read_head("edu", head_files["edu"])]
    return export_bundle(
        Checkpoint(encoders["bert"], "bert", None), heads, out, "mean", MAX_TOKENS, overwrite=overwrite
    )


def misread_a_bias(monkeypatch):
    """Export now reads a wrong last bias; the oracle reads the checkpoint itself."""

    def misread(directory):
        weights = read_encoder(directory)
        *layers, last = weights.layers
        norm = replace(last.mlp_norm, bias=last.mlp_norm.bias + np.linspace(0, 1, 32, dtype=np.float32))
        return replace(weights, layers=(*layers, replace(last, mlp_norm=norm)))

    monkeypatch.setattr("jql_export.graphs.read_encoder", misread)


def names(folder):
    return sorted(file.name for file in folder.iterdir())
