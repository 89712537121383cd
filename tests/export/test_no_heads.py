"""A bundle that only embeds, from export to what a run may do with it."""

from __future__ import annotations

import sys
import threading

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from jql_engine import Engine
from jql_engine.bundle import READOUTS, Bundle
from jql_engine.errors import BundleError, ParityError
from jql_engine.job.launch import Machine, rescore, score
from jql_engine.job.plan import Job
from jql_engine.job.progress import RunLog
from jql_export import cli, probes
from jql_export.bundle import export_bundle
from jql_export.hub import Checkpoint
from jql_export.tolerances import TOLERANCES
from tests.conftest import FAMILIES, MAX_TOKENS, ON_CPU, POOLING
from tests.export.test_bundle import misread_a_bias

FP32 = TOLERANCES["fp32"]


@pytest.fixture(scope="module")
def bare(encoders, tmp_path_factory) -> dict[str, Bundle]:
    """Bundles without heads, with every variant; tests must not change them."""
    root = tmp_path_factory.mktemp("bare")
    return {
        family: export_bundle(
            Checkpoint(encoders[family], family, None), (), root / family, POOLING[family], MAX_TOKENS, ON_CPU
        )
        for family in FAMILIES
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["cpu-fp32", "standard-fp32"])
def test_it_embeds_as_the_bundle_with_heads_does_and_scores_nothing(bare, bundles, family, variant):
    engine = Engine(bare[family].path, device="cpu", variant=variant)
    texts = [*probes.SENTENCES, None]
    expected = Engine(bundles[family].path, device="cpu", variant=variant).embed(texts)
    np.testing.assert_array_equal(engine.embed(texts), expected)
    scores = engine.score(texts)
    assert scores.values.shape == (len(texts), 0) and scores.heads == ()
    assert scores.to_table().column_names == ["n_tokens", "truncated"]
    assert bare[family].encoder_hash == bundles[family].encoder_hash


def test_parity_is_that_of_the_embedding(bare):
    for variant in bare["gte"].manifest.variants.values():
        assert 0 < variant.parity["max_abs_embedding"] <= FP32.embedding
        assert not {"max_abs_score", "max_abs_batch"} & variant.parity.keys()


def test_a_wrong_embedding_is_refused(encoders, tmp_path, monkeypatch):
    misread_a_bias(monkeypatch)
    with pytest.raises(ParityError, match="embedding differs"):
        export_bundle(Checkpoint(encoders["gte"], "gte", None), (), tmp_path / "out", "cls", MAX_TOKENS)
    assert not any(tmp_path.iterdir())


def test_the_files_say_that_there_are_no_heads(bare):
    bundle = Bundle.open(bare["gte"].path)
    assert bundle.heads == () and bundle.manifest.readouts == []
    assert load_file(bundle.path / READOUTS) == {}
    for name in ON_CPU:
        outputs = onnx.load(bundle.graph(name), load_external_data=False).graph.output
        sizes = {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in outputs}
        assert sizes == {"scores": 0, "embedding": 32}


def write(file):
    pq.write_table(pa.table({"text": pa.array([*probes.SENTENCES, None], pa.string())}), file)
    return str(file)


def run(bundle, file, out, **options):
    return score(Job((file,), str(out), **options), bundle, Machine("cpu"), RunLog(None), threading.Event())


def test_a_run_keeps_the_vectors_for_heads_to_come(bare, bundle, tmp_path):
    file = write(tmp_path / "a.parquet")
    run(bare["gte"], file, tmp_path / "vectors", embeddings="fp32")
    table = pq.read_table(tmp_path / "vectors" / "a.parquet")
    assert table.column_names == ["n_tokens", "truncated", "embedding"]
    rescore(Job((str(tmp_path / "vectors"),), str(tmp_path / "out")), bundle, 1, RunLog(None), threading.Event())
    run(bundle, file, tmp_path / "direct")
    later, direct = (pq.read_table(tmp_path / folder / "a.parquet") for folder in ("out", "direct"))
    assert later.column_names == direct.column_names
    for name in ("score_edu", "score_prose"):
        found, expected = (table[name].to_numpy(zero_copy_only=False) for table in (later, direct))
        np.testing.assert_allclose(found, expected, rtol=0, atol=FP32.batch)


def test_a_run_without_vectors_has_nothing_to_compute(bare, tmp_path):
    file = write(tmp_path / "a.parquet")
    with pytest.raises(BundleError, match="gte has no heads, only embeddings; give --embeddings fp16 or fp32"):
        run(bare["gte"], file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_there_is_nothing_to_rescore_with(bare, tmp_path):
    job = Job((str(tmp_path),), str(tmp_path / "out"))
    with pytest.raises(BundleError, match="gte has no heads to apply"):
        rescore(job, bare["gte"], 1, RunLog(None), threading.Event())


def test_the_command_writes_one(encoders, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "--encoder", encoders["gte"], "--no-heads", "--out", tmp_path / "out", "--pooling=cls",
         f"--max-tokens={MAX_TOKENS}")  # fmt: skip
    assert "no heads\n" in capsys.readouterr().err
    assert Bundle.open(tmp_path / "out").heads == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-heads", "--head=a=b"], "--no-heads: leaves no place for --head"),
        (["--heads-revision=main", "--head=a=b"], "is for the default heads, which are not asked for"),
        (["--heads-revision=main", "--no-heads"], "is for the default heads, which are not asked for"),
    ],
)
def test_options_that_contradict_each_other_are_misuse(monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "--out=any", *options)
    assert end.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["jql-export", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
