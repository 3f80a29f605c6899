"""The CE component that prime-rl's trainer makes of our samples, by its formula, against our own term.

prime-rl is on no package index, so its sum is written out here: each component is Σ weight · loss over the
tokens of a step, divided by how many of them have a weight (`trainer/rl/train.py`, summer of 2026).
"""

from __future__ import annotations

import pytest
import torch
from arith_shards import export_arith_shards

from pipeline.errors import ConfigError
from pipeline.exports.prime_rl import PRIME_RL
from pipeline.models import load_model, model_folder
from pipeline.tokenization import load_tokenizer
from trainer.adapters.prime_rl import EchoSamples
from trainer.echoclips import EchoClips

ECHO_WEIGHT = 0.3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arith")
    export_arith_shards(folder / "lake", folder / "shards")
    return folder / "shards"


def ce_component(model, samples):
    """A micro-batch a sample, each backpropagated; what all of them add up to."""
    num_tokens = sum(weight != 0 for sample in samples for weight in sample["ce_weights"])
    total = 0.0
    for sample in samples:
        ids = torch.tensor(sample["token_ids"])
        logits = model(ids[None]).logits[0, :-1] / torch.tensor(sample["temperatures"])[1:, None]
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
        part = -(torch.tensor(sample["ce_weights"])[1:] * logprobs).sum() / num_tokens
        part.backward()
        total += part.item()
    return total


def test_the_ce_component_of_a_step_is_lambda_times_the_echo_clip_loss(shards):
    tokenizer = load_tokenizer(model_folder("arith"))
    ours, theirs = (load_model(model_folder("arith"), "cpu", "float32") for _ in range(2))
    samples, clips = EchoSamples(shards, tokenizer, ECHO_WEIGHT, 5), EchoClips(shards, tokenizer, 5)
    step = samples.next_step()
    assert list(step[0]) == PRIME_RL.names
    assert len({len(sample["token_ids"]) for sample in step}) > 1
    loss = ECHO_WEIGHT * clips.loss(ours)
    loss.backward()
    assert ce_component(theirs, step) == pytest.approx(loss.item(), rel=1e-6)
    for expected, found in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            found.grad, expected.grad, rtol=0, atol=1e-5 * float(expected.grad.abs().max())
        )
    assert all(set(sample["rl_weights"]) == {0.0} for sample in step)


def test_a_negative_lambda_is_refused(shards):
    with pytest.raises(ConfigError, match="`echo_weight` is -1"):
        EchoSamples(shards, load_tokenizer(model_folder("arith")), -1.0)
