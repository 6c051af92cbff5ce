"""Server-sent events. As OpenAI's chats have them: each payload one `data:` line; `data: [DONE]` ends a stream that did
not fail. With `has_names` payloads are whole events, with names, of which one ends the stream. Where nothing comes for
long a stream sends comments, so that proxies and clients do not take the connection for dead.

Our own door offers an extension of ASGI, WRITE_NOW: its `write` writes a piece of a started body at once, or returns
False when it cannot. It spares each event the coroutines that Starlette and uvicorn put around a send.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.errors import ClientGoneError
from serving.ingress.http.request import until_disconnect
from serving.supervision import owned_tasks

logger = logging.getLogger(__name__)

WRITE_NOW = "moesaic.write_now"
SILENCE_S = 15.0                    # a comment goes out after 15 to 30 s in which nothing did
_COMMENT = b": waiting\n\n"


class EventStream(Response):
    """An error before the first payload becomes an ordinary answer with its own status, a later one an event.

    Starlette's StreamingResponse may notice a client that left only when it next sends; this one does at once.
    """

    def __init__(self, payloads: AsyncGenerator[bytes], answer_error: Callable[[Exception], Response],
                 has_names: bool = False) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._payloads = payloads
        self.late_headers: Callable[[], dict[str, str]] = dict      # asked when the first payload is there
        self._answer_error = answer_error
        self._frame = b"%b" if has_names else b"data: %b\n\n"
        self._end = b"" if has_names else b"data: [DONE]\n\n"
        self._has_started = False           # then an error can only be an event
        self._num_sent = 0
        self._error_frame = b"event: error\ndata: %b\n\n" if has_names else b"data: %b\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGoneError):      # nobody is left to be told
            await until_disconnect(receive, self._send_all(scope, receive, send))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure: Exception | None = None
        async with owned_tasks(comments=self._comment_on_silence(send)), aclosing(self._payloads) as payloads:
            try:
                await self._send_payloads(payloads, _writer(scope), send)
            except Exception as error:
                failure = error
        if failure is not None:
            answer = self._answer_error(failure)
            if not self._has_started:
                answer.headers.update(self.late_headers())
                await answer(scope, receive, send)
                return
            with suppress(OSError):     # the error may be that the client does not take anything any more
                await _send(send, self._error_frame % bytes(answer.body))
        with suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_payloads(self, payloads: AsyncGenerator[bytes], write_now: Callable[[bytes], bool], send: Send
                             ) -> None:
        async for payload in payloads:
            if not self._has_started:
                await self._start(send)
            self._num_sent += 1
            if not write_now(event := self._frame % payload):
                await _send(send, event)
        if not self._has_started:
            await self._start(send)
        await _send(send, self._end)

    async def _comment_on_silence(self, send: Send) -> None:
        """Send comments until cancelled. The first may start the answer: whoever waits for it hears nothing else."""
        with suppress(OSError):         # whoever sends the payloads learns of it
            while True:
                num_sent = self._num_sent
                await asyncio.sleep(SILENCE_S)
                if num_sent == self._num_sent:
                    if not self._has_started:
                        await self._start(send)
                    await _send(send, _COMMENT)

    async def _start(self, send: Send) -> None:
        self._has_started = True        # before the attempt: a wire that breaks in it takes no other answer
        self.headers.update(self.late_headers())
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})


def _writer(scope: Scope) -> Callable[[bytes], bool]:
    write: Callable[[bytes], bool] = scope.get("extensions", {}).get(WRITE_NOW, {}).get("write", lambda body: False)
    return write


async def _send(send: Send, event: bytes) -> None:
    await send({"type": "http.response.body", "body": event, "more_body": True})
