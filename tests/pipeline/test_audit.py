"""The audit's figures on a dump whose every number is known."""

from __future__ import annotations

import json
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import main
from pipeline.audits.core import Audit, ClassFigures, audit
from pipeline.audits.page import write_audit_page
from pipeline.audits.rules import RuleFigures
from pipeline.config import MiningConfig
from pipeline.errors import FormatError, LakeError
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


def written(path: Path, content: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def rewards_only(**groups: list[float]) -> list[dict[str, Any]]:
    return [{"group_id": name, "reward": reward} for name, given in groups.items() for reward in given]


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    groups = [
        *rows("solved", [1.0, 1.0, 1.0], 10),
        *rows("also solved", [1.0, 1.0], 8),
        *rows("failed", [0.0, 0.0], 6),
        *rows("half", [0.5, 0.5], 4),
        *rows("mixed", [1.0, 0.0], 20),
    ]
    groups.append(rows("mixed", [float("nan")], 20)[0] | {"group_id": "refused"})
    return written(tmp_path / "dump.jsonl", groups)


def by_trainer(found: Audit) -> dict[str, RuleFigures]:
    return {rule.trainer: rule for rule in found.rules}


def test_every_figure_of_a_dump(dump):
    found = audit([dump], load_tokenizer(MODEL), MiningConfig())
    assert found.classes == {
        "all_equal": ClassFigures(groups=1, rollouts=2, tokens=8),
        "all_fail": ClassFigures(groups=1, rollouts=2, tokens=12),
        "all_success": ClassFigures(groups=2, rollouts=5, tokens=46),
        "mixed": ClassFigures(groups=1, rollouts=2, tokens=40),
    }
    assert (found.mined.clips, found.mined.dropped, found.mined.why_not) == (2, {}, "")
    assert found.refused == found.mined.refused == {"the reward is nan": 1}
    assert (found.groups, found.zero_advantage_groups) == (5, 4)
    assert (found.tokens, found.zero_advantage_tokens) == (106, 66)
    assert found.zero_advantage_share == pytest.approx(66 / 106)


def test_the_mining_options_decide_the_classes_and_the_clips(dump):
    found = audit([dump], load_tokenizer(MODEL), MiningConfig(success_reward=0.5, max_clips=1))
    assert found.classes["all_success"] == ClassFigures(groups=3, rollouts=7, tokens=54)
    assert "all_equal" not in found.classes
    assert (found.mined.clips, found.mined.dropped) == (1, {"max_clips": 2})


def test_what_each_rule_misses_and_drops_with_the_tokens_and_the_phantom(tmp_path):
    groups = {"missed by verl": [0.7] * 6, "by the others": [0.7] * 8, "dropped": [-1.0, 1.0]}
    given = [row | {"completion_ids": [1] * 5} for row in rewards_only(**groups)]
    found = by_trainer(audit([written(tmp_path / "d.jsonl", given)], None, MiningConfig()))
    verl, openrlhf, skyrl = found["verl"], found["OpenRLHF"], found["SkyRL"]
    assert (verl.missed, verl.missed_tokens, verl.dropped) == (1, 30, 0)
    assert (verl.largest_phantom, verl.mean_phantom) == (0.0, 0.0)  # 6 × 0.7 is exact in float32
    assert verl.largest_unfiltered == pytest.approx(0.056, abs=5e-4)
    assert (openrlhf.missed, openrlhf.missed_tokens) == (2, 70)
    assert (openrlhf.dropped, openrlhf.dropped_tokens) == (1, 10)
    assert openrlhf.largest_phantom == pytest.approx(0.921, abs=5e-4)
    assert openrlhf.mean_phantom == pytest.approx(0.921 * 8 / 14, abs=5e-4)
    assert (skyrl.missed, skyrl.dropped, skyrl.largest_phantom) == (0, 0, None)
    assert found["TRL, replay buffer"].missed == 1


@pytest.mark.parametrize("indices", [[2, None], [None, 2], [None, 0], [1, None]])
def test_rows_without_an_index_are_counted_past_the_given_ones_and_none_is_lost(tmp_path, indices):
    given = [row | {"sample_index": i} for row, i in zip(rewards_only(a=[1.0, 0.0]), indices, strict=True)]
    found = audit([written(tmp_path / "d.jsonl", given)], None, MiningConfig())
    assert found.classes == {"mixed": ClassFigures(1, 2, None)}


def test_incomplete_groups_are_judged_by_no_rule(tmp_path):
    given = [row | {"group_size": 9} for row in rewards_only(lost=[0.7] * 8)] + rewards_only(alone=[0.7])
    found = audit([written(tmp_path / "d.jsonl", given)], None, MiningConfig())
    assert set(found.classes) == {"incomplete"}
    assert sum(rule.missed + rule.dropped for rule in found.rules) == 0


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_groups_and_rewards_are_enough(tmp_path, suffix):
    given = rewards_only(a=[1.0, 1.0], b=[0.0, 1.0])
    path = tmp_path / f"dump{suffix}"
    if suffix == ".jsonl":
        written(path, given)
    else:
        pq.write_table(pa.Table.from_pylist(given), path)
    found = audit([path], None, MiningConfig())
    assert found.classes == {"all_success": ClassFigures(1, 2, None), "mixed": ClassFigures(1, 2, None)}
    assert (found.tokens, found.zero_advantage_share) == (None, None)
    assert found.mined.clips is None
    assert found.mined.why_not == "steps need token texts: give the model's folder with --tokenizer"


def test_what_cannot_be_mined_is_audited_all_the_same_and_says_why(tmp_path):
    path = tmp_path / "dump.parquet"
    pq.write_table(pa.Table.from_pylist(rewards_only(a=[1.0, 1.0])), path)
    found = audit([path], load_tokenizer(MODEL), MiningConfig())
    assert found.classes == {"all_success": ClassFigures(1, 2, None)}
    assert found.mined.clips is None
    assert "has no column `sample_index`" in found.mined.why_not


def test_text_is_counted_in_tokens_where_there_is_a_tokenizer(tmp_path):
    given = [row | {"completion": "17+25\n"} for row in rewards_only(a=[1.0, 1.0])]
    path = written(tmp_path / "dump.jsonl", given)
    assert audit([path], None, MiningConfig()).tokens is None
    length = len(load_tokenizer(MODEL).encode("17+25\n", add_special_tokens=False))
    assert audit([path], load_tokenizer(MODEL), MiningConfig()).tokens == 2 * length


def test_where_some_rollouts_tell_no_tokens_no_sum_and_no_share_of_tokens_is_told(tmp_path, capfd):
    told = [row | {"completion_ids": [1] * 5} for row in rewards_only(a=[1.0, 0.0], b=[0.0, 0.0])]
    untold = rewards_only(c=[1.0, 1.0], b=[0.0], half=[0.7] * 8)
    paths = [written(tmp_path / "told.jsonl", told), written(tmp_path / "untold.jsonl", untold)]
    found = audit(paths, None, MiningConfig())
    assert found.classes == {
        "all_equal": ClassFigures(1, 8, None),
        "all_fail": ClassFigures(1, 3, None),
        "all_success": ClassFigures(1, 2, None),
        "mixed": ClassFigures(1, 2, 10),
    }
    assert (found.tokens, found.zero_advantage_tokens, found.zero_advantage_share) == (None, None, None)
    openrlhf = by_trainer(found)["OpenRLHF"]
    assert (openrlhf.missed, openrlhf.missed_tokens, openrlhf.dropped_tokens) == (1, None, 0)
    assert main(["audit", *map(str, paths)]) == 0
    shown = capfd.readouterr().out
    assert "Zero-advantage groups: 3 of 4 groups (75.0 %) taught nothing." in shown
    mixed = next(line for line in shown.splitlines() if "mixed" in line)
    assert "%" not in mixed, "a share of what is not known"


def test_a_row_that_is_there_twice_counts_once_and_an_expert_never(tmp_path):
    given = [{"group_id": "a", "sample_index": index, "reward": 1.0} for index in (0, 1, 1)]
    given.append({"group_id": "a", "sample_index": 2, "reward": 0.0, "origin": "expert"})
    found = audit([written(tmp_path / "dump.jsonl", given)], None, MiningConfig())
    assert found.classes == {"all_success": ClassFigures(1, 2, None)}


def test_rows_that_say_no_group_or_reward_are_counted_by_reason(tmp_path):
    bad = [
        {"group_id": "a", "reward": "1"},
        {"reward": 1},
        {"group_id": "a"},
        {"group_id": 3, "reward": 1},
        4,
    ]
    found = audit([written(tmp_path / "d.jsonl", bad)], None, MiningConfig())
    assert found.refused == {
        "column `group_id` is missing or no text": 2,
        "no JSON object in valid Unicode": 1,
        "the reward is missing": 1,
        "the reward is no number": 1,
    }
    assert (found.classes, found.groups, found.zero_advantage_groups) == ({}, 0, 0)


def test_an_audit_leaves_nothing_behind(dump, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    audit([dump], load_tokenizer(MODEL), MiningConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dump.jsonl"]


def test_dumps_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    for name, message in (
        ("none.jsonl", "There is no file"),
        ("a.csv", r"neither \.parquet nor \.jsonl"),
        ("cut.parquet", "no complete Parquet file"),
    ):
        with pytest.raises(FormatError, match=message):
            audit([tmp_path / name], None, MiningConfig())


def test_the_command_prints_the_tables_and_the_same_numbers_as_json(dump, capfd):
    assert main(["audit", str(dump), "--tokenizer", str(MODEL)]) == 0
    shown = capfd.readouterr().out
    assert "66 of 106 completion tokens (62.3%) taught nothing" in shown
    assert "2 EchoClips" in shown
    assert "the reward is nan 1" in shown
    assert "std from E[x²]" in " ".join(shown.split())
    assert main(["audit", str(dump), "--tokenizer", str(MODEL), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["classes"]["all_fail"] == {"groups": 1, "rollouts": 2, "tokens": 12}
    assert (found["tokens"], found["zero_advantage_tokens"], found["clips"]) == (106, 66, 2)
    assert {rule["trainer"]: rule["missed"] for rule in found["rules"]}["OpenRLHF"] == 1
    assert main(["audit", str(dump), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["clips"] is None
    assert "--tokenizer" in found["not_mined"]


class Page(HTMLParser):
    """What a page asks a browser to load or run, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href") or name[:2] == "on"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_the_figures_escapes_what_dumps_say_and_loads_nothing(tmp_path):
    hostile = "<script>alert(1)</script>\u202e.jsonl".replace("/", "∕")
    path = written(tmp_path / hostile, [*rewards_only(a=[0.7] * 8, b=[-1.0, 1.0]), {"group_id": "a"}])
    found = audit([path], None, MiningConfig())
    page = Page(write_audit_page(found, [path], tmp_path / "out" / "audit.html").read_text())
    assert page.links == []
    assert not page.tags & {"script", "img", "link", "iframe"}
    assert "<script>alert(1)<∕script>⟨U+202E⟩.jsonl" in page.text
    assert "OpenRLHF" in page.text
    assert "0.921" in page.text
    assert "rows without a group or a reward: 1 (the reward is missing)" in page.text
    with pytest.raises(LakeError, match="Cannot write"):
        write_audit_page(found, [path], path / "audit.html")


def test_the_page_of_a_dump_without_a_group_says_so(tmp_path):
    path = written(tmp_path / "d.jsonl", [{"group_id": 3, "reward": 1}])
    page = write_audit_page(audit([path], None, MiningConfig()), [path], tmp_path / "a.html").read_text()
    assert "The dump holds no group." in Page(page).text


def test_a_browser_draws_the_page_without_a_complaint(dump, tmp_path, chromium):
    page = write_audit_page(
        audit([dump], load_tokenizer(MODEL), MiningConfig()), [dump], tmp_path / "audit.html"
    )
    done = subprocess.run(
        [
            *(
                str(chromium),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--dump-dom",
                "--enable-logging=stderr",
            ),
            f"--user-data-dir={tmp_path / 'browser'}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "2 with zero advantage" not in done.stdout
    assert "4 with zero advantage" in done.stdout
    assert "CONSOLE" not in done.stderr
