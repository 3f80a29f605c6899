"""Faster float32 matrix products on CPUs, for inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# oneDNN adds all products of a dot product into one float32, and MKL 192 at a time. Blocks of this many cost
# a fifth of the speed and keep the error of SmolLM2's entropies at MKL's (docs/entropies.md).
SUMMED_AT_ONCE = 288


class OneDnnLinear(TorchFunctionMode):
    """Within it, linear layers of float32 on a CPU are computed by oneDNN instead of MKL. Without gradients.

    MKL has no AVX-512 kernels for AMD's processors, where oneDNN is about twice as fast; see
    `tests/benchmarks/bench_linear.py`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs and _suits(*args[:2]):
            return _linear(args[0], args[1], args[2] if len(args) > 2 else None)
        return func(*args, **(kwargs or {}))


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_blocks = -(-weight.shape[1] // SUMMED_AT_ONCE)
    first, *others = zip(states.chunk(num_blocks, -1), weight.chunk(num_blocks, -1), strict=True)
    total = _product(*first, bias)
    for block in others:
        total += _product(*block)
    return total


def _product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Of strided weights oneDNN takes a loop that is a thousand times as slow.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        states.contiguous(), weight.contiguous(), bias, "none", [], ""
    )
    return product


def _suits(states: Tensor, weight: Tensor) -> bool:
    return (
        states.dtype == weight.dtype == torch.float32
        and states.device.type == "cpu"
        and torch._C._has_mkldnn
        and not torch.is_grad_enabled()
    )
