"""Server-sent events: each payload one `data:` line; `data: [DONE]` ends a stream that did not fail."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.errors import ClientGoneError
from serving.ingress.http_request import until_disconnect

logger = logging.getLogger(__name__)


class EventStream(Response):
    """An error before the first payload becomes an ordinary answer with its own status, a later one an event.

    Starlette's StreamingResponse may notice a client that left only when it next sends; this one does at once.
    """

    def __init__(self, payloads: AsyncGenerator[bytes], answer_error: Callable[[Exception], Response]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._payloads = payloads
        self._answer_error = answer_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGoneError):      # nobody is left to be told
            await until_disconnect(receive, self._send_all(scope, receive, send))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        async with aclosing(self._payloads) as payloads:
            try:
                async for payload in payloads:
                    if not started:
                        started = True      # before the attempt: a wire that breaks in it takes no other answer
                        await self._start(send)
                    await _send_event(send, payload)
                await _send_event(send, b"[DONE]")
            except Exception as error:
                answer = self._answer_error(error)
                if not started:
                    await answer(scope, receive, send)
                    return
                with suppress(OSError):     # the error may be that the client does not take anything any more
                    await _send_event(send, bytes(answer.body))
        with suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})


async def _send_event(send: Send, payload: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: %b\n\n" % payload, "more_body": True})
