"""How long a storage node usually takes to answer, in constant time and space per sample.

Step 2 of the life of a get: `NodePool` feeds each answer in and asks, before each read, after how
many seconds a slot is late enough to be hedged.  Pure: no I/O, no clock, imports nothing of ours
but limits.
"""

from __future__ import annotations

import math

SIZE_CLASS_BITS = 4
"""Answers whose sizes differ by less than a factor of 16 share an estimate."""

_STEP = 0.1
"""How far one surprising sample moves an estimate, as a share of it, once it has settled."""

_SETTLING_SAMPLES = 8
"""Before this many samples steps are larger, so that a first guess does not linger."""


def size_class(expected_bytes: int) -> int:
    """Which estimate an answer of `expected_bytes` belongs to: 4 KiB, 64 KiB, 1 MiB, 16 MiB..."""
    return max(0, (expected_bytes.bit_length() - 9 + SIZE_CLASS_BITS - 1) // SIZE_CLASS_BITS)


class QuantileEstimate:
    """A running quantile of positive samples, by stochastic approximation.

    A sample above the estimate raises it by a factor, one below lowers it by a smaller factor;
    the two balance where the wanted share of samples lies below.  It forgets by itself: after the
    distribution doubles, a p95 follows within some ten late samples, and comes down again over
    some hundred early ones.
    """

    __slots__ = ("_quantile", "samples", "value")

    def __init__(self, quantile: float) -> None:
        assert 0.0 < quantile < 1.0
        self._quantile = quantile
        self.value = 0.0
        self.samples = 0

    def observe(self, sample: float) -> None:
        """Take one sample, in the unit that `value` is read in."""
        self.samples += 1
        if self.samples == 1:
            self.value = max(sample, 1e-9)
            return
        step = _STEP * max(1.0, _SETTLING_SAMPLES / self.samples)
        if sample > self.value:
            self.value *= math.exp(step * self._quantile)
        elif sample < self.value:
            self.value *= math.exp(-step * (1.0 - self._quantile))


class LatencyTable:
    """p95 of each node and the median over all nodes, per size class of the answer."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[str, int], QuantileEstimate] = {}
        self._all: dict[int, QuantileEstimate] = {}

    def observe(self, node: str, answer_class: int, seconds: float) -> None:
        """An answer of that size class came after `seconds` (or had not come by then)."""
        of_node = self._nodes.get((node, answer_class))
        if of_node is None:
            of_node = self._nodes[node, answer_class] = QuantileEstimate(0.95)
        of_node.observe(seconds)
        of_all = self._all.get(answer_class)
        if of_all is None:
            of_all = self._all[answer_class] = QuantileEstimate(0.5)
        of_all.observe(seconds)

    def p95(self, node: str, answer_class: int) -> QuantileEstimate | None:
        """The estimate for one node, or None before its first answer of that class."""
        return self._nodes.get((node, answer_class))

    def median(self, answer_class: int) -> QuantileEstimate | None:
        """The median over all nodes: what a slow node is slow in comparison with."""
        return self._all.get(answer_class)
