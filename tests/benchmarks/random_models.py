"""Causal language models of random weights: as large as real ones, without a download."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

SIZES = {  # Qwen2.5's of these names
    "0.5B": {
        "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2,
    },
    "1.5B": {
        "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip


def random_model(size: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES[size], tie_word_embeddings=True, max_position_embeddings=32_768)
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    return model.to(dtype)


def model_flops(model: PreTrainedModel, lengths: list[int], num_predicted: int) -> float:
    """Floating-point operations of forward and backward over these rows, by need: no padding, nothing twice.

    6 for each weight and token that meet, and of causal attention 6 · length² · width in each layer (half of
    what PaLM, arXiv 2204.02311, counts for a square of positions).

    Args:
        num_predicted: tokens that the output embedding is asked for.
    """
    config = model.config
    head, table = (of.weight for of in (model.get_output_embeddings(), model.get_input_embeddings()))
    body = sum(weight.numel() for weight in model.parameters() if weight is not head and weight is not table)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_width
    attention = 6 * config.num_hidden_layers * width * sum(length**2 for length in lengths)
    return 6 * body * sum(lengths) + 6 * head.numel() * num_predicted + attention
