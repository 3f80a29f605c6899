"""Optimizer steps a second: packed against padded rows, beside EchoClips, and against TRL's GRPOTrainer.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_trainer.py --model arith
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_trainer.py --model smollm2 --rows 16
    python tests/benchmarks/bench_trainer.py --random 0.5B --device cuda --dtype bfloat16 --peak-tflops 989 \
        --rows 128 --median 600 --context 8192 --batch-tokens 32768

Every side takes GRPO steps on the same rollouts, whose lengths are log-normal, with given advantages and old
log-probs; nothing is sampled. Ours are the trainer's own (`Updater.update`). The side `online` also finds its
clips in the rollouts, whose steps are known from their rows for the lake, as in a training. Every
`grad_norms_every`-th of its steps measures both gradient norms: the line below the table spreads that over
the others. TRL gets as many rows in a micro-batch as `--batch-tokens` hold when they are padded to the
batch's longest, as it pads them; of bfloat16 weights it has no float32 copy.

On a CPU the sides take turns; on CUDA each has the GPU for itself, so that its peak memory is its own. The
table has the medians of `--repeats` steps. MFU counts what the rows need, without padding (`model_flops`).
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from measure import medians, print_table
from random_models import SIZES, model_flops, random_model
from trl import GRPOConfig, GRPOTrainer

from pipeline import logprobs
from pipeline.config import MiningConfig, TrainConfig
from pipeline.models import load_model, model_folder
from pipeline.records import Group, Judgement, Prompt, Sample
from pipeline.shards import Clip
from pipeline.tokenization import load_tokenizer, tokenizer_hash
from trainer import batches
from trainer.batches import packed_batches, padded_batches
from trainer.guard import Guard
from trainer.online import OnlineClips
from trainer.optimizer import MasterAdamW
from trainer.rollout_batch import RolloutBatch, Rollouts
from trainer.update import StepClips, Updater

LR, GROUP_SIZE, NUM_CLIPS = 1e-6, 8, 16


def rollout_batch(num_rows: int, vocabulary: int, context: int, median: float) -> RolloutBatch:
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


def as_sampled(batch: RolloutBatch) -> Rollouts:
    """The batch's rollouts as groups that all succeeded, with entropies, so that clips are found in them."""
    random, groups = np.random.default_rng(1), []
    for start in range(0, len(batch.rows), GROUP_SIZE):
        samples = tuple(
            Sample(i, i, ids, None, random.gamma(0.5, 0.4, len(ids)).astype(np.float32), "stop")
            for i, (_, ids) in enumerate(batch.rows[start : start + GROUP_SIZE])
        )
        prompt = Prompt(({"role": "user", "content": str(start)},))
        groups.append(Group(prompt, batch.rows[start][0], samples))
    judged = [[Judgement(1.0)] * len(group.samples) for group in groups]
    return Rollouts(groups, judged, [()] * len(groups), [0] * len(groups), 0)


def trl_step(model, tokenizer, batch: RolloutBatch, batch_tokens: int, folder: Path) -> Callable[[], None]:
    """A step of TRL's own trainer on the batch, as it pads and splits it."""
    settings = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=GROUP_SIZE, num_generations=GROUP_SIZE,
        use_cpu=model.device.type == "cpu", bf16=False, report_to=[], gradient_checkpointing=False,
        max_completion_length=batch.max_tokens, loss_type="grpo",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, args=settings, processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["1"] * GROUP_SIZE}),
    )  # fmt: skip
    trainer.model.train()
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=LR)
    inputs = {name: value.to(model.device) for name, value in trl_inputs(batch).items()}
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
    folder: Path,
    *,
    clips: Sequence[Clip] = (),
    online: Callable[[], StepClips] | None = None,
    optim_step: int = 0,
    packed: bool = True,
) -> Callable[[], None]:
    optimizer = MasterAdamW(model, LR, 0.0, 1.0)
    updater = Updater(model, config, 1.0, optimizer, Guard(folder, "benchmark"))

    def step() -> None:
        beside = online() if online else StepClips(clips, [None] * len(clips))
        assert not updater.update(batch, beside, optim_step).skipped

    def padded_step() -> None:
        with (
            mock.patch.object(logprobs, "can_pack", return_value=False),
            mock.patch.object(batches, "can_pack", return_value=False),
        ):
            step()

    return step if packed else padded_step


def finder(batch: RolloutBatch, tokenizer) -> Callable[[], StepClips]:
    """What `online` does before each step."""
    rollouts = as_sampled(batch)
    rules = MiningConfig(clips_per_group=max(1, NUM_CLIPS // len(rollouts.groups)))
    clips = OnlineClips(tokenizer, tokenizer_hash(tokenizer), rules, GROUP_SIZE, "benchmark")

    def find() -> StepClips:
        found = clips.of(rollouts)
        row_of = {place: row for row, place in enumerate(batch.places)}
        return StepClips([clip for clip, _ in found], [row_of[place] for _, place in found])

    return find


def measured(
    sides: dict[str, Callable[[], Callable[[], None]]], repeats: int, on_cuda: bool
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Seconds a step and, on CUDA, peak memory in bytes of each side."""
    if not on_cuda:
        return medians({name: build() for name, build in sides.items()}, repeats), dict.fromkeys(sides)
    seconds: dict[str, float] = {}
    peaks: dict[str, float | None] = {}
    for name, build in sides.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, step = torch.cuda.memory_allocated(), build()

        def finished(step: Callable[[], None] = step) -> None:
            step()
            torch.cuda.synchronize()

        seconds |= medians({name: finished}, repeats)
        peaks[name] = torch.cuda.max_memory_allocated() - before
        del step, finished
    return seconds, peaks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="arith")
    parser.add_argument("--random", choices=SIZES, help="random weights of this size instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in this dtype, dense; for MFU")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--median", type=float, default=60.0, help="tokens of a completion")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    folder, on_cuda = model_folder(options.model), options.device.startswith("cuda")
    if options.peak_tflops and not on_cuda:
        parser.error("--peak-tflops is a GPU's: give --device cuda")
    tokenizer = load_tokenizer(folder)
    if options.random:
        model = random_model(options.random, "cpu", getattr(torch, options.dtype)).train(False)
    else:
        model = load_model(folder, "cpu", options.dtype).train(False)
    vocabulary = min(model.config.vocab_size, len(tokenizer))
    batch = rollout_batch(options.rows, vocabulary, options.context, options.median)
    config = TrainConfig(batch_tokens=options.batch_tokens)
    clips = [
        Clip(str(i), prompt, completion[: max(1, len(completion) // 2)], 0.0, 1.0, 0, "", 1.0)
        for i, (prompt, completion) in enumerate(batch.rows[:: max(1, options.rows // NUM_CLIPS)])
    ]
    find = finder(batch, tokenizer)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)

        def ours(**given) -> Callable[[], Callable[[], None]]:
            return lambda: our_step(copied(), batch, config, scratch, **given)

        def copied():
            return deepcopy(model).to(options.device)

        sides = {
            "packed": ours(),
            "padded": ours(packed=False),
            "packed, clips of shards": ours(clips=clips),
            "packed, clips online": ours(online=find),
            "the same, norms measured": ours(online=find, optim_step=config.grad_norms_every - 1),
            "TRL": lambda: trl_step(copied(), tokenizer, batch, options.batch_tokens, scratch),
        }
        seconds, peaks = measured(sides, options.repeats, on_cuda)
    show(options, model, batch, config, clips, seconds, peaks)
    print(f"{len(find().clips)} clips online, found in {medians({'of': find})['of']:.4f} s")


def show(
    options: argparse.Namespace,
    model,
    batch: RolloutBatch,
    config: TrainConfig,
    clips: Sequence[Clip],
    seconds: dict[str, float],
    peaks: dict[str, float | None],
) -> None:
    lengths = [len(prompt) + len(completion) for prompt, completion in batch.rows]
    tokens, clip_tokens = sum(lengths), sum(len(c.prompt_ids) + len(c.clip_ids) for c in clips)
    trained = sum(len(completion) for _, completion in batch.rows)
    flops = model_flops(model, lengths, trained)
    rows = []
    for side, took in seconds.items():
        peak = peaks[side]
        mfu = f"{flops / took / options.peak_tflops / 1e12:.3f}" if options.peak_tflops else "–"
        memory = "–" if peak is None else f"{peak / 1e9:.2f}"
        rows.append(
            (side, f"{took:.3f}", f"{trained / took:,.0f}", f"{seconds['packed'] / took:.2f}", memory, mfu)
        )
    header = ("side", "seconds a step", "completion tokens / s", "packed's time / its time", "peak GB", "MFU")
    print_table(header, rows)
    passes, padded = (
        packed_batches(lengths, options.batch_tokens),
        padded_batches(lengths, options.batch_tokens),
    )
    print(f"\n{len(lengths)} rows, {tokens} tokens, {trained} of completions, {len(passes)} packed passes")
    read = sum(max(lengths[i] for i in rows_of) * len(rows_of) for rows_of in padded)
    print(f"real tokens in padded passes: {tokens / read:.3f}")
    over, limit = seconds["packed, clips of shards"] / seconds["packed"], 1 + clip_tokens / tokens + 0.02
    print(f"clips of shards: {over:.3f} of the time without; the goal is {limit:.3f} ({clip_tokens} tokens)")
    plain, every = seconds["packed, clips online"], config.grad_norms_every
    online = plain + (seconds["the same, norms measured"] - plain) / every
    print(
        f"clips online: {online / seconds['packed']:.3f} of the time without, one step in {every} measured; "
        "the goal is 1.020"
    )
    print(f"against TRL: {seconds['TRL'] / seconds['packed']:.2f} times its tokens/s; the goal is 1.50")


if __name__ == "__main__":
    main()
