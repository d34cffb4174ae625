"""`recipe: lexico` against a reference implementation of the published training step in PyTorch, where one is at hand."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ORACLE = Path(__file__).resolve().parents[2] / ".." / "shared" / "tools" / "lexico_recipe.py"
FOLLOW = Path(os.environ["LEXICO_BIN"]) / "follow_recipe"


@pytest.mark.skipif(not ORACLE.exists(), reason=f"no reference implementation at {ORACLE}")
@pytest.mark.parametrize("sparsity", [4, 8])
def test_losses_and_atoms_are_those_of_the_reference(tmp_path, sparsity):
    case, theirs, ours = (str(tmp_path / name) for name in ("case", "theirs", "ours"))
    subprocess.run([sys.executable, ORACLE, "make", case, "--steps", "120"], check=True)
    reference = [sys.executable, ORACLE, "train", case, theirs, "--max-atoms", str(sparsity), "--steps-per-epoch", "40"]
    subprocess.run(reference, check=True)
    subprocess.run([FOLLOW, case, ours, str(sparsity), "1e-4", "40"], check=True)
    theirs, ours = load_file(theirs), load_file(ours)
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
    np.testing.assert_allclose(ours["relative_error"], theirs["relative_error"], rtol=1e-4)
    np.testing.assert_allclose(ours["atoms"], theirs["atoms"], rtol=0, atol=1e-3)
