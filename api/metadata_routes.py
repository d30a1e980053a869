"""`/v1/metadata/*` and `/v1/account`: the file tree over HTTP.

Life of a commit over HTTP:

    1. the body as a model, strictly: no coercion, no unknown field
    2. claims of the caller to the blocks that its namespace does not reference
    3. `Tree.commit`: compare and swap
    4. 201 for a new version, 200 if the same content was there

Nothing here decides about paths, revisions or references: `metadata` does.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from api.answers import Answer, json_answer
from api.authority import Authority
from api.bodies import Run
from api.call import Call
from api.errors import error_body
from api.hash_lists import parse_hashes
from api.openapi import ErrorDetail
from api.routing import Route
from metadata.accounts import Account
from metadata.changes import CommitRequest
from metadata.tree import Tree
from protocol.errors import HaversackError, InvalidRequest
from protocol.ids import BlockHash
from protocol.limits import (
    COMMIT_BLOCKS_MAX,
    COMMIT_ENTRIES_MAX,
    INLINE_FILE_BYTES_MAX,
    LISTING_PAGE_MAX,
)

LIST_IN_LOOP_BLOCKS: Final = 4096
"""Up to this a block list is read within about a millisecond."""

_SIZE_MAX: Final = 2**63 - 1
_STRICT: Final = ConfigDict(extra="forbid", strict=True)


class CommitBody(BaseModel):
    """A file or symlink as it shall be.  Exactly one of block_list, content and symlink."""

    model_config = _STRICT

    path: str
    size: int = Field(ge=0, le=_SIZE_MAX)
    mtime: float = Field(allow_inf_nan=False, description="Seconds since 1970.")
    block_list: list[str] | None = Field(default=None, max_length=COMMIT_BLOCKS_MAX)
    content: str | None = Field(
        default=None, description=f"Base64 of a file of up to {INLINE_FILE_BYTES_MAX} bytes."
    )
    parent_rev: str | None = Field(
        default=None, description="Rev that this replaces; null: nothing is there."
    )
    executable: bool = False
    symlink: str | None = None


class CommitBatchBody(BaseModel):
    """Many commits, in order, in one transaction, each with its own result."""

    model_config = _STRICT

    entries: list[CommitBody] = Field(max_length=COMMIT_ENTRIES_MAX)


class DeleteBody(BaseModel):
    """What to move to the trash."""

    model_config = _STRICT

    path: str
    parent_rev: str | None = None


class FolderBody(BaseModel):
    """Which folder to make."""

    model_config = _STRICT

    path: str


class ListQuery(BaseModel):
    """Which page of which folder."""

    model_config = ConfigDict(extra="forbid")

    path: str = ""
    recursive: bool = False
    cursor: str | None = None
    limit: int = Field(default=LISTING_PAGE_MAX, ge=1, le=LISTING_PAGE_MAX)


class PathQuery(BaseModel):
    """Which entry."""

    model_config = ConfigDict(extra="forbid")

    path: str


class EntryAnswer(BaseModel):
    """One file, folder or symlink."""

    id: str
    path: str
    name: str
    kind: Literal["file", "folder", "symlink"]
    rev: str
    size: int
    mtime: float
    executable: bool
    block_list: list[str] | None
    content: str | None
    symlink: str | None
    modified: float


class CommitAnswer(BaseModel):
    """The entry as it is now."""

    entry: EntryAnswer


class CommitBatchItem(BaseModel):
    """The entry, or why it was refused."""

    entry: EntryAnswer | None = None
    error: ErrorDetail | None = None


class CommitBatchAnswer(BaseModel):
    """One result per commit, in order."""

    results: list[CommitBatchItem]


class ListAnswer(BaseModel):
    """One page."""

    entries: list[EntryAnswer]
    cursor: str | None
    """Where the next page starts; null: this was the last."""


class DeleteAnswer(BaseModel):
    """How many entries went to the trash."""

    deleted: int


class AccountAnswer(BaseModel):
    """Who the token speaks for."""

    id: int
    name: str
    is_admin: bool
    namespace_id: int


class MetadataRoutes:
    """Endpoints of the tree."""

    def __init__(self, tree: Tree, authority: Authority, run: Run) -> None:
        self._tree = tree
        self._authority = authority
        self._run = run

    def routes(self) -> list[Route]:
        """What this class serves."""
        write = ("invalid_request", "invalid_path", "body_too_large", "unknown_outcome")
        read = ("invalid_request", "invalid_path", "entry_not_found")
        return [
            Route(
                "POST",
                "/v1/metadata/commit",
                self.commit,
                responses={
                    201: {"model": CommitAnswer, "description": "A new version."},
                    200: {"model": CommitAnswer, "description": "This content was there."},
                },
                problems=(*write, "malformed_hash", "conflict", "missing_blocks"),
            ),
            Route(
                "POST",
                "/v1/metadata/commit_batch",
                self.commit_batch,
                responses={200: {"model": CommitBatchAnswer, "description": "One result each."}},
                problems=write,
            ),
            Route(
                "GET",
                "/v1/metadata/list",
                self.list_folder,
                responses={200: {"model": ListAnswer, "description": "A page."}},
                problems=read,
            ),
            Route(
                "GET",
                "/v1/metadata/entry",
                self.entry,
                responses={200: {"model": EntryAnswer, "description": "What is there."}},
                problems=read,
            ),
            Route(
                "POST",
                "/v1/metadata/delete",
                self.delete,
                responses={200: {"model": DeleteAnswer, "description": "In the trash."}},
                problems=(*write, "entry_not_found", "conflict"),
            ),
            Route(
                "POST",
                "/v1/metadata/folder",
                self.make_folder,
                responses={
                    201: {"model": EntryAnswer, "description": "Made."},
                    200: {"model": EntryAnswer, "description": "It was there."},
                },
                problems=(*write, "conflict"),
            ),
            Route(
                "GET",
                "/v1/account",
                self.account,
                responses={200: {"model": AccountAnswer, "description": "You."}},
            ),
        ]

    async def commit(self, call: Call, body: CommitBody) -> Answer:
        """Make one version of a file or symlink."""
        request = await self._request(body)
        claimed = await self._claimed(call.account, (request,))
        result = await self._tree.commit(call.account, request, claimed)
        return json_answer({"entry": result.entry.as_json()}, 201 if result.created else 200)

    async def commit_batch(self, call: Call, body: CommitBatchBody) -> Answer:
        """Make many versions; each succeeds or fails on its own."""
        results: list[dict[str, Any]] = [{} for _ in body.entries]
        requests: dict[int, CommitRequest] = {}
        for index, item in enumerate(body.entries):
            try:
                requests[index] = await self._request(item)
            except HaversackError as error:
                results[index] = {"error": error_body(error)}
        if requests:
            claimed = await self._claimed(call.account, requests.values())
            outcomes = await self._tree.commit_many(call.account, list(requests.values()), claimed)
            for index, outcome in zip(requests, outcomes, strict=True):
                if isinstance(outcome, HaversackError):
                    results[index] = {"error": error_body(outcome)}
                else:
                    results[index] = {"entry": outcome.entry.as_json()}
        return json_answer({"results": results})

    async def list_folder(self, call: Call, query: Annotated[ListQuery, Query()]) -> Answer:
        """One page of a folder, or of everything below it."""
        page = await self._tree.list_folder(
            call.account, query.path, query.cursor, query.limit, recursive=query.recursive
        )
        entries = [entry.as_json() for entry in page.entries]
        return json_answer({"entries": entries, "cursor": page.cursor})

    async def entry(self, call: Call, query: Annotated[PathQuery, Query()]) -> Answer:
        """What stands at a path."""
        entry = await self._tree.entry(call.account, query.path)
        return json_answer(entry.as_json())

    async def delete(self, call: Call, body: DeleteBody) -> Answer:
        """Move an entry, and what is below it, to the trash."""
        deleted = await self._tree.delete(call.account, body.path, body.parent_rev)
        return json_answer({"deleted": deleted.count})

    async def make_folder(self, call: Call, body: FolderBody) -> Answer:
        """Make a folder and those above it."""
        result = await self._tree.make_folder(call.account, body.path)
        return json_answer(result.entry.as_json(), 201 if result.created else 200)

    async def account(self, call: Call) -> Answer:
        """Who the token speaks for."""
        return json_answer(call.account._asdict())

    async def _request(self, body: CommitBody) -> CommitRequest:
        """`commit_request`, in a thread for a file so large that its list would hold us up."""
        if body.block_list is not None and len(body.block_list) > LIST_IN_LOOP_BLOCKS:
            request: CommitRequest = await self._run(commit_request, body)
            return request
        return commit_request(body)

    async def _claimed(self, account: Account, requests: Iterable[CommitRequest]) -> set[BlockHash]:
        named = dict.fromkeys(block for request in requests for block in request.block_list or ())
        return await self._authority.claims_needed(account, list(named)) if named else set()


def commit_request(body: CommitBody) -> CommitRequest:
    """The request in the types of `metadata`.  Raises `MalformedHash`, `InvalidRequest`."""
    content = None
    if body.content is not None:
        try:
            content = binascii.a2b_base64(body.content.encode("ascii"), strict_mode=True)
        except ValueError as error:
            raise InvalidRequest(f"content is not base64: {error}") from error
    return CommitRequest(
        path=body.path,
        size=body.size,
        mtime=body.mtime,
        block_list=None if body.block_list is None else tuple(parse_hashes(body.block_list)),
        content=content,
        symlink=body.symlink,
        parent_rev=body.parent_rev,
        executable=body.executable,
    )
