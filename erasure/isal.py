"""Slots of a stripe from k others, by ISA-L itself: one pass over memory, nothing copied.

Called by `erasure.codec` for step "reconstruct" of a repair and step "decode" of a get.  PyECLib
reconstructs one slot a call and wants every source joined to a header of its own; of the second a
rebuilt gigabyte cost that way, two thirds were copies (`docs/design/015-repair.md`).  ISA-L takes
addresses and lets go of the GIL.  The library is the one that PyECLib brings and uses, so that both
know the same matrix; a build of PyECLib that hides it goes through PyECLib.  Pure; checks no
lengths.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from erasure.scheme import Scheme
from protocol.buffers import buffer_to_fill
from protocol.hashing import Buffer

_TABLE_BYTES: Final = 32
"""What ISA-L expands one coefficient to."""

_TABLES_KEPT: Final = 256
"""Per process: a repair uses one for each set of sources it meets."""


class _Tables(NamedTuple):
    """The coefficients that make some slots from some others, as ISA-L wants them."""

    rows: int
    expanded: ctypes.Array[ctypes.c_ubyte]


@functools.cache
def library() -> ctypes.CDLL | None:
    """ISA-L as PyECLib found it: inside its wheel, or the system's.  None if there is none."""
    spec = importlib.util.find_spec("pyeclib")
    inside: list[Path] = []
    if spec is not None and spec.origin is not None:
        packages = Path(spec.origin).parent.parent
        inside = sorted(packages.glob("pyeclib.libs/libisal*"))
    for name in (*map(str, inside), "libisal.so.2"):
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        found.ec_encode_data.restype = None
        return found
    return None


def reconstruct(
    isal: ctypes.CDLL, scheme: Scheme, payloads: Mapping[int, Buffer], wanted: Sequence[int]
) -> dict[int, Buffer]:
    """The payloads of the `wanted` slots from those of exactly k others, all of one length."""
    sources = tuple(sorted(payloads))
    tables = _tables(isal, scheme, sources, tuple(wanted))
    size = len(payloads[sources[0]])
    made = {slot: buffer_to_fill(size) for slot in wanted}
    # Arrays hold the buffers, and so their addresses, for the length of the call.
    read = [np.frombuffer(payloads[slot], np.uint8) for slot in sources]
    written = [np.frombuffer(buffer, np.uint8) for buffer in made.values()]
    isal.ec_encode_data(
        size, scheme.k, tables.rows, tables.expanded, _addresses(read), _addresses(written)
    )
    return dict(made)


def _addresses(
    arrays: Sequence[np.ndarray[tuple[int], np.dtype[np.uint8]]],
) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays])


@functools.lru_cache(maxsize=_TABLES_KEPT)
def _tables(
    isal: ctypes.CDLL, scheme: Scheme, sources: tuple[int, ...], wanted: tuple[int, ...]
) -> _Tables:
    """A wanted slot's row of the matrix, times the inverse of the sources' rows."""
    k, n = scheme.k, scheme.n
    matrix = (ctypes.c_ubyte * (n * k))()
    isal.gf_gen_cauchy1_matrix(matrix, n, k)
    chosen = (ctypes.c_ubyte * (k * k))(
        *[matrix[slot * k + column] for slot in sources for column in range(k)]
    )
    inverse = (ctypes.c_ubyte * (k * k))()
    singular = isal.gf_invert_matrix(chosen, inverse, k)
    assert singular == 0, f"a Cauchy matrix has no singular rows: {sources} of {scheme}"
    coefficients = (ctypes.c_ubyte * (len(wanted) * k))()
    for row, slot in enumerate(wanted):
        for column in range(k):
            total = 0
            for inner in range(k):
                total ^= isal.gf_mul(matrix[slot * k + inner], inverse[inner * k + column])
            coefficients[row * k + column] = total & 0xFF
    expanded = (ctypes.c_ubyte * (_TABLE_BYTES * k * len(wanted)))()
    isal.ec_init_tables(k, len(wanted), coefficients, expanded)
    return _Tables(len(wanted), expanded)
