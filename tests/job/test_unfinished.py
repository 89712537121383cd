from __future__ import annotations

import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jql_engine.decision.copying import Joined
from jql_engine.decision.opening import open_scores
from jql_engine.decision.report.report import Sources, report_page, take_figures
from jql_engine.decision.result import Request
from jql_engine.decision.threshold import decide
from jql_engine.errors import InputError, OutputError
from jql_engine.files.inputs import find_files
from jql_engine.job.finished import check_finished
from jql_engine.job.launch import Machine, score
from jql_engine.job.launch import rescore as apply_heads
from jql_engine.job.plan import Job
from jql_engine.job.progress import RunLog
from jql_engine.job.ranks import Rank
from jql_engine.job.unfinished import RunFile, Unfinished
from jql_engine.sessions.base import SessionOptions

BAD = b"PAR1 and no more"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Two files that can be read, and one that cannot."""
    for name in ("a.parquet", "sub/c.parquet"):
        write(tmp_path / "in" / name)
    (tmp_path / "in/sub/b.parquet").write_bytes(BAD)
    return tmp_path / "in"


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": ["Water boils.", "Ice melts.", "Steam rises."]}), path)


def run(bundle, out: Path, *inputs: Path, **options: object) -> dict:
    job = Job(tuple(map(str, inputs)), out, **options)
    return score(job, bundle, Machine("cpu", options=SessionOptions(threads=1)), RunLog(None), threading.Event())


def left(out: Path) -> list[str]:
    return [Path(one.file).name for one in check_finished(str(out))]


@pytest.mark.parametrize("given", ["out", "out/sub", "out/*/*.parquet", "out/sub/"])
def test_whoever_decides_by_the_others_is_told(given, bundle, corpus, tmp_path, capfd):
    run(bundle, tmp_path / "out", corpus)
    capfd.readouterr()
    files = open_scores([str(tmp_path / given)])
    assert [one.file for one in files.without_scores] == [str(corpus / "sub/b.parquet")]
    said = capfd.readouterr().err
    assert f"{tmp_path / given}: an input file has no scores and no part in what follows; start" in said
    assert "b.parquet is not a complete parquet file" in said
    assert decide(files, Request("all", quantile=0.6)).to_json()["without_scores"] == (files.without_scores[0].file,)


def test_scores_that_are_named_are_as_complete_as_they_look(bundle, corpus, tmp_path, capfd):
    run(bundle, tmp_path / "out", corpus)
    capfd.readouterr()
    assert open_scores([str(tmp_path / "out/a.parquet")]).without_scores == ()
    assert "no scores" not in capfd.readouterr().err


def test_the_report_counts_them_beside_the_figures(bundle, corpus, tmp_path):
    (corpus / "d.parquet").write_bytes(BAD)
    run(bundle, tmp_path / "out", corpus)
    figures = take_figures(Sources((str(tmp_path / "out"),)))
    assert [Path(name).name for name in figures.to_json()["provenance"]["without_scores"]] == ["d.parquet", "b.parquet"]
    assert "Input files without scores, which have no part here: 2." in report_page(figures)


def test_a_file_that_was_mended_counts_no_more(bundle, corpus, tmp_path):
    run(bundle, tmp_path / "out", corpus)
    assert left(tmp_path / "out") == ["b.parquet"]
    write(corpus / "sub/b.parquet")
    assert run(bundle, tmp_path / "out", corpus)["files"] == 1
    assert left(tmp_path / "out") == [] and not (tmp_path / "out/.parts").exists()


def test_a_file_that_was_removed_counts_no_more(bundle, corpus, tmp_path):
    run(bundle, tmp_path / "out", corpus)
    (corpus / "sub/b.parquet").unlink()
    assert run(bundle, tmp_path / "out", corpus)["skipped_files"] == 2
    assert not (tmp_path / "out/.parts").exists()


def test_another_command_forgets_nothing_and_may_score_the_file(bundle, corpus, tmp_path):
    run(bundle, tmp_path / "out", corpus)
    write(tmp_path / "more/e.parquet")
    run(bundle, tmp_path / "out", tmp_path / "more")
    assert left(tmp_path / "out") == ["b.parquet"]
    write(tmp_path / "mended/sub/b.parquet")
    run(bundle, tmp_path / "out", tmp_path / "mended")
    assert left(tmp_path / "out") == []


def test_with_overwrite_what_other_settings_left_is_forgotten(bundle, corpus, tmp_path):
    run(bundle, tmp_path / "out", corpus)
    write(tmp_path / "more/a.parquet")
    run(bundle, tmp_path / "out", tmp_path / "more", overwrite=True, chunk_rows=2)
    assert left(tmp_path / "out") == []


def test_each_rank_says_what_it_has_left(bundle, corpus, tmp_path):
    write(corpus / "d.parquet")
    (corpus / "e.parquet").write_bytes(BAD)
    for rank in range(2):
        run(bundle, tmp_path / "out", corpus, rank=Rank(rank, 2))
    assert sorted(left(tmp_path / "out")) == ["b.parquet", "e.parquet"]
    for name in ("sub/b.parquet", "e.parquet"):
        write(corpus / name)
    assert run(bundle, tmp_path / "out", corpus)["files"] == 2
    assert not (tmp_path / "out/.parts").exists()


@pytest.fixture
def partly(corpus) -> Path:
    """A file beside them whose last row group is damaged."""
    bad = corpus / "f.parquet"
    pq.write_table(pa.table({"text": [f"Sentence {i}." for i in range(300)]}), bad, row_group_size=100)
    chunk = pq.read_metadata(bad).row_group(2).column(0)
    with bad.open("r+b") as stream:
        stream.seek(chunk.dictionary_page_offset)
        stream.write(b"\xff" * chunk.total_compressed_size)
    return bad


def parts_of(out: Path, name: str) -> list[Path]:
    return sorted((out / ".parts" / name).glob("*.parquet"))


def test_a_file_that_was_mended_is_scored_anew_whatever_was_read_of_it(bundle, corpus, partly, tmp_path):
    out = tmp_path / "out"
    run(bundle, out, corpus, chunk_rows=100)
    assert parts_of(out, "f.parquet") and left(out) == ["f.parquet", "b.parquet"]
    write(partly)
    assert run(bundle, out, corpus, chunk_rows=100)["files"] == 1
    assert left(out) == ["b.parquet"] and not parts_of(out, "f.parquet")
    assert pq.read_metadata(out / "f.parquet").num_rows == 3


def test_what_was_read_of_a_file_is_kept_while_it_is_the_same(bundle, corpus, partly, tmp_path):
    for _ in range(2):
        run(bundle, tmp_path / "out", corpus, chunk_rows=100)
        assert len(parts_of(tmp_path / "out", "f.parquet")) == 2


def test_a_file_that_was_read_in_part_and_removed_leaves_nothing(bundle, corpus, partly, tmp_path):
    run(bundle, tmp_path / "out", corpus, chunk_rows=100)
    partly.unlink()
    run(bundle, tmp_path / "out", corpus, chunk_rows=100)
    assert left(tmp_path / "out") == ["b.parquet"] and not parts_of(tmp_path / "out", "f.parquet")


@pytest.mark.parametrize("given", ["out", "out/sub"])
def test_a_job_that_was_stopped_between_two_files_is_refused(bundle, corpus, tmp_path, given):
    stop = threading.Event()
    stop.set()
    (corpus / "sub/b.parquet").unlink()
    write(tmp_path / "first/sub/0.parquet")
    run(bundle, tmp_path / "out", tmp_path / "first")
    options = SessionOptions(threads=1)
    score(Job((str(corpus),), tmp_path / "out"), bundle, Machine("cpu", options=options), RunLog(None), stop)
    with pytest.raises(InputError, match=r"not finished: .*\.run says that .*\.parquet is to be written"):
        open_scores([str(tmp_path / given)])
    run(bundle, tmp_path / "out", corpus)
    assert left(tmp_path / "out") == []


def test_scores_of_what_the_file_held_before_go_with_overwrite(bundle, corpus, tmp_path):
    write(corpus / "sub/b.parquet")
    run(bundle, tmp_path / "out", corpus)
    (corpus / "sub/b.parquet").write_bytes(BAD)
    run(bundle, tmp_path / "out", corpus, overwrite=True)
    assert left(tmp_path / "out") == ["b.parquet"] and not (tmp_path / "out/sub/b.parquet").exists()


def test_jobs_in_folders_of_one_folder_are_seen(bundle, corpus, tmp_path):
    run(bundle, tmp_path / "out/en", corpus)
    write(tmp_path / "de/a.parquet")
    run(bundle, tmp_path / "out/de", tmp_path / "de")
    assert left(tmp_path / "out") == left(tmp_path / "out/en") == ["b.parquet"]
    assert left(tmp_path / "out/de") == []


def test_the_folder_may_be_the_current_one_or_a_link(bundle, corpus, tmp_path, monkeypatch):
    run(bundle, tmp_path / "out", corpus)
    (tmp_path / "link").symlink_to(tmp_path / "out/sub")
    monkeypatch.chdir(tmp_path / "out/sub")
    assert left(Path()) == left(tmp_path / "link") == ["b.parquet"]


def stop_after_the_first(bundle, out: Path, source: Path, **options: object) -> None:
    """As a kill between two files leaves it: `source` is to be scored, and one file is."""
    first = source / next(name for name in sorted(file.name for file in source.iterdir()))
    run(bundle, out, source, **options)
    for file in out.rglob("*.parquet"):
        if file.name != first.name:
            file.unlink()
    settings = json.loads(pq.read_schema(out / first.name).metadata[b"jql_engine"])
    del settings["source_bytes"], settings["source_version"]
    names = [file.relative_to(source).as_posix() for file in source.rglob("*.parquet")]
    RunFile.of(out, settings, [str(source)], Rank()).begin(names, [])


def refused(given: Path | str) -> bool:
    try:
        open_scores([str(given)])
    except InputError as error:
        return "is to be written; let that job" in str(error)
    return False


def test_a_job_that_ends_while_its_files_are_listed_is_noticed(bundle, tmp_path, monkeypatch):
    """The listing lacks its last file, and what it had left to do is gone right after it."""
    for name in ("a", "b"):
        write(tmp_path / f"in/{name}.parquet")
    run(bundle, tmp_path / "out", tmp_path / "in")
    last = (tmp_path / "out/b.parquet").rename(tmp_path / "b.parquet")
    settings = json.loads(pq.read_schema(tmp_path / "out/a.parquet").metadata[b"jql_engine"])
    del settings["source_bytes"], settings["source_version"]
    run_file = RunFile.of(tmp_path / "out", settings, [str(tmp_path / "in")], Rank())
    run_file.begin(["b.parquet"], [])

    def listed_before_the_end(inputs):
        found = find_files(inputs)
        last.rename(tmp_path / "out/b.parquet")
        run_file.write(None)
        return found

    monkeypatch.setattr("jql_engine.decision.opening.find_files", listed_before_the_end)
    with pytest.raises(InputError, match=r"b\.parquet is to be written"):
        open_scores([str(tmp_path / "out")])


def test_links_to_parts_of_an_output_lead_to_what_it_lacks(bundle, corpus, tmp_path):
    """As those have them who gather the scores of several jobs in one folder."""
    run(bundle, tmp_path / "out", corpus)
    (tmp_path / "all").mkdir()
    (tmp_path / "all/of_sub").symlink_to(tmp_path / "out/sub")
    assert left(tmp_path / "all") == ["b.parquet"]
    for file in tmp_path.glob("out/.parts/*.run"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({"names": ["sub/e.parquet"], "unfinished": content["unfinished"]}))
    with pytest.raises(InputError, match=r"run says that of_sub/e\.parquet is to be written"):
        open_scores([str(tmp_path / "all")])


def test_folders_behind_links_are_seen(bundle, tmp_path):
    """Below the output, the output itself, and above it."""
    for name in ("big/0.parquet", "big/1.parquet"):
        write(tmp_path / "in" / name)
    (tmp_path / "disk/big").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/big").symlink_to(tmp_path / "disk/big")
    run(bundle, tmp_path / "out", tmp_path / "in")
    settings = json.loads(pq.read_schema(tmp_path / "out/big/0.parquet").metadata[b"jql_engine"])
    del settings["source_bytes"], settings["source_version"]
    (tmp_path / "all").mkdir()
    (tmp_path / "all/x").symlink_to(tmp_path / "out")
    places = [tmp_path / place for place in ("out", "out/big", "all", "all/x")]
    run_file = RunFile.of(tmp_path / "out", settings, [str(tmp_path / "in")], Rank())
    run_file.begin(["big/0.parquet", "big/1.parquet"], [])
    assert not any(map(refused, places))  # all is there
    (tmp_path / "disk/big/1.parquet").unlink()
    assert all(map(refused, places))


def test_a_glob_is_judged_by_what_it_matches(bundle, corpus, tmp_path):
    runs = tmp_path / "runs"
    for name in ("en-v1", "en-v2"):
        run(bundle, runs / name, corpus)
    assert left(runs / "*-v1/**/*.parquet") == ["b.parquet"]
    assert [len(open_scores([str(runs / glob)]).without_scores) for glob in ("*-v1/*.parquet", "*/*.parquet")] == [0, 0]
    settings = json.loads(pq.read_schema(runs / "en-v2/a.parquet").metadata[b"jql_engine"])
    RunFile.of(runs / "en-v2", settings, ["in"], Rank()).begin(["a.parquet", "z.parquet"], [])
    assert not refused(runs / "*-v1/*.parquet") and refused(runs / "*/*.parquet")


def test_commands_are_told_apart_by_where_their_inputs_are(bundle, tmp_path, monkeypatch):
    for name in ("de/corpus/0.parquet", "de/corpus/1.parquet", "en/corpus/2.parquet"):
        write(tmp_path / name)
    monkeypatch.chdir(tmp_path / "de")
    stop_after_the_first(bundle, tmp_path / "out", Path("corpus"))
    assert refused(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "en")
    run(bundle, tmp_path / "out", Path("corpus"))
    assert refused(tmp_path / "out")
    run(bundle, tmp_path / "out", tmp_path / "de/corpus")
    assert not refused(tmp_path / "out")


def test_a_limited_start_over_of_other_files_forgets_nothing(bundle, tmp_path):
    for name in ("in/0.parquet", "in/1.parquet", "more/z.parquet"):
        write(tmp_path / name)
    stop_after_the_first(bundle, tmp_path / "out", tmp_path / "in")
    run(bundle, tmp_path / "out", tmp_path / "more", overwrite=True, limit=2)
    assert refused(tmp_path / "out")


def test_a_record_of_a_job_that_nothing_else_is_known_of_is_refused(bundle, corpus, tmp_path):
    (corpus / "sub/b.parquet").unlink()
    run(bundle, tmp_path / "out", corpus)
    (tmp_path / "out/.parts").mkdir()
    (tmp_path / "out/.parts/job.json").write_text("{}")
    with pytest.raises(InputError, match=r"job\.json names a job"):
        open_scores([str(tmp_path / "out")])


def test_another_command_scores_what_was_mended_too(bundle, corpus, partly, tmp_path):
    for rank in range(2):
        run(bundle, tmp_path / "out", corpus, chunk_rows=100, rank=Rank(rank, 2))
    assert left(tmp_path / "out") == ["f.parquet", "b.parquet"] and parts_of(tmp_path / "out", "f.parquet")
    write(partly)
    assert run(bundle, tmp_path / "out", partly, chunk_rows=100)["files"] == 1
    assert left(tmp_path / "out") == ["b.parquet"]


def test_a_start_that_fails_changes_nothing(bundle, corpus, tmp_path):
    out = tmp_path / "out"
    run(bundle, out, corpus)
    write(corpus / "c.parquet")
    (out / "c.parquet").write_bytes((out / "a.parquet").read_bytes())  # scores of another file
    with pytest.raises(OutputError, match=r"c\.parquet"):
        run(bundle, out, corpus)
    assert left(out) == ["b.parquet"]


def test_the_same_decision_about_more_files_goes_on_where_thresholds_are_equal(bundle, corpus, tmp_path):
    run(bundle, tmp_path / "out", corpus)
    digests = []
    for _ in range(2):
        files = open_scores([str(tmp_path / "out")])
        digests.append(
            (len(files.without_scores), Joined.of(decide(files, Request("all", quantile=0.6)), files).decided)
        )
        (corpus / "sub/b.parquet").unlink(missing_ok=True)
        run(bundle, tmp_path / "out", corpus)
    assert [n for n, _ in digests] == [1, 0] and digests[0][1] == digests[1][1]


def test_nothing_secret_is_written(bundle, tmp_path):
    secret = "https://us:pässword@host/b.parquet?sig=aé-SECRET"
    RunFile.of(tmp_path, {}, ["in"], Rank()).end([Unfinished(secret, f"{secret} is gone", None)])
    [file] = (tmp_path / ".parts").iterdir()
    assert "ssword" not in file.read_text() and "SECRET" not in file.read_text()


def test_a_corpus_that_still_has_it_is_refused(bundle, corpus, partly, tmp_path):
    run(bundle, tmp_path / "out", corpus, chunk_rows=100)
    files = open_scores([str(tmp_path / "out")])
    joined = Joined.of(decide(files, Request("all", quantile=0.6)), files)
    source = next(file for file in find_files([str(corpus)]).files if file.location == partly)
    with pytest.raises(InputError, match=r"f\.parquet has no scores: its job has ended without it"):
        joined.number_of(source)


def test_new_heads_do_not_hide_them(bundle, corpus, tmp_path):
    run(bundle, tmp_path / "out", corpus, embeddings="fp16")
    job = Job((str(tmp_path / "out"),), tmp_path / "new")
    found = apply_heads(job, bundle, 1, RunLog(None), threading.Event())
    assert [Path(one["file"]).name for one in found["unfinished"]] == ["b.parquet"]
    assert left(tmp_path / "new") == ["b.parquet"]


def test_a_damaged_file_of_a_run_is_named(bundle, corpus, tmp_path):
    run(bundle, tmp_path / "out", corpus)
    [file] = (tmp_path / "out/.parts").glob("*.run")
    file.write_text("[{]")
    with pytest.raises(OutputError, match=r"\.run is damaged \(.*\); remove it"):
        open_scores([str(tmp_path / "out")])
