"""torch.ops.lexico and CompressedCache against scikit-learn, numpy and dense attention in double."""

import gc

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from sklearn.linear_model import orthogonal_mp

import lexico


def unit_rows(rng, count, dim):
    atoms = rng.standard_normal((count, dim))
    return atoms / np.linalg.norm(atoms, axis=1, keepdims=True)


def tensor(array):
    return torch.tensor(np.asarray(array), dtype=torch.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- encode and decode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [1, 4, 8])
def test_the_error_is_that_of_scikit_learns_omp(rng, sparsity):
    atoms, x = unit_rows(rng, 128, 32), rng.standard_normal((200, 32))
    indices, weights, counts = lexico.encode(tensor(x), tensor(atoms), sparsity)
    assert indices.shape == weights.shape == (200, sparsity) and (counts == sparsity).all()
    ours = np.linalg.norm(x - lexico.decode(indices, weights, tensor(atoms)).numpy(), axis=1)
    theirs = np.linalg.norm(x - (atoms.T @ orthogonal_mp(atoms.T, x.T, n_nonzero_coefs=sparsity).reshape(128, -1)).T, axis=1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_shapes_follow_the_vectors_and_decode_is_the_sum_of_atoms(rng):
    atoms, x = unit_rows(rng, 64, 16), rng.standard_normal((2, 3, 5, 16))
    indices, weights, counts = lexico.encode(tensor(x), tensor(atoms), 4)
    assert indices.shape == (2, 3, 5, 4) and indices.dtype == torch.int32 and counts.shape == (2, 3, 5)
    dense = (weights.numpy()[..., None] * atoms[indices.numpy()]).sum(-2)
    np.testing.assert_allclose(lexico.decode(indices.long(), weights, tensor(atoms)).numpy(), dense, atol=1e-6)
    assert lexico.decode(*lexico.encode(torch.zeros(0, 16), tensor(atoms), 4)[:2], tensor(atoms)).shape == (0, 16)
    one = lexico.encode(tensor(x[0, 0, 0]), tensor(atoms), 4)
    assert one[0].shape == (4,) and torch.equal(one[0], indices[0, 0, 0])


def test_half_precision_is_taken_as_the_numbers_it_holds(rng):
    atoms, x = tensor(unit_rows(rng, 64, 16)), tensor(rng.standard_normal((20, 16)))
    for dtype in (torch.float16, torch.bfloat16):
        got = lexico.encode(x.to(dtype), atoms, 4)
        for a, b in zip(got, lexico.encode(x.to(dtype).float(), atoms, 4)):
            assert torch.equal(a, b)


def test_pursuit_stops_at_the_tolerance_and_at_vectors_without_direction(rng):
    atoms, x = tensor(unit_rows(rng, 128, 16)), tensor(rng.standard_normal((50, 16)))
    indices, weights, counts = lexico.encode(x, atoms, 12, tolerance=0.3)
    assert counts.min() < 12
    assert (torch.linalg.norm(x - lexico.decode(indices, weights, atoms), dim=1) <= 0.3001 * torch.linalg.norm(x, dim=1)).all()
    assert (indices[counts < 12][:, -1] == -1).all()
    x[0], x[1, 3] = 0, torch.nan
    assert lexico.encode(x, atoms, 4)[2][:3].tolist() == [0, 0, 4]


def test_ols_finds_smaller_errors(rng):
    atoms, x = tensor(unit_rows(rng, 600, 32)), tensor(rng.standard_normal((300, 32)))
    errors = {}
    for selection in ("omp", "ols", "ols-8"):
        indices, weights, _ = lexico.encode(x, atoms, 8, selection=selection)
        errors[selection] = torch.linalg.norm(x - lexico.decode(indices, weights, atoms)).item()
    assert errors["ols"] < errors["ols-8"] < errors["omp"]


def test_wrong_arguments_name_what_is_wrong(rng):
    atoms, x = tensor(unit_rows(rng, 64, 16)), tensor(rng.standard_normal((5, 16)))
    with pytest.raises(ValueError, match="max_atoms is 17, must be in .1, 16."):
        lexico.encode(x, atoms, 17)
    with pytest.raises(ValueError, match="last dimensions must be equal"):
        lexico.encode(x[:, :8], atoms, 4)
    with pytest.raises(ValueError, match="norm that is off 1 by 0.5"):
        lexico.encode(x, atoms * 0.5, 4)
    with pytest.raises(ValueError, match="'best'"):
        lexico.encode(x, atoms, 4, selection="best")
    with pytest.raises(TypeError, match="vectors is Double"):
        lexico.encode(x.double(), atoms, 4)
    indices, weights, _ = lexico.encode(x, atoms, 4)
    with pytest.raises(ValueError, match="reach from .* to 64, must be in .0, 64"):
        lexico.decode(torch.full_like(indices, 64), weights, atoms)
    with pytest.raises(ValueError, match="must be equal"):
        lexico.decode(indices, weights[:, :2], atoms)


# --- attend -----------------------------------------------------------------------------------------------------------


def dense_attention(q, k, v, scale):
    """q [batch, heads, dim], k and v [batch, kv_heads, tokens, dim], in double."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return ((q[:, :, None] @ k.transpose(2, 3) * scale).softmax(-1) @ v)[:, :, 0]


def close(ours, theirs, bound=1e-5):
    assert (torch.linalg.norm(ours.double() - theirs.double()) / torch.linalg.norm(theirs.double())).item() < bound


@pytest.mark.parametrize("tokens, window, scale", [(70, 0, None), (130, 9, 0.3), (0, 5, None)])
def test_attend_is_dense_attention_on_the_decoded_vectors(rng, tokens, window, scale):
    batch, heads, kv_heads, dim = 2, 6, 2, 16
    atoms_k, atoms_v = tensor(unit_rows(rng, 64, dim)), tensor(unit_rows(rng, 40, dim))
    q = tensor(rng.standard_normal((batch, heads, dim)))
    k, v = (tensor(rng.standard_normal((batch, kv_heads, tokens, dim))) for _ in range(2))
    wk, wv = (tensor(rng.standard_normal((batch, kv_heads, window, dim))) for _ in range(2))
    ki, kw, _ = lexico.encode(k, atoms_k, 4)
    vi, vw, _ = lexico.encode(v, atoms_v, 6)
    more = {"window_keys": wk, "window_values": wv} if window else {}
    ours = lexico.attend(q, ki, kw, atoms_k, vi, vw, atoms_v, **more, scale=scale)
    k, v = torch.cat([lexico.decode(ki, kw, atoms_k), wk], 2), torch.cat([lexico.decode(vi, vw, atoms_v), wv], 2)
    close(ours, dense_attention(q, k, v, scale or dim**-0.5))


def test_attend_refuses_shapes_that_do_not_fit(rng):
    atoms = tensor(unit_rows(rng, 64, 16))
    codes = lexico.encode(torch.randn(1, 2, 5, 16), atoms, 4)[:2]
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 KV heads"):
        lexico.attend(torch.randn(1, 3, 16), *codes, atoms, *codes, atoms)
    with pytest.raises(ValueError, match=r"must be \[2, kv_heads, tokens, sparsity\]"):
        lexico.attend(torch.randn(2, 4, 16), *codes, atoms, *codes, atoms)
    with pytest.raises(ValueError, match="come together"):
        lexico.attend(torch.randn(1, 4, 16), *codes, atoms, *codes, atoms, window_keys=torch.randn(1, 2, 3, 16))


def test_the_compiler_knows_the_shapes(rng):
    atoms, x = tensor(unit_rows(rng, 64, 16)), tensor(rng.standard_normal((2, 3, 16)))

    def both_ways(x):
        indices, weights, counts = torch.ops.lexico.encode(x, atoms, 4)
        return torch.ops.lexico.decode(indices, weights, atoms) * counts[..., None]

    compiled = torch.compile(both_ways, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), both_ways(x))
    codes = lexico.encode(torch.randn(1, 2, 5, 16), atoms, 4)[:2]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lexico.encode.default, (x, atoms, 4), test_utils=checks)
    torch.library.opcheck(torch.ops.lexico.decode.default, (*codes, atoms), test_utils=checks)
    torch.library.opcheck(torch.ops.lexico.attend.default, (torch.randn(1, 4, 16), *codes, atoms, *codes, atoms), test_utils=checks)


# --- CompressedCache --------------------------------------------------------------------------------------------------


@pytest.fixture
def dictionaries(tmp_path, rng):
    atoms = {f"layers.{layer:02d}.{kind}.atoms": unit_rows(rng, 64, 16).astype(np.float32) for layer in range(2) for kind in ("keys", "values")}
    path = tmp_path / "dictionary.safetensors"
    save_file(atoms, path, {"format": "lexico-dictionary 1", "key_stage": "post_rope"})
    return str(path)


def make(dictionaries, window=8, sparsity=(4,)):
    return lexico.CompressedCache(dictionaries, 2, 2, 2, 16, 0, window, 1, 0, list(sparsity), list(sparsity), [], [])


def test_the_class_does_what_its_model_does(dictionaries, tmp_path, rng):
    cache = make(dictionaries)
    rows = [cache.add_sequence(), cache.add_sequence()]
    k, v = (tensor(rng.standard_normal((2, 2, 50, 16))) for _ in range(2))
    for layer in range(2):
        cache.append(layer, rows, k[:, :, :49], v[:, :, :49])
        cache.append(layer, rows, k[:, :, 49:], v[:, :, 49:])
    assert cache.tokens(rows[1], 1) == 50 and cache.coded_tokens(rows[0], 0) == 42
    assert cache.counts()["coded_vectors"] == 2 * 2 * 2 * 2 * 42
    # The window is exact, the rest pursuit on half floats.
    atoms = load_file(dictionaries)
    for kind, x, got in zip(("keys", "values"), (k, v), cache.reconstruct(1, rows[1], 0, 50)):
        assert torch.equal(got[:, 42:], x[1, :, 42:].half().float())
        indices, weights, _ = lexico.encode(x[1, :, :42].half(), atoms[f"layers.01.{kind}.atoms"], 4)
        torch.testing.assert_close(got[:, :42], lexico.decode(indices, weights, atoms[f"layers.01.{kind}.atoms"]), rtol=1e-4, atol=1e-4)
    q = tensor(rng.standard_normal((3, 4, 16)))
    out, sums = cache.attend(1, [rows[0], rows[1], rows[0]], q)
    pairs = [cache.reconstruct(1, row, 0, 50) for row in (rows[0], rows[1], rows[0])]
    keys, values = (torch.stack([pair[i] for pair in pairs]) for i in range(2))
    close(out, dense_attention(q, keys, values, 0.25))
    scores = (q[:, :, None] @ keys.repeat_interleave(2, 1).transpose(2, 3))[:, :, 0] / 4
    torch.testing.assert_close(sums, scores.logsumexp(-1), rtol=1e-4, atol=1e-4)
    # Bytes are as promised; shared pages count once.
    assert cache.sequence_bytes(rows[0]) == cache.bytes_for(50) and cache.bytes() == 2 * cache.bytes_for(50)
    fork = cache.fork(rows[0])
    assert cache.bytes() < 3 * cache.bytes_for(50)
    cache.truncate(fork, 20)
    assert cache.tokens(fork, 0) == 20 and cache.tokens(rows[0], 0) == 50
    path = tmp_path / "row.lexico"
    cache.save(rows[1], str(path))
    other = make(dictionaries)
    close(other.attend(1, [other.load(str(path))], q[:1])[0], cache.attend(1, [rows[1]], q[:1])[0])
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(RuntimeError, match="row.lexico"):
        other.load(str(path))
    cache.remove(rows[1])
    cache.clear()
    assert cache.bytes() == 0


def test_the_class_says_what_is_wrong_and_stays_usable(dictionaries):
    with pytest.raises(RuntimeError, match="absent"):
        make("absent")
    with pytest.raises(ValueError, match="recent_window"):
        make(dictionaries, window=-1)
    for device in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match=f"device is '{device}'"):
            lexico.CompressedCache(dictionaries, 2, 2, 2, 16, 0, 8, 1, 0, [4], [4], [], [], "omp", "float16", 0.0, 64, 256, 0, 0, device)
    with pytest.raises(ValueError, match="keys have 3 sparsities"):
        make(dictionaries, sparsity=(4, 4, 4))
    cache = make(dictionaries)
    row = cache.add_sequence()
    good = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match=r"must be \[1, 2, tokens, 16\]"):
        cache.append(0, [row], good[..., :8], good[..., :8])
    with pytest.raises(ValueError, match="layer"):
        cache.append(2, [row], good, good)
    with pytest.raises(ValueError, match="sequence"):
        cache.append(0, [row + 1], good, good)
    with pytest.raises(ValueError, match="keys is on meta, must be on the CPU or a CUDA device"):
        cache.append(0, [row], good.to("meta"), good.to("meta"))
    with pytest.raises(ValueError, match=r"must be \[1, 4, 16\]"):
        cache.attend(0, [row], torch.randn(1, 2, 16))
    cache.append(0, [row], good, good)
    assert cache.tokens(row, 0) == 3
    del cache
    gc.collect()
