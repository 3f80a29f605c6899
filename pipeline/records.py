"""What travels between the stages: prompts, sampled completions and the groups they form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import content_id

Int32: TypeAlias = NDArray[np.int32]
Float32: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """One problem.

    Attributes:
        messages: chat messages, each with `role` and `content`; a plain prompt is one user message.
        ground_truth: what the verifier compares with, as text; None if the verifier needs none.
        data_source: where it comes from (a file's stem, verl's `data_source`, `reasoning_gym:<task>`).
        extra_info: JSON-compatible facts for the verifier, such as a reasoning_gym entry.
    """

    messages: tuple[Mapping[str, str], ...]
    ground_truth: str | None = None
    data_source: str = ""
    extra_info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_id(self) -> str:
        """Content address: the messages and the truth, so a corrected answer is another prompt."""
        return content_id([dict(message) for message in self.messages], self.ground_truth)

    @property
    def text(self) -> str:
        return "\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True)
class Sample:
    """One sampled completion of T tokens.

    Attributes:
        sample_index: 0 … group_size − 1.
        completion_ids: [T] token ids, the end-of-sequence token included when it was sampled.
        logprobs: [T] nats, log-probability of each sampled token.
        entropies: [T] nats, entropy of the model's next-token distribution at each token's position, at
            temperature 1 before truncation unless the kind says otherwise; None when the engine cannot know
            it (the scorer fills it in later).
        finish_reason: "stop" or "length".
    """

    sample_index: int
    seed: int
    completion_ids: Int32
    logprobs: Float32 | None
    entropies: Float32 | None
    finish_reason: str


@dataclass(frozen=True)
class Group:
    """The rollouts of one prompt under one policy version, as they leave the engine.

    Attributes:
        prompt_ids: [P] token ids.
        samples: ordered by sample_index.
    """

    prompt: Prompt
    prompt_ids: Int32
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Judgement:
    """What a verifier said of one sample. Without a reward it hung, died or raised; then `error` tells."""

    reward: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Policy:
    """Which weights sample: the model's name, its hashes, and the optimizer steps behind it."""

    model: str
    weights_hash: str
    tokenizer_hash: str
    policy_version: int


@dataclass(frozen=True)
class Run:
    """One night's generation (or one training's), as it is written beside every rollout."""

    run_id: str
    night: date
    origin: str = "policy"


def group_id(run_id: str, prompt_id: str, policy_version: int) -> str:
    """The name of the group of one prompt, under one policy version, in one run."""
    return content_id(run_id, prompt_id, policy_version)


def sample_seed(run_seed: int, group_id: str, sample_index: int) -> int:
    """A seed for one sample's noise: the same group and index draw the same noise on every night's rerun.

    Returns:
        an integer in [0, 2^63).
    """
    return int(content_id(run_seed, group_id, sample_index)[:16], 16) >> 1
