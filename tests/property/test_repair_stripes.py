"""Whatever k slots survive, every lost slot is made again byte for byte, liars or not."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.block_index import BlockRow
from cluster.repair.remake import Remaker, StripeJob, reframe
from erasure.codec import Codec
from erasure.envelope import seal
from erasure.fragment import Fragment, pack_header, parse
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from erasure.stripe import make_stripe
from protocol.errors import BlockUnreadable, CorruptFragment
from protocol.hashing import hash_block
from protocol.ids import VolumeId

CODEC = Codec()
KEYRING = Keyring([bytes(range(32))])
SCHEMES = [Scheme.parse(name) for name in ("rs-2-1", "rs-3-2", "rs-6-3", "rs-10-4", "replica-3")]
OLD, NEW = 3, 4
VOLUME = VolumeId(17)


class Stripe:
    """One sealed block and its fragments."""

    def __init__(self, scheme: Scheme, seed: int, size: int, encrypted: bool) -> None:
        self.scheme = scheme
        plain = random.Random(seed).randbytes(size)
        self.block = hash_block(plain)
        self.remaker = Remaker(CODEC, KEYRING if encrypted else None)
        stored = seal([plain], size, keyring=self.remaker.keyring, compress=False)
        self.row = BlockRow(self.block, VOLUME, len(stored), size)
        self.records = self._records(stored, OLD)
        self.renewed = self._records(stored, NEW)
        self.fragments = {slot: parse(record) for slot, record in enumerate(self.records)}

    def _records(self, stored: bytes, epoch: int) -> list[bytes]:
        made = make_stripe(CODEC, self.scheme, self.block, VOLUME, epoch, stored)
        return [header + bytes(payload) for header, payload in made]

    def lie(self, slot: int) -> None:
        """Other bytes under matching checksums."""
        old = self.fragments[slot]
        payload = bytes(byte ^ 0xA5 for byte in old.payload)
        header = pack_header(
            old.scheme,
            slot,
            old.block,
            old.volume,
            old.epoch,
            old.stored_length,
            payload,
            old.stripe_tag,
            old.plain_length,
        )
        self.fragments[slot] = parse(header + payload)

    def given(self, slots: set[int]) -> dict[int, Fragment]:
        return {slot: self.fragments[slot] for slot in slots}


@st.composite
def stripes(draw: st.DrawFn) -> tuple[Stripe, set[int]]:
    scheme = draw(st.sampled_from(SCHEMES))
    size = draw(st.one_of(st.integers(0, 300), st.integers(0, 40_000)))
    stripe = Stripe(scheme, draw(st.integers(0, 2**32)), size, draw(st.booleans()))
    order = draw(st.permutations(range(scheme.n)))
    return stripe, set(order[: scheme.k])


@settings(max_examples=150, deadline=None)
@given(stripes())
def test_any_k_survivors_make_all_other_slots(case: tuple[Stripe, set[int]]) -> None:
    stripe, left = case
    wanted = sorted(set(range(stripe.scheme.n)) - left)
    job = StripeJob(stripe.row, stripe.given(left), wanted)
    stripe.remaker.make([job], stripe.scheme, NEW)
    assert job.error is None
    for slot in wanted:
        made = job.made[slot]
        assert made.header + bytes(made.payload) == stripe.renewed[slot]
        assert made.stripe_tag == stripe.fragments[slot].stripe_tag


@settings(max_examples=100, deadline=None)
@given(stripes(), st.data())
def test_a_liar_is_never_decoded_into_a_fragment_and_is_named_if_enough_others_are_left(
    case: tuple[Stripe, set[int]], data: st.DataObject
) -> None:
    stripe, left = case
    if not stripe.fragments[0].payload:
        return
    liar = data.draw(st.sampled_from(sorted(left)))
    stripe.lie(liar)
    wanted = sorted(set(range(stripe.scheme.n)) - left)[:1]
    quick = StripeJob(stripe.row, stripe.given(left), wanted)
    stripe.remaker.make([quick], stripe.scheme, NEW)
    assert isinstance(quick.error, CorruptFragment)
    assert quick.made == {}
    others = set(range(stripe.scheme.n)) - set(wanted)
    proven = StripeJob(stripe.row, stripe.given(others), wanted)
    stripe.remaker.prove([proven], stripe.scheme, NEW)
    if len(others) == stripe.scheme.k:
        assert isinstance(proven.error, BlockUnreadable)
        return
    assert proven.error is None
    assert proven.liars == (liar,)
    for slot in wanted:
        made = proven.made[slot]
        assert made.header + bytes(made.payload) == stripe.renewed[slot]


@settings(max_examples=60, deadline=None)
@given(stripes())
def test_a_copied_fragment_differs_by_its_epoch_alone(case: tuple[Stripe, set[int]]) -> None:
    stripe, _ = case
    for slot, fragment in stripe.fragments.items():
        record = reframe(fragment, NEW)
        assert record.header + bytes(record.payload) == stripe.renewed[slot]
