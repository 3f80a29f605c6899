"""Every form of export, on the sample lake: what its rows hold, and what all forms refuse alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sample_lake import EOS_ID, LakeBuilder, SampleLake, character_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.config import ExportConfig, MiningConfig
from pipeline.errors import FormatError, LakeError, NothingToMine
from pipeline.exports import selection
from pipeline.exports.core import Export, export_clips
from pipeline.exports.hf import HF, MEANINGS, hf
from pipeline.exports.luffy import LUFFY, luffy
from pipeline.exports.prime_rl import PRIME_RL, ce_weights, prime_rl
from pipeline.exports.sft import sft
from pipeline.exports.shards import SHARDS
from pipeline.exports.text import clip_text, prompt_messages
from pipeline.exports.trl import TRL, trl
from pipeline.hashing import file_sha256
from pipeline.lake import Lake
from pipeline.mine import mine
from pipeline.models import model_folder
from pipeline.prompts import prompt_messages_ids
from pipeline.shards import load_clips
from pipeline.tokenization import load_tokenizer

TOKENIZER = character_tokenizer()
FORMS = {
    form.name: form
    for form in (SHARDS, luffy(TOKENIZER), sft(TOKENIZER), prime_rl(0.001), trl(TOKENIZER), hf(TOKENIZER))
}


def export(name: str, mined: SampleLake, folder: Path, **settings: Any) -> Export:
    return export_clips(mined.lake, folder, FORMS[name], ExportConfig(**settings), mined.mining_id)


def rows_of(done: Export) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for file in done.manifest["files"]:
        path = done.folder / file["file"]
        if path.suffix == ".parquet":
            rows += pq.read_table(path).to_pylist()
        else:
            rows += [json.loads(line) for line in path.open(encoding="utf-8")]
    return rows


@pytest.fixture(scope="module")
def clips(sample_lake: SampleLake) -> list[dict[str, Any]]:
    """The mined clips in rank order, with what the lake knows of their rollouts and prompts."""
    with sample_lake.lake.reader() as reader:
        return reader.rows(
            "select clips.*, rollouts.completion, rollouts.completion_ids, messages, data_source from clips "
            "join rollouts using (rollout_id) join prompts on prompts.prompt_id = clips.prompt_id "
            "where mining_id = $mining_id order by clip_rank",
            {"mining_id": sample_lake.mining_id},
        )


@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_every_clip_and_says_so(name, sample_lake, clips, tmp_path):
    done = export(name, sample_lake, tmp_path, clips_per_shard=4)
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert manifest == done.manifest
    assert (manifest["format"], manifest["clips"], manifest["dropped"]) == (name, len(clips), {})
    assert manifest["clip_tokens"] == sum(clip["clip_tokens"] for clip in clips)
    assert manifest["prompt_tokens"] == sum(len(clip["prompt_ids"]) for clip in clips)
    assert [file["clips"] for file in manifest["files"]] == [4, 4, 1]
    assert len(rows_of(done)) == len(clips)
    for file in manifest["files"]:
        assert file_sha256(done.folder / file["file"]) == file["sha256"]
    latest = {"export": done.folder.name, "mining_id": sample_lake.mining_id}
    assert json.loads((tmp_path / "latest.json").read_text()) == latest


def test_sft_rows_are_conversations_that_end_with_the_clip(sample_lake, clips, tmp_path):
    for row, clip in zip(rows_of(export("sft", sample_lake, tmp_path)), clips, strict=True):
        *prompt, answer = row["messages"]
        assert prompt == json.loads(clip["messages"])
        assert answer["role"] == "assistant"
        assert answer["content"] == TOKENIZER.decode(clip["clip_ids"], skip_special_tokens=True)
        assert clip["completion"].startswith(answer["content"])
        assert row["is_whole"] == (clip["clip_ids"][-1] == EOS_ID)
        assert (row["clip_id"], row["step_entropy"]) == (clip["clip_id"], clip["step_entropy"])


def test_luffy_rows_are_verl_prompts_with_a_target(sample_lake, clips, tmp_path):
    done = export("luffy", sample_lake, tmp_path)
    assert pq.read_schema(done.folder / "clips-00000.parquet").equals(LUFFY)
    for index, (row, clip) in enumerate(zip(rows_of(done), clips, strict=True)):
        assert row["prompt"] == json.loads(clip["messages"])
        assert [message["role"] for message in row["target"]] == ["assistant"]
        assert clip["completion"].startswith(row["target"][0]["content"])
        assert row["data_source"] == clip["data_source"] == "sums"
        assert row["reward_model"] == {"style": "rule", "ground_truth": ""}
        assert (row["extra_info"]["index"], row["extra_info"]["clip_id"]) == (index, clip["clip_id"])


def test_trl_rows_hold_the_sampled_tokens_beside_their_text(sample_lake, clips, tmp_path):
    done = export("trl", sample_lake, tmp_path)
    assert pq.read_schema(done.folder / "clips-00000.parquet").equals(TRL)
    for row, clip in zip(rows_of(done), clips, strict=True):
        assert row["input_ids"] == clip["prompt_ids"] + clip["clip_ids"]
        assert row["completion_mask"] == [0] * len(clip["prompt_ids"]) + [1] * len(clip["clip_ids"])
        assert row["prompt"] == TOKENIZER.decode(clip["prompt_ids"])
        assert clip["completion"].startswith(row["completion"])


def test_prime_rl_rows_have_the_fields_of_a_training_sample(sample_lake, clips, tmp_path):
    done = export("prime-rl", sample_lake, tmp_path)
    assert pq.read_schema(done.folder / "clips-00000.parquet").equals(PRIME_RL)
    for row, clip in zip(rows_of(done), clips, strict=True):
        in_clip = [False] * len(clip["prompt_ids"]) + [True] * len(clip["clip_ids"])
        assert row["token_ids"] == clip["prompt_ids"] + clip["clip_ids"]
        assert row["mask"] == in_clip == [weight > 0 for weight in row["ce_weights"]]
        assert set(row["rl_weights"]) == set(row["logprobs"]) == {0.0}
        assert set(row["temperatures"]) == {1.0}


def prime_rl_ce(rows: list[dict[str, Any]], nll: list[np.ndarray]) -> float:
    """The CE component of one step as prime-rl's trainer normalizes it: by the tokens that have a weight."""
    weights = [np.array(row["ce_weights"]) for row in rows]
    num_tokens = sum(int((weight != 0).sum()) for weight in weights)
    return sum(float((weight * loss).sum()) for weight, loss in zip(weights, nll, strict=True)) / num_tokens


@pytest.mark.parametrize("clips_per_step", [2, 5, 100])
def test_the_ce_component_of_a_file_is_lambda_times_the_mean_of_the_clips_means(
    sample_lake, tmp_path, clips_per_step
):
    config = ExportConfig(clips_per_shard=clips_per_step)
    done = export_clips(sample_lake.lake, tmp_path, prime_rl(0.05), config, sample_lake.mining_id)
    random = np.random.default_rng(0)
    for file in done.manifest["files"]:
        rows = pq.read_table(done.folder / file["file"]).to_pylist()
        nll = [random.gamma(0.5, 1.0, len(row["token_ids"])) for row in rows]
        means = [loss[np.array(row["mask"])].mean() for loss, row in zip(nll, rows, strict=True)]
        assert prime_rl_ce(rows, nll) == pytest.approx(0.05 * np.mean(means), rel=1e-6)


def test_a_part_of_a_file_has_the_term_times_the_ratio_of_the_mean_lengths():
    lengths = np.array([3, 40, 7, 110], np.int32)
    part = [0, 2]
    rows = [
        {"ce_weights": [weight] * length}
        for weight, length in zip(ce_weights(lengths, 0.001), lengths, strict=True)
    ]
    nll = [np.linspace(0.1, 2.0, length) for length in lengths]
    wanted = 0.001 * np.mean([nll[index].mean() for index in part])
    got = prime_rl_ce([rows[index] for index in part], [nll[index] for index in part])
    assert got == pytest.approx(wanted * lengths.mean() / lengths[part].mean(), rel=1e-6)


def test_the_card_of_an_hf_folder_names_its_data_and_explains_every_column(sample_lake, clips, tmp_path):
    done = export("hf", sample_lake, tmp_path)
    _, head, text = (done.folder / "README.md").read_text().split("---\n", 2)
    (files,) = yaml.safe_load(head)["configs"][0]["data_files"]
    assert sorted(done.folder.glob(files["path"])) == [done.folder / "clips-00000.parquet"]
    assert list(MEANINGS) == HF.names == pq.read_schema(done.folder / "clips-00000.parquet").names
    assert all(f"| `{name}` |" in text for name in HF.names)
    assert f"{len(clips)} EchoClips of {done.manifest['clip_tokens']} tokens" in text
    assert [row["clip_ids"] for row in rows_of(done)] == [clip["clip_ids"] for clip in clips]
    assert rows_of(done)[0]["messages"] == json.loads(clips[0]["messages"])


def test_windows_smaller_than_the_export_change_nothing(sample_lake, tmp_path, monkeypatch):
    whole = export("shards", sample_lake, tmp_path / "whole", clips_per_shard=2)
    monkeypatch.setattr(selection, "WINDOW_CLIPS", 1)
    parts = export("shards", sample_lake, tmp_path / "parts", clips_per_shard=2)
    assert [file["sha256"] for file in parts.manifest["files"]] == [
        file["sha256"] for file in whole.manifest["files"]
    ]


def test_a_clip_that_ends_within_a_character_is_a_prefix_all_the_same():
    alphabet = {byte: place for place, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "é🙂\nπ"
    ids = np.array(tokenizer(text)["input_ids"], np.int32)
    found = [clip_text(tokenizer, ids[:end]) for end in range(1, len(ids) + 1)]
    assert found == ["", "é", "é", "é", "é", "é🙂", "é🙂\n", "é🙂\n", text]


def test_a_prompt_known_by_its_tokens_only_gets_the_one_message_that_makes_them_or_none():
    tokenizer = load_tokenizer(model_folder("arith"))
    message = {"role": "user", "content": "17+25"}
    ids = prompt_messages_ids(tokenizer, [message])
    assert prompt_messages(tokenizer, None, ids) == [message]
    assert prompt_messages(tokenizer, None, ids[:-1]) is None
    plain = np.array(TOKENIZER("What is 17+25?")["input_ids"], np.int32)
    assert prompt_messages(TOKENIZER, None, plain) == [{"role": "user", "content": "What is 17+25?"}]


def test_clips_without_messages_are_left_out_of_chats_and_counted(tmp_path):
    builder = LakeBuilder(tmp_path / "lake")
    builder.add_group(["1\n#2", "2\n#2"], [1.0, 1.0], prompt_ids=[1, EOS_ID, 2], prompt_id="unknown")
    builder.add_group(["1\n#2", "2\n#2"], [1.0, 1.0], question="What is 1+1?")
    lake = builder.commit()
    mined = SampleLake(lake, "run-1", mine(lake, MiningConfig()).mining_id, builder.tokenizer)
    sft = export("sft", mined, tmp_path / "sft")
    assert (sft.clips, sft.dropped, len(rows_of(sft))) == (1, {"unknown_messages": 1}, 1)
    assert export("trl", mined, tmp_path / "trl").clips == 2
    assert sorted(row["messages"] is None for row in rows_of(export("hf", mined, tmp_path / "hf"))) == [
        False,
        True,
    ]


@pytest.mark.parametrize("form", [luffy, sft, trl, hf])
def test_text_is_not_decoded_with_another_tokenizer(form, sample_lake, tmp_path):
    other = form(load_tokenizer(model_folder("arith")))
    with pytest.raises(FormatError, match=r"which is not the one given\. Give the folder of the model"):
        export_clips(sample_lake.lake, tmp_path, other, ExportConfig(), sample_lake.mining_id)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FORMS)
def test_an_export_of_no_clip_is_complete_and_not_the_newest(name, sample_lake, tmp_path):
    done = export(name, sample_lake, tmp_path, max_tokens=1)
    assert done.clips == 0
    assert rows_of(done) == []
    assert set(done.dropped) == {"max_tokens"}
    assert [path.name for path in tmp_path.iterdir()] == [done.folder.name]


@pytest.mark.parametrize("name", FORMS)
def test_a_damaged_export_is_written_again(name, sample_lake, tmp_path):
    done = export(name, sample_lake, tmp_path)
    path = done.folder / done.manifest["files"][0]["file"]
    good = path.read_bytes()
    path.write_bytes(good[:-20])
    assert export(name, sample_lake, tmp_path).folder == done.folder
    assert path.read_bytes() == good


@pytest.mark.parametrize("name", FORMS)
def test_every_form_says_the_same_of_a_lake_that_was_not_mined_and_a_folder_that_is_a_file(
    name, sample_lake, tmp_path
):
    with pytest.raises(NothingToMine, match="was never mined"):
        export_clips(Lake.create(tmp_path / "lake"), tmp_path / "out", FORMS[name], ExportConfig())
    (tmp_path / "file").write_text("")
    with pytest.raises(LakeError, match=rf"Cannot write {name} to .*Choose another folder"):
        export(name, sample_lake, tmp_path / "file")


def test_the_trainer_refuses_an_export_of_another_form(sample_lake, tmp_path):
    export("trl", sample_lake, tmp_path)
    with pytest.raises(FormatError, match=r"holds an export of the form trl\. Export shards"):
        load_clips(tmp_path, "any tokenizer")


def test_an_export_is_of_the_lake_as_it_was(sample_lake, tmp_path):
    shutil.copytree(sample_lake.lake.folder, tmp_path / "lake")
    lake = Lake.open(tmp_path / "lake")
    with lake.reader() as reader:
        before = reader.snapshot
    mine(lake, MiningConfig(max_clips=1))
    assert export_clips(lake, tmp_path / "new", SHARDS, ExportConfig()).clips == 1
    then = export_clips(lake, tmp_path / "then", SHARDS, ExportConfig(), snapshot=before)
    assert then.manifest["mining_id"] == sample_lake.mining_id


def test_a_clip_that_left_the_lake_makes_another_export(sample_lake, tmp_path):
    """The name of an export follows its clips, so that none that was withdrawn is handed out again."""
    first = export("shards", sample_lake, tmp_path)
    with sample_lake.lake.reader() as reader:
        reader.materialize_rows(
            "rollouts", reader.table("select * from rollouts").slice(0, 4)
        )  # a session that sees less than the lake holds
        less = selection.select(reader, ExportConfig(), sample_lake.mining_id)
    with sample_lake.lake.reader() as reader:
        all_clips = selection.select(reader, ExportConfig(), sample_lake.mining_id)
    assert less.num_clips < all_clips.num_clips == first.clips
    assert less.content_hash != all_clips.content_hash


def test_luffy_and_sft_keep_characters_that_json_and_parquet_stumble_over(tmp_path):
    builder = LakeBuilder(tmp_path / "lake")
    odd = 'é π "quoted" \\ 🙂\u2028 half\n#4'
    builder.add_group([odd, odd + "\n"], [1.0, 1.0], question="2\u2029+2\t\\?")
    lake = builder.commit()
    mining = mine(lake, MiningConfig(min_step_tokens=5))
    mined = SampleLake(lake, "run-1", mining.mining_id, builder.tokenizer)
    done = export("sft", mined, tmp_path / "sft")
    assert (done.folder / "clips-00000.jsonl").read_bytes().count(b"\n") == 1
    ((question, answer),) = [row["messages"] for row in rows_of(done)]
    assert question["content"] == "2\u2029+2\t\\?"
    assert odd.startswith(answer["content"])
    (row,) = rows_of(export("luffy", mined, tmp_path / "luffy"))
    assert (row["prompt"], row["target"]) == ([question], [answer])
