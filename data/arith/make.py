"""Makes the embedded default model: `python data/arith/make.py`, about 35 minutes on two cores.

Writes beside itself `prompts.jsonl` (128 problems) and `model/` (tokenizer, config and weights): a
Llama of 1.6 M parameters that reads one character a token and was trained by supervised learning on
random solutions of random problems, none of them among the prompts. Seeds are fixed; the weights are
the same on the same machine and thread count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import string
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from problems import NARROW, WIDE, Range, problems, solution, write_prompts, written
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
PROMPT_SEED, INITIAL_SEED = 20260531, 1
NUM_PROMPTS = 128
MAX_TOKENS = 256
IGNORED = -100  # the label that cross entropy skips
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of printable ASCII, so that any English prompt can be read."""
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    characters = ["\n", *string.printable[:95]]
    vocabulary = {token: i for i, token in enumerate([*specials, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(INITIAL_SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass(frozen=True)
class Stage:
    """One stretch of training with a learning-rate schedule of its own.

    Attributes:
        tokens_per_batch: padding included; an optimizer step takes `batches_per_step` of them.
        drill_share: of the problems, sums of two numbers alone.
    """

    numbers: Range
    drill_share: float
    steps: int
    tokens_per_batch: int
    batches_per_step: int
    peak_lr: float
    seed: int


# First the form of solutions on large numbers, then exactness on small ones. Rows of similar length share a
# batch, so several batches a step keep each step's gradient from being about one length.
STAGES = (
    Stage(WIDE, 0.0, 2600, 6000, 1, 2e-3, 1),
    Stage(NARROW, 0.5, 1000, 1500, 4, 1.5e-3, 2),
    Stage(NARROW, 0.5, 500, 1500, 4, 1e-3, 3),
)


def batches(tokenizer: PreTrainedTokenizerFast, skip: frozenset[str], stage: Stage):
    """Endless ([B, T] ids, [B, T] labels); rows of similar length share a batch."""
    vocabulary = tokenizer.get_vocab()
    rng = random.Random(stage.seed)
    stream = problems(stage.seed, skip, stage.numbers, stage.drill_share)
    while True:
        rows = []
        for terms in itertools.islice(stream, 4096):
            prompt = [tokenizer.bos_token_id, *(vocabulary[c] for c in written(terms) + "\n")]
            text = solution(terms, rng, stage.numbers)
            answer = [*(vocabulary[c] for c in text), tokenizer.eos_token_id]
            if len(prompt) + len(answer) <= MAX_TOKENS:
                rows.append((prompt, answer))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        chunks, chunk = [], []
        for row in rows:
            if chunk and (len(chunk) + 1) * (len(row[0]) + len(row[1])) > stage.tokens_per_batch:
                chunks.append(chunk)
                chunk = []
            chunk.append(row)
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(prompt) + len(answer) for prompt, answer in chunk)
            ids = torch.full((len(chunk), width), tokenizer.pad_token_id)
            labels = torch.full((len(chunk), width), IGNORED)
            for i, (prompt, answer) in enumerate(chunk):
                ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
                labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
            yield ids, labels


def train(model: LlamaForCausalLM, stream, stage: Stage) -> None:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.peak_lr, betas=(0.9, 0.98))
    warmup, started = max(1, min(60, stage.steps // 5)), time.monotonic()
    for step in range(stage.steps):
        done = max(0.0, (step - warmup) / max(1, stage.steps - warmup))
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = stage.peak_lr * min(1.0, (step + 1) / warmup) * decay
        total = 0.0
        for ids, labels in itertools.islice(stream, stage.batches_per_step):
            # Padding is on the right, so causality masks it.
            loss = model(input_ids=ids, labels=labels).loss / stage.batches_per_step
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == stage.steps - 1:
            minutes = (time.monotonic() - started) / 60
            print(f"optim_step {step:5d}  loss {total:.4f}  {minutes:.1f} min", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    prompts = options.out / "prompts.jsonl"
    write_prompts(prompts, PROMPT_SEED, NUM_PROMPTS, wide_share=0.06, drill_share=0.4)
    skip = frozenset(json.loads(line)["prompt"] for line in prompts.read_text().splitlines())

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    for stage in STAGES:
        train(model, batches(tokenizer, skip, stage), stage)
    tokenizer.save_pretrained(options.out / "model")
    model.save_pretrained(options.out / "model")


if __name__ == "__main__":
    main()
