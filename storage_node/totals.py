"""What a store counts, kept in the same batch as what it counts.

`rocks_store` writes one `Totals` with every change of its index, so the counts after a crash are
those of the index after the crash, and opening a store does not read its index.

    offset  size  field
    0       1     version
    1       7     reserved, zero
    8       8     last sequence used
    16      8     fragments the index refers to
    24      8     sum of their records' lengths, bytes
    32      8     records without an index entry that still take space
    40      8     sum of their lengths, bytes

All integers are little-endian.  History: version 1, first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from protocol.errors import DirectoryCorrupt, FormatUnsupported

TOTALS_KEY = b"totals"
_TOTALS = struct.Struct("<B7xQQQQQ")
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of one store at one moment."""

    last_sequence: int = 0
    fragments: int = 0
    fragment_bytes: int = 0
    dead_records: int = 0
    dead_bytes: int = 0

    def stored(self, records: int, length: int) -> Totals:
        """With `records` more, of `length` bytes together."""
        return replace(
            self,
            fragments=self.fragments + records,
            fragment_bytes=self.fragment_bytes + length,
        )

    def died(self, records: int, length: int) -> Totals:
        """With indexed records turned into ones that only take space."""
        return replace(
            self,
            fragments=self.fragments - records,
            fragment_bytes=self.fragment_bytes - length,
            dead_records=self.dead_records + records,
            dead_bytes=self.dead_bytes + length,
        )

    def reclaimed(self, records: int, length: int) -> Totals:
        """With the space of `records` dead ones given back."""
        return replace(
            self,
            dead_records=self.dead_records - records,
            dead_bytes=self.dead_bytes - length,
        )

    def up_to(self, sequence: int) -> Totals:
        """With `sequence` as the last one used."""
        assert sequence >= self.last_sequence
        return replace(self, last_sequence=sequence)

    def pack(self) -> bytes:
        """48 bytes."""
        return _TOTALS.pack(
            _VERSION,
            self.last_sequence,
            self.fragments,
            self.fragment_bytes,
            self.dead_records,
            self.dead_bytes,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Totals:
        """Inverse of `pack`.

        Raises `FormatUnsupported` for another version, `DirectoryCorrupt` for other bytes.
        """
        if len(data) != _TOTALS.size:
            raise DirectoryCorrupt(f"the totals of a store have {len(data)} bytes")
        version, *counts = _TOTALS.unpack(data)
        if version != _VERSION:
            raise FormatUnsupported(f"store totals of version {version}; this reads {_VERSION}")
        return cls(*counts)
