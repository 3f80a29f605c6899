"""The output embedding, a block of rows and vocabulary at a time: no [N, V] tensor, forward or backward.

Backward computes the logits again instead of keeping them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.head_blocks import Distribution, logits_gradient, targets_in


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
            states = hidden[rows].to(_factors(hidden, weight, exact))
            sampled = plain = Distribution(len(states), temperature, like=logprobs)
            if entropy_temperature != temperature:
                plain = Distribution(len(states), entropy_temperature, like=logprobs)
            found = logprobs.new_zeros(len(states))  # the targets' logits
            for columns in blocks:
                logits = linear(states, weight, bias, columns, exact)
                place, here = targets_in(logits.shape[1], targets[rows] - columns.start)
                found += torch.where(here, logits.gather(1, place[:, None])[:, 0], 0)
                if plain is not sampled:
                    plain.add(logits.clone())
                sampled.add(logits)
            normalizers[rows], plain_normalizers[rows] = sampled.normalizers(), plain.normalizers()
            logprobs[rows], entropies[rows] = found / temperature - normalizers[rows], plain.entropies()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, normalizers, plain_normalizers)
        ctx.temperatures, ctx.chunk_logits = (temperature, entropy_temperature), chunk_logits
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropies, *normalizers = ctx.saved_tensors
        exact = entropies.dtype
        # Gradients over all blocks add up in float32 before they are rounded.
        grad_hidden = torch.zeros_like(hidden, dtype=exact)
        grad_weight = torch.zeros_like(weight, dtype=exact)
        grad_bias = grad_weight.new_zeros(len(weight))
        row_blocks, blocks = _blocks(len(hidden), len(weight), ctx.chunk_logits)
        for rows in row_blocks:
            states = hidden[rows].to(_factors(hidden, weight, exact))
            for columns in blocks:
                grad = logits_gradient(
                    linear(states, weight, bias, columns, exact),
                    targets[rows] - columns.start,
                    [of_all[rows] for of_all in normalizers],
                    entropies[rows],
                    [None if pull is None else pull[rows] for pull in grads],
                    ctx.temperatures,
                )
                if bias is not None:
                    grad_bias[columns] += grad.sum(0)
                grad = grad.to(states.dtype)  # tensor cores', as autograd rounds that of bfloat16 logits
                grad_hidden[rows] += _product(grad, weight[columns], exact)
                grad_weight[columns] += _product(grad.T, states, exact)
        return (
            grad_hidden.to(hidden.dtype),
            grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _blocks(num_rows: int, vocabulary: int, chunk_logits: int) -> tuple[list[slice], list[slice]]:
    """Slices of the rows and of the vocabulary, of `chunk_logits` logits a pair.

    Whole rows if many fit; else about as many rows as columns, since each block of rows reads all weights.
    """
    rows = max(1, min(num_rows, max(chunk_logits // vocabulary, math.isqrt(chunk_logits))))
    columns = max(1, chunk_logits // rows)
    return list(_slices(num_rows, rows)), list(_slices(vocabulary, columns))


def linear(states: Tensor, weight: Tensor, bias: Tensor | None, columns: slice, exact: torch.dtype) -> Tensor:
    """Logits of some columns of the vocabulary in the precision `exact`; no other weights are cast."""
    bias = None if bias is None else bias[columns].to(exact)
    if states.dtype == exact:
        logits: Tensor = torch.nn.functional.linear(states, weight[columns].to(exact), bias)
        return logits
    logits = _product(states, weight[columns].T, exact)
    return logits if bias is None else logits.add_(bias)


def _factors(hidden: Tensor, weight: Tensor, exact: torch.dtype) -> torch.dtype:
    """The precision of what is multiplied: tensor cores add up products of bfloat16 in float32, exactly."""
    halves = hidden.dtype in (torch.bfloat16, torch.float16) and hidden.dtype == weight.dtype
    return hidden.dtype if halves and hidden.is_cuda else exact


def _product(left: Tensor, right: Tensor, exact: torch.dtype) -> Tensor:
    """Of two matrices, added up in the precision `exact`."""
    if left.dtype == exact:
        return left @ right.to(exact)
    return torch.mm(left, right, out_dtype=exact)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
