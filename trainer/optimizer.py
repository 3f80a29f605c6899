"""AdamW with float32 masters: bfloat16 weights have 8 bits, and an update of 1e-5 would round away."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """AdamW over a module's trainable parameters, its gradients clipped to a norm.

    Parameters of less than float32 get a float32 copy that holds the truth; after each step the rounded
    copy goes back into the model. Weight decay spares vectors (norms, biases).
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, max_grad_norm: float) -> None:
        named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._names, self._params = list(named), list(named.values())
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

    def swap(self) -> None:
        """Put what is collected so far by, until `clip`, and go on with what was put by before, if anything.

        So two terms' gradients have norms of their own, at the cost of holding both for a while.
        """
        before = self._aside or [None] * len(self._masters)
        self._aside = [master.grad for master in self._masters]
        for master, grad in zip(self._masters, before, strict=True):
            master.grad = grad

    def norm(self) -> float:
        """Of what is collected since the beginning or `swap`; 0 if that is nothing."""
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

    def state(self) -> dict[str, Tensor]:
        """Masters, moments and step counts, by kind and parameter ("exp_avg.lm_head.weight")."""
        tensors = {}
        for name, master in zip(self._names, self._masters, strict=True):
            of_master = {"master": master.detach(), **self._adamw.state.get(master, {})}
            tensors.update({f"{kind}.{name}": of_master[kind].contiguous() for kind in of_master})
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the optimizer and its model, alike in all but values, to what `state` gave."""
        for name, param, master in zip(self._names, self._params, self._masters, strict=True):
            master.copy_(tensors[f"master.{name}"])
            param.copy_(master)
            self._adamw.state.pop(master, None)
            if f"step.{name}" in tensors:  # AdamW has no moments before a parameter's first gradient
                self._adamw.state[master] = {
                    "step": tensors[f"step.{name}"].clone(),  # AdamW counts on the CPU
                    **{kind: _like(master, tensors[f"{kind}.{name}"]) for kind in MOMENTS},
                }


def _like(master: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(master, requires_grad=False).copy_(values)


def _master(param: nn.Parameter) -> Tensor:
    if param.dtype in (torch.float32, torch.float64):
        return param
    return param.detach().to(torch.float32).requires_grad_()
