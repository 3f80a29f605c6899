"""Memory of the fused log-probs and entropies, forward and backward, beyond weights and their gradient.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_head.py
    python tests/benchmarks/bench_head.py --device cuda --dtype bfloat16

The hidden states and their gradient are counted. The weights have a gradient before, as they do from the
second forward pass of an optimizer step on. On a CPU this is resident memory, on CUDA what torch allocated.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from measure import print_table

from pipeline.logprobs import token_logprobs_and_entropies


class Peak:
    """Greatest memory since it was made, beyond what there was then, in bytes."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device.startswith("cuda")
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again at VmRSS
            self._before = _status("VmRSS")

    def beyond(self) -> int:
        now = torch.cuda.max_memory_allocated() if self._on_cuda else _status("VmHWM")
        return now - self._before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def step(weight: torch.Tensor, num_tokens: int) -> None:
    hidden = torch.randn(num_tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
    hidden.requires_grad_()
    targets = torch.arange(num_tokens, device=weight.device) % len(weight)
    logprobs, entropies = token_logprobs_and_entropies(hidden, weight, targets, differentiable_entropies=True)
    (logprobs.sum() + entropies.sum()).backward()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--vocabulary", type=int, default=152_000)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype)
    weight = torch.randn(options.vocabulary, options.width, device=options.device, dtype=dtype)
    weight = (weight / options.width**0.5).requires_grad_()
    step(weight, 8)  # leaves a gradient, and loads what is loaded once
    peak, started = Peak(options.device), time.perf_counter()
    step(weight, options.tokens)
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    header = ("tokens", "vocabulary", "width", "dtype", "peak beyond weights and gradient, GB", "seconds")
    sizes = options.tokens, options.vocabulary, options.width, options.dtype
    print_table(header, [(*sizes, f"{peak.beyond() / 1e9:.2f}", f"{seconds:.1f}")])


if __name__ == "__main__":
    main()
