"""Block bodies that are random, fresh in every run and can be made again to check an answer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes of a block and its name in hex."""

    data: bytes
    name: str


def make_bodies(seed: int, first: int, count: int, size: int) -> list[Body]:
    """Bodies number `first` to `first + count - 1` of the family `seed`, each of `size` bytes."""
    return [_make(seed, number, size) for number in range(first, first + count)]


def _make(seed: int, number: int, size: int) -> Body:
    data = np.random.default_rng((seed, number, size)).bytes(size)
    return Body(data, hashlib.sha256(data).hexdigest())
