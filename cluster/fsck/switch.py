"""Put a rebuilt `cell.db` in the place of the one there was, and keep that one beside it.

Called at the end of a rebuild, and by `cli.prepare` before anything opens the database.  A database
is up to three files, which cannot be renamed at once, and a log that is left alone beside a new
database would be replayed into it.  So the rebuilt file first gets the name `cell.db.rebuilt`: that
rename is the moment at which the rebuild counts.  From then on every step may be the last one of
its process, and whoever comes next goes on.

    cell.db.rebuilding --rename--> cell.db.rebuilt --old files aside, rename--> cell.db
      not complete                   complete, checked, durable
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from storage_node.identity import sync_directory

DATABASE: Final = "cell.db"
REBUILDING: Final = "cell.db.rebuilding"
REBUILT: Final = "cell.db.rebuilt"

_LOG, _SHARED_MEMORY = "-wal", "-shm"


def commit(data: Path) -> Path | None:
    """Make the complete file `cell.db.rebuilding` count, then `finish`."""
    with (data / REBUILDING).open("rb") as file:
        os.fsync(file.fileno())
    (data / REBUILDING).rename(data / REBUILT)
    sync_directory(data)
    return finish(data)


def finish(data: Path) -> Path | None:
    """Complete a switch that was committed, if there is one; where the old database is kept, if
    there was one.  Safe to repeat."""
    rebuilt = data / REBUILT
    if not rebuilt.exists():
        return None
    moment = datetime.fromtimestamp(rebuilt.stat().st_mtime, UTC)
    kept = data / f"{DATABASE}.before-{moment:%Y%m%dT%H%M%S.%fZ}"
    # The log before its database: one without the other is worth less than the other way round,
    # and a log must never be beside a database that is not its own.
    _move(data / (DATABASE + _LOG), kept.with_name(kept.name + _LOG))
    (data / (DATABASE + _SHARED_MEMORY)).unlink(missing_ok=True)
    _move(data / DATABASE, kept)
    sync_directory(data)
    rebuilt.rename(data / DATABASE)
    sync_directory(data)
    return kept if kept.exists() else None


def _move(source: Path, target: Path) -> None:
    if source.exists():
        source.rename(target)
