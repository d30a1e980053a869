"""How close a set of slots is to loss, and whose loss would do it.  Pure.

Used by `why` for a block (with what the nodes said just now) and for a volume (with what the map
says).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.explain.domains import Domain, Level, domains_at
from cluster.topology import NodeView
from erasure.scheme import Scheme
from protocol.ids import NodeId


@dataclass(frozen=True, slots=True)
class Risk:
    """`present` fragments are there, `needed` suffice."""

    present: int
    needed: int
    slots: int
    fatal: tuple[tuple[Domain, int], ...]
    """Domains whose loss alone would leave fewer than needed, with the fragments they hold; the
    smallest level only where a larger one is implied by it."""

    @property
    def spare(self) -> int:
        """Fragments that may still be lost; below zero the block cannot be read now."""
        return self.present - self.needed

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "present": self.present,
            "needed": self.needed,
            "slots": self.slots,
            "spare": self.spare,
            "fatal": [
                {"level": str(domain.level), "name": domain.name, "fragments": fragments}
                for domain, fragments in self.fatal
            ],
        }


def assess(
    scheme: Scheme,
    slots: Sequence[NodeId | None],
    present: Collection[int],
    nodes: Mapping[NodeId, NodeView],
) -> Risk:
    """`present`: slots whose fragment is there."""
    holders = [slots[slot] for slot in sorted(present)]
    members = [nodes[node_id] for node_id in holders if node_id is not None]
    spare = len(holders) - scheme.k
    fatal: list[tuple[Domain, int]] = []
    seen: set[tuple[NodeId, ...]] = set()
    if spare >= 0:
        for level in Level:
            for domain in domains_at(level, members):
                # A rack of one host is the same loss as that host: named once.
                if len(domain.nodes) > spare and domain.nodes not in seen:
                    seen.add(domain.nodes)
                    fatal.append((domain, len(domain.nodes)))
    return Risk(len(holders), scheme.k, scheme.n, tuple(fatal))
