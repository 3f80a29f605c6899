"""A user's mistake costs one line of what, where and what to do; exit code 2, and nothing is written."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import dumps
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from attempts import EXTENSIONS, FILES, NETWORK, WRITES
from refusals import says

from flows.cli import main
from pipeline.engines import vllm_start

# Prompts


@pytest.mark.parametrize("command", ["generate", "nightly"])
def test_a_missing_prompt_file_is_named_before_anything_starts(refused, tmp_path, command):
    new = tmp_path / "new-lake"
    line = refused(command, "--lake", new, "--prompts", tmp_path / "none.jsonl")
    says(line, tmp_path / "none.jsonl", "Check the path")
    assert not new.exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            '{"prompt": "1+1", "ground_truth": "2"}\n{"prompt": "8+',
            ["line 2", "not JSON", "one JSON object a line"],
        ),
        ('{"ground_truth": "42"}\n', ["line 1", "no `prompt`", "Mend the row"]),
        ('{"prompt": 7}\n', ["line 1", "`prompt` is 7"]),
        ("", ["is empty", "Write it again"]),
        ("\n\n", ["holds no prompts"]),
    ],
    ids=["cut-off line", "no prompt", "a number", "empty file", "blank lines"],
)
def test_a_malformed_prompt_file_names_its_line(refused, tmp_path, content, parts):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    says(refused("generate", "--prompts", path), path, *parts)


def test_a_cut_off_prompt_parquet_is_named(refused, tmp_path):
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["1+1"] * 50, "ground_truth": ["2"] * 50}), path)
    path.write_bytes(path.read_bytes()[:-20])
    says(refused("generate", "--prompts", path), path, "no whole Parquet file", "Copy or write it again")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("reasoning_gym:chain_sun", ["`chain_sun`", "did you mean `chain_sum`?"]),
        ("reasoning_gym:chain_sum?max_tems=3", ["`max_tems`", "did you mean `max_terms`?"]),
        ("reasoning_gym:chain_sum?size=many", ["`size`", "'many'", "whole number"]),
        ("reasoning_gym:chain_sum?size=2&min_terms=9&max_terms=2", ["refuses", "Change the parameters"]),
    ],
)
def test_a_wrong_reasoning_gym_task_is_answered_with_the_nearest(refused, source, parts):
    says(refused("generate", "--prompts", source), *parts)


# Config and options


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ('modell = "arith"', ["`modell`", "did you mean `model`?"]),
        ("[mining]\nclip_per_group = 2", ["`mining.clip_per_group`", "did you mean `clips_per_group`?"]),
        ("[sampling]\ngroup_size = 'eight'", ["`sampling.group_size`", "'eight'", "valid integer"]),
        ("[sampling]\ntemperature = -1", ["`sampling.temperature`", "-1", "greater than 0"]),
        ("[sampling]\nstop = ['']", ["`sampling.stop.0`", "''", "at least 1 character"]),
        ("[train]\nlr = nan", ["`train.lr`", "finite number"]),
        ("mining = 3", ["`mining`", "3"]),
        ("[engine]\ndevice = 'gpu'", ["`engine.device`", "'gpu'", "cuda"]),
        ("[sampling\n", ["no readable TOML", "line 1", "Mend it"]),
    ],
)
def test_a_wrong_config_key_or_value_is_named(refused, tmp_path, toml, parts):
    path = tmp_path / "night.toml"
    path.write_text(toml)
    says(refused("mine", "--config", path, "--clips-per-group", "2"), path, *parts)


def test_a_missing_config_file_is_named(refused, tmp_path):
    says(refused("mine", "--config", tmp_path / "none.toml"), tmp_path / "none.toml", "Check --config")


def test_an_option_is_blamed_and_not_the_config_file(refused, tmp_path):
    path = tmp_path / "night.toml"
    path.write_text("[mining]\nclips_per_group = 2")
    line = refused("mine", "--config", path, "--clips-per-group", "0")
    says(line, "`mining.clips_per_group` in the options is 0", "greater than or equal to 1")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["min"], ["no command `min`", "did you mean `mine`?"]),
        (["import", "rolouts"], ["no command `import rolouts`", "did you mean `rollouts`?"]),
        (
            ["mine", "--clips-per-grup", "2"],
            ["--clips-per-grup", "--clips-per-group", "echomine mine --help"],
        ),
        (["mine", "--clips-per-group", "two"], ["--clips-per-group", "'two'", "valid integer"]),
        (["mine", "--scope", "all"], ["--scope", "'all'", "zero_advantage"]),
        (["mine", "--snapshot", "-1"], ["--snapshot", "-1"]),
        (["mine", "--delimiter", "."], ["`mining.delimiter`", "'.'", "one white-space character"]),
        (
            ["mine", "--what-if", "delimiter=\\n\\n"],
            ["`delimiter` in --what-if", "one white-space character"],
        ),
        (["mine", "--tokenizer", "."], ["--tokenizer", "--delimiter", "echomine mine --help"]),
        (["mine", "--delimiter", "\\n", "--tokenizer", "none"], ["no folder none"]),
        (["sql", "--example", "wasted_token"], ["`wasted_token`", "did you mean `wasted_tokens`?"]),
        (["sql", "select 1", "--examples"], ["one of QUERY", "echomine sql --help"]),
        (["sql", "select 1", "--memory-limit", "2"], ["`2` is no size", "2GB"]),
        (["sql", "select 1", "--timeout", "0"], ["--timeout", "0"]),
        (["mine", "--what-if", "clip_per_group=4"], ["`clip_per_group`", "did you mean `clips_per_group`?"]),
        (
            ["mine", "--what-if", "clips_per_group=0"],
            ["`clips_per_group` in --what-if", "greater than"],
        ),
        (["mine", "--what-if", "scope"], ["`scope`", "no setting", "name=value"]),
        (["mine", "--what-if", "max_clips=1,max_clips=2"], ["`max_clips` comes twice"]),
        (
            ["mine", "--what-if", "max_clips=1", "--scope", "any_success"],
            ["Beside --what-if"],
        ),
        (["report", "--night", "yesterday"], ["--night", "yesterday", "%Y-%m-%d"]),
    ],
)
def test_a_wrong_command_or_option_is_named(refused, arguments, parts):
    says(refused(*arguments), *parts)


# Models and verifiers


def model_copy(tmp_path: Path, *without: str) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(dumps.MODEL, folder, ignore=shutil.ignore_patterns(*without))
    return folder


def test_an_unknown_model_is_answered_with_the_known_ones(refused):
    says(refused("generate", "--model", "arit"), "`arit`", "did you mean `arith`?", "model folder")


def test_a_model_without_a_tokenizer_is_refused(refused, tmp_path):
    folder = model_copy(tmp_path, "tokenizer*")
    says(refused("generate", "--model", folder), folder, "no tokenizer", "Copy the model's tokenizer")


def test_a_tokenizer_of_another_model_is_refused(refused, tmp_path):
    folder = model_copy(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    says(refused("generate", "--model", folder), folder, "ids up to 99", "0 to 49", "was trained with")


def test_servers_that_are_not_named_are_asked_for(refused, tmp_path):
    says(refused("generate", "--engine", "server"), "no endpoints", "engine.server.endpoints")
    config = tmp_path / "night.toml"
    config.write_text('[engine]\nkind = "server"\n[engine.server]\nendpoints = ["gpu1:8000"]\n')
    says(refused("generate", "--config", config), "`gpu1:8000`", "no URL", "http://gpu1:8000/v1")


@pytest.mark.parametrize("command", ["generate", "nightly"])
def test_a_vllm_that_was_not_tested_is_named_with_the_range(refused, monkeypatch, command):
    monkeypatch.setattr(vllm_start, "installed_version", lambda: "0.99.0")
    says(refused(command, "--engine", "vllm"), "vLLM 0.99.0 is outside", "0.32", "Install one of these")


def test_an_unknown_dtype_is_refused_with_the_known_ones(refused, tmp_path):
    config = tmp_path / "night.toml"
    config.write_text('[engine]\ndtype = "float8"\n')
    says(refused("generate", "--config", config), config, "engine.dtype", "'float32' or 'bfloat16'")


def test_a_model_without_weights_is_refused(refused, tmp_path):
    folder = model_copy(tmp_path, "*.safetensors")
    says(refused("generate", "--model", folder), folder, "no safetensors weights", "complete model folder")


def test_a_model_with_pickled_weights_is_refused(refused, tmp_path):
    folder = model_copy(tmp_path, "*.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    says(refused("generate", "--model", folder), folder, "pickle", "Save the model as safetensors")


def test_cut_off_weights_are_refused(refused, tmp_path):
    folder = model_copy(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    says(refused("generate", "--model", folder), weights, "no whole safetensors file", "Copy it there anew")


def test_a_broken_tokenizer_file_is_refused(refused, tmp_path):
    folder = model_copy(tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    says(refused("generate", "--model", folder), folder, "tokenizer", "Copy it there anew")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("exakt", ["`exakt`", "did you mean `exact`?", "module:function"]),
        ("no_such_module:judge", ["`no_such_module:judge`", "No module named", "Install it"]),
        ("json:lods", ["`lods`", "did you mean `loads`?"]),
    ],
)
def test_an_unknown_verifier_is_refused_before_anything_is_generated(refused, tmp_path, name, parts):
    line = refused("generate", "--lake", tmp_path / "new-lake", "--verifier", name)
    says(line, *parts)


# Queries


@pytest.mark.parametrize(
    ("query", "parts"),
    [
        ("delete from rollouts", ["only reads", "delete", "Give a `select`", "nothing was changed"]),
        ("copy rollouts to 'stolen.csv'", ["only reads", "copy"]),
        ("select 1; drop table rollouts", ["2 statements", "Give one"]),
        ("selec 1", ["no SQL", 'near "selec"', "Mend it"]),
        ("select reward_ from rollouts", ["reward_", '"reward"', "Mend it"]),
        ("from '/etc/passwd'", ["/etc/passwd", "goes beyond"]),
        ("select * from read_text('/etc/passwd')", ["read_text", "goes beyond"]),
    ],
)
def test_a_query_that_is_wrong_or_does_more_than_read_is_refused(refused, query, parts):
    says(refused("sql", query), *parts)


def test_no_query_is_asked_for(refused, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    says(refused("sql"), "no query", "standard input", "echomine sql --examples")


@pytest.mark.parametrize(
    "arguments",
    [
        ["sql", "select 1"],
        ["sql", "--example", "wasted_tokens"],
        ["sql", "--attach"],
        ["mine"],
        ["mine", "--what-if", "clips_per_group=4"],
        ["export", "shards", "shards"],
    ],
    ids=" ".join,
)
def test_an_unknown_snapshot_is_named_by_every_command_that_reads_the_lake(refused, arguments):
    says(refused(*arguments, "--snapshot", "999"), "no snapshot 999", 'echomine sql "from snapshots"')
    before = "from before its tables were made"
    says(refused(*arguments, "--snapshot", "0"), "Snapshot 0", before, 'echomine sql "from snapshots"')


def test_what_came_after_a_snapshot_is_unknown_to_an_export_of_it(refused, tmp_path):
    line = refused("export", "shards", tmp_path / "shards", "--snapshot", "1", exit_code=3)
    says(line, "was never mined by snapshot 1", "echomine mine")


@pytest.mark.parametrize("query", [*WRITES[:10], *EXTENSIONS[:10], *NETWORK[:10], *FILES[:10]])
def test_the_command_reads_the_lake_and_nothing_else(refused, lake, tmp_path, query):
    (tmp_path / "secret.csv").write_text("a\nsecret\n")
    line = refused("sql", query.replace("{outside}", str(tmp_path)).replace("{lake}", str(lake / "files")))
    assert "secret\n" not in line


# Mining, shards, reports


def test_a_report_without_a_night_says_what_makes_one(refused):
    says(refused("report"), "no night", "echomine nightly")
    says(refused("report", "--night", "2031-01-01"), "no night 2031-01-01", "echomine nightly")


def test_an_unknown_mining_is_named(refused, tmp_path):
    line = refused("export", "shards", tmp_path / "shards", "--mining", "zzz")
    says(line, "no mining zzz", 'echomine sql "from mining_runs"')


def test_a_shard_folder_that_cannot_be_written_is_named(refused, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused("export", "shards", tmp_path / "file" / "shards")
    says(line, tmp_path / "file" / "shards", "Not a directory", "Choose another folder")


def test_a_training_that_cannot_be_plotted_is_named(refused, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    says(refused("report", "--train", "nothing"), "`nothing`", "echomine train")
    says(refused("report", "--train", "x" * 5000), "No folder and no id", "echomine train")
    says(refused("report", "--train", empty), empty, "no metrics.jsonl")
    (empty / "metrics.jsonl").write_text('{"optim_st')
    says(refused("report", "--train", empty), "no whole optimizer step", "cut off")
    says(refused("report", "--train", empty, "--night", "2026-05-31"), "--night", "of a night's report")
    says(refused("report", "--html", tmp_path / "page.html"), "--html goes with --train")


def test_training_without_shards_says_how_to_make_them(refused, tmp_path):
    line = refused("train", tmp_path / "none", "--lake", tmp_path / "new-lake")
    says(line, tmp_path / "none", "no shards", "echomine export shards")


@pytest.fixture
def shards(tmp_path: Path, lake: Path) -> Path:
    assert main(["export", "shards", str(tmp_path / "shards"), "--lake", str(lake)]) == 0
    return tmp_path / "shards"


def test_cut_off_shards_are_not_trained_on(refused, shards, tmp_path):
    file = next(shards.rglob("clips-*.parquet"))
    file.write_bytes(file.read_bytes()[:-30])
    line = refused("train", shards, "--lake", tmp_path / "new-lake")
    says(line, file, "not as it was exported", "Export the shards again")


def test_shards_of_a_newer_form_are_not_trained_on(refused, shards, tmp_path):
    manifest = next(shards.rglob("manifest.json"))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 2}))
    says(refused("train", shards, "--lake", tmp_path / "new-lake"), manifest, "format 2", "Update EchoMine")


@pytest.mark.parametrize(
    ("file", "message"),
    [("model.safetensors", "no whole safetensors file"), ("echomine.json", "names no policy_version")],
)
def test_a_checkpoint_that_is_cut_off_costs_no_new_lake(refused, shards, tmp_path, file, message):
    folder = model_copy(tmp_path)
    (folder / "echomine.json").write_text('{"policy_version": 20}')
    (folder / file).write_bytes((folder / file).read_bytes()[:12])
    says(refused("train", shards, "--lake", tmp_path / "new-lake", "--model", folder), file, message)


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    """A copy of the model whose tokenizer has two digits in each other's place."""
    folder = model_copy(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["7"], ids["8"] = ids["8"], ids["7"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_steps_are_not_split_again_by_another_tokenizer(refused, other_model):
    line = refused("mine", "--delimiter", "\\n", "--tokenizer", other_model)
    says(line, "of another tokenizer", "Give --tokenizer the folder of the model that sampled them")


def test_shards_of_another_tokenizer_are_not_trained_on(refused, shards, tmp_path, other_model):
    line = refused("train", shards, "--lake", tmp_path / "new-lake", "--model", other_model)
    says(line, "mined with tokenizer", "not this model's", "Train the model that sampled them")
