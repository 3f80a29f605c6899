"""What every reader of a foreign dump has in common: it knows its own files, and survives damaged ones."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from foreign_dumps import DUMPS, FILES, FORMATS, JSON_LINES, damaged, lines, read, write_lines, write_rows
from sample_lake import character_tokenizer

from pipeline.errors import FormatError
from pipeline.formats.fields import flat, short
from pipeline.imports.core import import_rollouts, with_formats

TOKENIZER = character_tokenizer()

CANONICAL = {
    "group_id": "a",
    "sample_index": 0,
    "prompt_ids": [1],
    "completion_ids": [52],
    "completion_entropies": [0.5],
    "reward": 1.0,
}
VERL = {"input": "2+2?", "output": "4", "gts": "4", "score": 1.0, "step": 3}
TRL = {"step": 3, "prompt": "2+2?", "completion": "4", "correct": 1.0, "advantage": 0.0}
VERL_PROMPT = {"data_source": "sums", "prompt": [{"role": "user", "content": "2+2?"}]}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_dump_is_recognized_by_its_own_reader_and_no_other(name: str, file: str) -> None:
    assert [other for other, module in FORMATS.items() if module.recognizes(DUMPS / file)] == [name]


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_dump_is_imported_whole_and_the_second_time_changes_nothing(lake, name, file) -> None:
    dumps = with_formats([DUMPS / file])
    assert [kind.NAME for _, kind in dumps] == [name]
    rows = read(name, file)
    first = import_rollouts(lake, dumps, TOKENIZER).rows
    refused = sum(row.problem is not None for row in rows)
    assert (first.written, first.known, first.refused) == (len(rows) - refused, 0, refused)
    again = import_rollouts(lake, dumps, TOKENIZER).rows
    assert (again.written, again.known, again.refused) == (0, len(rows) - refused, refused)


@pytest.mark.parametrize("row", [CANONICAL, VERL, VERL | {"uid": "a_0_1"}, TRL, VERL_PROMPT, {}, [1], "x", 5])
def test_files_of_other_kinds_are_nobodys(tmp_path: Path, row: Any) -> None:
    paths = [write_lines(tmp_path / "dump.jsonl", [row]), tmp_path / "dump.json", tmp_path / "dump.parquet"]
    paths[1].write_text(json.dumps(row))
    write_rows(paths[2], [row if isinstance(row, dict) and row else {"x": 1}])
    for name, content in (("dump.pt", b"PK\3\4"), ("dump.db", b"SQLite format 3\0"), ("empty.jsonl", b"")):
        (tmp_path / name).write_bytes(content)
        paths.append(tmp_path / name)
    for path in (*paths, tmp_path, tmp_path / "none.jsonl", tmp_path / "none.pt", tmp_path / "none.parquet"):
        assert [name for name, module in FORMATS.items() if module.recognizes(path)] == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_file_is_one_error_that_names_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.file"):
        read(name, tmp_path / "none.file")


@pytest.mark.parametrize(("name", "file"), JSON_LINES)
def test_damaged_lines_are_rows_with_a_problem_and_the_rest_is_read(name, file, tmp_path: Path) -> None:
    first, *_ = (DUMPS / file).read_text().splitlines(keepends=True)
    half = json.dumps({**json.loads(first), "note": "\ud83d"})
    dump = (
        first
        + "not JSON\n[1]\n"
        + '{"a":' * 100_000
        + "\n"
        + half
        + "\n\n"
        + first
        + first[: len(first) // 2]
    )
    path = tmp_path / Path(file).name
    path.write_text(dump)
    whole, *broken, again, cut = read(name, path)
    assert [row.source.rpartition(":")[2] for row in (*broken, again, cut)] == ["2", "3", "4", "5", "7", "8"]
    assert all(row.problem and row.problem.startswith("no JSON object") for row in (*broken, cut))
    assert again.problem == whole.problem
    assert broken[0].values == {"line": "not JSON\n"}


@pytest.mark.parametrize(("name", "file"), JSON_LINES)
def test_no_member_of_a_row_can_stop_an_import(name: str, file: str, tmp_path: Path) -> None:
    rows = [broken for row in lines(file)[:2] for broken in damaged(row)]
    assert len(rows) > 100
    path = write_lines(tmp_path / Path(file).name, [lines(file)[0], *rows])
    found = read(name, path)
    assert len(found) >= len(rows)
    assert all(isinstance(row.problem, str | None) for row in found)
    for row in found:
        if row.problem is None and "completion_ids" in row.values:
            assert all(type(token) is int for token in row.values["completion_ids"])


@pytest.mark.parametrize(("name", "file"), JSON_LINES)
def test_groups_keep_their_names_while_a_file_grows(name: str, file: str, tmp_path: Path) -> None:
    rows = lines(file)
    path = tmp_path / Path(file).name
    groups = [row.values.get("group_id") for row in read(name, write_lines(path, rows[:1]))]
    grown = [row.values.get("group_id") for row in read(name, write_lines(path, rows))]
    assert grown[: len(groups)] == groups


@pytest.mark.parametrize(("name", "file"), [JSON_LINES[0], JSON_LINES[1], JSON_LINES[-1]])
def test_groups_of_another_training_have_other_names(name: str, file: str, tmp_path: Path) -> None:
    first, *_ = lines(file)
    other = write_lines(tmp_path / Path(file).name, [first | {"note": "of another training"}])
    assert read(name, other)[0].values["group_id"] != read(name, file)[0].values["group_id"]


@pytest.mark.parametrize(("name", "file"), JSON_LINES)
def test_lines_are_read_one_at_a_time(name: str, file: str, tmp_path: Path) -> None:
    line = (DUMPS / file).read_text().splitlines(keepends=True)[0]
    path = tmp_path / Path(file).name
    path.write_text(line * (8_000_000 // len(line)))
    tracemalloc.start()
    number = sum(1 for _ in FORMATS[name].read(path))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 8_000_000 // len(line)
    assert peak_bytes < 1_000_000


def test_a_value_that_holds_itself_many_times_over_is_shown_and_kept_in_short() -> None:
    laughs: list[Any] = ["ha"]
    for _ in range(64):
        laughs = [laughs] * 64
    assert len(short(laughs)) <= 40
    assert flat({"a": laughs, "b": 1, "c": [1, "x"], "d": {"e": 1}}) == {"b": 1, "c": [1, "x"]}
