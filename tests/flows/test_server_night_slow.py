"""A night whose rollouts come from a real `vllm serve`, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.lake import Lake

pytestmark = pytest.mark.slow

ECHOMINE = str(Path(sys.executable).with_name("echomine"))
POLICY = "from rollouts where origin = 'policy'"


def config(url: str) -> str:
    return f"""
    max_prompts = 24
    night = "2026-05-31"
    [sampling]
    group_size = 4
    max_tokens = 64
    [engine]
    kind = "server"
    batch_rollouts = 16
    [engine.server]
    endpoints = ["{url}"]
    [train]
    optim_steps = 1
    prompts_per_step = 2
    group_size = 4
    clips_per_step = 4
    """


def rows(lake: Path, sql: str) -> list[dict]:
    with Lake.open(lake).reader() as reader:
        return reader.rows(sql)


def test_a_night_on_a_server_is_scored_mined_and_generated_once(arith_server: str, tmp_path: Path) -> None:
    lake, settings = tmp_path / "lake", tmp_path / "night.toml"
    settings.write_text(config(arith_server))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = clean | {"PREFECT_HOME": str(tmp_path / "prefect")}

    def echomine(command: str) -> str:
        arguments = [ECHOMINE, command, "--config", str(settings), "--lake", str(lake)]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "Servers tell no entropies" in echomine("generate")
    sampled = rows(lake, f"select rollout_id {POLICY} order by all")
    assert len(sampled) == 24 * 4
    assert rows(lake, f"select count(completion_entropies) as n {POLICY}") == [{"n": 0}]

    assert "96 rollouts scored" in echomine("nightly")
    assert rows(
        lake,
        "select logprobs_kind, entropy_kind, "
        "bool_and(len(completion_logprobs) = len(completion_ids)) as logprobs, "
        f"bool_and(len(completion_entropies) = len(completion_ids)) as entropies {POLICY} group by all",
    ) == [{"logprobs_kind": "raw", "entropy_kind": "rescored", "logprobs": True, "entropies": True}]
    clips = rows(lake, "select clip_id from echo_clips order by all")
    assert clips

    assert "Nothing was generated" in echomine("nightly")
    assert rows(lake, f"select rollout_id {POLICY} order by all") == sampled
    assert rows(lake, "select clip_id from echo_clips order by all") == clips
    assert rows(lake, "select count(*) as n from scorings") == [{"n": 96}]
