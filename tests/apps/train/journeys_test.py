"""lexico-train as its user meets it: the real binary on small files, what it leaves behind, and what it says to bad input."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
import activations  # noqa: E402
import programs  # noqa: E402

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # small steps on a busy machine: threads that spin only get in the way
TRAIN = str(Path(os.environ["LEXICO_BIN"]) / "lexico-train")
SMALL = ["--num-atoms", "48", "--sparsity", "3", "--vectors", "20000", "--batch-size", "256", "--validation-vectors", "500",
         "--coding", "exact"]  # fmt: skip


def run(*arguments, **options):
    return programs.run(TRAIN, *arguments, **options)


def fails(code, message, *arguments, **options):
    done = run(*arguments, code=code, **options)
    assert message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3, done.stderr  # one line, warnings aside


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return activations.write(tmp_path_factory.mktemp("data") / "activations.h5")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return out, run("--data", data, "--output", out, *SMALL)


def atoms(folder):
    return load_file(folder / "dictionary.safetensors")


def test_a_run_leaves_all_its_files_and_nothing_else(finished):
    out, done = finished
    names = {p.name for p in out.iterdir()}
    events = {n for n in names if n.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert names - events == {"config.yaml", "run.json", "metrics.jsonl", "metrics.csv", "checkpoints", "dictionary.safetensors",
                              "dictionary.pt", "path_to_dictionary.json", "report.json", "report.csv", "report.html"}  # fmt: skip
    assert "s=3" in done.stdout.strip().splitlines()[-1]  # the verdict comes last


PACKED = [*SMALL[:-2], "--code-vectors", "1024"]


def rate_of(report, layer, kind):
    return next(r for r in report["rates"] if (r["layer"], r["kind"]) == (layer, kind))


def test_codes_are_fitted_and_reported_whatever_the_threads(data, tmp_path):
    for threads in (1, 2):
        out = tmp_path / f"run{threads}"
        done = run("--data", data, "--output", out, *PACKED, "--bits", 40, "--threads", threads)
        report = json.loads((out / "report.json").read_text())
        assert all(r["bits_per_vector"] == 40 and r["mean"] < 1 for r in report["rates"]) and len(report["rates"]) == 4
        # More bits than two atoms and their weights take: the residual code is used, and pays.
        two = next(r["mean"] for r in report["rows"] if (r["layer"], r["kind"], r["sparsity"]) == (0, "keys", 1))
        assert rate_of(report, 0, "keys")["mean"] < two
        assert "as stored: relative error keys" in done.stdout.strip().splitlines()[-1]
        assert len(atoms(out)) > 4  # the tables of the codes as well
    one, two = ({k: v.tobytes() for k, v in atoms(tmp_path / f"run{t}").items()} for t in (1, 2))
    assert one == two


@pytest.mark.slow
def test_a_budget_is_kept_and_better_than_equal_shares(data, tmp_path):
    # 2 layers x 2 kinds x 2 heads: 5 bytes a vector on average.
    run("--data", data, "--output", tmp_path / "shared", *PACKED, "--bytes-per-token", 40)
    run("--data", data, "--output", tmp_path / "equal", *PACKED, "--bits", 40)
    shared, equal = (json.loads((tmp_path / n / "report.json").read_text())["rates"] for n in ("shared", "equal"))
    assert sum(r["bits_per_vector"] for r in shared) <= 160
    assert sum(r["mean"] ** 2 for r in shared) <= 1.03 * sum(r["mean"] ** 2 for r in equal)
    fails(2, "bits is 5, must be >= 8", "--data", data, "--output", tmp_path / "poorer", *PACKED, "--bits", 5)
    fails(2, "bytes_per_token is 1, must be at least 8", "--data", data, "--output", tmp_path / "poor", *PACKED, "--bytes-per-token", 1)
    fails(2, "bits and bytes_per_token both", "--data", data, "--output", tmp_path / "x", *PACKED, "--bits", 40, "--bytes-per-token", 40)
    fails(2, "coding is 'zip'", "--data", data, "--output", tmp_path / "x", *SMALL[:-1], "zip")


def test_python_reads_both_dictionaries_and_they_agree(finished):
    out, _ = finished
    published = torch.load(out / "dictionary.pt", weights_only=True)
    assert published.dtype == torch.float32 and published.shape == (4, 16, 48)
    with safe_open(out / "dictionary.safetensors", "np") as file:
        assert set(file.keys()) == {f"layers.{l:02d}.{k}.atoms" for l in (0, 1) for k in ("keys", "values")}
        metadata = file.metadata()
        for layer in (0, 1):
            for row, kind in enumerate(("keys", "values")):
                tensor = file.get_tensor(f"layers.{layer:02d}.{kind}.atoms")
                assert np.allclose(np.linalg.norm(tensor, axis=1), 1, atol=1e-5)
                assert np.array_equal(published[2 * layer + row].numpy().T, tensor)
    assert metadata["model"] == "org/tiny" and metadata["sparsity"] == "3" and metadata["recipe"] == "sgd"
    assert json.loads((out / "path_to_dictionary.json").read_text()) == {"org_tiny_N_48_s_3": "dictionary.pt"}


def test_held_out_errors_in_the_report_are_those_of_an_independent_pursuit(data, finished):
    import h5py
    from sklearn.linear_model import orthogonal_mp

    out, _ = finished
    rows = [r for r in csv.DictReader((out / "report.csv").open()) if r["sparsity"] == "3"]
    assert len(rows) == 4
    with h5py.File(data) as file:
        for row in rows:
            layer, kind = int(row["layer"]), row["kind"]
            X = file[f"layers/{layer:02d}/{kind}"][-500:].astype(np.float64)
            D = atoms(out)[f"layers.{layer:02d}.{kind}.atoms"].astype(np.float64)
            R = X - orthogonal_mp(D.T, X.T, n_nonzero_coefs=3).T @ D
            error = (np.linalg.norm(R, axis=1) / np.linalg.norm(X, axis=1)).mean()
            assert float(row["mean"]) == pytest.approx(error, rel=0.01)
            assert error < 0.35  # it has learnt something: random atoms give 0.7


def test_metrics_fall_and_are_the_same_in_jsonl_and_csv(finished):
    out, _ = finished
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    table = list(csv.DictReader((out / "metrics.csv").open()))
    assert len(lines) == len(table) == 79
    assert [float(r["loss"]) for r in table] == [l["loss"] for l in lines]
    assert float(table[-1]["layer01_values"]) == lines[-1]["relative_errors"][3]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_tensorboard_reads_the_events(finished):
    """The framing and the checksums, by the definitions of TFRecord (length, crc, data, crc)."""
    path = next(finished[0].glob("events.out.tfevents.*"))
    raw, at, records = path.read_bytes(), 0, []

    def crc32c(data):
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
        crc ^= 0xFFFFFFFF
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    assert crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 8], "little")
        data = raw[at + 12 : at + 12 + length]
        assert int.from_bytes(raw[at + 8 : at + 12], "little") == crc32c(raw[at : at + 8])
        assert int.from_bytes(raw[at + 12 + length : at + 16 + length], "little") == crc32c(data)
        records.append(data)
        at += 16 + length
    assert b"brain.Event:2" in records[0]
    assert sum(b"Loss/train" in r for r in records) == 79
    assert sum(b"RelativeReconstructionError/eval" in r for r in records) == 1


def test_config_written_by_a_run_gives_the_same_dictionary(data, finished, tmp_path):
    out, _ = finished
    run("-c", out / "config.yaml", "--output", tmp_path / "again", "--threads", "1")
    assert (tmp_path / "again" / "dictionary.pt").read_bytes() == (out / "dictionary.pt").read_bytes()


def test_chosen_layers_and_kinds_give_no_published_file_and_say_so(data, tmp_path):
    done = run("--data", data, "-o", tmp_path / "r", *SMALL, "--layers", "1", "--kinds", "values", "--recipe", "lexico",
               "--vectors", "2000")  # fmt: skip
    assert list(atoms(tmp_path / "r")) == ["layers.01.values.atoms"]
    assert not (tmp_path / "r" / "dictionary.pt").exists()
    assert "no dictionary.pt" in done.stderr


def test_registry_is_merged(data, tmp_path):
    registry = tmp_path / "path_to_dictionary.json"
    registry.write_text('{"other_N_1_s_1": "other.pt"}')
    run("--data", data, "-o", tmp_path / "r", *SMALL, "--vectors", "2000", "--registry", registry)
    assert json.loads(registry.read_text()) == {"other_N_1_s_1": "other.pt", "org_tiny_N_48_s_3": "r/dictionary.pt"}


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_run_cut_off_and_resumed_ends_with_the_same_bytes(data, tmp_path, how):
    settings = [*SMALL, "--vectors", "150000", "--checkpoint-seconds", "0.05"]
    run("--data", data, "-o", tmp_path / "whole", *settings)
    cut = tmp_path / "cut"
    process = subprocess.Popen([TRAIN, "--data", data, "-o", cut, *settings], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not list(cut.glob("checkpoints/*.safetensors")) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    stderr = process.communicate(timeout=60)[1]
    if process.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert process.returncode == (-9 if how == signal.SIGKILL else 75), stderr
    assert not (cut / "dictionary.safetensors").exists()
    if how != signal.SIGKILL:
        assert "--resume" in stderr
    fails(2, "--resume", "--data", data, "-o", cut, *settings)  # what is there is not overwritten unasked
    run("--data", data, "-o", cut, *settings, "--resume")
    assert (cut / "dictionary.pt").read_bytes() == (tmp_path / "whole" / "dictionary.pt").read_bytes()
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((cut / "checkpoints").iterdir())) <= 2


def test_a_damaged_checkpoint_is_left_out_and_the_older_one_taken(data, finished, tmp_path):
    out = tmp_path / "r"
    run("--data", data, "-o", out, *SMALL, "--checkpoint-seconds", "0.001")
    newest, older = sorted((out / "checkpoints").iterdir(), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-50])
    done = run("--data", data, "-o", out, *SMALL, "--resume")
    assert "damaged checkpoint" in done.stderr and newest.name in done.stderr
    assert (out / "dictionary.pt").read_bytes() == (finished[0] / "dictionary.pt").read_bytes()


def test_without_a_whole_checkpoint_nothing_is_resumed(data, finished, tmp_path):
    out = tmp_path / "r"
    run("--data", data, "-o", out, *SMALL, "--checkpoint-seconds", "0.001")
    for checkpoint in (out / "checkpoints").iterdir():
        content = bytearray(checkpoint.read_bytes())
        content[len(content) // 2] ^= 1
        checkpoint.write_bytes(content)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    done = run("--data", data, "-o", out, *SMALL, "--resume", code=3)
    assert "no checkpoint there is whole (2 damaged)" in done.stderr and "--overwrite" in done.stderr, done.stderr
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_removed_once_there_is_a_newer_one(data, tmp_path):
    out, settings = tmp_path / "r", [*SMALL, "--vectors", "300000"]
    long = subprocess.Popen([TRAIN, "--data", data, "-o", out, *settings, "--checkpoint-seconds", "0.05"], stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(out.glob("checkpoints/*.safetensors"))) == 2)
    long.kill()
    long.wait()
    for left in out.glob("checkpoints/*.partial"):
        left.unlink()
    newest, older = sorted((out / "checkpoints").iterdir(), reverse=True)[:2]
    newest.write_bytes(newest.read_bytes()[:-1])
    done = run("--data", data, "-o", out, *settings, "--resume")
    assert f"going on from the older {older}" in done.stderr, done.stderr
    assert not newest.exists() and len(list((out / "checkpoints").iterdir())) <= 2


def test_resume_begins_where_nothing_is_but_not_among_other_files(data, finished, tmp_path):
    done = run("--data", data, "-o", tmp_path / "r", *SMALL, "--resume")
    assert "no checkpoint yet, starting at step 0" in done.stderr
    assert (tmp_path / "r/dictionary.pt").read_bytes() == (finished[0] / "dictionary.pt").read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    fails(2, "holds other files and no run to resume", "--data", data, "-o", tmp_path / "mine", *SMALL, "--resume")


def wait_for(condition):
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def test_a_file_named_save_makes_it_save_and_go_on(data, tmp_path):
    out = tmp_path / "r"
    process = subprocess.Popen([TRAIN, "--data", data, "-o", out, *SMALL, "--vectors", "1e8"], stderr=subprocess.PIPE, text=True)
    for count in (1, 2):
        wait_for(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0)
        (out / "SAVE").touch()
        wait_for(lambda: not (out / "SAVE").exists())
        assert len(list(out.glob("checkpoints/*.safetensors"))) == count and process.poll() is None
    process.send_signal(signal.SIGUSR1)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and stderr.count("as SAVE asked") == 2, stderr
    newest = max((out / "checkpoints").iterdir()).name
    assert f"stopped at step {int(newest[5:15])} of" in stderr  # saved where it stopped


def test_a_second_interrupt_ends_it_at_once(data, tmp_path):
    out = tmp_path / "r"
    slow = ["--num-atoms", "4000", "--sparsity", "16", "--batch-size", "200000", "--vectors", "4e6", "--coding", "exact", "--threads", "1"]
    process = subprocess.Popen([TRAIN, "--data", data, "-o", out, *slow], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (out / "run.json").exists())
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None  # the step goes on
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=2)
    assert process.returncode == 130


def test_resuming_with_other_settings_is_refused_and_the_setting_named(data, finished):
    fails(2, "learning_rate", "--data", data, "-o", finished[0], *SMALL, "--resume", "--learning-rate", "0.5")


def test_resuming_on_other_vectors_is_refused(data, finished, tmp_path):
    resume = ["-o", finished[0], *SMALL, "--resume"]
    fails(2, "data = ", "--data", activations.write(tmp_path / "a.h5", key_stage="pre_rope"), *resume)
    fails(2, "data = ", "--data", data, *resume, "--validation-vectors", "50")


def test_a_start_that_failed_can_be_overwritten(data, tmp_path):
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    (tmp_path / "r" / "metrics.jsonl").write_text("")
    fails(2, "--overwrite", "--data", data, "-o", tmp_path / "r", *SMALL)
    run("--data", data, "-o", tmp_path / "r", *SMALL, "--vectors", "2000", "--overwrite")


def test_the_saved_config_repeats_the_run_and_no_more(data, finished, tmp_path):
    config = finished[0] / "config.yaml"
    assert not {"overwrite", "resume", "dry_run", "json"} & {line.split(":")[0] for line in config.read_text().splitlines()}
    fails(2, "--overwrite", "-c", config)
    run("-c", config, "-o", tmp_path / "again")
    assert (tmp_path / "again/dictionary.pt").read_bytes() == (finished[0] / "dictionary.pt").read_bytes()


def test_names_that_are_not_utf8(data, tmp_path):
    odd = os.fsencode(tmp_path) + b"/caf\xe9.h5"
    os.link(data, odd)
    run("--data", os.fsdecode(odd), "-o", tmp_path / "r", *SMALL, "--vectors", "2000", "--json")
    assert json.loads((tmp_path / "r/run.json").read_text())["verdict"]


def test_held_out_vectors_with_nan_are_noted(tmp_path):
    def change(layer, kind, vectors):
        if (layer, kind) == (0, "keys"):
            vectors[-100:] = np.nan
        return vectors

    data = activations.write(tmp_path / "a.h5", change=change)
    done = run("--data", data, "-o", tmp_path / "r", *SMALL, "--vectors", "2000")
    assert "layer 0 keys: 100 of 500 held-out vectors hold NaN or Inf" in done.stderr


def test_a_registry_that_cannot_be_used_stops_the_run_before_it_starts(data, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    fails(3, "list.json: is not a JSON map", "--data", data, "-o", tmp_path / "r", *SMALL, "--registry", tmp_path / "list.json")
    fails(4, "nowhere is no folder", "--data", data, "-o", tmp_path / "r", *SMALL, "--registry", tmp_path / "nowhere/r.json")
    assert not (tmp_path / "r").exists()


def test_numbers_beyond_all_bounds(data, tmp_path):
    fails(2, "learning_rate is 1e+38", "--data", data, "-o", tmp_path / "r", *SMALL, "--learning-rate", "1e38")
    fails(2, "vectors is 9223372036854775807", "--data", data, "-o", tmp_path / "r", "--vectors", "9223372036854775807")
    assert not (tmp_path / "r").exists()


def test_overwrite_starts_again_but_only_in_a_run_folder(data, tmp_path):
    out = tmp_path / "r"
    for extra in ([], ["--overwrite"]):
        run("--data", data, "-o", out, *SMALL, "--vectors", "2000", *extra)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    fails(2, "holds other files", "--data", data, "-o", tmp_path / "mine", *SMALL, "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_dry_run_writes_nothing_and_json_is_json(data, tmp_path):
    plan = json.loads(run("--data", data, "-o", tmp_path / "r", *SMALL, "--dry-run", "--json").stdout)
    assert plan["dictionaries"] == 4 and plan["steps"] == 79 and plan["vectors_in_data"] == 5500
    assert "Plan" in run("--data", data, "-o", tmp_path / "r", *SMALL, "--dry-run").stdout
    assert not (tmp_path / "r").exists()
    report = json.loads(run("--data", data, "-o", tmp_path / "r", *SMALL, "--vectors", "2000", "--json").stdout)
    assert "verdict" in report


def test_vectors_with_nan_are_left_out_and_said(tmp_path):
    def spoil(layer, kind, vectors):
        if layer == 1 and kind == "keys":
            vectors[::100] = np.nan
        return vectors

    data = activations.write(tmp_path / "nan.h5", change=spoil)
    done = run("--data", data, "-o", tmp_path / "r", *SMALL)
    assert "NaN" in done.stderr
    assert all(np.isfinite(a).all() for a in atoms(tmp_path / "r").values())
    all_bad = activations.write(tmp_path / "bad.h5", change=lambda l, k, v: v * np.nan)
    fails(3, "NaN", "--data", all_bad, "-o", tmp_path / "s", *SMALL)


@pytest.mark.parametrize("extra", [["--recipe", "online"], pytest.param(["--recipe", "online", "--finish", "0.5"], marks=pytest.mark.slow),
                                   ["--mean", "head", "--dictionaries", "head"]])  # fmt: skip
def test_other_recipes_and_frames_cut_off_and_resumed_end_with_the_same_bytes(data, tmp_path, extra):
    settings = [*SMALL, "--vectors", "150000", *extra]
    run("--data", data, "-o", tmp_path / "whole", *settings)
    cut = tmp_path / "cut"
    process = subprocess.Popen([TRAIN, "--data", data, "-o", cut, *settings, "--checkpoint-seconds", "0.05"], stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not list(cut.glob("checkpoints/*.safetensors")) and time.time() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    run("--data", data, "-o", cut, *settings, "--resume", "--checkpoint-seconds", "0.05", "--threads", "1")
    a, b = (atoms(f) for f in (tmp_path / "whole", cut))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def errors_of(folder, sparsity=3):
    return {(int(r["layer"]), r["kind"]): float(r["mean"]) for r in csv.DictReader((folder / "report.csv").open())
            if int(r["sparsity"]) == sparsity}  # fmt: skip


def test_a_mean_is_taken_off_stored_and_put_back(tmp_path):
    far = np.random.default_rng(1).normal(size=(2, 1, 16)) * 10

    def shift(layer, kind, vectors):  # rows of two heads in turn
        return (vectors.reshape(-1, 2, 16) + far[layer].reshape(1, 1, 16) * [[[1], [-1]]]).reshape(vectors.shape)

    data = activations.write(tmp_path / "a.h5", change=shift)
    done = run("--data", data, "-o", tmp_path / "mean", *SMALL, "--mean", "head")
    run("--data", data, "-o", tmp_path / "plain", *SMALL)
    plain, mean = errors_of(tmp_path / "plain"), errors_of(tmp_path / "mean")
    assert all(mean[k] < plain[k] for k in plain)
    assert "no dictionary.pt" in done.stderr


def test_dictionaries_of_heads_and_of_groups(data, tmp_path):
    run("--data", data, "-o", tmp_path / "heads", *SMALL, "--dictionaries", "head", "--kinds", "keys")
    assert len(atoms(tmp_path / "heads")) == 4
    header = (tmp_path / "heads/metrics.csv").read_text().splitlines()[0]
    assert header.endswith("layer00_keys_head0,layer00_keys_head1,layer01_keys_head0,layer01_keys_head1")
    assert len(errors_of(tmp_path / "heads")) == 2
    run("--data", data, "-o", tmp_path / "group", *SMALL, "--layer-groups", "0-1")
    assert len(errors_of(tmp_path / "group")) == 4
    fails(2, "layer 1 is in two groups", "--data", data, "-o", tmp_path / "r", *SMALL, "--layer-groups", "0-1,1")


def test_fine_tuning_starts_from_a_run_and_names_what_does_not_fit(data, finished, tmp_path):
    run("--data", data, "-o", tmp_path / "tuned", *SMALL, "--initial", finished[0], "--learning-rate", "1e-4", "--vectors", "2000")
    first = json.loads((tmp_path / "tuned/metrics.jsonl").read_text().splitlines()[0])
    assert first["relative_error"] < 0.35  # as the finished run, far from samples
    fails(2, "this run has num_atoms 40", "--data", data, "-o", tmp_path / "r", *SMALL, "--initial", finished[0], "--num-atoms", "40")
    fails(3, "missing.safetensors", "--data", data, "-o", tmp_path / "r", *SMALL, "--initial", tmp_path / "missing.safetensors")


def test_keys_and_values_of_their_own_sparsity(data, tmp_path):
    run("--data", data, "-o", tmp_path / "r", *SMALL, "--key-sparsity", "2", "--value-sparsity", "5")
    assert {int(r["sparsity"]) for r in csv.DictReader((tmp_path / "r/report.csv").open())} == {1, 2, 4, 5, 10}


def test_a_budget_in_minutes(data, tmp_path):
    settings = [*SMALL[:4], "--batch-size", "256", "--validation-vectors", "500",
         "--coding", "exact"]  # fmt: skip
    run("--data", data, "-o", tmp_path / "r", *settings, "--minutes", "0.02")
    lines = [json.loads(l) for l in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["learning_rate"] < 0.1 * lines[0]["learning_rate"]
    fails(2, "give one of them", "--data", data, "-o", tmp_path / "s", *settings, "--minutes", "1", "--vectors", "1000")


def test_a_batch_of_nan_is_skipped_and_said(tmp_path):
    """Nine rows of ten are NaN, and batches are small: some batches hold nothing else."""

    def spoil(layer, kind, vectors):
        if layer == 1 and kind == "keys":
            vectors[np.random.default_rng(0).random(len(vectors)) < 0.9] = np.nan
        return vectors

    data = activations.write(tmp_path / "nan.h5", change=spoil)
    done = run("--data", data, "-o", tmp_path / "r", *SMALL, "--batch-size", "4", "--vectors", "4000")
    assert "batches held nothing else" in done.stderr
    assert all(np.isfinite(a).all() for a in atoms(tmp_path / "r").values())


def test_divergence_stops_with_advice_and_leaves_the_best(data, finished, tmp_path):
    settings = ["-o", tmp_path / "r", *SMALL, "--recipe", "lexico", "--batch-size", "64", "--vectors", "1e6", "--learning-rate", "1",
                "--initial", finished[0]]  # fmt: skip
    fails(2, "try a learning_rate below 1", "--data", data, *settings)
    assert all(np.allclose(a, atoms(finished[0])[k], atol=1e-6) for k, a in atoms(tmp_path / "r").items())


def test_help_version_and_print_config():
    assert "Exit codes" in run("--help").stdout
    assert run("--version").stdout.startswith("lexico-train ")
    assert "num_atoms: 7" in run("--print-config", "--num-atoms", "7").stdout


def test_bad_input_is_named_and_has_its_exit_code(data, tmp_path):
    out = ["-o", tmp_path / "r"]
    fails(2, "data is missing", *out)
    fails(2, "output is missing", "--data", data)
    fails(3, "missing.h5", "--data", tmp_path / "missing.h5", *out)
    broken = tmp_path / "broken.h5"
    broken.write_bytes(Path(data).read_bytes()[:20000])
    fails(3, "broken.h5", "--data", broken, *out)
    text = tmp_path / "text.h5"
    text.write_text("not HDF5")
    fails(3, "text.h5", "--data", text, *out)
    fails(2, "sparsity is 9, must be in [1, num_atoms = 8]", "--data", data, *out, "--num-atoms", "8", "--sparsity", "9")
    fails(2, "sparsity is 17, must be at most head_dim = 16", "--data", data, *out, "--num-atoms", "48", "--sparsity", "17")
    fails(2, "layer 2 does not exist", "--data", data, *out, "--layers", "0,2")
    fails(2, "recipe is 'magic'", "--data", data, *out, "--recipe", "magic")
    fails(2, "'--num-atom'; the nearest flag is '--num-atoms'", "--data", data, *out, "--num-atom", "3")
    fails(2, "device is 'tpu'", "--data", data, *out, "--device", "tpu")
    config = tmp_path / "c.yaml"
    config.write_text("recipe: sgd\nsparcity: 4\n")
    fails(2, "c.yaml:2: unknown key 'sparcity'; the nearest is 'sparsity'", "-c", config, "--data", data, *out)
    other = activations.write(tmp_path / "other.h5", dim=8)
    fails(3, "head_dim", "--data", data, "--validation-data", other, *out, *SMALL)
    cut = tmp_path / "cut.h5"
    cut.write_bytes(Path(data).read_bytes()[:5000])
    assert run("--data", cut, *out, code=3).stderr.count("cut.h5") == 1
    fails(3, "too few", "--data", activations.write(tmp_path / "few.h5", tokens=3), *out, *SMALL)
    assert not (tmp_path / "r").exists()
    fails(4, "cannot be written: is not a folder", "--data", data, "-o", data, *SMALL)
    fails(4, "/proc/nowhere", "--data", data, "-o", "/proc/nowhere", *SMALL)


def test_a_full_disk_is_said_and_leaves_no_dictionary(data, tmp_path):
    out = tmp_path / "r"
    # The shell's file size limit stands in for a full disk: writes beyond it fail.
    done = subprocess.run(["bash", "-c", 'ulimit -f 20; trap "" XFSZ; exec "$0" "$@"', TRAIN, "--data", data, "-o", out, *SMALL],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "cannot write" in done.stderr
    assert not list(out.rglob("*.partial")) and not (out / "dictionary.safetensors").exists()
