"""Findings on the disk of a real node: the rows behind `storage_node/findings.py`.

Step "set aside" of the scrub, and the step of a put that ends a finding.  Called by `RocksStore`
alone, with its lock held for whatever writes; all open findings are in memory too.
"""

from __future__ import annotations

from collections.abc import Sequence

from rocksdict import Rdict, WriteBatch

from protocol.limits import FRAME_BODY_BYTES_MAX
from protocol.messages import ItemStatus
from storage_node import findings as book
from storage_node.examine import examined
from storage_node.interface import Finding, FragmentKey, StoredRecord
from storage_node.rocks_options import synced
from storage_node.rocks_read import Reader, fetch

_GONE = StoredRecord(ItemStatus.NOT_FOUND, None)


class RocksFindings:
    """The open findings of one open store.  Raises what rocksdict raises."""

    def __init__(self, database: Rdict, index: Rdict, reader: Reader) -> None:
        self.found: dict[bytes, Finding] = {}
        """By packed fragment key."""
        self._database = database
        self._index = index
        self._reader = reader
        self._synced = synced()

    def let_go(self) -> None:
        """RocksDB keeps its LOCK while any object still refers to it."""
        del self._database, self._index, self._reader

    def load(self) -> None:
        """Read all rows."""
        rows = self._database.iter()
        rows.seek(book.FINDING_PREFIX)
        while rows.valid() and rows.key().startswith(book.FINDING_PREFIX):
            key = rows.key()[len(book.FINDING_PREFIX) :]
            self.found[key] = book.unpack_finding(key, rows.value())
            rows.next()
        rows.status()

    def examine(self, keys: Sequence[FragmentKey]) -> list[StoredRecord]:
        """Read records, also those set aside; one that is gone answers NOT_FOUND."""
        return self._reader.get_many(keys, FRAME_BODY_BYTES_MAX, _GONE)

    def set_aside(self, keys: Sequence[FragmentKey], at: float) -> int:
        """Look once more, and note what is still bad; durable on return."""
        held = [key for key in keys if self._is_indexed(key.pack())]
        change = book.look_again(self.found, held, self.examine, at)
        self._write(change)
        return len(change.noted)

    def end_replaced(self, keys: list[bytes]) -> None:
        """End findings whose new record reads back well; until then the old one is kept."""
        fragments = [FragmentKey.unpack(key) for key in keys]
        answers = self.examine(fragments)
        ended = [
            key
            for key, fragment, answer in zip(keys, fragments, answers, strict=True)
            if examined(fragment, answer).status is ItemStatus.OK
        ]
        self._write(book.Change({}, ended))

    def _is_indexed(self, key: bytes) -> bool:
        """Also if its entry cannot be read: then the fragment is bad, not absent."""
        try:
            return fetch(self._index, [key])[0] is not None
        except Exception:  # noqa: BLE001  rocksdict raises nothing more precise
            return True

    def _write(self, change: book.Change) -> None:
        if not change.noted and not change.ended:
            return
        batch = WriteBatch(raw_mode=True)
        for key, finding in change.noted.items():
            batch.put(book.finding_row_key(key), book.pack_finding(finding))
        for key in change.ended:
            batch.delete(book.finding_row_key(key))
        self._database.write(batch, self._synced)
        self.found.update(change.noted)
        for key in change.ended:
            del self.found[key]
