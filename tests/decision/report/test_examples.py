"""Excerpts come from the corpus that was scored, or not at all."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jql_engine.decision.report.examples import EXCERPT, shortened
from jql_engine.decision.report.report import Sources, take_figures
from jql_engine.errors import InputError
from tests.decision.report.made import SCRIPT
from tests.decision.score_files import SETTINGS, write


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the corpus with its times."""
    return shutil.copytree(made.corpus, tmp_path / "corpus")


def test_excerpts_are_of_the_rows(figures):
    for head in figures.heads:
        for one in (*head.best, *head.middle, *head.worst):
            row = int(one.id.removeprefix("id-"))
            expected = f"{SCRIPT} {row}" if row % 3 == 0 else f"text {row} word word"
            assert one.excerpt.startswith(" ".join(expected.split()))


def test_excerpts_are_short_and_on_one_line():
    assert shortened(" a\n\n b\t c ") == "a b c"
    assert shortened("x" * EXCERPT) == "x" * EXCERPT
    assert shortened("x" * 10_000) == "x" * EXCERPT + " …"
    assert shortened("a" + " " * 10_000 + "b") == "a …"


def test_ids_are_those_of_the_column_that_was_copied(tmp_path):
    ids, texts = [f"k{row:02}" for row in range(20)], [f"text {row:02}" for row in range(20)]
    for place, order in (("corpus", slice(None)), ("reversed", slice(None, None, -1))):
        (tmp_path / place).mkdir()
        pq.write_table(pa.table({"key": ids[order], "text": texts[order]}), tmp_path / place / "a.parquet")
    columns = {"key": ids, "score_a": np.arange(20, dtype=np.float32), "n_tokens": np.ones(20, np.int32)}
    size = (tmp_path / "corpus/a.parquet").stat().st_size
    write(tmp_path / "scores/a.parquet", columns, {**SETTINGS, "id_column": "key", "source_bytes": size})
    sources = Sources((str(tmp_path / "scores"),), corpus=(str(tmp_path / "corpus"),), assume_unchanged=True)
    best = take_figures(sources).heads[0].best[0]
    assert (best.id, best.excerpt) == ("k19", "text 19")
    with pytest.raises(InputError, match=r"a\.parquet: row \d+ has key 'k\d+', its scores are of 'k\d+'"):
        take_figures(replace(sources, corpus=(str(tmp_path / "reversed"),)))


def test_a_corpus_with_other_rows_is_refused(copied, sources):
    table = pq.read_table(copied / "a/0.parquet")
    pq.write_table(table.slice(1), copied / "a/0.parquet")
    with pytest.raises(
        InputError, match=r"0.parquet has 699 rows and its scores .* 700; give the corpus that was scored"
    ):
        take_figures(replace(sources, corpus=(str(copied),)))


def test_a_corpus_of_another_size_is_refused(copied, sources):
    table = pq.read_table(copied / "a/0.parquet")
    pq.write_table(table, copied / "a/0.parquet", compression="none")
    with pytest.raises(InputError, match=r"bytes and had .* when .* was written; give the corpus that was scored"):
        take_figures(replace(sources, corpus=(str(copied),)))


def test_a_corpus_that_was_touched_is_refused_unless_it_is_said_to_be_the_same(copied, sources, figures):
    os.utime(copied / "a/0.parquet")
    os.utime(copied / "a/1.parquet")
    with pytest.raises(InputError, match=r"was changed or copied since .*--assume-unchanged"):
        take_figures(replace(sources, corpus=(str(copied),)))
    found = take_figures(replace(sources, corpus=(str(copied),), assume_unchanged=True), min_group=100)
    assert found.heads == figures.heads


def test_a_corpus_with_other_ids_is_refused(copied, sources):
    for number in range(2):
        file = copied / f"a/{number}.parquet"
        status = file.stat()
        content = file.read_bytes().replace(b"id-", b"ix-")
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputError, match=r"row \d+ has id 'ix-\d+', its scores are of 'id-\d+'"):
        take_figures(replace(sources, corpus=(str(copied),)))


def test_a_corpus_without_a_file_is_refused(copied, sources):
    (copied / "a/1.parquet").unlink()
    with pytest.raises(
        InputError,
        match=r"the corpus holds no file that .*1.parquet could be the scores of: none is called a/1.parquet",
    ):
        take_figures(replace(sources, corpus=(str(copied),)))


def test_scores_that_were_appended_to_the_corpus_are_their_own_corpus(made, sources, figures, tmp_path):
    for number in range(2):
        texts = pq.read_table(made.corpus / f"a/{number}.parquet", columns=["text"])
        scores = pq.read_table(made.scores / f"a/{number}.parquet")
        (tmp_path / "a").mkdir(exist_ok=True)
        pq.write_table(scores.append_column("text", texts["text"]), tmp_path / f"a/{number}.parquet")
    found = take_figures(replace(sources, inputs=(str(tmp_path),), corpus=(str(tmp_path),)), min_group=100)
    assert found.heads == figures.heads
