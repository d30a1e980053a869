"""Blocks over HTTP against a whole cell: bytes in, the same bytes out, and every bad input."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from api_cell import Cell, block_of, running_cell
from api_server import DEADLINE_S, read_all, read_answer

from protocol.limits import BLOCK_BYTES_MAX

UNKNOWN = "ab" * 32


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    with running_cell(tmp_path_factory.mktemp("cell")) as cell:
        yield cell


@pytest.fixture(scope="module")
def admin(cell: Cell) -> Iterator[httpx.Client]:
    with cell.client() as client:
        yield client


@pytest.fixture(scope="module")
def alice(cell: Cell) -> Iterator[httpx.Client]:
    with cell.client("alice") as client:
        yield client


@pytest.fixture(scope="module")
def bob(cell: Cell) -> Iterator[httpx.Client]:
    with cell.client("bob") as client:
        yield client


def _kind(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["kind"]


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _raw(cell: Cell, head: str, account: str = "alice") -> bytes:
    return f"{head}Authorization: Bearer {cell.tokens[account]}\r\n\r\n".encode()


# -- put and get -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1023, 128 * 1024 - 1, 128 * 1024, 1 << 20, 4 << 20])
def test_block_comes_back_byte_for_byte(alice: httpx.Client, size: int) -> None:
    name, data = block_of(size + 1, size)
    answer = alice.put(f"/v1/blocks/{name}", content=data)
    assert (answer.status_code, answer.json()) == (
        201,
        {"hash": name, "new": True, "length": size},
    )
    answer = alice.get(f"/v1/blocks/{name}")
    assert answer.status_code == 200
    assert answer.content == data


def test_second_put_of_a_block_says_that_it_is_not_new(
    alice: httpx.Client, bob: httpx.Client
) -> None:
    name, data = block_of(50, 5000)
    assert alice.put(f"/v1/blocks/{name}", content=data).status_code == 201
    for client in (alice, bob):
        answer = client.put(f"/v1/blocks/{name}", content=data)
        assert (answer.status_code, answer.json()["new"]) == (200, False)


def test_answer_to_a_get_can_be_cached_for_ever_by_its_reader_alone(alice: httpx.Client) -> None:
    name, data = block_of(51, 3000)
    alice.put(f"/v1/blocks/{name}", content=data)
    headers = alice.get(f"/v1/blocks/{name}").headers
    assert headers["cache-control"] == "private, max-age=31536000, immutable"
    assert headers["etag"] == f'"{name}"'
    assert headers["content-type"] == "application/octet-stream"
    assert headers["accept-ranges"] == "bytes"
    assert headers["x-content-type-options"] == "nosniff"


def test_head_tells_the_length_without_the_body(alice: httpx.Client) -> None:
    name, data = block_of(52, 200_000)
    alice.put(f"/v1/blocks/{name}", content=data)
    answer = alice.head(f"/v1/blocks/{name}")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == "200000"
    assert answer.headers["etag"] == f'"{name}"'


@pytest.mark.parametrize("field", ['"{}"', 'W/"{}"', '"x", "{}"', "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_known_content_is_answered_304(alice: httpx.Client, field: str, method: str) -> None:
    name, data = block_of(53, 3000)
    alice.put(f"/v1/blocks/{name}", content=data)
    answer = alice.request(
        method, f"/v1/blocks/{name}", headers={"If-None-Match": field.format(name)}
    )
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == f'"{name}"'
    assert "content-length" not in answer.headers


def test_304_is_no_way_to_learn_of_a_block(bob: httpx.Client, alice: httpx.Client) -> None:
    name, data = block_of(54, 3000)
    alice.put(f"/v1/blocks/{name}", content=data)
    answer = bob.get(f"/v1/blocks/{name}", headers={"If-None-Match": f'"{name}"'})
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("field", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        ("bytes=299990-", 299_990, 300_000),
        ("bytes=-10", 299_990, 300_000),
        ("bytes=-999999999", 0, 300_000),
        ("bytes=299999-999999999", 299_999, 300_000),
        ("Bytes = 5 - 6", 5, 7),
    ],
)
def test_one_range_is_served(alice: httpx.Client, field: str, start: int, end: int) -> None:
    name, data = block_of(55, 300_000)
    alice.put(f"/v1/blocks/{name}", content=data)
    answer = alice.get(f"/v1/blocks/{name}", headers={"Range": field})
    assert answer.status_code == 206
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/300000"
    assert answer.content == data[start:end]


@pytest.mark.parametrize("field", ["bytes=300000-", "bytes=999999999-", "bytes=-0"])
def test_range_behind_the_end_is_refused_with_the_length(alice: httpx.Client, field: str) -> None:
    name, data = block_of(55, 300_000)
    alice.put(f"/v1/blocks/{name}", content=data)
    answer = alice.get(f"/v1/blocks/{name}", headers={"Range": field})
    assert _kind(answer) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */300000"


@pytest.mark.parametrize(
    "field", ["bytes=0-1,5-6", "bytes=5-2", "bytes=", "bytes=-", "lines=1-2", "x", "bytes=a-b"]
)
def test_several_ranges_and_strange_ones_get_the_whole(alice: httpx.Client, field: str) -> None:
    name, data = block_of(55, 300_000)
    alice.put(f"/v1/blocks/{name}", content=data)
    answer = alice.get(f"/v1/blocks/{name}", headers={"Range": field})
    assert (answer.status_code, answer.content) == (200, data)


def test_range_of_other_content_gets_the_whole(alice: httpx.Client) -> None:
    name, data = block_of(55, 300_000)
    alice.put(f"/v1/blocks/{name}", content=data)
    url = f"/v1/blocks/{name}"
    other = alice.get(url, headers={"Range": "bytes=0-1", "If-Range": '"other"'})
    same = alice.get(url, headers={"Range": "bytes=0-1", "If-Range": f'"{name}"'})
    assert (other.status_code, same.status_code) == (200, 206)


def test_block_sent_after_a_wait_for_100_continue_is_stored(cell: Cell) -> None:
    name, data = block_of(56, 1 << 20)
    with cell.running.connect() as peer:
        peer.sendall(
            _raw(
                cell,
                f"PUT /v1/blocks/{name} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"
                f"Content-Length: {len(data)}\r\n",
            )
        )
        assert peer.recv(100).startswith(b"HTTP/1.1 100 Continue")
        peer.sendall(data)
        assert read_answer(peer)[0] == 201


# -- bad input ---------------------------------------------------------------------------------


def test_body_that_does_not_hash_to_its_name_is_refused_and_not_stored(
    cell: Cell, alice: httpx.Client
) -> None:
    name, data = block_of(60, 300_000)
    fragments = cell.fragments()
    for wrong in (data[:-1], data + b"x", b"", bytes(300_000)):
        answer = alice.put(f"/v1/blocks/{name}", content=wrong)
        assert _kind(answer) == (400, "hash_mismatch")
        details = answer.json()["error"]["details"]
        assert details == {"hash": name, "actual": hashlib.sha256(wrong).hexdigest()}
    assert cell.fragments() == fragments
    assert alice.get(f"/v1/blocks/{name}").status_code == 404


def test_block_over_four_mebibytes_is_refused_before_it_is_read(cell: Cell) -> None:
    name, _ = block_of(61, 10)
    with cell.running.connect() as peer:
        peer.sendall(
            _raw(
                cell, f"PUT /v1/blocks/{name} HTTP/1.1\r\nContent-Length: {BLOCK_BYTES_MAX + 1}\r\n"
            )
        )
        status, headers, body = read_answer(peer)  # not one byte of the body was sent
        assert (status, headers["connection"]) == (413, "close")
        assert b'"block_too_large"' in body


def test_client_that_sends_a_block_that_is_too_large_reads_the_refusal(
    alice: httpx.Client,
) -> None:
    name, data = block_of(62, BLOCK_BYTES_MAX + 1)
    assert _kind(alice.put(f"/v1/blocks/{name}", content=data)) == (413, "block_too_large")


def test_put_without_a_length_is_refused(alice: httpx.Client) -> None:
    name, data = block_of(63, 1000)
    answer = alice.put(f"/v1/blocks/{name}", content=iter([data]))
    assert _kind(answer) == (411, "length_required")


def test_put_with_neither_length_nor_body_is_refused(cell: Cell) -> None:
    name = hashlib.sha256(b"").hexdigest()
    request = _raw(cell, f"PUT /v1/blocks/{name} HTTP/1.1\r\nConnection: close\r\n")
    assert cell.running.exchange(request).startswith(b"HTTP/1.1 411 ")


@pytest.mark.parametrize("sent", [0, 1000, 2 << 20])
def test_body_shorter_than_its_length_dies_and_nothing_is_stored(
    cell: Cell, alice: httpx.Client, sent: int
) -> None:
    name, data = block_of(64, 3 << 20)
    fragments = cell.fragments()
    with cell.running.connect() as peer:
        peer.sendall(
            _raw(cell, f"PUT /v1/blocks/{name} HTTP/1.1\r\nContent-Length: {len(data)}\r\n")
            + data[:sent]
        )
        peer.shutdown(socket.SHUT_WR)
        assert read_all(peer) == b""
    with cell.client() as admin:
        _until(lambda: 'status="499"' in admin.get("/metrics").text)
    assert cell.fragments() == fragments
    assert alice.get(f"/v1/blocks/{name}").status_code == 404


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "ab" * 31,
        "ab" * 33,
        "AB" * 32,
        "zz" * 32,
        "ab" * 31 + "a ",
        "%00" * 64,
        "ab%2f" + "a" * 60,
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_malformed_hash_is_unprocessable(alice: httpx.Client, method: str, name: str) -> None:
    answer = alice.request(method, f"/v1/blocks/{name}", content=b"x" if method == "PUT" else None)
    assert answer.status_code in (404, 422)
    if "%2f" not in name:
        assert answer.status_code == 422
        assert method == "HEAD" or answer.json()["error"]["kind"] == "malformed_hash"


def test_unknown_block_is_not_found(alice: httpx.Client) -> None:
    assert _kind(alice.get(f"/v1/blocks/{UNKNOWN}")) == (404, "block_not_found")
    assert alice.head(f"/v1/blocks/{UNKNOWN}").status_code == 404


def test_block_of_another_user_looks_exactly_like_an_unknown_one(
    cell: Cell, alice: httpx.Client
) -> None:
    name, data = block_of(65, 100_000)
    assert alice.put(f"/v1/blocks/{name}", content=data).status_code == 201
    never, _ = block_of(66, 100_000)
    answers = []
    for wanted in (name, never):
        with cell.running.connect() as peer:
            peer.sendall(
                _raw(
                    cell,
                    f"GET /v1/blocks/{wanted} HTTP/1.1\r\nHost: a\r\nX-Request-Id: same\r\n",
                    "bob",
                )
            )
            status, headers, body = read_answer(peer)
            headers.pop("date")
            answers.append((status, headers, body.replace(wanted.encode(), b"HASH")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404


def test_block_of_another_user_makes_the_same_queries_as_an_unknown_one(
    cell: Cell, alice: httpx.Client, bob: httpx.Client
) -> None:
    name, data = block_of(67, 1000)
    alice.put(f"/v1/blocks/{name}", content=data)
    asked: list[tuple[str, int]] = []
    services = cell.services
    tree, index = services.tree, services.index
    references, claimed, lookup = tree.references, index.claimed, index.lookup
    tree.references = _spied(asked, "references", references)
    index.claimed = _spied(asked, "claimed", claimed)
    index.lookup = _spied(asked, "lookup", lookup)
    try:
        seen = []
        for wanted in (name, block_of(68, 1000)[0]):
            bob.get(f"/v1/blocks/{wanted}")
            seen.append(sorted(asked))
            asked.clear()
    finally:
        tree.references, index.claimed, index.lookup = references, claimed, lookup
    assert seen[0] == seen[1] == [("claimed", 1), ("references", 1)]


def _spied(asked: list[tuple[str, int]], what: str, call: Callable[..., object]):
    async def spy(*arguments: object) -> object:
        asked.append((what, len(arguments[-1])))
        return await call(*arguments)

    return spy


# -- check -------------------------------------------------------------------------------------


def test_check_has_what_the_caller_put_and_misses_the_rest(alice: httpx.Client) -> None:
    mine, data = block_of(70, 1000)
    alice.put(f"/v1/blocks/{mine}", content=data)
    answer = alice.post("/v1/blocks/check", json={"hashes": [UNKNOWN, mine, UNKNOWN]})
    assert (answer.status_code, answer.json()) == (200, {"missing": [UNKNOWN]})


def test_check_is_no_oracle_for_blocks_of_others(alice: httpx.Client, bob: httpx.Client) -> None:
    name, data = block_of(71, 1000)
    alice.put(f"/v1/blocks/{name}", content=data)
    assert bob.post("/v1/blocks/check", json={"hashes": [name]}).json() == {"missing": [name]}
    assert bob.put(f"/v1/blocks/{name}", content=data).json()["new"] is False
    assert bob.post("/v1/blocks/check", json={"hashes": [name]}).json() == {"missing": []}


def test_check_of_nothing_misses_nothing(alice: httpx.Client) -> None:
    assert alice.post("/v1/blocks/check", json={"hashes": []}).json() == {"missing": []}


def test_check_takes_four_thousand_and_ninety_six_hashes_and_no_more(alice: httpx.Client) -> None:
    names = [f"{number:064x}" for number in range(4097)]
    answer = alice.post("/v1/blocks/check", json={"hashes": names[:4096]})
    assert answer.json() == {"missing": names[:4096]}
    assert _kind(alice.post("/v1/blocks/check", json={"hashes": names})) == (422, "invalid_request")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "invalid_request"),
        (b"{", "invalid_request"),
        (b"[]", "invalid_request"),
        (b'{"hashes": "x"}', "invalid_request"),
        (b'{"hashes": [1]}', "invalid_request"),
        (b'{"hashes": [null]}', "invalid_request"),
        (b'{"hashes": [], "more": 1}', "invalid_request"),
        (b'{"hashes": ["\\ud800"]}', "invalid_request"),
        (b'\xff\xfe{"hashes": []}', "invalid_request"),
        (b'{"hashes": ["x"]}', "malformed_hash"),
        (b'{"hashes": ["' + b"AB" * 32 + b'"]}', "malformed_hash"),
        (b'{"hashes": ["' + b"a " * 32 + b'"]}', "malformed_hash"),
    ],
)
def test_malformed_check_is_unprocessable(alice: httpx.Client, body: bytes, kind: str) -> None:
    assert _kind(alice.post("/v1/blocks/check", content=body)) == (422, kind)


def test_json_body_over_the_limit_is_refused_before_it_is_read(cell: Cell) -> None:
    with cell.running.connect() as peer:
        peer.sendall(_raw(cell, "POST /v1/blocks/check HTTP/1.1\r\nContent-Length: 99999999\r\n"))
        status, _, body = read_answer(peer)
        assert status == 413
        assert b'"body_too_large"' in body


def test_json_body_in_chunks_over_the_limit_is_refused_where_it_passes_it(
    alice: httpx.Client,
) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(1 << 20)

    answer = alice.post("/v1/blocks/check", content=endless())
    assert _kind(answer) == (413, "body_too_large")


# -- nodes that fail ---------------------------------------------------------------------------


def test_full_disk_sends_the_block_elsewhere_and_its_reads_go_on(tmp_path: Path) -> None:
    with running_cell(tmp_path) as cell, cell.client() as client:
        before, old = block_of(80, 300_000)
        assert client.put(f"/v1/blocks/{before}", content=old).status_code == 201
        full = next(iter(cell.disks.values()))
        full.full = True
        held = len(full.entries)
        for seed in range(81, 86):
            name, data = block_of(seed, 300_000)
            answer = client.put(f"/v1/blocks/{name}", content=data)
            assert answer.status_code == 201, answer.text
            assert client.get(f"/v1/blocks/{name}").content == data
        assert len(full.entries) == held
        assert client.get(f"/v1/blocks/{before}").content == old


def test_all_disks_full_acknowledges_nothing_and_reads_go_on(tmp_path: Path) -> None:
    with running_cell(tmp_path, scheme="rs-2-1", nodes=3) as cell, cell.client() as client:
        before, old = block_of(90, 300_000)
        assert client.put(f"/v1/blocks/{before}", content=old).status_code == 201
        for disk in cell.disks.values():
            disk.full = True
        name, data = block_of(91, 300_000)
        answer = client.put(f"/v1/blocks/{name}", content=data, timeout=60)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get(f"/v1/blocks/{name}").status_code == 404
        assert client.get(f"/v1/blocks/{before}").content == old


def test_fewer_than_k_plus_one_nodes_refuse_puts_and_serve_reads(tmp_path: Path) -> None:
    with running_cell(tmp_path, scheme="rs-2-2", nodes=4) as cell, cell.client() as client:
        before, old = block_of(92, 300_000)
        assert client.put(f"/v1/blocks/{before}", content=old).status_code == 201
        nodes = list(cell.disks)
        cell.kill(*nodes[:2])
        name, data = block_of(93, 300_000)
        answer = client.put(f"/v1/blocks/{name}", content=data, timeout=60)
        assert _kind(answer) == (503, "not_enough_nodes")
        assert client.get(f"/v1/blocks/{name}").status_code == 404
        assert client.get(f"/v1/blocks/{before}").content == old
        cell.kill(nodes[2])
        lost = client.get(f"/v1/blocks/{before}", timeout=60)
        assert _kind(lost) == (503, "block_unreadable")
        _until(lambda: client.get("/readyz").status_code == 503)


def test_one_node_less_than_the_scheme_wants_is_a_debt_not_a_refusal(tmp_path: Path) -> None:
    with running_cell(tmp_path, scheme="rs-2-2", nodes=4) as cell, cell.client() as client:
        cell.kill(next(iter(cell.disks)))
        name, data = block_of(94, 300_000)
        answer = client.put(f"/v1/blocks/{name}", content=data, timeout=60)
        assert answer.status_code == 201
        assert client.get(f"/v1/blocks/{name}").content == data
        assert client.get("/v1/admin/status").json()["debts"] == 1
        assert "haversack_block_puts_degraded_total 1.0" in client.get("/metrics").text
