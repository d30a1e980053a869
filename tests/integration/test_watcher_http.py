"""The watcher over real HTTP: its credential reads any block and does nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from api_cell import Cell, block_of, running_cell

from api.watcher import Watcher, WatchSample
from client.api import HaversackClient
from protocol.ids import BlockHash


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    directory = tmp_path_factory.mktemp("cell")
    with running_cell(directory, scheme="rs-2-1", nodes=3, watch_share=1.0) as cell:
        yield cell


def watcher_client(cell: Cell) -> httpx.Client:
    assert cell.services is not None
    assert cell.running is not None
    headers = {"Authorization": f"Bearer {cell.services.watcher_token}"}
    return httpx.Client(base_url=cell.running.url, headers=headers, timeout=30, trust_env=False)


def test_the_watchers_credential_reads_any_block_and_nothing_else(cell: Cell) -> None:
    name, data = block_of(1, 5_000)
    with cell.client("alice") as alice, cell.client("bob") as bob:
        assert alice.put(f"/v1/blocks/{name}", content=data).status_code == 201
        assert bob.get(f"/v1/blocks/{name}").status_code == 404
    assert cell.services is not None
    app_routes = [
        ("PUT", f"/v1/blocks/{name}"),
        ("HEAD", f"/v1/blocks/{name}"),
        ("POST", "/v1/blocks/check"),
        ("POST", "/v1/blocks/batch"),
        ("POST", "/v1/blocks/fetch"),
        ("POST", "/v1/metadata/commit"),
        ("GET", "/v1/account"),
        ("GET", "/v1/admin/status"),
        ("POST", "/v1/admin/verify"),
        ("GET", "/openapi.json"),
    ]
    with watcher_client(cell) as client:
        assert client.get(f"/v1/blocks/{name}").content == data
        for method, path in app_routes:
            assert client.request(method, path).status_code == 403, (method, path)


def test_acknowledged_blocks_are_read_again_through_the_api(cell: Cell) -> None:
    services = cell.services
    assert services is not None
    assert cell.running is not None
    services.sample.take()
    blocks = []
    with cell.client() as client:
        for seed in range(10, 14):
            name, data = block_of(seed, 300_000 if seed % 2 else 700)
            assert client.put(f"/v1/blocks/{name}", content=data).status_code == 201
            blocks.append(BlockHash.parse(name))
        client.put(f"/v1/blocks/{name}", content=data)
    url, outcomes = cell.running.url, []

    class Later:
        """A minute has gone by."""

        def wall(self) -> float:
            return services.clock.wall() + 61

        monotonic = services.clock.monotonic
        sleep = services.clock.sleep

    async def main() -> None:
        idle = WatchSample(None, 0.0)  # type: ignore[arg-type]
        async with HaversackClient(url, services.watcher_token) as api:
            read = api.get_block
            first = Watcher(
                services.cell_db, services.clock, services.sample, read, outcomes.append
            )
            await first.step()
            later = Watcher(services.cell_db, Later(), idle, read, outcomes.append)
            await later.step()

    cell.running.call(main)
    assert outcomes == ["good"] * len(blocks)
