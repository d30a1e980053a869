"""What the verifier can find, and the sums it keeps: pure data.

Imports nothing that does I/O.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from cluster.debts import DebtReason
from protocol.ids import BlockHash, NodeId, VolumeId
from storage_node.interface import FragmentKey


class Difference(enum.StrEnum):
    """One class of disagreement between the block index and the disks.  The values are stored."""

    MISSING = "missing"
    """The slot's node looked completely and has no fragment; no debt says so."""
    WRONG_LENGTH = "wrong length"
    """A whole fragment, of another length than the index row and the scheme give."""
    WRONG_BYTES = "wrong bytes"
    """It fails a checksum, or is another fragment than its key says."""
    OTHER_STRIPE = "other stripe"
    """A whole fragment of another seal of the block than most of its stripe."""
    UNREADABLE = "unreadable"
    """The disk answers with an error."""
    UNSETTLED = "unsettled"
    """The fragments of a block disagree and no seal has enough of them: nobody can say which is
    wrong without the bytes."""
    NO_VOLUME = "no volume"
    """A row of the index names a volume that the table does not have."""
    MISPLACED = "misplaced"
    """On a node that does not hold the slot, and the slot's holder has none."""
    STALE = "stale copy"
    """On a node that does not hold the slot any more; the holder has it."""
    ORPHAN = "orphan"
    """The index has no such block in that volume, or the volume no such slot."""
    YOUNG = "too young to tell"
    """As an orphan, but a put that is under way may still write its row.  Never stored as a
    stray's class."""


STRAYS: Final = (Difference.MISPLACED, Difference.STALE, Difference.ORPHAN, Difference.YOUNG)
"""Fragments in no row's slot: they are kept in the table of strays, and counted last."""

DEBT_REASONS: Final = {
    Difference.MISSING: DebtReason.MISSING,
    Difference.WRONG_BYTES: DebtReason.CORRUPT,
    Difference.UNREADABLE: DebtReason.UNREADABLE,
    # Only the stripe's other fragments show that these are wrong: a node believes in them.
    Difference.WRONG_LENGTH: DebtReason.LYING,
    Difference.OTHER_STRIPE: DebtReason.LYING,
}
"""What repair has to mend."""


class Suspect(NamedTuple):
    """A fragment that may differ: what was seen is looked at again before it counts."""

    key: FragmentKey
    node: NodeId


class Finding(NamedTuple):
    """A confirmed difference in a slot."""

    difference: Difference
    key: FragmentKey
    node: NodeId | None


@dataclass(slots=True)
class Tally:
    """Counts and bounded examples of one pass."""

    examples_max: int
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(
        self, difference: Difference, volume: VolumeId, block: BlockHash, slot: int, node: str = ""
    ) -> None:
        """Count one; keep it if there are few."""
        self.counts[difference] += 1
        kept = self.examples.setdefault(difference.value, [])
        if len(kept) < self.examples_max:
            kept.append({"block": str(block), "volume": str(volume), "slot": slot, "node": node})

    def add_finding(self, finding: Finding) -> None:
        """Count a confirmed difference."""
        key = finding.key
        self.add(finding.difference, key.volume, key.block, key.slot, finding.node or "")

    def clear(self, differences: tuple[Difference, ...]) -> None:
        """Forget some classes: they are counted anew."""
        for difference in differences:
            self.counts.pop(difference, None)
            self.examples.pop(difference.value, None)

    def to_json(self) -> dict[str, Any]:
        """`{"missing": {"count", "examples"}, ...}`: classes without any are there with zero."""
        return {
            kind.value: {
                "count": self.counts.get(kind, 0),
                "examples": self.examples.get(kind.value, []),
            }
            for kind in Difference
        }

    @classmethod
    def from_json(cls, body: dict[str, Any], examples_max: int) -> Tally:
        """Inverse of `to_json`."""
        tally = cls(examples_max)
        for name, entry in body.items():
            if entry["count"]:
                tally.counts[Difference(name)] = entry["count"]
                tally.examples[name] = list(entry["examples"])
        return tally
