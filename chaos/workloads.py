"""Seeded clients: what users of a cell do, and what they write down about it.

Engine-independent: a `CellClient` reaches the cell (simulated or live), the `Ledger` takes down
what was asked and answered, a `Judge` looks at each answer at once.  Contents are drawn from one
pool shared by all clients, so that the same block is put by several at the same time; sizes sit on
the edges where bugs live.  May not import the engine.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from chaos.contents import Content, draw_content
from chaos.ledger import Kind, Ledger, Operation, Outcome
from protocol.errors import (
    EntryNotFound,
    HaversackError,
    MissingBlocks,
    UnknownOutcome,
)
from protocol.hashing import Buffer
from protocol.ids import BlockHash

DETAIL_CHARACTERS_MAX = 1_500
"""Of an error's details, kept in the ledger."""


class NoAnswer(Exception):
    """The request was sent, and the connection broke or the deadline passed: outcome unknown."""


class NotDelivered(Exception):
    """Nobody took the request: nothing was done."""


class EntrySeen(NamedTuple):
    """What a path holds."""

    rev: str
    blocks: tuple[BlockHash, ...]


class CellClient(Protocol):
    """One user's connection to one gateway.  Every method may raise `HaversackError`, `NoAnswer`
    or `NotDelivered`."""

    async def put(self, data: bytes) -> None: ...
    async def put_many(self, blocks: Sequence[bytes]) -> list[HaversackError | None]: ...
    async def get(self, block: BlockHash) -> Buffer: ...
    async def get_many(self, blocks: Sequence[BlockHash]) -> list[Buffer | HaversackError]: ...
    async def check(self, blocks: Sequence[BlockHash]) -> set[BlockHash]: ...
    async def commit(
        self, path: str, blocks: tuple[BlockHash, ...], size: int, parent_rev: str | None
    ) -> str: ...
    async def entry(self, path: str) -> EntrySeen: ...
    async def delete(self, path: str, parent_rev: str | None) -> None: ...


class Judge(Protocol):
    """Told of every answer as it arrives."""

    def put_acknowledged(self, operation: Operation) -> None: ...
    def put_failed(self, operation: Operation) -> None: ...
    def block_read(self, operation: Operation, data: Buffer) -> None: ...
    def read_failed(self, operation: Operation) -> None: ...
    def commit_refused(self, operation: Operation, missing: Sequence[BlockHash]) -> None: ...
    def path_seen(self, operation: Operation, blocks: tuple[BlockHash, ...]) -> None: ...


@dataclass(frozen=True, slots=True)
class WorkloadPlan:
    """What the clients of one run do.  `weights` are relative, per operation."""

    weights: Mapping[str, float]
    clients: int
    owners: int
    think_mean_s: float
    paths: int
    reuse: float
    """Probability that a put sends bytes that somebody has put before."""
    large: float
    """Probability of a block of up to 4 MiB: they cost most of the time of a run."""
    bursts: bool
    """All clients act at the same instants, so that they meet on the same blocks and paths."""

    @staticmethod
    def draw(rng: random.Random, operations: int, seconds: float) -> WorkloadPlan:
        """A plan for about so many operations in so much time; every run leans another way."""
        base = {
            "put": 4.0,
            "put_many": 1.5,
            "get": 4.0,
            "get_many": 1.0,
            "check": 0.5,
            "commit": 3.0,
            "steal": 0.3,
            "entry": 1.5,
            "delete": 0.5,
        }
        weights = {name: weight * (0.3 + rng.expovariate(1.0)) for name, weight in base.items()}
        clients = rng.randint(2, 6)
        return WorkloadPlan(
            weights,
            clients=clients,
            owners=2,
            think_mean_s=seconds * clients / operations,
            paths=rng.randint(3, 12),
            reuse=rng.uniform(0.1, 0.5),
            large=rng.choice([0.0, 0.0, 0.0, 0.02]),
            bursts=rng.random() < 0.4,
        )


@dataclass(slots=True)
class SharedWorld:
    """What the clients of one run know together."""

    ledger: Ledger
    judge: Judge
    plan: WorkloadPlan
    now: Callable[[], float]
    contents: list[Content] = field(default_factory=list)
    stored: dict[str, list[BlockHash]] = field(default_factory=dict)
    """Per owner, blocks it was told are stored."""


Sleep = Callable[[float], Awaitable[None]]
Connect = Callable[[], CellClient]


class Client:
    """One user at one keyboard: an operation at a time, with pauses.

    `connect` gives a connection to some gateway for each operation.
    """

    def __init__(
        self,
        name: str,
        owner: str,
        world: SharedWorld,
        connect: Connect,
        sleep: Sleep,
        rng: random.Random,
    ) -> None:
        self._name = name
        self._owner = owner
        self._world = world
        self._connect = connect
        self._sleep = sleep
        self._rng = rng
        self._actions: dict[str, Callable[[], Awaitable[None]]] = {
            "put": self._put,
            "put_many": self._put_many,
            "get": self._get,
            "get_many": self._get_many,
            "check": self._check,
            "commit": self._commit,
            "steal": self._steal,
            "entry": self._entry,
            "delete": self._delete,
        }

    async def run(self, stopped: Callable[[], bool]) -> None:
        """Operations until `stopped` says so."""
        weights = self._world.plan.weights
        names = list(weights)
        while not stopped():
            await self._sleep(self._pause_s())
            (name,) = self._rng.choices(names, [weights[name] for name in names])
            await self._actions[name]()

    def _pause_s(self) -> float:
        mean_s = self._world.plan.think_mean_s
        if self._world.plan.bursts:
            return mean_s - math.fmod(self._world.now(), mean_s)
        return self._rng.expovariate(1.0 / mean_s)

    # -- blocks --------------------------------------------------------------------------------

    async def _put(self) -> None:
        data = self._draw_content().data()
        operation = self._begin_put(data)
        async with _Recording(self._world, operation):
            await self._connect().put(data)
        self._put_ended(operation)

    async def _put_many(self) -> None:
        batch = [self._draw_content().data() for _ in range(self._rng.choice([2, 4, 12]))]
        distinct = list({hashlib.sha256(data).digest(): data for data in batch}.values())
        operations = [self._begin_put(data) for data in distinct]
        try:
            results = await self._connect().put_many(distinct)
        except (HaversackError, NoAnswer, NotDelivered) as error:
            results = []
            for operation in operations:
                _end_failed(self._world.ledger, operation, error)
        for operation, result in zip(operations, results, strict=False):
            if result is None:
                self._world.ledger.end(operation, Outcome.ACKNOWLEDGED)
            else:
                _end_failed(self._world.ledger, operation, result)
            self._put_ended(operation)

    async def _get(self) -> None:
        block = self._known_block()
        if block is None:
            return
        operation = self._begin(Kind.GET, blocks=(block,))
        data: Buffer = b""
        async with _Recording(self._world, operation):
            data = await self._connect().get(block)
        self._get_ended(operation, data)

    async def _get_many(self) -> None:
        known = [self._known_block() for _ in range(self._rng.choice([2, 6, 20]))]
        blocks = list(dict.fromkeys(block for block in known if block is not None))
        if not blocks:
            return
        operations = [self._begin(Kind.GET, blocks=(block,)) for block in blocks]
        results: list[Buffer | HaversackError | NoAnswer | NotDelivered]
        try:
            results = list(await self._connect().get_many(blocks))
        except (HaversackError, NoAnswer, NotDelivered) as error:
            results = [error] * len(blocks)
        for operation, result in zip(operations, results, strict=True):
            if isinstance(result, Exception):
                _end_failed(self._world.ledger, operation, result)
                self._get_ended(operation, b"")
            else:
                self._world.ledger.end(operation, Outcome.ACKNOWLEDGED)
                self._get_ended(operation, result)

    async def _check(self) -> None:
        drawn = [self._any_block() for _ in range(8)]
        blocks = tuple(dict.fromkeys(block for block in drawn if block is not None))
        operation = self._begin(Kind.CHECK, blocks=blocks)
        async with _Recording(self._world, operation):
            await self._connect().check(blocks)

    # -- paths ---------------------------------------------------------------------------------

    async def _commit(self) -> None:
        """Read a path, then replace what was seen there by blocks of our own."""
        path = self._path()
        found, seen = await self._look(path)
        if not found:
            return
        mine = self._world.stored.get(self._owner, [])
        usable = [block for block in mine if self._world.ledger.blocks[block].length > 0]
        if not usable:
            return
        blocks = tuple(self._rng.choice(usable) for _ in range(self._rng.choice([1, 1, 2, 7])))
        await self._replace(path, blocks, seen.rev if seen is not None else None)

    async def _steal(self) -> None:
        """Name a block that another user sent: the hash alone must not be enough."""
        others = [
            block
            for block, story in self._world.ledger.blocks.items()
            if self._owner not in story.attempts and story.length > 0
        ]
        if others:
            await self._replace(f"stolen/{self._name}", (self._rng.choice(others),), None)

    async def _replace(
        self, path: str, blocks: tuple[BlockHash, ...], parent_rev: str | None
    ) -> None:
        size = sum(self._world.ledger.blocks[block].length for block in blocks)
        operation = self._begin(Kind.COMMIT, blocks=blocks, path=path, parent_rev=parent_rev)
        missing: list[BlockHash] = []
        async with _Recording(self._world, operation) as recording:
            try:
                recording.rev = await self._connect().commit(path, blocks, size, parent_rev)
            except MissingBlocks as error:
                missing = [BlockHash.parse(name) for name in error.details["missing"]]
                raise
        if missing:
            self._world.judge.commit_refused(operation, missing)

    async def _entry(self) -> None:
        await self._look(self._path())

    async def _look(self, path: str) -> tuple[bool, EntrySeen | None]:
        """(whether there was an answer, what is at the path)."""
        operation = self._begin(Kind.ENTRY, path=path)
        seen: EntrySeen | None = None
        async with _Recording(self._world, operation) as recording:
            try:
                seen = await self._connect().entry(path)
                recording.rev = seen.rev
            except EntryNotFound:
                pass  # an answer like any other
        answered = operation.outcome is Outcome.ACKNOWLEDGED
        if answered:
            self._world.judge.path_seen(operation, seen.blocks if seen is not None else ())
        return answered, seen

    async def _delete(self) -> None:
        path = self._path()
        found, seen = await self._look(path)
        if not found or seen is None:
            return
        operation = self._begin(Kind.DELETE, path=path, parent_rev=seen.rev)
        async with _Recording(self._world, operation):
            await self._connect().delete(path, seen.rev)

    # -- drawing -------------------------------------------------------------------------------

    def _draw_content(self) -> Content:
        plan = self._world.plan
        return draw_content(self._rng, self._world.contents, plan.reuse, plan.large)

    def _known_block(self) -> BlockHash | None:
        """A block that this client's owner was told is stored."""
        mine = self._world.stored.get(self._owner, [])
        return self._rng.choice(mine) if mine else None

    def _any_block(self) -> BlockHash | None:
        """Any block of any owner, whatever became of it."""
        names = list(self._world.ledger.blocks)
        return self._rng.choice(names) if names else None

    def _path(self) -> str:
        number = self._rng.randrange(self._world.plan.paths)
        return f"folder-{number % 3}/file-{number}"

    # -- writing down --------------------------------------------------------------------------

    def _begin(
        self,
        kind: Kind,
        *,
        blocks: tuple[BlockHash, ...] = (),
        path: str = "",
        parent_rev: str | None = None,
    ) -> Operation:
        return self._world.ledger.begin(
            self._name, self._owner, kind, blocks=blocks, path=path, parent_rev=parent_rev
        )

    def _begin_put(self, data: bytes) -> Operation:
        block = BlockHash(hashlib.sha256(data).digest())
        return self._world.ledger.begin_put(self._name, self._owner, block, len(data))

    def _put_ended(self, operation: Operation) -> None:
        if operation.outcome is Outcome.ACKNOWLEDGED:
            (block,) = operation.blocks
            self._world.stored.setdefault(self._owner, []).append(block)
            self._world.judge.put_acknowledged(operation)
        else:
            self._world.judge.put_failed(operation)

    def _get_ended(self, operation: Operation, data: Buffer) -> None:
        if operation.outcome is Outcome.ACKNOWLEDGED:
            self._world.judge.block_read(operation, data)
        else:
            self._world.judge.read_failed(operation)


class _Recording:
    """Ends an operation with whatever the block ends with; swallows what the ledger records."""

    def __init__(self, world: SharedWorld, operation: Operation) -> None:
        self._ledger = world.ledger
        self._operation = operation
        self.rev: str | None = None

    async def __aenter__(self) -> _Recording:
        return self

    async def __aexit__(
        self, _kind: object, error: BaseException | None, _traceback: object
    ) -> bool:
        if error is None:
            self._ledger.end(self._operation, Outcome.ACKNOWLEDGED, rev=self.rev)
            return False
        if isinstance(error, HaversackError | NoAnswer | NotDelivered):
            _end_failed(self._ledger, self._operation, error)
            return True
        return False


def _end_failed(
    ledger: Ledger, operation: Operation, error: HaversackError | NoAnswer | NotDelivered
) -> None:
    """UNKNOWN for a lost answer, and for one that says so; FAILED for the rest."""
    if isinstance(error, NoAnswer | UnknownOutcome):
        ledger.end(operation, Outcome.UNKNOWN, error=_describe(error))
    else:
        ledger.end(operation, Outcome.FAILED, error=_describe(error))


def _describe(error: Exception) -> str:
    if not isinstance(error, HaversackError):
        return f"{type(error).__name__}: {error}"
    details = f" {error.details}" if error.details else ""
    return f"{error.kind}: {error}{details[:DETAIL_CHARACTERS_MAX]}"
