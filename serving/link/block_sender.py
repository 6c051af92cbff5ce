"""Lets other members of the group have KV blocks of this one's prefix cache. Whoever is none gets nothing: a sequence's
keys and values are what its user has written."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import grpc

from model.transport.address import EndpointAddress
from model.transport.handshake import HandshakeError, check_proof, read_hello, write_challenge
from serving.engine.block_transfers import BlockTransfers, Holding, TransferError
from serving.link.block_link import ANSWER_S, CHUNK_BYTES, TRANSFER_S, CacheContent
from serving.link.epoch import Epoch
from serving.proto import shard_pb2

logger = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext
Requests: TypeAlias = AsyncIterator[shard_pb2.ToSender]

MAX_AT_ONCE = 2         # receivers; others wait


@dataclass(frozen=True, slots=True)
class Lender:
    """What is lent, and to whom."""

    transfers: BlockTransfers
    content: CacheContent
    receivers: frozenset[bytes]     # peer ids of the others in the epoch


def lender_of(epoch: Epoch, shard_id: str, transfers: BlockTransfers, content: CacheContent) -> Lender:
    """Return what a member lends to those of its epoch that compute the same model."""
    own = next(member for member in epoch.members if member.shard_id == shard_id)
    others = frozenset(bytes.fromhex(member.endpoint.peer_id) for member in epoch.members
                       if member.endpoint is not None and member is not own and member.digest == own.digest)
    return Lender(transfers, content, others)


class BlockSender:
    """The gRPC servicer of BlockLink."""

    def __init__(self, own: EndpointAddress) -> None:
        self._own = own
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)
        self._num_open = 0
        self.lender: Lender | None = None       # None: there is nothing to lend

    async def Fetch(self, requests: Requests, context: Context) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                lender, wanted = await self._greet(requests, context)
            async with asyncio.timeout(TRANSFER_S):
                await self._take_turn(lender, wanted, requests, context)
        except (HandshakeError, struct.error) as error:
            logger.warning("blocks_refused why=%s", error)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"no blocks for a stranger: {error}")
        except (StopAsyncIteration, TimeoutError, TransferError) as error:
            logger.info("blocks_not_sent why=%r", error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the blocks are not sent: {error!r}")

    async def _take_turn(self, lender: Lender, wanted: shard_pb2.ToSender, requests: Requests,
                         context: Context) -> None:
        self._num_open += 1
        try:
            async with self._turns:
                await self._send(lender, wanted, requests, context)
        finally:
            self._num_open -= 1

    async def _send(self, lender: Lender, wanted: shard_pb2.ToSender, requests: Requests, context: Context) -> None:
        content, transfers = lender.content, lender.transfers
        if wanted.format != content.format:
            raise TransferError(f"caches differ: {wanted.format!r}, here {content.format!r}",
                                fix="give members that take over from each other the same device and dtype")
        holding = transfers.lend(wanted.names, wanted.num_known)
        if holding is None:
            raise TransferError("the blocks are not here, or no state to go on from")
        try:
            await context.write(shard_pb2.ToReceiver(num_offered=len(holding.names), num_sending=self._num_open))
            await anext(requests)
            async for message in _messages(holding, transfers, content):
                await context.write(message)
        finally:
            transfers.release(holding)

    async def _greet(self, requests: Requests, context: Context) -> tuple[Lender, shard_pb2.ToSender]:
        """Return what the receiver wants, once it has proved who it is. Raises HandshakeError, struct.error."""
        hello = (await anext(requests)).hello
        receiver = read_hello(hello, bytes.fromhex(self._own.peer_id))
        token = self._own.token.reveal()
        challenge = write_challenge(token, hello)
        await context.write(shard_pb2.ToReceiver(challenge=challenge))
        wanted = await anext(requests)
        check_proof(token, hello, challenge, wanted.proof)
        lender = self.lender
        if lender is None or receiver not in lender.receivers:
            raise HandshakeError("it is no member of the group")
        return lender, wanted


async def _messages(holding: Holding, transfers: BlockTransfers, content: CacheContent
                    ) -> AsyncIterator[shard_pb2.ToReceiver]:
    """Yield what is held, a chunk at a time. Raises TransferError."""
    num_at_once = max(1, CHUNK_BYTES // content.block_bytes)
    for first in range(0, len(holding.blocks), num_at_once):
        numbers = holding.blocks[first:first + num_at_once]
        chunk = await transfers.copy(holding, partial(content.read_blocks, numbers))
        yield shard_pb2.ToReceiver(num_blocks=len(numbers), content=chunk)
    if holding.slot is not None:
        for index in range(content.num_state_layers):
            state = await transfers.copy(holding, partial(content.read_state, holding.slot, index))
            yield shard_pb2.ToReceiver(content=state)
