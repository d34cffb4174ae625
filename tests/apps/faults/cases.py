"""What a small run of lexico-train and of lexico-extract must survive, whichever of its system calls is the last or fails."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
import activations  # noqa: E402
import faults  # noqa: E402
import toy_model  # noqa: E402

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
BIN = Path(os.environ["LEXICO_BIN"]).resolve()


class Job:
    """A command that writes a folder, and what it leaves there when nothing goes wrong. Runs one after the other use one path,
    so that outputs that hold it can be compared."""

    def __init__(self, command, folder):
        self.folder = folder
        self.command = [*map(str, command), "--output", str(folder)]
        folder.parent.mkdir(exist_ok=True)
        self.calls = faults.calls_in(folder, self.command)
        self.reference = self.contents()
        self.clear()

    def clear(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def comparable(self, path: Path, content: bytes):
        return content

    def ignored(self, name: str) -> bool:
        return False

    def contents(self) -> dict:
        files = (p for p in sorted(self.folder.rglob("*")) if p.is_file())
        return {str(p.relative_to(self.folder)): self.comparable(p, p.read_bytes()) for p in files if not self.ignored(p.name)}

    def finished(self) -> dict:
        """The pieces of work that are done: what a resumed run must not write again."""
        return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in self.folder.rglob(self.pieces)}

    def check(self, what, said=""):
        """That the output is as if nothing had gone wrong; an old file that could not be removed must have been named in a warning."""
        now = self.contents()
        for name in re.findall(r"warning: " + re.escape(str(self.folder)) + r"/(\S+): cannot be removed", said):
            now.pop(name, None)
        different = [name for name in {*now, *self.reference} if now.get(name) != self.reference.get(name)]
        assert not different, f"{what}: {sorted(different)} differ; there are {sorted(now)}"

    def resume(self, what):
        before = self.finished()
        done = faults.run([*self.command, "--resume"])
        assert done.returncode == 0, f"{what}, resumed: exit {done.returncode}\n{done.stderr}"
        self.check(what)
        again = [str(p) for p, place in before.items() if p.exists() and self.finished()[p] != place]
        assert not again, f"{what}: made again: {again}"
        self.check_resumed(what, before, done)

    def check_resumed(self, what, before, done):
        pass

    # --- what can go wrong ---

    def kill_at(self, call):
        self.clear()
        done = faults.broken(self.command, call, "signal=SIGKILL")
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), f"{call}: exit {done.returncode}\n{done.stderr}"
        self.resume(f"killed at {call}")

    def fail_at(self, call, fault):
        """@returns whether the run ended with an error."""
        self.clear()
        return self.check_failed(faults.broken(self.command, call, fault), f"{fault} at {call}")

    def fail_beyond(self, max_file_bytes):
        self.clear()
        return self.check_failed(faults.limited(self.command, max_file_bytes), f"files limited to {max_file_bytes} bytes")

    def check_failed(self, done, what):
        """Either it did without that call, or it said which file is concerned, left what was there, and goes on."""
        if done.returncode == 0:
            self.check(what, done.stderr)
            return False
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 4, f"{what}: exit {done.returncode}\n{done.stderr}"
        assert str(self.folder) in last and "internal error" not in last, f"{what}: {last}"
        assert re.search(r"Input/output error|No space left|File too large|disk|written|write", last), f"{what}: {last}"
        assert not list(self.folder.rglob("*.partial")), f"{what}: left {list(self.folder.rglob('*.partial'))}"
        self.resume(what)
        return True

    def kill_at_random(self, kills, seconds, seed):
        """Kills runs at random times and resumes them until as many kills are done. @returns runs that came to their end."""
        rng, done, ends = random.Random(seed), 0, 0
        self.clear()
        resumed = False
        while True:
            process = subprocess.Popen([*self.command, *(["--resume"] if resumed else [])], stdout=subprocess.DEVNULL,
                                       stderr=subprocess.PIPE, text=True)  # fmt: skip
            before = self.finished()
            try:
                if done < kills:
                    process.wait(rng.uniform(0.0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                done += 1
            stderr = process.communicate()[1]
            assert process.returncode in (0, -signal.SIGKILL), f"exit {process.returncode}\n{stderr}"
            again = [str(p) for p, place in before.items() if p.exists() and self.finished()[p] != place]
            assert not again, f"made again: {again}"
            resumed = process.returncode != 0
            if not resumed:
                self.check(f"killed {done} times so far")
                ends += 1
                if done >= kills:
                    return ends
                self.clear()


class Training(Job):
    pieces = "step-*.safetensors"
    last_step = 0  # > 0: checkpoints are made by the clock, so that only the last one is the same in each run

    def ignored(self, name):
        return name.startswith(("events.out.", "step-") if self.last_step else "events.out.") and f"{self.last_step:010}." not in name

    def comparable(self, path, content):
        """Without times, and without the command, which may have --resume."""
        if path.name in ("run.json", "report.json"):
            record = json.loads(content)
            for part in (record, record.get("training", {})):
                for key in ("started", "finished", "created", "seconds", "phases", "peak_memory_bytes", "command"):
                    part.pop(key, None)
            return record
        if path.name == "report.html":
            return re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC| --resume|\bin \d+ s\b", b"", content)
        return content

    def check_resumed(self, what, before, done):
        steps = [int(re.search(r"step-(\d+)", p.name)[1]) for p in before]
        if not steps:
            assert "no checkpoint yet" in done.stderr, f"{what}: {done.stderr}"
        else:
            assert f"from step {max(steps)}" in done.stderr, f"{what}: {done.stderr}"


class Extraction(Job):
    pieces = "activations-*.h5"

    def comparable(self, path, content):
        return content if path.suffix == ".h5" else "not a shard"


def training(folder: Path, steps=4, batch=64, checkpoint_seconds="1e-9", tokens=600) -> Training:
    """With a checkpoint after every step, if not by the clock."""
    Training.last_step = 0 if float(checkpoint_seconds) < 1e-6 else steps
    data = activations.write(folder / "activations.h5", layers=1, tokens=tokens)
    return Training([BIN / "lexico-train", "--data", data, "--num-atoms", 16, "--sparsity", 2, "--vectors", steps * batch,
                     "--batch-size", batch, "--checkpoint-seconds", checkpoint_seconds, "--validation-vectors", 50,
                     "--key-stage", "post_rope", "--coding", "exact", "--threads", 1], folder / "place" / "run")  # fmt: skip


def extraction(folder: Path, shards=3, milliseconds=0) -> Extraction:
    toy_model.save(folder / "toy.pt", model=toy_model.ToyModel(milliseconds=milliseconds))
    np.arange(16 * shards, dtype="<i4").__mod__(250).tofile(folder / "ids.bin")
    return Extraction([BIN / "lexico-extract", "--model", folder / "toy.pt", "--token-ids", folder / "ids.bin", "--bos", "none",
                       "--sequence-length", 16, "--shard-vectors", 32, "--threads", 1], folder / "place" / "shards")  # fmt: skip
