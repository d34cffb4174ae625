"""The operations, CompressedCache and LexicoCache on CUDA tensors, against the same on the CPU. Skipped where torch has no GPU."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import lexico

if not torch.cuda.is_available():
    pytest.skip("torch has no CUDA device here", allow_module_level=True)

DEMO = Path(__file__).resolve().parents[2] / "data/demo"


def unit_rows(rng, count, dim):
    atoms = rng.standard_normal((count, dim)).astype(np.float32)
    return atoms / np.linalg.norm(atoms, axis=1, keepdims=True)


def both(array):
    x = torch.tensor(np.asarray(array), dtype=torch.float32)
    return x, x.cuda()


def close(ours, theirs, bound=1e-4):
    assert ours.is_cuda
    assert (torch.linalg.norm(ours.cpu().double() - theirs.double()) / torch.linalg.norm(theirs.double())).item() < bound


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("selection", ["omp", "ols", "ols-4"])
def test_encode_and_decode_are_those_of_the_cpu(rng, selection):
    (d, d_gpu), (x, x_gpu) = both(unit_rows(rng, 512, 64)), both(rng.standard_normal((3, 200, 64)))
    x[0, 0], x[0, 1, 3] = 0, torch.nan
    x_gpu = x.cuda()
    ours, theirs = lexico.encode(x_gpu, d_gpu, 8, selection=selection), lexico.encode(x, d, 8, selection=selection)
    assert all(a.is_cuda and a.dtype == b.dtype and a.shape == b.shape for a, b in zip(ours, theirs))
    same = (ours[0].cpu() == theirs[0]).all(-1)
    assert same.float().mean() >= (0.99 if selection != "ols-4" else 0.9)
    assert ours[2][0, :2].tolist() == [0, 0]
    back = lexico.decode(*ours[:2], d_gpu)
    close(back, lexico.decode(ours[0].cpu(), ours[1].cpu(), d))
    errors = [torch.linalg.norm((x - y.cpu())[1:]).item() for y in (back, lexico.decode(*theirs[:2], d))]
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)


@pytest.mark.parametrize("window", [0, 7])
def test_attend_is_that_of_the_cpu(rng, window):
    (d, d_gpu), (q, q_gpu) = both(unit_rows(rng, 64, 16)), both(rng.standard_normal((2, 6, 16)))
    codes = lexico.encode(torch.tensor(rng.standard_normal((2, 2, 130, 16)), dtype=torch.float32), d, 4)[:2]
    more, more_gpu = {}, {}
    if window:
        for name in ("window_keys", "window_values"):
            more[name], more_gpu[name] = both(rng.standard_normal((2, 2, window, 16)))
    on_gpu = [c.cuda() for c in codes]
    close(lexico.attend(q_gpu, *on_gpu, d_gpu, *on_gpu, d_gpu, **more_gpu), lexico.attend(q, *codes, d, *codes, d, **more))
    with pytest.raises(ValueError, match="key_atoms is on cpu, must be on cuda:0"):
        lexico.attend(q_gpu, *on_gpu, d, *on_gpu, d_gpu)


def test_the_cache_is_that_of_the_cpu(rng, tmp_path):
    atoms = {f"layers.00.{kind}.atoms": unit_rows(rng, 64, 16) for kind in ("keys", "values")}
    path = tmp_path / "dictionary.safetensors"
    save_file(atoms, path, {"format": "lexico-dictionary 1", "key_stage": "post_rope"})
    caches = [lexico.CompressedCache(str(path), 1, 2, 2, 16, 0, 8, 1, 0, [4], [4], [], [], "omp", "float16", 0.0, 64, 64, 0, 0, device)
              for device in ("cpu", "cuda")]  # fmt: skip
    rows = [[cache.add_sequence(), cache.add_sequence()] for cache in caches]
    for tokens in (70, 1, 1, 90, 1):
        (k, k_gpu), (v, v_gpu), (q, q_gpu) = (both(rng.standard_normal(shape)) for shape in ((2, 2, tokens, 16), (2, 2, tokens, 16), (2, 4, 16)))
        caches[0].append(0, rows[0], k, v)
        caches[1].append(0, rows[1], k_gpu, v_gpu)
        want, ours = caches[0].attend(0, rows[0], q), caches[1].attend(0, rows[1], q_gpu)
        close(ours[0], want[0], 1e-3)
        close(ours[1], want[1], 1e-3)
    with pytest.raises(ValueError, match="queries is on cpu, must be on cuda:0"):
        caches[1].attend(0, rows[1], q)
    assert caches[1].bytes() == caches[0].bytes()


def test_generate_reads_the_same_tokens(rng, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "wikillama-5m", dtype=torch.float32).eval()
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    atoms = {f"layers.{layer:02d}.{kind}.atoms": unit_rows(rng, 512, dim) for layer in range(config.num_hidden_layers) for kind in ("keys", "values")}
    path = tmp_path / "dictionary.safetensors"
    save_file(atoms, path, {"format": "lexico-dictionary 1", "key_stage": "post_rope"})
    model.set_attn_implementation("lexico")
    ids, found = torch.randint(5, 4000, (2, 60), generator=torch.Generator().manual_seed(0)), []
    for device in ("cpu", "cuda"):
        cache = lexico.LexicoCache(config, path, recent_window=16, key_sparsity=16, value_sparsity=16, device=device)
        model.to(device)
        with torch.inference_mode():
            model(ids.to(device), past_key_values=cache)
            found.append(model(ids[:, :1].to(device), past_key_values=cache).logits)
        if device == "cpu":
            with pytest.raises(ValueError, match="the cache is on cpu"), torch.inference_mode():
                model.to("cuda")(ids[:, :1].cuda(), past_key_values=cache)
    close(found[1], found[0], 1e-2)
