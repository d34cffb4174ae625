"""lexico-eval --perplexity on the demo model, and the same numbers from transformers and a pursuit of our own in Python."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
from safetensors.numpy import save_file  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/support"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import perplexity_oracle as oracle  # noqa: E402
import programs  # noqa: E402

EVAL = str(Path(os.environ["LEXICO_BIN"]) / "lexico-eval")
DEMO = ROOT / "data/demo/wikillama-5m"
ATOMS, LENGTH, SEQUENCES = 128, 160, 4
THREADS = {**os.environ, "OMP_NUM_THREADS": "1"}  # two wait for each other where a core is busy with something else


def run(*arguments, **options):
    return programs.run(EVAL, *arguments, env=THREADS, **options)


def fails(code, *messages, arguments):
    last = run(*arguments, code=code).stderr.strip().splitlines()[-1]
    for message in messages:
        assert message in last, last


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return oracle.load(DEMO)


@pytest.fixture(scope="module")
def home(tmp_path_factory, model):
    """The exported model, token ids, and for each key stage a dictionary of plain samples."""
    home = tmp_path_factory.mktemp("perplexity")
    subprocess.run([sys.executable, ROOT / "tools/export_model.py", DEMO, home / "demo.pt"], check=True, stdout=subprocess.DEVNULL)
    oracle.sequences_of(DEMO, ROOT / "data/demo/heldout.jsonl", SEQUENCES, LENGTH).tofile(home / "ids.bin")
    train = torch.from_numpy(oracle.sequences_of(DEMO, ROOT / "data/demo/train.jsonl", 4, 128)).long()
    with torch.no_grad():
        cache = model(train, use_cache=True).past_key_values
    angle = oracle.angles(model.config, torch.arange(128))
    generator = torch.Generator().manual_seed(1)
    for stage in ("post_rope", "pre_rope"):
        tensors = {}
        for number, layer in enumerate(cache.layers):
            keys = oracle.rotate(layer.keys, -angle) if stage == "pre_rope" else layer.keys
            for kind, vectors in (("keys", keys), ("values", layer.values)):
                rows = vectors.transpose(1, 2).flatten(0, 2)[8:]
                rows = rows[torch.randperm(len(rows), generator=generator)[:ATOMS]]
                tensors[f"layers.{number:02d}.{kind}.atoms"] = (rows / rows.norm(dim=1, keepdim=True)).contiguous().numpy()
        (home / stage).mkdir()
        save_file(tensors, home / stage / "dictionary.safetensors", metadata={"format": "lexico-dictionary 1", "key_stage": stage})
    return home


def base(home, stage="post_rope"):
    return ["--dictionary", home / stage, "--model", home / "demo.pt", "--token-ids", home / "ids.bin", "--bos", "none",
            "--sequence-length", LENGTH, "--max-vectors", 100]  # fmt: skip


def effects(*arguments):
    return json.loads(run(*arguments, "--perplexity", "--json").stdout)["cache_effects"]


def compare(row, expected, names=("full_perplexity", "perplexity", "mean_kl", "p99_kl")):
    assert (row["tokens"], row["bytes"], row["full_bytes"]) == (expected["tokens"], expected["bytes"], expected["full_bytes"])
    assert row["share_of_fp16"] == pytest.approx(expected["bytes"] / expected["full_bytes"])
    assert row["perplexity_ratio"] == pytest.approx(row["perplexity"] / row["full_perplexity"])
    assert expected["mean_kl"] > 1e-4  # compressing does something
    for name in names:
        assert row[name] == pytest.approx(expected[name], rel=1e-3), (row, name)


def test_the_pursuit_of_the_oracle_is_that_of_scikit_learn(home):
    linear_model = pytest.importorskip("sklearn.linear_model")
    atoms = oracle.read_dictionaries(home / "post_rope/dictionary.safetensors").atoms[2, "keys"]
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    indices, weights = oracle.pursue(x, atoms, 8)
    theirs = linear_model.orthogonal_mp(atoms.T.numpy(), x.T.numpy(), n_nonzero_coefs=8)
    ours = np.zeros_like(theirs)
    ours[indices.numpy(), np.arange(40)[:, None]] = weights.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stage", ["post_rope", "pre_rope"])
def test_perplexity_divergence_and_bytes_are_those_of_transformers(home, model, stage):
    found = effects(*base(home, stage), "--sparsity", "8,16", "--window", "32", "--sinks", "0,4", "--no-baselines")
    assert len(found) == 4
    dictionaries = oracle.read_dictionaries(home / stage / "dictionary.safetensors")
    ids = np.fromfile(home / "ids.bin", np.int32).reshape(SEQUENCES, LENGTH)
    for row in found:
        assert row["key_atoms"] == row["value_atoms"] and row["chunk"] == 32
        compare(row, oracle.measure(model, ids, dictionaries, row["key_atoms"], 32, row["sink_tokens"], 32))
