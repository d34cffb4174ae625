"""LexicoCache on the demo model: against a loop of numpy and scikit-learn, and against the calls that the C++ programs make."""

import copy
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
from sklearn.linear_model import orthogonal_mp  # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

from lexico import LexicoCache  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "data/demo"
SPARSITY, WINDOW, SINKS = 8, 32, 4
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO / "wikillama-5m", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text():
    """Token ids of held-out text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "wikillama-5m/tokenizer.json"))

    def ids(name, count):
        lines = (DEMO / name).read_text(encoding="utf-8").splitlines()
        return torch.tensor(tokenizer.encode("\n".join(json.loads(line)["text"] for line in lines[:40])).ids[:count])[None]

    return ids


@pytest.fixture(scope="module")
def atoms(model, text):
    """Keys and values of training text, scaled to unit length: dictionaries that serve without training."""
    cache = DynamicCache()
    model(text("train.jsonl", 1500), past_key_values=cache)
    rng, found = np.random.default_rng(0), {}
    for index, layer in enumerate(cache.layers):
        for kind, x in (("keys", layer.keys), ("values", layer.values)):
            rows = x.reshape(-1, x.shape[-1]).numpy()
            rows = rows[rng.choice(len(rows), 512, replace=False)]
            found[f"layers.{index:02d}.{kind}.atoms"] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


@pytest.fixture(scope="module")
def dictionaries(atoms, tmp_path_factory):
    path = tmp_path_factory.mktemp("dictionaries") / "dictionary.safetensors"
    save_file(atoms, path, {"format": "lexico-dictionary 1", "key_stage": "post_rope"})
    return path


@pytest.fixture(params=["lexico", "sdpa", "eager"])
def attention(request, model):
    model.set_attn_implementation(request.param)
    yield request.param
    model.set_attn_implementation("sdpa")


@pytest.fixture
def on_codes(model):
    model.set_attn_implementation("lexico")
    yield
    model.set_attn_implementation("sdpa")


def make(model, dictionaries, **changes):
    return LexicoCache(model.config, dictionaries, **{**dict(recent_window=WINDOW, sink_tokens=SINKS, key_sparsity=SPARSITY,
                                                                    value_sparsity=SPARSITY), **changes})  # fmt: skip


class Reference:
    """A model with a cache whose tokens beyond the window are replaced by what scikit-learn's pursuit gives for them."""

    def __init__(self, model, atoms):
        self.model, self.atoms, self.cache, self.coded = model, atoms, DynamicCache(), SINKS

    def __call__(self, ids):
        before = self.cache.get_seq_length()
        logits = self.model(ids, past_key_values=self.cache).logits
        total = self.cache.get_seq_length()
        due = slice(self.coded, max(self.coded, total - WINDOW))
        for index, layer in enumerate(self.cache.layers):
            for kind, x in (("keys", layer.keys), ("values", layer.values)):
                x[:, :, before:] = x[:, :, before:].half().float()
                rows = x[:, :, due].reshape(-1, x.shape[-1]).double().numpy()
                if len(rows):
                    d = self.atoms[f"layers.{index:02d}.{kind}.atoms"].astype(np.float64).T
                    codes = orthogonal_mp(d, rows.T, n_nonzero_coefs=SPARSITY).reshape(d.shape[1], -1)
                    x[:, :, due] = torch.tensor((d @ codes).T).float().view_as(x[:, :, due])
        self.coded = due.stop
        return logits


def greedy(step, ids, count):
    """step(ids [1, T]) -> logits. Token 0 ends a text, which generate() leaves out until min_new_tokens."""
    found, logits = [], step(ids)
    for _ in range(count):
        found.append(1 + logits[0, -1, 1:].argmax().item())
        logits = step(torch.tensor([[found[-1]]]))
    return found


def generate(model, ids, cache, count=40, **named):
    out = model.generate(ids, past_key_values=cache, max_new_tokens=count, min_new_tokens=count, do_sample=False, **named)
    return out[0, ids.shape[1] :].tolist()


def test_greedy_tokens_are_those_of_the_reference(model, text, atoms, dictionaries, attention):
    ids = text("heldout.jsonl", 100)
    cache = make(model, dictionaries)
    ours = generate(model, ids, cache)
    model.set_attn_implementation("sdpa")
    assert ours == greedy(Reference(model, atoms), ids, 40)
    assert cache.get_seq_length() == 139 and cache.codes.coded_tokens(cache.sequences[0], 5) == 139 - WINDOW - SINKS
    assert cache.bytes() == cache.codes.bytes_for(139)
    assert ours != generate(model, ids, DynamicCache())  # compression is felt: the test can fail


def test_greedy_tokens_are_those_of_the_cpp_path(model, text, dictionaries, on_codes, tmp_path):
    """What C++ does: `step` of the exported model on what CompressedCache reconstructs; then its new keys and values are appended."""
    sys.path.insert(0, str(ROOT / "tools"))
    import export_model

    with torch.inference_mode(False):
        export_model.main([str(DEMO / "wikillama-5m"), str(tmp_path / "demo.pt")])
    exported, layers = torch.jit.load(str(tmp_path / "demo.pt")), range(model.config.num_hidden_layers)
    held = make(model, dictionaries)
    codes, row = held.codes, held.codes.add_sequence()

    def step(ids):
        pairs = [codes.reconstruct(layer, row, 0, codes.tokens(row, layer)) for layer in layers]
        past = [torch.stack([pair[i] for pair in pairs])[:, None] for i in range(2)]
        logits, keys, values = exported.step(ids, *past)
        for layer in layers:
            codes.append(layer, [row], keys[layer], values[layer])
        return logits

    ids = text("heldout.jsonl", 100)
    assert generate(model, ids, make(model, dictionaries)) == greedy(step, ids, 40)


def perplexity(step, ids, prompt):
    """Of what follows a prompt, token by token."""
    logits = [step(ids[:, :prompt])[:, -1:]] + [step(ids[:, i : i + 1]) for i in range(prompt, ids.shape[1] - 1)]
    return torch.nn.functional.cross_entropy(torch.cat(logits, 1)[0].double(), ids[0, prompt:]).exp().item()


def test_perplexity_is_that_of_the_reference(model, text, atoms, dictionaries, on_codes):
    ids = text("heldout.jsonl", 220)
    cache = make(model, dictionaries)
    ours = perplexity(lambda part: model(part, past_key_values=cache).logits, ids, 60)
    model.set_attn_implementation("sdpa")
    theirs = perplexity(Reference(model, atoms), ids, 60)
    full = DynamicCache()
    exact = perplexity(lambda part: model(part, past_key_values=full).logits, ids, 60)
    print(f"perplexity {ours:.4f} on codes, {theirs:.4f} reference, {exact:.4f} full; {cache.bytes()} bytes of {cache.dense_bytes()}")
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert abs(exact - theirs) > 1e-2 * exact
    assert cache.counts()["not_finite"] == 0


def test_steps_of_several_tokens_and_long_ones_give_the_same(model, text, dictionaries, attention):
    """Up to 16 new tokens are attended on the codes, more on rebuilt vectors; other implementations always do the latter."""
    ids = text("heldout.jsonl", 150)

    def run():
        cache = make(model, dictionaries)
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([70, 1, 16, 40, 3, 20], 1)], 1)

    ours = run()
    model.set_attn_implementation("sdpa")
    theirs = run()
    assert (torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs)).item() < 1e-3  # pursuit may turn on a last bit


def test_a_padded_batch_gives_what_its_rows_give_alone(model, text, dictionaries, attention):
    """With nothing compressed: then pads, which are cached as well, do not move what is."""
    ids, pad = text("heldout.jsonl", 60), 11
    short = ids[:, pad:]
    batch = torch.cat([ids, torch.cat([torch.zeros(1, pad, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    out = model.generate(batch, attention_mask=mask, past_key_values=make(model, dictionaries, recent_window=200), max_new_tokens=20,
                         min_new_tokens=20, do_sample=False)  # fmt: skip
    for row, alone in enumerate((ids, short)):
        assert out[row, 60:].tolist() == generate(model, alone, make(model, dictionaries, recent_window=200), 20)


def test_rows_of_a_batch_do_not_touch_each_other(model, text, dictionaries, on_codes):
    ids = torch.cat(text("heldout.jsonl", 180).split(60, 1))
    out = model.generate(ids, past_key_values=make(model, dictionaries), max_new_tokens=20, min_new_tokens=20, do_sample=False)
    for row in range(3):
        assert out[row, 60:].tolist() == generate(model, ids[row : row + 1], make(model, dictionaries), 20)


def test_beam_search_moves_rows(model, text, dictionaries, attention):
    ids = text("heldout.jsonl", 60)

    def beams(cache):
        return model.generate(ids, past_key_values=cache, num_beams=3, max_new_tokens=20, min_new_tokens=20, do_sample=False)[0].tolist()

    cache = make(model, dictionaries, recent_window=200)  # nothing compressed: the full cache's beams, but for half floats
    assert beams(cache) == beams(DynamicCache())
    assert len(cache.sequences) == 3
    compressed = make(model, dictionaries)
    ours = beams(compressed)
    model.set_attn_implementation("sdpa")
    assert ours == beams(make(model, dictionaries))
    assert compressed.bytes() < 3 * compressed.codes.bytes_for(79)  # beams share pages


def test_a_prompt_serves_several_continuations(model, text, dictionaries, on_codes, tmp_path):
    ids = text("heldout.jsonl", 100)
    prompt = make(model, dictionaries)
    model(ids[:, :80], past_key_values=prompt)
    once = generate(model, ids, copy.deepcopy(prompt), 10)
    assert prompt.get_seq_length() == 80
    assert generate(model, ids, prompt.fork(), 10) == once
    prompt.save(tmp_path / "prompt.lexico")
    loaded = make(model, dictionaries)
    loaded.load(tmp_path / "prompt.lexico")
    assert loaded.get_seq_length() == 80 and generate(model, ids, loaded, 10) == once
    kept = prompt.bytes()
    fork = prompt.fork()
    model(ids[:, 80:], past_key_values=fork)
    del fork
    assert prompt.bytes() == kept


def test_crop_takes_tokens_back(model, text, dictionaries, on_codes):
    ids, cache = text("heldout.jsonl", 100), make(model, dictionaries, compress_chunk=16)
    model(ids[:, :60], past_key_values=cache)
    before = model(ids[:, 60:61], past_key_values=cache).logits
    cache.crop(-1)
    assert cache.get_seq_length() == 60
    assert torch.equal(model(ids[:, 60:61], past_key_values=cache).logits, before)
    with pytest.raises(ValueError, match="negative number, got 5"):
        cache.crop(5)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.bytes() == 0
    assert generate(model, ids, cache, 5) == generate(model, ids, make(model, dictionaries, compress_chunk=16), 5)


def test_assisted_generation_runs_on_it(model, text, dictionaries, on_codes):
    """Prompt lookup: several tokens a step, some of them taken back."""
    ids = text("heldout.jsonl", 60)
    cache = make(model, dictionaries, recent_window=200)
    assert generate(model, ids, cache, 20, prompt_lookup_num_tokens=4) == generate(model, ids, make(model, dictionaries, recent_window=200), 20)


def test_a_bfloat16_model_is_served(dictionaries, text, model):
    half = AutoModelForCausalLM.from_pretrained(DEMO / "wikillama-5m", dtype=torch.bfloat16, attn_implementation="lexico").eval()
    cache = make(half, dictionaries, exact="bfloat16")
    ids = text("heldout.jsonl", 100)
    model(ids[:, :60], past_key_values=(full := make(model, dictionaries)))
    half(ids[:, :60], past_key_values=cache)
    ours = half(ids[:, 60:64], past_key_values=cache).logits
    assert ours.dtype == torch.bfloat16
    theirs = model(ids[:, 60:64], past_key_values=full).logits
    assert (torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs)).item() < 0.05


def test_errors_name_what_does_not_fit(model, text, dictionaries, on_codes):
    with pytest.raises(ValueError, match="sliding_attention"):
        config = transformers.MistralConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, sliding_window=8)
        LexicoCache(config, dictionaries)
    with pytest.raises(ValueError, match="dim"):
        LexicoCache(transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2), dictionaries)
    cache = make(model, dictionaries)
    with pytest.raises(ValueError, match="empty"):
        cache.reconstruct(0)
    ids = text("heldout.jsonl", 40)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 1 sequences, got a batch of 2"):
        model(ids[:, :2].view(2, 1), past_key_values=cache)
    small = make(model, dictionaries, max_bytes=make(model, dictionaries).codes.bytes_for(40))
    model(ids, past_key_values=small)
    with pytest.raises(RuntimeError, match="max_bytes"):
        for _ in range(1000):
            model(ids[:, :30], past_key_values=small)
    small.crop(0)
    tokens = small.get_seq_length()
    assert all(layer.get_seq_length() == tokens for layer in small.layers)


def test_without_a_lexico_cache_the_attention_is_sdpa(model, text, on_codes):
    ids = text("heldout.jsonl", 50)
    ours = model(ids).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, model(ids).logits)


SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
ARCHITECTURES = {
    "Llama": dict(SMALL, num_key_value_heads=2),
    "Qwen2": dict(SMALL, num_key_value_heads=2),
    "Qwen3": dict(SMALL, num_key_value_heads=2, head_dim=16),
    "Mistral": dict(SMALL, num_key_value_heads=1, sliding_window=None),
    "GPT2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=256, scale_attn_by_inverse_layer_idx=True),
    "GPTNeoX": dict(SMALL, rotary_pct=0.5),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name, tmp_path):
    config = getattr(transformers, name + "Config")(**ARCHITECTURES[name])
    torch.manual_seed(0)
    small = getattr(transformers, name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"))(config).eval()
    for weights in small.parameters():
        if weights.dim() == 2:
            weights.normal_(std=0.3)
    dim = getattr(config, "head_dim", None) or 8
    atoms = torch.nn.functional.normalize(torch.randn(4, 64, dim), dim=-1).numpy()
    tensors = {f"layers.{i // 2:02d}.{('keys', 'values')[i % 2]}.atoms": atoms[i] for i in range(4)}
    save_file(tensors, tmp_path / "dictionary.safetensors", {"format": "lexico-dictionary 1", "key_stage": "post_rope"})
    ids = torch.randint(3, 64, (2, 90))

    def read(implementation, cache):
        small.set_attn_implementation(implementation)
        return torch.cat([small(part, past_key_values=cache).logits for part in ids.split([60, 1, 1, 4, 24], 1)], 1)

    def far(a, b):
        return (torch.linalg.norm(a - b) / torch.linalg.norm(b)).item()

    def cache(window):
        return LexicoCache(config, tmp_path, recent_window=window, key_sparsity=4, value_sparsity=4, exact="float32")

    full = read("sdpa", DynamicCache())
    assert far(read("lexico", cache(200)), full) < 1e-5
    compressed = read("lexico", cache(16))
    assert far(compressed, read("sdpa", cache(16))) < 1e-3 < far(compressed, full)
