"""The audit's figures on a dump whose every number is known."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from pipeline.audit import Audit, ClassFigures, audit
from pipeline.config import MiningConfig
from pipeline.errors import FormatError
from pipeline.models import model_folder
from pipeline.tokenization import load_tokenizer

MODEL = model_folder("arith")


def rows(group: str, rewards: list[float], num_tokens: int) -> list[dict[str, Any]]:
    """Completions of `num_tokens` tokens (two steps); no two of a group are alike."""
    tokenizer = load_tokenizer(MODEL)
    half = num_tokens // 2
    texts = ["1" * (half - 1) + "\n" + str(index) * (num_tokens - half) for index in range(len(rewards))]
    return [
        {
            "group_id": group,
            "sample_index": index,
            "prompt": f"What is {group}?",
            "completion_ids": tokenizer.encode(text, add_special_tokens=False),
            "completion_entropies": [0.5] * num_tokens,
            "reward": reward,
        }
        for index, (text, reward) in enumerate(zip(texts, rewards, strict=True))
    ]


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    path = tmp_path / "dump.jsonl"
    groups = [
        *rows("solved", [1.0, 1.0, 1.0], 10),
        *rows("also solved", [1.0, 1.0], 8),
        *rows("failed", [0.0, 0.0], 6),
        *rows("half", [0.5, 0.5], 4),
        *rows("mixed", [1.0, 0.0], 20),
    ]
    groups.append(rows("mixed", [float("nan")], 20)[0] | {"group_id": "refused"})
    path.write_text("".join(json.dumps(row) + "\n" for row in groups))
    return path


def test_every_figure_of_a_dump(dump):
    found = audit([dump], load_tokenizer(MODEL), MiningConfig())
    assert found == Audit(
        classes={
            "all_equal": ClassFigures(groups=1, rollouts=2, tokens=8),
            "all_fail": ClassFigures(groups=1, rollouts=2, tokens=12),
            "all_success": ClassFigures(groups=2, rollouts=5, tokens=46),
            "mixed": ClassFigures(groups=1, rollouts=2, tokens=40),
        },
        clips=2,
        dropped={},
        refused={"the reward is nan": 1},
    )
    assert (found.tokens, found.zero_advantage_tokens) == (106, 66)
    assert found.zero_advantage_share == pytest.approx(66 / 106)


def test_the_mining_options_decide_the_classes_and_the_clips(dump):
    found = audit([dump], load_tokenizer(MODEL), MiningConfig(success_reward=0.5, max_clips=1))
    assert found.classes["all_success"] == ClassFigures(groups=3, rollouts=7, tokens=54)
    assert "all_equal" not in found.classes
    assert (found.clips, found.dropped) == (1, {"max_clips": 2})


def test_an_audit_leaves_nothing_behind(dump, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    audit([dump], load_tokenizer(MODEL), MiningConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dump.jsonl"]


def test_a_missing_dump_is_named():
    with pytest.raises(FormatError, match=r"There is no file none\.jsonl"):
        audit([Path("none.jsonl")], load_tokenizer(MODEL), MiningConfig())


def test_the_command_prints_the_table_and_the_same_numbers_as_json(dump, capfd):
    assert main(["audit", str(dump), "--tokenizer", str(MODEL)]) == 0
    shown = capfd.readouterr().out
    assert "66 of 106 completion tokens (62.3%) taught nothing" in shown
    assert "2 EchoClips" in shown
    assert "the reward is nan 1" in shown
    assert main(["audit", str(dump), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["classes"]["all_fail"] == {"groups": 1, "rollouts": 2, "tokens": 12}
    assert (found["tokens"], found["zero_advantage_tokens"], found["clips"]) == (106, 66, 2)
