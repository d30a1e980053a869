"""Who may still write to a filling disk: clients stop first, then repair, deletes never.

Used by both stores at each put and for summaries; placement stops earlier still, by the same
numbers.  Pure.

    0 %            85 %               90 %             95 %           100 %
    |  new volumes  |  puts of clients |  puts of repair | deletes, node state, merges
    +---------------+------------------+-----------------+--------------------------->

The shares are of the node's capacity: what it holds and what it may still take.  On a disk of its
own that is the disk; on one that it shares it is what the others leave to it.  A cell that stopped
repairing when its clients stopped could not heal any more once it is full, and one that could not
delete would stay full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from protocol.limits import CLIENT_SPACE_SHARE, PLACEMENT_SPACE_SHARE, REPAIR_SPACE_SHARE
from protocol.messages import PutPurpose


@dataclass(frozen=True, slots=True)
class SpaceShares:
    """Shares of a node's capacity up to which it takes what is asked of it."""

    placement: float = PLACEMENT_SPACE_SHARE
    client: float = CLIENT_SPACE_SHARE
    repair: float = REPAIR_SPACE_SHARE

    def __post_init__(self) -> None:
        assert 0 < self.placement <= self.client <= self.repair <= 1, self


class Space(NamedTuple):
    """Bytes of one node, as of now.  What is free is never negative."""

    capacity_bytes: int
    used_bytes: int
    placement_free_bytes: int
    client_free_bytes: int
    repair_free_bytes: int

    def free_for(self, purpose: PutPurpose) -> int:
        """What puts of this purpose may still take."""
        return self.repair_free_bytes if purpose is PutPurpose.REPAIR else self.client_free_bytes

    @property
    def is_short(self) -> bool:
        """Above where placement stops: space of deleted records is wanted back now."""
        return self.placement_free_bytes == 0


def space_of(
    used_bytes: int,
    disk_free_bytes: int,
    limit_bytes: int | None,
    reserve_bytes: int,
    shares: SpaceShares,
) -> Space:
    """Space of a node that holds `used_bytes` on a disk with `disk_free_bytes` left.

    `limit_bytes` bounds the capacity, `reserve_bytes` of the disk are left alone whatever the
    shares say: merges and deletes need room of an absolute size.
    """
    capacity = used_bytes + disk_free_bytes
    if limit_bytes is not None:
        capacity = min(capacity, limit_bytes)
    left = disk_free_bytes - reserve_bytes

    def free(share: float) -> int:
        return max(0, min(int(capacity * share) - used_bytes, left))

    return Space(
        capacity, used_bytes, free(shares.placement), free(shares.client), free(shares.repair)
    )
