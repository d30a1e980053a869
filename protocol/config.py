"""The settings of a process: one frozen value, read once, before anything else starts.

Called by every `main`: the CLI, the supervisor and the gateway.  This file is the sole reader of
the environment.  A value comes from the first of

    1. arguments of the command line (`load(data=...)`),
    2. `HAVERSACK_*` environment variables (`HAVERSACK_PORT=9000`; lists and tables as JSON),
    3. the file: `--config`, else `HAVERSACK_CONFIG`, else `haversack.toml` where we stand,
    4. the default below.

A name that is not a setting is refused wherever it stands, because a misspelt one would be
ignored in silence.  Limits that belong to a format or a protocol are in `protocol.limits` and
cannot be set.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings.exceptions import SettingsError

from protocol.errors import ConfigInvalid, MalformedId
from protocol.ids import NodeId
from protocol.limits import (
    BATCH_BODY_BYTES_MAX,
    CLIENT_SPACE_SHARE,
    GIB,
    KIB,
    MIB,
    PLACEMENT_SPACE_SHARE,
    REPAIR_SPACE_SHARE,
)

ENV_PREFIX: Final = "HAVERSACK_"
ENV_CONFIG_FILE: Final = "HAVERSACK_CONFIG"
DEFAULT_FILE: Final = "haversack.toml"
DEFAULT_SERVER: Final = "http://127.0.0.1:8420"

Seconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=1)]


class NodeLabel(BaseModel):
    """Where a storage node stands: `host` and `rack` name its failure domains."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default="", max_length=63, pattern=r"^[A-Za-z0-9._-]*$")
    rack: str = Field(default="", max_length=63, pattern=r"^[A-Za-z0-9._-]*$")
    weight: float = Field(default=1.0, ge=0, le=1000, allow_inf_nan=False)


class Settings(BaseSettings):
    """Everything an operator may set.  Durations are seconds, sizes are bytes."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    # -- the cell ------------------------------------------------------------------------------
    data: Path = Path("data")
    """Directory of the cell: databases, secrets, node directories, logs."""
    nodes: int = Field(default=9, ge=1, le=1000)
    """Storage nodes that `haversack up` runs on this machine."""
    scheme: str = Field(default="rs-6-3", pattern=r"^(rs-[0-9]{1,2}-[0-9]|replica-[0-9])$")
    """Redundancy scheme, fixed when the cell is created (`erasure.scheme` knows the ranges)."""
    node_labels: dict[str, NodeLabel] = Field(default_factory=dict)
    """Per node: a table here, or `"node-01:rack=r1,host=h1,weight=2"` in a list of the
    environment and the command line."""
    node_capacity_bytes: Bytes | None = None
    """What one node may fill; its file system's size when unset."""
    space_placement_percent: float = Field(default=100 * PLACEMENT_SPACE_SHARE, gt=0, lt=100)
    """Share of a node's capacity above which it gets no new volumes if others can be had."""
    space_client_percent: float = Field(default=100 * CLIENT_SPACE_SHARE, gt=0, lt=100)
    """Above which puts of clients are refused, and repair goes on."""
    space_repair_percent: float = Field(default=100 * REPAIR_SPACE_SHARE, gt=0, lt=100)
    """Above which repair is refused too, and only deletes and upkeep go on."""
    scrub_period_s: Seconds = 14 * 24 * 3600.0
    """Within this, each node reads and checks every fragment it holds."""
    scrub_bytes_per_s_max: Bytes = 32 * MIB
    """Bound of that reading on each node; `haversack scrub --now` has its own."""
    compression: bool = True
    """Compress a block when a sample of it says that this pays."""
    encryption_key_file: Path | None = None
    """File with the root key of encryption at rest; off when unset."""

    # -- the gateway ---------------------------------------------------------------------------
    host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    port: int = Field(default=8420, ge=0, le=65535)
    """TCP port of the HTTP API; 0 takes a free one (see `DIR/gateway.json`)."""
    active_requests_max: int = Field(default=128, ge=1, le=100_000)
    """Requests worked on at once."""
    queued_requests_max: int = Field(default=512, ge=0, le=100_000)
    """Requests that wait for their turn; the next one is answered 429."""
    queue_wait_s: Seconds = 10.0
    """Longest wait for a turn, then 429."""
    body_bytes_max: Bytes = 256 * MIB
    """Sum of the bodies held in memory at once, in each direction: what slow peers can hold."""
    header_s: Seconds = 15.0
    """A request's header must be complete within this time."""
    keep_alive_s: Seconds = 75.0
    """An idle connection is closed after this time."""
    transfer_grace_s: Seconds = 15.0
    """A body may stall this long, in either direction, before its rate is looked at."""
    transfer_rate_min: int = Field(default=8 * KIB, ge=0)
    """Bytes per second below which a peer is dropped, averaged over a body."""
    slow_request_s: Seconds = 1.0
    """Requests that take longer are logged."""
    access_log: Literal["problems", "all"] = "problems"
    """Log every request, or only errors and slow ones."""
    drain_s: Seconds = 10.0
    """How long a stopping gateway lets running requests finish."""
    gateway_keep_bytes: Bytes = 64 * MIB
    """Freed memory that the gateway's allocator keeps for the next body."""

    # -- health --------------------------------------------------------------------------------
    health_interval_s: Seconds = 1.0
    """How often the placement service speaks to each node."""
    health_deadline_s: Seconds = 2.0
    """How long a node may take to answer."""
    lease_s: Seconds = 10.0
    """A node that has not heard from the placement service for this long acknowledges no write."""
    node_down_after_s: Seconds = 6.0
    """Silence after which a node is down; its volumes are sealed.  Shorter than its lease."""
    node_out_after_s: Seconds = 900.0
    """Silence after which a down node's fragments are rebuilt elsewhere."""
    verify_period_s: Seconds = 7 * 24 * 3600.0
    """How often the verifier compares the block index with all disks."""
    watch_share: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)
    """Share of new blocks that gateways read again after a minute, an hour, a day and a week."""
    canary_interval_s: Seconds = 24 * 3600.0
    """Between the mending of a canary's fragment and the damaging of the next one."""
    canary_alarm_s: Seconds = 9 * 24 * 3600.0
    """A damaged canary that nobody has noticed after this time raises an alarm: longer than
    `verify_period_s` and a pass."""
    stray_grace_s: Seconds = 24 * 3600.0
    """A fragment in no row's slot is not removed before it is known for this long."""
    node_refusing_out_after_s: Seconds = 24 * 3600.0
    """The same for a node that answers and refuses, because its directory is empty or another's:
    a mount to be put right, not a disk to be replaced."""
    open_volumes: int = Field(default=4, ge=1, le=64)
    """Stock of open volumes per scheme."""
    volume_bytes: Bytes = 1 * GIB
    """Stored bytes at which a volume is sealed."""

    # -- repair --------------------------------------------------------------------------------
    repair_bytes_per_s_max: Bytes = 1 * GIB
    """Bytes of fragments that repair and moves write in a second, at most."""
    repair_bytes_per_s_min: Bytes = 4 * MIB
    """The same while clients are served slowly: repair yields, and never stops."""
    repair_live_latency_s: Seconds = 0.02
    """Nodes that take longer than this to answer a trifle while clients are served are too busy:
    repair slows down."""
    repair_headroom_share: float = Field(default=0.02, ge=0, le=0.5, allow_inf_nan=False)
    """Share of a node's capacity that repair leaves free."""

    # -- the command line and the client -------------------------------------------------------
    server: str = Field(default=DEFAULT_SERVER, pattern=r"^https?://[^/?#\s]+(/[^?#\s]*)?$")
    token_file: Path | None = None
    """File with a bearer token; `admin.token` of the data directory when unset."""

    @field_validator("node_labels", mode="before")
    @classmethod
    def _labels_from_list(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            return dict(_parse_label(item) for item in value)
        return value

    @field_validator("node_labels")
    @classmethod
    def _labels_name_nodes(cls, value: dict[str, NodeLabel]) -> dict[str, NodeLabel]:
        for name in value:
            try:
                NodeId.parse(name)
            except MalformedId as error:
                raise ValueError(error.message) from error
        return value

    @model_validator(mode="after")
    def _relations(self) -> Settings:
        silence_s = self.health_interval_s + self.health_deadline_s
        if not silence_s < self.node_down_after_s < self.lease_s:
            raise ValueError(
                "it must hold that health_interval_s + health_deadline_s < node_down_after_s "
                f"< lease_s: one slow answer is not a death, and a node whose volumes were sealed "
                f"may not take writes; got {silence_s:g}, {self.node_down_after_s:g}, "
                f"{self.lease_s:g}"
            )
        if self.canary_alarm_s <= self.verify_period_s:
            raise ValueError(
                "canary_alarm_s must be longer than verify_period_s: nobody has looked"
            )
        if not (
            self.space_placement_percent <= self.space_client_percent <= self.space_repair_percent
        ):
            raise ValueError(
                "it must hold that space_placement_percent <= space_client_percent <= "
                "space_repair_percent: repair needs room that clients do not take"
            )
        if self.node_out_after_s < self.node_down_after_s:
            raise ValueError("node_out_after_s must not be shorter than node_down_after_s")
        if self.node_refusing_out_after_s < self.node_out_after_s:
            raise ValueError("node_refusing_out_after_s must not be shorter than node_out_after_s")
        if self.repair_bytes_per_s_max < self.repair_bytes_per_s_min:
            raise ValueError("repair_bytes_per_s_max must not be less than repair_bytes_per_s_min")
        if self.body_bytes_max < BATCH_BODY_BYTES_MAX:
            raise ValueError(
                f"body_bytes_max must be at least {BATCH_BODY_BYTES_MAX}, the largest body"
            )
        return self

    @property
    def cell_database(self) -> Path:
        """SQLite file of the cluster's tables."""
        return self.data / "cell.db"

    @property
    def metadata_database(self) -> Path:
        """SQLite file of accounts and trees."""
        return self.data / "metadata.db"


def load(*, config: Path | None = None, **arguments: Any) -> Settings:
    """Settings of this process.  `arguments` are those given on the command line; None means
    not given.  Raises `ConfigInvalid` naming the setting, where it was read, and what is wrong.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    file, required = _settings_file(config)
    from_file = _read_file(file, required=required)
    _refuse_unknown(given, from_file, file)

    class Bound(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, from_file)

    try:
        return Bound(**given)
    except ValidationError as error:
        raise _invalid(error, given, file) from error
    except SettingsError as error:
        raise ConfigInvalid(
            f"{_first_line(error)}: lists and tables are written as JSON"
        ) from error


def _settings_file(config: Path | None) -> tuple[Path, bool]:
    """The file to read, and whether somebody asked for it by name."""
    if config is not None:
        return config, True
    named = os.environ.get(ENV_CONFIG_FILE)
    if named:
        return Path(named), True
    return Path(DEFAULT_FILE), False


def _read_file(file: Path, *, required: bool) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError as error:
        if not required:
            return {}
        raise ConfigInvalid(f"settings file {file} does not exist", {"file": str(file)}) from error
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"settings file {file}: {error}", {"file": str(file)}) from error


def _refuse_unknown(arguments: Mapping[str, Any], from_file: Mapping[str, Any], file: Path) -> None:
    known = {name.lower() for name in Settings.model_fields}
    for name in from_file:
        if name not in known:
            raise _unknown(f"{name!r} in {file}", name, known)
    for variable in os.environ:
        name = variable.removeprefix(ENV_PREFIX).lower()
        if variable.startswith(ENV_PREFIX) and variable != ENV_CONFIG_FILE and name not in known:
            raise _unknown(f"environment variable {variable}", name, known)
    assert known >= arguments.keys(), "a command line passes an argument that is no setting"


def _unknown(where: str, name: str, known: Iterable[str]) -> ConfigInvalid:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return ConfigInvalid(f"{where} is not a setting{hint}", {"setting": name})


def _invalid(error: ValidationError, given: Mapping[str, Any], file: Path) -> ConfigInvalid:
    """Name the first bad setting and where its value came from."""
    first = error.errors(include_url=False, include_context=False)[0]
    text = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return ConfigInvalid(text)
    name = str(first["loc"][0])
    if name in given:
        where = f"--{name.replace('_', '-')}"
    elif ENV_PREFIX + name.upper() in os.environ:
        where = ENV_PREFIX + name.upper()
    else:
        where = f"{name!r} in {file}"
    inside = "".join(f"[{part}]" for part in first["loc"][1:])
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ConfigInvalid(f"{where}{inside}: {text} (got {shown})", {"setting": name})


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _parse_label(item: object) -> tuple[str, dict[str, str]]:
    """`node-01:rack=r1,host=h1,weight=2` as a row of the table."""
    form = f"{item!r} is not NODE:rack=R,host=H,weight=W"
    if not isinstance(item, str):
        raise ValueError(form)
    node, colon, rest = item.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")]
    if not colon or any(not name or not value for name, _, value in pairs):
        raise ValueError(form)
    return node.strip(), {name.strip(): value.strip() for name, _, value in pairs}
