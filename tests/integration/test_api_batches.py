"""Many blocks in one body, both ways, against a whole cell."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from api_cell import Cell, block_of, running_cell
from api_server import read_answer

from protocol.block_frames import (
    FRAME_HEADER_BYTES,
    MEDIA_TYPE,
    FrameStatus,
    iter_frames,
    pack_frame_header,
)
from protocol.ids import BlockHash
from protocol.limits import BATCH_BLOCKS_MAX, BATCH_BODY_BYTES_MAX, BLOCK_BYTES_MAX


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    with running_cell(tmp_path_factory.mktemp("cell")) as cell:
        yield cell


@pytest.fixture(scope="module")
def alice(cell: Cell) -> Iterator[httpx.Client]:
    with cell.client("alice") as client:
        yield client


@pytest.fixture(scope="module")
def bob(cell: Cell) -> Iterator[httpx.Client]:
    with cell.client("bob") as client:
        yield client


def _framed(blocks: Sequence[tuple[str, bytes]]) -> bytes:
    return b"".join(
        pack_frame_header(BlockHash.parse(name), FrameStatus.OK, len(data)) + data
        for name, data in blocks
    )


def _frames(answer: httpx.Response) -> list[tuple[str, FrameStatus, bytes]]:
    assert answer.status_code == 200
    assert answer.headers["content-type"] == MEDIA_TYPE
    return [(str(f.block), f.status, bytes(f.data)) for f in iter_frames(answer.content)]


def _kind(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["kind"]


def test_batch_of_mixed_sizes_is_stored_and_fetched_back(alice: httpx.Client) -> None:
    sizes = [0, 1, 37, 1000, 16 * 1024, 16 * 1024 + 1, 130_000, 1 << 20]
    blocks = [block_of(1000 + size, size) for size in sizes]
    answer = alice.post("/v1/blocks/batch", content=_framed(blocks))
    assert (answer.status_code, answer.json()) == (
        200,
        {"results": ["created"] * len(blocks), "errors": []},
    )
    names = [name for name, _ in blocks]
    assert _frames(alice.post("/v1/blocks/fetch", json={"hashes": names})) == [
        (name, FrameStatus.OK, data) for name, data in blocks
    ]
    again = alice.post("/v1/blocks/batch", content=_framed(blocks)).json()
    assert again["results"] == ["exists"] * len(blocks)


def test_block_named_twice_in_a_batch_is_created_once(alice: httpx.Client) -> None:
    block = block_of(2, 700)
    answer = alice.post("/v1/blocks/batch", content=_framed([block, block]))
    assert answer.json()["results"] == ["created", "exists"]


def test_wrong_block_in_a_batch_spoils_only_itself(cell: Cell, alice: httpx.Client) -> None:
    good, other = block_of(3, 700), block_of(4, 900)
    liar, _ = block_of(5, 800)
    body = _framed([good, (liar, b"something else"), other])
    answer = alice.post("/v1/blocks/batch", content=body)
    assert answer.status_code == 200
    result = answer.json()
    assert result["results"] == ["created", "error", "created"]
    (problem,) = result["errors"]
    assert (problem["index"], problem["hash"]) == (1, liar)
    assert problem["error"]["kind"] == "hash_mismatch"
    assert problem["error"]["details"]["actual"] == hashlib.sha256(b"something else").hexdigest()
    assert alice.get(f"/v1/blocks/{liar}").status_code == 404
    assert alice.get(f"/v1/blocks/{other[0]}").content == other[1]


def test_empty_batch_and_empty_fetch_are_fine(alice: httpx.Client) -> None:
    assert alice.post("/v1/blocks/batch", content=b"").json() == {"results": [], "errors": []}
    assert _frames(alice.post("/v1/blocks/fetch", json={"hashes": []})) == []


def test_batch_in_chunks_without_a_length_is_taken(alice: httpx.Client) -> None:
    blocks = [block_of(6000 + i, 40_000) for i in range(10)]
    body = _framed(blocks)
    pieces = (body[start : start + 7777] for start in range(0, len(body), 7777))
    answer = alice.post("/v1/blocks/batch", content=pieces)
    assert answer.json()["results"] == ["created"] * 10


def test_largest_batch_is_taken(alice: httpx.Client) -> None:
    blocks = [block_of(7000 + i, 3000) for i in range(BATCH_BLOCKS_MAX)]
    answer = alice.post("/v1/blocks/batch", content=_framed(blocks))
    assert answer.json()["results"] == ["created"] * BATCH_BLOCKS_MAX
    names = [name for name, _ in blocks]
    assert alice.post("/v1/blocks/check", json={"hashes": names}).json() == {"missing": []}
    frames = _frames(alice.post("/v1/blocks/fetch", json={"hashes": names}))
    assert frames == [(name, FrameStatus.OK, data) for name, data in blocks]


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"x", 422, "invalid_request"),
        (_framed([block_of(8, 100)])[:-1], 422, "invalid_request"),
        (_framed([block_of(8, 100)]) + b"x", 422, "invalid_request"),
        (pack_frame_header(BlockHash(bytes(32)), FrameStatus.NOT_FOUND, 0), 422, "invalid_request"),
        (bytes(32) + b"\x09" + bytes(4), 422, "invalid_request"),
        (
            pack_frame_header(BlockHash(bytes(32)), FrameStatus.OK, BLOCK_BYTES_MAX + 1),
            413,
            "block_too_large",
        ),
        (bytes(FRAME_HEADER_BYTES) * (BATCH_BLOCKS_MAX + 1), 422, "invalid_request"),
    ],
)
def test_body_that_is_not_frames_is_refused_and_nothing_stored(
    cell: Cell, alice: httpx.Client, body: bytes, status: int, kind: str
) -> None:
    fragments = cell.fragments()
    assert _kind(alice.post("/v1/blocks/batch", content=body)) == (status, kind)
    assert cell.fragments() == fragments


def test_batch_over_the_limit_is_refused_before_it_is_read(cell: Cell) -> None:
    with cell.running.connect() as peer:
        peer.sendall(
            f"POST /v1/blocks/batch HTTP/1.1\r\nAuthorization: Bearer {cell.tokens['alice']}\r\n"
            f"Content-Length: {BATCH_BODY_BYTES_MAX + 1}\r\n\r\n".encode()
        )
        status, _, body = read_answer(peer)
    assert status == 413
    assert b'"body_too_large"' in body


def test_fetch_of_unknown_and_foreign_blocks_finds_neither(
    alice: httpx.Client, bob: httpx.Client
) -> None:
    mine, foreign = block_of(9, 500), block_of(10, 500)
    unknown = block_of(11, 500)[0]
    alice.put(f"/v1/blocks/{mine[0]}", content=mine[1])
    bob.put(f"/v1/blocks/{foreign[0]}", content=foreign[1])
    answer = alice.post("/v1/blocks/fetch", json={"hashes": [foreign[0], mine[0], unknown]})
    assert _frames(answer) == [
        (foreign[0], FrameStatus.NOT_FOUND, b""),
        (mine[0], FrameStatus.OK, mine[1]),
        (unknown, FrameStatus.NOT_FOUND, b""),
    ]


def test_fetch_answers_each_hash_once(alice: httpx.Client) -> None:
    name, data = block_of(12, 500)
    alice.put(f"/v1/blocks/{name}", content=data)
    answer = alice.post("/v1/blocks/fetch", json={"hashes": [name, name]})
    assert _frames(answer) == [(name, FrameStatus.OK, data)]


def test_fetch_that_would_grow_over_its_limit_says_what_it_did_not_send(
    alice: httpx.Client,
) -> None:
    blocks = [block_of(20 + i, BLOCK_BYTES_MAX - i) for i in range(5)]
    for name, data in blocks:
        assert alice.put(f"/v1/blocks/{name}", content=data).status_code == 201
    names = [name for name, _ in blocks]
    answer = alice.post("/v1/blocks/fetch", json={"hashes": names})
    assert len(answer.content) <= BATCH_BODY_BYTES_MAX
    frames = _frames(answer)
    left = [name for name, status, _ in frames if status is FrameStatus.NOT_SENT]
    sent = {name: data for name, status, data in frames if status is FrameStatus.OK}
    assert [name for name, _, _ in frames] == names
    assert sent == {name: data for name, data in blocks if name not in left}
    assert len(left) == 2
    rest = _frames(alice.post("/v1/blocks/fetch", json={"hashes": left}))
    assert [status for _, status, _ in rest] == [FrameStatus.OK, FrameStatus.OK]


@pytest.mark.parametrize("body", [{"hashes": ["x"]}, {"hashes": [1]}, {}, {"hashes": [], "a": 1}])
def test_malformed_fetch_is_unprocessable(alice: httpx.Client, body: object) -> None:
    assert alice.post("/v1/blocks/fetch", json=body).status_code == 422


def test_fetch_says_of_an_unreadable_block_that_it_is_unavailable(tmp_path: Path) -> None:
    with running_cell(tmp_path, scheme="rs-2-1", nodes=3) as cell, cell.client() as client:
        large, small = block_of(30, 300_000), block_of(31, 500)
        for name, data in (large, small):
            assert client.put(f"/v1/blocks/{name}", content=data).status_code == 201
        for disk in list(cell.disks.values())[:2]:
            disk.unreadable = True
        answer = client.post("/v1/blocks/fetch", json={"hashes": [large[0]]}, timeout=60)
        assert _frames(answer) == [(large[0], FrameStatus.UNAVAILABLE, b"")]


def test_batch_with_too_few_nodes_says_so_for_each_block(tmp_path: Path) -> None:
    with running_cell(tmp_path, scheme="rs-2-1", nodes=3) as cell, cell.client() as client:
        for disk in cell.disks.values():
            disk.full = True
        blocks = [block_of(40 + i, 500) for i in range(3)]
        answer = client.post("/v1/blocks/batch", content=_framed(blocks), timeout=60)
        result = answer.json()
        assert result["results"] == ["error"] * 3
        assert {problem["error"]["kind"] for problem in result["errors"]} <= {
            "not_enough_nodes",
            "node_full",
        }
        assert cell.fragments() == 0
