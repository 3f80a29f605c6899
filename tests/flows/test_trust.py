"""`echomine reverify` and `echomine forget`, as users type them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dumps
import pytest

from flows.cli import main
from pipeline.lake import Lake

FALSE = "3+4"  # its two successes are false: the completions say 42
UNKNOWN = "0" * 32


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mined lake of four groups, one of them of false successes. Tests change copies of it."""
    folder = tmp_path_factory.mktemp("trusted")
    false = dumps.group("false", [1.0, 1.0], seed=3, prompt=FALSE, ground_truth="7")
    dump = dumps.write_jsonl(folder / "night.jsonl", [*dumps.night(), *false])
    lake = folder / "lake"
    assert main(["import", "rollouts", str(dump), "--tokenizer", str(dumps.MODEL), "--lake", str(lake)]) == 0
    assert main(["mine", "--lake", str(lake)]) == 0
    return lake


@pytest.fixture
def folder(mined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy with an export of its own, in the folder `out`."""
    shutil.copytree(mined, tmp_path / "lake")
    monkeypatch.setenv("ECHOMINE_LAKE", str(tmp_path / "lake"))
    assert main(["export", "sft", str(tmp_path / "out"), "--tokenizer", str(dumps.MODEL)]) == 0
    return tmp_path / "lake"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):
    """Runs the command; returns its exit code, its output and the lines of its errors."""

    def command(*arguments: object) -> tuple[int, str, list[str]]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        output, errors = capfd.readouterr()
        return code, output, errors.splitlines()

    return command


def num(lake: Path, sql: str) -> int:
    with Lake.open(lake).reader() as reader:
        return int(reader.rows(f"select count(*) as n from {sql}")[0]["n"])


def notice(lake: Path) -> dict[str, list[str]]:
    (path,) = lake.parent.glob("out/*/withdrawn.json")
    return json.loads(path.read_text())


def prompt_file(folder: Path) -> Path:
    return dumps.write_jsonl(folder / "evaluation.jsonl", [{"prompt": FALSE, "ground_truth": "7"}])


def test_false_successes_are_told_and_their_clips_withdrawn(folder, run):
    code, output, errors = run("reverify", "--verifier", "exact")
    counts, heading, *table, shard = output.splitlines()
    assert code == 0
    assert counts.startswith(
        "judged 8, failed 0, known 0, unknown prompt 0, no ground truth 0, no verifier 0"
    )
    assert counts.endswith("withdrawn clips 1")
    assert heading.startswith("Disagreements in the lake")
    assert "exact" in "\n".join(table)
    assert shard.startswith(f"shard {folder.parent / 'out'}")
    assert shard.endswith(
        "1 clips; withdrawn.json beside it names them, and `echomine train` leaves them out"
    )
    assert "Copies of these shards elsewhere know nothing of it" in errors[-1]
    assert len(notice(folder)["overturned"]) == 1
    assert num(folder, "rollouts where reward = 1") == 5, "nothing is overwritten"


def test_what_was_judged_is_not_judged_again_and_json_says_the_same(folder, run):
    for judged, known in ((8, 0), (0, 8)):
        code, output, _ = run("reverify", "--verifier", "exact", "--json")
        answer = json.loads(output)
        assert code == 0
        assert (answer["judged"], answer["known"], answer["withdrawn_clips"]) == (judged, known, 1)
        assert [shard["noticed"] for shard in answer["shards"]] == [True]
        assert [row["verifier"] for row in answer["disagreements"]] == ["exact"]
    assert num(folder, "verdicts") == 8


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["None of the 6 rollouts names a built-in verifier", "--verifier NAME or module:function"]),
        (["--verifier", "exacct"], ["`exacct`", "exact"]),
        (["--verifier", "no_such_module:judge"], ["no_such_module"]),
        (["--verifier", "exact", "--prompt", UNKNOWN], ["no rollout of that run, night and prompt"]),
        (["--verifier", "exact", "--run", "none"], ["select distinct run_id, night from rollouts"]),
        (["--verifier", "exact", "--night", "soon"], ["--night", "'soon'"]),
    ],
)
def test_who_cannot_judge_or_has_nothing_to_judge_is_told(refused, arguments, parts):
    line = refused("reverify", *arguments)
    for part in parts:
        assert part in line


def test_what_would_go_is_said_before_it_goes(folder, run):
    path = prompt_file(folder.parent)
    code, output, errors = run("forget", "--prompt", path)
    assert (code, output) == (2, "")
    assert errors == [
        "This would remove 2 rollouts of 1 prompts, 1 clips, 0 refused rows.",
        "echomine: Nothing was removed. Give --yes to remove it for good; all older snapshots end with it.",
    ]
    assert num(folder, "rollouts") == 8


def test_a_forgotten_prompt_is_gone_and_what_remains_is_named(folder, run):
    path = prompt_file(folder.parent)
    code, output, errors = run("forget", "--prompt", path, "--yes")
    counts, shard = output.splitlines()
    assert code == 0
    assert counts == (
        "prompts forgotten 1, rollouts removed 2, verdicts removed 0, scorings removed 0, "
        "echo clips removed 1, clip uses removed 0, prompts removed 1, quarantine removed 0"
    )
    assert "Copies of these shards elsewhere know nothing of it" in errors[-1]
    assert "out" in shard
    assert len(notice(folder)["forgotten"]) == 1
    assert (num(folder, "rollouts"), num(folder, "snapshots")) == (6, 1)
    code, output, errors = run("forget", "--prompt", path, "--yes", "--json")
    answer = json.loads(output)
    assert (code, errors, answer["prompts"], set(answer["rows"].values())) == (0, [], 1, {0})


def test_a_prompt_that_is_forgotten_before_it_comes_is_refused_by_the_import(folder, run, tmp_path):
    path = dumps.write_jsonl(tmp_path / "evaluation.jsonl", [{"prompt": "5+6", "ground_truth": "11"}])
    code, _, errors = run("forget", "--prompt", path, "--yes")
    nothing = "The lake held nothing more of them. Imports and nights leave them out from now on."
    assert (code, errors) == (0, [nothing])
    rows = [*dumps.group("new", [1.0, 0.0]), *dumps.group("out", [1.0, 1.0], prompt="5+6")]
    dump = dumps.write_jsonl(tmp_path / "night.jsonl", rows)
    code, output, _ = run("import", "rollouts", dump, "--tokenizer", dumps.MODEL)
    assert (code, output) == (2, "written 2, known 0, refused 2\n")
    assert num(folder, "quarantine where reason = 'the prompt was forgotten'") == 2


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("none.jsonl", ["none.jsonl", "Check the path"]),
        ("none.txt", ["'none.txt' is neither a prompt id (32 hexadecimal digits, or one of"]),
        (UNKNOWN[1:], ["is neither a prompt id", "select prompt_id, messages from prompts"]),
    ],
)
@pytest.mark.parametrize("yes", [[], ["--yes"]], ids=["asking", "doing"])
def test_a_name_of_no_prompt_removes_nothing(refused, name, parts, yes):
    line = refused("forget", "--prompt", name, *yes)
    for part in parts:
        assert part in line


def test_whoever_names_no_prompt_is_asked_for_one(refused):
    assert "--prompt" in refused("forget", "--yes")
