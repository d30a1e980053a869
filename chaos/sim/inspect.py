"""Evidence of a simulated cell: rows read past the product's code, records read off the disks.

Called by `chaos/sim/world.py` whenever something is to be judged.  It opens SQLite itself and
parses SQL rows itself, so that a mistake in the product's queries cannot hide one in its rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos.budget import FaultAtlas
from chaos.evidence import References, SlotState, Stripe, Version
from erasure.fragment import parse_expected
from erasure.scheme import Scheme
from protocol.errors import HaversackError
from protocol.ids import BLOCK_HASH_BYTES, BlockHash, NodeId, VolumeId
from storage_node.interface import FragmentKey

ReadDisk = Callable[[NodeId, FragmentKey], bytes | None]
"""The bytes that a disk gives for a key now; None if there are none, or no disk."""


class Inspector:
    """Looks at one simulated cell from outside."""

    def __init__(self, directory: Path, read_disk: ReadDisk, atlas: FaultAtlas) -> None:
        self._cell = _open(directory / "cell.db")
        self._metadata = _open(directory / "metadata.db")
        self._read_disk = read_disk
        self._atlas = atlas

    def close(self) -> None:
        """Release both files."""
        self._cell.close()
        self._metadata.close()

    # -- blocks --------------------------------------------------------------------------------

    def stripe(self, block: BlockHash) -> Stripe | None:
        """One row of the index with everything behind it."""
        row = self._cell.execute(
            "SELECT hash, volume_id, plain_bytes FROM blocks WHERE hash = ?", (bytes(block),)
        ).fetchone()
        return None if row is None else self._stripe(row)

    def stripes(self, *, read_disks: bool = True) -> dict[BlockHash, Stripe]:
        """The whole index; without reading disks, every slot is called intact."""
        rows = self._cell.execute(
            "SELECT hash, volume_id, plain_bytes FROM blocks ORDER BY hash"
        ).fetchall()
        return {BlockHash(row[0]): self._stripe(row, read_disks) for row in rows}

    def node_incarnation(self, node_id: NodeId) -> int:
        """Of the node table, now."""
        row = self._cell.execute(
            "SELECT incarnation FROM nodes WHERE node_id = ?", (str(node_id),)
        ).fetchone()
        return int(row[0])

    def node_states(self) -> dict[NodeId, str]:
        """The cell's opinion of its nodes."""
        rows = self._cell.execute("SELECT node_id, state FROM nodes ORDER BY node_id").fetchall()
        return {NodeId(node_id): state for node_id, state in rows}

    def _stripe(self, row: tuple[bytes, int, int], read_disks: bool = True) -> Stripe:
        block, volume = BlockHash(row[0]), VolumeId(row[1])
        (scheme_name,) = self._cell.execute(
            "SELECT scheme FROM volumes WHERE volume_id = ?", (row[1],)
        ).fetchone()
        scheme = Scheme.parse(scheme_name)
        nodes: list[NodeId | None] = [None] * scheme.n
        for slot, node_id in self._cell.execute(
            "SELECT slot, node_id FROM volume_slots WHERE volume_id = ?", (row[1],)
        ):
            nodes[slot] = None if node_id is None else NodeId(node_id)
        debts = frozenset(
            int(slot)
            for (slot,) in self._cell.execute(
                "SELECT slot FROM debts WHERE volume_id = ? AND hash = ?", (row[1], row[0])
            )
        )
        keys = [FragmentKey(volume, block, slot) for slot in range(scheme.n)]
        slots = (SlotState.INTACT,) * scheme.n
        if read_disks:
            slots = tuple(self._slot(nodes[key.slot], key) for key in keys)
        destroyed = frozenset(key.slot for key in keys if self._took(nodes[key.slot], key, debts))
        return Stripe(block, volume, scheme, row[2], tuple(nodes), slots, debts, destroyed)

    def _took(self, node_id: NodeId | None, key: FragmentKey, debts: frozenset[int]) -> bool:
        """Whether a fault took the fragment: here, or where it lay before its slot was placed anew
        without it, which is a debt."""
        if key.slot in debts and self._atlas.was_destroyed(key):
            return True
        return node_id is not None and self._atlas.is_destroyed(node_id, key)

    def moves(self) -> list[tuple[VolumeId, int, NodeId]]:
        """Slots being made, and where."""
        rows = self._cell.execute("SELECT volume_id, slot, target FROM slot_moves").fetchall()
        return [(VolumeId(volume), slot, NodeId(target)) for volume, slot, target in rows]

    def unrepairable(self) -> list[tuple[VolumeId, BlockHash]]:
        """Blocks that the cell has listed as beyond repair."""
        rows = self._cell.execute("SELECT volume_id, hash FROM unrepairable").fetchall()
        return [(VolumeId(volume), BlockHash(block)) for volume, block in rows]

    def map_version(self) -> int:
        """Of the map of volumes and nodes."""
        (version,) = self._cell.execute("SELECT version FROM map_version").fetchone()
        return int(version)

    def holder(self, volume: VolumeId, slot: int) -> NodeId | None:
        """Whose a slot is."""
        row = self._cell.execute(
            "SELECT node_id FROM volume_slots WHERE volume_id = ? AND slot = ?", (int(volume), slot)
        ).fetchone()
        return None if row is None or row[0] is None else NodeId(row[0])

    def volume_slots(self) -> dict[VolumeId, list[NodeId | None]]:
        """Nodes of the slots of every volume, in slot order."""
        found: dict[VolumeId, list[NodeId | None]] = {}
        for volume, node in self._cell.execute(
            "SELECT volume_id, node_id FROM volume_slots ORDER BY volume_id, slot"
        ):
            found.setdefault(VolumeId(volume), []).append(None if node is None else NodeId(node))
        return found

    def block_volumes(self) -> dict[BlockHash, VolumeId]:
        """Where every block lies."""
        rows = self._cell.execute("SELECT hash, volume_id FROM blocks").fetchall()
        return {BlockHash(block): VolumeId(volume) for block, volume in rows}

    def commits(self) -> int:
        """A number that differs after anybody committed anything to the cell's database."""
        (number,) = self._cell.execute("PRAGMA data_version").fetchone()
        return int(number)

    def stripes_of(self, volume: VolumeId) -> dict[BlockHash, Stripe]:
        """The blocks of one volume."""
        rows = self._cell.execute(
            "SELECT hash, volume_id, plain_bytes FROM blocks WHERE volume_id = ? ORDER BY hash",
            (int(volume),),
        ).fetchall()
        return {BlockHash(row[0]): self._stripe(row) for row in rows}

    def _slot(self, node_id: NodeId | None, key: FragmentKey) -> SlotState:
        record = None if node_id is None else self._read_disk(node_id, key)
        if record is None:
            return SlotState.ABSENT
        try:
            parse_expected(record, key.volume, key.block, key.slot)
        except HaversackError:
            return SlotState.CORRUPT
        return SlotState.INTACT

    # -- metadata ------------------------------------------------------------------------------

    def versions(self) -> list[Version]:
        """Every kept version of every namespace."""
        paths = self._paths()
        found = []
        for entry, rev, current, packed in self._metadata.execute(
            "SELECT v.entry_id, v.id, e.rev = v.id, v.block_list FROM versions v"
            " JOIN entries e ON e.id = v.entry_id ORDER BY v.id"
        ):
            owner, path, live = paths[entry]
            blocks = tuple(
                BlockHash(packed[at : at + BLOCK_HASH_BYTES])
                for at in range(0, len(packed or b""), BLOCK_HASH_BYTES)
            )
            found.append(Version(owner, path, f"{rev:016x}", blocks, live and bool(current)))
        return found

    def references(self) -> list[References]:
        """Every counter."""
        return [
            References(owner, BlockHash(block), count)
            for owner, block, count in self._metadata.execute(
                "SELECT a.name, n.hash, n.count FROM namespace_blocks n"
                " JOIN accounts a ON a.namespace_id = n.namespace_id ORDER BY a.name, n.hash"
            )
        ]

    def _paths(self) -> dict[int, tuple[str, str, bool]]:
        """Entry -> (owner, path, whether it and all above it are live)."""
        owners = {
            namespace: name
            for name, namespace in self._metadata.execute("SELECT name, namespace_id FROM accounts")
        }
        rows = {
            entry: (parent, namespace, name, deleted)
            for entry, parent, namespace, name, deleted in self._metadata.execute(
                "SELECT id, parent_id, namespace_id, name, deleted FROM entries"
            )
        }

        def walk(entry: int) -> Iterator[tuple[str, bool]]:
            parent, _, name, deleted = rows[entry]
            if parent is not None:
                yield from walk(parent)
                yield name, deleted is None

        found = {}
        for entry, (_, namespace, _, _) in rows.items():
            names = list(walk(entry))
            path = "/".join(name for name, _ in names)
            found[entry] = (owners[namespace], path, all(live for _, live in names))
        return found


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
    connection.execute("PRAGMA query_only = ON")
    return connection
