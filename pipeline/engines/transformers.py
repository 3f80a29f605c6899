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
from pipeline.engines.base import GroupRequest, check_sample, refuse_long_prompts, request_ids
from pipeline.engines.sampling import DrawRule, draw, noise
from pipeline.errors import EngineError
from pipeline.models import is_out_of_memory
from pipeline.records import Group, Int32, Sample
from pipeline.tokenization import completion_text


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
    overlaps = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        entropy_kind: str = "full_vocab",
        batch_rollouts: int | None = None,
    ) -> None:
        """`batch_rollouts` are sampled at once, whole groups only and at least one; None samples all."""
        self.model = model
        self.tokenizer = tokenizer
        self.entropy_kind = entropy_kind
        self.batch_rollouts = batch_rollouts

    @torch.inference_mode()
    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingConfig) -> Iterator[Group]:
        """See `Engine.generate`. Rows leave their batch as they finish.

        Raises:
            EngineError: there is no memory for a batch; the message has the settings to lower.
        """
        prompts = [request_ids(self.tokenizer, request) for request in requests]
        context = getattr(self.model.config, "max_position_embeddings", None)
        refuse_long_prompts(requests, prompts, sampling, context)
        was_training = self.model.training
        self.model.train(False)
        try:
            for start, end in self._batches(requests):
                yield from self._sampled(requests[start:end], prompts[start:end], sampling)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._no_room(sampling) from error
        finally:
            self.model.train(was_training)

    def close(self) -> None:
        """There is nothing to end; the model belongs to whoever handed it in."""

    def _no_room(self, sampling: SamplingConfig) -> EngineError:
        # a trainer samples all of a step's groups at once
        rollouts = "engine.batch_rollouts" if self.batch_rollouts else "train.prompts_per_step"
        dtype = ", or set engine.dtype = bfloat16" if self.model.dtype == torch.float32 else ""
        return EngineError(
            f"Sampling ran out of memory on {self.model.device}. Lower {rollouts}"
            f"{f' (now {self.batch_rollouts})' if self.batch_rollouts else ''} or sampling.max_tokens (now "
            f"{sampling.max_tokens}){dtype}; finished groups are kept."
        )

    def _batches(self, requests: Sequence[GroupRequest]) -> Iterator[tuple[int, int]]:
        """Where batches of whole groups start and end in the list of requests."""
        start, rollouts = 0, 0
        for i, request in enumerate(requests):
            if i > start and self.batch_rollouts and rollouts + len(request.seeds) > self.batch_rollouts:
                yield start, i
                start, rollouts = i, 0
            rollouts += len(request.seeds)
        if start < len(requests):
            yield start, len(requests)

    def _sampled(
        self, requests: Sequence[GroupRequest], prompts: Sequence[Int32], sampling: SamplingConfig
    ) -> Iterator[Group]:
        rows = [
            _Row(request, index, noise(seed, sampling.max_tokens))
            for request, one in enumerate(requests)
            for index, seed in enumerate(one.seeds)
        ]
        finished: dict[int, list[_Row]] = {}
        ends, rule = self._end_ids(), DrawRule.of(sampling, self.entropy_kind)
        alive = rows
        logits, cache, mask = self._prefill(prompts, [row.request for row in rows])
        for position in range(sampling.max_tokens):
            uniforms = torch.tensor([row.noise[position] for row in alive], dtype=torch.float64)
            drawn = draw(logits, uniforms.to(logits.device), rule)
            chosen = drawn.tokens.tolist(), drawn.logprobs.tolist(), drawn.entropies.tolist()
            keep = []
            for i, (row, token, logprob, entropy) in enumerate(zip(alive, *chosen, strict=True)):
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.entropies.append(entropy)
                ended = token in ends or self._reads_stop(row.ids, sampling.stop)
                if ended:
                    row.finish_reason = "stop"
                if ended or position == sampling.max_tokens - 1:
                    done = finished.setdefault(row.request, [])
                    done.append(row)
                    if len(done) == len(requests[row.request].seeds):
                        yield _group(requests[row.request], prompts[row.request], done, logits.shape[1])
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

    def _reads_stop(self, ids: list[int], stop: Sequence[str]) -> bool:
        """Whether the newest token completes a stop string. Every token is a character or more, or a byte."""
        if not stop:
            return False
        reach = 4 * max(map(len, stop))  # bytes that a character can take
        text = completion_text(self.tokenizer, ids[-reach:])
        return any(string in text for string in stop)

    def _end_ids(self) -> frozenset[int]:
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None)


def _group(request: GroupRequest, prompt_ids: Int32, rows: list[_Row], vocabulary: int) -> Group:
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
    for sample in samples:
        check_sample(sample, vocabulary)
    return Group(request.prompt, prompt_ids, samples)
