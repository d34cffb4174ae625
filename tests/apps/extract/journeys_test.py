"""lexico-extract as its user meets it: the real binary on a tiny model, what it writes, and what it says to bad input."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
import programs  # noqa: E402
import toy_model  # noqa: E402

EXTRACT = str(Path(os.environ["LEXICO_BIN"]).resolve() / "lexico-extract")
LENGTH = 16
BOS = toy_model.BOS
DOCUMENTS = ["The first document is about owls.", "Short.", "A third one, quite a bit longer than both of the others: " + "owl " * 60]
torch.set_num_threads(1)


def run(*arguments, **options):
    return programs.run(EXTRACT, *arguments, **options)


def fails(code, message, *arguments, **options):
    done = run(*arguments, code=code, **options)
    lines = done.stderr.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("lexico-extract: "), done.stderr
    assert len(lines) == 1 or len(lines) == 2 and " tokens in " in lines[0], done.stderr
    assert done.stdout == ""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a model, its tokenizer and texts."""
    folder = tmp_path_factory.mktemp("toy")
    toy_model.save(folder / "toy.pt")
    toy_model.save_tokenizer(folder / "toy.tokenizer.json")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"id": i, "body": d}) + "\n" for i, d in enumerate(DOCUMENTS)))
    (folder / "long.txt").write_text("".join(f"Line {i} of a longer text.\n" for i in range(60)))
    return folder


@pytest.fixture(scope="module")
def both(toy):
    """Model and two texts, as arguments."""
    return ["--model", toy / "toy.pt", "--text", toy / "docs.jsonl", "--field", "body", "--text", toy / "long.txt",
            "--sequence-length", LENGTH, "--threads", 1]  # fmt: skip


@pytest.fixture(scope="module")
def ids_file(toy):
    ids = np.random.default_rng(0).integers(0, BOS, 999).astype("<i4")
    (toy / "ids.bin").write_bytes(ids.tobytes())
    return toy / "ids.bin", ids


def packed(documents, length, bos="always"):
    """The sequences that docs/formats.md promises, as (id, position, document) rows; documents are lists of ids."""
    rows, position = [], 0
    for number, ids in enumerate(documents):
        ids = ([BOS] if bos != "none" else []) + list(ids)
        while ids:
            if position == length:
                position = 0
            if position == 0 and bos == "always" and ids[0] != BOS:
                ids = [BOS] + ids
            rows.append((ids.pop(0), position, number))
            position += 1
    return np.array(rows, np.int32)


def expected(model, rows, length, unrotated=False):
    """Per sequence, from Python's torch: keys, values, queries as [layers, tokens * heads, dim]."""
    parts = []
    for first in range(0, len(rows), length):
        ids = torch.tensor(rows[first : first + length, 0][None], dtype=torch.long)
        keys, values, queries = model.queries(ids, torch.ones_like(ids))
        if unrotated:
            keys, queries = model.unrotated(ids)
        parts.append([x[:, 0].transpose(1, 2).flatten(1, 2).double().numpy() for x in (keys, values, queries)])
    return [np.concatenate(part, axis=1) for part in zip(*parts)]


def everything(path):
    """All of a file or a folder of shards: tokens [n, 3] and vectors [layer][kind]."""
    files = sorted(path.glob("*.h5")) if path.is_dir() else [path]
    tokens, vectors = [], []
    for name in files:
        with h5py.File(name) as file:
            assert file.attrs["complete"] == 1 and file.attrs["shard_count"] == len(files)
            tokens.append(np.stack([file[f"tokens/{field}"][:] for field in ("id", "position", "document")], 1))
            vectors.append([[file[f"layers/{layer:02d}/{kind}"][:] for kind in ("keys", "values")] for layer in range(toy_model.LAYERS)])
    return np.concatenate(tokens), np.concatenate(vectors, axis=2)


def test_the_file_holds_what_torch_computes_under_the_documented_names(toy, both, tmp_path):
    out = tmp_path / "new" / "a.h5"
    done = run(*both, "-o", out, "--query-moments")
    assert done.stdout.startswith("wrote ") and len(done.stdout.strip().splitlines()) == 1
    assert [p.name for p in out.parent.iterdir()] == ["a.h5"]
    documents = [d.encode() for d in DOCUMENTS] + [(toy / "long.txt").read_bytes()]
    first, second = packed(documents[:3], LENGTH), packed(documents[3:], LENGTH)
    second[:, 2] += 3  # documents are numbered through
    model = toy_model.ToyModel()
    wants = [np.concatenate(parts, axis=1) for parts in zip(expected(model, first, LENGTH), expected(model, second, LENGTH))]
    rows = np.concatenate([first, second])
    tokens, vectors = everything(out)
    np.testing.assert_array_equal(tokens, rows)
    np.testing.assert_allclose(vectors[:, 0], wants[0], rtol=1e-3, atol=1e-5)  # float16 has 11 bits
    np.testing.assert_allclose(vectors[:, 1], wants[1], rtol=1e-3, atol=1e-5)
    queries = wants[2].reshape(toy_model.LAYERS, len(rows), toy_model.KV_HEADS, -1, toy_model.DIM)
    moments = np.einsum("ltkgi,ltkgj->lkij", queries, queries) / (len(rows) * queries.shape[3])
    with h5py.File(out) as file:
        assert sorted(file) == ["layers", "tokens"] and sorted(file["layers/01"]) == ["keys", "query_second_moment", "values"]
        assert file["layers/00/keys"].dtype == np.float16 and file["layers/00/keys"].chunks == (2048, toy_model.DIM)
        for layer in range(toy_model.LAYERS):
            np.testing.assert_allclose(file[f"layers/{layer:02d}/query_second_moment"][:], moments[layer], rtol=1e-4, atol=1e-5)
        attributes = dict(file.attrs)
    assert attributes["contract"] == "lexico-activations 1" and attributes["model"] == "org/toy"
    assert list(attributes["corpora"]) == ["docs", "long"] and list(attributes["corpus_documents"]) == [3, 1]
    assert (attributes["bos"], attributes["key_stage"], attributes["dtype"]) == ("always", "post_rope", "float16")
    assert (attributes["num_tokens"], attributes["num_vectors"]) == (len(rows), len(rows) * toy_model.KV_HEADS)
    assert (attributes["sequence_length"], attributes["shard_index"], attributes["shard_count"]) == (LENGTH, 0, 1)
    assert attributes["model_sha256"] == hashlib.sha256((toy / "toy.pt").read_bytes()).hexdigest()


def test_pre_rope_keys_and_moments_are_those_before_the_rotation(toy, ids_file, tmp_path):
    out = tmp_path / "a.h5"
    run("--model", toy / "toy.pt", "--token-ids", ids_file[0], "-o", out, "--key-stage", "pre_rope", "--dtype", "float32",
        "--query-moments", "--bos", "none", "--sequence-length", 50)  # fmt: skip
    rows = packed([ids_file[1]], 50, "none")
    keys, values, queries = expected(toy_model.ToyModel(), rows, 50, unrotated=True)
    tokens, vectors = everything(out)
    np.testing.assert_array_equal(tokens, rows)
    np.testing.assert_allclose(vectors[:, 0], keys, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(vectors[:, 1], values, rtol=1e-5, atol=1e-6)
    queries = queries.reshape(toy_model.LAYERS, len(rows), toy_model.KV_HEADS, -1, toy_model.DIM)
    with h5py.File(out) as file:
        assert file.attrs["key_stage"] == "pre_rope" and file["layers/00/keys"].dtype == np.float32
        want = np.einsum("tkgi,tkgj->kij", queries[1], queries[1]) / (len(rows) * queries.shape[3])
        np.testing.assert_allclose(file["layers/01/query_second_moment"][:], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bos", ["always", "document", "none"])
def test_bos_starts_what_the_policy_says(toy, both, tmp_path, bos):
    run("--model", toy / "toy.pt", "--text", toy / "docs.jsonl", "--field", "body", "--sequence-length", LENGTH, "--bos", bos, "-o", tmp_path / "a.h5")
    np.testing.assert_array_equal(everything(tmp_path / "a.h5")[0], packed([d.encode() for d in DOCUMENTS], LENGTH, bos))


def test_shards_hold_what_one_file_holds_whatever_the_batches(both, tmp_path):
    run(*both, "-o", tmp_path / "one.h5", "--query-moments")
    run(*both, "-o", tmp_path / "many", "--query-moments", "--shard-vectors", 100, "--batch-size", 2)
    names = sorted(p.name for p in (tmp_path / "many").iterdir())
    assert names == [f"activations-{i:05d}.h5" for i in range(len(names))] and len(names) > 10
    one, many = everything(tmp_path / "one.h5"), everything(tmp_path / "many")
    np.testing.assert_array_equal(one[0], many[0])
    np.testing.assert_allclose(one[1], many[1], rtol=1e-3, atol=1e-6)
    weights, moments = [], []
    for name in names:
        with h5py.File(tmp_path / "many" / name) as file:
            weights.append(file.attrs["num_tokens"])
            moments.append(file["layers/00/query_second_moment"][:])
    with h5py.File(tmp_path / "one.h5") as file:
        np.testing.assert_allclose(np.average(moments, axis=0, weights=weights), file["layers/00/query_second_moment"][:], rtol=1e-4, atol=1e-5)


def test_the_budget_is_met_exactly_and_evenly_over_the_texts(toy, ids_file, tmp_path):
    np.arange(4000, dtype="<i4").__mod__(200).tofile(tmp_path / "big.bin")
    texts = ["--token-ids", f"small={ids_file[0]}", "--token-ids", f"big={tmp_path / 'big.bin'}", "--bos", "none", "--sequence-length", LENGTH]
    for budget in (2001, 2, 300):
        run("--model", toy / "toy.pt", *texts, "--max-vectors", budget, "-o", tmp_path / "a.h5", "--overwrite")
        tokens, vectors = everything(tmp_path / "a.h5")
        assert len(tokens) == budget // toy_model.KV_HEADS and vectors.shape[2] == len(tokens) * toy_model.KV_HEADS
        if budget > 100:
            share = (tokens[:, 2] == 0).mean()  # of the first text, which has 999 of 4999 tokens
            assert abs(share - 0.2) < 0.07
    starts = set()
    for seed in range(2):
        run("--model", toy / "toy.pt", *texts, "--max-vectors", 64, "--seed", seed, "-o", tmp_path / "a.h5", "--overwrite")
        starts.add(everything(tmp_path / "a.h5")[0].tobytes())
    assert len(starts) > 1


def test_token_ids_come_from_safetensors_too(toy, tmp_path):
    save_file({"b": np.array([5, 6], np.int64), "a": np.array([1, 2, 3], np.int32)}, tmp_path / "ids.safetensors")
    run("--model", toy / "toy.pt", "--token-ids", tmp_path / "ids.safetensors", "-o", tmp_path / "a.h5", "--bos", "document")
    np.testing.assert_array_equal(everything(tmp_path / "a.h5")[0], packed([[1, 2, 3], [5, 6]], 64, "document"))


def test_dry_run_prints_the_plan_and_writes_nothing(both, tmp_path):
    out = tmp_path / "folder" / "shards"
    plan = json.loads(run(*both, "-o", out, "--dry-run", "--json", "--shard-vectors", 100).stdout)
    text = run(*both, "-o", out, "--dry-run", "--shard-vectors", 100).stdout
    assert not list(tmp_path.iterdir())
    assert "verdict" in text and f"{plan['tokens']} of {plan['tokens']}" in text
    done = json.loads(run(*both, "-o", out, "--json", "--benchmark", "--shard-vectors", 100).stdout)
    same = [key for key in plan if key in done and key not in ("seconds", "bytes")]  # files hold their command line
    assert {key: done[key] for key in same} == {key: plan[key] for key in same}
    assert done["bare_tokens_per_s"] > 0 and "bare forward" in done["verdict"]
    files = list(out.iterdir())
    assert len(files) == plan["files"]
    size = sum(p.stat().st_size for p in files)
    assert size <= plan["bytes"] <= 2 * size  # tiny files are mostly headers


def test_the_example_in_the_documentation_runs(both, tmp_path):
    run(*both, "-o", tmp_path / "activations.h5")
    page = (Path(__file__).resolve().parents[3] / "docs" / "formats.md").read_text()
    example = next(part.split("```")[0] for part in page.split("```python\n")[1:] if "h5py" in part.split("```")[0])
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(f"({len(DOCUMENTS[0]) + 3}, {toy_model.KV_HEADS}, {toy_model.DIM}) "), done


# --- Stopping and going on ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(toy, tmp_path_factory):
    """A run of 40 shards that takes about a second, and what it writes when nobody disturbs it."""
    toy_model.save(toy / "slow.pt", model=toy_model.ToyModel(milliseconds=20))
    whole = tmp_path_factory.mktemp("whole") / "shards"
    np.arange(640, dtype="<i4").__mod__(250).tofile(toy / "slow.bin")
    arguments = ["--model", toy / "slow.pt", "--token-ids", toy / "slow.bin", "--bos", "none", "--sequence-length", 16,
                 "--shard-vectors", 32, "--threads", 1]  # fmt: skip
    run(*arguments, "-o", whole)
    return arguments, whole


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def comparable(folder):
    """The bytes, with the command line (it names the output folder, so its length may differ) left out."""
    found = {}
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            assert file.attrs["complete"] == 1
            datasets = {}
            file.visititems(lambda name, item: datasets.update({name: item[:].tobytes()}) if isinstance(item, h5py.Dataset) else None)
            found[path.name] = (datasets, {k: str(v) for k, v in file.attrs.items() if k != "command_line"})
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_run_cut_off_anywhere_and_resumed_ends_with_the_same_bytes(slow, tmp_path, how):
    arguments, _ = slow
    (tmp_path / "w").mkdir()
    run(*arguments, "-o", "a", cwd=tmp_path / "w")
    rng = random.Random(how)
    for attempt in range(2):
        place = tmp_path / str(attempt)
        place.mkdir()
        process = subprocess.Popen([EXTRACT, *map(str, arguments), "-o", "a"], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(rng.uniform(0.2, 1.4))
        process.send_signal(how)
        stderr = process.communicate(timeout=60)[1]
        left = {p.name for p in (place / "a").glob("*")}
        if how == signal.SIGKILL:
            assert process.returncode in (-9, 0)
            assert sum(name.endswith(".partial") for name in left) <= 1
        else:
            # Before it watches for signals, while libraries load, a signal ends it as any program.
            assert process.returncode in (75, 0, -how), stderr
            assert not [name for name in left if name.endswith(".partial")]
            if process.returncode == 75:
                assert "stopped" in stderr and len(stderr.strip().splitlines()) <= 2
        for name in left:
            if name.endswith(".h5"):
                with h5py.File(place / "a" / name) as file:
                    assert file.attrs["complete"] == 1
        before = {p.name: p.stat().st_mtime_ns for p in (place / "a").glob("*.h5")}
        run(*arguments, "-o", "a", "--resume", cwd=place)
        assert contents(place / "a") == contents(tmp_path / "w" / "a")
        assert all((place / "a" / name).stat().st_mtime_ns == at for name, at in before.items())  # finished work is kept


def test_one_file_is_all_or_nothing(slow, tmp_path):
    process = subprocess.Popen([EXTRACT, *map(str, slow[0]), "--batch-size", "1", "-o", tmp_path / "a.h5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not (tmp_path / "a.h5.partial").exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "run it again with" in stderr, stderr
    assert not list(tmp_path.iterdir())


def test_resume_makes_a_damaged_shard_again_and_refuses_another_run(slow, tmp_path):
    arguments, whole = slow
    folder = tmp_path / "a"
    run(*arguments, "-o", folder)
    damaged = folder / "activations-00003.h5"
    damaged.write_bytes(damaged.read_bytes()[:1500])
    (folder / "activations-00007.h5").unlink()
    done = run(*arguments, "-o", folder, "--resume")
    assert "activations-00003.h5" in done.stderr and "made again" in done.stderr
    assert comparable(folder) == comparable(whole)
    assert "nothing was left to do" in run(*arguments, "-o", folder, "--resume").stdout
    before = contents(folder)
    fails(2, "was made with another model, text or settings", *arguments, "-o", folder, "--resume", "--key-stage", "pre_rope")
    fails(2, "holds activations already (--resume goes on with it, --overwrite replaces it)", *arguments, "-o", folder)
    assert contents(folder) == before
    run(*arguments, "-o", folder, "--overwrite", "--shard-vectors", 640)
    assert len(contents(folder)) == 2  # and none of the 40


# --- Bad input ---------------------------------------------------------------------------------------------------------


SHARDS = ["--shard-vectors", 160]


@pytest.fixture(scope="module")
def alone(both, tmp_path_factory):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone") / "shards"
    run(*both, *SHARDS, "-o", folder)
    assert len(list(folder.iterdir())) >= 5
    return comparable(folder)


def launchers():
    yield "torchrun", lambda rank: {"RANK": str(rank), "WORLD_SIZE": "3"}
    yield "srun", lambda rank: {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "7"}
    yield "mpirun", lambda rank: {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "3"}


def start(arguments, environment):
    return subprocess.Popen([EXTRACT, *map(str, arguments)], env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.parametrize("launcher", [name for name, _ in launchers()])
def test_ranks_share_out_the_shards(both, alone, tmp_path, launcher):
    of_rank = dict(launchers())[launcher]
    arguments = [*both, *SHARDS, "-o", tmp_path / "out"]
    processes = [start(arguments, of_rank(rank)) for rank in (1, 2, 0)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert said[0] == said[1] == ("", "") and "wrote" in said[2][0]  # only rank 0 speaks
    assert comparable(tmp_path / "out") == alone
    assert len(list((tmp_path / "out").iterdir())) == len(alone)  # and nothing else is left there


def test_a_rank_that_never_comes_is_named_and_a_resumed_run_completes(both, alone, tmp_path):
    arguments = [*both, *SHARDS, "-o", tmp_path / "out", "--num-ranks", 2, "--rank-timeout", 1, "--rank"]
    done = run(*arguments, 0, code=75)
    assert "rank 1 of 2 was never heard of, missing: " in done.stderr and "activations-00001.h5" in done.stderr, done.stderr
    run(*arguments, 1)
    run(*arguments, 0, "--resume")
    assert comparable(tmp_path / "out") == alone


def torchrun(arguments):
    return [str(Path(sys.executable).with_name("torchrun")), "--no-python", "--nproc-per-node", "2", EXTRACT, *map(str, arguments)]


def mpirun(arguments):
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun here (apt: openmpi-bin)")
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2", EXTRACT, *map(str, arguments)]


@pytest.mark.parametrize("launcher", [pytest.param(torchrun, marks=pytest.mark.slow), mpirun])
def test_a_launcher_shares_the_work_out_and_survives_a_killed_rank(slow, tmp_path, launcher):
    command = launcher([*slow[0], "-o", tmp_path / "out"])
    job = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    alive = tmp_path / "out" / ".rank-00001.alive"
    deadline = time.time() + 60
    while not (alive.exists() and list((tmp_path / "out").glob("*.h5"))) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(int(alive.read_text().split()[1]), signal.SIGKILL)
    said = job.communicate(timeout=60)
    assert job.returncode != 0, said
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.h5")}
    done = subprocess.run(command, text=True, capture_output=True, timeout=60)  # ranks go on unasked
    assert done.returncode == 0 and done.stdout.count("wrote") == 1, done
    assert comparable(tmp_path / "out") == comparable(slow[1])
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == at for name, at in before.items())
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".h5"}


def test_a_killed_rank_is_named_at_once(slow, tmp_path):
    arguments = [*slow[0], "-o", tmp_path / "out", "--num-ranks", 2, "--rank"]
    other = start([*arguments, 1], {})
    first = start([*arguments, 0], {})
    deadline = time.time() + 30
    while not all((tmp_path / "out" / f".rank-0000{rank}.alive").exists() for rank in (0, 1)) and time.time() < deadline:
        time.sleep(0.02)
    other.kill()
    other.communicate()
    text = first.communicate(timeout=60)[1]
    assert first.returncode == 75 and "rank 1 of 2" in text and "missing: " in text, text


def test_ranks_that_make_no_sense_are_refused(both, tmp_path):
    base = [*both, "-o", tmp_path / "out"]
    for arguments, environment, message in (
        (["--rank", 2, "--num-ranks", 2], {}, "rank is 2 of 2"),
        (["--rank", 1], {}, "--rank and --num-ranks go together"),
        ([], {"RANK": "x", "WORLD_SIZE": "2"}, "environment variable RANK is 'x'"),
        ([], {"RANK": "3", "WORLD_SIZE": "2"}, "rank is 3 of 2 (torchrun"),
        (["--rank-timeout", 0], {}, "rank_timeout is 0"),
    ):
        fails(2, message, *base, *arguments, env={**os.environ, **environment})
    fails(2, "one file cannot be shared by 2 ranks", *both, "-o", tmp_path / "out.h5", "--rank", 0, "--num-ranks", 2)


def test_help_version_and_print_config():
    text = run("--help").stdout
    assert "--max-vectors" in text and "Exit codes" in text
    assert run("--version").stdout.startswith("lexico-extract ")
    assert "max_vectors: 7" in run("--print-config", "--max-vectors", "7").stdout


def test_bad_options_are_named(toy, both, tmp_path):
    out = ["-o", tmp_path / "a.h5"]
    model = ["--model", toy / "toy.pt"]
    text = ["--text", toy / "long.txt"]
    config = tmp_path / "c.yaml"
    config.write_text("model: x.pt\nmax_vectrs: 4\n")
    (tmp_path / "plain").write_text("mine")
    (tmp_path / "f.h5").mkdir()
    (tmp_path / "b.h5").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.h5").write_text("mine")
    cases = [
        (2, "model is missing", *text, *out),
        (2, "text is missing", *model, *out),
        (2, "output is missing", *model, *text),
        (2, "dtype is 'bfloat16', must be one of: float16, float32", *model, *text, *out, "--dtype", "bfloat16"),
        (2, "key_stage is 'rope'", *model, *text, *out, "--key-stage", "rope"),
        (2, "bos is 'yes'", *model, *text, *out, "--bos", "yes"),
        (2, "max_vectors is -1, must be >= 0", *model, *text, *out, "--max-vectors", "-1"),
        (2, "max_vectors is 1, but one token has 2 vectors", *model, *text, *out, "--max-vectors", "1"),
        (2, "sequence_length is 65, more than the 64 positions of", *model, *text, *out, "--sequence-length", "65"),
        (2, "device is 'tpu'", *model, *text, *out, "--device", "tpu"),
        (2, "'--max-vector'; the nearest flag is '--max-vectors'", *model, *text, *out, "--max-vector", "9"),
        (2, "two texts are named 'long'", *model, *text, *text, *out),
        (2, "--resume and --overwrite", *model, *text, *out, "--resume", "--overwrite"),
        (2, "c.yaml:2: unknown key 'max_vectrs'; the nearest is 'max_vectors'", "-c", config),
        (2, "is a file; --output must be a folder or end in .h5", *model, *text, "-o", tmp_path / "plain"),
        (2, "is a folder, and its name ends in .h5", *model, *text, "-o", tmp_path / "f.h5"),
        (2, "b.h5: exists", *model, *text, "-o", tmp_path / "b.h5"),
        (2, "mine.h5: is no file of this run", *model, *text, "-o", tmp_path / "other", "--overwrite"),
    ]
    with ThreadPoolExecutor(2) as pool:  # most of the time is libtorch being loaded
        list(pool.map(lambda case: fails(*case), cases))
    assert (tmp_path / "b.h5").read_text() == (tmp_path / "other" / "mine.h5").read_text() == "mine"
    assert not (tmp_path / "a.h5").exists()


def test_bad_models_are_named(toy, tmp_path):
    rest = ["--text", toy / "long.txt", "--tokenizer", toy / "toy.tokenizer.json", "-o", tmp_path / "a.h5"]
    fails(3, "missing.pt: No such file", "--model", tmp_path / "missing.pt", *rest)
    (tmp_path / "cut.pt").write_bytes((toy / "toy.pt").read_bytes()[:3000])
    fails(3, "cut.pt: cannot be read as a TorchScript model", "--model", tmp_path / "cut.pt", *rest)
    toy_model.save(tmp_path / "m.pt", contract="lexico-model 2")
    fails(3, """'contract' is "lexico-model 2", must be "lexico-model 1\"""", "--model", tmp_path / "m.pt", *rest)
    toy_model.save(tmp_path / "m.pt", head_dim=4, rope=dict(kind="none"))
    fails(3, "have shape [2, 1, 2, 64, 8], its lexico.json promises [2, 1, 2, 64, 4]", "--model", tmp_path / "m.pt", *rest, "--batch-size", 1)
    toy_model.save(tmp_path / "m.pt", methods=["forward"])
    fails(2, "has no method 'queries'", "--model", tmp_path / "m.pt", *rest, "--query-moments")
    toy_model.save(tmp_path / "m.pt", bos_id=None)
    fails(2, "has no BOS token: use --bos none", "--model", tmp_path / "m.pt", *rest, "--bos", "always")
    assert not list(tmp_path.glob("a.h5*"))


def test_values_that_cannot_be_stored_are_named(toy, tmp_path):
    rest = ["--token-ids", tmp_path / "ids.bin", "--sequence-length", 8, "--bos", "none", "-o", tmp_path / "a.h5"]
    np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 77], "<i4").tofile(tmp_path / "ids.bin")
    toy_model.save(tmp_path / "nan.pt", model=toy_model.ToyModel(nan_id=77))
    fails(3, "keys of layer 0, token 11", "--model", tmp_path / "nan.pt", *rest)
    toy_model.save(tmp_path / "big.pt", model=toy_model.ToyModel(scale=1e6))
    fails(3, "beyond float16's range of +-65504: store float32 instead (--dtype float32)", "--model", tmp_path / "big.pt", *rest)
    assert not list(tmp_path.glob("a.h5*"))
    run("--model", tmp_path / "big.pt", *rest, "--dtype", "float32")


def test_bad_texts_and_tokenizers_are_named(toy, tmp_path):
    rest = ["--model", toy / "toy.pt", "-o", tmp_path / "a.h5"]
    fails(3, "missing.txt: cannot be read: No such file", *rest, "--text", tmp_path / "missing.txt")
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("")
        fails(3, name, *rest, "--text", tmp_path / name)
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    fails(3, "lines.jsonl: line 2 has no field \"text\" (--field)", *rest, "--text", tmp_path / "lines.jsonl")
    (tmp_path / "cut.jsonl").write_text('{"text": "a"}\n{"text": "b')
    fails(3, "cut.jsonl: line 2", *rest, "--text", tmp_path / "cut.jsonl")
    np.array([1, 2, 260], "<i4").tofile(tmp_path / "large.bin")
    fails(3, "260", *rest, "--token-ids", tmp_path / "large.bin")
    (tmp_path / "odd.bin").write_bytes(b"12345")
    fails(3, "odd.bin", *rest, "--token-ids", tmp_path / "odd.bin")
    toy_model.save_tokenizer(tmp_path / "unigram.json", kind="Unigram")
    fails(3, "--token-ids", *rest, "--text", toy / "long.txt", "--tokenizer", tmp_path / "unigram.json")
    fails(3, "none.json: ", *rest, "--text", toy / "long.txt", "--tokenizer", tmp_path / "none.json")
    toy_model.save(tmp_path / "alone.pt")
    fails(2, "no tokenizer", "--model", tmp_path / "alone.pt", "--text", toy / "long.txt", "-o", tmp_path / "a.h5")
    assert not list(tmp_path.glob("a.h5*"))


# --- Places that cannot be written -------------------------------------------------------------------------------------


def test_places_that_cannot_be_written_are_named(both, tmp_path):
    fails(4, "/dev/full: cannot be written", *both, "-o", "/dev/full")
    fails(4, "/proc/nowhere", *both, "-o", "/proc/nowhere")
    fails(4, "/proc/nowhere", *both, "-o", "/proc/nowhere.h5")
    with open("/dev/full", "w") as full:
        done = subprocess.run([EXTRACT, *map(str, both), "-o", tmp_path / "a.h5"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 4 and "standard output" in done.stderr
    assert (tmp_path / "a.h5").exists()  # the work is kept, only its verdict could not be said


def test_a_folder_without_permission_is_named(toy):
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: that one belongs to one user alone
        place = Path(name)
        place.chmod(0o755)
        for file in ("toy.pt", "toy.tokenizer.json", "long.txt"):
            shutil.copy(toy / file, place)
        (place / "locked").mkdir(mode=0o555)
        someone = dict(user=65534, group=65534, extra_groups=[]) if os.geteuid() == 0 else {}  # root may write everywhere
        for out in ("locked/a.h5", "locked/new"):
            try:
                fails(4, "Permission denied", "--model", place / "toy.pt", "--text", place / "long.txt", "-o", place / out, **someone)
            except PermissionError:
                pytest.skip(f"another user may not run {EXTRACT}")


def test_a_full_disk_leaves_no_file(both, tmp_path):
    # The shell's file size limit stands in for a full disk: writes beyond it fail.
    done = subprocess.run(["bash", "-c", 'ulimit -f 20; trap "" XFSZ; exec "$0" "$@"', EXTRACT, *map(str, both), "-o", tmp_path / "a.h5"],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "a.h5" in done.stderr and not list(tmp_path.iterdir())


def test_a_full_file_system_is_said_before_the_work(toy, both, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], capture_output=True).returncode != 0:
        pytest.skip("a small file system can be mounted by root only")
    try:
        fails(4, "are free (--max-vectors sets a budget)", *both, "-o", place / "a.h5")
        plan = run(*both, "-o", place / "a.h5", "--dry-run").stdout
        assert "does not fit" in plan
        assert not list(place.iterdir())
    finally:
        subprocess.run(["umount", place], check=True)
