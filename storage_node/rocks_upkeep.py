"""One step of a store's upkeep: plan, survey, drop, compact, settle.

Called by `RocksStore.tidy`, on a thread of its own beside puts and reads: it holds the store's
lock only where it writes.  What each step is, and why a crash between any two loses nothing, is
told in `storage_node/merge.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rocksdict import ColumnFamily, Rdict, WriteBatch

from protocol.limits import MIB
from storage_node import merge
from storage_node.extents import Family, fragment_of
from storage_node.rocks_errors import reading
from storage_node.rocks_ledger import Ledger
from storage_node.rocks_options import synced
from storage_node.write_guard import WriteGuard

_MERGE_MARGIN_BYTES = 1 * MIB
"""Left alone by a rewrite on a nearly full disk: catalogue, log and tombstones grow as well."""


class Upkeep:
    """Gives the space of deleted records back, and joins short extents."""

    def __init__(
        self,
        directory: Path,
        merger: merge.Merger,
        ledger: Ledger,
        guard: WriteGuard,
        handles: Mapping[Family, ColumnFamily],
    ) -> None:
        self.merger = merger
        self._directory = directory
        self._ledger = ledger
        self._guard = guard
        self._handles = handles
        self._synced = synced()

    def tidy(
        self, budget_bytes: int, free_bytes: Callable[[], int], is_short: Callable[[], bool]
    ) -> int:
        """Rewrite one run of neighbouring extents; returns its bytes, zero if none.

        `free_bytes` of the disk and whether space `is_short` are asked once the lock is held.
        """
        with self._guard.lock:
            self._guard.check_writable()
            with self._guard.writing("syncing the index"):
                self._ledger.sync()
            plan = self.merger.plan(
                budget_bytes,
                dead_bytes=self._ledger.totals.dead_bytes,
                room_bytes=free_bytes() - _MERGE_MARGIN_BYTES,
                is_short=is_short(),
            )
            if plan is None:
                with self._guard.writing("counting space that came back before"):
                    self._ledger.settle(self.merger.stale_marks())
                return 0
        with reading(self._directory):
            survey = self.merger.survey(plan)
        if survey is None:
            return 0
        with self._guard.lock:
            self._guard.check_writable()
            with self._guard.writing("dropping deleted records"):
                self._drop_dead(plan.family, survey)
        if not self.merger.compact(plan):
            return 0
        with self._guard.lock:
            self._guard.check_writable()
            with self._guard.writing("counting the space that came back"):
                gone = [key for key in survey.dead if fragment_of(key) is not None]
                self._ledger.settle(gone + survey.stale)
        return plan.size

    def _drop_dead(self, family: Family, survey: merge.Survey) -> None:
        if not survey.dead:
            return
        records: Rdict = self.merger.families[family]
        batch = WriteBatch(raw_mode=True)
        for key in survey.dead:
            batch.delete(key, self._handles[family])
        self.merger.database.write(batch, self._synced)
        records.flush()
