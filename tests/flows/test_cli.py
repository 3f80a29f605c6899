"""The command: what it lists, what it prints where, and how it exits."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import dumps
import pytest
from nights import ECHOMINE

from flows.cli import main
from flows.commands.group import echomine
from pipeline.lake import Lake

ORDER = [
    *("nightly", "generate", "score", "import", "mine", "export", "train"),
    *("sql", "report", "audit", "reverify", "forget", "init", "maintain", "doctor"),
]


def commands(
    group: click.Group = echomine, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, click.Command]]:
    """Every command and group with its path, the root first."""
    yield " ".join(("echomine", *path)), group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join(("echomine", *path, name)), command


def example_of(command: click.Command) -> list[str]:
    _, _, example = (command.epilog or "").partition("Example:\n")
    return shlex.split(example)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return subprocess.run(
        [ECHOMINE, *arguments], capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )


@pytest.fixture
def new_lake(tmp_path: Path) -> Path:
    dump = dumps.write_jsonl(tmp_path / "dump.jsonl", dumps.night())
    arguments = ["--tokenizer", str(dumps.MODEL), "--lake", str(tmp_path / "lake")]
    assert main(["import", "rollouts", str(dump), *arguments]) == 0
    return tmp_path / "lake"


# Help


def test_the_commands_stand_in_the_order_of_a_night_with_whole_summaries(capfd):
    assert main(["--help"]) == 0
    listed = re.search(r"Commands:\n(.*?)\n\n", capfd.readouterr().out, re.DOTALL)
    lines = listed[1].splitlines()
    assert [line.split()[0] for line in lines] == ORDER
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)
    assert max(map(len, lines)) < 80


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=lambda value: str(value))
def test_every_help_shows_an_example_that_parses(path, command, capfd):
    assert main([*path.split()[1:], "--help"]) == 0
    shown = capfd.readouterr().out
    example = example_of(command)
    assert "Example:\n" in shown
    assert shlex.join(example[:2]) in shown
    assert example[: len(path.split())] == path.split() or path == "echomine"
    group, rest = echomine, example[1:]
    context = click.Context(echomine, info_name="echomine")
    while isinstance(group, click.Group):
        _, group, rest = group.resolve_command(context, rest)
    group.make_context(group.name, rest)  # raises if an option or a value is wrong


@pytest.mark.parametrize("path", ["echomine", "echomine import", "echomine export"])
def test_a_group_alone_shows_its_help(path, capfd):
    assert main(path.split()[1:]) == 0
    output, errors = capfd.readouterr()
    assert output.startswith(f"Usage: {path} ")
    assert errors == ""


def test_importing_the_command_imports_nothing_heavy():
    heavy = ("torch", "prefect", "duckdb", "transformers", "pyarrow", "polars", "reasoning_gym")
    code = f"import sys, flows.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_version_is_the_packages():
    done = run("--version")
    assert re.fullmatch(r"echomine \d+\.\d+\.\d+\n", done.stdout)


# Output and exit codes


def test_json_is_one_object_on_standard_output_and_the_rest_goes_to_standard_error(new_lake):
    failed = dumps.write_jsonl(new_lake.parent / "failed.jsonl", dumps.group("failed", [0.0, 0.0]))
    empty = str(new_lake.parent / "empty")
    tokenizer = ["--tokenizer", str(dumps.MODEL)]
    imported = run("import", "rollouts", str(failed), *tokenizer, "--lake", empty, "--json")
    assert (imported.returncode, imported.stderr) == (0, "")
    assert json.loads(imported.stdout) == {"written": 2, "known": 0, "refused": 0}
    mined = run("mine", "--json", ECHOMINE_LAKE=empty)
    assert mined.returncode == 3
    assert json.loads(mined.stdout)["groups"] == {"all_fail": 1}
    assert mined.stderr.startswith("echomine: Nothing to mine")
    assert mined.stderr.count("\n") == 1


def test_a_night_is_mined_exported_and_asked_about(new_lake, tmp_path, capfd):
    lake = ["--lake", str(new_lake)]
    capfd.readouterr()
    assert main(["mine", "--json", *lake]) == 0
    mined = json.loads(capfd.readouterr().out)
    assert mined["groups"] == {"all_fail": 1, "all_success": 1, "mixed": 1}
    assert (mined["clips"], mined["dropped"]) == (1, {})
    assert main(["export", "shards", str(tmp_path / "shards"), "--json", *lake]) == 0
    exported = json.loads(capfd.readouterr().out)
    assert exported["mining_id"] == mined["mining_id"]
    assert exported["clips"] == 1
    assert (
        main(
            [
                "sql",
                "select group_class, num_rollouts as n from groups order by all",
                "--format",
                "csv",
                *lake,
            ]
        )
        == 0
    )
    assert capfd.readouterr().out == "group_class,n\nall_fail,2\nall_success,2\nmixed,2\n"


def test_generated_rollouts_are_counted_once(tmp_path, capfd):
    prompts = dumps.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "17+25", "ground_truth": "42"}])
    config = tmp_path / "night.toml"
    config.write_text("[sampling]\ngroup_size = 2\nmax_tokens = 16\n")
    arguments = ["generate", "--json", "--lake", str(tmp_path / "lake"), "--night", "2026-03-01"]
    arguments += ["--prompts", str(prompts), "--config", str(config), "--engine", "transformers"]
    assert main(arguments) == 0
    first = json.loads(capfd.readouterr().out)
    assert main(arguments) == 0
    second = json.loads(capfd.readouterr().out)
    assert (first["night"], first["written"], second["written"]) == ("2026-03-01", 2, 0)
    assert first["run_id"] == second["run_id"]


def test_a_reader_that_leaves_early_gets_no_traceback(new_lake):
    query = "select range as n from range(500000)"
    command = f"{shlex.quote(ECHOMINE)} sql {shlex.quote(query)} --format csv --lake {new_lake} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("n\n", "")


def test_a_fault_of_ours_keeps_its_traceback_and_exits_with_1():
    code = (
        "import sys, pipeline.doctor as doctor, flows.cli\n"
        "doctor.examine = lambda *arguments: 1 / 0\n"
        "sys.exit(flows.cli.main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


# Doctor and maintain


def test_the_doctor_finds_a_machine_without_a_lake_healthy(tmp_path, capfd):
    assert main(["doctor", "--json", "--lake", str(tmp_path / "none")]) == 0
    findings = json.loads(capfd.readouterr().out)
    assert all(finding["ok"] for finding in findings.values())
    assert "none in" in findings["lake"]["finding"]
    assert findings["torch"]["finding"].startswith("2.13.0")
    assert not (tmp_path / "none").exists()


def test_the_doctor_reads_every_file_of_a_lake(new_lake, capfd):
    assert main(["doctor", "--lake", str(new_lake)]) == 0
    output = capfd.readouterr().out
    assert "6 rollouts, 3 groups" in output
    assert "BAD" not in output


def test_the_doctor_names_the_damaged_file(new_lake, capfd):
    file = next((new_lake / "files").rglob("rollouts/*.parquet"))
    file.write_bytes(file.read_bytes() + b"\0")
    capfd.readouterr()
    assert main(["doctor", "--lake", str(new_lake)]) == 2
    output, errors = capfd.readouterr()
    bad = [line for line in output.splitlines() if line.startswith("BAD")]
    assert file.name in bad[0]
    assert "SHA-256" in bad[0]
    assert errors.startswith("echomine: The doctor found 1 problem")


def test_maintain_deletes_what_no_snapshot_names_and_nothing_else(new_lake, capfd):
    held = sorted((new_lake / "files").rglob("*.parquet"))
    orphans = [held[0].with_name(name) for name in ("orphan.parquet", "young.parquet")]
    for orphan in orphans:
        orphan.write_bytes(held[0].read_bytes())
    two_hours_ago = time.time() - 7200
    os.utime(orphans[0], (two_hours_ago, two_hours_ago))
    capfd.readouterr()
    assert main(["maintain", "--json", "--lake", str(new_lake)]) == 0
    assert json.loads(capfd.readouterr().out)["orphaned_files_deleted"] == 1
    assert sorted((new_lake / "files").rglob("*.parquet")) == sorted([*held, orphans[1]])
    with Lake.open(new_lake).reader() as reader:
        assert reader.rows("select count(*) as n from rollouts") == [{"n": 6}]
