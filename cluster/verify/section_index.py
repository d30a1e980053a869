"""One section of the block index in memory, and the merge with what nodes say they hold.

The heart of a pass: pure, no SQL, no ports.  Millions of keys go through it, so it works on whole
pages with numpy; only what differs becomes an object.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.topology import VolumeView
from erasure.fragment import FRAGMENT_HEADER_BYTES
from protocol.ids import BLOCK_HASH_BYTES, BlockHash, NodeId, VolumeId
from protocol.limits import FRAGMENTS_PER_STRIPE_MAX
from storage_node.interface import FragmentKey

_VOLUME_BYTES: Final = 8
_NAME_BYTES: Final = _VOLUME_BYTES + BLOCK_HASH_BYTES
_KEY_BYTES: Final = _NAME_BYTES + 1
_NAME: Final = np.dtype(f"S{_NAME_BYTES}")

_VACANT: Final = -1
_NO_SLOT: Final = -2
_NO_ROW: Final = -3

_OUTSIDE: Final = FRAGMENTS_PER_STRIPE_MAX
"""Column of the holders for slot numbers that no scheme has."""


class IndexRow(NamedTuple):
    """What the section needs of a row of `blocks`."""

    volume: int
    block: bytes
    stored_bytes: int
    live: bool


class Stray(NamedTuple):
    """A fragment in no row's slot, as a page showed it."""

    node: NodeId
    key: FragmentKey
    length: int
    row: int
    """Position of its block in the section; -1 for an orphan."""


class PageMatch(NamedTuple):
    """What one page of one node's inventory showed."""

    strays: list[Stray]
    wrong_lengths: list[FragmentKey]


class SectionIndex:
    """Live rows of some volumes in (volume, block) order, and which of their slots were seen."""

    def __init__(
        self,
        volumes: Sequence[VolumeView],
        nodes: Sequence[NodeId],
        rows: Sequence[IndexRow],
        targets: Iterable[tuple[VolumeId, int, NodeId]] = (),
    ) -> None:
        """`volumes` in id order hold every row's volume.  `targets`: where moves of (volume, slot)
        are making fragments: what lies there is no stray."""
        self._nodes = tuple(nodes)
        self._numbers = {node: number for number, node in enumerate(self._nodes)}
        ids = np.array([int(volume.volume_id) for volume in volumes], np.int64)
        self._k = np.array([volume.scheme.k for volume in volumes] or [1], np.int64)
        self._holders = self._holder_table(volumes)
        self._targets = np.full_like(self._holders, _NO_SLOT)
        for volume_id, slot, node in targets:
            at = int(np.searchsorted(ids, int(volume_id)))
            if at < len(ids) and ids[at] == int(volume_id) and node in self._numbers:
                self._targets[at, slot] = self._numbers[node]
        joined = b"".join(row.volume.to_bytes(_VOLUME_BYTES, "big") + row.block for row in rows)
        names = np.frombuffer(joined, _NAME)
        order = np.argsort(names, kind="stable")
        self._names: npt.NDArray[np.bytes_] = names[order]
        self._stored = np.array([row.stored_bytes for row in rows], np.int64)[order]
        of_volume = np.array([row.volume for row in rows], np.int64)[order]
        self._volume_at = np.searchsorted(ids, of_volume)
        self._live = np.array([row.live for row in rows], np.bool_)[order]
        self._seen = np.zeros(len(rows), np.uint32)
        self._owed = np.zeros(len(rows), np.uint32)

    def _holder_table(self, volumes: Sequence[VolumeView]) -> npt.NDArray[np.int32]:
        """Node number by volume and slot."""
        table = np.full((max(len(volumes), 1), _OUTSIDE + 1), _NO_SLOT, np.int32)
        for at, volume in enumerate(volumes):
            for slot, node in enumerate(volume.slots):
                table[at, slot] = _VACANT if node is None else self._numbers.get(node, _VACANT)
        return table

    def __len__(self) -> int:
        """Blocks of the section."""
        return len(self._names)

    def excuse(self, owed: Iterable[tuple[int, int, bytes]]) -> None:
        """These (volume, slot, block) are known to be missing."""
        keys = list(owed)
        if not keys or not len(self):
            return
        joined = b"".join(
            volume.to_bytes(_VOLUME_BYTES, "big") + block for volume, _, block in keys
        )
        at, known = self._find(np.frombuffer(joined, _NAME))
        bits = np.left_shift(np.uint32(1), np.array([slot for _, slot, _ in keys], np.uint32))
        np.bitwise_or.at(self._owed, at[known], bits[known])

    def match(self, node: NodeId, keys: Sequence[bytes], lengths: Sequence[int]) -> PageMatch:
        """Mark what a page of `node`'s inventory shows, and tell what does not belong.

        `keys` are packed `FragmentKey`s, `lengths` of their records.
        """
        if not keys:
            return PageMatch([], [])
        number = self._numbers[node]
        raw = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY_BYTES)
        names = np.ascontiguousarray(raw[:, :_NAME_BYTES]).view(_NAME).ravel()
        slots = np.minimum(raw[:, _NAME_BYTES], _OUTSIDE).astype(np.uint32)
        at, known = self._find(names)
        if len(self):
            volume_at = self._volume_at[at]
            holders = np.where(known, self._holders[volume_at, slots], _NO_ROW)
            moving = known & (self._targets[volume_at, slots] == number)
        else:
            holders = np.full(len(keys), _NO_ROW)
            moving = known
        mine = holders == number
        rows = at[mine]
        np.bitwise_or.at(self._seen, rows, np.left_shift(np.uint32(1), slots[mine]))
        wrong = np.flatnonzero(mine)[np.asarray(lengths)[mine] != self._record_bytes(rows)]
        found = []
        for position in np.flatnonzero(~mine & ~moving).tolist():
            orphan = holders[position] in (_NO_ROW, _NO_SLOT)
            key = FragmentKey.unpack(keys[position])
            row = -1 if orphan else int(at[position])
            found.append(Stray(node, key, lengths[position], row))
        return PageMatch(found, [FragmentKey.unpack(keys[p]) for p in wrong.tolist()])

    def has(self, stray: Stray) -> bool:
        """Whether the holder of a misplaced fragment's slot was seen to have it."""
        return stray.row >= 0 and bool(int(self._seen[stray.row]) >> stray.key.slot & 1)

    def missing(self, looked: Iterable[NodeId]) -> Iterator[tuple[FragmentKey, NodeId]]:
        """Slots whose node was looked at completely and showed nothing, and that nobody owes."""
        for slot, (holders, absent) in self._absent(looked):
            for row in np.flatnonzero(absent).tolist():
                key = FragmentKey.unpack(self.name(row) + bytes([slot]))
                yield key, self._nodes[int(holders[row])]

    def unlooked(self, looked: Iterable[NodeId]) -> int:
        """Slots of live blocks whose node was not looked at; vacant ones are known to be lost."""
        flags = self._flags(looked)
        if not len(self):
            return 0
        holders = self._holders[self._volume_at][:, :_OUTSIDE]
        silent = (holders >= 0) & ~flags[np.maximum(holders, 0)]
        return int(np.count_nonzero(silent[self._live]))

    def name(self, row: int) -> bytes:
        """Volume and block of a row, packed as in a `FragmentKey`."""
        # numpy cuts trailing zeroes off what it takes for text.
        return bytes(self._names[row]).ljust(_NAME_BYTES, b"\0")

    def blocks(self, start: int, end: int) -> list[tuple[VolumeId, BlockHash]]:
        """Live blocks at these positions."""
        found = []
        for row in range(start, min(end, len(self))):
            if self._live[row]:
                key = FragmentKey.unpack(self.name(row) + b"\0")
                found.append((key.volume, key.block))
        return found

    def _absent(
        self, looked: Iterable[NodeId]
    ) -> Iterator[tuple[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]]:
        flags = self._flags(looked)
        if not len(self):
            return
        for slot in range(_OUTSIDE):
            holders = self._holders[self._volume_at, slot]
            known = ((self._seen | self._owed) >> np.uint32(slot)) & np.uint32(1)
            looked_at = (holders >= 0) & flags[np.maximum(holders, 0)]
            yield slot, (holders, looked_at & self._live & (known == 0))

    def _flags(self, looked: Iterable[NodeId]) -> npt.NDArray[np.bool_]:
        """By node number."""
        wanted = set(looked)
        return np.array([node in wanted for node in self._nodes] or [False], np.bool_)

    def _find(
        self, names: npt.NDArray[np.bytes_]
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
        """Positions of names, and whether each is there."""
        if not len(self):
            return np.zeros(len(names), np.intp), np.zeros(len(names), np.bool_)
        at = np.searchsorted(self._names, names)
        at[at == len(self)] = 0
        return at, self._names[at] == names

    def _record_bytes(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        """Length that each row's scheme gives to a slot's record."""
        if not len(rows):
            return np.zeros(0, np.int64)
        k = self._k[self._volume_at[rows]]
        lengths: npt.NDArray[np.int64] = FRAGMENT_HEADER_BYTES - (-self._stored[rows] // k)
        return lengths
