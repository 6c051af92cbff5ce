"""What both ends of a transfer of KV blocks agree on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

CHUNK_BYTES = 1 << 20       # of blocks in one message, at least one block: all that a transfer holds beside the caches
# A whole transfer with the wait for its turn, and each step of it, whatever the other side does.
TRANSFER_S = 10.0
ANSWER_S = 2.0


class CacheContent(Protocol):
    """Reads and writes the bytes of a member's blocks and states, beside the steps, one call after the other."""

    format: str             # bytes mean the same in caches whose formats are equal
    block_bytes: int
    num_state_layers: int

    def read_blocks(self, numbers: Sequence[int]) -> asyncio.Future[bytes]: ...
    def write_blocks(self, numbers: Sequence[int], content: bytes) -> asyncio.Future[None]: ...
    def read_state(self, slot: int, index: int) -> asyncio.Future[bytes]: ...
    def write_state(self, slot: int, index: int, content: bytes) -> asyncio.Future[None]: ...
