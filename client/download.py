"""Carry out a download plan: compare, fetch, verify, write, with bounded memory.

Steps 2 to 4 of the life of a get into a folder.  Called by `client.transfer`; may import
`protocol` and its own package.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence

from client.api import HaversackClient
from client.download_plan import DownloadPlan, RemoteLink, cut_jobs
from client.local_root import FileContent, LocalRoot, NewFile, Parts, Standing
from client.report import Ledger, TransferOptions, stops
from protocol.errors import CorruptReply, HaversackError, PathOccupied
from protocol.hashing import Buffer
from protocol.ids import BlockHash
from protocol.limits import BLOCK_BYTES_MAX

_Job = tuple[FileContent, ...]


class Downloader:
    """One run of one plan.

    Memory: a *slot* stands for one block's bytes; a group of small files takes one, a large file
    one for each block that is under way or waits for its turn to be written.
    """

    def __init__(
        self,
        client: HaversackClient,
        plan: DownloadPlan,
        root: LocalRoot,
        options: TransferOptions,
        ledger: Ledger,
    ) -> None:
        self._client = client
        self._plan = plan
        self._root = root
        self._options = options
        self._ledger = ledger
        self._slots = asyncio.Semaphore(options.memory_bytes_max // BLOCK_BYTES_MAX)
        self._requests = asyncio.Semaphore(options.parallel)
        self._touched: set[Parts] = set()
        self._stopped: HaversackError | None = None

    async def run(self) -> HaversackError | None:
        """Download everything.  Item errors go to the ledger; returns the error that made going on
        pointless, if there was one."""
        for parts in self._plan.folders:
            await self._make_folder(parts)
        jobs = cut_jobs(self._plan.files)
        workers = [asyncio.create_task(self._work(jobs)) for _ in range(self._options.parallel)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self._stopped is None:
            for link in self._plan.links:
                await self._write_link(link)
        await self._sync_folders()
        return self._stopped

    async def _work(self, jobs: Iterator[_Job]) -> None:
        while self._stopped is None:
            job = next(jobs, None)
            if job is None:
                return
            wanted = await self._not_yet_here(job)
            if wanted and len(wanted[0].blocks) > 1:
                await self._get_large(wanted[0])
            elif wanted:
                async with self._slots:
                    await self._get_group(wanted)
            self._ledger.changed()

    async def _not_yet_here(self, job: _Job) -> list[FileContent]:
        """The files of a job that must be fetched."""
        wanted: list[FileContent] = []
        standings = await self._client.run(lambda: self._root.compare(job))
        for file, standing in zip(job, standings, strict=True):
            if isinstance(standing, HaversackError):
                self._fail(file, standing)
            elif standing is Standing.SAME:
                self._ledger.counters.files_unchanged += 1
                self._done(file)
            elif standing is Standing.OTHER and not self._options.overwrite:
                shown = self._root.shown(file.parts)
                self._fail(file, PathOccupied(f"{shown!r} differs: use --overwrite to replace it"))
            else:
                wanted.append(file)
        return wanted

    # ------------------------------------------------------------------ small files

    async def _get_group(self, files: Sequence[FileContent]) -> None:
        names = [file.blocks[0] for file in files if file.content is None]
        blocks: dict[BlockHash, Buffer | HaversackError] = {}
        if names:
            try:
                async with self._requests:
                    answers = await self._client.fetch_blocks(names)
            except HaversackError as error:
                answers = [error] * len(names)
            blocks = dict(zip(names, answers, strict=True))
        ready: list[tuple[FileContent, Buffer]] = []
        for file in files:
            data = file.content if file.content is not None else blocks[file.blocks[0]]
            if isinstance(data, HaversackError):
                self._fail(file, data)
            elif len(data) != file.size:
                self._fail(file, _wrong_size(file, len(data)))
            else:
                ready.append((file, data))
        overwrite = self._options.overwrite
        results = await self._client.run(lambda: self._root.write_files(ready, overwrite))
        for (file, data), refusal in zip(ready, results, strict=True):
            if refusal is not None:
                self._fail(file, refusal)
            else:
                self._ledger.counters.bytes_moved += len(data)
                self._done(file)

    # ------------------------------------------------------------------ large files

    async def _get_large(self, file: FileContent) -> None:
        try:
            new = await self._client.run(lambda: NewFile(self._root, file.parts, file.executable))
            try:
                await self._fill(new, file)
                if new.length != file.size:
                    raise _wrong_size(file, new.length)
                overwrite = self._options.overwrite
                await self._client.run(lambda: new.finish(file.mtime_ns, overwrite))
            finally:
                await asyncio.shield(self._client.run(new.close))
        except HaversackError as error:
            self._fail(file, error)
        else:
            self._done(file)

    async def _fill(self, new: NewFile, file: FileContent) -> None:
        """Fetch ahead, write in order.  A block ahead is only asked for while there is a free
        slot, so that the one whose turn it is always gets through."""
        left = deque(file.blocks)
        ahead: deque[asyncio.Task[bytes]] = deque()
        try:
            while left or ahead:
                may_ask = len(ahead) < self._options.parallel and not self._slots.locked()
                if left and (may_ask or not ahead):
                    await self._slots.acquire()
                    ahead.append(asyncio.create_task(self._get_block(left.popleft())))
                    continue
                data = await ahead[0]
                await self._client.run(lambda data=data: new.write(data))  # type: ignore[misc]
                ahead.popleft()
                self._slots.release()
                self._ledger.counters.bytes_moved += len(data)
                self._ledger.counters.bytes_done += len(data)
                self._ledger.changed()
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)
            for _ in ahead:
                self._slots.release()

    async def _get_block(self, block: BlockHash) -> bytes:
        async with self._requests:
            return await self._client.get_block(block)

    # ------------------------------------------------------------------ the rest

    async def _make_folder(self, parts: Parts) -> None:
        error = await self._client.run(lambda: self._root.make_folder(parts))
        if error is not None:
            self._ledger.fail(self._root.shown(parts), error)
        else:
            self._ledger.counters.folders_done += 1
            self._touch(parts)

    async def _write_link(self, link: RemoteLink) -> None:
        try:
            await self._client.run(
                lambda: self._root.write_link(
                    link.parts, link.target, link.mtime_ns, self._options.overwrite
                )
            )
        except HaversackError as error:
            self._ledger.fail(self._root.shown(link.parts), error)
        else:
            self._ledger.counters.symlinks_done += 1
            self._touch(link.parts[:-1])

    async def _sync_folders(self) -> None:
        folders = sorted(self._touched)
        try:
            await self._client.run(lambda: self._root.sync_folders(folders))
        except HaversackError as error:
            self._ledger.fail(self._root.path, error)

    def _touch(self, folder: Parts) -> None:
        self._touched.update(folder[:depth] for depth in range(len(folder) + 1))

    def _done(self, file: FileContent) -> None:
        self._ledger.counters.files_done += 1
        if len(file.blocks) <= 1:
            self._ledger.counters.bytes_done += file.size
        self._touch(file.parts[:-1])

    def _fail(self, file: FileContent, error: HaversackError) -> None:
        self._ledger.fail(self._root.shown(file.parts), error)
        if stops(error):
            self._stopped = self._stopped or error


def _wrong_size(file: FileContent, length: int) -> CorruptReply:
    return CorruptReply(
        f"the blocks of {'/'.join(file.parts)!r} hold {length} bytes, "
        f"its entry says {file.size}: nothing was written"
    )
