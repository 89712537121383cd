"""Tokenizers of the kinds that published classifiers have, trained on any texts and saved as published ones are.

wordpiece-uncased, wordpiece-cased   BERT: BertNormalizer, words, pieces with ##
bytes                                ModernBERT: NFC, GPT-NeoX's byte-level BPE, [CLS] and [SEP] after its pieces
gemma                                mmBERT: spaces as \u2581 and no words at all, BPE that falls back to bytes
unigram                              XLM-R: SentencePiece's Unigram
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a tokenizer is trained, and what its files say."""

    train: Callable[[Iterable[str], int], Tokenizer]
    class_name: str  # in tokenizer_config.json, as published
    first: str
    last: str
    pad: str
    unknown: str
    mask: str
    lower: bool | None = None  # do_lower_case


def write_vocabulary(folder: Path, kind: str, texts: Iterable[str], size: int, max_tokens: int) -> Tokenizer:
    """Train a tokenizer of at most `size` ids and write tokenizer.json and tokenizer_config.json."""
    one = KINDS[kind]
    tokenizer = one.train(texts, size)
    ids = [(token, tokenizer.token_to_id(token)) for token in (one.first, one.last)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{one.first} $A {one.last}", pair=f"{one.first} $A {one.last} $B:1 {one.last}:1", special_tokens=ids
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": one.class_name, "model_max_length": max_tokens, "cls_token": one.first,
        "sep_token": one.last, "pad_token": one.pad, "unk_token": one.unknown, "mask_token": one.mask,
    }  # fmt: skip
    config |= {} if one.lower is None else {"do_lower_case": one.lower}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tokenizer


def _wordpiece(texts: Iterable[str], size: int, lower: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = _special(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    )
    return tokenizer


def _bytes(texts: Iterable[str], size: int) -> Tokenizer:
    """Special tokens have the last ids, and runs of spaces are tokens of their own, as in GPT-NeoX's vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    spaces = [AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)]
    last = _special(["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
    mask = AddedToken("[MASK]", lstrip=True, normalized=False, special=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(spaces) - len(last) - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(spaces)
    tokenizer.add_special_tokens([*last, mask])
    return tokenizer


def _gemma(texts: Iterable[str], size: int) -> Tokenizer:
    """Trained on words, since a merge across all of a text would fit that text alone; used without them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    specials = [*_special(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]), *map(AddedToken, BYTES)]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False, limit_alphabet=2_000)
    )
    content = json.loads(tokenizer.to_str())
    # The bytes are pieces of the model, which a text does not name.
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _unigram(texts: Iterable[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    space = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE)
    specials = _special(["<s>", "<pad>", "</s>", "<unk>"])
    specials.append(AddedToken("<mask>", lstrip=True, normalized=False, special=True))
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=specials, unk_token="<unk>", show_progress=False, shrinking_factor=0.5
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _special(tokens: Sequence[str]) -> list[AddedToken]:
    return [AddedToken(token, normalized=False, special=True) for token in tokens]


BERT = {"first": "[CLS]", "last": "[SEP]", "pad": "[PAD]", "unknown": "[UNK]", "mask": "[MASK]"}
KINDS = {
    "wordpiece-uncased": Kind(lambda texts, n: _wordpiece(texts, n, True), "BertTokenizer", lower=True, **BERT),
    "wordpiece-cased": Kind(lambda texts, n: _wordpiece(texts, n, False), "BertTokenizer", lower=False, **BERT),
    "bytes": Kind(_bytes, "PreTrainedTokenizerFast", **BERT),
    "gemma": Kind(_gemma, "GemmaTokenizer", first="<bos>", last="<eos>", pad="<pad>", unknown="<unk>", mask="<mask>"),
    "unigram": Kind(
        _unigram, "XLMRobertaTokenizer", first="<s>", last="</s>", pad="<pad>", unknown="<unk>", mask="<mask>"
    ),
}
