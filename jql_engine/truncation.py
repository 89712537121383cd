"""A huge document -> a text of the same first ids, so that none is tokenized to its end only to be cut.

Cutting a prefix off anywhere is wrong: how its last characters are best split depends on those that follow. It is
exact between two characters x and y where no token of the document lies across, because then:

1. Normalizing. `tokenizers` maps grapheme by grapheme (Precompiled), composes characters with marks and jamo after them
   (NFC and its kin) or works in white space only. The four characters around the cut are plain: they join no neighbor
   in a grapheme, compose with none and stay as they are. Or y is a blank, at which words end, and no mark follows.
   So the normalized prefix is a prefix of the normalized document.
2. Added tokens are found from left to right, the longest first, and none lies across the cut.
3. Words are split into pieces one by one, so only the prefix's last word could be split otherwise.
4. Unigram finds the best split of a word in one forward pass, which up to any place reads only what is before it and
   keeps the first of equally good splits (`encode_optimized` in tokenizers' unigram/model.rs). So if the best split of
   the whole word has a boundary at the cut, the pieces before it are those of the word that ends there.

A boundary is known in two ways. Surely: y is a blank, or no piece or added token holds x followed by y. Steadily: these
have at most L characters, so one of L neighboring places is a boundary; if the prefixes up to all of them have the
same first ids, these are the document's, whichever it is. Unknown characters in a row become one token, which may
go on beyond the cut: so a prefix must have more ids than are kept.

The document stays whole where nothing is proven: one character repeated for megabytes (its first ids do depend on the
end), a flood of emoji or marks, and tokenizers of another kind than described.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unicodedata import category

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tokenizers import Tokenizer as OracleTokenizer

Encode = Callable[[list[str]], tuple[NDArray[np.int32], NDArray[np.int64]]]
"""Content ids [T] of all texts and the length [N] of each."""

FIRST = 8  # bytes of the first prefix for each token wanted: English has 4 a token, Chinese 5, Thai 10
GROWTH = 2  # of the next prefix, so that all together cost no more than the whole document
REACH = 1 << 16  # characters at the end of a prefix where a place to cut is looked for

BLANKS = " \t\n\r\u00a0\u3000"
FLOOD = re.compile(f"(?<=[{BLANKS}][{BLANKS}])[{BLANKS}]+(?=[{BLANKS}][{BLANKS}])")
# Letters by their category that nevertheless join a neighbor: jamo, prepended Indic signs, Thai and Lao am.
JOINING = {*range(0x1100, 0x1200), *range(0xA960, 0xA980), *range(0x1CD0, 0x1D00), 0xD4E, 0xE33, 0xEB3}


@dataclass(frozen=True, slots=True)
class Shortener:
    """What must be known of a tokenizer to shorten its documents; made by `shortener`."""

    plain: NDArray[np.bool_]  # by code point, as the next two
    blank: NDArray[np.bool_]
    solid: NDArray[np.bool_]  # what may stand before a blank, whatever is before it
    neighbors: NDArray[np.int64]  # pairs of characters within pieces and added tokens, packed, ascending
    longest: int  # characters of the longest piece or added token
    drops_blanks: bool  # however many stand in a row

    def shorten(self, document: memoryview, room: int, encode: Encode) -> str:
        """A text with the first `room` ids of `document` (UTF-8), and with more ids than these if that has more."""
        size = FIRST * max(room, 1)
        while GROWTH * size <= len(document):
            text = self._read(document[:size])
            places = self.places(text)
            affordable = GROWTH * len(places) * size <= len(document)
            if places and affordable and _agree(room, *encode([text[:place] for place in places])):
                return text[: places[0]]
            size *= GROWTH
        return self._read(document)

    def _read(self, prefix: memoryview) -> str:
        text = str(prefix, "utf-8", "ignore")  # leaves out the character that the prefix ends within
        return FLOOD.sub("", text) if self.drops_blanks else text

    def places(self, text: str) -> list[int]:
        """Places in `text`, one of them surely a boundary: the last sure one, else the last steady ones, else none."""
        codes = _codes(text[-REACH:])
        plain, blank, solid = self.plain[codes], self.blank[codes], self.solid[codes]
        kept = plain | blank
        may = kept[:-3] & plain[1:-2] & kept[2:-1] & kept[3:]
        apart = blank[2:-1] | ~_among(_pairs(codes)[1:-1], self.neighbors)
        sure = (may & apart) | (solid[1:-2] & blank[2:-1] & kept[3:])
        for found, width in ((sure, 1), (may, self.longest)):
            if len(found) >= width and (runs := sliding_window_view(found, width).all(axis=1)).any():
                first = len(text) - len(codes) + 2 + int(np.flatnonzero(runs)[-1])  # found[0] is after two characters
                return list(range(first, first + width))
        return []


def shortener(oracle: OracleTokenizer) -> Shortener | None:
    """What to know of `oracle`, or None where the module's argument does not hold for it."""
    fields = json.loads(oracle.to_str())
    added = {token["content"] for token in fields["added_tokens"]}
    added |= {normalize(oracle, content) for content in added}
    if not _understood(fields) or any(c.isspace() or c == "▁" for c in "".join(added)):
        return None
    pieces = added | oracle.get_vocab().keys()
    blanks = [c for c in BLANKS if _ends_words(oracle, c) and _ends_words(oracle, c + "\n")]
    splits = _steps(fields["pre_tokenizer"])[0]["type"] == "WhitespaceSplit" and len(blanks) == len(BLANKS)
    drops = splits and all(len(_words(oracle, f"a{c * 3}a")) == 2 for c in BLANKS)
    return Shortener(
        plain=_table(_unchanged(oracle, letters_and_marks())),
        blank=_table(blanks),
        solid=_table(
            c for c in map(chr, range(1 << 16)) if drops and category(c)[0] in "LMNPS" and ord(c) not in JOINING
        ),
        neighbors=np.unique(_pairs(_codes("\0".join(pieces)))),
        longest=max(map(len, pieces)),
        drops_blanks=drops,
    )


def letters_and_marks() -> list[str]:
    """Characters that join no neighbor in a grapheme and compose with none that is in this list.

    Up to the last Hangul syllable: beyond come surrogates, compatibility forms and planes that few texts use.
    """
    letters = {c for c in map(chr, range(0xAA, 0xD7A4)) if category(c) in ("Lu", "Ll", "Lo", "Nd")}
    return sorted(letters - {*map(chr, JOINING)} | {*map(chr, range(0x21, 0x7F)), *"、。「」"})


def _understood(fields: dict[str, Any]) -> bool:
    """Whether tokenizer.json has only parts that the module's argument covers."""
    model = {key: value for key, value in fields["model"].items() if key != "vocab"}
    words, normalizers = _steps(fields["pre_tokenizer"]), _steps(fields["normalizer"])
    maps = [step["type"] for step in normalizers if not _only_white_space(step)]
    return (
        model["type"] == "Unigram" and isinstance(model["unk_id"], int) and not model["byte_fallback"]
        and [step["type"] for step in words] in (["WhitespaceSplit", "Metaspace"], ["Metaspace"])
        and words[-1]["replacement"] == "▁" and words[-1]["split"]
        and maps in ([], ["Precompiled"], ["NFC"], ["NFD"], ["NFKC"], ["NFKD"])
        and not any(token["single_word"] for token in fields["added_tokens"])
    )  # fmt: skip


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None or part["type"] != "Sequence":
        return [part] if part else []
    return [step for inner in part.get("normalizers") or part["pretokenizers"] for step in _steps(inner)]


def _only_white_space(step: dict[str, Any]) -> bool:
    replaces = step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"} and step["content"] in (" ", "▁")
    return replaces or step["type"] == "Strip"


def normalize(oracle: OracleTokenizer, text: str) -> str:
    """`text` as the tokenizer's normalizer leaves it, if it has one."""
    normalizer: Any = oracle.normalizer  # may be None, other than its stub says
    return str(normalizer.normalize_str(text)) if normalizer else text


def _ends_words(oracle: OracleTokenizer, blank: str) -> bool:
    words = _words(oracle, f"a{blank}a")
    return len(words) > 1 and words[0] == _words(oracle, "a")[0]


def _words(oracle: OracleTokenizer, text: str) -> list[str]:
    return [word for word, _ in oracle.pre_tokenizer.pre_tokenize_str(normalize(oracle, text))]


def _unchanged(oracle: OracleTokenizer, characters: Iterable[str]) -> list[str]:
    """Those that the normalizer leaves as they are, in one call, since there are 47,000; none if it touches "|"."""
    characters = [c for c in characters if c != "|"]
    normalized = normalize(oracle, "|".join(characters)).split("|")
    same_number = len(normalized) == len(characters)
    return [c for c, n in zip(characters, normalized, strict=True) if c == n] if same_number else []


def _agree(room: int, ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> bool:
    """Whether all texts have more than `room` ids, the first `room` being the same."""
    starts = np.cumsum(lengths) - lengths
    return bool((lengths > room).all()) and all(np.array_equal(ids[:room], ids[s : s + room]) for s in starts)


def _codes(text: str) -> NDArray[np.int64]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64)


def _pairs(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    return codes[:-1] << 32 | codes[1:]


def _among(values: NDArray[np.int64], ascending: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray(ascending[np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)] == values)


def _table(characters: Iterable[str]) -> NDArray[np.bool_]:
    table = np.zeros(0x110000, np.bool_)
    table[_codes("".join(characters))] = True
    return table
