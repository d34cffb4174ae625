"""tools/export_model.py: the saved file against transformers, lexico.json, and what is refused."""

import hashlib
import json
import shutil
import zipfile

import pytest
import torch
from conftest import MODELS, ROOT, save_random_model
from transformers import DynamicCache

import export_model


def load(path):
    extra = {"lexico.json": ""}
    module = torch.jit.load(str(path), _extra_files=extra)
    return module, json.loads(extra["lexico.json"])


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = save_random_model(request.param, folder / "model")
    export_model.main([str(folder / "model"), str(folder / "model.pt")])
    yield request.param, model.set_attn_implementation("eager") or model, *load(folder / "model.pt")
    shutil.rmtree(folder)


def ids_of(batch, length):
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(7 * batch + length))


def hf_cache(model, ids, mask=None):
    cache = DynamicCache()
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    return logits, torch.stack([x.keys for x in cache.layers]), torch.stack([x.values for x in cache.layers])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_forward_gives_the_cache_of_transformers(exported):
    _, model, saved, info = exported
    for batch, length, padded in [(1, 1, 0), (4, 3, 0), (3, 30, 11)]:
        ids = ids_of(batch, length)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, -padded:] = 0
        _, keys, values = hf_cache(model, ids, mask)
        ours = saved(ids, mask)
        shape = (info["layers"], batch, info["kv_heads"], length, info["head_dim"])
        assert ours[0].shape == shape and ours[1].shape == shape
        assert torch.equal(ours[0], keys) and torch.equal(ours[1], values)


@torch.no_grad()
def test_padding_changes_nothing_for_the_tokens_before_it(exported):
    _, _, saved, _ = exported
    ids = ids_of(1, 20)
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    short, _ = saved(ids[:, :12], mask[:, :12])
    torch.testing.assert_close(saved(ids, mask)[0][:, :, :, :12], short, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_steps_continue_one_pass_also_beyond_a_window(exported):
    """Token by token, in unequal parts, and from an empty past: the same logits and vectors as all at once."""
    _, model, saved, info = exported
    total = 30  # windows in MODELS are 8
    ids = ids_of(2, total)
    logits, keys, values = (tensor for tensor in hf_cache(model, ids))
    for parts in ([total], [1] * total, [13, 1, 16]):
        past_keys, past_values = keys[:, :, :, :0], values[:, :, :, :0]
        parts_of_logits = []
        for part in parts:
            start = past_keys.shape[3]
            step = saved.step(ids[:, start : start + part], past_keys, past_values)
            parts_of_logits.append(step[0])
            past_keys = torch.cat((past_keys, step[1]), dim=3)
            past_values = torch.cat((past_values, step[2]), dim=3)
        torch.testing.assert_close(torch.cat(parts_of_logits, dim=1), logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(past_keys, keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(past_values, values, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_changed_past_changes_the_logits(exported):
    _, _, saved, _ = exported
    ids = ids_of(1, 6)
    _, keys, values = saved.step(ids[:, :5], *(torch.zeros(*saved(ids, ids)[0].shape[:3], 0, saved(ids, ids)[0].shape[4]),) * 2)
    exact = saved.step(ids[:, 5:], keys, values)[0]
    assert (exact - saved.step(ids[:, 5:], keys, values * 0.9)[0]).abs().max() > 1e-4


@torch.no_grad()
def test_queries_and_keys_give_the_attention_weights(exported):
    name, model, saved, info = exported
    ids = ids_of(1, 7)  # inside every window
    weights = model(ids, output_attentions=True).attentions
    keys, _, queries = saved.queries(ids, torch.ones_like(ids))
    keys = keys.repeat_interleave(info["heads"] // info["kv_heads"], dim=2)
    scores = queries @ keys.transpose(-1, -2) / info["head_dim"] ** 0.5
    if name == "gpt2-upcast":  # divides by the layer's number
        scores[1] /= 2
    if name == "gemma2":
        scores = 50 * torch.tanh(scores / 50)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    ours = scores.masked_fill(future, float("-inf")).softmax(-1)
    assert queries.shape == (info["layers"], 1, info["heads"], 7, info["head_dim"])
    torch.testing.assert_close(ours, torch.stack(weights), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_undoing_rope_makes_the_keys_of_a_token_equal_everywhere(exported):
    """A layer-0 key depends on its token alone before RoPE: undone, repeats of a token must agree, and only then."""
    _, _, saved, info = exported
    rope = info["rope"]
    if rope["kind"] == "none":
        assert (rope["inverse_frequencies"], rope["rotary_dim"]) == ([], 0)
        return
    assert rope["rotary_dim"] == 2 * len(rope["inverse_frequencies"]) <= info["head_dim"]
    ids = torch.full((1, 30), 5)
    keys = saved(ids, torch.ones_like(ids))[0][0, 0]
    plain = export_model.undo_rope(rope, keys)
    assert (plain - plain[:, :1]).abs().max() < 1e-4
    assert (keys - keys[:, :1]).abs().max() > 1e-2
    assert abs(plain[:, 0].norm() * rope["attention_scaling"] - keys[:, 0].norm()) < 1e-4


def test_lexico_json_says_what_the_model_is(exported):
    name, model, _, info = exported
    config = model.config
    assert info["contract"] == "lexico-model 1"
    assert info["model"] == "model" and info["revision"] is None
    assert info["architecture"] == type(model).__name__
    assert (info["layers"], info["heads"], info["vocab"]) == (2, 4, 64)
    assert info["kv_heads"] == getattr(config, "num_key_value_heads", 4)
    assert info["max_positions"] == (32 if name == "llama-longrope" else 128)
    assert (info["dtype"], info["bos_id"], info["add_bos"]) == ("float32", 1, True)
    assert info["methods"] == ["forward", "step", "queries"]
    assert info["tokenizer_sha256"] is None
    kinds = {"gpt2": "none", "gpt2-upcast": "none"}
    _, _, kind = name.partition("-")
    assert info["rope"]["kind"] == kinds.get(name, kind if kind in ("linear", "llama3", "yarn", "dynamic", "longrope") else "default")
    assert info["rope"]["layout"] == "half"
    windows = {"mistral-window": [8, 8], "qwen2-window": [None, 8], "qwen3-window": [None, 8], "gemma2": [8, None]}
    assert info["sliding_window"] == windows.get(name)
    assert (len(info["notes"]) > 0) == (name in ("llama-dynamic", "llama-longrope"))


def test_rope_of_a_neox_covers_its_share_of_the_head(tmp_path):
    save_random_model("gpt-neox", tmp_path / "model", rotary_pct=0.25, hidden_size=64)
    export_model.main([str(tmp_path / "model"), str(tmp_path / "model.pt")])
    _, info = load(tmp_path / "model.pt")
    assert (info["head_dim"], info["rope"]["rotary_dim"], len(info["rope"]["inverse_frequencies"])) == (16, 4, 2)


def test_a_configuration_of_transformers_4_is_understood(tmp_path):
    """Folders on the hub keep rope_theta and rope_scaling apart, as version 4 wrote them."""
    save_random_model("llama-llama3", tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    path.write_text(json.dumps(dict(config, rope_scaling=rope)))
    export_model.main([str(tmp_path / "model"), str(tmp_path / "a.pt")])
    rope = load(tmp_path / "a.pt")[1]["rope"]
    assert rope["kind"] == "llama3"
    plain = [500000.0 ** (-2 * i / 8) for i in range(4)]
    assert rope["inverse_frequencies"][0] == pytest.approx(plain[0])
    assert rope["inverse_frequencies"][3] == pytest.approx(plain[3] / 8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@torch.no_grad()
def test_half_precision_is_exported_in_that_type(tmp_path, dtype):
    model = save_random_model("llama", tmp_path / "model")
    export_model.main([str(tmp_path / "model"), str(tmp_path / "model.pt"), "--dtype", dtype])
    saved, info = load(tmp_path / "model.pt")
    assert info["dtype"] == dtype
    ids = ids_of(2, 9)
    keys, _ = saved(ids, torch.ones_like(ids))
    assert keys.dtype == getattr(torch, dtype)
    exact = hf_cache(model, ids)[1]
    assert (keys.float() - exact).abs().max() < 0.05 * exact.abs().max()
    # A float32 past is taken too: what a compressed cache gives back.
    empty = torch.zeros(*keys.shape[:3], 0, keys.shape[4])
    assert saved.step(ids, empty, empty)[1].dtype == keys.dtype


def test_the_file_is_tied_to_no_device(exported, tmp_path):
    """What is exported on a CPU runs on a GPU: the saved code names no device (checked on its text)."""
    _, _, saved, _ = exported
    saved.save(str(tmp_path / "a.pt"))
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        code = [archive.read(file).decode() for file in archive.namelist() if file.endswith(".py")]
    assert len(code) > 3
    assert not any("torch.device(" in text for text in code)


def test_a_tokenizer_is_copied_and_its_digest_noted(tmp_path, call):
    save_random_model("llama", tmp_path / "model")
    demo = ROOT / "data/demo/wikillama-5m/tokenizer.json"
    shutil.copy(demo, tmp_path / "model")
    code, out, _ = call(export_model, tmp_path / "model", tmp_path / "a.pt")
    assert code == 0
    assert (tmp_path / "a.tokenizer.json").read_bytes() == demo.read_bytes()
    assert "a.tokenizer.json" in out
    assert load(tmp_path / "a.pt")[1]["tokenizer_sha256"] == hashlib.sha256(demo.read_bytes()).hexdigest()


def test_without_a_tokenizer_it_says_what_to_do(tmp_path, call):
    save_random_model("llama", tmp_path / "model")
    code, out, _ = call(export_model, tmp_path / "model", tmp_path / "a.pt")
    assert code == 0 and "--token-ids" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "model"]


@pytest.mark.parametrize("said, want", [(True, True), (False, False), (None, True)])
def test_bos_advice_follows_the_tokenizer(tmp_path, said, want):
    save_random_model("llama", tmp_path / "model")
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({} if said is None else {"add_bos_token": said}))
    export_model.main([str(tmp_path / "model"), str(tmp_path / "a.pt")])
    assert load(tmp_path / "a.pt")[1]["add_bos"] is want


@pytest.mark.parametrize("bos", [None, 9999])
def test_a_bos_that_is_not_a_token_is_none(tmp_path, bos):
    save_random_model("llama", tmp_path / "model", bos_token_id=bos)
    export_model.main([str(tmp_path / "model"), str(tmp_path / "a.pt")])
    info = load(tmp_path / "a.pt")[1]
    assert (info["bos_id"], info["add_bos"]) == (None, False)


def test_a_short_context_is_verified_within_its_positions(tmp_path):
    save_random_model("gpt2", tmp_path / "model", n_positions=4)
    export_model.main([str(tmp_path / "model"), str(tmp_path / "a.pt")])
    assert load(tmp_path / "a.pt")[1]["max_positions"] == 4


def test_a_large_window_is_checked_by_its_mask(tmp_path, call, monkeypatch):
    monkeypatch.setattr(export_model, "WINDOW_TEST_BUDGET", 0)
    save_random_model("gemma2", tmp_path / "model")
    code, out, _ = call(export_model, tmp_path / "model", tmp_path / "a.pt")
    assert code == 0 and "sliding window 8" in out
    assert "sliding window 8" in load(tmp_path / "a.pt")[1]["notes"][0]


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    save_random_model("llama", folder)
    return folder


@pytest.fixture
def llama_copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "copy")


def refused(call, tmp_path, *arguments, code=3):
    before = sorted(tmp_path.iterdir())
    got, out, err = call(export_model, *arguments)
    assert got == code, err
    assert err.count("\n") == 1 or code == 2
    assert sorted(tmp_path.iterdir()) == before  # nothing written, no partial file left
    return err


def test_a_mask_that_depends_on_the_traced_length_is_caught(llama, tmp_path, call, monkeypatch):
    masks = export_model.ExportedModel._masks

    def window_of_six(self, positions, key_positions, allowed):
        return masks(self, positions, key_positions, allowed & (positions[:, None] - key_positions < 6))

    monkeypatch.setattr(export_model.ExportedModel, "_masks", window_of_six)
    err = refused(call, tmp_path, llama, tmp_path / "a.pt")
    assert "forward at batch 3, length 9" in err and "tolerance 1e-05" in err and "nothing written" in err


def test_positions_that_ignore_the_past_are_caught(llama, tmp_path, call, monkeypatch):
    step = export_model.ExportedModel.step

    def without_past(self, input_ids, past_keys, past_values):
        return step(self, input_ids, past_keys[:, :, :, :0], past_values[:, :, :, :0])

    monkeypatch.setattr(export_model.ExportedModel, "step", without_past)
    assert "step at batch 1, length 1, past 7" in refused(call, tmp_path, llama, tmp_path / "a.pt")


def test_a_window_that_is_off_by_one_is_caught(tmp_path, call, monkeypatch):
    save_random_model("mistral-window", tmp_path / "model")
    make = export_model.ExportedModel.__init__

    def wider(self, model):
        make(self, model)
        self.window += 1

    monkeypatch.setattr(export_model.ExportedModel, "__init__", wider)
    assert "differs from transformers" in refused(call, tmp_path, tmp_path / "model", tmp_path / "a.pt")
    monkeypatch.setattr(export_model, "WINDOW_TEST_BUDGET", 0)
    monkeypatch.setattr(export_model, "check_forward", lambda *_: None)
    monkeypatch.setattr(export_model, "check_step", lambda *_: None)
    monkeypatch.setattr(export_model, "check_rope", lambda *_: None)
    assert "mask of the sliding window 8" in refused(call, tmp_path, tmp_path / "model", tmp_path / "a.pt")


def test_wrong_frequencies_in_lexico_json_are_caught(llama, tmp_path, call, monkeypatch):
    describe_rope = export_model.describe_rope

    def doubled(model, head_dim):
        rope = describe_rope(model, head_dim)
        return dict(rope, inverse_frequencies=[2 * f for f in rope["inverse_frequencies"]])

    monkeypatch.setattr(export_model, "describe_rope", doubled)
    assert "keys with RoPE undone" in refused(call, tmp_path, llama, tmp_path / "a.pt")


def test_other_architectures_are_refused_by_name(llama_copy, tmp_path, call):
    config = json.loads((llama_copy / "config.json").read_text())
    for architecture in ("MambaForCausalLM", "LlamaForSequenceClassification"):
        (llama_copy / "config.json").write_text(json.dumps(dict(config, architectures=[architecture])))
        err = refused(call, tmp_path, llama_copy, tmp_path / "a.pt")
        assert architecture in err and "Gemma2 (Gemma2ForCausalLM)" in err
    (llama_copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    assert "'architectures' is missing" in refused(call, tmp_path, llama_copy, tmp_path / "a.pt")
    (llama_copy / "config.json").write_text(json.dumps(dict(config, quantization_config={"quant_method": "gptq"})))
    assert "quantized (gptq)" in refused(call, tmp_path, llama_copy, tmp_path / "a.pt")


def test_damaged_folders_are_refused_in_one_line(llama_copy, tmp_path, call):
    good = (llama_copy / "config.json").read_text()
    for config, words in [
        (good[: len(good) // 2], "not readable as JSON"),
        ("[1, 2]", "want an object"),
        (good.replace('"num_hidden_layers": 2', '"num_hidden_layers": "two"'), "not a valid configuration"),
        (good.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'), "missing"),
        (good.replace('"intermediate_size": 48', '"intermediate_size": 40'), "weights"),
    ]:
        assert config != good
        (llama_copy / "config.json").write_text(config)
        assert words in refused(call, tmp_path, llama_copy, tmp_path / "a.pt")
    (llama_copy / "config.json").write_text(good)
    weights = llama_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "weights cannot be loaded" in refused(call, tmp_path, llama_copy, tmp_path / "a.pt")
    weights.unlink()
    assert "weights cannot be loaded" in refused(call, tmp_path, llama_copy, tmp_path / "a.pt")
    (llama_copy / "config.json").unlink()
    assert "no config.json" in refused(call, tmp_path, llama_copy, tmp_path / "a.pt")


def test_nan_weights_are_named(tmp_path, call):
    model = save_random_model("llama", tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    assert "NaN" in refused(call, tmp_path, tmp_path / "model", tmp_path / "a.pt")


def test_what_is_neither_folder_nor_reachable_hub_id_is_refused(llama, tmp_path, call):
    assert "no such folder" in refused(call, tmp_path, tmp_path / "absent", tmp_path / "a.pt")
    assert "hub failed" in refused(call, tmp_path, "nobody/nothing-here", tmp_path / "a.pt")
    assert "is a file" in refused(call, tmp_path, llama / "config.json", tmp_path / "a.pt")


def test_a_hub_model_is_fetched_at_its_revision(llama, tmp_path, call, monkeypatch):
    snapshot = tmp_path / "0123456789abcdef"
    shutil.copytree(llama, snapshot)
    asked = []

    def download(repo, revision, allow_patterns):
        asked.append((repo, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    code, _, _ = call(export_model, "some/model", tmp_path / "a.pt", "--revision", "v1")
    assert code == 0 and asked == [("some/model", "v1")]
    info = load(tmp_path / "a.pt")[1]
    assert (info["model"], info["revision"]) == ("some/model", "0123456789abcdef")


def test_outputs_are_guarded(llama, tmp_path, call):
    (tmp_path / "a.pt").write_text("mine")
    assert "--overwrite" in refused(call, tmp_path, llama, tmp_path / "a.pt", code=2)
    assert (tmp_path / "a.pt").read_text() == "mine"
    assert call(export_model, llama, tmp_path / "a.pt", "--overwrite")[0] == 0
    (tmp_path / "b.tokenizer.json").write_text("mine")
    assert "b.tokenizer.json" in refused(call, tmp_path, llama, tmp_path / "b.pt", code=2)
    assert "does not exist" in refused(call, tmp_path, llama, tmp_path / "no/a.pt", code=2)
    assert "is a folder" in refused(call, tmp_path, llama, tmp_path, code=2)
    assert "not a regular file" in refused(call, tmp_path, llama, "/dev/full", "--overwrite", code=2)


def test_usage_errors(llama, tmp_path, call):
    assert "invalid choice: 'int8'" in refused(call, tmp_path, llama, tmp_path / "a.pt", "--dtype", "int8", code=2)
    assert "'tpu'" in refused(call, tmp_path, llama, tmp_path / "a.pt", "--device", "tpu", code=2)
    assert "--revision" in refused(call, tmp_path, llama, tmp_path / "a.pt", "--revision", "main", code=2)
    if not torch.cuda.is_available():
        assert "no CUDA" in refused(call, tmp_path, llama, tmp_path / "a.pt", "--device", "cuda", code=2)
    code, out, _ = call(export_model, "--help")
    assert code == 0 and "Examples:" in out and "Exit codes" in out


def test_a_full_disk_leaves_nothing_behind(llama, tmp_path, call, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch.jit, "save", full)
    assert "MiB free" in refused(call, tmp_path, llama, tmp_path / "a.pt", code=4)


def test_an_interrupt_leaves_nothing_behind(llama, tmp_path, call, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_model, "check_saved", interrupted)
    assert "interrupted" in refused(call, tmp_path, llama, tmp_path / "a.pt", code=75)
