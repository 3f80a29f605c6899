"""A training that is killed at any step and started again equals, bit by bit, one that never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from killed_training import Kill, run, story
from loop_helpers import CONFIG, PROMPTS, SAMPLING, Training, even_sum

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError

BASE = {
    "optim_steps": 7, "prompts_per_step": 4, "group_size": 2, "lr": 3e-3, "echo_weight": 0.1,
    "batch_tokens": 60, "seed": 5, "checkpoint_every": 2,
}  # fmt: skip
OF_SHARDS = BASE | {"clips_per_step": 4}
CASES = {
    "clips of shards": OF_SHARDS,
    "clips of shards that retire": OF_SHARDS
    | {"max_clip_uses": 2, "retire_below_loss": 2.0, "weight_decay": 0.1},
    "both, two updates for each batch": OF_SHARDS | {"echo_source": "both", "updates_per_batch": 2},
    "both, dynamic sampling": OF_SHARDS | {"echo_source": "both", "objective": "dapo", "max_clip_uses": 3},
}
SLOW_CASES = {"clips of shards", "both, two updates for each batch"}  # the others have what is in these
KILLS = [
    Kill("uses", 2), Kill("step", 3), Kill("rollouts", 2), Kill("state", 1), Kill("checkpoint", 1),
]  # fmt: skip
FEW = CONFIG.model_copy(update={"optim_steps": 4, "checkpoint_every": 1})


@pytest.fixture
def model_folder(make, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make.model().save_pretrained(folder)
    make.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW_CASES)) for case in CASES]
)
def test_a_training_killed_again_and_again_equals_one_that_never_stopped(case, make, model_folder, tmp_path):
    config, clips = TrainConfig.model_validate(CASES[case]), make.clips(6)
    assert run(tmp_path / "calm", model_folder, clips, config) == 0
    for kill in KILLS:
        assert run(tmp_path / "killed", model_folder, clips, config, kill) == -9, kill
    assert run(tmp_path / "killed", model_folder, clips, config) == 0
    calm = story(tmp_path / "calm")
    assert story(tmp_path / "killed") == calm
    assert len(calm.metrics) == 7
    assert calm.uses
    assert any(line["rl_grad_norm"] or line["grad_norm"] for line in calm.metrics)


@pytest.mark.slow
def test_a_kill_at_each_single_step_changes_nothing(make, model_folder, tmp_path):
    config, clips = TrainConfig.model_validate(CASES["clips of shards that retire"]), make.clips(6)
    assert run(tmp_path / "calm", model_folder, clips, config) == 0
    calm = story(tmp_path / "calm")
    for nth in range(1, 8):
        folder = tmp_path / f"killed-{nth}"
        assert run(folder, model_folder, clips, config, Kill("step", nth)) == -9
        assert run(folder, model_folder, clips, config) == 0
        assert story(folder) == calm


@pytest.mark.slow
def test_a_killed_training_that_samples_with_vllm_equals_one_that_never_stopped(make, model_folder, tmp_path):
    options = OF_SHARDS | {"engine": "vllm", "optim_steps": 4}
    config, clips = TrainConfig.model_validate(options), make.clips(6)
    assert run(tmp_path / "calm", model_folder, clips, config) == 0
    assert run(tmp_path / "killed", model_folder, clips, config, Kill("step", 3)) == -9
    assert states(tmp_path / "killed") == ["step-000000000002"]
    assert run(tmp_path / "killed", model_folder, clips, config) == 0
    assert story(tmp_path / "killed") == story(tmp_path / "calm")


def stopping_at(optim_step: int):
    """A judge that stops the training when this step is sampled, as Ctrl-C would."""
    calls = iter(range(optim_step))

    def judge(groups):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return even_sum(groups)

    return judge


def stopped(make, folder: Path, optim_step: int, config: TrainConfig = FEW) -> None:
    with pytest.raises(KeyboardInterrupt):
        Training(make, folder, clips=make.clips(6), config=config, judge=stopping_at(optim_step))


def weights(training: Training):
    return {name: value.tolist() for name, value in training.model.state_dict().items()}


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "states").iterdir())


def test_the_last_k_states_are_kept_and_none_is_a_pickle(make, tmp_path):
    Training(make, tmp_path, config=FEW.model_copy(update={"keep_checkpoints": 2}))
    assert states(tmp_path) == ["step-000000000002", "step-000000000003"]
    files = {path.name for path in (tmp_path / "states").rglob("*") if path.is_file()}
    assert files == {"state.json", "tensors.safetensors"}


def test_without_states_a_training_begins_again_and_comes_to_the_same(make, tmp_path):
    config = FEW.model_copy(update={"checkpoint_every": 0})
    calm = Training(make, tmp_path / "calm", clips=make.clips(6), config=config)
    stopped(make, tmp_path / "own", 2, config)
    again = Training(make, tmp_path / "own", clips=make.clips(6), config=config)
    assert not (tmp_path / "own" / "states").exists()
    assert (again.result.num_rollouts, len(again.rollouts)) == (calm.result.num_rollouts, 4)
    assert weights(again) == weights(calm)


def test_only_what_came_after_the_state_is_done_again_and_the_result_counts_all(make, tmp_path):
    calm = Training(make, tmp_path / "calm", clips=make.clips(6), config=FEW)
    stopped(make, tmp_path / "own", 2)
    again = Training(make, tmp_path / "own", clips=make.clips(6), config=FEW)
    assert [version for _, _, version in again.rollouts] == [12, 13]
    assert [uses[0][1] for uses in again.clip_uses] == [2, 3]
    assert again.result.num_rollouts == calm.result.num_rollouts == 24
    assert again.result.num_clip_uses == calm.result.num_clip_uses == 16
    assert again.result.echo_loss_before == calm.result.echo_loss_before
    assert again.result.echo_loss_after == calm.result.echo_loss_after


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, Path.unlink])
def test_a_damaged_state_is_passed_over_in_one_line_for_the_one_before(name, damage, make, tmp_path, caplog):
    calm = Training(make, tmp_path / "calm", clips=make.clips(6), config=FEW)
    stopped(make, tmp_path / "own", 3)
    damage(tmp_path / "own" / "states" / "step-000000000003" / name)
    again = Training(make, tmp_path / "own", clips=make.clips(6), config=FEW)
    (line,) = caplog.messages
    assert line.startswith("Passed over the damaged training state ")
    assert "step-000000000003: " in line
    assert "\n" not in line
    assert [version for _, _, version in again.rollouts] == [12, 13]
    assert weights(again) == weights(calm)


def test_where_all_states_are_damaged_the_training_begins_again(make, tmp_path, caplog):
    stopped(make, tmp_path, 3)
    for path in (tmp_path / "states").glob("*/state.json"):
        path.write_text("[]")
    again = Training(make, tmp_path, clips=make.clips(6), config=FEW)
    assert len(caplog.messages) == 2
    assert len(again.rollouts) == 4
    assert states(tmp_path) == ["step-000000000002", "step-000000000003"]


def other_tokenizer(make):
    tokenizer = make.tokenizer()
    tokenizer.add_tokens(["echo"])
    return tokenizer


@pytest.mark.parametrize(
    ("another", "changes"),
    [
        ("config", lambda make: {"config": FEW.model_copy(update={"lr": 1e-4})}),
        ("config", lambda make: {"sampling": SAMPLING.model_copy(update={"max_tokens": 5})}),
        ("model", lambda make: {"model": make.model(seed=1)}),
        ("list of prompts", lambda make: {"prompts": PROMPTS[:4]}),
        ("list of clips", lambda make: {"clips": make.clips(5)}),
    ],
)
def test_a_state_of_another_training_is_refused_by_what_differs(another, changes, make, tmp_path):
    stopped(make, tmp_path, 2)
    with pytest.raises(ConfigError, match=rf"step-\S+ is the state of a training with another {another}\. "):
        Training(make, tmp_path, **{"clips": make.clips(6), "config": FEW} | changes(make))


def test_a_state_of_another_tokenizer_or_format_is_refused(make, tmp_path, monkeypatch):
    stopped(make, tmp_path, 2)
    swapped = SimpleNamespace(**{**vars(make), "tokenizer": lambda: other_tokenizer(make)})
    with pytest.raises(ConfigError, match="another tokenizer"):
        Training(swapped, tmp_path, clips=make.clips(6), config=FEW)
    monkeypatch.setattr("trainer.run_state.FORMAT", "2")
    with pytest.raises(ConfigError, match="another format"):
        Training(make, tmp_path, clips=make.clips(6), config=FEW)


def test_batch_tokens_may_change_between_two_starts_and_moves_the_losses_by_rounding_alone(make, tmp_path):
    calm = Training(make, tmp_path / "calm", clips=make.clips(6), config=FEW)
    stopped(make, tmp_path / "own", 2)
    config = FEW.model_copy(update={"batch_tokens": 25})
    again = Training(make, tmp_path / "own", clips=make.clips(6), config=config)
    assert [version for _, _, version in again.rollouts] == [12, 13]
    for step, expected in zip(again.metrics, calm.metrics, strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
        assert step["num_completion_tokens"] == expected["num_completion_tokens"]


def test_how_often_states_are_kept_may_change_between_two_starts(make, tmp_path):
    stopped(make, tmp_path, 2)
    config = FEW.model_copy(update={"checkpoint_every": 2, "keep_checkpoints": 1})
    again = Training(make, tmp_path, clips=make.clips(6), config=config)
    assert len(again.rollouts) == 2
    assert json.loads((again.result.checkpoint / "echomine.json").read_text())["policy_version"] == 14
