"""Recovery gives the named block or says that it cannot, and names the slots that lied."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

import pytest

from erasure import stripe
from erasure.codec import Codec
from erasure.envelope import seal
from erasure.fragment import Fragment, pack_header, parse
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from erasure.stripe import RECOVERY_TRIES_MAX, Recovered, make_stripe
from protocol.errors import BlockUnreadable, ConfigInvalid, CorruptFragment
from protocol.hashing import Buffer, hash_block
from protocol.ids import BlockHash, VolumeId

RS = Scheme.rs(6, 3)
WIDEST = Scheme.rs(16, 6)
CODEC = Codec()
PLAIN = random.Random(7).randbytes(1501)
BLOCK = hash_block(PLAIN)
VOLUME = VolumeId(9)
KEYRING = Keyring([bytes(range(32))])
ROTATED = Keyring([bytes(range(32)), bytes(range(1, 33))])
"""Opens what KEYRING sealed, and seals with a newer key."""


def fragments_of(
    plain: bytes = PLAIN,
    scheme: Scheme = RS,
    *,
    name: BlockHash | None = None,
    keyring: Keyring | None = None,
) -> dict[int, Fragment]:
    """A whole stripe as it would be read from the nodes; `name` lies about whose it is."""
    stored = seal([plain], len(plain), keyring=keyring, compress=True)
    pieces = make_stripe(CODEC, scheme, name or hash_block(plain), VOLUME, 3, stored)
    return {slot: parse(header + bytes(payload)) for slot, (header, payload) in enumerate(pieces)}


def lying(fragment: Fragment, payload: Buffer) -> Fragment:
    """The same fragment with other bytes and checksums to match: no node could notice."""
    header = pack_header(
        fragment.scheme,
        fragment.slot,
        fragment.block,
        fragment.volume,
        fragment.epoch,
        fragment.stored_length,
        payload,
        fragment.stripe_tag,
        fragment.plain_length,
    )
    return parse(header + bytes(payload))


def flipped(fragment: Fragment) -> Fragment:
    payload = bytearray(fragment.payload)
    payload[len(payload) // 2] ^= 0x10
    return lying(fragment, payload)


def recover(
    fragments: Mapping[int, Fragment],
    block: BlockHash = BLOCK,
    keyring: Keyring | None = None,
    codec: Codec = CODEC,
) -> Recovered:
    return stripe.recover(codec, keyring, block, fragments)


class CountingCodec(Codec):
    """Counts decodes."""

    decodes = 0

    def decode(self, scheme: Scheme, payloads: Mapping[int, Buffer], stored_length: int) -> Buffer:
        self.decodes += 1
        return super().decode(scheme, payloads, stored_length)


@pytest.mark.parametrize("scheme", [RS, Scheme.replica(4), Scheme.rs(2, 1), WIDEST], ids=str)
def test_a_whole_stripe_recovers_and_nobody_lied(scheme: Scheme) -> None:
    recovered = recover(fragments_of(scheme=scheme))
    assert recovered.plain == PLAIN
    assert recovered.liars == ()


def test_every_choice_of_k_slots_recovers_the_block() -> None:
    whole = fragments_of()
    for slots in itertools.combinations(whole, RS.k):
        recovered = recover({slot: whole[slot] for slot in slots})
        assert recovered.plain == PLAIN
        assert recovered.liars == ()


def test_headers_of_one_stripe_agree_and_those_of_two_seals_do_not() -> None:
    first, second = fragments_of(keyring=KEYRING), fragments_of(keyring=ROTATED)
    assert len({fragment.stripe_tag for fragment in first.values()}) == 1
    assert first[0].stripe_tag != second[0].stripe_tag
    assert {fragment.plain_length for fragment in first.values()} == {len(PLAIN)}
    assert {fragment.epoch for fragment in first.values()} == {3}


@pytest.mark.parametrize("keyring", [None, KEYRING], ids=["plain", "encrypted"])
def test_two_puts_of_one_block_write_the_same_records(keyring: Keyring | None) -> None:
    """So writers that meet in one volume cannot leave a mixture of two seals."""
    stored = [seal([PLAIN], len(PLAIN), keyring=keyring, compress=True) for _ in range(2)]
    first, second = (make_stripe(CODEC, RS, BLOCK, VOLUME, 3, bytes_) for bytes_ in stored)
    assert first == second


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_liars_up_to_m_are_named_and_the_block_is_right(count: int) -> None:
    whole = fragments_of()
    for liars in itertools.combinations(whole, count):
        given = {slot: flipped(f) if slot in liars else f for slot, f in whole.items()}
        recovered = recover(given)
        assert recovered.plain == PLAIN
        assert recovered.liars == liars


def test_lies_and_losses_together_are_survived_up_to_m() -> None:
    whole = fragments_of()
    for lost, liar in itertools.permutations(whole, 2):
        given = {slot: flipped(f) if slot == liar else f for slot, f in whole.items()}
        del given[lost]
        recovered = recover(given)
        assert recovered.plain == PLAIN
        assert recovered.liars == (liar,)


def test_liars_beyond_m_make_the_block_unreadable_and_never_wrong() -> None:
    whole = fragments_of()
    for liars in itertools.combinations(whole, RS.m + 1):
        given = {slot: flipped(f) if slot in liars else f for slot, f in whole.items()}
        with pytest.raises(BlockUnreadable):
            recover(given)


def test_replicas_that_lie_are_named() -> None:
    whole = fragments_of(scheme=Scheme.replica(4))
    given = {0: flipped(whole[0]), 1: whole[1], 2: flipped(whole[2]), 3: whole[3]}
    recovered = recover(given)
    assert recovered.plain == PLAIN
    assert recovered.liars == (0, 2)


def test_a_fragment_served_for_another_slot_is_set_aside() -> None:
    whole = fragments_of()
    swapped = {**whole, 2: whole[5], 5: whole[2]}
    counting = CountingCodec()
    recovered = recover(swapped, codec=counting)
    assert recovered.plain == PLAIN
    assert recovered.liars == (2, 5)
    assert counting.decodes == 1


def test_one_fragment_served_for_several_slots_counts_once() -> None:
    whole = fragments_of()
    recovered = recover({slot: whole[0] if slot in (1, 2) else whole[slot] for slot in whole})
    assert recovered.plain == PLAIN
    assert recovered.liars == (1, 2)
    with pytest.raises(BlockUnreadable):
        recover(dict.fromkeys(whole, whole[0]))


def test_fragments_of_another_block_are_set_aside() -> None:
    whole, other = fragments_of(), fragments_of(PLAIN[::-1])
    recovered = recover({**whole, 1: other[1], 7: other[7]})
    assert recovered.plain == PLAIN
    assert recovered.liars == (1, 7)
    counting = CountingCodec()
    with pytest.raises(BlockUnreadable):
        recover(other, codec=counting)
    assert counting.decodes == 0


def test_fragments_of_another_scheme_are_set_aside() -> None:
    whole, other = fragments_of(), fragments_of(scheme=Scheme.rs(6, 2))
    recovered = recover({**whole, 0: other[0], 7: other[7]})
    assert recovered.plain == PLAIN
    assert recovered.liars == (0, 7)


@pytest.mark.parametrize("of_second", [1, 2, 3])
def test_a_mixture_of_two_seals_is_read_from_the_one_that_is_complete(of_second: int) -> None:
    first, second = fragments_of(keyring=KEYRING), fragments_of(keyring=ROTATED)
    mixed = {slot: second[slot] if slot < of_second else first[slot] for slot in first}
    recovered = recover(mixed, keyring=ROTATED)
    assert recovered.plain == PLAIN
    assert recovered.liars == tuple(range(of_second))


def test_a_mixture_without_k_of_either_seal_is_unreadable_and_never_decoded_together() -> None:
    first, second = fragments_of(keyring=KEYRING), fragments_of(keyring=ROTATED)
    mixed = {slot: second[slot] if slot < 4 else first[slot] for slot in first}
    counting = CountingCodec()
    with pytest.raises(BlockUnreadable):
        recover(mixed, keyring=ROTATED, codec=counting)
    assert counting.decodes == 0


def test_a_stripe_of_other_bytes_under_this_name_is_refused_after_one_decode() -> None:
    counting = CountingCodec()
    with pytest.raises(BlockUnreadable):
        recover(fragments_of(PLAIN[::-1], name=BLOCK), codec=counting)
    assert counting.decodes == 1


def test_a_smaller_honest_seal_is_found_behind_a_larger_false_one() -> None:
    scheme = Scheme.rs(2, 4)
    false = fragments_of(PLAIN[::-1], scheme, name=BLOCK)
    whole = fragments_of(scheme=scheme)
    recovered = recover({slot: whole[slot] if slot in (1, 4) else false[slot] for slot in whole})
    assert recovered.plain == PLAIN
    assert recovered.liars == (0, 2, 3, 5)


@pytest.mark.parametrize("left", range(RS.k))
def test_fewer_than_k_fragments_are_unreadable(left: int) -> None:
    whole = fragments_of()
    with pytest.raises(BlockUnreadable):
        recover({slot: whole[slot] for slot in range(left)})


def test_a_missing_key_is_the_operators_matter_and_not_a_damaged_block() -> None:
    with pytest.raises(ConfigInvalid):
        recover(fragments_of(keyring=KEYRING))


def test_three_liars_are_found_in_the_widest_stripe_within_the_bound() -> None:
    whole = fragments_of(scheme=WIDEST)
    rng = random.Random(11)
    for _ in range(5):
        liars = tuple(sorted(rng.sample(range(WIDEST.n), 3)))
        given = {slot: flipped(f) if slot in liars else f for slot, f in whole.items()}
        counting = CountingCodec()
        assert recover(given, codec=counting).liars == liars
        assert counting.decodes <= RECOVERY_TRIES_MAX


def test_a_hopeless_stripe_costs_a_bounded_number_of_decodes() -> None:
    whole = fragments_of(scheme=WIDEST)
    counting = CountingCodec()
    with pytest.raises(BlockUnreadable):
        recover({slot: flipped(f) for slot, f in whole.items()}, codec=counting)
    assert counting.decodes == RECOVERY_TRIES_MAX


def test_the_bound_covers_every_subset_of_the_shipped_schemes() -> None:
    for name in ("rs-2-1", "rs-3-2", "rs-4-2", "rs-6-3", "rs-8-3", "rs-10-4"):
        scheme = Scheme.parse(name)
        subsets = list(stripe._subsets(range(scheme.n), scheme.k))
        assert sorted(subsets) == list(itertools.combinations(range(scheme.n), scheme.k))
        assert len(subsets) <= RECOVERY_TRIES_MAX
        assert subsets[0] == tuple(range(scheme.k))


@pytest.mark.parametrize("scheme", [RS, Scheme.replica(3)], ids=str)
def test_what_recovery_gives_encodes_to_the_same_records_again(scheme: Scheme) -> None:
    """A healed fragment is the lost one, bit for bit."""
    stored = seal([PLAIN], len(PLAIN), keyring=KEYRING, compress=True)
    written = make_stripe(CODEC, scheme, BLOCK, VOLUME, 3, stored)
    read = {
        slot: parse(header + bytes(payload))
        for slot, (header, payload) in list(enumerate(written))[scheme.m :]
    }
    recovered = recover(read, keyring=KEYRING)
    assert make_stripe(CODEC, scheme, BLOCK, VOLUME, 3, recovered.stored) == written


@pytest.mark.parametrize("scheme", [RS, Scheme.replica(2)], ids=str)
def test_the_empty_block_recovers(scheme: Scheme) -> None:
    whole = fragments_of(b"", scheme)
    assert recover(whole, hash_block(b"")) == (b"", (), seal([], 0, keyring=None, compress=False))


def test_a_flipped_record_never_reaches_recovery() -> None:
    stored = seal([PLAIN], len(PLAIN), keyring=None, compress=False)
    for header, payload in make_stripe(CODEC, RS, BLOCK, VOLUME, 3, stored):
        record = bytearray(header + bytes(payload))
        record[-1] ^= 1
        with pytest.raises(CorruptFragment):
            parse(record)
