from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jql_engine import Engine
from jql_engine.errors import InputError
from jql_engine.job import estimate
from jql_engine.job.estimate import estimate_work
from jql_engine.job.plan import Job
from jql_engine.job.ranks import Rank
from tests.conftest import MAX_TOKENS
from tests.files.test_formats import lines
from tests.files.test_inputs import write
from tests.inputs import damage

WORDS = "water boils at a lower temperature on a mountain than at the sea "


@pytest.fixture(autouse=True)
def short_probe(monkeypatch):
    monkeypatch.setattr(estimate, "PROBE_SECONDS", 0.02)


def estimated(
    engine: Engine, *inputs: Path, workers: int = 1, price: float | None = None, **options: object
) -> dict[str, Any]:
    return estimate_work(Job(tuple(map(str, inputs)), "", **options), engine.bundle, engine.session, workers, price)


def visible(folder: Path) -> list[tuple[str, int]]:
    return sorted((file.relative_to(folder).as_posix(), file.stat().st_mtime_ns) for file in folder.rglob("*"))


TEXTS = [WORDS * 30, None, "", "water", *[WORDS * (i % 3) for i in range(40)]]


@pytest.mark.parametrize("cuts", [[44], [11, 33], [1, 0, 3, 40]], ids=str)
def test_a_small_job_is_counted_exactly_and_nothing_is_written(engine, tmp_path, cuts):
    first = 0
    for number, n_rows in enumerate(cuts):
        texts = TEXTS[first : first + n_rows]
        first += n_rows
        if number % 2:
            lines(tmp_path / f"{number}.jsonl.gz", *[{"text": text} for text in texts])
        else:
            write(tmp_path / f"{number}.parquet", pa.array(texts, pa.string()), row_group_size=7)
    before = visible(tmp_path)
    found = estimated(engine, tmp_path)
    expected = engine.score(TEXTS)
    assert visible(tmp_path) == before
    assert (found["files"], found["documents"], found["sampled_documents"]) == (len(cuts), 44, 44)
    assert found["tokens"] == expected.n_tokens.sum()
    assert found["mean_tokens"] == pytest.approx(expected.n_tokens.sum() / 44, abs=0.05)
    assert found["p99_tokens"] <= MAX_TOKENS and expected.n_tokens.max() == MAX_TOKENS
    assert found["truncated_share"] == pytest.approx(1 / 44, abs=1e-5) and expected.truncated.sum() == 1
    assert (found["variant"], found["bundle"]) == (engine.session.variant, engine.bundle.hash)


@pytest.mark.parametrize("n_docs", [100, 500])
def test_more_rows_than_places_are_still_all_read_where_they_are_few(engine, tmp_path, n_docs):
    texts = ["water " * (i % 7) for i in range(n_docs)]
    write(tmp_path / "a.parquet", texts[:77])
    write(tmp_path / "b.parquet", texts[77:], row_group_size=50)
    found = estimated(engine, tmp_path)
    assert found["sampled_documents"] == n_docs
    assert found["tokens"] == engine.score(texts).n_tokens.sum()


def test_hours_and_cost_follow_from_tokens_and_speed(engine, tmp_path):
    path = write(tmp_path / "a.parquet", [WORDS] * 5_000)
    found = estimated(engine, path, workers=3, price=1e6)
    assert found["workers"] == 3 and found["tokens_per_second"] > 0
    hours = found["tokens"] / found["tokens_per_second"] / 3600
    assert found["hours"] == pytest.approx(hours, abs=1e-4)
    assert found["cost"] == pytest.approx(hours * 1e6, rel=1e-2)
    assert estimated(engine, path)["cost"] is None


def test_twenty_files_of_different_lengths_are_estimated_nearly_right(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "DOCUMENTS", 25)
    everything = []
    for number in range(20):
        n_docs, n_words = 20 + (number * 37) % 400, 1 + number % 6
        texts = ["water " * (n_words + i % 3) for i in range(n_docs)]
        write(tmp_path / f"{number:02}.parquet", texts, row_group_size=64)
        everything += texts
    found = estimated(engine, tmp_path)
    assert (found["files"], found["documents"]) == (20, len(everything))
    assert 500 <= found["sampled_documents"] <= 25 * 25 < len(everything)
    assert found["tokens"] == pytest.approx(engine.score(everything).n_tokens.sum(), rel=0.1)


def test_only_sampled_row_groups_are_decoded(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "DOCUMENTS", 5)
    path = write(tmp_path / "a.parquet", [f"text {i}" for i in range(24_000)], row_group_size=100)
    damage(path, row_group=5)  # places are 1,000 rows apart
    assert estimated(engine, path)["sampled_documents"] == 24 * 5


@pytest.mark.parametrize("texts", [[], [None, None]], ids=["no rows", "no text"])
def test_a_job_without_text_takes_no_time(engine, tmp_path, texts):
    found = estimated(engine, write(tmp_path / "a.parquet", pa.array(texts, pa.string())), price=2.0)
    assert (found["documents"], found["tokens"], found["hours"], found["cost"]) == (len(texts), 0, 0.0, 0.0)
    assert (found["median_tokens"], found["truncated_share"]) == (0, 0.0)


def test_an_unreadable_file_is_counted_beside_the_others(engine, tmp_path):
    write(tmp_path / "a.parquet", ["x"] * 3)
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    found = estimated(engine, tmp_path)
    assert (found["files"], found["unreadable_files"], found["documents"]) == (1, 1, 3)


def test_a_damaged_page_in_the_sample_is_named(engine, tmp_path):
    path = write(tmp_path / "a.parquet", [f"text {i}" for i in range(100)], row_group_size=50)
    damage(path, row_group=1)
    with pytest.raises(InputError, match=r"a\.parquet cannot be read to its end"):
        estimated(engine, path)


def test_limit_and_rank_are_kept(engine, tmp_path, capfd):
    for number, n_docs in enumerate([30, 20, 10]):
        write(tmp_path / f"{number}.parquet", ["x"] * n_docs)
    assert estimated(engine, tmp_path, limit=35)["documents"] == 35
    capfd.readouterr()
    found = [estimated(engine, tmp_path, rank=Rank(rank, 2, "RANK, WORLD_SIZE")) for rank in range(2)]
    shares = [one["documents"] for one in found]
    assert sum(shares) == 60 and min(shares) > 0
    assert [(one["rank"], one["world_size"]) for one in found] == [(0, 2), (1, 2)]
    assert "jql: of the share of rank 1 of 2 (RANK, WORLD_SIZE) alone" in capfd.readouterr().err


def test_what_is_no_part_of_it_is_named_and_what_would_be_refused_is(bundle, engine, tmp_path, capfd):
    write(tmp_path / "a.parquet", ["x"] * 9)
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    assert estimated(engine, tmp_path)["unreadable_files"] == 1
    assert re.search(r"b\.parquet is not .*; it is left out of what follows", capfd.readouterr().err)
    with pytest.raises(InputError, match="give --windows first"):
        estimated(Engine(bundle, device="cpu", windows="all"), tmp_path, embeddings="fp16")
