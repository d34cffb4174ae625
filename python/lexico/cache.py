"""LexicoCache: a transformers cache that holds codes, and the attention implementation "lexico", which reads them."""

import sys
import weakref

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import CompressedCache

# Of more new tokens than this, attention to the past rebuilds one layer's keys and values and leaves them to SDPA.
MAX_QUERIES_ON_CODES = 16


class LexicoCache(Cache):
    """The keys and values of a batch of sequences, compressed by dictionaries (docs/cache.md).

        model.set_attn_implementation("lexico")
        cache = LexicoCache(model.config, "runs/llama")
        model.generate(**inputs, past_key_values=cache)

    A forward pass attends to the tokens that the cache holds as it holds them, and to its own tokens exactly; then these
    join the cache. With the attention implementation "lexico", steps attend on the codes. With any other the result is the
    same, but every layer's keys and values are rebuilt in each step.

    Where the batch is padded, pads are cached like tokens, and steps rebuild keys and values for SDPA, which masks them.
    """

    def __init__(
        self,
        config,
        dictionaries,
        *,
        recent_window=32,
        compress_chunk=1,
        sink_tokens=0,
        key_sparsity=None,
        value_sparsity=None,
        key_tolerance=None,
        value_tolerance=None,
        selection="omp",
        exact="float16",
        adaptive_threshold=0.0,
        adaptive_atoms=64,
        page_tokens=256,
        max_bytes=0,
        threads=0,
        device="cpu",
    ):
        """
        config: of the model. dictionaries: a run folder of lexico-train, or its dictionary.safetensors.

        recent_window, compress_chunk, sink_tokens: which tokens stay exact, as numbers of the type `exact` ("float16",
        "bfloat16" or "float32"). *_sparsity, *_tolerance: of pursuit, a number or one for each layer; None: what the
        dictionaries say, and 0. adaptive_threshold: relative error above which a vector brings an atom of its own, 0: none do.
        max_bytes: of the whole cache, 0: no bound. threads: 0: torch.get_num_threads(). device: "cpu", "cuda" or "cuda:N", of
        the model; on a GPU the codes are there as well as on the host.

        Raises ValueError that names what does not fit, RuntimeError if the dictionaries cannot be read.
        """
        text = config.get_text_config(decoder=True)
        others = set(get_layer_types_and_kwargs(text)[0]) - {"full_attention"}
        if others:
            raise ValueError(f"lexico: the model has layers of {', '.join(sorted(others))}; LexicoCache has full_attention only")
        layers, heads = text.num_hidden_layers, text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        self._config = text
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None and torch.cuda.is_available():
            self._device = torch.device("cuda", torch.cuda.current_device())
        # By position: torch's classes take few names.
        self.codes = CompressedCache(
            str(dictionaries), layers, kv_heads, heads // kv_heads, self.head_dim, 0, recent_window, compress_chunk, sink_tokens,
            _numbers(key_sparsity, int), _numbers(value_sparsity, int), _numbers(key_tolerance, float),
            _numbers(value_tolerance, float), selection, exact, float(adaptive_threshold), adaptive_atoms, page_tokens, max_bytes,
            threads, str(self._device))  # fmt: skip
        self.sequences = []  # their numbers in `codes`, one for each row of the batch
        self._bytes_per_token = 2 * layers * kv_heads * self.head_dim
        super().__init__(layers=[LexicoLayer(self, index) for index in range(layers)])

    def bytes(self) -> int:
        """That hold the tokens, those of forks included: codes, exact tokens, own atoms; what is shared counts once."""
        return self.codes.bytes()

    def dense_bytes(self, dtype=torch.float16) -> int:
        """That keys and values would take without compression."""
        tokens = min((layer.get_seq_length() for layer in self.layers), default=0)
        return len(self.sequences) * tokens * self._bytes_per_token * dtype.itemsize

    def reconstruct(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (after RoPE) and values as attention sees them: float32, [batch, kv_heads, tokens, head_dim]."""
        tokens = self.get_seq_length(layer)
        pairs = [self.codes.reconstruct(layer, sequence, 0, tokens) for sequence in self.sequences]
        if not pairs:
            raise ValueError("lexico: the cache is empty")
        return torch.stack([keys for keys, _ in pairs]), torch.stack([values for _, values in pairs])

    def counts(self) -> dict[str, int]:
        """What happened so far: coded_vectors, saturated, not_finite, exact_saturated, own_atoms (CacheCounts)."""
        return dict(self.codes.counts())

    def save(self, path, row: int = 0) -> None:
        """One row of the batch to a file ("lexico-cache 1")."""
        self.codes.save(self.sequences[row], str(path))

    def load(self, *paths) -> None:
        """Puts saved rows in the place of what the cache holds; they must be equally long."""
        new = []
        try:
            for path in paths:
                new.append(self.codes.load(str(path)))
            lengths = [self.codes.tokens(sequence, 0) for sequence in new]
            if len(set(lengths)) > 1:
                raise ValueError(f"lexico: the saved rows have {lengths} tokens, must be equally many")
        except Exception:
            for sequence in new:
                self.codes.remove(sequence)
            raise
        self.reset()
        self.sequences = new

    def fork(self) -> "LexicoCache":
        """A cache of the same content that goes its own way; codes are shared until one of both changes them."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.sequences = [self.codes.fork(sequence) for sequence in self.sequences]
        other.layers = [LexicoLayer(other, index) for index in range(len(self.layers))]
        return other

    def __deepcopy__(self, memo):
        return self.fork()

    def __del__(self):
        if sys.is_finalizing():  # torch no longer finds its classes
            return
        for sequence in self.__dict__.get("sequences", ()):
            self.codes.remove(sequence)

    def reset(self) -> None:
        for sequence in self.sequences:
            self.codes.remove(sequence)
        self.sequences = []
        for layer in self.layers:
            layer.waiting = False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens. Those before them stay as they are: what is compressed remains so. After
        a forward pass that failed, 0 removes what it left in the lower layers."""
        if tokens_to_remove > 0:
            raise ValueError(f"lexico: crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        tokens = min(layer.get_seq_length() for layer in self.layers)
        for sequence in self.sequences:
            self.codes.truncate(sequence, max(0, tokens + tokens_to_remove))
        for layer in self.layers:
            layer.waiting = False

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes row indices[i]; rows may be taken several times."""
        if not self.sequences:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        taken, rows = set(), []
        for row in indices.tolist():
            sequence = self.sequences[row]
            rows.append(self.codes.fork(sequence) if sequence in taken else sequence)
            taken.add(sequence)
        for sequence in set(self.sequences) - taken:
            self.codes.remove(sequence)
        self.sequences = rows

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.sequences)).repeat_interleave(repeats))

    def _start(self, batch: int) -> None:
        if not self.sequences:
            self.sequences = [self.codes.add_sequence() for _ in range(batch)]
        if len(self.sequences) != batch:
            raise ValueError(f"lexico: the cache holds {len(self.sequences)} sequences, got a batch of {batch}; use another cache, or reset()")


class LexicoLayer(CacheLayerMixin):
    """One layer's view of a LexicoCache; what changes all layers at once is there."""

    supports_early_init = False

    def __init__(self, cache: LexicoCache, index: int):
        super().__init__()
        self._cache, self._index = weakref.proxy(cache), index
        self.waiting = False  # keys and values are with the attention "lexico", which has not come back

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        return len(self._cache.sequences) or -1

    def get_seq_length(self) -> int:
        cache = self._cache
        return cache.codes.tokens(cache.sequences[0], self._index) if cache.sequences else 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def update(self, key_states, value_states, *args, **kwargs):
        """[batch, kv_heads, tokens, head_dim] each. Returns what attention takes."""
        cache = self._cache
        on_codes = cache._config._attn_implementation == "lexico"
        if key_states.device.type != cache._device.type or (on_codes and key_states.device != cache._device):
            raise ValueError(
                f"lexico: keys are on {key_states.device}, the cache is on {cache._device}: LexicoCache(..., device='{key_states.device}')"
            )
        if self.waiting:
            raise RuntimeError(
                f"lexico: layer {self._index} waits for the attention 'lexico', which this model does not call with what the cache "
                "gives it, or which failed: then crop(0); otherwise model.set_attn_implementation('sdpa')"
            )
        cache._start(key_states.shape[0])
        self.is_initialized = True
        if on_codes:
            self.waiting = True
            key_states = key_states.view_as(key_states)
            key_states.lexico_layer = self
            return key_states, value_states
        keys, values = self.with_past(key_states, value_states)
        self.append(key_states, value_states)
        return keys, values

    def append(self, keys, values):
        self._cache.codes.append(self._index, self._cache.sequences, keys, values)

    def with_past(self, keys, values):
        """What the cache holds, followed by these."""
        if self.get_seq_length() == 0:
            return keys, values
        past_keys, past_values = self._cache.reconstruct(self._index)
        return torch.cat([past_keys.to(keys), keys], dim=2), torch.cat([past_values.to(values), values], dim=2)

    def attend(self, module, query, key, value, mask, scaling, **kwargs):
        """Of the new tokens, which then join the cache."""
        past, new = self.get_seq_length(), query.shape[2]
        if 0 < past and new <= MAX_QUERIES_ON_CODES and _causal_and_whole(mask, past, new):
            out = self._attend_on_codes(query, key, value, scaling)
        else:
            if past > 0 and new > 1 and mask is None:
                mask = _causal(past, new, query.device)[None, None]
            out, _ = sdpa_attention_forward(module, query, *self.with_past(key, value), mask, scaling=scaling, **kwargs)
        self.append(key, value)
        self.waiting = False
        return out, None

    def _attend_on_codes(self, query, key, value, scaling):
        cache = self._cache
        batch, heads, new, dim = query.shape
        kv_heads = key.shape[1]
        query_, key, value = query.float(), key.float(), value.float()
        # The new tokens among each other, exactly; then one softmax over both parts, by their sums of e^score.
        grouped = query_.reshape(batch, kv_heads, -1, new, dim) * scaling
        scores = grouped @ key[:, :, None].transpose(-1, -2)
        if new > 1:
            scores = scores.masked_fill(~_causal(0, new, query.device), -torch.inf)
        own_sums = scores.logsumexp(-1).reshape(batch, heads, new).transpose(1, 2)
        own = (scores.softmax(-1) @ value[:, :, None]).reshape(batch, heads, new, dim).transpose(1, 2)
        queries = (query_ * (scaling * dim**0.5)).transpose(1, 2).reshape(batch * new, heads, dim)
        sequences = [sequence for sequence in cache.sequences for _ in range(new)]
        past, past_sums = cache.codes.attend(self._index, sequences, queries)
        share = torch.sigmoid(past_sums.view_as(own_sums) - own_sums)[..., None]
        return torch.lerp(own, past.view_as(own), share).to(query.dtype)


def _numbers(given, kind):
    if given is None:
        return []
    return [kind(number) for number in given] if isinstance(given, (list, tuple)) else [kind(given)]


def _causal(past, new, device):
    """What each of the new tokens sees: [new, past + new]."""
    return torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)


def _causal_and_whole(mask, past, new):
    """Whether every new token sees all of the past, itself and the new ones before it."""
    if mask is None:
        return True
    if mask.dtype != torch.bool or mask.shape[-2:] != (new, past + new):
        return False
    return bool((mask == _causal(past, new, mask.device)).all())


def lexico_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention implementation "lexico": SDPA, but on the codes where the cache is a LexicoCache."""
    layer = getattr(key, "lexico_layer", None)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    asked = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None] + ["dropout"] * (dropout > 0)
    if asked:
        raise ValueError(f"lexico: the model's attention uses {', '.join(asked)}, which attention on codes does not have")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(module, query, key, value, attention_mask, scaling, **kwargs)


AttentionInterface.register("lexico", lexico_attention)
AttentionMaskInterface.register("lexico", sdpa_mask)
