"""Byte ranges of a block: `Range`, `If-Range`, `If-None-Match` (RFC 9110, sections 13 and 14).

Step 3 of a get over HTTP, called by `block_routes`.  One range is served; several, a unit that is
not bytes, or a field that is malformed are ignored, as the RFC allows, and the whole is sent.
Pure: linear in the length of the field, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from protocol.errors import RangeNotSatisfiable
from protocol.hashing import Buffer

_DIGITS_MAX: Final = 18


def etag_of(name: str) -> bytes:
    """Strong validator of content that is named by its hash."""
    return b'"%s"' % name.encode("ascii")


def matches_none(field: bytes | None, etag: bytes) -> bool:
    """Whether `If-None-Match` says that the caller holds this content: answer 304."""
    if field is None:
        return False
    if field.strip() == b"*":
        return True
    candidates = (part.strip() for part in field.split(b","))
    return any(candidate.removeprefix(b"W/") == etag for candidate in candidates)


def range_applies(field: bytes | None, etag: bytes) -> bool:
    """Whether `If-Range` lets the range stand: absent, or exactly our validator."""
    return field is None or field.strip() == etag


def parse_range(field: bytes | None, length: int) -> tuple[int, int] | None:
    """Start and end (exclusive) of the one range asked for; None: send everything.

    Raises `RangeNotSatisfiable` for a range that starts behind the end or has no bytes.
    """
    if field is None:
        return None
    unit, equals, text = field.partition(b"=")
    first, dash, last = (part.strip() for part in text.partition(b"-"))
    if unit.strip().lower() != b"bytes" or not equals or not dash or not (first or last):
        return None
    if not all(
        part == b"" or (part.isdigit() and len(part) <= _DIGITS_MAX) for part in (first, last)
    ):
        return None
    if not first:
        count = min(int(last), length)
        if count == 0:
            raise _unsatisfiable(length)
        return length - count, length
    start = int(first)
    if last and int(last) < start:
        return None
    if start >= length:
        raise _unsatisfiable(length)
    return start, min(int(last) + 1, length) if last else length


def _unsatisfiable(length: int) -> RangeNotSatisfiable:
    return RangeNotSatisfiable(f"the block has {length} bytes", {"length": length})


def cut_pieces(pieces: Sequence[Buffer], start: int, end: int) -> list[Buffer]:
    """Bytes `start` to `end` (exclusive) of what the pieces are together, as views."""
    cut: list[Buffer] = []
    position = 0
    for piece in pieces:
        first, last = max(start - position, 0), min(end - position, len(piece))
        if first < last:
            cut.append(memoryview(piece)[first:last])
        position += len(piece)
    return cut
