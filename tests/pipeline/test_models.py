"""Loading models: what is wrong with one that cannot be loaded, and what to do about it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import ModelError
from pipeline.models import load_model, model_folder

SHORT_OF_MEMORY = """
import json, os, resource, sys
from pathlib import Path
from pipeline.errors import ModelError
from pipeline.models import load_model, model_folder

load_model(model_folder("arith"), "cpu")  # so that every library is there before memory is short
messages = []
for spare_mib, dtype in ((50, "float32"), (140, "float32"), (50, "bfloat16")):
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + spare_mib * 2**20, resource.RLIM_INFINITY))
    try:
        load_model(Path(sys.argv[1]), "cpu", dtype)
    except ModelError as error:
        messages.append(str(error))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(messages))
"""


def test_a_model_that_memory_cannot_hold_names_the_setting_to_lower(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 2**17, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).save_pretrained(tmp_path)  # 100 MB
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, tmp_path], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    unmapped, halfway, halved = json.loads(done.stdout)
    no_room = f"The memory of cpu has no room for the model in {tmp_path} as"
    cure = "Set engine.dtype to bfloat16, which takes half of it; or free memory, or give a smaller model."
    assert unmapped == halfway == f"{no_room} float32. {cure}"
    assert halved == f"{no_room} bfloat16. Free memory, or give a smaller model."


def test_a_damaged_model_is_to_be_copied_anew(tmp_path: Path) -> None:
    shutil.copytree(model_folder("arith"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot be loaded: .*\. Copy it there anew\."):
        load_model(tmp_path / "model", "cpu")
