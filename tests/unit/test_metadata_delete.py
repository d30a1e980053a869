"""Deletes: subtrees, compare and swap, what stays referenced."""

from __future__ import annotations

import pytest
from metadata_store import MetadataStore, block, everything, put

from metadata.accounts import Account
from protocol.errors import EntryNotFound, InvalidPath, RevConflict


@pytest.fixture
def store():
    store = MetadataStore()
    yield store
    assert store.audit() == []
    store.close()


@pytest.fixture
async def account(store: MetadataStore) -> Account:
    return await store.open()


async def test_deleting_a_folder_takes_all_below_it(store: MetadataStore, account: Account) -> None:
    for path in ("/a/b/c/one", "/a/b/two", "/a/three", "/z"):
        await put(store, account, path, [1])
    assert (await store.tree.delete(account, "/a/B/two")).count == 1
    assert (await store.tree.delete(account, "/A")).count == 5
    assert [entry.path for entry in await everything(store, account)] == ["/z"]
    for path in ("/a", "/a/b", "/a/b/c/one", "/a/three"):
        with pytest.raises(EntryNotFound):
            await store.tree.entry(account, path)
        with pytest.raises(EntryNotFound):
            await store.tree.delete(account, path)


async def test_a_folder_made_again_is_empty(store: MetadataStore, account: Account) -> None:
    await put(store, account, "/a/one", [1])
    await store.tree.delete(account, "/a")
    await put(store, account, "/a/two", [1])
    assert [entry.path for entry in await everything(store, account)] == ["/a", "/a/two"]
    assert (await store.tree.delete(account, "/a")).count == 2


async def test_a_delete_with_a_stale_rev_is_refused_with_the_server_state(
    store: MetadataStore, account: Account
) -> None:
    old = (await put(store, account, "/d/f", [1])).entry
    new = (await put(store, account, "/d/f", [2], parent_rev=old.rev)).entry
    with pytest.raises(RevConflict) as caught:
        await store.tree.delete(account, "/d/F", old.rev)
    assert caught.value.details == {"path": "/d/F", "server": new.as_json()}
    assert (await store.tree.delete(account, "/d/f", new.rev)).count == 1


async def test_a_delete_keeps_the_blocks_referenced(store: MetadataStore, account: Account) -> None:
    await put(store, account, "/f", [1, 1, 2])
    await store.tree.delete(account, "/f")
    assert await store.tree.references(account, [block(1), block(2)]) == {block(1), block(2)}


async def test_the_root_cannot_be_deleted(store: MetadataStore, account: Account) -> None:
    for path in ("", "/"):
        with pytest.raises(InvalidPath):
            await store.tree.delete(account, path)


async def test_a_path_below_a_file_is_not_found(store: MetadataStore, account: Account) -> None:
    await put(store, account, "/f", [1])
    with pytest.raises(EntryNotFound):
        await store.tree.delete(account, "/f/g")
    with pytest.raises(EntryNotFound):
        await store.tree.entry(account, "/f/g")
