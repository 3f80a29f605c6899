from __future__ import annotations

import numpy as np
import pytest
import torch
from float64_reference import entropies, next_token_logprobs, sampled_tokens_logprobs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline import logprobs as module
from pipeline.errors import FormatError, ModelError
from pipeline.logprobs import check_head, completion_logprobs, token_logprobs_and_entropies

SMALL = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 48,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def head_inputs(num_rows=37, hidden=16, vocabulary=101, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    states = torch.randn(num_rows, hidden, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (num_rows,), generator=random)
    return states, weight, bias, targets


def full(states, weight, bias, targets, temperature=1.0, entropy_temperature=1.0):
    logits = states.double() @ weight.double().T + bias.double()
    log_p = torch.log_softmax(logits / temperature, -1)
    plain = torch.log_softmax(logits / entropy_temperature, -1)
    return log_p.gather(1, targets[:, None])[:, 0], -(plain.exp() * plain).sum(-1)


@pytest.mark.parametrize("chunk_logits", [1, 60, 1000, 10**6])
@pytest.mark.parametrize(("temperature", "entropy_temperature"), [(1.0, 1.0), (0.6, 1.0), (1.5, 1.5)])
def test_values_and_gradients_are_those_of_a_full_softmax_in_float64(
    chunk_logits, temperature, entropy_temperature
):
    *inputs, targets = head_inputs()
    ours = token_logprobs_and_entropies(
        inputs[0],
        inputs[1],
        targets,
        bias=inputs[2],
        temperature=temperature,
        entropy_temperature=entropy_temperature,
        differentiable_entropies=True,
        chunk_logits=chunk_logits,
    )
    theirs = full(*inputs, targets, temperature, entropy_temperature)
    pulls = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)
        our_grads = torch.autograd.grad((our * pulls).sum(), inputs, retain_graph=True)
        their_grads = torch.autograd.grad((their * pulls).sum(), inputs, retain_graph=True)
        for our_grad, their_grad in zip(our_grads, their_grads, strict=True):
            torch.testing.assert_close(our_grad, their_grad, rtol=1e-11, atol=1e-11)


def test_entropies_carry_no_gradient_unless_asked():
    states, weight, _, targets = head_inputs()
    logprobs, entropies = token_logprobs_and_entropies(states, weight, targets)
    assert logprobs.requires_grad
    assert not entropies.requires_grad


def test_bfloat16_input_is_computed_in_float32():
    states, weight, bias, targets = head_inputs(vocabulary=4001, dtype=torch.bfloat16)
    ours = token_logprobs_and_entropies(states, weight, targets, bias=bias, chunk_logits=10_000)
    theirs = full(states, weight, bias, targets)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-5)  # bfloat16 logits miss by 1e-2
    ours[0].sum().backward()
    assert weight.grad.dtype == states.grad.dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_flatten(made)[0] if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


def test_no_more_than_a_chunk_of_logits_exists_at_once():
    states, weight, bias, targets = head_inputs(num_rows=100, hidden=2, vocabulary=3000)
    with Largest() as largest, torch.no_grad():
        token_logprobs_and_entropies(states, weight, targets, bias=bias, chunk_logits=900)
    assert largest.elements == 900
    with Largest() as largest:
        logprobs, entropies = token_logprobs_and_entropies(
            states, weight, targets, bias=bias, chunk_logits=900, differentiable_entropies=True
        )
        (logprobs + entropies).sum().backward()
    assert largest.elements == weight.numel() == 6000  # its gradient


def test_weights_of_half_precision_are_cast_a_block_at_a_time():
    states, weight, _, targets = head_inputs(num_rows=8, hidden=64, vocabulary=5000, dtype=torch.bfloat16)
    with Largest() as largest, torch.no_grad():
        token_logprobs_and_entropies(states, weight, targets, chunk_logits=800)
    assert largest.elements == 100 * 64  # 800 logits are those of 8 rows and 100 tokens


def test_rounding_gives_no_negative_entropy_and_no_probability_above_one():
    states, weight, _, _ = head_inputs(num_rows=200, vocabulary=3000, dtype=torch.float32)
    with torch.no_grad():
        certain = (states @ weight.T).argmax(-1)
        logprobs, entropies = token_logprobs_and_entropies(states * 9, weight, certain, chunk_logits=999)
    assert logprobs.max() <= 0
    assert entropies.min() >= 0
    assert (entropies < 1e-6).sum() > 20


def rows_of(*lengths):
    random = np.random.default_rng(0)
    return [
        (random.integers(2, 40, p).astype(np.int32), random.integers(2, 40, c).astype(np.int32))
        for p, c in lengths
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_padded_rows_give_each_row_what_it_gets_alone_through_the_whole_model(model, temperature):
    rows = rows_of((3, 5), (1, 12), (20, 1), (7, 0))
    stats = completion_logprobs(model, rows, temperature=temperature)
    assert stats.lengths.tolist() == [5, 12, 1, 0]
    exact = model.double()
    sampled = [sampled_tokens_logprobs(next_token_logprobs(exact, *row, temperature), row[1]) for row in rows]
    plain = [entropies(next_token_logprobs(exact, *row)) for row in rows]
    np.testing.assert_allclose(stats.logprobs.detach().numpy(), np.concatenate(sampled), atol=2e-5)
    np.testing.assert_allclose(stats.entropies.numpy(), np.concatenate(plain), atol=2e-5)


def test_only_completion_positions_reach_the_head(model, monkeypatch):
    seen = []
    plain = module.token_logprobs_and_entropies
    monkeypatch.setattr(
        module,
        "token_logprobs_and_entropies",
        lambda hidden, *args, **kwargs: seen.append(len(hidden)) or plain(hidden, *args, **kwargs),
    )
    completion_logprobs(model, rows_of((30, 2), (4, 3)))
    assert seen == [5]


def test_rows_without_completion_tokens_give_nothing(model):
    stats = completion_logprobs(model, rows_of((3, 0)))
    assert stats.lengths.tolist() == [0]
    assert len(stats.logprobs) == len(stats.entropies) == 0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (rows_of((0, 4))[0], "no prompt tokens"),
        (rows_of((30, 19))[0], "30 prompt and 19 completion tokens, more than the 48"),
        ((np.array([3], np.int32), np.array([40], np.int32)), "token id 40"),
        ((np.array([3], np.int32), np.array([-1], np.int32)), "token id -1"),
    ],
)
def test_a_row_that_does_not_fit_the_model_is_refused_on_one_line(model, row, words):
    with pytest.raises(FormatError, match=words) as caught:
        completion_logprobs(model, [row])
    assert "\n" not in str(caught.value)


def test_a_model_that_caps_its_logits_is_refused_and_plain_ones_pass(model):
    check_head(model)
    check_head(Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True)).eval())
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=1.0)).eval()
    with pytest.raises(ModelError, match="scales or caps its logits"):
        check_head(capped)
