"""Buffers that are filled by the network."""

from __future__ import annotations

import pytest

from protocol.buffers import ZEROED_BELOW_BYTES, buffer_to_fill


@pytest.mark.parametrize(
    "size", [0, 1, ZEROED_BELOW_BYTES - 1, ZEROED_BELOW_BYTES, 700_001, 4 * 1024 * 1024]
)
def test_a_buffer_has_its_size_and_keeps_what_is_written(size: int) -> None:
    buffer = buffer_to_fill(size)
    assert type(buffer) is bytearray
    assert len(buffer) == size
    content = bytes(range(256)) * (size // 256 + 1)
    buffer[:] = content[:size]
    assert bytes(buffer) == content[:size]


def test_two_buffers_do_not_share_memory() -> None:
    first, second = buffer_to_fill(1_000_000), buffer_to_fill(1_000_000)
    first[:] = bytes(1_000_000)
    second[:] = b"\1" * 1_000_000
    assert first == bytes(1_000_000)
