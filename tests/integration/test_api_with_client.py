"""The project's own client against the project's own API: both ends of every route agree."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from api_cell import Cell, running_cell

from client.api import HaversackClient
from client.entries import EntryKind, NewEntry
from client.transfer import download_tree, upload_tree
from protocol.errors import (
    BlockNotFound,
    EntryNotFound,
    Forbidden,
    HashMismatch,
    InvalidPath,
    MissingBlocks,
    RevConflict,
    Unauthenticated,
)
from protocol.hashing import hash_block
from protocol.limits import BLOCK_BYTES_MAX


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    with running_cell(tmp_path_factory.mktemp("cell"), scheme="rs-2-1", nodes=3) as cell:
        yield cell


@pytest.fixture
async def alice(cell: Cell) -> AsyncIterator[HaversackClient]:
    async with HaversackClient(cell.running.url, cell.tokens["alice"]) as client:
        yield client


def _block(seed: int, size: int) -> tuple[object, bytes]:
    data = random.Random(f"client {seed}").randbytes(size)
    return hash_block(data), data


async def test_blocks_go_in_and_come_out(alice: HaversackClient) -> None:
    block, data = _block(1, BLOCK_BYTES_MAX)
    assert await alice.check_blocks([block]) == {block}
    assert await alice.put_block(block, data) is True
    assert await alice.put_block(block, data) is False
    assert await alice.check_blocks([block]) == set()
    assert await alice.head_block(block) == BLOCK_BYTES_MAX
    assert await alice.get_block(block) == data
    small = [_block(seed, 1000 + seed) for seed in range(2, 300)]
    assert await alice.put_blocks(small) == [True] * len(small)
    names = [name for name, _ in small]
    assert await alice.fetch_blocks([*names, block]) == [*(data for _, data in small), data]


async def test_more_than_one_answer_can_carry_is_fetched_in_several(
    alice: HaversackClient,
) -> None:
    blocks = [_block(400 + seed, BLOCK_BYTES_MAX) for seed in range(6)]
    await asyncio.gather(*(alice.put_block(name, data) for name, data in blocks))
    fetched = await alice.fetch_blocks([name for name, _ in blocks])
    assert [bytes(data) for data in fetched] == [data for _, data in blocks]


async def test_refusals_arrive_as_the_errors_they_are(cell: Cell, alice: HaversackClient) -> None:
    block, data = _block(500, 5000)
    with pytest.raises(HashMismatch):
        await alice.put_block(block, data + b"x")
    with pytest.raises(BlockNotFound):
        await alice.get_block(block)
    assert await alice.head_block(block) is None
    with pytest.raises(MissingBlocks) as caught:
        await alice.commit(NewEntry("/a", 5000, 0, None, blocks=(block,)))
    assert caught.value.details["missing"] == [str(block)]
    with pytest.raises(InvalidPath):
        await alice.commit(NewEntry("/a/../b", 1, 0, None, content=b"x"))
    with pytest.raises(EntryNotFound):
        await alice.entry("/absent")
    with pytest.raises(Forbidden):
        await alice.status()
    async with HaversackClient(cell.running.url, "hvs_" + "x" * 43) as stranger:
        with pytest.raises(Unauthenticated):
            await stranger.account()
        assert await stranger.is_ready()


async def test_tree_is_changed_and_listed(cell: Cell, alice: HaversackClient) -> None:
    first = await alice.commit(NewEntry("/t/a", 1, 1.5, None, content=b"a"))
    assert first.created
    with pytest.raises(RevConflict):
        await alice.commit(NewEntry("/t/a", 1, 1.5, "stale", content=b"b"))
    second = await alice.commit(NewEntry("/t/a", 1, 1.5, first.entry.rev, content=b"b"))
    assert (await alice.entry("/t/a")).rev == second.entry.rev
    await alice.make_folder("/t/folder")
    results = await alice.commit_many(
        [NewEntry(f"/t/many/{i}", 1, 0, None, content=b"x") for i in range(30)]
    )
    assert all(result.kind is EntryKind.FILE for result in results)
    listed = [entry.path async for entry in alice.iter_folder("/t", recursive=True)]
    assert len(listed) == 30 + 3
    assert await alice.delete("/t") == 34
    assert (await alice.account())["name"] == "alice"
    async with HaversackClient(cell.running.url, cell.tokens["admin"]) as admin:
        assert len((await admin.status())["nodes"]) == 3


async def test_real_folder_goes_up_and_comes_down_the_same(
    alice: HaversackClient, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    rng = random.Random(9)
    sizes = [0, 1, 4096, 4097, 100_000, BLOCK_BYTES_MAX, BLOCK_BYTES_MAX + 1, 9_000_000]
    for number, size in enumerate(sizes):
        path = source / f"d{number % 3}" / f"ü {number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(size))
    (source / "link").symlink_to("d0")
    await upload_tree(alice, str(source), "/real")
    target = tmp_path / "target"
    await download_tree(alice, "/real", str(target))
    files = sorted(path.relative_to(source) for path in source.rglob("*"))
    assert files == sorted(path.relative_to(target) for path in target.rglob("*"))
    for name in files:
        if (source / name).is_symlink():
            assert (target / name).readlink() == (source / name).readlink()
        elif (source / name).is_file():
            assert (target / name).read_bytes() == (source / name).read_bytes()
