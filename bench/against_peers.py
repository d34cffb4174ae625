#!/usr/bin/env python3
"""lexico-bench encode against other people's sparse coders, run in turns on the same cases; prints a table of ratios.

    .venv/bin/python -m pip install spams-bin        # the peer; scikit-learn is optional
    .venv/bin/python bench/against_peers.py          # about 4 minutes
    .venv/bin/python bench/against_peers.py --cases m64_N1024_s8 --rounds 9 --json

Each round times the peer and then ours, one setting after the other, so that a machine that changes its pace changes it
for both; the ratio of a round is ours / peer, the table shows the median over the rounds and its range. Both are timed
with everything that depends on the atoms (Gram matrix, packing) included. Cases are made here from a fixed seed, or
taken from a folder with FAMILY_mM_NN.safetensors files of tensors `atoms` [N, m] and `signals` [B, m].

SPAMS calls its rule OMP; it picks by the OLS rule, so its error compares with that of our `ols`.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CASES = {"m64_N1024_s8": (64, 1024, 8), "m128_N4096_s8": (128, 4096, 8), "m128_N4096_s32": (128, 4096, 32)}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def isotropic(dim, atoms, signals):
    """Random directions; a signal is a sum of 8 atoms with normal weights plus 10 % noise."""
    rng = np.random.default_rng(1)
    d = unit(rng.standard_normal((atoms, dim)))
    picks = np.argsort(rng.random((signals, atoms), dtype=np.float32), axis=1)[:, :8]
    x = np.einsum("bs,bsm->bm", rng.standard_normal((signals, 8)), d[picks])
    return d, x + 0.1 * np.sqrt((x**2).mean()) * rng.standard_normal(x.shape)


def coherent(dim, atoms, signals):
    """Like keys: a few loud channels, a mean that all share, clusters of low rank. Atoms are samples: many are close."""
    rng = np.random.default_rng(2)
    clusters, rank = 96, 12
    scale = np.exp(0.6 * rng.standard_normal(dim))
    scale[rng.choice(dim, max(2, dim // 24), replace=False)] *= 6
    mean = 0.7 * scale * rng.standard_normal(dim)
    centres = 0.8 * rng.standard_normal((clusters, dim))
    bases = rng.standard_normal((clusters, rank, dim)) * (0.75 ** np.arange(rank))[:, None]
    share = 1 / np.arange(1, clusters + 1) ** 0.8
    which = rng.choice(clusters, signals + atoms, p=share / share.sum())
    x = np.empty((signals + atoms, dim))
    for c in range(clusters):
        rows = np.where(which == c)[0]
        tail = 1 / np.sqrt(np.maximum(rng.gamma(2.5, 0.4, (len(rows), 1)), 0.05))
        x[rows] = centres[c] + (rng.standard_normal((len(rows), rank)) * tail) @ bases[c]
    x = mean + (x + 0.08 * rng.standard_normal(x.shape)) * scale
    d = x[signals:]
    return unit(d + 0.05 * np.abs(d).mean() * rng.standard_normal(d.shape)), x[:signals]


def case_file(folder, family, dim, atoms, signals):
    from safetensors.numpy import save_file

    path = Path(folder) / f"{family}_m{dim}_N{atoms}.safetensors"
    if not path.exists():
        d, x = {"isotropic": isotropic, "coherent": coherent}[family](dim, atoms, signals)
        save_file({"atoms": d.astype(np.float32), "signals": x.astype(np.float32)}, str(path))
    return path


class Spams:
    name = "SPAMS"

    def __init__(self, d, x, sparsity, threads):
        import spams

        self.x, self.d = x, d
        columns = np.asfortranarray(x.T), np.asfortranarray(d.T)
        # eps must be given: left out, the wrapper reads memory that nobody wrote
        self.encode = lambda: spams.omp(*columns, L=sparsity, eps=0.0, numThreads=threads)

    def error(self, codes):
        return relative_error(self.x, codes.T @ self.d)


class Sklearn:
    name = "scikit-learn"

    def __init__(self, d, x, sparsity, threads):
        from sklearn.linear_model import orthogonal_mp_gram

        self.d, self.x = d, x[:256]  # it is slow
        self.encode = lambda: orthogonal_mp_gram(d @ d.T, d @ self.x.T, n_nonzero_coefs=sparsity)

    def error(self, codes):
        return relative_error(self.x, codes.T @ self.d)


def relative_error(x, y):
    return float((np.linalg.norm(x - y, axis=1) / np.linalg.norm(x, axis=1)).mean())


def ours(arguments, path, sparsity, selection):
    command = [arguments.bench, "encode", "--case", str(path), "--sparsity", str(sparsity), "--selection", selection, "--threads",
               str(arguments.threads), "--num-signals", str(arguments.signals), "--repeats", "3", "--json", "--cpu", arguments.cpu]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def compare(arguments, path, sparsity, peer_type):
    from safetensors.numpy import load_file

    case = load_file(str(path))
    peer = peer_type(case["atoms"], case["signals"][: arguments.signals], sparsity, arguments.threads)
    peer_rates, rates, last = [], {s: [] for s in arguments.selection}, {}
    for _ in range(arguments.rounds):
        begin = time.perf_counter()
        codes = peer.encode()
        peer_rates.append(len(peer.x) / (time.perf_counter() - begin))
        for selection in arguments.selection:
            last[selection] = ours(arguments, path, sparsity, selection)
            rates[selection].append(last[selection]["vectors_per_s"])
    peer_error = peer.error(codes)
    for selection in arguments.selection:
        ratios = sorted(a / b for a, b in zip(rates[selection], peer_rates))
        yield {"selection": selection, "peer": peer.name, "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1],
               "vectors_per_s": statistics.median(rates[selection]), "peer_vectors_per_s": statistics.median(peer_rates),
               "error": last[selection]["mean_relative_error"], "peer_error": peer_error, "level": last[selection]["level"],
               "peak_memory_bytes": last[selection]["peak_memory_bytes"], "input_bytes": last[selection]["input_bytes"]}  # fmt: skip


def cpu_name():
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown CPU"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--bench", default=str(root / "build/cpu/bin/lexico-bench"), help="the program [%(default)s]")
    parser.add_argument("--folder", help="folder of cases, made there if missing [a temporary one]")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE", help="of %(choices)s")
    parser.add_argument("--families", nargs="+", default=["isotropic", "coherent"], choices=["isotropic", "coherent"])
    parser.add_argument("--selection", nargs="+", default=["omp", "ols", "ols-16"], help="[omp ols ols-16]")
    parser.add_argument("--peers", nargs="+", default=["spams"], choices=["spams", "sklearn"])
    parser.add_argument("--threads", type=int, default=2, help="of both [2]")
    parser.add_argument("--signals", type=int, default=16384, help="of each case [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--cpu", default="auto", help="speed level of ours [auto]")
    parser.add_argument("--json", action="store_true", help="one JSON object per line in place of the table")
    arguments = parser.parse_args()
    if not os.access(arguments.bench, os.X_OK):
        parser.error(f"{arguments.bench} is not there: build it (ninja lexico-bench) or name it with --bench")
    peers = {"spams": Spams, "sklearn": Sklearn}
    for peer in arguments.peers:
        try:
            __import__(peer)
        except ImportError:
            parser.error(f"no Python package {peer}: pip install {'spams-bin' if peer == 'spams' else 'scikit-learn'}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not arguments.json:
            print(f"{cpu_name()}, {arguments.threads} threads, {arguments.signals} signals, medians of {arguments.rounds} rounds\n")
            print("case                       rule     ours/peer (range)     ours/s     peer/s   our error  peer's  error ratio  level       peer")
        for case in arguments.cases:
            dim, atoms, sparsity = CASES[case]
            for family in arguments.families:
                path = case_file(folder, family, dim, atoms, max(arguments.signals, 16384))
                for peer in arguments.peers:
                    for row in compare(arguments, path, sparsity, peers[peer]):
                        if arguments.json:
                            print(json.dumps({"case": case, "family": family, "threads": arguments.threads, "cpu": cpu_name(), **row}), flush=True)
                            continue
                        print(f"{case + ' ' + family:26} {row['selection']:7} {row['ratio']:6.2f}x ({row['lowest']:.2f}-{row['highest']:.2f})"
                              f"  {row['vectors_per_s']:10.0f} {row['peer_vectors_per_s']:10.0f}   {row['error']:.5f}   {row['peer_error']:.5f}"
                              f"  {row['error'] / row['peer_error']:.4f}       {row['level']:10}  {row['peer']}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
