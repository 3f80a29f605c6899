"""The examples of docs/trainer.md, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from arith_shards import export_arith_shards
from test_adapter_verl import TWO_STEPS, rollouts, steps_without_clips
from verl_workers import Workers, trainer_of, verl_config

from pipeline.models import PROJECT, load_model, model_folder
from pipeline.tokenization import load_tokenizer

EXAMPLES = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "trainer.md").read_text(), re.DOTALL)
LOOP, STREAM, TRL, VERL, PRIME_RL = EXAMPLES
WITH_PROJECT = {**os.environ, "PYTHONPATH": str(PROJECT)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the paths of the examples are."""
    export_arith_shards(tmp_path / "lake", tmp_path / "data" / "shards")
    (tmp_path / "data" / "arith").symlink_to(PROJECT / "data" / "arith")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("folder")
def test_the_loop_of_the_page_takes_steps_on_all_clips():
    names = {}
    exec(LOOP, names)
    assert names["loss"].item() > 0
    assert {int(state["step"]) for state in names["optimizer"].state.values()} == {3}
    assert len(names["clips"].next_batch()) == 4


@pytest.mark.usefixtures("folder")
def test_the_stream_of_the_page_reads_all_clips_in_each_epoch():
    # in a process of its own: its workers are forked, which they cannot be after another test ran a flow
    ran = subprocess.run([sys.executable, "-c", STREAM], env=WITH_PROJECT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("torch.Size") == 3 * 2, "four clips over two workers"


@pytest.mark.usefixtures("folder")
def test_the_trl_example_of_the_page_trains_ten_steps_and_logs_echo_loss():
    names = {}
    exec(TRL, names)
    logged = [line for line in names["trainer"].state.log_history if "echo_loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 11))
    assert all(line["echo_loss"] > 0 for line in logged)


@pytest.mark.usefixtures("folder")
def test_the_verl_example_of_the_page_adds_the_clips_to_verls_steps():
    names = {}
    exec(VERL, names)
    model, tokenizer = load_model(model_folder("arith"), "cpu"), load_tokenizer(model_folder("arith"))
    config = verl_config(**TWO_STEPS, **{"policy_loss.loss_mode": "echo_vanilla"})
    workers = Workers(model, config)
    trainer_of(names["EchoTrainer"], config, tokenizer, workers)._update_actor(rollouts())
    plain = steps_without_clips(model, tokenizer, "vanilla", **TWO_STEPS)
    assert len(workers.steps) == len(plain) == 2
    for (loss, _), (without, _) in zip(workers.steps, plain, strict=True):
        assert 0 < loss - without < 0.01, "0.001 · EchoClip loss"


@pytest.mark.usefixtures("folder")
def test_the_prime_rl_example_of_the_page_has_samples_of_a_step():
    names = {}
    exec(PRIME_RL, names)
    assert {len(row["token_ids"]) for row in names["step"]} == {
        len(row["ce_weights"]) for row in names["step"]
    }
