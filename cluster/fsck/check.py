"""Compare the disks of a stopped cell with its databases: `haversack fsck DIR`.

Writes nothing anywhere below the cell's directory.  Fragments, rows of the block index and debts
are read as three lists in one order (volume, block) and merged, so memory does not grow with the
cell.
"""

from __future__ import annotations

import heapq
import itertools
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from cluster.fsck import cell_file
from cluster.fsck.cell_file import IndexRow, Member, VolumeSlots
from cluster.fsck.disks import Disk, node_directories, opened
from cluster.fsck.report import Kind, NodeReport, Report
from cluster.fsck.rules import Fragment, Health, Standing, Verdict, judge_block
from cluster.fsck.walk import BlockEntries, Entry, Progress, Walk, no_progress
from protocol.errors import DirectoryCorrupt
from protocol.ids import BlockHash, NodeId, VolumeId
from storage_node.offline import OfflineStore

_BATCH_BLOCKS: Final = 512

_Key = tuple[VolumeId, BlockHash]


@dataclass(slots=True)
class _Subject:
    """A block in a volume, as far as any list knows it."""

    volume: VolumeId
    block: BlockHash
    entries: list[Entry] = field(default_factory=list)
    row: IndexRow | None = None
    owed: set[int] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{self.block} in {self.volume}"


class _Line(NamedTuple):
    """What one list says of one block."""

    key: _Key
    said: BlockEntries | IndexRow | int


def check(
    cell_database: Path,
    metadata_database: Path,
    data: Path,
    *,
    deep: bool,
    others: Sequence[Path] = (),
    progress: Progress = no_progress,
) -> Report:
    """Read everything of the cell in `data` and say what differs.

    `deep`: read and check every record, not one of each block.  Raises `FormatUnsupported` for
    what a newer version wrote.
    """
    report = Report(deep)
    with ExitStack() as open_now:
        database = _open_cell(open_now, cell_database, report)
        members = [] if database is None else cell_file.members(database)
        directories = node_directories(data, [*(member.directory for member in members), *others])
        present = [directory for directory in directories if directory.exists()]
        disks = open_now.enter_context(opened(present))
        nodes, stores = _report_disks(report, disks, members, known=database is not None)
        walk = Walk(stores)
        if database is None:
            _count_fragments(walk, nodes, progress)
        else:
            _Comparison(report, walk, database, nodes, progress).run()
            _check_tables(database, report)
        _report_walk(report, walk, nodes)
    _check_metadata(metadata_database, cell_database, report)
    return report


def _open_cell(
    open_now: ExitStack, cell_database: Path, report: Report
) -> sqlite3.Connection | None:
    """The cell's database, if all of it is sound; otherwise the report says why not."""
    try:
        database = open_now.enter_context(cell_file.opened_untouched(cell_database))
        wrong = cell_file.integrity(database)
        report.cluster_id = cell_file.cluster_id(database) if not wrong else ""
    except (DirectoryCorrupt, sqlite3.DatabaseError) as error:
        report.add(Kind.UNREADABLE_DATABASE, f"{cell_database.name}: {error}")
        return None
    for line in wrong:
        report.add(Kind.UNREADABLE_DATABASE, f"{cell_database.name}: {line}")
    return None if wrong else database


def _report_disks(
    report: Report, disks: Sequence[Disk], members: Sequence[Member], *, known: bool
) -> tuple[list[NodeReport], list[OfflineStore]]:
    """A line for every directory; lines and stores of those to be walked.

    A disk of another cell is not: its volumes only have the same numbers.
    """
    expected = {(member.node_id, member.store_id): member for member in members}
    walked: list[tuple[NodeReport, OfflineStore]] = []
    for disk in disks:
        owner = disk.identity
        name = "?" if owner is None else str(owner.node_id)
        line = NodeReport(name, str(disk.directory), not disk.problem, disk.problem)
        report.nodes.append(line)
        if disk.problem:
            report.add(Kind.UNREADABLE_NODE, disk.problem)
        is_ours = owner is not None and (not known or owner.cluster_id == report.cluster_id)
        if disk.store is not None and is_ours:
            walked.append((line, disk.store))
            line.unindexed = disk.store.unindexed
        if owner is None:
            continue
        if expected.pop((owner.node_id, owner.store_id), None) is None and known:
            whose = "of no node of this cell" if is_ours else f"of cell {owner.cluster_id}"
            line.detail = line.detail or whose
            report.add(Kind.FOREIGN_DIRECTORY, f"{disk.directory}: {whose}")
    for member in expected.values():
        line = NodeReport(member.node_id, str(member.directory), False, "its directory is not here")
        report.nodes.append(line)
        report.add(Kind.ABSENT_NODE, f"{member.node_id}: {member.directory}")
    report.nodes.sort(key=lambda line: (line.node, line.directory))
    return [line for line, _ in walked], [store for _, store in walked]


def _report_walk(report: Report, walk: Walk, nodes: Sequence[NodeReport]) -> None:
    for number, (line, bad) in enumerate(zip(nodes, walk.bad, strict=True)):
        line.corrupt = bad[Health.CORRUPT]
        line.no_record = bad[Health.NO_RECORD]
        line.io_errors = bad[Health.IO_ERROR]
        for kind, count in (
            (Kind.CORRUPT, line.corrupt),
            (Kind.NO_RECORD, line.no_record),
            (Kind.IO_ERROR, line.io_errors),
        ):
            if count:
                report.add(kind, f"{line.node}: {count}", count)
        if number in walk.failures:
            line.detail = walk.failures[number]
            report.add(Kind.UNREADABLE_NODE, line.detail)


def _check_tables(database: sqlite3.Connection, report: Report) -> None:
    for relation in cell_file.relations(database):
        kind = Kind.UNKNOWN_VOLUME if relation.loss else Kind.TABLE
        report.add(kind, f"{relation.rows} {relation.what}", relation.rows)


def _check_metadata(path: Path, cell_database: Path, report: Report) -> None:
    cell_is_sound = not report.found[Kind.UNREADABLE_DATABASE]
    try:
        attached = cell_database if cell_is_sound else None
        with cell_file.opened_untouched(path, attached) as database:
            wrong = cell_file.integrity(database)
            for line in wrong:
                report.add(Kind.UNREADABLE_DATABASE, f"{path.name}: {line}")
            if attached is not None and not wrong:
                count = cell_file.dangling_references(database)
                if count:
                    report.add(Kind.DANGLING_REFERENCE, f"{count} blocks of versions", count)
    except DirectoryCorrupt as error:
        report.add(Kind.UNREADABLE_DATABASE, f"{path.name}: {error}")


def _count_fragments(walk: Walk, nodes: Sequence[NodeReport], progress: Progress) -> None:
    """What can be said without an index."""
    done = 0
    for volume in walk.volumes():
        for block in walk.blocks(volume):
            _count(nodes, block.entries)
            done += len(block.entries)
            progress("counted", done, walk.fragments)


def _count(nodes: Sequence[NodeReport], entries: Iterable[Entry]) -> None:
    for entry in entries:
        nodes[entry.node].fragments += 1
        nodes[entry.node].bytes += entry.place.length


class _Comparison:
    """One pass over fragments, index and debts."""

    def __init__(
        self,
        report: Report,
        walk: Walk,
        database: sqlite3.Connection,
        nodes: Sequence[NodeReport],
        progress: Progress,
    ) -> None:
        self._report = report
        self._walk = walk
        self._database = database
        self._nodes = nodes
        self._progress = progress
        self._by_name = {
            store.identity.node_id: number
            for number, store in enumerate(walk.stores)
            if not nodes[number].detail
        }
        self._held: tuple[VolumeId, VolumeSlots | None] | None = None
        self._by_present: Counter[tuple[int, int]] = Counter()

    def run(self) -> None:
        subjects = self._subjects()
        done = 0
        while batch := list(itertools.islice(subjects, _BATCH_BLOCKS)):
            held = [subject for subject in batch if subject.entries]
            looked = self._walk.look(
                [BlockEntries(s.volume, s.block, s.entries) for s in held], deep=self._report.deep
            )
            fragments = {id(s): found for s, found in zip(held, looked, strict=True)}
            for subject in batch:
                self._judge(subject, fragments.get(id(subject), []))
            done += sum(len(subject.entries) for subject in batch)
            self._progress("checked", done, self._walk.fragments)
        self._report.by_present = {
            f"{present}/{n}": count
            for (n, present), count in sorted(self._by_present.items(), reverse=True)
        }

    def _subjects(self) -> Iterator[_Subject]:
        """Every block that any of the three lists names, in order."""
        lines = heapq.merge(
            self._entry_lines(), self._row_lines(), self._debt_lines(), key=lambda line: line.key
        )
        for (volume, block), said in itertools.groupby(lines, key=lambda line: line.key):
            subject = _Subject(volume, block)
            for line in said:
                match line.said:
                    case BlockEntries():
                        subject.entries = line.said.entries
                    case IndexRow():
                        subject.row = line.said
                    case int():
                        subject.owed.add(line.said)
            yield subject

    def _entry_lines(self) -> Iterator[_Line]:
        for volume in self._walk.volumes():
            for block in self._walk.blocks(volume):
                _count(self._nodes, block.entries)
                yield _Line((volume, block.block), block)

    def _row_lines(self) -> Iterator[_Line]:
        for volume, block, row in cell_file.block_rows(self._database):
            yield _Line((volume, block), row)

    def _debt_lines(self) -> Iterator[_Line]:
        for volume, block, slot in cell_file.debt_rows(self._database):
            yield _Line((volume, block), slot)

    def _volume(self, volume: VolumeId) -> VolumeSlots | None:
        if self._held is None or self._held[0] != volume:
            found = cell_file.volume_slots(self._database, volume)
            self._held = volume, found
            self._report.volumes += found is not None
        return self._held[1]

    def _judge(self, subject: _Subject, fragments: Sequence[Fragment]) -> None:
        report = self._report
        if subject.row is None:
            if fragments:
                report.add(Kind.ORPHAN, str(subject), len(fragments))
            return  # a debt without its block is found by the tables
        report.blocks += 1
        volume = self._volume(subject.volume)
        if volume is None:
            return  # found by the tables
        if len(volume.slots) != volume.scheme.n:
            report.add(Kind.TABLE, f"{subject.volume} has rows for {len(volume.slots)} slots")
            return
        slots = [self._node_number(node) for node in volume.slots]
        verdict = judge_block(fragments, slots, frozenset(), volume.scheme.k)
        self._by_present[volume.scheme.n, len(verdict.present)] += 1
        report.indebted_blocks += bool(subject.owed)
        if verdict.standing is not Standing.READABLE:
            report.add(
                Kind.UNREADABLE_BLOCK,
                f"{subject}: {len(verdict.present)} of the {volume.scheme.k} fragments it needs",
            )
        self._compare_slots(subject, verdict)
        seal = verdict.seal
        if verdict.seals > 1:
            report.add(Kind.MIXED_SEALS, str(subject))
        if seal is not None and (seal.stored_bytes, seal.plain_bytes) != subject.row:
            report.add(Kind.WRONG_LENGTHS, f"{subject}: {seal.stored_bytes} bytes stored")

    def _compare_slots(self, subject: _Subject, verdict: Verdict) -> None:
        for slot, reason in verdict.owed:
            known = slot in subject.owed
            kind = Kind.OWED if known else Kind.MISSING
            self._report.add(kind, f"slot {slot} of {subject}" + ("" if known else f": {reason}"))
        for fragment in verdict.misplaced:
            kind = Kind.STALE_COPY if fragment.slot in verdict.present else Kind.MISPLACED
            name = self._walk.stores[fragment.node].identity.node_id
            self._report.add(kind, f"slot {fragment.slot} of {subject} on {name}")

    def _node_number(self, node: NodeId | None) -> int | None:
        return None if node is None else self._by_name.get(node)
