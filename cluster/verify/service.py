"""The verifier: a pass over the whole cell per period, and whenever somebody asks.

Runs in the process that repairs, under its role.  One step is one section; what a pass is about
to do and what it has found is in SQL after each, so that a restart goes on where it stood and
gateways show it without asking this process.

    idle --due, or asked for--> looking --last section--> settling --strays old enough--> idle
                                 |   ^                                                  (finished)
                                 +---+ next section

A fragment without a row may be a put that is under way.  So strays are counted last, once the
youngest of those has had `settle_s` to get its row, against rows that are read anew.  While
somebody waits for a pass, `asked_settle_s` must do: what is younger is then counted as that.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import structlog
from sqlalchemy import Connection, select

from cluster.block_index import read_totals
from cluster.events import CELL as CELL_SUBJECT
from cluster.events import EventKind, record_event
from cluster.node_watch import Ports
from cluster.schema import cell
from cluster.verify.differences import STRAYS, Difference, Tally
from cluster.verify.index_scan import VolumeRange, next_range, read_truth
from cluster.verify.lead import Lead
from cluster.verify.node_ports import NodePorts
from cluster.verify.pass_rows import (
    CELL,
    FINISHED,
    REMOVAL,
    VERIFY,
    PassRow,
    Wish,
    grant_wish,
    read_pass,
    read_wish,
    write_pass,
)
from cluster.verify.removal import StrayRemover
from cluster.verify.section_pass import SectionPass, SectionResult
from cluster.verify.settings import VerifierSettings
from cluster.verify.stray_rows import StrayRow, forget_strays, page_strays
from protocol.clock import Clock
from protocol.errors import NotLeader, RetryLater, UnknownOutcome
from protocol.ids import NodeId
from sql.database import Database
from storage_node.interface import FragmentKey

_BEFORE_ALL: Final = -1

log = structlog.get_logger()


class PassState(enum.StrEnum):
    """Of the newest pass; see the module's docstring."""

    LOOKING = "looking"
    SETTLING = "settling"
    FINISHED = "finished"


@dataclass(slots=True)
class _Pass:
    """The newest pass, as its row has it."""

    number: int
    begun: float
    deep: bool
    request: int
    """Number of the request that it answers; 0 if it was due."""
    state: PassState
    blocks_total: int
    tally: Tally
    position: int = _BEFORE_ALL
    """Last volume that was looked at."""
    blocks: int = 0
    unlooked: int = 0
    strays_left_off: int = 0
    silent: dict[NodeId, str] = field(default_factory=dict)

    def row(self, ended: float | None) -> PassRow:
        body = {
            "state": self.state.value,
            "deep": self.deep,
            "request": self.request,
            "position": self.position,
            "blocks": self.blocks,
            "blocks_total": self.blocks_total,
            "unlooked_slots": self.unlooked,
            "strays_left_off": self.strays_left_off,
            "silent_nodes": {str(node): why for node, why in sorted(self.silent.items())},
            "differences": self.tally.to_json(),
        }
        return PassRow(self.number, self.begun, ended, body)

    @classmethod
    def of_row(cls, row: PassRow, examples_max: int) -> _Pass:
        body = row.body
        return cls(
            number=row.number,
            begun=row.begun,
            deep=body["deep"],
            request=body["request"],
            state=PassState(body["state"]),
            blocks_total=body["blocks_total"],
            tally=Tally.from_json(body["differences"], examples_max),
            position=body["position"],
            blocks=body["blocks"],
            unlooked=body["unlooked_slots"],
            strays_left_off=body["strays_left_off"],
            silent={NodeId(node): why for node, why in body["silent_nodes"].items()},
        )

    def add(self, part: VolumeRange, result: SectionResult) -> None:
        """A section was looked at."""
        self.position = part.last
        self.blocks += result.blocks
        self.unlooked += result.unlooked
        self.strays_left_off += result.strays_left_off
        self.silent.update(result.silent)
        if part.is_last:
            self.state = PassState.SETTLING


class VerifierService:
    """One per cell, under the role `repair`.  One event loop; no threads of its own."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        ports: Ports,
        epoch: Callable[[], int],
        settings: VerifierSettings | None = None,
    ) -> None:
        """`ports` connects to a node as its row says; `epoch` is of the role as it was taken; 0
        until then."""
        self._settings = settings or VerifierSettings()
        self._clock = clock
        self._lead = Lead(db, epoch)
        self._ports = NodePorts(ports, clock, self._settings)
        self._stopped = False

    async def run(self) -> None:
        """Work until `stop`.  Raises `NotLeader` when another process has taken the role."""
        try:
            while not self._stopped:
                busy = self._lead.has_role and await self._try_step()
                if not busy and not self._stopped:
                    await self._clock.sleep(self._settings.poll_s)
        finally:
            await self._ports.aclose()

    async def stop(self) -> None:
        """End `run` after its step.  Idempotent."""
        self._stopped = True

    async def _try_step(self) -> bool:
        try:
            return await self.step()
        except NotLeader:
            log.warning("the verifier lost its role")
            raise
        except (RetryLater, UnknownOutcome) as error:
            log.warning("the verifier's step failed", error=error.message)
            return False

    async def step(self) -> bool:
        """One section, one removal, or the end of a pass; False if there is nothing to do now.

        Raises `NotLeader`, `DatabaseBusy`, `UnknownOutcome`: the same step is due again.
        """
        wish, row = await self._lead.db.read(
            lambda connection: (read_wish(connection), read_pass(connection, VERIFY, CELL))
        )
        if wish is not None and wish.remove_strays:
            await self._remove_strays(wish)
            return True
        if row is not None and row.ended is None:
            current = _Pass.of_row(row, self._settings.examples_max)
            return await self._go_on(current, is_awaited=wish is not None)
        if wish is not None or row is None or self._is_due(row):
            return await self._begin(row, wish)
        return False

    def _is_due(self, row: PassRow) -> bool:
        return self._clock.wall() - row.begun >= self._settings.period_s

    # -- a pass --------------------------------------------------------------------------------

    async def _begin(self, last: PassRow | None, wish: Wish | None) -> bool:
        now = self._clock.wall()

        def work(connection: Connection) -> _Pass | None:
            if connection.execute(select(cell.c.id)).first() is None:
                return None
            begun = _Pass(
                number=1 if last is None else last.number + 1,
                begun=now,
                deep=wish is not None and wish.deep,
                request=0 if wish is None else wish.number,
                state=PassState.LOOKING,
                blocks_total=read_totals(connection).blocks,
                tally=Tally(self._settings.examples_max),
            )
            write_pass(connection, VERIFY, CELL, begun.row(None))
            return begun

        begun = await self._lead.write(work)
        if begun is not None:
            log.info("verifier pass begins", number=begun.number, deep=begun.deep)
        return begun is not None

    async def _go_on(self, current: _Pass, *, is_awaited: bool) -> bool:
        if current.state is PassState.SETTLING:
            return await self._settle(current, is_awaited=is_awaited)
        part = await next_range(self._lead.db, current.position, self._settings.section_blocks_max)
        section = SectionPass(
            self._lead, self._clock, self._ports, self._settings, current.tally, current.number
        )
        current.add(part, await section.run(part, deep=current.deep))
        await self._lead.write(
            lambda connection: write_pass(connection, VERIFY, CELL, current.row(None))
        )
        return True

    async def _settle(self, current: _Pass, *, is_awaited: bool) -> bool:
        """Count the strays of this pass, once all of them can be told from puts under way, or
        somebody has waited long enough."""
        settings = self._settings
        patience_s = settings.asked_settle_s if is_awaited else settings.settle_s
        young = await self._lead.db.read(
            partial(
                page_strays,
                after=None,
                limit=1,
                first_seen=(self._clock.wall() - patience_s, float("inf")),
                kind=Difference.ORPHAN,
            )
        )
        if young:
            return False
        current.tally.clear(STRAYS)
        after: tuple[NodeId, FragmentKey] | None = None
        while True:
            page = await self._lead.db.read(
                partial(page_strays, after=after, limit=self._settings.confirm_batch)
            )
            if not page:
                break
            after = page[-1].place
            seen = [row for row in page if row.pass_number == current.number]
            await self._count_strays(seen, current.tally)
        current.state = PassState.FINISHED
        now = self._clock.wall()
        await self._lead.write(lambda connection: _finish(connection, current, now))
        log.info("verifier pass ended", number=current.number, **_counts(current.tally))
        return True

    async def _count_strays(self, rows: list[StrayRow], tally: Tally) -> None:
        truth = await self._lead.db.read(partial(read_truth, keys=[row.key for row in rows]))
        settled = self._clock.wall() - self._settings.settle_s
        gone = []
        for row in rows:
            key = row.key
            in_slot = truth.holder(key) == row.node
            arriving = truth.moves.get((key.volume, key.slot)) == row.node
            if in_slot or arriving:
                gone.append(row.place)
                continue
            kind = row.kind
            if kind is Difference.ORPHAN:
                if truth.holder(key) is not None:
                    gone.append(row.place)  # its row came: the next pass tells where it belongs
                    continue
                if row.first_seen > settled:
                    kind = Difference.YOUNG
            tally.add(kind, key.volume, key.block, key.slot, row.node)
        if gone:
            await self._lead.write(lambda connection: forget_strays(connection, gone))

    # -- removal -------------------------------------------------------------------------------

    async def _remove_strays(self, wish: Wish) -> None:
        remover = StrayRemover(self._lead, self._clock, self._ports, self._settings)
        begun = self._clock.wall()
        plan = await remover.plan()
        body: dict[str, Any] = {
            "request": wish.number,
            "dry_run": wish.dry_run,
            **plan.to_json(self._settings.examples_max),
        }
        if not wish.dry_run:
            outcome = await remover.execute(plan)
            body.update(outcome.to_json())
        now = self._clock.wall()

        def work(connection: Connection) -> None:
            write_pass(connection, REMOVAL, CELL, PassRow(wish.number, begun, now, body))
            grant_wish(connection, wish.number, now)

        await self._lead.write(work)


def _finish(connection: Connection, current: _Pass, now: float) -> None:
    row = current.row(now)
    write_pass(connection, VERIFY, CELL, row)
    write_pass(connection, VERIFY, FINISHED, row)
    if current.request:
        grant_wish(connection, current.request, now)
    counts = _counts(current.tally)
    told = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no difference"
    detail = f"verifier pass {current.number}, {current.blocks} blocks: {told}"
    record_event(connection, now, EventKind.PASS_ENDED, CELL_SUBJECT, detail)


def _counts(tally: Tally) -> dict[str, int]:
    """Classes that were found."""
    return {kind.value: tally.counts[kind] for kind in Difference if tally.counts[kind]}
