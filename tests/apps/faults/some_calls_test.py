"""A run that is killed or meets a full or failing disk at one of its system calls: a few of each kind. every_call_test.py does all."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import cases  # noqa: E402

pytestmark = pytest.mark.skipif(bool(cases.faults.why_not()), reason=str(cases.faults.why_not()))


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return cases.training(tmp_path_factory.mktemp("train"), steps=3)


@pytest.fixture(scope="module")
def extraction(tmp_path_factory):
    return cases.extraction(tmp_path_factory.mktemp("extract"), shards=2)


def some(job, names, where):
    """The last call of each kind on paths that contain `where`."""
    found = {call.kind: call for call in job.calls if call.name in names and where in call.path}
    assert found
    return list(found.values())


def test_training_killed_while_a_checkpoint_gets_its_name(training):
    for call in some(training, ("rename", "unlink"), "/checkpoints/"):
        training.kill_at(call)


def test_training_killed_while_it_writes_its_results(training):
    for call in some(training, ("rename",), "/dictionary.safetensors") + some(training, ("fsync",), "/report.json"):
        training.kill_at(call)


def test_training_on_a_full_or_failing_disk(training):
    assert training.fail_at(some(training, ("write",), "/checkpoints/")[0], "error=ENOSPC")
    assert training.fail_at(some(training, ("fsync",), "/checkpoints/")[0], "error=EIO")
    assert training.fail_at(some(training, ("write",), "/metrics.jsonl")[0], "error=ENOSPC")
    assert training.fail_at(some(training, ("write",), "/checkpoints/")[0], "retval=1")
    assert training.fail_beyond(6000)


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(training):
    training.kill_at(some(training, ("rename",), "/dictionary.safetensors")[-1])
    folder = cases.faults.Call("openat", str(training.folder / "checkpoints"), 1)
    before = training.finished()
    done = cases.faults.broken([*training.command, "--resume"], folder, "error=EIO")
    assert done.returncode == 4 and f"{folder.path}: cannot be read" in done.stderr, done.stderr
    assert training.finished() == before
    training.resume("after a folder could not be read")


def test_extraction_killed_while_a_shard_gets_its_name(extraction):
    for call in some(extraction, ("rename", "fsync"), "/activations-00001"):
        extraction.kill_at(call)


def test_extraction_on_a_full_or_failing_disk(extraction):
    assert extraction.fail_at(some(extraction, ("pwrite64",), "/activations-00001")[0], "error=ENOSPC")
    assert extraction.fail_at(some(extraction, ("fsync",), "/activations-00001")[0], "error=EIO")
    assert extraction.fail_beyond(6000)
