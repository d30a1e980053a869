"""Decide what an upload does: walk a local tree into a frozen plan, and cut it into windows.

Step 1 of the life of a put from a folder.  Reads directories, never file contents; follows no
symlink.  Called by `client.transfer`; may import `protocol` and shapes of `client`.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from client.entries import Entry, EntryKind
from client.report import ItemFailure, ItemNote, local_error
from protocol.errors import InvalidPath
from protocol.hashing import hash_block
from protocol.ids import BlockHash
from protocol.limits import (
    BATCH_BLOCKS_MAX,
    BLOCK_BYTES_MAX,
    NAME_BYTES_MAX,
    PATH_BYTES_MAX,
    PATH_DEPTH_MAX,
)
from protocol.names import name_key


class FileStamp(NamedTuple):
    """What must not move while a file is read: its identity, size and times (nanoseconds)."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """The stamp of an `lstat` or `fstat`."""
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )


class LocalFile(NamedTuple):
    """A regular file to upload."""

    local: str
    remote: str
    stamp: FileStamp
    executable: bool


class LocalLink(NamedTuple):
    """A symlink to upload as what it is."""

    local: str
    remote: str
    target: str
    mtime_ns: int


class RemoteState(NamedTuple):
    """What the server had at a path when the plan was made: enough to replace or to leave it."""

    kind: EntryKind
    rev: str
    size: int
    mtime: float
    executable: bool
    fingerprint: bytes
    """Hash of the block names, of the inline content, or of the link target."""

    @classmethod
    def of(cls, entry: Entry) -> RemoteState:
        """Condense an entry."""
        return cls(
            entry.kind,
            entry.rev,
            entry.size,
            entry.mtime,
            entry.executable,
            fingerprint(entry.blocks, entry.content if entry.size else b"", entry.symlink),
        )


@dataclass(frozen=True, slots=True)
class UploadPlan:
    """What an upload will do.  Remote paths start with "/"."""

    remote: str
    files: tuple[LocalFile, ...]
    links: tuple[LocalLink, ...]
    folders: tuple[str, ...]
    """Folders to make: those that no file or symlink brings into being."""
    standing: Mapping[str, RemoteState]
    """What the server had, by the `name_key` of the path."""
    refused: tuple[ItemFailure, ...]
    notes: tuple[ItemNote, ...]

    @property
    def bytes_total(self) -> int:
        """Content bytes of all files."""
        return sum(file.stamp.size for file in self.files)


class Piece(NamedTuple):
    """A run of one file that becomes one block, or its inline content."""

    file: int
    """Index in the plan's files."""
    number: int
    """Which block of the file, from 0."""
    offset: int
    length: int


Window = tuple[Piece, ...]
"""Pieces that are read, checked and sent together."""


def standing_at(standing: Mapping[str, RemoteState], path: str) -> RemoteState | None:
    """What the server had at a path, in whatever case the path is written."""
    return standing.get(name_key(path))


def fingerprint(blocks: Sequence[BlockHash], content: bytes | None, symlink: str | None) -> bytes:
    """32 bytes that two versions share only if their contents are the same."""
    if symlink is not None:
        return hash_block(b"symlink" + symlink.encode())
    if content is not None:
        return hash_block(b"content" + content)
    return hash_block(b"".join((b"blocks", *blocks)))


def cut_windows(files: Sequence[tuple[int, int]], window_bytes_max: int) -> Iterator[Window]:
    """Cut files, given as (index, size), into windows of bounded bytes and blocks, in order."""
    assert window_bytes_max >= BLOCK_BYTES_MAX
    pieces: list[Piece] = []
    held = 0
    for file, size in files:
        for number in range(block_count(size)):
            offset = number * BLOCK_BYTES_MAX
            length = min(BLOCK_BYTES_MAX, size - offset)
            if pieces and (held + length > window_bytes_max or len(pieces) >= BATCH_BLOCKS_MAX):
                yield tuple(pieces)
                pieces, held = [], 0
            pieces.append(Piece(file, number, offset, length))
            held += length
    if pieces:
        yield tuple(pieces)


def block_count(size: int) -> int:
    """Pieces of a file of `size` bytes; an empty file has one, empty."""
    return max(1, -(-size // BLOCK_BYTES_MAX))


def walk(
    local: str,
    remote: str,
    standing: Mapping[str, RemoteState],
    exclude: Sequence[str] = (),
) -> UploadPlan:
    """Plan the upload of `local` (a folder, a file or a symlink) to the path `remote`.

    Names below `local` that match a pattern of `exclude` are left out, folders with all they hold.
    Runs in a thread.  Raises `LocalFileError` if `local` itself cannot be read, `InvalidPath` if
    `remote` cannot be a path; everything below is refused item by item.
    """
    return _Walk(standing, exclude).plan(local, remote)


class _Walk:
    def __init__(self, standing: Mapping[str, RemoteState], exclude: Sequence[str]) -> None:
        self._standing = standing
        self._exclude = [re.compile(fnmatch.translate(pattern)) for pattern in exclude]
        self._files: list[LocalFile] = []
        self._links: list[LocalLink] = []
        self._folders: list[str] = []
        self._refused: list[ItemFailure] = []
        self._notes: list[ItemNote] = []

    def plan(self, local: str, remote: str) -> UploadPlan:
        root = "/" + "/".join(part for part in remote.split("/") if part)
        check_remote(root)
        try:
            status = os.lstat(local)
            if stat.S_ISDIR(status.st_mode):
                os.scandir(local).close()
        except OSError as error:
            raise local_error(local, error) from error
        if stat.S_ISDIR(status.st_mode):
            self._walk_folder(local.rstrip("/") or "/", root)
        else:
            self._add(local, root, status)
        return UploadPlan(
            remote=root,
            files=tuple(self._files),
            links=tuple(self._links),
            folders=tuple(self._folders),
            standing=self._standing,
            refused=tuple(self._refused),
            notes=tuple(self._notes),
        )

    def _walk_folder(self, local: str, remote: str) -> None:
        stack = [(local, remote)]
        while stack:
            folder, folder_remote = stack.pop()
            try:
                with os.scandir(folder) as entries:
                    found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                self._refused.append(ItemFailure(folder, local_error(folder, error)))
                continue
            fruitful, below = False, []
            names: dict[str, str] = {}
            for entry in found:
                if any(pattern.match(entry.name) for pattern in self._exclude):
                    continue
                path = f"{folder_remote.rstrip('/')}/{entry.name}"
                try:
                    check_remote(path)
                    _check_unique(entry.name, names)
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        below.append((entry.path, path))
                        fruitful = True
                    else:
                        fruitful = self._add(entry.path, path, status) or fruitful
                except InvalidPath as error:
                    self._refused.append(ItemFailure(entry.path, error))
                except OSError as error:
                    self._refused.append(ItemFailure(entry.path, local_error(entry.path, error)))
            if not fruitful and folder_remote != "/":
                self._folders.append(folder_remote)
            stack.extend(reversed(below))

    def _add(self, local: str, remote: str, status: os.stat_result) -> bool:
        """Take one non-folder into the plan; False if it is left out."""
        if stat.S_ISREG(status.st_mode):
            executable = bool(status.st_mode & stat.S_IXUSR)
            self._files.append(LocalFile(local, remote, FileStamp.of(status), executable))
            return True
        if stat.S_ISLNK(status.st_mode):
            target = os.readlink(local)
            if not _is_text(target):
                raise InvalidPath(f"the target of symlink {local!r} is not UTF-8: it stays behind")
            self._links.append(LocalLink(local, remote, target, status.st_mtime_ns))
            return True
        self._notes.append(ItemNote(local, f"{_special(status.st_mode)}: left out"))
        return False


def check_remote(path: str) -> None:
    """Raises `InvalidPath` for a path that the server would refuse, with what to do."""
    if not _is_text(path):
        raise InvalidPath(f"the name {path!r} is not UTF-8: rename it")
    parts = path.strip("/").split("/") if path.strip("/") else []
    if len(parts) > PATH_DEPTH_MAX:
        raise InvalidPath(f"{path[:80]!r}... is more than {PATH_DEPTH_MAX} folders deep")
    if len(path.encode()) > PATH_BYTES_MAX:
        raise InvalidPath(f"{path[:80]!r}... is longer than {PATH_BYTES_MAX} bytes")
    for part in parts:
        if part in ("", ".", "..") or "\0" in part:
            raise InvalidPath(f"{path!r} has a segment that no entry can have: {part!r}")
        if len(part.encode()) > NAME_BYTES_MAX:
            raise InvalidPath(f"the name {part[:80]!r}... is longer than {NAME_BYTES_MAX} bytes")


def _check_unique(name: str, names: dict[str, str]) -> None:
    """Raises `InvalidPath` for a name that the server holds to be one seen before."""
    first = names.setdefault(name_key(name), name)
    if first != name:
        raise InvalidPath(
            f"{name!r} and {first!r} are one name on the server, which ignores case and Unicode "
            "form: rename one of them"
        )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _special(mode: int) -> str:
    for test, name in (
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISCHR, "a character device"),
    ):
        if test(mode):
            return name
    return "neither file, folder nor symlink"
