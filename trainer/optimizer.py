"""AdamW with float32 masters: bfloat16 weights have 8 bits, and an update of 1e-5 would round away."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.ranks import ALONE, Ranks
from trainer.sharding import spread_like, whole

MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """AdamW over a module's trainable parameters, its gradients clipped to a norm.

    Parameters of less than float32 get a float32 copy that holds the truth; after each step the rounded
    copy goes back into the model. Weight decay spares vectors (norms, biases).

    Where several processes train (`ranks`), some parameters are spread over them and others whole in each;
    all processes must call the same methods.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float,
        max_grad_norm: float,
        ranks: Ranks = ALONE,
    ) -> None:
        named = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self._names, self._params = list(named), list(named.values())
        self._masters = [_master(param) for param in self._params]
        self._max_grad_norm, self._ranks = max_grad_norm, ranks
        self._aside: list[Tensor | None] = []
        model.zero_grad(set_to_none=True)  # what someone else left behind is no part of the first step
        self._kinds = [
            kind
            for is_spread in (False, True)
            if (kind := [m for m in self._masters if isinstance(m, DTensor) is is_spread])
        ]
        groups = [
            {
                "params": [m for m in kind if (m.ndim >= 2) is is_matrix],
                "weight_decay": weight_decay * is_matrix,
            }
            for kind in self._kinds
            for is_matrix in (True, False)
        ]
        self._adamw = torch.optim.AdamW(groups, lr=lr)

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
        self._add_up()
        before = self._aside or [None] * len(self._masters)
        self._aside = [master.grad for master in self._masters]
        for master, grad in zip(self._masters, before, strict=True):
            master.grad = grad

    def norm(self) -> float:
        """Of what is collected since the beginning or `swap`; 0 if that is nothing."""
        self._add_up()
        return self._norm()

    def drop(self) -> None:
        """Forget the collected gradients, and leave the model as it is."""
        self._aside = []
        self._adamw.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Clip the collected gradients; returns their norm before. 0 if there are none."""
        self._add_up()
        for master, aside in zip(self._masters, self._aside, strict=bool(self._aside)):
            if aside is not None:
                master.grad = aside if master.grad is None else master.grad + aside
        self._aside = []
        norm = self._norm()
        for kind in self._kinds:
            nn.utils.clip_grads_with_norm_(kind, self._max_grad_norm, torch.tensor(norm))
        return norm

    def _norm(self) -> float:
        """Of those that are whole and those that are spread, which torch does not mix."""
        norms = []
        for kind in self._kinds:
            grads = [master.grad for master in kind if master.grad is not None]
            if grads:
                norms.append(float(whole(nn.utils.get_total_norm(grads))))
        return norms[0] if len(norms) == 1 else math.hypot(*norms)

    def _add_up(self) -> None:
        """FSDP2 makes the mean over processes of gradients that are spread; do so with the others.

        What was added up before is the same everywhere, so that doing so again changes nothing.
        """
        for master in self._masters:
            if self._ranks.size > 1 and master.grad is not None and not isinstance(master.grad, DTensor):
                master.grad.copy_(self._ranks.total(master.grad) / self._ranks.size)

    @torch.no_grad()
    def step(self) -> None:
        """Update the model with the collected gradients and forget them."""
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        for param, master in zip(self._params, self._masters, strict=True):
            if param is not master:
                param.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Masters, moments and step counts, by kind and parameter ("exp_avg.lm_head.weight"), on the CPU.

        The first process gets them, the others nothing. One tensor at a time is gathered: all together are
        what was spread because one device does not hold them.
        """
        tensors = {}
        for name, master in zip(self._names, self._masters, strict=True):
            of_master = {"master": master.detach(), **self._adamw.state.get(master, {})}
            for kind, values in of_master.items():
                gathered = whole(values)
                if self._ranks.is_first:
                    tensors[f"{kind}.{name}"] = gathered.cpu().contiguous()
                del gathered
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the optimizer and its model, alike in all but values, to what `state` gave."""
        for name, param, master in zip(self._names, self._params, self._masters, strict=True):
            master.copy_(spread_like(tensors[f"master.{name}"], master))
            param.copy_(master)
            self._adamw.state.pop(master, None)
            if f"step.{name}" in tensors:  # AdamW has no moments before a parameter's first gradient
                self._adamw.state[master] = {
                    "step": tensors[f"step.{name}"].clone(),  # AdamW counts on the CPU
                    **{kind: _like(master, tensors[f"{kind}.{name}"]) for kind in MOMENTS},
                }


def _like(master: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(master, requires_grad=False).copy_(spread_like(values, master))


def _master(param: nn.Parameter) -> Tensor:
    if param.dtype in (torch.float32, torch.float64):
        return param
    return param.detach().to(torch.float32).requires_grad_()
