"""Clips of the batch itself: those that a mining finds, out of the forward pass that is there anyway."""

from __future__ import annotations

import dataclasses
from datetime import date

import numpy as np
import pytest
import torch
from loop_helpers import PROMPTS, Training
from test_loop_objectives import EXPERTS, Surer

from pipeline import tokenization
from pipeline.config import MiningConfig, SamplingConfig, TrainConfig
from pipeline.engines.base import GroupRequest
from pipeline.errors import ConfigError
from pipeline.ingest import ingest
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.objective_config import OWNERS
from pipeline.records import Judgement, Policy, Run
from pipeline.rollouts import Sampled, rollout_rows
from pipeline.tokenization import tokenizer_hash
from trainer.guard import Guard
from trainer.learner import backward_clips, backward_rollouts
from trainer.online import ONLINE, OnlineClips
from trainer.optimizer import MasterAdamW
from trainer.rollout_batch import Rollouts, rollout_batch
from trainer.update import StepClips, Updater

SAMPLING = SamplingConfig(group_size=4, max_tokens=20, stop=("0",))
STEPS = {"optim_steps": 3, "prompts_per_step": 4, "group_size": 4, "echo_source": "online", "seed": 2}


def solved(groups):
    """Every completion succeeds, but one of the third prompt's."""
    return [
        [Judgement(float(g.prompt != PROMPTS[2] or s.sample_index != 1)) for s in g.samples] for g in groups
    ]


@pytest.fixture(scope="module")
def sampled(make):
    """Five groups of four rollouts, of which one is mixed."""
    model, tokenizer = make.model(), make.tokenizer()
    requests = [GroupRequest(p, tuple(range(10 * i, 10 * i + 4))) for i, p in enumerate(PROMPTS)]
    groups = {g.prompt.prompt_id: g for g in make.engine(model, tokenizer).generate(requests, SAMPLING)}
    groups = [groups[prompt.prompt_id] for prompt in PROMPTS]
    return Rollouts(groups, solved(groups), [()] * 5, [0] * 5, 7)


def test_rows_of_the_lake_and_the_batchs_clips_split_a_rollout_once(make, sampled, monkeypatch):
    tokenizer, decoded = make.tokenizer(), []
    read = tokenization.token_texts
    monkeypatch.setattr(tokenization, "token_texts", lambda *given: decoded.append(None) or read(*given))
    policy = Policy("tiny", "weights", tokenizer_hash(tokenizer), 7)
    run = Sampled(
        Run("training", date(2026, 5, 31), "trainer"), policy, SAMPLING, "raw", "full_vocab", "", ""
    )
    rollout_rows(run, sampled.groups, sampled.judgements, tokenizer)
    assert 0 < len(decoded) <= 20
    num_decoded = len(decoded)
    found = OnlineClips(tokenizer, policy.tokenizer_hash, MiningConfig(), 4, "training").of(sampled)
    assert (len(decoded), bool(found)) == (num_decoded, True)


RULES = {
    "the defaults": {},
    "two clips of a group": {"clips_per_group": 2},
    "every group with a success": {"scope": "any_success", "clips_per_group": 4},
    "longer steps": {"min_step_tokens": 4},
    "short clips": {"max_clip_tokens": 14},
    "uncertain steps": {"min_step_entropy": 2.6, "clips_per_group": 4},
    "rollouts that were cut off": {"allow_truncated": True, "clips_per_group": 4},
    "two clips in all": {"max_clips": 2},
    "one clip of a prompt": {"max_clips_per_prompt": 1, "clips_per_group": 4},
    "steps that end at spaces": {"delimiter": "\x20", "clips_per_group": 2},
}


@pytest.mark.parametrize("name", RULES)
def test_the_clips_of_a_batch_are_those_of_a_mining_of_its_rollouts(make, sampled, tmp_path, name):
    tokenizer, rules = make.tokenizer(), MiningConfig(**RULES[name])
    hashed = tokenizer_hash(tokenizer)
    facts = Sampled(
        Run("training", date(2026, 5, 31), "trainer"),
        Policy("tiny", "weights", hashed, 7),
        SAMPLING,
        "raw",
        "full_vocab",
        "exact",
        "1",
    )
    rows, refused = rollout_rows(facts, sampled.groups, sampled.judgements, tokenizer)
    assert refused == []
    lake = Lake.create(tmp_path / "lake")
    ingest(lake, rows, ["training"] * len(rows), [group.prompt for group in sampled.groups], refused)
    mine(lake, rules, tokenizer=lambda: tokenizer)
    with lake.reader() as reader:
        mined = reader.rows("select clip_id, step_entropy, clip_tokens from echo_clips order by clip_rank")
    found = [clip for clip, _ in OnlineClips(tokenizer, hashed, rules, 4, "training").of(sampled)]
    assert len(found) > 1
    assert [clip.clip_id for clip in found] == [ONLINE + row["clip_id"] for row in mined]
    assert [len(clip.clip_ids) for clip in found] == [row["clip_tokens"] for row in mined]
    assert [clip.step_entropy for clip in found] == [row["step_entropy"] for row in mined]


def finds(make, training_id="training", **rules):
    return OnlineClips(make.tokenizer(), "tiny", MiningConfig(**rules), 4, training_id)


def test_a_group_behind_a_hint_has_no_clips(make, sampled):
    everything = finds(make).of(sampled)
    hinted = dataclasses.replace(sampled, hint_tokens=[2, 0, 0, 0, 0])
    assert [clip.clip_id for clip, _ in finds(make).of(hinted)] == [
        clip.clip_id for clip, (group, _) in everything if group
    ]


def test_the_gradient_out_of_the_rollouts_pass_is_that_of_a_pass_of_its_own(make, sampled):
    model = make.model(dtype=torch.float64)
    config = TrainConfig(group_size=4, batch_tokens=60)
    batch = rollout_batch(sampled, config, logprobs_known=True, max_tokens=20)
    rows = {place: row for row, place in enumerate(batch.places)}
    found = finds(make, clips_per_group=2).of(sampled)
    tokens = {rows[place]: len(clip.clip_ids) for clip, place in found}
    joint = backward_rollouts(model, batch, config, 1.0, None, tokens, 0.5 / len(found))
    ours = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    apart = backward_rollouts(model, batch, config, 1.0)
    _, losses = backward_clips(model, [clip for clip, _ in found], 0.5, 60)
    assert joint.loss == pytest.approx(apart.loss, abs=1e-12)
    assert [joint.clip_losses[rows[place]] for _, place in found] == pytest.approx(losses, rel=1e-9)
    for name, param in model.named_parameters():
        torch.testing.assert_close(ours[name], param.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_terms_norm_out_of_the_pass_that_they_share_is_that_of_the_term_alone(
    make, sampled, tmp_path, dtype
):
    config = TrainConfig(group_size=4, batch_tokens=60, echo_weight=0.5, grad_norms_every=2)
    batch = rollout_batch(sampled, config, logprobs_known=True, max_tokens=20)
    row_of = {place: row for row, place in enumerate(batch.places)}
    found = finds(make, clips_per_group=2).of(sampled)
    shared = [row_of[place] for _, place in found]

    def losses(optim_step, clips, rows):
        model = make.model(dtype=dtype)
        optimizer = MasterAdamW(model, 1e-3, 0.0, 1e9)
        updater = Updater(model, config, 1.0, optimizer, Guard(tmp_path, "training"))
        return updater.update(batch, StepClips(clips, rows), optim_step).losses

    clips = [clip for clip, _ in found]
    measured, unmeasured = losses(1, clips, shared), losses(0, clips, shared)
    apart, alone = losses(0, clips, [None] * len(clips)), losses(0, [], [])
    tolerance = 1e-9 if dtype == torch.float64 else 0.05
    assert "rl_grad_norm" not in unmeasured
    assert measured["rl_grad_norm"] == pytest.approx(alone["grad_norm"], rel=tolerance)
    assert measured["echo_grad_norm"] == pytest.approx(apart["echo_grad_norm"], rel=tolerance)
    for name in ("loss", "grad_norm"):
        assert measured[name] == pytest.approx(unmeasured[name], rel=tolerance)
    assert min(measured["rl_grad_norm"], measured["echo_grad_norm"]) > 0.01


@pytest.mark.parametrize("objective", OWNERS)
def test_each_objective_trains_beside_the_clips_of_its_batch(make, tmp_path, objective):
    # hints are over after the first step: what succeeds behind one yields no clip
    hints = {"uft": {"hint_steps": 0}} if objective == "uft" else {}
    config = TrainConfig(objective=objective, **STEPS, **hints)
    run = {"sampling": SAMPLING, "judge": solved, "experts": EXPERTS}
    training = Training(make, tmp_path / "on", config=config, **run)
    used = [name for uses in training.clip_uses for name, _, _ in uses]
    assert used
    assert all(name.startswith(ONLINE) for name in used)
    assert len(used) == training.result.num_clip_uses == sum(line["num_clips"] for line in training.metrics)
    with_clips = [line for line in training.metrics if line["num_clips"]]
    for line, uses in zip(with_clips, training.clip_uses, strict=True):
        assert line["echo_loss"] == pytest.approx(np.mean([loss for _, _, loss in uses]))
        assert line["grad_norm"] > 0
        # DAPO leaves solved groups out, so their clips have a pass and a norm of their own
        assert (line["echo_grad_norm"] is None) == (objective != "dapo")
    off = Training(make, tmp_path / "off", config=config.model_copy(update={"echo_weight": 0.0}), **run)
    changed = off.model.state_dict()
    assert any(not torch.equal(value, changed[name]) for name, value in training.model.state_dict().items())


def test_both_sources_share_one_mean_and_retire_alike(make, tmp_path):
    options = STEPS | {"echo_source": "both", "clips_per_step": 2, "updates_per_batch": 3, "max_clip_uses": 2}
    config = TrainConfig(**options)
    training = Training(make, tmp_path, clips=make.clips(6), config=config, sampling=SAMPLING, judge=solved)
    online = [[name for name, _, _ in uses if name.startswith(ONLINE)] for uses in training.clip_uses]
    assert online[0]
    assert online[0] == online[1]
    assert len(online) < 3 or online[2] == []
    for line, uses in zip(training.metrics, training.clip_uses, strict=False):
        assert line["echo_loss"] == pytest.approx(np.mean([loss for _, _, loss in uses]))
    assert [line["num_retired_clips"] for line in training.metrics] == [0, 0, 0]
    assert [line["num_clips"] for line in training.metrics] == [2 + len(online[0])] * 2 + [2]


class Silent(Surer):
    """An engine that tells no entropies."""

    def __init__(self, engine):
        super().__init__(engine)
        self.entropy_kind = None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": []}, r"train\.echo_source is online, and there are no prompts"),
        ({"wrap": Silent}, r"train\.echo_source is online, but the engine tells no entropies"),
        (
            {"sampling": SAMPLING.model_copy(update={"temperature": 0.5})},
            r"train\.echo_source is online, but the forward pass over rollouts of temperature 0\.5",
        ),
        (
            {"config": TrainConfig(**STEPS, clips_per_step=3)},
            r"`train\.clips_per_step` has no effect: it is of shards, and train\.echo_source is online\.",
        ),
    ],
)
def test_what_online_clips_need_is_asked_for_before_anything_is_sampled(make, tmp_path, given, message):
    run = {"config": TrainConfig(**STEPS), "clips": make.clips(3), "judge": pytest.fail} | given
    with pytest.raises(ConfigError, match=message) as refused:
        Training(make, tmp_path, **run)
    assert "\n" not in str(refused.value)
