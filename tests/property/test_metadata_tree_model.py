"""The tree against a plain dict: any sequence of changes leaves what the model says.

After every step the listing, the counts of block references and everything `metadata.audit` checks
must agree.  Names are few and collide by case and normal form on purpose.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from metadata_store import MetadataStore, block, everything
from sqlalchemy import select

from metadata.batch import CommitResult
from metadata.changes import CommitRequest
from metadata.entries import Entry
from metadata.schema import namespace_blocks
from protocol.errors import (
    EntryNotFound,
    HaversackError,
    InvalidPath,
    MissingBlocks,
    RevConflict,
)
from protocol.ids import BlockHash

T = TypeVar("T")
Keys = tuple[str, ...]

NAMES = st.sampled_from(["a", "A", "é", "E\u0301", "ß", "SS"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)
BLOCKS = st.lists(st.integers(0, 5), max_size=4).map(tuple)
CONTENTS = st.one_of(
    BLOCKS.map(lambda b: ("blocks", b)),
    st.binary(max_size=2).map(lambda c: ("inline", c)),
    st.sampled_from(["t", "../u"]).map(lambda t: ("link", t)),
)
PARENTS = st.sampled_from(["none", "current", "current", "stale"])


def fold(names: tuple[str, ...]) -> Keys:
    decomposed = (unicodedata.normalize("NFD", name) for name in names)
    return tuple(unicodedata.normalize("NFC", name.casefold()) for name in decomposed)


@dataclass(frozen=True)
class Item:
    """One entry of the model; a folder has no content."""

    name: str
    rev: str
    id: str
    content: tuple[str, Any] | None = None
    mtime: float = 0.0
    executable: bool = False


@dataclass(frozen=True)
class Ask:
    """A commit, as the test means it."""

    names: tuple[str, ...]
    content: tuple[str, Any]
    mtime: float
    executable: bool
    parent: str
    claimed: frozenset[int]


ASKS = st.builds(
    Ask,
    PATHS,
    CONTENTS,
    st.sampled_from([0.0, -1.5, 1e9]),
    st.booleans(),
    PARENTS,
    st.frozensets(st.integers(0, 5), min_size=3),
)


def settled(content: tuple[str, Any]) -> tuple[str, Any]:
    """The empty file is inline."""
    return ("inline", b"") if content == ("blocks", ()) else content


@dataclass
class Model:
    """What the tree should be."""

    items: dict[Keys, Item] = field(default_factory=dict)
    references: Counter[int] = field(default_factory=Counter)
    last_revs: list[str] = field(default_factory=lambda: ["nonsense"])

    def blocking(self, keys: Keys) -> Keys | None:
        """The nearest thing on the way that is no folder."""
        for depth in range(1, len(keys)):
            item = self.items.get(keys[:depth])
            if item is not None and item.content is not None:
                return keys[:depth]
        return None

    def rev_for(self, ask: Ask) -> str | None:
        current = self.items.get(fold(ask.names))
        if ask.parent == "none":
            return None
        if ask.parent == "current" and current is not None:
            return current.rev
        return self.last_revs[0]

    def request(self, ask: Ask) -> CommitRequest:
        kind, value = ask.content
        given: dict[str, Any] = {
            "blocks": {"block_list": tuple(map(block, value)) if kind == "blocks" else None},
            "inline": {"content": value},
            "link": {"symlink": value},
        }[kind]
        size = {"blocks": 10, "inline": 1, "link": 0}[kind] * len(value)
        return CommitRequest(
            path="/".join(ask.names),
            size=size,
            mtime=ask.mtime,
            executable=ask.executable,
            parent_rev=self.rev_for(ask),
            **given,
        )

    def expect(self, ask: Ask, rev: str | None, claimed: frozenset[int]) -> str:
        """`conflict`, `missing`, `created`, `touched` or `same`; changes nothing."""
        keys = fold(ask.names)
        current = self.items.get(keys)
        if self.blocking(keys) is not None:
            return "conflict"
        content = settled(ask.content)
        if current is not None:
            if current.content is None:
                return "conflict"
            if current.content == content:
                executable = ask.executable and content[0] != "link"
                same = (current.mtime, current.executable) == (ask.mtime, executable)
                return "touched" if rev == current.rev and not same else "same"
            if rev != current.rev:
                return "conflict"
        elif rev is not None:
            return "conflict"
        if content[0] == "blocks" and any(
            number not in claimed and not self.references[number] for number in content[1]
        ):
            return "missing"
        return "created"

    def apply(self, ask: Ask, verdict: str, result: CommitResult) -> None:
        """Take over a success."""
        entry = result.entry
        assert result.created == (verdict == "created")
        keys = fold(ask.names)
        if verdict != "same":
            for depth in range(1, len(keys)):
                folder = Item(ask.names[depth - 1], "", "")
                self.items.setdefault(keys[:depth], folder)
            old = self.items.get(keys)
            content = settled(ask.content)
            executable = ask.executable and content[0] != "link"
            if old is None:
                self.items[keys] = Item(ask.names[-1], entry.rev, entry.id, content)
            else:
                assert entry.id == old.id
                assert entry.rev != old.rev
                self.last_revs.insert(0, old.rev)
            self.items[keys] = replace(
                self.items[keys],
                rev=entry.rev,
                content=content,
                mtime=ask.mtime,
                executable=executable,
            )
            if content[0] == "blocks":
                self.references.update(content[1])
        self.agrees(keys, entry)

    def agrees(self, keys: Keys, entry: Entry) -> None:
        item = self.items[keys]
        path = "/" + "/".join(self.items[keys[:d]].name for d in range(1, len(keys) + 1))
        assert (entry.path, entry.name) == (path, item.name)
        if item.content is None:
            assert entry.kind == "folder"
            return
        kind, value = item.content
        assert (entry.rev, entry.id) == (item.rev, item.id)
        assert (entry.mtime, entry.executable) == (item.mtime, item.executable)
        assert entry.block_list == (tuple(map(block, value)) if kind == "blocks" else None)
        assert entry.content == (value if kind == "inline" else None)
        assert entry.symlink == (value if kind == "link" else None)


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.store = MetadataStore()
        self.model = Model()

    @initialize()
    def open(self) -> None:
        self.account = self.run(self.store.open())

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def outcome(self, work: Any) -> Any:
        try:
            return self.run(work)
        except HaversackError as error:
            return error

    def check(self, ask: Ask, verdict: str, outcome: CommitResult | HaversackError) -> None:
        if verdict == "conflict":
            assert isinstance(outcome, RevConflict)
            self.check_server_state(ask, outcome)
        elif verdict == "missing":
            assert isinstance(outcome, MissingBlocks)
        else:
            assert isinstance(outcome, CommitResult), outcome
            self.model.apply(ask, verdict, outcome)

    def check_server_state(self, ask: Ask, conflict: RevConflict) -> None:
        keys = fold(ask.names)
        blocking = self.model.blocking(keys)
        at = blocking if blocking is not None else keys
        server = conflict.details["server"]
        assert (server is None) == (at not in self.model.items)
        if server is not None:
            assert fold(tuple(server["path"][1:].split("/"))) == at

    @rule(ask=ASKS)
    def commit(self, ask: Ask) -> None:
        request = self.model.request(ask)
        verdict = self.model.expect(ask, request.parent_rev, ask.claimed)
        claimed = frozenset(map(block, ask.claimed))
        self.check(
            ask, verdict, self.outcome(self.store.tree.commit(self.account, request, claimed))
        )

    @rule(asks=st.lists(ASKS, max_size=6), claimed=st.frozensets(st.integers(0, 5)))
    def commit_many(self, asks: list[Ask], claimed: frozenset[int]) -> None:
        requests = [self.model.request(ask) for ask in asks]
        # What the namespace vouches for is decided for the batch as a whole, before it.
        vouched = claimed | {number for number, count in self.model.references.items() if count}
        outcomes = self.run(
            self.store.tree.commit_many(self.account, requests, frozenset(map(block, claimed)))
        )
        before = self.model.references
        for ask, request, outcome in zip(asks, requests, outcomes, strict=True):
            self.model.references = Counter(dict.fromkeys(vouched, 1))
            verdict = self.model.expect(ask, request.parent_rev, vouched)
            self.model.references = before
            self.check(ask, verdict, outcome)

    @rule(names=PATHS, parent=PARENTS)
    def delete(self, names: tuple[str, ...], parent: str) -> None:
        keys = fold(names)
        item = self.model.items.get(keys)
        rev = None
        if parent == "stale":
            rev = "stale"
        elif parent == "current" and item is not None and item.content is not None:
            rev = item.rev
        outcome = self.outcome(self.store.tree.delete(self.account, "/".join(names), rev))
        if item is None:
            assert isinstance(outcome, EntryNotFound)
        elif rev == "stale":
            assert isinstance(outcome, RevConflict)
        else:
            below = [at for at in self.model.items if at[: len(keys)] == keys]
            assert outcome.count == len(below)
            for at in below:
                self.model.last_revs.insert(0, self.model.items.pop(at).rev)

    @rule(names=PATHS)
    def make_folder(self, names: tuple[str, ...]) -> None:
        keys = fold(names)
        outcome = self.outcome(self.store.tree.make_folder(self.account, "/".join(names)))
        there = self.model.items.get(keys)
        if self.model.blocking(keys) is not None or (there and there.content is not None):
            assert isinstance(outcome, RevConflict)
            return
        assert outcome.created == (there is None)
        for depth in range(1, len(keys) + 1):
            self.model.items.setdefault(keys[:depth], Item(names[depth - 1], "", ""))
        self.model.agrees(keys, outcome.entry)

    @rule(names=PATHS)
    def look_up(self, names: tuple[str, ...]) -> None:
        keys = fold(names)
        outcome = self.outcome(self.store.tree.entry(self.account, "/" + "/".join(names)))
        if keys in self.model.items:
            self.model.agrees(keys, outcome)
        else:
            assert isinstance(outcome, EntryNotFound)

    @rule(names=st.lists(st.sampled_from(["..", ".", "", "a\0"]), min_size=1, max_size=2))
    def refuse(self, names: list[str]) -> None:
        path = "/x/" + "/".join(names)
        assert isinstance(self.outcome(self.store.tree.delete(self.account, path)), InvalidPath)

    @rule(limit=st.integers(1, 5))
    def list_in_small_pages(self, limit: int) -> None:
        self.agree_on_listing(limit)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "account"):
            return
        self.agree_on_listing(2_000)
        assert self.store.audit() == []
        query = select(namespace_blocks.c.hash, namespace_blocks.c.count)
        rows = self.store.database.read_now(lambda c: c.execute(query).all())
        counted = {BlockHash(name): count for name, count in rows}
        assert counted == {
            block(number): count for number, count in self.model.references.items() if count
        }
        asked = [block(number) for number in range(6)]
        assert self.run(self.store.tree.references(self.account, asked)) == set(counted)

    def agree_on_listing(self, limit: int) -> None:
        listed = self.run(everything(self.store, self.account, limit=limit))
        expected = sorted(self.model.items)
        assert [fold(tuple(entry.path[1:].split("/"))) for entry in listed] == expected
        for keys, entry in zip(expected, listed, strict=True):
            self.model.agrees(keys, entry)

    def teardown(self) -> None:
        self.store.close()
        self.loop.close()


TestTreeAgainstModel = TreeMachine.TestCase
TestTreeAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
