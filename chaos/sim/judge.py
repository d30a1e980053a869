"""Judges a simulated run: each answer as it arrives, everything once the faults have stopped.

`Judge` of `chaos/workloads.py` over the checkers of `chaos/checkers.py`; the first violation ends
the run.  Called by `chaos/sim/run.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from chaos import checkers
from chaos.checkers import Seen, Violation
from chaos.ledger import Kind, Ledger, Operation, Outcome
from chaos.sim.cell import SimCell
from protocol.hashing import Buffer
from protocol.ids import BlockHash
from protocol.limits import CLAIM_SECONDS

CLOCK_SKEW_MAX_S = 2 * 3600.0
"""The injector keeps every wall clock this close to the truth: claims last longer."""

EXCUSE_GRACE_S = 20.0
"""After a process works again, the others may need this long to trust it again: the longest
back-off of `cluster.node_pool`, and a little."""


class SafetyViolation(Exception):
    """A promise was broken."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(str(violation) for violation in violations[:5]))
        self.violations = list(violations)


class LivenessViolation(Exception):
    """Something that had to happen did not."""


class SimJudge:
    """Counts checks and stops the run at the first violation."""

    def __init__(self, cell: SimCell, ledger: Ledger) -> None:
        self._cell = cell
        self._ledger = ledger
        self.checks: Counter[str] = Counter()
        self.excused_reads = 0
        self.seen: list[Seen] = []

    def rule(self, checker: str, violations: Sequence[Violation]) -> None:
        """Count a check; end the run if it found something."""
        self.checks[checker] += 1
        if violations:
            self._cell.loop.fail(SafetyViolation(violations))

    # -- each answer ---------------------------------------------------------------------------

    def put_acknowledged(self, operation: Operation) -> None:
        """At this instant the row is committed and the fragments are durable."""
        (block,) = operation.blocks
        self._block_is_whole(block)

    def block_read(self, operation: Operation, data: Buffer) -> None:
        """The bytes are the block's."""
        (block,) = operation.blocks
        length = self._ledger.blocks[block].length
        self.rule(
            "served_bytes_are_the_blocks",
            checkers.served_bytes_are_the_blocks(block, length, data),
        )

    def read_failed(self, operation: Operation) -> None:
        """There was an excuse.  Only answers of the cell count: a client that lost its own
        connection learnt nothing."""
        (block,) = operation.blocks
        touched = self._cell.impairments.touched(
            operation.started - EXCUSE_GRACE_S, operation.ended
        )
        if operation.outcome is Outcome.UNKNOWN or any(
            name.startswith(("gateway", "network", "sql")) for name in touched
        ):
            self.excused_reads += 1
            return
        stripe = self._cell.inspector.stripe(block)
        serving: frozenset[int] = frozenset()
        if stripe is not None:
            nodes = enumerate(stripe.nodes)
            serving = frozenset(slot for slot, node in nodes if node and node not in touched)
        self.excused_reads += 1
        self.rule(
            "read_is_served_or_excused",
            checkers.read_is_served_or_excused(operation, stripe, serving),
        )

    def commit_refused(self, operation: Operation, missing: Sequence[BlockHash]) -> None:
        """What the owner was told is stored may be referenced."""
        claim_s = CLAIM_SECONDS - CLOCK_SKEW_MAX_S
        self.rule(
            "own_blocks_may_be_referenced",
            checkers.own_blocks_may_be_referenced(self._ledger, operation, missing, claim_s),
        )

    def path_seen(self, operation: Operation, blocks: tuple[BlockHash, ...]) -> None:
        """Kept for the histories, which are judged at the end."""
        self.seen.append(
            Seen(
                operation.owner,
                operation.path,
                operation.rev,
                blocks,
                operation.started,
                operation.ended,
            )
        )

    def _block_is_whole(self, block: BlockHash) -> None:
        stripe = self._cell.inspector.stripe(block)
        length = self._ledger.blocks[block].length
        self.rule(
            "acknowledged_block_is_whole",
            checkers.acknowledged_block_is_whole(block, length, stripe),
        )

    # -- at the end ----------------------------------------------------------------------------

    def judge_rows(self, operation_s_max: float) -> None:
        """Everything that can be seen without asking the cell."""
        inspector, ledger = self._cell.inspector, self._ledger
        for block in ledger.acknowledged_blocks():
            self._block_is_whole(block)
        stripes, versions = inspector.stripes(), inspector.versions()
        live = {(version.owner, version.path): version for version in versions if version.current}
        now = self._cell.loop.time()
        paths = {
            (operation.owner, operation.path): None
            for operation in ledger.of_kind(Kind.COMMIT, Kind.DELETE)
        }
        final = [
            Seen(owner, path, version.rev, version.blocks, now, now)
            if (version := live.get((owner, path))) is not None
            else Seen(owner, path, None, (), now, now)
            for owner, path in paths
        ]
        for name, violations in (
            ("failed_puts_left_nothing", checkers.failed_puts_left_nothing(ledger, stripes)),
            (
                "versions_reference_present_blocks",
                checkers.versions_reference_present_blocks(versions, stripes),
            ),
            ("references_are_authorised", checkers.references_are_authorised(ledger, versions)),
            (
                "reference_counts_match",
                checkers.reference_counts_match(versions, inspector.references()),
            ),
            (
                "paths_hold_a_last_write",
                checkers.paths_hold_a_last_write(ledger, [*self.seen, *final]),
            ),
            ("no_update_is_lost", checkers.no_update_is_lost(ledger)),
            (
                "writers_hold_their_lease",
                checkers.writers_hold_their_lease(self._cell.node_events),
            ),
        ):
            self.rule(name, violations)
        late = checkers.operations_end(ledger, operation_s_max)
        self.checks["operations_end"] += 1
        if late:
            raise LivenessViolation("; ".join(str(violation) for violation in late[:5]))

    def read_back(self, block: BlockHash, data: Buffer | None, error: str) -> None:
        """One acknowledged block, read after the faults stopped."""
        if data is not None:
            length = self._ledger.blocks[block].length
            violations = checkers.served_bytes_are_the_blocks(block, length, data)
        else:
            stripe = self._cell.inspector.stripe(block)
            violations = checkers.lost_block_is_excused(block, stripe, error)
        self.rule("acknowledged_block_reads_back", violations)
