"""The tree over HTTP against a whole cell: commits, claims, conflicts, listings, bad paths."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_cell import Cell, block_of, running_cell

from protocol.limits import COMMIT_ENTRIES_MAX


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    with running_cell(tmp_path_factory.mktemp("cell"), scheme="rs-2-1", nodes=3) as cell:
        yield cell


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


def _inline(path: str, content: bytes, **more: Any) -> dict[str, Any]:
    encoded = base64.b64encode(content).decode()
    return {"path": path, "size": len(content), "mtime": 1.5, "content": encoded, **more}


def _commit(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    return client.post("/v1/metadata/commit", json=body)


def _put(client: httpx.Client, seed: int, size: int = 5000) -> tuple[str, int]:
    name, data = block_of(seed, size)
    assert client.put(f"/v1/blocks/{name}", content=data).status_code in (200, 201)
    return name, size


# -- commits -----------------------------------------------------------------------------------


def test_inline_file_is_committed_listed_and_read(alice: httpx.Client) -> None:
    answer = _commit(alice, _inline("/inline/a.txt", b"hello", executable=True))
    assert answer.status_code == 201
    entry = answer.json()["entry"]
    assert (entry["path"], entry["kind"], entry["size"]) == ("/inline/a.txt", "file", 5)
    assert base64.b64decode(entry["content"]) == b"hello"
    assert entry["executable"] is True
    assert entry["block_list"] is None
    assert alice.get("/v1/metadata/entry", params={"path": "inline/a.txt"}).json() == entry
    page = alice.get("/v1/metadata/list", params={"path": "/inline"}).json()
    assert page == {"entries": [entry], "cursor": None}


def test_file_of_uploaded_blocks_is_committed(alice: httpx.Client) -> None:
    blocks = [_put(alice, seed) for seed in (1, 2, 1)]
    body = {
        "path": "blocks.bin",
        "size": sum(size for _, size in blocks),
        "mtime": 1700000000,
        "block_list": [name for name, _ in blocks],
    }
    entry = _commit(alice, body).json()["entry"]
    assert entry["block_list"] == body["block_list"]
    assert entry["content"] is None


def test_file_of_ten_thousand_blocks_is_committed(alice: httpx.Client) -> None:
    name, size = _put(alice, 3, 1000)
    body = {"path": "large.bin", "size": 10_000 * size, "mtime": 0, "block_list": [name] * 10_000}
    entry = _commit(alice, body).json()["entry"]
    assert entry["block_list"] == body["block_list"]


def test_symlink_is_committed(alice: httpx.Client) -> None:
    body = {"path": "link", "size": 0, "mtime": 0, "symlink": "../target"}
    entry = _commit(alice, body).json()["entry"]
    assert (entry["kind"], entry["symlink"]) == ("symlink", "../target")


def test_identical_commit_again_succeeds_and_is_not_new(alice: httpx.Client) -> None:
    first = _commit(alice, _inline("again.txt", b"same"))
    second = _commit(alice, _inline("again.txt", b"same"))
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()


def test_commit_naming_a_block_without_a_claim_lists_what_is_missing(
    alice: httpx.Client, bob: httpx.Client
) -> None:
    mine, size = _put(alice, 10)
    foreign, _ = _put(bob, 11)
    unknown = block_of(12, 10)[0]
    body = {
        "path": "stolen.bin",
        "size": 3 * size,
        "mtime": 0,
        "block_list": [foreign, mine, unknown],
    }
    answer = _commit(alice, body)
    assert _kind(answer) == (409, "missing_blocks")
    assert answer.json()["error"]["details"]["missing"] == [foreign, unknown]
    assert _kind(alice.get("/v1/metadata/entry", params={"path": "stolen.bin"})) == (
        404,
        "entry_not_found",
    )


def test_committed_block_can_be_read_and_named_again_by_its_owner_only(
    cell: Cell, alice: httpx.Client, bob: httpx.Client
) -> None:
    name, size = _put(alice, 13)
    body = {"path": "owned.bin", "size": size, "mtime": 0, "block_list": [name]}
    assert _commit(alice, body).status_code == 201
    assert _commit(alice, {**body, "path": "copy.bin"}).status_code == 201
    assert _kind(_commit(bob, body)) == (409, "missing_blocks")


def test_stale_parent_rev_conflicts_and_tells_what_the_server_has(alice: httpx.Client) -> None:
    first = _commit(alice, _inline("race.txt", b"one")).json()["entry"]
    second = _commit(alice, _inline("race.txt", b"two", parent_rev=first["rev"])).json()["entry"]
    for rev in (first["rev"], None, "nonsense"):
        answer = _commit(alice, _inline("race.txt", b"three", parent_rev=rev))
        assert _kind(answer) == (409, "conflict")
        assert answer.json()["error"]["details"]["server"] == second


@pytest.mark.parametrize(
    "path",
    [
        "a/../b",
        "..",
        "./a",
        "a//b",
        "//a",
        "a/",
        "a\0b",
        "x" * 256,
        "ü" * 128,
        "/".join(["d"] * 200),
        "/".join(["d" * 200] * 30),
        "/",
        "",
    ],
)
def test_path_that_no_entry_can_have_is_unprocessable(alice: httpx.Client, path: str) -> None:
    assert _kind(_commit(alice, _inline(path, b"x"))) == (422, "invalid_path")


def test_name_of_255_bytes_is_taken(alice: httpx.Client) -> None:
    name = "ü" * 127 + "x"
    assert _commit(alice, _inline(name, b"x")).status_code == 201


BAD_COMMITS: dict[str, dict[str, Any]] = {
    "no path": {"path": None},
    "path is a number": {"path": 3},
    "negative size": {"size": -1},
    "size is text": {"size": "5"},
    "size is a float": {"size": 5.5},
    "size beyond 64 bits": {"size": 2**63},
    "mtime is text": {"mtime": "now"},
    "mtime is null": {"mtime": None},
    "executable is text": {"executable": "yes"},
    "content is no base64": {"content": "a$b="},
    "content is not padded": {"content": "aGVsbG8"},
    "content is not ASCII": {"content": "häää"},
    "content of another size": {"size": 4},
    "two contents": {"block_list": []},
    "content too long": {"content": base64.b64encode(bytes(4097)).decode(), "size": 4097},
    "unknown field": {"owner": "alice"},
    "rev is a number": {"parent_rev": 7},
}


@pytest.mark.parametrize("name", BAD_COMMITS)
def test_malformed_commit_is_unprocessable(alice: httpx.Client, name: str) -> None:
    body = {**_inline("bad.txt", b"hello"), **BAD_COMMITS[name]}
    assert _kind(_commit(alice, body)) == (422, "invalid_request")
    assert alice.get("/v1/metadata/entry", params={"path": "bad.txt"}).status_code == 404


def test_malformed_hash_in_a_commit_is_unprocessable(alice: httpx.Client) -> None:
    body = {"path": "bad.bin", "size": 1, "mtime": 0, "block_list": ["AB" * 32]}
    assert _kind(_commit(alice, body)) == (422, "malformed_hash")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "01", "1_0"])
def test_number_that_is_none_is_unprocessable(alice: httpx.Client, text: str) -> None:
    body = '{"path":"n","size":1,"content":"YQ==","mtime":' + text + "}"
    answer = alice.post("/v1/metadata/commit", content=body.encode())
    assert _kind(answer) == (422, "invalid_request")


# -- batches -----------------------------------------------------------------------------------


def test_batch_of_commits_gives_each_its_own_result(alice: httpx.Client) -> None:
    name, size = _put(alice, 20)
    entries = [
        _inline("batch/a", b"a"),
        _inline("batch/../b", b"b"),
        {"path": "batch/c", "size": size, "mtime": 0, "block_list": [name]},
        {"path": "batch/d", "size": 5, "mtime": 0, "block_list": [block_of(21, 5)[0]]},
        {"path": "batch/e", "size": 5, "mtime": 0, "block_list": ["zz"]},
        _inline("batch/a", b"other"),
    ]
    answer = alice.post("/v1/metadata/commit_batch", json={"entries": entries})
    assert answer.status_code == 200
    kinds = [
        result["error"]["kind"] if "error" in result else result["entry"]["path"]
        for result in answer.json()["results"]
    ]
    assert kinds == [
        "/batch/a",
        "invalid_path",
        "/batch/c",
        "missing_blocks",
        "malformed_hash",
        "conflict",
    ]


def test_largest_batch_of_commits_is_taken_and_one_more_is_not(alice: httpx.Client) -> None:
    content = bytes(range(256)) * 16
    entries = [_inline(f"many/{i:04}", content) for i in range(COMMIT_ENTRIES_MAX + 1)]
    answer = alice.post("/v1/metadata/commit_batch", json={"entries": entries[:-1]})
    assert all("entry" in result for result in answer.json()["results"])
    answer = alice.post("/v1/metadata/commit_batch", json={"entries": entries})
    assert _kind(answer) == (422, "invalid_request")


def test_empty_batch_of_commits_is_fine(alice: httpx.Client) -> None:
    answer = alice.post("/v1/metadata/commit_batch", json={"entries": []})
    assert answer.json() == {"results": []}


# -- listings, deletes, folders ----------------------------------------------------------------


def test_listing_is_paged_to_the_end(alice: httpx.Client) -> None:
    entries = [_inline(f"pages/{i % 5}/{i:03}", b"x") for i in range(23)]
    alice.post("/v1/metadata/commit_batch", json={"entries": entries})
    seen: list[str] = []
    query: dict[str, Any] = {"path": "pages", "recursive": "true", "limit": 4}
    while True:
        page = alice.get("/v1/metadata/list", params=query).json()
        seen += [entry["path"] for entry in page["entries"]]
        if page["cursor"] is None:
            break
        query["cursor"] = page["cursor"]
    assert len(seen) == len(set(seen)) == 23 + 5
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=2001",
        "limit=x",
        "recursive=maybe",
        "cursor=nonsense",
        "more=1",
        "path=a&path=b",
        "path=%ff%fe",
        "path=%ed%a0%80",
        "&".join(f"a{i}=1" for i in range(100)),
    ],
)
def test_malformed_query_is_unprocessable(alice: httpx.Client, query: str) -> None:
    assert alice.get(f"/v1/metadata/list?{query}").status_code == 422


def test_bad_paths_in_queries_are_unprocessable(alice: httpx.Client) -> None:
    for path in ("a/../b", "a//b", "a\0", "x" * 256):
        for route in ("list", "entry"):
            answer = alice.get(f"/v1/metadata/{route}", params={"path": path})
            assert _kind(answer) == (422, "invalid_path")


def test_delete_moves_to_the_trash_once(alice: httpx.Client) -> None:
    entry = _commit(alice, _inline("gone/a", b"x")).json()["entry"]
    stale = alice.post("/v1/metadata/delete", json={"path": "gone/a", "parent_rev": "nonsense"})
    assert _kind(stale) == (409, "conflict")
    body = {"path": "gone/a", "parent_rev": entry["rev"]}
    assert alice.post("/v1/metadata/delete", json=body).json() == {"deleted": 1}
    assert _kind(alice.post("/v1/metadata/delete", json=body)) == (404, "entry_not_found")
    assert alice.post("/v1/metadata/delete", json={"path": "gone"}).json() == {"deleted": 1}
    assert _kind(alice.post("/v1/metadata/delete", json={"path": "/"})) == (422, "invalid_path")


def test_folder_is_made_once(alice: httpx.Client) -> None:
    first = alice.post("/v1/metadata/folder", json={"path": "made/deep"})
    second = alice.post("/v1/metadata/folder", json={"path": "made/deep"})
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert first.json()["kind"] == "folder"


def test_tree_of_one_account_is_invisible_to_another(
    alice: httpx.Client, bob: httpx.Client
) -> None:
    _commit(alice, _inline("private.txt", b"mine"))
    answer = bob.get("/v1/metadata/entry", params={"path": "private.txt"})
    assert _kind(answer) == (404, "entry_not_found")
    listed = bob.get("/v1/metadata/list", params={"recursive": "1"}).json()["entries"]
    assert "/private.txt" not in [entry["path"] for entry in listed]


def test_account_tells_who_the_token_speaks_for(cell: Cell, alice: httpx.Client) -> None:
    answer = alice.get("/v1/account").json()
    assert (answer["name"], answer["is_admin"]) == ("alice", False)
    with cell.client() as admin:
        assert admin.get("/v1/account").json()["is_admin"] is True
