"""Optimizer steps a second: packed against padded rows, beside EchoClips, and against TRL's GRPOTrainer.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_trainer.py --model arith
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_trainer.py --model smollm2 --rows 16

Every side takes GRPO steps (loss, backward, gradient clipping, AdamW) on the same rollouts, whose lengths are
log-normal, with given advantages and old log-probs; nothing is sampled. TRL gets as many rows in a
micro-batch as `--batch-tokens` hold when they are padded to the batch's longest, as it pads them.
The sides take turns; the table has the medians of `--repeats` steps.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from measure import medians, print_table
from trl import GRPOConfig, GRPOTrainer

from pipeline import logprobs
from pipeline.config import TrainConfig
from pipeline.models import load_model, model_folder
from pipeline.shards import Clip
from pipeline.tokenization import load_tokenizer
from trainer import batches, learner
from trainer.batches import packed_batches, padded_batches
from trainer.optimizer import MasterAdamW
from trainer.rollout_batch import RolloutBatch

LR, GROUP_SIZE = 1e-6, 8


def rollouts(num_rows: int, vocabulary: int, context: int, median: float) -> RolloutBatch:
    """Groups of eight, with log-normal completion lengths."""
    random = np.random.default_rng(0)

    def lengths(middle: float, count: int, most: int) -> list[int]:
        return random.lognormal(np.log(middle), 0.8, count).astype(int).clip(4, most).tolist()

    prompts = [ids(random, n, vocabulary) for n in lengths(median / 4, num_rows // GROUP_SIZE, context // 4)]
    completions = [ids(random, n, vocabulary) for n in lengths(median, num_rows, context // 2)]
    rows = [(prompts[i // GROUP_SIZE], completion) for i, completion in enumerate(completions)]
    return RolloutBatch(
        rows=rows,
        advantages=torch.tensor(random.normal(size=num_rows), dtype=torch.float32),
        max_tokens=context // 2,
        places=[(i // GROUP_SIZE, i % GROUP_SIZE) for i in range(num_rows)],
        engine_logprobs=[random.normal(-1, 0.1, len(c)).astype(np.float32) for _, c in rows],
    )


def ids(random: np.random.Generator, count: int, vocabulary: int) -> np.ndarray:
    return random.integers(3, vocabulary, count).astype(np.int32)


def trl_step(model, tokenizer, batch: RolloutBatch, batch_tokens: int, folder: str) -> Callable[[], None]:
    """A step of TRL's own trainer on the batch, as it pads and splits it."""
    settings = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=GROUP_SIZE, num_generations=GROUP_SIZE,
        use_cpu=not torch.cuda.is_available(), bf16=False, report_to=[], gradient_checkpointing=False,
        max_completion_length=batch.max_tokens, loss_type="grpo",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, args=settings, processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["1"] * GROUP_SIZE}),
    )  # fmt: skip
    trainer.model.train()
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=LR)
    inputs = trl_inputs(batch)
    widest = inputs["prompt_ids"].shape[1] + inputs["completion_ids"].shape[1]
    parts = torch.arange(len(batch.rows)).split(max(1, batch_tokens // widest))
    trainer.current_gradient_accumulation_steps = len(parts)
    trainer.args.steps_per_generation = len(parts)

    def step() -> None:
        for part in parts:
            of_part = {name: value[part] if value.dim() else value for name, value in inputs.items()}
            trainer.compute_loss(trainer.model, of_part).backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def trl_inputs(batch: RolloutBatch) -> dict[str, torch.Tensor]:
    """What `_generate_and_score_completions` gives: prompts padded on the left, completions on the right."""
    widths = [max(len(row[part]) for row in batch.rows) for part in (0, 1)]
    size = len(batch.rows)
    prompts, prompt_mask = torch.zeros(2, size, widths[0], dtype=torch.int64)
    completions, mask = torch.zeros(2, size, widths[1], dtype=torch.int64)
    old = torch.zeros(size, widths[1])
    for i, (prompt, completion) in enumerate(batch.rows):
        prompts[i, widths[0] - len(prompt) :] = torch.as_tensor(prompt)
        prompt_mask[i, widths[0] - len(prompt) :] = 1
        completions[i, : len(completion)] = torch.as_tensor(completion)
        mask[i, : len(completion)] = 1
        old[i, : len(completion)] = torch.as_tensor(batch.engine_logprobs[i])
    return {
        "prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": completions,
        "completion_mask": mask, "advantages": batch.advantages, "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def our_step(
    model,
    batch: RolloutBatch,
    config: TrainConfig,
    *,
    clips: Sequence[Clip] = (),
    prefixes: Mapping[int, int] = MappingProxyType({}),
    packed: bool = True,
) -> Callable[[], None]:
    optimizer = MasterAdamW(model, LR, 0.0, 1.0)

    def step() -> None:
        weight = config.echo_weight / max(len(prefixes), 1)
        learner.backward_rollouts(model, batch, config, 1.0, optimizer.collect, prefixes, weight)
        optimizer.swap()
        learner.backward_clips(model, clips, config.echo_weight, config.batch_tokens, optimizer.collect)
        optimizer.clip()
        optimizer.step()

    def padded_step() -> None:
        with (
            mock.patch.object(logprobs, "can_pack", return_value=False),
            mock.patch.object(batches, "can_pack", return_value=False),
        ):
            step()

    return step if packed else padded_step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="arith")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--median", type=float, default=60.0, help="tokens of a completion")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    folder = model_folder(options.model)
    model = load_model(folder, "auto", "float32").train(False)
    batch = rollouts(options.rows, model.config.vocab_size, options.context, options.median)
    config = TrainConfig(batch_tokens=options.batch_tokens)
    clips = [
        Clip(str(i), prompt, completion[: max(1, len(completion) // 2)], 0.0, 1.0, 0, "", 1.0)
        for i, (prompt, completion) in enumerate(batch.rows[:: max(1, options.rows // 16)])
    ]
    prefixes = {
        i: max(1, len(batch.rows[i][1]) // 2) for i in range(0, options.rows, max(1, options.rows // 16))
    }
    lengths = [len(prompt) + len(completion) for prompt, completion in batch.rows]
    with tempfile.TemporaryDirectory() as scratch:
        sides = {
            "packed": our_step(deepcopy(model), batch, config),
            "padded": our_step(deepcopy(model), batch, config, packed=False),
            "packed, clips of shards": our_step(deepcopy(model), batch, config, clips=clips),
            "packed, clips online": our_step(deepcopy(model), batch, config, prefixes=prefixes),
            "TRL": trl_step(deepcopy(model), load_tokenizer(folder), batch, options.batch_tokens, scratch),
        }
        seconds = medians(sides, options.repeats)
    tokens, clip_tokens = sum(lengths), sum(len(c.prompt_ids) + len(c.clip_ids) for c in clips)
    trained = sum(len(completion) for _, completion in batch.rows)
    rows = [
        (side, f"{took:.3f}", f"{trained / took:,.0f}", f"{seconds['packed'] / took:.2f}")
        for side, took in seconds.items()
    ]
    print_table(("side", "seconds a step", "completion tokens / s", "packed's time / its time"), rows)
    passes, padded = (
        packed_batches(lengths, options.batch_tokens),
        padded_batches(lengths, options.batch_tokens),
    )
    print(f"\n{len(lengths)} rows, {tokens} tokens, {trained} of completions, {len(passes)} packed passes")
    read = sum(max(lengths[i] for i in rows_of) * len(rows_of) for rows_of in padded)
    print(f"real tokens in padded passes: {tokens / read:.3f}")
    over, limit = seconds["packed, clips of shards"] / seconds["packed"], 1 + clip_tokens / tokens + 0.02
    print(f"clips of shards: {over:.3f} of the time without; the goal is {limit:.3f} ({clip_tokens} tokens)")
    print(f"clips online: {seconds['packed, clips online'] / seconds['packed']:.3f}; the goal is 1.020")
    print(f"against TRL: {seconds['TRL'] / seconds['packed']:.2f} times its tokens/s; the goal is 1.50")


if __name__ == "__main__":
    main()
