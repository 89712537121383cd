"""Files beside a graph that a manifest does not list, so that no hash covers them: weights may be read from one."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path


def unlisted_weights(path: Path, graphs: Collection[str], listed: Collection[str]) -> Iterator[str]:
    """Names of unlisted files beside the `graphs` of the bundle in `path`; raises OSError where one cannot be read.

    Operating systems leave hidden files anywhere (.DS_Store, .nfs...): such a file counts where a graph names it, since
    a graph holds the names of its weights' files as they are.
    """
    files = [path / graph for graph in graphs]
    # In the bundle's own folder, where other files lie as well, weights are named after their graph.
    beside = chain.from_iterable(
        graph.parent.glob(f"{glob.escape(graph.stem)}.*") if graph.parent == path else graph.parent.rglob("*")
        for graph in files
    )
    hidden_in_root = (file for file in path.glob(".*") if path in [graph.parent for graph in files])
    for file in chain(beside, hidden_in_root):
        name = file.relative_to(path).as_posix()
        if name in listed or not file.is_file():
            continue
        if not file.name.startswith(".") or any(_names(graph, file.name) for graph in files):
            yield name


def _names(graph: Path, name: str) -> bool:
    return graph.is_file() and name.encode().lower() in graph.read_bytes().lower()
