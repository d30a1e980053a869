"""Whatever is lost or lies, recovery gives the named block or refuses; it never gives another."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from erasure.codec import Codec
from erasure.envelope import seal, unseal
from erasure.fragment import Fragment, pack_header, parse
from erasure.keyring import Keyring
from erasure.scheme import Scheme
from erasure.stripe import make_stripe, recover
from protocol.errors import BlockUnreadable
from protocol.hashing import Buffer, hash_block
from protocol.ids import VolumeId

CODEC = Codec()
KEYRING = Keyring([bytes(32)])

schemes = st.one_of(
    st.builds(Scheme.rs, st.integers(2, 16), st.integers(1, 6)),
    st.builds(Scheme.replica, st.integers(1, 7)),
)
plains = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda unit, times: unit * times, st.binary(min_size=1, max_size=9), st.integers(0, 400)
    ),
)
keyrings = st.sampled_from([None, KEYRING])


def stripe_of(
    scheme: Scheme, plain: bytes, keyring: Keyring | None, compress: bool
) -> dict[int, Fragment]:
    stored = seal([plain], len(plain), keyring=keyring, compress=compress)
    pieces = make_stripe(CODEC, scheme, hash_block(plain), VolumeId(1), 1, stored)
    return {slot: parse(header + bytes(payload)) for slot, (header, payload) in enumerate(pieces)}


def with_payload(fragment: Fragment, payload: bytes) -> Fragment:
    """A lie that every checksum supports."""
    header = pack_header(
        fragment.scheme,
        fragment.slot,
        fragment.block,
        fragment.volume,
        fragment.epoch,
        fragment.stored_length,
        payload,
        fragment.stripe_tag,
    )
    return parse(header + payload)


@settings(max_examples=200, deadline=None)
@given(schemes, plains, keyrings, st.booleans(), st.randoms(use_true_random=False))
def test_any_k_slots_of_any_scheme_recover_any_block(
    scheme: Scheme, plain: bytes, keyring: Keyring | None, compress: bool, rng: random.Random
) -> None:
    whole = stripe_of(scheme, plain, keyring, compress)
    left = rng.sample(sorted(whole), scheme.k)
    recovered = recover(CODEC, keyring, hash_block(plain), {slot: whole[slot] for slot in left})
    assert recovered.plain == plain
    assert recovered.liars == ()


@settings(max_examples=200, deadline=None)
@given(plains, st.lists(st.integers(0, 3600), max_size=6), keyrings, st.booleans())
def test_a_block_in_any_parts_opens_again(
    plain: bytes, cuts: list[int], keyring: Keyring | None, compress: bool
) -> None:
    edges = [0, *sorted(min(cut, len(plain)) for cut in cuts), len(plain)]
    parts: list[Buffer] = [plain[edges[i] : edges[i + 1]] for i in range(len(edges) - 1)]
    stored = seal(parts, len(plain), keyring=keyring, compress=compress)
    assert unseal(stored, keyring) == plain


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([Scheme.rs(2, 1), Scheme.rs(4, 2), Scheme.rs(6, 3), Scheme.replica(4)]),
    st.binary(min_size=1, max_size=200),
    st.randoms(use_true_random=False),
)
def test_recovery_is_right_or_refuses_whatever_the_fragments_say(
    scheme: Scheme, plain: bytes, rng: random.Random
) -> None:
    whole = stripe_of(scheme, plain, None, compress=False)
    given_slots = rng.sample(sorted(whole), rng.randint(0, scheme.n))
    liars = set(rng.sample(given_slots, rng.randint(0, len(given_slots))))
    seen = {}
    for slot in given_slots:
        fragment = whole[slot]
        if slot in liars:
            lie = bytearray(fragment.payload)
            lie[rng.randrange(len(lie))] ^= rng.randint(1, 255)
            fragment = with_payload(fragment, bytes(lie))
        seen[slot] = fragment._replace(stripe_tag=0)
    try:
        recovered = recover(CODEC, None, hash_block(plain), seen)
    except BlockUnreadable:
        assert len(given_slots) - len(liars) < scheme.k
    else:
        assert recovered.plain == plain
        # A lie in the padding of the last data slot need not matter to the block.
        assert set(recovered.liars) <= liars
