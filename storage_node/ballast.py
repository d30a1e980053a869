"""A file that holds some of the disk back, to be given up when the disk is really full.

The thresholds of `space` keep a node from filling its own disk, but others may write there too.
On a disk without a free byte not even a delete can be logged; giving the ballast up makes room for
deletes and for the merges that free more.  Owned by `RocksStore`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from storage_node.identity import BALLAST_FILE

HOLD_FACTOR: Final = 4
"""Taken (again) when this many times its size is free."""


class Ballast:
    """The ballast of one node directory; `size` zero has none."""

    def __init__(self, directory: Path, size: int) -> None:
        self._path = directory / BALLAST_FILE
        self._size = size

    @property
    def size(self) -> int:
        """Bytes it takes while it is held."""
        return self._size

    @property
    def is_held(self) -> bool:
        """Whether there is something to give up."""
        return bool(self._path.exists())

    def balance(self, free_bytes: int) -> None:
        """Take it on a disk with plenty of room, give it up on one with next to none."""
        if not self._size:
            return
        held = self.is_held
        if held and free_bytes < self._size // HOLD_FACTOR:
            self.give_up()
        elif not held and free_bytes >= HOLD_FACTOR * self._size:
            self._take()

    def give_up(self) -> None:
        """Free its space.  Idempotent."""
        with suppress(OSError):  # a disk that cannot even remove a file says so at the next write
            self._path.unlink(missing_ok=True)

    def _take(self) -> None:
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.posix_fallocate(handle, 0, self._size)
            finally:
                os.close(handle)
        except OSError:  # no room after all, or a file system that cannot: go without
            self.give_up()
