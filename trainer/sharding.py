"""A model whose layers, gradients and optimizer are spread over processes by FSDP2 (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.config import SamplingConfig
from pipeline.engines.base import Engine, GroupRequest
from pipeline.records import Float32, Group, Judgement, Sample
from trainer.ranks import Ranks
from trainer.sampling import Judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sharded(model: PreTrainedModel, ranks: Ranks) -> PreTrainedModel:
    """What the processes learn on together: the model itself where there is one process, else a sharded copy.

    Every decoder layer is gathered when it is computed, forward and backward. Embeddings, output embedding
    and last norm are whole in each process, since the fused log-probs read the output embedding's weights
    themselves. The model stays whole: it is sampled from, and gets the weights by `copy_back`.
    """
    if ranks.size == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    learned: PreTrainedModel = deepcopy(model)
    mesh = init_device_mesh(ranks.device, (ranks.size,))
    for layer in learned.get_decoder().layers:  # type: ignore[no-untyped-call]
        # Asked for: a layer that is wrapped by itself would stay gathered after its forward pass. Where no
        # backward pass follows, the next forward pass would then be of the old weights.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return learned


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over processes, which must all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(values: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of whole values, spread as `tensor` is."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    return values


@torch.no_grad()
def copy_back(learned: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give the whole model the weights of the sharded one."""
    if learned is model:
        return
    for ours, theirs in zip(model.parameters(), learned.parameters(), strict=True):
        ours.copy_(whole(theirs))


class SharedEngine:
    """An engine on each process, which samples every n-th group; all processes get all groups."""

    def __init__(self, engine: Engine, ranks: Ranks, refresh: Callable[[], None]) -> None:
        """
        Args:
            engine: samples from this process's whole model.
            refresh: called before each sampling, by all processes.
        """
        self._engine, self._ranks, self._refresh = engine, ranks, refresh
        self.logprobs_kind, self.overlaps = engine.logprobs_kind, False

    @property
    def entropy_kind(self) -> str | None:
        return self._engine.entropy_kind

    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingConfig) -> Iterator[Group]:
        """See `Engine.generate`; all processes must call it with the same requests."""
        self._refresh()
        places = {request.prompt.prompt_id: place for place, request in enumerate(requests)}
        mine = requests[self._ranks.rank :: self._ranks.size]
        sampled = [
            (
                places[group.prompt.prompt_id],
                group.prompt_ids.tolist(),
                [_said(sample) for sample in group.samples],
            )
            for group in self._engine.generate(mine, sampling)
        ]
        for of_rank in self._ranks.gathered(sampled):
            for place, prompt_ids, samples in of_rank:
                ids = np.array(prompt_ids, dtype=np.int32)
                yield Group(requests[place].prompt, ids, tuple(_heard(*sample) for sample in samples))

    def close(self) -> None:
        self._engine.close()


def shared_judge(judge: Judge, ranks: Ranks) -> Judge:
    """The first process judges, and tells the others."""

    def told(groups: Sequence[Group]) -> list[list[Judgement]]:
        judged = judge(groups) if ranks.is_first else []
        said = [[(j.reward, dict(j.parts), j.error) for j in of_group] for of_group in judged]
        return [[Judgement(*one) for one in of_group] for of_group in ranks.gathered(said)[0]]

    return told


def _said(sample: Sample) -> tuple[object, ...]:
    logprobs, entropies = (None if x is None else x.tolist() for x in (sample.logprobs, sample.entropies))
    ids = sample.completion_ids.tolist()
    return sample.sample_index, sample.seed, ids, logprobs, entropies, sample.finish_reason


def _heard(
    sample_index: int,
    seed: int,
    ids: list[int],
    logprobs: list[float] | None,
    entropies: list[float] | None,
    finish_reason: str,
) -> Sample:
    told = (None if x is None else np.array(x, dtype=np.float32) for x in (logprobs, entropies))
    of_tokens: tuple[Float32 | None, Float32 | None] = (next(told), next(told))
    return Sample(sample_index, seed, np.array(ids, dtype=np.int32), *of_tokens, finish_reason)
