"""What a compressed cache does to the demo model, measured by us and, independently, with transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[2]
MEASURE = Path(os.environ["LEXICO_BIN"]) / "measure_cache_effect"
DEMO = ROOT / "data/demo/wikillama-5m"
GRID = 0.5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "demo.pt"
    subprocess.run([sys.executable, ROOT / "tools/export_model.py", DEMO, path], check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="eager").eval()


def held_out(sequences: int, length: int) -> np.ndarray:
    """Sequences of text the model has not seen, each with the start token in front."""
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    start = json.loads((DEMO / "config.json").read_text())["bos_token_id"]
    texts = [json.loads(line)["text"] for line in (ROOT / "data/demo/heldout.jsonl").read_text().splitlines()]
    ids = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids]
    body = np.array(ids[: sequences * (length - 1)]).reshape(sequences, length - 1)
    return np.concatenate((np.full((sequences, 1), start), body), 1).astype(np.int32)


@torch.no_grad()
def reference(model, ids: np.ndarray, window: int, sinks: int, chunk: int) -> dict:
    """One sequence at a time; the full cache in one pass without any cache."""
    divergences, full_nll, compressed_nll = [], [], []
    for sequence in torch.from_numpy(ids).long():
        length = len(sequence)
        p = model(sequence[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        keys = [torch.empty(0)] * model.config.num_hidden_layers
        values = list(keys)
        logits, rounded = [], sinks  # tokens before `rounded` have had their turn
        for start in range(0, length, chunk):
            for tensors in (keys, values) if start - window > rounded else ():
                for tensor in tensors:
                    old = tensor[:, :, rounded : start - window]
                    old.copy_(torch.round(old / GRID) * GRID)
            rounded = max(rounded, start - window)
            cache = transformers.DynamicCache()
            for layer in range(len(keys) if start else 0):
                cache.update(keys[layer], values[layer], layer)
            end = min(start + chunk, length)
            result = model(sequence[None, start:end], past_key_values=cache, use_cache=True,
                           position_ids=torch.arange(start, end)[None])  # fmt: skip
            logits.append(result.logits[0])
            keys = [layer.keys.clone() for layer in cache.layers]
            values = [layer.values.clone() for layer in cache.layers]
        q = torch.cat(logits)[:-1].double().log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
        full_nll.append(-p.gather(1, sequence[1:, None]))
        compressed_nll.append(-q.gather(1, sequence[1:, None]))
    divergences = torch.cat(divergences)
    return dict(tokens=len(divergences), full_perplexity=torch.cat(full_nll).mean().exp().item(),
                compressed_perplexity=torch.cat(compressed_nll).mean().exp().item(),
                mean_kl=divergences.mean().item(), p99_kl=np.quantile(divergences.numpy(), 0.99))  # fmt: skip


@pytest.mark.parametrize(
    "sequences, length, settings",
    [
        (6, 200, [(32, 0, 32), (4, 2, 4), (0, 0, 25)]),
        (2, 60, [(8, 1, 1)]),  # token by token
    ],
)
def test_perplexity_and_divergence_are_those_of_transformers(tmp_path, exported, model, sequences, length, settings):
    ids = held_out(sequences, length)
    ids.tofile(tmp_path / "ids")
    numbers = [str(number) for setting in settings for number in setting]
    command = [MEASURE, exported, tmp_path / "ids", str(length), str(GRID), *numbers]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two wait for each other where a core is busy with something else
    measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=one_thread).stdout)
    assert len(measured) == len(settings)
    for setting, ours in zip(settings, measured):
        theirs = reference(model, ids, *setting)
        assert theirs["mean_kl"] > 1e-4  # rounding does something
        assert ours["tokens"] == theirs["tokens"] == sequences * (length - 1)
        for name in ("full_perplexity", "compressed_perplexity", "mean_kl", "p99_kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (setting, name)
