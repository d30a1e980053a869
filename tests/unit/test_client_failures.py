"""Errors of the server, rebuilt on the client's side."""

from __future__ import annotations

import orjson
import pytest

from client.failures import error_of_answer, error_of_json, group_of_status
from client.report import stops
from protocol.errors import (
    BadRequest,
    BlockNotFound,
    CorruptReply,
    FileChanged,
    Forbidden,
    HaversackError,
    InvalidRequest,
    MissingBlocks,
    NodeUnavailable,
    NotEnoughNodes,
    OperatorNeeded,
    RetryLater,
    ServerUnreachable,
    Unauthenticated,
    UnknownOutcome,
)


def every_class(root: type[HaversackError] = HaversackError) -> list[type[HaversackError]]:
    found = [root]
    for child in root.__subclasses__():
        if child.__module__ == "protocol.errors":
            found += every_class(child)
    return found


@pytest.mark.parametrize("cls", every_class())
def test_every_kind_comes_back_as_its_class(cls: type[HaversackError]) -> None:
    body = {"kind": cls.kind, "message": "what happened", "details": {"a": 1}}
    error = error_of_json(body)
    assert error.kind == cls.kind
    assert issubclass(type(error), cls) or cls is BadRequest
    assert error.message == "what happened"
    assert error.details == {"a": 1}


def test_a_kind_shared_with_a_group_is_the_leaf() -> None:
    assert type(error_of_json({"kind": "invalid_request", "message": ""})) is InvalidRequest


@pytest.mark.parametrize(
    ("status", "group"),
    [
        (400, BadRequest),
        (401, Unauthenticated),
        (403, Forbidden),
        (418, BadRequest),
        (429, RetryLater),
        (500, HaversackError),
        (502, UnknownOutcome),
        (503, RetryLater),
        (504, UnknownOutcome),
        (511, OperatorNeeded),
        (302, HaversackError),
    ],
)
def test_unknown_kinds_fall_back_to_the_group_of_their_status(
    status: int, group: type[HaversackError]
) -> None:
    body = orjson.dumps({"error": {"kind": "new_in_2031", "message": "m", "details": {}}})
    error = error_of_answer(status, body, {})
    assert isinstance(error, group)
    assert error.details["kind"] == "new_in_2031"
    assert isinstance(error_of_answer(status, b"<html>", {}), group)
    assert issubclass(group_of_status(status), group)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"error": null}', b'{"error": "text"}', b'{"error": {}}', b"\xff\x00"],
)
def test_a_body_that_explains_nothing_still_makes_an_error(body: bytes) -> None:
    error = error_of_answer(503, body, {})
    assert isinstance(error, RetryLater)
    assert "HTTP 503" in error.message


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0", 0.0), ("999999999", 3600.0), ("-1", None), ("soon", None), ("²", None)],
)
def test_retry_after_is_read_in_seconds_and_bounded(header: str, seconds: float | None) -> None:
    error = error_of_answer(503, b"", {"Retry-After": header})
    assert error.details.get("retry_after_s") == seconds


def test_a_message_of_any_length_stays_one_message() -> None:
    body = orjson.dumps({"error": {"kind": "overloaded", "message": "x" * 10**6}})
    assert len(error_of_answer(429, body, {}).message) == 500


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ServerUnreachable("x"), True),
        (NotEnoughNodes("x"), True),
        (NodeUnavailable("x"), True),
        (UnknownOutcome("x"), True),
        (Unauthenticated("x"), True),
        (Forbidden("x"), True),
        (CorruptReply("x"), False),
        (FileChanged("x"), False),
        (BlockNotFound("x"), False),
        (MissingBlocks([]), False),
        (HaversackError("x"), False),
    ],
)
def test_only_errors_that_the_next_item_would_meet_stop_a_transfer(
    error: HaversackError, expected: bool
) -> None:
    assert stops(error) is expected
