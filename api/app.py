"""The FastAPI application: all routes, behind the gate.

Called by `gateway` and by tests with the services they assembled.  `GatewayApp` is a FastAPI in
what it declares (routes, models, OpenAPI) and hands every request to the gate instead of FastAPI's
own middleware, router and dependency solver: measured in `docs/design/011-http-api.md`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from api.access_log import AccessLog
from api.authentication import Authenticator
from api.authority import Authority
from api.batch_routes import BatchRoutes
from api.block_routes import BlockRoutes
from api.change_routes import ChangeRoutes
from api.explain_routes import ExplainRoutes
from api.gate import Gate
from api.metadata_routes import MetadataRoutes
from api.openapi import with_token
from api.routing import Route
from api.scrub_routes import ScrubRoutes
from api.services import Services
from api.system_routes import SystemRoutes
from api.turns import Turns
from api.verify_routes import VerifyRoutes
from cluster.byte_budget import ByteBudget

TITLE = "Haversack"
DESCRIPTION = (
    "Content-addressed blocks, and a tree of files made of them. Every answer with a status of "
    '400 and above is `{"error": {"kind", "message", "details"}}`; match on `kind`.'
)


class GatewayApp(FastAPI):
    """FastAPI whose requests all go through `gate.Gate`."""

    def __init__(self, services: Services) -> None:
        super().__init__(
            title=TITLE,
            version=services.version,
            description=DESCRIPTION,
            openapi_url=None,  # `system_routes` serves it, to callers with a token
            docs_url=None,
            redoc_url=None,
        )
        self._services = services
        self._turns = Turns(
            services.settings.active_requests_max,
            services.settings.queued_requests_max,
            services.settings.queue_wait_s,
        )
        self.api_routes: Sequence[Route] = self._make_routes()
        self.router.routes.extend(self.api_routes)

    def _make_routes(self) -> list[Route]:
        services = self._services
        authority = Authority(services.tree, services.index)
        blocks = BlockRoutes(
            services.blocks,
            services.index,
            authority,
            services.metrics.blocks,
            services.run,
            services.sample,
        )
        batches = BatchRoutes(
            services.blocks,
            authority,
            services.metrics.blocks,
            services.run,
            services.sample,
        )
        system = SystemRoutes(
            status=services.status,
            snapshot=services.snapshot,
            readiness=services.readiness,
            document=self.openapi,
            volume_map=services.volume_map,
            turns=self._turns,
            metrics=services.metrics,
            clock=services.clock,
        )
        tree = MetadataRoutes(services.tree, authority, services.run)
        verify = VerifyRoutes(services.verification)
        changes = ChangeRoutes(services.changes)
        explain = ExplainRoutes(
            services.explainer, services.losses, services.accounts, services.tree
        )
        return [
            *blocks.routes(),
            *batches.routes(),
            *tree.routes(),
            *system.routes(),
            *verify.routes(),
            *changes.routes(),
            *explain.routes(),
            *ScrubRoutes(services.scrubs).routes(),
        ]

    def build_middleware_stack(self) -> ASGIApp:
        """The gate; what is not HTTP (start-up and shut-down) goes to FastAPI's router."""
        services, settings = self._services, self._services.settings
        return Gate(
            self.router,
            self.api_routes,
            authenticator=Authenticator(services.accounts, services.clock, services.watcher_token),
            turns=self._turns,
            uploads=ByteBudget("uploads", settings.body_bytes_max, settings.queue_wait_s),
            downloads=ByteBudget("downloads", settings.body_bytes_max, settings.queue_wait_s),
            metrics=services.metrics.http,
            log=AccessLog(settings.access_log, settings.slow_request_s),
            clock=services.clock,
            name=secrets.token_hex(4),
        )

    def openapi(self) -> dict[str, Any]:
        """FastAPI's document, and that everything but probes needs a token."""
        if self.openapi_schema is None:
            self.openapi_schema = with_token(super().openapi())
        return self.openapi_schema


def create_app(services: Services) -> GatewayApp:
    """The application over these services.  Serve it with `http_listener.Listener`."""
    return GatewayApp(services)
