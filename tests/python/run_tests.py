"""Runs the tests of this folder; exits with 77 (skipped) and says why where a package is missing."""

import importlib.util
import sys
from pathlib import Path

missing = [name for name in ("pytest", "torch", "transformers", "tokenizers") if not importlib.util.find_spec(name)]
if missing:
    print(f"skipped: {sys.executable} has no {', '.join(missing)}; run scripts/setup")
    sys.exit(77)

import pytest  # noqa: E402

sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning:torch", str(Path(__file__).parent), *sys.argv[1:]]))
