"""lexico-bench as its user meets it: the real binary, its numbers, and what it says to bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
import programs  # noqa: E402

BENCH = str(Path(os.environ["LEXICO_BIN"]) / "lexico-bench")
ROOT = Path(__file__).resolve().parents[3]
QUICK = ["--repeats", "1", "--threads", "2"]


def run(*arguments, **options):
    environment = {k: v for k, v in os.environ.items() if k != "LEXICO_CPU"} | options.pop("env", {})
    return programs.run(BENCH, *arguments, env=environment, **options)


def fails(code, message, *arguments, **options):
    done = run(*arguments, code=code, **options)
    assert message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("case") / "case.safetensors"
    tensors = {"atoms": unit(rng.standard_normal((256, 48))).astype(np.float32), "signals": rng.standard_normal((700, 48)).astype(np.float32)}
    tensors["signals"][3, 5] = np.nan
    save_file(tensors, str(path))
    return path


def results(*arguments, **options):
    return [json.loads(line) for line in run("encode", "--json", *QUICK, *arguments, **options).stdout.splitlines()]


def test_json_says_what_was_measured(case):
    omp, ols = results("--case", case, "--sparsity", 5, "--selection", "omp", "ols", "--check", 100)
    assert (omp["num_atoms"], omp["dim"], omp["num_signals"], omp["sparsity"], omp["threads"]) == (256, 48, 700, 5, 2)
    assert (omp["selection"], ols["selection"]) == ("omp", "ols")
    assert omp["vectors_per_s"] == pytest.approx(700 / omp["seconds"][0])
    assert omp["not_finite"] == 1 and omp["mean_atoms"] == 5
    assert ols["mean_relative_error"] < omp["mean_relative_error"] < 0.8
    assert omp["input_bytes"] == case.stat().st_size
    assert 0 < omp["workspace_bytes"] < omp["peak_memory_bytes"] < 200e6
    for result in (omp, ols):
        assert result["check"] == {"signals": 100, "identical_sequences": pytest.approx(0.99), "error_ratio": pytest.approx(1, abs=1e-5)}


def test_error_is_that_of_scikit_learn(case):
    sklearn = pytest.importorskip("sklearn.linear_model")
    from safetensors.numpy import load_file

    tensors = load_file(str(case))
    d, x = tensors["atoms"].astype(np.float64), np.delete(tensors["signals"], 3, axis=0).astype(np.float64)
    y = sklearn.orthogonal_mp(d.T, x.T, n_nonzero_coefs=5).T @ d
    want = (np.linalg.norm(x - y, axis=1) / np.linalg.norm(x, axis=1)).mean()
    assert results("--case", case, "--sparsity", 5)[0]["mean_relative_error"] == pytest.approx(want, rel=1e-5)


def test_curve_is_the_error_at_every_smaller_sparsity(case):
    curve = results("--case", case, "--sparsity", 6, "--curve")[0]["curve"]
    assert len(curve) == 6
    for s in (1, 4, 6):
        assert results("--case", case, "--sparsity", s)[0]["mean_relative_error"] == pytest.approx(curve[s - 1], rel=1e-6)


def test_every_level_has_the_same_error(case):
    best = results("--case", case)[0]
    errors = {}
    for level in ("generic", "avx2", "avx512", "avx512vnni", "amx"):
        done = subprocess.run([BENCH, "encode", "--json", *QUICK, "--case", str(case), "--cpu", level], capture_output=True, text=True)
        if done.returncode == 0:
            result = json.loads(done.stdout)
            assert result["level"] == level
            errors[level] = result["mean_relative_error"]
        else:
            assert done.returncode == 2 and "this CPU cannot run" in done.stderr, done.stderr
    assert best["level"] in errors and "generic" in errors
    assert max(errors.values()) == pytest.approx(min(errors.values()), rel=1e-6)
    assert results("--case", case, env={"LEXICO_CPU": "generic"})[0]["level"] == "generic"


def test_batches_do_not_change_the_codes(case):
    whole, split = results("--case", case)[0], results("--case", case, "--batch-size", 37)[0]
    assert whole["mean_relative_error"] == split["mean_relative_error"]


def test_random_case_and_table():
    out = run("encode", "--num-atoms", 128, "--dim", 32, "--num-signals", 500, "--threads", "1,2", "--repeats", 1).stdout
    assert "500 signals of dimension 32, 128 atoms" in out and "vectors/s" in out


def test_memory_at_4096_atoms():
    result = results("--num-atoms", 4096, "--dim", 128, "--num-signals", 4000)[0]
    assert result["peak_memory_bytes"] - result["input_bytes"] < 200e6


def test_bad_input_is_named(case, tmp_path):
    fails(2, "must be: encode, attend or prefill")
    fails(2, "context is 0, must be >= 1", "attend", "--context", 0)
    fails(2, "format is 'exact'", "attend", "--format", "exact")
    fails(2, "key stage", "attend", "--key-stage", "rope")
    fails(2, "LEXICO_CPU is 'mmx'", "attend", "--cpu", "mmx")
    fails(2, "max_atoms is 17, must be in [0, 16]", "attend", "--sparsity", 17, "--dim", 16)
    fails(2, "tokens is 0, must be >= 1", "prefill", "--tokens", 0)
    fails(2, "format is 'exact', must be packed or fp8-int16", "prefill", "--format", "exact")
    fails(2, "ols-99", "prefill", "--selection", "ols-99")
    fails(2, "LEXICO_CPU is 'mmx'", "prefill", "--cpu", "mmx")
    fails(2, "max_atoms is 17, must be in [0, 16]", "prefill", "--sparsity", 17, "--dim", 16)
    fails(2, "'decode' is nothing to measure", "decode")
    fails(2, "ols-99", "encode", "--selection", "ols-99")
    fails(2, "repeats is 0", "encode", "--repeats", 0)
    fails(2, "LEXICO_CPU is 'mmx'", "encode", "--cpu", "mmx")
    fails(2, "sparsity is 49, must be in [1, 48]", "encode", "--case", case, "--sparsity", 49)
    fails(2, "sparsty", "encode", "--set", "sparsty=4")
    fails(3, "nowhere.safetensors", "encode", "--case", tmp_path / "nowhere.safetensors")
    (tmp_path / "short.safetensors").write_bytes(case.read_bytes()[:5000])
    fails(3, "truncated", "encode", "--case", tmp_path / "short.safetensors")
    tensors = {"atoms": np.ones((4, 8), np.float32), "signals": np.ones((2, 8), np.float32)}
    save_file(tensors, str(tmp_path / "long.safetensors"))
    fails(3, "atom 0 has norm 2.8", "encode", "--case", tmp_path / "long.safetensors")
    save_file({"atoms": np.eye(8, dtype=np.float32), "signals": np.ones((2, 9), np.float32)}, str(tmp_path / "other.safetensors"))
    fails(3, "signals have dimension 9, atoms 8", "encode", "--case", tmp_path / "other.safetensors")
    save_file({"atoms": np.eye(8, dtype=np.float32)}, str(tmp_path / "none.safetensors"))
    fails(3, "no tensor 'signals'", "encode", "--case", tmp_path / "none.safetensors")


def test_help_teaches():
    assert "lexico-bench encode|attend|prefill [options]" in run("--help").stdout
    out = run("encode", "--help").stdout
    assert "--selection" in out and "Examples:" in out and "avx512vnni, amx" in out
    assert run("--version").stdout.startswith("lexico-bench ")


def test_comparison_with_peers_runs(tmp_path):
    pytest.importorskip("spams")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/against_peers.py"), "--bench", BENCH, "--folder", str(tmp_path), "--cases", "m64_N1024_s8", "--families",
         "coherent", "--signals", "500", "--rounds", "1", "--selection", "ols", "--json"], capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["error"] == pytest.approx(row["peer_error"], rel=1e-3)
    assert row["ratio"] > 0


SMALL = ["--num-atoms", 256, "--dim", 64, "--kv-heads", 2, "--context", "300,700", "--least-ms", 0, "--repeats", 2]


def test_attend_says_what_was_measured():
    for stage in ("post_rope", "pre_rope"):
        rows = [json.loads(line) for line in run("attend", "--json", "--key-stage", stage, "--sparsity", "4,6", *SMALL).stdout.splitlines()]
        rounds, results = rows[:8], rows[8:]
        assert [(r["context"], r["sparsity"]) for r in results] == [(300, 4), (700, 4), (300, 6), (700, 6)]
        for i, result in enumerate(results):
            assert result["all_ms"] == [r["ms"] for r in rounds[i::4]] and min(result["all_ms"]) > 0
            assert len(result["all_append_ms"]) == 2 and min(result["all_append_ms"]) > 0 and result["layers"] > 1
        # One page of 1024 tokens for keys and one for values, of 8 + s * (8 + 5) bits a vector.
        assert results[0]["coded_bytes"] == 2 * (2 * 1024 * (8 + 4 * 13) // 8 + 32)
    assert "700   4" in run("attend", "--sparsity", "4", "--format", "fp8-int16", *SMALL).stdout


def test_attend_leaves_appending_out_when_told():
    row = json.loads(run("attend", "--json", "--compress-chunk", 0, *SMALL).stdout.splitlines()[-1])
    assert row["ms"] > 0 and "append_ms" not in row


PROMPTS = ["--num-atoms", 256, "--dim", 64, "--kv-heads", 2, "--tokens", "100,300", "--least-ms", 0, "--repeats", 2]


def test_prefill_says_what_was_measured():
    for stage in ("post_rope", "pre_rope"):
        lines = run("prefill", "--json", "--key-stage", stage, "--sparsity", "4,6", "--format", "packed", "--format", "fp8-int16", "--layers", 10, *PROMPTS).stdout
        rows = [json.loads(line) for line in lines.splitlines()]
        rounds, results = rows[:16], rows[16:]
        assert [(r["format"], r["sparsity"], r["tokens"]) for r in results] == [
            (f, s, t) for f in ("packed", "fp8-int16") for s in (4, 6) for t in (100, 300)]  # fmt: skip
        for i, result in enumerate(results):
            assert result["all_ms"] == [r["ms"] for r in rounds[i::8]] and min(result["all_ms"]) > 0
            assert result["coded_tokens"] == max(0, result["tokens"] - 128)  # the window is 128
            assert result["vectors_per_s"] == pytest.approx(2 * 2 * result["coded_tokens"] * 1e3 / result["ms"])
            assert result["layer_tokens_per_s"] == pytest.approx(result["tokens"] * 1e3 / result["ms"])
            assert result["model_tokens_per_s"] == pytest.approx(result["layer_tokens_per_s"] / 10)
        assert results[1]["ms"] > results[0]["ms"]  # the shorter prompt fits the window
    assert " 300   4  packed" in run("prefill", "--sparsity", "4", *PROMPTS).stdout


@pytest.mark.parametrize("script, words", [("attend", ["--context", "200,400"]), ("prefill", ["--tokens", "100,300"])])
def test_comparison_with_torch_runs(tmp_path, script, words):
    out = tmp_path / ("out" if script == "attend" else "out.json")
    done = subprocess.run([sys.executable, str(ROOT / f"bench/{script}_against_torch.py"), "--bench", BENCH, *words, "--num-atoms", "256", "--dim", "64",
                           "--kv-heads", "2", "--sparsity", "4", "--least-ms", "0", "--rounds", "2", "--out", str(out)], capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "s = 4" in done.stdout and "torch bf16" in done.stdout
    found = json.loads((out / "attend.json" if script == "attend" else out).read_text())
    assert all(row["ms"] > 0 for row in found["dense"] + found["coded"])


def test_attend_takes_turns():
    rows = run("attend", "--json", "--turns", *SMALL, input="\n").stdout.splitlines()
    assert len(rows) == 2 + 2  # the second round was not asked for
