"""Minings that split successes again: where their clips end, and what they refuse.

What they choose is in test_mine_properties.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_lake import EOS_ID, LakeBuilder

from flows.cli import main
from pipeline.config import ExportConfig, MiningConfig, validated
from pipeline.errors import ConfigError, MiningError
from pipeline.exports.core import export_clips
from pipeline.exports.shards import SHARDS
from pipeline.lake import Lake
from pipeline.mine import Mining, mine
from pipeline.models import model_folder
from pipeline.report_clips import clip_views
from pipeline.shards import load_clips
from pipeline.sqlfiles import sql_file
from pipeline.steps import SPLITTER
from pipeline.tokenization import load_tokenizer, tokenizer_hash
from pipeline.what_if import Overlap, parse_changes, simulate

# Words of three tokens with the space before them; the second line's first word is the least sure.
TEXT = "so it\nis 17 so"
NATS = [0.0] * 6 + [2.0, 1.0] + [0.25] * 6 + [0.0]
BY_LINE, BY_WORD = len("so it\n"), len("so it\nis")


@pytest.fixture
def builder(tmp_path: Path) -> LakeBuilder:
    builder = LakeBuilder(tmp_path / "lake")
    builder.add_group([TEXT, "other\none"], [1.0, 1.0], entropies=[NATS, [0.125] * 10])
    return builder


@pytest.fixture
def lake(builder: LakeBuilder) -> Lake:
    return builder.commit()


@pytest.fixture
def words(builder: LakeBuilder, lake: Lake) -> Callable[..., Mining]:
    """Mines with words as steps, unless the settings say otherwise."""

    def mined(tokenizer: Any = builder.tokenizer, **settings: Any) -> Mining:
        config = MiningConfig(**({"delimiter": " "} | settings))
        return mine(lake, config, tokenizer=lambda: tokenizer)

    return mined


def clips_of(lake: Lake, mining: Mining) -> list[dict[str, Any]]:
    with lake.reader() as reader:
        sql = "select * from clips where mining_id = $id order by clip_rank"
        return reader.rows(sql, {"id": mining.mining_id})


def clip_text(builder: LakeBuilder, ids: list[int]) -> str:
    return builder.tokenizer.decode(ids)


def test_a_clip_ends_with_the_step_that_the_delimiter_made(builder, lake, words):
    (clip,) = clips_of(lake, words())
    assert clip_text(builder, clip["clip_ids"]) == "so it\nis "
    assert (clip["step_index"], clip["num_steps"], clip["clip_tokens"]) == (1, 4, BY_WORD + 1)
    (stored,) = clips_of(lake, mine(lake, MiningConfig()))
    assert clip_text(builder, stored["clip_ids"]) == TEXT + "<eos>"
    assert (stored["step_index"], stored["num_steps"]) == (1, 2)


def test_an_exported_clip_ends_with_the_step_that_the_delimiter_made(builder, lake, words, tmp_path):
    done = export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig(), words().mining_id)
    (clip,) = load_clips(done.folder, builder.tokenizer_hash)
    assert clip_text(builder, clip.clip_ids.tolist()) == "so it\nis "


def test_the_report_draws_the_steps_that_the_delimiter_made(builder, lake, words):
    shown = {"mining_id": words().mining_id, "num_clips": 9}
    with lake.reader() as reader:
        rows = reader.rows(sql_file("reports/best_clips"), shown)
    (clip,) = clip_views(rows, builder.tokenizer).clips
    assert [(step.number, step.place, len(step.tokens)) for step in clip.steps] == [
        (1, "clip", 3), (2, "chosen", 6), (3, "after", 3), (4, "after", 3),
    ]  # fmt: skip
    assert clip.steps[1].entropy == rows[0]["step_entropy"] == pytest.approx(3.25 / 6)
    (clip,) = clip_views(rows, load_tokenizer(model_folder("arith"))).clips
    assert [(step.number, step.place, len(step.tokens), step.entropy) for step in clip.steps] == [
        (2, "chosen", BY_WORD + 1, rows[0]["step_entropy"]), (3, "after", 6, None),
    ]  # fmt: skip


def test_what_split_the_steps_is_recorded_and_names_the_mining(builder, lake, words):
    lines, spaces = words(delimiter="\n"), words()
    assert len({lines.mining_id, spaces.mining_id, mine(lake, MiningConfig()).mining_id}) == 3
    assert words() == spaces
    with lake.reader() as reader:
        rows = reader.rows(
            "select mining_id, config ->> 'delimiter' as delimiter, config ->> 'splitter' as splitter, "
            "config ->> 'tokenizer_hash' as tokenizer_hash from mining_runs order by splitter desc"
        )
    assert [(row["delimiter"], row["splitter"], row["tokenizer_hash"]) for row in rows] == [
        ("\n", SPLITTER, builder.tokenizer_hash),
        (" ", "U+0020-1", builder.tokenizer_hash),
        (None, None, None),
    ]


def test_steps_that_came_with_a_dump_give_way_to_the_delimiter(tmp_path):
    builder = LakeBuilder(tmp_path / "lake")
    ends = [4, len(TEXT) + 1]
    builder.add_group([TEXT] * 2, [1.0, 1.0], entropies=[NATS] * 2, step_ends=ends, splitter="given")
    lake = builder.commit()
    mined = mine(lake, MiningConfig(delimiter="\n"), tokenizer=lambda: builder.tokenizer)
    (clip,) = clips_of(lake, mined)
    assert (clip["step_index"], clip["clip_tokens"]) == (1, len(TEXT) + 1)
    assert clips_of(lake, mine(lake, MiningConfig(delimiter=None)))[0]["num_steps"] == 2


def test_news_and_single_runs_are_split_again_too(builder, lake, words):
    with lake.reader() as reader:
        before = reader.snapshot
    later = LakeBuilder(builder.lake.folder.with_name("other"), seed=1)
    later.lake = lake
    later.add_group(
        ["a b\nc"] * 2, [1.0, 1.0], run_id="run-2", question="?", entropies=[[0, 3, 0, 0, 0, 0]] * 2
    )
    later.commit()
    config = MiningConfig(delimiter=" ")

    def lengths(**scope: Any) -> list[int]:
        mined = mine(lake, config, tokenizer=lambda: builder.tokenizer, **scope)
        return [clip["clip_tokens"] for clip in clips_of(lake, mined)]

    assert lengths(since_snapshot=before) == lengths(run_id="run-2") == [2]
    assert lengths(run_id="run-1") == lengths(snapshot=before) == [BY_WORD + 1]
    assert lengths() == [2, BY_WORD + 1]


def test_copies_are_dropped_whichever_rule_stored_their_steps(tmp_path):
    builder = LakeBuilder(tmp_path / "lake")
    for step_ends in ([3, 15], [15]):
        builder.add_group([TEXT] * 2, [1.0, 1.0], entropies=[NATS] * 2, step_ends=step_ends, splitter="given")
    mined = mine(builder.commit(), MiningConfig(delimiter=" "), tokenizer=lambda: builder.tokenizer)
    assert (mined.clips, mined.dropped) == (1, {"duplicate": 1})


def test_a_group_that_awaits_the_scorer_is_dropped_whatever_its_tokenizer(builder, words):
    builder.add_group(
        [TEXT] * 2,
        [1.0, 1.0],
        question="?",
        completion_entropies=None,
        entropy_kind=None,
        tokenizer_hash="another",
    )
    builder.rows = builder.rows[2:]
    builder.commit()
    mined = words()
    assert (mined.clips, mined.dropped) == (1, {"unscored": 1})


def test_an_empty_completion_is_no_obstacle(tmp_path):
    builder = LakeBuilder(tmp_path / "lake")
    builder.add_group([TEXT, ""], [1.0, 1.0], entropies=[NATS, [0.5]])
    builder.rows[1] |= {
        "completion_ids": [],
        "completion_entropies": [],
        "completion_logprobs": [],
        "step_ends": [],
    }
    lake = builder.commit()
    mined = mine(lake, MiningConfig(delimiter=" ", clips_per_group=2), tokenizer=lambda: builder.tokenizer)
    assert [clip["clip_tokens"] for clip in clips_of(lake, mined)] == [BY_WORD + 1]


def test_another_tokenizer_is_refused_by_name_and_nothing_is_recorded(builder, lake, words):
    other = load_tokenizer(model_folder("arith"))
    with pytest.raises(MiningError) as refusal:
        words(other)
    for part in (builder.tokenizer_hash[:12], tokenizer_hash(other)[:12], "2 by", "--tokenizer"):
        assert part in str(refusal.value)
    with lake.reader() as reader:
        assert reader.rows("select * from mining_runs") == []


def test_token_ids_beyond_the_tokenizer_are_refused_where_no_tokenizer_is_recorded(tmp_path):
    builder = LakeBuilder(tmp_path / "lake")
    builder.add_group(["so"] * 2, [1.0, 1.0], tokenizer_hash=None)
    builder.rows[0]["completion_ids"] = [5, 70_000, EOS_ID]
    with pytest.raises(MiningError, match="from 5 to 70000, and the tokenizer has"):
        mine(builder.commit(), MiningConfig(delimiter=" "), tokenizer=lambda: builder.tokenizer)


def test_a_tokenizer_is_asked_for_only_where_steps_are_split_again(lake):
    def unwanted() -> Any:
        raise AssertionError("loading a tokenizer takes longer than a mining")

    assert mine(lake, MiningConfig(), tokenizer=unwanted).clips == 1
    with pytest.raises(MiningError, match="no tokenizer is given"):
        mine(lake, MiningConfig(delimiter="\n"))


@pytest.mark.parametrize(
    ("written", "delimiter"),
    [
        ("\\n", "\n"),
        ("\n", "\n"),
        ("\\x20", " "),
        (" ", " "),
        ("\\t", "\t"),
        ("\\u2028", "\u2028"),
        (None, None),
    ],
)
def test_a_delimiter_is_a_character_or_its_escape(written, delimiter):
    assert MiningConfig(delimiter=written).delimiter == delimiter


@pytest.mark.parametrize("written", ["", "\n\n", "\\n\\n", ".", "\\x2e", "a", ". ", "\\", "\\N"])
def test_a_delimiter_of_several_characters_or_of_none_that_is_white_space_is_refused(written):
    with pytest.raises(ConfigError, match=r"`delimiter` in the options is .*one white-space character"):
        validated(MiningConfig, {"delimiter": written}, where="the options")


def test_a_simulation_splits_again_and_a_later_one_may_keep_to_the_stored_steps(
    builder, lake, words, tmp_path
):
    def tokenizer() -> Any:
        return builder.tokenizer

    last = mine(lake, MiningConfig())
    changes = parse_changes("delimiter=\\x20,min_step_tokens=2")
    simulated = simulate(lake, changes, tokenizer=tokenizer)
    assert (simulated.mining_id, simulated.changes["delimiter"]) == (last.mining_id, " ")
    assert (simulated.what_if.clip_tokens, simulated.overlap) == (BY_WORD + 1, Overlap(0, 1, 1))
    shutil.copytree(lake.folder, tmp_path / "copy")
    copy = Lake.open(tmp_path / "copy")
    mine(copy, MiningConfig(delimiter=" "), tokenizer=tokenizer)
    back = simulate(copy, parse_changes("delimiter=none"), tokenizer=tokenizer)
    assert (back.last.clip_tokens, back.what_if.clip_tokens) == (BY_WORD + 1, simulated.last.clip_tokens)


def test_the_command_splits_again_with_the_tokenizer_of_a_folder(builder, lake, tmp_path, capsys):
    builder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    mining = ["mine", "--lake", str(lake.folder), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*mining, "--delimiter", "\\x20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with lake.reader() as reader:
        clips = reader.rows("select mining_id, clip_tokens from echo_clips")
    assert clips == [{"mining_id": found["mining_id"], "clip_tokens": BY_WORD + 1}]
    assert main([*mining, "--what-if", "delimiter=\\n"]) == 0
    assert "what if delimiter='\\n'" in capsys.readouterr().out
