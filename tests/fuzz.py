"""Damaged files of every kind that comes from outside: each is an error of ours or a correct read.

    python -m tests.fuzz --cases 100000 --seed 7 [--kind parquet]
    python -m tests.fuzz --seed 7 --only parquet:1234

A case is its kind, its seed and its number; nothing else decides about it but the versions of the libraries that write
the undamaged files. A child process takes the cases of a kind one after another, so that a crash of pyarrow, torch or
tokenizers ends the child alone and is told with its case. Violations: any exception that is no EngineError, another
content than the oracle's, a case that takes longer than --timeout, a crash. A crash of pyarrow on a parquet file is
known, and counted apart: jql-run survives it, since worker processes look into files.

The last line of stdout is JSON: cases, errors of ours, correct reads, crashes, violations. Exits with 1 on a violation.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jql_engine.errors import EngineError
from tests.fuzzing.kinds import MODULES, load

TIMEOUT = 60.0  # seconds for one case; they take milliseconds
START_SECONDS = 300.0  # until a child is ready: it may have to make the undamaged files
MEMORY_BYTES = 6 << 30  # address space beyond what a child needs to start
LOG_BYTES = 1 << 20
CHILD_CASES = 5_000  # then a new one: libraries lose memory when they raise
SHOWN = 5  # violations of one kind and message


@dataclass(frozen=True, slots=True)
class Case:
    """What decides about a damaged file."""

    kind: str
    seed: int
    number: int

    def random(self) -> random.Random:
        """Its source of random numbers."""
        return random.Random(f"{self.kind} {self.seed} {self.number}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one case."""

    case: Case
    verdict: str  # error, read, crash or violation
    message: str = ""  # what is the same for cases of one cause
    detail: str = ""


class Child:
    """A process that takes cases of one kind."""

    def __init__(self, kind: str, bases: Path, folder: Path) -> None:
        self.kind, self.n_cases = kind, 0
        folder = folder / kind
        folder.mkdir(exist_ok=True)
        self.log = folder / "log"
        command = [sys.executable, "-m", "tests.fuzz", "--child", kind, str(bases), str(folder)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        if (ready := self._answer(START_SECONDS)) is None:
            raise RuntimeError(f"a child for {kind} did not start: {self.log.read_text(errors='replace')[-4000:]}")
        self.may_crash: bool = ready["may_crash"]

    def run(self, case: Case, timeout: float) -> Outcome:
        """One case; the child is gone after a crash or a hang."""
        assert self.process.stdin is not None
        self.n_cases += 1
        self.process.stdin.write(f"{case.seed} {case.number}\n".encode())
        self.process.stdin.flush()
        answer = self._answer(timeout)
        if answer is not None:
            return Outcome(case, **answer)
        status = self.process.poll()
        if status is None:
            self.stop()
            return Outcome(case, "violation", f"took longer than {timeout:.0f} s")
        tail = self.log.read_text(errors="replace")[:2_000]
        return Outcome(case, "crash" if self.may_crash else "violation", f"exit status {status}", tail)

    @property
    def takes_more(self) -> bool:
        """Whether it can take another case."""
        return self.process.poll() is None and self.n_cases < CHILD_CASES

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _answer(self, timeout: float) -> dict[str, Any] | None:
        """None where it takes too long, or the process ended."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            return None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            return None
        return json.loads(line)


def run_cases(cases: Iterable[Case], bases: Path, folder: Path, timeout: float = TIMEOUT) -> Iterator[Outcome]:
    """Every case, with one child at a time; those of a kind should come in a row."""
    child: Child | None = None
    try:
        for case in cases:
            if child is None or child.kind != case.kind or not child.takes_more:
                if child is not None:
                    child.stop()
                child = Child(case.kind, bases, folder)
            yield child.run(case, timeout)
    finally:
        if child is not None:
            child.stop()


def report(outcomes: Iterable[Outcome], folder: Path, keep: Path | None = None) -> dict[str, Any]:
    """Count, and name on stderr each violation and crash with the command that repeats it."""
    verdicts: dict[str, Counter[str]] = {}
    shown: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        case = outcome.case
        verdicts.setdefault(case.kind, Counter())[outcome.verdict] += 1
        if outcome.verdict in ("crash", "violation"):
            shown[case.kind, outcome.message] += 1
            if keep is not None:
                _keep(folder / case.kind, keep / f"{case.kind}-{case.seed}-{case.number}")
            if shown[case.kind, outcome.message] <= SHOWN:
                again = f"python -m tests.fuzz --seed {case.seed} --only {case.kind}:{case.number}"
                sys.stderr.write(f"{outcome.verdict}: {outcome.message}\n{outcome.detail}\n  again: {again}\n")
    total: Counter[str] = sum(verdicts.values(), Counter())
    return {
        **_counts(total),
        "kinds": {kind: _counts(counter) for kind, counter in verdicts.items()},
        "causes": [{"kind": kind, "message": message, "cases": n} for (kind, message), n in shown.most_common()],
    }


def _keep(folder: Path, target: Path) -> None:
    """Copy the last case of a kind, a file or a folder."""
    for case in folder.glob("case.*"):
        copy = shutil.copytree if case.is_dir() else shutil.copyfile
        copy(case, target.with_name(target.name + "".join(case.suffixes)))


def _counts(verdicts: Counter[str]) -> dict[str, int]:
    return {
        "cases": verdicts.total(), "errors": verdicts["error"], "reads": verdicts["read"], "crashes": verdicts["crash"],
        "violations": verdicts["violation"],
    }  # fmt: skip


def serve(name: str, bases: Path, folder: Path) -> None:
    """Be a child: take seeds and numbers of cases from stdin, answer each with a line of JSON on what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    kind = load(name, bases)
    _limit_memory()
    answers.write(json.dumps({"may_crash": kind.may_crash}) + "\n")
    answers.flush()
    for line in sys.stdin:
        if os.fstat(2).st_size > LOG_BYTES:
            os.ftruncate(2, 0)
        case = Case(name, *map(int, line.split()))
        answers.write(json.dumps(_judge(kind, case.random(), folder)) + "\n")
        answers.flush()


def _judge(kind: Any, rng: random.Random, folder: Path) -> dict[str, str]:
    file = kind.write(rng, folder)
    try:
        kind.read(file)
    except EngineError as error:
        return {"verdict": "error", "message": type(error).__name__, "detail": str(error)[:500]}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
        return {"verdict": "violation", "message": message, "detail": traceback.format_exc()[-4_000:]}
    return {"verdict": "read"}


def _limit_memory() -> None:
    """A length that damage made huge is an error of allocation here, and no burden on the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000, help="cases in all, shared by the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(MODULES), help="all kinds, unless named")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="repeat one case, and leave its file")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds that one case may take")
    parser.add_argument("--keep", type=Path, help="folder for the files of violations and crashes")
    parser.add_argument("--bases", type=Path, help="folder that keeps the undamaged files for the next call")
    parser.add_argument("--child", choices=list(MODULES), help=argparse.SUPPRESS)
    parser.add_argument("folders", nargs="*", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        serve(given.child, *given.folders)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    bases = given.bases or folder / "bases"
    bases.mkdir(parents=True, exist_ok=True)
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
    kinds = given.kind or list(MODULES)
    each = -(-given.cases // len(kinds))
    numbers = range(given.first, given.first + each)
    cases: Iterable[Case] = (Case(kind, given.seed, number) for kind in kinds for number in numbers)
    if given.only:
        kind, _, number = given.only.partition(":")
        cases = [Case(kind, given.seed, int(number))]
    result = {"seed": given.seed, **report(run_cases(cases, bases, folder, given.timeout), folder, given.keep)}
    if given.only:
        sys.stderr.write(f"its file: {folder}\n")
    else:
        shutil.rmtree(folder)
    print(json.dumps(result))  # noqa: T201
    return int(result["violations"] > 0)


if __name__ == "__main__":
    sys.exit(main())
