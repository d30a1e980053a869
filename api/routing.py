"""Routes of the HTTP API: who may call them, how they read a request, what OpenAPI says of them.

Step 2 of every walk over HTTP: `gate.Gate` finds the route here and calls `Route.answer`.  A route
is a FastAPI `APIRoute`, so the schema is made by FastAPI from the same declaration; but a request
does not pass through FastAPI's dependency solver, which costs more than all of the rest.
"""

from __future__ import annotations

import inspect
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from fastapi.params import Query
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from api.answers import Answer
from api.bodies import invalid, read_json_body
from api.call import Access, Call
from api.openapi import problem_responses
from protocol.errors import InvalidRequest, MethodNotAllowed, RouteNotFound

Model = TypeVar("Model", bound=BaseModel)

QUERY_FIELDS_MAX: Final = 16


class Route(APIRoute):
    """One method of one path.

    The endpoint takes the `Call`, and may take one more parameter: a pydantic model, which is the
    JSON body, or with `Annotated[Model, Query()]` the query string.
    """

    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Callable[..., Awaitable[Answer]],
        *,
        access: Access = Access.USER,
        problems: Sequence[str] = (),
        responses: Mapping[int, Mapping[str, Any]],
        openapi_extra: Mapping[str, Any] | None = None,
        reads_block: bool = False,
    ) -> None:
        """`reads_block`: it gives one block's bytes and nothing else, so that the watcher may call
        it."""
        extra = dict(openapi_extra or {})
        if access is Access.PUBLIC:
            extra["security"] = []
        success = min(responses)
        super().__init__(
            path,
            endpoint,
            methods=[method],
            operation_id=f"{endpoint.__name__}_{method.lower()}",
            response_model=None,
            response_class=Response,
            status_code=success,
            response_description=str(responses[success].get("description", "Done.")),
            responses={
                **{status: dict(response) for status, response in responses.items()},
                **problem_responses(problems, authenticated=access is not Access.PUBLIC),
            },
            openapi_extra=extra,
        )
        self.method = method
        self.access = access
        self.reads_block = reads_block
        self._model, self._in_query = _parameter_of(endpoint)

    async def answer(self, call: Call) -> Answer:
        """Read what the endpoint wants and call it.  Raises `InvalidRequest`, `BodyTooLarge`,
        `PeerGone`, and whatever the endpoint raises."""
        model = self._model
        if model is None:
            return await self._respond(call)
        if self._in_query:
            return await self._respond(call, _from_query(model, call.scope["query_string"]))
        return await self._respond(call, await read_json_body(call, model))

    async def _respond(self, *arguments: object) -> Answer:
        answer: Answer = await self.endpoint(*arguments)
        return answer


class Found(NamedTuple):
    """A route and the variable segment of its path."""

    route: Route
    argument: str


class RouteTable:
    """All routes by path; the last segment of a path may be a variable."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._exact: dict[str, dict[str, Route]] = {}
        self._prefix: dict[str, dict[str, Route]] = {}
        for route in routes:
            prefix, _, last = route.path.rpartition("/")
            assert "{" not in prefix, "only the last segment of a path may be a variable"
            table, key = (
                (self._prefix, prefix) if last.startswith("{") else (self._exact, route.path)
            )
            methods = table.setdefault(key, {})
            assert route.method not in methods, f"two routes for {route.method} {route.path}"
            methods[route.method] = route

    def find(self, method: str, path: str) -> Found:
        """The route of a request.  Raises `RouteNotFound` or `MethodNotAllowed`."""
        argument = ""
        methods = self._exact.get(path)
        if methods is None:
            prefix, _, argument = path.rpartition("/")
            methods = self._prefix.get(prefix)
            if methods is None or not argument:
                raise RouteNotFound(f"there is no {_shown(path)}: see /openapi.json")
        route = methods.get(method) or (methods.get("GET") if method == "HEAD" else None)
        if route is None:
            allow = sorted(methods)
            raise MethodNotAllowed(
                f"{_shown(path)} takes {', '.join(allow)}, not {method}", {"allow": allow}
            )
        return Found(route, argument)


def _shown(path: str) -> str:
    return path if len(path) <= 100 else path[:97] + "..."


def _parameter_of(endpoint: Callable[..., object]) -> tuple[type[BaseModel] | None, bool]:
    """The model that an endpoint wants besides the call, and whether it is in the query."""
    parameters = inspect.signature(endpoint, eval_str=True).parameters.values()
    wanted = [parameter.annotation for parameter in parameters if parameter.annotation is not Call]
    if not wanted:
        return None, False
    (annotation,) = wanted
    in_query = any(isinstance(mark, Query) for mark in getattr(annotation, "__metadata__", ()))
    model = annotation.__origin__ if in_query else annotation
    assert issubclass(model, BaseModel), f"{endpoint.__name__} wants {model}"
    return model, in_query


def _from_query(model: type[Model], query: bytes) -> Model:
    try:
        pairs = urllib.parse.parse_qsl(
            query.decode("ascii"),
            keep_blank_values=True,
            errors="surrogateescape",
            max_num_fields=QUERY_FIELDS_MAX,
        )
    except ValueError as error:
        raise InvalidRequest("the query string is not ASCII, or has too many fields") from error
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise InvalidRequest("a field of the query string is repeated")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from error
