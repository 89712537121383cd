"""Sound files that the damaged ones are made from, where they take long to make."""

from __future__ import annotations

import json
from collections import Counter
from math import log
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from jql_export import probes

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
FAMILIES = ("gte", "bert")


def bundle(bases: Path) -> Path:
    """A bundle with two heads."""
    if not (folder := bases / "bundle").is_dir():
        from tests.conftest import export

        export(encoder(bases, "gte"), {"edu": head(bases)}, folder, ("cpu-fp32", "standard-fp32"))
    return folder


def encoder(bases: Path, family: str) -> Path:
    """A checkpoint directory."""
    if not (folder := bases / family).is_dir():
        from tests.conftest import write_encoder

        write_encoder(folder, family)
    return folder


def head(bases: Path) -> Path:
    """A Lightning checkpoint."""
    if not (file := bases / "head.ckpt").is_file():
        from tests.conftest import write_head

        write_head(file)
    return file


def tokenizers(bases: Path) -> list[Path]:
    """XLM-R's layout, the same with another normalizer, and BERT's; every vocabulary the same in every process."""
    files = [bases / f"tokenizer-{i}.json" for i in range(3)]
    if not files[-1].is_file():
        pieces = [(token, 0.0) for token in SPECIALS] + _pieces()
        split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
        unigram = models.Unigram(pieces, unk_id=SPECIALS.index("<unk>"))
        _save(files[0], unigram, normalizers.NFKC(), split)
        sequence = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁"), normalizers.Lowercase()])
        _save(files[1], unigram, sequence, pre_tokenizers.Metaspace())
        vocabulary = {piece.replace("▁", "") or "▁": i for i, (piece, _) in enumerate(pieces)}
        vocabulary |= {f"##{c}": len(vocabulary) + i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
        wordpiece = models.WordPiece(vocabulary, unk_token="<unk>")
        _save(files[2], wordpiece, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())
    return files


def _pieces() -> list[tuple[str, float]]:
    counts: Counter[str] = Counter()
    for word in " ".join(probes.SENTENCES).split():
        word = f"▁{word}"
        counts.update(word[i:j] for i in range(len(word)) for j in range(i + 1, min(len(word), i + 5) + 1))
    letters = sorted(piece for piece in counts if len(piece) == 1)
    frequent = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece))[:400]
    return [(piece, log(counts[piece] / counts.total())) for piece in [*letters, *frequent]]


def _save(file: Path, model: models.Model, normalizer: object, pre_tokenizer: object) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIALS])
    around = [("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    tokenizer.enable_truncation(64)
    file.write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False), encoding="utf-8")
