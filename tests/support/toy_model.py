"""A tiny TorchScript language model of the contract "lexico-model 1" (docs/formats.md), and a tokenizer of bytes for it."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

LAYERS, HEADS, KV_HEADS, DIM, VOCAB, BOS, MAX_POSITIONS = 2, 4, 2, 8, 260, 256, 64
INVERSE_FREQUENCIES = [1.0, 0.25, 0.05, 0.01]


class ToyModel(nn.Module):
    """Keys, values and queries are linear in the mean of the tokens so far; keys and queries are rotated ("half")."""

    def __init__(self, nan_id: int = -1, milliseconds: int = 0, scale: float = 1.0):
        super().__init__()
        self.layers, self.dim = LAYERS, DIM
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)  # noqa: E731
        self.embedding = draw(VOCAB, 16)
        if nan_id >= 0:
            self.embedding[nan_id] = float("nan")
        self.to_keys, self.to_values = draw(LAYERS, 16, KV_HEADS * DIM), draw(LAYERS, 16, KV_HEADS * DIM)
        self.to_values *= scale
        self.to_queries = draw(LAYERS, 16, HEADS * DIM)
        self.inverse_frequencies = nn.Parameter(torch.tensor(INVERSE_FREQUENCIES), requires_grad=False)
        self.milliseconds = milliseconds  # about this long does a batch take
        self.work = torch.zeros(256, 256)

    def hidden(self, input_ids: Tensor) -> Tensor:
        nothing = self.work.sum()
        for _ in range(self.milliseconds):
            nothing = nothing + torch.mm(self.work, self.work).sum()
        count = torch.arange(1, input_ids.shape[1] + 1)
        return self.embedding[input_ids].cumsum(1) / count[:, None] + nothing

    def heads(self, hidden: Tensor, weight: Tensor) -> Tensor:
        batch, length = hidden.shape[0], hidden.shape[1]
        return torch.einsum("bti,lio->lbto", hidden, weight).reshape(self.layers, batch, length, -1, self.dim).transpose(2, 3)

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[3])[:, None] * self.inverse_frequencies
        cos, sin = torch.cat((angle.cos(), angle.cos()), 1), torch.cat((angle.sin(), angle.sin()), 1)
        return x * cos + torch.cat((-x[..., self.dim // 2 :], x[..., : self.dim // 2]), -1) * sin

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(input_ids)
        return self.rotate(self.heads(hidden, self.to_keys)), self.heads(hidden, self.to_values)

    @torch.jit.export
    def queries(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.forward(input_ids, attention_mask)
        return keys, values, self.rotate(self.heads(self.hidden(input_ids), self.to_queries))

    @torch.jit.export
    def unrotated(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(input_ids)
        return self.heads(hidden, self.to_keys), self.heads(hidden, self.to_queries)


def info(**changes) -> dict:
    rope = dict(kind="default", layout="half", rotary_dim=DIM, inverse_frequencies=INVERSE_FREQUENCIES, attention_scaling=1.0)
    return {**dict(contract="lexico-model 1", model="org/toy", dtype="float32", layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS,
                   head_dim=DIM, vocab=VOCAB, max_positions=MAX_POSITIONS, bos_id=BOS, add_bos=True, rope=rope,
                   methods=["forward", "queries"], tokenizer_sha256=None), **changes}  # fmt: skip


def save(path: Path, text: str | None = None, model: nn.Module | None = None, **changes) -> nn.Module:
    """`changes` replace keys of lexico.json, `text` all of it. @returns the model."""
    model = model or ToyModel()
    text = json.dumps(info(**changes)) if text is None else text
    torch.jit.save(torch.jit.script(model), str(path), _extra_files={"lexico.json": text})
    return model


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def save_tokenizer(path: Path, kind: str = "BPE") -> None:
    """Every byte is the token of its own number."""
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    path.write_text(json.dumps(dict(version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=None,
                                    pre_tokenizer=level, post_processor=None, decoder=level,
                                    model=dict(type=kind, dropout=None, unk_token=None, continuing_subword_prefix=None,
                                               end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                                               ignore_merges=False, vocab=vocab, merges=[]))))  # fmt: skip
