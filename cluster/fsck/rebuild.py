"""Make `cell.db` again from node directories alone: `haversack fsck DIR --rebuild-index`.

    open the directories -> per volume: scheme, who holds each slot, then every block
      -> settle blocks found twice -> check the new file -> put it in place (`switch`)

Each volume is walked twice, so that nothing is kept of it in memory: once to count who claims its
slots, once to judge its blocks.  What the disks cannot say, and what follows, is in
`docs/design/019-fsck.md`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from cluster.fsck import switch
from cluster.fsck.disks import Disk, node_directories, opened
from cluster.fsck.new_index import CellIdentity, FoundBlock, NewIndex, Written
from cluster.fsck.report import EXAMPLES_MAX
from cluster.fsck.rules import Standing, judge_block
from cluster.fsck.walk import Progress, Walk, in_batches, no_progress
from cluster.topology import NodeState, NodeView
from erasure.scheme import Scheme, SchemeKind
from protocol.errors import ConfigInvalid
from protocol.ids import NodeId, VolumeId
from storage_node.host import file_system_bytes
from storage_node.identity import IDENTITY_FILE

NUMBERS_AHEAD: Final = 1_000
"""How far epochs, volume numbers and incarnations of a rebuilt cell lie beyond all that were seen:
a disk that is away now may have seen a few more."""


class Place(NamedTuple):
    """Where a node stands."""

    host: str
    rack: str
    weight: float


@dataclass(frozen=True, slots=True)
class RebuildRequest:
    """What an operator asks for."""

    data: Path
    now: float
    """Wall-clock seconds; the blocks' age counts from here."""
    place_of: Mapping[str, Place]
    """By node name, for every node that has a label."""
    default_place: Place
    scheme: Scheme | None = None
    """The cell's; by the youngest erasure-coded volume if None."""
    deep: bool = False
    others: Sequence[Path] = ()


@dataclass(slots=True)
class Rebuilt:
    """What was made, and what could not be decided."""

    cluster_id: str
    scheme: str
    nodes: int
    volumes: int
    blocks: int
    debts: int
    unreadable: int
    """Blocks that are in the index with fewer fragments seen than they need."""
    vacant_slots: int
    kept: str
    """Where the old database is; empty if there was none."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was left out or decided, by kind."""
    examples: dict[str, list[str]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class _Notes:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        self.counts[kind] += count
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES_MAX:
            examples.append(example)


def rebuild(request: RebuildRequest, progress: Progress = no_progress) -> Rebuilt:
    """Write a new index, check it, and put it in place; the old one is kept beside it.

    Until the last step nothing of the old state is touched.  The caller holds the directory's lock.
    Raises `ConfigInvalid` where only a person can decide, `DirectoryCorrupt` if the new file does
    not read back, `FormatUnsupported` for what a newer version wrote.
    """
    switch.finish(request.data)  # of an earlier rebuild; it is kept beside the new one
    notes = _Notes()
    with opened(node_directories(request.data, request.others)) as disks:
        cluster_id = _agree(disks, notes)
        stores = [disk.store for disk in disks if disk.store is not None]
        walk = Walk(stores)
        nodes = [_node_view(request, disk) for disk in disks if disk.identity is not None]
        index = NewIndex(request.data / switch.REBUILDING, nodes, request.now)
        try:
            scheme = _Volumes(request, walk, index, notes, progress).run()
            created = min(
                (disk.directory / IDENTITY_FILE).stat().st_mtime
                for disk in disks
                if disk.identity is not None
            )
            seen = [volume for epochs in walk.epochs for volume in epochs]
            next_volume = VolumeId(max([*seen, *walk.record_epochs], default=0) + NUMBERS_AHEAD)
            progress("settling", walk.fragments, walk.fragments)
            written = index.complete(CellIdentity(cluster_id, scheme, created), next_volume)
        except BaseException:
            index.close()
            index.discard()
            raise
        for node, message in walk.failures.items():
            notes.add("node index read in part", f"{stores[node].identity.node_id}: {message}")
    kept = switch.commit(request.data)
    return _rebuilt(cluster_id, scheme, len(nodes), written, kept, notes)


def _rebuilt(
    cluster_id: str, scheme: Scheme, nodes: int, written: Written, kept: Path | None, notes: _Notes
) -> Rebuilt:
    if written.elsewhere:
        notes.add(
            "block in two volumes: the copies with fewer fragments are strays now",
            f"{written.elsewhere} in all",
            written.elsewhere,
        )
    return Rebuilt(
        cluster_id,
        scheme.name,
        nodes,
        written.volumes,
        written.blocks,
        written.debts,
        written.unreadable,
        written.vacant_slots,
        "" if kept is None else str(kept),
        notes.counts,
        notes.examples,
    )


def _agree(disks: Sequence[Disk], notes: _Notes) -> str:
    """The one cell that all directories belong to.  Raises `ConfigInvalid`."""
    owners = [disk.identity for disk in disks if disk.identity is not None]
    clusters = sorted({owner.cluster_id for owner in owners})
    if len(clusters) != 1:
        raise ConfigInvalid(
            f"the directories belong to {len(clusters)} cells ({', '.join(clusters) or 'none'}): "
            "leave those of one cell"
        )
    names = Counter(str(owner.node_id) for owner in owners)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ConfigInvalid(
            f"two directories say that they are {twice[0]}: leave the one that was in use last",
            {"node": twice[0]},
        )
    for disk in disks:
        if disk.problem:
            notes.add("directory that cannot be read", disk.problem)
    return clusters[0]


def _node_view(request: RebuildRequest, disk: Disk) -> NodeView:
    """As a stopped cell has it; a node that does not come up is lost, then out, by itself."""
    assert disk.identity is not None
    name = disk.identity.node_id
    place = request.place_of.get(name, request.default_place)
    store = disk.store
    capacity = file_system_bytes(disk.directory)
    return NodeView(
        node_id=name,
        store_id=disk.identity.store_id,
        directory=str(disk.directory.absolute()),
        host=place.host,
        rack=place.rack,
        weight=place.weight,
        state=NodeState.SUSPECT,
        state_since=request.now,
        incarnation=0 if store is None else store.node_state().incarnation + NUMBERS_AHEAD,
        endpoint="",
        pid=0,
        capacity_bytes=capacity,
        free_bytes=capacity,
        used_bytes=0 if store is None else store.totals.fragment_bytes,
        fragments=0 if store is None else store.totals.fragments,
        detail="the index was rebuilt",
    )


class _Volumes:
    """Fills a new index, volume by volume."""

    def __init__(
        self,
        request: RebuildRequest,
        walk: Walk,
        index: NewIndex,
        notes: _Notes,
        progress: Progress,
    ) -> None:
        self._request = request
        self._walk = walk
        self._index = index
        self._notes = notes
        self._progress = progress
        self._names: list[NodeId] = [store.identity.node_id for store in walk.stores]
        self._done = 0

    def run(self) -> Scheme:
        """All volumes; the cell's scheme.  Raises `ConfigInvalid` if that cannot be told."""
        youngest: Scheme | None = None
        replicas: set[Scheme] = set()
        for volume in self._walk.volumes():
            scheme = self._walk.scheme_of(volume)
            if scheme is None:
                self._notes.add("volume without one intact fragment: left out", str(volume))
                continue
            if scheme.kind is SchemeKind.RS:
                youngest = scheme
            else:
                replicas.add(scheme)
            self._add(volume, scheme)
        return self._request.scheme or youngest or _ask(replicas)

    def _add(self, volume: VolumeId, scheme: Scheme) -> None:
        holders = self._walk.holders(volume, scheme)
        for claim in holders.rejected:
            self._notes.add(
                "claim to a slot that is another node's: its fragments are strays now",
                f"slot {claim.slot} of {volume} on {self._names[claim.node]}: {claim.held} "
                f"fragments, epoch {claim.epoch}; it is {self._name(holders.slots[claim.slot])}'s",
            )
        for batch in in_batches(self._walk.blocks(volume)):
            self._index.add_blocks(volume, self._judged(volume, scheme, holders.slots, batch))
            self._done += sum(len(block.entries) for block in batch)
            self._progress("read", self._done, self._walk.fragments)
        epochs = (known.get(volume, 0) for known in (*self._walk.epochs, self._walk.record_epochs))
        self._index.add_volume(
            volume, scheme, max(epochs) + NUMBERS_AHEAD, [self._name(n) for n in holders.slots]
        )

    def _judged(
        self, volume: VolumeId, scheme: Scheme, slots: Sequence[int | None], batch: Sequence[Any]
    ) -> Iterator[FoundBlock]:
        unaccounted = self._walk.unaccounted(volume, slots)
        looked = self._walk.look(batch, deep=self._request.deep)
        for block, fragments in zip(batch, looked, strict=True):
            verdict = judge_block(fragments, slots, unaccounted, scheme.k)
            name = f"{block.block} in {volume}"
            if verdict.standing is Standing.INCOMPLETE:
                self._notes.add(
                    "block with too few fragments, whatever comes back: left out",
                    f"{name}: {len(fragments)} of {scheme.k}",
                )
                continue
            if verdict.seal is None:
                self._notes.add("block without one intact fragment: left out", name)
                continue
            if verdict.seals > 1:
                self._notes.add("block with fragments of two seals", name)
            if verdict.standing is Standing.UNREADABLE:
                self._notes.add(
                    "block with too few fragments for now: kept",
                    f"{name}: {len(verdict.present)} of {scheme.k}",
                )
            yield FoundBlock(
                block.block,
                verdict.seal.stored_bytes,
                verdict.seal.plain_bytes,
                verdict.standing is Standing.READABLE,
                len(verdict.present) - scheme.k,
                tuple((slot, reason.value) for slot, reason in verdict.owed),
            )

    def _name(self, node: int | None) -> NodeId | None:
        return None if node is None else self._names[node]


def _ask(replicas: set[Scheme]) -> Scheme:
    known = ", ".join(sorted(scheme.name for scheme in replicas)) or "none"
    raise ConfigInvalid(
        f"the disks do not say which scheme large blocks get (volumes of small ones: {known}): "
        "give it with --scheme, as the cell was started with"
    )
