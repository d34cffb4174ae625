#!/usr/bin/env python3
"""Compression of a prompt against the dense attention of the same prompt by torch's scaled_dot_product_attention.

    .venv/bin/python bench/prefill_against_torch.py --bench build/cpu/bin/lexico-bench --threads 2

The model attends over the prompt densely in any case; compressing it comes on top. So the ratio says by how much attention's part
of a prefill grows; the matrix products of the layer, which are not counted here, make its part in the whole smaller. Both take
turns: in every round lexico-bench times each of its settings, then torch each prompt length (causal, grouped queries in the faster
of the two forms that torch has for them). A memory copy of the same keys and values, the least that any cache does, is timed too.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for both: who waits for its turn does not keep a core busy
import torch  # noqa: E402  (reads it)

sys.dont_write_bytecode = True
from attend_against_torch import DTYPES, Ours, median  # noqa: E402


def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attend_repeated(q, k, v):
    group = q.shape[1] // k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True)


class Dense:
    def __init__(self, args, tokens, dtype):
        self.tokens, self.dtype = tokens, dtype
        shape = (args.batch, args.kv_heads, tokens, args.dim)
        self.keys, self.values = (torch.randn(shape).to(DTYPES[dtype]) for _ in range(2))
        self.query = torch.randn(args.batch, args.kv_heads * args.group, tokens, args.dim).to(DTYPES[dtype])
        self.copy = torch.empty((2, *shape), dtype=DTYPES[dtype])
        self.times = {attend: [], attend_repeated: []}
        self.copy_times = []

    def timed(self, call, least_ms, clock):
        calls, begin, started = 0, time.perf_counter(), clock()
        while calls == 0 or (time.perf_counter() - begin) * 1e3 < least_ms:
            call()
            calls += 1
        return (clock() - started) * 1e3 / calls

    def round(self, least_ms, clock):
        for form, times in self.times.items():
            best = min((median(t) for t in self.times.values() if t), default=float("inf"))
            if not times or median(times) <= 1.5 * best:  # else the slower form was tried and is out
                times.append(self.timed(lambda: form(self.query, self.keys, self.values), least_ms, clock))
        self.copy_times.append(self.timed(lambda: (self.copy[0].copy_(self.keys), self.copy[1].copy_(self.values)), least_ms, clock))

    def result(self):
        form = min(self.times, key=lambda f: median(self.times[f]))
        return {"tokens": self.tokens, "dtype": self.dtype, "form": form.__name__, "ms": median(self.times[form]), "all_ms": self.times[form],
                "copy_ms": median(self.copy_times)}  # fmt: skip


def main():
    numbers = lambda text: [int(x) for x in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default="build/cpu/bin/lexico-bench", help="the program lexico-bench")
    parser.add_argument("--tokens", type=numbers, default=[512, 2048])
    parser.add_argument("--sparsity", type=numbers, default=[4, 8, 16])
    parser.add_argument("--format", nargs="+", default=["packed"])
    parser.add_argument("--key-stage", default="post_rope")
    for name, default in {"batch": 1, "kv_heads": 8, "group": 4, "dim": 128, "num_atoms": 4096, "window": 128, "layers": 32, "threads": 2, "rounds": 3}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--least-ms", type=float, default=20, help="one round times a setting for at least so long")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="processor: time of all threads, for a machine with other work; with --threads 1")
    parser.add_argument("--out", type=Path, help="file for all numbers, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    command = [args.bench, "prefill", "--json", "--turns", "--repeats", args.rounds, "--tokens", ",".join(map(str, args.tokens)),
               "--sparsity", ",".join(map(str, args.sparsity))]  # fmt: skip
    for name in args.format:
        command += ["--format", name]
    for name in ("key_stage", "batch", "kv_heads", "dim", "num_atoms", "window", "layers", "threads", "least_ms", "clock"):
        command += ["--" + name.replace("_", "-"), getattr(args, name)]
    ours = Ours(command, len(args.tokens) * len(args.sparsity) * len(args.format))
    dense = [Dense(args, tokens, dtype) for dtype in DTYPES for tokens in args.tokens]
    for _ in range(args.rounds):
        ours.round()
        with torch.inference_mode():
            for one in dense:
                one.round(args.least_ms, time.process_time if args.clock == "processor" else time.perf_counter)
    dense, coded = [one.result() for one in dense], ours.results()
    least = {row["tokens"]: min(r["ms"] for r in dense if r["tokens"] == row["tokens"]) for row in dense}

    print(f"medians of {args.rounds} rounds; {coded[0]['level']} level, {args.threads} threads, {args.clock} clock; {args.batch} x {args.kv_heads} KV heads of "
          f"{args.group} x {args.dim}, N = {args.num_atoms}, keys {args.key_stage}")  # fmt: skip
    print("  tokens  what                      ms per layer   of dense attention   tokens/s, a layer   a model of", args.layers)
    for row in dense:
        print(f"{row['tokens']:8}  {'torch ' + row['dtype']:24}  {row['ms']:12.1f}   {'':18}  (copying: {row['copy_ms']:.2f} ms)")
    for row in coded:
        name = f"s = {row['sparsity']}, {row['format']}"
        print(f"{row['tokens']:8}  {name:24}  {row['ms']:12.1f}   {row['ms'] / least[row['tokens']]:17.2f}x   {row['layer_tokens_per_s']:17.0f}   {row['model_tokens_per_s']:.1f}")
    if args.out:
        args.out.write_text(json.dumps({"dense": dense, "coded": coded}, indent=1))


if __name__ == "__main__":
    main()
