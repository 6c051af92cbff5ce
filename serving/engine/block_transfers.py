"""Blocks and state slots on their way to another member, or from one: held, so that nobody gives them up meanwhile.

What is here depends on names only, which are hashes of all tokens up to a block's end: what stands behind a name is the
same on every member. What has arrived becomes a cached prefix like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from serving.engine.block_manager import BlockManager
from serving.engine.state_slots import StateSlots
from serving.errors import ServingError

T = TypeVar("T")


class TransferError(ServingError):
    """Says that blocks cannot be had, or not any more. Whoever wanted them computes them."""


@dataclass(eq=False, slots=True)
class Holding:
    """Is valid until release(), or until all transfers are closed."""

    names: tuple[bytes, ...]        # of the sequence's blocks, from its first on
    blocks: tuple[int, ...]         # those to copy: the ones that the last of the names stand for
    slot: int | None                # of the state at their end; None: no layer keeps one
    num_saved: int                  # tokens that a receiver need not compute
    shared: tuple[int, ...] = ()    # held beside: the blocks before them, which the receiver has
    num_arrived: int = 0            # of `blocks`
    copy: asyncio.Future[object] | None = None


class BlockTransfers:
    """One member's, in both directions. All methods are called on one event loop."""

    def __init__(self, blocks: BlockManager, states: StateSlots) -> None:
        self._blocks = blocks
        self._states = states
        self._held: set[Holding] = set()
        self._is_closed = False

    def num_known(self, names: Sequence[bytes]) -> tuple[int, int]:
        """Return how many of these blocks are here, from the first on, and of how many of them a sequence can go on."""
        num_blocks = 0 if self._is_closed else len(self._blocks.cached_prefix(names))
        return num_blocks, self._states.num_reusable(names[:num_blocks])

    def lend(self, names: Sequence[bytes], num_known: int) -> Holding | None:
        """Hold what a receiver, who knows the first `num_known` blocks, lacks of those that are here.

        None when there is nothing from which a sequence can go on.
        """
        _, num_offered = self.num_known(names)
        if not num_offered:
            return None
        offered = tuple(names[:num_offered])
        blocks = self._blocks.allocate(0, self._blocks.cached_prefix(offered)[num_known:])
        assert blocks is not None, "what is cached can be held"
        return self._hold(Holding(offered, tuple(blocks), self._states.lend(offered[-1]), 0))

    def receive(self, names: Sequence[bytes], num_known: int, num_spare: int) -> Holding | None:
        """Hold blocks, and a slot, for what comes behind the first `num_known`. None when there is no room that would
        leave `num_spare` blocks, or the known ones are gone."""
        if self._is_closed or self.num_known(names[:num_known])[0] < num_known:
            return None
        num_reusable = self.num_known(names)[1]
        known = self._blocks.cached_prefix(names[:num_known])
        blocks = self._blocks.allocate(len(names) - num_known, known, num_spare)
        if blocks is None:
            return None
        slot = self._states.take() if self._states.num_slots else None
        if self._states.num_slots and slot is None:
            self._blocks.free(blocks)
            return None
        return self._hold(Holding(tuple(names), tuple(blocks[num_known:]), slot,
                                  (len(names) - num_reusable) * self._blocks.block_size, tuple(known)))

    async def copy(self, holding: Holding, start: Callable[[], asyncio.Future[T]]) -> T:
        """Start to read or write what is held, on another thread, and return when that is done. Nothing of the holding
        is given up before, also when the caller is cancelled. Raises TransferError."""
        self._check(holding)
        copied = start()
        holding.copy = copied   # type: ignore[assignment]      # a future is invariant
        return await asyncio.shield(copied)

    def arrived(self, holding: Holding, num_blocks: int) -> None:
        """The next blocks have been written: sequences can use them. Raises TransferError."""
        self._check(holding)
        first = len(holding.names) - len(holding.blocks)
        for index in range(holding.num_arrived, holding.num_arrived + num_blocks):
            self._blocks.publish(holding.blocks[index], holding.names[first + index])
        holding.num_arrived += num_blocks

    def state_arrived(self, holding: Holding) -> None:
        """All layers' states have been written, after all blocks. Raises TransferError."""
        self._check(holding)
        assert holding.slot is not None and holding.num_arrived == len(holding.blocks), "a state comes last"
        self._states.publish_received(holding.slot, holding.names[-1], len(holding.names) * self._blocks.block_size,
                                      holding.num_saved)

    def release(self, holding: Holding) -> None:
        """Let go of it, once what is being copied has been. What has arrived stays cached as long as there is room."""
        if holding.copy is None or holding.copy.done():
            self._free(holding)
        else:
            holding.copy.add_done_callback(lambda _: self._free(holding))

    async def close(self) -> None:
        """End all transfers and allow no others until open(): the blocks are about to get other numbers."""
        self._is_closed = True
        copies = [holding.copy for holding in self._held if holding.copy is not None and not holding.copy.done()]
        if copies:
            await asyncio.wait(copies)
        for holding in list(self._held):
            self._free(holding)

    def open(self) -> None:
        self._is_closed = False

    def _hold(self, holding: Holding) -> Holding:
        self._held.add(holding)
        return holding

    def _check(self, holding: Holding) -> None:
        if self._is_closed or holding not in self._held:
            raise TransferError("the blocks are not held any more")

    def _free(self, holding: Holding) -> None:
        if holding not in self._held:
            return
        self._held.discard(holding)
        self._blocks.free((*holding.shared, *holding.blocks))
        if holding.slot is not None:
            self._states.give_back(holding.slot)
