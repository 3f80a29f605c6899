"""What becomes of a block of logits: running sums for log-probs and entropies, and the logits' gradient.

Triton kernels on CUDA (`pipeline/head_kernels.py`), plain torch elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


class Distribution:
    """Normalizer and entropy of rows of logits that come a block of the vocabulary at a time. R rows.

    With z the logits divided by the temperature, m the greatest so far, s = Σ exp(z − m) and
    u = Σ exp(z − m)·(z − m), logsumexp z = m + log s and entropy = log s − u/s. Since s ≥ 1 and u ≤ 0,
    rounding makes no entropy negative, no probability > 1.
    """

    def __init__(self, num_rows: int, temperature: float, like: Tensor) -> None:
        """`like` has the device and the precision of the logits that come."""
        self.temperature = temperature
        self.greatest = like.new_full((num_rows,), -math.inf)
        self.mass, self.moment = like.new_zeros(2, num_rows)

    def add(self, logits: Tensor) -> None:
        """Takes in logits [R, C], and overwrites them."""
        if kernels := _kernels(logits):
            kernels.take_in(logits, self.temperature, self.greatest, self.mass, self.moment)
            return
        if self.temperature != 1:
            logits /= self.temperature
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
        normalizers: Tensor = self.greatest + self.mass.log()
        return normalizers

    def entropies(self) -> Tensor:
        """[R] nats."""
        entropies: Tensor = self.mass.log() - self.moment / self.mass
        return entropies


def logits_gradient(
    logits: Tensor,
    places: Tensor,
    normalizers: Sequence[Tensor],
    entropies: Tensor,
    pulls: Sequence[Tensor | None],
    temperatures: tuple[float, float],
) -> Tensor:
    """The gradient of Σ pull · value with respect to a block of logits, which may be overwritten.

    Args:
        logits: [R, C].
        places: [R] int64, columns of the targets, some outside of the block.
        normalizers: [R] logsumexp over the whole vocabulary, at each of the temperatures.
        entropies: [R] nats, at the second temperature.
        pulls: [R] of the log-probs and of the entropies.
        temperatures: of the log-probs and of the entropies.

    Returns:
        [R, C]
    """
    if kernels := _kernels(logits):
        nothing = torch.zeros_like(entropies)
        known = [nothing if pull is None else pull.contiguous() for pull in pulls]  # a sum's are expanded
        gradient: Tensor = kernels.to_gradient(logits, places, normalizers, entropies, known, temperatures)
        return gradient
    grad = torch.zeros_like(logits)
    of_logprobs, of_entropies = pulls
    if of_logprobs is not None:
        pull = of_logprobs / temperatures[0]
        grad -= pull[:, None] * torch.exp(logits / temperatures[0] - normalizers[0][:, None])
        place, here = targets_in(logits.shape[1], places)
        grad.scatter_add_(1, place[:, None], torch.where(here, pull, 0)[:, None])
    if of_entropies is not None:
        log_p = logits / temperatures[1] - normalizers[1][:, None]
        pull = of_entropies / temperatures[1]
        grad -= pull[:, None] * log_p.exp() * (log_p + entropies[:, None])
    return grad


def targets_in(num_columns: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """A column for each target, and whether the target stands there, that is within the block."""
    return places.clamp(0, num_columns - 1), (places >= 0) & (places < num_columns)


def _kernels(logits: Tensor) -> ModuleType | None:
    # Triton takes numbers such as a temperature in float32.
    return _triton_kernels() if logits.is_cuda and logits.dtype == torch.float32 else None


@cache
def _triton_kernels() -> ModuleType | None:
    """None where torch for CUDA came without Triton, as on Windows."""
    try:
        from pipeline import head_kernels
    except ImportError:
        return None
    return head_kernels
