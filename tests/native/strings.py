"""Strings on which two tokenizers could differ: random and mutated ones by seed, every code point in four places."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from jql_engine.probe_texts import ODDITIES

# What joins its neighbors in a grapheme cluster, is mapped, is a blank, or means something to the tokenizer.
ODD = (
    "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<mask", "＜s＞", "<\u200bs>", "\u2581", " ", "  ", "\u00a0", "\u3000",
    "\u2028", "\u0085", "\u200b", "\u200d", "\u200c", "\ufe0f", "\ufeff", "\x00", "\x1c", "\n", "\r\n", "\r", "\t",
    "\u0301", "\u0300\u0301", "e\u0301", "\u0338", "\u0344", "\u0345", "\u0897", "\u1acf", "\u1add", "\u1aeb",
    "\u0600", "\u0d4e", "\u0e33", "\u0eb3", "\u093c", "\u094d", "क\u094dष", "\u0903", "\u1100", "\u1161", "\u11a8",
    "가", "\ua960", "ﷺ", "ﬁ", "Å", "Ⅷ", "①", "㍿", "ﾞ", "ｶﾞ", "™", "©\u200d™\u0301", "👩‍👩‍👧", "🇩🇪", "🇩", "🈂", "𝒳", "x",
    "жж", "9.9.9.9.", "。", "，", "ａ", "ª", "º", "\u0149", "\u1e9e", "ſ", "ß", "İ", "\U000e0001", "\U0010ffff",
    "\ue000", "\ufdd0",
)  # fmt: skip
RANGES = (
    (0x20, 0x7E), (0x20, 0x7E), (0x00, 0x24F), (0x250, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF),
    (0xE00, 0xEFF), (0x1000, 0x11FF), (0x1AB0, 0x1AFF), (0x1E00, 0x206F), (0x2070, 0x2BFF), (0x3000, 0x30FF),
    (0x3100, 0x33FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFFFF), (0x1D400, 0x1D7FF), (0x1F000, 0x1FAFF),
    (0x10000, 0x10FFFF),
)  # fmt: skip
TIES = (
    "9.9.9.9.9.9.9.9.",
    "9.9.9.9.",
    "------------",
    "aaaaaaaaaaaa",
    "......",
    "ааааа",
    "9" * 40,
    "1.1.1.1.1.1.",
    "的的的的的的",
)


def places(code_point: int) -> tuple[str, str, str, str]:
    """A code point alone, between letters, after a no-break space, and before an acute accent."""
    c = chr(code_point)
    return c, f"a{c}b", f"\u00a0{c}", f"{c}\u0301"


def code_points(step: int = 1, first: int = 0) -> Iterator[str]:
    """Every `step`-th code point but surrogates, in all places."""
    for code_point in range(first, 0x110000, step):
        if not 0xD800 <= code_point < 0xE000:
            yield from places(code_point)


class Source:
    """An endless source of strings, the same for the same seed and corpus."""

    def __init__(self, seed: int, corpus: Sequence[str]) -> None:
        self.random, self.corpus = random.Random(seed), corpus

    def take(self, n: int) -> list[str]:
        """The next `n` strings: random ones, mutated pieces of documents, ties, and joints of odd parts."""
        kinds = self.random.choices((self._random, self._mutated, self._ties, self._joined), (3, 5, 1, 3), k=n)
        return [kind() for kind in kinds]

    def _character(self) -> str:
        first, last = self.random.choice(RANGES)
        code_point = self.random.randint(first, last)
        return " " if 0xD800 <= code_point < 0xE000 else chr(code_point)

    def _random(self) -> str:
        return "".join(self._character() for _ in range(self.random.randint(0, 24)))

    def _mutated(self) -> str:
        document = self.random.choice(self.corpus)
        start = self.random.randrange(max(1, len(document) - 40))
        characters = list(document[start : start + self.random.randint(1, 60)])
        for _ in range(self.random.randint(0, 4)):
            place = self.random.randint(0, len(characters))
            change = self.random.random()
            if change < 0.4:
                characters.insert(place, self.random.choice(ODD))
            elif change < 0.7:
                characters.insert(place, self._character())
            elif change < 0.85:
                del characters[place : place + self.random.randint(1, 5)]
            else:
                characters[place:place] = characters[: self.random.randint(1, 8)]
        return "".join(characters)

    def _ties(self) -> str:
        unit = self.random.choice((*TIES, self._character(), self._character() + self._character()))
        return (unit * self.random.randint(1, 12))[: self.random.randint(1, 80)]

    def _joined(self) -> str:
        parts = self.random.choices((*ODD, *ODDITIES), k=self.random.randint(1, 6))
        return "".join(part if self.random.random() < 0.8 else part + self._character() for part in parts)
