"""Runs one pytest file; exits with 77 (skipped) and says why where a package is missing."""

import importlib.util
import sys

missing = [name for name in ("pytest", "h5py", "numpy", "safetensors", "torch") if not importlib.util.find_spec(name)]
if missing:
    print(f"skipped: {sys.executable} has no {', '.join(missing)}; run scripts/setup")
    sys.exit(77)

import pytest  # noqa: E402

sys.dont_write_bytecode = True
status = pytest.main(["-q", "-rs", "-p", "no:cacheprovider", "-o", "markers=slow", *sys.argv[1:]])
sys.exit(77 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status)  # the whole file is skipped, and says why
