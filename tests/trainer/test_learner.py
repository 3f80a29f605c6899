from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.config import SamplingConfig, TrainConfig
from pipeline.objective_checks import sampled_logprobs_known
from trainer.learner import backward_clips, backward_rollouts

CONFIG = TrainConfig(group_size=4)


def gradients(model):
    taken = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


def largest(grads):
    return max(float(grad.abs().max()) for grad in grads.values())


@pytest.mark.parametrize("reward", [1.0, 0.7, 0.0])
def test_zero_advantage_groups_give_exactly_zero_gradient_and_clips_give_some(model, make, reward):
    groups = [make.group(model, text, 4) for text in ("1+2=", "30-7=")]
    batch = make.batch(groups, [make.judged(*[reward] * 4)] * 2, CONFIG, logprobs_known=True, max_tokens=9)
    assert len(batch.rows) == 8
    assert backward_rollouts(model, batch, CONFIG, temperature=1.0).loss == 0.0
    backward_clips(model, make.clips(5), echo_weight=0.0, batch_tokens=100)
    without_clips = gradients(model)
    assert without_clips.keys() == dict(model.named_parameters()).keys()
    assert all(torch.count_nonzero(grad) == 0 for grad in without_clips.values())
    backward_rollouts(model, batch, CONFIG, temperature=1.0)
    backward_clips(model, make.clips(5), echo_weight=1e-3, batch_tokens=100)
    assert all(torch.count_nonzero(grad) > 0 for grad in gradients(model).values())


def test_mixed_groups_give_a_gradient(model, make):
    batch = make.batch(
        [make.group(model, "1+2=", 4)], [make.judged(1, 0, 0, 1)], CONFIG, logprobs_known=True, max_tokens=9
    )
    backward_rollouts(model, batch, CONFIG, temperature=1.0)
    assert largest(gradients(model)) > 1e-3


@pytest.mark.parametrize("batch_tokens", [14, 20, 30])
def test_loss_and_gradient_do_not_depend_on_micro_batches(make, batch_tokens):
    model = make.model(dtype=torch.float64)
    groups = [make.group(model, text, 4, max_tokens=tokens) for text, tokens in (("1+2=", 9), ("3=", 4))]
    judgements = [make.judged(1, 0, 0, 1), make.judged(0, 0, 1, 0)]
    batch = make.batch(groups, judgements, CONFIG, logprobs_known=True, max_tokens=9)
    clips = [dataclasses.replace(clip, weight=1.0 + i / 4) for i, clip in enumerate(make.clips(7))]
    # At a temperature that nothing was sampled at, so that ratios differ from 1 and some are clipped.
    whole_rl = backward_rollouts(model, batch, CONFIG, temperature=0.8)
    whole_echo = backward_clips(model, clips, 0.3, CONFIG.batch_tokens)
    whole = gradients(model)
    cut = CONFIG.model_copy(update={"batch_tokens": batch_tokens})
    calls = []
    cut_rl = backward_rollouts(model, batch, cut, 0.8, lambda: calls.append("rl"))
    cut_echo = backward_clips(model, clips, 0.3, batch_tokens, lambda: calls.append("echo"))
    assert calls.count("rl") > 1
    assert calls.count("echo") > 1
    assert cut_rl.loss == pytest.approx(whole_rl.loss, rel=1e-12)
    assert cut_rl.figures.entropy_mean == pytest.approx(whole_rl.figures.entropy_mean, rel=1e-12)
    assert cut_echo[0] == pytest.approx(whole_echo[0], rel=1e-12)
    assert cut_echo[1] == pytest.approx(whole_echo[1], rel=1e-12)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-10, atol=1e-13)


def test_the_gradient_is_that_of_the_loss_written_out_over_the_whole_model(make):
    model = make.model(dtype=torch.float64)
    group, clips = make.group(model, "1+2=", 4, temperature=0.8), make.clips(3)
    batch = make.batch([group], [make.judged(1, 0, 0, 0)], CONFIG, logprobs_known=False, max_tokens=9)
    backward_rollouts(model, batch, CONFIG, temperature=0.8)
    backward_clips(model, clips, 0.5, CONFIG.batch_tokens)
    ours = gradients(model)

    def logprobs(prompt, completion, temperature):
        ids = torch.tensor(np.concatenate((prompt, completion)).astype(np.int64))
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1] / temperature
        return torch.log_softmax(logits, -1).gather(1, ids[len(prompt) :, None])[:, 0]

    # Ratio 1 and no clipping on fresh samples: the policy gradient itself.
    advantages = [1.5, -0.5, -0.5, -0.5]
    loss = sum(
        -advantage * logprobs(group.prompt_ids, sample.completion_ids, 0.8).mean() / 4
        for advantage, sample in zip(advantages, group.samples, strict=True)
    )
    loss = loss + 0.5 * sum(-logprobs(clip.prompt_ids, clip.clip_ids, 1.0).mean() for clip in clips) / 3
    loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


def test_the_learner_agrees_with_the_sampler_on_log_probs(model, make):
    group = make.group(model, "12+30=", 4)
    batch = make.batch([group], [make.judged(1, 0, 0, 0)], CONFIG, logprobs_known=True, max_tokens=9)
    done = backward_rollouts(model, batch, CONFIG, temperature=1.0)
    assert done.logprob_gap < 1e-4
    sampled = np.concatenate([sample.entropies for sample in group.samples])
    assert done.figures.entropy_mean == pytest.approx(float(sampled.mean()), abs=1e-4)


def test_a_group_that_lost_a_rollout_gives_no_gradient(model, make):
    groups = [make.group(model, "1+2=", 4), make.group(model, "30-7=", 4)]
    judgements = [make.judged(1, None, 0, 1), make.judged(1, 0, 0, 0)]
    batch = make.batch(groups, judgements, CONFIG, logprobs_known=True, max_tokens=9)
    assert [row[1].tolist() for row in batch.rows] == [s.completion_ids.tolist() for s in groups[1].samples]
    nothing = make.batch(groups[:1], judgements[:1], CONFIG, logprobs_known=True, max_tokens=9)
    done = backward_rollouts(model, nothing, CONFIG, temperature=1.0)
    assert (done.loss, done.figures, gradients(model)) == (0.0, None, {})


def test_without_the_samplers_log_probs_the_ratio_is_one(model, make):
    group = make.group(model, "1+2=", 4)
    known = make.batch([group], [make.judged(1, 0, 0, 0)], CONFIG, logprobs_known=True, max_tokens=9)
    unknown = make.batch([group], [make.judged(1, 0, 0, 0)], CONFIG, logprobs_known=False, max_tokens=9)
    backward_rollouts(model, known, CONFIG, temperature=1.0)
    with_known = gradients(model)
    done = backward_rollouts(model, unknown, CONFIG, temperature=1.0)
    assert done.logprob_gap is None
    assert done.loss == pytest.approx(0.0, abs=1e-6)  # ratio 1, advantages that sum to 0
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, with_known[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "known"),
    [
        ("processed", {"temperature": 0.6}, True),
        ("raw", {"temperature": 0.6}, False),
        ("raw", {}, True),
        ("processed", {"top_p": 0.9}, False),
        ("processed", {"top_k": 5}, False),
    ],
)
def test_sampled_log_probs_are_used_only_where_they_are_of_the_trained_distribution(kind, options, known):
    assert sampled_logprobs_known(kind, SamplingConfig(**options)) is known


def test_dapo_learns_from_mixed_groups_only_and_counts_no_others(model, make):
    groups = [make.group(model, "1+2=", 4), make.group(model, "30-7=", 4)]
    judgements = [make.judged(1, 1, 1, 1), make.judged(1, 0, 0, 0)]
    dapo = TrainConfig(group_size=4, objective="dapo")
    batch = make.batch(groups, judgements, dapo, logprobs_known=True, max_tokens=9)
    alone = make.batch(groups[1:], judgements[1:], dapo, logprobs_known=True, max_tokens=9)
    assert [row[1].tolist() for row in batch.rows] == [s.completion_ids.tolist() for s in groups[1].samples]
    assert len(batch.engine_logprobs) == 4
    done = backward_rollouts(model, batch, dapo, temperature=1.0)
    assert done.loss == backward_rollouts(model, alone, dapo, temperature=1.0).loss


def test_a_correction_weighs_tokens_by_the_engines_log_probs_with_ratio_one(make):
    model = make.model(dtype=torch.float64)
    group = make.group(model, "1+2=", 4)
    plain = make.batch([group], [make.judged(1, 0, 0, 0)], CONFIG, logprobs_known=False, max_tokens=9)
    backward_rollouts(model, plain, CONFIG, temperature=1.0)
    uncorrected = gradients(model)
    # An engine that is e times too sure of every token: each weighs 1/e.
    surer = [sample.logprobs + np.float32(1) for sample in group.samples]
    batch = dataclasses.replace(plain, engine_logprobs=surer)
    config = TrainConfig(group_size=4, correction="truncated")
    done = backward_rollouts(model, batch, config, temperature=1.0)
    assert done.logprob_gap == pytest.approx(1.0, abs=1e-4)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, uncorrected[name] / np.e, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("objective", ["luffy", "uft"])
def test_the_entropy_bonus_reaches_the_model(model, make, objective):
    group = make.group(model, "1+2=", 4)
    config = TrainConfig(group_size=4, objective=objective)
    batch = make.batch([group], [make.judged(1, 1, 1, 1)], config, logprobs_known=True, max_tokens=9)
    done = backward_rollouts(model, batch, config, temperature=1.0)
    assert done.loss == pytest.approx(-0.001 * done.figures.entropy_mean, rel=1e-4)
    assert largest(gradients(model)) > 0


@pytest.mark.parametrize("objective", ["luffy", "uft"])
def test_the_entropy_bonus_is_of_the_policy_at_the_temperature_it_samples_at(make, objective):
    model = make.model(dtype=torch.float64)
    group = make.group(model, "1+2=", 4, temperature=0.8)
    config = TrainConfig(group_size=4, objective=objective)
    batch = make.batch([group], [make.judged(1, 1, 1, 1)], config, logprobs_known=False, max_tokens=9)
    backward_rollouts(model, batch, config, temperature=0.8)
    ours = gradients(model)
    entropies = []
    for sample in group.samples:
        ids = torch.tensor(np.concatenate((group.prompt_ids, sample.completion_ids)).astype(np.int64))
        logits = model(ids[None]).logits[0, len(group.prompt_ids) - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits / 0.8).entropy())
    (-0.001 * torch.cat(entropies).mean()).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-9)
