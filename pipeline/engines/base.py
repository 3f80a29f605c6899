"""What every engine promises: whole groups, streamed as they finish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.config import SamplingConfig
from pipeline.records import Group, Prompt


@dataclass(frozen=True)
class GroupRequest:
    """One prompt to sample `len(seeds)` completions of; `seeds[i]` decides the noise of sample i."""

    prompt: Prompt
    seeds: tuple[int, ...]


class Engine(Protocol):
    """Samples completions with the entropy and log-probability of every token.

    Attributes:
        logprobs_kind: "raw" or "processed" (after temperature and truncation).
        entropy_kind: "full_vocab" or "full_vocab_tempered".
    """

    logprobs_kind: str
    entropy_kind: str

    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingConfig) -> Iterator[Group]:
        """Yields each group once, when all its samples are finished, in any order.

        The same requests in the same call, on the same machine, give the same token ids. Every sample
        has as many entropies and log-probs as tokens.

        Raises:
            PromptError: a prompt that does not fit the model with `max_tokens` completion tokens.
        """
        ...
