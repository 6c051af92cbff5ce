"""The HTTP door: the paths of all its APIs, and which error shape each has.

The app needs no lifespan events, so that Ray Serve can mount one made inside a replica.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.batches.stores import BatchStores
from serving.config import RouterConfig
from serving.ingress.body_bounds import body_bounds
from serving.ingress.caller import choose_request_id
from serving.ingress.http.anthropic_paths import AnthropicPaths
from serving.ingress.http.batches_paths import BatchesPaths
from serving.ingress.http.door import Door, RateHeaders
from serving.ingress.http.errors import anthropic_error, openai_error
from serving.ingress.http.files_paths import FilesPaths
from serving.ingress.http.openai_paths import OpenAIPaths
from serving.ingress.http.own_paths import OwnPaths, RenderMetrics, WhyNotReady
from serving.ingress.http.request import PlainPaths
from serving.ingress.http.responses_paths import ResponsesPaths
from serving.ingress.http.ui.live_feed import LiveFeed
from serving.ingress.http.ui_paths import UiPaths
from serving.ingress.responses.store import MemoryStore, ResponseStore
from serving.ingress.usage import UsageEndpoint
from serving.router.generation import Service
from serving.tenants.key import Key
from serving.tenants.key_ring import KeyRing
from serving.tenants.rate_headers import EXPOSED
from serving.text.tokenizer import Tokenizer

_EXPOSED = ["x-request-id", "request-id", "retry-after", *EXPOSED]


def _shards_are_missing() -> str:
    return "no shards are serving yet"


def no_rates(key: Key) -> dict[str, str]:
    return {}


@dataclass(frozen=True, slots=True)
class HttpParts:
    """What the door of a router may have beside a service."""

    why_not_ready: WhyNotReady = _shards_are_missing    # what /health says while it answers 503
    keys: KeyRing | None = None                 # None: everybody may ask
    rates: RateHeaders = no_rates               # headers that say how much of its rates a key has left
    responses: ResponseStore | None = None      # None: they are kept in memory
    live: LiveFeed | None = None                # what the page at /ui follows; None: there is no page
    stores: BatchStores | None = None           # None: there are no files and batches
    usage: UsageEndpoint | None = None          # None: none is counted


def build_http_app(service: Service, tokenizer: Tokenizer, config: RouterConfig, render_metrics: RenderMetrics,
                   route_prefix: str = "/", parts: HttpParts = HttpParts()) -> Starlette:
    """Return the ASGI app of one router replica."""
    door = Door(parts.keys, body_bounds(max(card.max_model_len for card in service.cards)), parts.rates)
    routes = [*OpenAIPaths(door, service, tokenizer, config.tool_parser).routes(),
              *AnthropicPaths(door, service, tokenizer, config.tool_parser).routes(),
              *ResponsesPaths(door, service, tokenizer, config.tool_parser, parts.responses or MemoryStore()).routes(),
              *FilesPaths(door, parts.stores).routes(), *BatchesPaths(door, parts.stores).routes(),
              *OwnPaths(door, service, tokenizer, render_metrics, parts.why_not_ready, parts.usage).routes(),
              *(UiPaths(door, parts.live).routes() if parts.live else ())]
    middleware = [Middleware(PlainPaths, prefix=route_prefix)]
    if config.cors_origins:
        middleware.insert(0, Middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"], expose_headers=_EXPOSED))
    app = Starlette(routes=routes, middleware=middleware,
                    exception_handlers={HTTPException: _RoutingErrors(routes).answer})
    app.router.redirect_slashes = False
    return app


class _RoutingErrors:
    """Says what there is: the exceptions of Starlette's routes have a status and no more."""

    def __init__(self, routes: list[Route]) -> None:
        self._paths = ", ".join(dict.fromkeys(route.path for route in routes if "{" not in route.path))

    async def answer(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            detail = f"there is nothing at {request.url.path}. Ask one of {self._paths}"
        else:
            allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))     # Starlette's is a set
            detail = f"{request.method} is not for {request.url.path}. Use {allowed}"
        request_id = choose_request_id(request.headers.get("x-request-id"))
        write_error = anthropic_error if request.url.path.startswith("/v1/messages") else openai_error
        response = write_error(HTTPException(error.status_code, detail, error.headers), request_id)
        response.headers["x-request-id"] = request_id
        return response
