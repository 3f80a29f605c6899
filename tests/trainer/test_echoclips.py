"""Clips for a loop of one's own."""

import json

import pytest
import torch
from arith_shards import export_arith_shards
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import ExportConfig
from pipeline.errors import ConfigError, FormatError
from pipeline.exports.core import export_clips
from pipeline.exports.manifest import newest_manifest
from pipeline.exports.shards import SHARDS
from pipeline.lake import Lake
from pipeline.models import model_folder
from pipeline.shards import UnknownTokenizer, load_clips
from pipeline.tokenization import load_tokenizer, tokenizer_hash
from pipeline.withdrawal import NOTICE
from trainer.echoclips import EchoClips
from trainer.learner import backward_clips, mean_clip_loss


@pytest.fixture(scope="module")
def shards(sample_lake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    lake = Lake.open(sample_lake.lake.folder)
    export_clips(lake, folder, SHARDS, ExportConfig(), sample_lake.mining_id)
    return folder


@pytest.fixture
def model(sample_lake):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(sample_lake.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def test_the_loss_of_all_clips_is_their_mean_loss_and_falls_when_trained_on(shards, sample_lake, model):
    clips = EchoClips(shards, sample_lake.tokenizer, clips_per_step=1000)
    loaded = load_clips(shards, tokenizer_hash(sample_lake.tokenizer))
    before = clips.loss(model)
    assert before.item() == pytest.approx(mean_clip_loss(model, loaded, 10_000), rel=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        clips.loss(model).backward()
        optimizer.step()
    assert clips.loss(model) < before


def test_the_gradient_is_that_of_our_own_trainers_term(shards, sample_lake, model):
    clips = EchoClips(shards, sample_lake.tokenizer, clips_per_step=1000)
    clips.loss(model).backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    loaded = load_clips(shards, tokenizer_hash(sample_lake.tokenizer))
    backward_clips(model, loaded, 1.0, 50)  # several micro-batches
    for name, value in model.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_newer_export_takes_over_where_an_epoch_ends(tmp_path):
    export_arith_shards(tmp_path / "old", tmp_path / "shards")
    tokenizer = load_tokenizer(model_folder("arith"))
    clips = EchoClips(tmp_path / "shards", tokenizer, clips_per_step=2)
    old = {clip.clip_id for clip in load_clips(tmp_path / "shards", tokenizer_hash(tokenizer))}
    first = clips.next_batch()
    export_arith_shards(tmp_path / "new", tmp_path / "shards", ("20+22", "10+32"))
    assert {*first.clip_ids, *clips.next_batch().clip_ids} == old, "the epoch is dealt to its end"
    new = set(clips.next_batch().clip_ids)
    assert len(new) == 2
    assert not new & old
    assert set(clips.next_batch().clip_ids) == new


def test_epochs_are_cut_into_equal_steps_and_shuffled_anew(tmp_path):
    export_arith_shards(tmp_path / "lake", tmp_path / "shards")
    clips = EchoClips(tmp_path / "shards", load_tokenizer(model_folder("arith")), clips_per_step=3)
    dealt = [clips.next_batch().clip_ids for _ in range(12)]
    assert {len(batch) for batch in dealt} == {2}, "4 clips in 2 steps"
    epochs = {(*first, *second) for first, second in zip(dealt[::2], dealt[1::2], strict=True)}
    assert {len(set(epoch)) for epoch in epochs} == {4}
    assert len(epochs) > 1


def test_clips_that_were_withdrawn_are_dealt_no_more_after_the_epoch(tmp_path):
    export_arith_shards(tmp_path / "lake", tmp_path / "shards")
    clips = EchoClips(tmp_path / "shards", load_tokenizer(model_folder("arith")), clips_per_step=4)
    dealt = clips.next_batch().clip_ids
    notice = newest_manifest(tmp_path / "shards").parent / NOTICE
    notice.write_text(json.dumps({"overturned": dealt[:1]}))
    assert [set(clips.next_batch().clip_ids) for _ in range(2)] == [set(dealt[1:])] * 2
    notice.write_text(json.dumps({"overturned": dealt}))
    with pytest.raises(FormatError, match=r"All clips in .* were withdrawn"):
        clips.next_batch()


def test_a_dealing_goes_on_where_it_stood(tmp_path):
    export_arith_shards(tmp_path / "lake", tmp_path / "shards")

    def clips():
        return EchoClips(tmp_path / "shards", load_tokenizer(model_folder("arith")), clips_per_step=1)

    calm, stopped = clips(), clips()
    dealt = [calm.next_batch().clip_ids for _ in range(9)]
    for position in range(9):
        again = clips()
        again.load_state_dict(stopped.state_dict())
        assert [again.next_batch().clip_ids for _ in range(9 - position)] == dealt[position:]
        stopped.next_batch()


def test_less_than_one_clip_per_step_is_refused(shards, sample_lake):
    with pytest.raises(ConfigError, match="0 EchoClips per step"):
        EchoClips(shards, sample_lake.tokenizer, clips_per_step=0)


def test_a_newer_format_is_refused(tmp_path):
    export_arith_shards(tmp_path / "lake", tmp_path / "shards")
    path = newest_manifest(tmp_path / "shards")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(FormatError, match=r"has format 99\. Update EchoMine"):
        EchoClips(tmp_path / "shards", load_tokenizer(model_folder("arith")))


def test_the_same_seed_deals_the_same_clips(shards, sample_lake, model):
    losses = [
        [clips.loss(model).item() for _ in range(4)]
        for clips in (EchoClips(shards, sample_lake.tokenizer, 1, seed) for seed in (0, 0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_clips_of_another_tokenizer_are_refused(shards, tokenizer):
    with pytest.raises(UnknownTokenizer, match="not this model's"):
        EchoClips(shards, tokenizer)
