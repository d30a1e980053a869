"""Entries of the file tree as the HTTP API shows them, and what a commit sends.

Shapes only: used by `client.api`, `client.upload` and `client.download`.  May import `protocol`.
"""

from __future__ import annotations

import base64
import binascii
import enum
import math
from dataclasses import dataclass
from typing import Any

from protocol.errors import CorruptReply, MalformedHash
from protocol.ids import BlockHash

_MTIME_SECONDS_MAX = 1 << 40  # far beyond every file system, far below overflow in nanoseconds


class EntryKind(enum.Enum):
    """What stands at a path."""

    FILE = "file"
    FOLDER = "folder"
    SYMLINK = "symlink"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the tree.  A file has either `blocks` or `content` (up to 4 KiB)."""

    path: str
    name: str
    kind: EntryKind
    rev: str
    size: int
    mtime: float
    """Seconds since 1970."""
    executable: bool
    blocks: tuple[BlockHash, ...]
    content: bytes | None
    symlink: str | None
    raw: dict[str, Any]
    """The JSON object as received: `ls --json` prints it."""


@dataclass(frozen=True, slots=True)
class NewEntry:
    """What `POST /v1/metadata/commit` is told: a file in blocks, an inline file, or a symlink."""

    path: str
    size: int
    mtime: float
    parent_rev: str | None
    """Revision this one replaces; None: nothing may stand there (or the same content)."""
    blocks: tuple[BlockHash, ...] | None = None
    content: bytes | None = None
    symlink: str | None = None
    executable: bool = False

    def __post_init__(self) -> None:
        given = [part for part in (self.blocks, self.content, self.symlink) if part is not None]
        assert len(given) == 1, "a version is blocks, inline content, or a symlink"

    def to_json(self) -> dict[str, Any]:
        """The request's JSON object."""
        return {
            "path": self.path,
            "block_list": None if self.blocks is None else [block.hex() for block in self.blocks],
            "content": None if self.content is None else base64.b64encode(self.content).decode(),
            "size": self.size,
            "mtime": self.mtime,
            "parent_rev": self.parent_rev,
            "executable": self.executable,
            "symlink": self.symlink,
        }

    def json_bytes_at_most(self) -> int:
        """Upper bound on the length of the JSON form, to keep a batch under the body limit."""
        blocks = 67 * len(self.blocks) if self.blocks is not None else 0
        content = 4 * (len(self.content) // 3 + 1) if self.content is not None else 0
        texts = 6 * (len(self.path) + len(self.symlink or ""))  # 6: a control character escaped
        return 256 + texts + blocks + content


def parse_entry(value: Any) -> Entry:
    """Read an entry of the API.  Raises `CorruptReply` if it is not one."""
    try:
        kind = EntryKind(value["kind"])
        blocks = value.get("block_list")
        content = value.get("content")
        symlink = value.get("symlink")
        entry = Entry(
            path=_text(value["path"]),
            name=_text(value["name"]),
            kind=kind,
            rev=str(value.get("rev") or ""),
            size=int(value.get("size") or 0),
            mtime=float(value.get("mtime") or 0),
            executable=bool(value.get("executable")),
            blocks=tuple(BlockHash.parse(text) for text in blocks or ()),
            content=None if content is None else base64.b64decode(content, validate=True),
            symlink=None if symlink is None else _text(symlink),
            raw=value,
        )
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        MalformedHash,
        binascii.Error,
    ) as error:
        raise CorruptReply(f"the server sent an entry that cannot be read: {error}") from error
    if not math.isfinite(entry.mtime) or abs(entry.mtime) > _MTIME_SECONDS_MAX or entry.size < 0:
        raise CorruptReply(f"the server sent an impossible size or time for {entry.path!r}")
    return entry


def _text(value: Any) -> str:
    """`value` if it is a string that UTF-8 can carry; raises TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    value.encode()
    return value
