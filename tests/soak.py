"""Does a job survive whatever happens to it? Kills, damaged files, full disks, failing requests, rival jobs, ranks.

    python -m tests.soak --minutes 30 --seed 7             rounds until the time is over
    python -m tests.soak --seed 7 --only 12                round 12 of that seed alone

A round makes a corpus of good, damaged and odd files from its seed and scores it: the command is started again and
again, and each time something happens to it. Then it is left alone, and what must hold is checked: every row of every
good file once, with the scores of an undisturbed run into another folder; every finished file whole at any time; every
bad file named; nothing stray, nothing outside of --out; exit codes right; no traceback, no hang. The last line of
stdout is one JSON object: rounds, kills, faults, files, rows, violations.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from jql_engine import Engine
from jql_engine.bundle import Bundle
from jql_engine.files.settings import METADATA_KEY
from jql_export import probes
from tests import servers
from tests.conftest import export, write_encoder, write_head

RUN = [sys.executable, "-c", "from jql_engine.cli.run import main; main()"]
TOLERANCE = 1e-5  # a score alone against the same in another batch
DATA = Path(__file__).with_name("data")
WORDS = " ".join(probes.SENTENCES[:12]).split()
SCORES = ("score_edu", "score_prose")
LIMIT_SECONDS = 300  # of one command: longer is a hang


@dataclass(slots=True)
class Tally:
    """What has happened so far."""

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def check(self, holds: object, what: str) -> None:
        """Keep `what` where it does not hold."""
        if not holds:
            self.violations.append(what)
            print(f"VIOLATION {what}", flush=True)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Input files, and which of them can be scored."""

    folder: Path
    good: list[str]  # names below the folder
    bad: list[str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one round reads from and writes to, as the command line names it, and how to look at it here."""

    source: str
    out: str
    environment: dict[str, str]
    pull: Callable[[], Path]  # the output as a local folder
    publish: Callable[[str], None]  # a file of the corpus that was written anew
    forget: Callable[[str], None]  # remove what there is of the scores of a file
    disk: Path | None = None  # where a file fills the disk that the output is on


def texts(draw: random.Random, n_docs: int) -> list[str | None]:
    """Documents of 0 to 60 words; some null, some twice."""
    found: list[str | None] = []
    for _ in range(n_docs):
        kind = draw.random()
        if kind < 0.1:
            found.append(None)
        elif kind < 0.2 and found:
            found.append(draw.choice(found))
        else:
            found.append(" ".join(draw.choices(WORDS, k=draw.randint(0, 60))))
    return found


def write_good(file: Path, draw: random.Random) -> None:
    """A file that can be read, of the kind that its name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    n_docs = draw.choice([0, 1, 7, 40, 150, 400])
    documents = texts(draw, n_docs)
    if file.name.endswith(".parquet"):
        columns = {"id": pa.array(range(n_docs), pa.int64()), "text": pa.array(documents, pa.large_string())}
        pq.write_table(
            pa.table(columns), file,
            row_group_size=draw.choice([None, 13, 100]), use_dictionary=draw.random() < 0.5,
            compression=draw.choice(["zstd", "snappy", "none"]),
        )  # fmt: skip
        return
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)).encode()
    file.write_bytes(gzip.compress(lines) if file.name.endswith(".gz") else lines)


def write_bad(file: Path, draw: random.Random) -> None:
    """A file with an input's name that cannot be read to its end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = draw.choice(["cut", "footer", "empty", "noise", "link", "fifo", "crash"])
    crashing = sorted(DATA.glob("abort*.parquet")) if DATA.is_dir() else []
    if kind == "crash" and crashing:
        shutil.copy(draw.choice(crashing), file)
    elif kind == "link":
        file.symlink_to("nowhere.parquet")
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind in ("empty", "noise"):
        file.write_bytes(draw.randbytes(0 if kind == "empty" else 500))
    else:
        pq.write_table(pa.table({"id": range(300), "text": texts(draw, 300)}), file)
        content = bytearray(file.read_bytes())
        if kind == "cut":
            del content[len(content) // 2 :]
        else:
            content[-8:-4] = (1 << 30).to_bytes(4, "little")
        file.write_bytes(bytes(content))


def make_corpus(folder: Path, draw: random.Random, remote: bool) -> Corpus:
    """Files in folders, some behind a link, some bad."""
    good = [f"{draw.choice(['', 'de/', 'en/x/'])}{i:02}.parquet" for i in range(draw.randint(3, 8))]
    good += [f"lines/{i}{draw.choice(['.jsonl', '.jsonl.gz'])}" for i in range(draw.randint(0, 3))]
    bad = [f"{draw.choice(['', 'de/'])}bad{i}.parquet" for i in range(draw.choice([0, 0, 1, 2]))]
    for name in good:
        write_good(folder / name, draw)
    for name in bad:
        write_bad(folder / name, draw)
    if remote:  # what is no file cannot be uploaded
        bad = [name for name in bad if (folder / name).is_file()]
    elif draw.random() < 0.5:
        elsewhere = folder.with_name("linked")
        write_good(elsewhere / "far.parquet", draw)
        (folder / "link").symlink_to(elsewhere, target_is_directory=True)
        good.append("link/far.parquet")
        if draw.random() < 0.5:
            (elsewhere / "loop").symlink_to(folder, target_is_directory=True)
    return Corpus(folder, good, bad)


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of one round."""

    bundle: Bundle
    rival: Bundle  # with other heads
    chunk_rows: int
    workers: int
    output: str
    ranks: int

    def command(
        self, place: Place, *, bundle: Bundle | None = None, rank: int | None = None, inputs: tuple[str, ...] = ()
    ) -> list[str]:
        """The command line."""
        given = [
            *RUN, *(inputs or (place.source,)), "--bundle", (bundle or self.bundle).path, "--out", place.out,
            "--device", "cpu", "--threads", 1, "--workers", self.workers, "--chunk-rows", self.chunk_rows,
            "--output", self.output, "--retry-minutes", 1,
        ]  # fmt: skip
        if rank is not None:
            given += ["--rank", rank, "--world-size", self.ranks]
        return list(map(str, given))


@dataclass(slots=True)
class Round:
    """One corpus, one job, whatever happens to it, and the check."""

    settings: Settings
    corpus: Corpus
    place: Place
    draw: random.Random
    tally: Tally
    name: str
    engines: dict[str, Engine]  # by the hash of their bundles

    def start(self, command: list[str], limit: int | None = None) -> subprocess.Popen[str]:
        """A command in a process group of its own; `limit`: bytes after which a file cannot grow, as on a full disk."""

        def limited() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, **self.place.environment}, preexec_fn=limited,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str], what: str) -> tuple[int, str, str]:
        """Wait for a command; a traceback or a hang is a violation."""
        try:
            stdout, stderr = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.tally.check(False, f"{self.name}: {what} hangs")
            self.kill(process)
            stdout, stderr = process.communicate()
        # Python's own, while it is still importing what handles the signal, is none of ours.
        calm = "Traceback" not in stderr or stderr.rstrip().endswith("KeyboardInterrupt")
        self.tally.check(calm, f"{self.name}: {what} gave a traceback: {stderr[-3000:]}")
        return process.returncode, stdout, stderr

    def kill(self, process: subprocess.Popen[str]) -> None:
        """The job and all of its workers."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def disturb(self) -> None:
        """Start the job, and let something happen to it."""
        rank = self.draw.choice(self.ranks)
        events = [
            self.killed, self.killed, self.killed, self.worker_killed, self.interrupted, self.rival, self.rival,
            self.full, self.changed, self.grown,
        ]  # fmt: skip
        if rank is not None:
            events += [self.together, self.other_inputs]
        self.draw.choice(events)(self.settings.command(self.place, rank=rank))
        self.check_finished()

    @property
    def ranks(self) -> list[int | None]:
        return list(range(self.settings.ranks)) if self.settings.ranks > 1 else [None]

    def killed(self, command: list[str]) -> None:
        process = self.start(command)
        self.wait(process)
        if self.draw.random() < 0.5:
            self.kill(process)
        else:
            process.kill()  # its workers find out
        process.communicate()
        self.tally.counts["kills"] += 1

    def worker_killed(self, command: list[str]) -> None:
        process = self.start(command)
        self.wait(process)
        with suppress(psutil.NoSuchProcess, IndexError):
            self.draw.choice(psutil.Process(process.pid).children(recursive=True)).kill()
            self.tally.counts["kills"] += 1
        self.end(process, "a job of which a process was killed")

    def interrupted(self, command: list[str]) -> None:
        process = self.start(command)
        self.wait(process)
        process.send_signal(self.draw.choice([signal.SIGINT, signal.SIGTERM]))
        code, _, stderr = self.end(process, "a job that was interrupted")
        self.tally.check(code in (0, 1, -2, -15, 130, 143), f"{self.name}: interrupted, exit {code}: {stderr[-500:]}")
        self.tally.counts["kills"] += 1

    def together(self, _: list[str]) -> None:
        """All ranks at once, of which one may be killed."""
        processes = [self.start(self.settings.command(self.place, rank=rank)) for rank in self.ranks]
        if self.draw.random() < 0.5:
            victim = self.draw.choice(processes)
            self.wait(victim)
            self.kill(victim)
            self.tally.counts["kills"] += 1
        for process in processes:
            self.end(process, "one of several ranks")

    def other_inputs(self, command: list[str]) -> None:
        """A rank whose shell has expanded the pattern is refused while the ranks have a listing."""
        self.end(self.start(command), "a rank")
        if not (self.place.pull() / ".parts").is_dir() or not list(self.place.pull().glob(".parts/*.listing")):
            return
        inputs = tuple(f"{self.place.source}/{name}" for name in self.corpus.good)
        code, _, stderr = self.end(
            self.start(self.settings.command(self.place, rank=self.draw.choice(self.ranks), inputs=inputs)),
            "a rank with other inputs",
        )
        self.tally.check(
            code in (1, 2) and ("in quotes" in stderr or "would both be written" in stderr),
            f"{self.name}: a rank with other inputs, exit {code}: {stderr[-500:]}",
        )
        self.tally.counts["faults"] += 1

    def grown(self, command: list[str]) -> None:
        """A file appears while the job runs, or before."""
        name = f"{self.draw.choice(['', 'de/'])}new{len(self.corpus.good):02}.parquet"
        process = self.start(command)
        if self.draw.random() < 0.5:
            self.wait(process)
        file = self.corpus.folder / name
        write_good(file.with_name("_" + file.name), self.draw)
        file.with_name("_" + file.name).replace(file)
        self.place.publish(name)
        self.corpus.good.append(name)
        self.end(process, "a job while a file appeared")
        self.tally.counts["faults"] += 1

    def rival(self, command: list[str]) -> None:
        """Another job on the same output folder, for all inputs or for one, either of them maybe with --overwrite.

        Often this job stands still while the rival runs, as between two commits.
        """
        over = [["--overwrite"] if self.draw.random() < 0.5 else [] for _ in range(2)]
        few = self.draw.random() < 0.3
        names = [self.draw.choice(self.corpus.good)] if few else self.corpus.good
        inputs = (f"{self.place.source}/{names[0]}",) if few and "/" not in names[0] else (self.place.source,)
        process = self.start([*command, *over[0]])
        if self.draw.random() < 0.7:
            self.wait(process)
        stands = self.draw.random() < 0.5
        if stands:
            self.signal(process, signal.SIGSTOP)
        other = self.start([*self.settings.command(self.place, bundle=self.settings.rival, inputs=inputs), *over[1]])
        codes = [0, 0]
        if stands:
            codes[1] = self.end(other, "a rival")[0]
            self.signal(process, signal.SIGCONT)
        codes[0] = self.end(process, "a job with a rival")[0]
        if not stands:
            codes[1] = self.end(other, "a rival")[0]
        self.tally.counts["faults"] += 1
        self.check_scores(f"rivals {over}, exit {codes}")
        if codes == [0, 0] and self.settings.ranks == 1:
            self.check_serial(inputs, over)
        if self.named() - {self.settings.bundle.hash}:
            for rank in self.ranks:
                again = [*self.settings.command(self.place, rank=rank), "--overwrite"]
                self.end(self.start(again), "a job that starts over")

    def check_serial(self, inputs: tuple[str, ...], over: list[list[str]]) -> None:
        """Both jobs were well: then all is as if one had run after the other."""
        found = {file.relative_to(self.place.pull()).as_posix(): s["bundle"] for file, s in finished(self.place.pull())}
        ours, rival = self.settings.bundle.hash, self.settings.rival.hash
        mine = set(found.values()) if inputs == (self.place.source,) else {found.get(Path(inputs[0]).name)}
        self.tally.check(mine in ({ours}, {rival}, set()), f"{self.name}: two jobs both exit 0, {over}: {found}")

    def check_scores(self, what: str) -> None:
        """Every finished file holds the scores of the bundle that its metadata names."""
        out = self.place.pull()
        for file, settings in finished(out):
            table = pq.read_table(file)
            documents = texts_of(self.corpus.folder, file, out)
            if table.num_rows != len(documents):
                continue  # its source was replaced since
            expected = self.engines[str(settings["bundle"])].score(documents).to_table().select(SCORES)
            self.tally.check(
                same(table.select(SCORES), expected), f"{self.name}: {what}: {file.name} has scores of another job"
            )

    def signal(self, process: subprocess.Popen[str], number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def full(self, command: list[str]) -> None:
        left = self.draw.choice([300, 2_000, 8_000, 40_000])
        if self.place.disk is None:
            process = self.start(command, left)
        else:
            free = shutil.disk_usage(self.place.disk).free
            (self.place.disk / "filler").write_bytes(bytes(max(0, free - left)))
            process = self.start(command)
        code, _, stderr = self.end(process, "a job on a full disk")
        if self.place.disk is not None:
            (self.place.disk / "filler").unlink()
        self.tally.check(code in (0, 1), f"{self.name}: exit code {code} on a full disk: {stderr[-500:]}")
        self.tally.counts["faults"] += 1

    def changed(self, command: list[str]) -> None:
        """A source is replaced while the job runs; its scores are removed, as the error advises."""
        name = self.draw.choice(self.corpus.good)
        process = self.start(command)
        self.wait(process)
        file = self.corpus.folder / name
        new = file.with_name(f"_new{output_name(file.name)}" if file.suffix == ".parquet" else f"_new{file.name}")
        write_good(new, self.draw)
        new.replace(file)
        self.place.publish(name)
        self.end(process, "a job of which a source was replaced")
        self.place.forget(output_name(name))
        self.tally.counts["faults"] += 1

    def wait(self, process: subprocess.Popen[str]) -> None:
        """A while, most often until the job is at work."""
        ends = time.monotonic() + self.draw.choice([0.2, 1.0, 2.0, 3.0, 4.0, 6.0]) * self.draw.random() * 1.5
        while time.monotonic() < ends and process.poll() is None:
            time.sleep(0.01)

    def named(self) -> set[str]:
        """The bundles that the records and files in the output name."""
        out = self.place.pull()
        records = [json.loads(file.read_bytes())["bundle"] for file in out.glob(".parts/job.json")]
        return {*records, *(settings["bundle"] for _, settings in finished(out))}

    def check_finished(self) -> None:
        """What is finished is whole, at any time."""
        out = self.place.pull()
        for file, _ in finished(out):
            n_rows, expected = pq.read_metadata(file).num_rows, len(texts_of(self.corpus.folder, file, out))
            self.tally.check(n_rows == expected, f"{self.name}: {file} has {n_rows} rows, expected {expected}")

    def check(self, reference: Path) -> None:
        """Run it undisturbed to its end, and compare."""
        # What has appeared since is in the next listing, also where nothing was left to do of this one.
        for attempt in range(1 if self.settings.ranks == 1 else 3):
            unfinished, n_docs = self._last_runs()
            if attempt and not n_docs:
                break
        bad = {Path(name).name for name in self.corpus.bad}
        self.tally.check(unfinished == bad, f"{self.name}: unfinished {sorted(unfinished)}, bad {sorted(bad)}")
        self._compare(self.place.pull(), reference)

    def _last_runs(self) -> tuple[set[str], int]:
        unfinished: set[str] = set()
        n_docs = 0
        for rank in self.ranks:
            command = self.settings.command(self.place, rank=rank)
            code, stdout, stderr = self.end(self.start(command), "the last run")
            summary = json.loads(stdout.splitlines()[-1]) if stdout.strip() else {}
            found = {Path(item["file"]).name for item in summary.get("unfinished", [])}
            self.tally.check(
                code == (1 if found else 0) and summary,
                f"{self.name}: exit {code}, unfinished {found}: {stderr[-2000:]}",
            )
            self.tally.check(
                all(name in stderr for name in found), f"{self.name}: bad files are not all named on stderr"
            )
            unfinished |= found
            n_docs += summary.get("documents", 0)
        return unfinished, n_docs

    def _compare(self, out: Path, reference: Path) -> None:
        there = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
        names = {output_name(name) for name in self.corpus.good}
        stray = {name for name in there - names if not (self.corpus.bad and name.startswith(".parts/"))}
        self.tally.check(not names - there, f"{self.name}: missing {sorted(names - there)}")
        self.tally.check(not stray, f"{self.name}: stray {sorted(stray)}")
        for name in sorted(names & there):
            found, expected = pq.read_table(out / name), pq.read_table(reference / name)
            self.tally.counts["files"] += 1
            self.tally.counts["rows"] += found.num_rows
            self.tally.check(same(found, expected), f"{self.name}: {name} differs from the undisturbed run")


def same(found: pa.Table, expected: pa.Table) -> bool:
    """Whether two score files hold the same, scores within the tolerance between batches."""
    if found.schema.remove_metadata() != expected.schema.remove_metadata() or found.num_rows != expected.num_rows:
        return False
    for name in found.column_names:
        one, other = found[name].combine_chunks(), expected[name].combine_chunks()
        if not name.startswith("score_"):
            if one != other:
                return False
            continue
        if not one.is_null().equals(other.is_null()):
            return False
        difference = np.abs(one.drop_null().to_numpy() - other.drop_null().to_numpy())
        if difference.max(initial=0) > TOLERANCE:
            return False
    return True


def finished(out: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """Score files that are there, and the settings in their metadata."""
    for file in sorted(out.rglob("*.parquet")):
        if ".parts" not in file.relative_to(out).parts:
            yield file, json.loads(pq.read_schema(file).metadata[METADATA_KEY])


def output_name(name: str) -> str:
    """Scores are parquet."""
    return name.partition(".jsonl")[0] + ".parquet" if ".jsonl" in name else name


def texts_of(corpus: Path, file: Path, out: Path) -> list[str | None]:
    """Documents of the input of a score file."""
    name = file.relative_to(out).as_posix()
    if (corpus / name).is_file():
        return pq.read_table(corpus / name, columns=["text"])["text"].to_pylist()
    lines = next(found for suffix in (".jsonl", ".jsonl.gz") if (found := corpus / (name[:-8] + suffix)).is_file())
    content = gzip.decompress(lines.read_bytes()) if lines.name.endswith(".gz") else lines.read_bytes()
    found: list[str | None] = [json.loads(line)["text"] for line in content.splitlines()]
    return found


@contextmanager
def on_disk(folder: Path, corpus: Corpus) -> Iterator[Place]:
    """A folder, where that is possible on a disk of its own that can be filled."""
    disk = folder / "disk"
    disk.mkdir()
    out = disk / "out"
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def forget(name: str) -> None:
        (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / ".parts" / name, ignore_errors=True)

    try:
        yield Place(str(corpus.folder), str(out), {}, lambda: out, lambda _: None, forget, disk if mounted else None)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


@contextmanager
def on_s3(folder: Path, corpus: Corpus, draw: random.Random, tally: Tally) -> Iterator[Place]:
    """A bucket on moto's server, behind a proxy that fails one request in fifty."""
    import s3fs

    environment = {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }  # fmt: skip
    with servers.s3() as server:
        environment["AWS_ENDPOINT_URL"] = server.url
        files = s3fs.S3FileSystem(key="key", secret="secret", endpoint_url=server.behind, skip_instance_cache=True)
        files.mkdir("soak")
        for name in [*corpus.good, *corpus.bad]:
            files.put_file(str(corpus.folder / name), f"soak/in/{name}")

        def fault(_: servers.Request) -> servers.Fault | None:
            if draw.random() >= 0.02:
                return None
            tally.counts["faults"] += 1
            return draw.choice(["drop", "busy", "cut"])

        def pull() -> Path:
            local = folder / "pulled"
            shutil.rmtree(local, ignore_errors=True)
            local.mkdir()
            files.invalidate_cache()
            for key in files.find("soak/out") if files.exists("soak/out") else []:
                target = local / key.removeprefix("soak/out/")
                target.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(key, str(target))
            return local

        def publish(name: str) -> None:
            files.put_file(str(corpus.folder / name), f"soak/in/{name}")

        def forget(name: str) -> None:
            files.invalidate_cache()
            for key in [f"soak/out/{name}", *files.find(f"soak/out/.parts/{name}")]:
                if files.exists(key):
                    files.rm_file(key)

        server.fault = fault
        try:
            yield Place("s3://soak/in", "s3://soak/out", environment, pull, publish, forget)
        finally:  # moto remembers for as long as this process lives
            files.invalidate_cache()
            files.rm("soak", recursive=True)


def one_round(number: int, seed: int, bundles: tuple[Bundle, Bundle], engines: dict[str, Engine], tally: Tally) -> None:
    """Round `number` of `seed`."""
    draw = random.Random(f"{seed}-{number}")
    remote = draw.random() < 0.3
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = Path(temporary)
        corpus = make_corpus(folder / "in", draw, remote)
        only_parquet = all(name.endswith(".parquet") for name in corpus.good)
        settings = Settings(
            *bundles, draw.choice([5, 30, 100, 20_000]), draw.choice([1, 1, 2]),
            draw.choice(["sidecar", "append"]) if only_parquet else "sidecar", draw.choice([1, 1, 1, 2]),
        )  # fmt: skip
        name = f"seed {seed} round {number}"
        with on_s3(folder, corpus, draw, tally) if remote else on_disk(folder, corpus) as place:
            this = Round(settings, corpus, place, draw, tally, name, engines)
            before = outside(folder)
            for _ in range(draw.randint(2, 8)):
                this.disturb()
            reference = replace(place, source=str(corpus.folder), out=str(folder / "reference"))
            calm = replace(this, place=reference, name=f"{name}, undisturbed")
            calm.end(calm.start(replace(settings, ranks=1).command(reference)), "the undisturbed run")
            this.check(folder / "reference")
            stray = outside(folder) ^ (before | {f"in/{file}" for file in corpus.good if not file.startswith("link/")})
            tally.check(not stray, f"{name}: outside of --out {sorted(stray)}")
    tally.counts["rounds"] += 1


def outside(folder: Path) -> set[str]:
    """Every file of a round but those in its output."""
    return {
        name
        for file in folder.rglob("*")
        if not (name := file.relative_to(folder).as_posix()).startswith(("disk", "pulled", "reference"))
        and (file.is_symlink() or not file.is_dir())
    }


def main() -> None:
    """Rounds until the time is over; exit 1 where something did not hold."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=1)
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    options.add_argument("--only", type=int, help="this round alone")
    given = options.parse_args()
    print(f"seed {given.seed}", flush=True)
    tally, began = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-bundles-") as temporary:
        folder = Path(temporary)
        encoder = write_encoder(folder / "encoder", "gte")
        heads = {name: write_head(folder / f"{name}.ckpt", seed=i) for i, name in enumerate(("edu", "prose"))}
        bundle = export(encoder, heads, folder / "bundle")
        rival = export(encoder, dict(zip(heads, reversed(heads.values()), strict=True)), folder / "rival")
        engines = {one.hash: Engine(one, device="cpu", threads=1) for one in (bundle, rival)}
        number = 0 if given.only is None else given.only
        while True:
            one_round(number, given.seed, (bundle, rival), engines, tally)
            number += 1
            if given.only is not None or time.monotonic() - began > 60 * given.minutes:
                break
            print(json.dumps({"round": number, **tally.counts, "violations": len(tally.violations)}), flush=True)
    names = ("rounds", "kills", "faults", "files", "rows")
    counts = {name: tally.counts[name] for name in names}
    print(json.dumps({"seed": given.seed, **counts, "violations": len(tally.violations)}), flush=True)
    sys.exit(1 if tally.violations else 0)


if __name__ == "__main__":
    main()
