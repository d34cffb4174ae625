#!/usr/bin/env python3
"""Exports a Hugging Face language model to TorchScript for the lexico programs ("lexico-model 1", docs/formats.md).

The file holds three traced methods and lexico.json, which describes them:
  forward(input_ids, attention_mask)          -> keys, values            [layers, batch, kv_heads, length, head_dim]
  step(input_ids, past_keys, past_values)     -> logits, keys, values    of the new tokens; the past may be empty
  queries(input_ids, attention_mask)          -> keys, values, queries   [layers, batch, heads, length, head_dim]
Keys and queries are those after RoPE. Before the file gets its name it is loaded back and compared with the model run
by transformers itself, at other shapes than it was traced with, padding and a past included.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lexico_cli import NO_SPACE, USAGE, ToolError, check_output, complete_file, one_line, quiet_libraries, run  # noqa: E402

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

CONTRACT = "lexico-model 1"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SUPPORTED = {
    "LlamaForCausalLM": "Llama",
    "Qwen2ForCausalLM": "Qwen2",
    "Qwen3ForCausalLM": "Qwen3",
    "MistralForCausalLM": "Mistral",
    "GPT2LMHeadModel": "GPT-2",
    "GPTNeoXForCausalLM": "GPT-NeoX",
    "Gemma2ForCausalLM": "Gemma2",
}
# Largest difference allowed between the saved file and transformers, relative to the largest value of the tensor.
# On a CPU it is 0 with every configuration tested; the room is for kernels that choose their order of sums at run time.
TRACE_TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
# The same for results reached another way (past + step against one pass; RoPE undone): rounding differs by nature.
ROUNDING_TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
# A window is tested by running past it if that costs at most this many parameter-tokens; else its mask alone is.
WINDOW_TEST_BUDGET = 2e11
ATTENTION_NAME = "lexico_recording"


# --- Fetching and loading ---------------------------------------------------------------------------------------------


@dataclass
class Source:
    folder: Path
    name: str
    revision: str | None


def find_source(model: str, revision: str | None) -> Source:
    """The folder that holds the model, downloaded from the hub if it is not one already."""
    path = Path(model)
    if path.is_dir():
        if revision:
            raise ToolError(f"--revision {revision}: {model} is a local folder, which has no revisions", USAGE)
        if not (path / "config.json").is_file():
            raise ToolError(f"{model}: no config.json in this folder; want a Hugging Face model folder")
        return Source(path, path.resolve().name, None)
    if path.exists():
        raise ToolError(f"{model}: is a file; want a Hugging Face model folder or a hub id")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise ToolError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors"]
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except Exception as error:  # the hub client raises a dozen types, from several packages
        raise ToolError(
            f"{model}: no such folder, and fetching it from the Hugging Face hub failed: "
            f"{type(error).__name__}: {one_line(error, 160)}"
        ) from error
    return Source(folder, model, folder.name)


def read_config(source: Source):
    """The model's configuration, if it is one of the supported architectures."""
    from transformers import AutoConfig

    path = source.folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"want an object, found {type(raw).__name__}")
    except (OSError, ValueError) as error:
        raise ToolError(f"{path}: not readable as JSON: {one_line(error)}") from error
    architectures = raw.get("architectures") or []
    supported = ", ".join(f"{style} ({name})" for name, style in SUPPORTED.items())
    if not architectures:
        raise ToolError(f"{path}: 'architectures' is missing or empty; supported: {supported}")
    if architectures[0] not in SUPPORTED:
        raise ToolError(f"{source.name}: architecture {architectures[0]} is not supported; supported: {supported}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ToolError(f"{source.name}: weights are quantized ({method}); export the unquantized model")
    try:
        config = AutoConfig.from_pretrained(source.folder)
    except Exception as error:  # strict dataclasses, key errors, value errors: all mean a config that does not hold
        raise ToolError(f"{path}: not a valid configuration: {one_line(error)}") from error
    if getattr(config, "add_cross_attention", False):
        raise ToolError(f"{source.name}: add_cross_attention is true; only decoders without cross-attention are supported")
    return config


def load_model(source: Source, config, dtype: torch.dtype, device: str):
    import transformers

    architecture = getattr(transformers, config.architectures[0])
    try:
        model, info = architecture.from_pretrained(
            source.folder, config=config, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    except Exception as error:  # truncated safetensors, absent shards, mismatched shapes
        raise ToolError(f"{source.folder}: weights cannot be loaded: {one_line(error)}") from error
    # transformers fills what a file lacks with random numbers and goes on.
    for what in ("missing_keys", "mismatched_keys"):
        if info.get(what):
            some = sorted(map(str, info[what]))
            raise ToolError(f"{source.folder}: {len(some)} weights are {what.split('_')[0]}, the first is {some[0]}")
    try:
        model = model.to(device).eval().requires_grad_(False)
        for weight in model.parameters():
            weight.data = weight.data.clone()  # mapped from the file it may be unaligned, and sums differ in a last bit
        return model
    except (RuntimeError, AssertionError) as error:
        raise ToolError(f"--device {device}: cannot place the model there: {one_line(error)}", USAGE) from error


# --- What is traced ---------------------------------------------------------------------------------------------------

_recorded_queries: list[Tensor] = []


def recording_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """The model's own eager attention; notes the queries, which after this point are nowhere to be found."""
    _recorded_queries.append(query)
    if getattr(module, "reorder_and_upcast_attn", False):  # a GPT-2 option that lives outside its eager function
        return module._upcast_and_reordered_attn(query, key, value, attention_mask)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)


def make_cache(past_keys: Tensor | None = None, past_values: Tensor | None = None):
    """A cache that gives attention past and new vectors, and keeps the new ones apart in `new_keys`, `new_values`."""
    from transformers import DynamicCache

    class NewVectorCache(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            self.new_keys: list[Tensor] = []
            self.new_values: list[Tensor] = []

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
            assert layer_idx == len(self.new_keys)
            self.new_keys.append(key_states)
            self.new_values.append(value_states)
            if past_keys is None:  # copied as DynamicCache does: the order of sums depends on strides and alignment
                layout = torch.contiguous_format
                return key_states.clone(memory_format=layout), value_states.clone(memory_format=layout)
            return (
                torch.cat((past_keys[layer_idx], key_states), dim=2),
                torch.cat((past_values[layer_idx], value_states), dim=2),
            )

    return NewVectorCache()


class ExportedModel(nn.Module):
    """The methods of the file. Positions and masks are explicit, so that nothing depends on the traced shapes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.window = getattr(config, "sliding_window", None)
        layer_types = getattr(config, "layer_types", None)
        # Models of mixed layers take one mask per type; Mistral takes one mask, with the window if there is one.
        self.layer_types = sorted(set(layer_types)) if layer_types is not None else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        cache = self._run_base(input_ids, attention_mask)
        return torch.stack(cache.new_keys), torch.stack(cache.new_values)

    def queries(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _recorded_queries.clear()
        cache = self._run_base(input_ids, attention_mask)
        return torch.stack(cache.new_keys), torch.stack(cache.new_values), torch.stack(_recorded_queries)

    def step(self, input_ids: Tensor, past_keys: Tensor, past_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key_positions = torch.arange(past_keys.shape[3] + input_ids.shape[1], device=input_ids.device)
        positions = key_positions[past_keys.shape[3] :]
        allowed = torch.ones_like(input_ids[:, :1, None, None], dtype=torch.bool)
        cache = make_cache(past_keys.to(self.model.dtype), past_values.to(self.model.dtype))
        result = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(positions, key_positions, allowed),
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
        )
        return result.logits, torch.stack(cache.new_keys), torch.stack(cache.new_values)

    def _run_base(self, input_ids: Tensor, attention_mask: Tensor):
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        cache = make_cache()
        self.model.base_model(
            input_ids=input_ids,
            attention_mask=self._masks(positions, positions, attention_mask[:, None, None, :] != 0),
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
        )
        return cache

    def _masks(self, positions: Tensor, key_positions: Tensor, allowed: Tensor):
        """Additive masks [batch, 1, queries, keys]: 0 where a query sees a key, the dtype's lowest number elsewhere."""
        age = positions[:, None] - key_positions[None, :]
        full = (age >= 0) & allowed
        sliding = full & (age < self.window) if self.window is not None else full
        masks = {"full_attention": full, "sliding_attention": sliding}
        zero = torch.zeros((), dtype=self.model.dtype, device=positions.device)
        lowest = torch.finfo(self.model.dtype).min
        if self.layer_types is None:
            return torch.where(sliding, zero, lowest)
        return {kind: torch.where(masks[kind], zero, lowest) for kind in self.layer_types}


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Inside, the model records its queries and its RoPE is fixed; outside it is as transformers made it."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, recording_attention)
    rotary = getattr(model.base_model, "rotary_emb", None)
    model.set_attn_implementation(ATTENTION_NAME)
    if rotary is not None:
        rope_type, rotary.rope_type = rotary.rope_type, "default"  # of the frequencies at hand: no updates by length
    try:
        yield
    finally:
        _recorded_queries.clear()
        model.set_attn_implementation("eager")
        if rotary is not None:
            rotary.rope_type = rope_type


def trace(model: nn.Module, vocab: int, max_positions: int) -> torch.jit.ScriptModule:
    length = max(1, min(5, max_positions // 2))
    past = min(3, max_positions - length)
    ids = torch.arange(2 * length, device=model.device).reshape(2, length) % vocab
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    exported = ExportedModel(model).eval()
    with torch.no_grad(), traceable(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of every Python number; check_saved is the judge
        keys, values = exported(ids[:, :past], mask[:, :past])
        inputs = {"forward": (ids, mask), "step": (ids, keys, values), "queries": (ids, mask)}
        traced = torch.jit.trace_module(exported, inputs, check_trace=False)
    free_from_device(traced)
    return traced


def free_from_device(traced: torch.jit.ScriptModule) -> None:
    """A trace creates tensors on the device it was made on; let it ask its input, so that the file runs anywhere."""
    methods = [part._c._get_method(name) for part in traced.modules() for name in part._c._method_names()]
    for graph in (method.graph for method in methods):
        tensors = [value for value in graph.inputs() if value.type().kind() == "TensorType"]
        devices = [node for node in graph.nodes() if node.kind() == "prim::Constant" and is_device(node)]
        for constant in devices:
            of_input = graph.create("prim::device", [tensors[0]], 1)
            of_input.output().setType(torch._C.DeviceObjType.get())
            graph.prependNode(of_input)
            constant.output().replaceAllUsesWith(of_input.output())
        if devices:
            torch._C._jit_pass_dce(graph)
            torch._C._jit_pass_lint(graph)


def is_device(constant) -> bool:
    return constant.output().type().kind() == "DeviceObjType"


# --- lexico.json ------------------------------------------------------------------------------------------------------


def describe_rope(model: nn.Module, head_dim: int) -> dict:
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return {"kind": "none", "layout": "half", "rotary_dim": 0, "inverse_frequencies": [], "attention_scaling": 1.0}
    frequencies = rotary.inv_freq
    if frequencies.dtype != torch.float32 or 2 * len(frequencies) > head_dim:
        raise ToolError(
            f"RoPE: {len(frequencies)} frequencies of {frequencies.dtype}, want float32 and at most {head_dim // 2}"
        )
    return {
        "kind": rotary.rope_type,
        "layout": "half",
        "rotary_dim": 2 * len(frequencies),
        "inverse_frequencies": frequencies.double().tolist(),
        "attention_scaling": float(rotary.attention_scaling),
    }


def position_limit(config) -> tuple[int, str | None]:
    """The longest sequence for which the traced frequencies are the model's, and why it is not the configured one."""
    limit = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind == "dynamic":
        return limit, f"dynamic RoPE changes its frequencies beyond {limit} positions: max_positions stops there"
    if kind == "longrope":
        original = int(rope.get("original_max_position_embeddings") or limit)
        if original < limit:
            return original, (
                f"longrope changes its frequencies beyond {original} positions: max_positions is {original}, "
                f"the model's own is {limit}"
            )
    return limit, None


def bos_policy(source: Source, config, vocab: int) -> tuple[int | None, bool]:
    """The BOS id, and whether sequences should start with it: as the tokenizer says, else yes if there is a BOS."""
    bos = config.bos_token_id
    bos = bos[0] if isinstance(bos, list) and bos else bos
    if not isinstance(bos, int) or not 0 <= bos < vocab:
        return None, False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        said = json.loads((source.folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("add_bos_token")
        if isinstance(said, bool):
            return bos, said
    return bos, True


def layer_windows(config) -> list[int | None]:
    """The sliding window of each layer, None where a layer sees everything."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


def describe(source: Source, model: nn.Module, dtype: str) -> dict:
    import transformers

    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    vocab = model.get_output_embeddings().weight.shape[0]
    max_positions, note = position_limit(config)
    bos_id, add_bos = bos_policy(source, config, vocab)
    tokenizer = source.folder / "tokenizer.json"
    windows = layer_windows(config)
    return {
        "contract": CONTRACT,
        "model": source.name,
        "revision": source.revision,
        "architecture": config.architectures[0],
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "vocab": vocab,
        "max_positions": max_positions,
        "sliding_window": windows if any(windows) else None,
        "dtype": dtype,
        "bos_id": bos_id,
        "add_bos": add_bos,
        "rope": describe_rope(model, head_dim),
        "tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None,
        "methods": ["forward", "step", "queries"],
        "notes": [note] if note else [],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


# --- Verification -----------------------------------------------------------------------------------------------------


class Check:
    """Compares tensors and remembers the largest difference."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.largest = 0.0
        self.count = 0

    def same(self, what: str, ours: Tensor, theirs: Tensor) -> None:
        self.largest = max(self.largest, self._compare(what, ours, theirs, TRACE_TOLERANCE[self.dtype]))

    def close(self, what: str, ours: Tensor, theirs: Tensor) -> None:
        self._compare(what, ours, theirs, ROUNDING_TOLERANCE[self.dtype])

    def _compare(self, what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> float:
        self.count += 1
        if ours.shape != theirs.shape:
            raise ToolError(f"{what}: shape is {list(ours.shape)}, transformers gives {list(theirs.shape)}; nothing written")
        if not theirs.isfinite().all():
            raise ToolError(f"{what}: transformers itself gives NaN or infinity in {self.dtype}; try another --dtype")
        scale = theirs.double().abs().max().item() or 1.0
        difference = (ours.double() - theirs.double()).abs().max().item() / scale
        if not difference <= tolerance:
            raise ToolError(
                f"{what}: the traced model differs from transformers by {difference:.3g} of the largest value, "
                f"tolerance {tolerance:g} ({self.dtype}); nothing written"
            )
        return difference


def reference(model: nn.Module, ids: Tensor, mask: Tensor | None = None, past=None):
    """transformers alone: its own masks, positions and cache. Returns logits, and keys, values of all tokens so far."""
    from transformers import DynamicCache

    cache = past if past is not None else DynamicCache()
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    keys = torch.stack([layer.keys for layer in cache.layers])
    values = torch.stack([layer.values for layer in cache.layers])
    return logits, keys, values


def random_ids(batch: int, length: int, vocab: int, device) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * batch + length)
    return torch.randint(vocab, (batch, length), generator=generator).to(device)


def check_forward(check: Check, saved, model, vocab: int, batch: int, length: int, padded: int) -> None:
    ids = random_ids(batch, length, vocab, model.device)
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, length - padded :] = 0
    what = f"forward at batch {batch}, length {length}, {padded} padded"
    _, keys, values = reference(model, ids, mask)
    ours = saved(ids, mask)
    check.same(what + ", keys", ours[0], keys)
    check.same(what + ", values", ours[1], values)
    also = saved.queries(ids, mask)
    check.same(what.replace("forward", "queries") + ", keys", also[0], keys)
    check.same(what.replace("forward", "queries") + ", values", also[1], values)


def check_step(check: Check, saved, model, vocab: int, batch: int, length: int, past: int) -> None:
    from transformers import DynamicCache

    ids = random_ids(batch, past + length, vocab, model.device)
    what = f"step at batch {batch}, length {length}, past {past}"
    whole_logits, whole_keys, whole_values = reference(model, ids)
    past_keys, past_values = whole_keys[:, :, :, :past], whole_values[:, :, :, :past]
    cache = DynamicCache()
    if past:
        for layer in range(len(past_keys)):
            cache.update(past_keys[layer], past_values[layer], layer)
    logits, keys, values = reference(model, ids[:, past:], past=cache)
    ours = saved.step(ids[:, past:], past_keys, past_values)
    check.same(what + ", logits", ours[0], logits)
    check.same(what + ", keys", ours[1], keys[:, :, :, past:])
    check.same(what + ", values", ours[2], values[:, :, :, past:])
    check.close(what + ", logits against one pass over all tokens", ours[0], whole_logits[:, past:])
    check.close(what + ", keys against one pass over all tokens", ours[1], whole_keys[:, :, :, past:])


def check_queries(check: Check, saved, model, vocab: int, length: int) -> None:
    """The queries must be those that transformers' attention function receives."""
    ids = random_ids(2, length, vocab, model.device)
    theirs: list[Tensor] = []
    module = sys.modules[type(model).__module__]
    eager = module.eager_attention_forward

    def spy(attention, query, *args, **kwargs):
        theirs.append(query)
        return eager(attention, query, *args, **kwargs)

    if any(getattr(part, "reorder_and_upcast_attn", False) for part in model.modules()):
        return  # that GPT-2 option never calls the function that could be watched
    module.eager_attention_forward = spy
    try:
        reference(model, ids)
    finally:
        module.eager_attention_forward = eager
    check.same("queries", saved.queries(ids, torch.ones_like(ids))[2], torch.stack(theirs))


def undo_rope(rope: dict, keys: Tensor) -> Tensor:
    """Keys [..., length, head_dim] at positions 0, 1, ... before their rotation, from lexico.json alone."""
    half = rope["rotary_dim"] // 2
    positions = torch.arange(keys.shape[-2], dtype=torch.float64, device=keys.device)
    angles = positions[:, None] * torch.tensor(rope["inverse_frequencies"], dtype=torch.float64, device=keys.device)
    cos, sin = angles.cos() / rope["attention_scaling"], angles.sin() / rope["attention_scaling"]
    first, second, rest = keys.double().split((half, half, keys.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def check_rope(check: Check, saved, model, rope: dict, vocab: int, length: int) -> None:
    """Undoing RoPE on the file's keys must give the keys that transformers rotates."""
    if rope["kind"] == "none":
        return
    ids = random_ids(1, length, vocab, model.device)
    keys, _ = saved(ids, torch.ones_like(ids))
    module = sys.modules[type(model).__module__]
    apply = module.apply_rotary_pos_emb
    unrotated: list[Tensor] = []

    def spy(query, key, *args, **kwargs):
        unrotated.append(key)
        return apply(query, key, *args, **kwargs)

    module.apply_rotary_pos_emb = spy
    try:
        reference(model, ids)
    finally:
        module.apply_rotary_pos_emb = apply
    check.close("keys with RoPE undone", undo_rope(rope, keys), torch.stack(unrotated).double())


def check_window_mask(model, window: int) -> None:
    """The masks beyond the window against transformers' own, without running the model."""
    from transformers.masking_utils import create_sliding_window_causal_mask

    length = window + 5
    exported = ExportedModel(model)
    positions = torch.arange(length, device=model.device)
    ours = exported._masks(positions, positions, torch.ones(1, 1, 1, length, dtype=torch.bool, device=model.device))
    ours = ours["sliding_attention"] if isinstance(ours, dict) else ours
    embeddings = torch.empty(1, length, 1, dtype=model.dtype, device=model.device)
    theirs = create_sliding_window_causal_mask(
        config=model.config, inputs_embeds=embeddings, attention_mask=None, past_key_values=None
    )
    if not torch.equal(ours, theirs):
        raise ToolError(f"the mask of the sliding window {window} differs from transformers'; nothing written")


@dataclass
class CheckPlan:
    forward: list[tuple[int, int, int]]  # batch, length, padded tokens of the last row
    step: list[tuple[int, int, int]]  # batch, length, past
    rope_length: int
    masked_window: int | None  # compare only the mask beyond this window: running the model there is too slow


def plan_checks(model: nn.Module, info: dict) -> CheckPlan:
    forward = [(1, 1, 0), (3, 9, 0), (2, 17, 6), (1, 64, 0)]
    step = [(1, 1, 0), (3, 4, 0), (1, 1, 7), (2, 5, 11)]
    limit, masked_window = info["max_positions"], None
    window = max((w for w in info["sliding_window"] or [] if w), default=None)
    if window is not None and window < limit:
        if window > 2048 or window * sum(p.numel() for p in model.parameters()) > WINDOW_TEST_BUDGET:
            masked_window = window
        else:
            forward += [(1, window + 1, 0), (2, window + 5, 3)]
            step += [(1, 1, window + 3), (2, 3, window - 1), (1, window + 5, 0)]
    return CheckPlan(
        forward=[shape for shape in forward if shape[1] <= limit],
        step=[shape for shape in step if shape[1] + shape[2] <= limit],
        rope_length=min(64, limit),
        masked_window=masked_window,
    )


def check_saved(path: Path, model: nn.Module, info: dict, plan: CheckPlan) -> Check:
    """Loads the file back and compares it with transformers at other shapes than it was traced with."""
    saved = torch.jit.load(str(path), map_location=model.device)
    vocab = info["vocab"]
    check = Check(info["dtype"])
    # Like the C++ side: no gradients, no graph optimizer.
    with torch.no_grad(), torch.jit.optimized_execution(False):
        for shape in plan.forward:
            check_forward(check, saved, model, vocab, *shape)
        for shape in plan.step:
            check_step(check, saved, model, vocab, *shape)
        check_queries(check, saved, model, vocab, min(6, info["max_positions"]))
        check_rope(check, saved, model, info["rope"], vocab, plan.rope_length)
    if plan.masked_window is not None:
        check_window_mask(model, plan.masked_window)
    return check


# --- Program ----------------------------------------------------------------------------------------------------------


def save(traced: torch.jit.ScriptModule, path: Path, info: dict) -> None:
    try:
        torch.jit.save(traced, str(path), _extra_files={"lexico.json": json.dumps(info, indent=1)})
    except RuntimeError as error:  # libtorch's writer reports a full disk as one
        free = shutil.disk_usage(path.parent).free / 2**20
        raise ToolError(f"{path}: cannot write ({free:.0f} MiB free): {one_line(error, 120)}", NO_SPACE) from error


def export(model_name: str, output: Path, dtype: str, device: str, revision: str | None) -> tuple[dict, Check]:
    """Writes the file and, if the model has one, its tokenizer beside it. Returns lexico.json and the verification."""
    source = find_source(model_name, revision)
    model = load_model(source, read_config(source), DTYPES[dtype], device)
    info = describe(source, model, dtype)
    plan = plan_checks(model, info)
    if plan.masked_window is not None:
        info["notes"].append(f"sliding window {plan.masked_window}: beyond it the mask was checked, the model was not run")
    with complete_file(output) as partial:
        save(trace(model, info["vocab"], info["max_positions"]), partial, info)
        check = check_saved(partial, model, info, plan)
    tokenizer = source.folder / "tokenizer.json"
    if tokenizer.is_file():
        with complete_file(tokenizer_path(output)) as partial:
            shutil.copyfile(tokenizer, partial)
    return info, check


def tokenizer_path(output: Path) -> Path:
    return output.with_name(output.stem + ".tokenizer.json")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export_model.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="Supported: " + ", ".join(SUPPORTED.values()) + " style models.\n\n"
        "Examples:\n"
        "  tools/export_model.py data/demo/wikillama-5m wikillama-5m.pt\n"
        "  tools/export_model.py Qwen/Qwen2.5-0.5B qwen2.5-0.5b.pt --dtype bfloat16 --device cuda\n\n"
        "Exit codes: 0 written, 2 usage, 3 a model that does not fit or differs from its trace, 4 no space, 75 interrupted.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face model folder, or a hub id such as Qwen/Qwen2.5-0.5B")
    parser.add_argument("output", metavar="OUT.pt", type=Path, help="the file to write; OUT.tokenizer.json appears beside it")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights, keys and values (default: float32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:i], where to trace and verify; the file itself runs on any device (default: cpu)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model (default: its main branch)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.pt and OUT.tokenizer.json if they exist")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        parser.error(f"argument --device: is {options.device!r}, want cpu or cuda[:i]")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"argument --device: is {options.device!r}, but torch finds no CUDA device")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    check_output(options.output, options.overwrite)
    check_output(tokenizer_path(options.output), options.overwrite)
    quiet_libraries()
    info, check = export(options.model, options.output, options.dtype, options.device, options.revision)
    size = options.output.stat().st_size / 2**20
    print(
        f"{options.output}: {info['model']} ({SUPPORTED[info['architecture']]}), {info['layers']} layers, "
        f"{info['kv_heads']} KV heads of {info['head_dim']}, {info['dtype']}, at most {info['max_positions']} positions, "
        f"{size:.1f} MiB"
    )
    for note in info["notes"]:
        print(f"note: {note}")
    if info["tokenizer_sha256"]:
        print(f"{tokenizer_path(options.output)}: the model's tokenizer.json, copied")
    else:
        print("note: the model has no tokenizer.json; pass token ids to lexico-extract (--token-ids)")
    print(
        f"verified: {check.count} comparisons with transformers at other shapes, largest difference "
        f"{check.largest:.3g} of the largest value (tolerance {TRACE_TOLERANCE[info['dtype']]:g})"
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run("export_model.py", main))
