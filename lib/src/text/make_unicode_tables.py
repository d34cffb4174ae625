"""Writes unicode_tables.cpp: where `tokenizers` and the C libraries here see Unicode differently.

    .venv/bin/pip install unicodedata2     # a newer Unicode than Python's own
    .venv/bin/python lib/src/text/make_unicode_tables.py > lib/src/text/unicode_tables.cpp

`tokenizers` matches with the tables of Unicode 16 but composes (NFC) with those of Unicode 9. PCRE2 may
know as little as Unicode 14, utf8proc knows more than 9. Run with Python 3.11 (Unicode 14).
"""

import sys
import unicodedata as old

import unicodedata2 as new
from tokenizers import Regex, normalizers, pre_tokenizers

assert old.unidata_version == "14.0.0", old.unidata_version
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co Cn".split()


def matched(pattern):
    """The code points that `tokenizers` matches with `pattern`."""
    text = "".join(map(chr, CODE_POINTS))
    keep = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return {ord(c) for i in range(0, len(text), 4096) for piece, _ in keep.pre_tokenize_str(text[i : i + 4096]) for c in piece}


def utf8_length(c):
    return len(chr(c).encode())


def stand_ins():
    """Ranges whose category is not that of Unicode 14, with a character that has always had it."""
    theirs = {c: name for name in CATEGORIES for c in matched(r"\p{%s}" % name)}
    han = matched(r"\p{Han}")
    always, ranges = {}, []
    for c in CODE_POINTS:
        if old.category(chr(c)) == theirs[c] == new.category(chr(c)) and old.name(chr(c), ""):
            always.setdefault((theirs[c], utf8_length(c), c in han), c)
    for c in CODE_POINTS:
        if theirs[c] == old.category(chr(c)):
            continue
        stand_in = always[theirs[c], utf8_length(c), c in han]
        if ranges and ranges[-1][1] == c - 1 and ranges[-1][2] == stand_in:
            ranges[-1][1] = c
        else:
            ranges.append([c, c, stand_in])
    return ranges


def inert():
    """Characters that move or compose under NFC today, but not in `tokenizers`."""
    nfc = normalizers.NFC().normalize_str
    found = set()
    for c in CODE_POINTS:
        for text in (chr(c), "a" + chr(c) + "\u0334", "a\u0345" + chr(c), "x" + chr(c) + "\u0327", "x\u0327" + chr(c)):
            if nfc(text) != new.normalize("NFC", text):
                found.add(c)
        parts = new.decomposition(chr(c)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            pair = "".join(chr(int(x, 16)) for x in parts)
            if nfc(pair) != new.normalize("NFC", pair):
                found |= {c, ord(pair[0])} | ({ord(pair[1])} if ord(pair[1]) > 0x800 else set())
    ranges = []
    for c in sorted(found):
        if ranges and ranges[-1][1] == c - 1:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    return ranges


def main():
    out = sys.stdout.write
    out('#include "text/unicode_tables.h"\n\n// Written by make_unicode_tables.py.\n// clang-format off\nnamespace lexico::text {\n\n')
    out("const StandIn kStandIns[] = {\n")
    rows = stand_ins()
    for first, last, stand_in in rows:
        out(f"    {{0x{first:X}, 0x{last:X}, 0x{stand_in:X}}},  // {new.category(chr(stand_in))}\n")
    out(f"}};\nconst std::size_t kNumStandIns = {len(rows)};\n\n")
    rows = inert()
    out("const CodePointRange kInert[] = {\n")
    for first, last in rows:
        out(f"    {{0x{first:X}, 0x{last:X}}},\n")
    out(f"}};\nconst std::size_t kNumInert = {len(rows)};\n\n}}  // namespace lexico::text\n")


main()
