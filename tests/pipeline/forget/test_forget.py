"""A forgotten prompt is in no file, snapshot or page of the lake, and does not come back."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from forget_helpers import SAME_QUESTION, SECRET, SECRET_PROMPT, WRITTEN, everything, lake_rows
from sample_lake import LakeBuilder, character_tokenizer

from pipeline.checks import run_checks
from pipeline.errors import PromptError
from pipeline.forget import forget
from pipeline.forgetting import find
from pipeline.forgotten import Forgotten
from pipeline.formats import verl
from pipeline.imports.core import import_rollouts
from pipeline.ingest import Ingested, ingest, ingest_table
from pipeline.quarantine import Refused
from pipeline.records import Prompt
from pipeline.rollouts import prompt_table, rollout_table


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
