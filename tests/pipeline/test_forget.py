"""A forgotten prompt is in no file, snapshot or page of the lake, and does not come back."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from sample_lake import LakeBuilder, character_tokenizer, overturned

from pipeline.checks import run_checks
from pipeline.config import ExportConfig, MiningConfig
from pipeline.errors import BusyError, LakeError, MiningError, NothingToMine, PromptError
from pipeline.exports.core import Form, export_clips
from pipeline.exports.hf import hf
from pipeline.exports.luffy import luffy
from pipeline.exports.prime_rl import prime_rl
from pipeline.exports.sft import sft
from pipeline.exports.shards import SHARDS
from pipeline.exports.trl import trl
from pipeline.forget import forget
from pipeline.forgetting import find
from pipeline.forgotten import Forgotten
from pipeline.formats import verl
from pipeline.imports.core import import_rollouts
from pipeline.imports.staging import ImportStaging
from pipeline.ingest import Ingested, ingest, ingest_table
from pipeline.lake import Lake
from pipeline.lake_writer import Writer
from pipeline.mine import mine
from pipeline.quarantine import Refused
from pipeline.records import Prompt
from pipeline.rollouts import prompt_table, rollout_table
from pipeline.schema import CLIP_USES, SCORINGS
from pipeline.set_aside import set_aside
from pipeline.shards import load_clips
from pipeline.what_if import parse_changes, simulate

SECRET, WRITTEN = "zzz Quokka 7141 zzz", "aaa Wombat 9253 aaa"  # the last and the first of their columns
SECRET_PROMPT = Prompt(({"role": "user", "content": SECRET},), None, "sums")
SAME_QUESTION = Prompt(SECRET_PROMPT.messages, "another truth")


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
    done = forget(lake, [SECRET_PROMPT.prompt_id])
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
    assert forget(lake, [SECRET_PROMPT.prompt_id]).rows["rollouts"] == 0, "it may be run again"


def test_neither_rows_nor_text_of_it_come_back(builder: LakeBuilder) -> None:
    lake = builder.lake
    forget(lake, [SECRET_PROMPT.prompt_id])
    prompts = [Prompt(SECRET_PROMPT.messages, "another truth"), Prompt(({"role": "user", "content": "1+1"},))]
    assert Forgotten.of(lake).without([SECRET_PROMPT, *prompts]) == prompts[1:]
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


def test_what_was_made_ready_before_is_kept_out_when_it_is_committed(builder: LakeBuilder) -> None:
    lake, rows = builder.lake, rollout_table(builder.rows)
    named = {**builder.rows[-1], "prompt_id": SAME_QUESTION.prompt_id, "prompt_ids": [1, 2, 3]}
    ready = pa.concat_tables([rows, rollout_table([named])])
    prompts = prompt_table([SECRET_PROMPT, SAME_QUESTION])
    forget(lake, [SECRET_PROMPT.prompt_id])
    done = ingest_table(
        lake, ready, {4: "duplicate"}, lambda n: (f"dump:{n}", ready.slice(n, 1).to_pylist()[0]), prompts
    )
    assert done == Ingested(written=0, known=2, refused=3)
    assert lake_rows(lake, "prompts")["messages"].to_pylist() == [
        json.dumps(list(builder.prompts[0].messages))
    ]
    left = everything(lake.folder)
    assert [text for text in (SECRET, WRITTEN) if text in left] == []


REFUSED_ROWS = {
    "verl": {"input": SECRET, "output": WRITTEN, "score": "bad", "step": 3},
    "messages": {"messages": [*SECRET_PROMPT.messages, {"role": "assistant", "content": WRITTEN}]},
    "text in parts": {"prompt": [{"role": "user", "content": [{"type": "text", "text": SECRET}]}]},
    "JSON in JSON": {"episode": json.dumps({"steps": [{"question": SECRET, "answer": WRITTEN}]})},
    "tokens": {"sample": {"prompt_token_ids": character_tokenizer()(SECRET)["input_ids"], "text": WRITTEN}},
}


@pytest.mark.parametrize("name", REFUSED_ROWS)
def test_a_refused_row_is_recognized_however_its_dump_names_the_prompt(
    builder: LakeBuilder, tmp_path: Path, name: str
) -> None:
    lake = builder.lake
    forget(lake, [SECRET_PROMPT.prompt_id])
    ingest(lake, [], [], (), [Refused(f"of {WRITTEN}", "dump:7", REFUSED_ROWS[name])])
    path = tmp_path / "1.jsonl"
    path.write_text(json.dumps(REFUSED_ROWS[name]) + "\n")
    imported = import_rollouts(lake, [(path, verl)], builder.tokenizer)
    assert imported.rows == Ingested(refused=1)
    left = everything(lake.folder)
    assert [text for text in (SECRET, WRITTEN) if text in left] == []


def test_refused_rows_that_only_hold_its_text_go_when_its_file_is_given_again(
    builder: LakeBuilder, tmp_path: Path
) -> None:
    lake, path = builder.lake, tmp_path / "evaluation.jsonl"
    path.write_text(json.dumps({"prompt": SECRET}) + "\n")
    forget(lake, [str(path)])
    cut = json.dumps({"prompt": SECRET, "completion": WRITTEN})[:-3]
    rendered = f"<|im_start|>user\n{SECRET}<|im_end|>\n"
    ingest(lake, [], [], (), [Refused("no JSON", "dump:1", {"line": cut})])
    ingest(lake, [], [], (), [Refused("no reward", "dump:2", {"prompt": rendered, "output": WRITTEN})])
    assert forget(lake, [SECRET_PROMPT.prompt_id]).rows["quarantine"] == 0, "an id tells no text"
    assert forget(lake, [str(path)]).rows["quarantine"] == 2
    left = everything(lake.folder)
    assert [text for text in (SECRET, WRITTEN) if text in left] == []


def test_a_prompt_file_forgets_the_question_whatever_its_truth(builder: LakeBuilder, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    path.write_text(json.dumps({"prompt": SECRET, "ground_truth": "42"}) + "\n")
    assert forget(builder.lake, [str(path)]).rows["rollouts"] == 2
    ids = tmp_path / "ids.txt"
    ids.write_text("0" * 32 + "\n" + "1" * 32 + "\n")
    assert forget(builder.lake, [str(ids)]).prompts == 2


@pytest.mark.parametrize("name", ["no-such-file.txt", "42", "/"])
def test_what_is_neither_an_id_nor_a_file_is_refused(builder: LakeBuilder, name: str) -> None:
    with pytest.raises(PromptError, match=r"neither a prompt id .* nor a file"):
        find(builder.lake, [name])


def test_a_dumps_own_id_of_a_prompt_names_it(builder: LakeBuilder) -> None:
    lake = builder.lake
    rows = [row | {"prompt_id": "7", "run_id": "other"} for row in builder.rows[-2:]]
    other = [
        row | {"group_id": "own", "rollout_id": f"own-{n}", "prompt_ids": [1, 2, 3]}
        for n, row in enumerate(rows)
    ]
    lake.commit({"rollouts": rollout_table(other)})
    assert forget(lake, ["7"]).rows["rollouts"] == 2
    assert forget(lake, ["7"]).rows["rollouts"] == 0, "it is known still"
    forgotten = Forgotten.of(lake)
    assert forgotten.holds({"prompt_id": "7"})
    assert not forgotten.holds({"completion": "7"}), "a short id is no text"


TOKENIZER = character_tokenizer()
FORMS = [SHARDS, luffy(TOKENIZER), sft(TOKENIZER), prime_rl(0.1), trl(TOKENIZER), hf(TOKENIZER)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_one_file_with_the_clip_is_named_in_every_form(
    builder: LakeBuilder, tmp_path: Path, form: Form
) -> None:
    lake = LakeBuilder(tmp_path / "shared").lake
    lake.commit({"rollouts": rollout_table(builder.rows), "prompts": prompt_table(builder.prompts)})
    mine(lake, MiningConfig())
    with lake.reader() as reader:
        order = [row["prompt_id"] for row in reader.rows("select prompt_id from clips order by clip_rank")]
    export = export_clips(lake, tmp_path / "out", form, ExportConfig(clips_per_shard=1))
    done = forget(lake, [SECRET_PROMPT.prompt_id])
    number = order.index(SECRET_PROMPT.prompt_id)
    assert [(shard.path, shard.clips, shard.noticed) for shard in done.shards] == [
        (str(export.folder / f"clips-{number:05}{form.suffix}"), 1, True)
    ]
    assert len(json.loads((export.folder / "withdrawn.json").read_text())["forgotten"]) == 1
    if form is SHARDS:
        assert len(load_clips(export.folder, builder.tokenizer_hash)) == 1
    mine(lake, MiningConfig())
    assert export_clips(lake, tmp_path / "out", form, ExportConfig()).clips == 1


def test_an_export_that_runs_meanwhile_leaves_nothing(builder: LakeBuilder, tmp_path: Path) -> None:
    lake = LakeBuilder(tmp_path / "shared").lake
    lake.commit({"rollouts": rollout_table(builder.rows)})
    mine(lake, MiningConfig())

    def rows(clips: pa.Table) -> pa.Table:
        assert clips.num_rows == 2
        assert forget(lake, [SECRET_PROMPT.prompt_id]).shards == []
        return SHARDS.rows(clips)

    with pytest.raises(LakeError, match=r"forgotten meanwhile\. Nothing was recorded; run the command again"):
        export_clips(lake, tmp_path / "out", replace(SHARDS, rows=rows), ExportConfig())
    assert list((tmp_path / "out").iterdir()) == []
    assert export_clips(lake, tmp_path / "out", SHARDS, ExportConfig()).clips == 1


def test_where_nothing_tells_which_clips_a_file_holds_it_may_be_all_of_the_mining(
    builder: LakeBuilder, tmp_path: Path
) -> None:
    lake = LakeBuilder(tmp_path / "shared").lake
    lake.commit({"rollouts": rollout_table(builder.rows)})
    mine(lake, MiningConfig())
    unnamed, gone = (
        export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig(clips_per_shard=n)).folder
        for n in (10, 20)
    )
    (unnamed / "clips.json").unlink()
    shutil.rmtree(gone)
    shards = forget(lake, [SECRET_PROMPT.prompt_id]).shards
    assert {Path(shard.path).parent: (shard.clips, shard.noticed) for shard in shards} == {
        unnamed: (1, True),
        gone: (1, False),
    }
    assert len(load_clips(unnamed, builder.tokenizer_hash)) == 1


def test_it_is_refused_while_a_night_runs_and_tidies_its_leavings_afterwards(
    builder: LakeBuilder,
) -> None:
    lake = builder.lake
    run = lake.folder / "runs" / "run-1"
    run.mkdir(parents=True)
    (run / "report.html").write_text(WRITTEN)
    (run / "run.json").write_text(json.dumps({"snapshot": 3, "done": True}))
    skipped = run / "training-1" / "skipped"
    skipped.mkdir(parents=True)
    (skipped / "step-000001.safetensors").write_text(WRITTEN)
    names = [SECRET_PROMPT.prompt_id]
    with FileLock(lake.folder / "nightly.lock"), pytest.raises(BusyError, match="Wait until it is done"):
        forget(lake, names)
    assert forget(lake, names).reports == [str(run / "report.html")]
    assert json.loads((run / "run.json").read_text()) == {"snapshot": None, "done": True}
    assert WRITTEN not in everything(lake.folder)


def test_a_clip_that_a_training_found_in_its_own_rollouts_is_forgotten_with_its_training_named(
    builder: LakeBuilder,
) -> None:
    facts = {"run_id": "training-1", "origin": "trainer", "policy_version": 3}
    builder.add_group(["3\n#42"], [1.0], question=SECRET, **facts)
    rollout = rollout_table(builder.rows[-1:])
    name = hashlib.md5(f"{rollout['rollout_id'][0]}:2".encode()).hexdigest()
    uses = [("training-1", f"online-{name}"), ("training-2", "online-0123")]
    values = {"optim_step": 0, "clip_loss": 1.0, "created_at": datetime.now(UTC)}
    rows = [{"training_id": training, "clip_id": clip, **values} for training, clip in uses]
    builder.lake.commit({"rollouts": rollout, "clip_uses": pa.Table.from_pylist(rows, CLIP_USES)})
    done = forget(builder.lake, [SECRET_PROMPT.prompt_id])
    assert "training-1" in done.trainings
    assert "training-2" not in done.trainings
    with builder.lake.reader() as reader:
        left = reader.rows("select clip_id from clip_uses where clip_id like 'online-%'")
    assert left == [{"clip_id": "online-0123"}]


def test_a_scorer_that_holds_its_rollouts_does_not_bring_them_back(builder: LakeBuilder) -> None:
    lake = builder.lake
    scored, kept = rollout_table(builder.rows[-1:]), rollout_table(builder.rows[:1])
    rows = pa.concat_tables([kept, scored])
    facts = {"model": "small", "weights_hash": "w", "policy_version": 0, "scored_at": datetime.now(UTC)}
    notes = [{"rollout_id": rollout_id, **facts} for rollout_id in rows["rollout_id"].to_pylist()]
    scorings = pa.Table.from_pylist(notes, SCORINGS)
    forget(lake, [SECRET_PROMPT.prompt_id])
    assert lake.replace_rollouts(rows, scorings) == 1
    assert lake.replace_rollouts(scored, scorings.slice(1)) == 0
    assert lake_rows(lake, "scorings")["rollout_id"].to_pylist() == kept["rollout_id"].to_pylist()
    assert WRITTEN not in everything(lake.folder)


def test_damaged_files_stop_it_and_once_set_aside_are_named_since_nothing_can_search_them(
    builder: LakeBuilder,
) -> None:
    lake = builder.lake
    path = sorted((lake.folder / "files" / "main" / "rollouts").glob("*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LakeError, match="Run `echomine doctor` to see what is damaged"):
        forget(lake, [SECRET_PROMPT.prompt_id])
    set_aside(lake)
    done = forget(lake, [SECRET_PROMPT.prompt_id])
    assert done.set_aside == [str(lake.folder / "damaged" / "main" / "rollouts" / path.name)]


def test_rollouts_that_came_after_the_user_asked_what_would_go_are_found_too(builder: LakeBuilder) -> None:
    lake = builder.lake
    assert len(find(lake, [SECRET_PROMPT.prompt_id]).keys["rollouts"]) == 2
    builder.add_group([f"{WRITTEN} again\n#42"], [1.0], question=SECRET)
    lake.commit({"rollouts": rollout_table(builder.rows[-1:])})
    assert forget(lake, [SECRET_PROMPT.prompt_id]).rows["rollouts"] == 3
    assert WRITTEN not in everything(lake.folder)


def test_what_a_killed_import_staged_goes_and_a_running_one_is_waited_for(builder: LakeBuilder) -> None:
    lake = builder.lake
    staged = lake.folder / "staging" / "killed"
    staged.mkdir(parents=True)
    staged.with_suffix(".lock").touch()
    (staged / "part-000").write_text(WRITTEN)
    with ImportStaging(lake.folder, 0) as running:
        with pytest.raises(BusyError, match=r"An import .* is running. Wait until it is done, then forget"):
            forget(lake, [SECRET_PROMPT.prompt_id])
        assert running.folder.is_dir()
        assert len(lake_rows(lake, "rollouts")) == 4
    forget(lake, [SECRET_PROMPT.prompt_id])
    assert WRITTEN not in everything(lake.folder)


def test_minings_say_how_many_clips_they_lost_and_other_losses_still_show(builder: LakeBuilder) -> None:
    lake = builder.lake
    forget(lake, [SECRET_PROMPT.prompt_id])
    (mining,) = lake_rows(lake, "mining_runs").to_pylist()
    assert (mining["num_clips"], dict(mining["dropped"])["forgotten"]) == (1, 1)

    def lose_clips(writer: Writer) -> None:
        writer.begin()
        writer.connection.execute("delete from echo_clips")

    lake.changed(lose_clips)
    with lake.reader() as reader:
        offending = {check.name for check in run_checks(reader) if check.num_offending}
    assert "miscounted_minings" in offending


def test_clips_that_were_found_before_are_not_recorded_afterwards(builder: LakeBuilder) -> None:
    lake = builder.lake
    before, clips = Forgotten.of(lake), lake_rows(lake, "echo_clips")
    forget(lake, [SECRET_PROMPT.prompt_id])
    with pytest.raises(
        LakeError, match=r"were forgotten meanwhile\. Nothing was recorded; run the command again"
    ):
        before.commit(lake, {"echo_clips": clips})
    assert len(lake_rows(lake, "echo_clips")) == 1


def test_afterwards_minings_name_a_snapshot_that_is_there(builder: LakeBuilder) -> None:
    lake = builder.lake
    mine(lake, MiningConfig(), since_snapshot=2)
    forget(lake, ["0" * 32])  # nothing of it was there
    changes = parse_changes("clips_per_group=1")
    with pytest.raises(NothingToMine, match=r"which has ended since\. Mine again"):
        simulate(lake, changes)
    with lake.reader() as reader:
        newest, begins = reader.snapshot, "the lake's history begins with"
    for since_the_second in (
        lambda: simulate(lake, changes, snapshot=newest),
        lambda: mine(lake, MiningConfig(), since_snapshot=2),
    ):
        with pytest.raises(MiningError, match=f"after snapshot 2 cannot be told: {begins} {newest}"):
            since_the_second()
    mined = mine(lake, MiningConfig())
    assert mined == mine(lake, MiningConfig()), "it is the same mining now"
    with lake.reader(mined.snapshot) as reader:
        assert len(reader.rows("from rollouts")) == 4
    assert simulate(lake, changes).snapshot == mined.snapshot
    assert mine(lake, MiningConfig(), since_snapshot=mined.snapshot).clips == 0
