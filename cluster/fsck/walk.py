"""Walk through the fragments of all nodes in key order: volume, block, slot.

Every node lists its index in that order, so merging the lists is all the sorting there is, and
memory is that of one batch of blocks.  Called by `check` and `rebuild`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from cluster.fsck.rules import ClaimCount, Fragment, Health, Holders, Seal
from erasure.fragment import Fragment as Record
from erasure.fragment import parse_expected
from erasure.scheme import Scheme
from protocol.errors import CorruptFragment, DirectoryCorrupt
from protocol.ids import BlockHash, VolumeId
from protocol.limits import MIB
from protocol.messages import ItemStatus
from storage_node.extents import Place
from storage_node.interface import FragmentKey, StoredRecord
from storage_node.offline import OfflineStore

_BATCH_BYTES: Final = 16 * MIB
_BATCH_FRAGMENTS: Final = 4_096
"""Looked at together: what is held in memory, records included."""

_VOLUME_BYTES: Final = 8
_BLOCK_KEY_BYTES: Final = 40

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many fragments are done with, and of how many about."""


def no_progress(_what: str, _done: int, _total: int) -> None:
    """For callers that do not watch."""


class Entry(NamedTuple):
    """An index entry of one node."""

    node: int
    """Position of its store in the walk."""
    key: bytes
    place: Place

    @property
    def slot(self) -> int:
        return self.key[-1]


class BlockEntries(NamedTuple):
    """All index entries for one block in one volume, in (slot, node) order."""

    volume: VolumeId
    block: BlockHash
    entries: list[Entry]


class Walk:
    """The stores of a cell's nodes, and what was found while they were walked."""

    def __init__(self, stores: Sequence[OfflineStore]) -> None:
        self.stores = stores
        self.epochs = [store.node_state().volume_epochs for store in stores]
        self.failures: dict[int, str] = {}
        """Nodes whose index could not be read to the end, and why."""
        self.bad = [Counter[Health]() for _ in stores]
        """Per node: records that were looked for, by what was found, intact ones left out."""
        self.fragments = sum(store.totals.fragments + store.unindexed for store in stores)
        """About how many there are, as the nodes count them."""
        self.record_epochs: dict[VolumeId, int] = {}
        """The highest of the records that were read, by volume."""
        self._torn: set[tuple[int, VolumeId]] = set()

    def volumes(self) -> Iterator[VolumeId]:
        """Every volume of which any node holds an entry, in order."""
        ahead = [self._next_volume(node, VolumeId(0)) for node in range(len(self.stores))]
        while any(found is not None for found in ahead):
            volume = min(found for found in ahead if found is not None)
            yield volume
            for node, found in enumerate(ahead):
                if found == volume:
                    ahead[node] = self._next_volume(node, VolumeId(volume + 1))

    def _next_volume(self, node: int, first: VolumeId) -> VolumeId | None:
        try:
            start = first.to_bytes(_VOLUME_BYTES, "big")
            for key, _ in self.stores[node].places(start):
                return VolumeId(int.from_bytes(key[:_VOLUME_BYTES], "big"))
        except DirectoryCorrupt as error:
            self.failures.setdefault(node, error.message)
            # Part of the index is lost.  The node's list of epochs says where it goes on.
            return min((volume for volume in self.epochs[node] if volume >= first), default=None)
        return None

    def blocks(self, volume: VolumeId) -> Iterator[BlockEntries]:
        """The blocks of one volume in order of their names."""
        merged = heapq.merge(
            *(self._entries(node, volume) for node in range(len(self.stores))),
            key=lambda entry: entry.key,
        )
        for prefix, entries in itertools.groupby(
            merged, key=lambda entry: entry.key[:_BLOCK_KEY_BYTES]
        ):
            yield BlockEntries(volume, BlockHash(prefix[_VOLUME_BYTES:]), list(entries))

    def _entries(self, node: int, volume: VolumeId) -> Iterator[Entry]:
        start = volume.to_bytes(_VOLUME_BYTES, "big")
        stop = VolumeId(volume + 1).to_bytes(_VOLUME_BYTES, "big")
        try:
            for key, place in self.stores[node].places(start, stop):
                yield Entry(node, key, place)
        except DirectoryCorrupt as error:
            self.failures.setdefault(node, error.message)
            self._torn.add((node, volume))

    def holders(self, volume: VolumeId, scheme: Scheme) -> Holders:
        """Who holds each slot, by reading the volume's index entries once, or twice where slots
        are contested."""
        claims = self._counted(volume, ClaimCount(scheme))
        found = claims.holders(self._epoch_of(volume))
        if found.rejected and claims.uncontested:
            claims = self._counted(volume, ClaimCount(scheme, claims.uncontested))
            found = claims.holders(self._epoch_of(volume))
        return found

    def _counted(self, volume: VolumeId, claims: ClaimCount) -> ClaimCount:
        for block in self.blocks(volume):
            claims.add([(entry.slot, entry.node) for entry in block.entries])
        return claims

    def _epoch_of(self, volume: VolumeId) -> Callable[[int], int]:
        return lambda node: self.epochs[node].get(volume, 0)

    def unaccounted(self, volume: VolumeId, slots: Sequence[int | None]) -> frozenset[int]:
        """Slots that nobody can speak for; known once the volume was walked."""
        return frozenset(
            slot for slot, node in enumerate(slots) if node is None or (node, volume) in self._torn
        )

    def scheme_of(self, volume: VolumeId) -> Scheme | None:
        """By the first intact fragment; None if there is none."""
        for block in self.blocks(volume):
            for entry in block.entries:
                (record,) = self.stores[entry.node].read([(entry.key, entry.place)])
                parsed = _parse(entry, record)
                if parsed is not None:
                    return parsed.scheme
        return None

    # -- records -------------------------------------------------------------------------------

    def look(self, blocks: Sequence[BlockEntries], *, deep: bool) -> list[list[Fragment]]:
        """The fragments of some blocks: every record read and checked if `deep`, otherwise one of
        each block, and all of a block whose fragments disagree."""
        wanted = [
            entry for block in blocks for entry in (block.entries if deep else [_pick(block)])
        ]
        read = self._read(wanted)
        if not deep:
            doubtful = [
                entry
                for block in blocks
                if _doubtful(block, read)
                for entry in block.entries
                if entry not in read
            ]
            read |= self._read(doubtful)
        return [
            [
                read.get(entry) or Fragment(entry.slot, entry.node, entry.place.length)
                for entry in block.entries
            ]
            for block in blocks
        ]

    def _read(self, entries: Sequence[Entry]) -> dict[Entry, Fragment]:
        found: dict[Entry, Fragment] = {}
        by_node: dict[int, list[Entry]] = {}
        for entry in entries:
            by_node.setdefault(entry.node, []).append(entry)
        for node, mine in by_node.items():
            for part in _parts(mine, lambda entry: entry.place.length):
                records = self.stores[node].read([(entry.key, entry.place) for entry in part])
                for entry, record in zip(part, records, strict=True):
                    fragment = found[entry] = self._fragment(entry, record)
                    if fragment.health is not Health.INTACT:
                        self.bad[node][fragment.health] += 1
        return found

    def _fragment(self, entry: Entry, record: StoredRecord) -> Fragment:
        length = entry.place.length
        parsed = _parse(entry, record)
        if parsed is None:
            return Fragment(entry.slot, entry.node, length, _health(record.status))
        known = self.record_epochs.get(parsed.volume, 0)
        self.record_epochs[parsed.volume] = max(known, parsed.epoch)
        seal = Seal(parsed.stripe_tag, parsed.stored_length, parsed.plain_length)
        return Fragment(entry.slot, entry.node, length, Health.INTACT, seal)


def in_batches(blocks: Iterable[BlockEntries]) -> Iterator[list[BlockEntries]]:
    """Runs of blocks that are looked at together."""
    batch: list[BlockEntries] = []
    fragments = 0
    for block in blocks:
        batch.append(block)
        fragments += len(block.entries)
        if fragments >= _BATCH_FRAGMENTS:
            yield batch
            batch, fragments = [], 0
    if batch:
        yield batch


def _parts(entries: Sequence[Entry], size: Callable[[Entry], int]) -> Iterator[list[Entry]]:
    """Runs whose records may be held together."""
    part: list[Entry] = []
    held = 0
    for entry in entries:
        if part and held + size(entry) > _BATCH_BYTES:
            yield part
            part, held = [], 0
        part.append(entry)
        held += size(entry)
    if part:
        yield part


def _pick(block: BlockEntries) -> Entry:
    """One entry of a block, spread over slots and so over disks."""
    return block.entries[block.block[-1] % len(block.entries)]


def _doubtful(block: BlockEntries, read: dict[Entry, Fragment]) -> bool:
    lengths = {entry.place.length for entry in block.entries}
    return len(lengths) > 1 or read[_pick(block)].health is not Health.INTACT


def _health(status: ItemStatus) -> Health:
    match status:
        case ItemStatus.NOT_FOUND:
            return Health.NO_RECORD
        case ItemStatus.IO_ERROR:
            return Health.IO_ERROR
        case _:
            return Health.CORRUPT


def _parse(entry: Entry, record: StoredRecord) -> Record | None:
    """A record that is what its key says; None for any other.

    Raises `FormatUnsupported` for a newer version's record: that is no damage, and another program
    must judge it.
    """
    if record.record is None:
        return None
    try:
        return parse_expected(record.record, *FragmentKey.unpack(entry.key))
    except CorruptFragment:
        return None
