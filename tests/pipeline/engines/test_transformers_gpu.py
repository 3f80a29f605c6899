"""The engine and the loss on an NVIDIA GPU: `make test-gpu`."""

import numpy as np
import pytest

from pipeline.config import SamplingConfig
from pipeline.engines.base import GroupRequest
from pipeline.engines.transformers import TransformersEngine
from pipeline.logprobs import completion_logprobs
from pipeline.models import load_model, model_folder
from pipeline.records import Prompt
from pipeline.tokenization import load_tokenizer

pytestmark = pytest.mark.gpu


def test_entropies_and_log_probs_of_the_gpu_are_those_of_the_cpu():
    folder = model_folder("arith")
    tokenizer = load_tokenizer(folder)
    gpu = load_model(folder, "cuda", "float32")
    request = GroupRequest(Prompt(({"role": "user", "content": "13+18-7"},)), tuple(range(8)))
    [group] = TransformersEngine(gpu, tokenizer).generate([request], SamplingConfig(max_tokens=64))
    rows = [(group.prompt_ids, sample.completion_ids) for sample in group.samples]
    reference = completion_logprobs(load_model(folder, "cpu", "float32"), rows)
    entropies = np.concatenate([sample.entropies for sample in group.samples])
    logprobs = np.concatenate([sample.logprobs for sample in group.samples])
    assert np.abs(entropies - reference.entropies.numpy()).max() <= 1e-3
    assert np.abs(logprobs - reference.logprobs.detach().numpy()).max() <= 1e-3


def test_the_clip_loss_has_a_gradient_on_the_gpu():
    folder = model_folder("arith")
    model = load_model(folder, "cuda", "float32")
    ids = np.array(load_tokenizer(folder).encode("13+18\n=31\n#31"), dtype=np.int32)
    stats = completion_logprobs(model, [(ids[:6], ids[6:])])
    (-stats.logprobs.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
