"""Which operations of torch are really computed."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

ONEDNN = "mkldnn::_linear_pointwise"  # oneDNN's linear layer


class Dispatched(TorchDispatchMode):
    """Notes the name of every operation that is computed within it, such as `aten::addmm`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))
