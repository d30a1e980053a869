"""Failure domains by name: nodes, hosts and racks that an operator points at.  Pure.

A host is named `RACK/HOST`, because placement takes hosts of one name in two racks for two hosts.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.topology import NodeState, NodeView
from protocol.errors import InvalidRequest
from protocol.ids import NodeId


class Level(enum.StrEnum):
    """What fails together, from small to large."""

    NODE = "node"
    HOST = "host"
    RACK = "rack"


@dataclass(frozen=True, slots=True, order=True)
class Domain:
    """One node, host or rack, with the nodes in it in id order."""

    level: Level
    name: str
    nodes: tuple[NodeId, ...]

    def __str__(self) -> str:
        return f"{self.level}:{self.name}"


def name_at(level: Level, node: NodeView) -> str:
    """The domain of a level that a node is in."""
    match level:
        case Level.NODE:
            return str(node.node_id)
        case Level.HOST:
            return f"{node.rack}/{node.host}"
        case Level.RACK:
            return node.rack


def domains_at(level: Level, nodes: Iterable[NodeView]) -> list[Domain]:
    """All domains of a level that have members, by name; nodes that are gone belong to none."""
    members: dict[str, list[NodeId]] = {}
    for node in nodes:
        if node.state is not NodeState.GONE:
            members.setdefault(name_at(level, node), []).append(node.node_id)
    return [Domain(level, name, tuple(sorted(members[name]))) for name in sorted(members)]


def resolve(text: str, nodes: Sequence[NodeView]) -> Domain:
    """What `node-03`, `rack-1`, `rack-1/host-2` or `rack:r1` means.

    A bare host name is enough where only one rack has such a host.  Raises `InvalidRequest` for a
    name that means nothing, or more than one thing.
    """
    level, colon, name = text.partition(":")
    levels = tuple(Level)
    if colon:
        if level not in set(levels):
            raise InvalidRequest(f"{text!r}: write node:NAME, host:RACK/HOST or rack:NAME")
        levels = (Level(level),)
    else:
        name = text
    found = [
        domain
        for level in levels
        for domain in domains_at(level, nodes)
        if name == domain.name or (level is Level.HOST and domain.name.endswith(f"/{name}"))
    ]
    if not found:
        raise InvalidRequest(
            f"no node, host or rack of this cell is called {text!r}: see `haversack status`"
        )
    if len(found) > 1:
        names = ", ".join(str(domain) for domain in found[:5])
        raise InvalidRequest(f"{text!r} may be any of {names}: write which one")
    return found[0]
