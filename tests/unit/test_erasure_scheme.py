"""Schemes: the supported range is closed, names and bytes read back."""

from __future__ import annotations

import pytest

from erasure.scheme import SCHEME_BYTES, Scheme, SchemeKind
from protocol.errors import SchemeUnsupported

EVERY_SCHEME = [Scheme.rs(k, m) for k in range(2, 17) for m in range(1, 7)] + [
    Scheme.replica(n) for n in range(1, 8)
]


@pytest.mark.parametrize("scheme", EVERY_SCHEME, ids=str)
def test_every_supported_scheme_reads_back_from_its_name_and_its_bytes(scheme: Scheme) -> None:
    assert Scheme.parse(scheme.name) == scheme
    assert Scheme.parse(str(scheme)) == scheme
    assert len(scheme.pack()) == SCHEME_BYTES
    assert Scheme.unpack(scheme.pack()) == scheme


@pytest.mark.parametrize(
    "name",
    [
        *("rs-1-1", "rs-17-3", "rs-6-0", "rs-6-7", "replica-0", "replica-8", "rs-06-3", "rs-6-03"),
        *("rs-6", "rs-6-3-1", "RS-6-3", "rs_6_3", " rs-6-3", "rs-6-3\n", "", "raid6", "rs-٦-3"),
    ],
)
def test_a_name_outside_the_range_is_refused(name: str) -> None:
    with pytest.raises(SchemeUnsupported):
        Scheme.parse(name)


@pytest.mark.parametrize(
    "packed", [b"\0\6\3", b"\3\6\3", b"\1\1\1", b"\1\x11\3", b"\1\6\7", b"\2\2\1", b"\2\1\7"]
)
def test_packed_bytes_outside_the_range_are_refused(packed: bytes) -> None:
    with pytest.raises(SchemeUnsupported):
        Scheme.unpack(packed)


@pytest.mark.parametrize(
    ("name", "n", "k", "write_minimum", "twin"),
    [
        ("rs-6-3", 9, 6, 7, "replica-4"),
        ("rs-2-1", 3, 2, 3, "replica-2"),
        ("rs-16-6", 22, 16, 17, "replica-7"),
        ("replica-4", 4, 1, 2, "replica-4"),
        ("replica-2", 2, 1, 2, "replica-2"),
        ("replica-1", 1, 1, 1, "replica-1"),
    ],
)
def test_counts_that_placement_and_puts_rely_on(
    name: str, n: int, k: int, write_minimum: int, twin: str
) -> None:
    scheme = Scheme.parse(name)
    assert (scheme.n, scheme.k, scheme.write_minimum) == (n, k, write_minimum)
    assert scheme.small_twin() == Scheme.parse(twin)
    assert scheme.small_twin().m == scheme.m


def test_chunks_cover_the_stored_block_with_less_than_one_byte_a_slot_to_spare() -> None:
    for scheme in EVERY_SCHEME:
        for length in (0, 1, scheme.k - 1, scheme.k, scheme.k + 1, 4 * 1024 * 1024 + 64):
            chunk = scheme.chunk_bytes(length)
            assert 0 <= chunk * scheme.k - length < scheme.k
    assert Scheme.replica(3).chunk_bytes(17) == 17


def test_packed_kinds_never_change() -> None:
    assert Scheme.rs(6, 3).pack() == b"\1\6\3"
    assert Scheme.replica(4).pack() == b"\2\1\3"
    assert [int(kind) for kind in SchemeKind] == [1, 2]
