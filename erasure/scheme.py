"""Redundancy schemes: how many fragments a stored block becomes, and how long each one is.

Step "pick a scheme" of the life of a put, and the first thing every reader of a fragment looks
at.  Called by everybody who plans, places, encodes or reads; imports `protocol` only, so that a
storage node can use it without loading a codec.

| name        | fragments | any of them that suffice | payload of one slot           |
|-------------|-----------|--------------------------|-------------------------------|
| `rs-k-m`    | k + m     | k                        | 1/k of the stored block, rounded up |
| `replica-n` | n         | 1                        | the stored block itself       |
"""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass
from typing import Final

from protocol.errors import SchemeUnsupported
from protocol.limits import FRAGMENTS_PER_STRIPE_MAX

RS_DATA_MIN: Final = 2
RS_DATA_MAX: Final = 16
"""A wider stripe makes every read and every repair wait for more disks."""

RS_PARITY_MIN: Final = 1
RS_PARITY_MAX: Final = 6

REPLICAS_MAX: Final = RS_PARITY_MAX + 1
"""So that every RS scheme has a replica scheme of equal tolerance for its small blocks."""

SCHEME_BYTES: Final = 3
"""A scheme inside a fragment header: kind, k, m."""

assert RS_DATA_MAX + RS_PARITY_MAX == FRAGMENTS_PER_STRIPE_MAX

_RS = re.compile(r"rs-([1-9][0-9]?)-([1-9])")
_REPLICA = re.compile(r"replica-([1-9])")


class SchemeKind(enum.IntEnum):
    """First byte of a packed scheme.  Append-only: another code gets another number."""

    RS = 1
    """Reed-Solomon over GF(2^8), Cauchy generator matrix of ISA-L."""
    REPLICA = 2
    """The same bytes in every slot."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one volume protects its blocks: any `k` of its `n` slots give every block back.

    Raises `SchemeUnsupported` for a combination outside the supported range.
    """

    kind: SchemeKind
    k: int
    """Fragments that suffice to read; 1 for replicas."""
    m: int
    """Fragments that may be lost."""

    def __post_init__(self) -> None:
        if self.kind is SchemeKind.RS:
            known = (
                RS_DATA_MIN <= self.k <= RS_DATA_MAX and RS_PARITY_MIN <= self.m <= RS_PARITY_MAX
            )
        else:
            known = self.k == 1 and 0 <= self.m < REPLICAS_MAX
        if not known:
            raise SchemeUnsupported(
                f"{self.name} is not supported: use rs-k-m with k from {RS_DATA_MIN} to "
                f"{RS_DATA_MAX} and m from {RS_PARITY_MIN} to {RS_PARITY_MAX}, or replica-n with "
                f"n from 1 to {REPLICAS_MAX}",
                {"scheme": self.name},
            )

    @classmethod
    def rs(cls, k: int, m: int) -> Scheme:
        """`k` data slots and `m` parity slots."""
        return cls(SchemeKind.RS, k, m)

    @classmethod
    def replica(cls, n: int) -> Scheme:
        """`n` copies."""
        return cls(SchemeKind.REPLICA, 1, n - 1)

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a name such as `rs-6-3` or `replica-4`.  Raises `SchemeUnsupported`."""
        if match := _RS.fullmatch(text):
            return cls.rs(int(match.group(1)), int(match.group(2)))
        if match := _REPLICA.fullmatch(text):
            return cls.replica(int(match.group(1)))
        shown = text[:40]
        raise SchemeUnsupported(
            f"{shown!r} is not a redundancy scheme: write rs-k-m or replica-n, as in rs-6-3",
            {"scheme": shown},
        )

    @property
    def n(self) -> int:
        """Slots of a stripe."""
        return self.k + self.m

    @property
    def name(self) -> str:
        """What `parse` reads back."""
        if self.kind is SchemeKind.REPLICA:
            return f"replica-{self.n}"
        return f"rs-{self.k}-{self.m}"

    def __str__(self) -> str:
        return self.name

    @property
    def write_minimum(self) -> int:
        """Durable fragments below which a put is not acknowledged: one more than a read needs, so
        that no acknowledged block is one fault away from loss; all of them where n has no more."""
        return min(self.k + 1, self.n)

    def small_twin(self) -> Scheme:
        """The replica scheme that survives as many losses, for blocks too small to be split."""
        return Scheme.replica(self.m + 1)

    def chunk_bytes(self, stored_length: int) -> int:
        """Length of every slot's payload for a stored block of `stored_length` bytes."""
        return -(-stored_length // self.k)

    def pack(self) -> bytes:
        """`SCHEME_BYTES` bytes: kind, k, m."""
        return bytes((self.kind, self.k, self.m))

    @staticmethod
    def unpack(data: bytes) -> Scheme:
        """Inverse of `pack`.  Raises `SchemeUnsupported` for a kind or range unknown here."""
        return _unpack(data)


@functools.lru_cache(maxsize=512)
def _unpack(data: bytes) -> Scheme:
    """Cached: one cell uses two or three schemes, and every fragment read asks for one."""
    assert len(data) == SCHEME_BYTES
    kind, k, m = data
    try:
        return Scheme(SchemeKind(kind), k, m)
    except ValueError as error:
        raise SchemeUnsupported(f"redundancy scheme of unknown kind {kind}") from error
