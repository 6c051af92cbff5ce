"""Wakes the sleeping members of a group: "a member waits in the agreement of step k"."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc

from serving.link.channel_options import channel_options
from serving.link.epoch import Member
from serving.proto import shard_pb2, shard_pb2_grpc

logger = logging.getLogger(__name__)

RING_TIMEOUT_S = 10.0


class PeerRinger:
    """Persistent channels from one member to all others of its epoch."""

    def __init__(self, members: Sequence[Member], epoch_number: int, my_rank: int,
                 timeout_s: float = RING_TIMEOUT_S) -> None:
        self._epoch_number = epoch_number
        self._timeout_s = timeout_s
        self._channels = {member.shard_id: grpc.aio.insecure_channel(member.link_address, options=channel_options())
                          for rank, member in enumerate(members) if rank != my_rank}
        self._stubs = {shard_id: shard_pb2_grpc.ShardLinkStub(channel) for shard_id, channel in self._channels.items()}

    def connect(self) -> None:
        """Open the connections now, so that the first ring does not wait for them."""
        for channel in self._channels.values():
            channel.get_state(try_to_connect=True)

    async def ring_peers(self, step_index: int) -> None:
        """Ring everybody at once. A peer that cannot be reached is logged: the collective's own timeout judges it."""
        ends = await asyncio.gather(*(self._ring(stub, step_index) for stub in self._stubs.values()),
                                    return_exceptions=True)
        for shard_id, error in zip(self._stubs, ends, strict=True):
            if error is not None:
                logger.warning("ring_failed shard_id=%s epoch=%d step=%d error=%s", shard_id, self._epoch_number,
                               step_index, _reason(error))

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def _ring(self, stub: shard_pb2_grpc.ShardLinkStub, step_index: int) -> None:
        # wait_for_ready: a connection still being made must not lose the ring.
        await stub.Ring(shard_pb2.RingRequest(epoch_number=self._epoch_number, step_index=step_index),
                        timeout=self._timeout_s, wait_for_ready=True)


def _reason(error: BaseException) -> str:
    return f"{error.code()} {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else repr(error)
