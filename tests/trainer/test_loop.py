from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from loop_helpers import CONFIG, PROMPTS, SAMPLING, Training, even_sum
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigError, FormatError
from pipeline.records import Judgement, group_id, sample_seed
from trainer.loop import train


def test_a_training_hands_out_what_it_sampled_and_used_and_leaves_a_checkpoint(make, tmp_path):
    clips = make.clips(6)
    training = Training(make, tmp_path / "new", clips=clips)
    result = training.result
    assert (result.optim_steps, result.num_rollouts, result.num_clip_uses) == (3, 18, 12)
    assert [version for _, _, version in training.rollouts] == [10, 11, 12]
    assert [len(groups) for groups, _, _ in training.rollouts] == [2, 2, 2]
    assert [[step for _, step, _ in uses] for uses in training.clip_uses] == [[0] * 4, [1] * 4, [2] * 4]
    assert {clip_id for uses in training.clip_uses for clip_id, _, _ in uses} == {c.clip_id for c in clips}
    assert training.changed()
    assert result.checkpoint == tmp_path / "new" / "checkpoint"
    saved = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    torch.testing.assert_close(saved.state_dict(), training.model.state_dict(), rtol=0, atol=0)
    assert json.loads((result.checkpoint / "echomine.json").read_text())["policy_version"] == 13


def test_metrics_hold_one_line_per_step_whose_numbers_agree_with_what_was_handed_out(make, tmp_path):
    training = Training(make, tmp_path, clips=make.clips(6))
    assert [line["optim_step"] for line in training.metrics] == [0, 1, 2]
    assert [dataclasses.asdict(metrics) for metrics in training.seen] == training.metrics
    for line, (groups, judgements, version), uses in zip(
        training.metrics, training.rollouts, training.clip_uses, strict=True
    ):
        rewards = [[j.reward for j in judged] for judged in judgements]
        assert line["policy_version"] == version
        assert line["reward_mean"] == pytest.approx(np.mean(rewards))
        equal = [len(set(of_group)) == 1 for of_group in rewards]
        assert line["zero_advantage_share"] == pytest.approx(np.mean(equal))
        assert line["classes"]["mixed"] == pytest.approx(1 - np.mean(equal))
        assert line["num_completion_tokens"] == sum(len(s.completion_ids) for g in groups for s in g.samples)
        assert line["echo_loss"] == pytest.approx(np.mean([loss for _, _, loss in uses]))
        assert line["loss"] == pytest.approx(line["rl_loss"] + CONFIG.echo_weight * line["echo_loss"])
        assert line["entropy_mean"] == pytest.approx(
            np.mean(np.concatenate([s.entropies for g in groups for s in g.samples])), abs=1e-4
        )
        assert line["logprob_gap"] < 1e-4  # the engine samples from the weights as they are at this step
        assert line["grad_norm"] > 0
    assert training.result.reward_before == training.metrics[0]["reward_mean"]
    assert training.result.reward_after == training.metrics[-1]["reward_mean"]


def test_samples_carry_the_seeds_of_the_trainings_groups(make, tmp_path):
    training = Training(make, tmp_path)
    for groups, _, version in training.rollouts:
        for group in groups:
            name = group_id("training", group.prompt.prompt_id, version)
            assert [s.seed for s in group.samples] == [sample_seed(CONFIG.seed, name, i) for i in range(3)]


def test_at_another_temperature_the_tempered_policy_is_trained_with_ratio_one(make, tmp_path):
    training = Training(make, tmp_path, sampling=SAMPLING.model_copy(update={"temperature": 0.6}))
    assert [line["logprob_gap"] for line in training.metrics] == [None] * 3
    assert [line["rl_loss"] for line in training.metrics] == pytest.approx([0.0] * 3, abs=1e-6)
    assert training.changed()


def test_two_identical_trainings_are_identical(make, tmp_path):
    one = Training(make, tmp_path / "one", clips=make.clips(6))
    two = Training(make, tmp_path / "two", clips=make.clips(6))
    timings = {"seconds": 0.0, "tokens_per_second": 0.0}
    assert [{**line, **timings} for line in one.metrics] == [{**line, **timings} for line in two.metrics]
    assert one.clip_uses == two.clip_uses
    torch.testing.assert_close(one.model.state_dict(), two.model.state_dict(), rtol=0, atol=0)
    other = Training(
        make, tmp_path / "other", clips=make.clips(6), config=CONFIG.model_copy(update={"seed": 6})
    )
    assert other.clip_uses != one.clip_uses


class Reversed:
    """An engine that yields its groups the other way round."""

    def __init__(self, engine):
        self.engine, self.logprobs_kind, self.entropy_kind = engine, engine.logprobs_kind, engine.entropy_kind

    def generate(self, requests, sampling):
        yield from reversed(list(self.engine.generate(requests, sampling)))


def test_the_order_in_which_an_engine_finishes_changes_nothing(make, tmp_path):
    one = Training(make, tmp_path / "one")
    two = Training(make, tmp_path / "two", wrap=Reversed)
    for (groups, judgements, _), (others, other_judgements, _) in zip(
        one.rollouts, two.rollouts, strict=True
    ):
        assert [g.prompt.prompt_id for g in groups] == [g.prompt.prompt_id for g in others]
        assert judgements == other_judgements
    torch.testing.assert_close(one.model.state_dict(), two.model.state_dict(), rtol=0, atol=0)


def test_a_bfloat16_model_trains_and_stays_bfloat16(make, tmp_path):
    model, tokenizer, clips = make.model(dtype=torch.bfloat16), make.tokenizer(), make.clips(6)
    config = CONFIG.model_copy(update={"optim_steps": 4, "echo_weight": 1.0, "lr": 1e-3})
    result = train(
        model,
        tokenizer,
        make.engine(model, tokenizer),
        PROMPTS,
        clips,
        config,
        SAMPLING,
        even_sum,
        lambda *_: None,
        lambda _: None,
        tmp_path,
        "training",
        0,
    )
    assert result.echo_loss_after < result.echo_loss_before
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}


def test_a_tighter_token_budget_changes_nothing_but_rounding(make, tmp_path):
    one = Training(make, tmp_path / "one", clips=make.clips(6))
    wide = CONFIG.model_copy(update={"batch_tokens": 4096})
    two = Training(make, tmp_path / "two", clips=make.clips(6), config=wide)
    assert one.metrics[0]["loss"] == pytest.approx(two.metrics[0]["loss"], abs=1e-6)
    assert one.metrics[0]["grad_norm"] == pytest.approx(two.metrics[0]["grad_norm"], rel=1e-4)


def test_clips_alone_lower_their_loss(make, tmp_path):
    config = CONFIG.model_copy(update={"optim_steps": 6, "echo_weight": 1.0, "clips_per_step": 6})
    training = Training(make, tmp_path, prompts=[], clips=make.clips(6), config=config)
    losses = [line["echo_loss"] for line in training.metrics]
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert training.result.echo_loss_before == pytest.approx(losses[0])
    assert training.result.echo_loss_after < losses[-1]
    assert training.rollouts == []
    assert (training.result.reward_before, training.result.num_rollouts) == (None, 0)


def test_without_clips_it_is_grpo_alone(make, tmp_path):
    training = Training(make, tmp_path)
    assert training.clip_uses == []
    assert (training.result.echo_loss_before, training.result.echo_loss_after) == (None, None)
    assert all(line["loss"] == line["rl_loss"] and line["echo_loss"] is None for line in training.metrics)
    assert training.changed()


def test_lambda_grows_over_its_warm_up_and_weighs_each_steps_loss(make, tmp_path):
    config = CONFIG.model_copy(update={"echo_weight": 0.5, "echo_warmup_steps": 2})
    training = Training(make, tmp_path, clips=make.clips(6), config=config)
    assert [line["echo_weight"] for line in training.metrics] == [0.25, 0.5, 0.5]
    for line in training.metrics:
        assert line["loss"] == pytest.approx(line["rl_loss"] + line["echo_weight"] * line["echo_loss"])


def test_clips_that_retire_are_used_no_more_and_the_training_goes_on(make, tmp_path):
    config = CONFIG.model_copy(update={"optim_steps": 4, "max_clip_uses": 1})
    training = Training(make, tmp_path, clips=make.clips(6), config=config)
    assert [line["num_clips"] for line in training.metrics] == [4, 2, 0, 0]
    assert [line["num_retired_clips"] for line in training.metrics] == [4, 6, 6, 6]
    assert [len(uses) for uses in training.clip_uses] == [4, 2]
    assert training.result.num_clip_uses == 6
    assert training.metrics[2]["echo_loss"] is None


def test_only_solved_groups_leave_the_model_as_it_was_without_lambda_and_not_with_it(make, tmp_path):
    def solved(groups):
        return [[Judgement(1.0) for _ in group.samples] for group in groups]

    off = CONFIG.model_copy(update={"echo_weight": 0.0})
    still = Training(make, tmp_path / "off", clips=make.clips(6), config=off, judge=solved)
    assert [line["grad_norm"] for line in still.metrics] == [0.0, 0.0, 0.0]
    assert not still.changed()
    moved = Training(make, tmp_path / "on", clips=make.clips(6), judge=solved)
    assert all(line["grad_norm"] > 0 and line["rl_loss"] == 0 for line in moved.metrics)
    assert moved.metrics[0]["classes"]["all_success"] == moved.metrics[0]["zero_advantage_share"] == 1.0
    assert moved.changed()


def test_groups_that_the_verifier_lost_are_handed_out_and_teach_nothing(make, tmp_path):
    def losing(groups):
        return [[Judgement(None, error="timeout"), *judged[1:]] for judged in even_sum(groups)]

    training = Training(make, tmp_path, judge=losing)
    assert training.rollouts[0][1][0][0].error == "timeout"
    assert [line["classes"]["incomplete"] for line in training.metrics] == [1.0] * 3
    assert not training.changed()


def test_no_steps_measure_and_save_only(make, tmp_path):
    config = CONFIG.model_copy(update={"optim_steps": 0})
    training = Training(make, tmp_path, clips=make.clips(6), config=config)
    assert (training.result.optim_steps, training.metrics, training.rollouts) == (0, [], [])
    assert training.result.echo_loss_before == training.result.echo_loss_after > 0
    assert json.loads((training.result.checkpoint / "echomine.json").read_text())["policy_version"] == 10
    assert not training.changed()


def test_at_most_256_clips_spread_over_the_ranking_are_measured(make, tmp_path):
    clips = make.clips(600)
    config = CONFIG.model_copy(update={"optim_steps": 0, "batch_tokens": 4096})
    measured = Training(make, tmp_path / "all", clips=clips, config=config).result.echo_loss_before
    third = Training(make, tmp_path / "third", clips=clips[::3], config=config).result.echo_loss_before
    assert measured == pytest.approx(third, abs=1e-6)


def test_a_clip_of_another_vocabulary_is_refused_before_anything_is_sampled(make, tmp_path):
    foreign = dataclasses.replace(make.clips(1)[0], clip_ids=np.array([5, 77], dtype=np.int32))
    with pytest.raises(FormatError, match="token id 77"):
        Training(make, tmp_path, clips=[foreign])


def test_nothing_to_train_on_and_an_unwritable_folder_are_one_line(make, tmp_path):
    with pytest.raises(ConfigError, match="neither prompts nor clips"):
        Training(make, tmp_path, prompts=[])
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"Cannot write .*metrics\.jsonl"):
        Training(make, tmp_path / "file" / "folder")
