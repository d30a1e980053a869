"""Keep large buffers out of mmap, once per process, before the first of them is allocated.

glibc gives every allocation above 128 KiB its own mapping and returns it at free, so a 700 KB
fragment costs some 170 page faults each time.  Measured on a two-core virtual machine: encoding
4 MiB with rs-6-3 takes 7.8 ms that way and 0.5 ms when the memory is reused
(`docs/design/003-allocator.md`).
"""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MMAP_THRESHOLD_BYTES = 32 * 1024 * 1024  # glibc's own maximum on 64-bit machines


def reuse_large_buffers(keep_bytes: int) -> bool:
    """Let malloc keep up to `keep_bytes` of freed memory.  False if the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES) and mallopt(_M_TRIM_THRESHOLD, keep_bytes)
    )


def share_one_arena() -> bool:
    """Let all threads allocate from one heap.  Call it before the first thread starts.

    By default each thread gets a heap of its own, which keeps its own free memory: a buffer that
    the loop's thread freed is no use to the thread that encodes.  False if not glibc.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1))
    except AttributeError:
        return False


def trim_free_memory() -> None:
    """Return free memory to the system: after a burst of large buffers, when nothing runs."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return


def release_free_memory() -> None:
    """Return what start-up left behind to the system: called once, when a process goes idle."""
    gc.collect()
    gc.freeze()
    trim_free_memory()
