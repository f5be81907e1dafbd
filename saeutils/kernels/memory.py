"""Large tensors come back from the C library's heap instead of fresh pages of the system."""

import ctypes
import platform
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


@cache
def reuse() -> None:
    """From now on this process keeps freed memory, 2 GiB at its end included, for its next tensors.

    By default every tensor above 32 MB is mapped afresh and page by page filled with zeros by the system, at each step of
    a training run again. In a sandbox a page can cost microseconds: half of a step of a large SAE. Does nothing where
    another C library or allocator serves the process.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_ARENA_MAX, 1)  # threads share the heap: their own would give freed memory back
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
