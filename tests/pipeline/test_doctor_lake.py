"""The doctor finds what is wrong with a lake, says how to mend it, and calls the sample lake healthy."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sample_lake import SampleLake, character_tokenizer

from flows.cli import main
from pipeline.doctor import Finding, examine_lake
from pipeline.imports.core import import_rollouts, with_formats
from pipeline.lake import Lake
from pipeline.lake_writer import Writer
from pipeline.sqlfiles import SQL_FOLDER

SOME_PROMPT = "(select min(prompt_id) from prompts)"
SOME_CLIP = "(select min(rollout_id) from echo_clips)"
# what breaks the sample lake, the checks that find it, a part of the cure
BREAKS = [
    (f"delete from prompts where prompt_id = {SOME_PROMPT}", {"orphan_rollouts"}, "import the run again"),
    ("update rollouts set group_size = 1 where group_size = 2", {"overfull_groups"}, "true `group_size`"),
    ("update echo_clips set mining_id = 'lost'", {"unmined_clips", "miscounted_minings"}, "echomine mine"),
    ("update mining_runs set num_clips = num_clips + 1", {"miscounted_minings"}, "export that mining"),
    (
        "insert into clip_uses select training_id, 'lost', 1, 0.5, created_at from clip_uses",
        {"orphan_clip_uses"},
        "Keep the training's shards",
    ),
    ("insert into scorings (rollout_id, scored_at) values ('lost', now())", {"orphan_scorings"}, "backup"),
    ("insert into verdicts (rollout_id, reward) values ('lost', 0)", {"orphan_verdicts"}, "backup"),
    (
        "insert into shards (path, sha256, mining_id) values ('/no/a', 'b', 'lost')",
        {"orphan_shards"},
        "export shards",
    ),
    (
        f"insert into forgotten_prompts values ({SOME_PROMPT}, 'prompt', {SOME_PROMPT}, now())",
        {"remembered_prompts"},
        "echomine forget --prompt",
    ),
    ("delete from files where table_name = 'rollouts'", {"miscounted_files"}, "restore the catalog"),
    ("update files set num_rows = num_rows + 1", {"miscounted_files"}, "restore the catalog"),
    (f"delete from rollouts where rollout_id = {SOME_CLIP}", {"orphan_clips"}, "echomine mine"),
]


@pytest.fixture
def copy(sample_lake: SampleLake, tmp_path: Path) -> Lake:
    shutil.copytree(sample_lake.lake.folder, tmp_path / "lake")
    return Lake.open(tmp_path / "lake")


def bad(lake: Lake) -> list[Finding]:
    return [finding for finding in examine_lake(lake.folder) if not finding.ok]


def change(lake: Lake, sql: str) -> None:
    def run(writer: Writer) -> None:
        writer.begin()
        writer.connection.execute(sql)

    lake.changed(run)


def test_the_sample_lake_is_healthy(copy: Lake) -> None:
    assert bad(copy) == []


@pytest.mark.parametrize(("sql", "checks", "cure"), BREAKS, ids=[sql for sql, *_ in BREAKS])
def test_the_doctor_sees_what_was_broken_and_names_the_cure(
    copy: Lake, sql: str, checks: set[str], cure: str
) -> None:
    change(copy, sql)
    found = {finding.name.removeprefix("check "): finding.text for finding in bad(copy)}
    assert found.keys() == checks
    assert all("lists them" in text for text in found.values())
    assert any(cure in text for text in found.values())


def test_prompts_known_by_tokens_beside_others_known_by_words_are_no_loss_and_lost_words_are(
    tmp_path: Path,
) -> None:
    prompts = (
        {"prompt": "1+1"},
        {"prompt": "1+2"},
        {"prompt_ids": [5, 100, 0]},
        {"prompt_ids": [7]},
        {"prompt_ids": [8], "prompt_id": "named by the dump"},
    )
    rows = [
        {"group_id": f"g{group}", "sample_index": index, "reward": 1.0, **prompt}
        | {"completion_ids": [5, 6 + index], "completion_entropies": [0.125, 0.25]}
        for group, prompt in enumerate(prompts)
        for index in range(2)
    ]
    path = tmp_path / "dump.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lake = Lake.create(tmp_path / "lake")
    assert import_rollouts(lake, with_formats([path]), character_tokenizer()).rows.written == 10
    assert bad(lake) == []
    change(lake, f"delete from prompts where prompt_id = {SOME_PROMPT}")
    (finding,) = bad(lake)
    assert finding.name == "check orphan_rollouts"
    assert finding.text.startswith("2 offending rows")


def test_the_query_that_the_doctor_advises_lists_what_offends(copy: Lake) -> None:
    change(copy, "update files set num_rows = num_rows + 1 where table_name = 'rollouts'")
    (finding,) = bad(copy)
    command = re.search(r"`(echomine sql .+?)` lists them", finding.text)[1]
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=SQL_FOLDER.parent,
        env=os.environ
        | {"ECHOMINE_LAKE": str(copy.folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert next(copy.files.rglob("rollouts/*.parquet")).name in done.stdout


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_an_export_that_lost_or_changed_a_file_is_named_and_a_deleted_one_is_not(
    copy: Lake, tmp_path, damage
) -> None:
    shards = tmp_path / "shards" / "export"
    shards.mkdir(parents=True)
    (shards / "clips-00000.parquet").write_bytes(b"what was exported")
    sha256 = hashlib.sha256(b"what was exported").hexdigest()
    change(
        copy,
        f"insert into shards select '{shards}/clips-00000.parquet', mining_id, 1, 1, '{sha256}', now() "
        "from mining_runs",
    )
    assert bad(copy) == []
    damage(shards / "clips-00000.parquet")
    named = [finding for finding in bad(copy) if finding.name == "shard export/clips-00000.parquet"]
    assert len(named) == 1
    assert f"Delete {shards} and export again" in named[0].text
    shutil.rmtree(shards)
    assert not [finding for finding in bad(copy) if finding.name.startswith("shard ")]


def test_a_flipped_byte_is_named_with_the_cure_and_the_command_exits_with_2(
    copy: Lake, capfd: pytest.CaptureFixture[str]
) -> None:
    path = next(copy.files.rglob("rollouts/*.parquet"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert main(["doctor", "--lake", str(copy.folder)]) == 2
    line = next(line for line in capfd.readouterr().out.splitlines() if path.name in line)
    assert line.startswith("BAD")
    assert "SHA-256 differs" in line
    assert "Restore it from a backup" in line
