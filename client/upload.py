"""Carry out an upload plan: read, hash, check, send, commit, with bounded memory.

Steps 2 to 4 of the life of a put from a folder.  Called by `client.transfer`; may import
`protocol` and its own package.

Windows of pieces (`client.upload_plan.cut_windows`) run side by side.  A file is committed once
all its pieces are on the server and every one of them was read under the same stamp; a file that
changed meanwhile is started over, then reported.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from dataclasses import dataclass, field

from client.api import HaversackClient
from client.block_sender import BlockSender
from client.commit_queue import CommitQueue
from client.entries import Entry, EntryKind, NewEntry
from client.local_read import PieceFailed, PieceRead, look_again, read_pieces
from client.report import Ledger, TransferOptions, stops
from client.upload_plan import (
    LocalFile,
    LocalLink,
    Piece,
    RemoteState,
    UploadPlan,
    Window,
    block_count,
    cut_windows,
    fingerprint,
    standing_at,
)
from protocol.errors import FileChanged, HaversackError, MissingBlocks
from protocol.ids import BlockHash
from protocol.limits import BLOCK_BYTES_MAX

_WINDOWS_PARALLEL = 4
_READ_JOB_BYTES = BLOCK_BYTES_MAX
"""Bytes read and hashed by one job in a thread, so that a window uses several threads."""
_READ_JOB_PIECES = 128
_MTIME_EQUAL_S = 0.002
"""Times closer than this are the same: a float of seconds does not carry nanoseconds."""


@dataclass(slots=True)
class _FileState:
    """A file under way."""

    file: LocalFile
    blocks: list[BlockHash | None] = field(default_factory=list)
    content: bytes | None = None
    left: int = 0
    attempt: int = 1
    error: HaversackError | None = None

    def start(self) -> None:
        """Forget what was read, before the first piece of an attempt."""
        self.left = block_count(self.file.stamp.size)
        self.blocks = [None] * self.left
        self.content = None
        self.error = None

    def complete_blocks(self) -> tuple[BlockHash, ...]:
        """All blocks; only once every piece was read."""
        assert None not in self.blocks or self.content is not None
        return tuple(block for block in self.blocks if block is not None)


class Uploader:
    """One run of one plan."""

    def __init__(
        self, client: HaversackClient, plan: UploadPlan, options: TransferOptions, ledger: Ledger
    ) -> None:
        self._client = client
        self._plan = plan
        self._options = options
        self._ledger = ledger
        self._sender = BlockSender(client, ledger, options.parallel)
        self._files = [_FileState(file) for file in plan.files]
        self._window_bytes = max(BLOCK_BYTES_MAX, options.memory_bytes_max // _WINDOWS_PARALLEL)
        self._again: deque[Window] = deque()
        self._stopped: HaversackError | None = None

    async def run(self) -> HaversackError | None:
        """Upload everything.  Item errors go to the ledger; returns the error that made going on
        pointless, if there was one."""
        for state in self._files:
            state.start()
        try:
            async with CommitQueue(self._client) as commits:
                for link in self._plan.links:
                    await self._put_link(link, commits)
                await self._make_folders()
                await self._put_files(commits)
                if self._stopped is None:
                    await commits.drain()
        except HaversackError as error:
            self._stop(error)
        return self._stopped

    def _stop(self, error: HaversackError) -> None:
        self._stopped = self._stopped or error

    # ---------------------------------------------------------- files in windows

    async def _put_files(self, commits: CommitQueue) -> None:
        sizes = [(index, state.file.stamp.size) for index, state in enumerate(self._files)]
        planned = cut_windows(sizes, self._window_bytes)
        running: set[asyncio.Task[None]] = set()
        try:
            while self._stopped is None:
                while len(running) < _WINDOWS_PARALLEL:
                    window = self._again.popleft() if self._again else next(planned, None)
                    if window is None:
                        break
                    running.add(asyncio.create_task(self._put_window(window, commits)))
                if not running:
                    await commits.drain()
                    if not self._again:
                        return
                    continue
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _put_window(self, window: Window, commits: CommitQueue) -> None:
        pieces = await self._read(window)
        wanted: list[tuple[BlockHash, bytes]] = []
        for read in pieces:
            state = self._files[read.piece.file]
            if isinstance(read, PieceFailed):
                state.error = state.error or read.error
            elif read.block is None:
                state.content = read.data
            else:
                state.blocks[read.piece.number] = read.block
                if len(state.blocks) == 1 and self._stands(state):
                    self._ledger.counters.blocks_deduplicated += 1
                else:
                    wanted.append((read.block, read.data))
        failed = await self._sender.ensure(wanted)
        for read in pieces:
            state = self._files[read.piece.file]
            if isinstance(read, PieceRead):
                self._ledger.counters.bytes_done += len(read.data)
                if read.block is not None:
                    state.error = state.error or failed.get(read.block)
            state.left -= 1
            if state.left == 0:
                await self._finish(read.piece.file, commits)
        self._ledger.changed()

    async def _read(self, window: Window) -> list[PieceRead | PieceFailed]:
        """Read a window in jobs small enough that several threads share it."""
        given_up = [piece for piece in window if self._files[piece.file].error is not None]
        jobs: list[list[tuple[LocalFile, Piece]]] = [[]]
        held = 0
        for piece in window:
            state = self._files[piece.file]
            if state.error is not None:  # no use reading more of it
                continue
            full = held + piece.length > _READ_JOB_BYTES or len(jobs[-1]) >= _READ_JOB_PIECES
            if jobs[-1] and full:
                jobs.append([])
                held = 0
            jobs[-1].append((state.file, piece))
            held += piece.length
        parts = await asyncio.gather(
            *(self._client.run(functools.partial(read_pieces, job)) for job in jobs)
        )
        return [read for part in parts for read in part] + [
            PieceFailed(piece, self._error_of(piece)) for piece in given_up
        ]

    def _error_of(self, piece: Piece) -> HaversackError:
        error = self._files[piece.file].error
        assert error is not None
        return error

    # ------------------------------------------------------------- a file's end

    async def _finish(self, index: int, commits: CommitQueue) -> None:
        state = self._files[index]
        counters = self._ledger.counters
        if state.error is not None:
            if isinstance(state.error, FileChanged):
                await self._look_again(index)
            else:
                self._ledger.fail(state.file.local, state.error)
            return
        standing = standing_at(self._plan.standing, state.file.remote)
        if standing is not None and self._stands(state) and _attributes_stand(state.file, standing):
            counters.files_unchanged += 1
            counters.files_done += 1
            return
        new = NewEntry(
            path=state.file.remote,
            size=state.file.stamp.size,
            mtime=state.file.stamp.mtime_ns / 1e9,
            parent_rev=_replaceable_rev(standing),
            blocks=None if state.content is not None else state.complete_blocks(),
            content=state.content,
            executable=state.file.executable,
        )
        await commits.put(new, lambda result: self._settled(index, result))

    def _stands(self, state: _FileState) -> bool:
        """The server has this very content at this path already."""
        standing = standing_at(self._plan.standing, state.file.remote)
        return (
            standing is not None
            and standing.kind is EntryKind.FILE
            and standing.size == state.file.stamp.size
            and standing.fingerprint == fingerprint(state.complete_blocks(), state.content, None)
        )

    def _settled(self, index: int, result: Entry | HaversackError) -> None:
        """What became of a file's commit."""
        state = self._files[index]
        if isinstance(result, Entry):
            self._ledger.counters.files_done += 1
            self._ledger.counters.bytes_moved += len(state.content or b"")
        elif isinstance(result, MissingBlocks) and state.attempt < self._options.read_attempts_max:
            self._sender.forget(state.complete_blocks())
            self._start_over(index, state.file)
        else:
            self._refused(state.file.local, result)
        self._ledger.changed()

    async def _look_again(self, index: int) -> None:
        """A file changed under us: start it over, unless that was done often enough."""
        state = self._files[index]
        assert state.error is not None
        if state.attempt >= self._options.read_attempts_max:
            self._ledger.fail(state.file.local, state.error)
            return
        try:
            file = await self._client.run(lambda: look_again(state.file))
        except HaversackError as error:
            self._ledger.fail(state.file.local, error)
            return
        self._start_over(index, file)

    def _start_over(self, index: int, file: LocalFile) -> None:
        state = self._files[index]
        state.file = file
        state.attempt += 1
        state.start()
        self._ledger.counters.bytes_total += file.stamp.size
        self._again.extend(cut_windows([(index, file.stamp.size)], self._window_bytes))

    # ---------------------------------------------------------- links and folders

    async def _put_link(self, link: LocalLink, commits: CommitQueue) -> None:
        standing = standing_at(self._plan.standing, link.remote)
        if (
            standing is not None
            and standing.kind is EntryKind.SYMLINK
            and standing.fingerprint == fingerprint((), None, link.target)
        ):
            self._ledger.counters.symlinks_done += 1
            return
        new = NewEntry(
            path=link.remote,
            size=0,
            mtime=link.mtime_ns / 1e9,
            parent_rev=_replaceable_rev(standing),
            symlink=link.target,
        )

        def settled(result: Entry | HaversackError) -> None:
            if isinstance(result, Entry):
                self._ledger.counters.symlinks_done += 1
            else:
                self._refused(link.local, result)

        await commits.put(new, settled)

    async def _make_folders(self) -> None:
        slots = asyncio.Semaphore(self._options.parallel)

        async def make(path: str) -> None:
            standing = standing_at(self._plan.standing, path)
            async with slots:
                if self._stopped is not None:
                    return
                if standing is None or standing.kind is not EntryKind.FOLDER:
                    try:
                        await self._client.make_folder(path)
                    except HaversackError as error:
                        self._refused(path, error)
                        return
            self._ledger.counters.folders_done += 1

        await asyncio.gather(*(make(path) for path in self._plan.folders))

    def _refused(self, path: str, error: HaversackError) -> None:
        self._ledger.fail(path, error)
        if stops(error):
            self._stop(error)


def _replaceable_rev(standing: RemoteState | None) -> str | None:
    """The revision to replace; a folder is never replaced by a file."""
    return None if standing is None or standing.kind is EntryKind.FOLDER else standing.rev


def _attributes_stand(file: LocalFile, standing: RemoteState) -> bool:
    return (
        standing.executable == file.executable
        and abs(standing.mtime - file.stamp.mtime_ns / 1e9) <= _MTIME_EQUAL_S
    )
