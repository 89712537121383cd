"""Texts in, scores out: the loop that everything else here serves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jql_engine.bundle import Aggregate, Bundle, Take
from jql_engine.data import DocumentBatch, ScoreBatch, Scores, TokenBatch
from jql_engine.errors import DeviceError, InputError
from jql_engine.sessions.base import EngineOptions, Session, SessionOptions, execute
from jql_engine.sessions.open import open_session
from jql_engine.sessions.select import choose
from jql_engine.template import TEXT
from jql_engine.tokenizer import Tokenizer, with_proven_tokenizer
from jql_engine.windows import Windows

Texts: TypeAlias = Sequence[str | None] | pa.Array | pa.ChunkedArray


class Engine:
    """Scores texts with one bundle on one device; may be shared by threads."""

    def __init__(
        self,
        bundle: str | Path | Bundle,
        device: str = "auto",
        variant: str | None = None,
        threads: int | None = None,
        tolerance: float | None = None,
        engines: EngineOptions | None = None,
        windows: Take | None = None,
        aggregate: Aggregate | None = None,
    ) -> None:
        """Open the bundle directory `bundle`, or take one that is open, and load the graph that runs on `device`.

        `device`: auto, cpu, cuda or cuda:N; `variant`: a graph of the bundle by name, by default the fastest whose
        scores were found within `tolerance` of the fp32 reference (0.02); `threads`: CPU threads, by default every
        core this process may use (of up to four, ONNX Runtime lets each compute a document of its own); `engines`:
        those of TensorRT; `windows` and `aggregate`: which windows of a long document are scored, and how their scores
        become one, by default as the bundle says.

        Raises BundleError, DeviceError, TokenizerError, and ParityError where this machine computes
        something else than the reference.

        `engine.tokenizer.library` names what computes token ids; where that is not what the bundle was made with, the
        logger "jql_engine" is told so, as a warning.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        opened = opened.with_windows(windows, aggregate)
        self.bundle = with_proven_tokenizer(opened, logging.getLogger("jql_engine").warning)
        choice = choose(self.bundle, device, variant, tolerance)
        if "," in device:
            raise DeviceError(f"device {device}: an Engine computes on one; make one for each")
        options = SessionOptions(threads, engines or EngineOptions())
        self.session: Session = open_session(self.bundle, choice, choice.devices[0], options)
        self.tokenizer = Tokenizer.of(self.bundle)
        self.windows = Windows.of(self.bundle)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads, in the order of the score columns."""
        return self.bundle.heads

    def score(self, texts: Texts, columns: Mapping[str, Texts] | None = None) -> Scores:
        """Score `texts` (str, or null for no score), in their order; an empty string is scored.

        `columns`: what the bundle's template needs beside the texts, by name; a null in one gives no score. Raises
        InputError for anything that is not text, and for a column that is missing.
        """
        tokens = self.tokenizer.encode(DocumentBatch.of(self._documents(texts, columns)))
        return Scores.spread(self.score_tokens(tokens), self.heads, len(texts))

    def score_tokens(self, tokens: TokenBatch) -> ScoreBatch:
        """Score tokenized documents."""
        windows = self.windows.cut(tokens)
        scores = ScoreBatch.empty(windows.tokens, len(self.heads))
        for batch, output in execute(self.session, windows.tokens):
            scores.put(batch.rows, output)
        return self.windows.merge(tokens, windows, scores)

    def embed(self, texts: Texts, columns: Mapping[str, Texts] | None = None) -> NDArray[np.float32]:
        """L2-normalized embeddings of `texts`, float32 [n, hidden size]; NaN for a null text; see `score`."""
        if self.windows.rule.take != "first":
            raise InputError(f"an embedding is of one window, and windows are {self.windows.rule.take}: give first")
        tokens = self.tokenizer.encode(DocumentBatch.of(self._documents(texts, columns)))
        embeddings = np.full((len(texts), self.bundle.manifest.encoder.hidden_size), np.nan, np.float32)
        for batch, output in execute(self.session, tokens):
            embeddings[batch.rows] = output.embeddings
        return embeddings

    def _documents(self, texts: Texts, columns: Mapping[str, Texts] | None) -> pa.LargeStringArray:
        template = self.bundle.template
        if template is None:
            if columns:
                raise InputError(
                    f"columns {', '.join(columns)}: the bundle has no template that needs any; give texts alone"
                )
            return as_texts(texts)
        if unknown := sorted((columns or {}).keys() - set(template.columns)):
            raise InputError(f"column {unknown[0]!r} is none of template {template.source!r}; leave it out")
        given = {name: as_texts(values) for name, values in (columns or {}).items()} | {TEXT: as_texts(texts)}
        for name in template.columns:
            if len(given.get(name, ())) != len(texts):
                found = f"{len(given[name])} values" if name in given else "none"
                raise InputError(
                    f"template {template.source!r} needs column {name!r} with {len(texts)} values, found {found}; give "
                    "score(texts, columns={name: values})"
                )
        return template.fill(given)


def as_texts(texts: Texts) -> pa.LargeStringArray:
    """`texts` as an Arrow array; raises InputError that names the first item which is not text."""
    if isinstance(texts, str):
        raise InputError("score() takes a list of texts; for a single text write [text]")
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    try:
        if not isinstance(texts, pa.Array):
            return pa.array(texts, pa.large_string())
        if pa.types.is_primitive(texts.type):
            raise pa.ArrowTypeError("no text")
        # Arrow takes an array declared as text at its word, and checks UTF-8 where it turns bytes into text.
        return texts.cast(pa.large_string()).cast(pa.large_binary()).cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, UnicodeEncodeError) as error:
        raise InputError(f"texts must be str or None: {_first_wrong(texts)} ({error})") from error


def _first_wrong(texts: Texts) -> str:
    if isinstance(texts, pa.Array):
        return f"found an Arrow array of {texts.type}"
    for i, text in enumerate(texts):
        if not (text is None or isinstance(text, str)):
            return f"item {i} is {type(text).__name__}"
        if text is not None and not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            return f"item {i} holds a lone surrogate, which is no Unicode text"
    return "found something else"
