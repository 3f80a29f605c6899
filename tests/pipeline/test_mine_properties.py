"""Mining in SQL against a plain walk of the rules, on lakes that hypothesis makes up."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from lake_worker import rollout
from mining_reference import CLIP, Row, SeveralKinds, steps, walked
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pipeline.config import MiningConfig
from pipeline.errors import MiningError
from pipeline.ingest import ingest
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.schema import VERDICTS

MAX_TOKENS = 8
REWARDS = {
    "solved": st.sampled_from([1.0, 1.0, 1.0, 1.0 - 5e-7]),
    "failed": st.just(0.0),
    "equal": st.just(1 / 3),
    "mixed": st.sampled_from([0.0, 1 / 3, 0.5, 0.75, 1.0, 1.0 + 1e-6, 2.0]),
}
PIECES = ("a", "b\n", "\n", " ", " c", "\nd", "e\u2028 ", "<eos>")
SETTINGS = settings(
    deadline=None,  # a lake's speed is the machine's
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


def digits(number: int, base: int, count: int) -> list[int]:
    return [number // base**place % base for place in range(count)]


@st.composite
def rollout_rows(draw: st.DrawFn, style: str, kinds: list[str | None]) -> Row:
    """A rollout of few tokens, so that clips and entropies are often equal; one number holds many choices."""
    num_tokens = draw(st.integers(0, MAX_TOKENS))
    kind = draw(st.sampled_from(kinds))
    entropies = digits(draw(st.integers(0, 4**MAX_TOKENS - 1)), 4, num_tokens)
    cuts = digits(draw(st.integers(0, 2**MAX_TOKENS - 1)), 2, max(num_tokens - 1, 0))
    ends = [place for place, cut in enumerate(cuts, 1) if cut]
    return {
        "completion_ids": digits(draw(st.integers(0, 2**MAX_TOKENS - 1)), 2, num_tokens),
        "completion_entropies": None if kind is None else [entropy / 4 for entropy in entropies],
        "entropy_kind": kind,
        "step_ends": [*ends, num_tokens] if num_tokens else [],
        "reward": draw(REWARDS[style]),
        "finish_reason": draw(st.sampled_from(["stop"] * 5 + ["length"])),
        "origin": draw(st.sampled_from(["policy"] * 4 + ["trainer", "expert"])),
    }


@st.composite
def groups(draw: st.DrawFn, kinds: list[str | None]) -> list[Row]:
    """A group's rollouts, their sample indices in any order."""
    style = draw(st.sampled_from(["solved", "solved", *REWARDS]))
    members = draw(st.lists(rollout_rows(style, kinds), min_size=1, max_size=4))
    lost, version = draw(st.sampled_from([0, 0, 0, 1])), draw(st.integers(0, 3))
    facts = {
        "prompt_id": f"p{draw(st.integers(0, 4))}",
        "model": draw(st.sampled_from(["m", "n"])),
        "policy_version": version,
        "group_size": len(members) + lost,
    }
    indices = draw(st.permutations(range(len(members))))
    return [member | facts | {"sample_index": i} for member, i in zip(members, indices, strict=True)]


@st.composite
def lakes(draw: st.DrawFn) -> list[Row]:
    """The rows of a lake of up to 150 groups."""
    kinds = draw(st.sampled_from([["full_vocab"] * 20 + [None], ["full_vocab"] * 9 + ["rescored", None]]))
    # few where a failure is being narrowed down, else many
    num_groups = draw(st.one_of(st.integers(1, 8), *[st.integers(80, 150)] * 3))
    drawn = draw(st.lists(groups(kinds), min_size=num_groups, max_size=num_groups))
    return [
        rollout(f"g{number:03}", row["sample_index"]) | row
        for number, group in enumerate(drawn)
        for row in group
    ]


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


CONFIGS = st.builds(
    MiningConfig,
    scope=st.sampled_from(["zero_advantage", "any_success", "any_success"]),
    clips_per_group=st.sampled_from([1, 1, 2, 4]),
    min_step_tokens=st.sampled_from([1, 1, 2, 3]),
    max_clip_tokens=maybe(st.integers(1, MAX_TOKENS)),
    min_step_entropy=st.sampled_from([0.0, 0.0, 0.25, 0.5]),
    allow_truncated=st.booleans(),
    allow_partial=st.booleans(),
    min_group_size=st.integers(1, 3),
    max_policy_lag=st.one_of(st.none(), st.none(), st.integers(0, 3)),
    policy_version=maybe(st.integers(0, 5)),
    max_clips=st.one_of(st.none(), st.integers(0, 12), st.integers(0, 40)),
    max_clips_per_prompt=st.one_of(st.none(), st.integers(0, 3), st.integers(0, 12)),
    success_reward=st.sampled_from([1.0, 1.0, 1.0, 0.5, 1 / 3]),
    fail_reward=st.sampled_from([0.0, 0.0, 1 / 3]),
    reward_tolerance=st.sampled_from([1e-6, 1e-6, 0.0, 0.25, 0.5]),
    entropy_kind=st.sampled_from([None, "full_vocab", "full_vocab", "full_vocab", "rescored"]),
)
OPTION_SETS = st.lists(CONFIGS, min_size=4, max_size=4, unique_by=lambda config: config.model_dump_json())


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="a"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def spelled(rows: list[Row], pieces: list[int]) -> list[Row]:
    """The rows with tokens of the tokenizer, equal completions staying equal."""

    def ids(row: Row) -> list[int]:
        return [pieces[4 * token + place % 4] for place, token in enumerate(row["completion_ids"])]

    return [row | {"completion_ids": ids(row)} for row in rows]


def split_at(rows: list[Row], delimiter: str) -> list[Row]:
    """The rows with the reference's steps."""

    def ends(ids: list[int]) -> list[int]:
        special = [place for place, token in enumerate(ids) if PIECES[token] == "<eos>"]
        return steps([PIECES[token] for token in ids], special, delimiter)

    return [row | {"step_ends": ends(row["completion_ids"])} for row in rows]


def mined(lake: Lake, config: MiningConfig, **reach: Any) -> tuple[Counter[str], Counter[str], list[Row]]:
    """What SQL gives, in the form of `walked`."""
    try:
        mining = mine(lake, config, tokenizer=tokenizer, **reach)
    except MiningError as error:
        raise SeveralKinds from error
    with lake.reader() as reader:
        clips = reader.rows(
            "select * from echo_clips where mining_id = $id order by clip_rank", {"id": mining.mining_id}
        )
    found = [{name: clip[name] for name in (*CLIP, "step_entropy")} for clip in clips]
    return Counter(mining.groups), Counter(mining.dropped), found


def check(
    empty: Path, rows: list[Row], configs: list[MiningConfig], mined_rows: list[Row] | None = None
) -> None:
    """Mines a lake of `rows`; a walk over `mined_rows`, by default the same, finds as much."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(empty, Path(folder) / "lake")
        lake = Lake.open(Path(folder) / "lake")
        assert ingest(lake, rows, ["made up"] * len(rows)).written == len(rows)
        for config in configs:
            try:
                expected = walked(mined_rows or rows, config)
            except SeveralKinds:
                event("refused: several kinds of entropy")
                with pytest.raises(SeveralKinds):
                    mined(lake, config)
                continue
            for reason in expected[1]:
                event(f"dropped: {reason}")
            assert mined(lake, config) == expected, config


@settings(SETTINGS, max_examples=8, phases=[Phase.generate, Phase.shrink])
@given(rows=lakes(), configs=OPTION_SETS)
def test_sql_and_a_plain_walk_of_the_rules_choose_the_same_clips(
    empty: Path, rows: list[Row], configs: list[MiningConfig]
) -> None:
    check(empty, rows, configs)


@settings(SETTINGS, max_examples=4, phases=[Phase.generate, Phase.shrink])
@given(rows=lakes(), configs=OPTION_SETS, pieces=st.permutations(range(len(PIECES))))
def test_splitting_again_at_newlines_mines_the_clips_of_the_stored_steps(
    empty: Path, rows: list[Row], configs: list[MiningConfig], pieces: list[int]
) -> None:
    again = [config.model_copy(update={"delimiter": "\n"}) for config in configs[1:]]
    check(empty, split_at(spelled(rows, pieces), "\n"), [configs[1], *again])


@settings(SETTINGS, max_examples=4, phases=[Phase.generate, Phase.shrink])
@given(
    rows=lakes(),
    configs=OPTION_SETS,
    pieces=st.permutations(range(len(PIECES))),
    delimiter=st.sampled_from(["\n", " ", "\u2028", "\t"]),
)
def test_sql_and_a_plain_walk_split_at_any_delimiter_whatever_steps_are_stored(
    empty: Path, rows: list[Row], configs: list[MiningConfig], pieces: list[int], delimiter: str
) -> None:
    given_steps = spelled(rows, pieces)
    configs = [config.model_copy(update={"delimiter": delimiter}) for config in configs]
    check(empty, given_steps, configs, split_at(given_steps, delimiter))


@settings(SETTINGS, max_examples=4, phases=[Phase.generate, Phase.shrink])
@given(rows=lakes(), configs=OPTION_SETS, chance=st.randoms(use_true_random=False))
def test_sql_and_a_plain_walk_see_the_same_of_runs_of_the_news_and_of_verdicts(
    empty: Path, rows: list[Row], configs: list[MiningConfig], chance: Random
) -> None:
    rows = [row | {"run_id": _run(row, chance)} for row in rows]
    late = {index for index in range(len(rows)) if chance.random() < 0.3}
    verdicts = {
        index: chance.choice([0.0, 1.0, row["reward"], None])
        for index, row in enumerate(rows)
        if chance.random() < 0.1
    }
    counting = [
        row if verdicts.get(index) is None else row | {"reward": verdicts[index]}
        for index, row in enumerate(rows)
    ]
    news = {
        row["group_id"]
        for index, row in enumerate(rows)
        if index in late or counting[index]["reward"] != row["reward"]
    }
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(empty, Path(folder) / "lake")
        lake = Lake.open(Path(folder) / "lake")
        _put(lake, [row for index, row in enumerate(rows) if index not in late])
        with lake.reader() as reader:
            before = reader.snapshot
        _put(lake, [rows[index] for index in sorted(late)])
        _judge(
            lake,
            {(rows[index]["group_id"], rows[index]["sample_index"]): verdicts[index] for index in verdicts},
        )
        for config in configs:
            run = chance.choice([None, rows[0]["run_id"]])
            since = chance.choice([None, before])
            reached = [
                row
                for row in counting
                if run in (None, row["run_id"]) and (since is None or row["group_id"] in news)
            ]
            reach = {"run_id": run, "since_snapshot": since}
            try:
                expected = walked(reached, config, counting)
            except SeveralKinds:
                with pytest.raises(SeveralKinds):
                    mined(lake, config, **reach)
                continue
            event(f"mined {'one run' if run else 'all runs'}, {'the news' if since else 'everything'}")
            assert mined(lake, config, **reach) == expected, (config, reach)


def _run(row: Row, chance: Random) -> str:
    """Of its group, but for some that another run went on with."""
    return f"run {(int(row['group_id'][1:]) + (chance.random() < 0.1)) % 3}"


def _put(lake: Lake, rows: list[Row]) -> None:
    assert ingest(lake, rows, ["made up"] * len(rows)).written == len(rows)


def _judge(lake: Lake, rewards: dict[tuple[str, int], float | None]) -> None:
    """A second verifier's verdicts, by group and sample."""
    with lake.reader() as reader:
        ids = {
            (row["group_id"], row["sample_index"]): row["rollout_id"]
            for row in reader.rows("select group_id, sample_index, rollout_id from rollouts")
        }
    verdicts = [
        {"rollout_id": ids[place], "verifier": "second", "verifier_version": "1", "reward": reward}
        for place, reward in rewards.items()
    ]
    now = {"judged_at": datetime.now(UTC)}
    lake.commit({"verdicts": pa.Table.from_pylist([row | now for row in verdicts], VERDICTS)})


@pytest.mark.slow
@settings(SETTINGS, max_examples=22)
@given(rows=lakes(), configs=OPTION_SETS)
def test_sql_and_a_plain_walk_of_the_rules_agree_on_thousands_of_groups(
    empty: Path, rows: list[Row], configs: list[MiningConfig]
) -> None:
    assume(len(rows) > 20)
    check(empty, rows, configs)
