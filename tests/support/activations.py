"""Small activation files for the journeys, written as docs/formats.md says."""

import h5py
import numpy as np


def sparse_vectors(rng, rows, dim, atoms=40, sparsity=3):
    """Sparse combinations of hidden unit atoms and a little noise: something a dictionary can learn."""
    hidden = rng.standard_normal((atoms, dim))
    hidden /= np.linalg.norm(hidden, axis=1, keepdims=True)
    weights = np.zeros((rows, atoms))
    for row in range(rows):
        weights[row, rng.choice(atoms, sparsity, replace=False)] = rng.standard_normal(sparsity)
    return weights @ hidden + 0.05 * rng.standard_normal((rows, dim))


def write(path, layers=2, kv_heads=2, dim=16, tokens=3000, seed=0, key_stage="post_rope", change=None, **attributes):
    """change(layer, kind, vectors) may return other vectors; attributes replace those of the file."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file.attrs.update(contract="lexico-activations 1", model="org/tiny", model_sha256="0" * 64, key_stage=key_stage,
                          dtype="float16", num_layers=layers, kv_heads=kv_heads, head_dim=dim, num_tokens=tokens,
                          num_vectors=tokens * kv_heads, sequence_length=128, bos="none", seed=0, version="test",
                          command_line="test", plan_hash="test", shard_index=0, shard_count=1, complete=True)  # fmt: skip
        file.attrs["corpora"] = np.array(["made"], dtype=h5py.string_dtype())
        file.attrs.update(attributes)
        for layer in range(layers):
            for kind in ("keys", "values"):
                vectors = sparse_vectors(rng, tokens * kv_heads, dim)
                if change:
                    vectors = change(layer, kind, vectors)
                file.create_dataset(f"layers/{layer:02d}/{kind}", data=vectors.astype(np.float16), chunks=(min(2048, tokens * kv_heads), dim))
        for name in ("id", "position", "document"):
            file.create_dataset(f"tokens/{name}", data=np.zeros(tokens, np.int32))
    return path
