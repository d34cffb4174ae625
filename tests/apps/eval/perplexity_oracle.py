"""What a cache of codes does to the demo model, computed without anything of ours.

The dictionary's file is read by safetensors, vectors are coded by matching pursuit in float64 and torch's float8, the
model is transformers'. The only things taken from docs/ are definitions: which tokens stay exact, and what they take.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from safetensors import safe_open

PAGE_TOKENS, PAGE_SLACK = 64, 32  # docs/cache.md; the smallest pages


@dataclass
class Dictionaries:
    atoms: dict  # (layer, kind): float64 [N, d]
    frames: dict  # (layer, kind): mean [heads, d], map and back_map [heads, d, d], where there are any
    pre_rope: bool

    def through_codes(self, x: torch.Tensor, layer: int, kind: str, sparsity: int) -> torch.Tensor:
        """x [B, H, T, d] as a cache in the published format gives it back."""
        mean, there, back = self.frames[layer, kind]
        z = (x - mean[:, None]).double()
        z = torch.einsum("hij,bhtj->bhti", there.double(), z) if there is not None else z
        z = through_codes(z, self.atoms[layer, kind], sparsity)
        z = torch.einsum("hij,bhtj->bhti", back.double(), z) if back is not None else z
        return (mean[:, None] + z).float()


def read_dictionaries(path: Path) -> Dictionaries:
    with safe_open(path, "np") as file:
        pre_rope = (file.metadata() or {}).get("key_stage", "post_rope") == "pre_rope"
        atoms, frames = {}, {}
        there = set(file.keys())
        for name in sorted(there):
            match = re.fullmatch(r"(layers\.(\d+)\.(keys|values))\.atoms", name)
            if not match:
                continue
            place = int(match[2]), match[3]
            rows = torch.from_numpy(file.get_tensor(name)).double()
            atoms[place] = rows / rows.norm(dim=1, keepdim=True)
            mean, to, back = (torch.from_numpy(file.get_tensor(part)) if (part := f"{match[1]}.{suffix}") in there else None
                              for suffix in ("mean", "map", "back_map"))  # fmt: skip
            frames[place] = torch.zeros(1, rows.shape[1]) if mean is None else mean, to, back
    return Dictionaries(atoms, frames, pre_rope)


def pursue(x: torch.Tensor, atoms: torch.Tensor, sparsity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonal matching pursuit of x [B, d]: indices [B, s] and least-squares weights [B, s]."""
    indices = torch.empty(len(x), 0, dtype=torch.long)
    residual, weights = x, torch.empty(len(x), 0, dtype=x.dtype)
    for _ in range(sparsity):
        match = (residual @ atoms.T).abs()
        match.scatter_(1, indices, -1.0)
        indices = torch.cat((indices, match.argmax(1, keepdim=True)), 1)
        chosen = atoms[indices]  # [B, k, d]
        weights = torch.linalg.solve(chosen @ chosen.transpose(1, 2), chosen @ x[:, :, None])[:, :, 0]
        residual = x - (weights[:, None] @ chosen)[:, 0]
    return indices, weights


def through_codes(x: torch.Tensor, atoms: torch.Tensor, sparsity: int) -> torch.Tensor:
    """x [..., d] in float64 as the published format gives it back: E4M3 weights."""
    rows = x.reshape(-1, x.shape[-1])
    back = torch.zeros_like(rows)
    for first in range(0, len(rows), 4096):
        part = rows[first : first + 4096]
        indices, weights = pursue(part, atoms, sparsity)
        weights = weights.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()
        back[first : first + 4096] = (weights[:, None] @ atoms[indices])[:, 0]
    return back.reshape(x.shape)


def half(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-65504, 65504).half().float()


def angles(config, positions: torch.Tensor) -> torch.Tensor:
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    dim = config.head_dim
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    return positions.float()[:, None] * frequencies


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, d], pairs (i, i + d/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def cache_bytes(config, dictionaries: Dictionaries, tokens: int, sparsity: int, window: int, sinks: int) -> int:
    heads, dim = config.num_key_value_heads, config.head_dim
    coded = max(0, tokens - sinks - window)
    total = config.num_hidden_layers * 2 * heads * (sinks + window) * dim * 2
    for atoms in dictionaries.atoms.values():
        bits = sparsity * (math.ceil(math.log2(len(atoms))) + 8)
        total += math.ceil(coded / PAGE_TOKENS) * (heads * PAGE_TOKENS * bits // 8 + PAGE_SLACK)
    return total


@torch.no_grad()
def measure(model, ids: np.ndarray, dictionaries: Dictionaries, sparsity: int, window: int, sinks: int, chunk: int) -> dict:
    """All sequences side by side, `mean_kls` of each; the full cache in one pass without any cache."""
    sequences, length, config = torch.from_numpy(ids).long(), ids.shape[1], model.config
    layers = range(config.num_hidden_layers)
    keys, values = ([torch.empty(len(ids), config.num_key_value_heads, 0, config.head_dim)] * len(layers) for _ in range(2))
    p = torch.cat([model(one[None], use_cache=False).logits[0, :-1] for one in sequences]).double().log_softmax(-1)
    logits, coded = [], sinks  # tokens before `coded` are coded, or sinks
    for start in range(0, length, chunk):
        cache = transformers.DynamicCache()
        for layer in layers if start else ():
            cache.update(keys[layer], values[layer], layer)
        end = min(start + chunk, length)
        result = model(sequences[:, start:end], past_key_values=cache, use_cache=True, position_ids=torch.arange(start, end)[None])
        logits.append(result.logits)
        for layer in layers:
            keys[layer] = torch.cat((keys[layer], half(cache.layers[layer].keys[:, :, start:])), 2)
            values[layer] = torch.cat((values[layer], half(cache.layers[layer].values[:, :, start:])), 2)
        if end - window <= coded:
            continue
        angle = angles(config, torch.arange(coded, end - window))
        for layer in layers:
            k, v = (x[layer][:, :, coded : end - window] for x in (keys, values))
            stage = rotate(k, -angle) if dictionaries.pre_rope else k
            back = dictionaries.through_codes(stage, layer, "keys", sparsity)
            k.copy_(rotate(back, angle) if dictionaries.pre_rope else back)
            v.copy_(dictionaries.through_codes(v, layer, "values", sparsity))
        coded = end - window
    q = torch.cat(logits, 1)[:, :-1].flatten(0, 1).double().log_softmax(-1)
    target = sequences[:, 1:].reshape(-1, 1)
    divergence = (p.exp() * (p - q)).sum(-1)
    size = len(ids) * cache_bytes(config, dictionaries, length, sparsity, window, sinks)
    full = len(ids) * length * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 2
    return dict(tokens=len(target), full_perplexity=p.gather(1, target).mean().neg().exp().item(),
                perplexity=q.gather(1, target).mean().neg().exp().item(), mean_kl=divergence.mean().item(),
                p99_kl=float(np.quantile(divergence.numpy(), 0.99)), bytes=size, full_bytes=full,
                mean_kls=divergence.reshape(len(ids), -1).mean(1).numpy())  # fmt: skip


def load(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def sequences_of(folder: Path, text: Path, sequences: int, length: int) -> np.ndarray:
    """Of a .jsonl, each with the start token in front."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = json.loads((folder / "config.json").read_text())["bos_token_id"]
    ids = []
    for line in text.read_text().splitlines():
        ids += tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
        if len(ids) >= sequences * (length - 1):
            break
    body = np.array(ids[: sequences * (length - 1)]).reshape(sequences, length - 1)
    return np.concatenate((np.full((sequences, 1), start), body), 1).astype(np.int32)
