"""Decide what a download does: list the remote tree into a frozen plan.

Step 1 of the life of a get into a folder.  Called by `client.transfer`; may import `protocol` and
its own package.  The plan holds the inline contents that the listing brought.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from client.api import HaversackClient
from client.entries import Entry, EntryKind
from client.local_root import FileContent, Parts, check_parts
from client.report import ItemFailure
from protocol.errors import CorruptReply, HaversackError, InvalidPath
from protocol.limits import BLOCK_BYTES_MAX

_GROUP_FILES_MAX = 512


class RemoteLink(NamedTuple):
    """A symlink to make."""

    parts: Parts
    target: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What a download will do below the local folder `root`."""

    root: str
    files: tuple[FileContent, ...]
    links: tuple[RemoteLink, ...]
    folders: tuple[Parts, ...]
    refused: tuple[ItemFailure, ...]

    @property
    def bytes_total(self) -> int:
        """Content bytes of all files."""
        return sum(file.size for file in self.files)


async def plan_download(client: HaversackClient, remote: str, local: str) -> DownloadPlan:
    """Plan the download of what stands at `remote` to the local path `local`.

    A folder's contents go into `local`; a file or a symlink becomes `local`.  Raises
    `EntryNotFound` if nothing stands there.
    """
    remote = "/" + "/".join(part for part in remote.split("/") if part)
    builder = _Builder()
    if remote != "/":
        entry = await client.entry(remote)
        if entry.kind is not EntryKind.FOLDER:
            folder, name = _split(local)
            builder.add(entry, (name,))
            return builder.plan(folder)
        remote = entry.path  # as it was created: the listing spells it so
    builder.folders.append(())
    prefix = remote.rstrip("/") + "/"
    async for entry in client.iter_folder(remote, recursive=True):
        try:
            if not entry.path.startswith(prefix):
                raise InvalidPath(f"the listing of {remote!r} strays to {entry.path!r}")
            parts = tuple(entry.path[len(prefix) :].split("/"))
            check_parts(parts)
            builder.add(entry, parts)
        except HaversackError as error:
            builder.refused.append(ItemFailure(entry.path, error))
    return builder.plan(local)


class _Builder:
    def __init__(self) -> None:
        self.files: list[FileContent] = []
        self.links: list[RemoteLink] = []
        self.folders: list[Parts] = []
        self.refused: list[ItemFailure] = []
        self._taken: set[Parts] = set()

    def add(self, entry: Entry, parts: Parts) -> None:
        """Take one entry.  Raises `InvalidPath`, `CorruptReply`."""
        if parts in self._taken:
            raise InvalidPath(f"the server lists {entry.path!r} twice")
        self._taken.add(parts)
        mtime_ns = round(entry.mtime * 1e9)
        match entry.kind:
            case EntryKind.FOLDER:
                self.folders.append(parts)
            case EntryKind.SYMLINK:
                if not entry.symlink or "\0" in entry.symlink:
                    raise CorruptReply(f"the server lists {entry.path!r} without a target")
                self.links.append(RemoteLink(parts, entry.symlink, mtime_ns))
            case EntryKind.FILE:
                content = entry.content if entry.size else b""
                whole = len(content) == entry.size if content is not None else bool(entry.blocks)
                if not whole:
                    raise CorruptReply(f"the server lists {entry.path!r} without its content")
                self.files.append(
                    FileContent(
                        parts, entry.size, mtime_ns, entry.executable, entry.blocks, content
                    )
                )

    def plan(self, root: str) -> DownloadPlan:
        """Freeze."""
        return DownloadPlan(
            root,
            tuple(self.files),
            tuple(self.links),
            tuple(self.folders),
            tuple(self.refused),
        )


def _split(local: str) -> tuple[str, str]:
    return os.path.split(os.path.abspath(local))


def cut_jobs(files: tuple[FileContent, ...]) -> Iterator[tuple[FileContent, ...]]:
    """Files in the order of the plan: small ones in groups of at most one block's bytes, each
    larger one (more than one block) alone."""
    group: list[FileContent] = []
    held = 0
    for file in files:
        if len(file.blocks) > 1:
            yield (file,)
            continue
        if group and (held + file.size > BLOCK_BYTES_MAX or len(group) >= _GROUP_FILES_MAX):
            yield tuple(group)
            group, held = [], 0
        group.append(file)
        held += file.size
    if group:
        yield tuple(group)
