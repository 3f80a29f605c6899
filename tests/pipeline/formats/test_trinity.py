"""Trinity-RFT's buffer, written by hand from its source: SQLite, with a pickle that nobody may run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sqlite3
import struct
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_dumps import DUMPS, FORMATS, read

from pipeline.errors import FormatError
from pipeline.formats.pickled import read_pickle

NONE: frozenset[str] = frozenset()


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def with_blob(tmp_path: Path, blob: Any) -> Path:
    """The old buffer, with another pickle in its first row."""
    path = Path(shutil.copy(DUMPS / "trinity/old.db", tmp_path / "buffer.db"))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("update experience set experience_bytes = ? where id = 1", (blob,))
    return path


@pytest.mark.parametrize(("file", "group", "version"), [("old.db", "3/1", 7), ("new.db", "3/8", 2)])
def test_columns_count_before_the_pickle_and_the_task_of_a_batch_is_the_group(file, group, version) -> None:
    first, second, *_ = read("trinity", f"trinity/{file}")
    assert first.source == f"{file}:1"
    assert first.values == {
        "group_id": first.values["group_id"],
        "prompt_ids": [1, 2, 3, 4, 5],
        "prompt_text": "2+2?",
        "completion_ids": [52, 128],
        "completion_logprobs": [-0.125, -0.125],
        "reward": 1.0,
        "policy_version": version,
    }
    assert first.values["group_id"].endswith(f"/{group}")
    assert second.values["group_id"] == first.values["group_id"]
    # both say run 0, as workflows do that never set it: no index is made of that
    assert "sample_index" not in second.values
    assert second.values["completion_ids"] == [53, 128]


def test_a_pickle_in_a_table_of_its_own_is_found() -> None:
    first, lost = read("trinity", "trinity/split.db")
    assert first.values["group_id"].endswith("/3/8")
    assert first.values["reward"] == 0.5
    assert lost.problem == "the row has no pickle, and with it no tokens and no group"
    assert lost.values["id"] == 2


def test_what_is_no_single_turn_is_refused_and_cut_off_is_said() -> None:
    rows = read("trinity", "trinity/old.db")
    assert [row.problem for row in rows[2:]] == [
        "several sampled turns: `action_mask` has other tokens between sampled ones",
        "several sampled turns: a later step of its run, with a prompt of its own",
        None,
        "a pair of preferences, no rollout",
    ]
    assert rows[4].values["finish_reason"] == "length"
    assert len({row.values["group_id"] for row in rows}) == 1


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(tmp_path: Path, protocol: int) -> None:
    made = tmp_path / "made"
    bomb = pickle.dumps({"eid": Bomb(made)}, protocol=protocol)
    path = with_blob(tmp_path, bomb)
    assert FORMATS["trinity"].recognizes(path)
    first, *rest = read("trinity", path)
    assert first.problem is not None
    assert "which is not run" in first.problem or "which is not carried out" in first.problem
    assert first.values["prompt"] == "2+2?"
    assert len(rest) == 5
    assert not made.exists()
    pickle.loads(bomb)
    assert made.exists(), "the bomb was a dud, and the test proves nothing"


def test_a_bomb_within_the_storage_of_a_tensor_does_not_go_off(tmp_path: Path) -> None:
    made = tmp_path / "made"

    class Storage:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (pickle.dumps(Bomb(made)),)

    first, *_ = read("trinity", with_blob(tmp_path, pickle.dumps({"tokens": Storage()})))
    assert first.problem is not None
    assert first.problem.startswith("its pickle is damaged")
    assert not made.exists()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (b"cbuiltins\neval\n.", "its pickle names builtins.eval, which is not run"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "its pickle names os.system, which is not run"),
        (b"\x80\x04\x82\x01.", "its pickle does EXT1, which is not carried out"),
        (b"\x80\x04\x8c\x01xQ.", "its pickle does BINPERSID, which is not carried out"),
        (b"\x80\x04(\x8c\x01xo.", "its pickle does OBJ, which is not carried out"),
    ],
)
def test_names_and_operations_beyond_plain_values_end_the_reading(name: bytes, problem: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_pickle(name, NONE)
    assert str(caught.value) == problem


def test_every_cut_and_every_flipped_byte_of_a_pickle_is_refused_or_read_and_never_crashes() -> None:
    with closing(sqlite3.connect(DUMPS / "trinity/old.db")) as connection:
        (blob,) = connection.execute("select experience_bytes from experience").fetchone()
    classes = frozenset({"trinity.common.experience.Experience", "trinity.common.experience.EID"})
    assert read_pickle(blob, classes)["tokens"] == [1, 2, 3, 4, 5, 52, 128]
    for cut in range(0, len(blob), 7):
        with pytest.raises(FormatError):
            read_pickle(blob[:cut], classes)
    for place in range(0, len(blob), 3):
        flipped = bytearray(blob)
        flipped[place] ^= 0x15
        with suppress(FormatError):
            read_pickle(bytes(flipped), classes)


def test_tensors_and_numbers_of_numpy_come_as_lists_and_numbers() -> None:
    said = {
        "view": torch.arange(6, dtype=torch.int64)[2:4],
        "flags": torch.tensor([True, False]),
        "half": torch.tensor([0.5], dtype=torch.bfloat16),
        "number": np.float32(0.25),
        "count": np.int64(7),
        "nested": [(1, 2.5, None), {"a": b"x"}],
        "large": 2**70,
    }
    plain = {"view": [2, 3], "flags": [True, False], "half": [0.5], "number": 0.25, "count": 7}
    for protocol in (2, 3, 4, 5):
        if protocol > 2:  # bytes are spelled with a function of codecs before
            assert read_pickle(pickle.dumps(said, protocol=protocol), NONE) == said | plain


def test_a_tensor_that_would_fill_the_memory_is_refused() -> None:
    expanded = torch.ones(1).expand(10**12)
    with pytest.raises(FormatError, match="no list of numbers"):
        read_pickle(pickle.dumps(expanded), NONE)
    beyond = pickle.dumps(torch.ones(3)).replace(b"K\x03\x85", b"J" + struct.pack("<i", 2**31 - 1) + b"\x85")
    with pytest.raises(FormatError, match="longer than its storage"):
        read_pickle(beyond, NONE)


def test_an_archive_in_place_of_a_storage_is_not_opened() -> None:
    archive = io.BytesIO()
    torch.save(torch.ones(3), archive)

    class Storage:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (archive.getvalue(),)

    with pytest.raises(FormatError, match="holds an archive"):
        read_pickle(pickle.dumps(Storage()), NONE)


def test_groups_keep_their_names_while_the_buffer_grows(tmp_path: Path) -> None:
    path = Path(shutil.copy(DUMPS / "trinity/old.db", tmp_path / "buffer.db"))
    before = [row.values["group_id"] for row in read("trinity", path)]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "insert into experience (reward, experience_bytes) select 0, experience_bytes from experience"
        )
    assert [row.values["group_id"] for row in read("trinity", path)] == before * 2


def test_values_that_share_themselves_endlessly_are_refused_in_a_line(tmp_path: Path) -> None:
    laughs: list[Any] = ["ha"]
    for _ in range(40):
        laughs = [laughs] * 10
    eid = {"batch": 1, "task": 1}
    blob = pickle.dumps({"eid": eid, "tokens": [1, 2], "prompt_length": laughs})
    first, *_ = read("trinity", with_blob(tmp_path, blob))
    assert first.problem is not None
    assert first.problem.startswith("`prompt_length` is [[")
    assert "experience" not in first.values


@pytest.mark.parametrize(
    "experience",
    [
        5,
        [],
        {},
        {"eid": 1},
        {"eid": {"batch": 1, "task": 1}},
        {"eid": {"batch": 1, "task": 1}, "tokens": [1, -2], "prompt_length": 1},
        {"eid": {"batch": 1, "task": 1}, "tokens": [1, 2.0], "prompt_length": 1},
        {"eid": {"batch": 1, "task": 1}, "tokens": [1, 2], "prompt_length": 2},
        {"eid": {"batch": 1, "task": 1}, "tokens": [1, 2], "prompt_length": True},
        {"eid": {"batch": 1, "task": 1}, "tokens": [1, 2], "prompt_length": 1, "action_mask": [2]},
        {"eid": {"batch": 1, "task": 1}, "tokens": [1, 2], "prompt_length": 1, "logprobs": [0.0, 0.0]},
    ],
)
def test_an_experience_of_other_types_is_refused_alone(tmp_path: Path, experience: Any) -> None:
    first, second, *_ = read("trinity", with_blob(tmp_path, pickle.dumps(experience)))
    assert first.problem
    assert second.problem is None


def test_blobs_that_are_no_bytes_are_refused_alone(tmp_path: Path) -> None:
    first, *_ = read("trinity", with_blob(tmp_path, "text"))
    assert first.problem == "the row has no pickle, and with it no tokens and no group"


def test_a_file_that_is_no_database_or_another_one_is_an_error_in_one_line(tmp_path: Path) -> None:
    for name, content in (
        ("no.db", b"not a database, but long enough to look like one" * 100),
        ("e.db", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=name):
            read("trinity", tmp_path / name)
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection, connection:
        connection.execute("create view experience as select 1 as id, 1 as reward, x'00' as experience_bytes")
    with pytest.raises(FormatError, match=r"other\.db has no table with `reward`"):
        read("trinity", tmp_path / "other.db")


def test_a_database_that_is_cut_off_is_an_error_in_one_line(tmp_path: Path) -> None:
    whole = (DUMPS / "trinity/old.db").read_bytes()
    path = tmp_path / "cut.db"
    path.write_bytes(whole[: len(whole) - 4096])
    with pytest.raises(FormatError, match=r"cut\.db is no whole SQLite database"):
        read("trinity", path)


def test_reading_leaves_the_buffer_as_it_was(tmp_path: Path) -> None:
    path = Path(shutil.copy(DUMPS / "trinity/old.db", tmp_path / "buffer.db"))
    before = path.read_bytes()
    read("trinity", path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
