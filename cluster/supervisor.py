"""The controller of a one-machine cell: the only Ray driver (`python -m cluster.supervisor`).

Started and restarted by `haversack up`.  Walk: start Ray without the services that a cell does
not need, create the placement actor, one storage-node actor per member of the plan file and the
repair actor, watch Ray's own processes, start and stop the actors of nodes that come and go (the
plan file changes), stop everything in order on SIGTERM.  Ray restarts actors; if its GCS or raylet
dies this process ends, and `haversack up` starts it again: the cold start from SQL and disks is the
ordinary start.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray._private.node import Node

from cluster.actor import remote_placement
from cluster.controller_plan import ControllerPlan, PlannedNode, read_plan
from cluster.ray_environment import NAMESPACE, PLACEMENT_NAME, REPAIR_NAME
from cluster.repair.actor import remote_repair
from protocol.allocator import release_free_memory
from protocol.ids import NodeId
from protocol.limits import MIB
from storage_node.actor import remote_storage_node
from storage_node.node_config import NodeConfig

log = logging.getLogger("haversack.controller")

OBJECT_STORE_BYTES = 80 * MIB
"""Ray's own minimum: fragments never pass through the object store."""

STARTING_MAX = 4
"""Processes that Ray starts at a time, at most one a core; it takes that number from its CPUs, of
which our actors reserve none.  No cell has fewer actors, so none is started for nothing."""

WATCH_S = 1.0
STOP_NODE_S = 20.0

UNUSED_SERVICES = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's node that start the dashboard, the autoscaler and the log monitor."""

VITAL_SERVICES = ("gcs_server", "raylet")

SESSION_PREFIX = "haversack-ray-"


class _Leaving(NamedTuple):
    """A storage node that was told to stop, and is killed if it takes longer than `until`."""

    name: str
    actor: Any
    call: Any
    until: float


class Supervisor:
    """Everything below Ray, in the order it starts and the reverse order it stops."""

    def __init__(self, data: Path, plan: ControllerPlan) -> None:
        self._data = data
        self._plan = plan
        self._stopping = threading.Event()
        self._session = new_session(data / "ray.session")
        self._placement: Any = None
        self._repair: Any = None
        self._nodes: dict[str, Any] = {}
        self._leaving: list[_Leaving] = []

    def start(self) -> None:
        """Start Ray and all actors; returns before they have opened their disks."""
        leave_out_unused_services()
        ray.init(
            address="local",
            namespace=NAMESPACE,
            num_cpus=min(os.cpu_count() or 1, STARTING_MAX),
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(self._session),
            _node_ip_address="127.0.0.1",
        )
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        self._placement = remote_placement().options(name=PLACEMENT_NAME).remote(str(self._data))
        for node in self._plan.nodes:
            self._start_node(node)
        self._repair = remote_repair().options(name=REPAIR_NAME).remote(str(self._data))
        release_free_memory()

    def _start_node(self, node: PlannedNode) -> None:
        config = NodeConfig(
            node_id=NodeId.parse(node.node_id),
            directory=node.directory,
            cluster_id=self._plan.cluster_id,
            secret_file=str(self._data / "cluster.secret"),
            bind_host="127.0.0.1",
            capacity_bytes=self._plan.node_capacity_bytes,
            namespace=NAMESPACE,
            registrar=PLACEMENT_NAME,
            log_file=str(self._data / "logs" / f"{node.node_id}.log"),
            upkeep=self._plan.upkeep,
        )
        actor = remote_storage_node().options(name=node.node_id).remote(config)
        self._nodes[node.node_id] = actor

    def _follow_plan(self) -> None:
        """Start the actors of nodes that were added, stop those of nodes that were removed."""
        try:
            plan = read_plan(self._data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("the controller's plan cannot be read: %s", error)
            return
        if plan == self._plan:
            return
        self._plan = plan
        members = {node.node_id: node for node in plan.nodes}
        for name in [name for name in self._nodes if name not in members]:
            log.warning("%s left the cell: its actor stops", name)
            actor = self._nodes.pop(name)
            until = time.monotonic() + STOP_NODE_S
            self._leaving.append(_Leaving(name, actor, actor.stop.remote(), until))
        for name in [name for name in members if name not in self._nodes]:
            log.warning("%s joins the cell: its actor starts", name)
            self._start_node(members[name])

    def _see_off(self) -> None:
        """Actors that were told to stop: once they have answered or are late, they are ended."""
        for leaving in list(self._leaving):
            done, _ = ray.wait([leaving.call], timeout=0)
            if done or time.monotonic() >= leaving.until:
                ray.kill(leaving.actor, no_restart=True)
                self._leaving.remove(leaving)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stopping.set()

    def watch(self) -> bool:
        """Until asked to stop (True) or a vital Ray process has ended (False)."""
        vital = list(vital_services())
        while not self._stopping.wait(WATCH_S):
            for process in vital:
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    log.error("Ray's process %d has ended", process.pid)
                    return False
            self._follow_plan()
            self._see_off()
        return True

    def stop(self) -> None:
        """Close every store, then Ray.  Whatever does not answer in time is killed with Ray."""
        ray.wait([self._repair.stop.remote()], timeout=STOP_NODE_S)
        calls = [node.stop.remote() for node in self._nodes.values()]
        _, late = ray.wait(calls, num_returns=len(calls), timeout=STOP_NODE_S)
        if late:
            log.warning("%d storage nodes did not close in time", len(late))
        ray.wait([self._placement.stop.remote()], timeout=STOP_NODE_S)
        ray.shutdown()

    def clean_up(self) -> None:
        """Remove Ray's session directory."""
        shutil.rmtree(self._session, ignore_errors=True)


def new_session(note: Path) -> Path:
    """A directory for Ray; removes the one that a killed controller left behind.

    Not under TMPDIR: the paths of Ray's sockets must stay under 107 bytes.
    """
    if note.exists():
        shutil.rmtree(note.read_text(encoding="utf-8").strip(), ignore_errors=True)
    session = Path(tempfile.mkdtemp(prefix=SESSION_PREFIX, dir="/tmp"))
    note.write_text(f"{session}\n", encoding="utf-8")
    return session


def leave_out_unused_services() -> None:
    """Keep Ray from starting services that a cell does not use, some 50 MB and half a second of
    CPU each; `ray.init` has no arguments for that.

    Raises `AttributeError` for a release of Ray that starts them in another way.
    """
    for start in UNUSED_SERVICES:
        getattr(Node, start)
        setattr(Node, start, _start_nothing)


def _start_nothing(*_: object, **__: object) -> None:
    """In the place of a method of Ray that starts a service."""


def vital_services() -> Iterator[psutil.Process]:
    """The GCS and the raylet: children of this process."""
    for process in psutil.Process().children():
        try:
            command = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if any(part.endswith(VITAL_SERVICES) for part in command[:3]):
            yield process


def main() -> int:
    """Run until SIGTERM (0) or until Ray has failed (1)."""
    parser = argparse.ArgumentParser(prog="python -m cluster.supervisor")
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data.resolve()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    supervisor = Supervisor(data, read_plan(data))
    try:
        supervisor.start()
        if not supervisor.watch():
            return 1
        supervisor.stop()
    finally:
        supervisor.clean_up()
    return 0


if __name__ == "__main__":
    sys.exit(main())
