"""Two processes (gloo, FSDP2) against one, on the same training."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from arith_shards import export_arith_shards
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from flows.cli import main
from flows.processes import check_devices
from pipeline.config import SamplingConfig, TrainConfig
from pipeline.engines.transformers import TransformersEngine
from pipeline.errors import ConfigError
from pipeline.models import PROJECT, load_model, model_folder
from pipeline.prompts import read_prompts
from pipeline.records import Judgement
from pipeline.shards import load_clips
from pipeline.tokenization import load_tokenizer, tokenizer_hash
from trainer.loop import train
from trainer.ranks import ALONE, joined_ranks
from trainer.sharding import sharded

ECHOMINE = Path(sys.executable).with_name("echomine")
CONFIG = TrainConfig(
    optim_steps=5, prompts_per_step=4, group_size=4, clips_per_step=3, echo_source="both", echo_weight=0.1,
    lr=1e-3, batch_tokens=100, checkpoint_every=2, tensorboard=False,
)  # fmt: skip
PLAIN = CONFIG.model_copy(update={"echo_weight": 0.0, "echo_source": "shards", "optim_steps": 3})
FIGURES = ("loss", "rl_loss", "echo_loss", "grad_norm", "entropy_mean", "ratio_mean", "mismatch_kl")
# One process's losses, and what is computed of the same values: sums in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def judge(groups):
    """Mixed groups and solved ones."""
    return [
        [Judgement(float(len(group.prompt_ids) % 2 or sample.sample_index % 2)) for sample in group.samples]
        for group in groups
    ]


def run(folder: Path, ranks, uses_file="uses-0.json", config=CONFIG):
    """One process's part of the training, which goes on from what lies in its folder."""
    source = model_folder("arith")
    tokenizer, model = load_tokenizer(source), load_model(source, "cpu", "float32")
    clips = load_clips(folder.parent / "shards", tokenizer_hash(tokenizer))
    uses: list[object] = []
    train(
        model, tokenizer, TransformersEngine(model, tokenizer), read_prompts("arith", 12), clips, config,
        SamplingConfig(max_tokens=12), judge, lambda *_: None, uses.extend, folder, "training", 0,
        ranks=ranks,
    )  # fmt: skip
    if ranks.is_first:
        (folder / uses_file).write_text(json.dumps(uses))


def process(rank: int, port: int, folder: Path, num_runs: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with joined_ranks(on_cuda=False) as ranks:
        for number in range(num_runs):
            run(folder, ranks, f"uses-{number}.json")
        run(folder.with_name("two-plain"), ranks, config=PLAIN)
        check_that_layers_are_spread_after_use(ranks)


def check_that_layers_are_spread_after_use(ranks) -> None:
    model = sharded(load_model(model_folder("arith"), "cpu", "float32"), ranks)
    with torch.no_grad():
        model(input_ids=torch.arange(4)[None])
    for layer in model.get_decoder().layers:
        assert all(isinstance(param, DTensor) for param in layer.parameters())


def run_by_two(folder: Path, num_runs: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(process, args=(port, folder, num_runs), nprocs=2)


def steps_of(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a training by one process, with the shards beside it."""
    folder = tmp_path_factory.mktemp("distributed")
    export_arith_shards(folder / "lake", folder / "shards")
    run(folder / "one", ALONE)
    run(folder / "one-plain", ALONE, config=PLAIN)
    return folder / "one"


def uses_in(folder: Path, name: str):
    return [(clip_id, step) for clip_id, step, _ in json.loads((folder / name).read_text())]


def test_two_processes_give_one_processs_curve_weights_and_uses_also_after_a_restart(one):
    two = one.with_name("two")
    run_by_two(two, num_runs=2)  # the second goes on from the state before the last step
    steps, expected = steps_of(two), steps_of(one)
    assert len(steps) == len(expected) == 5
    assert any(step["num_clips"] > 3 for step in expected), "some are of the batch"
    for step, of_one in zip(steps, expected, strict=True):
        for name in FIGURES:
            torch.testing.assert_close(step[name], of_one[name], **CLOSE)
        for name in ("policy_version", "reward_mean", "num_clips", "num_completion_tokens", "skipped"):
            assert step[name] == of_one[name]
        assert step["padding_share"] < 0.5, "both have rows of their own"
    weights, of_one = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (two, one))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, of_one[name], rtol=1e-4, atol=2e-5)
    assert uses_in(two, "uses-0.json") == uses_in(one, "uses-0.json")
    again = uses_in(two, "uses-1.json")
    assert again == [use for use in uses_in(one, "uses-0.json") if use[1] == 4]
    assert not list(two.glob(".rank-*")), "only the first one's files stay"

    # without a weight the clips' forward passes have no backward pass behind them
    plain, of_one = (steps_of(one.with_name(name)) for name in ("two-plain", "one-plain"))
    for step, expected_step in zip(plain, of_one, strict=True):
        for name in FIGURES:
            torch.testing.assert_close(step[name], expected_step[name], **CLOSE)

    run(two, ALONE, "alone.json")  # one process goes on with a state of two
    assert uses_in(two, "alone.json") == again
    torch.testing.assert_close(steps_of(two)[4]["loss"], expected[4]["loss"], **CLOSE)


def arguments(folder: Path, *more: object) -> list[str]:
    given = [
        ECHOMINE, "train", folder / "shards", "--lake", folder / "lake", "--optim-steps", 2,
        "--prompts-per-step", 2, "--group-size", 2, *more,
    ]  # fmt: skip
    return [str(argument) for argument in given]


def test_more_processes_than_cores_are_refused_before_anything_is_written(one, tmp_path, capfd, monkeypatch):
    there = len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # as an engine of vLLM in this process leaves it
    lake = tmp_path / "lake"
    assert main([*arguments(one.parent, "--nproc", there + 1)[1:], "--lake", str(lake)]) == 2
    too_many = f"--nproc {there + 1} is more than the {there} cores of this machine"
    assert capfd.readouterr() == ("", f"echomine: {too_many}. Give {there} or less.\n")
    assert not lake.exists()


def test_processes_that_would_share_one_gpu_are_refused():
    with pytest.raises(ConfigError, match=r"cuda:1 is one GPU, and --nproc 2 .* engine\.device to cuda or"):
        check_devices(2, "cuda:1")


def test_more_processes_of_torchruns_than_cores_are_refused_as_well(one, tmp_path, capfd, monkeypatch):
    there = len(os.sched_getaffinity(0))
    for name, value in {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": there + 1, "WORLD_SIZE": there + 1}.items():
        monkeypatch.setenv(name, str(value))
    assert main([*arguments(one.parent)[1:], "--lake", str(tmp_path / "lake")]) == 2
    too_many = f"--nproc-per-node {there + 1} is more than the {there} cores of this machine"
    assert capfd.readouterr() == ("", f"echomine: {too_many}. Give {there} or less.\n")


@pytest.mark.slow
def test_the_command_trains_with_two_processes_and_one_that_is_killed_ends_it_in_a_line(one):
    done = subprocess.run(arguments(one.parent, "--nproc", 2), capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 optimizer steps") == 1

    (folder,) = (path.parent for path in (one.parent / "lake" / "runs" / "train").glob("*/training.json"))
    (folder / "training.json").unlink()
    (folder / ".rank-1" / "metrics.jsonl").mkdir(parents=True)  # the second process alone cannot write
    done = subprocess.run(arguments(one.parent, "--nproc", 2), capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 2
    assert re.fullmatch(r"echomine: Process 1 of 2 failed: .*metrics\.jsonl.*\n", done.stderr)
    shutil.rmtree(folder)

    running = subprocess.Popen(
        arguments(one.parent, "--nproc", 2, "--optim-steps", 500),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT,
    )  # fmt: skip
    try:
        started = one.parent / "lake" / "runs" / "train"
        while not any(path.stat().st_size for path in started.glob("*/metrics.jsonl")):
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.2)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)  # the one that was started last
        _, errors = running.communicate(timeout=600)
    finally:
        running.kill()
    assert running.returncode == 2
    assert errors == "echomine: Process 1 of 2 was ended by SIGKILL. Start the training again to go on.\n"
