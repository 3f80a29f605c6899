"""What becomes of a block of logits, as Triton kernels: each is read once, and written once at most.

The formulas are those of `pipeline/head_blocks.py`, where torch passes over a block about ten times instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # logits of a row that a program holds at once; not tuned
NUM_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _take_in(  # type: ignore[no-untyped-def]
    logits, stride, num_columns, scale, greatest, mass, moment, BLOCK: tl.constexpr
):
    """One program per row. The running sums are about the greatest logit so far."""
    row = tl.program_id(0)
    high, total, weighed = tl.load(greatest + row), tl.load(mass + row), tl.load(moment + row)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = (
            tl.load(logits + row.to(tl.int64) * stride + columns, inside, -float("inf")).to(high.dtype)
            * scale
        )
        higher = tl.maximum(high, tl.max(z, 0))
        shift = tl.maximum(high - higher, -1e4)  # −∞ before the first block
        weighed = tl.exp(shift) * (weighed + shift * total)
        total = tl.exp(shift) * total
        below = tl.where(inside, z - higher, 0)
        weights = tl.where(inside, tl.exp(below), 0)
        total += tl.sum(weights, 0)
        weighed += tl.sum(weights * below, 0)
        high = higher
    tl.store(greatest + row, high)
    tl.store(mass + row, total)
    tl.store(moment + row, weighed)


@triton.jit  # type: ignore[untyped-decorator]
def _to_gradient(  # type: ignore[no-untyped-def]
    logits, stride, num_columns, places, normalizers, plain_normalizers, entropies,
    logprob_pulls, entropy_pulls, scale, entropy_scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK logits of a row, which their gradient replaces."""
    row, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    here = logits + row.to(tl.int64) * stride + columns
    z = tl.load(here, inside, 0)
    pull = tl.load(logprob_pulls + row) * scale
    entropy_pull = tl.load(entropy_pulls + row) * entropy_scale
    is_target = columns == tl.load(places + row)
    grad = pull * (tl.where(is_target, 1.0, 0.0) - tl.exp(z * scale - tl.load(normalizers + row)))
    log_p = z * entropy_scale - tl.load(plain_normalizers + row)
    grad -= entropy_pull * tl.exp(log_p) * (log_p + tl.load(entropies + row))
    tl.store(here, grad, inside)


def take_in(logits: Tensor, temperature: float, greatest: Tensor, mass: Tensor, moment: Tensor) -> None:
    """Add a block of the vocabulary to the running sums of R rows: see `head_blocks.Distribution`.

    Args:
        logits: [R, C] float32, contiguous within a row; not changed.
        greatest, mass, moment: [R], updated in place.
    """
    rows, columns = logits.shape
    # Triton launches on the current device, whatever a tensor's is
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        _take_in[(rows,)](
            logits, logits.stride(0), columns, 1 / temperature, greatest, mass, moment,
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


def to_gradient(
    logits: Tensor,
    places: Tensor,
    normalizers: Sequence[Tensor],
    entropies: Tensor,
    pulls: Sequence[Tensor],
    temperatures: tuple[float, float],
) -> Tensor:
    """Replace a block of logits by the gradient of the loss, which is Σ pull · value, with respect to them.

    Args:
        logits: [R, C] float32, contiguous within a row; overwritten.
        places: [R] int64, columns of the targets, some outside of the block.
        normalizers: [R] logsumexp over the whole vocabulary, at each of the two temperatures.
        entropies: [R] nats, at the second temperature.
        pulls: [R] of log-probs and of entropies.
        temperatures: of log-probs and of entropies.

    Returns:
        `logits`.
    """
    rows, columns = logits.shape
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        _to_gradient[(rows, triton.cdiv(columns, BLOCK))](
            logits, logits.stride(0), columns, places, *normalizers, entropies, *pulls,
            *(1 / temperature for temperature in temperatures), BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return logits
