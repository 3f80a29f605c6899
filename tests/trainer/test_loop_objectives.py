"""Every objective through the real loop: each of its options changes what is minimized, or is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from loop_helpers import PROMPTS, SAMPLING, Training, even_sum

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.experts import Expert
from pipeline.objective_config import OWNERS

# Two batches, each of two updates: in the second one ratios are no longer 1.
STEPS = {
    "optim_steps": 4, "updates_per_batch": 2, "prompts_per_step": 2, "group_size": 4,
    "clips_per_step": 3, "lr": 1e-2, "seed": 5,
}  # fmt: skip
CLIPS = {"clip_low": 0.01, "clip_high": 0.01}
SCALED = {"scale_rewards": False, "advantage_epsilon": 0.5}
# By objective, what all its trainings here have, and another value of each of its options.
OPTIONS = {
    "grpo": ({}, {**CLIPS, **SCALED}),
    "dapo": (
        {},
        {
            **CLIPS,
            **SCALED,
            "dynamic_sampling": False,
            "max_refills": 0,
            "overlong_buffer_tokens": 4,
            "overlong_penalty": 0.25,
        },
    ),
    "dr_grpo": ({"scale_rewards": True}, {**CLIPS, **SCALED, "norm_tokens": 3}),
    "gspo": ({}, {"clip_low": 0.5, "clip_high": 0.5, **SCALED}),
    "luffy": (
        {"scale_rewards": True},
        {
            **CLIPS,
            **SCALED,
            "shaping_gamma": 0.5,
            "experts_per_group": 2,
            "experts_in_statistics": False,
            "norm_tokens": 3,
            "entropy_weight": 0.1,
        },
    ),
    "uft": (
        {"hint_start": 0.6, "hint_end": 0.4, "hint_steps": 3},
        {
            **CLIPS,
            **SCALED,
            "entropy_weight": 0.1,
            "sft_weight": 0.1,
            "hint_chunks": 1,
            "hint_start": 0.3,
            "hint_end": 0.9,
            "hint_steps": 1,
        },
    ),
}
STOPPING = SAMPLING.model_copy(update={"stop": tuple("0123456789")})  # so that lengths differ
RANDOM = np.random.default_rng(0)
EXPERTS = {
    prompt.prompt_id: [
        Expert(f"expert {i}.{k}", RANDOM.integers(2, 40, 5 + k + i).astype(np.int32), 1.0)
        for k in range(2)
        for k in range(2)
    ]
    for i, prompt in enumerate(PROMPTS)
    if i
}


def sometimes_solved(groups):
    """`even_sum`, but that every completion of one prompt succeeds."""
    judged = even_sum(groups)
    for index, group in enumerate(groups):
        if group.prompt == PROMPTS[0]:
            judged[index] = [dataclasses.replace(judgement, reward=1.0) for judgement in judged[index]]
    return judged


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
    """A training with these options; each is done once."""
    done = {}

    def training(objective, **options):
        name = objective, tuple(sorted(options.items()))
        if name not in done:
            given = {objective: OPTIONS[objective][0] | options}
            done[name] = Training(
                make,
                tmp_path_factory.mktemp("training"),
                clips=make.clips(5),
                config=TrainConfig(objective=objective, **STEPS, **given),
                sampling=STOPPING,
                judge=sometimes_solved,
                experts=EXPERTS,
            )
        return done[name]

    return training


@pytest.mark.parametrize("objective", OWNERS)
def test_an_objective_trains_beside_clips_and_says_what_it_did(trained, objective):
    training = trained(objective)
    assert training.changed()
    assert [(line["policy_version"], line["policy_lag"]) for line in training.metrics] == [
        (10, 0), (10, 1), (12, 0), (12, 1)
    ]  # fmt: skip
    for line in training.metrics:
        assert line["loss"] == pytest.approx(line["rl_loss"] + 1e-3 * line["echo_loss"])
        assert line["echo_grad_norm"] > 0
        assert abs(line["rl_grad_norm"] - line["echo_grad_norm"]) <= line["grad_norm"]
        assert line["grad_norm"] <= line["rl_grad_norm"] + line["echo_grad_norm"]
    assert max(line["rl_grad_norm"] for line in training.metrics) > 0
    fresh, again = training.metrics[:2]
    assert fresh["logprob_gap"] < 1e-4
    assert fresh["mismatch_kl"] < 1e-8
    assert fresh["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert again["mismatch_kl"] > 1e-6  # the weights moved on from those that sampled
    assert again["num_completion_tokens"] == fresh["num_completion_tokens"]
    assert (sum(line["num_expert_tokens"] for line in training.metrics) > 0) == (objective == "luffy")
    assert (sum(line["num_hint_tokens"] for line in training.metrics) > 0) == (objective == "uft")


def test_the_table_of_this_test_has_every_option():
    for objective, section in OWNERS.items():
        assert set(OPTIONS[objective][1]) == set(section.model_fields), objective


@pytest.mark.parametrize(
    ("objective", "option"),
    [(objective, option) for objective, (_, options) in OPTIONS.items() for option in options],
)
def test_each_option_of_an_objective_changes_the_loss(trained, objective, option):
    plain = [line["rl_loss"] for line in trained(objective).metrics]
    other = trained(objective, **{option: OPTIONS[objective][1][option]})
    changes = np.abs(np.subtract([line["rl_loss"] for line in other.metrics], plain))
    assert changes.max() > 1e-6


class Surer:
    """An engine that calls each token e^0.5 times as likely as it is."""

    def __init__(self, engine):
        self.engine, self.logprobs_kind, self.entropy_kind = engine, engine.logprobs_kind, engine.entropy_kind

    def generate(self, requests, sampling):
        for group in self.engine.generate(requests, sampling):
            surer = [dataclasses.replace(s, logprobs=s.logprobs + np.float32(0.5)) for s in group.samples]
            yield dataclasses.replace(group, samples=tuple(surer))


@pytest.mark.parametrize("objective", OWNERS)
def test_a_correction_weighs_by_the_engines_log_probs(make, tmp_path, objective):
    def first_norm(name, **correction):
        config = TrainConfig(objective=objective, **(STEPS | {"optim_steps": 1}), **correction, **uncorrected)
        training = Training(make, tmp_path / name, config=config, wrap=Surer, experts=experts)
        assert training.metrics[0]["mismatch_kl"] == pytest.approx(np.exp(-0.5) - 1 + 0.5, rel=1e-3)
        return training.metrics[0]["rl_grad_norm"]

    uncorrected = {objective: {"entropy_weight": 0.0}} if objective in ("luffy", "uft") else {}
    if objective == "uft":
        uncorrected["uft"]["hint_start"] = 0.0
        uncorrected["uft"]["hint_end"] = 0.0
    # expert tokens have no engine: a group without one is what weighs alone
    experts = EXPERTS if objective == "uft" else {PROMPTS[0].prompt_id: EXPERTS[PROMPTS[1].prompt_id][:1]}
    weighed = first_norm("truncated", correction="truncated")
    raised = first_norm("floor", correction="truncated", correction_floor=1.0)
    assert weighed == pytest.approx(np.exp(-0.5) * raised, rel=1e-3)
    assert first_norm("masked", correction="token_mask", correction_floor=0.7) == 0.0
    assert first_norm("kept", correction="token_mask", correction_floor=0.6) == pytest.approx(weighed)


REFUSED = {
    "a correction of what nobody knows": (
        {"correction": "truncated"},
        {"temperature": 0.6},
        r"train\.correction is truncated, but the engine's log-probs are not those of the trained distri",
    ),
    "a clip where every ratio is 1": (
        {"correction": "truncated", "grpo": {"clip_low": 0.1}},
        {},
        r"`train\.grpo\.clip_low` has no effect: in the one update on each batch every ratio is 1\.",
    ),
    "a clip where the engine tells nothing": (
        {"objective": "dapo", "dapo": {"clip_high": 0.5}},
        {"top_p": 0.9},
        r"`train\.dapo\.clip_high` has no effect",
    ),
    "a buffer longer than a completion": (
        {"objective": "dapo", "dapo": {"overlong_buffer_tokens": 7}},
        {},
        r"`train\.dapo\.overlong_buffer_tokens` is 7, more than the 6 tokens of a completion\.",
    ),
    "LUFFY without experts": (
        {"objective": "luffy"},
        {},
        "luffy, which learns from experts, and none",
    ),
    "UFT without experts": ({"objective": "uft"}, {}, "uft, which learns from experts, and none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_option_without_effect_is_refused_before_anything_is_sampled(make, tmp_path, case):
    options, sampling, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as refused:
        Training(
            make,
            tmp_path,
            config=TrainConfig(**options),
            sampling=SAMPLING.model_copy(update=sampling),
            judge=pytest.fail,
        )
    assert "\n" not in str(refused.value)
    assert list(Path(tmp_path).iterdir()) == []
