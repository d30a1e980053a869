"""The real store against a dict: any sequence of puts, deletes, merges, closings and crashes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from node_parts import fragment_key, fragment_record, noise, rocks

from erasure.fragment import MAGIC
from protocol.limits import KIB, MIB
from protocol.messages import ItemStatus
from storage_node import merge_plan
from storage_node.interface import FragmentKey
from storage_node.rocks_store import RocksStore

numbers = st.integers(0, 12)
sizes = st.sampled_from([0, 1, 900, 31 * KIB, 33 * KIB, 150 * KIB, 300 * KIB])
groups = st.lists(st.tuples(numbers, sizes, st.integers(0, 3)), min_size=1, max_size=5)


def is_fragment(record: bytes) -> bool:
    """`noise` starts with anything but a fragment's magic."""
    return record.startswith(MAGIC)


def copy_alive(directory: Path, copy: Path) -> None:
    """Copy an open store; again, if RocksDB removed a file meanwhile."""
    for _ in range(10):
        try:
            shutil.copytree(directory, copy)
        except shutil.Error:
            shutil.rmtree(copy)
        else:
            return
    raise AssertionError("the store never rests")


class StoreMachine(RuleBasedStateMachine):
    """One directory; the model holds what was acknowledged."""

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="haversack-store-"))
        self.lives = 0
        self.directory = self.root / "node"
        self.model: dict[FragmentKey, bytes] = {}
        self.state: dict[str, bytes] = {}
        self.aside: set[FragmentKey] = set()
        self.store = rocks(self.directory)

    @rule(group=groups)
    def put(self, group: list[tuple[int, int, int]]) -> None:
        records = [
            (fragment_key(number), noise(number + version, size)) for number, size, version in group
        ]
        self.store.put_group(records)
        self.model.update(records)

    @rule(chosen=st.lists(numbers, max_size=5))
    def delete(self, chosen: list[int]) -> None:
        keys = [fragment_key(number) for number in chosen]
        expected = [ItemStatus.OK if key in self.model else ItemStatus.NOT_FOUND for key in keys]
        assert self.store.delete_group(keys) == expected
        for key in keys:
            self.model.pop(key, None)
            self.aside.discard(key)

    @rule(chosen=numbers, size=sizes)
    def put_a_good_fragment(self, chosen: int, size: int) -> None:
        key, record = fragment_record(chosen, size)
        self.store.put_group([(key, record)])
        self.model[key] = record
        self.aside.discard(key)

    @rule(chosen=st.lists(numbers, max_size=5, unique=True))
    def set_aside(self, chosen: list[int]) -> None:
        """What `put` stores is no fragment, and what `put_a_good_fragment` stores is one."""
        keys = [fragment_key(number) for number in chosen]
        bad = {key for key in keys if key in self.model and not is_fragment(self.model[key])}
        assert self.store.set_aside(keys, 1.0) == len(bad - self.aside)
        self.aside |= bad

    @rule(name=st.sampled_from(["a", "b"]), value=st.binary(max_size=5))
    def set_state(self, name: str, value: bytes) -> None:
        self.store.put_state({name: value})
        self.state[name] = value

    @rule()
    def flush(self) -> None:
        self.store.flush()

    @rule()
    def tidy(self) -> None:
        shortest, merge_plan.RUN_FILES_MIN = merge_plan.RUN_FILES_MIN, 2
        try:
            self.store.tidy(64 * MIB)
        finally:
            merge_plan.RUN_FILES_MIN = shortest

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = rocks(self.directory)

    @rule()
    def crash(self) -> None:
        self.lives += 1
        copy = self.root / f"life-{self.lives}"
        copy_alive(self.directory, copy)
        self._drop()
        self.directory = copy
        self.store = rocks(copy)

    def _drop(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)

    @invariant()
    def everything_acknowledged_is_there_and_nothing_else(self) -> None:
        store: RocksStore | None = getattr(self, "store", None)
        if store is None:
            return
        keys = [fragment_key(number) for number in range(13)]
        for key, answer in zip(keys, store.get_many(keys), strict=True):
            assert answer.record == (None if key in self.aside else self.model.get(key))
        for key, answer in zip(keys, store.examine(keys), strict=True):
            assert answer.record == self.model.get(key)
        assert {finding.key for finding in store.findings(None, 100)[0]} == self.aside
        listed, more = store.inventory(None, 100)
        assert not more
        assert dict(listed) == {key: len(record) for key, record in self.model.items()}
        assert [key for key, _ in listed] == sorted(self.model, key=FragmentKey.pack)
        stats = store.stats()
        counted = (stats.fragments, stats.fragment_bytes)
        assert counted == (len(self.model), sum(map(len, self.model.values())))
        assert counted == store.recount()
        assert {name: store.get_state(name) for name in self.state} == self.state

    def teardown(self) -> None:
        store: Any = getattr(self, "store", None)
        if store is not None:
            store.close()
            shutil.rmtree(self.root)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
