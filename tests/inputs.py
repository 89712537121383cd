"""Input files for tests: what they hold, and how they break."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Tokenizer, models, trainers

from jql_engine import probe_texts
from jql_engine.bundle import MANIFEST, Bundle, describe_files

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
OTHER_TOKIE = "tokie 0.1.3"


def special_tokens() -> list[AddedToken]:
    """SPECIALS as XLM-R's tokenizer.json has them."""
    return [AddedToken(token, normalized=False, special=True, lstrip=token == "<mask>") for token in SPECIALS]


def train_unigram(tokenizer: Tokenizer) -> None:
    """Train a Unigram model on the probe sentences: the same pieces, ids and scores every time.

    The trainer's hash seed moves the last digits of its scores, and with them ids; single characters that it dropped
    come back in random order, with scores that rise from the lowest by 0.0001 each. Scores are exact in fp32, as
    are SentencePiece's, which made those of XLM-R.
    """
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=special_tokens(), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(probe_texts.SENTENCES, trainer)
    trained = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    lowest = min(score for _, score in trained)
    settled = [
        (piece, lowest if len(piece) == 1 and score < lowest + 0.5 else score)
        for piece, score in trained[len(SPECIALS) :]
    ]
    rounded = [(piece, float(np.float32(round(score, 4)))) for piece, score in settled]
    pieces = trained[: len(SPECIALS)] + sorted(rounded, key=lambda pair: (-pair[1], pair[0]))
    tokenizer.model = models.Unigram(pieces, unk_id=SPECIALS.index("<unk>"))


def not_utf8() -> pa.StringArray:
    """Texts number 1 and 3 are no UTF-8, number 2 is null; Arrow does not look."""
    parts = [b"good", b"\xff\xfe", b"", b"caf\xe9", "süß".encode()]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    valid = pa.py_buffer(bytes([0b11011]))
    return pa.StringArray.from_buffers(5, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(parts)), valid, 1)


def damage(path: Path, row_group: int) -> None:
    """Overwrite the text of one row group; the footer and the file's time stay as they are."""
    status = path.stat()
    metadata = pq.read_metadata(path).row_group(row_group)
    column = next(
        metadata.column(i) for i in range(metadata.num_columns) if metadata.column(i).path_in_schema == "text"
    )
    with path.open("r+b") as stream:
        stream.seek(column.dictionary_page_offset or column.data_page_offset)
        stream.write(b"\xff" * column.total_compressed_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def made_with_other_tokie(bundle: Bundle, folder: Path, *, same_ids: bool) -> Bundle:
    """A copy of `bundle` that was made with another version of tokie than the one installed, which is exact or not."""
    shutil.copytree(bundle.path, folder)
    file = folder / "tokenizer.json"
    tokenizer, manifest = json.loads(file.read_text()), json.loads((folder / MANIFEST).read_text())
    if same_ids:  # tokie 0.1.4 leaves out NFKC, and white space that is split off
        tokenizer["normalizer"], tokenizer["pre_tokenizer"] = None, tokenizer["pre_tokenizer"]["pretokenizers"][1]
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = [(piece, float(np.float32(score))) for piece, score in vocabulary]
    file.write_text(json.dumps(tokenizer))
    manifest["tokenizer"]["fast"], manifest["files"] = OTHER_TOKIE, describe_files(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(folder)
