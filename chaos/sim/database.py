"""SQL under simulation: the real `sql.Database` and SQLite, with time, crashes and lost answers.

Each simulated process opens its own `SimDatabase` on the same file, as real processes do.  What was
committed survives a crash; what was under way is rolled back.  SQLite itself is trusted: power cuts
inside it are tested live.  The files lie on a memory file system where there is one.

The schema is migrated once per Python process and copied for each run: Alembic costs more than the
rest of a small run.
"""

from __future__ import annotations

import asyncio
import functools
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection

from cluster.cell import MIGRATIONS as CELL_MIGRATIONS
from metadata.schema import MIGRATIONS as METADATA_MIGRATIONS
from protocol.errors import DatabaseBusy, UnknownOutcome
from sql.database import Database
from sql.engine import Engines, make_engines, sqlite_url
from sql.migrations import upgrade

T = TypeVar("T")

Watch = Callable[[], Callable[[], None]]
"""Called before each transaction; what it returns is called after its commit, in the same
instant."""

READ_MEAN_S = 0.0002
WRITE_MEAN_S = 0.002
"""A synced COMMIT of a small group on a good disk."""

_MEMORY = Path("/dev/shm")


@dataclass(slots=True)
class SqlFaults:
    """What goes wrong with the writes of one process; an injector sets it, `SimDatabase` uses
    it up."""

    busy: int = 0
    """So many writes are refused with nothing done."""
    lose_reply: bool | None = None
    """The next write is answered with UnknownOutcome: True after its commit, False instead."""
    kill: bool | None = None
    """The process dies at its next write: True just after the commit, False just before."""
    on_kill: Callable[[], None] | None = None
    on_fired: Callable[[str], None] | None = None

    def take(self) -> str:
        """What happens to the write that is about to start; each fault fires once."""
        if self.kill is not None:
            when, self.kill = self.kill, None
            return self._fired("kill_after" if when else "kill_before")
        if self.busy:
            self.busy -= 1
            return self._fired("busy")
        if self.lose_reply is not None:
            committed, self.lose_reply = self.lose_reply, None
            return self._fired("lost_after" if committed else "lost_instead")
        return ""

    def _fired(self, what: str) -> str:
        if self.on_fired is not None:
            self.on_fired(what)
        return what


class SimDatabase(Database):
    """One process's view of one database file."""

    def __init__(
        self, path: Path, rng: random.Random, faults: SqlFaults, watch: Watch | None = None
    ) -> None:
        super().__init__(sqlite_url(path), inline=True, engines=_engines(path))
        self._watch = watch
        self._rng = rng
        self._faults = faults

    async def read(self, work: Callable[[Connection], T]) -> T:
        """See `Database.read`."""
        await asyncio.sleep(self._rng.expovariate(1.0) * READ_MEAN_S)
        return self.read_now(work)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """See `Database.write`: a caller that gives up does not stop the work."""
        task = asyncio.get_running_loop().create_task(self._write(work), name="sql-write")
        try:
            result: T = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_notice)
            raise
        return result

    async def _write(self, work: Callable[[Connection], T]) -> T:
        pause_s = self._rng.expovariate(1.0) * WRITE_MEAN_S / 2
        await asyncio.sleep(pause_s)
        fault = self._faults.take()
        if fault == "busy":
            raise DatabaseBusy("simulated: the database is locked")
        if fault == "lost_instead":
            raise UnknownOutcome("simulated: connection lost in COMMIT, which was not reached")
        if fault == "kill_before":
            await self._die()
        judge = None if self._watch is None else self._watch()
        result = self.transact(work)
        if judge is not None:
            judge()
        if fault == "kill_after":
            await self._die()
        await asyncio.sleep(pause_s)
        if fault == "lost_after":
            raise UnknownOutcome("simulated: connection lost in COMMIT, which was done")
        return result

    async def _die(self) -> None:
        """Kill the process that runs this; nothing after it is ever executed."""
        assert self._faults.on_kill is not None
        self._faults.on_kill()
        await asyncio.get_running_loop().create_future()
        raise AssertionError("a dead process went on")


def _notice(task: asyncio.Task[Any]) -> None:
    """Nobody waits for this write any more: how it ends is nobody's to be told."""
    if not task.cancelled():
        task.exception()


@functools.cache
def _engines(path: Path) -> Engines:
    """One pair per path for as long as the Python process lives, so that statements are compiled
    once and not once a life of a process.  Works run inline and never overlap, so lives cannot
    meet in a connection."""
    return make_engines(sqlite_url(path), inline=True)


def memory_directory() -> Path | None:
    """A directory whose files never touch a disk, if the machine has one."""
    return _MEMORY if _MEMORY.is_dir() else None


@functools.cache
def _template_directory() -> tempfile.TemporaryDirectory[str]:
    """Both databases, empty and migrated; removed when the process ends."""
    directory = tempfile.TemporaryDirectory(prefix="haversack-sim-", dir=memory_directory())
    for name, migrations in (("cell.db", CELL_MIGRATIONS), ("metadata.db", METADATA_MIGRATIONS)):
        database = Database(sqlite_url(Path(directory.name) / name), inline=True)
        upgrade(database, migrations)
        database.close()
    return directory


def copy_databases(target: Path) -> None:
    """Put fresh copies of `cell.db` and `metadata.db` into `target`."""
    for name in ("cell.db", "metadata.db"):
        shutil.copyfile(Path(_template_directory().name) / name, target / name)
