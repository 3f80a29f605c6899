"""TRL's completions, as TRL writes them (see dumps/README.md)."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from foreign_dumps import write_rows

from pipeline.errors import FormatError
from pipeline.formats import trl
from pipeline.imports.core import Imported, import_rollouts, with_formats
from pipeline.ingest import Ingested
from pipeline.lake import Lake
from pipeline.models import model_folder
from pipeline.tokenization import load_tokenizer

FOLDER = Path(__file__).parent / "dumps" / "trl"
TEXT, MESSAGES = (sorted((FOLDER / kind).glob("*.parquet")) for kind in ("text", "messages"))
ARITH = load_tokenizer(model_folder("arith"))


def taken(lake: Lake, *files: Path) -> Imported:
    return import_rollouts(lake, with_formats(files), ARITH)


def test_neighbours_with_one_prompt_are_a_group_and_reward_functions_are_summed(lake: Lake) -> None:
    done = taken(lake, *TEXT)
    assert done.rows == Ingested(written=8)
    assert done.assumed == {
        "TRL's dump names no groups: neighbouring rows with the same prompt and step were taken as one. "
        "The reward is the sum of correct, steps."
    }
    with lake.reader() as reader:
        rows = reader.rows(
            "select policy_version, sample_index, group_size, completion, reward, reward_parts "
            "from rollouts where completion in ('\\n=20+10\\n=30\\n#30', '\\n=40+12\\n=52\\n#52') "
            .replace("\\n", "\n") + "order by policy_version"
        )  # fmt: skip
        groups = reader.rows("select count(*) as n from rollouts group by group_id")
    assert groups == [{"n": 2}] * 4
    assert [tuple(row.values()) for row in rows] == [
        (1, 1, 2, "\n=20+10\n=30\n#30", 1.0, [("correct", 1.0)]),  # the other function gave None
        (2, 0, 2, "\n=40+12\n=52\n#52", 0.25, [("correct", 0.0), ("steps", 0.25)]),
    ]


def test_conversational_prompts_are_rendered_and_completions_are_the_message(lake: Lake) -> None:
    assert taken(lake, *MESSAGES).rows == Ingested(written=8)
    with lake.reader() as reader:
        rows = reader.rows(
            "select distinct prompt_ids, messages from rollouts join prompts using (prompt_id) "
            "where completion = '=42' || chr(10) || '#42'"
        )
    template = ARITH.apply_chat_template(
        [{"role": "user", "content": "17+25"}], add_generation_prompt=True, return_dict=False
    )
    assert rows == [{"prompt_ids": template, "messages": '[{"role":"user","content":"17+25"}]'}]


def test_a_rollout_that_no_reward_function_judged_is_refused_and_several_messages_are(
    lake: Lake, tmp_path: Path
) -> None:
    unjudged = pq.read_table(TEXT[0]).to_pylist()
    unjudged[0] |= {"correct": float("nan")}
    write_rows(tmp_path / "unjudged.parquet", unjudged)
    talk = pq.read_table(MESSAGES[0]).to_pylist()
    talk[1]["completion"] *= 2
    write_rows(tmp_path / "talk.parquet", talk)
    done = taken(lake, tmp_path / "unjudged.parquet", tmp_path / "talk.parquet")
    assert done.rows == Ingested(written=6, refused=2)
    with lake.reader() as reader:
        refused = reader.rows("select source, reason from quarantine order by source")
        sizes = reader.rows("select distinct group_size from rollouts")
    assert [row["source"] for row in refused] == [
        f"{tmp_path}/talk.parquet:2",
        f"{tmp_path}/unjudged.parquet:1",
    ]
    assert "more than one message" in refused[0]["reason"]
    assert refused[1]["reason"] == "the reward is missing"
    assert sizes == [{"group_size": 2}]


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(TEXT[0].read_bytes()[:-9])
    with pytest.raises(FormatError, match="no complete Parquet file"):
        trl.read(cut)
    lacking = tmp_path / "lacking.parquet"
    pq.write_table(pq.read_table(TEXT[0]).drop_columns("completion"), lacking)
    with pytest.raises(FormatError, match="no column `completion`"):
        trl.read(lacking)
    assert not trl.recognizes(lacking)
