"""What entropies cost in vLLM: tokens/s of the same work with and without them, all sides in one run.

    python tests/benchmarks/bench_entropy_tap.py [MODEL] [--requests N] [--tokens N] [--repeats N]

MODEL is arith, smollm2, a folder, or random-150k: a shallow model of random weights with a vocabulary of
150,000, for `random-150k --requests 512 --max-num-seqs 256 --full-row-requests 1` on a GPU (a full row of
it is 0.6 MB a token). Every request runs to the same number
of tokens, so that all sides do the same work. The sides take turns in two engines that run side by side, one
without and one with the tap; the figures are medians.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measure import medians, print_table
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import EngineConfig, VllmConfig
from pipeline.engines import vllm_start
from pipeline.engines.sampling import DrawRule
from pipeline.engines.tap import TapRequest
from pipeline.models import model_folder
from pipeline.prompts import prompt_messages_ids, read_prompts
from pipeline.tokenization import load_tokenizer

TAPPED = ("tap draws: log-probs, entropies", "logprobs=0, tap measures")


def random_model(folder: Path, vocabulary: int = 150_000) -> Path:
    """Random weights, two layers deep, and arith's tokenizer, whose ids are the first of the vocabulary."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    load_tokenizer(model_folder("arith")).save_pretrained(folder)
    return folder


def engines(folder: Path, max_num_seqs: int) -> tuple[Any, Any]:
    """Plain vLLM, and vLLM with the tap."""
    # two engines share one GPU
    options = VllmConfig(max_num_seqs=max_num_seqs, kv_cache_gib=1.0, gpu_memory_utilization=0.4)
    config = EngineConfig(kind="vllm", vllm=options)
    tapped = vllm_start.start_vllm(folder, config)
    arguments = vllm_start._arguments

    def without_tap(folder: Path, config: EngineConfig) -> dict[str, Any]:
        dropped = ("logits_processors", "worker_extension_cls")
        kept = {name: value for name, value in arguments(folder, config).items() if name not in dropped}
        return kept | {"max_logprobs": -1}

    vllm_start._arguments = without_tap
    plain = vllm_start.start_vllm(folder, config)
    vllm_start._arguments = arguments
    return plain, tapped


def generate(engine: Any, prompts: list[list[int]], tokens: int, **options: Any) -> None:
    """One pass over the prompts. With the option `tap`: drawing (True) or measuring only (False)."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    tap = options.pop("tap", None)
    for i, ids in enumerate(prompts):
        extra = None if tap is None else TapRequest(str(i), i, tokens, DrawRule(), tap).as_arguments()
        params = SamplingParams(
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra,
            **options,
        )
        engine.add_request(str(i), {"type": "token", "prompt_token_ids": ids}, params)
    num_tokens = num_measured = 0
    while engine.has_unfinished_requests():
        finished = [output for output in engine.step() if output.finished]
        num_tokens += sum(len(output.outputs[0].token_ids) for output in finished)
        if finished and tap is not None:
            keys = [output.request_id for output in finished]
            num_measured += len(engine.collective_rpc("take_entropies", args=(keys,))[0])
    assert num_tokens == len(prompts) * tokens
    assert tap is None or num_measured == len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="arith")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full-row-requests", type=int, default=16, help="fewer: it is that slow")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        random = options.model == "random-150k"
        compare(random_model(Path(temporary)) if random else model_folder(options.model), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """All sides in one run, and the table of their speeds."""
    tokenizer = load_tokenizer(folder)
    source = read_prompts("arith", 128)
    ids = [prompt_messages_ids(tokenizer, prompt.messages).tolist() for prompt in source]
    prompts = [ids[i % len(ids)] for i in range(options.requests)]
    plain, tapped = engines(folder, options.max_num_seqs)
    few, tokens = prompts[: options.full_row_requests], options.tokens
    flat = {"flat_logprobs": True}
    sides = {
        "plain vLLM, no log-probs": lambda: generate(plain, prompts, tokens),
        "logprobs=0, flat": lambda: generate(plain, prompts, tokens, logprobs=0, **flat),
        "logprobs=20": lambda: generate(plain, prompts, tokens, logprobs=20),
        "logprobs=20, flat": lambda: generate(plain, prompts, tokens, logprobs=20, **flat),
        "full row (logprobs=-1)": lambda: generate(plain, few, tokens, logprobs=-1),
        "full row, flat": lambda: generate(plain, few, tokens, logprobs=-1, **flat),
        TAPPED[0]: lambda: generate(tapped, prompts, tokens, temperature=0.0, tap=True),
        TAPPED[1]: lambda: generate(tapped, prompts, tokens, logprobs=0, tap=False, **flat),
    }
    seconds = medians(sides, options.repeats)
    done = {name: tokens * len(few if name.startswith("full row") else prompts) for name in sides}
    rates = {name: done[name] / seconds[name] for name in sides}
    print(f"{options.model}: {options.requests} requests of {tokens} tokens, {options.max_num_seqs} at once")
    base = rates["plain vLLM, no log-probs"]
    rows = [(name, f"{rate:,.0f}", f"{rate / base:.2f}") for name, rate in rates.items()]
    print_table(("side", "tokens/s", "of plain"), rows)
    print(f"\ntap alone against logprobs=0: {rates[TAPPED[1]] / rates['logprobs=0, flat']:.2f}")
    for engine in (plain, tapped):
        vllm_start.stop_vllm(engine)


if __name__ == "__main__":
    main()
