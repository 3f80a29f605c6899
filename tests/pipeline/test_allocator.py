"""What becomes of memory that forward passes free."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Four tensors of 4 MiB live and die together, as those of a layer do. Huge pages, which some machines hand
# out unasked, would hide what a page costs. glibc moves its own threshold by what was freed before and where
# it lay, so by luck it keeps the memory as well: both start from a threshold that is set.
LAYERS = """
import ctypes, resource, sys, torch
from pipeline.allocator import keep_freed_memory

PR_SET_THP_DISABLE, M_MMAP_THRESHOLD = 41, -3
libc = ctypes.CDLL(None)
assert libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
assert libc.mallopt(M_MMAP_THRESHOLD, 2**20) == 1
if sys.argv[1] == "kept":
    keep_freed_memory()

def layers(count):
    for _ in range(count):
        alive = [torch.ones(2**20) for _ in range(4)]

layers(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
layers(100)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() / (100 * 4 * 2**22))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted as Linux counts them")
def test_memory_that_a_layer_freed_costs_the_next_no_page() -> None:
    shares = {}  # of the bytes that the layers asked for, those that came from the kernel
    for mode in ("kept", "returned"):
        done = subprocess.run([sys.executable, "-c", LAYERS, mode], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shares[mode] = float(done.stdout)
    assert shares["returned"] > 0.9
    assert shares["kept"] < 0.1
