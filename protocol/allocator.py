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


def release_free_memory() -> None:
    """Return what start-up left behind to the system: called once, when a process goes idle."""
    gc.collect()
    gc.freeze()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return
