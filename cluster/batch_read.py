"""The life of a get, for many blocks at once: one frame per node for all fragments it holds.

Called by `block_client.get_many`.  Reads what is healthy, in at most `ROUNDS` rounds; blocks that
something is wrong with are left to `get_path`, together with the fragments already verified.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.block_index import BlockRow
from cluster.node_pool import Direction
from cluster.stripe_read import (
    ReadTools,
    expected_record_bytes,
    joined,
    open_healthy,
    open_record,
)
from cluster.topology import VolumeView
from cluster.volume_map import VolumeMap
from erasure.fragment import Fragment
from erasure.scheme import SchemeKind
from protocol.errors import CorruptFragment, HaversackError
from protocol.hashing import Buffer
from protocol.ids import BlockHash, NodeId
from protocol.limits import BATCH_BLOCKS_MAX, FRAME_BODY_BYTES_MAX
from storage_node.interface import FragmentKey, StoredRecord

ROUNDS = 2
"""After the second, what is missing is not a matter of one slow node any more."""

HEDGE_FLOOR_S = 0.1
"""A frame of many fragments is not late before this."""

SLICE_BYTES = 256 * 1024
"""Bytes opened before other requests of the event loop get their turn."""


@dataclass(slots=True)
class _Wanted:
    """One block on its way out."""

    row: BlockRow
    volume: VolumeView
    fragments: dict[int, Fragment] = field(default_factory=dict)
    tried: set[int] = field(default_factory=set)


class _Item(NamedTuple):
    """One fragment in a frame."""

    wanted: _Wanted
    slot: int


class _Frame(NamedTuple):
    """One request to one node."""

    node_id: NodeId
    items: list[_Item]
    expected_bytes: int


class BatchResult(NamedTuple):
    """What a batch could read, and what is left with its good fragments."""

    plain: dict[BlockHash, Buffer]
    left: dict[BlockHash, dict[int, Fragment]]


async def read_batch(
    tools: ReadTools, volume_map: VolumeMap, rows: Sequence[BlockRow]
) -> BatchResult:
    """Read distinct blocks, grouped by node.  Raises `DatabaseBusy` if volumes are not cached."""
    volumes = await volume_map.volumes([row.volume for row in rows])
    result = BatchResult({}, {})
    waiting: list[_Wanted] = []
    for row in rows:
        volume = volumes.get(row.volume)
        if volume is None:
            result.left[row.hash] = {}
        else:
            waiting.append(_Wanted(row, volume))
    for _ in range(ROUNDS):
        frames = list(_frames(tools, waiting))
        if not frames:
            break
        await _exchange(tools, frames)
        waiting = await _open_complete(tools, waiting, result)
    for wanted in waiting:
        result.left[wanted.row.hash] = wanted.fragments
    return result


def _frames(tools: ReadTools, waiting: Sequence[_Wanted]) -> Iterator[_Frame]:
    """The next slots of all waiting blocks, by node, in frames whose answers keep the limit."""
    by_node: dict[NodeId, list[_Item]] = {}
    for wanted in waiting:
        for slot in _next_slots(tools, wanted):
            node_id = wanted.volume.slots[slot]
            assert node_id is not None
            wanted.tried.add(slot)
            by_node.setdefault(node_id, []).append(_Item(wanted, slot))
    for node_id, items in by_node.items():
        frame = _Frame(node_id, [], 0)
        for item in items:
            size = expected_record_bytes(item.wanted.row, item.wanted.volume)
            if frame.items and (
                frame.expected_bytes + size > FRAME_BODY_BYTES_MAX
                or len(frame.items) >= BATCH_BLOCKS_MAX
            ):
                yield frame
                frame = _Frame(node_id, [], 0)
            frame.items.append(item)
            frame = frame._replace(expected_bytes=frame.expected_bytes + size)
        yield frame


def _next_slots(tools: ReadTools, wanted: _Wanted) -> list[int]:
    """One replica on a trusted node, at random; or the data slots, if all are on trusted nodes.
    Empty: `get_path` does better."""
    scheme, slots = wanted.volume.scheme, wanted.volume.slots
    if scheme.kind is SchemeKind.RS:
        return (
            [] if wanted.tried or not _all_trusted(tools, slots[: scheme.k]) else [*range(scheme.k)]
        )
    first = tools.rng.randrange(scheme.n)
    for offset in range(scheme.n):
        slot = (first + offset) % scheme.n
        if slot not in wanted.tried and _all_trusted(tools, slots[slot : slot + 1]):
            return [slot]
    return []


def _all_trusted(tools: ReadTools, nodes: Sequence[NodeId | None]) -> bool:
    return all(
        node_id is not None and tools.pool.is_trusted(node_id, Direction.READ) for node_id in nodes
    )


async def _exchange(tools: ReadTools, frames: Sequence[_Frame]) -> None:
    """Send all frames and keep every good fragment; what fails is simply not there afterwards."""
    outcomes = await asyncio.gather(
        *(_ask(tools, frame) for frame in frames), return_exceptions=True
    )
    for frame, outcome in zip(frames, outcomes, strict=True):
        if isinstance(outcome, HaversackError | TimeoutError):
            continue
        if isinstance(outcome, BaseException):
            raise outcome
        if len(outcome) != len(frame.items):
            continue
        for item, answer in zip(frame.items, outcome, strict=True):
            try:
                fragment = open_record(item.wanted.row, item.slot, answer)
            except HaversackError:
                continue  # `get_path` asks again, and reports it
            item.wanted.fragments[item.slot] = fragment


async def _ask(tools: ReadTools, frame: _Frame) -> list[StoredRecord]:
    """One frame; a late one is given up, because others hold the same blocks.

    Raises `TimeoutError`, and what `NodePool.read` raises.
    """
    late_s = max(HEDGE_FLOOR_S, tools.pool.hedge_delay_s(frame.node_id, frame.expected_bytes))
    keys = [
        FragmentKey(item.wanted.row.volume, item.wanted.row.hash, item.slot) for item in frame.items
    ]
    try:
        async with asyncio.timeout(late_s):
            return await tools.pool.read(
                frame.node_id, keys, frame.expected_bytes, tools.settings.get_slot_s
            )
    except TimeoutError:
        tools.pool.lost_race(frame.node_id, frame.expected_bytes, late_s)
        raise


async def _open_complete(
    tools: ReadTools, waiting: Sequence[_Wanted], result: BatchResult
) -> list[_Wanted]:
    """Open the blocks whose fragments are there; the others, and what does not open, stay."""
    incomplete: list[_Wanted] = []
    opened_bytes = 0
    for wanted in waiting:
        if len(wanted.fragments) < wanted.volume.scheme.k:
            incomplete.append(wanted)
            continue
        try:
            pieces = open_healthy(tools, wanted.row, wanted.volume, wanted.fragments)
        except CorruptFragment:
            # Its fragments go along: `get_path` finds out which of them lies.
            incomplete.append(wanted)
            continue
        result.plain[wanted.row.hash] = joined(pieces)
        opened_bytes += wanted.row.plain_bytes
        if opened_bytes > SLICE_BYTES:
            opened_bytes = 0
            await asyncio.sleep(0)
    return incomplete
