"""What the OpenAPI document says beside the routes' own models: errors, tokens, framed bodies.

Used when routes are declared; nothing here runs for a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pydantic import BaseModel

from api.errors import ANSWERS
from protocol.block_frames import MEDIA_TYPE

_EVERYWHERE: Final = ("request_timeout", "internal")
_WITH_TOKEN: Final = ("unauthenticated", "overloaded", "database_busy", "unavailable")


class ErrorDetail(BaseModel):
    """What went wrong."""

    kind: str
    """Stable: match on this."""
    message: str
    """For people: what happened, to what, and what to do about it."""
    details: dict[str, Any]


class Problem(BaseModel):
    """The body of every answer with a status of 400 and above."""

    error: ErrorDetail


def problem_responses(kinds: Sequence[str], *, authenticated: bool) -> dict[int | str, Any]:
    """OpenAPI `responses` for the error kinds that a route can answer with."""
    by_status: dict[int, list[str]] = {}
    for kind in (*kinds, *_EVERYWHERE, *(_WITH_TOKEN if authenticated else ())):
        names = by_status.setdefault(ANSWERS[kind].status, [])
        if kind not in names:
            names.append(kind)
    return {
        status: {"model": Problem, "description": "`" + "`, `".join(names) + "`"}
        for status, names in sorted(by_status.items())
    }


def binary(description: str, media_type: str = "application/octet-stream") -> dict[str, Any]:
    """OpenAPI of an answer whose body is bytes."""
    return {
        "description": description,
        "content": {media_type: {"schema": {"type": "string", "format": "binary"}}},
    }


def binary_body(description: str, media_type: str = "application/octet-stream") -> dict[str, Any]:
    """`openapi_extra` of a route whose request body is bytes."""
    return {
        "requestBody": {
            "required": True,
            "description": description,
            "content": {media_type: {"schema": {"type": "string", "format": "binary"}}},
        }
    }


FRAMES: Final = MEDIA_TYPE

HASH_PARAMETER: Final = {
    "name": "hash",
    "in": "path",
    "required": True,
    "description": "SHA-256 of the block's bytes.",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
}


def header(name: str, description: str) -> dict[str, Any]:
    """OpenAPI of an optional request header."""
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": {"type": "string"},
    }


def with_token(document: dict[str, Any]) -> dict[str, Any]:
    """Say that everything needs a bearer token, except where a route says otherwise."""
    schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
    schemes["token"] = {"type": "http", "scheme": "bearer", "bearerFormat": "hvs_..."}
    document["security"] = [{"token": []}]
    return document
