"""What clients were told: the external record that every verdict rests on.

Written by `chaos/workloads.py` before a request is sent and after its answer arrives; read by
`chaos/checkers.py`.  It shares nothing with the cell.  Three outcomes, never two: an operation
whose answer was lost is UNKNOWN for ever, and counts neither as a success nor as a failure.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from protocol.ids import BlockHash


class Outcome(enum.Enum):
    """What the client knows of an operation."""

    ACKNOWLEDGED = "acknowledged"
    FAILED = "failed"
    """The answer said that nothing was done."""
    UNKNOWN = "unknown"
    """No answer, or an answer that says the outcome is not known; also while it runs."""


class Kind(enum.Enum):
    """Operations that the ledger tells apart.  A batch is one operation per block."""

    PUT = "put"
    GET = "get"
    CHECK = "check"
    COMMIT = "commit"
    DELETE = "delete"
    ENTRY = "entry"


@dataclass(slots=True)
class Operation:
    """One request of one client.  Times are seconds of the engine's clock."""

    number: int
    client: str
    owner: str
    kind: Kind
    started: float
    blocks: tuple[BlockHash, ...] = ()
    """The block of a put or get; the block list of a commit."""
    path: str = ""
    parent_rev: str | None = None
    ended: float = math.inf
    outcome: Outcome = Outcome.UNKNOWN
    error: str = ""
    """Kind of the error, and what it says, for anything but ACKNOWLEDGED."""
    rev: str | None = None
    """The revision that a commit or an entry was answered with; None when there is no entry."""

    @property
    def finished(self) -> bool:
        """The client has its answer, or gave up waiting for it."""
        return self.ended != math.inf


@dataclass(slots=True)
class Attempts:
    """All puts of one block by one owner, by how they ended; `running` ones are unknown too."""

    running: int = 0
    acknowledged: int = 0
    unknown: int = 0
    failed: int = 0

    @property
    def may_have_worked(self) -> bool:
        """Something other than a clean failure happened."""
        return bool(self.running or self.acknowledged or self.unknown)


@dataclass(slots=True)
class BlockStory:
    """All that was attempted with one block."""

    length: int
    first_acknowledged: float | None = None
    attempts: dict[str, Attempts] = field(default_factory=dict)
    """Per owner."""

    @property
    def may_exist(self) -> bool:
        """Some put of somebody did not fail cleanly."""
        return any(attempts.may_have_worked for attempts in self.attempts.values())


class Ledger:
    """Append-only; `now` gives the engine's seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.operations: list[Operation] = []
        self.blocks: dict[BlockHash, BlockStory] = {}

    def begin_put(self, client: str, owner: str, block: BlockHash, length: int) -> Operation:
        """Record a put before its bytes are sent."""
        story = self.blocks.setdefault(block, BlockStory(length))
        story.attempts.setdefault(owner, Attempts()).running += 1
        return self.begin(client, owner, Kind.PUT, blocks=(block,))

    def begin(
        self,
        client: str,
        owner: str,
        kind: Kind,
        *,
        blocks: tuple[BlockHash, ...] = (),
        path: str = "",
        parent_rev: str | None = None,
    ) -> Operation:
        """Record any other operation before its request is sent."""
        number = len(self.operations)
        operation = Operation(number, client, owner, kind, self._now(), blocks, path, parent_rev)
        self.operations.append(operation)
        return operation

    def end(
        self, operation: Operation, outcome: Outcome, *, error: str = "", rev: str | None = None
    ) -> None:
        """Record what the client was told; once per operation."""
        assert not operation.finished
        operation.ended = self._now()
        operation.outcome = outcome
        operation.error = error
        operation.rev = rev
        if operation.kind is Kind.PUT:
            self._end_put(operation)

    def acknowledged_blocks(self) -> list[BlockHash]:
        """Blocks that some client was told are durable, in order of first attempt."""
        return [
            block for block, story in self.blocks.items() if story.first_acknowledged is not None
        ]

    def of_kind(self, *kinds: Kind) -> Iterator[Operation]:
        """Operations of these kinds in order of their start."""
        return (operation for operation in self.operations if operation.kind in kinds)

    def counts(self) -> dict[str, int]:
        """How many operations ended how: `put acknowledged` -> 17."""
        totals: dict[str, int] = {}
        for operation in self.operations:
            name = f"{operation.kind.value} {operation.outcome.value}"
            totals[name] = totals.get(name, 0) + 1
        return dict(sorted(totals.items()))

    def _end_put(self, operation: Operation) -> None:
        (block,) = operation.blocks
        story = self.blocks[block]
        attempts = story.attempts[operation.owner]
        attempts.running -= 1
        match operation.outcome:
            case Outcome.ACKNOWLEDGED:
                attempts.acknowledged += 1
                if story.first_acknowledged is None:
                    story.first_acknowledged = operation.ended
            case Outcome.UNKNOWN:
                attempts.unknown += 1
            case Outcome.FAILED:
                attempts.failed += 1
