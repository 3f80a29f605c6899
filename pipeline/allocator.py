"""What the C library does with memory that tensors free on a CPU."""

from __future__ import annotations

import ctypes
import platform

# glibc's names for its settings (mallopt(3)), and the greatest size for which it may be told to use its heap.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_IN_HEAP = 32 * 2**20
KEPT_BYTES = 512 * 2**20  # freed memory that a process keeps at most


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, instead of giving it back to the kernel at once.

    A forward pass frees and asks for the same megabytes at every layer; glibc returns them each time, and
    the kernel hands them out page by page, zeroed. It does nothing where the C library is another.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
