"""Accounts and their bearer tokens.

First step of every request: `authenticate` turns a token into the account it speaks for.  Called
by the API (which may cache the answer for seconds), and by the supervisor and the admin commands
for the rest.  A token is 256 random bits; only its SHA-256 is stored, so the table reveals none,
and looking the digest up in an index leaks no more about a token than its hash does.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, insert, select, update

from metadata.namespaces import create_namespace
from metadata.schema import accounts, tokens
from protocol.clock import Clock
from protocol.errors import EntryNotFound, InvalidRequest, Unauthenticated
from protocol.names import name_key
from sql.database import Database

TOKEN_PREFIX = "hvs_"
"""Lets secret scanners find a leaked token."""

_TOKEN_BYTES = 32
_TOKEN = re.compile(r"hvs_[A-Za-z0-9_-]{43}")
_ACCOUNT_NAME = re.compile(r"[\w][\w.@+-]{0,127}")
_LABEL_CHARACTERS_MAX = 200


class Account(NamedTuple):
    """Who a request speaks for."""

    id: int
    name: str
    is_admin: bool
    namespace_id: int
    """Its root namespace."""


class TokenInfo(NamedTuple):
    """A token, without its secret."""

    id: int
    label: str
    created: float
    """Seconds since 1970."""
    revoked: float | None


class Accounts:
    """The accounts of one metadata database."""

    def __init__(self, database: Database, clock: Clock, entropy: Callable[[int], bytes]) -> None:
        """`entropy(n)` gives n unpredictable bytes (`os.urandom` outside of simulations)."""
        self._database = database
        self._clock = clock
        self._entropy = entropy

    async def create_account(self, name: str, admin: bool) -> Account:
        """A new account with an empty root namespace.

        Raises `InvalidRequest` for a name that is malformed, or taken in any case.
        """
        _check_name(name)
        now = self._clock.wall()

        def work(connection: Connection) -> Account | InvalidRequest:
            return _create(connection, name, admin, now)

        return _raised(await self._database.write(work))

    async def first_admin(self, name: str) -> Account:
        """The oldest admin account; made under `name` if there is none.  Safe to repeat.

        Raises `InvalidRequest` like `create_account`.
        """
        _check_name(name)
        now = self._clock.wall()

        def work(connection: Connection) -> Account | InvalidRequest:
            row = connection.execute(_OLDEST_ADMIN).first()
            return _create(connection, name, True, now) if row is None else _account(row)

        return _raised(await self._database.write(work))

    async def list_accounts(self) -> list[Account]:
        """All accounts, the oldest first."""

        def work(connection: Connection) -> list[Account]:
            return [_account(row) for row in connection.execute(_ALL_ACCOUNTS)]

        return await self._database.read(work)

    async def issue_token(self, account: Account, label: str) -> str:
        """A new token of `account`.  This is the only time it can be read.

        `label` says where it is kept, for its owner.  Raises `InvalidRequest` for one that is too
        long or not printable.
        """
        if len(label) > _LABEL_CHARACTERS_MAX or not (label.isprintable() or label == ""):
            raise InvalidRequest(
                f"a token's label has up to {_LABEL_CHARACTERS_MAX} printable characters"
            )
        secret = base64.urlsafe_b64encode(self._entropy(_TOKEN_BYTES)).decode().rstrip("=")
        token = TOKEN_PREFIX + secret
        assert _TOKEN.fullmatch(token), "the entropy source gave another number of bytes"
        values = {
            "digest": _digest(token),
            "account_id": account.id,
            "label": label,
            "created": self._clock.wall(),
        }

        def work(connection: Connection) -> None:
            connection.execute(insert(tokens).values(values))

        await self._database.write(work)
        return token

    async def authenticate(self, token: str) -> Account:
        """The account that `token` speaks for.  Raises `Unauthenticated`."""
        if _TOKEN.fullmatch(token) is None:
            raise _unauthenticated()
        digest = _digest(token)

        def work(connection: Connection) -> Account | None:
            row = connection.execute(_ACCOUNT_BY_TOKEN, {"digest": digest}).first()
            return None if row is None else _account(row)

        account = await self._database.read(work)
        if account is None:
            raise _unauthenticated()
        return account

    async def list_tokens(self, account: Account) -> list[TokenInfo]:
        """Tokens of `account`, revoked ones included, the oldest first."""

        def work(connection: Connection) -> list[TokenInfo]:
            rows = connection.execute(_TOKENS_OF, {"account": account.id})
            return [TokenInfo(*row) for row in rows]

        return await self._database.read(work)

    async def revoke_token(self, account: Account, token_id: int) -> None:
        """End a token of `account`; again is fine.  Raises `EntryNotFound`."""
        parameters = {"account": account.id, "token": token_id, "now": self._clock.wall()}

        def work(connection: Connection) -> bool:
            connection.execute(_REVOKE, parameters)
            return connection.execute(_KNOWN_TOKEN, parameters).first() is not None

        if not await self._database.write(work):
            raise EntryNotFound(f"account {account.name!r} has no token {token_id}")


def _check_name(name: str) -> None:
    if _ACCOUNT_NAME.fullmatch(name) is None:
        raise InvalidRequest(
            f"{name[:128]!r} is not an account name: letters, digits and . _ @ + -"
        )


def _create(connection: Connection, name: str, admin: bool, now: float) -> Account | InvalidRequest:
    if connection.execute(_ACCOUNT_BY_KEY, {"key": name_key(name)}).first() is not None:
        return InvalidRequest(f"the account name {name!r} is taken", {"name": name})
    namespace_id = create_namespace(connection, now)
    made = connection.execute(
        insert(accounts).values(
            name=name,
            name_key=name_key(name),
            is_admin=admin,
            namespace_id=namespace_id,
            created=now,
        )
    )
    assert made.inserted_primary_key is not None
    return Account(made.inserted_primary_key[0], name, admin, namespace_id)


def _raised(outcome: Account | InvalidRequest) -> Account:
    if isinstance(outcome, InvalidRequest):
        raise outcome
    return outcome


def _account(row: Sequence[Any]) -> Account:
    return Account(*row)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _unauthenticated() -> Unauthenticated:
    return Unauthenticated("the token is unknown or revoked: send `Authorization: Bearer TOKEN`")


_ACCOUNT = select(accounts.c.id, accounts.c.name, accounts.c.is_admin, accounts.c.namespace_id)
_ACCOUNT_BY_KEY = _ACCOUNT.where(accounts.c.name_key == bindparam("key"))
_ACCOUNT_BY_TOKEN = _ACCOUNT.join(tokens, tokens.c.account_id == accounts.c.id).where(
    tokens.c.digest == bindparam("digest"), tokens.c.revoked.is_(None)
)
_OLDEST_ADMIN = _ACCOUNT.where(accounts.c.is_admin).order_by(accounts.c.id).limit(1)
_ALL_ACCOUNTS = _ACCOUNT.order_by(accounts.c.id)
_TOKENS_OF = (
    select(tokens.c.id, tokens.c.label, tokens.c.created, tokens.c.revoked)
    .where(tokens.c.account_id == bindparam("account"))
    .order_by(tokens.c.id)
)
_REVOKE = (
    update(tokens)
    .where(
        tokens.c.id == bindparam("token"),
        tokens.c.account_id == bindparam("account"),
        tokens.c.revoked.is_(None),
    )
    .values(revoked=bindparam("now"))
)
_KNOWN_TOKEN = select(tokens.c.id).where(
    tokens.c.id == bindparam("token"), tokens.c.account_id == bindparam("account")
)
