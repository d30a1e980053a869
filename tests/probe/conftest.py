"""Real cells, as a user starts them.  One healthy cell is shared by tests that break nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chaos.live.cell import LiveCell


@pytest.fixture(scope="session")
def shared_cell() -> Iterator[LiveCell]:
    """Nine nodes, rs-6-3.  Tests may write to it but must leave every process alive."""
    with LiveCell() as cell:
        cell.start()
        cell.wait_for_nodes(9)
        yield cell


@pytest.fixture
def own_cell() -> Iterator[LiveCell]:
    """A cell that the test may break; not started yet."""
    with LiveCell() as cell:
        yield cell
