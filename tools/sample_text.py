#!/usr/bin/env python3
"""Samples documents from a Hugging Face language model into a .jsonl file, one {"text": ...} per line.

Each document starts from the model's BOS token and ends at its EOS token or after --max-tokens. The same model,
options and seed give the same file on the same machine and torch version.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lexico_cli import USAGE, ToolError, bounded_float, bounded_int, check_output, complete_file, one_line, quiet_libraries, run  # noqa: E402

import torch  # noqa: E402
from torch import Tensor  # noqa: E402


def load(folder: Path):
    """The model in float32, its tokenizer, and the ids that start and end a document."""
    import transformers

    quiet_libraries()
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ToolError(f"{folder}: no {name}; want a Hugging Face model folder")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # of transformers, tokenizers or safetensors: a damaged file
        raise ToolError(f"{folder}: cannot be loaded: {one_line(error)}") from error
    start, end = model.config.bos_token_id, model.config.eos_token_id
    if start is None:
        raise ToolError(f"{folder}: config.json names no bos_token_id, so a document has nothing to start from")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    return model, tokenizer, start, ends


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One id per row of [batch, vocab] logits, among the likeliest ids that hold top_p of the probability."""
    probabilities, ids = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[before >= top_p] = 0  # the first id always stays: nothing comes before it
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=generator))


@torch.inference_mode()
def sample_batch(model, start: int, ends: list[int], batch: int, options: argparse.Namespace, generator: torch.Generator):
    """Token ids of `batch` documents, without BOS and EOS."""
    from transformers import DynamicCache

    cache = DynamicCache()
    ids = torch.full((batch, 1), start)
    finished = torch.zeros(batch, dtype=torch.bool)
    columns = []
    for _ in range(options.max_tokens):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
        ids = pick(logits, options.temperature, options.top_p, generator)
        columns.append(ids)
        finished |= torch.isin(ids[:, 0], torch.tensor(ends, dtype=ids.dtype))
        if finished.all():
            break
    rows = torch.cat(columns, dim=1).tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample_text.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="Example:\n  tools/sample_text.py data/demo/wikillama-5m train.jsonl --bytes 400000 --seed 1",
    )
    parser.add_argument("model", metavar="FOLDER", type=Path, help="Hugging Face model folder with tokenizer.json")
    parser.add_argument("output", metavar="OUT.jsonl", type=Path, help="the file to write")
    parser.add_argument("--bytes", type=bounded_int(1), default=100_000, help="stop when the file is this long (default: 100000)")
    parser.add_argument("--max-tokens", type=bounded_int(1), default=512, help="longest document (default: 512)")
    parser.add_argument("--batch", type=bounded_int(1), default=64, help="documents sampled side by side (default: 64)")
    parser.add_argument("--temperature", type=bounded_float(0, 10, low_open=True), default=0.9, help="below 1: safer text (default: 0.9)")
    parser.add_argument("--top-p", type=bounded_float(0, 1, low_open=True), default=0.95, help="share of the probability to choose from (default: 0.95)")
    parser.add_argument("--seed", type=bounded_int(0, 2**63 - 1), default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--threads", type=bounded_int(1), default=2, help="CPU threads (default: 2)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.jsonl if it exists")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    check_output(options.output, options.overwrite)
    torch.set_num_threads(options.threads)
    model, tokenizer, start, ends = load(options.model)
    limit = model.config.max_position_embeddings
    if options.max_tokens > limit:
        raise ToolError(f"--max-tokens is {options.max_tokens}, must be at most {limit}, the model's positions", USAGE)
    generator = torch.Generator().manual_seed(options.seed)
    written = documents = tokens = 0
    began = time.monotonic()
    with complete_file(options.output) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        while written < options.bytes:
            before = written
            # The last batch is only as large as what is missing.
            missing = documents * (options.bytes - written) // written + 2 if written else options.batch
            for ids in sample_batch(model, start, ends, min(missing, options.batch), options, generator):
                # A document cut inside a character ends in U+FFFD.
                text = tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd").strip()
                line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                if not text or written >= options.bytes:
                    continue
                file.write(line)
                written += len(line.encode())
                documents += 1
                tokens += len(ids)
            rate = tokens / (time.monotonic() - began)
            print(f"documents={documents} bytes={written}/{options.bytes} tokens_per_s={rate:.0f}", file=sys.stderr)
            if written == before:
                raise ToolError(f"{options.model}: {options.batch} documents in a row were empty")
    print(f"{options.output}: {documents} documents, {tokens} tokens, {written} bytes")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run("sample_text.py", main))
