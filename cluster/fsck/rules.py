"""What the fragments of one volume and of one block say, where they may contradict each other.

The decisions of `fsck`, for the report and for a rebuilt index alike.  Pure: nodes are numbers,
nothing is read here.  Ambiguity means keep: a rule may prefer one claim to another, and the other's
fragments stay on their disks.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from cluster.debts import DebtReason
from erasure.scheme import Scheme


class Health(enum.Enum):
    """What is known of a fragment that a node's index names."""

    UNREAD = "unread"
    """Taken at its word: only the index entry was looked at."""
    INTACT = "intact"
    CORRUPT = "corrupt"
    NO_RECORD = "no record"
    """Nothing lies where the index entry says."""
    IO_ERROR = "I/O error"


class Seal(NamedTuple):
    """One sealing of a block: fragments of two are never decoded together."""

    stripe_tag: int
    stored_bytes: int
    plain_bytes: int


class Fragment(NamedTuple):
    """One index entry of one node, for one block of one volume."""

    slot: int
    node: int
    length: int
    """Of the record, bytes; equal within a stripe."""
    health: Health = Health.UNREAD
    seal: Seal | None = None
    """Of an intact one."""


class Claim(NamedTuple):
    """That a node holds a slot of a volume, and what speaks for it."""

    slot: int
    node: int
    vouched: int
    """Fragments of blocks that enough other slots know, so that they were certainly wanted here."""
    epoch: int
    """The highest of the volume that the node was given a record of."""
    held: int
    """All of its fragments in the slot."""


class Holders(NamedTuple):
    """Who holds each slot of a volume."""

    slots: tuple[int | None, ...]
    rejected: tuple[Claim, ...]
    """Claims to slots that are another node's: their fragments are strays."""


class ClaimCount:
    """Counts the claims to the slots of one volume; memory does not depend on its blocks.

    A move leaves the old node's fragments behind as strays, deleted blocks among them, and its new
    epoch says nothing about whether it ended.  So a claim is judged by the blocks that *other*
    slots vouch for, and where two nodes hold as many of these, the later epoch is the slot's.  A
    move that did not end holds fewer, whatever its epoch.

    Strays of two slots could vouch for each other's deleted blocks.  So once it is known which
    slots are contested, the claims are counted again with the others as the only witnesses.
    """

    def __init__(self, scheme: Scheme, witnesses: frozenset[int] | None = None) -> None:
        """`witnesses`: slots that nobody contests; all slots if None."""
        self._slots = scheme.n
        self._witnesses = frozenset(range(scheme.n)) if witnesses is None else witnesses
        self._needed = min(scheme.k, scheme.n - 1, len(self._witnesses))
        self._counts: dict[tuple[int, int], list[int]] = {}

    def add(self, fragments: Sequence[tuple[int, int]]) -> None:
        """Count one block, given (slot, node) of each of its fragments."""
        seen = {slot for slot, _ in fragments} & self._witnesses
        for claim in fragments:
            if claim[0] < self._slots:
                counts = self._counts.setdefault(claim, [0, 0])
                counts[0] += len(seen) - (claim[0] in seen) >= self._needed
                counts[1] += 1

    @property
    def uncontested(self) -> frozenset[int]:
        """Slots that exactly one node claims."""
        claims = Counter(slot for slot, _ in self._counts)
        return frozenset(slot for slot, count in claims.items() if count == 1)

    def holders(self, epoch_of: Callable[[int], int]) -> Holders:
        """The best claim to each slot; `epoch_of` gives a node's epoch of the volume."""
        best: list[Claim | None] = [None] * self._slots
        rejected: list[Claim] = []
        for (slot, node), (vouched, held) in sorted(self._counts.items()):
            claim = Claim(slot, node, vouched, epoch_of(node), held)
            standing = best[slot]
            if standing is None:
                best[slot] = claim
            elif _merit(claim) > _merit(standing):
                rejected.append(standing)
                best[slot] = claim
            else:
                rejected.append(claim)
        slots = tuple(None if claim is None else claim.node for claim in best)
        return Holders(slots, tuple(rejected))


def _merit(claim: Claim) -> tuple[int, int, int]:
    return claim.vouched, claim.epoch, claim.held


class Standing(enum.Enum):
    """What can become of a block."""

    READABLE = "readable"
    """k fragments of one seal are where the map says."""
    UNREADABLE = "unreadable"
    """Fewer, but bytes that lie elsewhere, were not read, or a node that comes back may help."""
    INCOMPLETE = "incomplete"
    """Fewer than k in all, with every slot accounted for: no put of it was ever acknowledged, or it
    was deleted, or more was lost than its scheme bears."""


class Verdict(NamedTuple):
    """What the fragments of one block say."""

    standing: Standing
    seal: Seal | None
    """The one to go by; None if no fragment could be read."""
    present: frozenset[int]
    """Slots whose holder has a fragment of that seal that is not known to be bad."""
    owed: tuple[tuple[int, DebtReason], ...]
    """The other slots of the volume, and how each fragment is missing."""
    misplaced: tuple[Fragment, ...]
    """Fragments on a node that does not hold their slot."""
    seals: int
    """How many different ones were seen."""


def judge_block(
    fragments: Sequence[Fragment],
    slots: Sequence[int | None],
    unaccounted: frozenset[int],
    k: int,
) -> Verdict:
    """Judge all fragments of one block in one volume whose slots lie on the nodes `slots`.

    `unaccounted`: slots that nobody can speak for: vacant, or on a node that could not be read to
    the end.
    """
    at_home = {
        fragment.slot: fragment
        for fragment in fragments
        if fragment.slot < len(slots) and slots[fragment.slot] == fragment.node
    }
    misplaced = tuple(f for f in fragments if at_home.get(f.slot) is not f)
    groups = {
        (f.seal, f.length) for f in fragments if f.health is Health.INTACT and f.seal is not None
    }
    seal, length = max(
        groups,
        key=lambda group: (*_support(at_home.values(), fragments, group, k), _tie(group[0])),
        default=(None, -1),  # nothing was read, so nothing is known to be there
    )
    present = frozenset(_slots_of(at_home.values(), seal, length))
    possible = {f.slot for f in fragments if f.slot < len(slots)} | unaccounted
    if len(present) >= k:
        standing = Standing.READABLE
    elif len(possible) >= k:
        standing = Standing.UNREADABLE
    else:
        standing = Standing.INCOMPLETE
    owed = tuple(
        (slot, _reason(at_home.get(slot))) for slot in range(len(slots)) if slot not in present
    )
    return Verdict(standing, seal, present, owed, misplaced, len(groups))


def _support(
    at_home: Iterable[Fragment], everywhere: Iterable[Fragment], group: tuple[Seal, int], k: int
) -> tuple[bool, bool, int, int]:
    """How much speaks for a seal."""
    here = len(_slots_of(at_home, *group))
    anywhere = len(_slots_of(everywhere, *group))
    return here >= k, anywhere >= k, here, anywhere


def _tie(seal: Seal) -> tuple[int, int, int]:
    return -seal.stripe_tag, seal.stored_bytes, seal.plain_bytes


def _slots_of(fragments: Iterable[Fragment], seal: Seal | None, length: int) -> set[int]:
    """Slots of those that belong to a seal; an unread one does if its length does."""
    return {
        f.slot
        for f in fragments
        if (f.health is Health.INTACT and f.seal == seal and f.length == length)
        or (f.health is Health.UNREAD and f.length == length)
    }


def _reason(at_home: Fragment | None) -> DebtReason:
    if at_home is None:
        return DebtReason.MISSING
    match at_home.health:
        case Health.CORRUPT | Health.NO_RECORD:
            return DebtReason.CORRUPT
        case Health.IO_ERROR:
            return DebtReason.UNREADABLE
        case Health.UNREAD | Health.INTACT:
            # A good fragment of another seal: only a decode tells which of them are of use.
            return DebtReason.LYING
