"""`echomine import rollouts`, as users type it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dumps
import pytest
from sample_lake import character_tokenizer

from flows.cli import main
from pipeline.lake import Lake

FIXTURES = Path(__file__).parents[1] / "pipeline" / "formats" / "dumps"
VERL = FIXTURES / "verl" / "v0" / "7.jsonl"
TRL = sorted((FIXTURES / "trl" / "text").glob("*.parquet"))


def test_a_text_dump_is_imported_scored_and_mined(tmp_path, capfd):
    lake = ["--lake", str(tmp_path / "lake")]
    command = ["import", "rollouts", str(VERL), *map(str, TRL), "--score-with", "arith", "--json", *lake]
    assert main(command) == 0
    output, errors = capfd.readouterr()
    assert json.loads(output) == {"written": 12, "known": 0, "refused": 0, "scored": 12}
    assert errors.splitlines() == [
        "TRL's dump names no groups: neighbouring rows with the same prompt and step were taken as one. "
        "The reward is the sum of correct, steps.",
        "verl's v0 dump names no groups: rows of one file with the same `input` were taken as one.",
    ]
    assert main(command) == 0
    assert json.loads(capfd.readouterr().out) == {"written": 0, "known": 12, "refused": 0}
    with Lake.open(tmp_path / "lake").reader() as reader:
        kinds = reader.rows("select entropy_kind, count(*) as n from rollouts group by entropy_kind")
    assert kinds == [{"entropy_kind": "rescored", "n": 12}]
    assert main(["mine", "--json", *lake]) == 0
    assert json.loads(capfd.readouterr().out)["groups"]["all_success"] == 1


def test_only_what_was_imported_is_scored(tmp_path, capfd):
    lake, tokenizer = ["--lake", str(tmp_path / "lake")], ["--tokenizer", str(dumps.MODEL)]
    assert main(["import", "rollouts", str(TRL[0]), *tokenizer, *lake]) == 0
    output, errors = capfd.readouterr()
    assert output == "written 4, known 0, refused 0\n"
    assert "4 rollouts have no entropies yet" in errors
    assert f"echomine score --model MODEL --lake {tmp_path / 'lake'}" in errors
    assert main(["import", "rollouts", str(VERL), "--score-with", "arith", *lake]) == 0
    assert capfd.readouterr().out == "written 4, known 0, refused 0, scored 4\n"


def test_a_scorer_of_another_tokenizer_is_refused_before_anything_is_written(refused, tmp_path):
    folder = tmp_path / "tokenizer"
    character_tokenizer().save_pretrained(folder)
    line = refused(
        *("import", "rollouts", VERL, "--tokenizer", folder, "--score-with", "arith"),
        *("--lake", tmp_path / "lake"),
    )
    assert "arith has another tokenizer than" in line
    assert str(folder) in line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([VERL], ["no tokenizer is given", "Give --tokenizer"]),
        ([VERL, "--score-with", "arit"], ["no model `arit`", "did you mean `arith`?"]),
        ([VERL, "--format", "verll"], ["--format", "'verll'", "canonical"]),
        ([TRL[0], "--format", "canonical", "--tokenizer", dumps.MODEL], ["no column `group_id`"]),
        ([VERL, "--format", "trl", "--tokenizer", dumps.MODEL], ["is no complete Parquet file"]),
        ([FIXTURES / "README.md", "--tokenizer", dumps.MODEL], ["neither .parquet nor .jsonl", "--format"]),
    ],
)
def test_a_mistake_makes_no_lake(refused, tmp_path, arguments, parts):
    line = refused("import", "rollouts", *arguments, "--lake", tmp_path / "lake")
    for part in parts:
        assert part in line
    assert not (tmp_path / "lake").exists()


def test_the_first_refusal_is_named_however_its_format_names_places(tmp_path, capfd):
    shutil.copytree(FIXTURES / "echorl" / "step_6", tmp_path / "step_6")
    path = tmp_path / "step_6" / "samples.json"
    dump = json.loads(path.read_text())
    for category in ("correct_rollouts", "wrong_rollouts", "golden_trajectories"):
        for sample in dump[category]:
            sample["reward"] = "high"
    path.write_text(json.dumps(dump))
    options = ["--tokenizer", str(dumps.MODEL), "--lake", str(tmp_path / "lake")]
    assert main(["import", "rollouts", str(path), *options]) == 2
    output, errors = capfd.readouterr()
    assert "written 0, known 0, refused" in output
    assert f"such as {path}:correct_rollouts[0]: " in errors
    assert "None was imported; mend them and import again" in errors
    assert "others" not in errors
