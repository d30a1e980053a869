"""The second look: a suspect counts only if index and node still say so, and becomes a debt.

Blocks are put, moved and deleted while a pass runs.  So each suspect goes through three steps, and
falls away at the first that contradicts it:

    1. SQL: the live row is in that volume, the slot is that node's, nobody owes it
    2. the node reads the record from its disk (`NodePort.verify`)
    3. one transaction: the row is the same one (volume, instant of creation), the slot still that
       node's; the debt is written in it
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection

from cluster.block_index import BlockRow
from cluster.block_sql import Debt
from cluster.debts import record_debts
from cluster.events import EventKind, record_event
from cluster.verify.differences import DEBT_REASONS, Difference, Finding, Suspect, Tally
from cluster.verify.index_scan import Truth, read_truth
from cluster.verify.lead import Lead
from cluster.verify.node_ports import NodePorts, reason_of
from cluster.verify.stripe_judgement import difference_of, judge_stripe
from erasure.fragment import FRAGMENT_HEADER_BYTES
from protocol.clock import Clock
from protocol.errors import HaversackError
from protocol.ids import BlockHash, NodeId, VolumeId
from storage_node.interface import FragmentKey, VerifiedRecord

_Answers = dict[FragmentKey, VerifiedRecord]


class Confirmer:
    """One per pass.  One event loop."""

    def __init__(self, lead: Lead, clock: Clock, ports: NodePorts, tally: Tally) -> None:
        self._lead = lead
        self._clock = clock
        self._ports = ports
        self._tally = tally
        self.silent: dict[NodeId, str] = {}
        """Nodes that did not answer a second look: what was suspected there does not count."""

    async def confirm(self, suspects: Sequence[Suspect]) -> None:
        """Look at single fragments again."""
        truth = await self._lead.db.read(
            lambda connection: read_truth(connection, [suspect.key for suspect in suspects])
        )
        standing = [
            suspect
            for suspect in suspects
            if truth.holder(suspect.key) == suspect.node and suspect.key not in truth.owed
        ]
        wanted: dict[NodeId, list[FragmentKey]] = {}
        for key, node in standing:
            wanted.setdefault(node, []).append(key)
        answers = await self._ask(wanted)
        found: list[Finding] = []
        doubtful: set[tuple[VolumeId, BlockHash]] = set()
        for key, node in standing:
            answer = answers.get(key)
            if answer is None:
                continue
            difference = difference_of(answer.status)
            if difference is not None:
                found.append(Finding(difference, key, node))
            elif answer.length != _expected(truth, key):
                doubtful.add((key.volume, key.block))
        await self._record(found, truth)
        if doubtful:
            await self.check_stripes(sorted(doubtful))

    async def check_stripes(self, stripes: Sequence[tuple[VolumeId, BlockHash]]) -> int:
        """Have all fragments of some blocks read, and compare them; returns the bytes read."""
        truth = await self._lead.db.read(lambda connection: _stripe_truth(connection, stripes))
        wanted: dict[NodeId, list[FragmentKey]] = {}
        keys: dict[BlockHash, list[FragmentKey]] = {}
        for volume_id, block in stripes:
            row = truth.rows.get(block)
            if row is None or row.volume != volume_id or volume_id not in truth.volumes:
                continue
            for slot, node in enumerate(truth.volumes[volume_id].slots):
                key = FragmentKey(volume_id, block, slot)
                if node is not None and key not in truth.owed:
                    wanted.setdefault(node, []).append(key)
                    keys.setdefault(block, []).append(key)
        answers = await self._ask(wanted)
        found: list[Finding] = []
        for block, of_block in keys.items():
            row = truth.rows[block]
            found += judge_stripe(
                BlockRow(block, row.volume, row.stored_bytes, row.plain_bytes),
                truth.volumes[row.volume],
                {key.slot: answers[key] for key in of_block if key in answers},
            )
        await self._record(found, truth)
        return sum(answer.length for answer in answers.values())

    async def _ask(self, wanted: Mapping[NodeId, Sequence[FragmentKey]]) -> _Answers:
        """Answers of the nodes that gave one, all at the same time."""

        async def ask(node: NodeId, keys: Sequence[FragmentKey]) -> _Answers:
            try:
                answers = await self._ports.verify(node, keys)
            except HaversackError as error:
                self.silent[node] = reason_of(error)
                return {}
            return dict(zip(keys, answers, strict=True))

        nodes = sorted(wanted)
        asked = await asyncio.gather(*(ask(node, wanted[node]) for node in nodes))
        return {key: answer for answers in asked for key, answer in answers.items()}

    async def _record(self, found: Sequence[Finding], truth: Truth) -> None:
        """Step 3."""
        now = self._clock.wall()
        for finding in await record_findings(self._lead, now, found, truth, "verifier"):
            self._tally.add_finding(finding)


async def record_findings(
    lead: Lead, now: float, found: Sequence[Finding], truth: Truth, finder: str
) -> list[Finding]:
    """Make debts of findings that still hold; returns those.

    `truth` is what they were judged by; `finder` is named in the event.  Raises `NotLeader`,
    `DatabaseBusy`, `UnknownOutcome`.
    """
    if not found:
        return []
    return await lead.write(lambda connection: _record(connection, found, truth, now, finder))


def _record(
    connection: Connection, found: Sequence[Finding], before: Truth, now: float, finder: str
) -> list[Finding]:
    """Write debts of what still holds; returns it."""
    truth = read_truth(connection, [finding.key for finding in found])
    kept = [
        finding
        for finding in found
        if truth.rows.get(finding.key.block) == before.rows[finding.key.block]
        and truth.holder(finding.key) == finding.node
        and finding.key not in truth.owed
    ]
    by_reason: dict[Difference, list[Debt]] = {}
    volumes: dict[VolumeId, Counter[str]] = {}
    for finding in kept:
        if finding.difference in DEBT_REASONS:
            debt = Debt(finding.key.volume, finding.key.slot, finding.key.block)
            by_reason.setdefault(finding.difference, []).append(debt)
            volumes.setdefault(finding.key.volume, Counter())[finding.difference.value] += 1
    for difference, rows in by_reason.items():
        record_debts(connection, sorted(rows), now, DEBT_REASONS[difference])
    for volume, counts in sorted(volumes.items()):
        told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        record_event(connection, now, EventKind.DEBT_FOUND, volume, f"{finder}: {told}")
    return kept


def _stripe_truth(connection: Connection, stripes: Sequence[tuple[VolumeId, BlockHash]]) -> Truth:
    """Of all slots of some blocks."""
    first = read_truth(connection, [FragmentKey(volume, block, 0) for volume, block in stripes])
    return read_truth(
        connection,
        [
            FragmentKey(volume, block, slot)
            for volume, block in stripes
            if volume in first.volumes
            for slot in range(first.volumes[volume].scheme.n)
        ],
    )


def _expected(truth: Truth, key: FragmentKey) -> int:
    """Length of a slot's record."""
    stored = truth.rows[key.block].stored_bytes
    return FRAGMENT_HEADER_BYTES + truth.volumes[key.volume].scheme.chunk_bytes(stored)
