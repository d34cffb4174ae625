#!/usr/bin/env python3
"""The CUDA kernels against torch on the same device: pursuit, a training step, decode attention.

    python3 bench/device_against_torch.py --bench build/kernels/bin/device_bench --out gpu.json

Both take turns: in every round device_bench times each of its settings, then torch its own of the same sizes. The peers are
what one writes in torch: OMP by matrix product, argmax and Gram-Schmidt (float32, TF32 allowed) without solving for weights; an eager step of
the published recipe; scaled_dot_product_attention in fp16 over dense keys and values, in both ways that give grouped-query
attention, of which the faster counts. Prints a table of medians and ratios. Random data.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

# What the backend must reach and what it is made for (times as fast as the peer).
GOALS = {"pursuit": (10, 30), "training": (5, 20), "attention": (2, 5)}
LONG_CONTEXT = 131072  # below, launches are most of what a decode step takes, and no floor holds (docs/gpu.md)


def goals(row):
    floor, aim = GOALS[row["name"].split()[0]]
    compared = row["name"].startswith("attention") and ("s8 " not in row["name"] or ", rows" in row["name"])  # to tell how they do beside s = 8 in tiles
    return (0 if compared or int(sizes_of(row).get("context", LONG_CONTEXT)) < LONG_CONTEXT else floor), aim


def omp(atoms, signals, sparsity):
    """atoms [P, N, m], signals [P, B, m]: residual, indices [P, B, s] and an orthonormal basis of the atoms [P, B, s, m]."""
    P, B, m = signals.shape
    residual = signals.clone()
    basis = torch.zeros(P, B, sparsity, m, device=signals.device)
    indices = torch.empty(P, B, sparsity, dtype=torch.long, device=signals.device)
    for k in range(sparsity):
        indices[..., k] = (residual @ atoms.transpose(1, 2)).abs_().argmax(2)
        u = torch.gather(atoms, 1, indices[..., k, None].expand(-1, -1, m))[:, :, None].clone()
        for _ in range(2):
            u -= (u @ basis[:, :, :k].transpose(2, 3)) @ basis[:, :, :k]
        u = normalize(u[:, :, 0], dim=2)
        basis[:, :, k] = u
        residual -= (residual * u).sum(2, keepdim=True) * u
    return residual, indices, basis


class Pursuit:
    def __init__(self, sizes, device):
        dim, num_atoms, self.sparsity = (int(sizes[name]) for name in ("m", "N", "s"))
        self.count = min(16384, int(sizes["calls"]))  # the rate is the same for more
        self.atoms = normalize(torch.randn(1, num_atoms, dim, device=device), dim=2)
        self.signals = torch.randn(1, self.count, dim, device=device)
        self.scale = int(sizes["calls"]) / self.count

    def step(self):
        omp(self.atoms, self.signals, self.sparsity)


class Training:
    """One step of the published recipe: encode, loss, gradient without its part along the atom, normalize, Adam."""

    def __init__(self, sizes, device):
        P, m, N, self.sparsity, B = (int(sizes[name]) for name in ("P", "m", "N", "s", "batch"))
        self.atoms = normalize(torch.randn(P, N, m, device=device), dim=2)
        self.signals = torch.randn(P, B, m, device=device)
        self.optimizer = torch.optim.Adam([self.atoms], lr=1e-4)
        self.scale = 1

    def step(self):
        residual, indices, _ = omp(self.atoms, self.signals, self.sparsity)
        m = self.atoms.shape[2]
        chosen = torch.gather(self.atoms[:, None].expand(-1, self.signals.shape[1], -1, -1), 2, indices[..., None].expand(-1, -1, -1, m))
        gram = chosen @ chosen.transpose(2, 3)
        weights = torch.linalg.solve(gram, chosen @ self.signals[..., None])[..., 0]
        codes = torch.zeros(*self.signals.shape[:2], self.atoms.shape[1], device=weights.device).scatter_(2, indices, weights)
        residual = self.signals - codes @ self.atoms
        gradient = -2.0 / residual.numel() * (codes.transpose(1, 2) @ residual)
        self.atoms.copy_(normalize(self.atoms, dim=2))
        self.atoms.grad = gradient - (gradient * self.atoms).sum(2, keepdim=True) * self.atoms
        self.optimizer.step()


class Attention:
    FORMS = (lambda q, k, v: scaled_dot_product_attention(q.view(1, k.shape[1], -1, k.shape[3]), k, v),
             lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True))  # fmt: skip

    def __init__(self, sizes, device):
        kv_heads, group = (int(n) for n in sizes["heads"].split("x"))
        shape = (1, kv_heads, int(sizes["context"]), int(sizes["m"]))
        dtype = torch.float16 if device != "cpu" else torch.float32
        layers = max(1, min(8, int(2e9 / (4 * shape[1] * shape[2] * shape[3]))))
        self.layers = [tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)) for _ in range(layers)]
        self.query = torch.randn(1, kv_heads * group, 1, shape[3], device=device, dtype=dtype)
        self.turn, self.form, self.scale = 0, None, 1

    def step(self):
        k, v = self.layers[self.turn % len(self.layers)]
        self.turn += 1
        self.FORMS[self.form or 0](self.query, k, v)


def milliseconds(step, device, least_ms):
    step()
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    calls, begin = 0, time.perf_counter()
    while calls == 0 or (time.perf_counter() - begin) * 1e3 < least_ms:
        step()
        calls += 1
        if calls % 16 == 0:
            wait()
    wait()
    return (time.perf_counter() - begin) * 1e3 / calls


def sizes_of(row):
    """The sizes that a setting's name states: m128, N4096, s8, P64, batch 64, 8x4, context 131072."""
    sizes = dict(re.findall(r"\b([mNsP])(\d+)", row["name"])) | dict(re.findall(r"(batch|context) (\d+)", row["name"]))
    heads = re.search(r"(\d+x\d+)", row["name"])
    return sizes | {"calls": round(row["vectors_per_s"] * row["ms"] / 1e3), "heads": heads.group(1) if heads else ""}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default="build/kernels/bin/device_bench", help="the program device_bench")
    parser.add_argument("--libraries", help="LD_LIBRARY_PATH of that program alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sizes to try this script with, on an emulated device too")
    parser.add_argument("--device", default="cuda", help="of torch")
    parser.add_argument("--out", help="file for all numbers, JSON")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("device_against_torch: torch finds no GPU")
    torch.set_float32_matmul_precision("high")
    torch.set_grad_enabled(False)

    process = subprocess.Popen([args.bench, "--turns", "--rounds", str(args.rounds), *["--tiny"] * args.tiny],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=os.environ | ({"LD_LIBRARY_PATH": args.libraries} if args.libraries else {}))  # fmt: skip
    first = process.stdout.readline()
    if not first:
        sys.exit(f"device_bench ended with {process.wait()}")
    settings = json.loads(first)["settings"]
    ours, peers, peer_ms = {}, {}, {}
    for _ in range(args.rounds):
        process.stdin.write("\n")
        process.stdin.flush()
        for _ in range(settings):
            line = process.stdout.readline()
            if not line:
                sys.exit(f"device_bench ended with {process.wait()}")
            row = json.loads(line)
            ours.setdefault(row["name"], []).append(row)
        for name, rows in ours.items():
            kind = name.split()[0]
            # Settings of the same sizes have the same peer, for which a cache's sparsity is nothing.
            key = kind + str(sorted((k, v) for k, v in sizes_of(rows[0]).items() if (kind, k) != ("attention", "s")))
            if key not in peers:
                peers[key] = {"pursuit": Pursuit, "training": Training, "attention": Attention}[kind](sizes_of(rows[0]), args.device)
            peer = peers[key]
            if kind == "attention" and peer.form is None:
                tried = []
                for form in range(len(peer.FORMS)):
                    peer.form = form
                    tried.append(milliseconds(peer.step, args.device, 20))
                peer.form = tried.index(min(tried))
            peer_ms.setdefault(name, []).append(peer.scale * milliseconds(peer.step, args.device, 1 if args.tiny else 50))
    process.wait()

    rows = []
    for name, results in ours.items():
        floor, aim = goals(results[0])
        ms, other = statistics.median(r["ms"] for r in results), statistics.median(peer_ms[name])
        ratios = [b / r["ms"] for r, b in zip(results, peer_ms[name])]
        rows.append({"name": name, "ms": ms, "peer_ms": other, "ratio": other / ms, "ratios": ratios, "floor": floor, "aim": aim,
                     "vectors_per_s": sizes_of(results[0])["calls"] / ms * 1e3, "all_ms": [r["ms"] for r in results], "all_peer_ms": peer_ms[name]})  # fmt: skip
    print(f"{'':80} {'ms':>10} {'torch ms':>10} {'times':>7} {'(range)':>14} {'floor':>6} {'aim':>4} {'M vectors/s':>12}")
    for r in rows:
        spread = f"{min(r['ratios']):.1f}-{max(r['ratios']):.1f}"
        rate = f"{r['vectors_per_s'] / 1e6:12.2f}" if not r["name"].startswith("attention") else ""
        print(f"{r['name']:80} {r['ms']:10.3f} {r['peer_ms']:10.3f} {r['ratio']:7.1f} {spread:>14} {r['floor']:6} {r['aim']:4} {rate}")
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(f"on {device}, torch {torch.__version__}, medians of {args.rounds} rounds")
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"device": device, "torch": torch.__version__, "rounds": args.rounds, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
