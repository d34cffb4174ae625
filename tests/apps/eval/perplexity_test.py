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
ATOMS, LENGTH, SEQUENCES = 128, 128, 4
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
            "--sequence-length", LENGTH, "--max-vectors", 100, "--threads", 1]  # fmt: skip


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


@pytest.mark.parametrize("stage, sinks", [("post_rope", 0), ("pre_rope", 4)])
def test_perplexity_divergence_and_bytes_are_those_of_transformers(home, model, stage, sinks):
    found = effects(*base(home, stage), "--sparsity", "8,16", "--window", 32, "--sinks", sinks, "--no-baselines")
    dictionaries = oracle.read_dictionaries(home / stage / "dictionary.safetensors")
    ids = np.fromfile(home / "ids.bin", np.int32).reshape(SEQUENCES, LENGTH)
    assert [row["key_atoms"] for row in found] == [row["value_atoms"] for row in found] == [8, 16]
    for row in found:
        assert (row["chunk"], row["recent_window"], row["sink_tokens"]) == (32, 32, sinks)
        compare(row, oracle.measure(model, ids, dictionaries, row["key_atoms"], 32, sinks, 32))


def test_a_list_has_a_row_for_each_combination_and_rivals_at_equal_bytes(home, tmp_path):
    done = run(*base(home), "--perplexity", "--sparsity", 8, "--window", "8,32", "--sinks", "0,4", "--adaptive", "0,0.5",
               "--chunk", 32, "--bits", 2, "--perplexity-tokens", 2 * LENGTH, "-o", tmp_path / "out")  # fmt: skip
    rows = json.loads((tmp_path / "out/report.json").read_text())["cache_effects"]
    key = lambda row: (row["recent_window"], row["sink_tokens"], row["adaptive_threshold"])  # noqa: E731
    ours = {key(row): row for row in rows if row["coder"] == "dictionary, fp8-int16"}
    assert list(ours) == [(window, sinks, threshold) for threshold in (0, 0.5) for window in (8, 32) for sinks in (0, 4)]
    rivals = {(key(row), row["key_bits"]): row for row in rows if row["coder"] == "rotation + Lloyd-Max"}
    for where, row in ours.items():
        assert (row["own_atoms"] > 0) == (row["adaptive_threshold"] > 0)
        if row["adaptive_threshold"] == 0:
            assert rivals[where, row["key_bits"]]["bytes"] == row["bytes"]
        else:
            plain = ours[(*where[:2], 0)]
            assert row["bytes"] > plain["bytes"] + row["own_atoms"] * 64 * 2 - 1  # and wider indices
    assert ours[32, 4, 0]["mean_kl"] < ours[8, 4, 0]["mean_kl"]
    assert {row["coder"] for row in rows} == {"dictionary, fp8-int16", "rotation + Lloyd-Max", "min/max"}
    with open(tmp_path / "out/cache_effects.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    for line, row in zip(table, rows):
        assert (line["coder"], int(line["bytes"])) == (row["coder"], row["bytes"])
        assert float(line["mean_kl"]) == pytest.approx(row["mean_kl"], rel=1e-6)
    assert "x the KL of rotation + Lloyd-Max at equal bytes" in done.stdout
    page = (tmp_path / "out/report.html").read_text()
    assert "What it does to the model" in page and f"{len(rows)} settings" in page


def test_a_sweep_stays_within_its_budget_and_names_the_best(home):
    done = run(*base(home), "--sparsity", 8, "--budget", 0.3, "--chunk", 32, "--perplexity-tokens", LENGTH, "--json")
    rows = json.loads(done.stdout)["cache_effects"]
    assert all(0.2 < row["share_of_fp16"] <= 0.3 for row in rows if row["coder"] == "dictionary, fp8-int16")
    assert all(row["share_of_fp16"] <= 0.3 for row in rows)
    assert {row["recent_window"] for row in rows} == {0, 8, 16, 32}
    assert {row["split"] for row in rows} >= {"keys 1/4", "keys 1/2", "keys 3/4", "rotation + Lloyd-Max"}
    assert len({(r["coder"], r["recent_window"], r["key_bits"], r["value_bits"]) for r in rows}) == len(rows)  # none twice
    assert f"perplexity on ids: {len(rows)} settings, {LENGTH} tokens each" in done.stderr
    plan = json.loads(run(*base(home), "--budget", 0.3, "--perplexity-tokens", LENGTH, "--dry-run", "--json").stdout)["perplexity"]
    assert [(one["split"], one["bytes"]) for one in plan] == [(row["split"], row["bytes"]) for row in rows]
    text = run(*base(home), "--budget", 0.3, "--perplexity-tokens", LENGTH, "--dry-run").stdout
    assert f"Perplexity on ids: {len(rows)} settings" in text and "keys 3/4" in text


def test_bad_requests_are_named(home, tmp_path):
    plain = [*base(home), "--perplexity", "--sparsity", 8]
    fails(2, "recent_window is 128", "128 tokens: nothing would be compressed", arguments=[*plain, "--window", "32,128"])
    fails(2, "sparsity is 65", "head_dim 64", arguments=[*base(home), "--perplexity", "--sparsity", "8,65"])
    fails(2, "budget is 0.01, too small: the least possible is 0.", arguments=[*base(home), "--budget", 0.01])
    fails(2, "budget is 1, must be in (0, 1)", arguments=[*base(home), "--budget", 1])
    fails(2, "adaptive_threshold", "no dictionary", arguments=[*plain, "--adaptive", 0.3, "--coding", "file"])
    import toy_model

    toy_model.save(tmp_path / "toy.pt")
    save_file({f"layers.{layer:02d}.{kind}.atoms": np.eye(8, dtype=np.float32) for layer in range(2) for kind in ("keys", "values")},
              tmp_path / "toy.safetensors", metadata={"format": "lexico-dictionary 1"})  # fmt: skip
    np.arange(200, dtype=np.int32).tofile(tmp_path / "ids.bin")
    fails(3, "toy.pt", "method 'step'", "export_model.py", arguments=["--dictionary", tmp_path / "toy.safetensors", "--model", tmp_path / "toy.pt",
          "--token-ids", tmp_path / "ids.bin", "--sparsity", 4, "--perplexity"])  # fmt: skip
