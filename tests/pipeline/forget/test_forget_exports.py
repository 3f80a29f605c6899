"""The exported files that hold clips of a forgotten prompt are named, and no export brings it back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from forget_helpers import SECRET_PROMPT
from sample_lake import LakeBuilder, character_tokenizer

from pipeline.config import ExportConfig, MiningConfig
from pipeline.errors import LakeError
from pipeline.exports.core import Form, export_clips
from pipeline.exports.hf import hf
from pipeline.exports.luffy import luffy
from pipeline.exports.prime_rl import prime_rl
from pipeline.exports.sft import sft
from pipeline.exports.shards import SHARDS
from pipeline.exports.trl import trl
from pipeline.forget import forget
from pipeline.mine import mine
from pipeline.shards import load_clips

TOKENIZER = character_tokenizer()
FORMS = [SHARDS, luffy(TOKENIZER), sft(TOKENIZER), prime_rl(0.1), trl(TOKENIZER), hf(TOKENIZER)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_one_file_with_the_clip_is_named_in_every_form(
    mined: LakeBuilder, tmp_path: Path, form: Form
) -> None:
    lake = mined.lake
    with lake.reader() as reader:
        order = [row["prompt_id"] for row in reader.rows("select prompt_id from clips order by clip_rank")]
    export = export_clips(lake, tmp_path / "out", form, ExportConfig(clips_per_shard=1))
    done = forget(lake, [SECRET_PROMPT.prompt_id])
    number = order.index(SECRET_PROMPT.prompt_id)
    assert [(shard.path, shard.clips, shard.noticed) for shard in done.shards] == [
        (str(export.folder / f"clips-{number:05}{form.suffix}"), 1, True)
    ]
    assert len(json.loads((export.folder / "withdrawn.json").read_text())["forgotten"]) == 1
    if form is SHARDS:
        assert len(load_clips(export.folder, mined.tokenizer_hash)) == 1
    mine(lake, MiningConfig())
    assert export_clips(lake, tmp_path / "out", form, ExportConfig()).clips == 1


def test_an_export_that_runs_meanwhile_leaves_nothing(mined: LakeBuilder, tmp_path: Path) -> None:
    lake = mined.lake

    def rows(clips: pa.Table) -> pa.Table:
        assert clips.num_rows == 2
        assert forget(lake, [SECRET_PROMPT.prompt_id]).shards == []
        return SHARDS.rows(clips)

    with pytest.raises(LakeError, match=r"forgotten meanwhile\. Nothing was recorded; run the command again"):
        export_clips(lake, tmp_path / "out", replace(SHARDS, rows=rows), ExportConfig())
    assert list((tmp_path / "out").iterdir()) == []
    assert export_clips(lake, tmp_path / "out", SHARDS, ExportConfig()).clips == 1


def test_where_nothing_tells_which_clips_a_file_holds_it_may_be_all_of_the_mining(
    mined: LakeBuilder, tmp_path: Path
) -> None:
    lake = mined.lake
    unnamed, gone = (
        export_clips(lake, tmp_path / "shards", SHARDS, ExportConfig(clips_per_shard=n)).folder
        for n in (10, 20)
    )
    (unnamed / "clips.json").unlink()
    shutil.rmtree(gone)
    shards = forget(lake, [SECRET_PROMPT.prompt_id]).shards
    assert {Path(shard.path).parent: (shard.clips, shard.noticed) for shard in shards} == {
        unnamed: (1, True),
        gone: (1, False),
    }
    assert len(load_clips(unnamed, mined.tokenizer_hash)) == 1
