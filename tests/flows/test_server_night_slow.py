"""A night whose rollouts come from a real `vllm serve`, as a user runs it."""

import subprocess
from pathlib import Path

import pytest
from nights import ECHOMINE, night_config, rows

pytestmark = pytest.mark.slow

POLICY = "from rollouts where origin = 'policy'"


def test_a_night_on_a_server_is_scored_mined_and_generated_once(
    arith_server: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    lake = tmp_path / "lake"
    server = f'kind = "server"\nserver.endpoints = ["{arith_server}"]\n'
    settings = night_config(tmp_path / "night.toml", optim_steps=1, engine=server)

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
