"""The erasure code gives every block back from every k of its n slots, at every size."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable

import pytest
from pyeclib.ec_iface import ECDriver, ECDriverError

from erasure.codec import EC_TYPE, Codec
from erasure.scheme import Scheme
from protocol.errors import BlockUnreadable, CorruptFragment
from protocol.hashing import Buffer
from protocol.limits import KIB, MIB

SHIPPED = [
    Scheme.parse(name) for name in ("rs-2-1", "rs-3-2", "rs-4-2", "rs-6-3", "rs-8-3", "rs-10-4")
]
EVERY_RS = [Scheme.rs(k, m) for k in range(2, 17) for m in range(1, 7)]

PATTERNS_ENUMERATED_MAX = math.comb(16, 6)
"""All C(n, k) subsets of 80 of the 90 RS schemes, up to those of rs-10-6; of the others, which have
between 8,568 and 74,613, a seeded sample.  The design page tells of a count of all of them."""
PATTERNS_SAMPLED = 200

CODEC = Codec()


def block_of(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def survivors(scheme: Scheme) -> Iterable[tuple[int, ...]]:
    """Which k slots are left: every choice, or a sample of the widest stripes' choices."""
    slots = range(scheme.n)
    if math.comb(scheme.n, scheme.k) <= PATTERNS_ENUMERATED_MAX:
        return itertools.combinations(slots, scheme.k)
    rng = random.Random(scheme.name)
    # The worst case, nothing but the highest slots, is always among them.
    sampled = [tuple(sorted(rng.sample(slots, scheme.k))) for _ in range(PATTERNS_SAMPLED)]
    return [tuple(slots[-scheme.k :]), *sampled]


def assert_survives(scheme: Scheme, stored: bytes, patterns: Iterable[tuple[int, ...]]) -> int:
    """Decode and reconstruct from each pattern; how many there were."""
    payloads = CODEC.encode(scheme, stored)
    count = 0
    for slots in patterns:
        left = {slot: payloads[slot] for slot in slots}
        lost = [slot for slot in range(scheme.n) if slot not in left]
        assert CODEC.decode(scheme, left, len(stored)) == stored, (scheme, slots)
        rebuilt = CODEC.reconstruct(scheme, left, lost, len(stored))
        assert sorted(rebuilt) == lost
        for slot in lost:
            assert rebuilt[slot] == payloads[slot], (scheme, slots, slot)
        count += 1
    return count


@pytest.mark.parametrize("scheme", SHIPPED, ids=str)
def test_every_k_slots_of_a_shipped_scheme_decode_and_reconstruct(scheme: Scheme) -> None:
    stored = block_of(scheme.k * 7 + 3)
    patterns = itertools.combinations(range(scheme.n), scheme.k)
    assert assert_survives(scheme, stored, patterns) == math.comb(scheme.n, scheme.k)


@pytest.mark.parametrize("scheme", EVERY_RS, ids=str)
def test_every_supported_rs_scheme_survives_any_m_losses(scheme: Scheme) -> None:
    assert_survives(scheme, block_of(scheme.k * 3 + 1), survivors(scheme))


@pytest.mark.parametrize("copies", range(1, 8))
def test_any_single_replica_gives_the_block_back(copies: int) -> None:
    scheme = Scheme.replica(copies)
    stored = block_of(1000)
    assert assert_survives(scheme, stored, [(slot,) for slot in range(copies)]) == copies


@pytest.mark.parametrize("scheme", [*SHIPPED, Scheme.replica(4)], ids=str)
@pytest.mark.parametrize(
    "length",
    ["0", "1", "k-1", "k", "k+1", "64Ki-1", "64Ki", "64Ki+1", "4Mi-1", "4Mi"],
)
def test_awkward_sizes_come_back_whole(scheme: Scheme, length: str) -> None:
    values = {"k": scheme.k, "64Ki": 64 * KIB, "4Mi": 4 * MIB}
    base, _, offset = length.partition("-" if "-" in length else "+")
    size = values.get(base, int(base) if base.isdigit() else 0)
    size += int(offset or 0) * (-1 if "-" in length else 1)
    slots = range(scheme.n)
    patterns = [tuple(slots[: scheme.k]), tuple(slots[-scheme.k :])]
    patterns += [(*slots[1 : scheme.k], scheme.n - 1)] if scheme.k > 1 else []
    assert_survives(scheme, block_of(size), patterns)


@pytest.mark.parametrize("scheme", [*SHIPPED, Scheme.replica(4)], ids=str)
@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 1000, 64 * KIB + 1])
def test_a_healthy_read_is_a_plain_concatenation(scheme: Scheme, length: int) -> None:
    stored = block_of(length)
    payloads = CODEC.encode(scheme, stored)
    assert [len(payload) for payload in payloads] == [scheme.chunk_bytes(length)] * scheme.n
    joined = b"".join(payloads[: scheme.k])
    assert joined[:length] == stored
    assert joined[length:] == bytes(len(joined) - length)
    assert CODEC.join_data(scheme, payloads[: scheme.k], length) == stored


def test_replicas_are_not_copied() -> None:
    stored = block_of(100)
    assert all(payload is stored for payload in CODEC.encode(Scheme.replica(4), stored))


def test_more_slots_than_needed_are_no_obstacle() -> None:
    scheme, stored = Scheme.rs(6, 3), block_of(1000)
    payloads = dict(enumerate(CODEC.encode(scheme, stored)))
    assert CODEC.decode(scheme, payloads, len(stored)) == stored
    del payloads[2]
    assert CODEC.decode(scheme, payloads, len(stored)) == stored


def test_a_wanted_slot_is_computed_even_if_a_payload_for_it_was_given() -> None:
    scheme, stored = Scheme.rs(6, 3), block_of(1000)
    payloads = CODEC.encode(scheme, stored)
    given: dict[int, Buffer] = dict(enumerate(payloads))
    given[4] = bytes(len(payloads[4]))
    assert CODEC.reconstruct(scheme, given, [4], len(stored)) == {4: payloads[4]}


@pytest.mark.parametrize("scheme", [*SHIPPED, Scheme.replica(2)], ids=str)
@pytest.mark.parametrize("length", [0, 1000])
def test_more_than_m_losses_are_refused_and_never_decoded(scheme: Scheme, length: int) -> None:
    stored = block_of(length)
    payloads = CODEC.encode(scheme, stored)
    few = {slot: payloads[slot] for slot in range(1, scheme.k)}
    with pytest.raises(BlockUnreadable):
        CODEC.decode(scheme, few, length)
    with pytest.raises(BlockUnreadable):
        CODEC.reconstruct(scheme, few, [0], length)


def test_wanting_slots_does_not_count_them_as_sources() -> None:
    scheme, stored = Scheme.rs(2, 1), block_of(10)
    payloads = dict(enumerate(CODEC.encode(scheme, stored)))
    with pytest.raises(BlockUnreadable):
        CODEC.reconstruct(scheme, payloads, [0, 1], len(stored))


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("scheme", [Scheme.rs(6, 3), Scheme.replica(3)], ids=str)
def test_a_payload_of_another_length_is_refused(scheme: Scheme, change: int) -> None:
    stored = block_of(1000)
    payloads = dict(enumerate(CODEC.encode(scheme, stored)))
    payloads[1] = bytes(len(payloads[1]) + change)
    with pytest.raises(CorruptFragment):
        CODEC.join_data(scheme, [payloads[1]] * scheme.k, 1000)
    del payloads[0]
    with pytest.raises(CorruptFragment):
        CODEC.decode(scheme, payloads, 1000)
    with pytest.raises(CorruptFragment):
        CODEC.reconstruct(scheme, payloads, [0], 1000)


def test_sources_may_be_any_kind_of_buffer() -> None:
    scheme, stored = Scheme.rs(4, 2), block_of(999)
    payloads = CODEC.encode(scheme, stored)
    mixed: dict[int, Buffer] = {
        0: bytes(payloads[0]),
        2: bytearray(payloads[2]),
        4: memoryview(payloads[4]),
        5: memoryview(b"xx" + bytes(payloads[5]))[2:],
    }
    assert CODEC.decode(scheme, mixed, len(stored)) == stored


def singular_subsets(ec_type: str, k: int, m: int) -> int:
    """Of all C(n, k) choices of survivors, how many the library cannot decode rightly."""
    library = ECDriver(ec_type=ec_type, k=k, m=m)
    stored = block_of(k * 4)
    fragments = library.encode(stored)
    bad = 0
    for left in itertools.combinations(fragments, k):
        try:
            bad += library.decode(list(left)) != stored
        except ECDriverError:
            bad += 1
    return bad


def test_cauchy_is_mds_where_vandermonde_is_not() -> None:
    """Some of the figures of docs/design/002-erasure-code.md."""
    assert singular_subsets("isa_l_rs_vand", 16, 4) == 0
    assert singular_subsets("isa_l_rs_vand", 6, 5) == 2
    assert singular_subsets("isa_l_rs_vand", 5, 6) == 2
    assert singular_subsets("isa_l_rs_vand", 10, 5) == 10
    assert singular_subsets(EC_TYPE, 6, 5) == 0
    assert singular_subsets(EC_TYPE, 5, 6) == 0
    assert singular_subsets(EC_TYPE, 10, 5) == 0


def test_payloads_do_not_depend_on_which_checksum_the_library_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The switch of LP#1886088 changes the library's headers, so it must not change ours."""
    scheme, stored = Scheme.rs(4, 2), block_of(1000)
    before = CODEC.encode(scheme, stored)
    monkeypatch.setenv("LIBERASURECODE_WRITE_LEGACY_CRC", "1")
    legacy = Codec()
    assert legacy.encode(scheme, stored) == before
    left = dict(list(enumerate(before))[2:])
    assert legacy.decode(scheme, left, len(stored)) == stored
    assert legacy.reconstruct(scheme, left, [0, 1], len(stored)) == {0: before[0], 1: before[1]}
