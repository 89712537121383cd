from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from jql_engine.cli import cut as cli
from jql_engine.decision.opening import open_scores
from jql_engine.decision.result import Request
from jql_engine.decision.threshold import decide
from jql_engine.job.launch import Machine, score
from jql_engine.job.plan import Job
from jql_engine.job.progress import RunLog
from jql_engine.sessions.base import SessionOptions
from tests.cli.command import Result, run_command
from tests.decision.score_files import columns_of, write_many
from tests.files.test_remote import client, moto, s3  # noqa: F401

RULE = ("--rule", "all", "--group-column", "lang")


@pytest.fixture
def jql_cut(monkeypatch, capfd):
    """The command line in this process."""

    def call(*arguments: object) -> Result:
        return run_command(cli.main, "jql-cut", arguments, monkeypatch, capfd)

    return call


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    """5,000 documents: two languages, one of them small; every 50th is null; scores of one digit."""
    rng = np.random.default_rng(0)
    null = np.arange(5_000) % 50 == 0
    a, b = (np.ma.masked_array(np.round(rng.standard_normal(5_000), 1).astype(np.float32), null) for _ in range(2))
    lang = np.where(rng.random(5_000) < 0.1, "zu", "en").tolist()
    columns = columns_of([a, b], np.ma.masked_array(rng.integers(1, 999, 5_000), null), lang)
    return write_many(tmp_path_factory.mktemp("scores"), columns)


def test_thresholds_are_written_and_the_summary_is_the_last_line(jql_cut, scores, tmp_path):
    result = jql_cut(scores, *RULE, "--quantile", 0.6, "--thresholds", tmp_path / "deep/thresholds.json")
    right = decide(open_scores([str(scores)], group_column="lang"), Request("all", quantile=0.6))
    assert result.code == 0
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["thresholds.json"]
    assert json.loads((tmp_path / "deep/thresholds.json").read_text()) == json.loads(json.dumps(right.to_json()))
    assert result.summary.pop("seconds") > 0
    assert {name: value for name, value in result.summary.items() if name != "seconds"} == {
        "documents": 5000, "scored": 4900, "null": 100, "nan": 0, "infinite": 0, "tokens": right.counts.tokens,
        "kept_documents": right.counts.kept_documents, "kept_tokens": right.counts.kept_tokens, "quantile": 0.6,
        "target": None, "groups": 2, "pooled_groups": 1, "score_files": 3, "files_without_scores": 0,
        "thresholds": str(tmp_path / "deep/thresholds.json"),
    }  # fmt: skip


def test_what_is_not_expected_is_said_aloud(jql_cut, scores, tmp_path):
    result = jql_cut(scores, *RULE, "--keep", 0.2, "--thresholds", tmp_path / "thresholds.json")
    target = result.summary["target"]
    assert target["asked"] == 980 < target["kept"] == result.summary["kept_documents"]
    assert result.stderr.splitlines() == [
        "jql-cut: 100 of 5,000 documents are dropped: a score is null (100), NaN (0) or infinite (0)",
        "jql-cut: 1 of 2 groups have fewer than 1,000 documents with scores, and take the thresholds of all groups: "
        "'zu'",
        f"jql-cut: {target['excess']:,} documents more are kept than the 980 asked for: every threshold is a "
        "document's score, those of all groups and heads move together, and equal scores are kept together",
    ]


def test_ties_at_a_quantile_are_said_aloud(jql_cut, tmp_path):
    """Annotators' whole numbers: no threshold keeps 40 % of them."""
    rng = np.random.default_rng(0)
    scores = [rng.choice(3, 4_000, p=[0.1, 0.8, 0.1]).astype(np.float32), rng.standard_normal(4_000, np.float32)]
    write_many(tmp_path / "scores", columns_of(scores, np.full(4_000, 9), ["en"] * 2_000 + ["de"] * 2_000))
    arguments = tmp_path / "scores", *RULE, "--quantile", 0.6, "--thresholds", tmp_path / "t.json"
    said = jql_cut(*arguments).stderr.splitlines()
    groups = json.loads((tmp_path / "t.json").read_text())["groups"]
    share, name = max((one["thresholds"][0]["share"], one["group"]) for one in groups)
    assert share == pytest.approx(0.9, abs=0.02)
    assert said == [
        "jql-cut: 2 of 4 thresholds keep more than the 40.0% of documents asked for, as equal scores are kept "
        f"together: that of a in group {name!r} keeps {share:.1%}"
    ]
    tied = write_many(tmp_path / "tied", columns_of([np.minimum(np.arange(2_500, dtype=np.float32), 2_000)],
                      np.full(2_500, 9), ["en"] * 2_000 + ["de"] * 500))  # fmt: skip
    said = jql_cut(tied, *RULE, "--quantile", 0.9, "--thresholds", tmp_path / "t.json").stderr
    assert "1 of 2 thresholds keep more than the 10.0%" in said and "a over all groups keeps 20.0%" in said
    few = write_many(tmp_path / "few", columns_of([np.arange(9, dtype=np.float32)], np.full(9, 9)), 1)
    assert jql_cut(few, "--quantile", 0.6, "--thresholds", tmp_path / "t.json").stderr == ""


def test_a_pipe_gets_the_thresholds_and_stays_a_pipe(jql_cut, scores, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    assert jql_cut(scores, "--quantile", 0.6, "--thresholds", tmp_path / "pipe").code == 0
    assert (tmp_path / "pipe").is_fifo()
    reader.join(30)
    assert json.loads(found[0])["quantile"] == 0.6


def test_standard_output_gets_the_thresholds_before_the_summary(scores, tmp_path):
    code = "from jql_engine.cli.cut import main; main()"
    command = [sys.executable, "-c", code, str(scores), "--quantile", "0.6"]
    with (tmp_path / "said").open("wb") as said:
        subprocess.run([*command, "--thresholds", "/dev/stdout"], stdout=said, check=True)
    *thresholds, summary = (tmp_path / "said").read_text().splitlines()
    assert json.loads("".join(thresholds))["quantile"] == 0.6 and json.loads(summary)["thresholds"] == "/dev/stdout"
    assert Path("/dev/stdout").is_symlink()


@pytest.mark.parametrize("name", ["scores/000.parquet", "t.jsonl.gz"])
def test_thresholds_do_not_take_the_place_of_data(name, jql_cut, scores, tmp_path):
    result = jql_cut(scores, *RULE, "--quantile", 0.6, "--thresholds", tmp_path / name)
    assert result.code == 2 and "has the name of a data file" in re.sub(r"[\s│]+", " ", result.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", ["all", "any", "mean"])
def test_tokens_may_be_given_as_a_number_with_an_exponent(rule, jql_cut, scores, tmp_path):
    arguments = "--rule", rule, "--weight", "tokens", "--keep-tokens", "1e6", "--thresholds", tmp_path / "t.json"
    result = jql_cut(scores, *arguments)
    assert result.summary["target"]["asked"] == 1_000_000 <= result.summary["kept_tokens"] < 1_300_000
    found = json.loads((tmp_path / "t.json").read_text())
    assert [one["head"] for one in found["groups"][0]["thresholds"]] == (["mean"] if rule == "mean" else ["a", "b"])
    assert found["group_column"] is found["groups"][0]["group"] is None


def test_one_column_alone_may_be_cut(jql_cut, scores, tmp_path):
    result = jql_cut(scores, "--columns", "score_b", "--quantile", 0.9, "--thresholds", tmp_path / "t.json")
    assert result.code == 0
    assert json.loads((tmp_path / "t.json").read_text())["score_columns"] == ["score_b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --quantile, --keep and --keep-tokens"),
        (("--quantile", 0.6, "--keep", 0.4), "give one of --quantile"),
        (("--quantile", 1.1), "a number from 0 to 1"),
        (("--quantile", "nan"), "a number from 0 to 1"),
        (("--keep", 0), "it is a share"),
        (("--keep", "nan"), "it is a share"),
        (("--keep-tokens", 0), "a number of tokens"),
        (("--keep-tokens", "inf"), "a number of tokens"),
        (("--keep", 0.4, "--rule", "most"), "is not one of"),
        (("--keep", 0.4, "--min-group", 0), "--min-group"),
    ],
)
def test_misuse_is_said_with_exit_code_2(arguments, message, jql_cut, scores, tmp_path):
    result = jql_cut(scores, *arguments, "--thresholds", tmp_path / "t.json")
    assert result.code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_the_thresholds_have_no_place_by_default(jql_cut, scores):
    assert jql_cut(scores, "--quantile", 0.6).code == 2


def test_an_error_leaves_what_was_there(jql_cut, scores, tmp_path):
    target = tmp_path / "t.json"
    target.write_text("before")
    result = jql_cut(scores, "--group-column", "language", "--quantile", 0.6, "--thresholds", target)
    assert result.code == 1
    assert "jql-cut: " in result.stderr
    assert "no column 'language'; it has score_a, score_b, n_tokens, lang" in result.stderr
    assert target.read_text() == "before"
    assert jql_cut(tmp_path / "nothing", "--quantile", 0.6, "--thresholds", target).code == 1
    assert jql_cut(scores, "--quantile", 0.6, "--thresholds", tmp_path).code == 1
    assert [file.name for file in tmp_path.iterdir()] == ["t.json"]
    assert jql_cut(scores, "--quantile", 0.6, "--thresholds", target).code == 0
    assert json.loads(target.read_text())["format"] == 1


@pytest.mark.parametrize("options", [{"output": "append"}, {"group_column": "lang"}])
def test_scores_of_a_real_job_are_cut_by_a_column_of_their_source(options, bundle, jql_cut, tmp_path):
    texts = [f"Water boils at {i} degrees." if i % 7 else None for i in range(400)]
    lang = ["en" if i % 3 else "de" for i in range(400)]
    pq.write_table(pa.table({"text": texts, "lang": lang}), tmp_path / "in.parquet")
    job = Job((str(tmp_path / "in.parquet"),), tmp_path / "out", **options)
    score(job, bundle, Machine("cpu", options=SessionOptions(threads=1)), RunLog(None), threading.Event())
    arguments = "--min-group", 10, "--quantile", 0.6, "--thresholds", tmp_path / "t.json"
    result = jql_cut(tmp_path / "out", *RULE, *arguments)
    frame = pq.read_table(tmp_path / "out").to_pandas().dropna(subset=["n_tokens"])
    heads = [f"score_{head}" for head in bundle.heads]
    quantile = lambda scores: np.quantile(scores, np.array(0.6), method="inverted_cdf")  # noqa: E731
    kept = (frame[heads] >= frame.groupby("lang")[heads].transform(quantile)).all(axis=1)
    assert result.summary["kept_documents"] == kept.sum() > 0
    assert result.summary["kept_tokens"] == frame["n_tokens"][kept].sum()
    assert json.loads((tmp_path / "t.json").read_text())["settings"]["bundle"] == bundle.hash


@pytest.mark.usefixtures("s3")
def test_scores_and_thresholds_may_be_on_s3(jql_cut, scores):
    S3FileSystem().put(str(scores), "bucket/scores", recursive=True)
    result = jql_cut("s3://bucket/scores", *RULE, "--quantile", 0.6, "--thresholds", "s3://bucket/cut/t.json")
    assert result.code == 0
    assert json.loads(S3FileSystem().cat_file("bucket/cut/t.json"))["counts"]["documents"] == 5000
    assert S3FileSystem().ls("bucket/cut", refresh=True) == ["bucket/cut/t.json"]
