"""Small random models and a way to call a tool as its user does."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
sys.dont_write_bytecode = True
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import lexico_cli  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: a second thread only waits
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LLAMA = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
NEOX = {name: value for name, value in LLAMA.items() if name != "pad_token_id"}
GPT2 = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)

# name -> (architecture, configuration): the seven architectures and what their configurations can vary.
MODELS = {
    "llama": ("Llama", dict(LLAMA, num_key_value_heads=2)),
    "llama-mha-tied": ("Llama", dict(LLAMA, num_key_value_heads=4, tie_word_embeddings=True)),
    "llama-wide-head": ("Llama", dict(LLAMA, num_key_value_heads=1, head_dim=16)),
    "llama-linear": ("Llama", dict(LLAMA, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "llama-llama3": ("Llama", dict(LLAMA, rope_parameters=dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32))),
    "llama-yarn": ("Llama", dict(LLAMA, rope_parameters=dict(
        rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32))),
    "llama-dynamic": ("Llama", dict(LLAMA, rope_parameters=dict(
        rope_type="dynamic", rope_theta=10000.0, factor=2.0))),
    "llama-longrope": ("Llama", dict(LLAMA, rope_parameters=dict(
        rope_type="longrope", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32,
        short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 4.0, 6.0, 8.0]))),
    "qwen2": ("Qwen2", dict(LLAMA, num_key_value_heads=2)),
    "qwen2-window": ("Qwen2", dict(LLAMA, num_key_value_heads=2, use_sliding_window=True, sliding_window=8,
                                   max_window_layers=1)),
    "qwen3": ("Qwen3", dict(LLAMA, num_key_value_heads=2, head_dim=16)),
    "qwen3-window": ("Qwen3", dict(LLAMA, num_key_value_heads=2, head_dim=16, use_sliding_window=True,
                                   sliding_window=8, max_window_layers=1)),
    "mistral": ("Mistral", dict(LLAMA, num_key_value_heads=2, sliding_window=None)),
    "mistral-window": ("Mistral", dict(LLAMA, num_key_value_heads=2, sliding_window=8)),
    "gpt2": ("GPT2", GPT2),
    "gpt2-upcast": ("GPT2", dict(GPT2, reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True)),
    "gpt-neox": ("GPTNeoX", dict(NEOX, rotary_pct=0.5)),
    "gpt-neox-serial": ("GPTNeoX", dict(NEOX, rotary_pct=1.0, use_parallel_residual=False)),
    "gemma2": ("Gemma2", dict(LLAMA, num_key_value_heads=2, head_dim=16, sliding_window=8, query_pre_attn_scalar=16)),
}  # fmt: skip
CLASSES = {"GPT2": "GPT2LMHeadModel"}


def save_random_model(name: str, folder: Path, **changes) -> transformers.PreTrainedModel:
    """A model of MODELS with random weights, large enough that attention is not uniform, saved as a folder."""
    architecture, settings = MODELS[name]
    config = getattr(transformers, architecture + "Config")(**dict(settings, **changes))
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(architecture, architecture + "ForCausalLM"))(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 2:
                tensor.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def call(capsys):
    """call(module, *arguments) -> (exit code, stdout, stderr); a traceback in stderr fails the test."""

    def run(module, *arguments):
        try:
            code = lexico_cli.run(module.__name__ + ".py", module.main, [str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run
