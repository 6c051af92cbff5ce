"""What is on its way is held exactly as long as somebody may copy it, and is a cached prefix afterwards."""

from __future__ import annotations

import asyncio

import pytest

from serving.engine.block_manager import BlockManager, block_hash
from serving.engine.block_transfers import BlockTransfers, Holding, TransferError
from serving.engine.state_slots import StateSlots
from tests.serving.engine.fake_group import check_blocks, check_state_slots

BLOCK = 4
NAMES = [b"a", b"b", b"c", b"d", b"e"]


class Member:
    def __init__(self, num_blocks: int = 8, num_slots: int = 0) -> None:
        self.states = StateSlots(num_slots)
        self.blocks = BlockManager(num_blocks, BLOCK, True, self.states.forget)
        self.transfers = BlockTransfers(self.blocks, self.states)

    def cache(self, names: list[bytes], snapshot_at: int | None = None) -> list[int]:
        """Have these blocks cached, and a snapshot after so many of them."""
        blocks = self.blocks.allocate(len(names))
        assert blocks is not None
        for block, name in zip(blocks, names, strict=True):
            self.blocks.publish(block, name)
        if snapshot_at is not None:
            slot = self.states.take()
            assert slot is not None
            self.states.publish_received(slot, names[snapshot_at - 1], snapshot_at * BLOCK, snapshot_at * BLOCK)
            self.states.give_back(slot)
        self.blocks.free(blocks)
        return blocks

    def check_nothing_is_held(self) -> None:
        check_blocks(self.blocks, ())
        check_state_slots(self.states, ())


async def copied(member: Member, holding: Holding) -> None:
    await member.transfers.copy(holding, lambda: asyncio.ensure_future(asyncio.sleep(0)))


async def test_blocks_go_from_one_cache_to_the_other() -> None:
    source, target = Member(), Member()
    numbers = source.cache(NAMES[:4])
    target.cache(NAMES[:1])
    lent = source.transfers.lend(NAMES, num_known=1)
    assert lent is not None and (lent.names, lent.blocks) == (tuple(NAMES[:4]), tuple(numbers[1:]))
    taken = target.transfers.receive(lent.names, num_known=1, num_spare=2)
    assert taken is not None and len(taken.blocks) == 3 and target.transfers.num_known(NAMES) == (1, 1)
    await copied(source, lent)
    target.transfers.arrived(taken, 2)
    assert target.transfers.num_known(NAMES) == (3, 3)
    source.transfers.release(lent)
    target.transfers.release(taken)         # the last block has not come
    source.check_nothing_is_held()
    target.check_nothing_is_held()
    assert target.transfers.num_known(NAMES) == (3, 3) and target.blocks.num_free == 8


async def test_what_is_held_is_not_given_up() -> None:
    source = Member(num_blocks=5)
    source.cache(NAMES[:4])
    lent = source.transfers.lend(NAMES, num_known=2)
    assert lent is not None and source.blocks.num_free == 3
    assert source.blocks.allocate(4) is None
    source.transfers.release(lent)
    assert source.blocks.allocate(5) is not None


async def test_states_come_with_the_block_before_them_and_last() -> None:
    source, target = Member(num_slots=6), Member(num_slots=6)
    source.cache(NAMES, snapshot_at=3)
    target.cache(NAMES[:4], snapshot_at=2)
    assert target.transfers.num_known(NAMES) == (4, 2)
    lent = source.transfers.lend(NAMES, num_known=4)
    assert lent is not None and (lent.names, lent.blocks) == (tuple(NAMES[:3]), ()) and lent.slot is not None
    taken = target.transfers.receive(lent.names, num_known=3, num_spare=0)
    assert taken is not None and (taken.blocks, taken.num_saved) == ((), BLOCK)
    target.transfers.state_arrived(taken)
    assert target.transfers.num_known(NAMES) == (4, 3)
    source.transfers.release(lent)
    target.transfers.release(taken)
    source.check_nothing_is_held()
    target.check_nothing_is_held()


def test_without_a_state_there_is_nothing_to_lend() -> None:
    source = Member(num_slots=6)
    source.cache(NAMES)
    assert source.transfers.lend(NAMES, num_known=0) is None
    source.check_nothing_is_held()


def test_nothing_is_received_without_room() -> None:
    target = Member(num_blocks=5, num_slots=1)
    assert target.transfers.receive(NAMES, 0, num_spare=1) is None          # no room for those who run
    assert target.transfers.receive(NAMES, 1, num_spare=0) is None          # the known one is gone
    slot = target.states.take()
    assert slot is not None and target.transfers.receive(NAMES, 0, num_spare=0) is None
    target.states.give_back(slot)
    target.check_nothing_is_held()


async def test_a_block_that_was_computed_meanwhile_stays_the_one_that_is_shared() -> None:
    target = Member()
    taken = target.transfers.receive(NAMES[:2], 0, num_spare=0)
    assert taken is not None
    computed = target.cache(NAMES[:2])
    target.transfers.arrived(taken, 2)
    target.transfers.release(taken)
    assert target.blocks.cached_prefix(NAMES) == computed
    target.check_nothing_is_held()


async def test_what_is_being_copied_is_held_until_the_copy_is_done() -> None:
    target = Member()
    taken = target.transfers.receive(NAMES, 0, num_spare=0)
    assert taken is not None
    copy: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    copying = asyncio.create_task(target.transfers.copy(taken, lambda: copy))
    await asyncio.sleep(0)
    copying.cancel()
    await asyncio.wait([copying])
    target.transfers.release(taken)
    assert target.blocks.num_free == 3
    copy.set_result(None)
    await asyncio.sleep(0)
    target.check_nothing_is_held()


async def test_closing_ends_what_is_held_after_its_copies_and_allows_no_more() -> None:
    member = Member()
    member.cache(NAMES)
    lent = member.transfers.lend(NAMES, 0)
    assert lent is not None
    copy: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    copying = asyncio.create_task(member.transfers.copy(lent, lambda: copy))
    closing = asyncio.create_task(member.transfers.close())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not closing.done() and member.blocks.num_free == 3
    copy.set_result(None)
    await asyncio.gather(copying, closing)
    member.check_nothing_is_held()
    assert member.transfers.lend(NAMES, 0) is None and member.transfers.receive(NAMES, 0, 0) is None
    with pytest.raises(TransferError):
        await copied(member, lent)
    member.transfers.release(lent)
    member.transfers.open()
    member.check_nothing_is_held()
    again = member.transfers.lend([*NAMES, block_hash(b"e", (1,))], 0)
    assert again is not None and len(again.blocks) == 5
