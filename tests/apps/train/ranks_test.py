"""lexico-train on several machines, as launchers start it: ranks that share out the dictionaries and one folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
import activations  # noqa: E402
import programs  # noqa: E402

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # small steps on a busy machine: threads that spin only get in the way
TRAIN = str((Path(os.environ["LEXICO_BIN"]) / "lexico-train").resolve())
SMALL = ["--data", "../a.h5", "--num-atoms", "48", "--sparsity", "3", "--vectors", "20000", "--batch-size", "256",
         "--validation-vectors", "500", "--code-vectors", "1024", "--threads", "1", "-o", "run"]  # fmt: skip
LONG = [*SMALL, "--vectors", "600000", "--checkpoint-seconds", "0.05", "--coding", "exact"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder whose folders find the data beside them: runs of equal names have equal files."""
    folder = tmp_path_factory.mktemp("ranks")
    activations.write(folder / "a.h5")
    return folder


def fresh(place, name):
    (place / name).mkdir()
    return place / name


def run(folder, *arguments, **options):
    return programs.run(TRAIN, *arguments, cwd=folder, **options)


def start(folder, rank, ranks, *arguments):
    return subprocess.Popen([TRAIN, *map(str, arguments), "--rank", str(rank), "--num-ranks", str(ranks)], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def end(*processes):
    said = [process.communicate(timeout=120) for process in processes]
    return [process.returncode for process in processes], said


def learnt(folder):
    return (folder / "run" / "dictionary.safetensors").read_bytes(), (folder / "run" / "report.csv").read_bytes()


def wait_until(condition):
    deadline = time.time() + 60
    while not condition() and time.time() < deadline:
        time.sleep(0.02)


def pid_of(folder, rank):
    try:
        return int((folder / "run" / f".rank-{rank:05d}.alive").read_text().split()[1])
    except (OSError, IndexError):
        return None


def checkpoints(folder, part, parts):
    return list((folder / f"run/parts/{part:05d}-of-{parts:05d}/checkpoints").glob("*.safetensors"))


def left_over(folder):
    return [p for p in (folder / "run").rglob("*") if p.name.startswith(".rank-") or p.name.endswith(".partial")]


@pytest.fixture(scope="module")
def long_run(place):
    """What one process makes of the longer settings."""
    folder = fresh(place, "long")
    run(folder, *LONG)
    return learnt(folder)


@pytest.mark.parametrize("ranks, extra", [
    pytest.param(3, ["--bytes-per-token", "40"], marks=pytest.mark.slow),
    (2, ["--recipe", "lexico", "--key-sparsity", "2"]),
    (2, ["--recipe", "online", "--finish", "0.5", "--dictionaries", "head", "--mean", "head"]),
    (5, ["--layer-groups", "0-1", "--pool-mib", "1"]),
], ids=lambda value: "-".join(value) if isinstance(value, list) else str(value))  # fmt: skip
def test_ranks_learn_what_one_process_learns(place, ranks, extra):
    name = "".join(extra)
    one, many = fresh(place, "one" + name), fresh(place, "many" + name)
    run(one, *SMALL, *extra)
    codes, said = end(*(start(many, rank, ranks, *SMALL, *extra) for rank in range(ranks)))
    assert codes == [0] * ranks, said
    assert learnt(many) == learnt(one)
    assert all(text == ("", "") for text in said[1:])  # only rank 0 speaks
    assert "s=" in said[0][0].strip().splitlines()[-1]
    assert not left_over(many)
    a, b = ([json.loads(line) for line in (f / "run/metrics.jsonl").read_text().splitlines()] for f in (one, many))
    assert [x["step"] for x in a] == [x["step"] for x in b]
    assert [x["relative_errors"] for x in a] == [x["relative_errors"] for x in b]
    assert a[-1]["loss"] == pytest.approx(b[-1]["loss"]) and a[-1]["relative_error"] == pytest.approx(b[-1]["relative_error"])
    assert (one / "run/metrics.csv").read_text().splitlines()[0] == (many / "run/metrics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("ranks_after", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_and_the_resumed_run_completes(place, long_run, ranks_after):
    folder = fresh(place, f"killed{ranks_after}")
    processes = [start(folder, rank, 2, *LONG) for rank in (0, 1)]
    wait_until(lambda: checkpoints(folder, 2, 2))
    processes[1].kill()
    processes[1].wait()
    codes, said = end(*processes)
    assert codes == [75, -signal.SIGKILL], said
    assert "rank 1 of 2 is gone, missing: layer 1 keys, layer 1 values. The same command with --resume goes on" in said[0][1]
    done = folder / "run/parts/00001-of-00002/learned.safetensors"
    before = done.stat().st_mtime_ns
    assert not (folder / "run/dictionary.safetensors").exists()
    if ranks_after == 1:
        assert "from step" in run(folder, *LONG, "--resume").stderr
    else:
        codes, said = end(*(start(folder, rank, ranks_after, *LONG, "--resume") for rank in range(ranks_after)))
        assert codes == [0] * ranks_after, said
        assert ("on have nothing to do" in said[0][1]) == (ranks_after == 3)
    assert done.stat().st_mtime_ns == before
    assert learnt(folder) == long_run and not left_over(folder)


def test_a_rank_that_never_comes_is_named_and_one_without_rank_0_gives_up(place):
    folder = fresh(place, "never")
    done = run(folder, *SMALL, "--num-ranks", 2, "--rank", 0, "--rank-timeout", 1, code=75)
    assert "rank 1 of 2 was never heard of, missing: layer 1 keys, layer 1 values" in done.stderr
    done = run(fresh(place, "alone"), *SMALL, "--num-ranks", 2, "--rank", 1, "--rank-timeout", 1, code=75)
    assert "rank 1 of 2: rank 0 of 2, which prepares run, was not heard of for 1 seconds" in done.stderr


def test_a_stopped_job_goes_on_by_itself_when_it_is_started_again(place, long_run):
    """What a batch system's requeue does: the same command, the same number of ranks."""
    folder = fresh(place, "stopped")
    processes = [start(folder, rank, 2, *LONG) for rank in (0, 1)]
    wait_until(lambda: checkpoints(folder, 1, 2) and checkpoints(folder, 2, 2))
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    codes, said = end(*processes)
    assert codes == [75, 75], said
    assert "stopped" in said[0][1] and "--resume goes on" in said[0][1]
    assert "lexico-train: rank 1 of 2: stopped at step" in said[1][1]
    codes, said = end(*(start(folder, rank, 2, *LONG) for rank in (0, 1)))
    assert codes == [0, 0], said
    assert learnt(folder) == long_run


def test_a_request_to_save_reaches_every_part(place):
    folder = fresh(place, "save")
    settings = [*LONG, "--checkpoint-seconds", "1000", "--vectors", "1000000"]
    processes = [start(folder, rank, 2, *settings) for rank in (0, 1)]
    wait_until(lambda: len(list((folder / "run/parts").glob("*/metrics.jsonl"))) == 2)
    (folder / "run/SAVE").touch()
    wait_until(lambda: checkpoints(folder, 1, 2) and checkpoints(folder, 2, 2))
    assert checkpoints(folder, 1, 2) and checkpoints(folder, 2, 2) and not (folder / "run/SAVE").exists()
    for process in processes:
        process.send_signal(signal.SIGTERM)
    end(*processes)


def test_a_run_of_one_process_is_finished_by_ranks_and_started_again_by_others(place):
    folder = fresh(place, "grown")
    run(folder, *SMALL)
    before = learnt(folder)
    codes, said = end(*(start(folder, rank, 2, *SMALL, "--resume") for rank in (0, 1)))
    assert codes == [0, 0] and "ranks from 1 on have nothing to do" in said[0][1]
    assert learnt(folder) == before and not (folder / "run/parts").exists()
    codes, said = end(*(start(folder, rank, 2, *SMALL, "--overwrite", "--seed", "3") for rank in (1, 0)))
    assert codes == [0, 0], said
    assert learnt(folder) != before and not (folder / "run/checkpoints").exists()
    codes, said = end(*(start(folder, rank, 2, *SMALL, "--overwrite") for rank in (1, 0)))
    assert learnt(folder) == before
    done = run(folder, *SMALL, "--resume", "--learning-rate", "0.01", code=2)
    assert "was trained with learning_rate = 0.02" in done.stderr
    done = run(folder, *SMALL, "--resume", "--layers", "1", "--kinds", "keys", code=2)
    assert "holds a run of 2 parts, this one has 1 dictionaries" in done.stderr
    assert learnt(folder) == before


def test_a_part_that_is_damaged_is_made_again(place):
    folder = fresh(place, "damaged")
    codes, said = end(*(start(folder, rank, 2, *SMALL) for rank in (0, 1)))
    before = learnt(folder)
    part = folder / "run/parts/00002-of-00002/learned.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    assert "00002-of-00002/learned.safetensors" in run(folder, *SMALL, "--resume").stderr
    assert learnt(folder) == before


def test_a_budget_in_minutes_is_each_ranks_own(place):
    folder = fresh(place, "minutes")
    settings = [*SMALL[:6], *SMALL[8:], "--minutes", "0.02"]
    codes, said = end(*(start(folder, rank, 2, *settings) for rank in (0, 1)))
    assert codes == [0, 0], said
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert all(len(line["relative_errors"]) == 4 for line in lines)


# --- Real launchers ----------------------------------------------------------------------------------------------------


def torchrun(arguments):
    return [str(Path(sys.executable).with_name("torchrun")), "--no-python", "--nproc-per-node", "2", TRAIN, *arguments]


def mpirun(arguments):
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun here (apt: openmpi-bin)")
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2", TRAIN, *arguments]


@pytest.mark.parametrize("launcher", [pytest.param(torchrun, marks=pytest.mark.slow), mpirun])
def test_a_launcher_shares_the_work_out_and_survives_a_killed_rank(place, long_run, launcher):
    folder = fresh(place, launcher.__name__)
    job = subprocess.Popen(launcher(LONG), cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: checkpoints(folder, 1, 2) and checkpoints(folder, 2, 2))
    os.kill(pid_of(folder, 1), signal.SIGKILL)
    codes, said = end(job)
    assert codes != [0] and not (folder / "run/dictionary.safetensors").exists(), said
    job = subprocess.Popen([*launcher(LONG), "--resume"], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    codes, said = end(job)
    assert codes == [0], said
    assert learnt(folder) == long_run and not left_over(folder)
    assert said[0][0].count("Training of dictionaries") == 1 and said[0][1].count("wrote run/dictionary.safetensors") == 1


def test_the_slurm_script_of_the_documentation_requeues_until_the_run_is_done(place, long_run):
    """With stand-ins for srun and scontrol; the rest of the script is as printed."""
    folder = fresh(place, "slurm")
    page = (Path(__file__).resolve().parents[3] / "docs" / "clusters.md").read_text()
    script = next(part.split("```")[0] for part in page.split("```sh\n")[1:] if "#SBATCH" in part)
    command = script[script.index("lexico-train --data") : script.index(" &\nstep")]
    (folder / "job.sh").write_text(script.replace(command, " ".join([TRAIN, *LONG, "--resume"])))
    (folder / "bin").mkdir()
    shutil.copy(Path(__file__).with_name("slurm_stand_in.sh"), folder / "bin" / "srun")
    (folder / "bin" / "scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n')
    (folder / "bin" / "scontrol").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "1"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: checkpoints(folder, 1, 2) and checkpoints(folder, 2, 2))
    job.send_signal(signal.SIGUSR1)
    codes, said = end(job)
    assert codes == [75] and (folder / "requeued").read_text() == "requeue 17\n", said
    done = subprocess.run(["bash", "job.sh"], cwd=folder, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and learnt(folder) == long_run, done
