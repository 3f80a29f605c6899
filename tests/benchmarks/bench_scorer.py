"""The scorer against the straightforward loop: one sequence at a time, full log-softmax. CPU or GPU.

    python tests/benchmarks/bench_scorer.py --model smollm2 --groups 12 --prompt-tokens 80

Lengths are log-normal. The loop has its rollouts in memory; the scorer reads them from a lake and commits
what it finds, so its side carries everything that `echomine score` does after loading the model.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measure import medians, print_table
from transformers import PreTrainedModel

from pipeline import scoring
from pipeline.lake import Lake
from pipeline.logprobs import Row
from pipeline.models import load_model, model_folder, policy_of
from pipeline.records import Policy
from pipeline.rollouts import rollout_table
from pipeline.tokenization import load_tokenizer


def rollouts(options: argparse.Namespace, vocabulary: int, context: int) -> list[tuple[int, Row]]:
    """(group, row) of random tokens; what they are changes no speed."""
    random = np.random.default_rng(0)
    rows = []
    for group in range(options.groups):
        prompt_tokens = _lengths(random, options.prompt_tokens, context // 4, 1)[0]
        prompt = random.integers(3, vocabulary, prompt_tokens).astype(np.int32)
        for num_tokens in _lengths(random, options.completion_tokens, context // 2, options.group_size):
            rows.append((group, (prompt, random.integers(3, vocabulary, num_tokens).astype(np.int32))))
    return rows


def _lengths(random: np.random.Generator, median: int, longest: int, count: int) -> np.ndarray:
    return np.clip(random.lognormal(np.log(median), 0.7, count), 2, longest).astype(int)


def lake_with(folder: Path, rows: list[tuple[int, Row]], policy: Policy) -> Lake:
    lake = Lake.create(folder)
    records = [
        {
            "group_id": str(group),
            "prompt_id": str(group),
            "run_id": "benchmark",
            "origin": "policy",
            "model": policy.model,
            "tokenizer_hash": policy.tokenizer_hash,
            "sample_index": index,
            "prompt_ids": prompt,
            "completion_ids": completion,
            "finish_reason": "stop",
            "reward": 1.0,
            "step_ends": np.unique([*range(8, len(completion), 8), len(completion)]),
        }
        for index, (group, (prompt, completion)) in enumerate(rows)
    ]
    lake.commit({"rollouts": rollout_table(records)})
    return lake


@torch.inference_mode()
def loop(model: PreTrainedModel, rows: list[tuple[int, Row]]) -> dict[tuple[int, ...], np.ndarray]:
    """Entropies by completion, as anyone would write it."""
    entropies = {}
    for _, (prompt, completion) in rows:
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64)).to(model.device)
        log_p = torch.log_softmax(model(ids[None]).logits[0].float(), dim=-1)
        log_p[:-1].gather(1, ids[1:, None])[len(prompt) - 1 :].cpu()  # the log-probs
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        entropies[tuple(completion)] = entropy[len(prompt) - 1 : -1].cpu().numpy()
    return entropies


def difference(lake: Lake, entropies: dict[tuple[int, ...], np.ndarray]) -> float:
    """The greatest between the two sides, nats."""
    with lake.reader() as reader:
        rows = reader.rows("select completion_ids, completion_entropies from rollouts")
    gaps = [np.abs(entropies[tuple(r["completion_ids"])] - r["completion_entropies"]).max() for r in rows]
    return float(max(gaps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="arith")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--groups", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=12, help="median")
    parser.add_argument("--completion-tokens", type=int, default=40, help="median")
    parser.add_argument("--batch-tokens", type=int, help="default: the scorer's")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    folder = model_folder(options.model)
    model = load_model(folder, options.device, options.dtype)
    policy = policy_of(folder, options.model, load_tokenizer(folder))
    rows = rollouts(options, model.config.vocab_size, model.config.max_position_embeddings)
    with tempfile.TemporaryDirectory() as temporary:
        lake = lake_with(Path(temporary) / "lake", rows, policy)
        times = iter(range(10**6))

        def scorer() -> None:
            again = replace(policy, weights_hash=f"time {next(times)}")  # so that nothing is done already
            selection = scoring.Selection(rescore=True)
            assert scoring.score(lake, model, again, selection, options.batch_tokens).scored == len(rows)

        seconds = medians({"loop": lambda: loop(model, rows), "scorer": scorer}, options.repeats)
        gap = difference(lake, loop(model, rows))
    tokens = sum(len(completion) for _, (_, completion) in rows)
    print_table(
        ("model", "side", "rollouts", "completion tokens", "median seconds", "tokens/s", "speed-up"),
        [
            (
                f"{options.model} {options.dtype}",
                side,
                len(rows),
                tokens,
                f"{seconds[side]:.2f}",
                f"{tokens / seconds[side]:,.0f}",
                f"{seconds['loop'] / seconds[side]:.1f}",
            )
            for side in seconds
        ],
    )
    print(f"\ngreatest difference of an entropy: {gap:.1e} nats")


if __name__ == "__main__":
    main()
