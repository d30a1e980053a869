"""Every error has exactly one HTTP answer, and its body can always be written."""

from __future__ import annotations

import importlib
import pkgutil

import orjson
import pytest

import protocol
from api.errors import ANSWERS, encode, render
from protocol.errors import (
    BadRequest,
    HaversackError,
    InvalidPath,
    MethodNotAllowed,
    NotEnoughNodes,
    OperatorNeeded,
    RangeNotSatisfiable,
    RetryLater,
    Unauthenticated,
    rebuild,
)

for _module in pkgutil.iter_modules(protocol.__path__, "protocol."):
    importlib.import_module(_module.name)


def _tree(root: type[HaversackError]) -> list[type[HaversackError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


def test_table_has_every_kind_and_no_other() -> None:
    kinds = {cls.kind for cls in _tree(HaversackError) if cls.__module__.startswith("protocol.")}
    assert set(ANSWERS) == kinds


@pytest.mark.parametrize("kind", sorted(ANSWERS))
def test_every_kind_renders_to_its_status(kind: str) -> None:
    details = {"allow": ["GET"], "length": 3}
    status, headers, body = render(rebuild(kind, "what happened", details))
    assert status == ANSWERS[kind].status
    error = orjson.loads(body)["error"]
    assert (error["kind"], error["message"], error["details"]) == (kind, "what happened", details)
    assert all(name == name.lower() for name, _ in headers)


def test_what_a_caller_must_change_is_never_a_server_error() -> None:
    ours = {"path_occupied"}  # raised by the client, not by us
    for cls in _tree(BadRequest):
        assert 400 <= ANSWERS[cls.kind].status < 500 or cls.kind in ours


def test_what_may_be_retried_says_so_and_what_needs_a_person_does_not() -> None:
    for cls in _tree(RetryLater):
        assert ANSWERS[cls.kind].status in (408, 429, 500, 503)
    for cls in _tree(OperatorNeeded):
        assert ANSWERS[cls.kind].status == 500


def test_special_headers_are_there() -> None:
    assert (b"retry-after", b"5") in render(NotEnoughNodes("two nodes"))[1]
    assert render(Unauthenticated("no token"))[1][0][0] == b"www-authenticate"
    assert (b"allow", b"GET, PUT") in render(MethodNotAllowed("no", {"allow": ["GET", "PUT"]}))[1]
    assert (b"content-range", b"bytes */7") in render(RangeNotSatisfiable("no", {"length": 7}))[1]


def test_error_about_text_that_utf8_cannot_carry_can_be_told() -> None:
    body = render(InvalidPath("bad \udcff", {"path": "a/\udcff", "huge": 2**70, "set": {1}}))[2]
    error = orjson.loads(body)["error"]
    assert error["message"] == "bad \\udcff"
    assert error["details"]["huge"] == str(2**70)


def test_plain_values_are_written_as_they_are() -> None:
    assert encode({"a": [1, 2.5, None, True, "ü"]}) == '{"a":[1,2.5,null,true,"ü"]}'.encode()
