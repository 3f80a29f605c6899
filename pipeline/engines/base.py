"""What every engine promises: whole groups, streamed as they finish."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pipeline.config import SamplingConfig
from pipeline.errors import EngineBug, EngineError, PromptError
from pipeline.prompts import prompt_messages_ids
from pipeline.records import Group, Int32, Prompt, Sample

# Sampled groups that wait to be taken; with more of them engines side by side and servers wait, too, so that
# memory does not grow with the night, nor what a kill costs.
BACKLOG_GROUPS = 256
_ROUNDING = 1e-3  # nats that a float32 entropy may exceed its bound by


@dataclass(frozen=True)
class GroupRequest:
    """One prompt to sample `len(seeds)` completions of; `seeds[i]` decides the noise of sample i.

    Attributes:
        hint_ids: tokens of a solution that stand behind the prompt, and that the completions go on from.
    """

    prompt: Prompt
    seeds: tuple[int, ...]
    hint_ids: tuple[int, ...] = ()


class Engine(Protocol):
    """Samples completions with the log-probability of every token, and its entropy where it can know it.

    Attributes:
        logprobs_kind: "raw" or "processed" (after temperature and truncation).
        entropy_kind: "full_vocab" or "full_vocab_tempered"; None where samples come without entropies.
        overlaps: whether it goes on sampling while its caller does something else.
    """

    logprobs_kind: str
    overlaps: bool

    @property
    def entropy_kind(self) -> str | None: ...

    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingConfig) -> Iterator[Group]:
        """Yields each group once, when all its samples are finished, in any order.

        Every sample has as many log-probs as tokens, and as many entropies unless `entropy_kind` is None.
        The same requests in the same call, on the same machine, give the same token ids; where batches form
        by what else runs (vLLM, servers), they do so up to the rounding of sums. vLLM's own sampler on a CPU
        (`engine.vllm.sampler = "vllm"`) takes no seeds, and draws anew each time.

        Raises:
            PromptError: a prompt that does not fit the model with `max_tokens` completion tokens.
            EngineError: the engine cannot go on, or measured what cannot be.
        """
        ...

    def close(self) -> None:
        """Gives back what the engine holds. It cannot be used afterwards."""
        ...


@runtime_checkable
class UpdatableEngine(Engine, Protocol):
    """An engine with a copy of the weights: a trainer hands it the new ones after an optimizer step.

    The transformers engine is none: it samples from the trainer's own model, as it stands. Nor is a pool of
    servers, whose weights are theirs.
    """

    def update_weights(self, folder: Path) -> None:
        """Goes on with the weights of another folder of the same model. No group may be running.

        Args:
            folder: safetensors and config, as `save_pretrained` leaves them. It stays until the next update:
                an engine that dies starts again from it.

        Raises:
            EngineError: the weights do not fit. The engine goes on with those that it had.
        """
        ...


def request_ids(tokenizer: Any, request: GroupRequest) -> Int32:
    """[P] the ids that a request's completions go on from: its prompt's, then its hint's.

    Raises:
        PromptError: see `prompt_messages_ids`.
    """
    prompt = prompt_messages_ids(tokenizer, request.prompt.messages)
    return np.concatenate((prompt, np.array(request.hint_ids, dtype=np.int32)))


def refuse_long_prompts(
    requests: Sequence[GroupRequest], prompts: Sequence[Int32], sampling: SamplingConfig, context: int | None
) -> None:
    """Raises PromptError for the first prompt that leaves no room for its completion.

    Args:
        prompts: the token ids of each request's prompt.
        context: tokens that the model reads at most; None if it does not say.
    """
    for request, prompt in zip(requests, prompts, strict=True):
        if context is not None and len(prompt) + sampling.max_tokens > context:
            raise PromptError(
                f"Prompt {request.prompt.prompt_id} ({request.prompt.text[:40]!r}) has {len(prompt)} "
                f"tokens; with sampling.max_tokens = {sampling.max_tokens} it exceeds the model's "
                f"{context}. Lower max_tokens or shorten the prompt."
            )


def check_sample(sample: Sample, vocabulary: int) -> None:
    """Sees to it that each token has a log-prob, and an entropy that `vocabulary` tokens can have.

    Raises:
        EngineError: the model's logits are no numbers.
        EngineBug: the engine measured something else.
    """
    assert sample.logprobs is not None
    assert sample.entropies is not None
    num_tokens, logprobs, entropies = len(sample.completion_ids), sample.logprobs, sample.entropies
    if not (np.isfinite(entropies).all() and np.isfinite(logprobs).all()):
        raise EngineError(
            f"The model's logits are not finite in a completion of {num_tokens} tokens: the weights "
            "are broken, or overflow; try engine.dtype = float32."
        )
    greatest = math.log(vocabulary) + _ROUNDING
    possible = ((entropies >= 0) & (entropies <= greatest)).all()
    if not possible or not len(entropies) == len(logprobs) == num_tokens:
        smallest, largest = entropies.min(initial=0.0), entropies.max(initial=0.0)
        raise EngineBug(
            f"There are {len(entropies)} entropies, from {smallest:.3f} to {largest:.3f} of at most "
            f"{greatest:.3f} nats, and {len(logprobs)} log-probs for {num_tokens} tokens. "
            "This is a fault of ours."
        )
