"""TRL's own GRPOTrainer, run for real, with EchoClips beside its batches."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from accelerate import DistributedType
from arith_shards import export_arith_shards
from datasets import Dataset
from trl import GRPOConfig

from pipeline.errors import ConfigError
from pipeline.models import load_model, model_folder
from pipeline.shards import UnknownTokenizer, load_clips
from pipeline.tokenization import load_tokenizer, tokenizer_hash
from trainer import learner
from trainer.adapters.trl import EchoGRPOTrainer, check_whole_weights

NUM_STEPS = 10


def same_reward(completions, **_):
    """No group has an advantage, so that whatever is learned comes from the clips."""
    return [1.0] * len(completions)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arith")
    export_arith_shards(folder / "lake", folder / "shards")
    return folder / "shards"


@pytest.fixture
def trainer_of(shards, tmp_path):
    def trainer(echo_weight, accumulation=1, tokenizer=None, **given):
        settings = GRPOConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=NUM_STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            num_generations=2,
            max_completion_length=4,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        return EchoGRPOTrainer(
            model=load_model(model_folder("arith"), "cpu"),
            reward_funcs=same_reward,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": ["1+2\n", "30+7\n"]}),
            processing_class=tokenizer or load_tokenizer(model_folder("arith")),
            shards=shards,
            echo_weight=echo_weight,
            **given,
        )

    return trainer


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def echo_losses(trainer):
    return [logged["echo_loss"] for logged in trainer.state.log_history if "echo_loss" in logged]


def test_ten_steps_of_trl_learn_the_clips_where_no_group_has_an_advantage(trainer_of):
    trainer = trainer_of(1.0)
    trainer.train()
    losses = echo_losses(trainer)
    assert len(losses) == NUM_STEPS == trainer.state.global_step
    assert losses[-1] < 0.7 * losses[0]


def test_with_a_weight_of_0_the_loss_is_logged_and_nothing_is_learned_from_it(trainer_of):
    trainer = trainer_of(0.0)
    before = weights_of(trainer)
    trainer.train()
    assert len(echo_losses(trainer)) == NUM_STEPS
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


def test_the_gradient_of_a_step_is_lambda_times_that_of_our_own_trainer(trainer_of, shards):
    trainer = trainer_of(0.5, accumulation=2)
    inputs = trainer._generate_and_score_completions([{"prompt": "1+2\n"}] * 2)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    for _ in range(2):  # each with all four clips
        trainer.compute_loss(trainer.model, inputs).backward()
    model = load_model(model_folder("arith"), "cpu")
    clips = load_clips(shards, tokenizer_hash(trainer.processing_class))
    learner.backward_clips(model, clips, 0.5, 10_000)
    ours = dict(model.named_parameters())
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value.grad, ours[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_evaluation_deals_no_clips(trainer_of):
    trainer = trainer_of(1.0)
    inputs = trainer._generate_and_score_completions([{"prompt": "1+2\n"}] * 2)
    trainer.model.eval()
    trainer.echo_clips = None  # asking it for a loss would fail
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_is_negative_or_no_number_is_refused(trainer_of, weight):
    with pytest.raises(ConfigError, match=r"`echo_weight` is .*0 or more"):
        trainer_of(weight)


def test_less_than_one_clip_is_refused(trainer_of):
    with pytest.raises(ConfigError, match="0 EchoClips per step"):
        trainer_of(1.0, clips_per_batch=0)


def test_clips_of_another_tokenizer_than_trls_are_refused(trainer_of, tokenizer):
    with pytest.raises(UnknownTokenizer, match="not this model's"):
        trainer_of(1.0, tokenizer=tokenizer)


@pytest.mark.parametrize("split", ["FSDP", "DEEPSPEED"])
def test_weights_that_are_split_over_processes_are_refused(split):
    with pytest.raises(ConfigError, match=f"{split} splits them"):
        check_whole_weights(DistributedType(split))
    check_whole_weights(DistributedType.NO)


def test_without_trl_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "trainer.adapters.trl")
    with pytest.raises(ConfigError, match=r"needs TRL.*pip install trl==1\.16\.0"):
        importlib.import_module("trainer.adapters.trl")
