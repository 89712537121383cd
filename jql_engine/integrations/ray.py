"""Ray Data: score_dataset, actors that load the bundle once and score batch after batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from jql_engine.engine import Engine
from jql_engine.errors import InputError

BATCH_DOCUMENTS = 4_096  # scored together, and so sorted by length


def score_dataset(
    ds: ray.data.Dataset,
    *,
    bundle: str | Path,
    text_column: str = "text",
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = BATCH_DOCUMENTS,
    variant: str | None = None,
    tolerance: float | None = None,
) -> ray.data.Dataset:
    """`ds` with the columns of `score_schema` behind its own; a template's columns are the dataset's.

    `concurrency` actors, a number or (least, most), each with `num_gpus` GPUs (0 or None: the CPU) and `num_cpus`
    cores, load `bundle`, a path that every node can read. Leave cores for the tasks that read, or nothing begins. An
    actor that dies is restarted by Ray and its batch done again. `variant` and `tolerance` decide about the graph as
    they do for Engine. A dataset that has a column of these names, or none named `text_column`, fails with InputError.
    """
    least, most = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    device = "cuda:0" if num_gpus else "cpu"  # Ray shows an actor only its own GPUs
    return ds.map_batches(
        _Scorer,
        fn_constructor_args=(str(bundle), device, text_column, variant, max(1, int(num_cpus or 1)), tolerance),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
    )


class _Scorer:
    """A Ray actor that scores batches with one engine."""

    def __init__(
        self, bundle: str, device: str, text_column: str, variant: str | None, threads: int, tolerance: float | None
    ) -> None:
        self._engine = Engine(bundle, device, variant, threads, tolerance)
        self._text_column = text_column
        template = self._engine.bundle.template
        self._template = () if template is None else template.columns

    def __call__(self, table: pa.Table) -> pa.Table:
        names = table.schema.names
        if self._text_column not in names:
            raise InputError(f"the dataset has no column {self._text_column!r}; it has {', '.join(names)}")
        if missing := [name for name in self._template if name not in names]:
            raise InputError(
                f"the dataset has no column {missing[0]!r}, which the bundle's template needs; "
                f"it has {', '.join(names)}"
            )
        columns = {name: table[name] for name in self._template}
        scores: Any = self._engine.score(table[self._text_column], columns).to_table()
        if clash := set(names) & set(scores.schema.names):
            raise InputError(f"the dataset has a column {min(clash)!r} already; rename it, or the head")
        for name in scores.schema.names:
            table = table.append_column(scores.schema.field(name), scores[name])
        return table
