"""A step's rollouts: sampled from the policy as it stands, judged, handed out, and refilled for DAPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from pipeline.config import MiningConfig, SamplingConfig, TrainConfig
from pipeline.engines.base import Engine, GroupRequest
from pipeline.experts import Expert
from pipeline.objective_config import DapoConfig, LuffyConfig, UftConfig
from pipeline.records import Group, Judgement, Prompt, group_id, sample_seed
from trainer.batches import Cursor, step_batches
from trainer.hints import draw_hint_tokens
from trainer.rollout_batch import Rollouts, carries_signal

Judge: TypeAlias = Callable[[Sequence[Group]], Sequence[Sequence[Judgement]]]
OnRollouts: TypeAlias = Callable[[Sequence[Group], Sequence[Sequence[Judgement]], int], None]

PROMPT_STREAM, EXPERT_STREAM = 0, 3  # 1 and 2 are the orders of clips


class RolloutSource:
    """Deals out prompts in a seeded order, and makes each step's groups of them."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        experts: Mapping[str, Sequence[Expert]],
        config: TrainConfig,
        sampling: SamplingConfig,
        rules: MiningConfig,
        judge: Judge,
        on_rollouts: OnRollouts,
        training_id: str,
    ) -> None:
        self._engine, self._prompts, self._experts = engine, prompts, experts
        self._config, self._rules = config, rules
        self._sampling = sampling.model_copy(update={"group_size": config.group_size})
        self._judge, self._on_rollouts, self._training_id = judge, on_rollouts, training_id
        order = step_batches(len(prompts), config.prompts_per_step, config.seed, PROMPT_STREAM)
        self._order = Cursor(order)
        self.num_rollouts = 0

    def sample(self, optim_step: int, policy_version: int) -> Rollouts:
        """`prompts_per_step` groups, or as many as there are prompts; each prompt once at most.

        Under DAPO's dynamic sampling further prompts are taken until so many groups carry signal, prompts
        run out, or `max_refills` is reached; what is there then is what the step learns from.
        """
        rng = np.random.default_rng([self._config.seed, EXPERT_STREAM, optim_step])
        taken = self._order.take()
        rollouts = self._sampled(taken, optim_step, policy_version, rng)
        options, num_refills = self._config.options, 0
        if not (isinstance(options, DapoConfig) and options.dynamic_sampling):
            return rollouts
        wanted = len(taken)
        while num_refills < options.max_refills and len(taken) < len(self._prompts):
            if self._num_with_signal(rollouts) >= wanted:
                break
            num_refills += 1
            fresh = [i for i in self._order.take() if i not in taken]
            taken = taken + fresh
            rollouts = _joined(rollouts, self._sampled(fresh, optim_step, policy_version, rng))
        return replace(rollouts, num_refills=num_refills)

    def state(self) -> dict[str, Any]:
        """What must be kept to go on, as JSON values."""
        return {"position": self._order.position, "num_rollouts": self.num_rollouts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a new source was, of the same prompts and seed."""
        self._order.go_to(state["position"])
        self.num_rollouts = state["num_rollouts"]

    def _num_with_signal(self, rollouts: Rollouts) -> int:
        size, tolerance = self._config.group_size, self._rules.reward_tolerance
        return sum(carries_signal(judged, size, tolerance) for judged in rollouts.judgements)

    def _sampled(
        self, chosen: Sequence[int], optim_step: int, policy_version: int, rng: np.random.Generator
    ) -> Rollouts:
        prompts = [self._prompts[i] for i in chosen]
        experts = [self._drawn_experts(prompt, rng) for prompt in prompts]
        hints = [self._hint(of_prompt, optim_step, rng) for of_prompt in experts]
        groups = self._groups(prompts, hints, policy_version)
        read = [_as_read(group, len(hint)) for group, hint in zip(groups, hints, strict=True)]
        judgements = self._judge(read) if groups else []
        self._hand_out(groups, judgements, hints, policy_version)
        self.num_rollouts += sum(len(group.samples) for group in groups)
        joins = isinstance(self._config.options, LuffyConfig)
        return Rollouts(
            groups,
            list(judgements),
            [of_prompt if joins else () for of_prompt in experts],
            [len(hint) for hint in hints],
            policy_version,
        )

    def _drawn_experts(self, prompt: Prompt, rng: np.random.Generator) -> Sequence[Expert]:
        """The experts of one prompt that this step learns from."""
        options, known = self._config.options, self._experts.get(prompt.prompt_id, ())
        wanted = options.experts_per_group if isinstance(options, LuffyConfig) else 1
        if len(known) <= wanted:
            return known
        return [known[i] for i in rng.permutation(len(known))[:wanted]]

    def _hint(self, experts: Sequence[Expert], optim_step: int, rng: np.random.Generator) -> tuple[int, ...]:
        options = self._config.options
        if not isinstance(options, UftConfig) or not experts:
            return ()
        solution = experts[0].completion_ids
        shown = draw_hint_tokens(len(solution), optim_step, options, rng)
        return tuple(solution[:shown].tolist())

    def _groups(
        self, prompts: Sequence[Prompt], hints: Sequence[tuple[int, ...]], policy_version: int
    ) -> list[Group]:
        """One group per prompt, in the prompts' order: the engine yields them as they finish."""
        if not prompts:
            return []
        requests = []
        for prompt, hint in zip(prompts, hints, strict=True):
            name = group_id(self._training_id, prompt.prompt_id, policy_version)
            seeds = [sample_seed(self._config.seed, name, i) for i in range(self._config.group_size)]
            requests.append(GroupRequest(prompt, tuple(seeds), hint))
        groups = {g.prompt.prompt_id: g for g in self._engine.generate(requests, self._sampling)}
        return [groups[prompt.prompt_id] for prompt in prompts]

    def _hand_out(
        self,
        groups: Sequence[Group],
        judgements: Sequence[Sequence[Judgement]],
        hints: Sequence[tuple[int, ...]],
        policy_version: int,
    ) -> None:
        """Groups behind a hint are not the policy's own work: clips of them would be the expert's."""
        own = [i for i, hint in enumerate(hints) if not hint]
        if own:
            self._on_rollouts([groups[i] for i in own], [judgements[i] for i in own], policy_version)


def _as_read(group: Group, num_hint_tokens: int) -> Group:
    """The group as a verifier reads it: what a hint says need not be said again."""
    if not num_hint_tokens:
        return group
    hint_ids = group.prompt_ids[-num_hint_tokens:]
    samples = (
        replace(sample, completion_ids=np.concatenate((hint_ids, sample.completion_ids)))
        for sample in group.samples
    )
    return replace(group, samples=tuple(samples))


def _joined(one: Rollouts, more: Rollouts) -> Rollouts:
    return replace(
        one,
        groups=one.groups + more.groups,
        judgements=one.judgements + more.judgements,
        experts=one.experts + more.experts,
        hint_tokens=one.hint_tokens + more.hint_tokens,
    )
