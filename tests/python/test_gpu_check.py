"""scripts/gpu_check with stand-ins for the GPU and for what was built: the table says what happened, and so does the exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TEST = """#!{python}
import json, sys
path = next(word.split("json:", 1)[1] for word in sys.argv if "json:" in word) if any("json:" in word for word in sys.argv) else None
if path:
    json.dump({{"testsuites": [{{"testsuite": {cases}}}]}}, open(path, "w"))
sys.exit({code})
"""


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def check(tmp_path):
    bins, fakes = tmp_path / "bins", tmp_path / "fakes"
    bins.mkdir(), fakes.mkdir()

    def run(tests, gpu=True, extra=()):
        if gpu:
            program(fakes / "nvidia-smi", "#!/bin/sh\necho A GPU\n")
        for name, (cases, code) in tests.items():
            program(bins / name, TEST.format(python=sys.executable, cases=repr(cases), code=code))
        path = os.pathsep.join([str(fakes), *(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvidia-smi").exists())])
        done = subprocess.run([sys.executable, ROOT / "scripts/gpu_check", "--binaries", bins, "--out", tmp_path / "out", *extra],
                              capture_output=True, text=True, env=os.environ | {"PATH": path})  # fmt: skip
        report = tmp_path / "out/gpu_check.json"
        rows = {row["what"]: row for row in json.loads(report.read_text())["rows"]} if report.exists() else {}
        return done, rows

    return run


def test_passed_skipped_and_failed_tests_are_told_apart(check):
    done, rows = check({
        "test_kernels_a_cuda": ([{"name": "Works", "result": "COMPLETED"}], 0),
        "test_kernels_b_cuda": ([{"name": "NoDevice", "result": "SKIPPED"}], 0),
        "test_kernels_c_cuda": ([{"name": "Breaks", "result": "COMPLETED", "failures": [{}]}], 1),
        "test_kernels_d_cuda": ([{"name": "Dies", "result": "COMPLETED"}], 139),
    })  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert [rows[f"test_kernels_{x}_cuda"]["result"] for x in "abcd"] == ["pass", "skip", "fail", "fail"]
    assert "Breaks" in rows["test_kernels_c_cuda"]["detail"] and "2 of" in done.stdout
    assert rows["A GPU"]["result"] == "pass"


def test_without_a_gpu_it_says_so_and_is_content(check):
    done, rows = check({"test_kernels_a_cuda": ([], 1)}, gpu=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows["GPU"] == {"part": "device", "what": "GPU", "result": "skip", "detail": "no GPU here: nothing was run on one"}
    assert "test_kernels_a_cuda" not in rows


TRAIN = """#!{python}
import json, pathlib, sys
word = lambda name: sys.argv[sys.argv.index(name) + 1]
run = pathlib.Path(word("--output"))
run.mkdir(parents=True)
json.dump({{"rows": [{{"mean": 0.1}}, {{"mean": 0.2 * ({factor} if word("--device") == "cuda" else 1)}}]}}, open(run / "report.json", "w"))
"""


@pytest.mark.parametrize("factor, result", [(1.01, "pass"), (1.2, "fail")])
def test_training_on_both_devices_must_agree(check, tmp_path, factor, result):
    program(tmp_path / "bins/lexico-train", TRAIN.format(python=sys.executable, factor=factor))
    (tmp_path / "bins/wikillama-5m.pt").touch()
    done, rows = check({})
    assert rows["training on cuda as on cpu"]["result"] == result, done.stdout + done.stderr
    assert done.returncode == (result == "fail")


@pytest.mark.parametrize("extra, said", [(["--rounds", "0"], "--rounds is 0"), (["--binaries", "/no/such"], "/no/such is no folder")])
def test_wrong_usage_is_named(check, extra, said):
    done, _ = check({}, extra=extra)
    assert done.returncode == 2 and said in done.stderr
