"""A commit as it is asked for, and the same after its checks.

Step 1 of a commit: everything that can be refused without looking at the tree is refused here.
Called by the API (which builds `CommitRequest`) and by `metadata.tree`.  Pure.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from metadata.entries import EntryKind, pack_blocks
from metadata.paths import Names, keys_of, parse_path
from protocol.errors import InvalidPath, InvalidRequest
from protocol.ids import BlockHash
from protocol.limits import (
    BLOCK_BYTES_MAX,
    COMMIT_BLOCKS_MAX,
    INLINE_FILE_BYTES_MAX,
    PATH_BYTES_MAX,
)


@dataclass(frozen=True, slots=True)
class CommitRequest:
    """What a file or symlink shall be.  Exactly one of the three contents is given."""

    path: str
    size: int
    """Bytes of the file; of a symlink 0 or the length of its target."""
    mtime: float
    """Seconds since 1970; any finite number."""
    block_list: tuple[BlockHash, ...] | None = None
    content: bytes | None = None
    """The whole file, at most `INLINE_FILE_BYTES_MAX`."""
    symlink: str | None = None
    parent_rev: str | None = None
    """Rev that this replaces; None: nothing may be there."""
    executable: bool = False
    """Ignored for symlinks, which have no mode of their own."""


class Change(NamedTuple):
    """A `CommitRequest` that is well formed."""

    names: Names
    keys: tuple[str, ...]
    kind: EntryKind
    size: int
    mtime: float
    executable: bool
    blocks: tuple[BlockHash, ...]
    packed_blocks: bytes | None
    content: bytes | None
    symlink: str | None
    parent_rev: str | None
    unclaimed: tuple[BlockHash, ...]
    """Blocks that the namespace itself must vouch for: distinct, in order."""


def check_commit(request: CommitRequest, claimed: AbstractSet[BlockHash]) -> Change:
    """The change that `request` asks for.  Raises `InvalidPath` or `InvalidRequest`."""
    names = parse_path(request.path)
    if not names:
        raise InvalidPath("the root is a folder", {"path": "/", "reason": "root"})
    mtime = _finite(request)
    given = (request.block_list, request.content, request.symlink)
    if sum(one is not None for one in given) != 1:
        raise _refused(request, "send exactly one of block_list, content and symlink")
    kind, size, content = EntryKind.FILE, request.size, request.content
    blocks: tuple[BlockHash, ...] = ()
    if request.symlink is not None:
        _check_symlink(request, request.symlink)
        kind, size = EntryKind.SYMLINK, 0
    elif content is not None:
        _check_content(request, content)
    elif request.block_list:
        blocks = request.block_list
        _check_blocks(request, blocks)
    else:
        content = b""  # one form for the empty file
        _check_content(request, content)
    return Change(
        names,
        keys_of(names),
        kind,
        size,
        mtime,
        request.executable and kind is EntryKind.FILE,
        blocks,
        pack_blocks(blocks) if blocks else None,
        content,
        request.symlink,
        request.parent_rev,
        tuple(block for block in dict.fromkeys(blocks) if block not in claimed),
    )


def _finite(request: CommitRequest) -> float:
    try:
        mtime = float(request.mtime)
    except OverflowError:
        mtime = math.inf
    if not math.isfinite(mtime):
        raise _refused(request, "mtime is not a finite number of seconds")
    return mtime


def _check_content(request: CommitRequest, content: bytes) -> None:
    if len(content) > INLINE_FILE_BYTES_MAX:
        raise _refused(
            request,
            f"inline content is over {INLINE_FILE_BYTES_MAX} bytes: upload blocks and list them",
        )
    if request.size != len(content):
        raise _refused(request, f"size is {request.size} but the content has {len(content)} bytes")


def _check_blocks(request: CommitRequest, blocks: tuple[BlockHash, ...]) -> None:
    if len(blocks) > COMMIT_BLOCKS_MAX:
        raise _refused(request, f"block_list has over {COMMIT_BLOCKS_MAX} blocks")
    # Cuts may follow the content, so a block may be of any size from one byte up.
    if not len(blocks) <= request.size <= len(blocks) * BLOCK_BYTES_MAX:
        raise _refused(request, f"{len(blocks)} blocks cannot hold exactly {request.size} bytes")


def _check_symlink(request: CommitRequest, target: str) -> None:
    try:
        length = len(target.encode())
    except UnicodeEncodeError:
        raise _refused(request, "the symlink's target is not Unicode text") from None
    if not 0 < length <= PATH_BYTES_MAX or "\0" in target:
        raise _refused(request, f"a symlink's target has 1 to {PATH_BYTES_MAX} bytes and no NUL")
    if request.size not in (0, length):
        raise _refused(request, f"size is {request.size} but the target has {length} bytes")


def _refused(request: CommitRequest, why: str) -> InvalidRequest:
    return InvalidRequest(f"commit of {request.path!r}: {why}", {"path": request.path})
