"""What a model says of given tokens, one sequence at a time, by a full log-softmax in float64: no tricks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.inference_mode()
def next_token_logprobs(
    model: PreTrainedModel, prompt_ids: np.ndarray, completion_ids: np.ndarray, temperature: float = 1.0
) -> Tensor:
    """[T, V] float64 log-probs of the next token at each of the completion's T positions.

    The reference is float64 throughout where the model is: give `load_model(…).double()`.
    """
    ids = torch.from_numpy(np.concatenate([prompt_ids, completion_ids]).astype(np.int64))
    logits = model(input_ids=ids[None], logits_to_keep=len(completion_ids) + 1).logits[0, :-1]
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def sampled_tokens_logprobs(log_p: Tensor, completion_ids: np.ndarray) -> np.ndarray:
    """[T] nats, of the tokens that were sampled, from the log-probs [T, V] of all."""
    return log_p.gather(1, torch.from_numpy(completion_ids.astype(np.int64))[:, None])[:, 0].numpy()


def entropies(log_p: Tensor) -> np.ndarray:
    """[T] nats, from log-probs [T, V]."""
    return -(log_p.exp() * log_p).sum(dim=-1).numpy()
