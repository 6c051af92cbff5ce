"""The router's end of the shard link: submissions and cancellations up, the shard's token events down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol

import grpc

from serving.engine.engine import ShardLoad
from serving.engine.request import Submission, TokenEvent
from serving.errors import ShardFailedError
from serving.link.channel_options import Options, channel_options
from serving.link.epoch import Member
from serving.link.messages import decode_event, decode_load, encode_submission
from serving.proto import shard_pb2, shard_pb2_grpc

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 40.0        # longer than a shard lets a router wait for an epoch that is still to come
RETRY_MIN_S = 0.1
RETRY_MAX_S = 2.0


class LinkOwner(Protocol):
    """What a link tells its owner; called on the event loop, must not block. After link_broken nothing of the sequences
    submitted before will come: the shard has cancelled them, or is gone."""

    def link_connected(self, link: ShardLinkClient) -> None: ...
    def link_events(self, link: ShardLinkClient, events: list[TokenEvent]) -> None: ...
    def link_broken(self, link: ShardLinkClient, error: ShardFailedError) -> None: ...


class SubmissionQueue:
    """Holds what waits to be written to the shard: all that has gathered since the last write goes in one message."""

    def __init__(self, epoch_number: int, router_id: str, window: int, clock: Callable[[], float]) -> None:
        self._epoch_number = epoch_number
        self._router_id = router_id
        self._window = window
        self._clock = clock
        self._submissions: dict[str, Submission] = {}
        self._cancellations: list[str] = []
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
        """The stream's requests, as gRPC writes them: the next is asked for when the one before is on its way."""
        yield shard_pb2.ToShard(epoch=self._epoch_number, router_id=self._router_id, window=self._window)
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            yield self._take()

    def _take(self) -> shard_pb2.ToShard:
        submissions, self._submissions = self._submissions, {}
        cancellations, self._cancellations = self._cancellations, []
        self._num_acknowledged = self._num_handled
        now_s = self._clock()
        return shard_pb2.ToShard(
            epoch=self._epoch_number, submissions=[encode_submission(entry, now_s) for entry in submissions.values()],
            cancellations=cancellations, acknowledged_sequence=self._num_acknowledged)


class ShardLinkClient:
    """One router's link to one member of one epoch. Connects again after a break until the epoch ends or close()."""

    def __init__(self, member: Member, new_queue: Callable[[], SubmissionQueue], epoch_number: int, owner: LinkOwner,
                 options: Options | None = None, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """`new_queue` makes the queue of one stream."""
        self.member = member
        self.epoch_number = epoch_number
        self.load: ShardLoad | None = None      # as of the last message; None before the first
        self._new_queue = new_queue
        self._owner = owner
        self._options = channel_options() if options is None else options
        self._connect_timeout_s = connect_timeout_s
        self._queue: SubmissionQueue | None = None      # while connected
        self._task: asyncio.Task[None] | None = None

    @property
    def is_connected(self) -> bool:
        return self._queue is not None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"shard-link-{self.member.shard_id}")

    async def close(self) -> None:
        """End the stream; the shard cancels what is open on it. The owner is not told."""
        self._queue = None
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

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
        retry_s, is_over = RETRY_MIN_S, False
        async with grpc.aio.insecure_channel(self.member.link_address, options=self._options) as channel:
            while not is_over:
                try:
                    why = await self._run_stream(channel)
                except grpc.aio.AioRpcError as error:
                    why = error.details() or str(error.code())
                    is_over = error.code() is grpc.StatusCode.FAILED_PRECONDITION       # the epoch is
                except TimeoutError:
                    why = f"no answer within {self._connect_timeout_s:g} s"
                except Exception as error:      # a fault of ours: the sequences of this link must still be continued
                    logger.exception("shard_link_failed shard_id=%s epoch=%d", self.member.shard_id, self.epoch_number)
                    why = f"a message could not be handled: {error!r}"
                retry_s = RETRY_MIN_S if self.is_connected else min(RETRY_MAX_S, retry_s * 2)
                self._break(why)
                if not is_over:
                    await asyncio.sleep(retry_s)    # a back-off after a failure, not a poll

    async def _run_stream(self, channel: grpc.aio.Channel) -> str:
        """One stream from greeting to end -> why it ended. Raises AioRpcError or TimeoutError."""
        queue = self._new_queue()
        call = shard_pb2_grpc.ShardLinkStub(channel).Connect(queue.messages(), wait_for_ready=True)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                greeting = await call.read()
            if greeting is grpc.aio.EOF:
                return "the shard closed the stream at once"
            self.load = decode_load(greeting.load)
            self._queue = queue
            logger.info("shard_connected shard_id=%s epoch=%d", self.member.shard_id, self.epoch_number)
            self._owner.link_connected(self)
            await self._receive(call, queue)
        finally:
            call.cancel()
        return "the shard closed the stream"

    async def _receive(self, call: grpc.aio.StreamStreamCall[shard_pb2.ToShard, shard_pb2.ToRouter],
                       queue: SubmissionQueue) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            if message.epoch != self.epoch_number:
                logger.warning("late_message shard_id=%s epoch=%d", self.member.shard_id, message.epoch)
                continue
            self.load = decode_load(message.load)
            self._owner.link_events(self, [decode_event(update) for update in message.updates])
            queue.handled(message.sequence)

    def _break(self, why: str) -> None:
        was_connected, self._queue = self._queue is not None, None
        if was_connected:
            logger.warning("shard_disconnected shard_id=%s epoch=%d why=%s", self.member.shard_id, self.epoch_number,
                           why)
            self._owner.link_broken(self, ShardFailedError(
                f"the link to shard {self.member.shard_id} on {self.member.node_name} broke: {why}",
                fix="send the request again; `moesaic status` shows the shards"))
        else:
            logger.info("shard_connect_failed shard_id=%s epoch=%d why=%s", self.member.shard_id, self.epoch_number,
                        why)
