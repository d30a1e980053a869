"""Judges a simulated run: each answer as it arrives, everything once the faults have stopped.

`Judge` of `chaos/workloads.py` over the checkers of `chaos/checkers.py`; the first violation ends
the run.  Called by `chaos/sim/run.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from chaos import checkers
from chaos.checkers import Seen, Violation
from chaos.evidence import Stripe, Version
from chaos.faults import FaultKind
from chaos.ledger import Kind, Ledger, Operation, Outcome
from chaos.sim.cell import SimCell
from chaos.sim.inject import WRITES_TO
from protocol.hashing import Buffer
from protocol.ids import BlockHash
from protocol.limits import CLAIM_SECONDS

CLOCK_SKEW_MAX_S = 2 * 3600.0
"""The injector keeps every wall clock this close to the truth: claims last longer."""

EXCUSE_GRACE_S = 20.0
"""After a process works again, the others may need this long to trust it again: the longest
back-off of `cluster.node_pool`, and a little."""


ANSWER_SLACK_S = 10.0
"""Over a client's deadline."""


UNSEEN_BY_PLACEMENT = frozenset({FaultKind.SLOW_DISK, FaultKind.READ_ERRORS, FaultKind.PARTITION})
"""Conditions of a node under which its leases may go on as if nothing were wrong."""


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
        self.excused_puts = 0
        self.seen: list[Seen] = []
        cell.witness.rule = self.rule

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

    def put_failed(self, operation: Operation) -> None:
        """There was an excuse: too few nodes, or trouble that placement cannot see."""
        impaired = self._cell.impairments.touched(
            operation.started - EXCUSE_GRACE_S, operation.ended
        )
        impaired.pop("repair", None)  # no put waits for it
        # A node that is full or fails writes is one node less, and no excuse beyond that.
        touched = {name.removeprefix(WRITES_TO): why for name, why in impaired.items()}
        gone = self._cell.gone_nodes()
        nodes = {str(node) for node in self._cell.disks if node not in gone}
        touched = {name: why for name, why in touched.items() if name not in gone}
        if operation.outcome is Outcome.UNKNOWN or any(
            name not in nodes or why in UNSEEN_BY_PLACEMENT for name, why in touched.items()
        ):
            self.excused_puts += 1
            return
        healthy = len(nodes - touched.keys())
        needed = self._cell.options.scheme.write_minimum
        self.rule(
            "put_is_taken_or_excused",
            checkers.put_is_taken_or_excused(operation, healthy, needed),
        )

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
        self.rule("acknowledged_block_is_whole", self._whole(block, stripe))

    def _whole(self, block: BlockHash, stripe: Stripe | None) -> list[Violation]:
        length = self._ledger.blocks[block].length
        return checkers.acknowledged_block_is_whole(block, length, stripe)

    # -- at the end ----------------------------------------------------------------------------

    def judge_rows(self, deadline_s: float) -> None:
        """Everything that can be seen without asking the cell.  Collects all violations.

        `deadline_s` is what clients wait for one answer.
        """
        inspector, ledger = self._cell.inspector, self._ledger
        stripes, versions = inspector.stripes(), inspector.versions()
        looks = [*self.seen, *self._final_looks(versions)]
        found: list[Violation] = []
        for name, violations in (
            (
                "acknowledged_block_is_whole",
                [
                    violation
                    for block in ledger.acknowledged_blocks()
                    for violation in self._whole(block, stripes.get(block))
                ],
            ),
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
            ("paths_hold_a_last_write", checkers.paths_hold_a_last_write(ledger, looks)),
            ("no_update_is_lost", checkers.no_update_is_lost(ledger)),
            (
                "writers_hold_their_lease",
                checkers.writers_hold_their_lease(self._cell.witness.node_events),
            ),
            (
                "incarnation_is_durable",
                [
                    violation
                    for node, disk in self._cell.disks.items()
                    if node not in self._cell.atlas.lost_disks()
                    for violation in checkers.incarnation_is_durable(
                        node, self._cell.witness.node_events, disk.incarnation()
                    )
                ],
            ),
        ):
            self.checks[name] += 1
            found.extend(violations)
        if found:
            raise SafetyViolation(found)
        self._judge_progress(deadline_s)

    def _final_looks(self, versions: Sequence[Version]) -> list[Seen]:
        """What each path that was written to holds now."""
        live = {(version.owner, version.path): version for version in versions if version.current}
        now = self._cell.loop.time()
        written = {
            (operation.owner, operation.path): None
            for operation in self._ledger.of_kind(Kind.COMMIT, Kind.DELETE)
        }
        looks = []
        for owner, path in written:
            version = live.get((owner, path))
            rev, blocks = (None, ()) if version is None else (version.rev, version.blocks)
            looks.append(Seen(owner, path, rev, blocks, now, now))
        return looks

    def _judge_progress(self, deadline_s: float) -> None:
        def excused(operation: Operation) -> bool:
            touched = self._cell.impairments.touched(operation.started, operation.ended)
            return any(name.startswith(("gateway", "network")) for name in touched)

        late = checkers.operations_end(self._ledger, deadline_s + ANSWER_SLACK_S)
        late += checkers.requests_are_answered(self._ledger, deadline_s, excused)
        self.checks["operations_end"] += 1
        self.checks["requests_are_answered"] += 1
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
