"""Has KV blocks of a sequence sent by the member that it leaves, as far as that is done sooner than to compute them.

One transfer at a time, a chunk at a time. Before each chunk the choice is made again, by what was measured meanwhile.
Whatever goes wrong, what has not arrived is computed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import grpc

from model.transport.address import EndpointAddress
from model.transport.handshake import HandshakeError, write_hello, write_proof
from serving.engine.block_transfers import Holding, TransferError
from serving.engine.engine import Engine
from serving.engine.transfer_choice import Transfer, is_sent
from serving.link.block_link import ANSWER_S, TRANSFER_S, CacheContent
from serving.link.channel_options import channel_options
from serving.link.epoch import Epoch, Member
from serving.link.security import PLAIN, LinkSecurity, proof_for
from serving.proto import shard_pb2, shard_pb2_grpc

logger = logging.getLogger(__name__)

Call: TypeAlias = grpc.aio.StreamStreamCall[shard_pb2.ToSender, shard_pb2.ToReceiver]


class BlockReceiver:
    """Is the engine's BlockSource. `enter` tells it in which epoch it is."""

    def __init__(self, own: EndpointAddress, clock: Callable[[], float], security: LinkSecurity = PLAIN) -> None:
        self.own = own
        self.clock = clock
        self.security = security
        self.bytes_per_s: dict[str, float] = {}     # measured, by the sender's shard id
        self._turn = asyncio.Lock()
        self._num_bytes_ahead = 0                   # of transfers that wait for their turn or have it
        self._members: dict[str, Member] = {}
        self._content: CacheContent | None = None

    def enter(self, epoch: Epoch, shard_id: str, content: CacheContent) -> None:
        """Take blocks of that epoch's members. Their links say how fast, until a transfer has shown it."""
        self._members = {member.shard_id: member for member in epoch.members if member.shard_id != shard_id}
        self._content = content
        links = {member.shard_id: member.profile.link.bytes_per_s for member in epoch.members
                 if member.profile and member.profile.link}
        self.bytes_per_s = {name: self.bytes_per_s.get(name, min(rate, links.get(shard_id, rate)))
                            for name, rate in links.items() if name != shard_id}

    async def receive(self, shard_id: str, names: tuple[bytes, ...], engine: Engine) -> int:
        source, content = self._members.get(shard_id), self._content
        if source is None or source.endpoint is None or content is None:
            return 0
        transfer = _Incoming(self, source, source.endpoint, names, engine, content)
        if not transfer.is_worth_it(self._num_bytes_ahead):
            logger.info("blocks_computed shard_id=%s num_blocks=%d", shard_id, len(names))
            return 0
        self._num_bytes_ahead += transfer.num_bytes_left
        num_bytes = transfer.num_bytes_left
        try:
            async with asyncio.timeout(TRANSFER_S), self._turn:
                await transfer.run()
        except (grpc.aio.BaseError, HandshakeError, TransferError, TimeoutError, ValueError) as error:
            logger.info("blocks_not_received shard_id=%s why=%r", shard_id, error)
        except Exception:       # a fault of ours must not fail the request: it can be computed
            logger.exception("transfer_failed shard_id=%s", shard_id)
        finally:
            self._num_bytes_ahead -= num_bytes
        logger.info("blocks_received shard_id=%s num_blocks=%d num_bytes=%d num_tokens=%d took_s=%.3f", shard_id,
                    transfer.num_blocks, transfer.num_bytes, transfer.num_tokens, transfer.took_s)
        return transfer.num_tokens


class _Incoming:
    """One transfer."""

    def __init__(self, receiver: BlockReceiver, source: Member, endpoint: EndpointAddress, names: tuple[bytes, ...],
                 engine: Engine, content: CacheContent) -> None:
        self.num_blocks = 0         # that have arrived
        self.num_bytes = 0          # likewise
        self.num_tokens = 0         # that need not be computed any more
        self.took_s = 0.0
        self._receiver = receiver
        self._source = source
        self._endpoint = endpoint
        self._engine = engine
        self._content = content
        self._num_sending = 1       # receivers that the sender serves
        self._num_states = 0        # layers' states that have arrived
        self._look(names)

    def _look(self, names: tuple[bytes, ...]) -> None:
        """See what of these is here already."""
        scheduler = self._engine.scheduler
        self._names = names
        self._num_known, num_reusable = self._engine.transfers.num_known(names)
        self._num_tokens_left = (len(names) - num_reusable) * scheduler.config.block_size
        self.num_bytes_left = (len(names) - self._num_known) * self._content.block_bytes
        if self._content.num_state_layers:
            self.num_bytes_left += scheduler.room.slot_bytes

    def is_worth_it(self, num_bytes_before: int = 0) -> bool:
        """Return whether what is left is sent sooner than computed."""
        return is_sent(Transfer(
            num_bytes=self.num_bytes_left, num_bytes_before=num_bytes_before, num_tokens=self._num_tokens_left,
            num_tokens_before=self._engine.scheduler.num_tokens_to_compute, num_sending=self._num_sending,
            bytes_per_s=self._receiver.bytes_per_s.get(self._source.shard_id),
            tokens_per_s=self._engine.prefill_rate.tokens_per_s))

    async def run(self) -> None:
        """Raises what grpc raises, HandshakeError, TransferError, TimeoutError, ValueError."""
        self._look(self._names)     # another transfer may have brought some
        async with self._receiver.security.channel(self._source.link_address, channel_options()) as channel:
            call: Call = shard_pb2_grpc.BlockLinkStub(channel).Fetch(metadata=proof_for(self._endpoint))
            try:
                await self._ask(call)
            finally:
                call.cancel()

    async def _ask(self, call: Call) -> None:
        proof = await self._greet(call)
        await call.write(shard_pb2.ToSender(proof=proof, format=self._content.format, names=self._names,
                                            num_known=self._num_known))
        offer = await _read(call)
        num_known, self._num_sending = self._num_known, max(1, offer.num_sending)
        self._look(self._names[:offer.num_offered])
        if not self.is_worth_it():
            return
        transfers = self._engine.transfers
        holding = transfers.receive(self._names, num_known, num_spare=self._engine.scheduler.num_running)
        if holding is None:
            raise TransferError("there is no room for the blocks")
        try:
            await call.write(shard_pb2.ToSender())
            await self._take_all(call, holding)
        finally:
            transfers.release(holding)

    async def _greet(self, call: Call) -> bytes:
        """Return the proof that this is a member. Raises HandshakeError when the other end is not the source."""
        hello = write_hello(bytes.fromhex(self._receiver.own.peer_id), bytes.fromhex(self._endpoint.peer_id))
        await call.write(shard_pb2.ToSender(hello=hello))
        return write_proof(self._endpoint.token.reveal(), hello, (await _read(call)).challenge)

    async def _take_all(self, call: Call, holding: Holding) -> None:
        """Take chunk after chunk, as long as the rest is sent sooner than computed."""
        clock, began_s = self._receiver.clock, self._receiver.clock()
        num_states = self._content.num_state_layers
        while (self.num_blocks < len(holding.blocks) or self._num_states < num_states) and self.is_worth_it():
            message = await _read(call)
            if message.num_blocks:
                await self._take_blocks(holding, message)
            else:
                await self._take_state(holding, message)
            self.num_bytes += len(message.content)
            self.num_bytes_left -= len(message.content)
            self.took_s = clock() - began_s
            self._receiver.bytes_per_s[self._source.shard_id] = self.num_bytes / max(self.took_s, 1e-9)

    async def _take_blocks(self, holding: Holding, message: shard_pb2.ToReceiver) -> None:
        transfers, content = self._engine.transfers, self._content
        numbers = holding.blocks[self.num_blocks:self.num_blocks + message.num_blocks]
        await transfers.copy(holding, partial(content.write_blocks, numbers, message.content))
        transfers.arrived(holding, len(numbers))
        self.num_blocks += len(numbers)
        if not content.num_state_layers:
            self._note_saved(len(numbers) * self._engine.scheduler.config.block_size)

    async def _take_state(self, holding: Holding, message: shard_pb2.ToReceiver) -> None:
        transfers, content, slot = self._engine.transfers, self._content, holding.slot
        if slot is None or self.num_blocks < len(holding.blocks):
            raise TransferError("a state came that was not asked for")
        await transfers.copy(holding, partial(content.write_state, slot, self._num_states, message.content))
        self._num_states += 1
        if self._num_states == content.num_state_layers:
            transfers.state_arrived(holding)
            self._note_saved(holding.num_saved)

    def _note_saved(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self._num_tokens_left -= num_tokens


async def _read(call: Call) -> shard_pb2.ToReceiver:
    async with asyncio.timeout(ANSWER_S):
        message = await call.read()
    if message is grpc.aio.EOF:
        raise TransferError("the sender ended the transfer")
    assert isinstance(message, shard_pb2.ToReceiver)
    return message
