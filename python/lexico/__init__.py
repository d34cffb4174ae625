"""Sparse coding of key-value caches for PyTorch: encode, decode, attend, CompressedCache, and LexicoCache for transformers
(docs/pytorch.md). Tensors are of the CPU, or of a GPU where the library was built with CUDA."""

import os
from pathlib import Path

import torch

__version__ = "0.1.0"
__all__ = ["CompressedCache", "LexicoCache", "attend", "decode", "encode"]


def _library() -> Path:
    """liblexico_torch.so: the one named by LEXICO_TORCH_LIBRARY, or beside this file (a pip install)."""
    if named := os.environ.get("LEXICO_TORCH_LIBRARY"):
        return Path(named)
    places = [Path(folder) / "liblexico_torch.so" for folder in __path__]
    for place in places:
        if place.exists():
            return place
    raise ImportError(
        f"liblexico_torch.so is not in {', '.join(str(place.parent) for place in places)}: install with 'pip install .' in "
        "the source tree, or set LEXICO_TORCH_LIBRARY to the one of a build (build/cpu/lib/liblexico_torch.so)"
    )


torch.ops.load_library(str(_library()))

encode = torch.ops.lexico.encode
decode = torch.ops.lexico.decode
attend = torch.ops.lexico.attend
CompressedCache = torch.classes.lexico.CompressedCache


# Shapes alone, for torch.compile and torch.export.
@torch.library.register_fake("lexico::encode")
def _(vectors, atoms, sparsity, tolerance=0.0, selection="omp"):
    slots = (*vectors.shape[:-1], sparsity)
    return (vectors.new_empty(slots, dtype=torch.int32), vectors.new_empty(slots, dtype=torch.float32),
            vectors.new_empty(vectors.shape[:-1], dtype=torch.int32))  # fmt: skip


@torch.library.register_fake("lexico::decode")
def _(indices, weights, atoms):
    return weights.new_empty((*weights.shape[:-1], atoms.shape[1]), dtype=torch.float32)


@torch.library.register_fake("lexico::attend")
def _(queries, *others, **named):
    return torch.empty_like(queries, dtype=torch.float32)


def __getattr__(name):
    if name == "LexicoCache":  # not before it is asked for: it imports transformers
        from .cache import LexicoCache

        return LexicoCache
    raise AttributeError(f"module 'lexico' has no attribute '{name}'")
