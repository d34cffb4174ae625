"""Recomputes what lexico-eval reports with nothing of ours: torch.load, h5py, numpy and scikit-learn's orthogonal_mp.

    check_with_sklearn.py --eval build/cpu/bin/lexico-eval --dictionary runs/a/dictionary.pt \\
        --data wiki=test.h5 --ood code=code.h5 --sparsity 4,8,16 --max-vectors 2000

Prints one line per data set, layer, kind and sparsity; exits with 1 if an error differs by more than 1 %.
"""

import argparse
import glob
import json
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import torch
from sklearn.linear_model import orthogonal_mp


def spread(total, count):
    """The tokens that lexico-eval takes (apps/lexico-eval/vector_source.h)."""
    count = min(total, count)
    i = np.arange(count, dtype=np.int64)
    first, end = i * total // count, (i + 1) * total // count
    turns = i * 0.6180339887498949
    return first + ((turns - np.floor(turns)) * (end - first)).astype(np.int64)


def files_of(path):
    if Path(path).is_dir():
        return sorted(str(p) for p in Path(path).iterdir() if p.suffix in (".h5", ".hdf5"))
    return [path] if Path(path).exists() else sorted(glob.glob(path))


def vectors_of(path, layer, kind, max_vectors):
    parts = []
    for name in files_of(path):
        with h5py.File(name) as file:
            parts.append(file[f"layers/{layer:02d}/{kind}"][:])
            heads = int(file.attrs["kv_heads"])
    rows = np.concatenate(parts).astype(np.float64)
    tokens = rows.reshape(-1, heads, rows.shape[1])
    if max_vectors:
        tokens = tokens[spread(len(tokens), max(1, max_vectors // heads))]
    return tokens.reshape(-1, rows.shape[1])


def errors(atoms, vectors, sparsity):
    """atoms [m, N] of unit norm, vectors [n, m]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # exactly sparse vectors stop early
        codes = orthogonal_mp(atoms, vectors.T, n_nonzero_coefs=sparsity, precompute=True)
    rest = vectors - (atoms @ codes.reshape(atoms.shape[1], -1)).T
    return np.linalg.norm(rest, axis=1) / (np.linalg.norm(vectors, axis=1) + 1e-8)


def compare(report, dictionary_path, max_vectors, tolerance=0.01, log=print):
    """Every row of the dictionary in a report.json against scikit-learn. Returns (rows, worst relative difference)."""
    dictionaries = torch.load(dictionary_path, weights_only=True).numpy().astype(np.float64)  # [2 L, m, N]
    dictionaries /= np.linalg.norm(dictionaries, axis=1, keepdims=True)
    paths = {d["name"]: d["path"] for d in report["datasets"]}
    rows, worst, cached = 0, 0.0, {}
    for row in report["rows"]:
        if row["coder"] in ("random", "samples"):
            continue
        key = (row["dataset"], row["layer"], row["kind"])
        if key not in cached:
            cached = {key: vectors_of(paths[row["dataset"]], row["layer"], row["kind"], max_vectors)}
        atoms = dictionaries[2 * row["layer"] + (row["kind"] == "values")]
        found = errors(atoms, cached[key], row["sparsity"])
        assert len(found) == row["vectors"], (row, len(found))
        theirs = {"mean": found.mean(), "median": np.median(found), "p99": np.percentile(found, 99)}
        differences = {name: abs(row[name] - value) / max(value, 1e-6) for name, value in theirs.items()}
        worst, rows = max(worst, *differences.values()), rows + 1
        flag = "" if max(differences.values()) <= tolerance else "  <-- differs"
        log(f"{row['dataset']} layer {row['layer']} {row['kind']} s={row['sparsity']}: "
            + ", ".join(f"{name} {row[name]:.5f} / {value:.5f}" for name, value in theirs.items()) + flag)  # fmt: skip
    return rows, worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", required=True, help="the lexico-eval binary")
    parser.add_argument("--dictionary", required=True, help="a dictionary.pt")
    parser.add_argument("--data", action="append", default=[], help="[name=]activations")
    parser.add_argument("--ood", action="append", default=[])
    parser.add_argument("--sparsity", default="4,8,16")
    parser.add_argument("--max-vectors", type=int, default=2000, help="per data set, layer and kind; 0: all")
    args = parser.parse_args()
    command = [args.eval, "--dictionary", args.dictionary, "--sparsity", args.sparsity, "--max-vectors", str(args.max_vectors),
               "--json", "--no-baselines"]  # fmt: skip
    for flag, paths in (("--data", args.data), ("--ood", args.ood)):
        for path in paths:
            command += [flag, path]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    rows, worst = compare(report, args.dictionary, args.max_vectors)
    print(f"{rows} rows; largest difference {100 * worst:.4f} %")
    sys.exit(0 if rows and worst <= 0.01 else 1)


if __name__ == "__main__":
    main()
