"""GRPO against GRPO with EchoClips, `online` and `shards`, on the tiny model: does it help?

    python tests/benchmarks/learning_curve.py FOLDER

Every run takes the same number of steps on the same number of rollouts, from the same weights; only seed and
arm differ. The clips of `shards` are mined before from a night of the starting policy on the training
prompts, which costs rollouts of its own: they are counted in the table. Held-out problems are other ones than
those trained on. Started again it goes on with the runs that are missing, and prints the table of all.
`--only SEED …` takes some seeds, for several processes at once on one folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from measure import machine, print_table

PROJECT = Path(__file__).parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "data" / "arith")]

ARMS = ("grpo", "online", "shards")
NUM_TRAINING, NUM_HELD_OUT = 512, 256
GROUP_SIZE, PROMPTS_PER_STEP, MAX_TOKENS = 8, 8, 96
EVALUATED_EVERY, HELD_OUT_SAMPLES = 25, 2
SPAN = 20  # first and last steps that the table's means of metrics are over
METRICS = {
    "zero_advantage_share": "zero-advantage share",
    "entropy_mean": "entropy, nats a token",
    "grad_norm": "gradient norm",
    "echo_grad_norm": "EchoClip term's gradient norm",
    "echo_loss": "EchoClip loss",
}


def prepared(folder: Path) -> Path:
    """Prompts, and a lake whose night of the starting policy is mined and exported."""
    shards = folder / "shards"
    if (shards / "latest.json").is_file():
        return shards
    from problems import write_prompts

    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(
        folder / "all.jsonl", 20_260_531, NUM_TRAINING + NUM_HELD_OUT, wide_share=0.06, drill_share=0.4
    )
    lines = (folder / "all.jsonl").read_text().splitlines(keepends=True)
    (folder / "training.jsonl").write_text("".join(lines[:NUM_TRAINING]))
    (folder / "held-out.jsonl").write_text("".join(lines[NUM_TRAINING:]))
    (folder / "night.toml").write_text(
        f'prompts = "{folder}/training.jsonl"\n[engine]\nkind = "transformers"\n'
        f"[sampling]\ngroup_size = {GROUP_SIZE}\nmax_tokens = {MAX_TOKENS}\n"
    )
    for command in (["generate", "--config", folder / "night.toml"], ["mine"], ["export", "shards", shards]):
        subprocess.run(
            [sys.executable, "-m", "flows.cli", *map(str, command), "--lake", str(folder / "lake")],
            check=True, cwd=PROJECT, env=os.environ | {"PYTHONPATH": str(PROJECT)},
        )  # fmt: skip
    return shards


def run(folder: Path, arm: str, seed: int, steps: int, lr: float, echo_weight: float) -> None:
    """One training, with the held-out accuracy at its start and every few steps."""
    from pipeline.config import SamplingConfig, TrainConfig, VerifyConfig
    from pipeline.engines.base import GroupRequest
    from pipeline.engines.transformers import TransformersEngine
    from pipeline.models import load_model, model_folder
    from pipeline.prompts import read_prompts
    from pipeline.records import Group, Judgement, Prompt, sample_seed
    from pipeline.rewards import VerifierPool
    from pipeline.shards import load_clips
    from pipeline.tokenization import completion_text, load_tokenizer, tokenizer_hash
    from trainer.loop import train

    source = model_folder("arith")
    tokenizer, model = load_tokenizer(source), load_model(source, "cpu", "float32")
    engine = TransformersEngine(model, tokenizer)
    training, held_out = (read_prompts(str(folder / f"{name}.jsonl")) for name in ("training", "held-out"))
    sampling = SamplingConfig(group_size=GROUP_SIZE, max_tokens=MAX_TOKENS, seed=seed)
    clips = load_clips(folder / "shards", tokenizer_hash(tokenizer)) if arm == "shards" else []
    config = TrainConfig(
        optim_steps=steps, prompts_per_step=PROMPTS_PER_STEP, group_size=GROUP_SIZE, lr=lr, seed=seed,
        echo_weight=echo_weight, checkpoint_every=0, tensorboard=False,
        echo_source="online" if arm == "online" else "shards",
    )  # fmt: skip
    accuracy: dict[int, float] = {}
    out = folder / "runs" / f"{arm}-{seed}"
    with VerifierPool(VerifyConfig()) as pool:

        def judge(groups: Sequence[Group]) -> list[list[Judgement]]:
            texts = [
                [completion_text(tokenizer, s.completion_ids.tolist()) for s in g.samples] for g in groups
            ]
            return pool.judge(groups, texts)

        def request(prompt: Prompt) -> GroupRequest:
            seeds = (sample_seed(1, prompt.prompt_id, sample) for sample in range(HELD_OUT_SAMPLES))
            return GroupRequest(prompt, tuple(seeds))

        def evaluate(optim_step: int) -> None:
            if optim_step % EVALUATED_EVERY == 0:
                groups = list(engine.generate([request(prompt) for prompt in held_out], sampling))
                rewards = [judgement.reward or 0.0 for judged in judge(groups) for judgement in judged]
                accuracy[optim_step] = statistics.mean(rewards)

        evaluate(0)
        train(
            model, tokenizer, engine, training, clips, config, sampling, judge,
            lambda *_: None, lambda _: None, out, f"{arm}-{seed}", 0,
            progress=lambda step: evaluate(step.optim_step + 1),
        )  # fmt: skip
    settings = {"steps": steps, "lr": lr, "echo_weight": echo_weight, "num_clips": len(clips)}
    (out / "result.json.partial").write_text(json.dumps({"accuracy": accuracy, **settings}))
    os.replace(out / "result.json.partial", out / "result.json")


def table(folder: Path, steps: int) -> None:
    """Mean ± standard deviation over the seeds, a column for each arm.

    Of `online` the EchoClip term's norm is measured every `grad_norms_every`-th step, 50th by default: its
    mean over 20 steps is one step's or none's.
    """
    columns: list[list[str]] = []
    for arm in ARMS:
        runs = sorted((folder / "runs").glob(f"{arm}-*/result.json"))
        if not runs:
            continue
        results = [json.loads(path.read_text()) for path in runs]
        metrics = [
            [json.loads(line) for line in path.with_name("metrics.jsonl").read_text().splitlines()]
            for path in runs
        ]
        cells = [spread([result["accuracy"][str(step)] for result in results]) for step in evaluated(steps)]
        for name in METRICS:
            for span in (slice(SPAN), slice(-SPAN, None)):
                cells.append(spread([mean_of(steps_of[span], name) for steps_of in metrics]))
        rollouts = statistics.mean(PROMPTS_PER_STEP * GROUP_SIZE * len(steps_of) for steps_of in metrics)
        columns.append([f"{arm} ({len(runs)} seeds)", *cells, f"{rollouts:,.0f}"])
    names = [f"accuracy at step {step}" for step in evaluated(steps)]
    names += [f"{name}, {span} {SPAN} steps" for name in METRICS.values() for span in ("first", "last")]
    header, *rows = zip(["", *names, "rollouts trained on"], *columns, strict=True)
    print_table(header, rows)


def evaluated(steps: int) -> range:
    return range(0, steps + 1, EVALUATED_EVERY)


def mean_of(steps: Sequence[dict], name: str) -> float | None:
    values = [step[name] for step in steps if step[name] is not None]
    return statistics.mean(values) if values else None


def spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.3f} ± {deviation:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=int, nargs="*", help="these seeds")
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--echo-weight", type=float, default=1e-3)
    options = parser.parse_args()
    folder = options.folder.resolve()
    prepared(folder)
    for seed in options.only or range(1, options.seeds + 1):
        for arm in options.arms:
            if not (folder / "runs" / f"{arm}-{seed}" / "result.json").is_file():
                run(folder, arm, seed, options.steps, options.lr, options.echo_weight)
                print(f"{arm}, seed {seed}: done", flush=True)
    print(machine())
    table(folder, options.steps)


if __name__ == "__main__":
    main()
