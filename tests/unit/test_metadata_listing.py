"""Listings: order, pages, cursors, and change while they are read."""

from __future__ import annotations

import base64

import pytest
from metadata_store import MetadataStore, everything, put

from metadata import listing
from metadata.accounts import Account
from metadata.changes import CommitRequest
from metadata.paths import keys_of, parse_path
from protocol.errors import EntryNotFound, InvalidRequest
from protocol.limits import COMMIT_ENTRIES_MAX, LISTING_PAGE_MAX


@pytest.fixture
def store():
    store = MetadataStore()
    yield store
    assert store.audit() == []
    store.close()


@pytest.fixture
async def account(store: MetadataStore) -> Account:
    return await store.open()


async def put_many(store: MetadataStore, account: Account, paths: list[str]) -> None:
    for start in range(0, len(paths), COMMIT_ENTRIES_MAX):
        requests = [
            CommitRequest(path=path, size=1, mtime=1.0, content=b"x")
            for path in paths[start : start + COMMIT_ENTRIES_MAX]
        ]
        await store.tree.commit_many(account, requests, frozenset())


async def pages(
    store: MetadataStore, account: Account, path: str, limit: int, *, recursive: bool = False
) -> list[str]:
    paths: list[str] = []
    cursor = None
    while True:
        page = await store.tree.list_folder(account, path, cursor, limit, recursive=recursive)
        paths += [entry.path for entry in page.entries]
        cursor = page.cursor
        if cursor is None:
            return paths
        assert len(page.entries) == limit


async def test_a_folder_of_ten_thousand_lists_in_order_at_any_page_size(
    store: MetadataStore, account: Account
) -> None:
    names = [f"File {(i * 7919) % 10_000}" for i in range(10_000)]
    await put_many(store, account, [f"/big/{name}" for name in names])
    expected = [f"/big/{name}" for name in sorted(names, key=str.casefold)]
    for limit in (17, 1_000, LISTING_PAGE_MAX):
        assert await pages(store, account, "/BIG", limit) == expected


async def test_names_come_in_key_order_in_their_own_case(
    store: MetadataStore, account: Account
) -> None:
    names = ["b", "A", "C", "É", "e\u0301a", "Z", "_", "10", "9", "😀", "\uffee", "日"]
    await put_many(store, account, names)
    listed = await pages(store, account, "/", 3)
    assert listed == [f"/{name}" for name in sorted(names, key=lambda n: keys_of((n,)))]


async def test_a_recursive_listing_is_in_pre_order(store: MetadataStore, account: Account) -> None:
    files = ["a/x/1", "a/x/2", "a.txt", "a/y", "B/deep/er/f", "c", "a-b/z"]
    await put_many(store, account, files)
    await store.tree.make_folder(account, "/empty/folder")
    paths = {"/empty", "/empty/folder"}
    for file in files:
        names = file.split("/")
        paths |= {"/" + "/".join(names[:depth]) for depth in range(1, len(names) + 1)}
    expected = sorted(paths, key=lambda path: keys_of(parse_path(path)))
    for limit in range(1, len(expected) + 2):
        assert await pages(store, account, "/", limit, recursive=True) == expected
    below = [path for path in expected if path.startswith("/a/")]
    assert await pages(store, account, "/A", 2, recursive=True) == below


async def test_a_listing_shows_entries_as_entry_does(
    store: MetadataStore, account: Account
) -> None:
    await put(store, account, "/d/File", [1, 2], mtime=3.5)
    link = CommitRequest(path="/d/link", size=0, mtime=1.0, symlink="File")
    await store.tree.commit(account, link, frozenset())
    listed = await everything(store, account)
    assert listed == [await store.tree.entry(account, entry.path) for entry in listed]
    assert [entry.path for entry in listed] == ["/d", "/d/File", "/d/link"]


async def test_an_empty_folder_lists_nothing(store: MetadataStore, account: Account) -> None:
    page = await store.tree.list_folder(account, "")
    assert (page.entries, page.cursor) == ([], None)


async def test_what_stays_is_listed_once_whatever_changes_meanwhile(
    store: MetadataStore, account: Account
) -> None:
    await put_many(store, account, [f"d{i}/f{j}" for i in range(4) for j in range(4)])
    page = await store.tree.list_folder(account, "/", None, 8, recursive=True)
    assert page.entries[-1].path == "/d1/f1"
    # The open folder vanishes, an earlier one comes, one before and one after the cursor grow.
    await store.tree.delete(account, "/d1")
    await put_many(store, account, ["a/new", "d0/f9", "d2/f00", "d3/f9"])
    rest = await store.tree.list_folder(account, "/", page.cursor, 100, recursive=True)
    assert [entry.path for entry in rest.entries] == [
        "/d2",
        "/d2/f0",
        "/d2/f00",
        "/d2/f1",
        "/d2/f2",
        "/d2/f3",
        "/d3",
        "/d3/f0",
        "/d3/f1",
        "/d3/f2",
        "/d3/f3",
        "/d3/f9",
    ]


@pytest.mark.parametrize("gone", ["/d/b", "/d", "/d/b/x"])
async def test_a_cursor_goes_on_where_its_entry_was(
    store: MetadataStore, account: Account, gone: str
) -> None:
    await put_many(store, account, ["d/a", "d/b/x", "d/b/y", "d/c", "e"])
    page = await store.tree.list_folder(account, "/", None, 4, recursive=True)
    assert page.entries[-1].path == "/d/b/x"
    await store.tree.delete(account, gone)
    rest = await store.tree.list_folder(account, "/", page.cursor, 10, recursive=True)
    expected = [p for p in ("/d/b/y", "/d/c", "/e") if not p.startswith(gone)]
    assert [entry.path for entry in rest.entries] == expected


async def test_a_cursor_survives_its_folder_becoming_a_file(
    store: MetadataStore, account: Account
) -> None:
    await put_many(store, account, ["b/x", "b/y", "c"])
    page = await store.tree.list_folder(account, "/", None, 2, recursive=True)
    await store.tree.delete(account, "/b")
    await put_many(store, account, ["b"])
    rest = await store.tree.list_folder(account, "/", page.cursor, 10, recursive=True)
    assert [entry.path for entry in rest.entries] == ["/c"]


async def test_a_page_ends_early_when_its_block_lists_are_long(
    store: MetadataStore, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "LISTING_PAGE_BYTES_MAX", 32 * 10)
    for name in "abcdef":
        await put(store, account, name, range(4))
    await put(store, account, "c2", range(50))
    sizes = []
    cursor = None
    while True:
        page = await store.tree.list_folder(account, "/", cursor, 100)
        sizes.append([entry.name for entry in page.entries])
        cursor = page.cursor
        if cursor is None:
            break
    assert sizes == [["a", "b"], ["c"], ["c2"], ["d", "e"], ["f"]]


# -- refusals ------------------------------------------------------------------------------------


async def test_a_cursor_with_any_character_changed_is_refused(
    store: MetadataStore, account: Account
) -> None:
    await put_many(store, account, ["a", "b", "c"])
    cursor = (await store.tree.list_folder(account, "/", None, 1)).cursor
    assert cursor is not None
    for at, character in enumerate(cursor):
        other = "A" if character != "A" else "B"
        damaged = cursor[:at] + other + cursor[at + 1 :]
        if base64.urlsafe_b64decode(damaged + "==") == base64.urlsafe_b64decode(cursor + "=="):
            continue  # the spare bits of the last character
        with pytest.raises(InvalidRequest):
            await store.tree.list_folder(account, "/", damaged, 1)


@pytest.mark.parametrize("cursor", ["", "x", "AAAA", "é", "=" * 12, "A" * 100_000, "a b", "\0"])
async def test_no_text_makes_a_cursor(store: MetadataStore, account: Account, cursor: str) -> None:
    with pytest.raises(InvalidRequest):
        await store.tree.list_folder(account, "/", cursor)


async def test_a_forged_cursor_with_a_good_checksum_is_still_checked(
    store: MetadataStore, account: Account
) -> None:
    root = await store.tree.entry(account, "/")
    number = int(root.id.removeprefix("id:"), 16)
    forged = [
        listing.Cursor(2, number, False, ["a"]),
        listing.Cursor(1, number, False, []),
        listing.Cursor(1, number, False, ["a"] * 1_000),
        listing.Cursor(1, number, False, ["a\0"]),
        listing.Cursor(1, number + 1, False, ["a"]),
        listing.Cursor(1, number, True, ["a"]),
    ]
    for cursor in forged:
        with pytest.raises(InvalidRequest):
            await store.tree.list_folder(account, "/", cursor.print())


async def test_a_cursor_is_good_for_its_own_listing_only(
    store: MetadataStore, account: Account
) -> None:
    await put_many(store, account, ["a/1", "a/2", "b/1", "b/2"])
    other = await store.accounts.create_account("other", admin=False)
    await put_many(store, other, ["a/1", "a/2"])
    cursor = (await store.tree.list_folder(account, "/a", None, 1)).cursor
    for who, path, recursive in (
        (account, "/b", False),
        (account, "/", False),
        (account, "/a", True),
        (other, "/a", False),
    ):
        with pytest.raises(InvalidRequest):
            await store.tree.list_folder(who, path, cursor, recursive=recursive)


@pytest.mark.parametrize("limit", [-1, 0, LISTING_PAGE_MAX + 1])
async def test_a_limit_out_of_range_is_refused(
    store: MetadataStore, account: Account, limit: int
) -> None:
    with pytest.raises(InvalidRequest):
        await store.tree.list_folder(account, "/", None, limit)


async def test_only_folders_that_exist_can_be_listed(
    store: MetadataStore, account: Account
) -> None:
    await put(store, account, "/f", [1])
    with pytest.raises(InvalidRequest):
        await store.tree.list_folder(account, "/f")
    with pytest.raises(EntryNotFound):
        await store.tree.list_folder(account, "/g")
    with pytest.raises(EntryNotFound):
        await store.tree.list_folder(account, "/f/g")
