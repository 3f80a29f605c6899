"""An export is complete, vouched for by its manifest, and read only by whom it fits."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from lake_worker import rollout
from sample_lake import LakeBuilder, SampleLake

import pipeline.exports.core
from pipeline.config import ExportConfig, MiningConfig
from pipeline.errors import FormatError, LakeError, MiningError, NothingToMine
from pipeline.exports.core import Export, export_clips
from pipeline.exports.shards import SHARD, SHARDS
from pipeline.hashing import file_sha256
from pipeline.ingest import ingest
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.shards import UnknownTokenizer, load_clips
from pipeline.tokenization import tokenizer_hash

QUESTIONS = ["What is 17+25?", "What is 40+2?"]


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> SampleLake:
    """A lake of two solved groups with two clips each."""
    builder = LakeBuilder(tmp_path_factory.mktemp("shards") / "lake")
    ways = ["17+25\n10+20=30\n#42", "17+25\n17+20=37\n37+5=42\n#42"]
    for question in QUESTIONS:
        builder.add_group(ways, [1.0, 1.0], question=question, policy_version=3)
    lake = builder.commit()
    return SampleLake(lake, "run-1", mine(lake, MiningConfig(clips_per_group=2)).mining_id, builder.tokenizer)


def exported(mined: SampleLake, folder: Path, **settings: object) -> Export:
    return export_clips(mined.lake, folder, SHARDS, ExportConfig(**settings))


def test_an_export_holds_the_clips_in_rank_order_with_their_facts(mined: SampleLake, tmp_path: Path) -> None:
    export = exported(mined, tmp_path, clips_per_shard=3)
    with mined.lake.reader() as reader:
        clips = reader.rows("select * from clips order by clip_rank")
        recorded = reader.rows(
            "select * from shards where path like $at || '%' order by path", {"at": str(tmp_path)}
        )
    assert [file.name for file in sorted(export.folder.iterdir())] == [
        "clips-00000.parquet",
        "clips-00001.parquet",
        "clips.json",
        "manifest.json",
    ]
    manifest = json.loads((export.folder / "manifest.json").read_text())
    assert manifest == export.manifest
    assert [file["clips"] for file in manifest["files"]] == [3, 1]
    for file, row in zip(manifest["files"], recorded, strict=True):
        path = export.folder / file["file"]
        assert file["sha256"] == file_sha256(path) == row["sha256"]
        table = pq.read_table(path)
        assert table.schema.equals(SHARD)
        tokens = sum(len(clip["prompt_ids"]) + len(clip["clip_ids"]) for clip in table.to_pylist())
        assert file["tokens"] == tokens == row["num_tokens"]
        assert row["path"] == str(path)
    found = load_clips(tmp_path, tokenizer_hash(mined.tokenizer))
    assert [clip.clip_id for clip in found] == [clip["clip_id"] for clip in clips]
    for got, clip in zip(found, clips, strict=True):
        assert got.prompt_ids.tolist() == clip["prompt_ids"]
        assert got.clip_ids.tolist() == clip["clip_ids"]
        assert (got.step_entropy, got.reward, got.weight, got.policy_version) == (
            clip["step_entropy"],
            1.0,
            1.0,
            3,
        )
    facts = {"schema_version": 1, "mining_id": mined.mining_id, "clips": 4, "dropped": {}}
    facts |= {"tokenizer_hash": tokenizer_hash(mined.tokenizer)}
    facts |= {"clip_tokens": sum(len(clip["clip_ids"]) for clip in clips)}
    facts |= {"prompt_tokens": sum(len(clip["prompt_ids"]) for clip in clips)}
    assert facts.items() <= manifest.items()
    assert {"snapshot", "config_hash", "created_at"} <= manifest.keys()


def test_the_same_export_is_written_once_and_latest_names_the_newest(
    mined: SampleLake, tmp_path: Path
) -> None:
    first = exported(mined, tmp_path)
    written = (first.folder / "manifest.json").stat().st_mtime_ns
    assert exported(mined, tmp_path).folder == first.folder
    assert (first.folder / "manifest.json").stat().st_mtime_ns == written
    other = exported(mined, tmp_path, clips_per_shard=1)
    assert other.folder != first.folder
    latest = json.loads((tmp_path / "latest.json").read_text())
    assert latest == {"export": other.folder.name, "mining_id": mined.mining_id}
    exported(mined, tmp_path)
    assert json.loads((tmp_path / "latest.json").read_text())["export"] == first.folder.name
    assert {path.name for path in tmp_path.iterdir()} == {"latest.json", first.folder.name, other.folder.name}


@pytest.mark.parametrize("form", ["prompts", "ids"])
def test_evaluation_prompts_are_kept_out_and_counted(mined: SampleLake, tmp_path: Path, form: str) -> None:
    with mined.lake.reader() as reader:
        sql = "select prompt_id from prompts where messages like '%' || $question || '%'"
        (row,) = reader.rows(sql, {"question": QUESTIONS[0]})
    if form == "ids":
        held_out = tmp_path / "held_out.txt"
        held_out.write_text(f"{row['prompt_id']}\nanother\n")
    else:
        held_out = tmp_path / "held_out.jsonl"  # with another truth: it is the same question all the same
        held_out.write_text(json.dumps({"prompt": QUESTIONS[0], "ground_truth": "41"}) + "\n")
    export = exported(mined, tmp_path / "shards", exclude_prompts=held_out)
    assert (export.clips, export.dropped) == (2, {"excluded_prompt": 2})
    assert export.manifest["dropped"] == {"excluded_prompt": 2}
    with pytest.raises(FormatError, match="Cannot read"):
        exported(mined, tmp_path / "shards", exclude_prompts=tmp_path / "none.txt")


def test_clips_longer_than_the_limit_are_left_out_and_counted(mined: SampleLake, tmp_path: Path) -> None:
    everything = load_clips(exported(mined, tmp_path).folder, tokenizer_hash(mined.tokenizer))
    lengths = sorted(len(clip.prompt_ids) + len(clip.clip_ids) for clip in everything)
    export = exported(mined, tmp_path, max_tokens=lengths[0])
    kept = lengths.count(lengths[0])
    assert (export.clips, export.dropped) == (kept, {"max_tokens": 4 - kept} if kept < 4 else {})
    none = exported(mined, tmp_path, max_tokens=1)
    assert (none.clips, none.dropped) == (0, {"max_tokens": 4})
    assert load_clips(none.folder, "any tokenizer") == []


def test_a_crash_while_writing_leaves_no_half_export(
    mined: SampleLake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = exported(mined, tmp_path)
    write, calls = pipeline.exports.core.write_data_file, []

    def failing(*arguments: object) -> str:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(pipeline.exports.core, "write_data_file", failing)
    with pytest.raises(KeyboardInterrupt):
        exported(mined, tmp_path, clips_per_shard=1)
    assert {path.name for path in tmp_path.iterdir()} == {"latest.json", first.folder.name}
    assert json.loads((tmp_path / "latest.json").read_text())["export"] == first.folder.name
    assert exported(mined, tmp_path, clips_per_shard=1).clips == 4


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(mined: SampleLake, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LakeError, match=r"Cannot write shards to .*Choose another folder"):
        exported(mined, tmp_path / "file" / "shards")


def change_a_byte(folder: Path) -> None:
    path = folder / "clips-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(folder: Path) -> None:
    os.truncate(folder / "clips-00000.parquet", 100)


def lose_a_file(folder: Path) -> None:
    (folder / "clips-00000.parquet").unlink()


def newer_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 2}))


def no_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": [3]}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_a_byte, "is missing or not as it was exported"),
        (cut_off, "is missing or not as it was exported"),
        (lose_a_file, "is missing or not as it was exported"),
        (newer_format, "has format 2. Update EchoMine"),
        (no_json, "is no JSON"),
        (no_manifest, "is no manifest of an export"),
    ],
)
def test_a_damaged_export_is_refused_and_can_be_written_again(
    mined: SampleLake, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    export = exported(mined, tmp_path)
    damage(export.folder)
    with pytest.raises(FormatError, match=message):
        load_clips(tmp_path, tokenizer_hash(mined.tokenizer))
    exported(mined, tmp_path)
    assert len(load_clips(tmp_path, tokenizer_hash(mined.tokenizer))) == 4


def test_shards_of_another_tokenizer_or_no_shards_are_refused(mined: SampleLake, tmp_path: Path) -> None:
    exported(mined, tmp_path / "shards")
    with pytest.raises(UnknownTokenizer, match="which is not this model's"):
        load_clips(tmp_path / "shards", "another")
    with pytest.raises(FormatError, match="holds no shards"):
        load_clips(tmp_path, "any")


def test_what_was_never_mined_or_never_existed_is_not_exported(mined: SampleLake, tmp_path: Path) -> None:
    with pytest.raises(NothingToMine, match="was never mined"):
        export_clips(Lake.create(tmp_path / "lake"), tmp_path / "shards", SHARDS, ExportConfig())
    with pytest.raises(MiningError, match="has no mining zzz"):
        export_clips(mined.lake, tmp_path / "shards", SHARDS, ExportConfig(), "zzz")
    assert not (tmp_path / "shards").exists()


def test_the_first_digits_name_a_mining_unless_others_begin_so_too(tmp_path: Path) -> None:
    builder = LakeBuilder(tmp_path / "lake")
    builder.add_group(["1\n#42", "20\n30\n#42"], [1.0, 1.0])
    lake = builder.commit()
    whole = [mine(lake, MiningConfig(clips_per_group=n)).mining_id for n in range(1, 18)]
    first = Counter(name[0] for name in whole).most_common(1)[0][0]
    with pytest.raises(
        MiningError, match=rf"minings of the lake in .* begin with {first}\. Give more digits"
    ):
        export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig(), first)
    assert export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig(), whole[0][:12])
    assert export_clips(lake, tmp_path / "others", SHARDS, ExportConfig(), whole[0])


def test_clips_of_several_tokenizers_do_not_share_a_shard(mined: SampleLake, tmp_path: Path) -> None:
    shutil.copytree(mined.lake.folder, tmp_path / "lake")
    lake = Lake.open(tmp_path / "lake")
    rows = [rollout("other", index) | {"tokenizer_hash": "another"} for index in (0, 1)]
    ingest(lake, rows, ["", ""])
    mining = mine(lake, MiningConfig())
    with pytest.raises(MiningError, match="clips of 2 tokenizers"):
        export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig(), mining.mining_id)
    assert not (tmp_path / "shards").exists()


def test_a_mining_asked_for_again_is_the_one_that_is_exported(sample_lake, tmp_path):
    shutil.copytree(sample_lake.lake.folder, tmp_path / "lake")
    lake = Lake.open(tmp_path / "lake")
    wide = mine(lake, MiningConfig(clips_per_group=2))
    narrow = mine(lake, MiningConfig(max_clips=1))
    assert (
        export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig()).manifest["mining_id"]
        == narrow.mining_id
    )
    assert mine(lake, MiningConfig(clips_per_group=2)) == wide
    assert (
        export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig()).manifest["mining_id"]
        == wide.mining_id
    )


def test_an_empty_export_does_not_become_the_newest(sample_lake, tmp_path):
    shutil.copytree(sample_lake.lake.folder, tmp_path / "lake")
    lake = Lake.open(tmp_path / "lake")
    full = export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig(), sample_lake.mining_id)
    empty = export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig(max_tokens=1), sample_lake.mining_id)
    assert (full.clips > 0, empty.clips) == (True, 0)
    assert json.loads((tmp_path / "shards" / "latest.json").read_text())["export"] == full.folder.name


def test_an_exclusion_that_names_nothing_is_refused(sample_lake, tmp_path):
    (tmp_path / "evaluation.txt").write_text("\n")
    with pytest.raises(FormatError, match="names no prompt to keep out"):
        export_clips(
            sample_lake.lake,
            tmp_path / "shards",
            SHARDS,
            ExportConfig(exclude_prompts=tmp_path / "evaluation.txt"),
        )
