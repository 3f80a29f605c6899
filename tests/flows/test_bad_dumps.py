"""Dumps that are not what they should be: refused whole or row by row, never half-written."""

from __future__ import annotations

import json
from typing import Any

import dumps
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dumps import into
from nights import rows
from refusals import says

from flows.cli import main

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
