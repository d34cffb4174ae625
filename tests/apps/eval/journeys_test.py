"""lexico-eval as its user meets it: the real binary on small files, the numbers it finds, and what it says to bad input."""

import csv
import json
import os
import resource
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
sys.path.insert(0, str(Path(__file__).resolve().parent))
import activations  # noqa: E402
import programs  # noqa: E402
import toy_model  # noqa: E402

EVAL, EXTRACT = (str(Path(os.environ["LEXICO_BIN"]) / name) for name in ("lexico-eval", "lexico-extract"))
LAYERS, DIM, ATOMS = 2, 16, 48
torch.set_num_threads(1)


def run(*arguments, **options):
    return programs.run(EVAL, *arguments, **options)


def fails(code, *messages, arguments, **options):
    done = run(*arguments, code=code, **options)
    last = done.stderr.strip().splitlines()[-1]
    for message in messages:
        assert str(message) in last, done.stderr
    assert done.stdout == ""


def all_fail(*cases):
    """Each case is (code, messages..., arguments); starting a program takes longer than what it then does."""
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(fails, *case[:-1], arguments=case[-1]) for case in cases]:
            future.result()


def reports_of(*argument_lists):
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda arguments: report_of(*arguments), argument_lists))


def report_of(*arguments, **options):
    return json.loads(run(*arguments, "--json", **options).stdout)


def rows_of(report, **wanted):
    return [row for row in report["rows"] if all(row[key] == value for key, value in wanted.items())]


def unit_atoms(rng, layers=LAYERS, dim=DIM, atoms=ATOMS):
    made = rng.standard_normal((2 * layers, atoms, dim))
    return (made / np.linalg.norm(made, axis=2, keepdims=True)).astype(np.float32)


def write_dictionaries(folder, layers=LAYERS, dim=DIM, atoms=ATOMS, seed=1, **metadata):
    """The same atoms in both file formats."""
    folder.mkdir(parents=True, exist_ok=True)
    made = unit_atoms(np.random.default_rng(seed), layers, dim, atoms)
    tensors = {f"layers.{i // 2:02d}.{'values' if i % 2 else 'keys'}.atoms": made[i] for i in range(2 * layers)}
    save_file(tensors, folder / "dictionary.safetensors",
              metadata={"format": "lexico-dictionary 1", "key_stage": "post_rope", "model": "org/tiny", "model_sha256": "0" * 64, **metadata})  # fmt: skip
    torch.save(torch.from_numpy(made).transpose(1, 2).contiguous(), folder / "dictionary.pt")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    write_dictionaries(folder / "run")
    activations.write(folder / "wiki.h5", tokens=1500, dim=DIM)
    activations.write(folder / "code.h5", tokens=700, dim=DIM, seed=5)
    return folder


def measure(home):
    return ["--data", home / "wiki.h5", "--ood", home / "code.h5", "--sparsity", "2,4,8"]


@pytest.fixture(scope="module")
def report(home):
    return report_of("--dictionary", home / "run", *measure(home))


def test_coders_are_compared_at_equal_bits(home):
    found = report_of("--dictionary", home / "run", *measure(home), "--fit", home / "code.h5", "--bits", "2,3", "--fit-vectors", 1024)
    lines = {}
    for rate in found["rates"]:
        if (rate["dataset"], rate["layer"], rate["kind"]) == ("wiki", 0, "keys"):
            lines.setdefault(rate["coder"], {})[rate["bits_per_vector"]] = rate["mean"]
    assert set(lines) == {"dictionary, fp8-int16", "dictionary, fitted", "PCA transform coding", "rotation + Lloyd-Max", "min/max"}
    assert set(lines["dictionary, fitted"]) == set(lines["PCA transform coding"]) == {2 * DIM, 3 * DIM}
    assert set(lines["dictionary, fp8-int16"]) == {24 * s + 16 for s in (2, 4, 8)}
    for coder, line in lines.items():
        errors = [line[bits] for bits in sorted(line)]
        assert errors == sorted(errors, reverse=True) and 0 < errors[-1] < 1, coder
    before = {r["sparsity"]: r["mean"] for r in rows_of(found, dataset="wiki", layer=0, kind="keys", coder="dictionary")}
    for s in (2, 4):  # rounding to 8 bits costs little
        assert before[s] <= lines["dictionary, fp8-int16"][24 * s + 16] * 1.0001 < before[s] * 1.1
    base = ["--dictionary", home / "run", *measure(home)]
    fails(2, "sparse_autoencoder needs data", arguments=[*base, "--sparse-autoencoder"])
    fails(2, "perplexity needs text", arguments=[*base, "--perplexity"])
    fails(2, "bits is 0", arguments=[*base, "--bits", 0])


def test_moved_keys_are_another_data_set_and_need_a_rope(home):
    rope = json.dumps({"kind": "default", "layout": "half", "rotary_dim": DIM, "attention_scaling": 1.0,
                       "inverse_frequencies": [10.0 ** -(i / 4) for i in range(DIM // 2)]})  # fmt: skip
    known = activations.write(home / "known.h5", tokens=300, dim=DIM, rope=rope)
    write_dictionaries(home / "pre", key_stage="pre_rope")
    base = ["--data", f"wiki={known}", "--sparsity", "4", "--position-offset", 1000, "--no-baselines"]
    found = report_of("--dictionary", f"post={home / 'run'}", f"pre={home / 'pre'}", *base)
    error = {(r["dataset"], r["coder"]): r["mean"] for r in found["rows"] if (r["layer"], r["kind"]) == (0, "keys")}
    assert error["wiki+1000", "pre"] == pytest.approx(error["wiki", "pre"], rel=1e-3)
    assert error["wiki+1000", "post"] != pytest.approx(error["wiki", "post"], rel=1e-3)
    assert not rows_of(found, dataset="wiki+1000", kind="values")
    summary = next(s for s in found["summary"] if s["coder"] == "post")
    both = [r["mean"] for r in rows_of(found, dataset="wiki", coder="post", kind="keys")]
    assert summary["in_domain"]["keys"] == pytest.approx(np.mean(both))  # moved sets are in no domain's mean
    fails(3, "no RoPE", arguments=["--dictionary", home / "run", "--data", home / "wiki.h5", "--sparsity", 4, "--position-offset", 10])


@pytest.mark.parametrize("max_vectors", [0, 500])
def test_errors_are_those_of_scikit_learn(home, tmp_path, max_vectors):
    pytest.importorskip("sklearn")
    import check_with_sklearn

    data = activations.write(tmp_path / "small.h5", tokens=200) if max_vectors == 0 else home / "wiki.h5"
    found = report_of("--dictionary", home / "run/dictionary.pt", "--data", data, "--sparsity", "2,4,8", "--max-vectors", max_vectors)
    rows, worst = check_with_sklearn.compare(found, home / "run/dictionary.pt", max_vectors, log=lambda line: None)
    assert rows == LAYERS * 2 * 3
    assert worst < 1e-3
    assert rows_of(found, coder="dictionary")[0]["vectors"] == (max_vectors or 400)


def test_both_dictionary_formats_and_the_run_folder_agree(home, report):
    for other in reports_of(*([*measure(home), "-d", home / "run" / name] for name in ("dictionary.safetensors", "dictionary.pt"))):
        assert other["rows"] == report["rows"]


def test_the_report_compares_domains_baselines_and_bytes(report):
    assert [d["name"] for d in report["datasets"]] == ["wiki", "code"]
    assert [d["in_domain"] for d in report["datasets"]] == [True, False]
    assert {c["role"] for c in report["coders"]} == {"dictionary", "random", "samples"}
    assert len(report["rows"]) == 2 * LAYERS * 2 * 3 * 3
    summary = {(s["coder"], s["sparsity"]): s for s in report["summary"]}
    four = summary["dictionary", 4]
    assert four["bytes_per_vector"] == 3 * 4 + 2
    assert four["share_of_fp16"] == pytest.approx(14 / (2 * DIM))
    keys = [r["mean"] for r in rows_of(report, coder="dictionary", dataset="wiki", kind="keys", sparsity=4)]
    assert four["in_domain"]["keys"] == pytest.approx(np.mean(keys))
    assert four["out_over_in"] == pytest.approx(four["out_of_domain"]["both"] / four["in_domain"]["both"])
    for row in report["rows"]:
        assert 0 < row["median"] < row["p99"] and 0 < row["mean"] < 1
    assert report["weights_quantized"] is False


def test_samples_are_not_measured_on_themselves(report):
    for row in rows_of(report, coder="samples"):
        left_out = 2 * (ATOMS // 2 + ATOMS // 20 + 1)
        assert row["vectors"] == (3000 - left_out if row["dataset"] == "wiki" else 1400)
        assert row["median"] > 0.01


def test_too_few_samples_are_said_and_not_fatal(home, tmp_path):
    small = activations.write(tmp_path / "small.h5", tokens=40)
    done = run("--dictionary", home / "run", "--data", small, "--sparsity", "4", "--json")
    found = json.loads(done.stdout)
    assert {c["role"] for c in found["coders"]} == {"dictionary", "random"}
    assert "No baseline of plain samples" in found["notes"][0] and "80" in found["notes"][0]
    assert "No baseline of plain samples" in done.stderr


def test_a_table_on_stdout_and_three_files_in_the_output(home, tmp_path):
    done = run("--dictionary", home / "run", "--data", home / "wiki.h5", "--ood", "programs=" + str(home / "code.h5"),
               "--sparsity", "8,4,4", "-o", tmp_path / "out")  # fmt: skip
    lines = done.stdout.strip().splitlines()
    assert lines[-1].startswith("s=8: relative error keys 0.") and "out of domain" in lines[-1]
    assert "before the weights are quantized" in done.stdout and "programs*" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.csv", "report.html", "report.json"]
    found = json.loads((tmp_path / "out/report.json").read_text())
    with open(tmp_path / "out/report.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found["rows"]) == 2 * LAYERS * 2 * 3 * 2
    assert float(table[0]["mean"]) == pytest.approx(found["rows"][0]["mean"], rel=1e-6)
    assert found["verdict"] == lines[-1]
    assert str(home / "wiki.h5") in found["command"]
    page = (tmp_path / "out/report.html").read_text()
    assert found["command"].split()[0] in page and "://" not in page.replace(str(tmp_path), "")


def test_a_folder_of_shards_and_a_glob_are_one_data_set(home, tmp_path):
    for index in range(2):
        activations.write(tmp_path / f"part-{index}.h5", tokens=300, seed=index, shard_index=index, shard_count=2)
    folder, glob = reports_of(*(["--dictionary", home / "run", "--data", path, "--sparsity", "4"] for path in (tmp_path, f"{tmp_path}/*.h5")))
    assert folder["rows"] == glob["rows"]
    here = report_of("--dictionary", home / "run", "--data", "*.h5", "--sparsity", "4", cwd=tmp_path)
    assert here["rows"] == folder["rows"]
    assert folder["datasets"][0]["name"] == tmp_path.name
    assert folder["datasets"][0]["vectors_per_layer_and_kind"] == 1200


def test_layers_narrow_the_report_and_the_result_does_not_depend_on_threads(home, report):
    one = report_of("--dictionary", home / "run", "--data", home / "wiki.h5", "--ood", home / "code.h5", "--sparsity", "2,4,8",
                    "--layers", "1", "--threads", "1")  # fmt: skip
    assert one["layers"] == [1]
    assert one["rows"] == rows_of(report, layer=1)


def test_ols_is_better_than_omp_and_a_tolerance_saves_atoms(home, report):
    base = ["--dictionary", home / "run", "--data", home / "wiki.h5", "--no-baselines"]
    omp, ols, lazy = reports_of(*([*base, "--sparsity", "8", *more] for more in ([], ["--selection", "ols"], ["--tolerance", "0.4"])))
    assert np.mean([r["mean"] for r in ols["rows"]]) < np.mean([r["mean"] for r in omp["rows"]])
    assert ols["selection"] == "ols"
    assert all(r["mean_atoms"] < 8 and r["bytes_per_vector"] < 26 and r["p99"] <= 0.45 for r in lazy["rows"])


def test_several_dictionaries_are_compared(home, tmp_path):
    write_dictionaries(tmp_path / "other", atoms=96, seed=3)
    found = report_of("-d", home / "run", "-d", "wide=" + str(tmp_path / "other"), "--data", home / "wiki.h5", "--sparsity", "4")
    assert [c["name"] for c in found["coders"]] == ["run", "wide", "samples", "random"]
    mean = lambda name: np.mean([r["mean"] for r in rows_of(found, coder=name)])  # noqa: E731
    assert mean("wide") < mean("run")


def test_nan_vectors_are_counted_and_left_out(home, tmp_path):
    def spoil(layer, kind, vectors):
        if (layer, kind) == (1, "keys"):
            vectors[7, 3], vectors[20, 0] = np.nan, np.inf
        return vectors

    bad = activations.write(tmp_path / "bad.h5", tokens=500, change=spoil)
    done = run("--dictionary", home / "run", "--data", bad, "--sparsity", "4", "--json")
    found = json.loads(done.stdout)
    assert found["datasets"][0]["not_finite"] == 2
    assert "layer 1 keys: 2" in found["notes"][0] and "layer 1 keys: 2" in done.stderr
    assert rows_of(found, coder="dictionary", layer=1, kind="keys")[0]["vectors"] == 998
    assert rows_of(found, coder="dictionary", layer=1, kind="values")[0]["vectors"] == 1000

    def ruin(layer, kind, vectors):
        return np.full_like(vectors, np.nan) if (layer, kind) == (1, "values") else vectors

    ruined = activations.write(tmp_path / "ruined.h5", tokens=500, change=ruin)
    fails(3, ruined, "layer 1 values", "NaN", arguments=["--dictionary", home / "run", "--data", ruined, "--sparsity", "4"])


def test_zero_vectors_have_no_error(home, tmp_path):
    zeros = activations.write(tmp_path / "zeros.h5", tokens=200, change=lambda layer, kind, vectors: vectors * 0)
    found = report_of("--dictionary", home / "run", "--data", zeros, "--sparsity", "4")
    assert all(r["mean"] == 0 and r["p99"] == 0 for r in rows_of(found, coder="dictionary"))


TEXTS = ["The first document is about owls.", "Short.", "A third one, quite a bit longer than the others: " + "owls and mice " * 80]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A model with its tokenizer beside it, a text for it, and dictionaries of its size for both key stages."""
    folder = tmp_path_factory.mktemp("toy")
    toy_model.save(folder / "toy.pt")
    toy_model.save_tokenizer(folder / "toy.tokenizer.json")
    (folder / "text.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    np.random.default_rng(4).integers(0, 256, 1000).astype(np.int32).tofile(folder / "ids.bin")
    for stage in ("post_rope", "pre_rope"):
        write_dictionaries(folder / stage, dim=toy_model.DIM, key_stage=stage, model_sha256="")
    return folder


@pytest.mark.parametrize("stage", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("source", [["--text", "text.jsonl", "--field", "body"], ["--token-ids", "ids.bin", "--bos", "document"]])
def test_text_is_measured_as_what_lexico_extract_makes_of_it(toy, tmp_path, stage, source):
    """The same flags pack the same sequences: the model on the fly and the activation file give the same report."""
    text = [source[0], toy / source[1], *source[2:], "--model", toy / "toy.pt", "--sequence-length", "48"]
    subprocess.run([EXTRACT, *map(str, text), "--output", tmp_path / "x.h5", "--key-stage", stage, "--dtype", "float32"], check=True, capture_output=True)
    base = ["--dictionary", toy / stage, "--sparsity", "3", "--max-vectors", "0", "--no-baselines"]
    on_the_fly, from_file = reports_of([*base, *text], [*base, "--data", tmp_path / "x.h5"])
    assert len(on_the_fly["rows"]) == 2 * toy_model.LAYERS
    assert on_the_fly["datasets"][0]["tokens"] == from_file["datasets"][0]["tokens"] > 1000
    for a, b in zip(on_the_fly["rows"], from_file["rows"]):
        assert (a["layer"], a["kind"], a["vectors"]) == (b["layer"], b["kind"], b["vectors"])
        assert [a[k] for k in ("mean", "median", "p99")] == pytest.approx([b[k] for k in ("mean", "median", "p99")], rel=1e-5)
    assert on_the_fly["settings"]["bos"] == ("always" if "--text" in source else "document")
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]  # nothing was left behind


def test_a_budget_takes_sequences_from_all_over_the_text(toy):
    found = report_of("--dictionary", toy / "post_rope", "--data", toy / "ids.bin", "--model", toy / "toy.pt", "--bos", "none",
                      "--sequence-length", "48", "--sparsity", "3", "--max-vectors", "500")  # fmt: skip
    assert found["datasets"][0]["vectors_per_layer_and_kind"] == 500
    assert "6 of 21 evenly spread sequences" in found["datasets"][0]["sampling"]


def test_text_that_cannot_be_used_is_named(toy, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "ids.bin").write_bytes(np.array([1, 2, 999], np.int32).tobytes())
    (tmp_path / "alone.pt").write_bytes((toy / "toy.pt").read_bytes())
    (tmp_path / "cut.pt").write_bytes((toy / "toy.pt").read_bytes()[:2000])
    write_dictionaries(tmp_path / "wide", dim=16)
    write_dictionaries(tmp_path / "deep", dim=toy_model.DIM, layers=3)
    base = ["--sparsity", "3", "-d", toy / "post_rope"]
    text, model = ["--data", toy / "ids.bin"], ["--model", toy / "toy.pt"]
    all_fail(
        (2, "empty.txt", "is text", "--model", [*base, "--data", tmp_path / "empty.txt"]),
        (3, "empty.txt", "holds no text", [*base, *model, "--data", tmp_path / "empty.txt"]),
        (3, "blank.txt", "holds no text", [*base, *model, "--ood", tmp_path / "blank.txt"]),
        (3, "none.txt", [*base, *model, "--text", tmp_path / "none.txt"]),
        (3, "text.jsonl", "line 1", "body", [*base, *model, "--text", toy / "text.jsonl"]),
        (2, "tokenizer.json", "--token-ids", [*base, "--model", tmp_path / "alone.pt", "--text", toy / "text.jsonl"]),
        (3, "none.json", [*base, *model, "--text", toy / "text.jsonl", "--tokenizer", tmp_path / "none.json"]),
        (3, "ids.bin", "999", "260", [*base, *model, "--data", tmp_path / "ids.bin"]),
        (3, "none.pt", [*base, *text, "--model", tmp_path / "none.pt"]),
        (3, "cut.pt", [*base, *text, "--model", tmp_path / "cut.pt"]),
        (2, "sequence_length is 65", "64", [*base, *text, *model, "--sequence-length", "65"]),
        (3, toy / "toy.pt", "head_dim is 8", "wide has 16", ["--sparsity", "3", "-d", tmp_path / "wide", *text, *model]),
        (3, toy / "toy.pt", "2 layers", "deep", "of 3", ["--sparsity", "3", "-d", tmp_path / "deep", *text, *model]),
    )  # fmt: skip


def test_nan_from_the_model_is_counted(tmp_path, toy):
    toy_model.save(tmp_path / "nan.pt", model=toy_model.ToyModel(nan_id=7))
    ids = np.random.default_rng(4).integers(8, 256, 480).astype(np.int32)
    ids[47] = 7  # the last of its sequence: the toy model's means spread it no further
    ids.tofile(tmp_path / "ids.bin")
    found = report_of("--dictionary", toy / "post_rope", "--token-ids", tmp_path / "ids.bin", "--model", tmp_path / "nan.pt", "--bos", "none",
                      "--sequence-length", "48", "--sparsity", "3", "--no-baselines")  # fmt: skip
    heads = toy_model.KV_HEADS
    assert found["datasets"][0]["not_finite"] == heads * 2 * toy_model.LAYERS
    assert all(row["vectors"] == (480 - 1) * heads for row in found["rows"])


def test_inputs_that_do_not_fit_each_other_are_both_named(home, tmp_path):
    narrow = activations.write(tmp_path / "narrow.h5", tokens=60, dim=8)
    shallow = activations.write(tmp_path / "shallow.h5", tokens=60, layers=1)
    deep = activations.write(tmp_path / "deep.h5", tokens=60, layers=3, model_sha256="1" * 64)
    rotated = activations.write(tmp_path / "rotated.h5", tokens=60, key_stage="pre_rope")
    cases = ((narrow, "head_dim is 8", "has 16"), (shallow, "has 1 layers", "of 2"), (deep, "has 3 layers", "of 2"), (rotated, "pre_rope", "post_rope"))
    all_fail(*((3, path, home / "run", *words, ["--dictionary", home / "run", "--data", path, "--sparsity", "4"]) for path, *words in cases))
    # Layers that were asked for by number may be a part of the model's.
    found = report_of("--dictionary", home / "run", "--data", deep, "--sparsity", "4", "--layers", "0,1")
    assert found["layers"] == [0, 1]
    assert any("another model file" in note for note in found["notes"])


def test_more_atoms_than_there_are_is_a_usage_error(home, tmp_path):
    write_dictionaries(tmp_path / "few", atoms=6)
    all_fail(
        (2, "sparsity is 8", "6 atoms", tmp_path / "few", ["--dictionary", tmp_path / "few", "--data", home / "wiki.h5", "--sparsity", "4,8"]),
        (2, "sparsity is 17", "head_dim 16", ["--dictionary", home / "run", "--data", home / "wiki.h5", "--sparsity", "17"]),
        (2, "layer 7", ["--dictionary", home / "run", "--data", home / "wiki.h5", "--layers", "7"]),
    )


def test_files_that_are_missing_or_damaged_are_named(home, tmp_path):
    data, run_folder = home / "wiki.h5", home / "run"
    (tmp_path / "cut.h5").write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    (tmp_path / "cut.safetensors").write_bytes((run_folder / "dictionary.safetensors").read_bytes()[:1000])
    (tmp_path / "cut.pt").write_bytes((run_folder / "dictionary.pt").read_bytes()[:1000])
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    all_fail(*((3, bad, ["--dictionary", run_folder, "--data", tmp_path / bad]) for bad in ("cut.h5", "other.h5", "none.h5", "none-*.h5")),
             *((3, bad, ["--dictionary", tmp_path / bad, "--data", data]) for bad in ("cut.safetensors", "cut.pt", "none.pt", "none.safetensors")),
             (3, "dictionary.safetensors", ["--dictionary", tmp_path, "--data", data]))  # fmt: skip


def test_wrong_usage_is_named(home, tmp_path):
    base = ["--dictionary", home / "run", "--data", home / "wiki.h5"]
    (tmp_path / "c.yaml").write_text("max_vectors: 10\nsparcity: [4]\n")
    all_fail(
        (2, "dictionary", ["--data", home / "wiki.h5"]),
        (2, "data", ["--dictionary", home / "run"]),
        (2, "--sparcity", "--sparsity", [*base, "--sparcity", "4"]),
        (2, "c.yaml:2", "sparcity", "'sparsity'", [*base, "-c", tmp_path / "c.yaml"]),
        (2, "sparsity", "''", [*base, "--sparsity", "4,,8"]),
    )  # fmt: skip


def test_an_output_that_exists_or_cannot_be_written(home, tmp_path):
    base = ["--dictionary", home / "run", "--data", home / "wiki.h5", "--sparsity", "4", "--no-baselines"]
    run(*base, "-o", tmp_path / "out")
    fails(2, tmp_path / "out", "--overwrite", arguments=[*base, "-o", tmp_path / "out"])
    before = json.loads((tmp_path / "out/report.json").read_text())
    run(*base, "-o", tmp_path / "out", "--overwrite")
    assert json.loads((tmp_path / "out/report.json").read_text())["rows"] == before["rows"]
    (tmp_path / "file").write_text("")
    all_fail((2, tmp_path / "file", [*base, "-o", tmp_path / "file"]),
             (4, "/dev/full", [*base, "-o", "/dev/full"]),
             (4, "/proc/none", [*base, "-o", "/proc/none"]))  # fmt: skip
    with open("/dev/full", "w") as full:
        done = subprocess.run([EVAL, *map(str, base)], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4 and "standard output" in done.stderr
    # A file system that runs full while the report is written: what is left carries no final name.
    limit = lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))  # noqa: E731
    done = run(*base, "-o", tmp_path / "full", code=4, preexec_fn=limit)
    assert "report.json" in done.stderr
    assert not (tmp_path / "full").exists()


def test_a_folder_that_may_not_be_written(home):
    """As a user who is not root, who may write anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        other = Path(folder) / "others"
        other.mkdir(mode=0o555)
        for name in ("run/dictionary.pt", "code.h5"):
            shutil.copy(home / name, folder)
            os.chmod(Path(folder) / Path(name).name, 0o644)
        become = (lambda: os.setuid(65534)) if os.geteuid() == 0 else None
        if become and subprocess.run([EVAL, "--version"], capture_output=True, preexec_fn=become).returncode:
            pytest.skip("another user cannot run the program here")
        done = run("-d", Path(folder) / "dictionary.pt", "--data", Path(folder) / "code.h5", "-o", other, code=4, preexec_fn=become)
        assert str(other) in done.stderr and "Permission denied" in done.stderr


def test_a_stop_while_the_model_runs(toy, tmp_path):
    toy_model.save(tmp_path / "slow.pt", model=toy_model.ToyModel(milliseconds=2000))
    command = [EVAL, "-d", toy / "post_rope", "--data", toy / "ids.bin", "--model", tmp_path / "slow.pt", "--sparsity", "3", "-o", tmp_path / "out"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "stopped" in stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing_and_exits_with_75(home, tmp_path, stop):
    write_dictionaries(tmp_path / "wide", dim=64, atoms=2048)
    activations.write(tmp_path / "long.h5", tokens=1000, dim=64)
    command = [EVAL, "--dictionary", tmp_path / "wide", "--data", tmp_path / "long.h5", "--selection", "ols", "--sparsity", "48", "-o", tmp_path / "out"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "stopped" in stderr and not (tmp_path / "out").exists()


def test_a_dry_run_plans_and_writes_nothing(home, tmp_path):
    base = ["--dictionary", home / "run", "--data", home / "wiki.h5", "--ood", home / "code.h5", "--sparsity", "4"]
    plan = run(*base, "-o", tmp_path / "out", "--dry-run").stdout
    assert "3,000 vectors per layer and kind" in plan and "time" in plan
    assert not (tmp_path / "out").exists()
    assert json.loads(run(*base, "--dry-run", "--json").stdout)["data"][1]["tokens"] == 700


def test_a_printed_config_repeats_the_run(home, report, tmp_path):
    base = ["--dictionary", home / "run", "--data", home / "wiki.h5", "--ood", home / "code.h5", "--sparsity", "2,4,8"]
    (tmp_path / "c.yaml").write_text(run(*base, "--print-config").stdout)
    again = report_of("-c", tmp_path / "c.yaml")
    assert again["rows"] == report["rows"]
