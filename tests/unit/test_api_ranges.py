"""Range, If-Range and If-None-Match against a plain reading of the RFC."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.ranges import cut_pieces, etag_of, matches_none, parse_range, range_applies
from protocol.errors import RangeNotSatisfiable

ETAG = etag_of("ab" * 32)


@given(
    length=st.integers(0, 50),
    first=st.one_of(st.none(), st.integers(0, 60)),
    last=st.one_of(st.none(), st.integers(0, 60)),
)
def test_range_selects_the_bytes_that_the_rfc_says(
    length: int, first: int | None, last: int | None
) -> None:
    field = f"bytes={'' if first is None else first}-{'' if last is None else last}".encode()
    content = bytes(range(length))
    if first is None and last is None:
        assert parse_range(field, length) is None
        return
    if first is None:
        wanted = content[-last:] if last else b""
    elif last is not None and last < first:
        assert parse_range(field, length) is None
        return
    else:
        wanted = content[first:] if last is None else content[first : last + 1]
    if not wanted:
        with pytest.raises(RangeNotSatisfiable) as caught:
            parse_range(field, length)
        assert caught.value.details == {"length": length}
        return
    start, end = parse_range(field, length)
    assert content[start:end] == wanted


@given(st.binary(max_size=60), st.integers(0, 100))
def test_any_field_is_a_range_inside_the_block_or_nothing_or_unsatisfiable(
    field: bytes, length: int
) -> None:
    for text in (field, b"bytes=" + field):
        try:
            found = parse_range(text, length)
        except RangeNotSatisfiable:
            continue
        assert found is None or 0 <= found[0] < found[1] <= length


@pytest.mark.parametrize("field", [b"bytes=" + b"1" * 5000 + b"-", b"bytes=0-" + b"9" * 5000])
def test_huge_numbers_are_not_computed_with(field: bytes) -> None:
    assert parse_range(field, 10) is None


@pytest.mark.parametrize("digits", ["²", "\u0661", "1_0", "+1", " 1 1"])
def test_digits_that_are_not_ascii_digits_are_no_range(digits: str) -> None:
    assert parse_range(f"bytes={digits}-".encode(), 100) is None


def test_if_none_match_compares_weakly_and_in_lists() -> None:
    assert matches_none(b"*", ETAG)
    assert matches_none(ETAG, ETAG)
    assert matches_none(b'"x",W/' + ETAG + b' , "y"', ETAG)
    assert not matches_none(None, ETAG)
    assert not matches_none(b"", ETAG)
    assert not matches_none(ETAG.strip(b'"'), ETAG)


def test_if_range_compares_strongly() -> None:
    assert range_applies(None, ETAG)
    assert range_applies(b" " + ETAG, ETAG)
    assert not range_applies(b"W/" + ETAG, ETAG)
    assert not range_applies(b"Sat, 21 Nov 2026 09:43:52 GMT", ETAG)


def test_cutting_pieces_gives_the_bytes_of_the_whole() -> None:
    whole = bytes(range(23))
    pieces = [whole[:5], whole[5:5], whole[5:6], whole[6:20], whole[20:]]
    for start in range(24):
        for end in range(start, 24):
            assert b"".join(cut_pieces(pieces, start, end)) == whole[start:end]
