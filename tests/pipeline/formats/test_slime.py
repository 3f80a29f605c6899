"""slime's debug dump, written by hand from its source with torch.save."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_dumps import DUMPS, FORMATS, damaged, read, values

from pipeline.errors import FormatError

FILE = "slime/rollout_5.pt"


def saved(tmp_path: Path, *samples: Any) -> Path:
    path = tmp_path / "rollout_1.pt"
    torch.save({"rollout_id": 1, "samples": list(samples)}, path)
    return path


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    return dict(torch.load(DUMPS / FILE, weights_only=True)["samples"][0])


def test_tokens_are_cut_at_the_response_and_the_rest_comes_as_it_stands() -> None:
    row = read("slime", FILE)[0]
    assert row.source == "rollout_5.pt:1"
    assert row.values == {
        "group_id": row.values["group_id"],
        "prompt_ids": [1, 2, 3, 4, 5],
        "messages": [{"role": "user", "content": "2+2?"}],
        "completion_ids": [52, 128],
        "completion_logprobs": [-0.125, -0.125],
        "reward": 1.0,
        "policy_version": 3,
        "finish_reason": "stop",
        "ground_truth": "4",
    }


def test_a_truncated_sample_is_cut_off_and_of_its_oldest_weights() -> None:
    row = read("slime", FILE)[1].values
    assert (row["finish_reason"], row["policy_version"]) == ("length", 3)
    assert row["group_id"].endswith("/21")


def test_a_reward_in_parts_is_the_score_or_refused() -> None:
    rows = read("slime", FILE)
    assert (rows[3].values["reward"], rows[3].values["reward_parts"]) == (1.0, {"score": 1.0, "format": 0.5})
    assert rows[6].problem == "the reward has the parts a, b, and none is called score"


def test_the_raw_reward_is_the_one_that_was_trained_on(tmp_path: Path, sample: dict[str, Any]) -> None:
    changes = {"reward": {"a": 1.0, "b": 0.0}, "metadata": {"raw_reward": 0.0}}
    (row,) = values(read("slime", saved(tmp_path, sample | changes)))
    assert (row["reward"], row["reward_parts"]) == (0.0, {"a": 1.0, "b": 0.0})


def test_several_turns_and_samples_that_did_not_end_are_refused_and_keep_their_place() -> None:
    rows = read("slime", FILE)
    assert rows[2].problem == "several sampled turns: `loss_mask` has other tokens between sampled ones"
    assert rows[4].problem == "the sample is aborted"
    assert len({row.values["group_id"] for row in rows}) == 1


def test_tokens_behind_the_sampled_ones_are_left_out() -> None:
    row = read("slime", FILE)[5].values
    assert (row["completion_ids"], row["completion_logprobs"]) == ([52, 128], [-0.125, -0.125])


def test_a_prompt_of_text_is_kept_beside_its_tokens(tmp_path: Path, sample: dict[str, Any]) -> None:
    (row,) = values(read("slime", saved(tmp_path, sample | {"prompt": "2+2?"})))
    assert (row["prompt_text"], "messages" in row) == ("2+2?", False)


def test_weights_without_a_number_leave_the_policy_unsaid(tmp_path: Path, sample: dict[str, Any]) -> None:
    (row,) = values(read("slime", saved(tmp_path, sample | {"weight_versions": ["default"]})))
    assert "policy_version" not in row


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bomb_in_the_file_is_refused_and_does_not_go_off(tmp_path: Path, zipped: bool) -> None:
    made = tmp_path / "made"
    sample = {"group_index": 1, "response_length": 1, "metadata": Bomb(made)}
    torch.save({"samples": [sample]}, tmp_path / "bomb.pt", _use_new_zipfile_serialization=zipped)
    assert FORMATS["slime"].recognizes(tmp_path / "bomb.pt") is zipped
    with pytest.raises(FormatError, match=r"bomb\.pt is no whole \.pt file of tensors and plain values"):
        read("slime", tmp_path / "bomb.pt")
    assert not made.exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert made.exists(), "the bomb was a dud, and the test proves nothing"


def test_a_compressed_file_which_could_hold_any_size_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    with zipfile.ZipFile(DUMPS / FILE) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for entry in whole.infolist():
            small.writestr(entry.filename, whole.read(entry))
    with pytest.raises(FormatError, match=r"small\.pt is compressed"):
        read("slime", path)


def test_damaged_archives_are_never_more_than_unknown(tmp_path: Path) -> None:
    whole = (DUMPS / FILE).read_bytes()
    path = tmp_path / "damaged.pt"
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        assert FORMATS["slime"].recognizes(path) in (True, False)
        with suppress(FormatError):
            read("slime", path)


def test_a_file_that_is_cut_off_or_holds_something_else_is_an_error(tmp_path: Path) -> None:
    whole = (DUMPS / FILE).read_bytes()
    path = tmp_path / "cut.pt"
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"cut\.pt"):
            read("slime", path)
    torch.save({"model": torch.ones(2)}, path)
    with pytest.raises(FormatError, match=r"cut\.pt has no list `samples`"):
        read("slime", path)


def test_no_member_of_a_sample_can_stop_an_import(tmp_path: Path, sample: dict[str, Any]) -> None:
    broken = [one for one in damaged(sample) if 10**400 not in one.values()]
    broken += [sample | {name: torch.ones(2, 2)} for name in sample]
    rows = read("slime", saved(tmp_path, *broken, sample, 5))
    assert len(rows) == len(broken) + 2
    assert rows[-2].problem is None
    assert rows[-1].problem == "the sample is no dict"
    assert sum(row.problem is not None for row in rows) > 50
