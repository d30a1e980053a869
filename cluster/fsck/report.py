"""What a check found, as values: the JSON of `haversack fsck --json` and the source of its table.

Filled in by `check`; printed by `cli.fsck`.  Pure.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Final

EXAMPLES_MAX: Final = 10
"""Named of each kind; all are counted."""


class Kind(enum.StrEnum):
    """Differences.  The values are printed and scripts may match them: append-only."""

    UNREADABLE_BLOCK = "unreadable block"
    """Fewer than k fragments of one seal are where the map says."""
    UNKNOWN_VOLUME = "block in an unknown volume"
    UNREADABLE_NODE = "unreadable node directory"
    UNREADABLE_DATABASE = "unreadable database"
    DANGLING_REFERENCE = "reference to an unknown block"
    OWED = "owed fragment"
    """Not there, and the index knows it: a debt."""
    MISSING = "missing fragment"
    """Not there, or bad, and the index does not know it."""
    CORRUPT = "corrupt record"
    NO_RECORD = "index entry without a record"
    IO_ERROR = "unreadable record"
    MIXED_SEALS = "block with fragments of two seals"
    WRONG_LENGTHS = "block whose lengths the index has wrong"
    ORPHAN = "orphan"
    """A fragment whose block the index has in no such volume."""
    MISPLACED = "misplaced fragment"
    """On a node that does not hold its slot, while the holder lacks it."""
    STALE_COPY = "stale copy"
    """On a node that does not hold its slot any more; the holder has its own."""
    ABSENT_NODE = "node without a directory"
    FOREIGN_DIRECTORY = "directory of no node of this cell"
    TABLE = "rows that refer to nothing"


LOSSES: Final = frozenset(
    {
        Kind.UNREADABLE_BLOCK,
        Kind.UNKNOWN_VOLUME,
        Kind.UNREADABLE_NODE,
        Kind.UNREADABLE_DATABASE,
        Kind.DANGLING_REFERENCE,
        Kind.IO_ERROR,
    }
)
"""Something cannot be read."""


@dataclass(slots=True)
class NodeReport:
    """One node directory."""

    node: str
    directory: str
    opened: bool
    detail: str = ""
    fragments: int = 0
    """Index entries."""
    bytes: int = 0
    """Their records' lengths."""
    corrupt: int = 0
    no_record: int = 0
    io_errors: int = 0
    unindexed: int = 0
    """Records that the node's next start indexes again, counted above."""


@dataclass(slots=True)
class Report:
    """All of it."""

    deep: bool
    cluster_id: str = ""
    nodes: list[NodeReport] = field(default_factory=list)
    volumes: int = 0
    blocks: int = 0
    by_present: dict[str, int] = field(default_factory=dict)
    """Blocks by `fragments present/fragments of the scheme`, as in `9/9`."""
    indebted_blocks: int = 0
    """Blocks with debts."""
    found: Counter[Kind] = field(default_factory=Counter)
    examples: dict[Kind, list[str]] = field(default_factory=dict)

    def add(self, kind: Kind, example: str, count: int = 1) -> None:
        """Count a difference; the first few are kept by name."""
        self.found[kind] += count
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES_MAX:
            examples.append(example)

    @property
    def losses(self) -> int:
        """How much cannot be read."""
        return sum(count for kind, count in self.found.items() if kind in LOSSES)

    @property
    def clean(self) -> bool:
        """Whether nothing differs at all."""
        return not self.found.total()

    def as_json(self) -> dict[str, Any]:
        """Plain values, kinds by their names."""
        plain = asdict(self)
        plain["found"] = {kind.value: count for kind, count in sorted(self.found.items())}
        plain["examples"] = {kind.value: names for kind, names in sorted(self.examples.items())}
        plain["losses"] = self.losses
        plain["clean"] = self.clean
        return plain
