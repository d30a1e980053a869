"""Structured logs: one JSON object a line, appended to a file of `DIR/logs`.

Called once by each `main` and actor shell, before anything is logged.  A line never holds a token,
a query string or bytes of a block.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import orjson
import structlog


def open_log(path: Path | None) -> None:
    """Send structlog, and what libraries warn of, to `path`; None: to nowhere."""
    if path is None:
        structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[_encode])
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("ab", buffering=0)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _encode,
        ],
        logger_factory=structlog.BytesLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    handler = _Forward(logging.WARNING)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


class _Forward(logging.Handler):
    """Records of libraries become lines like ours."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(
            record.levelno,
            record.getMessage(),
            logger=record.name,
            exc_info=record.exc_info,
        )


def _encode(_logger: object, _name: str, event: MutableMapping[str, Any]) -> bytes:
    return orjson.dumps(event, default=repr)
