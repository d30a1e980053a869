"""Buffers that are about to be filled by the network: not zeroed first.

`bytearray(n)` writes n zeros that a received body overwrites at once; for the megabytes of a block
that is a pass over memory for nothing.  CPython's own constructor takes a null source for this.
Whoever asks for such a buffer must fill all of it before anything reads it.
"""

from __future__ import annotations

import ctypes

_new_bytearray = ctypes.pythonapi.PyByteArray_FromStringAndSize
_new_bytearray.restype = ctypes.py_object
_new_bytearray.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)

ZEROED_BELOW_BYTES = 16 * 1024
"""Small buffers are made the ordinary way: the call costs more than the zeros."""


def buffer_to_fill(size: int) -> bytearray:
    """A bytearray of `size` bytes with arbitrary content."""
    if size < ZEROED_BELOW_BYTES:
        return bytearray(size)
    buffer: bytearray = _new_bytearray(None, size)
    return buffer
