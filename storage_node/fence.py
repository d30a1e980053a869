"""The fence of a node: may it take this write, and may it still acknowledge it?

Asked by `StorageNode` at the first and the last step of every put and delete, and when placement
renews a lease.  Placement grants a lease for an *incarnation*; the node adopts a higher one
durably and refuses lower ones, and acknowledges no write once its lease ran out, by its own
monotonic clock.  Per volume it remembers the highest epoch it has seen and refuses records of
older ones.

Pure but for `write_epochs` and `adopt`, which write node state and run where the store's writes do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from protocol.clock import Clock
from protocol.errors import NodeRefuses, StaleIncarnation, UnknownOutcome
from protocol.ids import NodeId, VolumeId
from storage_node.interface import FragmentStore

_EPOCHS_CACHED_MAX: Final = 65_536
_INCARNATION = "incarnation"


class Fence:
    """Incarnation, lease and volume epochs of one node, as far as they are in memory."""

    def __init__(self, node_id: NodeId, clock: Clock) -> None:
        self._node_id = node_id
        self._clock = clock
        self._incarnation = 0
        self._lease_until = float("-inf")
        self._epochs: dict[VolumeId, int] = {}
        self._unwritten: dict[VolumeId, int] = {}

    @property
    def incarnation(self) -> int:
        return self._incarnation

    @property
    def has_lease(self) -> bool:
        return self._clock.monotonic() < self._lease_until

    def opened(self, store: FragmentStore) -> None:
        """Begin with what `store` has written down.  A lease from before does not carry over."""
        written = store.get_state(_INCARNATION)
        self._incarnation = _number(written)
        self.end_lease()
        self._epochs.clear()
        self._unwritten.clear()

    # -- writes ----------------------------------------------------------------------------

    def admit_write(self, incarnation: int) -> None:
        """Raises `StaleIncarnation`, or `NodeRefuses` without a live lease."""
        if incarnation != self._incarnation:
            raise StaleIncarnation(
                f"{self._node_id} lives its incarnation {self._incarnation}, the request was meant "
                f"for {incarnation}",
                {"node": self._node_id, "incarnation": self._incarnation},
            )
        if not self.has_lease:
            raise NodeRefuses(
                f"{self._node_id} has no live lease: it takes no writes", {"node": self._node_id}
            )

    def admit_answer(self, incarnation: int) -> None:
        """The write is durable; may it still be acknowledged?  Raises `UnknownOutcome` if not."""
        if incarnation != self._incarnation or not self.has_lease:
            raise UnknownOutcome(
                f"{self._node_id} lost its lease while it was writing", {"node": self._node_id}
            )

    # -- epochs ----------------------------------------------------------------------------

    def epoch_of(self, volume: VolumeId) -> int | None:
        """The highest epoch seen; None if the store has to be asked (`loaded`)."""
        return self._epochs.get(volume)

    def loaded(self, volume: VolumeId, written: bytes | None) -> int:
        """The highest epoch seen, now that the store answered with `written`."""
        if len(self._epochs) >= _EPOCHS_CACHED_MAX:
            self._epochs.clear()
        epoch = max(_number(written), self._unwritten.get(volume, 0))
        return self._epochs.setdefault(volume, epoch)

    def raise_epoch(self, volume: VolumeId, epoch: int) -> None:
        """A record of a newer epoch came: from now on older ones are refused."""
        self._epochs[volume] = self._unwritten[volume] = epoch

    def unwritten_epochs(self) -> dict[VolumeId, int]:
        """Newer epochs than the store has written down."""
        return dict(self._unwritten)

    def wrote_epochs(self, epochs: Mapping[VolumeId, int]) -> None:
        """These are durable."""
        for volume, epoch in epochs.items():
            if self._unwritten.get(volume) == epoch:
                del self._unwritten[volume]

    # -- lease -----------------------------------------------------------------------------

    def admit_lease(self, incarnation: int) -> None:
        """Raises `StaleIncarnation` for one lower than the node lives already."""
        if incarnation < self._incarnation:
            raise StaleIncarnation(
                f"{self._node_id} already lives its incarnation {self._incarnation}",
                {"node": self._node_id, "incarnation": self._incarnation},
            )

    def adopted(self, incarnation: int) -> None:
        """`incarnation` is durable.  Another offer may have overtaken it: the highest counts."""
        if incarnation > self._incarnation:
            self._incarnation = incarnation
            self.end_lease()

    def extend_lease(self, incarnation: int, until: float) -> None:
        """Leased until `until` at least, by the monotonic clock, if that is the life we live."""
        if incarnation == self._incarnation:
            self._lease_until = max(self._lease_until, until)

    def end_lease(self) -> None:
        self._lease_until = float("-inf")


def epoch_name(volume: VolumeId) -> str:
    """Node state under which a volume's epoch is kept."""
    return f"epoch/{volume}"


def write_epochs(store: FragmentStore, epochs: Mapping[VolumeId, int]) -> None:
    """Make epochs durable."""
    if epochs:
        store.put_state(
            {epoch_name(volume): epoch.to_bytes(8, "big") for volume, epoch in epochs.items()}
        )


def adopt(store: FragmentStore, incarnations: Sequence[int]) -> None:
    """The highest ever offered stays durable, in whatever order leases reach the disk."""
    written = store.get_state(_INCARNATION)
    highest = max(incarnations)
    if written is None or highest > _number(written):
        store.put_state({_INCARNATION: highest.to_bytes(8, "big")})


def _number(written: bytes | None) -> int:
    return 0 if written is None else int.from_bytes(written, "big")
