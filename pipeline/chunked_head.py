"""The output embedding, a block of rows and vocabulary at a time: no [N, V] tensor, forward or backward.

Backward computes the logits again instead of keeping them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class ChunkedHead(torch.autograd.Function):
    """∂log p_y/∂z = 1_y − p and ∂entropy/∂z = −p·(log p + entropy), with z divided by each temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropy_temperature: float,
        chunk_logits: int,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs, entropies, normalizers, plain_normalizers = hidden.new_empty(4, len(hidden), dtype=exact)
        row_blocks, blocks = _blocks(len(hidden), len(weight), chunk_logits)
        for rows in row_blocks:
            states = hidden[rows].to(exact)
            sampled = plain = _Distribution(states)
            if entropy_temperature != temperature:
                plain = _Distribution(states)
            found = states.new_zeros(len(states))  # the targets' logits
            for columns in blocks:
                logits = linear(states, weight, bias, columns)
                if plain is not sampled:
                    plain.add(logits / entropy_temperature)
                if temperature != 1:
                    logits /= temperature
                place, here = _targets_in(columns, targets[rows])
                found += torch.where(here, logits.gather(1, place[:, None])[:, 0], 0)
                sampled.add(logits)
            normalizers[rows], plain_normalizers[rows] = sampled.normalizers(), plain.normalizers()
            logprobs[rows], entropies[rows] = found - normalizers[rows], plain.entropies()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, normalizers, plain_normalizers)
        ctx.temperatures, ctx.chunk_logits = (temperature, entropy_temperature), chunk_logits
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropies = grads
        hidden, weight, bias, targets, entropies, normalizers, plain_normalizers = ctx.saved_tensors
        temperature, entropy_temperature = ctx.temperatures
        # Gradients over all blocks add up in float32 before they are rounded.
        grad_hidden = torch.zeros_like(hidden, dtype=entropies.dtype)
        grad_weight = torch.zeros_like(weight, dtype=entropies.dtype)
        grad_bias = grad_weight.new_zeros(len(weight))
        row_blocks, blocks = _blocks(len(hidden), len(weight), ctx.chunk_logits)
        for rows in row_blocks:
            states = hidden[rows].to(entropies.dtype)
            for columns in blocks:
                logits = linear(states, weight, bias, columns)
                grad = torch.zeros_like(logits)
                if grad_logprobs is not None:
                    pull = grad_logprobs[rows] / temperature
                    grad -= pull[:, None] * torch.exp(logits / temperature - normalizers[rows, None])
                    place, here = _targets_in(columns, targets[rows])
                    grad.scatter_add_(1, place[:, None], torch.where(here, pull, 0)[:, None])
                if grad_entropies is not None:
                    log_p = logits / entropy_temperature - plain_normalizers[rows, None]
                    pull = grad_entropies[rows] / entropy_temperature
                    grad -= pull[:, None] * log_p.exp() * (log_p + entropies[rows, None])
                grad_hidden[rows] += grad @ weight[columns].to(grad.dtype)
                grad_weight[columns].addmm_(grad.T, states)
                if bias is not None:
                    grad_bias[columns] += grad.sum(0)
        return (
            grad_hidden.to(hidden.dtype),
            grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            *(None,) * 4,
        )


class _Distribution:
    """Normalizer and entropy of rows of logits that come a block of the vocabulary at a time. R rows.

    With m the greatest logit so far, s = Σ exp(z − m) and u = Σ exp(z − m)·(z − m), logsumexp z = m + log s
    and entropy = log s − u/s. Since s ≥ 1 and u ≤ 0, rounding makes no entropy negative, no probability > 1.
    """

    def __init__(self, states: Tensor) -> None:
        self.greatest = states.new_full((len(states),), -math.inf)
        self.mass = states.new_zeros(len(states))
        self.moment = states.new_zeros(len(states))

    def add(self, logits: Tensor) -> None:
        """Takes in logits [R, C], and overwrites them."""
        greatest = torch.maximum(self.greatest, logits.amax(-1))
        shift = (self.greatest - greatest).clamp(min=-1e4)  # −∞ before the first block
        self.greatest = greatest
        self.moment = shift.exp() * (self.moment + shift * self.mass)
        self.mass = shift.exp() * self.mass
        logits -= greatest[:, None]
        weights = logits.exp()
        self.mass += weights.sum(-1)
        self.moment += weights.mul_(logits).sum(-1)

    def normalizers(self) -> Tensor:
        """[R] logsumexp of the logits."""
        return self.greatest + self.mass.log()

    def entropies(self) -> Tensor:
        """[R] nats."""
        return self.mass.log() - self.moment / self.mass


def _blocks(num_rows: int, vocabulary: int, chunk_logits: int) -> tuple[list[slice], list[slice]]:
    """Slices of the rows and of the vocabulary, of `chunk_logits` logits a pair.

    Whole rows if many fit; else about as many rows as columns, since each block of rows reads all weights.
    """
    rows = max(1, min(num_rows, max(chunk_logits // vocabulary, math.isqrt(chunk_logits))))
    columns = max(1, chunk_logits // rows)
    return list(_slices(num_rows, rows)), list(_slices(vocabulary, columns))


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def linear(states: Tensor, weight: Tensor, bias: Tensor | None, columns: slice = slice(None)) -> Tensor:
    """Logits of some columns of the vocabulary, in the precision of `states`; no other weights are cast."""
    bias = None if bias is None else bias[columns].to(states.dtype)
    logits: Tensor = torch.nn.functional.linear(states, weight[columns].to(states.dtype), bias)
    return logits


def _targets_in(columns: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Where each target stands within a block of the vocabulary, and whether it stands there at all."""
    place = targets - columns.start
    size = columns.stop - columns.start
    return place.clamp(0, size - 1), (place >= 0) & (place < size)
