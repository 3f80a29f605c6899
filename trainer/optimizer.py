"""AdamW with float32 masters: bfloat16 weights have 8 bits, and an update of 1e-5 would round away."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MasterAdamW:
    """AdamW over a module's trainable parameters, its gradients clipped to a norm.

    Parameters of less than float32 get a float32 copy that holds the truth; after each step the rounded
    copy goes back into the model. Weight decay spares vectors (norms, biases).
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, max_grad_norm: float) -> None:
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._masters = [_master(param) for param in self._params]
        self._max_grad_norm = max_grad_norm
        self._aside: list[Tensor | None] = []
        model.zero_grad(set_to_none=True)  # what someone else left behind is no part of the first step
        self._adamw = torch.optim.AdamW(
            [
                {"params": [m for m in self._masters if m.ndim >= 2], "weight_decay": weight_decay},
                {"params": [m for m in self._masters if m.ndim < 2], "weight_decay": 0.0},
            ],
            lr=lr,
        )

    def collect(self) -> None:
        """Add the model's gradients to the masters', in float32. Call after every backward pass."""
        for param, master in zip(self._params, self._masters, strict=True):
            if param is master or param.grad is None:
                continue
            grad = param.grad.to(master.dtype)
            master.grad = grad if master.grad is None else master.grad + grad
            param.grad = None

    def set_aside(self) -> float:
        """Put what is collected so far by, until `clip`, and begin anew; returns its norm.

        So the next term's gradient has a norm of its own, at the cost of holding two gradients for a while.
        """
        self._aside = [master.grad for master in self._masters]
        norm = self.norm()
        for master in self._masters:
            master.grad = None
        return norm

    def norm(self) -> float:
        """Of what is collected since the beginning or `set_aside`; 0 if that is nothing."""
        grads = [master.grad for master in self._masters if master.grad is not None]
        return float(nn.utils.get_total_norm(grads)) if grads else 0.0

    def drop(self) -> None:
        """Forget the collected gradients, and leave the model as it is."""
        self._aside = []
        self._adamw.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Clip the collected gradients; returns their norm before. 0 if there are none."""
        for master, aside in zip(self._masters, self._aside, strict=bool(self._aside)):
            if aside is not None:
                master.grad = aside if master.grad is None else master.grad + aside
        self._aside = []
        return float(nn.utils.clip_grad_norm_(self._masters, self._max_grad_norm))

    @torch.no_grad()
    def step(self) -> None:
        """Update the model with the collected gradients and forget them."""
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        for param, master in zip(self._params, self._masters, strict=True):
            if param is not master:
                param.copy_(master)


def _master(param: nn.Parameter) -> Tensor:
    if param.dtype in (torch.float32, torch.float64):
        return param
    return param.detach().to(torch.float32).requires_grad_()
