#!/usr/bin/env python3
"""Writes golden/lexico_recipe.safetensors: a small case of the published training recipe and what it should learn.

One step (krafton-ai/lexico's trainer, in this order): OMP at exactly s atoms; loss = mean of (x - D y)^2, y held fixed;
gradient in D without its part along each atom; atoms divided by their norm; Adam (0.9, 0.999, 1e-8) with a cosine
learning rate that moves once per epoch. Everything in float64, from the definitions.
"""
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

P, N, m, B, S = 2, 48, 16, 16, 4
STEPS, STEPS_PER_EPOCH, RATE = 120, 30, 1e-4


def omp(D, x, s):
    chosen, r = [], x
    for _ in range(s):
        score = np.abs(D @ r)
        score[chosen] = -1
        chosen.append(int(score.argmax()))
        weights = np.linalg.lstsq(D[chosen].T, x, rcond=None)[0]
        r = x - weights @ D[chosen]
    return chosen, weights, r


def main():
    rng = np.random.default_rng(3)
    unit = lambda rows: rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    truth = unit(rng.standard_normal((P, N, m)))
    batches = np.zeros((STEPS, P, B, m))
    for t in range(STEPS):
        for p in range(P):
            for b in range(B):
                batches[t, p, b] = (3 * rng.standard_normal(3)) @ truth[p][rng.choice(N, 3, replace=False)]
    batches = (batches + 0.2 * rng.standard_normal(batches.shape)).astype(np.float16)
    initial = unit(rng.uniform(-1, 1, (P, N, m))).astype(np.float32)

    D = initial.astype(np.float64)
    first, second, losses, errors = np.zeros_like(D), np.zeros_like(D), [], []
    for t in range(STEPS):
        X = batches[t].astype(np.float64)
        gradient, residual = np.zeros_like(D), np.zeros_like(X)
        for p in range(P):
            for b in range(B):
                chosen, weights, residual[p, b] = omp(D[p], X[p, b], S)
                gradient[p, chosen] -= 2 / X.size * weights[:, None] * residual[p, b]
        losses.append((residual ** 2).mean())
        errors.append((np.linalg.norm(residual, axis=2) / (np.linalg.norm(X, axis=2) + 1e-8)).mean())
        D = unit(D)
        gradient -= (gradient * D).sum(2, keepdims=True) * D
        rate = RATE * 0.5 * (1 + math.cos(math.pi * (t // STEPS_PER_EPOCH) / (STEPS // STEPS_PER_EPOCH)))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient ** 2
        D = D - rate * (first / (1 - 0.9 ** (t + 1))) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8)
    to32 = lambda a: np.ascontiguousarray(a, dtype=np.float32)
    save_file({"initial": initial, "batches": batches, "atoms": to32(D), "loss": to32(losses), "relative_error": to32(errors)},
              str(Path(__file__).parent / "golden" / "lexico_recipe.safetensors"))


main()
