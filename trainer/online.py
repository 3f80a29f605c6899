"""EchoClips of the very groups that a step sampled, by the rules that the lake is mined with.

Where a clip's rollout is in the batch, its tokens are in the forward pass already, and it costs nothing more.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import MiningConfig
from pipeline.hashing import rollout_id
from pipeline.records import Group, Int32, Judgement, Sample, group_id
from pipeline.shards import Clip
from pipeline.steps import DELIMITER, mean_step_entropies
from pipeline.tokenization import sampled_step_ends
from trainer.metrics import group_class
from trainer.rollout_batch import Rollouts

ONLINE = "online-"  # before the clip_id that a mining of the rollout gives


@dataclass(frozen=True)
class _Candidate:
    """The best step of one success."""

    group_index: int
    sample_index: int
    num_tokens: int
    step_entropy: float


@dataclass(frozen=True)
class OnlineClips:
    """Finds them. The rules' `max_policy_lag` and `policy_version` say nothing: all are of this policy.

    Attributes:
        group_size: rollouts that a whole group has.
        training_id: names the groups.
    """

    tokenizer: Any
    tokenizer_hash: str
    rules: MiningConfig
    group_size: int
    training_id: str

    def of(self, rollouts: Rollouts) -> list[tuple[Clip, tuple[int, int]]]:
        """The clips, most uncertain first, each with its rollout's place: group and sample of `rollouts`.

        Groups that were sampled behind a hint have none: what succeeded there is not the policy's alone.
        """
        candidates = [
            candidate
            for index in range(len(rollouts.groups))
            if not rollouts.hint_tokens[index]
            for candidate in self._of_group(index, rollouts.groups[index], rollouts.judgements[index])
        ]
        names = [self._group_name(group, rollouts.policy_version) for group in rollouts.groups]
        # as `sql/mining/clip_decisions.sql` orders and drops them
        candidates.sort(key=lambda c: (-c.step_entropy, names[c.group_index]))
        return [
            (self._clip(rollouts, names[c.group_index], c), (c.group_index, c.sample_index))
            for c in self._kept(candidates, rollouts)
        ]

    def _of_group(self, index: int, group: Group, judged: Sequence[Judgement]) -> list[_Candidate]:
        rewards = [judgement.reward for judgement in judged if judgement.reward is not None]
        in_scope = {
            "zero_advantage": ("all_success",),
            "any_success": ("all_success", "all_fail", "all_equal", "mixed"),
        }[self.rules.scope]
        if group_class(rewards, self.group_size, self.rules) not in in_scope:
            return []
        best = [
            found
            for sample, judgement in zip(group.samples, judged, strict=True)
            if self._succeeded(sample, judgement) and (found := self._best_step(index, sample)) is not None
        ]
        best.sort(key=lambda c: (-c.step_entropy, c.sample_index))
        return best[: self.rules.clips_per_group]

    def _succeeded(self, sample: Sample, judgement: Judgement) -> bool:
        enough = self.rules.success_reward - self.rules.reward_tolerance
        whole = sample.finish_reason != "length" or self.rules.allow_truncated
        return judgement.reward is not None and judgement.reward >= enough and whole

    def _best_step(self, index: int, sample: Sample) -> _Candidate | None:
        """The step of highest entropy, the earliest on ties, of those that the rules allow."""
        assert sample.entropies is not None
        delimiter = self.rules.delimiter or DELIMITER
        ends = np.array(sampled_step_ends(self.tokenizer, sample.completion_ids, delimiter), dtype=np.int32)
        if not len(ends):
            return None
        means = mean_step_entropies(sample.entropies, ends, np.zeros(len(ends), dtype=np.int64))
        allowed = np.diff(ends, prepend=0) >= self.rules.min_step_tokens
        if self.rules.max_clip_tokens is not None:
            allowed &= ends <= self.rules.max_clip_tokens
        if not allowed.any():
            return None
        step = int(np.where(allowed, means, -np.inf).argmax())
        return _Candidate(index, sample.sample_index, int(ends[step]), float(means[step]))

    def _kept(self, candidates: Sequence[_Candidate], rollouts: Rollouts) -> Iterator[_Candidate]:
        of_prompt: Counter[str] = Counter()
        contents = set()
        rules, num_kept = self.rules, 0
        for candidate in candidates:
            group = rollouts.groups[candidate.group_index]
            prompt_id = group.prompt.prompt_id
            content = prompt_id, self._clip_ids(group, candidate).tobytes()
            full = (
                rules.max_clips_per_prompt is not None and of_prompt[prompt_id] >= rules.max_clips_per_prompt
            )
            if candidate.step_entropy < rules.min_step_entropy or content in contents or full:
                continue
            if rules.max_clips is not None and num_kept >= rules.max_clips:
                return
            contents.add(content)
            of_prompt[prompt_id] += 1
            num_kept += 1
            yield candidate

    def _clip(self, rollouts: Rollouts, group_name: str, candidate: _Candidate) -> Clip:
        group = rollouts.groups[candidate.group_index]
        sample = group.samples[candidate.sample_index]
        reward = rollouts.judgements[candidate.group_index][candidate.sample_index].reward
        assert reward is not None
        rollout = rollout_id(group_name, sample.sample_index, group.prompt_ids, sample.completion_ids)
        name = hashlib.md5(f"{rollout}:{candidate.num_tokens}".encode(), usedforsecurity=False).hexdigest()
        return Clip(
            clip_id=ONLINE + name,
            prompt_ids=group.prompt_ids,
            clip_ids=self._clip_ids(group, candidate),
            step_entropy=candidate.step_entropy,
            reward=reward,
            policy_version=rollouts.policy_version,
            tokenizer_hash=self.tokenizer_hash,
            weight=1.0,
        )

    def _clip_ids(self, group: Group, candidate: _Candidate) -> Int32:
        return group.samples[candidate.sample_index].completion_ids[: candidate.num_tokens]

    def _group_name(self, group: Group, policy_version: int) -> str:
        return group_id(self.training_id, group.prompt.prompt_id, policy_version)
