"""Parts of a request without a server: hash lists, tokens, routes, bodies, answers."""

from __future__ import annotations

import re
from typing import Annotated, Any

import pytest
from fastapi import Query
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from api.access_log import AccessLog
from api.answers import Answer
from api.authentication import REMEMBERED_MAX, REMEMBERED_S, Authenticator
from api.bodies import declared_length, read_body, read_json_body, required_length
from api.call import Call, PeerGone
from api.hash_lists import parse_hashes
from api.routing import Route, RouteTable
from metadata.accounts import Account
from protocol.errors import (
    BlockTooLarge,
    BodyTooLarge,
    InvalidRequest,
    LengthRequired,
    MalformedHash,
    MethodNotAllowed,
    RouteNotFound,
    Unauthenticated,
)
from protocol.ids import BlockHash
from protocol.limits import JSON_BODY_BYTES_MAX

ALICE = Account(1, "alice", False, 1)


def _call(
    pieces: list[bytes] | None = None,
    *,
    headers: list[tuple[bytes, bytes]] | None = None,
    cut: bool = False,
) -> Call:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": piece, "more_body": True} for piece in pieces or []
    ]
    if cut:
        messages.append({"type": "http.disconnect"})
    else:
        messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    scope = {"type": "http", "headers": headers or [], "method": "PUT", "path": "/"}
    return Call(scope, receive)


# -- hash lists --------------------------------------------------------------------------------

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(st.lists(HEX, max_size=20))
def test_hashes_parse_and_print_back(texts: list[str]) -> None:
    assert [str(block) for block in parse_hashes(texts)] == texts


@given(st.lists(st.one_of(HEX, st.text("0123456789abcdefABCDEF \n\t-é", max_size=70)), max_size=6))
def test_list_is_taken_exactly_if_each_of_its_hashes_is(texts: list[str]) -> None:
    bad = next((text for text in texts if re.fullmatch("[0-9a-f]{64}", text) is None), None)
    if bad is None:
        assert parse_hashes(texts) == [BlockHash.parse(text) for text in texts]
        return
    with pytest.raises(MalformedHash) as caught:
        parse_hashes(texts)
    assert caught.value.details == MalformedHash(bad).details


# -- tokens ------------------------------------------------------------------------------------


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class _Accounts:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.revoked = False

    async def authenticate(self, token: str) -> Account:
        self.asked.append(token)
        if self.revoked or not token.startswith("hvs_"):
            raise Unauthenticated("unknown")
        return ALICE


async def test_token_is_looked_up_once_in_a_while_and_revocation_is_noticed() -> None:
    accounts, clock = _Accounts(), _Clock()
    authenticator = Authenticator(accounts, clock)
    for _ in range(5):
        assert await authenticator.account(b"Bearer hvs_x") == ALICE
    assert accounts.asked == ["hvs_x"]
    accounts.revoked = True
    clock.now = REMEMBERED_S / 2
    assert await authenticator.account(b"Bearer hvs_x") == ALICE
    clock.now = REMEMBERED_S
    with pytest.raises(Unauthenticated):
        await authenticator.account(b"Bearer hvs_x")


async def test_wrong_token_is_never_remembered() -> None:
    accounts = _Accounts()
    authenticator = Authenticator(accounts, _Clock())
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            await authenticator.account(b"Bearer wrong")
    assert len(accounts.asked) == 3


async def test_memory_of_tokens_is_bounded() -> None:
    accounts, clock = _Accounts(), _Clock()
    authenticator = Authenticator(accounts, clock)
    for number in range(2 * REMEMBERED_MAX + 10):
        clock.now += 0.0001
        await authenticator.account(b"Bearer hvs_%d" % number)
        assert len(authenticator._known) <= REMEMBERED_MAX


@pytest.mark.parametrize("field", [None, b"", b"Bearer", b"Bearer ", b"Basic x", b"\xff\xfe"])
async def test_other_credentials_are_not_even_looked_up(field: bytes | None) -> None:
    accounts = _Accounts()
    with pytest.raises(Unauthenticated):
        await Authenticator(accounts, _Clock()).account(field)
    assert accounts.asked == []


# -- bodies ------------------------------------------------------------------------------------


async def test_body_is_read_in_its_pieces() -> None:
    pieces = [b"ab", b"", b"c"]
    assert await read_body(_call(pieces), 3) == [b"ab", b"c"]


async def test_body_over_the_limit_is_refused_while_it_is_counted() -> None:
    with pytest.raises(BodyTooLarge):
        await read_body(_call([b"ab", b"cd"]), 3)


async def test_body_over_the_limit_is_refused_by_its_length_alone() -> None:
    call = _call(headers=[(b"content-length", b"4")])
    with pytest.raises(BlockTooLarge, match="has 4 bytes"):
        await read_body(call, 3, BlockTooLarge)


async def test_peer_that_leaves_in_mid_body_is_gone() -> None:
    with pytest.raises(PeerGone):
        await read_body(_call([b"ab"], cut=True), 10)


def test_length_is_required_where_it_is() -> None:
    assert required_length(_call(headers=[(b"content-length", b"0")])) == 0
    assert declared_length(_call()) == 0
    assert declared_length(_call(headers=[(b"transfer-encoding", b"chunked")])) is None
    for headers in ([], [(b"transfer-encoding", b"chunked")]):
        with pytest.raises(LengthRequired):
            required_length(_call(headers=headers))


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    numbers: list[int]


async def test_json_in_pieces_is_read_as_one() -> None:
    body = await read_json_body(_call([b'{"numb', b'ers": [1, 2]}']), _Body)
    assert body.numbers == [1, 2]
    with pytest.raises(InvalidRequest):
        await read_json_body(_call([b'{"numbers": []}', b"x"]), _Body)


async def test_complaint_about_a_body_is_short_and_does_not_repeat_it() -> None:
    text = b'{"numbers": [%s]}' % b",".join([b'"secret"'] * 5000)
    with pytest.raises(InvalidRequest) as caught:
        await read_json_body(_call([text]), _Body)
    assert len(str(caught.value.details)) < 2000
    assert "secret" not in f"{caught.value} {caught.value.details}"
    assert caught.value.details["count"] == 5000


async def test_json_over_the_limit_is_refused() -> None:
    call = _call(headers=[(b"content-length", b"%d" % (JSON_BODY_BYTES_MAX + 1))])
    with pytest.raises(BodyTooLarge):
        await read_json_body(call, _Body)


# -- routes ------------------------------------------------------------------------------------


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")
    path: str = ""


class _Endpoints:
    async def plain(self, call: Call) -> Answer:
        return Answer(200, (), (call.argument.encode(),))

    async def asked(self, call: Call, query: Annotated[_Query, Query()]) -> Answer:
        del call
        return Answer(200, (), (query.path.encode(),))


def _table() -> RouteTable:
    endpoints = _Endpoints()
    ok = {200: {"description": "ok"}}
    return RouteTable(
        [
            Route("GET", "/a/{hash}", endpoints.plain, responses=ok),
            Route("PUT", "/a/{hash}", endpoints.plain, responses=ok),
            Route("POST", "/a/check", endpoints.plain, responses=ok),
            Route("GET", "/b", endpoints.asked, responses=ok),
        ]
    )


def test_exact_path_wins_over_a_variable() -> None:
    table = _table()
    assert table.find("POST", "/a/check").route.path == "/a/check"
    assert table.find("GET", "/a/x") == (table.find("GET", "/a/y").route, "x")
    with pytest.raises(MethodNotAllowed) as caught:
        table.find("GET", "/a/check")
    assert caught.value.details == {"allow": ["POST"]}


def test_head_falls_back_to_get() -> None:
    assert _table().find("HEAD", "/b").route.method == "GET"


@pytest.mark.parametrize("path", ["/a", "/a/", "/a/x/y", "/", "", "a/x", "/B"])
def test_other_paths_have_no_route(path: str) -> None:
    with pytest.raises(RouteNotFound):
        _table().find("GET", path)


async def test_query_reaches_the_endpoint_decoded() -> None:
    call = _call()
    call.scope["query_string"] = b"path=a%2Fb+%C3%BC"
    answer = await _table().find("GET", "/b").route.answer(call)
    assert answer.pieces == ("a/b ü".encode(),)


# -- the log -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "probe", "status", "seconds", "lines"),
    [
        ("problems", False, 200, 0.1, 0),
        ("problems", False, 404, 0.1, 0),
        ("problems", False, 409, 0.1, 0),
        ("problems", False, 401, 0.1, 1),
        ("problems", False, 500, 0.1, 1),
        ("problems", False, 200, 1.1, 1),
        ("problems", True, 503, 0.1, 0),
        ("problems", True, 503, 1.1, 1),
        ("all", True, 200, 0.1, 1),
    ],
)
def test_only_problems_and_slow_requests_get_a_line(
    what: Any, probe: bool, status: int, seconds: float, lines: int
) -> None:
    log = AccessLog(what, 1.0)
    written: list[tuple[str, dict[str, Any]]] = []

    class Sink:
        def info(self, event: str, **fields: Any) -> None:
            written.append((event, fields))

        error = info

    log._log = Sink()
    call = _call(headers=[(b"authorization", b"Bearer hvs_secret")])
    call.scope |= {"query_string": b"token=secret", "client": ("127.0.0.1", 1)}
    log.answered(call, "/v1/x", status, seconds, 100.0, is_probe=probe)
    assert len(written) == lines
    assert "secret" not in str(written)
