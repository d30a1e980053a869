"""Accounts and tokens: what is stored, what opens the door, what closes it."""

from __future__ import annotations

import hashlib
import re

import pytest
from metadata_store import START, MetadataStore
from sqlalchemy import text

from protocol.errors import EntryNotFound, InvalidRequest, Unauthenticated


@pytest.fixture
def store():
    store = MetadataStore()
    yield store
    assert store.audit() == []
    store.close()


async def test_a_token_speaks_for_its_account(store: MetadataStore) -> None:
    ann = await store.accounts.create_account("Ann", admin=True)
    bob = await store.accounts.create_account("bob@example.org", admin=False)
    tokens = {await store.accounts.issue_token(who, "laptop"): who for who in (ann, bob, ann)}
    assert len(tokens) == 3
    for token, who in tokens.items():
        assert re.fullmatch(r"hvs_[A-Za-z0-9_-]{43}", token)
        assert await store.accounts.authenticate(token) == who
    assert (ann.is_admin, bob.is_admin) == (True, False)
    assert ann.namespace_id != bob.namespace_id


async def test_only_the_hash_of_a_token_is_stored(store: MetadataStore) -> None:
    ann = await store.accounts.create_account("ann", admin=False)
    token = await store.accounts.issue_token(ann, "laptop")
    rows = store.database.read_now(lambda c: c.execute(text("SELECT * FROM tokens")).all())
    assert hashlib.sha256(token.encode()).digest() in rows[0]
    assert token.removeprefix("hvs_") not in repr(rows)


@pytest.mark.parametrize(
    "wrong", ["", "hvs_", "hvs_" + "A" * 43, "hvs_" + "A" * 42, "A" * 47, "hvs_" + "é" * 43, "\0"]
)
async def test_any_other_token_is_refused(store: MetadataStore, wrong: str) -> None:
    ann = await store.accounts.create_account("ann", admin=False)
    right = await store.accounts.issue_token(ann, "")
    for token in (wrong, right + "A", right[:-1], right.swapcase(), " " + right):
        with pytest.raises(Unauthenticated) as caught:
            await store.accounts.authenticate(token)
        assert token not in caught.value.message or not token


async def test_a_revoked_token_opens_nothing_and_the_others_still_do(
    store: MetadataStore,
) -> None:
    ann = await store.accounts.create_account("ann", admin=False)
    bob = await store.accounts.create_account("bob", admin=False)
    lost = await store.accounts.issue_token(ann, "lost phone")
    kept = await store.accounts.issue_token(ann, "laptop")
    first, second = await store.accounts.list_tokens(ann)
    assert (first.label, second.label) == ("lost phone", "laptop")
    with pytest.raises(EntryNotFound):
        await store.accounts.revoke_token(bob, first.id)
    store.clock.now += 60
    await store.accounts.revoke_token(ann, first.id)
    store.clock.now += 60
    await store.accounts.revoke_token(ann, first.id)
    with pytest.raises(Unauthenticated):
        await store.accounts.authenticate(lost)
    assert await store.accounts.authenticate(kept) == ann
    revoked = [token.revoked for token in await store.accounts.list_tokens(ann)]
    assert revoked == [START + 60, None]


async def test_a_name_is_taken_in_any_case(store: MetadataStore) -> None:
    await store.accounts.create_account("Zoë", admin=False)
    for name in ("zoë", "ZOE\u0308", "Zoë"):
        with pytest.raises(InvalidRequest):
            await store.accounts.create_account(name, admin=False)
    assert [account.name for account in await store.accounts.list_accounts()] == ["Zoë"]


@pytest.mark.parametrize("name", ["", " ", "a b", "a/b", ".a", "a\0", "a" * 129, "a\n", "\ud800"])
async def test_a_malformed_name_is_refused(store: MetadataStore, name: str) -> None:
    for attempt in (
        store.accounts.create_account(name, admin=False),
        store.accounts.first_admin(name),
    ):
        with pytest.raises(InvalidRequest):
            await attempt


@pytest.mark.parametrize("label", ["a\nb", "\0", "\ud800", "x" * 201])
async def test_a_malformed_label_is_refused(store: MetadataStore, label: str) -> None:
    ann = await store.accounts.create_account("ann", admin=False)
    with pytest.raises(InvalidRequest):
        await store.accounts.issue_token(ann, label)


async def test_the_first_admin_is_made_once(store: MetadataStore) -> None:
    await store.accounts.create_account("early", admin=False)
    made = await store.accounts.first_admin("admin")
    assert made.is_admin
    assert await store.accounts.first_admin("another") == made
    assert len(await store.accounts.list_accounts()) == 2


async def test_the_first_admin_does_not_take_over_another_account(store: MetadataStore) -> None:
    await store.accounts.create_account("admin", admin=False)
    with pytest.raises(InvalidRequest):
        await store.accounts.first_admin("ADMIN")
