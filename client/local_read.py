"""Read pieces of local files in a thread: the bytes that are hashed are the bytes that are sent.

Step 2 of the life of a put from a folder.  Called by `client.upload` through an executor; may
import `protocol` and `client.upload_plan`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from client.report import local_error
from client.upload_plan import FileStamp, LocalFile, Piece
from protocol.errors import FileChanged, HaversackError
from protocol.hashing import hash_block
from protocol.ids import BlockHash
from protocol.limits import INLINE_FILE_BYTES_MAX

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
"""O_NONBLOCK: a file that was swapped for a FIFO must not hang the reader."""


@dataclass(frozen=True, slots=True)
class PieceRead:
    """Bytes of one piece; `block` is None for inline content."""

    piece: Piece
    data: bytes
    block: BlockHash | None


@dataclass(frozen=True, slots=True)
class PieceFailed:
    """A piece whose file cannot be read as planned: `FileChanged` or `LocalFileError`."""

    piece: Piece
    error: HaversackError


def read_pieces(
    work: Sequence[tuple[LocalFile, Piece]],
) -> list[PieceRead | PieceFailed]:
    """Read and hash pieces, one result each, in order.  Blocks: run in a thread."""
    return [_read_piece(file, piece) for file, piece in work]


def look_again(file: LocalFile) -> LocalFile:
    """The file as it is now.  Raises `LocalFileError`, `FileChanged` if it is a file no more."""
    try:
        status = os.lstat(file.local)
    except OSError as error:
        raise local_error(file.local, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise FileChanged(f"{file.local!r} stopped being a regular file: run the command again")
    executable = bool(status.st_mode & stat.S_IXUSR)
    return LocalFile(file.local, file.remote, FileStamp.of(status), executable)


def _read_piece(file: LocalFile, piece: Piece) -> PieceRead | PieceFailed:
    try:
        descriptor = os.open(file.local, _FLAGS)
        try:
            data = _read_unmoved(descriptor, file, piece)
        finally:
            os.close(descriptor)
    except OSError as error:
        return PieceFailed(piece, local_error(file.local, error))
    except FileChanged as error:
        return PieceFailed(piece, error)
    inline = file.stamp.size <= INLINE_FILE_BYTES_MAX
    return PieceRead(piece, data, None if inline else hash_block(data))


def _read_unmoved(descriptor: int, file: LocalFile, piece: Piece) -> bytes:
    """The piece's bytes, the file's stamp being the planned one before and after."""
    if FileStamp.of(os.fstat(descriptor)) != file.stamp:
        raise FileChanged(f"{file.local!r} changed while it was being uploaded")
    data = os.pread(descriptor, piece.length, piece.offset) if piece.length else b""
    if len(data) != piece.length:  # signals apart, a regular file reads short only at its end
        data = _read_rest(descriptor, piece, data)
    if FileStamp.of(os.fstat(descriptor)) != file.stamp or len(data) != piece.length:
        raise FileChanged(f"{file.local!r} changed while it was being uploaded")
    return data


def _read_rest(descriptor: int, piece: Piece, data: bytes) -> bytes:
    pieces = [data]
    length = len(data)
    while length < piece.length:
        more = os.pread(descriptor, piece.length - length, piece.offset + length)
        if not more:
            break
        pieces.append(more)
        length += len(more)
    return b"".join(pieces)
