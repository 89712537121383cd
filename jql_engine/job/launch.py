"""From a job to its summary: texts scored on this machine's devices, new heads on stored vectors, or an estimate."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from jql_engine.bundle import Bundle
from jql_engine.errors import DeviceError
from jql_engine.job.estimate import estimate_work
from jql_engine.job.finish import Outcome, run
from jql_engine.job.plan import Job, Work
from jql_engine.job.pool import Executed, Pool, Spec
from jql_engine.job.progress import Meter, RunLog
from jql_engine.job.rescore import Rescoring, prepare_rescoring
from jql_engine.job.scoring import prepare
from jql_engine.job.unfinished import Unfinished
from jql_engine.job.worker import Scoring
from jql_engine.printing import counted, say
from jql_engine.sessions.base import DEFAULTS, SessionOptions, check_options
from jql_engine.sessions.open import open_session
from jql_engine.sessions.select import Choice, choose
from jql_engine.tokenizer import with_proven_tokenizer


@dataclass(frozen=True, slots=True)
class Machine:
    """What of this machine a job may use; see the options of jql-run."""

    device: str = "auto"
    variant: str | None = None
    workers: int | None = None
    tolerance: float | None = None
    options: SessionOptions = DEFAULTS
    max_flips: float | None = None

    def choose(self, bundle: Bundle) -> Choice:
        """Devices and variant; see sessions.select.choose."""
        choice = choose(bundle, self.device, self.variant, self.tolerance, self.max_flips)
        check_options(bundle, choice.variant, self.options)
        return choice

    def shared(self, devices: tuple[str, ...]) -> SessionOptions:
        """The options of one worker of several: its share of the cores."""
        if devices[0] != "cpu" or self.options.threads:
            return self.options
        return replace(self.options, threads=max(1, len(os.sched_getaffinity(0)) // len(devices)))

    def devices(self, choice: Choice) -> tuple[str, ...]:
        """One device for each worker."""
        if choice.devices == ("cpu",):
            return choice.devices * (self.workers or 1)
        if self.workers not in (None, len(choice.devices)):
            raise DeviceError(
                f"--workers {self.workers}: a GPU has one worker each; name them with --device cuda:0,cuda:1"
            )
        return choice.devices


def score(job: Job, bundle: Bundle, machine: Machine, log: RunLog, stop: threading.Event) -> dict[str, Any]:
    """Run `job` and return its summary."""
    began = time.monotonic()
    log.check((job.out, *job.inputs))
    choice = machine.choose(bundle)
    devices = machine.devices(choice)
    notes: list[str] = []
    bundle = with_proven_tokenizer(bundle, notes.append)
    work = prepare(job, bundle, choice.variant, choice.chunk_bytes)
    notes = [*(choice.notes() if work.tasks else ()), *notes]
    options = machine.shared(devices)
    specs = [Scoring(bundle, device, choice, options, job.embedding_dtype, work.claim) for device in devices]
    on = f"variant {choice.variant} on {','.join(choice.devices)}, heads {', '.join(bundle.heads)}"
    summary = run_work(job, work, specs, on=on, notes=notes, began=began, log=log, stop=stop)
    return summary | {"bundle": bundle.hash, "variant": choice.variant}


def rescore(job: Job, bundle: Bundle, workers: int, log: RunLog, stop: threading.Event) -> dict[str, Any]:
    """Apply the heads of `bundle` to the vectors that a job has stored, and return the summary."""
    began = time.monotonic()
    log.check((job.out, *job.inputs))
    work = prepare_rescoring(job, bundle)
    specs = [Rescoring(bundle, work.claim)] * workers
    on = f"stored vectors, heads {', '.join(bundle.heads)}"
    summary = run_work(job, work, specs, on=on, notes=[], began=began, log=log, stop=stop)
    return summary | {"bundle": bundle.hash}


def estimate(job: Job, bundle: Bundle, machine: Machine, price_per_hour: float | None) -> dict[str, Any]:
    """Predict the work of `job`; computes a sample and writes nothing."""
    choice = machine.choose(bundle)
    devices = machine.devices(choice)
    for note in choice.notes():
        _say(note)
    bundle = with_proven_tokenizer(bundle, _say)
    session = open_session(bundle, choice, devices[0], machine.shared(devices), _say)
    return estimate_work(job, bundle, session, len(devices), price_per_hour)


def run_work(
    job: Job,
    work: Work,
    specs: Sequence[Spec],
    *,
    on: str,
    done: str = "scored",
    notes: Sequence[str],
    began: float,
    log: RunLog,
    stop: threading.Event,
) -> dict[str, Any]:
    """Do what is left of `job` with a worker for each of `specs`, and return the summary; `on` names what is done."""
    meter = Meter(work.n_docs, max(1, min(len(specs), len(work.tasks))), started=began)
    meter.say(_beginning(job, on, work))
    if n_untraceable := sum(not output.file.source.is_traceable for output in work.outputs):
        meter.say(
            f"jql: of {counted(n_untraceable, 'file')} the server tells neither an entity tag nor a time: a change of "
            "one that keeps its size will not be noticed"
        )
    for note in [*notes, *(f"{file.reason}; going on with the other files" for file in work.unreadable)]:
        meter.say(f"jql: {note}")

    def executed(done: Executed) -> None:
        meter.executed(done.documents, done.tokens, done.padding)

    pool = Pool(specs, work.outputs, stop, executed, lambda line: meter.say(f"jql: {line}"))
    ended: list[Unfinished] = []
    try:
        with closing(pool.run(work.tasks)) as chunks:
            outcome = run(work, chunks, meter, log)
        ended = outcome.unfinished if outcome.is_through else []
    finally:
        work.release(ended)
    meter.close()
    meter.say(_end(job, outcome, meter, done))
    return _summary(job, outcome, work, meter)


def _say(line: str) -> None:
    say(f"jql: {line}")


def _beginning(job: Job, on: str, work: Work) -> str:
    left = work.n_docs
    begun = sum(output.file.n_rows for output in work.outputs) - left
    kept = f"; {counted(begun, 'document')} of those files done already" if begun and job.limit is None else ""
    finished = f"; {counted(work.n_finished, 'file')} finished already" if work.n_finished else ""
    rank = f"; rank {job.rank.rank} of {job.rank.world_size} ({job.rank.said_by})" if job.rank.world_size > 1 else ""
    new = ""
    if work.listing is not None and work.listing.n_new:
        new = (
            f"; {counted(work.listing.n_new, 'file')} appeared since the ranks began: start all ranks again for what "
            "is new once they are through"
        )
    return f"{counted(left, 'document')} in {counted(len(work.outputs), 'file')}{kept}{finished}; {on}{rank}{new}"


def _end(job: Job, outcome: Outcome, meter: Meter, done: str) -> str:
    took = timedelta(seconds=round(meter.seconds))
    documents, files = counted(meter.documents, "document"), counted(outcome.n_files, "file")
    n_left = len(outcome.unfinished)
    unfinished = f"; {counted(n_left, 'file')} unfinished, see the summary" if n_left else ""
    return f"{documents} {done} in {took}, {files} written to {job.out}{unfinished}"


def _summary(job: Job, outcome: Outcome, work: Work, meter: Meter) -> dict[str, Any]:
    return meter.figures() | {
        "files": outcome.n_files,
        "skipped_files": work.n_finished,
        "unfinished": [asdict(file) for file in outcome.unfinished],
        "workers": meter.n_workers,
        "rank": job.rank.rank,
        "world_size": job.rank.world_size,
    }
