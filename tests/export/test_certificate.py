"""The certificate on a user's own documents: what it says, what it refuses, and that jobs stay valid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jql_engine import Engine, probe_texts
from jql_engine.bundle import MANIFEST, Bundle, describe_files
from jql_engine.certificate import CERTIFICATE, CUT, read_certificate
from jql_engine.errors import BundleError, InputError, ParityError
from jql_engine.sessions.select import choose
from jql_export.bundle import export_bundle
from jql_export.certificate import PAGE, certify_bundle, draw
from jql_export.families.read import read_encoder
from jql_export.graph.encoder import write_graph
from jql_export.hub import Checkpoint
from jql_export.readouts.classifier import read_classifier
from jql_export.readouts.head_file import read_head
from jql_export.variants import VARIANTS as KINDS
from tests.conftest import export, write_head
from tests.export.test_classifier import write_classifier
from tests.export.test_parity import Graph, key_bias_dropped, positions_shifted
from tests.job.test_run import score, write

TEXTS = [f"{a} {b}" for a in probe_texts.SENTENCES[:12] for b in probe_texts.SENTENCES[:12]]
VARIANTS = ["cpu-fp32", "standard-fp32"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write(folder / "a.parquet", [*TEXTS[:70], None], 20)
    write(folder / "b.parquet", TEXTS[70:], 20)
    return folder


@pytest.fixture(scope="module", params=["gte", "bert"])
def made(request, encoders, head_files, tmp_path_factory):
    """A bundle with two graphs, and what it was made of."""
    family = request.param
    out = tmp_path_factory.mktemp("certified") / family
    heads = [read_head(name, file) for name, file in head_files.items()]
    return export(encoders[family], head_files, out, VARIANTS), Checkpoint(encoders[family], family, None), heads


def test_every_graph_is_compared_with_the_reference_on_a_sample(made, corpus, tmp_path):
    bundle, checkpoint, heads = made
    job = tmp_path / "scores"
    score(Engine(bundle, device="cpu"), job, corpus)
    before = {file: file.read_bytes() for file in job.rglob("*.parquet")}
    certificate = certify_bundle(bundle.path, checkpoint, heads, str(corpus), n_docs=100)
    assert certificate["documents"] == 100 and certificate["corpus"]["documents"] == len(TEXTS) + 1
    assert list(certificate["variants"]) == VARIANTS
    for found in certificate["variants"].values():
        assert [flip["what"] for flip in found["flips"]] == ["edu", "prose", "all"]
        assert all(flip["share"] == 0 and 0 < flip["upper"] < 0.05 for flip in found["flips"])
    bf16 = certificate["reference_bf16"]["comparison"]["slices"][0]["differences"]
    fp32 = certificate["variants"]["cpu-fp32"]["comparison"]["slices"][0]["differences"]
    assert all(a["greatest"] > 10 * b["greatest"] for a, b in zip(bf16, fp32, strict=True)), "bf16 rounds"
    # The certificate is no part of the bundle: it opens, and the job is finished, as before.
    assert Bundle.open(bundle.path).hash == bundle.hash
    bundle.check_still_there()  # as every worker of a job that is resumed does
    assert score(Engine(bundle.path, device="cpu"), job, corpus).skipped_files == 2
    assert {file: file.read_bytes() for file in job.rglob("*.parquet")} == before
    page = (bundle.path / PAGE).read_text()
    assert bundle.hash in page and all(name in page for name in VARIANTS)
    (bundle.path / CERTIFICATE).unlink()


def test_the_sample_is_uniform_over_all_files_and_the_same_each_time(made, corpus):
    bundle = made[0]
    one, again = (draw(bundle, str(corpus), "text", 40) for _ in range(2))
    assert one.tokens.ids.tolist() == again.tokens.ids.tolist() and len(one.tokens.rows) == 40
    everything = draw(bundle, str(corpus), "text", 1_000)
    assert len(everything.tokens.rows) == len(TEXTS), "a null is not drawn"


def test_the_end_of_a_corpus_is_drawn_as_often_as_its_start(made, tmp_path):
    """Corpora are in some order: by language, by date."""
    tenths = np.arange(2_000) // 200
    pq.write_table(pa.table({"text": ["water " * (tenth + 1) for tenth in tenths]}), tmp_path / "a.parquet")
    drawn = draw(made[0], str(tmp_path), "text", 1_000).tokens.lengths
    _, counts = np.unique(drawn, return_counts=True)
    assert len(counts) == 10 and counts.sum() == 1_000
    assert np.abs(counts - 100).max() < 4 * np.sqrt(100 * 0.9 * 0.5), counts


def test_where_few_rows_have_a_text_more_are_drawn(made, tmp_path):
    texts = [f"water {i}" if i % 20 == 0 else None for i in range(20_000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert len(draw(made[0], str(tmp_path), "text", 300).tokens.rows) == 300


def test_the_fastest_variant_within_the_flips_is_taken(made, corpus):
    bundle, checkpoint, heads = made
    with pytest.raises(BundleError, match=f"has no {CERTIFICATE}, which --max-flips needs: make one with jql-export"):
        choose(bundle, "cpu", max_flips=0.01)
    certificate = certify_bundle(bundle.path, checkpoint, heads, str(corpus), n_docs=100)
    upper = certificate["variants"]["cpu-fp32"]["flips"][0]["upper"]
    file = bundle.path / CERTIFICATE
    try:
        assert choose(bundle, "cpu", max_flips=upper).variant == "cpu-fp32"
        with pytest.raises(BundleError, match=r"cpu-fp32: of 100 documents 0\.000% change sides by .*, up to 3\."):
            choose(bundle, "cpu", max_flips=upper / 2)
        with pytest.raises(BundleError, match="allow more with --max-flips"):
            choose(bundle, "cpu", "standard-fp32", max_flips=0.0)
        with pytest.raises(InputError, match="two limits of one thing"):
            choose(bundle, "cpu", tolerance=0.1, max_flips=0.1)
        certificate["variants"]["cpu-fp32"]["flips"][1]["upper"] = 0.5
        file.write_text(json.dumps(certificate))
        assert choose(bundle, "cpu", max_flips=upper).variant == "standard-fp32"
        with pytest.raises(BundleError, match=r"is of windows first, aggregate max; all, max are asked for"):
            choose(bundle.with_windows("all", None), "cpu", max_flips=upper)
        file.write_text(json.dumps(certificate | {"bundle": "0" * 64}))
        with pytest.raises(
            BundleError, match=r"certificate\.json is of bundle 000000000000, and this is .*exported again"
        ):
            read_certificate(bundle)
        file.write_text("{")
        with pytest.raises(BundleError, match=r"certificate\.json is damaged"):
            read_certificate(bundle)
    finally:
        file.unlink()
    assert CUT == 0.6


def test_other_sources_than_those_of_the_bundle_are_refused(made, encoders, corpus, tmp_path):
    bundle, checkpoint, heads = made
    other = shutil.copytree(checkpoint.directory, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(BundleError, match=r"config\.json is not the file that .* was made of"):
        certify_bundle(bundle.path, Checkpoint(other, "other", None), heads, str(corpus))
    wrong = [read_head("edu", write_head(tmp_path / "head.ckpt", seed=9)), *heads[1:]]
    with pytest.raises(BundleError, match=r"head edu: .* was made of other heads, edu, prose"):
        certify_bundle(bundle.path, checkpoint, wrong, str(corpus))
    with pytest.raises(BundleError, match="was made of other heads"):
        certify_bundle(bundle.path, checkpoint, heads[::-1], str(corpus))
    with pytest.raises(InputError, match="does not exist"):
        certify_bundle(bundle.path, checkpoint, heads, str(tmp_path / "nothing"))
    assert not (bundle.path / CERTIFICATE).exists()


def test_another_activation_than_that_of_the_bundle_is_named(encoders, corpus, tmp_path):
    classifier = write_classifier(tmp_path / "classifier", encoders["bert"], "bert")
    checkpoint = Checkpoint(classifier, "classifier", None)
    bundle = export_bundle(checkpoint, [read_classifier("q", classifier, "sigmoid")], tmp_path / "out")
    with pytest.raises(BundleError, match=r"head q: .* has the activation sigmoid, given was None: repeat the --activ"):
        certify_bundle(bundle.path, checkpoint, [read_classifier("q", classifier)], str(corpus))


def one_head_perturbed(graph):
    graph.weights["heads.output.weight"][..., 0] += 0.05


def damaged(bundle: Bundle, folder: Path, change) -> Bundle:
    """A copy whose graph was changed, and whose manifest says that it should be so."""
    copy = shutil.copytree(bundle.path, folder)
    graph = Graph(bundle.graph("cpu-fp32"))
    change(graph)
    graph.save(copy / bundle.manifest.variants["cpu-fp32"].graph)
    for weights in copy.glob("graphs/cpu-fp32*.data"):
        weights.unlink()
    return relisted(copy)


def relisted(folder: Path) -> Bundle:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = describe_files(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(folder)


@pytest.mark.parametrize("mistake", [one_head_perturbed, key_bias_dropped, positions_shifted])
def test_damage_is_refused_by_the_documents_alone(encoders, head_files, corpus, tmp_path, monkeypatch, mistake):
    """The probe documents, which would refuse these graphs when they are opened, are left out of it."""
    heads = [read_head(name, file) for name, file in head_files.items()]
    made = export(encoders["gte"], head_files, tmp_path / "made", ["cpu-fp32"])
    bundle = damaged(made, tmp_path / "damaged", mistake)
    with pytest.raises(ParityError, match="variant cpu-fp32 is out of tolerance"):
        Engine(bundle, device="cpu")
    monkeypatch.setattr("jql_engine.sessions.open.certify", lambda *_: {})
    with pytest.raises(
        ParityError, match=r"cpu-fp32 is out of tolerance: score_.* differs by .* on the documents given"
    ):
        certify_bundle(bundle.path, Checkpoint(encoders["gte"], "gte", None), heads, str(corpus), n_docs=50)
    assert not (bundle.path / CERTIFICATE).exists()


def test_the_first_token_alone_in_the_place_of_the_mean_is_refused(encoders, head_files, corpus, tmp_path, monkeypatch):
    heads = [read_head(name, file) for name, file in head_files.items()]
    made = export(encoders["bert"], head_files, tmp_path / "made", ["cpu-fp32"])
    assert made.manifest.pooling == "mean"
    graph = made.graph("cpu-fp32")
    graph.with_name(graph.name + ".data").unlink()
    graph.unlink()
    write_graph(graph, read_encoder(encoders["bert"]), heads, "cls", KINDS["cpu-fp32"].dialect())
    bundle = relisted(made.path)
    monkeypatch.setattr("jql_engine.sessions.open.certify", lambda *_: {})
    with pytest.raises(ParityError, match="cpu-fp32 is out of tolerance"):
        certify_bundle(bundle.path, Checkpoint(encoders["bert"], "bert", None), heads, str(corpus), n_docs=50)
