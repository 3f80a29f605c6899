"""The `transformers` engine: exact entropies on any machine, one batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.config import SamplingConfig
from pipeline.engines.base import GroupRequest
from pipeline.errors import PromptError
from pipeline.prompts import prompt_messages_ids
from pipeline.records import Group, Int32, Sample


@dataclass
class _Row:
    """One sample while it grows."""

    request: int
    sample_index: int
    noise: np.ndarray  # [max_tokens] uniforms in [0, 1)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    finish_reason: str = "length"


class TransformersEngine:
    """Samples with a Hugging Face model in this process; the trainer hands in its live model."""

    logprobs_kind = "raw"

    def __init__(self, model: PreTrainedModel, tokenizer: Any, entropy_kind: str = "full_vocab") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.entropy_kind = entropy_kind

    @torch.inference_mode()
    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingConfig) -> Iterator[Group]:
        """See `Engine.generate`. All requests are one batch; rows leave it as they finish."""
        if not requests:
            return
        prompts = [prompt_messages_ids(self.tokenizer, request.prompt.messages) for request in requests]
        self._refuse_long(requests, prompts, sampling)
        was_training = self.model.training
        self.model.train(False)
        try:
            yield from self._sampled(requests, prompts, sampling)
        finally:
            self.model.train(was_training)

    def _sampled(
        self, requests: Sequence[GroupRequest], prompts: Sequence[Int32], sampling: SamplingConfig
    ) -> Iterator[Group]:
        rows = [
            _Row(request, index, np.random.Generator(np.random.Philox(key=seed)).random(sampling.max_tokens))
            for request, one in enumerate(requests)
            for index, seed in enumerate(one.seeds)
        ]
        finished: dict[int, list[_Row]] = {}
        ends = self._end_ids()
        alive = rows
        logits, cache, mask = self._prefill(prompts, [row.request for row in rows])
        for position in range(sampling.max_tokens):
            uniforms = torch.tensor([row.noise[position] for row in alive], dtype=torch.float64)
            chosen = _sample(logits, uniforms.to(logits.device), sampling, self.entropy_kind)
            keep = []
            for i, (row, token, logprob, entropy) in enumerate(zip(alive, *chosen, strict=True)):
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.entropies.append(entropy)
                if token in ends:
                    row.finish_reason = "stop"
                if token in ends or position == sampling.max_tokens - 1:
                    done = finished.setdefault(row.request, [])
                    done.append(row)
                    if len(done) == len(requests[row.request].seeds):
                        yield _group(requests[row.request], prompts[row.request], done)
                else:
                    keep.append(i)
            if not keep:
                return
            tokens = torch.tensor([chosen[0][i] for i in keep], device=mask.device)
            if len(keep) < len(alive):
                kept = torch.tensor(keep, device=mask.device)
                cache.batch_select_indices(kept)
                mask = mask[kept]
                alive = [alive[i] for i in keep]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            logits = self._forward(tokens[:, None], mask, cache)

    def _prefill(self, prompts: Sequence[Int32], request_of_row: Sequence[int]) -> tuple[Tensor, Any, Tensor]:
        """Each prompt is read once, then its cache is repeated for its samples. B = rows.

        Returns:
            [B, V] logits of the next token, the cache, and the [B, P] mask (padding on the left).
        """
        width, device = max(map(len, prompts)), self.model.device
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[i, width - len(prompt) :] = 1
        cache = DynamicCache()
        mask = mask.to(device)
        logits = self._forward(ids.to(device), mask, cache)
        repeats = torch.tensor(request_of_row, device=device)
        cache.batch_select_indices(repeats)
        return logits[repeats], cache, mask[repeats]

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _end_ids(self) -> frozenset[int]:
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None)

    def _refuse_long(
        self, requests: Sequence[GroupRequest], prompts: Sequence[Int32], sampling: SamplingConfig
    ) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for request, prompt in zip(requests, prompts, strict=True):
            if limit is not None and len(prompt) + sampling.max_tokens > limit:
                raise PromptError(
                    f"Prompt {request.prompt.prompt_id} ({request.prompt.text[:40]!r}) has {len(prompt)} "
                    f"tokens; with sampling.max_tokens = {sampling.max_tokens} it exceeds the model's "
                    f"{limit}. Lower max_tokens or shorten the prompt."
                )


def _sample(
    logits: Tensor, uniforms: Tensor, sampling: SamplingConfig, entropy_kind: str
) -> tuple[list[int], list[float], list[float]]:
    """One token a row by inverse transform: the row's own uniform picks from its own distribution.

    Args:
        logits: [B, V] float32, as the model gave them.
        uniforms: [B] float64 in [0, 1).

    Returns:
        token ids [B]; their log-probs [B] at temperature 1 before truncation, nats; entropies [B], nats.
    """
    raw = torch.log_softmax(logits, dim=-1)
    tempered = (
        raw if sampling.temperature == 1.0 else torch.log_softmax(logits / sampling.temperature, dim=-1)
    )
    measured = tempered if entropy_kind == "full_vocab_tempered" else raw
    entropies = -(measured.exp() * measured).sum(dim=-1)
    probabilities = _truncated(tempered.exp(), sampling).double()
    cumulative = probabilities.cumsum(dim=-1)
    # right: the first token whose cumulative mass exceeds the uniform, so none of mass zero is taken
    targets = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).clamp(max=logits.shape[-1] - 1)
    logprobs = raw.gather(-1, tokens)[:, 0]
    return tokens[:, 0].tolist(), logprobs.tolist(), entropies.clamp(min=0).tolist()


def _truncated(probabilities: Tensor, sampling: SamplingConfig) -> Tensor:
    """[B, V] with the tokens outside top-k and top-p at zero; not renormalized."""
    vocabulary = probabilities.shape[-1]
    if 0 < sampling.top_k < vocabulary:
        floor = probabilities.topk(sampling.top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= floor, 0.0)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.where(mass_before < sampling.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return probabilities


def _group(request: GroupRequest, prompt_ids: Int32, rows: list[_Row]) -> Group:
    samples = tuple(
        Sample(
            sample_index=row.sample_index,
            seed=request.seeds[row.sample_index],
            completion_ids=np.array(row.ids, dtype=np.int32),
            logprobs=np.array(row.logprobs, dtype=np.float32),
            entropies=np.array(row.entropies, dtype=np.float32),
            finish_reason=row.finish_reason,
        )
        for row in sorted(rows, key=lambda row: row.sample_index)
    )
    return Group(request.prompt, prompt_ids, samples)
