"""What jql-run does: a job on this machine's devices, an estimate of it, or new heads on stored vectors."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from jql_engine.bundle import Bundle
from jql_engine.data import ChunkDone
from jql_engine.errors import DeviceError
from jql_engine.estimate import estimate_work
from jql_engine.parity import open_certified
from jql_engine.pool import Executed, Pool, Spec
from jql_engine.progress import Meter, RunLog
from jql_engine.rescore import rescore_files
from jql_engine.run import Job, Outcome, Work, prepare, run
from jql_engine.sessions import DEFAULTS, SessionOptions, check_options
from jql_engine.sessions.choice import Choice, choose
from jql_engine.tokens import Tokenizer
from jql_engine.worker import Worker


@dataclass(frozen=True, slots=True)
class Machine:
    """What of this machine a job may use; see the options of jql-run."""

    device: str = "auto"
    variant: str | None = None
    workers: int | None = None
    tolerance: float | None = None
    options: SessionOptions = DEFAULTS

    def choose(self, bundle: Bundle) -> Choice:
        """Devices and variant; see jql_engine.sessions."""
        choice = choose(bundle, self.device, self.variant, self.tolerance)
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
    log.check()
    choice = machine.choose(bundle)
    devices = machine.devices(choice)
    work = prepare(job, bundle, choice.variant, choice.chunk_bytes)
    meter = Meter(work.n_docs, max(1, min(len(devices), len(work.tasks))), started=began)
    meter.say(_beginning(job, bundle, choice, work))
    for file in work.unreadable:
        meter.say(f"jql-run: {file.reason}; going on with the other files")
    if len(devices) == 1:
        chunks = _in_this_process(job, bundle, choice, machine.options, work, meter, stop)
    else:
        chunks = _in_processes(job, bundle, choice, devices, machine.shared(devices), work, meter, stop)
    with closing(chunks):
        outcome = run(work, chunks, meter, log)
    meter.close()
    return _summary(job, outcome, work, meter, choice, bundle)


def estimate(job: Job, bundle: Bundle, machine: Machine, price_per_hour: float | None) -> dict[str, Any]:
    """Predict the work of `job`; computes a sample and writes nothing."""
    choice = machine.choose(bundle)
    devices = machine.devices(choice)
    session = open_certified(bundle, choice, devices[0], machine.shared(devices), Meter(0).say)
    return estimate_work(job, bundle, session, len(devices), price_per_hour)


def rescore_all(job: Job, bundle: Bundle, stop: threading.Event) -> dict[str, Any]:
    """Apply the heads of `bundle` to stored vectors."""
    return rescore_files(job, bundle, stop)


def _beginning(job: Job, bundle: Bundle, choice: Choice, work: Work) -> str:
    finished = f", {work.n_finished:,} files are finished already" if work.n_finished else ""
    rank = f"; rank {job.rank.rank} of {job.rank.world_size} ({job.rank.said_by})" if job.rank.world_size > 1 else ""
    return (
        f"{work.n_docs:,} documents in {len(work.targets):,} files{finished}; variant {choice.variant} on "
        f"{','.join(choice.devices)}, heads {', '.join(bundle.heads)}{rank}"
    )


def _in_this_process(
    job: Job, bundle: Bundle, choice: Choice, options: SessionOptions, work: Work, meter: Meter, stop: threading.Event
) -> Generator[ChunkDone]:
    say = lambda line: meter.say(f"jql-run: {line}")  # noqa: E731
    session = open_certified(bundle, choice, choice.devices[0], options, say)
    worker = Worker(
        bundle, session, Tokenizer.of(bundle), dict(enumerate(work.targets)), job.embedding_dtype, stop, meter.executed
    )
    return worker.run(work.tasks)


def _in_processes(
    job: Job,
    bundle: Bundle,
    choice: Choice,
    devices: tuple[str, ...],
    options: SessionOptions,
    work: Work,
    meter: Meter,
    stop: threading.Event,
) -> Generator[ChunkDone]:
    def executed(done: Executed) -> None:
        meter.executed(done.documents, done.tokens, done.padding)

    specs = [Spec(bundle, device, choice, options, job.embedding_dtype) for device in devices]
    return Pool(specs, work.targets, stop, executed, lambda line: meter.say(f"jql-run: {line}")).run(work.tasks)


def _summary(job: Job, outcome: Outcome, work: Work, meter: Meter, choice: Choice, bundle: Bundle) -> dict[str, Any]:
    return meter.figures() | {
        "files": outcome.n_files,
        "skipped_files": work.n_finished,
        "unfinished": [asdict(file) for file in outcome.unfinished],
        "workers": meter.n_workers,
        "rank": job.rank.rank,
        "world_size": job.rank.world_size,
        "variant": choice.variant,
        "bundle": bundle.hash,
    }
