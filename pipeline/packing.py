"""Forward passes without padding: sequences one after the other in one row, none of which sees another."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "echomine_packed"
PROBE = (3, 5, 3)  # tokens of the sequences by which a model is tried
PROBE_TOLERANCE = 1e-2  # of the greatest state; bfloat16 rounds to about this, and a leak changes far more

_packs: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a packed row begin and end.

    Attributes:
        lengths: tokens of each, in the order of the row.
        runs: (how many, their length) of neighbours of equal length.
        cu_seqlens: [R + 1] int32, as variable-length kernels take it.
        position_ids: [1, N] int64, from 0 in each sequence.
    """

    lengths: list[int]
    runs: list[tuple[int, int]]
    cu_seqlens: Tensor
    position_ids: Tensor

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Sequences:
        runs = [(len(list(equal)), length) for length, equal in groupby(lengths)]
        sizes = torch.tensor(lengths, device=device)
        ends = sizes.cumsum(0)
        positions = torch.arange(sum(lengths), device=device) - (ends - sizes).repeat_interleave(sizes)
        return cls(lengths, runs, torch.nn.functional.pad(ends, (1, 0)).int(), positions[None])


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a model gives each of several packed sequences what it gets alone. Tried once per model.

    Not so where layers keep more than keys and values (state spaces), see a window only, or go round
    transformers' table of attentions; nor while gradient checkpointing, which attends once more in backward.
    """
    if model.is_gradient_checkpointing:
        return False
    if model not in _packs:
        _packs[model] = _is_plain(model) and _is_alike(model)
    return _packs[model]


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the model's decoder takes `sequences=…` and attends within each of them."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _is_plain(model: Any) -> bool:
    """Whether every layer attends to all that came before, and the decoder hands on what it does not know."""
    parameters = inspect.signature(model.get_decoder().forward).parameters
    hands_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    layers = DynamicCache(config=model.config).layers
    keeps_all = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return hands_on and "position_ids" in parameters and keeps_all


@torch.no_grad()
def _is_alike(model: Any) -> bool:
    decoder = model.get_decoder()
    ids = torch.arange(sum(PROBE), device=model.device)[None] % model.config.vocab_size
    sequences = Sequences.of(list(PROBE), model.device)
    with packed_attention(model):
        packed = decoder(
            input_ids=ids, position_ids=sequences.position_ids, sequences=sequences, use_cache=False
        ).last_hidden_state
    alone = [decoder(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(PROBE, 1)]
    expected = torch.cat(alone, dim=1)
    return bool((packed - expected).abs().max() <= PROBE_TOLERANCE * expected.abs().max())


def _attention(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    sequences: Sequences,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: [1, heads, N, D] queries, keys and values; [1, N, heads, D] comes back.

    Sequences of equal length share a call. R different lengths have Σ 1 … R tokens at least, so N tokens
    need √(2 N) calls at most. `split` rather than slices, whose gradients would be of full size each.
    """
    if not dropout and _takes_varlen(query):
        return _varlen(query, key, value, sequences, scaling), None
    heads_per_key = query.shape[1] // key.shape[1]
    if heads_per_key > 1:
        key, value = (x.repeat_interleave(heads_per_key, dim=1) for x in (key, value))
    sizes = [count * length for count, length in sequences.runs]
    parts = [torch.split(x[0], sizes, 1) for x in (query, key, value)]
    outputs = []
    for run, *qkv in zip(sequences.runs, *parts, strict=True):
        q, k, v = (part.unflatten(1, run).transpose(0, 1) for part in qkv)  # [count, heads, length, D]
        output = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def _takes_varlen(query: Tensor) -> bool:
    """Whether torch's variable-length FlashAttention takes such queries: from Ampere GPUs on."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_size = query.shape[-1]
    is_ampere = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return is_ampere and head_size <= 256 and head_size % 8 == 0


def _varlen(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float | None) -> Tensor:
    """torch's variable-length FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    ends, longest = sequences.cu_seqlens, max(sequences.lengths)
    causal = (-1, 0)
    output: Any = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scaling, window_size=causal, enable_gqa=True
    )
    attended: Tensor = output[None]
    return attended


AttentionInterface.register(ATTENTION, _attention)
