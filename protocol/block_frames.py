"""Framing of many blocks in one HTTP body (`/v1/blocks/batch`, `/v1/blocks/fetch`).

    offset  size  field
    0       32    block hash
    32      1     status (`FrameStatus`; OK in an upload)
    33      4     length of the data, little-endian
    37            data

Frames follow each other without padding.  History: version 1, media type below.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

from protocol.errors import BlockTooLarge, InvalidRequest
from protocol.hashing import Buffer
from protocol.ids import BlockHash
from protocol.limits import BATCH_BLOCKS_MAX, BLOCK_BYTES_MAX

MEDIA_TYPE = "application/vnd.haversack.blocks.v1"
_HEADER = struct.Struct("<32sBI")
FRAME_HEADER_BYTES = _HEADER.size


class FrameStatus(enum.IntEnum):
    """What a frame of a fetch says about its block."""

    OK = 0
    NOT_FOUND = 1
    UNAVAILABLE = 2
    NOT_SENT = 3
    """The answer would have grown over its limit: ask again for this one."""


class BlockFrame(NamedTuple):
    block: BlockHash
    status: FrameStatus
    data: memoryview


def pack_frame_header(block: BlockHash, status: FrameStatus, length: int) -> bytes:
    """The 37 bytes in front of `length` bytes of data."""
    return _HEADER.pack(block, status, length)


def iter_frames(body: Buffer) -> Iterator[BlockFrame]:
    """Walk a complete framed body; `data` is a view into it.

    Raises `InvalidRequest` for a body that is cut or holds too many frames, `BlockTooLarge` for a
    frame above the block limit.
    """
    view = memoryview(body)
    position, count = 0, 0
    while position < len(view):
        if len(view) - position < FRAME_HEADER_BYTES:
            raise InvalidRequest(f"framed body is cut in the header of frame {count}")
        name, status, length = _HEADER.unpack_from(view, position)
        position += FRAME_HEADER_BYTES
        count += 1
        if count > BATCH_BLOCKS_MAX:
            raise InvalidRequest(f"more than {BATCH_BLOCKS_MAX} blocks in one body: send several")
        if length > BLOCK_BYTES_MAX:
            raise BlockTooLarge(
                f"frame {count - 1} holds {length} bytes; a block has at most 4 MiB"
            )
        if length > len(view) - position:
            raise InvalidRequest(f"framed body is cut in the data of frame {count - 1}")
        try:
            known = FrameStatus(status)
        except ValueError as error:
            raise InvalidRequest(f"frame {count - 1} has unknown status {status}") from error
        yield BlockFrame(BlockHash(name), known, view[position : position + length])
        position += length
