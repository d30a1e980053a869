"""May this store still be written to, and what a failed write means for the next one.

Around every write of `RocksStore` and of its upkeep.  After a failed sync every later write of
RocksDB fails as well, and what reached the disk is known again only after an open: the store says
so itself and refuses.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import NodeFull, NodeRefuses
from storage_node.ballast import Ballast
from storage_node.rocks_errors import DiskFailure, classify, write_error
from storage_node.rocks_options import StoreOptions


class WriteGuard:
    """The lock, the ballast and the first failure of one open store."""

    def __init__(self, directory: Path, options: StoreOptions) -> None:
        self.lock = threading.Lock()  # a put and a merge both change the totals
        self.failure: str | None = None
        self.closed = False
        self._directory = directory
        self._options = options
        self._ballast = Ballast(directory, options.ballast_bytes)

    def balance(self) -> None:
        """Hold the ballast if there is room for it, give it up if there is not."""
        self._ballast.balance(self._options.free_bytes(self._directory))

    def make_room(self) -> None:
        """Before a write that must succeed on a full disk."""
        if self._ballast.is_held:
            self.balance()

    def check_writable(self) -> None:
        """Raises `NodeRefuses` once the store is closed, or a write failed."""
        if self.closed:
            raise NodeRefuses(f"{self._directory} is closed")
        if self.failure is not None:
            raise NodeRefuses(
                f"{self._directory} takes no writes until it is opened again: {self.failure}",
                {"directory": str(self._directory)},
            )

    @contextmanager
    def writing(self, doing: str) -> Iterator[None]:
        """After any failure in here the store takes no further write: RocksDB would not either,
        and what reached the disk is known again only after an open."""
        try:
            yield
        except NodeFull:
            raise  # before anything was changed
        except Exception as error:
            if classify(error) is DiskFailure.NO_SPACE:
                self._ballast.give_up()  # so that the store can be opened again, and deletes work
            self.failure = f"{doing} failed: {error}"
            raise write_error(error, self._directory) from error
