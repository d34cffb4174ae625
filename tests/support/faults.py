"""Breaks one system call of a program: strace lists the calls that touch a folder, then runs the program again and kills it at one
of them, or lets that one fail."""

import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

CHANGES = ("write", "pwrite64", "writev", "pwritev", "fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink", "unlinkat",
           "openat", "ftruncate", "fallocate", "mkdir", "mkdirat")  # fmt: skip
LINE = re.compile(r"^(\d+) +(\w+)\((?:AT_FDCWD<[^>]*>, )?(?:\d+<([^>]*)>|\"([^\"]*)\")")


def why_not() -> str | None:
    """Why programs cannot be traced here; None: they can."""
    if shutil.which("strace") is None:
        return "there is no strace"
    done = subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return None if done.returncode == 0 else f"strace cannot trace here: {done.stderr.strip()[:200]}"


@dataclass(frozen=True)
class Call:
    """The nth call of this name on this path, counted from 1 in each thread."""

    name: str
    path: str
    nth: int

    def __str__(self):
        return f"{self.name} {self.nth} of {self.path}"

    @property
    def kind(self):
        """Calls that are alike: numbers in the name of the file left out."""
        return self.name, re.sub(r"\d+", "0", self.path)


def run(command, timeout=120, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout, **options)


def traced(command, options, **run_options):
    """@returns how it ended, and strace's lines."""
    with tempfile.NamedTemporaryFile("r", suffix=".strace") as log:
        done = run(["strace", "-f", "-y", "-qq", "-o", log.name, *options, *command], **run_options)
        return done, log.read().splitlines()


def calls_in(folder: Path, command, **options) -> list[Call]:
    """Of an undisturbed run, in order. Names of event files hold the time: those calls are of no fixed path and left out."""
    done, lines = traced(command, ["--seccomp-bpf", "-e", "trace=" + ",".join(CHANGES)], **options)
    assert done.returncode == 0, done.stderr
    counts, calls = Counter(), []
    for line in lines:
        found = LINE.match(line)
        if not found:
            continue
        thread, name, path = found[1], found[2], found[3] or found[4]
        if not path.startswith(str(folder)) or "/events.out." in path:
            continue
        counts[thread, name, path] += 1
        calls.append(Call(name, path, counts[thread, name, path]))
    assert calls
    return list(dict.fromkeys(calls))


def broken(command, call: Call, fault: str, **options):
    """Runs `command` with `fault` (signal=SIGKILL, error=EIO, retval=0, ...) at `call`, which must be reached."""
    fast = [] if fault.startswith("signal") else ["--seccomp-bpf"]  # strace 6.1 loses the signal with it
    done, lines = traced(command, [*fast, "-P", call.path, "-e", f"trace={call.name}", "-e",
                                   f"inject={call.name}:{fault}:when={call.nth}"], **options)  # fmt: skip
    reached = any("(INJECTED)" in line or "killed by SIGKILL" in line for line in lines)
    assert reached, f"{call} was not reached:\n{done.stderr}"
    return done


def limited(command, max_file_bytes: int, **options):
    """Runs `command` where no file can grow beyond a size: the write that would is cut short, the next one fails."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    return run(command, preexec_fn=limit, **options)
