"""Columns beside the text: those of a template, those that are copied, and the windows of long documents."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jql_engine import Engine, probe_texts
from jql_engine.bundle import MANIFEST, Bundle
from jql_engine.errors import InputError, OutputError
from jql_engine.files.settings import METADATA_KEY
from jql_engine.job.plan import Job
from jql_engine.job.scoring import prepare
from jql_export.tolerances import TOLERANCES
from tests.job.test_run import score, write

TEXTS = [*probe_texts.SENTENCES[:6], None, " ".join(probe_texts.SENTENCES * 3)]
URLS = [f"https://{i}.example/" for i in range(7)] + [None]


@pytest.fixture(scope="module")
def templated(bundle, tmp_path_factory) -> Engine:
    """An engine of the same bundle with a template."""
    folder = tmp_path_factory.mktemp("templated") / "bundle"
    folder.mkdir()
    for file in bundle.path.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / MANIFEST).unlink()
    manifest = replace(bundle.manifest, template="{url}\n\n{text}", requires=["template"])
    (folder / MANIFEST).write_text(manifest.to_json())
    return Engine(Bundle.open(folder), device="cpu")


def test_a_template_is_filled_from_the_columns_of_every_row(templated, engine, tmp_path):
    path = write(tmp_path / "in" / "a.parquet", TEXTS, 3, url=pa.array(URLS), lang=pa.array(["de", "en"] * 4))
    with (path.parent / "b.jsonl").open("w") as out:
        out.writelines(json.dumps({"url": url, "text": text}) + "\n" for url, text in zip(URLS, TEXTS, strict=True))
    score(templated, tmp_path / "out", path.parent)
    filled = [f"{u}\n\n{t}" if u and t else None for u, t in zip(URLS, TEXTS, strict=True)]
    expected = engine.score(filled)
    direct = templated.score(TEXTS, {"url": URLS})
    for found in pq.read_table(tmp_path / "out" / "a.parquet"), pq.read_table(tmp_path / "out" / "b.parquet"):
        for column in expected.to_table().column_names:
            assert found[column].is_valid().to_pylist() == expected.valid.tolist()
        values = np.column_stack([found[f"score_{head}"].to_numpy() for head in engine.heads])
        for wanted in expected.values, direct.values:
            np.testing.assert_allclose(values, wanted, rtol=0, atol=TOLERANCES["fp32"].batch)


def test_the_text_of_a_template_is_the_text_column_whatever_it_is_called(templated, tmp_path):
    table = pa.table({"body": TEXTS, "url": URLS})
    pq.write_table(table, tmp_path / "a.parquet")
    score(templated, tmp_path / "out", tmp_path / "a.parquet", text_column="body")
    found = pq.read_table(tmp_path / "out" / "a.parquet")
    expected = templated.score(TEXTS, {"url": URLS}).values[:, 0]
    np.testing.assert_allclose(found.column(0).to_numpy(), expected, rtol=0, atol=TOLERANCES["fp32"].batch)


def test_a_missing_column_of_a_template_is_an_error(templated, tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    with pytest.raises(InputError, match="has no column 'url'; it has text: the bundle's template needs it"):
        score(templated, tmp_path / "out", path)
    with pytest.raises(InputError, match=r"needs column 'url' with 1 values, found none; give score\(texts, columns="):
        templated.score(["x"])
    with pytest.raises(InputError, match="column 'url' is int64, expected text"):
        score(templated, tmp_path / "out", write(tmp_path / "a.parquet", ["x"], url=[1]))


def test_columns_are_refused_where_there_is_no_template(engine):
    with pytest.raises(InputError, match="columns url: the bundle has no template"):
        engine.score(["x"], {"url": ["y"]})


def test_texts_that_are_no_utf8_are_counted_once_and_large_ones_read_a_few_at_a_time(templated, tmp_path, monkeypatch):
    monkeypatch.setattr("jql_engine.files.reading.FILLED_BYTES", 64)
    bad = pa.StringArray.from_buffers(
        3, pa.py_buffer(np.array([0, 1, 2, 3], np.int32).tobytes()), pa.py_buffer(b"a\xffb")
    )
    path = write(tmp_path / "a.parquet", pa.array(["x", "y", "z"]), url=bad)
    score(templated, tmp_path / "out", path)
    found = pq.read_table(tmp_path / "out" / "a.parquet")
    assert found["n_tokens"].is_valid().to_pylist() == [True, False, True]


@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.dictionary(pa.int32(), pa.string())])
def test_the_group_column_is_copied_with_its_type(engine, tmp_path, kind):
    groups = pa.array(["1", "2", None] + ["1"] * 5).cast(pa.int64() if kind == pa.int64() else pa.string()).cast(kind)
    path = write(tmp_path / "a.parquet", TEXTS, 3, lang=groups, id=range(8))
    score(engine, tmp_path / "out", path, group_column="lang", chunk_rows=3)
    found = pq.read_table(tmp_path / "out" / "a.parquet")
    assert found.column_names[:2] == ["id", "lang"] and found.schema.field("lang").type == kind
    assert found["lang"].to_pylist() == groups.to_pylist()
    assert json.loads(found.schema.metadata[METADATA_KEY])["group_column"] == "lang"


def test_the_group_column_may_be_the_id_column_and_goes_through_json_lines(engine, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "de", "text": "x"}\n{"id": null, "text": "y"}\n')
    score(engine, tmp_path / "out", tmp_path / "a.jsonl", group_column="id")
    found = pq.read_table(tmp_path / "out" / "a.parquet")
    assert found.column_names[0] == "id" and found["id"].to_pylist() == ["de", None]
    assert found.column_names.count("id") == 1


def test_objects_without_keys_which_parquet_has_no_place_for_stop_their_file_alone(engine, tmp_path):
    (tmp_path / "in").mkdir()
    for name, metadata in (("a", "{}"), ("b", '{"x": 1}')):
        (tmp_path / f"in/{name}.jsonl").write_text(f'{{"text": "x", "metadata": {metadata}}}\n')
    summary = score(engine, tmp_path / "out", tmp_path / "in", id_column="metadata")
    assert [file.name for file in (tmp_path / "out").glob("*.parquet")] == ["b.parquet"]
    [left] = summary.unfinished
    assert left["file"].endswith("a.jsonl") and "cannot be written as parquet: " in left["reason"]


def test_a_group_column_that_is_missing_or_no_name_is_an_error(engine, tmp_path):
    path = write(tmp_path / "a.parquet", ["x"], weight=[1.5])
    with pytest.raises(InputError, match="has no column 'lang'; it has text, weight: name one with --group-column"):
        score(engine, tmp_path / "out", path, group_column="lang")
    with pytest.raises(InputError, match="column 'weight' is double, expected text, integers, booleans or dates"):
        score(engine, tmp_path / "out", path, group_column="weight")


def test_windows_of_long_documents_are_scored_and_counted(bundle, engine, tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS * 2, 3)
    windowed = Engine(bundle, device="cpu", windows="all", aggregate="mean")
    score(windowed, tmp_path / "out", path)
    found, expected = pq.read_table(tmp_path / "out" / "a.parquet"), windowed.score(TEXTS * 2).to_table()
    assert found.column_names == expected.column_names
    for name in ("n_windows", "n_tokens", "truncated"):
        assert found[name].to_pylist() == expected[name].to_pylist()
    values = [np.array(table["score_edu"].to_pylist(), np.float64) for table in (found, expected)]
    np.testing.assert_allclose(*values, rtol=0, atol=TOLERANCES["fp32"].batch)
    settings = json.loads(found.schema.metadata[METADATA_KEY])
    assert (settings["windows"], settings["aggregate"]) == ("all", "mean")
    with pytest.raises(OutputError, match="--windows all then, --windows first now"):
        score(engine, tmp_path / "out", path)


def test_embeddings_of_several_windows_are_refused(bundle, tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    job = Job((str(path),), tmp_path / "out", embeddings="fp16")
    with pytest.raises(InputError, match="not those of --windows all: give --windows first"):
        prepare(job, bundle.with_windows("all", None), "cpu-fp32", 1 << 20)
