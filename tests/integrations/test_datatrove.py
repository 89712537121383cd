"""The real datatrove, with its own readers, writers and executor."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter

from jql_engine import probe_texts
from jql_engine.bundle import MANIFEST, sha256_of
from jql_engine.errors import BundleError, DeviceError
from jql_engine.integrations import datatrove
from jql_engine.integrations.datatrove import JQLAnnotator, stats_adapter
from jql_export.tolerances import TOLERANCES
from tests.conftest import without_gpu
from tests.job.test_run import score

TEXTS = [*probe_texts.SENTENCES, "", *probe_texts.ODDITIES[20:60], " ".join(probe_texts.SENTENCES)]


def documents(texts: list[str | None]) -> list[Document]:
    return [Document(text, f"doc-{i}", metadata={"n": i}) for i, text in enumerate(texts)]


def annotate(texts: list[str | None], **options: object) -> list[Document]:
    return list(JQLAnnotator(device_overwrite="cpu", **options).run(iter(documents(texts))))


def assert_scores(found: list[dict], engine, texts: list[str]) -> None:
    expected = engine.score(texts)
    for i, head in enumerate(engine.heads):
        values = np.array([metadata[f"score_{head}"] for metadata in found])
        np.testing.assert_allclose(values, expected.values[:, i], rtol=0, atol=TOLERANCES["fp32"].batch)


@pytest.mark.parametrize("limits", [(4096, 16 << 20), (1, 16 << 20), (7, 16 << 20), (4096, 100)])
def test_every_document_comes_out_in_order_with_its_scores(bundle, engine, monkeypatch, limits):
    monkeypatch.setattr(datatrove, "BUFFER_DOCUMENTS", limits[0])
    monkeypatch.setattr(datatrove, "BUFFER_CHARACTERS", limits[1])
    found = annotate(TEXTS, bundle=bundle.path, batch_size=1)
    assert [(d.id, d.text, d.metadata["n"]) for d in found] == [(f"doc-{i}", t, i) for i, t in enumerate(TEXTS)]
    assert_scores([d.metadata for d in found], engine, TEXTS)


def test_a_task_reads_its_bundle_once(bundle, monkeypatch):
    read: list[str] = []
    monkeypatch.setattr("jql_engine.bundle.sha256_of", lambda file: read.append(file.name) or sha256_of(file))
    annotate(["Water"], bundle=bundle.path)
    assert len(read) == len(bundle.manifest.files)


def test_what_is_no_text_has_no_score(bundle):
    found = annotate(["Water", None, "\ud800", ""], bundle=bundle.path)
    assert [d.metadata["score_edu"] is None for d in found] == [False, True, True, False]
    assert [d.text for d in found] == ["Water", None, "\ud800", ""]


def test_several_windows_are_counted(bundle, tmp_path):
    """A bundle says itself which windows are scored."""
    long = Path(shutil.copytree(bundle.path, tmp_path / "long", copy_function=os.link))
    manifest = json.loads((long / MANIFEST).read_text())
    manifest |= {"windows": {"take": "all", "aggregate": "mean"}, "requires": ["windows"]}
    (long / MANIFEST).unlink()
    (long / MANIFEST).write_text(json.dumps(manifest))
    found = annotate(["Water", None, " ".join(probe_texts.SENTENCES)], bundle=long)
    assert [d.metadata["n_windows"] for d in found[:2]] == [1, None] and found[2].metadata["n_windows"] > 2


def test_no_documents_are_no_documents(bundle):
    assert annotate([], bundle=bundle.path) == []
    assert list(JQLAnnotator(bundle=bundle.path, device_overwrite="cpu").run(None)) == []


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"tolerance": 0.0}, r"differ by up to .* from the fp32 reference, allowed is 0"),
        ({"variant": "none"}, "'none' for"),
    ],
)
def test_the_graph_that_was_asked_for_or_an_error(bundle, wanted, said):
    with pytest.raises(BundleError, match=said):
        annotate(["Water"], bundle=bundle.path, **wanted)


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "0"])
def test_a_gpu_that_is_not_there_is_an_error(bundle, device):
    with pytest.raises(DeviceError, match=r"cuda.* was requested"):
        list(JQLAnnotator(bundle=bundle.path, device_overwrite=device).run(iter(documents(["x"]))))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for i in range(4):
        texts = [text for text in TEXTS[i::4] if text]  # datatrove's readers skip what is empty
        ids = [f"{i}-{j}" for j in range(len(texts))]
        pq.write_table(pa.table({"text": texts, "id": ids, "lang": ["x"] * len(texts)}), folder / f"{i}.parquet")
    return folder


def pipeline(source: Path, out: Path, bundle, **options: object) -> list:
    """The one of the original README, but for paths and the bundle."""
    return [
        ParquetReader(data_folder=str(source), glob_pattern="*.parquet"),
        JQLAnnotator(
            stats_writer=JsonlWriter(output_folder=f"{out}/stats", adapter=stats_adapter, expand_metadata=True),
            bundle=bundle.path,
            threads=1,
            **options,
        ),
        ParquetWriter(output_folder=f"{out}/data"),
    ]


def run(source: Path, out: Path, bundle, tasks: int = 2) -> None:
    steps = pipeline(source, out, bundle)
    LocalPipelineExecutor(steps, tasks=tasks, local_tasks=tasks, local_rank_offset=0, logging_dir=f"{out}/logs").run()


def test_the_pipeline_of_the_original_readme_runs_in_two_tasks(bundle, engine, source, tmp_path):
    run(source, tmp_path, bundle)
    found = pa.concat_tables(pq.read_table(file) for file in sorted((tmp_path / "data").glob("*.parquet")))
    given = pa.concat_tables(pq.read_table(file) for file in sorted(source.glob("*.parquet")))
    rows = {row["id"]: row for row in found.to_pylist()}
    assert sorted(rows) == sorted(given["id"].to_pylist()) and len(rows) == found.num_rows
    assert [rows[i]["text"] for i in given["id"].to_pylist()] == given["text"].to_pylist()
    metadata = [rows[i]["metadata"] for i in given["id"].to_pylist()]
    assert_scores(metadata, engine, given["text"].to_pylist())
    stats = [
        json.loads(line)
        for file in sorted((tmp_path / "stats").glob("*.jsonl.gz"))
        for line in gzip.decompress(file.read_bytes()).splitlines()
    ]
    assert sorted(row["id"] for row in stats) == sorted(rows)
    assert all("text" not in row and row["lang"] == "x" for row in stats)
    assert all(row["score_edu"] == rows[row["id"]]["metadata"]["score_edu"] for row in stats)


def test_scores_are_those_of_jql_run(bundle, engine, source, tmp_path):
    run(source, tmp_path, bundle)
    score(engine, tmp_path / "scores", source)
    expected = pa.concat_tables(pq.read_table(file) for file in sorted((tmp_path / "scores").glob("*.parquet")))
    wanted = dict(zip(expected["id"].to_pylist(), expected["score_prose"].to_pylist(), strict=True))
    for file in (tmp_path / "data").glob("*.parquet"):
        for row in pq.read_table(file).to_pylist():
            assert abs(row["metadata"]["score_prose"] - wanted[row["id"]]) <= TOLERANCES["fp32"].batch


class Break(JQLAnnotator):
    """Fails in rank 1 as long as a file is there."""

    def run(self, data, rank=0, world_size=1):
        for i, document in enumerate(JQLAnnotator.run(self, data, rank, world_size)):
            if rank == 1 and i == 3 and Path(self.marker).exists():
                raise RuntimeError("the node went away")
            yield document


def test_a_task_that_failed_is_done_again_and_the_others_are_not(bundle, engine, source, tmp_path):
    steps = pipeline(source, tmp_path, bundle)
    broken = Break(bundle=bundle.path, threads=1, stats_writer=steps[1].stats_writer)
    broken.marker = str(tmp_path / "marker")
    Path(broken.marker).touch()
    steps[1] = broken

    def execute() -> None:
        LocalPipelineExecutor(steps, tasks=2, workers=1, logging_dir=f"{tmp_path}/logs").run()

    with pytest.raises(RuntimeError, match="the node went away"):
        execute()
    [finished] = (tmp_path / "data").glob("*_00000.parquet")
    first = finished.stat().st_mtime_ns
    Path(broken.marker).unlink()
    execute()
    assert finished.stat().st_mtime_ns == first
    found = pa.concat_tables(pq.read_table(file) for file in sorted((tmp_path / "data").glob("*.parquet")))
    texts = [text for file in sorted(source.glob("*.parquet")) for text in pq.read_table(file)["text"].to_pylist()]
    assert sorted(found["text"].to_pylist()) == sorted(texts)


def test_json_lines_in_and_out(bundle, engine, source, tmp_path):
    texts = TEXTS[:10]
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"id": str(i), "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines))
    steps = [
        JsonlReader(str(tmp_path / "in")),
        JQLAnnotator(bundle=bundle.path, device_overwrite="cpu", threads=1),
        JsonlWriter(str(tmp_path / "out"), expand_metadata=True),
    ]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=f"{tmp_path}/logs").run()
    found = [json.loads(x) for x in gzip.decompress((tmp_path / "out/00000.jsonl.gz").read_bytes()).splitlines()]
    assert [row["text"] for row in found] == texts
    assert_scores(found, engine, texts)
