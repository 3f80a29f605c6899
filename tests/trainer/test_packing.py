"""Packed passes against padded ones, on real models of several kinds."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline import logprobs as module
from pipeline import packing
from pipeline.errors import ConfigError
from pipeline.logprobs import completion_logprobs
from pipeline.packing import can_pack
from trainer.batches import forward_batches, packed_batches, padded_batches
from trainer.padding import counted

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
PACKED = [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)]
PADDED = [
    (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
    (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 8}),
    (MambaForCausalLM, MambaConfig, {}),
]


def build(kind, config, **changes):
    torch.manual_seed(0)
    return kind(config(**SIZES | changes)).eval()


def rows_of(lengths):
    random = np.random.default_rng(0)
    return [tuple(random.integers(2, 60, tokens).astype(np.int32) for tokens in row) for row in lengths]


ROWS = rows_of([(3, 9), (1, 1), (20, 30), (4, 0), (5, 7), (2, 10), (1, 30), (30, 1), (6, 6)])


def values_and_gradients(model, rows):
    model.zero_grad()
    stats = completion_logprobs(model, rows, temperature=0.8, differentiable_entropies=True)
    pulls = torch.linspace(-1, 2, len(stats.logprobs)).to(stats.logprobs)
    (stats.logprobs * pulls + 0.1 * stats.entropies).sum().backward()
    return stats, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", PACKED)
def test_log_probs_entropies_and_gradients_are_those_of_padded_rows(monkeypatch, kind, dtype, tolerance):
    model = build(*kind).to(dtype)
    assert can_pack(model)
    with counted(model) as reading:
        packed, packed_gradients = values_and_gradients(model, ROWS)
    assert reading.num_positions == sum(len(p) + len(c) - 1 for p, c in ROWS if len(c))
    monkeypatch.setattr(module, "can_pack", lambda _: False)
    padded, padded_gradients = values_and_gradients(model, ROWS)
    torch.testing.assert_close(packed.logprobs, padded.logprobs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(packed.entropies, padded.entropies, rtol=tolerance, atol=tolerance)
    assert packed.lengths.tolist() == padded.lengths.tolist()
    for name, gradient in packed_gradients.items():
        scale = float(padded_gradients[name].abs().max())
        torch.testing.assert_close(gradient, padded_gradients[name], rtol=0, atol=tolerance * scale)


def mean_error(found, exact):
    """Of log-probs, entropies and each parameter's gradient, relative to the mean of the exact ones."""
    pairs = [(found[0].logprobs, exact[0].logprobs), (found[0].entropies, exact[0].entropies)]
    pairs += [(found[1][name], exact[1][name]) for name in exact[1]]
    errors = [(one.double() - other).abs().mean() / other.abs().mean() for one, other in pairs]
    return float(torch.stack(errors).mean().detach())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PACKED)
def test_variable_length_attention_in_bfloat16_errs_no_more_than_padded_rows_do(monkeypatch, kind):
    model, calls = build(*kind, hidden_size=64).to("cuda", torch.bfloat16), []
    exact = values_and_gradients(deepcopy(model).double(), ROWS)
    varlen = packing._varlen
    monkeypatch.setattr(packing, "_varlen", lambda *given: calls.append(None) or varlen(*given))
    assert can_pack(model)
    packed = values_and_gradients(model, ROWS)
    num_calls = len(calls)
    assert num_calls >= 4  # two layers, where the model was tried and where it was read
    monkeypatch.setattr(module, "can_pack", lambda _: False)
    padded = values_and_gradients(model, ROWS)
    assert len(calls) == num_calls
    assert mean_error(packed, exact) <= 1.5 * mean_error(padded, exact) <= 0.2


def test_no_row_changes_what_another_gets():
    model = build(*PACKED[0])
    together = completion_logprobs(model, ROWS).logprobs.split([len(c) for _, c in ROWS])
    for row, logprobs in zip(ROWS, together, strict=True):
        torch.testing.assert_close(logprobs, completion_logprobs(model, [row]).logprobs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", PADDED)
def test_models_with_windows_or_states_are_padded_and_get_what_each_row_gets_alone(kind):
    model = build(*kind[:2], **kind[2])
    assert not can_pack(model)
    rows = ROWS[:3] + ROWS[4:]
    together = completion_logprobs(model, rows).logprobs.split([len(c) for _, c in rows])
    for row, logprobs in zip(rows, together, strict=True):
        torch.testing.assert_close(logprobs, completion_logprobs(model, [row]).logprobs, rtol=0, atol=2e-5)


def test_gradient_checkpointing_pads_and_the_models_own_attention_stays():
    model = build(*PACKED[0])
    before = model.config._attn_implementation
    assert can_pack(model)
    completion_logprobs(model, ROWS)
    assert model.config._attn_implementation == before
    model.gradient_checkpointing_enable()
    assert not can_pack(model)


def test_97_percent_of_the_budget_are_real_tokens_on_log_normal_lengths():
    lengths = np.random.default_rng(0).lognormal(np.log(600), 0.8, 2000).clip(10, 8192).astype(int).tolist()
    passes = packed_batches(lengths, 16_384)
    assert sorted(row for rows in passes for row in rows) == list(range(2000))
    filled = [sum(lengths[row] for row in rows) for rows in passes]
    assert max(filled) <= 16_384
    assert sum(filled) >= 0.97 * 16_384 * len(passes)
    assert len(passes) < len(padded_batches(lengths, 16_384))


def test_a_row_that_does_not_fit_the_budget_is_refused_by_its_length():
    model = build(*PACKED[0])
    assert forward_batches(model, [], 8) == []
    with pytest.raises(ConfigError, match=r"^50 tokens, .* do not fit train\.batch_tokens = 49\. Raise it"):
        forward_batches(model, ROWS, 49)
