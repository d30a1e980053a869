"""A metadata database with two accounts, for the tests of `metadata/`."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metadata.accounts import Account, Accounts
from metadata.audit import audit
from metadata.batch import CommitResult
from metadata.changes import CommitRequest
from metadata.entries import Entry
from metadata.migrate import prepare_schema
from metadata.tree import Tree
from protocol.hashing import hash_block
from protocol.ids import BlockHash
from sql.database import Database
from sql.engine import sqlite_url

START = 1_795_305_600.0


class HandClock:
    """A clock that moves when a test says so, backwards too."""

    def __init__(self) -> None:
        self.now = START

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now - START

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


class MetadataStore:
    """The whole package over one database: in memory, or a file with its threads."""

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            self.database = Database("sqlite://", inline=True)
        else:
            self.database = Database(sqlite_url(path))
        prepare_schema(self.database)
        self.clock = HandClock()
        self.accounts = Accounts(self.database, self.clock, random.Random(1).randbytes)
        self.tree = Tree(self.database, self.clock)

    async def open(self) -> Account:
        """The account most tests use; the same after a restart."""
        return await self.accounts.first_admin("admin")

    def audit(self) -> list[str]:
        return self.database.read_now(audit)

    def close(self) -> None:
        self.database.close()


def block(number: int) -> BlockHash:
    """The name of some block."""
    return hash_block(number.to_bytes(8))


def file_request(path: str, blocks: Iterable[int], **rest: Any) -> CommitRequest:
    """A file of whole blocks."""
    hashes = tuple(map(block, blocks))
    given: dict[str, Any] = {"size": len(hashes) * 1000, "mtime": 1.5, **rest}
    return CommitRequest(path=path, block_list=hashes, **given)


async def put(
    store: MetadataStore, account: Account, path: str, blocks: Iterable[int], **rest: Any
) -> CommitResult:
    """Commit a file with claims to all of its blocks."""
    request = file_request(path, blocks, **rest)
    return await store.tree.commit(account, request, frozenset(request.block_list or ()))


async def everything(
    store: MetadataStore, account: Account, path: str = "/", limit: int = 2_000
) -> list[Entry]:
    """The whole listing below `path`, page by page."""
    entries: list[Entry] = []
    cursor = None
    while True:
        page = await store.tree.list_folder(account, path, cursor, limit, recursive=True)
        assert 0 < len(page.entries) <= limit or page.cursor is None
        entries += page.entries
        cursor = page.cursor
        if cursor is None:
            return entries
