"""The router's end of the shard link: submissions and cancellations up, the shard's token events down.

A link is of this router and one shard process, through all epochs that both live to see. After a break it connects
again; what was submitted on the stream before is then nowhere, and nothing of it comes late.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeAlias

import grpc

from serving.engine.engine import ShardLoad
from serving.engine.request import Submission, TokenEvent
from serving.errors import InvalidRequestError, ShardFailedError
from serving.link.channel_options import Options, channel_options
from serving.link.epoch import Member
from serving.link.messages import decode_load, decode_updates, encode_submission, failed_event
from serving.link.security import PLAIN, LinkSecurity, proof_for
from serving.proto import shard_pb2, shard_pb2_grpc
from serving.supervision import first_end, owned_tasks

logger = logging.getLogger(__name__)

LinkCall: TypeAlias = grpc.aio.StreamStreamCall[shard_pb2.ToShard, shard_pb2.ToRouter]

CONNECT_TIMEOUT_S = 40.0        # longer than a shard lets a router wait for its engine
RETRY_MIN_S = 0.1
RETRY_MAX_S = 2.0
MAX_TOKENS_PER_MESSAGE = 65536  # prompts and journals; a longer one goes alone. No message takes long to make or read.


class LinkOwner(Protocol):
    """Is told what happens on a link; called on the event loop, must not block. After link_broken nothing of the
    sequences submitted before will come: the shard has cancelled them, or is gone."""

    def link_connected(self, link: ShardLinkClient) -> None: ...
    def link_events(self, link: ShardLinkClient, events: list[TokenEvent]) -> None: ...
    def link_broken(self, link: ShardLinkClient, error: ShardFailedError) -> None: ...


class SubmissionQueue:
    """Holds what waits to be written on one stream: all that has gathered since the last write goes in one message."""

    def __init__(self, shard_id: str, router_id: str, window: int, clock: Callable[[], float]) -> None:
        self._shard_id = shard_id
        self._router_id = router_id
        self._window = window
        self._clock = clock
        self._submissions: dict[str, Submission] = {}
        self._cancellations: list[str] = []
        self._refused: list[TokenEvent] = []
        self._num_handled = 0
        self._num_acknowledged = 0
        self._wakeup = asyncio.Event()

    def submit(self, submission: Submission) -> None:
        self._submissions[submission.request_id] = submission
        self._wakeup.set()

    def cancel(self, request_id: str) -> None:
        if self._submissions.pop(request_id, None) is None:     # else the shard never hears of it
            self._cancellations.append(request_id)
            self._wakeup.set()

    def handled(self, sequence: int) -> None:
        """Acknowledge; written alone only when a quarter of the window is due, else with the next message."""
        self._num_handled = max(self._num_handled, sequence)
        if self._num_handled - self._num_acknowledged >= max(1, self._window // 4):
            self._wakeup.set()

    async def messages(self) -> AsyncIterator[shard_pb2.ToShard]:
        """Yield what is to be written, the greeting first; ask for the next when the one before is on its way."""
        yield shard_pb2.ToShard(shard_id=self._shard_id, router_id=self._router_id, window=self._window)
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            yield self._take()

    def take_refused(self) -> list[TokenEvent]:
        """Return the ends of the submissions that could not be encoded since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def _take(self) -> shard_pb2.ToShard:
        cancellations, self._cancellations = self._cancellations, []
        self._num_acknowledged = self._num_handled
        return shard_pb2.ToShard(submissions=self._take_submissions(), cancellations=cancellations,
                                 acknowledged_sequence=self._num_acknowledged)

    def _take_submissions(self) -> list[shard_pb2.Submission]:
        """Encode as many as one message should have, in order. One that cannot be encoded fails alone."""
        encoded: list[shard_pb2.Submission] = []
        num_tokens, now_s = 0, self._clock()
        while self._submissions:
            submission = next(iter(self._submissions.values()))
            num_tokens += len(submission.prompt_token_ids) + len(submission.journal_token_ids)
            if encoded and num_tokens > MAX_TOKENS_PER_MESSAGE:
                self._wakeup.set()
                break
            del self._submissions[submission.request_id]
            try:
                encoded.append(encode_submission(submission, now_s))
            except Exception as error:      # protobuf's own: TypeError, ValueError, OverflowError
                logger.exception("submission_not_encoded request_id=%s", submission.request_id)
                self._refused.append(failed_event(submission.request_id, InvalidRequestError(
                    f"the request cannot be sent to a shard: {error}", fix="use values that the API allows")))
        return encoded


class ShardLinkClient:
    """One router's link to one shard. Connects again after a break until close()."""

    def __init__(self, member: Member, new_queue: Callable[[], SubmissionQueue], owner: LinkOwner,
                 options: Options | None = None, connect_timeout_s: float = CONNECT_TIMEOUT_S,
                 security: LinkSecurity = PLAIN) -> None:
        """`new_queue` makes the queue of one stream."""
        self.member = member
        self.load: ShardLoad | None = None      # as of the last message; None before the first
        self._new_queue = new_queue
        self._owner = owner
        self._options = channel_options() if options is None else options
        self._connect_timeout_s = connect_timeout_s
        self._security = security
        self._queue: SubmissionQueue | None = None      # while connected
        self._task: asyncio.Task[None] | None = None
        self._restart_timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def is_connected(self) -> bool:
        return self._queue is not None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"shard-link-{self.member.shard_id}")
        self._task.add_done_callback(self._ended)

    async def close(self) -> None:
        """End the stream; the shard cancels what is open on it. The owner is not told."""
        self._is_closed, self._queue = True, None
        if self._restart_timer is not None:
            self._restart_timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Start again: nothing but close() may end a link, whatever was raised."""
        if self._is_closed:
            return
        error = None if task.cancelled() else task.exception()
        logger.error("shard_link_ended shard_id=%s error=%r", self.member.shard_id, error or "cancelled",
                     exc_info=error)
        self._restart_timer = task.get_loop().call_later(RETRY_MIN_S, self.start)
        self._break("the link's task ended")

    def submit(self, submission: Submission) -> None:
        """Raises ShardFailedError when the link is not connected."""
        if self._queue is None:
            raise ShardFailedError(f"shard {self.member.shard_id} is not connected", fix="send the request again")
        self._queue.submit(submission)

    def cancel(self, request_id: str) -> None:
        """Take a sequence out of the shard. Nothing to do without a connection: its end has cancelled all."""
        if self._queue is not None:
            self._queue.cancel(request_id)

    async def _run(self) -> None:
        retry_s = RETRY_MIN_S
        while True:
            try:
                # A channel for each stream: a certificate that was renewed is shown by the next one.
                async with self._security.channel(self.member.link_address, self._options) as channel:
                    why = await self._run_stream(channel)
            except grpc.aio.AioRpcError as error:
                why = error.details() or str(error.code())
            except TimeoutError:
                why = f"no answer within {self._connect_timeout_s:g} s"
            except Exception as error:      # a fault of ours: the sequences of this link must still be continued
                logger.exception("shard_link_failed shard_id=%s", self.member.shard_id)
                why = f"a message could not be handled: {error!r}"
            retry_s = RETRY_MIN_S if self.is_connected else min(RETRY_MAX_S, retry_s * 2)
            self._break(why)
            await asyncio.sleep(retry_s)        # a back-off after a failure, not a poll

    async def _run_stream(self, channel: grpc.aio.Channel) -> str:
        """Run one stream from greeting to end, and return why it ended.

        Raises what its reader or writer raised: AioRpcError, TimeoutError, TaskEndedError or a fault of ours.
        """
        queue = self._new_queue()
        call = shard_pb2_grpc.ShardLinkStub(channel).Connect(
            wait_for_ready=True, metadata=proof_for(self.member.endpoint))
        try:
            async with owned_tasks(reader=self._receive(call, queue), writer=self._send(call, queue)) as tasks:
                await first_end(tasks.values())
        finally:
            call.cancel()
        return "the shard closed the stream"

    async def _receive(self, call: LinkCall, queue: SubmissionQueue) -> None:
        """Read until the shard closes the stream."""
        async with asyncio.timeout(self._connect_timeout_s):
            greeting = await call.read()
        if greeting is grpc.aio.EOF:
            return
        self.load = decode_load(greeting.load)
        self._queue = queue
        logger.info("shard_connected shard_id=%s", self.member.shard_id)
        self._owner.link_connected(self)
        while (message := await call.read()) is not grpc.aio.EOF:
            self.load = decode_load(message.load)
            self._owner.link_events(self, decode_updates(message))
            queue.handled(message.sequence)

    async def _send(self, call: LinkCall, queue: SubmissionQueue) -> None:
        """Write what gathers. In a task of ours: of an error in its own iterator of requests, gRPC tells nobody."""
        async for message in queue.messages():
            if refused := queue.take_refused():
                self._owner.link_events(self, refused)
            await call.write(message)

    def _break(self, why: str) -> None:
        was_connected, self._queue = self._queue is not None, None
        if was_connected:
            logger.warning("shard_disconnected shard_id=%s why=%s", self.member.shard_id, why)
            self._owner.link_broken(self, ShardFailedError(
                f"the link to shard {self.member.shard_id} on {self.member.node_name} broke: {why}",
                fix="send the request again; `moesaic status` shows the shards"))
        else:
            logger.info("shard_connect_failed shard_id=%s why=%s", self.member.shard_id, why)
