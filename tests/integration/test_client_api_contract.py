"""The client against the real API, and the scripted cell held to the same claims."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from api_cell import running_cell
from scripted_server import TOKEN, ScriptedCell

from cli.compare import compare_trees
from client.api import HaversackClient
from client.entries import EntryKind, NewEntry
from client.transfer import TransferOptions, download_tree, plan_upload, upload_tree
from protocol.errors import (
    BlockNotFound,
    EntryNotFound,
    HashMismatch,
    HaversackError,
    InvalidPath,
    InvalidRequest,
    MissingBlocks,
    RevConflict,
    Unauthenticated,
)
from protocol.hashing import hash_block
from protocol.ids import BlockHash
from protocol.limits import BLOCK_BYTES_MAX, MIB


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[str, str]]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    cell = ScriptedCell()
    asyncio.run_coroutine_threadsafe(cell.start(), loop).result(20)
    yield cell.url, TOKEN
    asyncio.run_coroutine_threadsafe(cell.stop(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    with running_cell(tmp_path_factory.mktemp("cell"), scheme="rs-2-1", nodes=3) as cell:
        assert cell.running is not None
        yield cell.running.url, cell.tokens["admin"]


@pytest.fixture(params=["scripted", "real"])
def target(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def client(target: tuple[str, str]) -> AsyncIterator[HaversackClient]:
    async with HaversackClient(*target) as opened:
        yield opened


@pytest.fixture
def top() -> str:
    """A folder of the test's own."""
    return f"/{uuid.uuid4()}"


def block_of(size: int) -> tuple[BlockHash, bytes]:
    data = os.urandom(size)
    return hash_block(data), data


def small(path: str, content: bytes = b"x", rev: str | None = None) -> NewEntry:
    return NewEntry(path, len(content), 1.5, rev, content=content)


@pytest.mark.parametrize("size", [0, 1, 100_000, 200_000, BLOCK_BYTES_MAX])
async def test_blocks_go_in_and_come_out(client: HaversackClient, size: int) -> None:
    block, data = block_of(size)
    if size:
        assert await client.check_blocks([block]) == {block}
        assert await client.put_block(block, data) is True
    else:
        await client.put_block(block, data)
    assert await client.put_block(block, data) is False
    assert await client.check_blocks([block]) == set()
    assert await client.get_block(block) == data
    assert await client.head_block(block) == size


async def test_batches_go_in_and_come_out(client: HaversackClient) -> None:
    blocks = [block_of(size) for size in (1, 10, 1000, 50_000, 300_000)] * 2
    results = await client.put_blocks(blocks)
    assert len(results) == 10
    assert results[:5] == [True] * 5
    assert not any(isinstance(result, HaversackError) for result in results)
    absent = block_of(5)[0]
    got = await client.fetch_blocks([*(block for block, _ in blocks), absent])
    assert [bytes(data) for data in got[:-1]] == [data for _, data in blocks]
    assert isinstance(got[-1], BlockNotFound)


async def test_more_than_an_answer_carries_is_fetched_all_the_same(
    client: HaversackClient,
) -> None:
    blocks = [block_of(3 * MIB) for _ in range(7)]
    assert await client.put_blocks(blocks) == [True] * 7
    got = await client.fetch_blocks([block for block, _ in blocks])
    assert [bytes(data) for data in got] == [data for _, data in blocks]


async def test_bad_blocks_are_refused_as_what_they_are(client: HaversackClient) -> None:
    block, data = block_of(1000)
    with pytest.raises(HashMismatch):
        await client.put_block(block, data + b"!")
    results = await client.put_blocks([block_of(10), (block, b"wrong")])
    assert results[0] is True
    assert isinstance(results[1], HashMismatch)
    with pytest.raises(BlockNotFound):
        await client.get_block(block)
    assert await client.head_block(block) is None


async def test_a_stranger_is_refused_whatever_the_body(target: tuple[str, str]) -> None:
    async with HaversackClient(target[0], "hvs_" + "x" * 43) as stranger:
        for size in (10, BLOCK_BYTES_MAX):
            with pytest.raises(Unauthenticated):
                await stranger.put_block(*block_of(size))
        with pytest.raises(Unauthenticated):
            await stranger.account()
        assert await stranger.is_ready()


async def test_commits_compare_and_swap(client: HaversackClient, top: str) -> None:
    first = await client.commit(small(f"{top}/f", b"one"))
    assert first.created
    assert first.entry.content == b"one"
    assert first.entry.mtime == 1.5
    again = await client.commit(small(f"{top}/f", b"one"))
    assert not again.created
    assert again.entry.rev == first.entry.rev
    with pytest.raises(RevConflict) as caught:
        await client.commit(small(f"{top}/f", b"two"))
    assert caught.value.details["server"]["rev"] == first.entry.rev
    second = await client.commit(small(f"{top}/f", b"two", first.entry.rev))
    assert second.entry.rev != first.entry.rev
    assert (await client.entry(f"{top}/f")).content == b"two"


async def test_a_batch_of_commits_has_one_result_each(client: HaversackClient, top: str) -> None:
    block, data = block_of(5000)
    other, _ = block_of(5000)
    await client.put_block(block, data)
    results = await client.commit_many(
        [
            NewEntry(f"{top}/blocks", 5000, 1e9 + 0.25, None, blocks=(block,), executable=True),
            NewEntry(f"{top}/unclaimed", 5000, 1.0, None, blocks=(other,)),
            small(f"{top}/../escape"),
            NewEntry(f"{top}/link", 0, 2.0, None, symlink="../elsewhere"),
            small(f"{top}/nothing", b""),
            small(f"{top}/blocks/below"),
        ]
    )
    blocks, unclaimed, escape, link, nothing, below = results
    assert not isinstance(blocks, HaversackError)
    assert (blocks.kind, blocks.blocks, blocks.executable) == (EntryKind.FILE, (block,), True)
    assert isinstance(unclaimed, MissingBlocks)
    assert unclaimed.details["missing"] == [str(other)]
    assert isinstance(escape, InvalidPath)
    assert not isinstance(link, HaversackError)
    assert (link.kind, link.symlink) == (EntryKind.SYMLINK, "../elsewhere")
    assert not isinstance(nothing, HaversackError)
    assert nothing.size == 0
    assert isinstance(below, RevConflict)


async def test_folders_are_listed_in_pages_and_deleted_whole(
    client: HaversackClient, top: str
) -> None:
    for number in range(7):
        await client.commit(small(f"{top}/sub/{number}"))
    folder = await client.make_folder(f"{top}/empty/er")
    assert folder.kind is EntryKind.FOLDER
    assert (await client.make_folder(f"{top}/empty/er")).path == folder.path
    page = await client.list_page(f"{top}/sub", limit=3)
    assert [entry.name for entry in page.entries] == ["0", "1", "2"]
    assert page.cursor is not None
    page = await client.list_page(f"{top}/sub", limit=3, cursor=page.cursor)
    assert [entry.name for entry in page.entries] == ["3", "4", "5"]
    paths = [entry.path async for entry in client.iter_folder(top, recursive=True)]
    assert set(paths) == {
        f"{top}/empty", f"{top}/empty/er", f"{top}/sub", *(f"{top}/sub/{n}" for n in range(7))
    }  # fmt: skip
    assert await client.delete(f"{top}/sub") == 8
    with pytest.raises(EntryNotFound):
        await client.entry(f"{top}/sub/1")
    with pytest.raises(EntryNotFound):
        await client.delete(f"{top}/sub")
    with pytest.raises((EntryNotFound, InvalidRequest)):
        _ = [entry async for entry in client.iter_folder(f"{top}/sub")]


@pytest.mark.parametrize(
    "name", ["a b", "a+b", "ä", "?x=1&y", "per%20cent", "new\nline", "#", "'\""]
)
async def test_odd_names_travel_unchanged(client: HaversackClient, top: str, name: str) -> None:
    await client.commit(small(f"{top}/{name}"))
    assert (await client.entry(f"{top}/{name}")).path == f"{top}/{name}"
    assert [entry.name for entry in (await client.list_page(top)).entries] == [name]
    assert (await client.entry(f"{top}/{name.upper()}")).name == name, "case does not matter"


async def test_account_and_status_are_what_the_command_line_reads(client: HaversackClient) -> None:
    account = await client.account()
    assert account["is_admin"] is True
    state = await client.status()
    assert set(state) >= {
        "nodes", "volumes", "blocks", "logical_bytes", "stored_bytes", "debts", "scheme",
        "cluster_id", "version",
    }  # fmt: skip
    assert set(state["nodes"][0]) >= {
        "id", "state", "pid", "directory", "host", "rack", "bytes", "fragments", "detail",
    }  # fmt: skip
    assert set(state["volumes"]) >= {"open", "sealed", "by_spare"}


def make_tree(root: Path) -> None:
    (root / "deep" / "er").mkdir(parents=True)
    (root / "empty").mkdir()
    for size in (0, 1, 4096, 4097, 131_071, 131_072, 262_145, BLOCK_BYTES_MAX, 9 * MIB + 1):
        (root / "deep" / str(size)).write_bytes(os.urandom(size))
    for number in range(300):
        (root / "deep" / "er" / f"{number}").write_bytes(os.urandom(100 * number))
    (root / "tool").write_bytes(b"#!/bin/sh\n")
    (root / "tool").chmod(0o755)
    (root / "link").symlink_to("deep")
    (root / "ünï \n cödé").write_bytes(b"odd")


async def test_a_tree_comes_back_as_it_was(
    client: HaversackClient, top: str, tmp_path: Path
) -> None:
    tree, back = tmp_path / "tree", tmp_path / "back"
    make_tree(tree)
    report = await upload_tree(client, str(tree), top)
    assert report.complete, report
    again = await upload_tree(client, str(tree), top)
    assert again.complete, again
    assert again.counters.bytes_moved == 0
    assert again.counters.files_unchanged == report.counters.files_done
    report = await download_tree(client, top, str(back))
    assert report.complete, report
    result = compare_trees(str(tree), str(back), frozenset())
    assert result.differences == []
    assert result.files == report.counters.files_done
    (tree / "tool").write_bytes(b"changed")
    (tree / "deep" / "4096").chmod(0o755)
    os.utime(tree / "deep" / "1", (10, 10))
    (tree / "link").unlink()
    (tree / "link").symlink_to("tool")
    report = await upload_tree(client, str(tree), top)
    assert report.complete, report
    assert report.counters.files_unchanged == report.counters.files_total - 3
    report = await download_tree(client, top, str(back), TransferOptions(overwrite=True))
    assert report.complete, report
    assert compare_trees(str(tree), str(back), frozenset()).differences == []
    assert (back / "deep" / "1").stat().st_mtime == 10


async def test_a_change_of_times_alone_is_kept(
    client: HaversackClient, top: str, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(b"same")
    await upload_tree(client, str(tmp_path / "f"), f"{top}/f")
    os.utime(tmp_path / "f", (5, 5))
    report = await upload_tree(client, str(tmp_path / "f"), f"{top}/f")
    assert report.complete
    assert (await client.entry(f"{top}/f")).mtime == 5
    plan = await plan_upload(client, str(tmp_path / "f"), f"{top}/f")
    assert len(plan.standing) == 1


async def test_a_file_and_a_folder_do_not_take_each_others_place(
    client: HaversackClient, top: str, tmp_path: Path
) -> None:
    (tmp_path / "one" / "name").mkdir(parents=True)
    (tmp_path / "one" / "name" / "below").write_bytes(b"x")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "name").write_bytes(b"x")
    assert (await upload_tree(client, str(tmp_path / "one"), top)).complete
    report = await upload_tree(client, str(tmp_path / "two"), top)
    assert [type(item.error) for item in report.failures] == [RevConflict]
    assert (await client.entry(f"{top}/name/below")).content == b"x"
