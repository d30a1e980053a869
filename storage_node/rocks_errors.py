"""What an exception of rocksdict means: the one place that reads its text.

rocksdict raises plain `Exception` (and `DbClosedError`) whose text starts with RocksDB's status.
Called by `rocks_store` and `merge`.  An unknown text counts as corruption: that is the answer
which makes others read elsewhere and never makes them call a fragment absent.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.errors import (
    DirectoryCorrupt,
    DirectoryForeign,
    DirectoryInUse,
    HaversackError,
    NodeFull,
    OperatorNeeded,
)
from protocol.messages import ItemStatus


class DiskFailure(enum.Enum):
    """Kinds of failure that callers treat differently."""

    CORRUPT = "corrupt"
    NO_SPACE = "no space"
    LOCKED = "locked"
    IO = "I/O error"
    MISSING = "missing"


def classify(error: BaseException) -> DiskFailure:
    """Read the text of a RocksDB status, or the number of an operating-system error."""
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return DiskFailure.NO_SPACE if full else DiskFailure.IO
    text = str(error)
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return DiskFailure.NO_SPACE
    if "While lock file" in text or "lock hold by current process" in text:
        return DiskFailure.LOCKED
    if text.startswith("IO error"):
        return DiskFailure.IO
    if text.startswith("Invalid argument") and "does not exist" in text:
        return DiskFailure.MISSING
    return DiskFailure.CORRUPT


def read_status(error: BaseException) -> ItemStatus:
    """The answer for one key whose read raised `error`."""
    return ItemStatus.CORRUPT if classify(error) is DiskFailure.CORRUPT else ItemStatus.IO_ERROR


def open_error(error: BaseException, directory: object) -> HaversackError:
    """What opening a store raises when RocksDB raised `error`."""
    details = {"directory": str(directory), "cause": str(error)[:500]}
    match classify(error):
        case DiskFailure.LOCKED:
            return DirectoryInUse(f"another process has {directory} open", details)
        case DiskFailure.NO_SPACE:
            return NodeFull(f"no space to open {directory}: free some, then retry", details)
        case DiskFailure.MISSING:
            return DirectoryForeign(f"{directory} holds no store where one was created", details)
        case DiskFailure.CORRUPT | DiskFailure.IO:
            return DirectoryCorrupt(
                f"{directory} cannot be opened ({error}): set the disk aside, the cell rebuilds "
                "what it held",
                details,
            )


def write_error(error: BaseException, directory: object) -> HaversackError:
    """What a write raises when RocksDB or the operating system raised `error`."""
    details = {"directory": str(directory), "cause": str(error)[:500]}
    if classify(error) is DiskFailure.NO_SPACE:
        return NodeFull(f"the disk of {directory} is full", details)
    return DirectoryCorrupt(
        f"a write to {directory} failed ({error}): no further write until it is opened again",
        details,
    )


@contextmanager
def reading(directory: object) -> Iterator[None]:
    """Turn a failure of a read that concerns no single fragment into `DirectoryCorrupt`."""
    try:
        yield
    except OperatorNeeded:
        raise
    except Exception as error:
        raise DirectoryCorrupt(
            f"{directory} cannot be read ({error})",
            {"directory": str(directory), "cause": str(error)[:500]},
        ) from error
