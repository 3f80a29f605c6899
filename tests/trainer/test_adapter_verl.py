"""verl's own loss of an actor update, run for real, with EchoClips as rows beside the rollouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from arith_shards import export_arith_shards
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding

from pipeline.errors import ConfigError, FormatError
from pipeline.models import load_model, model_folder
from pipeline.tokenization import load_tokenizer
from trainer.adapters.verl import BASES, EchoRows
from trainer.objectives import clip_losses, echo_clip_loss

PROMPT_WIDTH, RESPONSE_WIDTH, NUM_ROLLOUTS = 16, 48, 6
ECHO_WEIGHT = 0.3
SEQUENCE_MODES = ["seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
CASES = [("vanilla", mode) for mode in ("token-mean", *SEQUENCE_MODES)] + [("gspo", "seq-mean-token-mean")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arith")
    export_arith_shards(folder / "lake", folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_folder("arith"))


@pytest.fixture(scope="module")
def model():
    return load_model(model_folder("arith"), "cpu", "float32")


def rollouts():
    """As `RayPPOTrainer` has them when it updates the actor."""
    random = torch.Generator().manual_seed(0)
    lengths = [(5, 30), (16, 48), (3, 1), (7, 12), (9, 20), (4, 48)]
    attention = torch.zeros(NUM_ROLLOUTS, PROMPT_WIDTH + RESPONSE_WIDTH, dtype=torch.int64)
    for row, (prompt, response) in enumerate(lengths):
        attention[row, PROMPT_WIDTH - prompt : PROMPT_WIDTH + response] = 1
    ids = torch.randint(3, 16, attention.shape, generator=random) * attention
    mask = attention[:, PROMPT_WIDTH:]
    tensors = {
        "prompts": ids[:, :PROMPT_WIDTH],
        "responses": ids[:, PROMPT_WIDTH:],
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp_min(0),
        "response_mask": mask,
        "old_log_probs": -2 * torch.rand(mask.shape, generator=random) * mask,
        "advantages": torch.randn(NUM_ROLLOUTS, 1, generator=random) * mask,
    }
    return DataProto.from_dict(tensors, meta_info={"temperature": 1.0})


def gradients(model, batch, loss_mode, agg_mode, micro_batch_rows):
    """The loss and gradient of verl's `ppo_loss` over the micro-batches of one optimizer step."""
    model.zero_grad()
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=agg_mode,
        policy_loss={"loss_mode": loss_mode},
    )  # fmt: skip
    whole, total = batch.batch, 0.0
    for start in range(0, len(batch), micro_batch_rows):
        part = whole[start : start + micro_batch_rows]
        logits = model(
            part["input_ids"], attention_mask=part["attention_mask"], position_ids=part["position_ids"]
        ).logits
        logprobs = torch.log_softmax(logits, -1)[:, :-1].gather(2, part["input_ids"][:, 1:, None])[..., 0]
        data = left_right_2_no_padding(TensorDict(part.to_dict(), batch_size=len(part)))
        tensordict_utils.assign_non_tensor(
            data, dp_size=1, batch_num_tokens=int(whole["response_mask"].sum()), global_batch_size=len(batch)
        )
        used = part["attention_mask"].bool()
        padded = torch.nn.functional.pad(logprobs, (0, 1))  # verl's: what each position says of the next
        flat = torch.nested.as_nested_tensor(
            [row[kept] for row, kept in zip(padded, used, strict=True)], layout=torch.jagged
        )
        loss, _ = ppo_loss(config, {"log_probs": flat}, data)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("base", "agg_mode"), CASES)
def test_verls_loss_and_gradient_grow_by_lambda_times_the_echo_clip_loss(
    model, tokenizer, shards, base, agg_mode
):
    rows = EchoRows(shards, tokenizer, ECHO_WEIGHT, 5, agg_mode)
    plain_loss, plain = gradients(model, rollouts(), base, agg_mode, NUM_ROLLOUTS)
    joined = rows(rollouts())
    loss, found = gradients(model, joined, f"echo_{base}", agg_mode, micro_batch_rows=3)
    clips = EchoRows(shards, tokenizer, clips_per_step=5).clips.next_batch()
    assert len(joined) == NUM_ROLLOUTS + len(clips) > NUM_ROLLOUTS

    model.zero_grad()
    echo = written_out(model, clips)
    (ECHO_WEIGHT * echo).backward()
    assert loss == pytest.approx(plain_loss + ECHO_WEIGHT * echo.item(), rel=1e-6, abs=1e-7)
    for name, parameter in model.named_parameters():
        expected = plain[name] + parameter.grad
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def written_out(model, clips):
    """The EchoClip loss, a clip at a time, by the model's own logits."""
    logprobs, lengths = [], []
    for prompt, clip in clips.rows():
        ids = torch.as_tensor(np.concatenate((prompt, clip)).astype(np.int64))
        of_all = torch.log_softmax(model(ids[None]).logits[0], -1)[:-1].gather(1, ids[1:, None])[:, 0]
        logprobs.append(of_all[len(prompt) - 1 :])
        lengths.append(len(clip))
    losses = clip_losses(torch.cat(logprobs), torch.tensor(lengths))
    return echo_clip_loss(losses, clips.weights, num_clips=len(clips))


def test_rollouts_alone_lose_what_verls_own_loss_loses(model):
    for base in BASES:
        ours = gradients(model, rollouts(), f"echo_{base}", "seq-mean-token-mean", 2)
        theirs = gradients(model, rollouts(), base, "seq-mean-token-mean", 2)
        assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert get_policy_loss_fn("echo_vanilla") is not get_policy_loss_fn("vanilla")


def test_each_batch_gets_the_next_clips(tokenizer, shards):
    rows = EchoRows(shards, tokenizer, clips_per_step=4)
    first, second = (rows(rollouts()).batch["responses"][NUM_ROLLOUTS:] for _ in range(2))
    assert len(first) > 0
    assert first.shape != second.shape or not torch.equal(first, second)


def test_what_verl_would_learn_otherwise_is_refused(tokenizer, shards):
    warm = rollouts()
    warm.meta_info["temperature"] = 0.7
    with pytest.raises(
        ConfigError, match=r"temperature 0\.7 .* Set `actor_rollout_ref\.rollout\.temperature=1\.0`"
    ):
        EchoRows(shards, tokenizer)(warm)
    with pytest.raises(ConfigError, match="`echo_weight` is -1"):
        EchoRows(shards, tokenizer, -1.0)
    narrow = rollouts()
    for name in ("responses", "response_mask", "old_log_probs", "advantages"):
        narrow.batch[name] = narrow.batch[name][:, :1]
    with pytest.raises(FormatError, match=r"does not fit verl's 16 \+ 1\. Raise `data\.max_prompt_length`"):
        EchoRows(shards, tokenizer)(narrow)
