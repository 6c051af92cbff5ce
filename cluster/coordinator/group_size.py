"""With how many members a group starts, and how many it may have. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from serving.config import ServeConfig
from serving.link.epoch import Member


@dataclass(frozen=True, slots=True)
class PoolSize:
    """So many shards a pool may have, and is to have."""

    least: int                  # without so many the group does not start, and none is asked to leave
    wanted: int                 # by now; 0 in all pools: the service sleeps
    most: int


@dataclass(frozen=True, slots=True)
class GroupSize:
    of_pool: Mapping[str, PoolSize]     # in the order of ranks
    settle_s: float             # with fewer than all it starts when nobody has come for so long
    fixed_members: int | None = None    # it starts with so many, and never has more; None: as many as the pools want

    @property
    def num_members(self) -> int:
        """Return for how many a first start waits at most."""
        return self.fixed_members or sum(size.wanted for size in self.of_pool.values())

    @property
    def is_asleep(self) -> bool:
        """Return whether no pool is to have any."""
        return not any(size.wanted for size in self.of_pool.values())

    @property
    def pools(self) -> tuple[str, ...]:
        return tuple(self.of_pool)

    @property
    def is_elastic(self) -> bool:
        """Return whether it may start with fewer than it waits for."""
        return sum(size.least for size in self.of_pool.values()) < self.num_members

    def with_wanted(self, pool: str, wanted: int) -> GroupSize:
        return replace(self, of_pool={**self.of_pool, pool: replace(self.of_pool[pool], wanted=wanted)})


def group_size(config: ServeConfig) -> GroupSize:
    of_pool = {pool.name: PoolSize(pool.least_replicas, pool.replicas, pool.most_replicas) for pool in config.pools}
    return GroupSize(of_pool, config.group.settle_s, config.group.members)


def may_enter(comers: Iterable[Member], staying: Iterable[Member], size: GroupSize) -> list[Member]:
    """Return those whom a group of `staying` may take in: the first of each pool, until pool and group are full."""
    of_pool = Counter(member.pool for member in staying)
    entering = []
    for member in comers:
        if of_pool.total() < size.num_members and of_pool[member.pool] < size.of_pool[member.pool].wanted:
            of_pool[member.pool] += 1
            entering.append(member)
    return entering


def may_start(present: Sequence[Member], size: GroupSize, quiet_s: float) -> bool:
    """Return whether the group starts with those present, or waits for more. Nobody has come for `quiet_s`."""
    if len(present) >= size.num_members:
        return True
    return bool(present) and size.is_elastic and not pools_below_least(present, size) and quiet_s >= size.settle_s


def pools_below_least(present: Iterable[Member], size: GroupSize) -> tuple[str, ...]:
    """Return the pools of which too few are here for any start."""
    here = Counter(member.pool for member in present)
    return tuple(pool for pool, one in size.of_pool.items() if here[pool] < one.least)


def who_is_missing(present: Sequence[Member], size: GroupSize) -> str:
    """Say who is here, and what the group still waits for."""
    here = ", ".join(member.node_name for member in present) or "none"
    text = f"{len(present)} of {size.num_members} shards are here ({here})"
    if not size.is_elastic:
        return text
    below = pools_below_least(present, size)
    if below:
        return f"{text}; it takes at least " + ", ".join(f"{size.of_pool[pool].least} of pool {pool}" for pool in below)
    return f"{text}; starts with these when no other comes within {size.settle_s:g} s"
