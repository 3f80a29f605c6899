"""verl's own actor update, run for real in `verl_workers`, with EchoClips among the rollouts."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from arith_shards import SUMS, export_arith_shards
from verl import DataProto
from verl.utils.tensordict_utils import get_tensordict
from verl_workers import RayPPOTrainer, Workers, trainer_of, verl_config

from pipeline.errors import ConfigError, FormatError
from pipeline.models import PROJECT, load_model, model_folder
from pipeline.tokenization import load_tokenizer
from trainer.adapters.verl import EchoUpdate
from trainer.echoclips import EchoClips
from trainer.objectives import clip_losses, echo_clip_loss

PROMPT_WIDTH, RESPONSE_WIDTH, NUM_ROLLOUTS = 16, 48, 8
ECHO_WEIGHT, CLIPS_PER_STEP = 0.3, 3
NUM_CLIPS = [3, 2]  # five of the shards, in steps of equal size
LENGTHS = [(5, 30), (16, 48), (3, 1), (7, 12), (9, 20), (4, 48), (2, 17), (11, 6)]  # of the rollouts
TWO_STEPS = {"ppo_mini_batch_size": NUM_ROLLOUTS // 2}
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arith")
    export_arith_shards(folder / "lake", folder / "shards", sums=(*SUMS, "22+20"))
    return folder / "shards"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_folder("arith"))


@pytest.fixture(scope="module")
def model():
    return load_model(model_folder("arith"), "cpu", "float32")


def rollouts():
    """As `RayPPOTrainer` has them when it updates the actor."""
    random = torch.Generator().manual_seed(0)
    attention = torch.zeros(NUM_ROLLOUTS, PROMPT_WIDTH + RESPONSE_WIDTH, dtype=torch.int64)
    for row, (prompt, response) in enumerate(LENGTHS):
        attention[row, PROMPT_WIDTH - prompt : PROMPT_WIDTH + response] = 1
    ids = torch.randint(3, 16, attention.shape, generator=random) * attention
    mask = attention[:, PROMPT_WIDTH:]
    tensors = {
        "prompts": ids[:, :PROMPT_WIDTH],
        "responses": ids[:, PROMPT_WIDTH:],
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp_min(0),
        "response_mask": mask,
        "old_log_probs": -2 * torch.rand(mask.shape, generator=random) * mask,
        "ref_log_prob": -2 * torch.rand(mask.shape, generator=random) * mask,
        "advantages": torch.randn(NUM_ROLLOUTS, 1, generator=random) * mask,
    }
    meta = {"global_steps": 1, "global_token_num": attention.sum(1).tolist(), "images_seqlens": []}
    columns = {"uid": np.arange(NUM_ROLLOUTS).astype(str).astype(object)}
    return DataProto.from_dict(tensors, non_tensors=columns, meta_info=meta)


def echo_trainer(shards, tokenizer, workers, config, **settings):
    kind = type("EchoTrainer", (EchoUpdate, RayPPOTrainer), {"shards": shards, **settings})
    return trainer_of(kind, config, tokenizer, workers)


def steps_without_clips(model, tokenizer, loss_mode, num_processes=1, **actor):
    """The loss and gradient of each optimizer step of verl's own, on the rollouts alone."""
    config = verl_config(**actor, **{"policy_loss.loss_mode": loss_mode})
    workers = Workers(model, config, num_processes)
    trainer_of(RayPPOTrainer, config, tokenizer, workers)._update_actor(rollouts())
    return workers.steps


def steps_with_clips(model, tokenizer, shards, loss_mode, num_processes=1, **actor):
    config = verl_config(**actor, **{"policy_loss.loss_mode": f"echo_{loss_mode}"})
    workers = Workers(model, config, num_processes)
    trainer = echo_trainer(
        shards, tokenizer, workers, config, echo_weight=ECHO_WEIGHT, clips_per_step=CLIPS_PER_STEP
    )
    trainer._update_actor(rollouts())
    return workers.steps


def assert_grown_by_the_term(found, plain, terms):
    """Step by step, within 1e-5 of the largest gradient of a weight."""
    assert len(found) == len(plain) == len(terms)
    for (loss, gradient), (plain_loss, plain_gradient), (term, term_gradient) in zip(
        found, plain, terms, strict=True
    ):
        assert loss == pytest.approx(plain_loss + term, rel=1e-5, abs=1e-6)
        for name in gradient:
            expected = plain_gradient[name] + term_gradient[name]
            limit = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(gradient[name], expected, rtol=0, atol=limit)


def echo_terms(model, tokenizer, shards, num_steps=2):
    """[(λ · EchoClip loss, its gradient)] of the next clips, a clip at a time by the model's logits."""
    clips, terms = EchoClips(shards, tokenizer, CLIPS_PER_STEP), []
    for _ in range(num_steps):
        batch, logprobs, lengths = clips.next_batch(), [], []
        for prompt, clip in batch.rows():
            ids = torch.as_tensor(np.concatenate((prompt, clip)).astype(np.int64))
            of_all = torch.log_softmax(model(ids[None]).logits[0], -1)[:-1].gather(1, ids[1:, None])[:, 0]
            logprobs.append(of_all[len(prompt) - 1 :])
            lengths.append(len(clip))
        losses = clip_losses(torch.cat(logprobs), torch.tensor(lengths))
        term = ECHO_WEIGHT * echo_clip_loss(losses, batch.weights, num_clips=len(batch))
        model.zero_grad()
        term.backward()
        terms.append((term.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}))
    return terms


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("agg_mode", ["token-mean", "seq-mean-token-mean"])
def test_each_of_two_steps_has_verls_loss_without_clips_plus_lambda_times_the_echo_clip_loss(
    model, tokenizer, shards, agg_mode, num_processes
):
    settings = {**TWO_STEPS, "loss_agg_mode": agg_mode}
    plain = steps_without_clips(model, tokenizer, "vanilla", num_processes, **settings)
    found = steps_with_clips(model, tokenizer, shards, "vanilla", num_processes, **settings)
    assert_grown_by_the_term(found, plain, echo_terms(model, tokenizer, shards))


@pytest.mark.parametrize(
    ("loss_mode", "settings"),
    [
        *(("vanilla", {"loss_agg_mode": mode}) for mode in MODES[1:3] + MODES[4:]),
        ("gspo", {"loss_agg_mode": "seq-mean-token-mean"}),
        ("vanilla", {"ppo_micro_batch_size_per_gpu": 2}),
        ("vanilla", {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 64}),
        ("vanilla", {"entropy_coeff": 0.1, "use_kl_loss": True, "kl_loss_coef": 0.5}),
    ],
)
def test_so_it_has_with_other_aggregations_micro_batches_and_regularizers(
    model, tokenizer, shards, loss_mode, settings
):
    settings = {**TWO_STEPS, **settings}
    plain = steps_without_clips(model, tokenizer, loss_mode, 2, **settings)
    found = steps_with_clips(model, tokenizer, shards, loss_mode, 2, **settings)
    assert_grown_by_the_term(found, plain, echo_terms(model, tokenizer, shards))


def test_the_epochs_of_an_update_repeat_its_clips(model, tokenizer, shards):
    settings = {**TWO_STEPS, "ppo_epochs": 2}
    plain = steps_without_clips(model, tokenizer, "vanilla", **settings)
    found = steps_with_clips(model, tokenizer, shards, "vanilla", **settings)
    assert_grown_by_the_term(found, plain, 2 * echo_terms(model, tokenizer, shards))


class Listening:
    """A worker group that keeps the rows it is given."""

    def __init__(self, num_processes):
        self._dispatch_info, self.batches = {"actor": list(range(num_processes))}, []

    def update_actor(self, batch):
        self.batches.append(batch)
        return get_tensordict({}, {"metrics": {"mfu": 0.0}})


def test_each_update_gets_the_next_clips_and_the_rollouts_come_back_as_they_were(tokenizer, shards):
    workers = Listening(2)
    config = verl_config(**TWO_STEPS, **{"policy_loss.loss_mode": "echo_vanilla"})
    trainer = echo_trainer(shards, tokenizer, workers, config, clips_per_step=CLIPS_PER_STEP)
    batch = rollouts()
    for _ in range(2):
        trainer._update_actor(batch)
    assert trainer.actor_rollout_wg is workers
    assert len(batch) == NUM_ROLLOUTS

    first, second = (given["responses"][given["old_log_probs"][:, 0] == 1.0] for given in workers.batches)
    assert len(first) == len(second) == sum(NUM_CLIPS)
    assert not torch.equal(first, second)
    assert first.unique(dim=0).tolist() == second.unique(dim=0).tolist(), "an epoch deals each clip once"
    given = workers.batches[0]
    in_clip = (given["old_log_probs"][:, 0] == 1.0).tolist()
    # for each process two steps of two rollouts and room for two clips, the last of which is padding
    assert in_clip == [
        False, False, True, True, False, False, True, False,
        False, False, True, False, False, False, True, False,
    ]  # fmt: skip
    assert (given["mini_batch_size"], given["global_batch_size"]) == (8, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"policy_loss.loss_mode": "vanilla"},
            "verl's loss is `vanilla`, .* to `echo_vanilla` or `echo_gspo`",
        ),
        ({"shuffle": True}, r"shuffles rows .* Set `actor_rollout_ref\.actor\.shuffle=False`"),
    ],
)
def test_a_configuration_that_loses_the_clips_is_refused_before_training(
    tokenizer, shards, settings, message
):
    config = verl_config(**{"policy_loss.loss_mode": "echo_vanilla", **settings})
    with pytest.raises(ConfigError, match=message):
        echo_trainer(shards, tokenizer, Listening(1), config)


def test_a_temperature_or_distillation_or_lambda_that_clips_cannot_have_is_refused(tokenizer, shards):
    config = verl_config(**{"policy_loss.loss_mode": "echo_vanilla"})
    with pytest.raises(ConfigError, match="`echo_weight` is -1"):
        echo_trainer(shards, tokenizer, Listening(1), config, echo_weight=-1.0)
    config.distillation.enabled = True
    with pytest.raises(ConfigError, match=r"Set `distillation\.enabled=False`"):
        echo_trainer(shards, tokenizer, Listening(1), config)
    config.actor_rollout_ref.rollout.temperature = 0.7
    with pytest.raises(
        ConfigError, match=r"temperature 0\.7 .* Set `actor_rollout_ref\.rollout\.temperature=1\.0`"
    ):
        echo_trainer(shards, tokenizer, Listening(1), config)


def test_a_batch_that_clips_cannot_join_is_refused_with_what_to_do(tokenizer, shards):
    config = verl_config(**TWO_STEPS, **{"policy_loss.loss_mode": "echo_vanilla"})
    trainer = echo_trainer(shards, tokenizer, Listening(2), config)

    narrow = rollouts()
    for name in ("responses", "response_mask", "old_log_probs", "advantages"):
        narrow.batch[name] = narrow.batch[name][:, :1]
    with pytest.raises(FormatError, match=r"does not fit verl's 16 \+ 1\. Raise `data\.max_prompt_length`"):
        trainer._update_actor(narrow)
    masked = rollouts()
    masked.batch["response_mask"][[2, 3, 6, 7]] = 0  # the second step's, on two processes
    with pytest.raises(ConfigError, match="Mini-batch 1 has no token of a rollout"):
        trainer._update_actor(masked)
    routed = rollouts()
    routed.batch["routed_experts"] = torch.zeros(NUM_ROLLOUTS, 1)
    with pytest.raises(ConfigError, match="holds `routed_experts`"):
        trainer._update_actor(routed)
    with pytest.raises(ConfigError, match="cannot cut 6 rollouts into mini-batches of 4 on 2 processes"):
        trainer._update_actor(rollouts()[:6])
    with pytest.raises(ConfigError, match=r"Set `trainer\.use_v1=False`"):
        trainer._update_actor(object(), metrics={})


def test_a_process_of_verls_finds_the_losses_by_its_variable_for_external_modules():
    code = "from verl.trainer.ppo.core_algos import get_policy_loss_fn as get; get('echo_gspo')"
    names = {"PYTHONPATH": str(PROJECT), "VERL_USE_EXTERNAL_MODULES": "trainer.adapters.verl"}
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, **names}, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
