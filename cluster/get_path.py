"""Steps 2 to 7 of the life of a get: find the volume, read, try again if our knowledge was old.

Called by `block_client` with a row of the index.  `stripe_read` does one attempt; this file owns
what surrounds it: the newest map when a slot is not where it should be, the deadline, the report
to repair, and the answer when nothing helps.  May not import Ray or a concrete port.
"""

from __future__ import annotations

import contextlib

from cluster.block_client_settings import FragmentProblem, ReportFragment
from cluster.block_index import BlockRow
from cluster.block_rows import BlockRows
from cluster.stripe_read import Pieces, ReadTools, StripeRead
from cluster.topology import VolumeView
from cluster.volume_map import VolumeMap
from erasure.fragment import Fragment
from protocol.errors import (
    BlockNotFound,
    BlockUnreadable,
    DatabaseBusy,
    HaversackError,
    NeedsRepair,
    NodeUnavailable,
)
from protocol.ids import NodeId, VolumeId

RETRY_FIRST_S = 0.1
"""Pause before a read whose nodes may come back is tried again; doubles, jittered by half."""


class GetPath:
    """Reads blocks one at a time; one per block client."""

    def __init__(
        self, rows: BlockRows, volume_map: VolumeMap, tools: ReadTools, report: ReportFragment
    ) -> None:
        self._rows = rows
        self._map = volume_map
        self._tools = tools
        self._report = report

    async def read(self, row: BlockRow, known: dict[int, Fragment] | None = None) -> Pieces:
        """The plain bytes of a block, in pieces.

        Raises `BlockNotFound` if it has left the index, `BlockUnreadable` when fewer than k good
        fragments answered (`details.slots` says why, slot by slot), `DatabaseBusy` if the volume
        is not cached and the database is away.
        """
        clock, settings = self._tools.clock, self._tools.settings
        deadline = clock.monotonic() + settings.get_s
        await self.freshen_map()
        for attempt in range(settings.get_attempts_max):
            row, volume = await self._volume_of(row)
            lives = self._lives(volume)
            reading = StripeRead(self._tools, row, volume, deadline, known)
            plain = await reading.read()
            await self._report_all(volume, reading.problems)
            if plain is not None:
                return plain
            row, known = await self._row_again(row), None
            await self._map.refresh()
            row, now = await self._volume_of(row)
            if _place(now) != _place(volume) or self._lives(volume) != lives:
                continue
            pause_s = RETRY_FIRST_S * 2.0**attempt * (0.5 + self._tools.rng.random())
            if not reading.may_come_back or clock.monotonic() + pause_s >= deadline:
                break
            await clock.sleep(pause_s)
            await self._map.refresh()
        raise _unreadable(row, volume, reading)

    async def freshen_map(self) -> None:
        """Reads go on with an old map while the database is away."""
        with contextlib.suppress(DatabaseBusy):
            await self._map.refresh(self._tools.settings.map_age_s)

    async def _volume_of(self, row: BlockRow) -> tuple[BlockRow, VolumeView]:
        """Where a block lies.  A volume that is gone was emptied: the block is in another by now.

        Raises `BlockNotFound`, `NeedsRepair`, `DatabaseBusy`.
        """
        try:
            return row, await self._map.volume(row.volume)
        except NeedsRepair:
            row = await self._row_again(row)
            return row, await self._map.volume(row.volume)

    async def _row_again(self, row: BlockRow) -> BlockRow:
        """What the index says now.  Raises `BlockNotFound`."""
        self._rows.forget(row.hash)
        found = (await self._rows.find([row.hash])).get(row.hash)
        if found is None:
            raise BlockNotFound(row.hash)
        return found

    def _lives(self, volume: VolumeView) -> list[tuple[int, str]]:
        """Incarnation and endpoint of each slot's node: a change is a reason to try again."""
        return [self._life(node_id) for node_id in volume.slots]

    def _life(self, node_id: NodeId | None) -> tuple[int, str]:
        if node_id is None:
            return 0, ""
        try:
            view = self._map.node(node_id)
        except NodeUnavailable:
            return 0, ""
        return view.incarnation, view.endpoint

    async def _report_all(self, volume: VolumeView, problems: list[FragmentProblem]) -> None:
        """Tell repair, unless the volume has moved on and our view of it was the problem."""
        if not problems:
            return
        with contextlib.suppress(HaversackError):  # repair looks for itself before it acts
            await self._map.refresh()
            if (await self._map.volume(volume.volume_id)).epoch != volume.epoch:
                return
        for problem in problems:
            self._report(problem)


def _place(volume: VolumeView) -> tuple[VolumeId, int]:
    """Where a volume's fragments are: every change of its slots raises its epoch."""
    return volume.volume_id, volume.epoch


def _unreadable(row: BlockRow, volume: VolumeView, reading: StripeRead) -> BlockUnreadable:
    slots = [
        {
            "slot": slot,
            "node": None if failure.node_id is None else str(failure.node_id),
            "kind": failure.error.kind,
            "why": str(failure.error),
        }
        for slot, failure in sorted(reading.failures.items())
    ]
    good = len(reading.fragments)
    return BlockUnreadable(
        f"block {row.hash}: {good} of {volume.scheme.n} slots of {row.volume} gave a good "
        f"fragment, {volume.scheme.k} are needed; bring the failed nodes back",
        {
            "hash": str(row.hash),
            "volume": str(row.volume),
            "scheme": volume.scheme.name,
            "good": good,
            "needed": volume.scheme.k,
            "slots": slots,
        },
    )
