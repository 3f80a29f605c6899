"""`echomine export prime-rl`: training samples whose CE component is the EchoClip loss.

The columns are fields of prime-rl's `TrainingSample` (`transports/rollouts/types.py`, summer of 2026), so
that `TrainingSample(**row)` makes one. Its trainer adds three components, each a weighted sum over tokens
divided by the number N of tokens, over the whole step and all ranks, whose weight of it is not 0
(`trainer/rl/train.py`). For clips c of |c| tokens with one weight w_c each, CE is therefore

    CE = (1/N) Σ_c w_c Σ_t −log π(c_t),   N = Σ_c |c|

The EchoClip term over K clips is  λ · (1/K) Σ_c (1/|c|) Σ_t −log π(c_t).  The two are equal for

    w_c = λ · N / (K · |c|)

that is 1/|c| scaled by λ times the mean clip length. N and K are those of the file a clip is in: a step that
takes one whole file has the EchoClip term exactly (`clips_per_shard` = clips of one step). A step that takes
some of a file's clips, of mean length m, has it times (N/K)/m. Other CE tokens in the step would enter N: let
the clips be the only ones.

The weight of the RL component is 0 on every token, so no advantage is needed. The temperature is 1 on every
token, as the EchoClip loss is of the distribution at temperature 1; log-probs, which only RL reads, are 0.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.exports.core import Form
from pipeline.exports.text import id_lists
from pipeline.records import Float32, Int32

ENV_NAME = "echomine"

_FLOATS = pa.list_(pa.float32())
PRIME_RL = pa.schema(
    [
        ("token_ids", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.bool_())),
        ("logprobs", _FLOATS),
        ("temperatures", _FLOATS),
        ("env_name", pa.string()),
        ("rl_weights", _FLOATS),
        ("ce_weights", _FLOATS),
    ]
)


def ce_weights(clip_tokens: Int32, echo_weight: float) -> Float32:
    """The CE weight of each token of each clip, for clips that share an optimizer step.

    Args:
        clip_tokens: [K] tokens, at least 1 each.
        echo_weight: λ.

    Returns:
        [K] float32: λ · (Σ clip_tokens / K) / clip_tokens.
    """
    lengths = clip_tokens.astype(np.float64)
    weights: Float32 = (echo_weight * lengths.mean() / lengths).astype(np.float32)
    return weights


def prime_rl(echo_weight: float) -> Form:
    """One row of `PRIME_RL` a clip.

    Args:
        echo_weight: λ, the weight of the EchoClip term.
    """

    def rows(clips: pa.Table) -> pa.Table:
        parts = list(zip(id_lists(clips, "prompt_ids"), id_lists(clips, "clip_ids"), strict=True))
        if not parts:
            return PRIME_RL.empty_table()
        weights = ce_weights(np.array([len(clip) for _, clip in parts], np.int32), echo_weight)
        in_clip = [np.repeat([False, True], [len(prompt), len(clip)]) for prompt, clip in parts]
        zeros = [np.zeros(len(mask), np.float32) for mask in in_clip]
        return pa.table(
            [
                pa.array([np.concatenate(part) for part in parts], pa.list_(pa.int32())),
                pa.array(in_clip, pa.list_(pa.bool_())),
                pa.array(zeros, _FLOATS),
                pa.array([np.ones(len(mask), np.float32) for mask in in_clip], _FLOATS),
                pa.array([ENV_NAME] * len(parts), pa.string()),
                pa.array(zeros, _FLOATS),
                pa.array([mask * weight for mask, weight in zip(in_clip, weights, strict=True)], _FLOATS),
            ],
            schema=PRIME_RL,
        )

    return Form("prime-rl", ".parquet", rows, settings={"echo_weight": echo_weight})
