"""The whole chain on the demo model, and its errors beside those that scikit-learn finds. Minutes, so it is labelled slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import check_with_sklearn  # noqa: E402

BIN = Path(os.environ["LEXICO_BIN"])
ROOT = Path(__file__).resolve().parents[3]
MAX_VECTORS = 2000


def run(program, *arguments):
    return subprocess.run([str(program), *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("demo")
    pytest.importorskip("transformers")
    run(sys.executable, "tools/export_model.py", "data/demo/wikillama-5m", home / "demo.pt")
    for name, text in (("train", "train.jsonl"), ("heldout", "heldout.jsonl"), ("code", "code.txt")):
        run(BIN / "lexico-extract", "--model", home / "demo.pt", "--text", ROOT / "data/demo" / text, "--output", home / f"{name}.h5",
            "--max-vectors", 20000)  # fmt: skip
    run(BIN / "lexico-train", "--data", home / "train.h5", "--output", home / "run", "--num-atoms", 256, "--sparsity", 8, "--vectors", 40000)
    return home


def test_errors_on_the_demo_model_are_those_of_scikit_learn(home):
    report = json.loads(run(BIN / "lexico-eval", "--dictionary", home / "run", "--data", home / "heldout.h5", "--ood", home / "code.h5",
                            "--sparsity", "4,8,16", "--max-vectors", MAX_VECTORS, "--json"))  # fmt: skip
    rows, worst = check_with_sklearn.compare(report, home / "run/dictionary.pt", MAX_VECTORS)
    assert rows == 2 * 6 * 2 * 3
    assert worst < 0.01
    at_eight = {s["coder"]: s for s in report["summary"] if s["sparsity"] == 8}
    errors = {name: s["in_domain"]["both"] for name, s in at_eight.items()}
    assert errors["dictionary"] < errors["samples"] < errors["random"]
    assert at_eight["dictionary"]["out_over_in"] > 1


def test_text_and_activations_agree_on_the_demo_model(home):
    base = ["--dictionary", home / "run", "--sparsity", "8", "--max-vectors", "0", "--no-baselines", "--json", "--layers", "0,3"]
    (home / "short.txt").write_text((ROOT / "data/demo/code.txt").read_text()[:12000])
    run(BIN / "lexico-extract", "--model", home / "demo.pt", "--text", home / "short.txt", "--output", home / "short.h5", "--dtype", "float32")
    from_file = json.loads(run(BIN / "lexico-eval", *base, "--data", home / "short.h5"))
    on_the_fly = json.loads(run(BIN / "lexico-eval", *base, "--data", home / "short.txt", "--model", home / "demo.pt"))
    assert len(from_file["rows"]) == 4
    for a, b in zip(from_file["rows"], on_the_fly["rows"]):
        assert a["vectors"] == b["vectors"]
        assert a["mean"] == pytest.approx(b["mean"], rel=1e-4)
