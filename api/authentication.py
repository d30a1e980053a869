"""Who makes a request: the bearer token, looked up once and remembered for seconds.

Step 2 of every walk over HTTP, called by `gate.Gate` for every route that is not public: there is
no other place that reads credentials.  Tokens are remembered by their SHA-256, so that neither the
time of a look-up nor a dump of this process's cache says anything about a token that is not known
already.
"""

from __future__ import annotations

import hashlib
from typing import Final

from metadata.accounts import Account, Accounts
from protocol.clock import Clock
from protocol.errors import Forbidden, Unauthenticated

WATCHER: Final = Account(-1, "watcher", False, -1)
"""The watcher of this very process: may read any block and nothing else.  It has no row, and its
token is drawn at the start of the process and never leaves it."""

REMEMBERED_S: Final = 5.0
"""A revoked token works for at most this long."""

REMEMBERED_MAX: Final = 4096

FIELD_BYTES_MAX: Final = 512


class Authenticator:
    """From the `Authorization` field to the account.  One event loop."""

    def __init__(self, accounts: Accounts, clock: Clock, watcher_token: str | None = None) -> None:
        """`watcher_token`: the secret by which this process's own watcher is known."""
        self._accounts = accounts
        self._clock = clock
        self._watcher: bytes | None = None
        if watcher_token is not None:
            self._watcher = hashlib.sha256(watcher_token.encode("ascii")).digest()
        self._known: dict[bytes, tuple[float, Account]] = {}

    async def account(self, field: bytes | None) -> Account:
        """The account that a request speaks for.  Raises `Unauthenticated`."""
        token = _bearer_token(field)
        digest = hashlib.sha256(token).digest()
        if digest == self._watcher:
            return WATCHER
        now = self._clock.monotonic()
        known = self._known.get(digest)
        if known is not None and known[0] > now:
            return known[1]
        account = await self._accounts.authenticate(token.decode("ascii"))
        if len(self._known) >= REMEMBERED_MAX:
            self._forget(now)
        self._known[digest] = (now + REMEMBERED_S, account)
        return account

    def _forget(self, now: float) -> None:
        """Drop what is too old; if nothing is, drop all: they cost one look-up each."""
        fresh = {digest: entry for digest, entry in self._known.items() if entry[0] > now}
        self._known = fresh if len(fresh) < REMEMBERED_MAX else {}


def require_admin(account: Account) -> None:
    """Raises `Forbidden` for anybody else."""
    if not account.is_admin:
        raise Forbidden("this needs the token of an administrator")


def refuse_watcher(account: Account) -> None:
    """Raises `Forbidden` for the watcher: this is not the reading of a block."""
    if account is WATCHER:
        raise Forbidden("the watcher reads blocks and nothing else")


def _bearer_token(field: bytes | None) -> bytes:
    if field is None:
        raise Unauthenticated("no token: send `Authorization: Bearer TOKEN`")
    scheme, _, token = field.strip().partition(b" ")
    token = token.strip()
    if scheme.lower() != b"bearer" or not token:
        raise Unauthenticated("only bearer tokens are taken: send `Authorization: Bearer TOKEN`")
    if len(field) > FIELD_BYTES_MAX or not token.isascii():
        raise Unauthenticated("the token is not one of ours")
    return token
