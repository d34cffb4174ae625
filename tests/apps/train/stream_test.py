"""lexico-train on a running model: what it learns is what it learns from a dump of the same options."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
import programs  # noqa: E402
import toy_model  # noqa: E402

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
BIN = Path(os.environ["LEXICO_BIN"]).resolve()
TRAIN, EXTRACT = str(BIN / "lexico-train"), str(BIN / "lexico-extract")
SMALL = ["--num-atoms", 24, "--sparsity", 2, "--vectors", 20000, "--batch-size", 256, "--validation-vectors", 400,
         "--code-vectors", 512, "--threads", 1]  # fmt: skip
BITS = ["--bits", 24]
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy_model.save(folder / "toy.pt")
    toy_model.save(folder / "slow.pt", model=toy_model.ToyModel(milliseconds=10))
    toy_model.save_tokenizer(folder / "tokenizer.json")
    rng = random.Random(1)
    words = ["owl", "river", "stone", "seven", "light", "under", "map", "salt"]
    sentence = lambda: " ".join(rng.choice(words) for _ in range(rng.randrange(3, 60)))  # noqa: E731
    (folder / "docs.jsonl").write_text("".join(json.dumps({"body": sentence()}) + "\n" for _ in range(30)))
    (folder / "long.txt").write_text("".join(sentence() + "\n" for _ in range(30)))
    np.random.default_rng(0).integers(0, 250, 25_000).astype("<i4").tofile(folder / "ids.bin")
    return folder


def texts(toy):
    return ["--text", toy / "docs.jsonl", "--field", "body", "--text", toy / "long.txt"]


def learned(folder):
    return {name: tensor.tobytes() for name, tensor in load_file(folder / "dictionary.safetensors").items()}


@pytest.mark.parametrize("of_both, of_extract, of_train, of_stream", [
    ([], ["-o", "dump"], BITS, []),  # pre-RoPE keys, means, codes
    pytest.param(["--key-stage", "pre_rope"], ["-o", "dump.h5"], ["--dictionaries", "head", *BITS], [], marks=pytest.mark.slow),
    (["--key-stage", "post_rope"], ["-o", "dump"], ["--recipe", "lexico", "--coding", "fp8-int16", "--position-offsets", 100], []),
    (["--seed", 7], ["-o", "dump", "--dtype", "float32", "--max-vectors", 5001], ["--recipe", "online", "--bytes-per-token", 24],
     ["--dtype", "float32", "--max-vectors", 5001]),
    ([], ["-o", "dump", "--sequence-length", 32, "--bos", "document", "--batch-size", 3, "--shard-vectors", 1000],
     ["--layers", 1, "--layer-groups", "0-1", *BITS], ["--sequence-length", 32, "--bos", "document", "--model-batch-size", 3]),
    pytest.param([], ["-o", "dump"], ["--pool-mib", 1, "--vectors", 120000, *BITS], [], marks=pytest.mark.slow),  # does not fit the pool
])  # fmt: skip
def test_streaming_learns_the_bytes_that_a_dump_gives(toy, tmp_path, of_both, of_extract, of_train, of_stream):
    is_text = "--pool-mib" not in of_train
    what = ["--model", toy / "toy.pt", *(texts(toy) if is_text else ["--token-ids", toy / "ids.bin", "--bos", "none"])]
    programs.run(EXTRACT, *what, "--threads", 1, *of_both, *of_extract, cwd=tmp_path)
    programs.run(TRAIN, "--data", of_extract[1], "-o", "from_dump", *SMALL, *of_both, *of_train, cwd=tmp_path)
    programs.run(TRAIN, *what, "-o", "streamed", *SMALL, *of_both, *of_train, *of_stream, cwd=tmp_path)
    a, b = tmp_path / "from_dump", tmp_path / "streamed"
    assert learned(a) == learned(b)
    assert (a / "report.csv").read_bytes() == (b / "report.csv").read_bytes()
    if (a / "dictionary.pt").exists():
        assert (a / "dictionary.pt").read_bytes() == (b / "dictionary.pt").read_bytes()
    names = {p.name for p in b.iterdir()}
    assert not any(name.startswith(".") or name.endswith((".h5", ".bin")) for name in names), names  # no dump, no token ids
    inputs = [Path(i["path"]).name for i in json.loads((b / "run.json").read_text())["inputs"]]
    assert inputs[0] == "toy.pt" and len(inputs) == (3 if is_text else 2)


@pytest.fixture(scope="module")
def slow(toy, tmp_path_factory):
    """A run of some seconds in which model and training take turns to wait, and what it ends with."""
    arguments = ["--model", toy / "slow.pt", "--token-ids", toy / "ids.bin", "--bos", "none", *SMALL, "--vectors", 150000,
                 "--pool-mib", 1, "--checkpoint-seconds", 0.05]  # fmt: skip
    whole = tmp_path_factory.mktemp("whole") / "run"
    programs.run(TRAIN, *arguments, "-o", whole)
    return arguments, learned(whole)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stream_cut_off_and_resumed_ends_with_the_same_bytes(slow, tmp_path, how):
    arguments, whole = slow
    cut, rng = tmp_path / "cut", random.Random(int(how))
    for start in range(3):
        process = subprocess.Popen([TRAIN, *map(str, arguments), "-o", cut, *(["--resume"] if start else [])],
                                   stderr=subprocess.PIPE, text=True)  # fmt: skip
        deadline = time.time() + 60
        while start == 0 and not list(cut.glob("checkpoints/*.safetensors")) and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        process.send_signal(how)
        stderr = process.communicate(timeout=60)[1]
        # Before it watches for signals, while libraries load, a signal ends it as any program.
        assert process.returncode in (-how, 75, 0), stderr
        if process.returncode == 75:
            assert "stopped" in stderr and "--resume" in stderr, stderr
    programs.run(TRAIN, *arguments, "-o", cut, "--resume")
    assert learned(cut) == whole
    assert not [p.name for p in cut.rglob("*") if p.name.startswith(".lexico") or p.name.endswith(".partial")]


def test_a_stop_before_the_first_step_is_heard_while_the_model_runs(toy, tmp_path):
    toy_model.save(tmp_path / "slow.pt", model=toy_model.ToyModel(milliseconds=500))
    process = subprocess.Popen([TRAIN, "--model", tmp_path / "slow.pt", "--token-ids", toy / "ids.bin", "--bos", "none",
                                *map(str, SMALL), "-o", tmp_path / "r"], stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.time() + 60
    while not (tmp_path / "r" / "run.json").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    began = time.time()
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "stopped" in stderr, stderr
    assert time.time() - began < 10  # batches of half a second; all of them take a minute


def test_resuming_over_another_text_is_refused(slow, toy, tmp_path):
    base = ["--model", toy / "toy.pt", *SMALL, "--vectors", 3000, "-o", tmp_path / "r"]
    programs.run(TRAIN, *base, *texts(toy))
    done = programs.run(TRAIN, *base, "--text", toy / "long.txt", "--resume", code=2)
    assert "data = plan " in done.stderr, done.stderr


# Not from here: a process starts with the peak of the one that forks it, which may be larger than its own.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
assert status == 0
print(usage.ru_maxrss)
"""


def peak_kib(*arguments):
    return int(programs.run(sys.executable, "-c", MEASURE, TRAIN, *arguments).stdout)


@pytest.mark.parametrize("kind", ["txt", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("jsonl", "bin"))])
def test_memory_does_not_grow_with_the_corpus(toy, tmp_path, kind):
    line = "The owl of the seventh map flies under light and over stone.\n"
    peaks = []
    for size in (1_000_000, 10_000_000):
        text = tmp_path / f"text.{kind}"
        if kind == "bin":
            np.tile(np.arange(250, dtype="<i4"), size // 250).tofile(text)
        elif kind == "txt":
            text.write_text(line * (size // len(line)))
        else:
            text.write_text((json.dumps({"text": line * 10}) + "\n") * (size // len(line) // 10))
        flag = "--token-ids" if kind == "bin" else "--text"
        peaks.append(peak_kib("--model", toy / "toy.pt", flag, text, *SMALL, "--pool-mib", 4, "-o", tmp_path / f"r{size}"))
    assert peaks[1] < 1.05 * peaks[0], peaks


def test_dry_run_states_the_stream_and_reads_little_of_it(toy, tmp_path):
    base = ["--model", toy / "slow.pt", "--token-ids", toy / "ids.bin", "--bos", "none", *SMALL, "-o", tmp_path / "r", "--dry-run"]
    plan = json.loads(programs.run(TRAIN, *base, "--json").stdout)
    assert plan["token_ids_bytes"] == 4 * 25_000 and plan["disk_bytes"] > 4 * 25_000
    assert 10_000 < plan["model_tokens"] <= 25_000 and plan["seconds"] > plan["model_seconds"] > 0
    text = programs.run(TRAIN, *base).stdout
    assert "tokens in about" in text and "nothing is dumped" in text
    assert not (tmp_path / "r").exists() and not list(tmp_path.iterdir())


def test_bad_input_is_named_and_has_its_exit_code(toy, tmp_path):
    out = ["-o", tmp_path / "r"]
    model, text = ["--model", toy / "toy.pt"], ["--text", toy / "long.txt"]
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "cut.pt").write_bytes((toy / "toy.pt").read_bytes()[:3000])
    toy_model.save_tokenizer(tmp_path / "unigram.json", kind="Unigram")
    toy_model.save(tmp_path / "alone.pt")
    toy_model.save(tmp_path / "nan.pt", model=toy_model.ToyModel(nan_id=ord("o")))
    for code, message, *arguments in [
        (2, "--model FILE.pt --text FILE", *out),
        (2, "contradict each other", *model, *text, "--data", toy, *out),
        (2, "model is missing", *text, *out),
        (2, "text is missing", *model, *out),
        (2, "metric is 'queries', which needs moments", *model, *text, *out, "--metric", "queries"),
        (2, "dtype is 'bfloat16'", *model, *text, *out, "--dtype", "bfloat16"),
        (2, "device is 'tpu'", *model, *text, *out, "--model-device", "tpu"),
        (2, "max_vectors is 1, but one token has 2 vectors", *model, *text, *out, "--max-vectors", "1"),
        (2, "no tokenizer", "--model", tmp_path / "alone.pt", *text, *out),
        (3, "missing.pt: No such file", "--model", tmp_path / "missing.pt", *text, *out),
        (3, "cut.pt: cannot be read as a TorchScript model", "--model", tmp_path / "cut.pt", *text, *out),
        (3, "missing.txt: cannot be read: No such file", *model, "--text", tmp_path / "missing.txt", *out),
        (3, "empty.txt: holds no text", *model, "--text", tmp_path / "empty.txt", *out),
        (3, "short.txt: 4 vectors a layer are too few", *model, "--text", tmp_path / "short.txt", *out),
        (3, "--token-ids", *model, *text, *out, "--tokenizer", tmp_path / "unigram.json"),
    ]:  # fmt: skip
        done = programs.run(TRAIN, *arguments, code=code)
        assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert not (tmp_path / "r").exists()
    done = programs.run(TRAIN, "--model", tmp_path / "nan.pt", *text, "--tokenizer", toy / "tokenizer.json", *out, *SMALL, code=3)
    assert "is not a finite number" in done.stderr and "long.txt" in done.stderr, done.stderr


def test_help_names_both_sources():
    text = programs.run(TRAIN, "--help").stdout
    assert "--token-ids" in text and "--model-device" in text and "--batch-tokens" in text
