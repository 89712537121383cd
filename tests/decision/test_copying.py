"""jql-cut with a corpus: the kept rows alone, all columns, in order, whatever kills it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jql_engine.decision.copying import Copier, Joined
from jql_engine.decision.cut import Copies, Sources, cut
from jql_engine.decision.opening import open_scores
from jql_engine.decision.result import Request
from jql_engine.decision.threshold import decide
from jql_engine.errors import EngineError, InputError, OutputError
from jql_engine.files.chunks import Segment
from jql_engine.files.inputs import Columns, InputFile, find_files
from jql_engine.files.output import OutputFile
from jql_engine.files.settings import METADATA_KEY
from jql_engine.files.versions import version_of
from jql_engine.job.plan import Job
from jql_engine.job.progress import RunLog

SCRIPT = "import sys; from jql_engine.cli.cut import main; sys.argv[0] = 'jql-cut'; main()"
HEADS = ("edu", "prose")


def corpus_of(folder: Path, n_files: int = 4, n_rows: int = 700, seed: int = 0) -> tuple[Path, Path]:
    """A corpus with columns of several kinds, and scores of it as jql-run writes them."""
    rng = np.random.default_rng(seed)
    for number in range(n_files):
        name = f"{'ab'[number % 2]}/{number}.parquet"
        rows = n_rows if number else 2 * n_rows
        ids = pa.array([f"{number}-{row}" for row in range(rows)])
        lang = pa.array(rng.choice(["de", "en", "fr"], rows))
        source = folder / "corpus" / name
        source.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table(
            {
                "id": ids,
                "text": pa.array([f"text {row} " * (row % 5) for row in range(rows)]),
                "lang": lang.dictionary_encode(),
                "meta": pa.array([{"n": row, "tags": ["x"] * (row % 3)} for row in range(rows)]),
            }
        ).replace_schema_metadata({b"made_by": b"a test"})
        pq.write_table(table, source, row_group_size=200)
        scores = [pa.array(rng.normal(size=rows).astype(np.float32), mask=rng.random(rows) < 0.03) for _ in HEADS]
        write_scores(folder / "scores" / name, source, ids, lang, scores)
    return folder / "corpus", folder / "scores"


def write_scores(place: Path, source: Path, ids: pa.Array, lang: pa.Array, scores: list[pa.Array]) -> None:
    size, version = version_of(source)
    settings = {"heads": list(HEADS), "bundle": "b", "output": "sidecar", "id_column": "id"}
    own = {"source_bytes": size, "source_version": version}
    columns = {f"score_{head}": column for head, column in zip(HEADS, scores, strict=True)}
    table = pa.table(
        {"id": ids, "lang": lang, **columns, "n_tokens": pa.array(np.arange(len(ids), dtype=np.int32) % 90)}
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(settings | own)}), place)


def keep(
    corpus: Path | None,
    scores: Path,
    out: Path,
    *,
    quantile: float = 0.6,
    min_group: int = 100,
    stop: Event | None = None,
    **options: object,
) -> dict[str, object]:
    request = Request("all", quantile=quantile, min_group=min_group)
    job = Job(() if corpus is None else (str(corpus),), str(out), **options)
    sources = Sources((str(scores),), (), "lang")
    return cut(sources, request, str(out / "thresholds.json"), Copies(job, 1, RunLog(None), stop or Event()))


def expected(corpus: Path, scores: Path) -> dict[str, pa.Table]:
    """By NumPy on whole columns: the paper's rule, each head's own quantile of each language."""
    names = sorted(file.relative_to(scores).as_posix() for file in scores.rglob("*.parquet"))
    tables = {name: pq.read_table(scores / name) for name in names}
    whole = pa.concat_tables([table.replace_schema_metadata() for table in tables.values()])
    values = np.stack([whole[f"score_{head}"].to_numpy(zero_copy_only=False) for head in HEADS])
    langs, is_scored = whole["lang"].to_numpy(zero_copy_only=False), np.isfinite(values).all(axis=0)
    kept = is_scored.copy()
    for lang in np.unique(langs):
        own = values[:, is_scored & (langs == lang)]
        kept[langs == lang] &= (
            values[:, langs == lang] >= np.quantile(own, 0.6, 1, method="inverted_cdf")[:, None]
        ).all(0)
    found, row = {}, 0
    for name, table in tables.items():
        found[name] = pq.read_table(corpus / name).filter(pa.array(kept[row : row + len(table)]))
        row += len(table)
    return found


def assert_same(found: pa.Table, wanted: pa.Table) -> None:
    """The same rows of the same types; a dictionary may lack values that no row has."""
    assert found.schema == wanted.schema
    assert decoded(found).equals(decoded(wanted))


def decoded(table: pa.Table) -> pa.Table:
    return table.set_column(2, "lang", table["lang"].cast(pa.string()))


def test_the_kept_rows_are_those_of_the_paper_s_rule_with_all_columns(tmp_path):
    corpus, scores = corpus_of(tmp_path)
    summary = keep(corpus, scores, tmp_path / "out")
    tables = expected(corpus, scores)
    for name, table in tables.items():
        found = pq.read_table(tmp_path / "out" / name)
        assert_same(found, table)
        assert found.schema.metadata[b"made_by"] == b"a test"
    assert {p.name for p in (tmp_path / "out").rglob("*.*")} == {*(Path(n).name for n in tables), "thresholds.json"}
    decision = json.loads((tmp_path / "out" / "thresholds.json").read_text())
    for group in decision["groups"]:
        kept = sum(
            pc.sum(pc.equal(table["lang"].cast(pa.string()), group["group"])).as_py() for table in tables.values()
        )
        assert group["counts"]["kept_documents"] == kept > 0
        whole = pq.read_table(corpus)["lang"].cast(pa.string())
        assert group["counts"]["documents"] == pc.sum(pc.equal(whole, group["group"])).as_py()
    assert summary["kept_documents"] == sum(map(len, tables.values())) and summary["copied"]["files"] == 4
    again = keep(corpus, scores, tmp_path / "out")
    assert (again["copied"]["files"], again["copied"]["skipped_files"]) == (0, 4)


def test_scores_beside_all_columns_are_their_own_corpus(tmp_path):
    corpus, scores = corpus_of(tmp_path)
    for file in scores.rglob("*.parquet"):
        table, source = pq.read_table(file), pq.read_table(corpus / file.relative_to(scores))
        settings = json.loads(table.schema.metadata[METADATA_KEY]) | {"output": "append"}
        for name in ("text", "meta"):
            table = table.append_column(source.schema.field(name), source[name])
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(settings)}), file)
    keep(None, scores, tmp_path / "out")
    for name, table in expected(corpus, scores).items():
        assert pq.read_table(tmp_path / "out" / name)["meta"].to_pylist() == table["meta"].to_pylist()
    again = open_scores([str(tmp_path / "out")], ["score_edu"], "lang")
    assert decide(again, Request("all", keep=0.5, min_group=1)).counts.kept_documents >= again.n_rows / 2


def test_another_decision_does_not_mix_its_rows_with_those_that_are_there(tmp_path):
    corpus, scores = corpus_of(tmp_path)
    keep(corpus, scores, tmp_path / "out")
    request = Request("any", quantile=0.6, min_group=100)
    job = Job((str(corpus),), str(tmp_path / "out"))
    with pytest.raises(OutputError, match="was computed with other settings: --rule all"):
        cut(Sources((str(scores),), (), "lang"), request, str(tmp_path / "t"), Copies(job, 1, RunLog(None), Event()))


def without_a_row(corpus: Path, scores: Path) -> None:
    file = next(scores.rglob("1.parquet"))
    table = pq.read_table(file)
    pq.write_table(table.slice(1), file)


def of_other_documents(corpus: Path, scores: Path) -> None:
    file = next(scores.rglob("1.parquet"))
    table = pq.read_table(file)
    ids = [f"other {i}" if i == 300 else i_ for i, i_ in enumerate(table["id"].to_pylist())]
    pq.write_table(table.set_column(0, "id", pa.array(ids)), file)


def of_a_changed_source(corpus: Path, scores: Path) -> None:
    file = next(corpus.rglob("1.parquet"))
    pq.write_table(pq.read_table(file), file, compression="none")


def of_a_copied_source(corpus: Path, scores: Path) -> None:
    file = next(corpus.rglob("1.parquet"))
    content = file.read_bytes()
    time.sleep(0.01)
    file.unlink()
    file.write_bytes(content)


def without_a_file(corpus: Path, scores: Path) -> None:
    next(scores.rglob("1.parquet")).unlink()


def of_a_file_that_is_gone(corpus: Path, scores: Path) -> None:
    next(corpus.rglob("1.parquet")).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_row, r"1\.parquet has 700 rows and its scores .*1\.parquet 699; .* score it again"),
        (of_a_changed_source, r"1\.parquet has .* bytes and had .* when .* was written; .* score it again"),
        (of_a_copied_source, r"1\.parquet was changed or copied since .*, or give --assume-unchanged"),
        (without_a_file, r"1\.parquet has no scores: none of the score files is called b/1\.parquet"),
        (of_a_file_that_is_gone, r"1 of 4 score files are of no file of the corpus, b/1\.parquet among them"),
    ],
)
def test_scores_that_do_not_line_up_are_an_error_before_anything_is_written(tmp_path, damage, message):
    corpus, scores = corpus_of(tmp_path)
    damage(corpus, scores)
    with pytest.raises(EngineError, match=message):
        keep(corpus, scores, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_copied_corpus_is_taken_where_that_is_asked_for(tmp_path):
    corpus, scores = corpus_of(tmp_path)
    of_a_copied_source(corpus, scores)
    keep(corpus, scores, tmp_path / "out", assume_unchanged=True)
    for name, table in expected(corpus, scores).items():
        assert_same(pq.read_table(tmp_path / "out" / name), table)


def test_ids_are_compared_row_by_row(tmp_path):
    corpus, scores = corpus_of(tmp_path)
    of_other_documents(corpus, scores)
    summary = keep(corpus, scores, tmp_path / "out")
    [unfinished] = summary["unfinished"]
    assert "row 300 has id '1-300', its scores are of 'other 300'" in unfinished["reason"]
    assert not (tmp_path / "out" / "b" / "1.parquet").exists() and summary["copied"]["files"] == 3


@pytest.mark.parametrize(
    ("other", "named"),
    [({"quantile": 0.7}, "--quantile 0.6 .* --quantile 0.7"), ({"min_group": 50}, "--min-group 100 .* --min-group 50")],
)
def test_another_request_is_named_by_its_option(other, named, tmp_path):
    corpus, scores = corpus_of(tmp_path, 1)
    keep(corpus, scores, tmp_path / "out")
    with pytest.raises(OutputError, match=named):
        keep(corpus, scores, tmp_path / "out", **other)


def test_a_missing_corpus_is_named_before_anything_is_read(tmp_path, monkeypatch):
    _, scores = corpus_of(tmp_path, 1)
    monkeypatch.setattr("jql_engine.decision.cut.decide", lambda *_: pytest.fail("scores were read"))
    with pytest.raises(InputError, match=r"was not written by jql-run --output append.*; give --corpus"):
        keep(None, scores, tmp_path / "out")


def test_a_corpus_of_json_lines_and_scores_alone_are_named(tmp_path):
    corpus, scores = corpus_of(tmp_path, 1)
    with pytest.raises(
        InputError, match=r"was not written by jql-run --output append.*; give --corpus, the files that were scored"
    ):
        keep(None, scores, tmp_path / "out")
    file = next(corpus.rglob("*.parquet"))
    file.with_suffix(".jsonl").write_text('{"text": "x"}\n')
    file.unlink()
    with pytest.raises(InputError, match=r"0\.jsonl: kept rows are written with all columns, of parquet files alone"):
        keep(corpus, scores, tmp_path / "out")


@pytest.mark.parametrize("seed", [1])
def test_killed_at_any_moment_it_goes_on_and_writes_the_same(tmp_path, seed, kills=6):
    corpus, scores = corpus_of(tmp_path, n_files=220, n_rows=150, seed=seed)
    corpus_of(tmp_path, n_files=1, n_rows=150_000, seed=seed)  # a file of several chunks
    out = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, scores, "--corpus", corpus, "--out", out, "--group-column", "lang"]
    command += ["--quantile", "0.6", "--min-group", "100", "--workers", "2"]
    rng = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(1.0, 5.0))
        process.kill()
        process.wait()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["unfinished"] == []
    for name, table in expected(corpus, scores).items():
        assert_same(pq.read_table(out / name), table)
    assert sorted(p.name for p in out.iterdir()) == ["a", "b", "thresholds.json"]


@pytest.mark.parametrize("inside", [".", "kept"])
def test_scores_are_never_replaced_by_the_rows_that_are_kept(tmp_path, inside):
    corpus, scores = corpus_of(tmp_path)
    before = {file: file.read_bytes() for file in scores.rglob("*.parquet")}
    with pytest.raises(OutputError, match=r"lies inside of the input|would take the place of the scores"):
        keep(corpus, scores, scores / inside, overwrite=True)
    with pytest.raises(OutputError, match="would take the place of the scores"):
        request = Request("all", quantile=0.6, min_group=100)
        flat = tmp_path / "flat"
        flat.mkdir()
        for file in corpus.rglob("*.parquet"):
            (flat / file.name).symlink_to(file)
        for file in [*scores.glob("*/*.parquet")]:
            file.rename(scores / file.name)
        files = Sources(tuple(map(str, sorted(scores.glob("*.parquet")))), (), "lang")
        job = Job((str(flat),), str(scores), overwrite=True)
        cut(files, request, str(tmp_path / "t"), Copies(job, 1, RunLog(None), Event()))
    found = {file.name: file.read_bytes() for file in scores.rglob("*.parquet")}
    assert found == {file.name: content for file, content in before.items()}


def test_a_text_that_repeats_is_held_once_until_it_is_written(tmp_path):
    source, n_rows = tmp_path / "corpus" / "a.parquet", 3_000
    source.parent.mkdir()
    texts = pa.array(["x" * 20_000] * n_rows)
    pq.write_table(pa.table({"id": np.arange(n_rows), "text": texts}), source, row_group_size=1_000)
    scores = [pa.array(np.arange(n_rows, dtype=np.float32)) for _ in HEADS]
    write_scores(tmp_path / "scores" / "a.parquet", source, pa.array(range(n_rows)), pa.array(["de"] * n_rows), scores)
    files = open_scores([str(tmp_path / "scores")], group_column="lang")
    joined = Joined.of(decide(files, Request("all", quantile=0.1)), files)
    [source_file] = find_files([str(tmp_path / "corpus")]).files
    file = InputFile(source_file, Columns(), pq.read_schema(source), (1_000,) * 3, (1,) * 3)
    output = OutputFile(tmp_path / "out", file, file.schema, "derived", {})
    kept = Copier(joined, {0: output}, None, Event(), lambda *_: None)._kept(Segment(0, 0, n_rows))
    assert len(kept) == 2_701 and kept.nbytes < 1 << 20
    output.commit(Segment(0, 0, n_rows), kept)
    assert pq.read_table(tmp_path / "out" / "a.parquet").equals(pq.read_table(source).slice(299))


def test_a_file_without_rows_gives_one_without_rows(tmp_path):
    corpus, scores = corpus_of(tmp_path, n_files=2)
    source, place = corpus / "a/0.parquet", scores / "a/0.parquet"
    pq.write_table(pq.read_table(source).slice(0, 0), source)
    empty = [pa.array([], pa.float32())] * len(HEADS)
    write_scores(place, source, pa.array([], pa.string()), pa.array([], pa.string()), empty)
    assert keep(corpus, scores, tmp_path / "out")["unfinished"] == []
    found = pq.read_table(tmp_path / "out/a/0.parquet")
    assert found.num_rows == 0 and found.schema == pq.read_schema(source).with_metadata(found.schema.metadata)
    assert pq.read_table(tmp_path / "out/b/1.parquet").num_rows > 0


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.string_view(), "a text that is longer than twelve"),
        (pa.binary_view(), b"\xff"),
        (pa.list_(pa.string_view()), ["a", None]),
        (pa.map_(pa.string(), pa.int32()), [("a", 1)]),
        (pa.decimal128(20, 3), Decimal("1.500")),
        (pa.list_(pa.float32(), 2), [0.5, 1.5]),
        (pa.dictionary(pa.int8(), pa.string()), "a"),
        (pa.list_(pa.null()), [None, None]),
        (pa.struct([("q", pa.list_(pa.null()))]), {"q": [None]}),
    ],
    ids=str,
)
def test_columns_of_every_type_are_kept(kind, value, tmp_path):
    corpus, scores = corpus_of(tmp_path, n_files=1)
    source, place = corpus / "a/0.parquet", scores / "a/0.parquet"
    kept = expected(corpus, scores)["a/0.parquet"]["id"]
    table, old = pq.read_table(source), pq.read_table(place)
    values = [None if row % 7 == 0 else value for row in range(len(table))]
    pq.write_table(table.append_column("own", pa.array(values, kind)), source)
    write_scores(place, source, old["id"], old["lang"], [old[f"score_{head}"] for head in HEADS])
    assert keep(corpus, scores, tmp_path / "out")["unfinished"] == []
    found = pq.read_table(tmp_path / "out/a/0.parquet")
    assert found["id"].equals(kept) and found.schema.field("own").type == kind
    assert found["own"].to_pylist() == [values[int(name.rpartition("-")[2])] for name in kept.to_pylist()]


def test_thresholds_stand_beside_the_rows_that_they_describe_alone(tmp_path, monkeypatch):
    """They are written once all rows are there, and go before the first row of another decision is."""
    corpus, scores = corpus_of(tmp_path)
    out = tmp_path / "out"
    keep(corpus, scores, out)
    before = (out / "thresholds.json").read_bytes()
    with pytest.raises(OutputError, match="other settings"):
        keep(corpus, scores, out, quantile=0.9)
    assert (out / "thresholds.json").read_bytes() == before
    monkeypatch.setattr("jql_engine.decision.copying.run_work", broken)
    with pytest.raises(KeyboardInterrupt):
        keep(corpus, scores, out, quantile=0.9, overwrite=True)
    assert not (out / "thresholds.json").exists()
    monkeypatch.undo()
    stop = Event()
    stop.set()
    keep(corpus, scores, out, quantile=0.9, stop=stop)
    assert not (out / "thresholds.json").exists()
    keep(corpus, scores, out, quantile=0.9)
    assert json.loads((out / "thresholds.json").read_bytes())["quantile"] == 0.9


def broken(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
