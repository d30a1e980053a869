"""One SQL database as the core sees it: `read`, and `write` with group commit.

Called by every class of `cluster` and `metadata` that keeps rows.  A write is a function over a
connection; the writer thread runs all functions that are waiting in one transaction, so that a
hundred concurrent puts cost one synced COMMIT.  Nothing is answered before COMMIT has returned.

Inline databases (`inline=True`) run everything in the caller, without threads: the simulation
and most tests use them.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError

from protocol.errors import DatabaseBusy, Overloaded, UnknownOutcome
from sql.engine import Engines, make_engines

T = TypeVar("T")
Work = Callable[[Connection], T]

GROUP_WORKS_MAX = 256
"""Functions that share one transaction: bounds what one failure makes run again."""

QUEUED_WORKS_MAX = 16_384
"""Functions waiting for the writer before callers are told to slow down."""

READERS = 4
"""Reader threads: more only contend for the interpreter."""


class _Pending:
    """One submitted function and the future that its caller awaits."""

    __slots__ = ("error", "future", "loop", "result", "work")

    def __init__(
        self, work: Work[Any], loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]
    ) -> None:
        self.work = work
        self.loop = loop
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class WriteStats:
    """How well writes share transactions."""

    works: int
    transactions: int


class Database:
    """One SQL database.  Create it on any thread; await its methods on one event loop each."""

    def __init__(self, url: str, *, inline: bool = False, engines: Engines | None = None) -> None:
        """`engines`: of that URL, if the caller keeps them for several databases in turn; `close`
        disposes of their connections either way."""
        engines = engines or make_engines(url, inline=inline)
        self._writer_engine: Engine = engines.writer
        self._reader_engine: Engine = engines.reader
        self._inline = inline
        self._queue: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._start_lock = threading.Lock()
        self._closed = False
        self._works = 0
        self._transactions = 0

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._writer_engine.dialect.name

    def stats(self) -> WriteStats:
        """Functions run and transactions they took since start."""
        return WriteStats(self._works, self._transactions)

    # -- synchronous ---------------------------------------------------------------------------

    def transact(self, work: Work[T]) -> T:
        """Run `work` in its own transaction in this thread; durable when this returns.

        Raises whatever `work` raises (after a rollback), `DatabaseBusy` if nothing was committed,
        `UnknownOutcome` if the connection was lost in COMMIT.
        """
        try:
            connection = self._writer_engine.connect()
        except DBAPIError as error:
            raise _translate(error) from error
        with connection:
            transaction = _begin(connection)
            try:
                result = work(connection)
            except DBAPIError as error:
                transaction.rollback()
                raise _translate(error) from error
            except BaseException:
                transaction.rollback()
                raise
            _commit(connection, transaction)
        self._works += 1
        self._transactions += 1
        return result

    def read_now(self, work: Work[T]) -> T:
        """Run a read-only `work` in this thread."""
        try:
            with self._reader_engine.connect() as connection:
                return work(connection)
        except DBAPIError as error:
            raise _translate(error) from error

    # -- asynchronous --------------------------------------------------------------------------

    async def read(self, work: Work[T]) -> T:
        """Run a read-only `work` on one snapshot, off the event loop."""
        if self._inline:
            return self.read_now(work)
        readers = self._readers or self._start_readers()
        return await asyncio.get_running_loop().run_in_executor(readers, self.read_now, work)

    async def write(self, work: Work[T]) -> T:
        """Run `work` in a transaction shared with its neighbours; durable when this returns.

        `work` may run more than once and touches nothing but the connection.  If it raises, its
        own effects are rolled back and the error is the caller's alone.  A caller that is
        cancelled does not stop its work.  Raises `Overloaded` when too many are waiting.
        """
        if self._inline:
            return self.transact(work)
        if self._queue.qsize() >= QUEUED_WORKS_MAX:
            raise Overloaded("too many writes are waiting for the database: retry later")
        if self._writer is None:
            self._start_writer()
        loop = asyncio.get_running_loop()
        pending = _Pending(work, loop, loop.create_future())
        self._queue.put(pending)
        result: T = await pending.future
        return result

    def close(self) -> None:
        """Finish the writes that are waiting, then release the database.  Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join()
        if self._readers is not None:
            self._readers.shutdown()
        self._writer_engine.dispose()
        self._reader_engine.dispose()

    async def aclose(self) -> None:
        """`close` without blocking the event loop."""
        if self._inline:
            self.close()
        else:
            await asyncio.get_running_loop().run_in_executor(None, self.close)

    # -- threads -------------------------------------------------------------------------------

    def _start_readers(self) -> ThreadPoolExecutor:
        with self._start_lock:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="sql-read")
            return self._readers

    def _start_writer(self) -> None:
        with self._start_lock:
            if self._writer is None:
                self._writer = threading.Thread(
                    target=self._write_loop, name="sql-write", daemon=True
                )
                self._writer.start()

    def _write_loop(self) -> None:
        stopping = False
        while not stopping:
            first = self._queue.get()
            if first is None:
                return
            group = [first]
            while len(group) < GROUP_WORKS_MAX:
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    stopping = True
                    break
                group.append(item)
            self._run_group(group)

    def _run_group(self, group: list[_Pending]) -> None:
        """One transaction for all; if it fails before COMMIT, one for each."""
        try:
            self._transact_group(group)
        except UnknownOutcome as error:
            for pending in group:
                pending.error = error
        except BaseException as error:  # noqa: BLE001 - handed to the caller it belongs to
            if len(group) == 1:
                group[0].error = error
            else:
                for pending in group:
                    self._run_alone(pending)
        _deliver(group)

    def _transact_group(self, group: list[_Pending]) -> None:
        def work(connection: Connection) -> None:
            for pending in group:
                pending.result = pending.work(connection)

        self.transact(work)
        self._works += len(group) - 1

    def _run_alone(self, pending: _Pending) -> None:
        try:
            pending.result = self.transact(pending.work)
        except BaseException as error:  # noqa: BLE001 - handed to the caller it belongs to
            pending.error = error


def _begin(connection: Connection) -> Any:
    try:
        return connection.begin()
    except DBAPIError as error:
        raise _translate(error) from error


def _commit(connection: Connection, transaction: Any) -> None:
    """COMMIT; SQLite says whether it happened, a server that went away does not."""
    try:
        transaction.commit()
    except DBAPIError as error:
        lost = error.connection_invalidated or connection.invalidated
        if lost:
            raise UnknownOutcome(
                "the database connection was lost in COMMIT: read back before retrying"
            ) from error
        if transaction.is_active:
            transaction.rollback()
        raise _translate(error) from error


def _translate(error: DBAPIError) -> Exception:
    """Our error for a database that is busy or away; the original for anything else."""
    if isinstance(error, OperationalError) or error.connection_invalidated:
        return DatabaseBusy(
            f"the database did not take the transaction ({error.orig}); nothing was committed",
        )
    return error


def _deliver(group: list[_Pending]) -> None:
    """Wake the callers: one call into each event loop, however many futures."""
    loops: dict[int, tuple[asyncio.AbstractEventLoop, list[_Pending]]] = {}
    for pending in group:
        loops.setdefault(id(pending.loop), (pending.loop, []))[1].append(pending)
    for loop, mine in loops.values():
        try:
            loop.call_soon_threadsafe(_settle, mine)
        except RuntimeError:
            continue  # that loop is closed: nobody waits for the answer any more


def _settle(group: list[_Pending]) -> None:
    for pending in group:
        if pending.future.done():
            continue
        if pending.error is not None:
            pending.future.set_exception(pending.error)
        else:
            pending.future.set_result(pending.result)
