"""What a step samples: refills for DAPO, hints for UFT, experts for LUFFY."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from loop_helpers import PROMPTS, SAMPLING

from pipeline.config import MiningConfig, TrainConfig
from pipeline.experts import Expert
from pipeline.records import Judgement
from trainer.batches import step_batches
from trainer.learner import backward_rollouts
from trainer.rollout_batch import rollout_batch
from trainer.sampling import PROMPT_STREAM, RolloutSource

STEPS = {"prompts_per_step": 2, "group_size": 3, "seed": 5}
SOLUTIONS = {
    prompt.prompt_id: [
        Expert(f"{i}.{k}", np.arange(10 * k + 2, 10 * k + 6 + i, dtype=np.int32), 1.0) for k in range(3)
    ]
    for i, prompt in enumerate(PROMPTS)
}


class Sampling:
    """A source of rollouts of the tiny model, with what it showed the judge and handed out."""

    def __init__(self, make, config, mixed=PROMPTS, experts=SOLUTIONS):
        self.config, self.mixed = config, mixed
        self.read, self.handed = [], []
        self.model = make.model()
        engine = make.engine(self.model, make.tokenizer())
        self.source = RolloutSource(
            engine, PROMPTS, experts, config, SAMPLING, MiningConfig(), self.judge, self.hand_out, "training"
        )

    def judge(self, groups):
        """Only the groups of the prompts that are `mixed` have unequal rewards."""
        self.read += groups
        unequal = [float(group.prompt in self.mixed) for group in groups]
        return [[Judgement(0.0), Judgement(0.0), Judgement(reward)] for reward in unequal]

    def hand_out(self, groups, judgements, version):
        self.handed += groups

    def batch(self, rollouts):
        return rollout_batch(rollouts, self.config, logprobs_known=True, max_tokens=SAMPLING.max_tokens)


def first_prompts(config):
    """The prompts of the first step, and those that the first refill would take."""
    order = step_batches(len(PROMPTS), config.prompts_per_step, config.seed, PROMPT_STREAM)
    return [PROMPTS[i] for i in next(order)], [PROMPTS[i] for i in next(order)]


def dapo(**options):
    return TrainConfig(objective="dapo", dapo=options, **STEPS)


def prompts_of(rollouts):
    return [group.prompt for group in rollouts.groups]


def test_a_batch_with_signal_everywhere_is_not_refilled(make):
    sampling = Sampling(make, dapo())
    rollouts = sampling.source.sample(0, 10)
    assert prompts_of(rollouts) == first_prompts(dapo())[0]
    assert (rollouts.num_refills, sampling.source.num_rollouts) == (0, 6)


def test_groups_without_signal_are_replaced_by_further_prompts_and_handed_out_all_the_same(make):
    first, second = first_prompts(dapo())
    sampling = Sampling(make, dapo(), mixed=[first[0], *second])
    rollouts = sampling.source.sample(0, 10)
    assert prompts_of(rollouts) == [*first, *second]
    assert (rollouts.num_refills, sampling.source.num_rollouts) == (1, 12)
    assert [group.prompt for group in sampling.handed] == [*first, *second]
    assert len(sampling.batch(rollouts).rows) == 9  # of the three groups with signal


def test_refills_end_at_their_bound(make):
    config = dapo(max_refills=1)
    rollouts = Sampling(make, config, mixed=[]).source.sample(0, 10)
    assert (len(rollouts.groups), rollouts.num_refills) == (4, 1)


def test_refills_end_with_the_prompts_each_of_which_comes_once_and_nothing_is_learned(make):
    sampling = Sampling(make, dapo(), mixed=[])
    rollouts = sampling.source.sample(0, 10)
    assert sorted(p.prompt_id for p in prompts_of(rollouts)) == sorted(p.prompt_id for p in PROMPTS)
    batch = sampling.batch(rollouts)
    assert batch.rows == []
    assert backward_rollouts(sampling.model, batch, sampling.config, 1.0).loss == 0.0


@pytest.mark.parametrize("config", [TrainConfig(**STEPS), dapo(dynamic_sampling=False)])
def test_without_dynamic_sampling_nothing_is_refilled(make, config):
    rollouts = Sampling(make, config, mixed=[]).source.sample(0, 10)
    assert (len(rollouts.groups), rollouts.num_refills) == (2, 0)


def test_luffys_experts_join_their_group_with_no_log_probs_of_an_engine(make):
    config = TrainConfig(objective="luffy", luffy={"experts_per_group": 2}, **STEPS)
    sampling = Sampling(make, config, mixed=[])
    rollouts = sampling.source.sample(0, 10)
    batch = sampling.batch(rollouts)
    assert batch.is_expert.tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 2
    known = {expert.completion_ids.tobytes() for experts in SOLUTIONS.values() for expert in experts}
    for (prompt, completion), expert, logprobs, advantage in zip(
        batch.rows, batch.is_expert, batch.engine_logprobs, batch.advantages, strict=True
    ):
        assert (completion.tobytes() in known) == bool(expert)
        assert np.isnan(logprobs).all() == bool(expert)
        assert (advantage > 0) == bool(expert)  # all others failed
        assert any(np.array_equal(prompt, group.prompt_ids) for group in rollouts.groups)
    done = backward_rollouts(sampling.model, batch, config, 1.0)
    assert done.logprob_gap < 1e-4
    assert int(done.figures.num_tokens) == sum(
        len(s.completion_ids) for g in rollouts.groups for s in g.samples
    )


def test_a_group_that_lost_a_rollout_is_left_out_with_its_experts(make):
    sampling = Sampling(make, TrainConfig(objective="luffy", **STEPS))
    rollouts = sampling.source.sample(0, 10)
    lost = [Judgement(None, error="timeout"), *rollouts.judgements[0][1:]]
    batch = sampling.batch(dataclasses.replace(rollouts, judgements=[lost, rollouts.judgements[1]]))
    assert batch.is_expert.tolist() == [False] * 3 + [True]


def test_ufts_completions_go_on_from_a_hint_that_the_judge_reads_and_the_lake_does_not_get(make):
    config = TrainConfig(objective="uft", uft={"hint_start": 1.0, "hint_end": 0.5, "hint_steps": 2}, **STEPS)
    sampling = Sampling(make, config)
    rollouts = sampling.source.sample(0, 10)
    assert sampling.handed == []
    batch = sampling.batch(rollouts)
    for index, (group, read) in enumerate(zip(rollouts.groups, sampling.read, strict=True)):
        num_hint_tokens = rollouts.hint_tokens[index]
        hint = group.prompt_ids[-num_hint_tokens:]
        assert any(np.array_equal(hint, e.completion_ids) for e in SOLUTIONS[group.prompt.prompt_id])
        for k, sample in enumerate(group.samples):
            whole = np.concatenate((hint, sample.completion_ids))
            assert read.samples[k].completion_ids.tolist() == whole.tolist()
            prompt, completion = batch.rows[3 * index + k]
            assert completion.tolist() == whole.tolist()
            assert np.concatenate((prompt, hint)).tolist() == group.prompt_ids.tolist()
    assert batch.hint_lengths.tolist() == np.repeat(rollouts.hint_tokens, 3).tolist()
    done = backward_rollouts(sampling.model, batch, config, 1.0)
    assert done.logprob_gap < 1e-4  # the engine read the hint where the trainer does

    sampling.source.sample(3, 11)  # past hint_steps
    assert len(sampling.handed) == 2
    assert sampling.read[-1].samples[0].completion_ids.tolist() == (
        sampling.handed[-1].samples[0].completion_ids.tolist()
    )


def test_what_a_step_draws_depends_on_its_number_and_not_on_what_came_before(make):
    config = TrainConfig(objective="luffy", **STEPS)

    def drawn(optim_step):
        rollouts = Sampling(make, config).source.sample(optim_step, 10)
        return [expert.rollout_id for experts in rollouts.experts for expert in experts]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(step)) for step in range(6)}) > 1
