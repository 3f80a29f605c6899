"""Linear layers of the scorer on a CPU in float32, speed and rounding: oneDNN against torch's default (MKL).

    python tests/benchmarks/bench_linear.py --tokens 1024 --sizes 576x1536 1536x576 576x49152

A size is input x output features; the defaults are SmolLM2's. The sides take turns; the figures are medians.
Errors are mean absolute differences to the product in float64, of standard normal inputs and weights.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext

import torch
from measure import medians, print_table

from pipeline.onednn import OneDnnLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sizes", nargs="+", default=["576x1536", "1536x576", "576x49152"])
    parser.add_argument("--calls", type=int, default=8, help="calls in one measurement")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()

    rows = []
    for size in options.sizes:
        num_inputs, num_outputs = map(int, size.split("x"))
        states, weight = torch.randn(options.tokens, num_inputs), torch.randn(num_outputs, num_inputs)

        def default(states: torch.Tensor = states, weight: torch.Tensor = weight) -> None:
            with torch.inference_mode():
                for _ in range(options.calls):
                    torch.nn.functional.linear(states, weight)

        def onednn(default=default) -> None:
            with OneDnnLinear():
                default()

        seconds = medians({"default": default, "oneDNN": onednn}, options.repeats)
        work = 2e-9 * options.calls * options.tokens * num_inputs * num_outputs
        rates = [work / seconds[side] for side in ("default", "oneDNN")]
        errors = [f"{error(states, weight, mode):.1e}" for mode in (nullcontext(), OneDnnLinear())]
        rows.append((size, *(f"{rate:.0f}" for rate in rates), f"{rates[1] / rates[0]:.2f}", *errors))
    header = ("layer", "default, GFLOP/s", "oneDNN, GFLOP/s", "ratio", "default, error", "oneDNN, error")
    print_table(header, rows)


@torch.inference_mode()
def error(states: torch.Tensor, weight: torch.Tensor, mode: AbstractContextManager[object]) -> float:
    """Mean absolute difference to the product in float64; over 64 rows, which are enough for a mean."""
    with mode:
        product = torch.nn.functional.linear(states[:64], weight)
    return float((product - states[:64].double() @ weight.double().T).abs().mean())


if __name__ == "__main__":
    main()
