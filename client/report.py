"""What a transfer is asked to do, how far it is, and what became of it.

Shapes only: used by `client.upload`, `client.download`, `client.transfer` and `cli`.  May import
`protocol`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.errors import (
    CorruptReply,
    FileChanged,
    Forbidden,
    HaversackError,
    LocalFileError,
    RetryLater,
    Unauthenticated,
    UnknownOutcome,
)
from protocol.limits import BLOCK_BYTES_MAX, MIB


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """Bounds of one transfer, and what to do about what stands in the way."""

    memory_bytes_max: int = 64 * MIB
    """Block bytes held at any time; bodies under way are copies of some of them."""
    parallel: int = 8
    """Requests with block bodies under way."""
    read_attempts_max: int = 3
    """How often a file that changes while it is read is started over."""
    overwrite: bool = False
    """Downloads only: replace local files and symlinks that differ."""

    def __post_init__(self) -> None:
        assert self.memory_bytes_max >= 2 * BLOCK_BYTES_MAX
        assert self.parallel >= 1
        assert self.read_attempts_max >= 1


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """One path that could not be transferred, and why."""

    path: str
    error: HaversackError


@dataclass(frozen=True, slots=True)
class ItemNote:
    """One path that was left out on purpose: a device, a FIFO, a socket."""

    path: str
    reason: str


@dataclass(slots=True)
class Counters:
    """How far a transfer is; only ever grows, apart from the totals."""

    files_total: int = 0
    bytes_total: int = 0
    files_done: int = 0
    """Committed, or found unchanged."""
    files_unchanged: int = 0
    bytes_done: int = 0
    """Plain bytes of content accounted for, whether they had to travel or not."""
    bytes_moved: int = 0
    """Content bytes sent or received: blocks and inline content, without HTTP around them."""
    blocks_new: int = 0
    blocks_deduplicated: int = 0
    symlinks_done: int = 0
    folders_done: int = 0


Progress = Callable[[Counters], None]
"""Called often, from the event loop; must return at once."""


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What became of a transfer."""

    counters: Counters
    failures: tuple[ItemFailure, ...]
    notes: tuple[ItemNote, ...]
    stopped: HaversackError | None
    """The error that made going on pointless; items not reached are in no list."""
    seconds: float

    @property
    def complete(self) -> bool:
        """Everything that was planned is done."""
        return self.stopped is None and not self.failures


@dataclass(slots=True)
class Ledger:
    """The report while it is being written."""

    progress: Progress | None = None
    counters: Counters = field(default_factory=Counters)
    failures: list[ItemFailure] = field(default_factory=list)

    def fail(self, path: str, error: HaversackError) -> None:
        """Note a failed item."""
        self.failures.append(ItemFailure(path, error))
        self.changed()

    def changed(self) -> None:
        """Tell whoever watches."""
        if self.progress is not None:
            self.progress(self.counters)


def stops(error: HaversackError) -> bool:
    """Whether the next item would only meet the same error, the retries of this one being spent."""
    if isinstance(error, CorruptReply | FileChanged):
        return False
    return isinstance(error, RetryLater | UnknownOutcome | Unauthenticated | Forbidden)


def local_error(path: str, error: OSError) -> LocalFileError:
    """A refusal of the local file system, in words."""
    reason = error.strerror or type(error).__name__
    return LocalFileError(f"{reason}: {path!r}", {"errno": error.errno})
