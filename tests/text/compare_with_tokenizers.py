"""Encodes the same texts with the package `tokenizers` and with our tokenizer; any difference fails.

compare_with_tokenizers.py PRINT_IDS FIXTURES SHARED [--lines N] [--configs N] [--whole-files]
"""

import argparse
import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata

os.environ["RUST_BACKTRACE"] = "0"  # `tokenizers` panics on some texts, see their_ids

try:
    from tokenizers import Tokenizer
except ImportError:
    print(f"skipped: {sys.executable} has no tokenizers; run scripts/setup")
    sys.exit(77)

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import styles  # noqa: E402


def shared_styles(shared):
    """name -> tokenizer.json as a dict, from the vocabularies in ../shared that are there."""
    found = {}
    folder = shared / "tokenizers/gpt2"
    if (folder / "encoder.json").exists():
        vocab = json.loads((folder / "encoder.json").read_text())
        merges = [line for line in (folder / "vocab.bpe").read_text().split("\n")[1:] if line]
        found["gpt2"] = styles.gpt2(vocab, merges)
        found["llama3"] = styles.llama3(vocab, [line.split(" ") for line in merges])
    folder = shared / "tokenizers/qwen2.5"
    if (folder / "vocab.json").exists():
        vocab = json.loads((folder / "vocab.json").read_text())
        merges = [line for line in (folder / "merges.txt").read_text().split("\n") if line and not line.startswith("#version")]
        decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        found["qwen2"] = styles.qwen2(vocab, merges, [{"id": int(i), **token} for i, token in decoder.items()])
    demo = shared / "models/wikillama-5m/tokenizer.json"
    if demo.exists():
        found["demo"] = json.loads(demo.read_text())
    return found


def odd_texts(rng, count):
    """Lines of mixed scripts, marks, spaces, controls, contractions, added tokens."""
    blocks = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x780), (0x900, 0xE00), (0x1100, 0x1200)]
    blocks += [(0x1E00, 0x2000), (0x2000, 0x2070), (0x2070, 0x2C00), (0x3000, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4)]
    blocks += [(0xF900, 0x10000), (0x10000, 0x11000), (0x11000, 0x12000), (0x16D40, 0x16D80), (0x1D100, 0x1D800)]
    blocks += [(0x1F000, 0x1FB00), (0x20000, 0x32400), (0, 0x110000)]
    bits = ["'s", "'T", "'RE", "'ve ", "'ſ", " '", "1234", "12", " 9", "\n", "\r\n", "\n\n ", "  ", "   ", "\t", "\u00a0", "\u3000"]
    bits += ["\u180e", "\u2028", "\x85", "\0", "e\u0301", "a\u0323\u0307", "a\u0307\u0323", "\u1100\u1161\u11a8", "\uac00\u11a8"]
    bits += ["<|endoftext|>", "<|im_start|>", " <|im_end|> ", "<|begin_of_text|>", "<|endof", "<tool_call>", "Hello", " world", "!!", "...", "ing"]
    texts = []
    for _ in range(count):
        parts = []
        first, last = rng.choice(blocks)
        for _ in range(rng.randrange(1, 40)):
            kind = rng.random()
            if kind < 0.4:
                parts.append(rng.choice(bits))
            elif kind < 0.7:
                parts.append("".join(rng.choice("abcdefghij ABCXYZ019.,;:-_'\"\n") for _ in range(rng.randrange(1, 9))))
            else:
                if kind < 0.8:
                    first, last = rng.choice(blocks)
                code_points = (rng.randrange(first, last) for _ in range(rng.randrange(1, 6)))
                parts.append("".join(chr(c) for c in code_points if not 0xD800 <= c <= 0xDFFF))
        texts.append("".join(parts))
    return texts


def every_code_point():
    """Each code point alone, between letters, after a space, after an apostrophe, before marks."""
    points = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF and not 0xE0200 <= c < 0x10F000 and not 0x40000 <= c < 0xE0000]
    for start in range(0, len(points), 64):
        block = [chr(c) for c in points[start : start + 64]]
        yield "\n".join(f"{c} a{c}b {c}1{c}  {c}.{c}'{c}e\u0301{c}\u0323\u0301{c} word{c} {c}word{c}<mask>" for c in block)


def pieces_of(text, size=4000):
    """Cuts of a text at line ends, so that a difference is small enough to look at."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) > size:
            yield piece
            piece = ""
    if piece:
        yield piece


def shared_texts(shared, whole_files):
    texts = []
    files = sorted(shared.glob("corpora/multilingual/*.txt")) + sorted(shared.glob("corpora/ood/*"))
    files += sorted(shared.glob("corpora/wikitext/*test*"))
    for file in files:
        text = file.read_bytes().decode("utf-8", errors="replace")
        texts += [text] if whole_files else list(pieces_of(text))[:10]
    return texts


def our_ids(program, tokenizer, texts):
    with tempfile.TemporaryDirectory() as folder:
        source, result = pathlib.Path(folder, "texts"), pathlib.Path(folder, "ids")
        encoded = [text.encode() for text in texts]
        source.write_bytes(b"".join(struct.pack("<I", len(t)) + t for t in encoded))
        done = subprocess.run([program, tokenizer, source, result], stdout=subprocess.PIPE, text=True, check=True)
        data, at, out = result.read_bytes(), 0, []
        for _ in texts:
            (count,) = struct.unpack_from("<I", data, at)
            out.append(list(struct.unpack_from(f"<{count}i", data, at + 4)))
            at += 4 + 4 * count
        assert at == len(data)
        return out, done.stdout.strip()


PATTERNS = [
    styles.LLAMA3_PATTERN,
    styles.QWEN2_PATTERN,
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[一-龥\u3040-ゟ゠-ヿ]+",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"[\r\n]",
    r"\s+$",
    r"^\w",
    r"\b",
    r"\B\w",
    r"\W+",
    r"[\w\h]{2}?",
    r"\h{1,2}",
    r"\p{Han}+|\p{^L}",
    r"\P{L}|[\P{N}\d]{2,}",
    r"x*",
    r"(a|b)+?[^\Sb]",
    r"(?<=a).|(?<!\d)\d",
    r"a{,2}|{|b{2",
    r"[]a\-\]b]+",
    r"\A.|.\z",
    r"(?i)ab|É",
    r".",
    r"[\D\t-\r]+",
]


def random_tokenizer(rng, vocab, merges):
    """A tokenizer.json of random steps, patterns and added tokens."""
    behaviors = ["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
    steps = []
    for _ in range(rng.randrange(3)):
        kind = rng.random()
        if kind < 0.1:
            steps.append({"type": "Digits", "individual_digits": rng.random() < 0.5})
        elif kind < 0.2:
            steps.append(styles.split(rng.choice(["a", " ", "ab", "$", ""]), rng.choice(behaviors), rng.random() < 0.3, "String"))
        else:
            steps.append(styles.split(rng.choice(PATTERNS), rng.choice(behaviors), rng.random() < 0.3))
    steps.append(styles.byte_level(rng.random() < 0.5, rng.random() < 0.3))
    tokens = {}
    for _ in range(rng.randrange(6)):
        content = "".join(rng.choice(["a", "b", " ", "<", ">", "é", "e\u0301", "<a>", "1", "\n"]) for _ in range(rng.randrange(1, 4)))
        flags = {flag: rng.random() < 0.3 for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        # Which of two tokens that normalize alike is found changes there from run to run.
        tokens[unicodedata.normalize("NFC", content)] = styles.added(rng.randrange(1000), content, **flags)
    normalizer = rng.choice([None, {"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}])
    model = {"ignore_merges": rng.random() < 0.5}
    return styles.tokenizer_json(vocab, merges, styles.sequence(*steps), normalizer, tokens.values(), **model)


def small_texts(rng, count):
    bits = list("aabb  <>1é2'\n.,A") + ["e\u0301", "<a>", "ab", "  ", "\r\n", "字", "\u3000", "\u0301", "\u200d", "ß", "Ⅷ", "_", "x", "É"]
    return ["".join(rng.choice(bits) for _ in range(rng.randrange(30))) for _ in range(count)]


def their_ids(tokenizer, texts):
    """None where `tokenizers` itself panics (a token that begins with the space another one stripped)."""
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
    ids = []
    for text in texts:
        try:
            ids.append(tokenizer.encode(text, add_special_tokens=False).ids)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            ids.append(None)
    return ids


def compare(name, program, path, texts):
    """Number of texts whose ids differ; shows the first three."""
    theirs = their_ids(Tokenizer.from_file(str(path)), texts)
    ours, speed = our_ids(program, path, texts)
    wrong = [i for i in range(len(texts)) if theirs[i] is not None and ours[i] != theirs[i]]
    num_ids = sum(len(ids) for ids in theirs if ids is not None)
    print(f"{name}: {len(texts)} texts, {num_ids} ids, {len(wrong)} texts differ, ours at {speed}", flush=True)
    for i in wrong[:3]:
        at = next((k for k, (a, b) in enumerate(zip(ours[i], theirs[i])) if a != b), min(len(ours[i]), len(theirs[i])))
        print(f"  text {i}: {texts[i][:200]!r}\n    at id {at}: ours {ours[i][at:at+8]}, theirs {theirs[i][at:at+8]}")
    return len(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("print_ids")
    parser.add_argument("fixtures", type=pathlib.Path)
    parser.add_argument("shared", type=pathlib.Path)
    parser.add_argument("--lines", type=int, default=1000, help="of fuzz")
    parser.add_argument("--configs", type=int, default=50, help="random tokenizer.json files")
    parser.add_argument("--whole-files", action="store_true", help="of the shared corpora, and every code point")
    args = parser.parse_args()
    if not args.shared.is_dir():
        print(f"skipped: the texts and tokenizers of {args.shared}, which is not there")
    texts = odd_texts(random.Random(1), args.lines) + shared_texts(args.shared, args.whole_files)
    texts += ["", " ", "\0", "a" * 100_000, " " * 100_000, "ab" * 50_000, "é" * 20_000]
    if args.whole_files:
        texts += every_code_point()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        paths = {path.parent.name + "/" + path.name: path for path in sorted(args.fixtures.glob("*.json")) if path.stem != "golden"}
        for name, content in shared_styles(args.shared).items():
            paths[name] = pathlib.Path(folder, name + ".json")
            paths[name].write_text(json.dumps(content))
        for name, path in paths.items():
            wrong += compare(name, args.print_ids, path, texts)
        base = json.loads((args.fixtures / "gpt2.json").read_text())["model"]
        for seed in range(args.configs):
            rng = random.Random(seed)
            path = pathlib.Path(folder, "random.json")
            path.write_text(json.dumps(random_tokenizer(rng, base["vocab"], base["merges"])))
            wrong += compare(f"random tokenizer {seed}", args.print_ids, path, small_texts(rng, 100) + odd_texts(rng, 10))
    print(f"{wrong} texts differ")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
