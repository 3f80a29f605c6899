"""The example questions have the answers that were worked out by hand from `tests/sample_lake.py`."""

from __future__ import annotations

import json
import shutil
from datetime import date
from typing import Any

import pytest
from sample_lake import overturned, prompt_id

from flows.cli import main
from pipeline.errors import QueryError
from pipeline.lake import Lake
from pipeline.sqlfiles import SQL_FOLDER, example, examples

FIRST, SECOND = date(2026, 3, 1), date(2026, 3, 2)
NIGHTS = (date(2026, 3, 3), date(2026, 3, 4), date(2026, 3, 5))  # of the model `taught`


def add(question: str) -> str:
    return f"What is {question}?"


# Of each example the columns that the rows below give, and the rows in their order.
ANSWERS: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
    "zero_advantage_share": (
        "night, model, num_groups, num_zero_advantage_groups, zero_advantage_share",
        [
            (FIRST, "other", 1, 1, 1.0),
            (SECOND, "other", 6, 4, 4 / 6),
            (FIRST, "small", 6, 4, 4 / 6),
            (SECOND, "small", 6, 4, 4 / 6),
            (NIGHTS[0], "taught", 6, 5, 5 / 6),
            (NIGHTS[1], "taught", 6, 4, 4 / 6),
            (NIGHTS[2], "taught", 7, 5, 5 / 7),
        ],
    ),
    "first_solved": (
        "question, model, policy_version, first_night, num_successes, num_rollouts, num_failures_before",
        [
            (add("5+5"), "taught", 10, NIGHTS[1], 1, 2, 2),
            (add("7+7"), "taught", 10, NIGHTS[1], 2, 2, 2),
        ],
    ),
    "fallen_back": (
        "question, model, best_version, best_success_rate, newest_version, newest_success_rate",
        [
            (add("9+9"), "taught", 10, 1.0, 20, 0.0),
            (add("6+7"), "taught", 0, 1.0, 20, 0.5),
            (add("17+25"), "small", 8, 1.0, 9, 0.5),
        ],
    ),
    # 22 successes; 15 wrong and 3 right failures: (15 × 1/2 + 3 × 1/8) / 18 and (15 × 3/4 + 3 × 1/4) / 18
    "entropy_by_outcome": (
        "model, tenth, success_entropy, failure_entropy, num_success_tokens, num_failure_tokens",
        [("taught", tenth, 0.125, 0.4375, 22, 18) for tenth in range(1, 6)]
        + [("taught", tenth, 0.25, 2 / 3, 22, 18) for tenth in range(6, 11)],
    ),
    # four right completions of mean 3/16, two wrong of 5/8
    "expert_entropy": (
        "question, model, entropy_kind, expert_entropy, policy_entropy, num_expert_rollouts, "
        "num_policy_rollouts",
        [
            (add("5+5"), "taught", "full_vocab", 1.0, 1 / 3, 1, 6),
            (add("6+7"), "taught", "full_vocab", 1.0, 1 / 3, 1, 6),
        ],
    ),
    "repeated_clips": (
        "question, clip_tokens, num_rollouts, num_minings, first_night, last_night, first_version, "
        "last_version",
        [
            (add("3+9"), 10, 3, 4, NIGHTS[0], NIGHTS[2], 0, 20),
            (add("7+7"), 10, 2, 3, NIGHTS[1], NIGHTS[2], 10, 20),
        ],
    ),
    # small: 53 tokens in each of four groups, 6 in the failed one, 11 in the one of half rewards
    "wasted_tokens": (
        "night, model, num_tokens, all_success_tokens, all_fail_tokens, all_equal_tokens, wasted_tokens, "
        "wasted_share",
        [
            (FIRST, "other", 6, 6, 0, 0, 6, 1.0),
            (SECOND, "other", 229, 106, 6, 11, 123, 123 / 229),
            (FIRST, "small", 229, 106, 6, 11, 123, 123 / 229),
            (SECOND, "small", 229, 106, 6, 11, 123, 123 / 229),
            (NIGHTS[0], "taught", 120, 40, 60, 0, 100, 100 / 120),
            (NIGHTS[1], "taught", 120, 60, 20, 0, 80, 80 / 120),
            (NIGHTS[2], "taught", 160, 60, 40, 0, 100, 100 / 160),
        ],
    ),
    "verifier_disagreements": (
        "verifier, earlier_version, later_version, num_completions, num_disagreements, disagreement_share",
        [
            ("exact", "1", "3", 5, 1, 1 / 5),
            ("exact", "1", "2", 6, 1, 1 / 6),
            ("exact", "2", "3", 6, 0, 0.0),
        ],
    ),
    "hardest_prompts": (
        "question, model, num_groups, num_rollouts, num_versions, newest_version, num_tokens",
        [
            (add("8+9"), "taught", 3, 6, 3, 20, 60),
            (add("1+2+3"), "small", 2, 4, 2, 8, 12),
            (add("1+2+3"), "other", 1, 2, 1, 3, 6),
        ],
    ),
    "training_consumption": (
        "training_id, num_clips, num_prompts, num_uses, num_optim_steps, num_tokens, min_policy_version, "
        "first_loss, last_loss",
        [("training-2", 2, 2, 3, 2, 30, 20, 0.625, 0.375)],
    ),
    "clips_by_lag": (
        "model, policy_lag, num_clips, num_tokens, mean_step_entropy",
        [("taught", 0, 3, 30, 0.25), ("taught", 10, 3, 30, 0.25), ("taught", 20, 2, 20, 0.25)],
    ),
    # under 1/2 the three groups of half rewards are solved; under 1/4 the one of four, 1, 1, 3/4, 3/4
    "yield_by_rule": (
        "group_size, reward_tolerance, num_groups, num_all_success, num_all_fail, num_all_equal, "
        "zero_advantage_share",
        [
            *((2, tolerance, 39, 19, 9, 3, 31 / 39) for tolerance in (1e-6, 0.01, 0.1, 0.25)),
            (2, 0.5, 39, 22, 9, 0, 31 / 39),
            *((4, tolerance, 1, 0, 0, 0, 0.0) for tolerance in (1e-6, 0.01, 0.1)),
            *((4, tolerance, 1, 1, 0, 0, 1.0) for tolerance in (0.25, 0.5)),
        ],
    ),
}
# The other models' clips and entropies are random.
ONLY_TAUGHT = {
    "entropy_by_outcome": ("model", "taught"),
    "clips_by_lag": ("model", "taught"),
    "training_consumption": ("training_id", "training-2"),
}
# Rows that tie in all they are ordered by but a hash.
TIED = {"first_solved", "expert_entropy"}


def test_twelve_questions_have_answers_here():
    files = {path.stem for path in (SQL_FOLDER / "examples").glob("*.sql")}
    assert set(examples()) == set(ANSWERS) == files
    assert len(files) == 12


@pytest.mark.parametrize("name", ANSWERS)
def test_an_example_has_the_answer_worked_out_by_hand(sample_lake, name):
    columns, rows = ANSWERS[name]
    with sample_lake.lake.reader() as reader:
        answer = reader.select(example(name)).table.to_pylist()
    if name in ONLY_TAUGHT:
        column, value = ONLY_TAUGHT[name]
        answer = [row for row in answer if row[column] == value]
    found = [tuple(row[column] for column in columns.split(", ")) for row in answer]
    if name in TIED:
        found.sort()
    assert len(found) == len(rows)
    for row, expected in zip(found, rows, strict=True):
        assert _same(row, expected), f"{row} is not {expected}"


def _same(row: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return all(
        a == pytest.approx(b) if isinstance(b, float) else a == b for a, b in zip(row, expected, strict=True)
    )


def test_a_disagreement_names_a_rollout_of_the_prompt_that_was_judged_anew(sample_lake):
    with sample_lake.lake.reader() as reader:
        rollout_id = reader.select(example("verifier_disagreements")).table["example_rollout_id"][0].as_py()
        rows = reader.rows(
            "select prompt_id, reward from rollouts where rollout_id = $id", {"id": rollout_id}
        )
    assert rows == [{"prompt_id": prompt_id("What is 5+5?"), "reward": 1.0}]


def test_answers_go_by_the_newest_verdict(sample_lake, tmp_path):
    lake = Lake.open(shutil.copytree(sample_lake.lake.folder, tmp_path / "lake"))
    rollout_id = overturned(lake)[0]
    with lake.reader() as reader:
        pairs = reader.rows(example("verifier_disagreements"))
        query = "select * from {} join rollouts using (group_id) where rollout_id = $id"
        groups = reader.rows(query.format("groups"), {"id": rollout_id})
        varied = reader.rows(query.format("variance_top_p(1)"), {"id": rollout_id})
        of_group = "prompt_id = $prompt_id and model = $model and policy_version = $policy_version"
        history = reader.rows(f"from prompt_history where {of_group}", groups[0])
    assert sum(pair["num_disagreements"] for pair in pairs) > sum(
        row[4] for row in ANSWERS["verifier_disagreements"][1]
    )
    assert (groups[0]["group_class"], len(varied)) == ("mixed", 1)
    assert history[0]["num_successes"] < history[0]["num_rollouts"]


def test_the_history_of_a_prompt_says_what_was_learned_and_forgotten(sample_lake):
    with sample_lake.lake.reader() as reader:
        history = {
            question: [
                row["change"]
                for row in reader.rows(
                    "select change from prompt_history where prompt_id = $id and model = 'taught' "
                    "order by policy_version",
                    {"id": prompt_id(add(question))},
                )
            ]
            for question in ("5+5", "6+7", "8+9", "9+9")
        }
    assert history == {
        "5+5": ["first", "better", "learned"],
        "6+7": ["first", "forgotten", "same"],
        "8+9": ["first", "same", "same"],
        "9+9": ["first", "learned", "forgotten"],
    }


def test_the_command_runs_an_example_and_lists_them_all(sample_lake, capsys):
    arguments = ["--lake", str(sample_lake.lake.folder), "--format", "json"]
    assert main(["sql", "--example", "hardest_prompts", *arguments]) == 0
    assert [row["num_tokens"] for row in json.loads(capsys.readouterr().out)] == [60, 12, 6]
    assert main(["sql", "--examples"]) == 0
    listed = capsys.readouterr().out
    for name, question in examples().items():
        assert f"{name} " in listed
        assert question in listed


def test_an_unknown_example_is_answered_with_the_nearest():
    with pytest.raises(QueryError, match=r"no example `hardest`: did you mean `hardest_prompts`\?"):
        example("hardest")
