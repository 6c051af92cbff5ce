"""KV blocks as numbers: who holds which, which hold a known prefix, which to give up first. Pure.

A block is in exactly one of three states:
    empty      nobody holds it and its content means nothing
    in use     held by one or more sequences; more than one only while it is full and its content is known
    cached     nobody holds it, but its content is known, so that a sequence with the same prefix can take it again

The content of a full block is named by the hash of its tokens and of everything before them. The hash is cryptographic
(BLAKE2b, 256 bits), so equal hashes mean equal tokens and nobody can craft a prompt that finds another's block.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return a full block's name: of its tokens after all that `parent` names. The first block's parent is b""."""
    return blake2b(parent + array("Q", token_ids).tobytes(), digest_size=32).digest()


class BlockManager:
    """Counts references, finds cached prefixes, evicts the least recently used block that nobody holds."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True,
                 on_evict: Callable[[bytes], None] = lambda name: None,
                 worth_of: Callable[[bytes], int] | None = None) -> None:
        """`on_evict` is told the name of every known block whose content is given up. With `worth_of` that is the one
        worth least, and among equals the least recently used."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._on_evict = on_evict
        self._worth_of = worth_of
        self._empty = list(range(num_blocks - 1, -1, -1))           # taken from the end: low numbers first
        self._cached: OrderedDict[int, None] = OrderedDict()        # nobody holds them; next to evict first
        self._num_holders = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Return how many blocks can be allocated, cached ones included."""
        return len(self._empty) + len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix of those that `hashes` name. Takes none of them."""
        blocks: list[int] = []
        for block in map(self._block_of.get, hashes):
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(self, num_new: int, prefix: Sequence[int] = (), num_spare: int = 0) -> list[int] | None:
        """Hold the `prefix` blocks once more and `num_new` others. None, and nothing has changed, when fewer than
        `num_spare` blocks would stay free."""
        if self.num_lacking(num_new, prefix, num_spare) > 0:
            return None
        num_holders = self._num_holders
        revived = [block for block in prefix if not num_holders[block]]
        for block in revived:
            del self._cached[block]
        for block in prefix:
            num_holders[block] += 1
        return [*prefix, *(self._take() for _ in range(num_new))]

    def num_lacking(self, num_new: int, prefix: Sequence[int] = (), num_spare: int = 0) -> int:
        """Return how many more blocks would have to be free for allocate(); 0 or less: it would succeed."""
        num_revived = sum(not self._num_holders[block] for block in prefix)
        return num_new + num_revived + num_spare - self.num_free

    def _take(self) -> int:
        block = self._empty.pop() if self._empty else self._evict()
        self._num_holders[block] = 1
        return block

    def _evict(self) -> int:
        block, worth_of = next(iter(self._cached)), self._worth_of
        if worth_of is not None:
            block = min(self._cached, key=lambda cached: worth_of(self._hash_of[cached]))
        del self._cached[block]
        name = self._hash_of.pop(block)
        del self._block_of[name]
        self._on_evict(name)
        return block

    @property
    def num_named(self) -> int:
        """Blocks whose content is known, held or not."""
        return len(self._block_of)

    def find(self, name: bytes) -> int | None:
        """Return the block with this content, if there is one."""
        return self._block_of.get(name)

    def forget(self, name: bytes) -> None:
        """A block's content is known no more; who holds it keeps it."""
        block = self._block_of.pop(name, None)
        if block is not None:
            del self._hash_of[block]
            if self._num_holders[block] == 0:
                del self._cached[block]
                self._empty.append(block)

    def publish(self, block: int, name: bytes) -> None:
        """Let others share a full block, after the step that filled it has succeeded."""
        if self._prefix_caching and name not in self._block_of and block not in self._hash_of:
            self._block_of[name] = block
            self._hash_of[block] = name

    @property
    def num_held(self) -> int:
        """Return how many blocks sequences hold."""
        return self.num_blocks - self.num_free

    def resize(self, num_blocks: int) -> dict[int, int]:
        """Go on with another number of blocks, at least those that are held, and return the new number of every block
        whose content is kept: of those that nobody holds, the most recently used."""
        held = [block for block, holders in enumerate(self._num_holders) if holders]
        assert len(held) <= num_blocks, "preempt before who holds them"
        while len(held) + len(self._cached) > num_blocks:
            self._empty.append(self._evict())
        kept = sorted((*held, *self._cached))
        free = iter(sorted(set(range(num_blocks)) - set(kept)))
        new_number_of = {block: block if block < num_blocks else next(free) for block in kept}
        num_holders = [0] * num_blocks
        for block in held:
            num_holders[new_number_of[block]] = self._num_holders[block]
        self._num_holders = num_holders
        self._hash_of = {new_number_of[block]: name for block, name in self._hash_of.items()}
        self._block_of = {name: block for block, name in self._hash_of.items()}
        self._cached = OrderedDict.fromkeys(new_number_of[block] for block in self._cached)
        self._empty = sorted(set(range(num_blocks)) - set(new_number_of.values()), reverse=True)
        self.num_blocks = num_blocks
        return new_number_of

    def free(self, block_table: Sequence[int]) -> None:
        """Let a sequence's blocks go. A prefix's end is evicted before its beginning, which more will ask for."""
        num_holders = self._num_holders
        for block in reversed(block_table):
            num_holders[block] -= 1
            if num_holders[block]:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._empty.append(block)
