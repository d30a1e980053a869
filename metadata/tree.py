"""The file trees as the API sees them: commit, look up, list, delete, and what a hash may do.

Called by the API (and by the simulation) with an account that `metadata.accounts` has
authenticated.  Each change is one function in one transaction of `sql.Database`; refusals travel
out of it as values, so that they undo nobody's work, and are raised here.

Walk of a commit: see `metadata.batch`.  Imports neither the API nor the cluster: which blocks the
caller has claims to is computed outside and handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Connection, bindparam, text, update

from metadata import numbers
from metadata.accounts import Account
from metadata.batch import Batch, CommitResult
from metadata.changes import Change, CommitRequest, check_commit
from metadata.commit_queue import CommitQueue, Outcome
from metadata.entries import Entry, EntryKind, EntryRow, rows_on_path
from metadata.listing import Page, list_page
from metadata.namespaces import ChangeKind, JournalLine, append_journal, lock_namespace
from metadata.paths import Names, join_path, keys_of, parse_path
from metadata.references import referenced, referring
from metadata.schema import entries
from metadata.tree_view import load
from protocol.clock import Clock
from protocol.errors import (
    EntryNotFound,
    HaversackError,
    InvalidPath,
    InvalidRequest,
    RevConflict,
)
from protocol.ids import BlockHash
from protocol.limits import COMMIT_ENTRIES_MAX, LISTING_PAGE_MAX
from sql.database import Database

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Deleted:
    """A delete that was done."""

    count: int
    """Entries that went to the trash: the one named, and with a folder all below it."""


class Tree:
    """The trees of all accounts, in one metadata database."""

    def __init__(self, database: Database, clock: Clock) -> None:
        """`database` is migrated to the newest schema (`schema.MIGRATIONS`)."""
        self._database = database
        self._clock = clock
        self._queue = CommitQueue(self._commit)

    # -- changes -------------------------------------------------------------------------------

    async def commit(
        self, account: Account, request: CommitRequest, claimed: AbstractSet[BlockHash]
    ) -> CommitResult:
        """Put one file or symlink at a path, if `request.parent_rev` is what is there.

        Folders on the way are made.  The same content again succeeds whatever the parent rev is,
        and changes nothing unless that is current and mtime or executable differ.  Raises
        `InvalidPath`, `InvalidRequest`, `RevConflict` (`details.server` is the entry in the way,
        or None), `MissingBlocks`; from the database `DatabaseBusy`, `Overloaded` and
        `UnknownOutcome`, after which the same commit may simply be sent again.
        """
        change = check_commit(request, claimed)
        return _raised(await self._queue.commit(account.namespace_id, change))

    async def commit_many(
        self, account: Account, requests: Sequence[CommitRequest], claimed: AbstractSet[BlockHash]
    ) -> list[Outcome]:
        """As many commits in one transaction, in order, each with its own outcome.

        Raises `InvalidRequest` for more than `COMMIT_ENTRIES_MAX`.
        """
        if len(requests) > COMMIT_ENTRIES_MAX:
            raise InvalidRequest(f"more than {COMMIT_ENTRIES_MAX} entries in one batch")
        outcomes: dict[int, Outcome] = {}
        changes: dict[int, Change] = {}
        for index, request in enumerate(requests):
            try:
                changes[index] = check_commit(request, claimed)
            except HaversackError as refusal:
                outcomes[index] = refusal
        if changes:
            decided = await self._commit(account.namespace_id, list(changes.values()))
            outcomes.update(zip(changes, decided, strict=True))
        return [outcomes[index] for index in range(len(requests))]

    async def make_folder(self, account: Account, path: str) -> CommitResult:
        """Make a folder and those above it; success if it is there.

        Raises `InvalidPath`, or `RevConflict` if a file is in the way.
        """
        names = parse_path(path)
        keys = keys_of(names)
        now = self._clock.wall()

        def work(connection: Connection) -> Outcome:
            position = lock_namespace(connection, account.namespace_id)
            root = load(connection, numbers.root_entry(account.namespace_id), [keys])
            batch = Batch(account.namespace_id, position, root, frozenset(), now)
            outcome = batch.make_folder(names, keys)
            batch.write(connection)
            return outcome

        return _raised(await self._database.write(work))

    async def delete(self, account: Account, path: str, parent_rev: str | None = None) -> Deleted:
        """Move an entry, with a folder everything below, to the trash; versions are kept.

        Raises `InvalidPath` (also for the root), `EntryNotFound`, and `RevConflict` if
        `parent_rev` is given and not current.
        """
        names = parse_path(path)
        if not names:
            raise InvalidPath("the root cannot be deleted", {"path": "/", "reason": "root"})
        keys = keys_of(names)
        now = self._clock.wall()

        def work(connection: Connection) -> Deleted | HaversackError:
            position = lock_namespace(connection, account.namespace_id)
            rows = rows_on_path(connection, numbers.root_entry(account.namespace_id), keys)
            if len(rows) <= len(keys):
                return _not_found(names)
            row = rows[-1]
            if parent_rev not in (None, numbers.rev(row.rev)):
                server = row.entry(_display(rows[:-1])).as_json()
                return RevConflict(
                    f"{join_path(names)!r} has another rev on the server",
                    {"path": join_path(names), "server": server},
                )
            count: int = connection.execute(_COUNT_SUBTREE, {"entry": row.id}).scalar_one()
            connection.execute(_TRASH, {"entry": row.id, "now": now})
            line = JournalLine(position + 1, row.id, ChangeKind.DELETED)
            append_journal(connection, account.namespace_id, [line], now)
            return Deleted(count)

        return _raised(await self._database.write(work))

    # -- look-ups ------------------------------------------------------------------------------

    async def entry(self, account: Account, path: str) -> Entry:
        """What is at `path`.  Raises `InvalidPath`, `EntryNotFound`."""
        names = parse_path(path)

        def work(connection: Connection) -> Entry:
            rows = _rows_at(connection, account, names)
            return rows[-1].entry(_display(rows[:-1]))

        return await self._database.read(work)

    async def list_folder(
        self,
        account: Account,
        path: str,
        cursor: str | None = None,
        limit: int = LISTING_PAGE_MAX,
        *,
        recursive: bool = False,
    ) -> Page:
        """One page of what is in a folder, by name; `recursive`: of the subtree, in pre-order.

        Raises `InvalidPath`, `EntryNotFound`, `InvalidRequest` (no folder, a limit outside
        1..`LISTING_PAGE_MAX`, a cursor that is not of this listing).
        """
        names = parse_path(path)
        if not 1 <= limit <= LISTING_PAGE_MAX:
            raise InvalidRequest(f"limit is {limit}, not 1..{LISTING_PAGE_MAX}")

        def work(connection: Connection) -> Page:
            rows = _rows_at(connection, account, names)
            if rows[-1].kind != EntryKind.FOLDER:
                raise InvalidRequest(f"{join_path(names)!r} is not a folder: ask for its entry")
            return list_page(
                connection, rows[-1], _display(rows), cursor, limit, recursive=recursive
            )

        return await self._database.read(work)

    async def references(self, account: Account, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        """Those of `hashes` that a version the account keeps lists: it may read and name these."""

        def work(connection: Connection) -> set[BlockHash]:
            return referenced(connection, account.namespace_id, hashes)

        return await self._database.read(work)

    async def referring(self, block: BlockHash) -> dict[int, int]:
        """How often the versions of each namespace name the block, namespaces that do not left
        out; for administrators."""
        return await self._database.read(lambda connection: referring(connection, block))

    # -- inside --------------------------------------------------------------------------------

    async def _commit(self, namespace_id: int, changes: list[Change]) -> list[Outcome]:
        now = self._clock.wall()
        unclaimed = list(dict.fromkeys(block for change in changes for block in change.unclaimed))
        paths = dict.fromkeys(change.keys for change in changes)

        def work(connection: Connection) -> list[Outcome]:
            position = lock_namespace(connection, namespace_id)
            root = load(connection, numbers.root_entry(namespace_id), paths)
            vouched = referenced(connection, namespace_id, unclaimed)
            batch = Batch(namespace_id, position, root, vouched, now)
            outcomes: list[Outcome] = [batch.commit(change) for change in changes]
            batch.write(connection)
            return outcomes

        return await self._database.write(work)


def _raised(outcome: _T | HaversackError) -> _T:
    if isinstance(outcome, HaversackError):
        raise outcome
    return outcome


def _rows_at(connection: Connection, account: Account, names: Names) -> list[EntryRow]:
    rows = rows_on_path(connection, numbers.root_entry(account.namespace_id), keys_of(names))
    if len(rows) <= len(names):
        raise _not_found(names)
    return rows


def _display(rows: Sequence[EntryRow]) -> Names:
    """Displayed path of the last of `rows`, which start at the root."""
    return tuple(row.name for row in rows[1:])


def _not_found(names: Names) -> EntryNotFound:
    return EntryNotFound(f"nothing is at {join_path(names)!r}", {"path": join_path(names)})


_COUNT_SUBTREE = text(
    "WITH RECURSIVE subtree(id) AS ("
    "  SELECT e.id FROM entries e WHERE e.id = :entry"
    "  UNION ALL"
    "  SELECT e.id FROM subtree JOIN entries e ON e.parent_id = subtree.id"
    "  WHERE e.deleted IS NULL"
    ") SELECT count(*) FROM subtree"
)
_TRASH = update(entries).where(entries.c.id == bindparam("entry")).values(deleted=bindparam("now"))
