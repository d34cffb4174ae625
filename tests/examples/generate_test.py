"""lexico-generate as its user meets it, on a toy model that attends to its cache."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import programs  # noqa: E402
import toy_model  # noqa: E402

GENERATE = str(Path(os.environ["LEXICO_BIN"]) / "lexico-generate")
LAYERS, KV_HEADS, DIM, VOCAB = 2, 2, 8, toy_model.VOCAB
torch.set_num_threads(1)


class ToyDecoder(nn.Module):
    """Two layers of attention without anything between; the next token depends on all keys and values."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        draw = lambda *shape: nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)  # noqa: E731
        self.embedding, self.out = draw(VOCAB, 16), draw(16, VOCAB)
        self.to_all = draw(2, 3, 16, 16)

    def read(self, input_ids: Tensor, past_keys: Tensor, past_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, past = input_ids.shape[0], input_ids.shape[1], past_keys.shape[3]
        hidden = self.embedding[input_ids]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for layer in range(2):
            q, k, v = [(hidden @ self.to_all[layer, i]).reshape(batch, length, 2, 8).transpose(1, 2) for i in range(3)]
            keys.append(k)
            values.append(v)
            scores = q @ torch.cat((past_keys[layer], k), 2).transpose(2, 3)
            later = torch.arange(past + length)[None, :] > (past + torch.arange(length))[:, None]
            seen = torch.softmax(scores.masked_fill(later, -1e9), -1) @ torch.cat((past_values[layer], v), 2)
            hidden = hidden + seen.transpose(1, 2).reshape(batch, length, 16)
            hidden = hidden / hidden.pow(2).sum(2, keepdim=True).sqrt()
        return hidden @ self.out, torch.stack(keys), torch.stack(values)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(2, input_ids.shape[0], 2, 0, 8)
        logits, keys, values = self.read(input_ids, nothing, nothing)
        return keys, values

    @torch.jit.export
    def step(self, input_ids: Tensor, past_keys: Tensor, past_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.read(input_ids, past_keys, past_values)


def expected(model, prompt, tokens):
    """The likeliest continuation, without any cache."""
    ids = list(prompt)
    nothing = torch.zeros(2, 1, 2, 0, 8)
    for _ in range(tokens):
        ids.append(int(model.read(torch.tensor([ids]), nothing, nothing)[0][0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("generate")
    model = ToyDecoder()
    rope = dict(kind="none", layout="half", rotary_dim=0, inverse_frequencies=[], attention_scaling=1.0)
    toy_model.save(home / "toy.pt", model=model, methods=["forward", "step"], rope=rope)
    toy_model.save(home / "old.pt", methods=["forward"])
    toy_model.save_tokenizer(home / "tokenizer.json")
    rng = np.random.default_rng(1)
    (home / "run").mkdir()
    tensors = {f"layers.{i // 2:02d}.{'values' if i % 2 else 'keys'}.atoms": rng.standard_normal((64, DIM)).astype(np.float32) for i in range(2 * LAYERS)}
    save_file(tensors, home / "run/dictionary.safetensors", metadata={"format": "lexico-dictionary 1", "key_stage": "post_rope"})
    return home


def run(home, *arguments, **options):
    return programs.run(GENERATE, "--model", home / "toy.pt", "--dictionary", home / "run", "--threads", 1, *arguments, **options)


def result(home, *arguments):
    return json.loads(run(home, "--prompt", "It was in the year", "--json", *arguments).stdout)


def test_all_atoms_give_the_text_of_the_full_cache(home):
    found = result(home, "--tokens", 20, "--sparsity", 8, "--recent-window", 4)  # as many atoms as dims
    prompt = [toy_model.BOS, *b"It was in the year"]
    assert found["prompt_tokens"] == len(prompt)
    assert found["full"]["ids"] == found["compressed"]["ids"] == expected(ToyDecoder(), prompt, 20)
    assert len(set(found["full"]["ids"])) > 3
    assert found["same_tokens"] == 20
    tokens = len(prompt) + 19  # the last one is not read
    assert (found["cached_tokens"], found["coded_tokens"]) == (tokens, tokens - 4 - 4)  # less sinks and window
    assert found["full_bytes"] == tokens * 2 * LAYERS * KV_HEADS * DIM * 2


def test_one_atom_gives_another_text_in_fewer_bytes(home):
    found = result(home, "--tokens", 40, "--sparsity", 1, "--recent-window", 0, "--sink-tokens", 0)
    assert found["same_tokens"] < 40
    assert found["compressed"]["ids"][0] == found["full"]["ids"][0]  # the prompt attends to itself exactly
    text = run(home, "--prompt", "It was in the year", "--tokens", 40, "--sparsity", 1, "--recent-window", 0).stdout
    assert "full cache" in text and "compressed cache" in text and "dense vectors reconstructed" in text
    whole = result(home, "--tokens", 40, "--sparsity", 1, "--recent-window", 64)
    assert whole["coded_tokens"] == 0 and whole["compressed"] == whole["full"]


def test_a_file_is_a_prompt_too(home):
    (home / "prompt.txt").write_text("It was in the year")
    found = json.loads(run(home, "--prompt-file", home / "prompt.txt", "--json", "--tokens", 5).stdout)
    assert found["full"] == result(home, "--tokens", 5)["full"]


def test_bad_input_is_named(home):
    base = ["--model", home / "toy.pt", "--dictionary", home / "run"]
    cases = [
        (2, "model is missing", ["--dictionary", home / "run", "--prompt", "x"]),
        (2, "dictionary is missing", ["--model", home / "toy.pt", "--prompt", "x"]),
        (2, "one of --prompt TEXT and --prompt-file FILE", [*base]),
        (2, "tokens is 0", [*base, "--prompt", "x", "--tokens", 0]),
        (2, "are more than the 64 positions", [*base, "--prompt", "x", "--tokens", 63]),
        (2, "recent_window is -1", [*base, "--prompt", "x", "--recent-window", -1]),
        (3, "nowhere.pt", ["--model", home / "nowhere.pt", "--dictionary", home / "run", "--prompt", "x"]),
        (3, "has no method 'step'", ["--model", home / "old.pt", "--dictionary", home / "run", "--prompt", "x"]),
        (3, "nowhere", ["--model", home / "toy.pt", "--dictionary", home / "nowhere", "--prompt", "x"]),
        (3, "nothing.txt", [*base, "--prompt-file", home / "nothing.txt"]),
    ]
    with ThreadPoolExecutor(4) as pool:
        for case, done in zip(cases, pool.map(lambda case: programs.run(GENERATE, *case[2], code=case[0]), cases)):
            assert case[1] in done.stderr.strip().splitlines()[-1], done.stderr
            assert done.stdout == ""
    help_text = programs.run(GENERATE, "--help").stdout
    assert "--recent-window" in help_text and "Example" in help_text
