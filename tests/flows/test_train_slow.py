"""`echomine train`, killed at random moments and given again, fills metrics, checkpoint and lake once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from killed import Killer

from pipeline.checks import run_checks
from pipeline.lake import Lake

pytestmark = pytest.mark.slow

NUM_KILLS = 4
CONFIG = """
[sampling]
max_tokens = 64
[train]
optim_steps = 8
prompts_per_step = 3
group_size = 4
echo_source = "online"
max_clip_uses = 2
checkpoint_every = 2
"""


def left_behind(lake: Path):
    """What a training left in the lake's folder and tables, but for times."""
    (metrics,) = lake.glob("runs/train/training-*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["tokens_per_second"]
    with Lake.open(lake).reader() as reader:
        assert [check for check in run_checks(reader) if check.num_offending] == []
        uses = reader.rows(
            "select training_id, clip_id, optim_step, clip_loss from clip_uses order by optim_step, clip_id"
        )
        rollouts = reader.rows(
            "select rollout_id, policy_version, reward, logprobs from rollouts order by rollout_id"
        )
    return lines, (metrics.parent / "checkpoint" / "model.safetensors").read_bytes(), uses, str(rollouts)


def test_a_command_killed_at_random_moments_ends_as_one_that_was_left_alone(tmp_path):
    config = tmp_path / "train.toml"
    config.write_text(CONFIG)
    killer = Killer(seed=5, log=tmp_path / "log")
    assert killer.run("train", "--config", config, "--lake", tmp_path / "calm") == 0
    for _ in range(NUM_KILLS):
        killer.kill("train", "--config", config, "--lake", tmp_path / "killed")
    assert killer.num_kills > 0
    assert killer.run("train", "--config", config, "--lake", tmp_path / "killed") == 0
    calm = left_behind(tmp_path / "calm")
    assert left_behind(tmp_path / "killed") == calm
    assert len(calm[0]) == 8
    assert calm[2]
