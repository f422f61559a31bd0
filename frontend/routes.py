"""The route table's type and its lookup: a path and a method to a handler and who may call it."""

from __future__ import annotations

import enum
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from penstock.frontend.context import Context
from penstock.frontend.exchange import Exchange
from penstock.protos.errors import ApiError

Handler = Callable[[Exchange, Context], Awaitable[None]]
_SLASHES = re.compile(r"/{2,}")


class Access(enum.Enum):
    OPEN = "open"  # for probes and scrapers: no key
    KEY = "key"  # a key, when keys are set


@dataclass(frozen=True, slots=True)
class Route:
    """path: without /v1 (each is served with and without it). A path that ends in /* takes the rest of the
    path as an argument, slashes included."""

    path: str
    access: Access
    handlers: Mapping[str, Handler]

    def handler(self, method: str) -> Handler:
        """Raises ApiError("method_not_allowed")."""
        found = self.handlers.get("GET" if method == "HEAD" else method)
        if found is None:
            raise ApiError("method_not_allowed", f"This URL does not take the method {method[:16]}.")
        return found

    def allowed(self) -> list[str]:
        methods = {*self.handlers, "OPTIONS"} | ({"HEAD"} if "GET" in self.handlers else set())
        return sorted(methods)


@dataclass(frozen=True, slots=True)
class Match:
    route: Route
    rest: str  # what /* stands for


class RouteTable:
    def __init__(self, routes: Iterable[Route], root_path: str = "") -> None:
        """root_path: a prefix that a proxy may have left on the path."""
        self.routes = tuple(routes)
        self._root_path = root_path
        self._exact = {route.path: route for route in self.routes if not route.path.endswith("/*")}
        self._open_ended = [(route.path[:-1], route) for route in self.routes if route.path.endswith("/*")]

    def find(self, path: str) -> Match | None:
        """path: percent-decoded. Doubled and trailing slashes do not matter."""
        path = self.canonical(path)
        route = self._exact.get(path)
        if route is not None:
            return Match(route, "")
        for prefix, open_ended in self._open_ended:
            if path.startswith(prefix) and len(path) > len(prefix):
                return Match(open_ended, path[len(prefix) :])
        return None

    def canonical(self, path: str) -> str:
        path = _SLASHES.sub("/", path)
        if self._root_path and (path + "/").startswith(self._root_path + "/"):
            path = path[len(self._root_path) :]
        if (path + "/").startswith("/v1/"):
            path = path[3:]
        return path.rstrip("/") or "/"
