"""Trains the tiny tokenizers in fixtures/ on fixtures/text.txt and writes the ids that the package
`tokenizers` gives to odd texts: fixtures/golden.json, a list of {"tokenizer", "text", "ids"}.

    .venv/bin/python tests/text/make_golden.py
"""

import json
import pathlib
import random
import sys

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import styles  # noqa: E402
from compare_with_tokenizers import odd_texts  # noqa: E402

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "Hello world! It's WE'LL i'M 'sup 'S'T",
    "12345678 1,000.5 ½ ² ١٢٣",
    "a\tb\r\nc\n\n\nd \n e",
    "tabs\t\t and\u00a0no-break\u3000wide\u180emongolian\u2028line",
    "NUL\0inside",
    "e\u0301 a\u0323\u0307 \u1100\u1161\u11a8 \u212b \ufb01",
    "été Größe Wörterbücher словарь λεξικό 词典 日本語 사전 القاموس शब्दकोश từ điển",
    "👩‍🔬🚀 🦙.cpp",
    "before<|endoftext|>after <|im_start|>user\nhi<|im_end|> <|begin_of_text|> <|endof",
    " <tool_call> <tool_call>x<tool_call>",
    "x<mask>y word <mask>  wordword word\tword, a<mask",
    "\U00010d4a\U000323af\u0897 newer letters",
    "'ſ \u017f 'K",
]


def train(vocab_size, pre_tokenizer, whole_alphabet=True):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if whole_alphabet else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator((FIXTURES / "text.txt").read_text().splitlines(keepends=True), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], model["merges"]


def split_then_bytes(pattern):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def fixtures():
    vocab, merges = train(600, pre_tokenizers.ByteLevel(add_prefix_space=False))
    vocab["<|endoftext|>"] = len(vocab)
    yield "gpt2", styles.gpt2(vocab, [" ".join(merge) for merge in merges])
    vocab, merges = train(600, split_then_bytes(styles.LLAMA3_PATTERN))
    # A word of the vocabulary that no merges lead to: only ignore_merges finds it.
    vocab["ĠQqz"] = len(vocab)
    yield "llama3", styles.llama3(vocab, merges)
    yield "qwen2", styles.qwen2(*train(600, split_then_bytes(styles.QWEN2_PATTERN)))

    # No letters beyond those of the text: bytes without a token become <unk>.
    vocab, merges = train(300, pre_tokenizers.ByteLevel(add_prefix_space=True), whole_alphabet=False)
    vocab = {token: i for i, token in enumerate(["<unk>"] + list(vocab))}
    options = {"unk_token": "<unk>", "fuse_unk": True}
    yield "unknown", styles.tokenizer_json(vocab, merges, styles.byte_level(True, add_prefix_space=True), **options)

    # Every option of added tokens and several steps.
    vocab, merges = train(400, pre_tokenizers.ByteLevel(add_prefix_space=False))
    n = len(vocab)
    added = [
        styles.added(n, "<mask>", lstrip=True),
        styles.added(n + 1, "word", single_word=True, special=False),
        styles.added(n + 2, "\u00e9t\u00e9", normalized=True, special=False, rstrip=True),
        styles.added(n + 3, "wordword", single_word=True, normalized=True, special=False),
        styles.added(vocab["the"] if "the" in vocab else n + 4, "the", special=False),
    ]
    steps = styles.sequence(
        styles.split(" ", "MergedWithNext", kind="String"),
        {"type": "Digits", "individual_digits": False},
        styles.split("[\r\n]+", "Removed"),
        styles.split(r"[A-Z]", "MergedWithPrevious"),
        styles.split(r"[\s.,;:]+", "Contiguous", invert=True),
        styles.byte_level(True),
    )
    normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    yield "steps", styles.tokenizer_json(vocab, merges, steps, normalizer, added)


def main():
    golden = []
    texts = TEXTS + [(FIXTURES / "text.txt").read_text()[:1500]] + odd_texts(random.Random(7), 60)
    for name, content in fixtures():
        path = FIXTURES / f"{name}.json"
        path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
        tokenizer = Tokenizer.from_file(str(path))
        for text in texts:
            golden.append({"tokenizer": name, "text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids})
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in golden)
    (FIXTURES / "golden.json").write_text(f"[\n{lines}\n]\n")


main()
