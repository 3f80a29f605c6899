"""Imports of any size: in parts, killed and run again, of files that turn out damaged."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_lake import EOS_ID, character_tokenizer

import pipeline.imports.batches
import pipeline.imports.staging
from pipeline.errors import FormatError
from pipeline.formats.source_rows import Format, SourceRow
from pipeline.imports.core import import_rollouts, num_unscored, with_formats
from pipeline.ingest import Ingested
from pipeline.lake import Lake

HERE = Path(__file__).parent
TOKENIZER = character_tokenizer()
GROUPS, GROUP_SIZE = 40, 4


def dump(path: Path) -> Path:
    """Groups scattered over the file, and among them bad rows of all kinds."""
    rows: list[dict[str, Any]] = []
    for group in range(GROUPS):
        for index in range(GROUP_SIZE):
            ids = [*TOKENIZER(f"{group}+{index}\n#{group}")["input_ids"], EOS_ID]
            entropies = [(group + index + i) % 7 / 8 for i in range(len(ids))]
            row = {"group_id": f"g{group}", "sample_index": index, "prompt": f"{group}?", "reward": 1.0}
            rows.append(row | {"completion_ids": ids, "completion_entropies": entropies})
    rows[5] |= {"reward": None}
    rows[9] |= {"completion_ids": [10**6], "completion_entropies": [0.5]}
    rows.append(rows[20] | {"reward": 0.0})
    rows.append(rows[24] | {"sample_index": 9, "policy_version": 3})
    random.Random(0).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"group_id": "g1", "samp\n')
    return path


def contents(lake: Lake) -> dict[str, list[dict[str, Any]]]:
    """Every row of the lake, but for times and the names of files."""
    with lake.reader() as reader:
        return {
            table: sorted(reader.rows(f"select * exclude (created_at) from {table}"), key=repr)
            for table in ("rollouts", "prompts", "quarantine")
        }


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.imports.staging, "PART_BYTES", 4096)
    monkeypatch.setattr(pipeline.imports.batches, "BATCH_ITEMS", 500)


def undisturbed(tmp_path: Path, path: Path) -> dict[str, list[dict[str, Any]]]:
    """What one import in one part leaves in a lake of its own."""
    other = Lake.create(tmp_path / "undisturbed")
    done = import_rollouts(other, with_formats([path]), TOKENIZER).rows
    assert done == Ingested(written=GROUPS * GROUP_SIZE - 2, refused=5)
    return contents(other)


def test_parts_end_in_the_same_rows_as_one(lake: Lake, tmp_path: Path, small_parts: None) -> None:
    path = dump(tmp_path / "dump.jsonl")
    done = import_rollouts(lake, with_formats([path]), TOKENIZER).rows
    assert done == Ingested(written=GROUPS * GROUP_SIZE - 2, refused=5)
    with lake.reader() as reader:
        assert reader.rows("select count(*) > 5 as many from snapshots")[0]["many"]
        partly = "select group_size, count(*) as n from rollouts where group_id = 'g1' group by group_size"
        # one of the four was refused; the cut line that names the group says nothing
        assert reader.rows(partly) == [{"group_size": 4, "n": 3}]
    pipeline.imports.staging.PART_BYTES = 48 << 20
    assert contents(lake) == undisturbed(tmp_path, path)
    assert list((lake.folder / "staging").iterdir()) == []


@pytest.mark.parametrize("when", ["staging", "commits"])
def test_a_killed_import_run_again_ends_in_the_rows_of_an_undisturbed_one(
    lake: Lake, tmp_path: Path, when: str
) -> None:
    path = dump(tmp_path / "dump.jsonl")
    expected = undisturbed(tmp_path, path)
    command = [sys.executable, str(HERE / "import_worker.py"), str(lake.folder), when, str(path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = contents(lake)
    assert bool(left["rollouts"]) == (when == "commits")
    assert len(left["rollouts"]) < len(expected["rollouts"])
    assert list((lake.folder / "staging").glob("*/part-*"))
    with lake.reader() as reader:  # groups are there whole or not at all
        found = reader.rows("select group_id, count(*) as n from rollouts group by group_id")
    whole = {row["group_id"]: row["n"] for row in found}
    sizes = [row["group_id"] for row in expected["rollouts"]]
    assert all(count == sizes.count(group) for group, count in whole.items())
    import_rollouts(lake, with_formats([path]), TOKENIZER)
    assert contents(lake) == expected
    assert list((lake.folder / "staging").iterdir()) == []


def test_of_two_imports_at_once_with_other_contents_for_a_place_one_wins(lake: Lake, tmp_path: Path) -> None:
    processes = []
    for name, reward in (("a", 1.0), ("b", 0.0)):
        rows = [
            {"group_id": "g", "sample_index": index, "prompt_ids": [1], "completion_ids": [50 + index]}
            | {"completion_entropies": [0.5], "reward": reward if index else 1.0}
            for index in range(4)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, str(HERE / "import_worker.py"), str(lake.folder), "meeting", str(path)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    said = sorted(process.communicate(timeout=600)[0].strip() for process in processes)
    assert said == ["0 1 3", "4 0 0"]  # written, known, refused
    with lake.reader() as reader:
        kept = reader.rows("select sample_index, reward from rollouts order by all")
        reasons = reader.rows("select reason from quarantine order by all")
    assert [row["sample_index"] for row in kept] == [0, 1, 2, 3]
    assert len({row["reward"] for row in kept[1:]}) == 1
    assert [row["reason"] for row in reasons] == [
        f"duplicate: sample {index} of group g is there with another content" for index in (1, 2, 3)
    ]


def test_a_running_import_keeps_its_staging_folder(lake: Lake) -> None:
    with pipeline.imports.staging.ImportStaging(lake.folder, 1) as first:
        with pipeline.imports.staging.ImportStaging(lake.folder, 1) as second:
            assert first.folder.is_dir()
        assert not second.folder.exists()
        assert first.folder.is_dir()


def test_a_file_damaged_in_its_middle_leaves_the_lake_as_it_was(lake: Lake, tmp_path: Path) -> None:
    good, bad = dump(tmp_path / "dump.jsonl"), tmp_path / "damaged.parquet"
    ids = list(range(100, 120))
    row = {"completion_ids": ids, "completion_entropies": [0.5] * 20, "prompt_ids": [1], "reward": 1.0}
    rows = [row | {"group_id": "big", "sample_index": index} for index in range(20_000)]
    pq.write_table(pa.Table.from_pylist(rows), bad, row_group_size=5000, write_page_checksum=True)
    content = bytearray(bad.read_bytes())
    place = pq.ParquetFile(bad).metadata.row_group(3).column(0).data_page_offset + 60
    content[place : place + 8] = bytes(8)
    bad.write_bytes(content)
    before = contents(lake)
    with pytest.raises(FormatError, match=r"damaged\.parquet is no complete Parquet file"):
        import_rollouts(lake, with_formats([good, bad]), TOKENIZER)
    assert contents(lake) == before
    assert list((lake.folder / "staging").iterdir()) == []


def test_a_file_is_recognized_by_its_content_or_the_user_is_asked(tmp_path: Path) -> None:
    verl = {"input": "1+1", "output": "2", "score": 1.0, "step": 3, "gts": None}
    ours = {"group_id": "a", "completion_ids": [1]}
    files = {
        "verl": [verl],
        "canonical": [ours],
        "both": [verl | ours],
        "none": [{"a": 1}],
        "late": ["", ours],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def kind(name: str, given: str | None = None) -> str:
        ((_, found),) = with_formats([tmp_path / f"{name}.jsonl"], given)
        return found.NAME

    assert [kind("verl"), kind("canonical"), kind("late")] == ["verl", "canonical", "canonical"]
    assert kind("both", "verl") == "verl"
    with pytest.raises(FormatError, match=r"both\.jsonl may be canonical or verl\. Say which with --format"):
        kind("both")
    with pytest.raises(FormatError, match=r"none\.jsonl has the fields of no dump that is known.*--format"):
        kind("none")
    with pytest.raises(FormatError, match="There is no file"):
        kind("missing")


def test_half_a_character_in_a_readers_text_costs_its_row_only(lake: Lake) -> None:
    class Reader:
        NAME = "test"

        def read(self, path: Path) -> Iterator[SourceRow]:
            good = {"group_id": "a", "prompt_text": "1+1", "completion": "2", "reward": 1.0}
            changes = [{}, {"completion": "\ud800"}, {"prompt_text": "\ud800"}, {"ground_truth": "\ud800"}]
            for number, change in enumerate(changes, start=1):
                yield SourceRow(f"{path.name}:{number}", good | change)

    done = import_rollouts(lake, [(HERE / "big_dump.py", cast(Format, Reader()))], TOKENIZER)
    assert done.rows == Ingested(written=1, refused=3)
    with lake.reader() as reader:
        reasons = [row["reason"] for row in reader.rows("select reason from quarantine order by source")]
        sizes = reader.rows("select sample_index, group_size, completion from rollouts")
    assert reasons == ["the completion is no valid Unicode", *["the prompt is no valid Unicode"] * 2]
    assert sizes == [{"sample_index": 0, "group_size": 4, "completion": "2"}]


def test_each_place_of_a_bad_line_is_kept_once_also_in_files_of_one_name(lake: Lake, tmp_path: Path) -> None:
    paths = [tmp_path / step / "dump.jsonl" for step in ("step_1", "step_2")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps({"group_id": "a", "sample_index": 0, "prompt": "1?"}) + "\n" + "{\n" * 2)
    for _ in range(2):
        done = import_rollouts(lake, with_formats(paths, "canonical"), TOKENIZER)
        assert done.rows == Ingested(refused=6)
    with lake.reader() as reader:
        places = [row["source"] for row in reader.rows("select source from quarantine order by source")]
    assert places == [f"{path}:{line}" for path in paths for line in (1, 2, 3)]


def test_a_folder_and_a_name_that_is_no_unicode_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"is a folder\. Give the files in it, such as .*/\*\.jsonl"):
        with_formats([tmp_path], "verl")
    for name in (None, "canonical"):
        path = tmp_path / "dump-\udcff.parquet"
        path.write_bytes(b"PAR1")
        with pytest.raises(FormatError, match=r"'.*dump-\\udcff\.parquet' is no valid UTF-8\. Rename it"):
            with_formats([path], name)


def test_rollouts_without_entropies_are_counted_by_run(lake: Lake, tmp_path: Path) -> None:
    path = tmp_path / "dump.jsonl"
    row = {"group_id": "a", "prompt": "1", "completion_ids": [50], "completion_entropies": None, "reward": 1}
    rows = [row | {"sample_index": index} for index in range(2)] + [row | {"sample_index": 2, "run_id": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = import_rollouts(lake, with_formats([path]), TOKENIZER)
    assert len(done.run_ids) == 2
    assert "x" in done.run_ids
    assert num_unscored(lake, sorted(done.run_ids)) == 3
    assert num_unscored(lake, ["x"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "num_mib"), [("jsonl", 600), ("parquet", 120)])
def test_25_million_tokens_of_scattered_groups_are_imported_in_less_than_a_gibibyte(
    tmp_path: Path, suffix: str, num_mib: int
) -> None:
    script, path, target = str(HERE / "big_dump.py"), str(tmp_path / f"dump.{suffix}"), tmp_path / "lake"

    def done(*arguments: str) -> float:
        command = [sys.executable, script, *arguments]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    num_groups = done("write", path, "610")
    assert Path(path).stat().st_size > num_mib << 20
    assert done("import", path, str(target)) < 1024
    with Lake.open(target).reader() as reader:
        groups = reader.rows("select group_size, count(*) as n from groups group by group_size")
    assert groups == [{"group_size": 8, "n": num_groups}]
