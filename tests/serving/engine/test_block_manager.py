from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.engine.block_manager import BlockManager, block_hash
from tests.serving.engine.fake_group import check_blocks


def names(*blocks: tuple[int, ...]) -> list[bytes]:
    hashes: list[bytes] = []
    for token_ids in blocks:
        hashes.append(block_hash(hashes[-1] if hashes else b"", token_ids))
    return hashes


def published(manager: BlockManager, hashes: list[bytes]) -> list[int]:
    block_table = manager.allocate(len(hashes))
    assert block_table is not None
    for block, name in zip(block_table, hashes, strict=True):
        manager.publish(block, name)
    return block_table


def test_a_block_is_named_by_everything_before_it() -> None:
    assert names((1, 2), (3, 4)) == names((1, 2), (3, 4))
    assert names((1, 2), (3, 4))[1] != names((2, 1), (3, 4))[1]
    assert block_hash(b"", (1, 2)) != block_hash(b"", (1, 2 << 32))


def test_a_freed_prefix_is_found_and_held_again() -> None:
    manager = BlockManager(4, 2)
    hashes = names((1, 2), (3, 4))
    first = published(manager, hashes)
    manager.free(first)
    assert manager.num_free == 4
    prefix = manager.cached_prefix([*hashes, *names((9, 9))])
    assert prefix == first
    assert manager.allocate(1, prefix) == [*first, 2]
    assert manager.num_free == 1


def test_two_holders_share_a_published_prefix() -> None:
    manager = BlockManager(3, 2)
    hashes = names((1, 2))
    mine = published(manager, hashes)
    theirs = manager.allocate(1, manager.cached_prefix(hashes))
    assert theirs is not None and theirs[0] == mine[0] and theirs[1] != mine[0]
    manager.free(mine)
    assert manager.num_free == 1
    manager.free(theirs)
    assert manager.num_free == 3


def test_the_least_recently_used_prefix_is_evicted_end_first() -> None:
    manager = BlockManager(4, 2)
    old, new = names((1, 2), (3, 4)), names((5, 6), (7, 8))
    old_table, new_table = published(manager, old), published(manager, new)
    manager.free(old_table)
    manager.free(new_table)
    assert manager.allocate(1) == [old_table[1]]
    assert manager.cached_prefix(old) == old_table[:1]
    assert manager.allocate(1) == [old_table[0]]
    assert manager.cached_prefix(old) == [] and manager.cached_prefix(new) == new_table


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    manager = BlockManager(4, 2)
    hashes = names((1, 2), (3, 4))
    manager.free(published(manager, hashes))
    prefix = manager.cached_prefix(hashes)
    assert manager.allocate(3, prefix) is None
    assert manager.allocate(2, prefix, num_spare=1) is None
    check_blocks(manager, [])
    assert manager.cached_prefix(hashes) == prefix


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = BlockManager(4, 2, prefix_caching=False)
    hashes = names((1, 2))
    manager.free(published(manager, hashes))
    assert manager.cached_prefix(hashes) == []


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences over a two-letter alphabet, so that prefixes meet often."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(num_blocks=9, block_size=1)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}        # what the block was last published as

    @rule(letters=st.lists(st.integers(0, 1), min_size=1, max_size=6), num_more=st.integers(0, 2),
          num_spare=st.integers(0, 2))
    def allocate(self, letters: list[int], num_more: int, num_spare: int) -> None:
        hashes = names(*((letter,) for letter in letters))
        prefix = self.manager.cached_prefix(hashes)
        assert [self.contents[block] for block in prefix] == hashes[:len(prefix)]
        num_free, num_new = self.manager.num_free, len(letters) - len(prefix) + num_more
        table = self.manager.allocate(num_new, prefix, num_spare)
        if table is None:
            assert self.manager.num_free == num_free < num_new + num_spare + len(prefix)
            return
        assert self.manager.num_free >= num_spare and table[:len(prefix)] == prefix
        for block in table[len(prefix):]:
            self.contents.pop(block, None)
        for block, name in zip(table, hashes, strict=False):
            if block not in prefix:
                self.manager.publish(block, name)
                self.contents[block] = name
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 100))
    def free(self, which: int) -> None:
        self.manager.free(self.tables.pop(which % len(self.tables)))

    @rule(num_more=st.integers(0, 9))
    def resize(self, num_more: int) -> None:
        """What is held stays; of the rest what was used last, as far as there is room."""
        num_held = self.manager.num_held
        held = {block for table in self.tables for block in table}
        new_number_of = self.manager.resize(num_held + num_more)
        assert num_held == len(held) and held <= set(new_number_of)
        assert sorted(set(new_number_of.values())) == sorted(new_number_of.values())
        assert all(0 <= block < num_held + num_more for block in new_number_of.values())
        self.tables = [[new_number_of[block] for block in table] for table in self.tables]
        self.contents = {new_number_of[block]: name for block, name in self.contents.items() if block in new_number_of}

    @invariant()
    def no_block_is_lost_or_wrongly_shared(self) -> None:
        check_blocks(self.manager, self.tables)


BlockManagerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestBlockManagerMachine = BlockManagerMachine.TestCase
