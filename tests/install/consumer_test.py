"""The installed core library as another project meets it: examples/consumer, outside the tree."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
CMAKE, CXX, FLAGS = os.environ["LEXICO_CMAKE"], os.environ["LEXICO_CXX"], os.environ["LEXICO_CXX_FLAGS"]
LAYERS, HEADS, DIM, ATOMS, TOKENS, SPARSITY = 2, 2, 32, 128, 200, 4


def run(*command, code=0, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("install")
    run(CMAKE, "--install", os.environ["LEXICO_BUILD"], "--component", "lexico", "--prefix", home / "made")
    (home / "made").rename(home / "prefix")  # an installed package may be moved
    shutil.copytree(ROOT / "examples/consumer", home / "source")
    rng = np.random.default_rng(1)
    atoms = rng.standard_normal((2 * LAYERS, ATOMS, DIM))
    atoms = (atoms / np.linalg.norm(atoms, axis=2, keepdims=True)).astype(np.float32)
    tensors = {f"layers.{i // 2:02d}.{'values' if i % 2 else 'keys'}.atoms": atoms[i] for i in range(2 * LAYERS)}
    metadata = {name[: -len(".atoms")]: f'{{"format": "fp8-int16", "max_atoms": {SPARSITY}}}' for name in tensors}
    save_file(tensors, home / "dictionary.safetensors", metadata={"format": "lexico-dictionary 1", "key_stage": "post_rope", **metadata})
    vectors = np.zeros((2 * LAYERS, TOKENS * HEADS, DIM), np.float32)
    for i in range(2 * LAYERS):  # of two atoms each
        for row in range(TOKENS * HEADS):
            vectors[i, row] = rng.choice([-1, 1], 2) @ atoms[i, rng.choice(ATOMS, 2, replace=False)]
    vectors.tofile(home / "vectors.f32")
    return home


def configure(home, source, build, *arguments, code=0):
    return run(CMAKE, "-S", source, "-B", home / build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={home / 'prefix'}", f"-DCMAKE_CXX_COMPILER={CXX}",
               f"-DCMAKE_CXX_FLAGS={FLAGS}", *arguments, code=code)  # fmt: skip


@pytest.fixture(scope="module")
def consumer(home):
    configure(home, home / "source", "build", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    run(CMAKE, "--build", home / "build")
    return home / "build/lexico_consumer"


def test_consumer_compresses_and_attends(home, consumer):
    out = run(consumer, home / "dictionary.safetensors", HEADS, TOKENS, home / "vectors.f32")
    assert f"tokens          {TOKENS}, of which coded {TOKENS - 16}" in out
    held, dense = map(int, re.search(r"bytes +(\d+), as 16-bit numbers (\d+)", out).groups())
    assert dense == LAYERS * 2 * TOKENS * HEADS * DIM * 2 and held < dense
    for error in ("vector", "attention"):  # what E4M3 weights lose
        assert 0 < float(re.search(rf"{error} error +([\d.]+)", out)[1]) < 0.06, out
    assert "attention error" in run(consumer, home / "dictionary.safetensors", HEADS, 40)


def test_consumer_names_what_is_wrong(home, consumer):
    assert "usage:" in run(consumer, code=2)
    assert "TOKENS is '0', must be in" in run(consumer, home / "dictionary.safetensors", HEADS, 0, code=2)
    assert "nowhere.safetensors" in run(consumer, home / "nowhere.safetensors", HEADS, TOKENS, code=3)
    assert "vectors.f32: has" in run(consumer, home / "dictionary.safetensors", HEADS, TOKENS + 1, home / "vectors.f32", code=3)


def test_consumer_links_neither_torch_nor_hdf5(consumer):
    needed = run("ldd", consumer)
    assert "libc.so" in needed
    assert not re.search("lib(torch|c10|hdf5|cuda|python)", needed), needed


def test_core_headers_are_installed_and_stand_alone(home):
    folder = home / "prefix/include/lexico"
    names = {path.name for path in folder.iterdir()}
    assert {"compressed_cache.h", "attention.h", "encoder.h", "dictionary.h", "error.h"} <= names
    assert not names & {"language_model.h", "activations.h", "trainer.h", "tokenizer.h", "pt_file.h"}
    all_of_them = "".join(f'#include "lexico/{name}"\n' for name in sorted(names))
    run(CXX, "-std=c++20", "-fsyntax-only", "-x", "c++", "-I", home / "prefix/include", "-", input=all_of_them)


def test_another_version_is_refused(home):
    major, minor, _ = os.environ["LEXICO_VERSION"].split(".")
    source = home / "newer"
    shutil.copytree(home / "source", source)
    lists = source / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace("find_package(lexico 0.1 REQUIRED)", f"find_package(lexico {major}.{int(minor) + 1} REQUIRED)"))
    assert "lexico" in configure(home, source, "build-newer", code=1)
