"""What --dry-run promises against what runs then use: memory and disk within 20 %. Times are for a quiet machine: they are printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import programs  # noqa: E402
import toy_model  # noqa: E402

BIN = Path(os.environ["LEXICO_BIN"]).resolve()
TIME = "/usr/bin/time"
torch.set_num_threads(1)
needs_time = pytest.mark.skipif(not Path(TIME).exists(), reason=f"there is no {TIME}")


def peak_bytes(command):
    """Of a run: as its own parent sees it, since a child of this process begins with this process's peak."""
    done = subprocess.run([TIME, "-f", "%M", *map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stderr.splitlines()[-1])


def disk_bytes(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def within_a_fifth(what, planned, used):
    print(f"\n{what}: planned {planned / 1e6:.1f} MB, used {used / 1e6:.1f} MB, ratio {planned / used:.3f}")
    assert 0.8 < planned / used < 1.2, what


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """A dump of so many tokens: 2 layers, 2 heads of dim 64, noise."""
    folder = tmp_path_factory.mktemp("dumps")

    def dump(tokens):
        path = folder / f"{tokens}.h5"
        if path.exists():
            return path
        rng = np.random.default_rng(0)
        with h5py.File(path, "w") as file:
            file.attrs.update(contract="lexico-activations 1", model="org/tiny", key_stage="post_rope", dtype="float16",
                              num_layers=2, kv_heads=2, head_dim=64, num_tokens=tokens, plan_hash="test", complete=True)  # fmt: skip
            for layer in range(2):
                for kind in ("keys", "values"):
                    vectors = rng.standard_normal((2 * tokens, 64), np.float32).astype(np.float16)
                    file.create_dataset(f"layers/{layer:02d}/{kind}", data=vectors, chunks=(2048, 64))
            for name in ("id", "position", "document"):
                file.create_dataset(f"tokens/{name}", data=np.zeros(tokens, np.int32))
        return path

    return dump


def train(data, out, *options):
    return [BIN / "lexico-train", "--data", data, "-o", out, *options]


SIZES = {
    "many atoms": ["--num-atoms", 4096, "--sparsity", 8, "--vectors", 8192, "--coding", "exact", "--validation-vectors", 2000],
    "sums of online": ["--num-atoms", 2048, "--sparsity", 4, "--vectors", 16384, "--recipe", "online", "--coding", "exact"],
    "large batches": ["--num-atoms", 256, "--sparsity", 3, "--vectors", 131072, "--batch-size", 32768, "--pool-mib", 8, "--coding", "exact"],
    "packed codes": ["--num-atoms", 256, "--vectors", 20000, "--code-vectors", 2048],
    "as published": ["--num-atoms", 1024, "--vectors", 20000, "--recipe", "lexico"],
}  # fmt: skip


@needs_time
@pytest.mark.parametrize("size", SIZES)
def test_training_uses_what_the_plan_says(dumps, tmp_path, size):
    command = train(dumps(30000), tmp_path / "run", *SIZES[size])
    plan = json.loads(programs.run(*command, "--dry-run", "--json").stdout)
    assert [phase["name"] for phase in plan["phases"]] == ["reading", "training", "codes", "report"] and plan["fits"]
    assert not (tmp_path / "run").exists()
    used = peak_bytes(command)
    phases = json.loads((tmp_path / "run/run.json").read_text())["phases"]
    print("\n" + ", ".join(f"{p['name']}: planned {p['seconds']:.2f} s, took {phases[p['name']]:.2f} s" for p in plan["phases"]))
    within_a_fifth(f"memory, {size}", plan["memory_bytes"], used)
    within_a_fifth(f"disk, {size}", plan["disk_left_bytes"], disk_bytes(tmp_path / "run"))
    newest = max((tmp_path / "run/checkpoints").iterdir())
    assert newest.stat().st_size == pytest.approx(plan["checkpoint_bytes"], rel=0.01)


def test_a_run_that_does_not_fit_says_so_before_it_starts(dumps, tmp_path):
    command = train(dumps(3000), tmp_path / "run", "--num-atoms", 1000000, "--sparsity", 1, "--recipe", "online")
    done = programs.run(*command, code=4)
    assert "of memory, but" in done.stderr and "num_atoms" in done.stderr, done.stderr
    plan = json.loads(programs.run(*command, "--dry-run", "--json").stdout)
    assert not plan["fits"] and plan["memory_bytes"] > 1e13
    assert "does not fit" in programs.run(*command, "--dry-run").stdout
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy_model.save(folder / "toy.pt")

    def extract(tokens, out, *options):
        np.arange(tokens, dtype="<i4").__mod__(250).astype("<i4").tofile(folder / f"{tokens}.bin")
        return [BIN / "lexico-extract", "--model", folder / "toy.pt", "--token-ids", folder / f"{tokens}.bin", "--bos", "none",
                "--sequence-length", 64, "-o", out, *options]  # fmt: skip

    return extract


@needs_time
@pytest.mark.parametrize("tokens, options", [(640, ["--shard-vectors", 128]), (200000, []), (200000, ["--batch-tokens", 65536])])
def test_extraction_uses_what_the_plan_says(toy, tmp_path, tokens, options):
    command = toy(tokens, tmp_path / "out", *options)
    plan = json.loads(programs.run(*command, "--dry-run", "--json").stdout)
    assert [phase["name"] for phase in plan["phases"]] == ["reading", "extracting"] and plan["fits"]
    used = peak_bytes(command)
    within_a_fifth("memory", plan["memory_bytes"], used)
    assert disk_bytes(tmp_path / "out") <= plan["bytes"] <= 1.02 * disk_bytes(tmp_path / "out")


@needs_time
def test_training_memory_does_not_grow_with_the_dump(dumps, tmp_path):
    options = ["--num-atoms", 256, "--sparsity", 3, "--vectors", 60000, "--pool-mib", 8, "--coding", "exact", "--validation-vectors", 2000]
    small, large = (peak_bytes(train(dumps(tokens), tmp_path / str(tokens), *options)) for tokens in (30000, 300000))
    print(f"\npeak {small / 1e6:.0f} MB, of ten times the dump {large / 1e6:.0f} MB")
    assert large < 1.05 * small
