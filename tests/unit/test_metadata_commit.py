"""Commits: compare and swap, authority over blocks, what counts as the same, batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from metadata_store import MetadataStore, block, everything, file_request, put
from sqlalchemy import func, select

from metadata.accounts import Account
from metadata.batch import CommitResult
from metadata.changes import CommitRequest
from metadata.entries import EntryKind
from metadata.schema import journal, versions
from protocol.errors import InvalidPath, InvalidRequest, MissingBlocks, RevConflict
from protocol.hashing import hash_block
from protocol.limits import (
    BLOCK_BYTES_MAX,
    COMMIT_ENTRIES_MAX,
    INLINE_FILE_BYTES_MAX,
    PATH_BYTES_MAX,
)


@pytest.fixture
def store():
    store = MetadataStore()
    yield store
    assert store.audit() == []
    store.close()


@pytest.fixture
async def account(store: MetadataStore) -> Account:
    return await store.open()


def inline(path: str, content: bytes, **rest: Any) -> CommitRequest:
    return CommitRequest(path=path, content=content, **{"size": len(content), "mtime": 1.0, **rest})


def journal_of(store: MetadataStore, account: Account) -> list[tuple[int, str]]:
    query = (
        select(journal.c.position, journal.c.change)
        .where(journal.c.namespace_id == account.namespace_id)
        .order_by(journal.c.position)
    )
    return store.database.read_now(lambda c: [(p, k) for p, k in c.execute(query)])


def version_count(store: MetadataStore) -> int:
    query = select(func.count()).select_from(versions)
    return store.database.read_now(lambda c: c.execute(query).scalar_one())


# -- what a commit leaves ------------------------------------------------------------------------


async def test_a_committed_file_reads_back_exactly(store: MetadataStore, account: Account) -> None:
    store.clock.now = 5_000.25
    result = await put(store, account, "/docs/Plan.md", [3, 1, 3], mtime=-7.125, executable=True)
    assert result.created
    entry = await store.tree.entry(account, "docs/plan.MD")
    assert entry == result.entry
    assert entry.path == "/docs/Plan.md"
    assert (entry.name, entry.kind, entry.size) == ("Plan.md", EntryKind.FILE, 3000)
    assert (entry.mtime, entry.executable, entry.modified) == (-7.125, True, 5_000.25)
    assert entry.block_list == (block(3), block(1), block(3))
    assert (entry.content, entry.symlink) == (None, None)


async def test_small_files_and_links_are_kept_inline(
    store: MetadataStore, account: Account
) -> None:
    content = bytes(range(256)) * (INLINE_FILE_BYTES_MAX // 256)
    small = await store.tree.commit(account, inline("/small", content), frozenset())
    assert (small.entry.content, small.entry.block_list) == (content, None)
    link = CommitRequest(path="/link", size=8, mtime=2.0, symlink="../sm/ö", executable=True)
    linked = (await store.tree.commit(account, link, frozenset())).entry
    assert (linked.kind, linked.symlink, linked.size) == (EntryKind.SYMLINK, "../sm/ö", 0)
    assert not linked.executable
    assert await store.tree.entry(account, "/link") == linked
    assert await store.tree.entry(account, "/small") == small.entry


async def test_the_empty_file_has_one_form(store: MetadataStore, account: Account) -> None:
    listed = await put(store, account, "/a", [], size=0)
    typed = await store.tree.commit(account, inline("/a", b""), frozenset())
    assert (listed.created, typed.created) == (True, False)
    assert typed.entry.content == b""
    assert typed.entry.block_list is None


async def test_folders_on_the_way_are_made_once(store: MetadataStore, account: Account) -> None:
    first = await put(store, account, "/a/b/c/one", [1])
    second = await put(store, account, "/A/B/two", [2])
    assert second.entry.path == "/a/b/two"
    folder = await store.tree.entry(account, "/a/b")
    assert (folder.kind, folder.size, folder.block_list) == (EntryKind.FOLDER, 0, None)
    paths = [entry.path for entry in await everything(store, account)]
    assert paths == ["/a", "/a/b", "/a/b/c", "/a/b/c/one", "/a/b/two"]
    assert first.entry.id != second.entry.id


async def test_every_change_takes_the_next_journal_position(
    store: MetadataStore, account: Account
) -> None:
    one = await put(store, account, "/a/f", [1])
    await put(store, account, "/a/f", [2], parent_rev=one.entry.rev)
    await put(store, account, "/a/f", [2])
    await store.tree.delete(account, "/a")
    assert journal_of(store, account) == [
        (1, "created"),
        (2, "created"),
        (3, "created"),
        (4, "modified"),
        (5, "deleted"),
    ]


# -- compare and swap ----------------------------------------------------------------------------


async def test_none_as_parent_means_nothing_may_be_there(
    store: MetadataStore, account: Account
) -> None:
    old = await put(store, account, "/F", [1])
    with pytest.raises(RevConflict) as caught:
        await put(store, account, "/f", [2])
    assert caught.value.details == {"path": "/f", "server": old.entry.as_json()}
    assert await store.tree.entry(account, "/f") == old.entry


async def test_a_current_parent_replaces_and_keeps_the_id(
    store: MetadataStore, account: Account
) -> None:
    old = (await put(store, account, "/F", [1])).entry
    new = await put(store, account, "/f", [2], parent_rev=old.rev)
    assert new.created
    assert (new.entry.id, new.entry.path) == (old.id, "/F")
    assert new.entry.rev != old.rev
    assert new.entry.block_list == (block(2),)


async def test_a_stale_parent_is_refused_with_the_server_state(
    store: MetadataStore, account: Account
) -> None:
    first = (await put(store, account, "/f", [1])).entry
    second = (await put(store, account, "/f", [2], parent_rev=first.rev)).entry
    for stale in (first.rev, "", "0", "not a rev", second.rev.upper() + "0", second.id):
        with pytest.raises(RevConflict) as caught:
            await put(store, account, "/f", [3], parent_rev=stale)
        assert caught.value.details["server"] == second.as_json()
    assert await store.tree.entry(account, "/f") == second


async def test_a_parent_rev_where_nothing_is_conflicts_with_nothing(
    store: MetadataStore, account: Account
) -> None:
    gone = (await put(store, account, "/f", [1])).entry
    await store.tree.delete(account, "/f")
    for path in ("/f", "/x/y"):
        with pytest.raises(RevConflict) as caught:
            await put(store, account, path, [2], parent_rev=gone.rev)
        assert caught.value.details == {"path": path, "server": None}
    assert await everything(store, account) == []


async def test_a_name_made_again_is_another_entry(store: MetadataStore, account: Account) -> None:
    before = (await put(store, account, "/f", [1])).entry
    await store.tree.delete(account, "/f")
    after = (await put(store, account, "/f", [1])).entry
    assert after.id != before.id
    assert after.rev != before.rev


async def test_a_file_where_a_folder_is_conflicts_with_the_folder(
    store: MetadataStore, account: Account
) -> None:
    await put(store, account, "/a/f", [1])
    folder = await store.tree.entry(account, "/a")
    for parent_rev in (None, folder.rev):
        with pytest.raises(RevConflict) as caught:
            await put(store, account, "/A", [2], parent_rev=parent_rev)
        assert caught.value.details["server"] == folder.as_json()


@pytest.mark.parametrize("make_link", [False, True])
async def test_a_path_through_a_file_or_link_conflicts_with_it(
    store: MetadataStore, account: Account, make_link: bool
) -> None:
    if make_link:
        link = CommitRequest(path="/f", size=0, mtime=1.0, symlink="/elsewhere")
        there = (await store.tree.commit(account, link, frozenset())).entry
    else:
        there = (await put(store, account, "/f", [1])).entry
    for attempt in (
        put(store, account, "/f/g/h", [1]),
        store.tree.make_folder(account, "/f/g"),
        store.tree.make_folder(account, "/f"),
    ):
        with pytest.raises(RevConflict) as caught:
            await attempt
        assert caught.value.details["server"] == there.as_json()
    assert await everything(store, account) == [there]


async def test_a_file_may_become_a_link_and_back(store: MetadataStore, account: Account) -> None:
    was = (await put(store, account, "/f", [1], executable=True)).entry
    link = CommitRequest(path="/f", size=0, mtime=1.0, symlink="x", parent_rev=was.rev)
    linked = await store.tree.commit(account, link, frozenset())
    assert linked.created
    assert await store.tree.entry(account, "/f") == linked.entry
    again = await put(store, account, "/f", [1], parent_rev=linked.entry.rev)
    assert (again.created, again.entry.kind, again.entry.id) == (True, EntryKind.FILE, was.id)


# -- the same content again ----------------------------------------------------------------------


@pytest.mark.parametrize("parent_rev", [None, "stale", "current"])
async def test_the_same_content_again_succeeds_whatever_the_parent(
    store: MetadataStore, account: Account, parent_rev: str | None
) -> None:
    old = (await put(store, account, "/f", [1, 2])).entry
    if parent_rev == "current":
        parent_rev = old.rev
    again = await put(store, account, "/f", [1, 2], parent_rev=parent_rev)
    assert again == CommitResult(old, created=False)
    assert version_count(store) == 1


async def test_mtime_and_mode_follow_only_a_current_parent(
    store: MetadataStore, account: Account
) -> None:
    old = (await put(store, account, "/f", [1])).entry
    for stale in (None, "stale"):
        result = await put(store, account, "/f", [1], parent_rev=stale, mtime=9.0, executable=True)
        assert result == CommitResult(old, created=False)
    touched = await put(store, account, "/f", [1], parent_rev=old.rev, mtime=9.0, executable=True)
    assert not touched.created
    assert (touched.entry.mtime, touched.entry.executable) == (9.0, True)
    assert touched.entry.rev != old.rev
    lost_reply = await put(
        store, account, "/f", [1], parent_rev=old.rev, mtime=9.0, executable=True
    )
    assert lost_reply == touched
    assert await store.tree.entry(account, "/f") == touched.entry


async def test_inline_bytes_stay_inline_when_their_block_is_committed(
    store: MetadataStore, account: Account
) -> None:
    content = b"few bytes"
    blocks = (hash_block(content),)
    old = await store.tree.commit(account, inline("/f", content), frozenset())
    listed = CommitRequest(path="/f", size=9, mtime=1.0, block_list=blocks, executable=True)
    same = await store.tree.commit(account, listed, frozenset())
    assert same == CommitResult(old.entry, created=False)
    touch = replace(listed, parent_rev=old.entry.rev)
    touched = await store.tree.commit(account, touch, frozenset())
    assert (touched.created, touched.entry.executable) == (False, True)
    assert (touched.entry.content, touched.entry.block_list) == (content, None)
    assert await store.tree.references(account, blocks) == set()
    for other in (inline("/f", b"few bytez"), inline("/f", b"fewer bytes")):
        with pytest.raises(RevConflict):
            await store.tree.commit(account, other, frozenset())


async def test_a_block_stays_a_block_when_its_bytes_are_committed_inline(
    store: MetadataStore, account: Account
) -> None:
    content = b"few bytes"
    blocks = (hash_block(content),)
    listed = CommitRequest(path="/f", size=9, mtime=1.0, block_list=blocks)
    old = await store.tree.commit(account, listed, frozenset(blocks))
    touch = inline("/f", content, mtime=3.0, parent_rev=old.entry.rev)
    touched = await store.tree.commit(account, touch, frozenset())
    assert (touched.created, touched.entry.mtime) == (False, 3.0)
    assert (touched.entry.content, touched.entry.block_list) == (None, blocks)


async def test_a_link_to_elsewhere_is_other_content(store: MetadataStore, account: Account) -> None:
    link = CommitRequest(path="/l", size=0, mtime=1.0, symlink="here")
    old = await store.tree.commit(account, link, frozenset())
    again = await store.tree.commit(account, link, frozenset())
    assert again == CommitResult(old.entry, created=False)
    with pytest.raises(RevConflict):
        await store.tree.commit(account, replace(link, symlink="else"), frozenset())


async def test_the_same_blocks_in_another_order_or_size_are_other_content(
    store: MetadataStore, account: Account
) -> None:
    await put(store, account, "/f", [1, 2], size=2000)
    for blocks, size in (([2, 1], 2000), ([1, 2], 2001), ([1, 2, 2], 3000), ([1], 1000)):
        with pytest.raises(RevConflict):
            await put(store, account, "/f", blocks, size=size)


# -- authority over blocks -----------------------------------------------------------------------


async def test_a_block_nobody_vouches_for_is_listed_in_order_once(
    store: MetadataStore, account: Account
) -> None:
    request = file_request("/f", [5, 3, 5, 4, 3, 9])
    with pytest.raises(MissingBlocks) as caught:
        await store.tree.commit(account, request, {block(4)})
    assert caught.value.details["missing"] == [str(block(n)) for n in (5, 3, 9)]
    assert await everything(store, account) == []
    assert journal_of(store, account) == [(1, "created")]


async def test_a_namespace_vouches_for_what_its_versions_list(
    store: MetadataStore, account: Account
) -> None:
    old = (await put(store, account, "/f", [1])).entry
    await put(store, account, "/f", [2], parent_rev=old.rev)
    await put(store, account, "/gone", [3])
    await store.tree.delete(account, "/gone")
    copy = await store.tree.commit(account, file_request("/g", [1, 2, 3]), frozenset())
    assert copy.created
    wanted = [block(n) for n in range(5)]
    assert await store.tree.references(account, wanted) == {block(1), block(2), block(3)}


async def test_one_account_never_vouches_for_another(
    store: MetadataStore, account: Account
) -> None:
    await put(store, account, "/f", [1])
    other = await store.accounts.create_account("other", admin=False)
    with pytest.raises(MissingBlocks):
        await store.tree.commit(other, file_request("/f", [1]), frozenset())
    assert await store.tree.references(other, [block(1)]) == set()
    assert await everything(store, other) == []
    mine = await put(store, other, "/f", [1])
    theirs = await store.tree.entry(account, "/f")
    assert mine.entry.id != theirs.id
    assert mine.entry.rev != theirs.rev


async def test_a_conflict_is_told_before_blocks_are_asked_for(
    store: MetadataStore, account: Account
) -> None:
    await put(store, account, "/f", [1])
    with pytest.raises(RevConflict):
        await store.tree.commit(account, file_request("/f", [2]), frozenset())


async def test_any_number_of_hashes_can_be_asked_about(
    store: MetadataStore, account: Account
) -> None:
    numbers = range(0, 9_000, 2)
    await put(store, account, "/big", numbers)
    for count in (0, 1, 2, 63, 64, 65, 4_095, 4_096, 4_097, 9_000):
        asked = [block(n) for n in range(count)]
        expected = {block(n) for n in range(0, count, 2)}
        assert await store.tree.references(account, asked) == expected
    assert await store.tree.references(account, [block(2)] * 3) == {block(2)}


# -- malformed requests --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"path": "/f", "size": 1, "mtime": 1.0},
        {"path": "/f", "size": 1, "mtime": 1.0, "content": b"x", "block_list": (block(1),)},
        {"path": "/f", "size": 1, "mtime": 1.0, "content": b"x", "symlink": "y"},
        {"path": "/f", "size": 0, "mtime": 1.0, "content": b"x"},
        {"path": "/f", "size": 2, "mtime": 1.0, "content": b"x"},
        {"path": "/f", "size": -1, "mtime": 1.0, "block_list": ()},
        {"path": "/f", "size": 1, "mtime": 1.0, "block_list": ()},
        {"path": "/f", "size": 0, "mtime": 1.0, "block_list": (block(1),)},
        {"path": "/f", "size": 1, "mtime": 1.0, "block_list": (block(1), block(2))},
        {"path": "/f", "size": BLOCK_BYTES_MAX + 1, "mtime": 1.0, "block_list": (block(1),)},
        {"path": "/f", "size": 1, "mtime": math.nan, "content": b"x"},
        {"path": "/f", "size": 1, "mtime": -math.inf, "content": b"x"},
        {"path": "/f", "size": 1, "mtime": 10**400, "content": b"x"},
        {"path": "/f", "size": 0, "mtime": 1.0, "symlink": ""},
        {"path": "/f", "size": 0, "mtime": 1.0, "symlink": "a\0b"},
        {"path": "/f", "size": 0, "mtime": 1.0, "symlink": "\ud800"},
        {"path": "/f", "size": 0, "mtime": 1.0, "symlink": "x" * (PATH_BYTES_MAX + 1)},
        {"path": "/f", "size": 3, "mtime": 1.0, "symlink": "x"},
        {
            "path": "/f",
            "size": INLINE_FILE_BYTES_MAX + 1,
            "mtime": 1.0,
            "content": bytes(INLINE_FILE_BYTES_MAX + 1),
        },
    ],
)
async def test_a_malformed_commit_is_refused(
    store: MetadataStore, account: Account, bad: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await store.tree.commit(account, CommitRequest(**bad), {block(1), block(2)})
    assert caught.value.details["path"] == "/f"
    assert journal_of(store, account) == [(1, "created")]


@pytest.mark.parametrize("path", ["", "/", "/a/../b", "/a\0", "//"])
async def test_no_file_can_be_committed_at_an_invalid_path_or_the_root(
    store: MetadataStore, account: Account, path: str
) -> None:
    with pytest.raises(InvalidPath):
        await put(store, account, path, [1])


async def test_blocks_of_any_size_may_add_up_to_a_file(
    store: MetadataStore, account: Account
) -> None:
    await put(store, account, "/least", [1, 2, 3], size=3)
    await put(store, account, "/most", [1, 2, 3], size=3 * BLOCK_BYTES_MAX)


# -- batches -------------------------------------------------------------------------------------


async def test_a_bad_entry_of_a_batch_hurts_no_other(
    store: MetadataStore, account: Account
) -> None:
    await put(store, account, "/old", [1])
    requests = [
        file_request("/new/a", [2]),
        file_request("/bad/../path", [2]),
        file_request("/old", [2]),
        file_request("/new/b", [7, 8, 7]),
        inline("/new/c", b"c", size=5),
        file_request("/new/a/below", [2]),
        file_request("/new/d", [2, 1]),
    ]
    outcomes = await store.tree.commit_many(account, requests, {block(2), block(8)})
    kinds = [o.created if isinstance(o, CommitResult) else o.kind for o in outcomes]
    assert kinds == [
        True,
        "invalid_path",
        "conflict",
        "missing_blocks",
        "invalid_request",
        "conflict",
        True,
    ]
    assert isinstance(outcomes[3], MissingBlocks)
    assert outcomes[3].details["missing"] == [str(block(7))]
    paths = [entry.path for entry in await everything(store, account)]
    assert paths == ["/new", "/new/a", "/new/d", "/old"]


async def test_entries_of_a_batch_see_those_before_them(
    store: MetadataStore, account: Account
) -> None:
    requests = [
        file_request("/x/F", [1]),
        file_request("/X/f", [1]),
        file_request("/x/f", [2]),
        file_request("/x", [2]),
        file_request("/x/F/g", [2]),
    ]
    outcomes = await store.tree.commit_many(account, requests, {block(1), block(2)})
    first, same, *conflicts = outcomes
    assert isinstance(first, CommitResult)
    assert same == CommitResult(first.entry, created=False)
    for conflict in conflicts:
        assert isinstance(conflict, RevConflict)
    assert conflicts[0].details["server"] == first.entry.as_json()
    assert conflicts[1].details["server"]["path"] == "/x"
    assert conflicts[2].details["server"] == first.entry.as_json()


async def test_a_full_batch_is_taken_and_one_more_is_refused(
    store: MetadataStore, account: Account
) -> None:
    requests = [
        inline(f"/d{i % 7}/e{i % 11}/f{i}", str(i).encode()) for i in range(COMMIT_ENTRIES_MAX)
    ]
    outcomes = await store.tree.commit_many(account, requests, frozenset())
    assert all(isinstance(o, CommitResult) and o.created for o in outcomes)
    files = [e for e in await everything(store, account) if e.kind is EntryKind.FILE]
    assert {e.path: e.content for e in files} == {r.path: r.content for r in requests}
    again = await store.tree.commit_many(account, requests, frozenset())
    assert [o.created for o in again if isinstance(o, CommitResult)] == [False] * len(requests)
    with pytest.raises(InvalidRequest):
        await store.tree.commit_many(account, [*requests, requests[0]], frozenset())
    assert await store.tree.commit_many(account, [], frozenset()) == []


# -- folders and deletes -------------------------------------------------------------------------


async def test_making_a_folder_is_idempotent(store: MetadataStore, account: Account) -> None:
    made = await store.tree.make_folder(account, "/A/b")
    again = await store.tree.make_folder(account, "/a/B")
    assert (made.created, again.created) == (True, False)
    assert made.entry == again.entry
    assert made.entry.path == "/A/b"
    root = await store.tree.make_folder(account, "/")
    assert (root.created, root.entry.path, root.entry.name) == (False, "/", "")
    assert root.entry == await store.tree.entry(account, "")
