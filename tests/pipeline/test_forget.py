"""A forgotten prompt is in no file, snapshot or page of the lake, and does not come back."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from sample_lake import LakeBuilder, overturned

from pipeline.checks import run_checks
from pipeline.config import ExportConfig, MiningConfig
from pipeline.errors import BusyError, PromptError
from pipeline.exports.core import export_clips
from pipeline.exports.shards import SHARDS
from pipeline.forget import forget
from pipeline.forgetting import find
from pipeline.forgotten import Forgotten
from pipeline.ingest import ingest
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.quarantine import Refused
from pipeline.records import Prompt
from pipeline.rollouts import rollout_table
from pipeline.schema import SCORINGS
from pipeline.shards import load_clips

SECRET, WRITTEN = "zzz Quokka 7141 zzz", "aaa Wombat 9253 aaa"  # the last and the first of their columns
SECRET_PROMPT = Prompt(({"role": "user", "content": SECRET},), None, "sums")


def everything(folder: Path) -> str:
    """All that the files of a lake hold: their bytes, their Parquet values, and the catalog's rows."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        found.append(path.read_bytes().decode("utf-8", "replace"))
        if path.suffix == ".parquet":
            found.append(str(pq.read_table(path).to_pylist()))
            found.append(str(pq.read_metadata(path).to_dict()))
        if path.name == "catalog.sqlite":
            with sqlite3.connect(path) as catalog:
                found.append("\n".join(catalog.iterdump()))
            catalog.close()
    return "\n".join(found)


@pytest.fixture
def builder(tmp_path: Path) -> LakeBuilder:
    """A mined lake with two groups, one of them of the secret prompt, which left traces everywhere."""
    builder = LakeBuilder(tmp_path / "lake")
    builder.add_group(["1\n#42", "20\n30\n#42"], [1.0, 1.0])
    name = builder.add_group([f"{WRITTEN}\n#42", "7\n8\n#42"], [1.0, 1.0], question=SECRET)
    lost = {**builder.rows[-1], "sample_index": 5, "reward": None}
    raw = {"line": json.dumps({"prompt": SECRET, "completion": WRITTEN})[:-3]}
    other = Refused("no reward", "dump:2", {"group_id": "another", "prompt": "What is 17+25?"})
    lake = builder.commit([Refused("no reward", name, lost), Refused("no JSON", "dump:1", raw), other])
    lake.replace_rollouts(  # the bytes of the row before stay in its file
        rollout_table([builder.rows[-2]]), lake_rows(lake, "scorings")
    )
    mine(lake, MiningConfig())
    overturned(lake, 2)
    return builder


def lake_rows(lake: Lake, table: str):
    with lake.reader() as reader:
        return reader.table(f"select * from lake.{table}")


def test_the_bytes_are_gone_from_every_file_and_the_rest_is_there(builder: LakeBuilder) -> None:
    lake = builder.lake
    assert SECRET in everything(lake.folder)
    assert WRITTEN in everything(lake.folder)
    done = forget(lake, find(lake, [SECRET_PROMPT.prompt_id]))
    assert (done.prompts, done.rows["rollouts"], done.rows["echo_clips"], done.rows["quarantine"]) == (
        1,
        2,
        1,
        2,
    )
    left = everything(lake.folder)
    assert [text for text in (SECRET, WRITTEN) if text in left] == []
    with lake.reader() as reader:
        assert [row["completion"] for row in reader.rows("select completion from rollouts order by 1")] == [
            "1\n#42",
            "20\n30\n#42",
        ]
        assert len(reader.rows("from quarantine")) == 1
        assert len(reader.rows("from snapshots")) == 1
        assert reader.rows("from prompts where messages >= 'a' and messages <= 'b'") == []
        assert len(reader.rows("from prompts where messages like '%17+25%'")) == 1
        assert reader.verification(everything=True).damaged() == []
        assert [check for check in run_checks(reader) if check.num_offending] == []
    assert forget(lake, find(lake, [SECRET_PROMPT.prompt_id])).rows["rollouts"] == 0, "it may be run again"


def test_neither_rows_nor_text_of_it_come_back(builder: LakeBuilder) -> None:
    lake = builder.lake
    forget(lake, find(lake, [SECRET_PROMPT.prompt_id]))
    prompts = [Prompt(SECRET_PROMPT.messages, "another truth"), Prompt(({"role": "user", "content": "1+1"},))]
    with lake.reader() as reader:
        assert Forgotten.of(reader).without([SECRET_PROMPT, *prompts]) == prompts[1:]
    nameless = {**builder.rows[-1], "prompt_id": "known by its tokens only"}
    refused = [Refused(f"what it says: {WRITTEN}", "dump:3", {"prompt": SECRET, "text": WRITTEN})]
    done = ingest(lake, [builder.rows[-2], nameless], ["dump:1", "dump:2"], [SECRET_PROMPT], refused)
    assert (done.written, done.known, done.refused) == (0, 0, 3)
    with lake.reader() as reader:
        rows = reader.rows("select reason, source from quarantine where source like 'dump:_' order by all")
    assert [row["reason"] for row in rows if row["reason"] == "the prompt was forgotten"] == [
        "the prompt was forgotten"
    ] * 3
    assert SECRET not in everything(lake.folder)
    assert WRITTEN not in everything(lake.folder)


def test_a_prompt_file_forgets_the_question_whatever_its_truth(builder: LakeBuilder, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    path.write_text(json.dumps({"prompt": SECRET, "ground_truth": "42"}) + "\n")
    assert forget(builder.lake, find(builder.lake, [str(path)])).rows["rollouts"] == 2
    ids = tmp_path / "ids.txt"
    ids.write_text("0" * 32 + "\n" + "1" * 32 + "\n")
    assert forget(builder.lake, find(builder.lake, [str(ids)])).prompts == 2


@pytest.mark.parametrize("name", ["no-such-file.txt", "42", "/"])
def test_what_is_neither_an_id_nor_a_file_is_refused(builder: LakeBuilder, name: str) -> None:
    with pytest.raises(PromptError, match=r"neither a prompt id .* nor a file"):
        find(builder.lake, [name])


def test_shards_that_are_out_are_named_and_lose_the_clip(builder: LakeBuilder, tmp_path: Path) -> None:
    lake = LakeBuilder(tmp_path / "shared").lake
    lake.commit({"rollouts": rollout_table(builder.rows)})
    mine(lake, MiningConfig())
    export = export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig())
    assert len(load_clips(export.folder, builder.tokenizer_hash)) == 2
    done = forget(lake, find(lake, [SECRET_PROMPT.prompt_id]))
    assert [(shard.path, shard.clips, shard.noticed) for shard in done.shards] == [
        (str(export.folder / "clips-00000.parquet"), 1, True)
    ]
    assert len(load_clips(export.folder, builder.tokenizer_hash)) == 1
    mine(lake, MiningConfig())
    assert export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig()).clips == 1


def test_it_is_refused_while_a_night_runs_and_tidies_its_leavings_afterwards(
    builder: LakeBuilder,
) -> None:
    lake = builder.lake
    run = lake.folder / "runs" / "run-1"
    run.mkdir(parents=True)
    (run / "report.html").write_text(WRITTEN)
    (run / "run.json").write_text(json.dumps({"snapshot": 3, "done": True}))
    found = find(lake, [SECRET_PROMPT.prompt_id])
    with FileLock(lake.folder / "nightly.lock"), pytest.raises(BusyError, match="Wait until it is done"):
        forget(lake, found)
    assert forget(lake, found).reports == [str(run / "report.html")]
    assert json.loads((run / "run.json").read_text()) == {"snapshot": None, "done": True}
    assert WRITTEN not in everything(lake.folder)


def test_a_scorer_that_holds_its_rollouts_does_not_bring_them_back(builder: LakeBuilder) -> None:
    lake = builder.lake
    scored, kept = rollout_table(builder.rows[-1:]), rollout_table(builder.rows[:1])
    rows = pa.concat_tables([kept, scored])
    facts = {"model": "small", "weights_hash": "w", "policy_version": 0, "scored_at": datetime.now(UTC)}
    notes = [{"rollout_id": rollout_id, **facts} for rollout_id in rows["rollout_id"].to_pylist()]
    scorings = pa.Table.from_pylist(notes, SCORINGS)
    forget(lake, find(lake, [SECRET_PROMPT.prompt_id]))
    assert lake.replace_rollouts(rows, scorings) == 1
    assert lake.replace_rollouts(scored, scorings.slice(1)) == 0
    assert lake_rows(lake, "scorings")["rollout_id"].to_pylist() == kept["rollout_id"].to_pylist()
    assert WRITTEN not in everything(lake.folder)
