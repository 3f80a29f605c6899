"""What takes longer: nights that are killed, scheduled, deployed, and sampled by a real language model."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from nights import ECHOMINE, night_config, rows
from vllm_server import free_port

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
SECONDS = 600  # what takes longer hangs


@pytest.fixture
def config(tmp_path):
    return night_config(tmp_path / "night.toml", optim_steps=2)


@contextmanager
def running(arguments, environment, **options):
    """A process in a group of its own, killed whole at the end."""
    process = subprocess.Popen(arguments, env=environment, start_new_session=True, cwd=PROJECT, **options)
    try:
        yield process
    finally:
        kill(process)


def kill(process):
    with suppress(ProcessLookupError):  # it ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(condition, process, log):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def num_groups(lake):
    if not (lake / "catalog.sqlite").exists():
        return 0
    return rows(lake, "select count(distinct group_id) as n from rollouts where origin = 'policy'")[0]["n"]


def test_a_night_killed_again_and_again_ends_as_one_that_was_left_alone(
    tmp_path, environment, config, prefect_url
):
    environment |= {"PREFECT_API_URL": prefect_url}
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    generate = [ECHOMINE, "generate", "--config", str(config), "--lake"]
    subprocess.run([*generate, str(calm)], env=environment, check=True, cwd=PROJECT)
    log = tmp_path / "log-sampling"
    with running([*generate, str(stormy)], environment, stderr=log.open("w")) as process:
        wait_until(lambda: num_groups(stormy) >= 9, process, log)  # killed wherever it stands then
    nightly = [ECHOMINE, "nightly", "--config", str(config), "--lake", str(stormy)]
    log = tmp_path / "log-training"
    with running(nightly, environment, stderr=log.open("w")) as process:
        trained = "select count(*) as n from rollouts where origin = 'trainer'"
        wait_until(lambda: rows(stormy, trained)[0]["n"] > 0, process, log)
    done = subprocess.run(nightly, env=environment, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr
    sampled = "select rollout_id from rollouts where origin = 'policy' order by rollout_id"
    assert rows(stormy, sampled) == rows(calm, sampled)
    for table, key in (
        ("rollouts", "group_id, sample_index"),
        ("echo_clips", "mining_id, clip_id"),
        ("clip_uses", "training_id, clip_id, optim_step"),
    ):
        assert rows(stormy, f"select {key} from {table} group by all having count(*) > 1") == []
    assert len(rows(stormy, "from mining_runs")) == 1
    assert not list((stormy / "runs").glob("*/staging"))


def test_a_second_night_waits_for_the_first(tmp_path, environment, config, prefect_url):
    environment |= {"PREFECT_API_URL": prefect_url}
    lake = tmp_path / "lake"
    nightly = [ECHOMINE, "nightly", "--config", str(config), "--lake", str(lake)]
    log = tmp_path / "first"
    with running(nightly, environment, stderr=log.open("w"), stdout=subprocess.DEVNULL) as first:
        wait_until(lambda: (lake / "nightly.lock").exists(), first, log)
        second = subprocess.run(nightly, env=environment, cwd=PROJECT, capture_output=True, text=True)
        assert "Another night is running" in second.stderr
        assert "Nothing was generated" in second.stdout
        assert second.returncode in (0, 3)
        assert first.wait(timeout=SECONDS) in (0, 3)
    assert len(rows(lake, "from mining_runs")) == 1


def test_a_scheduled_night_fires(tmp_path, environment, config):
    environment |= {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}
    lake, log = tmp_path / "lake", tmp_path / "log"
    arguments = [ECHOMINE, "nightly", "--config", str(config), "--lake", str(lake), "--serve"]
    with running([*arguments, "--cron", "* * * * *"], environment, stderr=log.open("w")) as process:
        wait_until(lambda: list(lake.glob("runs/*/report.html")), process, log)
        api = environment["PREFECT_API_URL"]
        runs = httpx.post(f"{api}/flow_runs/filter", json={}).json()
        assert any(run["auto_scheduled"] and run["name"] == "nightly 2026-05-31 arith" for run in runs)


def test_prefect_yaml_deploys_the_flow_to_a_work_pool(environment, prefect_url):
    environment |= {"PREFECT_API_URL": prefect_url}
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    subprocess.run(
        [*prefect, "work-pool", "create", "--type", "process", "echomine"],
        env=environment, check=True, cwd=PROJECT, capture_output=True,
    )  # fmt: skip
    done = subprocess.run(
        [*prefect, "deploy", "--all"], env=environment, cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nightly/nightly" in done.stdout


def test_a_real_language_model_runs_a_night_on_reasoning_gym(tmp_path, environment):
    lake, config = tmp_path / "lake", tmp_path / "night.toml"
    config.write_text(
        """
        model = "smollm2"
        prompts = "reasoning_gym:chain_sum?size=2&max_terms=2&max_digits=1"
        [sampling]
        group_size = 4
        max_tokens = 48
        [verify]
        verifier = "reasoning_gym"
        [mining]
        scope = "any_success"
        [train]
        optim_steps = 0
        """
    )
    nightly = [ECHOMINE, "nightly", "--config", str(config), "--lake", str(lake)]
    done = subprocess.run(nightly, env=environment, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr
    [facts] = rows(
        lake,
        "select count(*) as n, max(list_max(completion_entropies)) as highest, "
        "min(list_min(completion_entropies)) as lowest from rollouts",
    )
    assert facts["n"] == 8
    assert 0 <= facts["lowest"] < facts["highest"] <= 10.81  # ln of SmolLM2's 49,152 tokens
