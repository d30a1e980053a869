"""Frames of the data port: a fixed header, a typed part (`meta`), a raw part (`body`).

    offset  size  field
    0       4     magic, b"HVSP"
    4       1     protocol version
    5       1     op (`Op`)
    6       1     status (`Status`; REQUEST in a request)
    7       1     reserved, zero
    8       8     request id: chosen by the caller, repeated in the answer
    16      4     length of meta, bytes
    20      4     length of body, bytes
    24      8     XXH3-64 of bytes 0..24 followed by meta
    32            meta (MessagePack, one struct of `protocol.messages`), then body

All integers are little-endian.  The body is not covered by this checksum: it is a run of fragment
records, each of which carries its own (`erasure/fragment.py`).

History: version 1, first.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import xxhash

from protocol.errors import FormatUnsupported, HaversackError
from protocol.hashing import Buffer
from protocol.limits import FRAME_BODY_BYTES_MAX, FRAME_META_BYTES_MAX

MAGIC = b"HVSP"
VERSION = 1
HEADER_BYTES = 32
_FIELDS = struct.Struct("<4sBBBBQII")
_CHECKSUM = struct.Struct("<Q")
assert _FIELDS.size + _CHECKSUM.size == HEADER_BYTES


class Op(enum.IntEnum):
    """What a frame asks for.  Append-only."""

    HELLO = 1
    PROVE = 2
    PUT = 3
    GET = 4
    DELETE = 5
    LEASE = 6
    SUMMARY = 7
    INVENTORY = 8
    VERIFY = 9
    SCRUB = 10
    FINDINGS = 11


class Status(enum.IntEnum):
    """REQUEST in a request; OK or ERROR in an answer (meta is then `ErrorReply`)."""

    REQUEST = 0
    OK = 1
    ERROR = 2


class MalformedFrame(HaversackError):
    """Bytes that are not a frame: the connection cannot be trusted any further and is closed."""

    kind = "malformed_frame"


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The decoded fixed part of a frame."""

    op: Op
    status: Status
    request_id: int
    meta_length: int
    body_length: int
    checksum: int


def pack_header(op: Op, status: Status, request_id: int, meta: bytes, body_length: int) -> bytes:
    """The 32 bytes in front of `meta` and a body of `body_length` bytes."""
    assert len(meta) <= FRAME_META_BYTES_MAX
    assert body_length <= FRAME_BODY_BYTES_MAX
    fields = _FIELDS.pack(MAGIC, VERSION, op, status, 0, request_id, len(meta), body_length)
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields + meta))


def unpack_header(data: Buffer) -> FrameHeader:
    """Read the first 32 bytes of a frame.

    Raises `MalformedFrame` for bytes that are not a frame or exceed a limit, `FormatUnsupported`
    for another protocol version.  The checksum is checked by `verify_meta`, once meta is there.
    """
    magic, version, op, status, _, request_id, meta_length, body_length = _FIELDS.unpack_from(data)
    if magic != MAGIC:
        raise MalformedFrame(f"not a data-port frame: starts with {bytes(magic)!r}")
    if version != VERSION:
        raise FormatUnsupported(f"data-port protocol version {version}; this end speaks {VERSION}")
    if meta_length > FRAME_META_BYTES_MAX or body_length > FRAME_BODY_BYTES_MAX:
        raise MalformedFrame(f"frame of {meta_length} + {body_length} bytes is over the limit")
    try:
        known_op, known_status = Op(op), Status(status)
    except ValueError as error:
        raise MalformedFrame(f"frame with op {op} and status {status}") from error
    (checksum,) = _CHECKSUM.unpack_from(data, _FIELDS.size)
    return FrameHeader(known_op, known_status, request_id, meta_length, body_length, checksum)


def verify_meta(header_bytes: Buffer, header: FrameHeader, meta: Buffer) -> None:
    """Raise `MalformedFrame` unless header and meta are what the sender packed."""
    digest = xxhash.xxh3_64(bytes(header_bytes[: _FIELDS.size]))
    digest.update(meta)
    if digest.intdigest() != header.checksum:
        raise MalformedFrame("frame header or meta does not match its checksum")
