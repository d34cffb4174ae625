#!/usr/bin/env python3
"""Trains a small Llama and its byte-level BPE tokenizer on any text, and saves both as a Hugging Face folder.

The defaults are those of data/demo/wikillama-5m: 5.5 M parameters, one pass over the text, about 2,400 tokens a second
on two CPU cores. A .txt file is one document, a line of a .jsonl file is one (its string "text"); <|endoftext|>
starts every document and every sequence. The result goes into tools/export_model.py.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lexico_cli import USAGE, ToolError, bounded_float, bounded_int, one_line, quiet_libraries, run  # noqa: E402

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

START = "<|endoftext|>"


def read_documents(paths: list[Path]) -> list[str]:
    documents: list[str] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise ToolError(f"{path}: cannot be read: {error.strerror}") from error
        if path.suffix != ".jsonl":
            documents.append(text)
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                document = None
            if not isinstance(document, str):
                raise ToolError(f'{path}: line {number} is not an object with a string "text"')
            documents.append(document)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ToolError(f"{', '.join(map(str, paths))}: no text")
    return documents


def train_tokenizer(documents: list[str], vocab: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def pack(tokenizer, documents: list[str], length: int) -> Tensor:
    """[sequences, length]: the start token, then documents joined by it. What does not fill a sequence is left out."""
    start = tokenizer.token_to_id(START)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
        ids += [start, *encoding.ids]
    body = length - 1
    count = len(ids) // body
    if count == 0:
        raise ToolError(f"the text has {len(ids)} tokens, want at least {body} for one sequence of {length}")
    rows = torch.tensor(ids[: count * body]).reshape(count, body)
    return torch.cat((torch.full((count, 1), start), rows), dim=1)


def make_model(options: argparse.Namespace, vocab: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=options.hidden,
            intermediate_size=options.mlp,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            head_dim=options.head_dim,
            max_position_embeddings=max(2048, options.length),
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear up to the peak, then linear to zero."""
    warmup = min(warmup, max(1, steps // 2))
    return peak * min((step + 1) / warmup, (steps - step) / (steps - warmup) if steps > warmup else 1.0)


def train(model, sequences: Tensor, options: argparse.Namespace) -> tuple[int, float]:
    """Returns the number of steps and the mean loss (nats per token) of the last tenth of them."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))
    per_pass = max(1, len(sequences) // options.batch)
    steps = options.steps or per_pass
    generator = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    began = last_report = time.monotonic()
    model.train()
    for step in range(steps):
        if step % per_pass == 0:
            order = torch.randperm(len(sequences), generator=generator)
        first = step % per_pass * options.batch
        ids = sequences[order[first : first + options.batch]]
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, steps, options.warmup, options.learning_rate)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.autocast == "bfloat16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        losses.append(loss.item())
        now = time.monotonic()
        if now - last_report > 10 or step + 1 == steps or step == 0:
            last_report = now
            rate = (step + 1) * ids.numel() / (now - began)
            left = (now - began) / (step + 1) * (steps - step - 1)
            print(f"step={step + 1}/{steps} loss={losses[-1]:.4f} tokens_per_s={rate:.0f} eta_s={left:.0f}", file=sys.stderr)
    tail = losses[-max(1, steps // 10) :]
    return steps, sum(tail) / len(tail)


def save(model, tokenizer, card: str, folder: Path) -> None:
    """Writes everything beside the folder first: it appears when it is complete."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        model.eval().half().save_pretrained(partial)
        tokenizer.save(str(partial / "tokenizer.json"))
        settings = {"tokenizer_class": "TokenizersBackend", "bos_token": START, "eos_token": START}
        (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (partial / "README.md").write_text(card)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_demo_model.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="Example:\n  tools/train_demo_model.py wiki.txt notes.jsonl --out my-llama\n"
        "  tools/export_model.py my-llama my-llama.pt",
    )
    parser.add_argument("texts", metavar="TEXT", nargs="+", type=Path, help=".txt or .jsonl file")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the Hugging Face folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER if it holds a model")
    shape = parser.add_argument_group("shape")
    for name, default, what in [
        ("layers", 6, "layers"),
        ("hidden", 256, "width of the hidden states"),
        ("heads", 4, "query heads"),
        ("kv-heads", 2, "key and value heads; divides --heads"),
        ("head-dim", 64, "dimension of a head, even"),
        ("mlp", 704, "width of the MLP"),
    ]:
        shape.add_argument(f"--{name}", type=bounded_int(1), default=default, help=f"{what} (default: {default})")
    shape.add_argument("--vocab", type=bounded_int(257), default=4096, help="tokens: 256 bytes, <|endoftext|>, merges (default: 4096)")
    how = parser.add_argument_group("training")
    how.add_argument("--steps", type=bounded_int(1), help="optimizer steps (default: one pass over the text)")
    how.add_argument("--batch", type=bounded_int(1), default=16, help="sequences a step (default: 16)")
    how.add_argument("--length", type=bounded_int(8), default=512, help="tokens a sequence (default: 512)")
    how.add_argument("--learning-rate", type=bounded_float(0, 1, low_open=True), default=3e-3, help="its peak (default: 3e-3)")
    how.add_argument("--warmup", type=bounded_int(1), default=200, help="steps up to the peak; at most half of all (default: 200)")
    how.add_argument("--autocast", choices=["bfloat16", "none"], default="bfloat16", help="of the forward pass (default: bfloat16)")
    how.add_argument("--seed", type=bounded_int(0, 2**63 - 1), default=0, help="of weights and order (default: 0)")
    how.add_argument("--threads", type=bounded_int(1), default=2, help="CPU threads (default: 2)")
    options = parser.parse_args(arguments)
    if options.heads % options.kv_heads:
        parser.error(f"argument --kv-heads: is {options.kv_heads}, must divide --heads {options.heads}")
    if options.head_dim % 2:
        parser.error(f"argument --head-dim: is {options.head_dim}, must be even")
    return options


def check_folder(folder: Path, overwrite: bool) -> None:
    if not folder.absolute().parent.is_dir():
        raise ToolError(f"{folder}: folder {folder.parent} does not exist", USAGE)
    if folder.exists() and not folder.is_dir():
        raise ToolError(f"{folder}: is a file, want a folder name", USAGE)
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise ToolError(f"{folder}: is not empty; choose another name or pass --overwrite", USAGE)
        if not (folder / "config.json").is_file():  # --overwrite must not delete somebody's folder
            raise ToolError(f"{folder}: is not empty and holds no model; choose another name", USAGE)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    quiet_libraries()
    check_folder(options.out, options.overwrite)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    documents = read_documents(options.texts)
    tokenizer = train_tokenizer(documents, options.vocab)
    sequences = pack(tokenizer, documents, options.length)
    model = make_model(options, tokenizer.get_vocab_size())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{millions:.2f} M parameters, {tokenizer.get_vocab_size()} tokens in the vocabulary, {sequences.numel()} in the text", file=sys.stderr)
    steps, loss = train(model, sequences, options)
    names = ", ".join(path.name for path in options.texts)
    card = (
        f"# {options.out.name}\nA Llama of {millions:.2f} M parameters, trained by tools/train_demo_model.py on {names} "
        f"({sequences.numel()} tokens, {steps} steps of {options.batch} sequences of {options.length}); "
        f"training loss at the end {loss:.3f} nats per token.\n"
    )
    try:
        save(model, tokenizer, card, options.out)
    except OSError as error:
        raise ToolError(f"{options.out}: cannot be written: {one_line(error)}", 4) from error
    print(f"{options.out}: {millions:.2f} M parameters, {steps} steps, {loss:.3f} nats per token at the end")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run("train_demo_model.py", main))
