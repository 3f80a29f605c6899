"""verl's dumps, as verl writes them (see dumps/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sample_lake import character_tokenizer

from pipeline.formats import verl
from pipeline.imports.core import Imported, import_rollouts, with_formats
from pipeline.ingest import Ingested
from pipeline.lake import Lake

TOKENIZER = character_tokenizer()
V0 = Path(__file__).parent / "dumps" / "verl" / "v0" / "7.jsonl"
V1 = Path(__file__).parent / "dumps" / "verl" / "v1" / "8.jsonl"


def taken(lake: Lake, *files: Path) -> Imported:
    return import_rollouts(lake, with_formats(files), TOKENIZER)


def rollouts(lake: Lake, columns: str) -> list[tuple[Any, ...]]:
    with lake.reader() as reader:
        sql = (
            f"select {columns} from rollouts order by min(rollouts.reward) over (partition by group_id) desc,"
        )
        return [tuple(row.values()) for row in reader.rows(f"{sql} group_id, sample_index")]


def test_a_v0_dump_is_grouped_by_its_input_and_the_user_is_told(lake: Lake) -> None:
    done = taken(lake, V0)
    assert done.rows == Ingested(written=4)
    assert done.assumed == {
        "verl's v0 dump names no groups: rows of one file with the same `input` were taken as one."
    }
    columns = "sample_index, group_size, policy_version, reward, reward_parts, completion_entropies"
    parts = [[("acc", 1.0)], [("acc", 0.0)]]
    assert rollouts(lake, columns) == [
        (0, 2, 7, 1.0, parts[0], None),
        (1, 2, 7, 1.0, parts[0], None),
        (0, 2, 7, 1.0, parts[0], None),
        (1, 2, 7, 0.0, parts[1], None),
    ]


def test_texts_are_tokenized_as_they_stand(lake: Lake) -> None:
    taken(lake, V0)
    text = "17+20=37\n37+5=42\n#42"
    ((prompt, completion, ids, ends),) = rollouts(lake, "prompt_ids, completion, completion_ids, step_ends")[
        1:2
    ]
    assert TOKENIZER.decode(prompt) == "17+25"
    assert completion == TOKENIZER.decode(ids) == text
    assert ends == [9, 17, 20]
    with lake.reader() as reader:
        prompts = reader.rows("select messages, ground_truth from prompts order by messages")
    assert [(json.loads(row["messages"])[0]["content"], row["ground_truth"]) for row in prompts] == [
        ("17+25", "42"),
        ("18+24", "42"),
    ]


def test_a_v1_dump_is_grouped_by_its_uid_and_only_the_last_output_of_a_session_counts(lake: Lake) -> None:
    done = taken(lake, V1)
    assert (done.rows, done.assumed) == (Ingested(written=4, refused=1), frozenset())
    assert rollouts(lake, "sample_index, group_size, policy_version, completion, reward")[2:] == [
        (0, 2, 8, "10+20=30\n7+5=12\n#42", 1.0),
        (1, 2, 8, "#42", 0.5),
    ]
    with lake.reader() as reader:
        (refused,) = reader.rows("select source, reason from quarantine")
    assert refused["source"] == f"{V1}:4"
    assert refused["reason"].startswith("an earlier output of its session")


def test_the_same_prompt_and_step_of_another_training_is_another_group(lake: Lake, tmp_path: Path) -> None:
    other = tmp_path / V0.name
    other.write_text(V0.read_text().replace("#42", "#41"))
    assert taken(lake, V0).rows == taken(lake, other).rows == Ingested(written=4)
    assert taken(lake, V0, V0).rows == Ingested(known=4 + 4)


def test_rows_that_are_no_rollouts_are_refused_with_their_line(tmp_path: Path) -> None:
    good = json.loads(V1.read_text().splitlines()[0])
    bad = [
        (7, "no JSON object"),
        ({"input": "a", "output": "b", "score": 1}, "column `step` is missing"),
        (good | {"output": ["b"]}, "must be text"),
        (good | {"uid": "a_b"}, "uid 'a_b' is not"),
        (good | {"uid": None}, "uid None is not"),
    ]
    path = tmp_path / "1.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in [*bad, (good, None)]))
    rows = list(verl.read(path))
    assert [row.source for row in rows] == [f"1.jsonl:{n}" for n in range(1, 7)]
    for row, (_, reason) in zip(rows, bad, strict=False):
        assert reason in (row.problem or "")
    assert rows[-1].problem is None
