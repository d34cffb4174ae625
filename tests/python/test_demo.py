"""Sampling, retraining and the demo texts."""

import hashlib
import json

import pytest
import torch
from conftest import ROOT

import export_model
import make_demo_texts
import sample_text
import train_demo_model

DEMO = ROOT / "data/demo"
TINY = ["--layers", "2", "--hidden", "32", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--mlp", "48",
        "--vocab", "300", "--length", "32", "--batch", "4", "--autocast", "none", "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny model trained for a few steps on two files."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "a.txt").write_text("The cat sat on the mat. The dog sat on the log. " * 60)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": f"Line {i}: the cat again."}) + "\n" for i in range(40)))
    train_demo_model.main([str(folder / "a.txt"), str(folder / "b.jsonl"), "--out", str(folder / "m"), *TINY,
                           "--steps", "40", "--learning-rate", "0.01", "--warmup", "5"])  # fmt: skip
    return folder


# --- train_demo_model.py ----------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(trained):
    card = (trained / "m/README.md").read_text()
    loss = float(card.split("training loss at the end ")[1].split()[0])
    assert loss < 0.6 * torch.tensor(300.0).log()  # random weights give log(vocabulary)
    assert not list(trained.glob("*.partial"))


def test_a_trained_folder_can_be_exported(trained, tmp_path, call):
    code, out, err = call(export_model, trained / "m", tmp_path / "m.pt")
    assert code == 0, err
    assert "m (Llama), 2 layers, 2 KV heads of 8" in out and (tmp_path / "m.tokenizer.json").exists()


def test_the_tokenizer_is_byte_level_and_loses_nothing(trained):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(trained / "m/tokenizer.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for text in ["The cat", "Ünïcode 漢字 🙂\n\ttabs", ""]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_sequence_starts_with_the_start_token_and_documents_are_joined_by_it():
    documents = ["ab" * 50, "cd" * 50]
    tokenizer = train_demo_model.train_tokenizer(documents, 257)
    rows = train_demo_model.pack(tokenizer, documents, 21)
    assert rows.shape == (10, 21) and (rows[:, 0] == 0).all()
    assert rows[:, 1:].flatten().tolist().count(0) == 2  # one for each document


def test_training_repeats_with_its_seed(tmp_path):
    (tmp_path / "a.txt").write_text("some words to learn, again and again. " * 30)
    for name in ("one", "two"):
        train_demo_model.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / name), *TINY, "--steps", "2"])
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("step, want", [(0, 0.25), (3, 1.0), (4, 1.0), (7, 0.5), (9, 1 / 6)])
def test_the_learning_rate_rises_and_falls_linearly(step, want):
    assert train_demo_model.learning_rate(step, steps=10, warmup=4, peak=1.0) == pytest.approx(want)


def test_training_refuses_bad_input(tmp_path, call):
    out = tmp_path / "m"

    def fails(code, words, *arguments):
        got, _, err = call(train_demo_model, *TINY, *arguments)
        assert got == code and words in err, err
        assert not out.exists() or out.is_file()

    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("few words")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"body": "not"}\n')
    fails(3, "absent.txt: cannot be read", tmp_path / "absent.txt", "--out", out)
    fails(3, "no text", tmp_path / "empty.txt", "--out", out)
    fails(3, "want at least 31", tmp_path / "short.txt", "--out", out)
    fails(3, "bad.jsonl: line 2", tmp_path / "bad.jsonl", "--out", out)
    fails(2, "is not empty", tmp_path / "short.txt", "--out", tmp_path)
    fails(2, "holds no model", tmp_path / "short.txt", "--out", tmp_path, "--overwrite")
    fails(2, "does not exist", tmp_path / "short.txt", "--out", tmp_path / "no/m")
    fails(2, "must divide", tmp_path / "short.txt", "--out", out, "--kv-heads", "3")
    assert call(train_demo_model, tmp_path / "short.txt", "--out", out, "--vocab", "100")[0] == 2
    assert "Example" in call(train_demo_model, "--help")[1]


# --- sample_text.py ---------------------------------------------------------------------------------------------------


def sample(call, trained, path, *more):
    limits = ["--bytes", "2000", "--max-tokens", "40", "--batch", "8", "--threads", "1"]
    code, out, err = call(sample_text, trained / "m", path, *limits, *more)
    assert code == 0, err
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_samples_are_documents_of_the_asked_size_and_repeat_with_their_seed(trained, tmp_path, call):
    one = sample(call, trained, tmp_path / "1.jsonl", "--seed", "1")
    again = sample(call, trained, tmp_path / "2.jsonl", "--seed", "1")
    other = sample(call, trained, tmp_path / "3.jsonl", "--seed", "2")
    assert one == again and one != other
    assert all(text and "<|endoftext|>" not in text for text in one)
    assert 2000 <= (tmp_path / "1.jsonl").stat().st_size < 2400


def test_a_low_top_p_makes_sampling_greedy():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.9]])
    ids = sample_text.pick(logits, 1.0, 1e-6, torch.Generator().manual_seed(0))
    assert ids.tolist() == [[1], [0]]


def test_sampling_follows_the_probabilities_within_top_p():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, 3)
    ids = sample_text.pick(logits, 1.0, 0.7, torch.Generator().manual_seed(0))[:, 0]
    counts = torch.bincount(ids, minlength=3) / 4000
    assert counts[2] == 0 and abs(counts[0] - 0.625) < 0.03


@torch.no_grad()
def test_documents_end_before_the_end_token(trained):
    model, _, start, ends = sample_text.load(trained / "m")
    options = sample_text.parse([str(trained / "m"), "x", "--max-tokens", "30"])
    rows = sample_text.sample_batch(model, start, ends, 16, options, torch.Generator().manual_seed(0))
    assert len(rows) == 16 and all(len(row) <= 30 and 0 not in row for row in rows)


def test_sampling_refuses_bad_input(trained, tmp_path, call):
    out = tmp_path / "o.jsonl"

    def fails(code, words, *arguments):
        got, _, err = call(sample_text, *arguments)
        assert got == code and words in err, err
        assert not out.exists()

    fails(3, "no config.json", tmp_path, out)
    fails(2, "must be at most 2048", trained / "m", out, "--max-tokens", "4000")
    fails(2, "must be in (0, 1]", trained / "m", out, "--top-p", "0")
    fails(2, "does not exist", trained / "m", tmp_path / "no/o.jsonl")
    assert "Example" in call(sample_text, "--help")[1]


# --- make_demo_texts.py and data/demo ---------------------------------------------------------------------------------


def test_the_code_text_is_the_same_for_the_same_tree(tmp_path, call):
    for name in ("lib/b.cpp", "lib/a.h", "docs/x.md", "tools/t.py", "build/no.cpp", "lib/image.png"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"first line of {name}\n" * 10)
    texts = []
    for name in ("one.txt", "two.txt"):
        code, _, err = call(make_demo_texts, "--root", tmp_path / "root", "--output", tmp_path / name, "--per-file", "100")
        assert code == 0, err
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert sum(line.startswith("====") for line in texts[0].splitlines()) == 4
    assert "build/no" not in texts[0] and "image" not in texts[0]
    assert all(line in ("",) or line.startswith(("==== ", "first line of ")) for line in texts[0].splitlines())


def test_the_code_text_keeps_to_its_size(tmp_path, call):
    call(make_demo_texts, "--output", tmp_path / "code.txt", "--bytes", "20000")
    assert 15000 < (tmp_path / "code.txt").stat().st_size <= 20000
    code, _, err = call(make_demo_texts, "--root", tmp_path / "empty", "--output", tmp_path / "x.txt")
    assert code == 3 and "no source files" in err


def test_the_demo_is_complete_and_small():
    def documents(name):
        return [json.loads(line)["text"] for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]

    train, heldout = documents("train.jsonl"), documents("heldout.jsonl")
    assert 350_000 < (DEMO / "train.jsonl").stat().st_size < 450_000
    assert 60_000 < (DEMO / "heldout.jsonl").stat().st_size < 100_000
    assert 60_000 < (DEMO / "code.txt").stat().st_size < 100_000
    assert not set(train) & set(heldout)
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 13e6


def test_the_demo_model_exports(tmp_path, call):
    code, out, err = call(export_model, DEMO / "wikillama-5m", tmp_path / "demo.pt")
    assert code == 0, err
    assert "largest difference 0 " in out and "6 layers, 2 KV heads of 64" in out
    digest = hashlib.sha256((DEMO / "wikillama-5m/tokenizer.json").read_bytes()).hexdigest()
    assert hashlib.sha256((tmp_path / "demo.tokenizer.json").read_bytes()).hexdigest() == digest
