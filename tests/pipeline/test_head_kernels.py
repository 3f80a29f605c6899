"""The Triton kernels of the output embedding, on a GPU; those of blocks also in Triton's interpreter.

Without a GPU: `pip install --target FOLDER triton==3.7.1`, then
`TRITON_INTERPRET=1 PYTHONPATH=.:FOLDER pytest -m gpu -k blocks tests/pipeline/test_head_kernels.py`.
"""

from __future__ import annotations

import pytest
import torch

from pipeline.head_blocks import Distribution, logits_gradient
from pipeline.logprobs import token_logprobs_and_entropies

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_blocks_give_the_sums_and_the_gradient_that_torch_gives_in_float64(temperature):
    from pipeline import head_kernels

    torch.manual_seed(0)
    rows, vocabulary = 9, 5000
    logits = (torch.randn(rows, vocabulary) * 4).to(DEVICE)
    ours = Distribution(rows, temperature, like=logits)
    exact = Distribution(rows, temperature, like=logits.double())
    exact.add(logits.double())
    for block in logits.split(2100, 1):
        head_kernels.take_in(block, temperature, ours.greatest, ours.mass, ours.moment)
    torch.testing.assert_close(ours.normalizers().double(), exact.normalizers(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours.entropies().double(), exact.entropies(), rtol=1e-5, atol=1e-5)

    places = torch.tensor([3, -1, 4999, 5000, 17, 2048, 2047, -4000, 0], device=DEVICE)
    pulls = torch.randn(2, rows).to(DEVICE)
    temperatures = (temperature, 1.0)
    expected = logits_gradient(
        logits.double(),
        places,
        [exact.normalizers()] * 2,
        exact.entropies(),
        list(pulls.double()),
        temperatures,
    )
    found = head_kernels.to_gradient(
        logits, places, [ours.normalizers()] * 2, ours.entropies(), list(pulls), temperatures
    )
    assert found.data_ptr() == logits.data_ptr()  # in place
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_of_a_head_on_a_gpu_are_those_of_float64(dtype, tolerance):
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, device="cuda").to(dtype) for size in ((300, 64), (7001, 64), (7001,))
    )
    targets = torch.randint(7001, (300,), device="cuda")

    def values_and_gradients(kind: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.detach().to(kind).requires_grad_() for x in (hidden, weight, bias)]
        values = token_logprobs_and_entropies(
            inputs[0], inputs[1], targets, bias=inputs[2], temperature=0.7,
            differentiable_entropies=True, chunk_logits=100_000,
        )  # fmt: skip
        return [*values, *torch.autograd.grad(sum(value.sum() for value in values), inputs)]

    for ours, exact in zip(values_and_gradients(dtype), values_and_gradients(torch.float64), strict=True):
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error <= tolerance


def test_16k_tokens_of_a_152k_vocabulary_need_less_than_one_and_a_half_gigabytes():
    states = torch.randn(16_384, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(152_000, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(152_000, (16_384,), device="cuda")
    weight.grad = torch.zeros_like(weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs, _ = token_logprobs_and_entropies(states, weight, targets)
    logprobs.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.5e9
