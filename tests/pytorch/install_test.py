"""pip install of the source tree, as a user does it, into an empty folder: the package brings its library and works from there."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

USE = """
import sys, torch, lexico
assert lexico.__file__.startswith(sys.argv[1]), lexico.__file__
atoms = torch.nn.functional.normalize(torch.randn(64, 16, generator=torch.manual_seed(1)), dim=1)
vectors = 2 * atoms[[5, 40]] - atoms[[7, 3]]
indices, weights = torch.ops.lexico.encode(vectors, atoms, 4)[:2]
print(float((torch.ops.lexico.decode(indices, weights, atoms) - vectors).abs().max()) < 1e-5, lexico.LexicoCache.__name__)
"""


def test_pip_installs_a_package_that_works(tmp_path):
    site = tmp_path / "site"
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-C", f"build-dir={tmp_path / 'build'}",
                           "--target", site, ROOT], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (site / "lexico/liblexico_torch.so").exists()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LEXICO_TORCH_LIBRARY")}
    used = subprocess.run([sys.executable, "-c", USE, site], capture_output=True, text=True, cwd=tmp_path,
                          env=environment | {"PYTHONPATH": str(site)})  # fmt: skip
    assert used.stdout.split() == ["True", "LexicoCache"], used.stdout + used.stderr
