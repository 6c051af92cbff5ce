"""Takes over KV blocks and states from other members, and lets them have this one's. One for the life of a process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from model.caches import SequenceCaches
from model.transport.address import EndpointAddress
from serving.engine.engine import Engine
from serving.link.block_receiver import BlockReceiver
from serving.link.block_sender import BlockSender, lender_of
from serving.link.epoch import Epoch
from serving.link.security import PLAIN, LinkSecurity


class BlockExchange:
    """Is open until `close`. `sender` is to be served beside the shard link."""

    def __init__(self, own: EndpointAddress, security: LinkSecurity = PLAIN) -> None:
        self.sender = BlockSender(own)
        self._receiver = BlockReceiver(own, time.monotonic, security)
        self._thread = ThreadPoolExecutor(1, "copy", lambda: torch.set_num_threads(1))

    def enter(self, epoch: Epoch, shard_id: str, engine: Engine, caches: SequenceCaches) -> None:
        """Exchange with that epoch's members from now on."""
        content = CopiedCaches(caches, self._thread)
        self._receiver.enter(epoch, shard_id, content)
        self.sender.lender = lender_of(epoch, shard_id, engine.transfers, content)
        engine.block_source = self._receiver

    def leave(self) -> None:
        """Let nobody have anything: the engine is given up."""
        self.sender.lender = None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class CopiedCaches:
    """Copies on a thread of its own, beside the steps: what is sent are full blocks, to which no step writes, and what
    is received belongs to no sequence yet."""

    def __init__(self, caches: SequenceCaches, thread: ThreadPoolExecutor) -> None:
        self.format = caches.format
        self.block_bytes = caches.block_bytes
        self.num_state_layers = len(caches.states)
        self._caches = caches
        self._thread = thread

    def read_blocks(self, numbers: Sequence[int]) -> asyncio.Future[bytes]:
        return asyncio.get_running_loop().run_in_executor(self._thread, self._caches.read_blocks, numbers)

    def write_blocks(self, numbers: Sequence[int], content: bytes) -> asyncio.Future[None]:
        return asyncio.get_running_loop().run_in_executor(self._thread, self._caches.write_blocks, numbers, content)

    def read_state(self, slot: int, index: int) -> asyncio.Future[bytes]:
        return asyncio.get_running_loop().run_in_executor(self._thread, self._caches.read_state, slot, index)

    def write_state(self, slot: int, index: int, content: bytes) -> asyncio.Future[None]:
        return asyncio.get_running_loop().run_in_executor(self._thread, self._caches.write_state, slot, index, content)
