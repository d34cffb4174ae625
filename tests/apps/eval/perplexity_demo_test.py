"""The demo model with a trained dictionary on all of its held-out text, and the same numbers from transformers. A minute or two: slow."""

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

sys.path.insert(0, str(Path(__file__).resolve().parent))
import perplexity_oracle as oracle  # noqa: E402

BIN = Path(os.environ["LEXICO_BIN"])
ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "data/demo/wikillama-5m"
SEQUENCES, LENGTH = 24, 512


def run(program, *arguments):
    return subprocess.run([str(program), *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("perplexity")
    run(sys.executable, "tools/export_model.py", DEMO, home / "demo.pt")
    oracle.sequences_of(DEMO, ROOT / "data/demo/heldout.jsonl", SEQUENCES, LENGTH).tofile(home / "ids.bin")
    return home


@pytest.mark.parametrize("stage, options", [("post_rope", ["--mean", "none"]), ("pre_rope", [])])
def test_perplexity_divergence_and_bytes_are_those_of_transformers(home, stage, options):
    run(BIN / "lexico-extract", "--model", home / "demo.pt", "--text", ROOT / "data/demo/train.jsonl", "--key-stage", stage,
        "--max-vectors", 20000, "--output", home / f"{stage}.h5")  # fmt: skip
    run(BIN / "lexico-train", "--data", home / f"{stage}.h5", "--output", home / stage, "--num-atoms", 256, "--vectors", 40000,
        "--key-stage", stage, *options)  # fmt: skip
    found = json.loads(run(BIN / "lexico-eval", "--dictionary", home / stage, "--model", home / "demo.pt", "--token-ids", home / "ids.bin",
                           "--bos", "none", "--sequence-length", LENGTH, "--perplexity", "--sparsity", "8,16", "--window", 32, "--coding",
                           "fp8-int16", "--no-baselines", "--max-vectors", 500, "--json"))["cache_effects"]  # fmt: skip
    model = oracle.load(DEMO)
    ids = np.fromfile(home / "ids.bin", np.int32).reshape(SEQUENCES, LENGTH)
    dictionaries = oracle.read_dictionaries(home / stage / "dictionary.safetensors")
    assert [row["key_atoms"] for row in found] == [8, 16]
    for row in found:
        expected = oracle.measure(model, ids, dictionaries, row["key_atoms"], 32, 0, 32)
        print({name: row[name] / expected[name] - 1 for name in ("full_perplexity", "perplexity", "mean_kl", "p99_kl", "bytes")})
        assert (row["tokens"], row["bytes"]) == (expected["tokens"], expected["bytes"])
        assert expected["mean_kl"] > 1e-5
        for name in ("full_perplexity", "perplexity", "mean_kl"):
            assert row[name] == pytest.approx(expected[name], rel=1e-3), (row, name)
        assert row["p99_kl"] == pytest.approx(expected["p99_kl"], rel=1e-2)
