"""The shard's end of the shard link: routers' streams in, the engine's events out.

A process has one server for its whole life, and its engine takes what routers send from the moment that there is one,
also between two epochs. The end of a stream, however it comes, takes the router's sequences out of the engine; nothing
that was sent on it is heard after that, so a late message needs no number to be harmless.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from model.transport.address import EndpointAddress
from serving.engine.engine import ShardLoad
from serving.engine.request import Submission, TokenEvent
from serving.errors import ServingError, ShardFailedError
from serving.link.block_sender import BlockSender
from serving.link.channel_options import Options, server_options
from serving.link.messages import decode_submission, encode_load, encode_updates, failed_event
from serving.link.outbox import Outbox, OutboxClosedError
from serving.link.received import MAX_ID_CHARACTERS, check_submission
from serving.link.security import PLAIN, LinkSecurity, ProofInterceptor
from serving.proto import shard_pb2, shard_pb2_grpc

logger = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext

ENGINE_WAIT_S = 30.0        # of routers: a shard that loads has no engine yet
FIRST_MESSAGE_WAIT_S = 10.0
LOAD_REFRESH_S = 0.5        # routers without sequences in a working shard learn its load so often


class LinkedEngine(Protocol):
    """Takes what routers send: the part of `serving.engine.engine.Engine` that the link needs."""

    def submit(self, router_id: str, submission: Submission) -> None: ...
    def cancel(self, router_id: str, request_id: str) -> None: ...
    def disconnect(self, router_id: str) -> None: ...
    def hold(self, router_id: str, held: bool) -> None: ...
    def ring(self, epoch_number: int, step_index: int) -> None: ...
    def load(self) -> ShardLoad: ...


class RouterStream:
    """One connected router."""

    def __init__(self, router_id: str, engine: LinkedEngine, num_embeddings: int, window: int) -> None:
        self.router_id = router_id
        self.engine = engine
        self._num_embeddings = num_embeddings
        self.is_over = False        # its sequences are out of the engine; what still comes on it is not for them
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
                before = self._last_submission
                received = decode_submission(submission, now_s, before)
                check_submission(received, self._num_embeddings, before)
                self._last_submission = received
                self.engine.submit(self.router_id, received)
            except ServingError as error:
                self.outbox.deliver((failed_event(submission.request_id, error),))
            except Exception as error:      # a fault of ours in one request must not end the stream of all
                logger.exception("submission_failed request_id=%s", submission.request_id)
                self.outbox.deliver((failed_event(submission.request_id, ShardFailedError(
                    f"the shard could not take the request up: {error!r:.200}", fix="send it again")),))
        for request_id in message.cancellations:
            self.engine.cancel(self.router_id, request_id)


class ShardLinkServer:
    """The gRPC servicer. `deliver` is what the engine calls after each step."""

    def __init__(self, shard_id: str, clock: Callable[[], float], engine_wait_s: float = ENGINE_WAIT_S) -> None:
        self._shard_id = shard_id
        self._clock = clock
        self._engine_wait_s = engine_wait_s
        self._engine: LinkedEngine | None = None
        self._num_embeddings = 0            # of the engine's model
        self._engine_came = asyncio.Event()
        self._streams: dict[str, RouterStream] = {}         # by router id; the current one of each
        self._load_timer: asyncio.TimerHandle | None = None

    def serve(self, engine: LinkedEngine, num_embeddings: int) -> None:
        """Give `engine` what routers send, until stop(). It may go through any number of epochs meanwhile. Token ids
        are below `num_embeddings`."""
        self.stop("the shard's engine was made anew")
        self._engine, self._num_embeddings = engine, num_embeddings
        self._engine_came.set()

    def stop(self, why: str) -> None:
        """End all streams, which cancels their sequences. Routers that come wait for the next serve()."""
        for stream in list(self._streams.values()):
            self._drop(stream, why)
        self._engine = None
        self._engine_came.clear()
        if self._load_timer is not None:
            self._load_timer.cancel()
            self._load_timer = None

    def deliver(self, router_id: str, step_index: int, events: list[TokenEvent]) -> None:
        """Hand one step's events to their router; dropped when it is gone, for its sequences are cancelled already."""
        stream = self._streams.get(router_id)
        if stream is not None:
            stream.outbox.deliver(events)
        if self._load_timer is None and self._streams:
            self._load_timer = asyncio.get_running_loop().call_later(LOAD_REFRESH_S, self._refresh_loads)

    async def Connect(self, requests: AsyncIterator[shard_pb2.ToShard], context: Context) -> None:
        """Serve one router's stream, from its first message to its end."""
        try:
            async with asyncio.timeout(FIRST_MESSAGE_WAIT_S):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration, DecodeError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the stream began without a message: {error!r}")
        if not 0 < len(first.router_id) <= MAX_ID_CHARACTERS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the stream began without a router's id, or with one "
                                f"of more than {MAX_ID_CHARACTERS} characters")
        stream = self._register(first, await self._engine_for(first.shard_id, context))
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
        """Pass on that a peer waits in an agreement; the engine knows whether of the epoch that it is in.

        A peer rings from agreement 1 of an epoch on. It has been through agreement 0 then, and so has the engine here:
        no ring of an epoch can come before the epoch.
        """
        if self._engine is not None:
            self._engine.ring(request.epoch_number, request.step_index)
        return shard_pb2.RingReply()

    async def _engine_for(self, shard_id: str, context: Context) -> LinkedEngine:
        """Wait until there is an engine; ends the call when another shard is meant, or none comes."""
        if shard_id != self._shard_id:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION,
                                f"shard {shard_id} is not here any more; shard {self._shard_id} has taken its port")
        try:
            async with asyncio.timeout(self._engine_wait_s):
                while self._engine is None:
                    await self._engine_came.wait()
        except TimeoutError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"shard {shard_id} has no engine yet, it still loads")
        assert self._engine is not None, "abort raises"
        return self._engine

    def _register(self, first: shard_pb2.ToShard, engine: LinkedEngine) -> RouterStream:
        before = self._streams.get(first.router_id)
        if before is not None:      # its end was not noticed yet; the router has given that stream up
            self._drop(before, "the router connected again")
        stream = RouterStream(first.router_id, engine, self._num_embeddings, first.window)
        self._streams[first.router_id] = stream
        engine.hold(first.router_id, False)
        logger.info("router_connected router_id=%s", first.router_id)
        return stream

    def _drop(self, stream: RouterStream, why: str) -> None:
        """Take a stream's sequences out of the engine and end its writer; once for each stream."""
        if stream.is_over:
            return
        stream.is_over = True
        del self._streams[stream.router_id]
        stream.outbox.close(why)
        stream.engine.disconnect(stream.router_id)
        logger.info("router_disconnected router_id=%s why=%s", stream.router_id, why)

    async def _read(self, stream: RouterStream, requests: AsyncIterator[shard_pb2.ToShard]) -> None:
        why = "the router closed the stream"
        try:
            async for message in requests:
                if stream.is_over:      # given up meanwhile: these submissions would go to the stream after it
                    break
                stream.handle(message, self._clock())
        except grpc.aio.BaseError as error:     # the call ended while we were reading
            why = f"the stream broke: {error}"
        except Exception as error:
            logger.exception("router_stream_failed router_id=%s", stream.router_id)
            why = f"the shard could not handle a message: {error}"
        finally:
            self._drop(stream, why)

    async def _write(self, stream: RouterStream, context: Context) -> None:
        while True:
            outgoing = await stream.outbox.take()
            message = shard_pb2.ToRouter(sequence=outgoing.sequence, load=encode_load(stream.engine.load()))
            encode_updates(message, outgoing.events)
            await context.write(message)

    def _refresh_loads(self) -> None:
        self._load_timer = None
        for stream in self._streams.values():
            stream.outbox.refresh()


async def start_link_server(servicer: ShardLinkServer, address: str,
                            options: Options | None = None, blocks: BlockSender | None = None,
                            own: EndpointAddress | None = None,
                            security: LinkSecurity = PLAIN) -> tuple[grpc.aio.Server, int]:
    """Serve the link, and blocks for other members, at `address` (host:port, port 0 for any), to those who know the
    token of `own`. Returns the server and its port; OSError when taken."""
    server = grpc.aio.server(options=server_options() if options is None else options,
                             interceptors=[ProofInterceptor(own)] if own else [])
    shard_pb2_grpc.add_ShardLinkServicer_to_server(servicer, server)
    if blocks is not None:
        shard_pb2_grpc.add_BlockLinkServicer_to_server(blocks, server)
    port = security.add_port(server, address)
    await server.start()
    return server, port
