"""EchoRL's dump of entropies, written by hand from its source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_dumps import DUMPS, damaged, read, values

from pipeline.errors import FormatError

FILE = "echorl/step_6/samples.json"
TENSOR = "correct_rollouts_tensors/sample_0_entropy.npy"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DUMPS / "echorl/step_6", tmp_path / "step_6"))


def changed(folder: Path, category: str = "correct_rollouts", **changes: Any) -> Any:
    """The first sample of a category with changes, read again."""
    dump = json.loads((folder / "samples.json").read_text())
    dump[category][0] |= changes
    (folder / "samples.json").write_text(json.dumps(dump))
    return next(
        row for row in read("echorl", folder / "samples.json") if row.source.endswith(f"{category}[0]")
    )


def test_prompt_and_response_are_freed_of_padding_and_of_each_other() -> None:
    row = read("echorl", FILE)[0]
    assert row.source == "samples.json:correct_rollouts[0]"
    raw = json.loads((DUMPS / FILE).read_text())["correct_rollouts"][0]
    assert (raw["prompt_ids"], raw["response_ids"]) == (
        [127, 127, 1, 2, 3, 4, 5, 52, 128, 127, 127],
        [52, 128, 127, 127],
    )
    assert row.values == {
        "group_id": row.values["group_id"],
        "prompt_ids": [1, 2, 3, 4, 5],
        "completion_ids": [52, 128],
        "completion_entropies": [0.5, 0.75],
        "entropy_kind": "full_vocab",
        "reward": 1.0,
        "policy_version": 6,
        "origin": "policy",
        "finish_reason": "stop",
    }


def test_samples_of_one_prompt_and_step_are_a_group() -> None:
    rows = values(read("echorl", FILE))
    assert len({row["group_id"] for row in rows}) == 1
    assert [row["reward"] for row in rows] == [1.0, 0.0, 0.0, 1.0]


def test_a_response_without_padding_ran_into_the_limit() -> None:
    row = read("echorl", FILE)[2].values
    assert (row["completion_ids"], row["finish_reason"]) == ([52] * 4, "length")


def test_golden_trajectories_are_experts_in_the_group_of_their_prompt() -> None:
    row = read("echorl", FILE)[3].values
    assert (row["origin"], row["prompt_ids"]) == ("expert", [1, 2, 3, 4, 5])
    assert (row["completion_ids"], row["completion_entropies"]) == ([52, 10, 128], [0.5, 0.75, 1.0])
    assert row["reward"] == 1.0
    assert row["group_id"] == read("echorl", FILE)[0].values["group_id"]


def test_unpadded_samples_of_the_release_s_script_are_read_as_they_stand(folder: Path) -> None:
    golden = json.loads((folder / "samples.json").read_text())["golden_trajectories"][0]
    golden |= {"prompt_ids": [1, 2, 3], "response_ids": [52, 10, 128], "reward": 0.5}
    dump = {"step": 0, "correct_rollouts": [], "wrong_rollouts": [], "golden_trajectories": [golden]}
    (folder / "samples.json").write_text(json.dumps(dump))
    (row,) = values(read("echorl", folder / "samples.json"))
    assert (row["prompt_ids"], row["completion_ids"]) == ([1, 2, 3], [52, 10, 128])
    assert (row["reward"], row["finish_reason"]) == (0.5, "stop")


def test_without_any_padded_response_the_padding_of_prompts_is_unknown(folder: Path) -> None:
    dump = json.loads((folder / "samples.json").read_text())
    dump |= {"correct_rollouts": [], "golden_trajectories": [], "wrong_rollouts": dump["wrong_rollouts"][1:]}
    (folder / "samples.json").write_text(json.dumps(dump))
    (row,) = read("echorl", folder / "samples.json")
    assert row.problem == "no response of the file is padded, so the padding of the prompts is unknown"


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/passwd", "../outside.npy", "a/../../outside.npy"]
)
def test_a_tensor_outside_the_dump_is_not_opened(folder: Path, name: str) -> None:
    np.save(folder.parent / "outside.npy", np.ones(2, dtype=np.float32))
    row = changed(folder, entropy_tensor_file=name)
    assert row.problem == f"`entropy_tensor_file` '{name}' leaves the dump's folder"
    assert row.values["category"] == "correct_rollouts"


def test_a_link_that_leads_outside_is_not_followed(folder: Path) -> None:
    np.save(folder.parent / "outside.npy", np.ones(2, dtype=np.float32))
    (folder / "link.npy").symlink_to(folder.parent / "outside.npy")
    assert "leaves the dump's folder" in changed(folder, entropy_tensor_file="link.npy").problem


def test_a_tensor_of_objects_is_not_unpickled(folder: Path) -> None:
    np.save(folder / TENSOR, np.array([0.5, {"a": 1}], dtype=object), allow_pickle=True)
    problem = read("echorl", folder / "samples.json")[0].problem
    assert problem is not None
    assert "cannot be read" in problem


def test_a_header_that_claims_more_than_the_file_holds_costs_no_memory(folder: Path) -> None:
    whole = (folder / TENSOR).read_bytes()
    claim = whole.replace(b"(2,), }" + b" " * 12, b"(9999999999999,), }")
    assert len(claim) == len(whole)
    assert claim != whole
    (folder / TENSOR).write_bytes(claim)
    row = read("echorl", folder / "samples.json")[0]
    assert row.problem is not None
    assert "cannot be read" in row.problem


@pytest.mark.parametrize(
    "array", [np.ones((2, 1), dtype=np.float32), np.ones(2, dtype=np.int64), np.ones(2, dtype=np.complex64)]
)
def test_a_tensor_of_another_shape_or_type_is_refused(folder: Path, array: Any) -> None:
    np.save(folder / TENSOR, array)
    assert read("echorl", folder / "samples.json")[0].problem == (
        f"`entropy_tensor_file` '{TENSOR}' holds no list of entropies"
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"entropy_tensor_file": None}, "the sample names no `entropy_tensor_file`"),
        ({"entropy_tensor_file": "none.npy"}, "`entropy_tensor_file` 'none.npy' cannot be read"),
        ({"entropy_tensor_file": "a\0b"}, "`entropy_tensor_file` 'a\\x00b' cannot be read"),
        ({"entropy_tensor_file": "samples.json"}, "`entropy_tensor_file` 'samples.json' cannot be read"),
        ({"response_ids": [52]}, "2 entropies for 1 response tokens"),
        ({"response_ids": [52, 128, 5, 127]}, "2 entropies end before the response does"),
        ({"prompt_ids": None}, "`prompt_ids` is no list of token ids"),
        ({"prompt_ids": [float("nan")]}, "`prompt_ids` is no list of token ids"),
    ],
)
def test_a_sample_that_contradicts_itself_is_refused(folder: Path, changes, problem) -> None:
    assert changed(folder, **changes).problem.startswith(problem)


def test_no_member_of_a_sample_can_stop_an_import(folder: Path) -> None:
    dump = json.loads((folder / "samples.json").read_text())
    broken = list(damaged(dump["correct_rollouts"][0]))
    dump |= {"correct_rollouts": broken + dump["correct_rollouts"]}
    (folder / "samples.json").write_text(json.dumps(dump))
    rows = read("echorl", folder / "samples.json")
    assert len(rows) == len(broken) + 4
    assert rows[len(broken)].problem is None


@pytest.mark.parametrize(
    "content", ["", "[1]", "{", '{"correct_rollouts": 5}', '{"a":' * 100_000, '"\\ud83d"']
)
def test_a_file_that_is_no_such_dump_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(FormatError, match=r"samples\.json"):
        read("echorl", tmp_path / "samples.json")
