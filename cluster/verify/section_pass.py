"""One section of a pass: read the index, page every node's inventory, compare, look again.

1. `read_section`: rows, volumes, slots, moves and debts of a range of volumes
2. each node's inventory of that range, page by page, into the `SectionIndex`
3. what the index has and no node showed: suspects, looked at again by `Confirmer`
4. what nodes showed and the index does not have: rows of the table of strays
5. deep: every stripe is read on its nodes and compared
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

from cluster.verify.confirm import Confirmer
from cluster.verify.differences import Difference, Suspect, Tally
from cluster.verify.index_scan import SectionRows, VolumeRange, read_section, read_truth
from cluster.verify.lead import Lead
from cluster.verify.node_ports import NodePorts, reason_of
from cluster.verify.section_index import SectionIndex, Stray
from cluster.verify.settings import VerifierSettings
from cluster.verify.stray_rows import StrayRow, count_strays, forget_unseen, save_strays
from protocol.clock import Clock
from protocol.errors import HaversackError
from protocol.ids import NodeId
from storage_node.interface import FragmentKey

T = TypeVar("T")

NODES_AT_ONCE = 4
"""Inventories paged at the same time: an answer is two thirds of a megabyte."""


@dataclass(slots=True)
class SectionResult:
    """What a section adds to its pass, besides the tally."""

    blocks: int = 0
    unlooked: int = 0
    """Slots whose node was not looked at."""
    silent: dict[NodeId, str] = field(default_factory=dict)
    """Nodes that were not looked at completely, and why."""
    strays_left_off: int = 0


class SectionPass:
    """Sections of one pass.  One event loop."""

    def __init__(
        self,
        lead: Lead,
        clock: Clock,
        ports: NodePorts,
        settings: VerifierSettings,
        tally: Tally,
        number: int,
    ) -> None:
        self._lead = lead
        self._clock = clock
        self._ports = ports
        self._settings = settings
        self._tally = tally
        self._number = number
        self._confirmer = Confirmer(lead, clock, ports, tally)

    async def run(self, part: VolumeRange, *, deep: bool) -> SectionResult:
        """Look at one range.  Raises `NotLeader`, `DatabaseBusy`, `UnknownOutcome`."""
        rows = await read_section(self._lead.db, part, self._settings)
        await self._ports.adopt(rows.nodes)
        names = [node.node_id for node in rows.nodes]
        index = SectionIndex(rows.volumes, names, rows.rows, rows.targets)
        index.excuse(rows.owed)
        result = SectionResult(blocks=len(index))
        strays, wrong = await self._look(part, index, names, result)
        looked = [node for node in names if node not in result.silent]
        result.unlooked = index.unlooked(looked)
        suspects = (Suspect(key, node) for key, node in index.missing(looked))
        for batch in _batches(suspects, self._settings.confirm_batch):
            await self._confirmer.confirm(batch)
        for batch in _batches(wrong, self._settings.confirm_batch):
            await self._confirmer.confirm(batch)
        await self._count_lost_rows(rows)
        await self._save(part, index, strays, looked, result)
        if deep:
            await self._read_stripes(index)
        result.silent.update(self._confirmer.silent)
        return result

    # -- steps 2 to 5 --------------------------------------------------------------------------

    async def _look(
        self, part: VolumeRange, index: SectionIndex, nodes: Sequence[NodeId], result: SectionResult
    ) -> tuple[list[Stray], list[Suspect]]:
        """Page every node; a few at a time."""
        turns = asyncio.Semaphore(NODES_AT_ONCE)
        strays: list[Stray] = []
        wrong: list[Suspect] = []

        async def look(node: NodeId) -> None:
            async with turns:
                try:
                    async for page in self._ports.inventory(node, part.after, part.last):
                        match = index.match(node, page.keys, page.lengths)
                        room = self._settings.strays_max - len(strays)
                        strays.extend(match.strays[:room])
                        result.strays_left_off += max(0, len(match.strays) - room)
                        wrong.extend(Suspect(key, node) for key in match.wrong_lengths)
                except HaversackError as error:
                    result.silent[node] = reason_of(error)

        async with asyncio.TaskGroup() as tasks:
            for node in nodes:
                tasks.create_task(look(node))
        return strays, wrong

    async def _count_lost_rows(self, rows: SectionRows) -> None:
        """Rows without a volume, if they are still there."""
        for batch in _batches(rows.lost_rows, self._settings.confirm_batch):
            keys = [FragmentKey(volume, block, 0) for volume, block in batch]
            truth = await self._lead.db.read(partial(read_truth, keys=keys))
            for volume, block in batch:
                row = truth.rows.get(block)
                if row is not None and row.volume == volume and volume not in truth.volumes:
                    self._tally.add(Difference.NO_VOLUME, volume, block, 0)

    async def _save(
        self,
        part: VolumeRange,
        index: SectionIndex,
        strays: Sequence[Stray],
        looked: Sequence[NodeId],
        result: SectionResult,
    ) -> None:
        """Strays that this pass saw; then forget those that it should have seen and did not."""
        now = self._clock.wall()
        room = self._settings.strays_max - await self._lead.db.read(count_strays)
        for batch in _batches(strays, self._settings.confirm_batch):
            rows = [self._row(index, stray, now) for stray in batch]
            added, left_off = await self._lead.write(partial(save_strays, found=rows, room=room))
            room -= added
            result.strays_left_off += left_off
        if result.strays_left_off:
            return  # nobody can tell which of the others are gone
        for node in looked:
            await self._lead.write(
                partial(
                    forget_unseen,
                    node=node,
                    after=part.after,
                    last=part.last,
                    pass_number=self._number,
                )
            )

    def _row(self, index: SectionIndex, stray: Stray, now: float) -> StrayRow:
        if stray.row < 0:
            kind = Difference.ORPHAN
        else:
            kind = Difference.STALE if index.has(stray) else Difference.MISPLACED
        return StrayRow(stray.node, stray.key, kind, stray.length, now, self._number, None)

    async def _read_stripes(self, index: SectionIndex) -> None:
        """Every record of the section, at a bounded rate."""
        step = self._settings.deep_blocks
        for start in range(0, len(index), step):
            stripes = index.blocks(start, start + step)
            began = self._clock.monotonic()
            read_bytes = await self._confirmer.check_stripes(stripes)
            spent_s = self._clock.monotonic() - began
            await self._clock.sleep(
                max(0.0, read_bytes / self._settings.deep_bytes_per_s - spent_s)
            )


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of at most `size`."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
