"""Faster float32 matrix products on CPUs, for inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


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
            bias = args[2] if len(args) > 2 else None
            return torch.ops.mkldnn._linear_pointwise(args[0], args[1], bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _suits(states: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        states.dtype == weight.dtype == torch.float32
        and states.device.type == "cpu"
        and torch._C._has_mkldnn
        and not torch.is_grad_enabled()
    )
