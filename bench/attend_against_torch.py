#!/usr/bin/env python3
"""Decode attention on codes against torch's scaled_dot_product_attention on dense keys and values of the same shapes.

    .venv/bin/python bench/attend_against_torch.py --bench build/cpu/bin/lexico-bench --threads 2

Both take turns: in every round lexico-bench times each of its settings, then torch each of its own. Every call is of another
layer, as in a model, so that no cache holds the vectors of the last call. torch is asked in both ways that give grouped-query
attention (the query heads of a KV head as rows, and enable_gqa); the faster one counts. Prints a table of medians, ratios and
break-even lengths, and writes the chart and all numbers with --out FOLDER.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for both: who waits for its turn does not keep a core busy
import torch  # noqa: E402  (reads it)

FORMS = {
    "rows": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q.view(k.shape[0], k.shape[1], -1, k.shape[3]), k, v),
    "enable_gqa": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def median(values):
    values = sorted(values)
    return 0.5 * (values[(len(values) - 1) // 2] + values[len(values) // 2])


class Ours:
    """lexico-bench with --json --turns, which times one round of `settings` for every line it is sent."""

    def __init__(self, command, settings):
        self.settings = settings
        self.process = subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self):
        text = self.process.stdout.readline()
        if not text:
            sys.exit(f"lexico-bench ended with {self.process.wait()}")
        return json.loads(text)

    def round(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for _ in range(self.settings):
            self.line()

    def results(self):
        rows = [self.line() for _ in range(self.settings)]
        self.process.wait()
        return rows


def our_attend(args, key_stage, sparsities):
    command = [args.bench, "attend", "--json", "--turns", "--key-stage", key_stage, "--context", ",".join(map(str, args.context)),
               "--sparsity", ",".join(map(str, sparsities)), "--repeats", args.rounds]  # fmt: skip
    for name in ("threads", "batch", "kv_heads", "group", "dim", "num_atoms", "window", "format", "clock", "least_ms", "compress_chunk"):
        command += ["--" + name.replace("_", "-"), getattr(args, name)]
    return Ours(command, len(args.context) * len(sparsities))


class Dense:
    def __init__(self, args, context, dtype):
        self.context, self.dtype, self.times = context, dtype, {form: [] for form in FORMS}
        shape = (args.batch, args.kv_heads, context, args.dim)
        layer_bytes = 2 * math.prod(shape) * DTYPES[dtype].itemsize
        layers = max(1, min(32, math.ceil(96e6 / layer_bytes)))
        self.layers = [tuple(torch.randn(shape).to(DTYPES[dtype]) for _ in range(2)) for _ in range(layers)]
        self.query = torch.randn(args.batch, args.kv_heads * args.group, 1, args.dim).to(DTYPES[dtype])
        self.bytes, self.next = layer_bytes, 0

    def round(self, least_ms, clock):
        best = min((median(t) for t in self.times.values() if t), default=math.inf)
        for form, attend in FORMS.items():
            if self.times[form] and median(self.times[form]) > 1.5 * best:
                continue  # the slower form was tried and is out
            calls, begin, started = 0, time.perf_counter(), clock()
            while calls == 0 or (time.perf_counter() - begin) * 1e3 < least_ms:
                k, v = self.layers[self.next % len(self.layers)]
                attend(self.query, k, v)
                calls, self.next = calls + 1, self.next + 1
            self.times[form].append((clock() - started) * 1e3 / calls)

    def result(self):
        form = min(FORMS, key=lambda f: median(self.times[f]))
        return {"context": self.context, "dtype": self.dtype, "form": form, "ms": median(self.times[form]), "all_ms": self.times[form], "bytes": self.bytes}


def break_even(dense, ours):
    """Where two lists of (context, ms) cross, between the lengths measured; None: ours is slower at all of them."""
    pairs = [(x, d - o) for (x, d), (_, o) in zip(dense, ours)]
    if pairs[0][1] >= 0:
        return f"<= {pairs[0][0]}"
    for (x0, d0), (x1, d1) in zip(pairs, pairs[1:]):
        if d1 >= 0:
            return f"{x0 + (x1 - x0) * -d0 / (d1 - d0):.0f}"
    return "none"


def chart(curves, title):
    """Both axes logarithmic. curves: name -> [(context, ms)]"""
    points = [p for curve in curves.values() for p in curve]
    x0, x1 = math.log2(min(p[0] for p in points)), math.log2(max(p[0] for p in points))
    y0, y1 = math.floor(math.log10(min(p[1] for p in points))), math.ceil(math.log10(max(p[1] for p in points)))
    x = lambda c: 60 + 520 * (math.log2(c) - x0) / max(x1 - x0, 1e-9)
    y = lambda ms: 340 - 310 * (math.log10(ms) - y0) / max(y1 - y0, 1e-9)
    colors = ["#888888", "#bbbbbb", "#0072b2", "#d55e00", "#009e73", "#a8508a", "#8a6d00", "#2f2f7f"]
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 390" font-family="sans-serif" font-size="12">', '<rect width="780" height="390" fill="white"/>',
           f'<text x="60" y="18" font-size="14">{title}</text>', '<text x="320" y="382" text-anchor="middle">context (tokens)</text>',
           '<text x="14" y="185" transform="rotate(-90 14 185)" text-anchor="middle">ms per token and layer</text>']
    for power in range(y0, y1 + 1):
        svg.append(f'<line x1="60" x2="580" y1="{y(10**power):.1f}" y2="{y(10**power):.1f}" stroke="#ddd"/><text x="54" y="{y(10**power) + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for context in sorted({p[0] for p in points}):
        svg.append(f'<line x1="{x(context):.1f}" x2="{x(context):.1f}" y1="30" y2="340" stroke="#eee"/><text x="{x(context):.1f}" y="358" text-anchor="middle">{context // 1024}k</text>')
    for i, (name, curve) in enumerate(curves.items()):
        color = colors[i % len(colors)]
        svg.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{" ".join(f"{x(c):.1f},{y(ms):.1f}" for c, ms in curve)}"/>')
        svg += [f'<circle cx="{x(c):.1f}" cy="{y(ms):.1f}" r="3" fill="{color}"><title>{name}, {c} tokens: {ms:.3f} ms</title></circle>' for c, ms in curve]
        svg.append(f'<line x1="600" x2="620" y1="{50 + 20 * i}" y2="{50 + 20 * i}" stroke="{color}" stroke-width="2"/><text x="626" y="{54 + 20 * i}">{name}</text>')
    return "\n".join(svg + ["</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default="build/cpu/bin/lexico-bench", help="the program lexico-bench")
    parser.add_argument("--context", type=lambda t: [int(x) for x in t.split(",")], default=[1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--sparsity", type=lambda t: [int(x) for x in t.split(",")], default=[4, 8, 16], help="with keys after RoPE")
    parser.add_argument("--pre-rope-sparsity", type=lambda t: [int(x) for x in t.split(",") if x], default=[4], help="with keys before RoPE; '': none")
    for name, default in {"batch": 1, "kv_heads": 8, "group": 4, "dim": 128, "num_atoms": 4096, "window": 128, "threads": 2, "rounds": 7, "compress_chunk": 32}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--least-ms", type=float, default=20, help="one round times a setting for at least so long")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall", help="processor: time of all threads, for a machine with other work; with --threads 1")
    parser.add_argument("--format", default="packed")
    parser.add_argument("--out", type=Path, help="folder for attend.json and attend.svg")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours = [our_attend(args, stage, list_) for stage, list_ in (("post_rope", args.sparsity), ("pre_rope", args.pre_rope_sparsity)) if list_]
    dense = [Dense(args, context, dtype) for dtype in DTYPES for context in args.context]
    for _ in range(args.rounds):
        for one in ours:
            one.round()
        with torch.inference_mode():
            for one in dense:
                one.round(args.least_ms, time.process_time if args.clock == "processor" else time.perf_counter)
    dense = [one.result() for one in dense]
    coded = [row for one in ours for row in one.results()]

    curves = {f"torch {dtype}": [(r["context"], r["ms"]) for r in dense if r["dtype"] == dtype] for dtype in DTYPES}
    for row in coded:  # a step: attention, and a new token's part in the compression
        curves.setdefault(f"s = {row['sparsity']}, keys {row['key_stage'].replace('_rope', '-RoPE')}", []).append((row["context"], row["ms"] + row.get("append_ms", 0)))
    width = max(map(len, curves)) + 2
    print("ms per token and layer", "(appending and compressing it included)" if args.compress_chunk > 0 else "(attention alone)", "medians of", args.rounds, "rounds;", coded[0]["level"], "level,", args.threads, "threads,", args.clock, "clock")
    print("".ljust(width) + "".join(f"{c:>10}" for c in args.context) + "   break-even against bf16")
    best = [min(r["ms"] for r in dense if r["context"] == c) for c in args.context]
    for name, curve in curves.items():
        line = name.ljust(width) + "".join(f"{ms:10.3f}" for _, ms in curve)
        print(line if name.startswith("torch") else line + "   " + break_even(curves["torch bf16"], curve))
    print("times as fast as the faster dense one:")
    for name, curve in curves.items():
        if not name.startswith("torch"):
            print(name.ljust(width) + "".join(f"{b / ms:10.2f}" for b, (_, ms) in zip(best, curve)))
    for row in coded:
        if row["context"] == args.context[-1]:
            print(f"s = {row['sparsity']} {row['key_stage']}: codes of a layer {row['coded_bytes'] / 1e6:.1f} MB, dense bf16 {dense[len(args.context) - 1]['bytes'] / 1e6:.1f} MB, "
                  f"scratch {row['workspace_bytes'] / 1e6:.1f} MB, of {row['ms'] + row.get('append_ms', 0):.2f} ms a step appending takes {row.get('append_ms', 0):.2f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "attend.json").write_text(json.dumps({"dense": dense, "coded": coded}, indent=1))
        (args.out / "attend.svg").write_text(chart(curves, f"Decode attention, {args.batch} x {args.kv_heads} KV heads of {args.group} x {args.dim}, N = {args.num_atoms}, {args.threads} threads"))


if __name__ == "__main__":
    main()
