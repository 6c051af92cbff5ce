"""Wakes the sleeping members of a group: "a member waits in the agreement of step k"."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc

from serving.link.channel_options import channel_options
from serving.link.epoch import Member
from serving.link.security import PLAIN, LinkSecurity, proof_for
from serving.proto import shard_pb2, shard_pb2_grpc

logger = logging.getLogger(__name__)

RING_TIMEOUT_S = 10.0


class PeerRinger:
    """Persistent channels from one member to all others of its epoch."""

    def __init__(self, members: Sequence[Member], epoch_number: int, my_rank: int,
                 timeout_s: float = RING_TIMEOUT_S, security: LinkSecurity = PLAIN) -> None:
        self._peers = [member for rank, member in enumerate(members) if rank != my_rank]
        self._epoch_number = epoch_number
        self._timeout_s = timeout_s
        self._security = security
        self._before: list[grpc.aio.Channel] = []       # on which rings may still be under way
        self._open()

    def connect(self) -> None:
        """Open the connections now, so that the first ring does not wait for them."""
        for channel in self._channels.values():
            channel.get_state(try_to_connect=True)

    async def ring_peers(self, step_index: int) -> None:
        """Ring everybody at once. A peer that cannot be reached is logged: the collective's own timeout judges it."""
        if self._security.identity is not self._shown:
            await self._renew()
        ends = await asyncio.gather(*(self._ring(peer, step_index) for peer in self._peers), return_exceptions=True)
        for peer, error in zip(self._peers, ends, strict=True):
            if error is not None:
                logger.warning("ring_failed shard_id=%s epoch=%d step=%d error=%s", peer.shard_id, self._epoch_number,
                               step_index, _reason(error))

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in (*self._before, *self._channels.values())))

    def _open(self) -> None:
        self._shown = self._security.identity
        self._channels = {peer.shard_id: self._security.channel(peer.link_address, channel_options())
                          for peer in self._peers}

    async def _renew(self) -> None:
        """Ring on channels with the renewed certificate: the old one would not do when a connection is made again."""
        ended, self._before = self._before, list(self._channels.values())
        self._open()
        await asyncio.gather(*(channel.close() for channel in ended))

    async def _ring(self, peer: Member, step_index: int) -> None:
        stub = shard_pb2_grpc.ShardLinkStub(self._channels[peer.shard_id])
        # wait_for_ready: a connection still being made must not lose the ring.
        await stub.Ring(shard_pb2.RingRequest(epoch_number=self._epoch_number, step_index=step_index),
                        timeout=self._timeout_s, wait_for_ready=True, metadata=proof_for(peer.endpoint))


def _reason(error: BaseException) -> str:
    return f"{error.code()} {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else repr(error)
