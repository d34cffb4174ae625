"""Kills small runs at every system call that changes their output, lets each of them fail, and kills them at random times. Takes a quarter
of an hour; LEXICO_FAULTS=k/n in the environment does the k-th of n parts. What was done is printed at the end."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import cases  # noqa: E402

pytestmark = pytest.mark.skipif(bool(cases.faults.why_not()), reason=str(cases.faults.why_not()))
PART, PARTS = map(int, os.environ.get("LEXICO_FAULTS", "1/1").split("/"))
FAULTS = {"error=EIO": cases.faults.CHANGES, "error=ENOSPC": ("write", "pwrite64", "openat", "fsync", "ftruncate", "rename", "mkdir", "fallocate"),
          "retval=0": ("write", "pwrite64"), "retval=1": ("write",)}  # fmt: skip
done = Counter()


def mine(items):
    return list(items)[PART - 1 :: PARTS]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    made = {}

    def job(name):
        if name not in made:
            made[name] = getattr(cases, name)(tmp_path_factory.mktemp(name))
            print(f"\n{name}: {len(made[name].calls)} calls")
        return made[name]

    yield job
    print("\n" + "\n".join(f"{count:5} {what}" for what, count in done.items()))


def all_of(job, items, one):
    """Every item is tried; then those that failed are told."""
    failures = []
    for item in mine(items):
        try:
            done[f"{type(job).__name__.lower()}: {one(item)}"] += 1
        except AssertionError as error:
            failures.append(str(error)[:2000])
    assert not failures, f"{len(failures)} failed:\n\n" + "\n\n".join(failures)


@pytest.mark.parametrize("name", ["training", "extraction"])
def test_killed_at_every_call(jobs, name):
    job = jobs(name)

    def one(call):
        job.kill_at(call)
        return "kills at a call"

    all_of(job, job.calls, one)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["training", "extraction"])
def test_every_call_fails_once(jobs, name, fault):
    job = jobs(name)
    all_of(job, [c for c in job.calls if c.name in FAULTS[fault]],
           lambda call: f"{fault}, {'said' if job.fail_at(call, fault) else 'done without'}")  # fmt: skip


@pytest.mark.parametrize("name", ["training", "extraction"])
def test_files_that_cannot_grow(jobs, name):
    """Cut short in the middle of a write, as by a full disk."""
    job = jobs(name)
    largest = max(p.stat().st_size for p in job.folder.rglob("*") if p.is_file()) if job.folder.exists() else 60000
    all_of(job, [int(largest * i / 40) for i in range(1, 40)],
           lambda limit: f"short writes, {'said' if job.fail_beyond(limit) else 'done without'}")  # fmt: skip


def test_training_killed_at_random_times(tmp_path):
    job = cases.training(tmp_path, steps=400, batch=256, checkpoint_seconds="0.02", tokens=3000)
    kills = -(-100 // PARTS)
    print(f"\n{kills} kills in training, {job.kill_at_random(kills, 1.2, PART)} runs came to their end")


def test_extraction_killed_at_random_times(tmp_path):
    job = cases.extraction(tmp_path, shards=40, milliseconds=20)
    kills = -(-50 // PARTS)
    print(f"\n{kills} kills in extraction, {job.kill_at_random(kills, 1.4, PART)} runs came to their end")
