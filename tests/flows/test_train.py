"""`echomine train` as a user sees it: on shards of a mined lake, into a lake of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from flows.cli import main
from pipeline.checks import run_checks
from pipeline.lake import Lake

OPTIONS = ["--optim-steps", "1", "--prompts-per-step", "2", "--group-size", "2", "--clips-per-step", "2"]


@pytest.fixture
def shards(tmp_path: Path, lake: Path) -> Path:
    assert main(["export", "shards", str(tmp_path / "shards"), "--lake", str(lake)]) == 0
    return tmp_path / "shards"


def test_a_training_says_its_clip_loss_and_keeps_its_rollouts_and_uses(shards, tmp_path, capfd):
    capfd.readouterr()
    assert main(["train", str(shards), "--lake", str(tmp_path / "own"), *OPTIONS]) == 0
    steps, losses = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"1 optimizer steps; checkpoint in .+/checkpoint", steps)
    assert re.fullmatch(r"EchoClip loss \d+\.\d{4} → \d+\.\d{4} nats/token", losses)
    (folder,) = (tmp_path / "own" / "runs" / "train").iterdir()
    assert main(["report", "--train", folder.name, "--lake", str(tmp_path / "own")]) == 0
    assert capfd.readouterr().out == f"{folder / 'report.html'}\n"
    assert "<h1>arith · grpo</h1>" in (folder / "report.html").read_text()
    with Lake.open(tmp_path / "own").reader() as reader:
        assert reader.rows("select count(*) as n from rollouts where origin = 'trainer'")[0]["n"] == 4
        assert reader.rows("select count(*) as n from clip_uses")[0]["n"] > 0


def test_another_verifier_makes_another_training(shards, tmp_path, monkeypatch):
    (tmp_path / "ours.py").write_text("def always(completion, prompt):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    train = ["train", str(shards), "--lake", str(tmp_path / "own"), *OPTIONS]
    assert main(train) == 0
    assert main([*train, "--verifier", "ours:always"]) == 0
    folders = list((tmp_path / "own" / "runs" / "train").iterdir())
    assert len(folders) == 2
    rewards = [json.loads((f / "metrics.jsonl").read_text().splitlines()[0])["reward_mean"] for f in folders]
    assert 1.0 in rewards
    assert rewards != [1.0, 1.0]


def test_without_shards_the_clips_are_of_the_trainings_own_rollouts(tmp_path, capfd):
    options = [
        "--optim-steps",
        "2",
        "--prompts-per-step",
        "4",
        "--group-size",
        "4",
        "--echo-source",
        "online",
    ]
    capfd.readouterr()
    assert main(["train", "--lake", str(tmp_path / "own"), *options]) == 0
    used = capfd.readouterr().out.splitlines()[1]
    assert re.fullmatch(r"\d+ uses of EchoClips; none of shards", used)
    with Lake.open(tmp_path / "own").reader() as reader:
        assert reader.rows("select count(*) as n from clip_uses")[0]["n"] == int(used.split()[0]) > 0
    assert main(["mine", "--lake", str(tmp_path / "own")]) == 0
    with Lake.open(tmp_path / "own").reader() as reader:
        mined = reader.rows("select 'online-' || clip_id as clip_id from echo_clips")
        used_clips = reader.rows("select distinct clip_id from clip_uses")
        assert [check for check in run_checks(reader) if check.num_offending] == []
    assert {row["clip_id"] for row in mined} & {row["clip_id"] for row in used_clips}


def test_a_prompt_or_clip_that_may_not_fit_batch_tokens_is_refused_before_anything_starts(
    refused, shards, tmp_path
):
    new = tmp_path / "new-lake"
    line = refused("train", shards, "--lake", new, *OPTIONS, "--batch-tokens", 100)
    assert re.search(
        r"Prompt \w+ \('.+'\) has \d+ tokens; with sampling\.max_tokens = 256 that makes 2\d\d, and "
        r"train\.batch_tokens, which one forward pass takes, is 100\. Raise it, lower max_tokens, or",
        line,
    )
    assert line == refused("nightly", "--config", _config(tmp_path, "batch_tokens = 100"))
    short = _config(tmp_path, "batch_tokens = 20\n[sampling]\nmax_tokens = 1")
    line = refused("train", shards, "--lake", new, *OPTIONS, "--config", short)
    assert re.search(r"longest clip of the shards has \d\d tokens .* is 20\. Raise it, or export with", line)
    assert not new.exists()


def test_shards_are_asked_for_where_clips_come_from_them(refused):
    assert "Give the folder of SHARDS, or --echo-source online" in refused("train", *OPTIONS)


def test_an_objective_that_learns_from_experts_needs_some_in_the_lake(refused, shards):
    line = refused("train", shards, *OPTIONS, "--objective", "luffy")
    assert "no expert's solution" in line
    assert "echomine import rollouts" in line
    line = refused("nightly", "--config", _config(shards.parent, 'objective = "uft"'))
    assert "no expert's solution" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--echo-weight", "-0.1"], "`train.echo_weight` in the options is -0.1"),
        (["--correction-cap", "2"], "`train.correction_cap` belongs to a correction"),
        (
            ["--objective", "grpo", "--config", "dapo.toml"],
            "belongs to the objective dapo, and train.objective",
        ),
    ],
)
def test_options_without_sense_are_refused(refused, shards, tmp_path, monkeypatch, options, message):
    (tmp_path / "dapo.toml").write_text("[train.dapo]\nclip_high = 0.3\n")
    monkeypatch.chdir(tmp_path)
    assert message in refused("train", shards, *OPTIONS, *options)


def _config(folder: Path, line: str) -> Path:
    path = folder / "night.toml"
    path.write_text(f"[train]\n{line}\n")
    return path
