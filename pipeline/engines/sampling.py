"""Drawing tokens, and measuring next-token distributions: one place for every engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import SamplingConfig

PRODUCTS = 2**19  # elements of a product that are held at once on a CPU: they fit its cache
_LOWEST = -1e30  # a finite stand-in for the logit of a forbidden token
BLOCK = 256  # tokens whose probabilities are summed before a draw looks at them one by one


@dataclass(frozen=True)
class DrawRule:
    """How tokens are drawn, and which distribution's entropy is kept.

    Attributes:
        top_k: 0 keeps all.
        entropy_kind: full_vocab (temperature 1) or full_vocab_tempered; neither sees the truncation.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    entropy_kind: str = "full_vocab"

    @classmethod
    def of(cls, sampling: SamplingConfig, entropy_kind: str) -> DrawRule:
        return cls(sampling.temperature, sampling.top_p, sampling.top_k, entropy_kind)


@dataclass(frozen=True)
class Drawn:
    """One token for each of B rows.

    Attributes:
        tokens: [B] int64.
        logprobs: [B] float32, nats, at temperature 1 before truncation.
        entropies: [B] float32, nats.
    """

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor


def noise(seed: int, num_tokens: int) -> NDArray[np.float64]:
    """[num_tokens] uniforms in [0, 1): what decides the tokens of one sample, wherever it is computed."""
    return np.random.Generator(np.random.Philox(key=seed)).random(num_tokens)


def draw(logits: Tensor, uniforms: Tensor, rule: DrawRule) -> Drawn:
    """One token a row by inverse transform: the row's own uniform picks from its own distribution.

    Args:
        logits: [B, V] float32, as the model gave them; each row is shifted, in place, to a maximum of 0.
        uniforms: [B] float64 in [0, 1).
    """
    weights, totals, entropies = measure(logits)
    if rule.temperature != 1.0:
        weights, _, tempered = measure(logits / rule.temperature)
        if rule.entropy_kind == "full_vocab_tempered":
            entropies = tempered
    tokens = _pick(_truncated(weights, rule), uniforms)
    return Drawn(tokens, logits.gather(1, tokens[:, None])[:, 0] - totals.log(), entropies)


def measure(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights, their sum and the entropy of softmax(logits).

    With z = logits − their maximum and w = exp z: entropy = log Σw − (Σ w·z) / Σw. Shifted sums are
    small, and so exact, however large the logits are.

    Args:
        logits: [B, V] float32; each row is shifted, in place, to a maximum of 0.

    Returns:
        weights [B, V], the largest of a row 1; their sums [B]; entropies [B], nats.
    """
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp()
    totals = weights.sum(dim=-1)
    products = _sum_of_products(weights, logits)
    # a difference of float32 can end a hair below zero where the model is sure
    return weights, totals, (totals.log() - products / totals).clamp(min=0.0)


def _sum_of_products(weights: Tensor, logits: Tensor) -> Tensor:
    """[B] Σ w·z of [B, V], with 0 · −∞ = 0 where a token is forbidden.

    Multiplied first and then summed in pairs, a few rows at a time. Over 50,000 tokens a matrix product (MKL)
    errs a hundred times as much; see the test of entropies over fifty thousand tokens.
    """
    rows = max(1, PRODUCTS // weights.shape[1]) if weights.device.type == "cpu" else len(weights)
    parts = [
        (w * z.clamp(min=_LOWEST)).sum(dim=-1)
        for w, z in zip(torch.split(weights, rows), torch.split(logits, rows), strict=True)
    ]
    return torch.cat(parts)


def _pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """[B] int64 indices into [B, V] weights, each with probability in proportion to its weight.

    Two levels: first a block of tokens, then a token in it, so that the whole row is read once and only
    sums are added up in float64.
    """
    num_tokens = weights.shape[1]
    if num_tokens <= BLOCK:
        return _position(weights.double(), uniforms)[0]
    whole = num_tokens // BLOCK * BLOCK
    sums = [weights[:, :whole].view(len(weights), -1, BLOCK).sum(dim=-1)] if whole else []
    if whole < num_tokens:
        sums.append(weights[:, whole:].sum(dim=-1, keepdim=True))
    block, fraction = _position(torch.cat(sums, dim=1).double(), uniforms)
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=num_tokens - 1)).double()
    inside = inside.masked_fill(columns >= num_tokens, 0.0)
    index, _ = _position(inside, fraction)
    # NaN weights lead beyond the last token; whoever gets the token finds its log-probability NaN
    return (block * BLOCK + index).clamp(max=num_tokens - 1)


def _position(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Where [B] uniforms fall in [B, N] float64 weights: the index, and how far into it, in [0, 1)."""
    cumulative = weights.cumsum(dim=1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    # right: the first whose cumulative weight exceeds the target, so that none of weight zero is taken
    index = torch.searchsorted(cumulative, targets, right=True).clamp(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    into = (targets - (cumulative.gather(1, index) - weight)) / weight
    return index[:, 0], into[:, 0].clamp(0.0, 1.0 - 2.0**-53)


def _truncated(weights: Tensor, rule: DrawRule) -> Tensor:
    """[B, V] with the tokens outside top-k and top-p at zero; not renormalized."""
    vocabulary = weights.shape[-1]
    if 0 < rule.top_k < vocabulary:
        floor = weights.topk(rule.top_k, dim=-1).values[:, -1:]
        weights = weights.where(weights >= floor, 0.0)
    if rule.top_p < 1.0:
        ordered, order = weights.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.where(mass_before < rule.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        weights = torch.zeros_like(weights).scatter(-1, order, ordered)
    return weights
