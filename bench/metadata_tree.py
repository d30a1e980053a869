"""Commits, listings and look-ups of the metadata against the database's own limits.

`python -m bench.metadata_tree [--directory DIR] [--entries N]` prints the table of
`docs/design/010-metadata.md`: first what bare SQLite does in the same directory, then `metadata/`
in this process, without HTTP.  `--entries` grows the tree first, to see whether costs stay flat.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from metadata.accounts import Account, Accounts
from metadata.batch import CommitResult
from metadata.changes import CommitRequest
from metadata.migrate import prepare_schema
from metadata.tree import Tree
from protocol.clock import SystemClock
from protocol.ids import BlockHash
from protocol.limits import BATCH_BLOCKS_MAX, COMMIT_ENTRIES_MAX
from sql.database import Database
from sql.engine import sqlite_url

_SINGLES = 2_000
_BATCHES = 20
_LOOKUPS = 200
_BARE_ROW = b"x" * 100


def bare_limits(path: Path) -> tuple[float, float]:
    """Durable one-row transactions a second, and rows a second in transactions of 1,000."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE bare (k INTEGER PRIMARY KEY, v BLOB)")

    def insert(transactions: int, rows: int) -> float:
        started = time.perf_counter()
        for _ in range(transactions):
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT INTO bare (v) VALUES (?)", [(_BARE_ROW,)] * rows)
            connection.execute("COMMIT")
        return transactions * rows / (time.perf_counter() - started)

    limits = insert(_SINGLES, 1), insert(_BATCHES, 1_000)
    connection.close()
    return limits


def small_file(path: str) -> CommitRequest:
    """A file of one new block."""
    return CommitRequest(path, 5_000, 1.5, block_list=(BlockHash(os.urandom(32)),))


class Rate(NamedTuple):
    """How fast something went, and what it cost: the steadier figure on a busy machine."""

    per_s: float
    cpu_us: float
    """User and system time of this process for each."""

    def __str__(self) -> str:
        return f"{self.per_s:,.0f}/s, {self.cpu_us:.0f} us of CPU each"


class Stopwatch:
    """Wall and CPU time since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def rate(self, count: int) -> Rate:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return Rate(count / wall, 1e6 * cpu / count)


async def commit_singly(tree: Tree, account: Account, clients: int, label: str) -> Rate:
    """Commits one entry a call."""

    async def client(number: int) -> None:
        for i in range(_SINGLES // clients):
            request = small_file(f"/{label}/{number}/d{i % 20}/f{i}")
            await tree.commit(account, request, frozenset(request.block_list or ()))

    watch = Stopwatch()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return watch.rate(_SINGLES)


async def commit_batches(
    tree: Tree, account: Account, batches: int, label: str
) -> tuple[Rate, list[BlockHash]]:
    """Entries in full batches (the median batch), and the blocks they named."""
    rates: list[Rate] = []
    blocks: list[BlockHash] = []
    for batch in range(batches):
        first = batch * COMMIT_ENTRIES_MAX
        requests = [
            small_file(f"/{label}/dir{number // 50}/sub{number % 3}/file{number}.txt")
            for number in range(first, first + COMMIT_ENTRIES_MAX)
        ]
        claimed = {block for request in requests for block in request.block_list or ()}
        watch = Stopwatch()
        outcomes = await tree.commit_many(account, requests, claimed)
        rates.append(watch.rate(len(outcomes)))
        assert all(isinstance(o, CommitResult) and o.created for o in outcomes)
        blocks += claimed
    return sorted(rates)[len(rates) // 2], blocks


async def latency_ms(call: Callable[[], Awaitable[object]], repeats: int) -> str:
    """p50 and p99 of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        await call()
        times.append(1e3 * (time.perf_counter() - started))
    times.sort()
    return f"{times[len(times) // 2]:.2f} / {times[len(times) * 99 // 100]:.2f} ms"


async def list_all(tree: Tree, account: Account) -> Rate:
    """Entries of a recursive listing from the root."""
    watch, count, cursor = Stopwatch(), 0, None
    while True:
        page = await tree.list_folder(account, "/", cursor, recursive=True)
        count, cursor = count + len(page.entries), page.cursor
        if cursor is None:
            return watch.rate(count)


async def measure(directory: Path, entries: int) -> None:
    """Print the table."""
    singles, rows = bare_limits(directory / "bare.db")
    print(f"bare SQLite: {singles:,.0f} one-row transactions/s, {rows:,.0f} rows/s by the thousand")
    database = Database(sqlite_url(directory / "metadata.db"))
    prepare_schema(database)
    accounts = Accounts(database, SystemClock(), os.urandom)
    account = await accounts.first_admin("admin")
    token = await accounts.issue_token(account, "bench")
    tree = Tree(database, SystemClock())
    if entries:
        rate, _ = await commit_batches(tree, account, entries // COMMIT_ENTRIES_MAX, "grown")
        print(f"growing to {entries:,} entries: {rate}")
    for clients in (1, 8, 64):
        rate = await commit_singly(tree, account, clients, f"single{clients}")
        print(f"single commits, {clients} clients: {rate}, {rate.per_s / singles:.2f} of bare")
    rate, blocks = await commit_batches(tree, account, _BATCHES, "batched")
    print(f"batches of {COMMIT_ENTRIES_MAX}: {rate}")
    for count in (1, 64, BATCH_BLOCKS_MAX):
        asked = random.Random(count).sample(blocks, count)
        took = await latency_ms(lambda asked=asked: tree.references(account, asked), _LOOKUPS)  # type: ignore[misc]
        print(f"references of {count}: {took}")
    path = "/batched/dir3/sub0/file150.txt"
    print(f"entry: {await latency_ms(lambda: tree.entry(account, path), _LOOKUPS)}")
    deep = "/deep" + "/d" * 20
    await tree.make_folder(account, deep)
    print(f"entry 21 deep: {await latency_ms(lambda: tree.entry(account, deep), _LOOKUPS)}")
    print(f"authenticate: {await latency_ms(lambda: accounts.authenticate(token), _LOOKUPS)}")
    print(f"recursive listing: {await list_all(tree, account)}")
    started = time.perf_counter()
    deleted = await tree.delete(account, "/batched")
    print(f"delete of {deleted.count:,}: {1e3 * (time.perf_counter() - started):.0f} ms")
    await database.aclose()


def main() -> None:
    """Entry point of `python -m bench.metadata_tree`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--entries", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        asyncio.run(measure(Path(directory), options.entries))


if __name__ == "__main__":
    main()
