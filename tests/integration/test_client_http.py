"""`HaversackClient` against a server that misbehaves: retries, lost answers, wrong bytes."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator

import pytest
from scripted_server import TOKEN, Fault, ScriptedCell, busy, scripted_cell

from client.api import HaversackClient
from client.entries import NewEntry
from client.retry import RetryPolicy
from protocol.clock import SystemClock
from protocol.errors import (
    BlockNotFound,
    ConfigInvalid,
    CorruptReply,
    EntryNotFound,
    HashMismatch,
    HaversackError,
    InvalidRequest,
    MissingBlocks,
    NotEnoughNodes,
    Overloaded,
    RevConflict,
    ServerUnreachable,
    Unauthenticated,
    UnknownOutcome,
)
from protocol.hashing import hash_block
from protocol.ids import BlockHash
from protocol.limits import BATCH_BLOCKS_MAX, BLOCK_BYTES_MAX, COMMIT_ENTRIES_MAX, MIB

FAST = RetryPolicy(attempts_max=4, total_s=20, first_delay_s=0.001, delay_max_s=0.002)


class RecordingClock(SystemClock):
    """The real clock, except that sleeping is only noted."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
async def cell() -> AsyncIterator[ScriptedCell]:
    async with scripted_cell() as running:
        yield running


@pytest.fixture
async def client(cell: ScriptedCell) -> AsyncIterator[HaversackClient]:
    async with HaversackClient(cell.url, TOKEN, policy=FAST, rng=random.Random(1)) as opened:
        yield opened


def block_of(size: int) -> tuple[BlockHash, bytes]:
    data = os.urandom(size)
    return hash_block(data), data


def small_file(path: str = "/a", content: bytes = b"hello", rev: str | None = None) -> NewEntry:
    return NewEntry(path, len(content), 1.5, rev, content=content)


@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK_BYTES_MAX])
async def test_a_block_put_is_the_block_got(client: HaversackClient, size: int) -> None:
    block, data = block_of(size)
    assert await client.check_blocks([block]) == {block}
    assert await client.put_block(block, memoryview(data)) is True
    assert await client.put_block(block, data) is False
    assert await client.check_blocks([block]) == set()
    assert await client.get_block(block) == data
    assert await client.head_block(block) == size


async def test_a_block_that_is_not_there_is_an_error_and_is_asked_for_once(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    block, _ = block_of(10)
    with pytest.raises(BlockNotFound):
        await client.get_block(block)
    assert len(cell.requests) == 1
    assert await client.head_block(block) is None


@pytest.mark.parametrize("act", ["reset", "lost", "cut", "garbage"])
async def test_a_block_upload_survives_lost_answers(
    cell: ScriptedCell, client: HaversackClient, act: str
) -> None:
    cell.script.append(Fault("PUT", act, times=2))
    block, data = block_of(3 * MIB)
    await client.put_block(block, data)
    assert cell.blocks[block] == data
    assert cell.requests.count(f"PUT /v1/blocks/{block}") >= 3


async def test_a_refusal_that_may_pass_is_retried_until_attempts_run_out(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    cell.script.append(Fault("PUT", "error", times=3, error=busy()))
    block, data = block_of(100)
    assert await client.put_block(block, data)
    cell.script.append(Fault("PUT", "error", times=4, error=busy()))
    block, data = block_of(100)
    with pytest.raises(NotEnoughNodes, match="5 of 9"):
        await client.put_block(block, data)
    assert block not in cell.blocks


async def test_a_refusal_that_cannot_pass_is_not_retried(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    block, data = block_of(100)
    with pytest.raises(HashMismatch):
        await client.put_block(block, data + b"!")
    assert len(cell.requests) == 1
    with pytest.raises(Unauthenticated):
        async with HaversackClient(cell.url, "hvs_wrong", policy=FAST) as stranger:
            await stranger.put_block(*block_of(3 * MIB))
    assert len(cell.requests) == 2


async def test_retry_after_is_waited_for(cell: ScriptedCell) -> None:
    clock = RecordingClock()
    cell.script.append(
        Fault("GET /v1/account", "error", error=Overloaded("full"), headers={"Retry-After": "7"})
    )
    policy = RetryPolicy(attempts_max=3, total_s=30)
    async with HaversackClient(cell.url, TOKEN, policy=policy, clock=clock) as client:
        assert (await client.account())["name"] == "admin"
    assert clock.slept == [7.0]


async def test_a_retry_after_beyond_our_patience_fails_at_once(cell: ScriptedCell) -> None:
    clock = RecordingClock()
    cell.script.append(
        Fault("GET", "error", error=Overloaded("full"), headers={"Retry-After": "3600"})
    )
    async with HaversackClient(cell.url, TOKEN, policy=FAST, clock=clock) as client:
        with pytest.raises(Overloaded):
            await client.account()
    assert clock.slept == []


async def test_kinds_of_a_newer_server_fall_back_to_the_group_of_their_status(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    class FromTheFuture(HaversackError):
        kind = "node_on_holiday"

    cell.script.append(Fault("GET /v1/account", "error", error=FromTheFuture("back on monday")))
    assert (await client.account())["name"] == "admin", "503: retried"
    del FromTheFuture


@pytest.mark.parametrize("act", ["corrupt", "cut"])
async def test_a_block_with_wrong_bytes_is_asked_for_again(
    cell: ScriptedCell, client: HaversackClient, act: str
) -> None:
    block, data = block_of(2 * MIB)
    cell.blocks[block] = data
    cell.script.append(Fault("GET /v1/blocks", act, times=2))
    assert await client.get_block(block) == data


@pytest.mark.parametrize("act", ["corrupt", "cut"])
async def test_a_block_whose_bytes_stay_wrong_is_never_returned(
    cell: ScriptedCell, client: HaversackClient, act: str
) -> None:
    block, data = block_of(2 * MIB)
    cell.blocks[block] = data
    cell.script.append(Fault("GET /v1/blocks", act, times=99))
    with pytest.raises(CorruptReply):
        await client.get_block(block)


async def test_an_answer_longer_than_a_block_is_refused(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    block, _ = block_of(10)
    cell.blocks[block] = bytes(BLOCK_BYTES_MAX + 1)
    with pytest.raises(CorruptReply, match="announces"):
        await client.get_block(block)


async def test_no_server_is_told_as_such_after_bounded_attempts(cell: ScriptedCell) -> None:
    await cell.die()
    clock = RecordingClock()
    async with HaversackClient(cell.url, TOKEN, policy=FAST, clock=clock) as client:
        with pytest.raises(ServerUnreachable, match="is the cell up"):
            await client.account()
        assert not await client.is_ready()
    assert len(clock.slept) == 2 * (FAST.attempts_max - 1)


async def test_a_server_that_falls_silent_is_given_up_and_asked_again(
    cell: ScriptedCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.transport._SILENCE_S", 0.2)
    cell.script.append(Fault("GET /v1/account", "hang", times=2))
    async with HaversackClient(cell.url, TOKEN, policy=FAST) as client:
        assert (await client.account())["name"] == "admin"
        assert len(cell.requests) == 3
        cell.script.append(Fault("GET /v1/account", "hang", times=99))
        with pytest.raises(ServerUnreachable, match="no answer in time"):
            await client.account()


async def test_a_server_that_stops_reading_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.transport._SILENCE_S", 0.2)
    connections: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        writer.transport.pause_reading()  # type: ignore[attr-defined]

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    blocks = [block_of(BLOCK_BYTES_MAX) for _ in range(4)]
    async with HaversackClient(f"http://127.0.0.1:{port}", TOKEN, policy=FAST) as client:
        with pytest.raises(ServerUnreachable):
            await client.put_blocks(blocks)  # 16 MiB: more than the sockets' buffers take
    assert len(connections) == FAST.attempts_max
    for writer in connections:
        writer.transport.abort()
    server.close()
    await server.wait_closed()


async def test_a_server_that_comes_back_is_used_again(cell: ScriptedCell) -> None:
    block, data = block_of(1000)
    await cell.die()

    class ReviveOnThirdSleep(RecordingClock):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds)
            if len(self.slept) == 3:
                await cell.listen()

    async with HaversackClient(cell.url, TOKEN, policy=FAST, clock=ReviveOnThirdSleep()) as client:
        assert await client.put_block(block, data)


# --------------------------------------------------------------------------- batches


async def test_a_batch_says_for_each_block_whether_it_was_new(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    blocks = [block_of(100) for _ in range(5)]
    cell.blocks[blocks[1][0]] = blocks[1][1]
    assert await client.put_blocks(blocks) == [True, False, True, True, True]


async def test_one_bad_block_of_a_batch_fails_alone(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    good, other = block_of(100), block_of(100)
    results = await client.put_blocks([good, (other[0], b"not it"), block_of(3)])
    assert results[0] is True
    assert isinstance(results[1], HashMismatch)
    assert results[2] is True
    assert len(cell.requests) == 1


async def test_only_the_busy_blocks_of_a_batch_are_sent_again(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    blocks = [block_of(100) for _ in range(3)]
    cell.refuse_blocks[blocks[1][0]] = busy()
    results = await client.put_blocks(blocks)
    assert results[0] is True
    assert isinstance(results[1], NotEnoughNodes)
    assert results[2] is True
    assert len(cell.requests) == FAST.attempts_max
    assert cell.body_bytes == 200, "the good ones travelled once"


async def test_more_than_one_body_of_blocks_is_cut_by_bytes_and_by_count(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    many = [block_of(8) for _ in range(BATCH_BLOCKS_MAX + 1)]
    assert await client.put_blocks(many) == [True] * len(many)
    assert len(cell.requests) == 2
    large = [block_of(4 * MIB) for _ in range(5)]
    assert await client.put_blocks(large) == [True] * 5
    assert len(cell.requests) == 4
    assert await client.check_blocks([block for block, _ in many]) == set()
    assert cell.batch_sizes == [BATCH_BLOCKS_MAX, 1]


async def test_fetch_brings_every_block_however_little_one_answer_carries(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    blocks = [block_of(4 * MIB) for _ in range(5)]  # 20 MiB: more than one answer
    cell.blocks.update(blocks)
    names = [block for block, _ in blocks]
    got = await client.fetch_blocks([*names, names[0]])
    assert [bytes(data) for data in got if not isinstance(data, HaversackError)] == [
        data for _, data in [*blocks, blocks[0]]
    ]
    assert cell.requests.count("POST /v1/blocks/fetch") == 2


async def test_fetch_says_for_each_block_why_it_did_not_come(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    good, absent, unreadable = block_of(10), block_of(10), block_of(10)
    cell.blocks.update([good, unreadable])
    cell.refuse_blocks[unreadable[0]] = busy()
    got = await client.fetch_blocks([good[0], absent[0], unreadable[0]])
    assert bytes(got[0]) == good[1]
    assert isinstance(got[1], BlockNotFound)
    assert isinstance(got[2], NotEnoughNodes)


async def test_a_fetched_block_with_wrong_bytes_is_got_alone(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    blocks = [block_of(1000) for _ in range(3)]
    cell.blocks.update(blocks)
    cell.script.append(Fault("fetch", "corrupt"))  # flips a bit of the last block
    got = await client.fetch_blocks([block for block, _ in blocks])
    assert [bytes(data) for data in got] == [data for _, data in blocks]
    assert cell.requests[-1] == f"GET /v1/blocks/{blocks[2][0]}"


async def test_a_fetch_answer_that_is_no_framed_body_falls_back_to_single_blocks(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    blocks = [block_of(1000) for _ in range(3)]
    cell.blocks.update(blocks)
    cell.script.append(Fault("fetch", "garbage", times=99))
    got = await client.fetch_blocks([block for block, _ in blocks])
    assert [bytes(data) for data in got] == [data for _, data in blocks]


# -------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("act", ["lost", "cut", "garbage"])
async def test_a_commit_whose_answer_was_lost_is_repeated_and_made_once(
    cell: ScriptedCell, client: HaversackClient, act: str
) -> None:
    cell.script.append(Fault("metadata/commit", act, times=2))
    committed = await client.commit(small_file())
    assert not committed.created, "the first attempt had made it"
    assert committed.entry.rev == "r1"


@pytest.mark.parametrize("act", ["lost", "garbage", "cut"])
async def test_a_commit_that_is_never_answered_is_an_unknown_outcome(
    cell: ScriptedCell, client: HaversackClient, act: str
) -> None:
    cell.script.append(Fault("metadata/commit", act, times=99))
    with pytest.raises(UnknownOutcome):
        await client.commit(small_file())
    with pytest.raises(UnknownOutcome):
        await client.commit_many([small_file("/b")])


async def test_a_commit_that_was_never_sent_is_no_unknown_outcome(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    await cell.die()
    with pytest.raises(ServerUnreachable):
        await client.commit(small_file())


async def test_a_commit_refused_for_now_is_no_unknown_outcome(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    cell.script.append(Fault("metadata/commit", "error", times=99, error=busy()))
    with pytest.raises(NotEnoughNodes):
        await client.commit(small_file())


async def test_unknown_outcome_of_the_server_is_confirmed_by_repeating(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    cell.script.append(
        Fault("metadata/commit", "error", times=2, error=UnknownOutcome("commit timed out"))
    )
    assert (await client.commit(small_file())).created


async def test_commit_conflicts_carry_the_state_of_the_server(client: HaversackClient) -> None:
    await client.commit(small_file(content=b"one"))
    with pytest.raises(RevConflict) as caught:
        await client.commit(small_file(content=b"two"))
    assert caught.value.details["server"]["rev"] == "r1"
    assert (await client.commit(small_file(content=b"two", rev="r1"))).created


async def test_a_batch_of_commits_has_one_result_each(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    block, _ = block_of(10)
    results = await client.commit_many(
        [
            small_file("/ok"),
            NewEntry("/no", 10, 1.0, None, blocks=(block,)),
            small_file("/bad/../x"),
            NewEntry("/link", 0, 1.0, None, symlink="ok"),
        ]
    )
    assert not isinstance(results[0], HaversackError)
    assert isinstance(results[1], MissingBlocks)
    assert results[1].details["missing"] == [str(block)]
    assert not isinstance(results[3], HaversackError)
    assert results[3].symlink == "ok"
    with pytest.raises(InvalidRequest):
        await client.commit_many([small_file()] * (COMMIT_ENTRIES_MAX + 1))


async def test_listing_pages_join_into_one_walk(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    cell.page_limit = 3
    for number in range(10):
        await client.commit(small_file(f"/f/{number}"))
    names = [entry.name async for entry in client.iter_folder("/f")]
    assert names == [str(number) for number in range(10)]
    everything = [entry.path async for entry in client.iter_folder("/", recursive=True)]
    assert everything == ["/f", *(f"/f/{number}" for number in range(10))]


async def test_a_delete_whose_answer_was_lost_is_not_repeated_and_says_what_stands_there(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    await client.commit(small_file("/gone"))
    cell.script.append(Fault("delete", "lost"))
    with pytest.raises(UnknownOutcome, match="nothing stands there now"):
        await client.delete("/gone")
    await client.commit(small_file("/still"))
    cell.script.append(Fault("delete", "reset"))
    with pytest.raises(UnknownOutcome, match="a file stands there now, rev r2"):
        await client.delete("/still")
    assert cell.requests.count("POST /v1/metadata/delete") == 2
    assert await client.delete("/still") == 1
    with pytest.raises(EntryNotFound):
        await client.entry("/still")


async def test_a_delete_refused_for_now_is_repeated(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    await client.commit(small_file("/gone"))
    cell.script.append(Fault("delete", "error", times=2, error=busy()))
    assert await client.delete("/gone") == 1


@pytest.mark.parametrize("name", ["a b", "a+b", "ä/ö", "q?x=1&y", "per%20cent", "new\nline", "#"])
async def test_odd_names_travel_unchanged(client: HaversackClient, name: str) -> None:
    await client.commit(small_file(f"/{name}"))
    assert (await client.entry(f"/{name}")).path == f"/{name}"


async def test_a_name_that_is_not_text_is_refused_before_it_is_sent(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    with pytest.raises(InvalidRequest):
        await client.entry("/caf\udce9")
    assert cell.requests == []


@pytest.mark.parametrize("url", ["", "127.0.0.1:8420", "ftp://x", "http://", "http://a?b=c"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigInvalid, match="not a server address"):
        HaversackClient(url, TOKEN)


async def test_a_server_that_is_no_cell_is_told_as_such(
    cell: ScriptedCell, client: HaversackClient
) -> None:
    cell.script.append(Fault("GET /v1/account", "garbage", times=99))
    with pytest.raises(CorruptReply, match="is --server a Haversack cell"):
        await client.account()


async def test_connections_are_reused(cell: ScriptedCell, client: HaversackClient) -> None:
    for _ in range(20):
        await client.account()
    assert cell._runner is not None
    assert len(cell._runner.server.connections) == 1
