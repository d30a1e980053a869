"""How fast a block index is made again, and in how much memory: `python -m bench.fsck`.

Writes node directories with small replicated records and larger erasure-coded ones straight into
the stores, as nodes would, then runs the rebuild in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from erasure.fragment import pack_header
from erasure.scheme import Scheme
from protocol.ids import BlockHash, NodeId, VolumeId
from storage_node.identity import Identity, initialise
from storage_node.interface import FragmentKey
from storage_node.rocks_options import StoreOptions
from storage_node.rocks_store import open_store

CLUSTER = "c" * 32
GROUP = 64


def make_cell(data: Path, scheme: Scheme, nodes: int, blocks: int, stored_bytes: int) -> int:
    """Node directories that hold `blocks` stripes in volumes of 2,000; returns the fragments."""
    stores = []
    for number in range(1, nodes + 1):
        owner = Identity(CLUSTER, NodeId.numbered(number), f"store-{number}")
        directory = data / "nodes" / owner.node_id
        initialise(directory, owner)
        stores.append(open_store(directory, owner, StoreOptions(reserve_bytes=0)))
    rng = random.Random(1)
    payload = rng.randbytes(scheme.chunk_bytes(stored_bytes))
    for first in range(0, blocks, 2_000):
        volume = VolumeId(first // 2_000 + 1)
        holders = rng.sample(stores, scheme.n)
        for slot, store in enumerate(holders):
            store.put_state({f"epoch/{volume}": (1).to_bytes(8, "big")})
            group = []
            for block in range(first, min(first + 2_000, blocks)):
                name = BlockHash(hashlib.sha256(b"%d" % block).digest())
                header = pack_header(
                    scheme, slot, name, volume, 1, stored_bytes, payload, 1, stored_bytes - 64
                )
                group.append((FragmentKey(volume, name, slot), header + payload))
                if len(group) == GROUP:
                    store.put_group(group)
                    group = []
            store.put_group(group)
    for store in stores:
        store.close()
    return blocks * scheme.n


def measure(data: Path, scheme: str, deep: bool) -> None:
    """In a process of its own: rebuild, then check, and print what both took."""
    from cluster.fsck.check import check
    from cluster.fsck.rebuild import Place, RebuildRequest, rebuild

    started, cpu = time.monotonic(), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = rebuild(
        RebuildRequest(
            data, time.time(), {}, Place("host", "rack", 1.0), Scheme.parse(scheme), deep=deep
        )
    )
    taken, used = time.monotonic() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    report = check(data / "cell.db", data / "metadata.db", data, deep=deep)
    print(
        json.dumps(
            {
                "blocks": made.blocks,
                "rebuild_s": round(taken, 2),
                "rebuild_cpu_s": round(used, 2),
                "check_s": round(time.monotonic() - started, 2),
                "by_present": report.by_present,
                "rss_before_mib": before // 1024,
                "rss_peak_mib": peak // 1024,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fsck")
    parser.add_argument("--scheme", default="replica-4")
    parser.add_argument("--nodes", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=50_000)
    parser.add_argument("--stored-bytes", type=int, default=2_000)
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure, options.scheme, options.deep)
        return
    with tempfile.TemporaryDirectory(prefix="haversack-bench-") as directory:
        data = Path(directory)
        scheme = Scheme.parse(options.scheme)
        fragments = make_cell(data, scheme, options.nodes, options.blocks, options.stored_bytes)
        command = [sys.executable, "-m", "bench.fsck", "--measure", str(data)]
        command += ["--scheme", options.scheme, *(["--deep"] if options.deep else [])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result = json.loads(done.stdout)
    rate = fragments / result["rebuild_s"]
    print(f"{fragments:,} fragments, {options.scheme}: {rate:,.0f} fragments/s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
