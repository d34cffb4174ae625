"""The styles of tokenizer.json that are tested, for make_golden.py and compare_with_tokenizers.py."""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level(use_regex, add_prefix_space=False):
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": False, "use_regex": use_regex}


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def added(id, content, **options):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": content, **flags, **options}


def template(bos, bos_id):
    """A post-processor that puts `bos` first, as Llama-3 has it."""
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = single + [{"Sequence": {"id": "B", "type_id": 1}}]
    special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def tokenizer_json(vocab, merges, pre_tokenizer, normalizer=None, added_tokens=(), post_processor=None, **model):
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
            **model,
        },
    }


def gpt2(vocab, merges):
    end = "<|endoftext|>"
    return tokenizer_json(vocab, merges, byte_level(True), added_tokens=[added(vocab[end], end)] if end in vocab else [])


def llama3(vocab, merges):
    n = len(vocab)
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
    return tokenizer_json(
        vocab,
        merges,
        sequence(split(LLAMA3_PATTERN), byte_level(False)),
        added_tokens=[added(n + i, s) for i, s in enumerate(specials)],
        post_processor={"type": "Sequence", "processors": [byte_level(True), template(specials[0], n)]},
        ignore_merges=True,
    )


def qwen2(vocab, merges, added_tokens=None):
    n = len(vocab)
    if added_tokens is None:
        added_tokens = [added(n, "<|endoftext|>"), added(n + 1, "<|im_start|>"), added(n + 2, "<|im_end|>")]
        added_tokens.append(added(n + 3, "<tool_call>", special=False))
    return tokenizer_json(
        vocab,
        merges,
        sequence(split(QWEN2_PATTERN), byte_level(False)),
        normalizer={"type": "NFC"},
        added_tokens=added_tokens,
        post_processor=byte_level(False),
    )
