"""The Ray shell of a storage node, in a Ray of its own: one driver script for all of it.

The script runs in a process of its own: unit tests never start Ray, and a driver that dies takes
nothing with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from node_parts import IDENTITY, SECRET, formatted, fragment_key, fragment_record, rocks

from cluster.ray_environment import ray_environment
from protocol.limits import MIB

REPOSITORY = Path(__file__).resolve().parents[2]
SUPPORT = REPOSITORY / "tests" / "support"

DRIVER = """
    import asyncio, json, os, signal, sys, tempfile, time
    import psutil, ray
    from node_parts import CLUSTER_ID, IDENTITY, SECRET, fragment_record
    from protocol.clock import SystemClock
    from storage_node.actor import NodeConfig, remote_storage_node
    from storage_node.port_client import SocketPort

    directory, foreign, secret_file, log_file = sys.argv[1:]

    class Placement:
        def __init__(self):
            self.seen = []
            self.refusals = []

        async def register(self, registration):
            if registration.refusal:  # the other node's, whose directory is not its own
                self.refusals.append(registration.refusal)
                return
            self.seen.append(registration)
            port = SocketPort(
                registration.node_id, registration.endpoint, CLUSTER_ID, SECRET, SystemClock()
            )
            await port.lease(len(self.seen), 600, 5)
            await port.close()

        async def registrations(self):
            return self.seen

        async def refused(self):
            return self.refusals

    def report(**values):
        print(json.dumps(values), flush=True)

    def until(call, wanted):
        late = time.monotonic() + 60
        while True:
            try:
                found = ray.get(call(), timeout=10)
            except ray.exceptions.RayActorError:
                found = None
            if found is not None and wanted(found):
                return found
            assert time.monotonic() < late, found
            time.sleep(0.05)

    async def put(endpoint, incarnation, number):
        port = SocketPort(IDENTITY.node_id, endpoint, CLUSTER_ID, SECRET, SystemClock())
        outcome = await port.put(incarnation, [[fragment_record(number)[1]]], 10)
        await port.close()
        return [int(status) for status in outcome.statuses]

    ray.init(address="local", namespace="haversack", num_cpus=1, include_dashboard=False,
             log_to_driver=False, object_store_memory=80 * 2**20, _node_ip_address="127.0.0.1",
             _temp_dir=tempfile.mkdtemp(prefix="hv-ray-"))
    placement = ray.remote(num_cpus=0)(Placement).options(name="placement").remote()
    config = dict(node_id=IDENTITY.node_id, directory=directory, cluster_id=CLUSTER_ID,
                  secret_file=secret_file, bind_host="127.0.0.1", capacity_bytes=None,
                  namespace="haversack", registrar="placement", reserve_bytes=0, log_file=log_file)
    node = remote_storage_node().options(name="node-01").remote(NodeConfig(**config))
    refusing = remote_storage_node().options(name="node-x").remote(
        NodeConfig(**{**config, "directory": foreign})
    )
    first = until(placement.registrations.remote, lambda seen: len(seen) == 1)[0]
    memory = psutil.Process(first.pid).memory_full_info()
    served = asyncio.run(put(first.endpoint, 1, 1))
    report(step="served", uss=memory.uss, statuses=served, pid=first.pid)
    report(step="refused", state=until(refusing.state.remote, lambda s: s[0] == "refusing"),
           said=until(placement.refused.remote, lambda said: said))

    os.kill(first.pid, signal.SIGKILL)
    second = until(placement.registrations.remote, lambda seen: len(seen) == 2)[1]
    report(step="restarted", statuses=asyncio.run(put(second.endpoint, 2, 2)), pid=second.pid)

    try:
        ray.get(node.stop.remote(), timeout=30)
        stopped = "answered"
    except ray.exceptions.RayActorError:
        stopped = "ended"
    try:
        ray.get(node.state.remote(), timeout=10)
        alive = True
    except ray.exceptions.RayActorError:
        alive = False
    report(step="stopped", how=stopped, alive=alive)
    ray.shutdown()
"""


@pytest.mark.slow
def test_an_actor_opens_serves_restarts_refuses_and_stops(tmp_path: Path) -> None:
    directory = formatted(tmp_path / "node")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    secret = tmp_path / "cluster.secret"
    secret.write_text(SECRET.hex())
    token = tmp_path / "ray.token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    command = [sys.executable, "-c", textwrap.dedent(DRIVER)]
    command += map(str, (directory, foreign, secret, tmp_path / "logs" / "node-01.log"))
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={
            **os.environ,
            **ray_environment(token),
            "PYTHONPATH": f"{REPOSITORY}:{SUPPORT}",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray prints, too
    steps = {line["step"]: line for line in map(json.loads, lines)}
    assert steps["served"]["statuses"] == [0]
    assert steps["served"]["uss"] < 110 * MIB
    assert steps["refused"]["state"][0] == "refusing"
    assert str(foreign) in steps["refused"]["state"][1]
    assert all(str(foreign) in said for said in steps["refused"]["said"])
    assert list(foreign.iterdir()) == []
    assert steps["restarted"]["statuses"] == [0]
    assert steps["restarted"]["pid"] != steps["served"]["pid"]
    assert steps["stopped"] == {"step": "stopped", "how": "ended", "alive": False}
    store = rocks(directory)  # closed in order: nobody holds it
    for number in (1, 2):
        (answer,) = store.get_many([fragment_key(number)])
        assert answer.record == fragment_record(number)[1]
    store.close()
    log_text = (tmp_path / "logs" / "node-01.log").read_text()
    log = [json.loads(line) for line in log_text.splitlines()]
    assert any(f"{IDENTITY.node_id} serves" in line["event"] for line in log)
