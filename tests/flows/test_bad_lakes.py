"""Dumps and lakes that are not what they should be: refused whole or row by row, never half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dumps
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nights import ECHOMINE, rows

from flows.cli import main
from pipeline import schema
from pipeline.lake import Lake


@pytest.fixture
def import_dump(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[[list[Any]], tuple[int, str, str]]:
    """Imports rows into `tmp_path / "lake"`; returns exit code, output and errors."""

    def run(rows: list[Any]) -> tuple[int, str, str]:
        dump = dumps.write_jsonl(tmp_path / "dump.jsonl", rows)
        capfd.readouterr()
        code = main(["import", "rollouts", str(dump), *into(tmp_path / "lake")])
        return code, *capfd.readouterr()

    return run


def into(lake: Path) -> list[str]:
    return ["--tokenizer", str(dumps.MODEL), "--lake", str(lake)]


def says(line: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in line


# Dumps that are refused whole


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("none.jsonl", ["There is no file", "Check the path"]),
        ("dump.csv", ["neither .parquet nor .jsonl", "Convert it"]),
        ("cut.parquet", ["no complete Parquet file", "Copy it again"]),
        ("renamed.parquet", ["no column `completion_entropies`", "did you mean `completion_entropy`?"]),
    ],
)
def test_a_dump_that_cannot_be_read_makes_no_lake(refused, tmp_path, name, parts):
    table = pa.Table.from_pylist(dumps.night())
    (tmp_path / "dump.csv").write_text("group_id,reward\n")
    pq.write_table(table, tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-100])
    pq.write_table(
        table.rename_columns({"completion_entropies": "completion_entropy"}), tmp_path / "renamed.parquet"
    )
    says(refused("import", "rollouts", tmp_path / name, *into(tmp_path / "lake")), tmp_path / name, *parts)


@pytest.mark.parametrize("where", ["a value", "a column's name", "the footer"])
def test_a_parquet_dump_with_a_flipped_bit_is_refused_by_name(tmp_path, capfd, where):
    dump = tmp_path / "dump.parquet"
    pq.write_table(pa.Table.from_pylist(dumps.night()), dump, write_page_checksum=True)
    content = bytearray(dump.read_bytes())
    places = {
        "a value": len(content) // 8,
        "a column's name": content.index(b"reward") + 3,
        "the footer": len(content) - 6,
    }
    content[places[where]] ^= 0x80
    dump.write_bytes(content)
    assert main(["import", "rollouts", str(dump), *into(tmp_path / "lake")]) == 2
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1
    says(errors, f"echomine: {dump} is no complete Parquet file", "Copy it again")
    assert not list(tmp_path.rglob("rollouts/*.parquet"))


def test_an_import_needs_a_tokenizer_that_is_there(refused, tmp_path):
    dump = dumps.write_jsonl(tmp_path / "dump.jsonl", dumps.night())
    line = refused("import", "rollouts", dump, "--tokenizer", tmp_path / "none", "--lake", tmp_path / "lake")
    says(line, tmp_path / "none", "Give a Hugging Face model or tokenizer folder")


def test_an_import_of_a_missing_file_says_so_before_it_asks_for_a_tokenizer(refused, tmp_path):
    missing = tmp_path / "missing*.jsonl"
    for more in ([], ["--format", "verl"]):
        says(refused("import", "rollouts", missing, *more), f"There is no file {missing}")
    dump = dumps.write_jsonl(tmp_path / "dump.jsonl", dumps.night())
    says(refused("import", "rollouts", dump), "no tokenizer is given. Give --tokenizer")


# Rows that are refused


def _short_entropies(row: dict[str, Any]) -> None:
    row["completion_entropies"].pop()


def _nan_reward(row: dict[str, Any]) -> None:
    row["reward"] = float("nan")


def _no_reward(row: dict[str, Any]) -> None:
    row["reward"] = None


def _negative_entropy(row: dict[str, Any]) -> None:
    row["completion_entropies"][0] = -0.5


def _infinite_entropy(row: dict[str, Any]) -> None:
    row["completion_entropies"][0] = float("inf")


def _other_tokenizer(row: dict[str, Any]) -> None:
    row["tokenizer_hash"] = "0123456789abcdef"


def _foreign_token(row: dict[str, Any]) -> None:
    row["completion_ids"][0] = 100_000


def _duplicate(row: dict[str, Any]) -> None:
    row["sample_index"] = 1  # the next row's place


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_short_entropies, "completion_entropies has 25 values for 26 completion tokens"),
        (_nan_reward, "the reward is nan"),
        (_no_reward, "the reward is missing"),
        (_negative_entropy, "completion_entropies holds negative values"),
        (_infinite_entropy, "completion_entropies holds NaN or infinite values"),
        (_other_tokenizer, "unknown tokenizer 0123456789ab"),
        (_foreign_token, "unknown tokenizer: completion_ids holds 100000, the tokenizer has 100 tokens"),
        (_duplicate, "duplicate: sample 1 of group solved is there with another content"),
    ],
)
def test_a_bad_row_is_quarantined_and_the_rest_proceeds(import_dump, tmp_path, damage, reason):
    night = dumps.night()
    damage(night[0])
    code, output, errors = import_dump(night)
    assert (code, output) == (2, "written 5, known 0, refused 1\n")
    assert errors.count("\n") == 1
    says(
        errors,
        "echomine: 1 of 6 rows was refused",
        "dump.jsonl:",
        reason,
        "The others are in the lake",
        "mend",
    )
    quarantined = rows(tmp_path / "lake", "select reason, source, row from quarantine")
    assert len(quarantined) == 1
    assert quarantined[0]["reason"].startswith(reason)
    assert json.loads(quarantined[0]["row"])["group_id"] == "solved"
    assert rows(tmp_path / "lake", "select count(*) as n from rollouts") == [{"n": 5}]


def test_a_group_that_lost_a_row_is_incomplete_and_not_mined(import_dump, tmp_path, capfd):
    night = dumps.night()
    _nan_reward(night[0])
    import_dump(night)
    assert main(["mine", "--json", "--lake", str(tmp_path / "lake")]) == 3
    mined = json.loads(capfd.readouterr().out)
    assert mined["groups"] == {"all_fail": 1, "incomplete": 1, "mixed": 1}
    assert mined["clips"] == 0


def test_mended_rows_enter_beside_what_is_there(import_dump, tmp_path):
    night = dumps.night()
    reward = night[0]["reward"]
    _nan_reward(night[0])
    assert import_dump(night)[0] == 2
    night[0]["reward"] = reward
    assert import_dump(night) == (0, "written 1, known 5, refused 0\n", "")


def test_a_line_that_is_no_json_is_quarantined_with_its_number(tmp_path, capfd):
    dump = dumps.write_jsonl(tmp_path / "dump.jsonl", dumps.night())
    dump.write_text(dump.read_text() + '{"group_id": "cut o')
    assert main(["import", "rollouts", str(dump), *into(tmp_path / "lake")]) == 2
    says(capfd.readouterr().err, "1 of 7 rows was refused", "dump.jsonl:7: no JSON object")


# Lakes


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
