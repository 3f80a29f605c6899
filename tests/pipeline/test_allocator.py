"""What becomes of memory that forward passes free."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Four tensors of 4 MiB live and die together, as those of a layer do. Huge pages, which some machines hand
# out unasked, would hide what a page costs.
LAYERS = """
import ctypes, resource, sys, torch
from pipeline.allocator import keep_freed_memory

PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
if sys.argv[1] == "kept":
    keep_freed_memory()

def layers(count):
    for _ in range(count):
        alive = [torch.ones(2**20) for _ in range(4)]

layers(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
layers(100)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted as Linux counts them")
def test_memory_that_a_layer_freed_costs_the_next_no_page() -> None:
    pages = {}
    for mode in ("kept", "returned"):
        done = subprocess.run([sys.executable, "-c", LAYERS, mode], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        pages[mode] = int(done.stdout)
    assert pages["kept"] < pages["returned"] / 4
