"""The paths of the live page: /ui, its two files, and the events that it follows.

The page holds nothing secret, so it needs no key; what it follows does. A browser's EventSource sends no key, so the
page reads the stream with fetch().
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from serving.ingress.caller import Caller
from serving.ingress.http.door import AnswerStyle, Door, Handler, stream_response
from serving.ingress.http.errors import openai_error
from serving.ingress.http.ui.live_feed import LiveFeed
from serving.tenants.key import Scope

_STYLE = AnswerStyle("", openai_error, has_names=True)
_HEADERS = {
    # Nothing from elsewhere, nothing inline, nobody's frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                               "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache"}


class UiPaths:
    def __init__(self, door: Door, feed: LiveFeed) -> None:
        self._door = door
        self._feed = feed

    def routes(self) -> list[Route]:
        route = self._door.route
        return [
            route("/ui", _page(), scope=None), route("/ui/ui.css", _file("ui.css", "text/css"), scope=None),
            route("/ui/ui.js", _file("ui.js", "text/javascript"), scope=None),
            route("/ui/events", self.events, scope=Scope.STATUS),
        ]

    async def events(self, request: Request, caller: Caller) -> Response:
        async def while_allowed() -> AsyncGenerator[bytes]:
            async with aclosing(self._feed.events()) as events:
                async for event in events:
                    self._door.check(request, Scope.STATUS)     # a key may be revoked while the page is open
                    yield event
        return stream_response(while_allowed(), caller, _STYLE)


def _page() -> Handler:
    answer = _file("index.html", "text/html")

    async def page(request: Request, caller: Caller) -> Response:
        """Answer below /ui/, whatever prefix stands before it: the page names its files relative to that."""
        if not request.scope.get("raw_path", b"/").endswith(b"/"):
            return RedirectResponse("ui/", headers=_HEADERS)
        return await answer(request, caller)
    return page


def _file(name: str, media_type: str) -> Handler:
    content = files("serving.ingress.http.ui").joinpath(name).read_bytes()

    async def answer(request: Request, caller: Caller) -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)
    return answer
