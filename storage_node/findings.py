"""Fragments that a store has set aside: the records it knows to be bad.

Kept by each `FragmentStore`; written by the scrubber, read by `FINDINGS`.  A finding is durable,
and while it stands its record is kept on the disk and served as CORRUPT.  It ends when

* a record under the same key was put, read back from the disk and found good, or
* the fragment is deleted, or
* (of an IO_ERROR or a missing record only) a later look finds the record good.

Row of the default family: "finding/", packed fragment key ->

    offset  size  field
    0       1     `ItemStatus`: CORRUPT, NOT_FOUND or IO_ERROR
    1       8     when it was found, seconds since 1970 (IEEE double)

Little-endian.  History: version 1, first.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from protocol.errors import CorruptFragment
from protocol.messages import ItemStatus
from storage_node.examine import examined
from storage_node.interface import Finding, FragmentKey, StoredRecord

FINDING_PREFIX: Final = b"finding/"
FINDINGS_MAX: Final = 65_536
"""Findings kept: a disk with more is bad as a whole (`Fault.DISK`), and memory stays bounded."""

_ROW = struct.Struct("<Bd")

Look = Callable[[Sequence[FragmentKey]], list[StoredRecord]]
"""Reads records as `FragmentStore.examine` does."""


class Change(NamedTuple):
    """Rows to write and keys of rows to delete, together."""

    noted: dict[bytes, Finding]
    ended: list[bytes]


def finding_row_key(packed: bytes) -> bytes:
    """Key of a finding's row."""
    return FINDING_PREFIX + packed


def pack_finding(finding: Finding) -> bytes:
    """Value of a finding's row."""
    return _ROW.pack(finding.status, finding.found_at)


def unpack_finding(packed_key: bytes, row: bytes) -> Finding:
    """Inverse of `pack_finding`.  Raises `CorruptFragment` for bytes that are no row."""
    try:
        status, found_at = _ROW.unpack(row)
        return Finding(FragmentKey.unpack(packed_key), ItemStatus(status), found_at)
    except (struct.error, ValueError) as error:
        raise CorruptFragment(f"a finding of {len(row)} bytes is not one") from error


def look_again(
    open_findings: dict[bytes, Finding], keys: Iterable[FragmentKey], look: Look, at: float
) -> Change:
    """What changes when `keys` are read once more, by the only writer.

    The scrubber read them earlier, beside puts and deletes: a key that is good, deleted or
    replaced by now is not noted.  A CORRUPT finding stands until its record is replaced.
    """
    noted: dict[bytes, Finding] = {}
    ended: list[bytes] = []
    wanted = [key for key in keys if not _is_corrupt(open_findings.get(key.pack()))]
    for key, answer in zip(wanted, look(wanted), strict=True):
        packed = key.pack()
        status = examined(key, answer).status
        if status is ItemStatus.OK or answer.status is ItemStatus.NOT_SENT:
            if packed in open_findings and status is ItemStatus.OK:
                ended.append(packed)
            continue
        known = open_findings.get(packed)
        if known is None and len(open_findings) + len(noted) >= FINDINGS_MAX:
            continue
        if known is None or known.status is not status:
            noted[packed] = Finding(key, status, at if known is None else known.found_at)
    return Change(noted, ended)


def _is_corrupt(finding: Finding | None) -> bool:
    return finding is not None and finding.status is ItemStatus.CORRUPT


def page_of(
    open_findings: dict[bytes, Finding], after: FragmentKey | None, limit: int
) -> tuple[list[Finding], bool]:
    """A page in key order; True if there are more."""
    start = b"" if after is None else after.pack()
    later = sorted(key for key in open_findings if key > start)
    return [open_findings[key] for key in later[:limit]], len(later) > limit
