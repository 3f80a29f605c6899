"""A random two-layer Llama over single characters, and what it samples."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.config import SamplingConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.transformers import TransformersEngine
from pipeline.records import Group, Judgement, Prompt
from pipeline.shards import Clip
from trainer.rollout_batch import Rollouts, rollout_batch

CHARACTERS = "0123456789+-*/=#() abcdefghijklmnopqr\n"  # with <pad> and <eos>: 40 tokens


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def sampled_group(
    model: LlamaForCausalLM, text: str, num_samples: int, temperature: float = 1.0, max_tokens: int = 9
) -> Group:
    """A group of real samples; one token per character of the text."""
    sampling = SamplingConfig(group_size=num_samples, max_tokens=max_tokens, temperature=temperature)
    request = GroupRequest(Prompt(({"role": "user", "content": text},)), tuple(range(num_samples)))
    return next(TransformersEngine(model, char_tokenizer()).generate([request], sampling))


def char_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def judged(*rewards: float | None) -> list[Judgement]:
    return [Judgement(reward) for reward in rewards]


def batch_of(groups, judgements, config, *, logprobs_known, max_tokens, experts=None, hints=None):
    """What a learner takes of these groups, which no loop sampled."""
    none = [()] * len(groups)
    rollouts = Rollouts(groups, judgements, experts or none, hints or [0] * len(groups), 0)
    return rollout_batch(rollouts, config, logprobs_known=logprobs_known, max_tokens=max_tokens)


def random_clips(count: int, seed: int = 0) -> list[Clip]:
    random = np.random.default_rng(seed)
    return [
        Clip(
            clip_id=f"clip{i}",
            prompt_ids=random.integers(2, 40, 2 + i % 3).astype(np.int32),
            clip_ids=random.integers(2, 40, 1 + i % 5).astype(np.int32),
            step_entropy=1.0,
            reward=1.0,
            policy_version=0,
            tokenizer_hash="tiny",
            weight=1.0,
        )
        for i in range(count)
    ]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return char_tokenizer()


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """What the tests build batches from, by name."""
    return SimpleNamespace(
        model=tiny_llama,
        group=sampled_group,
        batch=batch_of,
        judged=judged,
        clips=random_clips,
        engine=TransformersEngine,
        tokenizer=char_tokenizer,
    )
