"""Lakes and nights that are not what they should be: refused in one line, never half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import dumps
import numpy as np
import pytest
from dumps import into
from nights import ECHOMINE, rows
from refusals import says

from flows.cli import main
from pipeline import schema
from pipeline.lake import Lake


def test_a_missing_lake_is_named_and_not_made(refused, tmp_path):
    for command in (
        ["mine"],
        ["sql", "select 1"],
        ["report"],
        ["maintain"],
        ["score"],
        ["export", "shards", "x"],
    ):
        says(refused(*command, "--lake", tmp_path / "none"), "no lake", tmp_path / "none", "--lake")


def test_a_lake_folder_that_cannot_be_made_is_named(refused, tmp_path):
    (tmp_path / "file").write_text("")
    dump = dumps.write_jsonl(tmp_path / "dump.jsonl", dumps.night())
    line = refused("import", "rollouts", dump, *into(tmp_path / "file" / "lake"))
    says(line, tmp_path / "file" / "lake", "Not a directory", "Choose another folder")


def test_a_lake_of_a_newer_schema_is_left_alone(refused, monkeypatch):
    newest = schema.SCHEMA_VERSION
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 0)
    says(refused("mine"), f"has schema {newest}", "knows 0", "Update EchoMine", "nothing was changed")


@pytest.mark.parametrize("content", [b"no database", b"", b"SQLite format 3\0" + bytes(4000)])
def test_a_damaged_catalog_is_named(refused, tmp_path, content):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "catalog.sqlite").write_bytes(content)
    says(
        refused("mine", "--lake", folder),
        folder / "catalog.sqlite",
        "cannot be read",
        "Restore it from a backup",
    )


def test_a_damaged_data_file_is_not_mined(import_dump, refused, tmp_path):
    import_dump(dumps.night())
    file = next((tmp_path / "lake" / "files").rglob("rollouts/*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    says(
        refused("mine", "--lake", tmp_path / "lake"), file.name, "SHA-256", "Restore it", "nothing was mined"
    )


def test_several_kinds_of_entropy_are_not_ranked_together(import_dump, refused, tmp_path):
    import_dump([*dumps.group("a", [1, 1]), *dumps.group("b", [1, 1], entropy_kind="rescored")])
    line = refused("mine", "--lake", tmp_path / "lake")
    says(line, "full_vocab, rescored", "Choose one with --entropy-kind")
    assert main(["mine", "--lake", str(tmp_path / "lake"), "--entropy-kind", "rescored"]) == 0


def test_a_lake_that_was_never_mined_has_nothing_to_export(import_dump, refused, tmp_path):
    import_dump(dumps.night())
    line = refused("export", "shards", tmp_path / "shards", "--lake", tmp_path / "lake", exit_code=3)
    says(line, tmp_path / "lake", "never mined", "echomine mine")


def test_a_lake_without_solved_groups_is_mined_with_exit_code_3(import_dump, tmp_path, capfd):
    import_dump(dumps.group("failed", [0.0, 0.0]))
    assert main(["mine", "--lake", str(tmp_path / "lake")]) == 3
    assert capfd.readouterr().err.startswith("echomine: Nothing to mine")


def limited(*arguments: str, file_bytes: int) -> subprocess.CompletedProcess[str]:
    """The real command, for which no file may grow above `file_bytes`: what a full disk does to it."""
    return subprocess.run(
        [ECHOMINE, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
    )


def test_a_full_disk_costs_nothing_that_was_there(import_dump, tmp_path):
    import_dump(dumps.night())
    lake = tmp_path / "lake"
    before = sorted(path for path in lake.rglob("*.parquet"))
    dump = dumps.write_jsonl(tmp_path / "big.jsonl", varied(400, seed=0))
    done = limited("import", "rollouts", str(dump), *into(lake), file_bytes=48 * 1024)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    says(done.stderr, "echomine: Cannot write", lake, "run the command again")
    assert sorted(path for path in lake.rglob("*.parquet")) == before
    assert not list(lake.rglob("*.partial"))
    assert rows(lake, "select count(*) as n from rollouts") == [{"n": 6}]
    assert main(["import", "rollouts", str(dump), *into(lake)]) == 0
    assert rows(lake, "select count(*) as n from rollouts") == [{"n": 806}]


def varied(num_groups: int, seed: int) -> list[dict[str, Any]]:
    """Rows of solved groups, each of a prompt of its own, that take their room on a disk."""
    random, rows = np.random.default_rng(seed), []
    for i in range(num_groups):
        for row in dumps.group(f"group {seed}-{i}", [1.0, 1.0], prompt=f"{seed}+{i}"):
            row["completion_entropies"] = np.float32(random.random(len(row["completion_ids"]))).tolist()
            rows.append(row)
    return rows


def test_a_disk_that_is_full_for_a_mining_an_export_or_upkeep_costs_nothing(tmp_path, capfd):
    lake, out = tmp_path / "lake", tmp_path / "out"
    for seed in (1, 2):
        dump = dumps.write_jsonl(tmp_path / f"{seed}.jsonl", varied(600, seed))
        assert main(["import", "rollouts", str(dump), *into(lake)]) == 0

    def fails(*arguments: object) -> None:
        before = contents(lake)
        done = limited(*map(str, arguments), "--lake", str(lake), file_bytes=48 * 1024)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        says(done.stderr, "echomine: Cannot ")
        assert contents(lake) == before

    fails("mine")
    assert main(["mine", "--lake", str(lake)]) == 0
    fails("export", "sft", out)
    assert not list(out.glob("*/*"))
    assert main(["export", "sft", str(out), "--lake", str(lake)]) == 0
    fails("maintain")
    assert main(["maintain", "--lake", str(lake)]) == 0
    assert main(["doctor", "--lake", str(lake)]) == 0
    capfd.readouterr()
    assert rows(lake, "select count(*) as n from clips") == [{"n": 1200}]


def contents(lake: Path) -> tuple[dict[str, int], list[object]]:
    """Rows by table, and the minings."""
    with Lake.open(lake).reader() as reader:
        counts = {
            table: reader.rows(f"select count(*) as n from lake.{table}")[0]["n"] for table in schema.TABLES
        }
        return counts, reader.rows("from mining_runs")


def test_a_disk_without_room_for_a_catalog_gets_no_half_a_lake(tmp_path):
    dump = dumps.write_jsonl(tmp_path / "dump.jsonl", dumps.night())
    done = limited("import", "rollouts", str(dump), *into(tmp_path / "lake"), file_bytes=4096)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    says(done.stderr, "echomine: Cannot make or write a lake", tmp_path / "lake", "Choose another folder")
    assert not list((tmp_path / "lake").rglob("*.sqlite*"))


# Nights


def test_a_rollout_lost_to_its_verifier_leaves_its_group_incomplete(tmp_path, capfd, monkeypatch):
    (tmp_path / "dying.py").write_text(
        "import os, pathlib\n"
        "def judge(completion, prompt):\n"
        "    first = pathlib.Path('first')\n"
        "    if not first.exists():\n"
        "        first.write_text(completion)\n"
        "    if first.read_text() == completion:\n"
        "        os._exit(7)\n"
        "    return 1.0\n"
    )
    (tmp_path / "night.toml").write_text(
        "[sampling]\ngroup_size = 4\nmax_tokens = 24\ntemperature = 5.0\n[verify]\nworkers = 1\n"
    )
    dumps.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "17+25"}, {"prompt": "46*3+14"}])
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "night.toml", "--prompts", "prompts.jsonl", "--verifier", "dying:judge"]
    code = main(["generate", "--json", "--lake", "lake", *arguments])
    output, errors = capfd.readouterr()
    counts = json.loads(output)
    assert (code, counts["written"], counts["refused"]) == (0, 7, 1)
    says(errors, "no reward for 1 of these rollouts", "incomplete", "quarantine")
    classes = rows(tmp_path / "lake", "select group_class, num_rollouts from groups order by all")
    assert classes == [
        {"group_class": "all_success", "num_rollouts": 4},
        {"group_class": "incomplete", "num_rollouts": 3},
    ]
    [lost] = rows(tmp_path / "lake", "select reason from quarantine")
    says(lost["reason"], "the verifier", "exit code 7")


@pytest.mark.parametrize("cron", ["tonight", "61 2 * * *", "0 2 *"])
def test_a_wrong_cron_expression_is_refused(refused, monkeypatch, cron):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    says(refused("nightly", "--serve", "--cron", cron), repr(cron), "five fields")


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run(
            [ECHOMINE, "nightly", "--serve", "--lake", tmp_path / "lake"],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"},
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    says(done.stderr, f"echomine: Port {port}", "in use", "choose another with PREFECT_API_URL")
    assert not (tmp_path / "lake").exists()


def test_a_copied_lake_is_a_lake(import_dump, tmp_path):
    import_dump(dumps.night())
    shutil.move(tmp_path / "lake", tmp_path / "moved")
    assert rows(tmp_path / "moved", "select count(*) as n from rollouts") == [{"n": 6}]
