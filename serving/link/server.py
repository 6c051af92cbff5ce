"""The shard's end of the shard link: routers' streams in, the engine's events out.

A process has one server for its whole life and opens it for one epoch after the other. The end of a stream, however it
comes, takes the router's sequences out of the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import NoReturn, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from serving.engine.engine import ShardLoad
from serving.engine.request import Submission, TokenEvent
from serving.errors import NotReadyError, ServingError, ShardFailedError
from serving.link.channel_options import server_options
from serving.link.messages import decode_submission, encode_load, encode_updates, failed_event
from serving.link.outbox import Outbox, OutboxClosedError
from serving.proto import shard_pb2, shard_pb2_grpc

logger = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext

EPOCH_WAIT_S = 30.0         # a router may hear of an epoch before its shard has built the group
FIRST_MESSAGE_WAIT_S = 10.0
LOAD_REFRESH_S = 0.5        # routers without sequences in a working shard learn its load so often


class LinkedEngine(Protocol):
    """Takes what routers send: the part of `serving.engine.engine.Engine` that the link needs."""

    def submit(self, router_id: str, submission: Submission) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def disconnect(self, router_id: str) -> None: ...
    def hold(self, router_id: str, held: bool) -> None: ...
    def ring(self, epoch_number: int, step_index: int) -> None: ...
    def load(self) -> ShardLoad: ...


class RouterStream:
    """One connected router."""

    def __init__(self, router_id: str, epoch_number: int, engine: LinkedEngine, window: int) -> None:
        self.router_id = router_id
        self.epoch_number = epoch_number
        self.engine = engine
        self.outbox = Outbox(window, self._hold)
        self._last_submission: Submission | None = None

    def _hold(self, held: bool) -> None:
        logger.info("router_held router_id=%s held=%s", self.router_id, held)
        self.engine.hold(self.router_id, held)

    def handle(self, message: shard_pb2.ToShard, now_s: float) -> None:
        """Do what a router's message says. A submission that is refused ends with a FAILED event."""
        self.outbox.acknowledge(message.acknowledged_sequence)
        for submission in message.submissions:
            try:
                self._last_submission = decode_submission(submission, now_s, self._last_submission)
                self.engine.submit(self.router_id, self._last_submission)
            except ServingError as error:
                self.outbox.deliver(0, (failed_event(submission.request_id, error),))
            except Exception as error:      # a fault of ours in one request must not end the stream of all
                logger.exception("submission_failed request_id=%s", submission.request_id)
                self.outbox.deliver(0, (failed_event(submission.request_id, ShardFailedError(
                    f"the shard could not take the request up: {error!r:.200}", fix="send it again")),))
        for request_id in message.cancellations:
            self.engine.cancel(request_id)


class ShardLinkServer:
    """The gRPC servicer. `deliver` is what the engine calls after each step."""

    def __init__(self, clock: Callable[[], float], epoch_wait_s: float = EPOCH_WAIT_S) -> None:
        self._clock = clock
        self._epoch_wait_s = epoch_wait_s
        self._epoch_number = 0
        self._engine: LinkedEngine | None = None
        self._epoch_changed = asyncio.Event()
        self._streams: dict[str, RouterStream] = {}
        self._early_rings: dict[int, int] = {}      # epochs that are still to come here -> highest step rung for
        self._load_timer: asyncio.TimerHandle | None = None

    def open_epoch(self, epoch_number: int, engine: LinkedEngine) -> None:
        """Serve routers of epoch `epoch_number` with `engine`; streams of the epoch before end."""
        self.close_epoch(f"epoch {epoch_number} begins")
        self._epoch_number, self._engine = epoch_number, engine
        self._announce()
        step_index = self._early_rings.get(epoch_number)
        self._early_rings = {later: step for later, step in self._early_rings.items() if later > epoch_number}
        if step_index is not None:
            engine.ring(epoch_number, step_index)

    def close_epoch(self, why: str) -> None:
        """End all streams, which cancels their sequences; routers of this epoch are refused until another opens."""
        for stream in list(self._streams.values()):
            self._drop(stream, why)
        self._engine = None
        if self._load_timer is not None:
            self._load_timer.cancel()
            self._load_timer = None

    def deliver(self, router_id: str, step_index: int, events: list[TokenEvent]) -> None:
        """Hand one step's events to their router; dropped when it is gone, for its sequences are cancelled already."""
        stream = self._streams.get(router_id)
        if stream is not None:
            stream.outbox.deliver(step_index, events)
        if self._load_timer is None and self._streams:
            self._load_timer = asyncio.get_running_loop().call_later(LOAD_REFRESH_S, self._refresh_loads)

    async def Connect(self, requests: AsyncIterator[shard_pb2.ToShard], context: Context) -> None:
        """Serve one router's stream, from its first message to its end."""
        try:
            async with asyncio.timeout(FIRST_MESSAGE_WAIT_S):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration, DecodeError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the stream began without a message: {error!r}")
        engine = await self._engine_of(first.epoch_number, context)
        stream = self._register(first, engine)
        reader = asyncio.create_task(self._read(stream, requests))
        try:
            stream.handle(first, self._clock())
            await self._write(stream, context)
        except OutboxClosedError as closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(closed))
        except BaseException as error:  # of what is no Exception, as a cancellation, gRPC tells the router nothing
            if not context.done():
                logger.warning("router_writer_ended router_id=%s error=%r", stream.router_id, error)
                await context.abort(grpc.StatusCode.UNAVAILABLE, f"the shard's writer ended: {error!r:.200}")
            raise
        finally:
            reader.cancel()
            self._drop(stream, "the stream ended")
            await asyncio.wait([reader])        # it has told by dropping the stream whatever ended it

    async def Ring(self, request: shard_pb2.RingRequest, context: Context) -> shard_pb2.RingReply:
        """Pass on that a peer waits in an agreement. A ring of an epoch that has yet to open here is kept for it."""
        if self._engine is not None and request.epoch_number == self._epoch_number:
            self._engine.ring(request.epoch_number, request.step_index)
        elif request.epoch_number > self._epoch_number:
            earlier = self._early_rings.get(request.epoch_number, 0)
            self._early_rings[request.epoch_number] = max(request.step_index, earlier)
        else:
            await self._refuse_epoch(request.epoch_number, context)
        return shard_pb2.RingReply()

    async def _engine_of(self, epoch_number: int, context: Context) -> LinkedEngine:
        """Wait until that epoch runs here; ends the call when it is over or does not come."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._epoch_wait_s):
                while epoch_number > self._epoch_number:
                    await self._epoch_changed.wait()
        if epoch_number != self._epoch_number or self._engine is None:
            await self._refuse_epoch(epoch_number, context)
        return self._engine

    async def _refuse_epoch(self, epoch_number: int, context: Context) -> NoReturn:
        error = NotReadyError(f"epoch {epoch_number} does not run here; the latest is {self._epoch_number}"
                              f"{'' if self._engine else ', and it has ended'}", fix="wait for the next epoch")
        is_over = epoch_number <= self._epoch_number
        code = grpc.StatusCode.FAILED_PRECONDITION if is_over else grpc.StatusCode.UNAVAILABLE
        await context.abort(code, str(error))
        raise AssertionError("abort raises")

    def _register(self, first: shard_pb2.ToShard, engine: LinkedEngine) -> RouterStream:
        before = self._streams.get(first.router_id)
        if before is not None:      # its end was not noticed yet; the router has given that stream up
            self._drop(before, "the router connected again")
        stream = RouterStream(first.router_id, first.epoch_number, engine, first.window)
        self._streams[first.router_id] = stream
        engine.hold(first.router_id, False)
        logger.info("router_connected router_id=%s epoch=%d", first.router_id, first.epoch_number)
        return stream

    def _drop(self, stream: RouterStream, why: str) -> None:
        """Take a stream's sequences out of the engine and end its writer; once for each stream."""
        if self._streams.get(stream.router_id) is not stream:
            return
        del self._streams[stream.router_id]
        stream.outbox.close(why)
        stream.engine.disconnect(stream.router_id)
        logger.info("router_disconnected router_id=%s epoch=%d why=%s", stream.router_id, stream.epoch_number, why)

    async def _read(self, stream: RouterStream, requests: AsyncIterator[shard_pb2.ToShard]) -> None:
        why = "the router closed the stream"
        try:
            async for message in requests:
                if message.epoch_number != stream.epoch_number:
                    why = f"a message of epoch {message.epoch_number} came on a stream of epoch {stream.epoch_number}"
                    break
                stream.handle(message, self._clock())
        except grpc.aio.BaseError as error:     # the call ended while we were reading
            why = f"the stream broke: {error}"
        except Exception as error:
            logger.exception("router_stream_failed router_id=%s epoch=%d", stream.router_id, stream.epoch_number)
            why = f"the shard could not handle a message: {error}"
        finally:
            self._drop(stream, why)

    async def _write(self, stream: RouterStream, context: Context) -> None:
        while True:
            outgoing = await stream.outbox.take()
            await context.write(shard_pb2.ToRouter(
                epoch_number=stream.epoch_number, step_index=outgoing.step_index, sequence=outgoing.sequence,
                updates=encode_updates(outgoing.events), load=encode_load(stream.engine.load())))

    def _refresh_loads(self) -> None:
        self._load_timer = None
        for stream in self._streams.values():
            stream.outbox.refresh()

    def _announce(self) -> None:
        self._epoch_changed.set()
        self._epoch_changed = asyncio.Event()


async def start_link_server(servicer: ShardLinkServer, address: str) -> tuple[grpc.aio.Server, int]:
    """Serve the link at `address` (host:port, port 0 for any). Returns the server and its port; OSError when taken."""
    server = grpc.aio.server(options=server_options())
    shard_pb2_grpc.add_ShardLinkServicer_to_server(servicer, server)
    port = server.add_insecure_port(address)
    await server.start()
    return server, port
