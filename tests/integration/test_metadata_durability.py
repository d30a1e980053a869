"""Metadata on a real file: races of two processes' worth of writers, restarts, SIGKILL."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from metadata_store import MetadataStore, block, everything, file_request, put

from metadata.batch import CommitResult
from metadata.changes import CommitRequest
from metadata.entries import EntryKind
from protocol.errors import RevConflict

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metadata.db"


async def test_of_racing_commits_on_one_parent_exactly_one_wins(path: Path) -> None:
    first, second = MetadataStore(path), MetadataStore(path)
    account = await first.open()
    rev = None
    for round_ in range(20):
        attempts = [
            put(store, account, "/a/f", [round_ * 10 + n], parent_rev=rev)
            for n, store in enumerate([first, second] * 3)
        ]
        outcomes = await asyncio.gather(*attempts, return_exceptions=True)
        won = [o for o in outcomes if isinstance(o, CommitResult)]
        lost = [o for o in outcomes if isinstance(o, RevConflict)]
        assert (len(won), len(lost)) == (1, 5)
        assert all(error.details["server"] == won[0].entry.as_json() for error in lost)
        rev = won[0].entry.rev
    assert first.audit() == []
    first.close()
    second.close()


async def test_no_increment_is_lost_between_two_databases(path: Path) -> None:
    stores = MetadataStore(path), MetadataStore(path)
    account = await stores[0].open()

    def counter(value: int, rev: str | None) -> CommitRequest:
        content = str(value).encode()
        return CommitRequest("/n", len(content), 1.0, content=content, parent_rev=rev)

    await stores[0].tree.commit(account, counter(0, None), frozenset())
    created = 0

    async def increment(store: MetadataStore) -> None:
        nonlocal created
        for _ in range(15):
            entry = await store.tree.entry(account, "/n")
            assert entry.content is not None
            request = counter(int(entry.content) + 1, entry.rev)
            try:
                outcome = await store.tree.commit(account, request, frozenset())
            except RevConflict:
                continue
            created += outcome.created

    await asyncio.gather(*(increment(store) for store in stores * 4))
    final = await stores[1].tree.entry(account, "/n")
    assert final.content == str(created).encode()
    assert created >= 15
    for store in stores:
        assert store.audit() == []
        store.close()


async def test_mixed_traffic_keeps_every_invariant(path: Path) -> None:
    store = MetadataStore(path)
    account = await store.open()

    async def work(worker: int) -> None:
        for i in range(30):
            request = file_request(f"/d{i % 3}/f{(worker * i) % 5}", [i % 7, worker])
            await asyncio.gather(
                store.tree.commit(account, request, frozenset(request.block_list or ())),
                store.tree.commit_many(account, [request], frozenset()),
                store.tree.make_folder(account, f"/d{i % 3}/g{worker}"),
                store.tree.delete(account, f"/d{(i + 1) % 3}"),
                store.tree.list_folder(account, "/", recursive=True),
                return_exceptions=True,
            )

    await asyncio.gather(*(work(worker) for worker in range(6)))
    assert store.audit() == []
    store.close()


async def test_a_restart_finds_everything_that_was_acknowledged(path: Path) -> None:
    store = MetadataStore(path)
    account = await store.open()
    token = await store.accounts.issue_token(account, "kept")
    old = (await put(store, account, "/a/f", [1])).entry
    await put(store, account, "/a/f", [2], parent_rev=old.rev)
    await put(store, account, "/b", [3])
    await store.tree.delete(account, "/b")
    before = await everything(store, account)
    store.close()
    again = MetadataStore(path)
    assert await again.accounts.authenticate(token) == account
    assert await everything(again, account) == before
    asked = [block(n) for n in range(5)]
    assert await again.tree.references(account, asked) == {block(1), block(2), block(3)}
    assert again.audit() == []
    fresh = await put(again, account, "/b", [3])
    assert fresh.entry.rev > old.rev
    again.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from metadata_store import MetadataStore, file_request

async def main():
    store = MetadataStore(Path(sys.argv[1]))
    account = await store.open()

    async def work(worker):
        n = 0
        while True:
            paths = [f"/w{worker}/d{n % 4}/f{n}-{i}" for i in range(9)]
            requests = [file_request(path, [n, worker]) for path in paths]
            claims = {b for r in requests for b in r.block_list}
            await store.tree.commit_many(account, requests[1:], claims)
            await store.tree.commit(account, requests[0], claims)
            print("\\n".join(r.path for r in requests), flush=True)
            n += 1

    await asyncio.gather(*(work(w) for w in range(4)))

asyncio.run(main())
"""


def write_until_killed(path: Path, acknowledged: int) -> set[str]:
    """Paths that the writer said were committed; it is killed after that many at least."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests/support'}"},
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(acknowledged)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    return {line.strip() for line in lines if line.endswith("\n")}


@pytest.mark.parametrize("acknowledged", [40, 400])
async def test_sigkill_loses_no_acknowledged_commit(path: Path, acknowledged: int) -> None:
    said = write_until_killed(path, acknowledged)
    assert len(said) >= acknowledged
    store = MetadataStore(path)
    account = await store.open()
    kept = {e.path for e in await everything(store, account) if e.kind is EntryKind.FILE}
    assert said <= kept
    assert store.audit() == []
    store.close()
