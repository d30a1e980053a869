"""Every route and every way of not being allowed in; limits under load; the document is true."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from api_cell import Cell, block_of, running_cell
from api_server import DEADLINE_S, read_answer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.app import GatewayApp, create_app
from api.call import Access
from api.errors import ANSWERS
from protocol.errors import DatabaseBusy, UnknownOutcome

UNKNOWN = "ab" * 32


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    with running_cell(tmp_path_factory.mktemp("cell"), scheme="rs-2-1", nodes=3) as cell:
        yield cell


@pytest.fixture(scope="module")
def app(cell: Cell) -> GatewayApp:
    return create_app(cell.services)


@pytest.fixture(scope="module")
def document(cell: Cell) -> dict[str, Any]:
    with cell.client() as client:
        return client.get("/openapi.json").json()


def _kind(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["kind"]


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- who may call ------------------------------------------------------------------------------

CREDENTIALS: dict[str, Callable[[Cell], str | None]] = {
    "none": lambda cell: None,
    "empty": lambda cell: "",
    "no token": lambda cell: "Bearer",
    "comma": lambda cell: "Bearer ,",
    "unknown token": lambda cell: "Bearer hvs_" + "a" * 43,
    "short token": lambda cell: "Bearer hvs_a",
    "cut token": lambda cell: "Bearer " + cell.tokens["admin"][:-1],
    "longer token": lambda cell: "Bearer " + cell.tokens["admin"] + "a",
    "token in upper case": lambda cell: "Bearer " + cell.tokens["admin"].upper(),
    "huge token": lambda cell: "Bearer " + "a" * 20_000,
    "token that is no text": lambda cell: "Bearer hvs_\xff" + "a" * 42,
    "Basic": lambda cell: "Basic YWRtaW46YWRtaW4=",
    "Basic with our token": lambda cell: "Basic " + cell.tokens["admin"],
    "bare token": lambda cell: cell.tokens["admin"],
    "other scheme": lambda cell: "Digest " + cell.tokens["admin"],
    "AWS": lambda cell: "AWS4-HMAC-SHA256 Credential=" + cell.tokens["admin"],
}


@pytest.mark.parametrize("credential", CREDENTIALS)
def test_no_route_but_probes_lets_anybody_in(cell: Cell, app: GatewayApp, credential: str) -> None:
    value = CREDENTIALS[credential](cell)
    headers = {} if value is None else {"Authorization": value.encode("latin-1")}
    with cell.client(None) as client:
        for route in app.api_routes:
            path = route.path.replace("{hash}", UNKNOWN).replace("{subject}", UNKNOWN)
            answer = client.request(route.method, path, headers=headers)
            if route.access is Access.PUBLIC:
                assert answer.status_code == 200, path
                continue
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert route.method == "HEAD" or _kind(answer) == (401, "unauthenticated")


def test_public_routes_are_three_probes_and_an_empty_page_and_no_other(app: GatewayApp) -> None:
    public = {route.path for route in app.api_routes if route.access is Access.PUBLIC}
    assert public == {"/healthz", "/readyz", "/metrics", "/admin"}


def test_token_in_the_query_or_in_a_cookie_is_no_token(cell: Cell) -> None:
    token = cell.tokens["admin"]
    with cell.client(None, cookies={"Authorization": f"Bearer {token}"}) as client:
        for query in ({"token": token}, {"access_token": token}, {"Authorization": token}):
            assert client.get("/v1/account", params=query).status_code == 401


ADMIN_QUERIES = {"/v1/admin/what-if": {"lose": "node-01"}}
"""For routes that need one."""


def test_admin_routes_are_for_administrators(cell: Cell, app: GatewayApp) -> None:
    admin_routes = [route for route in app.api_routes if route.access is Access.ADMIN]
    assert {route.path for route in admin_routes} == {
        route.path for route in app.api_routes if route.path.startswith("/v1/admin/")
    }
    with cell.client("alice") as alice, cell.client() as admin:
        for route in admin_routes:
            path = route.path.replace("{subject}", "node-01")
            assert _kind(alice.request(route.method, path)) == (403, "forbidden")
            if route.method == "GET" and "{" not in path:
                params = ADMIN_QUERIES.get(path, {})
                assert admin.get(path, params=params).status_code == 200, path


def test_scheme_of_the_credentials_is_not_case_sensitive(cell: Cell) -> None:
    with cell.client(None) as client:
        for scheme in ("bearer", "BEARER"):
            headers = {"Authorization": f"{scheme}  {cell.tokens['alice']}"}
            assert client.get("/v1/account", headers=headers).status_code == 200


def test_refused_upload_is_refused_before_it_is_read(cell: Cell) -> None:
    with cell.running.connect() as peer:
        peer.sendall(
            f"PUT /v1/blocks/{UNKNOWN} HTTP/1.1\r\nContent-Length: 999999\r\n\r\n".encode()
        )
        status, headers, _ = read_answer(peer)
        assert (status, headers["connection"]) == (401, "close")


# -- routes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/", "/v1/blocks", "/v1/blocks/", "/v2/blocks/x", "/docs", "/redoc",
             "/v1/blocks/check/more", "//v1/account", "/v1/account/", "/HEALTHZ", "/%00", "/é"]
)  # fmt: skip
def test_path_that_does_not_exist_is_not_found(cell: Cell, path: str) -> None:
    with cell.client() as client:
        assert _kind(client.get(path)) == (404, "route_not_found")


def test_wrong_method_is_told_the_right_ones(cell: Cell, app: GatewayApp) -> None:
    with cell.client() as client:
        for path in {route.path for route in app.api_routes}:
            methods = {route.method for route in app.api_routes if route.path == path}
            answer = client.request("DELETE", path.replace("{hash}", UNKNOWN))
            assert _kind(answer) == (405, "method_not_allowed")
            assert set(answer.headers["allow"].split(", ")) == methods


def test_head_works_wherever_get_does(cell: Cell) -> None:
    with cell.client() as client:
        for path in ("/healthz", "/v1/account", "/metrics"):
            answer = client.head(path)
            assert (answer.status_code, answer.content) == (200, b"")
            assert int(answer.headers["content-length"]) > 0


def test_every_answer_has_a_request_id(cell: Cell) -> None:
    with cell.client(None) as client:
        seen = [
            client.get(path).headers["x-request-id"] for path in ("/healthz", "/x", "/v1/account")
        ]
        assert len(set(seen)) == 3
        given = client.get("/healthz", headers={"X-Request-Id": "mine-1.2_3"})
        assert given.headers["x-request-id"] == "mine-1.2_3"
        for bad in ("a b", "x" * 65, "ä".encode().decode("latin-1"), "<script>"):
            answer = client.get("/healthz", headers={"X-Request-Id": bad.encode("latin-1")})
            assert answer.headers["x-request-id"] != bad


# -- probes, metrics ---------------------------------------------------------------------------


def test_probes_say_what_works(cell: Cell) -> None:
    with cell.client(None) as client:
        assert client.get("/healthz").json() == {"alive": True}
        answer = client.get("/readyz")
        assert answer.status_code == 200
        assert answer.json()["nodes"] == {"all": 3, "reading": 3, "writing": 3}
        assert answer.json()["needs"] == {"read": 2, "write": 3}


def test_metrics_count_by_route_template_and_never_by_path(cell: Cell) -> None:
    name, data = block_of(1, 1000)
    with cell.client() as client:
        client.put(f"/v1/blocks/{name}", content=data)
        client.get(f"/v1/blocks/{name}")
        client.get("/no/such/path")
        text = client.get("/metrics").text
    assert 'method="GET",route="/v1/blocks/{hash}",status="200"' in text
    assert 'route="none",status="404"' in text
    assert name not in text
    assert "no/such" not in text
    for line in (
        'haversack_block_puts_total{outcome="new"}',
        "haversack_block_gets_total",
        'haversack_nodes{state="up"} 3.0',
        "haversack_debts 0.0",
        "haversack_sql_up 1.0",
        "haversack_http_request_seconds_bucket",
        "process_resident_memory_bytes",
    ):
        assert line in text


def test_status_lists_nodes_volumes_and_bytes(cell: Cell) -> None:
    with cell.client() as client:
        status = client.get("/v1/admin/status").json()
    assert [node["id"] for node in status["nodes"]] == ["node-01", "node-02", "node-03"]
    assert {node["state"] for node in status["nodes"]} == {"up"}
    assert status["volumes"]["open"] >= 2
    assert status["scheme"] == "rs-2-1"


# -- mistakes and outages ----------------------------------------------------------------------


def test_exception_that_nobody_foresaw_is_a_500_that_tells_nothing(cell: Cell) -> None:
    services = cell.services
    index = services.index
    claimed = index.claimed

    async def broken(*_: object) -> None:
        raise KeyError("secret inside")

    index.claimed = broken
    try:
        with cell.client() as client:
            answer = client.get(f"/v1/blocks/{UNKNOWN}")
            assert _kind(answer) == (500, "internal")
            assert "secret" not in answer.text
            assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    finally:
        index.claimed = claimed
    with cell.client() as client:
        assert client.get(f"/v1/blocks/{UNKNOWN}").status_code == 404


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [(DatabaseBusy("locked"), 503, "1"), (UnknownOutcome("lost in COMMIT"), 504, None)],
)
def test_outage_of_a_database_is_told_as_what_it_is(
    cell: Cell, error: Exception, status: int, retry: str | None
) -> None:
    tree = cell.services.tree
    references = tree.references

    async def failing(*_: object) -> None:
        raise copy.copy(error)

    tree.references = failing
    try:
        with cell.client() as client:
            answer = client.get(f"/v1/blocks/{UNKNOWN}")
    finally:
        tree.references = references
    assert _kind(answer) == (status, error.kind)
    assert answer.headers.get("retry-after") == retry


# -- limits under load -------------------------------------------------------------------------


def test_requests_over_the_queue_are_told_to_come_back(tmp_path: Path) -> None:
    with running_cell(
        tmp_path,
        scheme="rs-2-1",
        nodes=3,
        active_requests_max=2,
        queued_requests_max=3,
        queue_wait_s=30,
    ) as cell:
        released = cell.running.call(_make_event)
        _delay(cell, released)
        with concurrent.futures.ThreadPoolExecutor(12) as pool, cell.client() as probe:
            calls = [pool.submit(_get_account_of, cell) for _ in range(8)]
            _until(lambda: sum(call.done() for call in calls) == 3)
            assert probe.get("/healthz").status_code == 200
            metrics = probe.get("/metrics").text
            assert "haversack_http_active 2.0" in metrics
            assert "haversack_http_queued 3.0" in metrics
            refused = [call.result() for call in calls if call.done()]
            assert {answer.status_code for answer in refused} == {429}
            assert {answer.headers["retry-after"] for answer in refused} == {"1"}
            cell.running.loop.call_soon_threadsafe(released.set)
            statuses = sorted(call.result().status_code for call in calls)
        assert statuses == [404] * 5 + [429] * 3


def test_request_that_waits_too_long_for_its_turn_is_told_to_come_back(tmp_path: Path) -> None:
    with running_cell(
        tmp_path, scheme="rs-2-1", nodes=3, active_requests_max=1, queue_wait_s=0.2
    ) as cell:
        released = cell.running.call(_make_event)
        _delay(cell, released)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(_get_account_of, cell) for _ in range(2)]
            _until(lambda: any(call.done() for call in calls))
            cell.running.loop.call_soon_threadsafe(released.set)
            assert sorted(call.result().status_code for call in calls) == [404, 429]


def test_slow_peers_hold_memory_but_no_turns(tmp_path: Path) -> None:
    with running_cell(
        tmp_path, scheme="rs-2-1", nodes=3, active_requests_max=1, queued_requests_max=0
    ) as cell:
        name, data = block_of(7, 200_000)
        head = (
            f"PUT /v1/blocks/{name} HTTP/1.1\r\nAuthorization: Bearer {cell.tokens['alice']}\r\n"
            f"Content-Length: {len(data)}\r\nExpect: 100-continue\r\n\r\n"
        )
        with cell.running.connect() as uploader, cell.client("alice") as client:
            uploader.sendall(head.encode())
            assert uploader.recv(100).startswith(b"HTTP/1.1 100")
            uploader.sendall(data[:100_000])
            assert client.get("/v1/account").status_code == 200
            uploader.sendall(data[100_000:])
            assert read_answer(uploader)[0] == 201
            with cell.running.connect() as reader:
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                for _ in range(200):  # far more than the sockets hold
                    reader.sendall(
                        f"GET /v1/blocks/{name} HTTP/1.1\r\n"
                        f"Authorization: Bearer {cell.tokens['alice']}\r\n\r\n".encode()
                    )
                assert reader.recv(100).startswith(b"HTTP/1.1 200")
                state = cell.running.server.server_state

                def is_stuck() -> bool:
                    return any(peer._room is not None for peer in list(state.connections))

                def holds_no_turn() -> bool:
                    return all(
                        is_stuck() and client.get("/v1/account").status_code == 200
                        for _ in range(20)
                    )

                # While the sockets still take answers the reader's own requests have turns.
                _until(holds_no_turn)


def test_bodies_over_the_memory_for_them_wait_and_are_then_told_to_come_back(
    tmp_path: Path,
) -> None:
    with running_cell(
        tmp_path, scheme="rs-2-1", nodes=3, body_bytes_max=16 << 20, queue_wait_s=0.3
    ) as cell:
        name, data = block_of(8, 4 << 20)
        head = (
            f"PUT /v1/blocks/{name} HTTP/1.1\r\nAuthorization: Bearer {cell.tokens['alice']}\r\n"
            f"Content-Length: {len(data)}\r\nExpect: 100-continue\r\n\r\n"
        ).encode()
        with contextlib.ExitStack() as stack:
            holders = [stack.enter_context(cell.running.connect()) for _ in range(4)]
            for peer in holders:
                peer.sendall(head)
                assert peer.recv(100).startswith(b"HTTP/1.1 100")
            late = stack.enter_context(cell.running.connect())
            late.sendall(head)
            assert read_answer(late)[0] == 429
            holders[0].sendall(data)
            assert read_answer(holders[0])[0] == 201
            with cell.client("alice") as client:
                assert client.put(f"/v1/blocks/{name}", content=data).status_code == 200


async def _make_event() -> asyncio.Event:
    return asyncio.Event()


def _delay(cell: Cell, released: asyncio.Event) -> None:
    """Entry look-ups wait for the event."""
    tree = cell.services.tree
    entry = tree.entry

    async def waiting(*arguments: Any) -> Any:
        await released.wait()
        return await entry(*arguments)

    tree.entry = waiting


def _get_account_of(cell: Cell) -> httpx.Response:
    with cell.client() as client:
        return client.get("/v1/metadata/entry", params={"path": "absent"})


# -- the document ------------------------------------------------------------------------------


def test_document_names_every_route_and_nothing_else(
    app: GatewayApp, document: dict[str, Any]
) -> None:
    named = {(path, method.upper()) for path, item in document["paths"].items() for method in item}
    assert named == {(route.path, route.method) for route in app.api_routes}


def test_document_says_where_a_token_is_needed(app: GatewayApp, document: dict[str, Any]) -> None:
    assert document["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for route in app.api_routes:
        operation = document["paths"][route.path][route.method.lower()]
        assert (operation.get("security") == []) == (route.access is Access.PUBLIC)
        assert ("401" in operation["responses"]) == (route.access is not Access.PUBLIC)


def _conforms(document: dict[str, Any], method: str, path: str, answer: httpx.Response) -> None:
    operation = document["paths"][path][method.lower()]
    declared = operation["responses"].get(str(answer.status_code))
    assert declared is not None, f"{method} {path} answered {answer.status_code}: {answer.text}"
    if not answer.content:
        return
    media = answer.headers["content-type"].split(";")[0]
    assert media in declared["content"], f"{method} {path} answered {media}"
    if media == "application/json":
        schema = {**declared["content"][media]["schema"], "components": document["components"]}
        jsonschema.validate(answer.json(), schema)
    if answer.status_code >= 400:
        kind = answer.json()["error"]["kind"]
        assert f"`{kind}`" in declared["description"], f"{method} {path}: {kind} is not declared"


def test_answers_are_what_the_document_says(cell: Cell, document: dict[str, Any]) -> None:
    name, data = block_of(5, 2000)
    wrong = block_of(6, 2000)[0]
    entry = {"path": "doc/a", "size": 2000, "mtime": 1, "block_list": [name]}
    calls: list[tuple[str, str, str, dict[str, Any]]] = [
        ("PUT", "/v1/blocks/{hash}", name, {"content": data}),
        ("PUT", "/v1/blocks/{hash}", name, {"content": data}),
        ("PUT", "/v1/blocks/{hash}", wrong, {"content": data}),
        ("PUT", "/v1/blocks/{hash}", "x", {"content": data}),
        ("PUT", "/v1/blocks/{hash}", name, {"content": iter([data])}),
        ("PUT", "/v1/blocks/{hash}", name, {"content": bytes((4 << 20) + 1)}),
        ("GET", "/v1/blocks/{hash}", name, {}),
        ("GET", "/v1/blocks/{hash}", name, {"headers": {"Range": "bytes=0-9"}}),
        ("GET", "/v1/blocks/{hash}", name, {"headers": {"Range": "bytes=9999-"}}),
        ("GET", "/v1/blocks/{hash}", name, {"headers": {"If-None-Match": "*"}}),
        ("GET", "/v1/blocks/{hash}", wrong, {}),
        ("HEAD", "/v1/blocks/{hash}", name, {}),
        ("HEAD", "/v1/blocks/{hash}", wrong, {}),
        ("POST", "/v1/blocks/check", "", {"json": {"hashes": [name, wrong]}}),
        ("POST", "/v1/blocks/check", "", {"json": {"hashes": ["x"]}}),
        ("POST", "/v1/blocks/check", "", {"json": []}),
        ("POST", "/v1/blocks/batch", "", {"content": b""}),
        ("POST", "/v1/blocks/batch", "", {"content": b"x"}),
        ("POST", "/v1/blocks/fetch", "", {"json": {"hashes": [name, wrong]}}),
        ("POST", "/v1/blocks/fetch", "", {"json": {"hashes": 1}}),
        ("POST", "/v1/metadata/commit", "", {"json": entry}),
        ("POST", "/v1/metadata/commit", "", {"json": entry}),
        ("POST", "/v1/metadata/commit", "", {"json": {**entry, "size": 1999, "mtime": 2}}),
        ("POST", "/v1/metadata/commit", "", {"json": {**entry, "path": "../x"}}),
        ("POST", "/v1/metadata/commit", "", {"json": {**entry, "block_list": [wrong]}}),
        ("POST", "/v1/metadata/commit", "", {"json": {**entry, "block_list": ["x"]}}),
        ("POST", "/v1/metadata/commit", "", {"json": {}}),
        ("POST", "/v1/metadata/commit_batch", "", {"json": {"entries": [entry]}}),
        ("POST", "/v1/metadata/commit_batch", "", {"json": {"entries": [{}]}}),
        ("GET", "/v1/metadata/list", "", {"params": {"path": "doc"}}),
        ("GET", "/v1/metadata/list", "", {"params": {"path": "absent"}}),
        ("GET", "/v1/metadata/list", "", {"params": {"path": ".."}}),
        ("GET", "/v1/metadata/list", "", {"params": {"limit": "x"}}),
        ("GET", "/v1/metadata/entry", "", {"params": {"path": "doc/a"}}),
        ("GET", "/v1/metadata/entry", "", {"params": {"path": "absent"}}),
        ("GET", "/v1/metadata/entry", "", {}),
        ("POST", "/v1/metadata/folder", "", {"json": {"path": "doc/b"}}),
        ("POST", "/v1/metadata/folder", "", {"json": {"path": "doc/b"}}),
        ("POST", "/v1/metadata/folder", "", {"json": {"path": "doc/a"}}),
        ("POST", "/v1/metadata/delete", "", {"json": {"path": "doc/a", "parent_rev": "x"}}),
        ("POST", "/v1/metadata/delete", "", {"json": {"path": "doc/a"}}),
        ("POST", "/v1/metadata/delete", "", {"json": {"path": "doc/a"}}),
        ("GET", "/v1/account", "", {}),
        ("GET", "/v1/admin/status", "", {}),
        ("GET", "/v1/admin/why/{subject}", "node-01", {}),
        ("GET", "/v1/admin/why/{subject}", "v1", {}),
        ("GET", "/v1/admin/why/{subject}", name, {}),
        ("GET", "/v1/admin/why/{subject}", UNKNOWN, {}),
        ("GET", "/v1/admin/why/{subject}", "X", {}),
        ("GET", "/v1/admin/what-if", "", {"params": {"lose": "node-01"}}),
        ("GET", "/v1/admin/what-if", "", {"params": {"any_one": "rack"}}),
        ("GET", "/v1/admin/what-if", "", {}),
        ("GET", "/v1/admin/events", "", {}),
        ("GET", "/v1/admin/events", "", {"params": {"limit": 0}}),
        ("GET", "/v1/admin/scrub", "", {}),
        ("POST", "/v1/admin/scrub", "", {"json": {"action": "start"}}),
        ("POST", "/v1/admin/scrub", "", {"json": {"action": "hurry"}}),
        ("GET", "/v1/admin/verify", "", {}),
        ("POST", "/v1/admin/verify", "", {"json": {"deep": True}}),
        ("POST", "/v1/admin/verify", "", {"json": {"deep": "very"}}),
        ("GET", "/v1/admin/nodes", "", {}),
        ("POST", "/v1/admin/nodes", "", {"json": {"directory": "relative"}}),
        ("POST", "/v1/admin/nodes/{node}", "node-01", {"json": {"weight": 1.0}}),
        ("POST", "/v1/admin/nodes/{node}", "node-99", {"json": {"weight": 1.0}}),
        ("GET", "/v1/admin/jobs", "", {}),
        ("POST", "/v1/admin/jobs", "", {"json": {"kind": "drain", "node": "node-99"}}),
        ("POST", "/v1/admin/jobs", "", {"json": {"kind": "rebalance", "dry_run": True}}),
        ("GET", "/v1/admin/jobs/{job}", "77", {}),
        ("POST", "/v1/admin/jobs/{job}", "77", {"json": {"action": "pause"}}),
        ("GET", "/admin", "", {}),
        ("GET", "/healthz", "", {}),
        ("GET", "/readyz", "", {}),
        ("GET", "/metrics", "", {}),
        ("GET", "/openapi.json", "", {}),
    ]
    called = set()
    with cell.client() as client:
        for method, path, argument, options in calls:
            called.add((method, path))
            answer = client.request(method, re.sub(r"\{\w+\}", argument, path), **options)
            _conforms(document, method, path, answer)
    assert called == {
        (method.upper(), path) for path, item in document["paths"].items() for method in item
    }


def test_every_declared_problem_is_in_the_table_of_kinds(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            for status, response in operation["responses"].items():
                for kind in response["description"].split("`")[1::2]:
                    assert ANSWERS[kind].status == int(status), f"{method} {path} {kind}"


# -- garbage -----------------------------------------------------------------------------------

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=40),
    st.just("/a/../b"),
    st.just(UNKNOWN),
    st.just("x" * 300),
)
TREES = st.recursive(
    JUNK,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["path", "size", "mtime", "block_list", "content", "parent_rev", "symlink", "hashes", "entries"]
)
BODIES = st.one_of(
    st.binary(max_size=300),
    TREES.map(lambda tree: json.dumps(tree).encode()),
    st.dictionaries(FIELDS, TREES, max_size=8).map(lambda tree: json.dumps(tree).encode()),
)
METHODS = st.sampled_from(["GET", "PUT", "POST", "HEAD", "DELETE", "OPTIONS", "PATCH"])
PATHS = st.one_of(
    st.sampled_from(
        [
            f"/v1/blocks/{UNKNOWN}",
            "/v1/blocks/check",
            "/v1/blocks/batch",
            "/v1/blocks/fetch",
            "/v1/metadata/commit",
            "/v1/metadata/commit_batch",
            "/v1/metadata/list",
            "/v1/metadata/entry",
            "/v1/metadata/delete",
            "/v1/metadata/folder",
            "/v1/account",
            "/openapi.json",
        ]
    ),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30).map(
        lambda text: "/v1/blocks/" + text
    ),
)
QUERIES = st.one_of(
    st.just(""),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40).map("?".__add__),
    st.builds("?{}={}".format, st.sampled_from(["path", "limit", "cursor", "recursive"]),
              st.text(st.sampled_from("abc%f0/.-_"), max_size=20)),
)  # fmt: skip
HEADERS = st.dictionaries(
    st.sampled_from(["Range", "If-None-Match", "If-Range", "Content-Type", "X-Request-Id"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60),
    max_size=3,
)


@given(method=METHODS, path=PATHS, query=QUERIES, body=BODIES, headers=HEADERS)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_garbage_is_never_a_server_error(
    cell: Cell, method: str, path: str, query: str, body: bytes, headers: dict[str, str]
) -> None:
    connection = http.client.HTTPConnection(*cell.running.address, timeout=DEADLINE_S)
    try:
        target = path.replace("#", "%23") + query
        token = {"Authorization": f"Bearer {cell.tokens['alice']}"}
        connection.putrequest(method, "/", skip_accept_encoding=True)
        connection._buffer[0] = f"{method} {target} HTTP/1.1".encode("ascii")
        for name, value in {**headers, **token, "Content-Length": str(len(body))}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    assert answer.status < 500, content
    if answer.status >= 400 and method != "HEAD":
        error = json.loads(content)["error"]
        assert ANSWERS[error["kind"]].status == answer.status
