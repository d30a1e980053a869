"""A verifier over a `BlockCell`: whole passes under virtual time, and differences to plant."""

from __future__ import annotations

from typing import Any

from block_cell import BlockCell

from cluster.events import read_events
from cluster.leadership import take_role
from cluster.verify.differences import Difference
from cluster.verify.lead import ROLE, Lead
from cluster.verify.node_ports import NodePorts
from cluster.verify.pass_rows import request_pass, verification_of
from cluster.verify.removal import StrayRemover
from cluster.verify.service import VerifierService
from cluster.verify.settings import VerifierSettings
from cluster.verify.stray_rows import StrayRow, page_strays
from erasure.fragment import Fragment, pack_header, parse
from protocol.hashing import hash_block
from protocol.ids import BlockHash, NodeId, VolumeId
from storage_node.interface import FragmentKey

SETTINGS = VerifierSettings(
    asked_settle_s=VerifierSettings().settle_s,
    section_blocks_max=4,
    index_page_rows=3,
    inventory_page_keys=5,
)
"""So small that everything is in pages and sections; nobody is in a hurry."""


class Verifying:
    """The service, and what a test asks of it."""

    def __init__(self, cell: BlockCell, settings: VerifierSettings = SETTINGS) -> None:
        self.cell = cell
        self.settings = settings
        self.epoch = self.take_role("verifier")
        self.service = self.new_service()

    def take_role(self, holder: str) -> int:
        now = self.cell.clock.wall()
        return self.cell.db.transact(lambda c: take_role(c, ROLE, holder, now))

    def new_service(self) -> VerifierService:
        """As after a restart: nothing but SQL is kept."""
        epoch = self.epoch
        return VerifierService(
            self.cell.db,
            self.cell.clock,
            self.cell._connect,
            lambda: epoch,
            self.settings,
        )

    def remover(self) -> StrayRemover:
        lead = Lead(self.cell.db, lambda: self.epoch)
        ports = NodePorts(self.cell._connect, self.cell.clock, self.settings)
        return StrayRemover(lead, self.cell.clock, ports, self.settings)

    def ask(self, *, deep: bool = False, remove: bool = False, dry_run: bool = False) -> None:
        now = self.cell.clock.wall()
        self.cell.db.transact(
            lambda c: request_pass(c, now, deep=deep, remove_strays=remove, dry_run=dry_run)
        )

    async def whole_pass(self, *, deep: bool = False) -> dict[str, Any]:
        """Ask for a pass, carry it out, and return what it says."""
        self.ask(deep=deep)
        for _ in range(10_000):
            if not await self.service.step():
                if self.report()["request"]["ended"] is not None:
                    return dict(self.report()["finished"])
                await self.cell.clock.sleep(5.0)
        raise AssertionError("the pass does not end")

    def report(self) -> dict[str, Any]:
        return self.cell.db.read_now(verification_of)

    def strays(self) -> list[StrayRow]:
        return self.cell.db.read_now(lambda c: page_strays(c, None, 1_000))

    def events(self) -> list[str]:
        return [str(event.kind) for event in self.cell.db.read_now(read_events)]

    # -- what can be wrong ---------------------------------------------------------------------

    async def key_of(self, data: bytes, slot: int) -> tuple[NodeId, FragmentKey]:
        """Where a slot of a block is, and its key."""
        row = await self.cell.row_of(data)
        assert row is not None
        nodes = await self.cell.slots_of(data)
        return nodes[slot], FragmentKey(row.volume, row.hash, slot)

    def record(self, node: NodeId, key: FragmentKey) -> bytes:
        (answer,) = self.cell.stores[node].get_many([key])
        assert answer.record is not None
        return bytes(answer.record)

    def plant(self, node: NodeId, key: FragmentKey, record: bytes) -> None:
        self.cell.stores[node].put_group([(key, record)])

    async def bystander(self, data: bytes) -> NodeId:
        """A node without a slot of the block's volume."""
        nodes = await self.cell.slots_of(data)
        return next(node for node in self.cell.node_ids if node not in nodes)


def counts(report: dict[str, Any]) -> dict[str, int]:
    """Classes that a pass found."""
    return {name: entry["count"] for name, entry in report["differences"].items() if entry["count"]}


def all_zero(report: dict[str, Any]) -> bool:
    return counts(report) == {} and set(report["differences"]) == {str(kind) for kind in Difference}


def resealed(record: bytes, payload: bytes | None = None, tag: int = 99) -> bytes:
    """The same fragment as another seal of the block would have it."""
    fragment: Fragment = parse(record)
    body = bytes(fragment.payload) if payload is None else payload
    stored = fragment.stored_length if payload is None else len(payload) * fragment.scheme.k
    header = pack_header(
        fragment.scheme,
        fragment.slot,
        fragment.block,
        fragment.volume,
        fragment.epoch,
        stored,
        body,
        tag,
        fragment.plain_length,
    )
    return header + body


def orphan_record(record: bytes, block: BlockHash, volume: VolumeId | None = None) -> bytes:
    """A whole fragment of a block that nobody recorded."""
    fragment: Fragment = parse(record)
    header = pack_header(
        fragment.scheme,
        fragment.slot,
        block,
        fragment.volume if volume is None else volume,
        fragment.epoch,
        fragment.stored_length,
        fragment.payload,
        7,
        fragment.plain_length,
    )
    return header + bytes(fragment.payload)


def name_of(text: str) -> BlockHash:
    return hash_block(text.encode())
