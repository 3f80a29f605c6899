"""However rows share forward passes, each gets what it gets alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dispatched import ONEDNN, Dispatched
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from pipeline.logprobs import Row, completion_logprobs
from pipeline.onednn import OneDnnLinear
from pipeline.teacher_forcing import forward_passes

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


def llama(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


def windowed() -> PreTrainedModel:
    """A model of which each token sees the four before it."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()


def rows_of(*families: tuple[int, tuple[int, ...]]) -> list[Row]:
    """Rows of prompts of so many tokens, each with completions of so many."""
    random = np.random.default_rng(0)
    ids = [(random.integers(0, 50, prompt).astype(np.int32), completions) for prompt, completions in families]
    return [
        (prompt, random.integers(0, 50, tokens).astype(np.int32)) for prompt, all in ids for tokens in all
    ]


ROWS = rows_of((9, (5, 1, 30, 12)), (3, (7, 7)), (20, (4,)), (1, (16, 0, 2)))


def fed_tokens(model: PreTrainedModel) -> list[int]:
    """Grows with the ids of each forward pass from here on, padding included."""
    fed: list[int] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, given: fed.append(given["input_ids"].numel()), with_kwargs=True
    )
    return fed


@pytest.mark.parametrize("batch_tokens", [1, 30, 64, 10_000])
@pytest.mark.parametrize("make", [llama, windowed])
@torch.inference_mode()
def test_every_row_gets_what_it_gets_alone(make, batch_tokens):
    model, seen = make(), []
    for indices, stats in forward_passes(model, ROWS, batch_tokens):
        seen += indices
        alone = [completion_logprobs(model, [ROWS[index]]) for index in indices]
        assert stats.lengths.tolist() == [len(ROWS[index][1]) for index in indices]
        torch.testing.assert_close(
            stats.logprobs, torch.cat([one.logprobs for one in alone]), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            stats.entropies, torch.cat([one.entropies for one in alone]), atol=1e-5, rtol=0
        )
    assert sorted(seen) == list(range(len(ROWS)))


@torch.inference_mode()
def test_a_prompt_that_several_share_is_read_once():
    model = llama()
    fed = fed_tokens(model)
    list(forward_passes(model, rows_of((60, (3, 3, 3, 3))), 10_000))
    assert fed == [60, 4 * 2]  # the last token of a row predicts nothing


@torch.inference_mode()
def test_a_model_that_forgets_part_of_its_prompt_reads_whole_rows():
    model = windowed()
    fed = fed_tokens(model)
    list(forward_passes(model, rows_of((60, (3, 3, 3, 3))), 10_000))
    assert fed == [4 * 62]


@torch.inference_mode()
def test_like_lengths_share_a_pass_and_none_is_larger_than_the_budget():
    model = llama()
    fed = fed_tokens(model)
    rows = rows_of(*((5, (length,)) for length in (40, 3, 39, 4, 38, 5)))
    indices = [part for part, _ in forward_passes(model, rows, 90)]
    assert indices == [[0, 2], [4, 5], [3, 1]]
    assert max(fed) <= 90


@torch.inference_mode()
def test_bfloat16_weights_lose_a_quarter_less_with_the_residual_stream_in_float32():
    sizes = {"num_hidden_layers": 24, "hidden_size": 128, "initializer_range": 0.08}
    exact, rows = llama(**sizes).double(), rows_of((5, (60, 60, 60)), (7, (80,)))
    rounded = llama(**sizes).bfloat16()
    with torch.no_grad():  # only the rounding on the way is judged, not that of the weights
        for ours, theirs in zip(exact.parameters(), rounded.parameters(), strict=True):
            ours.copy_(theirs)
    errors = []
    for precise in (False, True):
        gaps = [
            completion_logprobs(rounded, [row], precise=precise).logprobs
            - completion_logprobs(exact, [row]).logprobs
            for row in rows
        ]
        errors.append(torch.cat(gaps).abs().mean().item())
    assert errors[1] <= 0.75 * errors[0]


def test_onednn_multiplies_float32_without_gradients_and_nothing_else():
    torch.manual_seed(0)
    layer, states = torch.nn.Linear(300, 200), torch.randn(7, 40, 300)
    with OneDnnLinear(), torch.no_grad(), Dispatched() as dispatched:
        fast = layer(states)
    assert ONEDNN in dispatched.operations
    assert dispatched.operations.isdisjoint({"aten::linear", "aten::addmm", "aten::mm", "aten::bmm"})
    torch.testing.assert_close(fast, layer(states), atol=1e-5, rtol=1e-5)
    with OneDnnLinear(), Dispatched() as dispatched:
        layer(states).sum().backward()
        with torch.no_grad():
            assert layer.bfloat16()(states.bfloat16()).dtype == torch.bfloat16
    assert ONEDNN not in dispatched.operations
    assert layer.weight.grad is not None
