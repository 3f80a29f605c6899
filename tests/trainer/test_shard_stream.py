"""Shards as a stream of packed batches: every clip once, in a seeded order that can be gone on with."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from torch.utils.data import DataLoader

from pipeline.errors import ConfigError, FormatError
from pipeline.exports.manifest import EXPORT_VERSION, replace_json
from pipeline.exports.shards import SHARD
from pipeline.parquet import write_data_file
from pipeline.shards import UnknownTokenizer, load_clips
from pipeline.withdrawal import NOTICE
from trainer.shard_stream import ShardStream

TOKENIZER = "aa" * 32
NUM_CLIPS = 50
FEW = 120  # tokens that are shuffled together: windows of one to three files of these exports


def write_export(folder: Path, name: str, num_clips: int = NUM_CLIPS, clips_per_file: int = 7) -> Path:
    """An export with clips `<name>-0` … of random lengths, which `latest.json` names from now on."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "clip_id": f"{name}-{i}",
            "prompt_ids": rng.integers(0, 100, rng.integers(1, 5)),
            "clip_ids": rng.integers(0, 100, rng.integers(1, 9)),
            "step_entropy": 0.5,
            "reward": 1.0,
            "policy_version": i,
            "tokenizer_hash": TOKENIZER,
            "weight": i / 4,
        }
        for i in range(num_clips)
    ]
    files = [
        write_file(folder / name / f"clips-{first:05d}.parquet", rows[first : first + clips_per_file])
        for first in range(0, num_clips, clips_per_file)
    ]
    facts = {"schema_version": EXPORT_VERSION, "tokenizer_hash": TOKENIZER, "dropped": {}}
    replace_json(folder / name / "manifest.json", {**facts, "clips": num_clips, "files": files})
    replace_json(folder / "latest.json", {"export": name})
    return folder / name


def write_file(path: Path, rows: list[dict], schema: pa.Schema = SHARD) -> dict:
    sha256 = write_data_file(pa.Table.from_pylist(rows, schema), path)
    tokens = sum(len(row["prompt_ids"]) + len(row["clip_ids"]) for row in rows)
    return {"file": path.name, "clips": len(rows), "tokens": tokens, "sha256": sha256}


def stream(folder: Path, **given) -> ShardStream:
    return ShardStream(folder, TOKENIZER, **{"batch_tokens": 30, "buffer_tokens": FEW} | given)


def ids(batches) -> list[list[str]]:
    return [batch.clip_ids for batch in batches]


def loading(dealt: ShardStream, num_workers: int, **given) -> DataLoader:
    # Prefect's exit hooks fail in a process that is forked after a flow ran, as other tests do here.
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["trainer.shard_stream"])
    return DataLoader(
        dealt, batch_size=None, num_workers=num_workers, multiprocessing_context=forkserver, **given
    )


def flat(batches) -> list[str]:
    return [clip_id for batch in batches for clip_id in batch.clip_ids]


def changed_manifest(export: Path, **changes) -> None:
    path = export / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_batches_are_the_exports_clips_unpadded_and_full(tmp_path):
    write_export(tmp_path, "one")
    clips = {clip.clip_id: clip for clip in load_clips(tmp_path, TOKENIZER)}
    batches = list(stream(tmp_path))
    assert sorted(flat(batches)) == sorted(clips)
    for batch in batches:
        for clip_id, (prompt_ids, clip_ids) in zip(batch.clip_ids, batch.rows(), strict=True):
            np.testing.assert_array_equal(prompt_ids, clips[clip_id].prompt_ids)
            np.testing.assert_array_equal(clip_ids, clips[clip_id].clip_ids)
        assert len(batch.ids) == batch.cu_seqlens[-1] == sum(batch.prompt_lengths + batch.clip_lengths) <= 30
        assert batch.weights.tolist() == [clips[clip_id].weight for clip_id in batch.clip_ids]
        assert batch.policy_versions.tolist() == [clips[clip_id].policy_version for clip_id in batch.clip_ids]
    for batch, after in pairwise(batches):
        assert len(batch.ids) + after.cu_seqlens[1] > 30, "the next clip would not have gone in"


def test_two_ranks_of_two_workers_read_every_clip_once(tmp_path):
    write_export(tmp_path, "one")
    read = []
    for rank in range(2):
        dealt = stream(tmp_path, rank=rank, world_size=2)
        loader = loading(dealt, num_workers=2)
        first = flat(loader)
        dealt.set_epoch(1)
        second = flat(loader)
        assert sorted(first) != sorted(second), "parts are drawn anew in each epoch"
        read.append((first, second))
    for epoch in zip(*read, strict=True):
        assert sorted(epoch[0] + epoch[1]) == sorted(f"one-{i}" for i in range(NUM_CLIPS))
        assert [len(part) for part in epoch] == [NUM_CLIPS // 2] * 2


def test_more_parts_than_clips_leave_some_without(tmp_path):
    write_export(tmp_path, "one", num_clips=2)
    parts = [flat(stream(tmp_path, rank=rank, world_size=3, batch_clips=8)) for rank in range(3)]
    assert [len(part) for part in parts] == [1, 1, 0]
    assert {*parts[0], *parts[1]} == {"one-0", "one-1"}


def test_the_order_is_that_of_the_seed_and_goes_across_files(tmp_path):
    write_export(tmp_path, "one")
    same, again, other = (ids(stream(tmp_path, seed=seed)) for seed in (0, 0, 1))
    assert same == again != other
    first_files = [int(clip_id.removeprefix("one-")) // 7 for batch in same for clip_id in batch][:7]
    assert len(set(first_files)) > 1
    two = stream(tmp_path)
    assert ids(two) != ids(two), "each epoch has an order of its own"


@pytest.mark.parametrize("limits", [{}, {"batch_tokens": None, "batch_clips": 4}, {"batch_clips": 3}])
def test_gone_on_with_at_every_position_it_deals_what_it_would_have(limits, tmp_path):
    write_export(tmp_path, "one")
    calm = stream(tmp_path, **limits)
    undisturbed = ids(calm) + ids(calm)
    stopped = stream(tmp_path, **limits)
    states = [json.dumps(stopped.state_dict())]
    for _ in range(2):
        states += [json.dumps(stopped.state_dict()) for _ in stopped]
    for position, state in enumerate(states):
        again = stream(tmp_path, **limits)
        again.load_state_dict(json.loads(state))
        dealt = ids(again)
        while again.epoch < 1:
            dealt += ids(again)
        assert dealt == undisturbed[position:]


def test_a_newer_export_takes_over_at_the_border_and_not_before(tmp_path):
    write_export(tmp_path, "old")
    dealt = stream(tmp_path)
    batches = iter(dealt)
    first = next(batches).clip_ids
    state = dealt.state_dict()
    write_export(tmp_path, "new")
    rest = flat(batches)
    assert sorted(first + rest) == sorted(f"old-{i}" for i in range(NUM_CLIPS))
    assert sorted(flat(dealt)) == sorted(f"new-{i}" for i in range(NUM_CLIPS))
    again = stream(tmp_path)
    again.load_state_dict(state)
    assert flat(again) == rest, "what stood in the old export goes on there"
    assert all(clip_id.startswith("new-") for clip_id in flat(again))


def test_going_on_without_the_old_export_is_refused_but_at_an_epochs_border(tmp_path):
    export = write_export(tmp_path, "old")
    dealt = stream(tmp_path)
    at_start = dealt.state_dict()
    next(iter(dealt))
    within = dealt.state_dict()
    list(dealt)
    at_end = dealt.state_dict()
    shutil.rmtree(export)
    write_export(tmp_path, "new", num_clips=5)
    again = stream(tmp_path)
    with pytest.raises(
        FormatError, match=r"stood at clip \d+ of epoch 0 in export old, and .*new is another\."
    ):
        again.load_state_dict(within)
    for state, epoch in ((at_start, 0), (at_end, 1)):
        again.load_state_dict(state)
        assert len(flat(again)) == 5
        assert again.epoch == epoch


def test_a_clip_withdrawn_meanwhile_moves_no_other(tmp_path):
    export = write_export(tmp_path, "one")
    dealt = stream(tmp_path, batch_tokens=None, batch_clips=1)
    batches = iter(dealt)
    next(batches)
    state = dealt.state_dict()
    rest = flat(batches)
    (export / NOTICE).write_text(json.dumps({"overturned": [rest[3]]}))
    again = stream(tmp_path, batch_tokens=None, batch_clips=1)
    again.load_state_dict(state)
    assert flat(again) == rest[:3] + rest[4:]


def flip_a_byte(export: Path) -> None:
    path = export / "clips-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def another_schema(export: Path) -> None:
    rows = [{"prompt_ids": [1], "clip_ids": [2]}]
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in rows[0]])
    changed_manifest(export, files=[write_file(export / "clips-00000.parquet", rows, schema)])


def a_null(export: Path) -> None:
    rows = [dict.fromkeys(SHARD.names) | {"prompt_ids": [1], "clip_ids": [2]}]
    changed_manifest(export, files=[write_file(export / "clips-00000.parquet", rows)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"clips-00000\.parquet is missing or not as it was exported\. Export"),
        (lambda export: (export / "clips-00007.parquet").unlink(), "clips-00007.parquet is missing"),
        (another_schema, r"clips-00000\.parquet is no shard: .*clip_id"),
        (a_null, r"clips-00000\.parquet does not hold its 1 clips"),
        (lambda export: changed_manifest(export, schema_version=2), r"has format 2\. Update EchoMine"),
        (lambda export: changed_manifest(export, tokenizer_hash="b" * 64), "not this model's"),
        (lambda export: changed_manifest(export, files=[]), "hold no clip"),
        (
            lambda export: changed_manifest(
                export, files=[{"file": "x", "sha256": "", "clips": "9", "tokens": 1}]
            ),
            r"manifest\.json does not count its clips",
        ),
    ],
)
def test_what_is_no_export_for_this_model_is_refused_in_one_line(damage, message, tmp_path):
    damage(write_export(tmp_path, "one"))
    with pytest.raises(FormatError, match=message) as refused:
        list(stream(tmp_path))
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, UnknownTokenizer) == ("model's" in message)


def test_a_clip_that_fits_no_batch_is_refused_with_what_to_do(tmp_path):
    write_export(tmp_path, "one")
    with pytest.raises(
        FormatError, match=r"has 1\d tokens with its prompt, and batch_tokens is 9\. Raise it"
    ):
        list(stream(tmp_path, batch_tokens=9))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_tokens": None}, "Give batch_tokens or batch_clips"),
        ({"batch_tokens": 0}, "to hold 0 tokens"),
        ({"rank": 2, "world_size": 2}, r"no rank 2 of 2\. Give one from 0 to 1"),
    ],
)
def test_a_stream_that_makes_no_sense_is_refused(given, message, tmp_path):
    write_export(tmp_path, "one")
    with pytest.raises(ConfigError, match=message):
        stream(tmp_path, **given)


def test_a_state_of_another_split_or_seed_is_refused(tmp_path):
    write_export(tmp_path, "one")
    state = stream(tmp_path).state_dict()
    for other in ({"seed": 1}, {"rank": 1, "world_size": 2}):
        with pytest.raises(ConfigError, match="Give it the same seed, buffer_tokens, ranks and workers"):
            stream(tmp_path, **other).load_state_dict(state)


def test_workers_that_outlive_an_epoch_are_refused(tmp_path):
    write_export(tmp_path, "one")
    loader = loading(stream(tmp_path), num_workers=1, persistent_workers=True)
    assert len(flat(loader)) == NUM_CLIPS
    with pytest.raises(ConfigError, match="Set persistent_workers=False"):
        flat(loader)
