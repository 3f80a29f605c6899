"""Clips for a loop of one's own."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import ExportConfig
from pipeline.exports.core import export_clips
from pipeline.exports.shards import SHARDS
from pipeline.lake import Lake
from pipeline.shards import UnknownTokenizer
from trainer.echoclips import EchoClips
from trainer.learner import mean_clip_loss


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
    before = clips.loss(model)
    assert before.item() == pytest.approx(mean_clip_loss(model, clips.clips, 10_000), rel=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        clips.loss(model).backward()
        optimizer.step()
    assert clips.loss(model) < before


def test_the_same_seed_deals_the_same_clips(shards, sample_lake, model):
    losses = [
        [clips.loss(model).item() for _ in range(4)]
        for clips in (EchoClips(shards, sample_lake.tokenizer, 1, seed) for seed in (0, 0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_clips_of_another_tokenizer_are_refused(shards, tokenizer):
    with pytest.raises(UnknownTokenizer, match="not this model's"):
        EchoClips(shards, tokenizer)
