"""Linear layers of the scorer on a CPU in float32: oneDNN against torch's default (MKL).

    python tests/benchmarks/bench_linear.py --tokens 1024 --sizes 576x1536 1536x576 576x49152

A size is input x output features; the defaults are SmolLM2's. The sides take turns; the figures are medians.
"""

from __future__ import annotations

import argparse

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
        rows.append((size, *(f"{rate:.0f}" for rate in rates), f"{rates[1] / rates[0]:.2f}"))
    print_table(("layer", "default, GFLOP/s", "oneDNN, GFLOP/s", "ratio"), rows)


if __name__ == "__main__":
    main()
