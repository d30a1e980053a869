"""What a node knows to be wrong with its disk: the `fault` of its lease answers and summaries.

Owned by `StorageNode`.  Placement must tell a directory that an operator has to put right (not
mounted, another node's) from a disk that has to be replaced: only the second starts a rebuild at
once.  Pure: time is a parameter.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from protocol.clock import Clock
from protocol.errors import DirectoryCorrupt
from storage_node.service_state import Fault

FAILURES_MAX: Final = 3
FAILURES_WINDOW_S: Final = 600.0
"""A disk on which this many writes failed within this time, each after the store was opened anew,
is bad.  One failure may be anything; a full disk does not count."""


class DiskHealth:
    """Collects signs; `fault` sums them up."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._opening = Fault.NONE
        self._failures: deque[float] = deque(maxlen=FAILURES_MAX)

    def opened(self) -> None:
        """The directory is ours, and the store in it was opened."""
        self._opening = Fault.NONE

    def refused(self, error: Exception) -> None:
        """The directory could not be opened because of `error`."""
        corrupt = isinstance(error, DirectoryCorrupt)
        self._opening = Fault.DISK if corrupt else Fault.DIRECTORY

    def write_failed(self, error: Exception) -> None:
        """The store takes no more writes because of `error`."""
        if isinstance(error, DirectoryCorrupt):
            self._failures.append(self._clock.monotonic())

    @property
    def fault(self) -> Fault:
        """The worst of what is known now."""
        since = self._clock.monotonic() - FAILURES_WINDOW_S
        recent = [at for at in self._failures if at >= since]
        if len(recent) >= FAILURES_MAX:
            return Fault.DISK
        return self._opening
