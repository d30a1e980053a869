"""One HTTP call: sent, retried while that is safe, answered or turned into an error of ours.

Step 1 of every walk that starts at a client.  Called by `client.api` only; may import `protocol`
and `client.retry`, `client.replies`, `client.failures`.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from client.failures import error_of_answer
from client.replies import Reply
from client.retry import Backoff, RetryPolicy
from protocol.clock import Clock
from protocol.errors import (
    ConfigInvalid,
    CorruptReply,
    HaversackError,
    InvalidRequest,
    RetryLater,
    ServerUnreachable,
    UnknownOutcome,
)
from protocol.hashing import Buffer
from protocol.limits import BATCH_BODY_BYTES_MAX, KIB, MIB

T = TypeVar("T")

_CONNECT_S = 5.0
_SILENCE_S = 25.0
"""A third of a transfer's patience: an answer that never comes is asked for again."""
_CALL_S = 300.0
_KEEP_ALIVE_S = 4.0
"""Under uvicorn's five seconds, so that a connection is not reused while the server closes it."""
_ANSWER_BYTES_MAX = 4 * BATCH_BODY_BYTES_MAX
_WRITE_BYTES = 256 * KIB
_READ_BUFFER_BYTES = 1 * MIB


class LostReply(enum.Enum):
    """What a lost answer means for a call.

    The call may have been done when its connection broke after the request was sent:

        REPEAT   doing it twice is the same as once, and nobody needs to know: reads, puts by hash
        CONFIRM  doing it twice is the same as once, but if no later attempt is answered the
                 caller must be told that it may have been done: commits
        TELL     never sent twice: deletes
    """

    REPEAT = "repeat"
    CONFIRM = "confirm"
    TELL = "tell"


@dataclass(frozen=True, slots=True)
class Call:
    """A request: what to send, and what a lost answer means."""

    method: str
    path: str
    lost: LostReply = LostReply.REPEAT
    query: Mapping[str, str] = field(default_factory=dict)
    body: Sequence[Buffer] | None = None
    media_type: str = "application/json"
    answer_bytes_max: int = _ANSWER_BYTES_MAX
    anonymous: bool = False
    """Without the token: /healthz and /readyz."""

    @property
    def what(self) -> str:
        """For messages."""
        return f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True)
class _Failure:
    """An attempt that brought no answer of success."""

    error: HaversackError
    maybe_done: bool
    """The request left, and no answer says that nothing was done."""


class Transport:
    """A pool of connections to one server.  Open with `open()` in a running loop, then `close()`.

    `connections` bounds parallel requests; the rest wait in line.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        policy: RetryPolicy,
        clock: Clock,
        rng: random.Random,
        connections: int,
    ) -> None:
        self._base = _base_url(url)
        self._token = token
        self._policy = policy
        self._clock = clock
        self._rng = rng
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Create the pool; connects on first use."""
        assert self._session is None, "opened twice"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._connections, keepalive_timeout=_KEEP_ALIVE_S, use_dns_cache=True
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity", "User-Agent": "haversack"},
            timeout=aiohttp.ClientTimeout(
                total=_CALL_S, sock_connect=_CONNECT_S, sock_read=_SILENCE_S
            ),
            read_bufsize=_READ_BUFFER_BYTES,
            auto_decompress=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close every connection.  Idempotent."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    def backoff(self) -> Backoff:
        """Fresh attempts under this client's policy."""
        return Backoff(self._policy, self._clock, self._rng)

    async def call(self, call: Call, read: Callable[[Reply], T]) -> T:
        """Send until answered, and return what `read` makes of the answer.

        `read` raises `CorruptReply` for an answer that is not what the API promises: such a call
        counts as one whose answer was lost.  Raises the server's error, `ServerUnreachable` or
        `CorruptReply` once no attempt is left, and `UnknownOutcome` if the call may have been done
        and no answer could be had.
        """
        backoff = self.backoff()
        maybe_done = False
        while True:
            outcome = await self._attempt(call, read)
            if not isinstance(outcome, _Failure):
                return outcome
            error = outcome.error
            maybe_done = maybe_done or outcome.maybe_done
            if maybe_done and call.lost is LostReply.TELL:
                raise _unknown(call, error)
            if not (outcome.maybe_done or isinstance(error, RetryLater)):
                raise error
            try:
                await backoff.pause(error)
            except HaversackError as last:
                if maybe_done and call.lost is LostReply.CONFIRM:
                    raise _unknown(call, last) from last
                raise

    async def _attempt(self, call: Call, read: Callable[[Reply], T]) -> T | _Failure:
        assert self._session is not None, "use the client inside `async with`"
        try:
            async with self._session.request(
                call.method,
                self._base.joinpath(call.path.lstrip("/")).with_query(call.query),
                data=None if call.body is None else _Parts(call.body, call.media_type),
                headers=self._headers(call),
                allow_redirects=False,
            ) as response:
                body = await _read_body(response, call)
                if response.status < 300:
                    return read(Reply(response.status, response.headers, body))
                error = error_of_answer(response.status, body, response.headers)
                return _Failure(error, isinstance(error, UnknownOutcome))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return _Failure(_unreachable(self._base, error), maybe_done=False)
        except aiohttp.ClientPayloadError as error:
            return _Failure(CorruptReply(f"the answer to {call.what} was cut: {error}"), True)
        except CorruptReply as error:
            return _Failure(error, maybe_done=True)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return _Failure(_unreachable(self._base, error), maybe_done=True)

    def _headers(self, call: Call) -> dict[str, str]:
        return {} if call.anonymous else {"Authorization": f"Bearer {self._token}"}


class _Parts(aiohttp.payload.Payload):
    """A body of known length in pieces, sent without joining them and as often as needed."""

    def __init__(self, parts: Sequence[Buffer], media_type: str) -> None:
        super().__init__(parts, content_type=media_type)
        self._parts = [memoryview(part) for part in parts if len(part)]
        self._size = sum(part.nbytes for part in self._parts)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Send everything; waits whenever the socket is full, but not for a server that has stopped
        reading (aiohttp's own timeout begins when the body is sent)."""
        for part in self._parts:
            for start in range(0, part.nbytes, _WRITE_BYTES):
                async with asyncio.timeout(_SILENCE_S):
                    await writer.write(part[start : start + _WRITE_BYTES])

    async def write_with_length(
        self, writer: AbstractStreamWriter, content_length: int | None
    ) -> None:
        """As `write`: the length announced is always ours."""
        assert content_length is None or content_length == self._size
        await self.write(writer)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Unused by aiohttp for requests; here because the base class is abstract."""
        return b"".join(self._parts).decode(encoding, errors)


async def _read_body(response: aiohttp.ClientResponse, call: Call) -> bytes:
    """The whole body, refused as soon as it is known to be over the call's limit."""
    limit = call.answer_bytes_max
    if response.content_length is not None and call.method != "HEAD":
        if response.content_length > limit:
            response.close()
            raise CorruptReply(
                f"the answer to {call.what} announces {response.content_length} bytes, "
                f"at most {limit} are possible"
            )
        return await response.read()
    pieces: list[bytes] = []
    length = 0
    async for piece in response.content.iter_any():
        length += len(piece)
        if length > limit:
            response.close()
            raise CorruptReply(f"the answer to {call.what} is longer than {limit} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _base_url(text: str) -> URL:
    """The server's address.  Raises `ConfigInvalid` if it is not an http(s) URL."""
    try:
        url = URL(text)
        usable = url.scheme in ("http", "https") and bool(url.host) and not url.query_string
    except ValueError:
        usable = False
    if not usable:
        raise ConfigInvalid(f"{text!r} is not a server address: give http://HOST:PORT")
    return url


def _unreachable(base: URL, error: BaseException) -> ServerUnreachable:
    reason = "no answer in time" if isinstance(error, asyncio.TimeoutError) else str(error)
    return ServerUnreachable(
        f"{base} does not answer ({reason or type(error).__name__}): is the cell up?"
    )


def _unknown(call: Call, error: HaversackError) -> UnknownOutcome:
    if isinstance(error, UnknownOutcome):
        return error
    return UnknownOutcome(
        f"{call.what} was sent and may have been done, but no answer came ({error}): "
        "look at the path before you repeat it",
        {"cause": error.kind},
    )


def text_query(**values: Any) -> dict[str, str]:
    """Query parameters without the absent ones.  Raises `InvalidRequest` for text UTF-8 refuses."""
    query: dict[str, str] = {}
    for name, value in values.items():
        if value is None:
            continue
        text = ("true" if value else "false") if isinstance(value, bool) else str(value)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{name} holds characters that are not Unicode text") from error
        query[name] = text
    return query
