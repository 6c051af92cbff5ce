"""Who holds more of a shard than its part, and who gives way to whom. Pure.

Each tenant with requests in a shard has a part of its KV blocks and of its places in the batch, by its weight. Nobody
is kept from taking more while others leave it; but where a request of a tenant within its part does not fit, those give
way that go beyond theirs, the last come first, and never a tenant's last one. Of a less urgent priority whoever would
be later in turn gives way. Where those that run lack a block, a tenant's only one may have to give way too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from serving.engine.request import Request


@dataclass(frozen=True, slots=True)
class Room:
    """KV blocks, and places in the batch."""

    num_blocks: int
    num_places: int


class TenantShares:
    """What tenants hold, of those requests that run."""

    def __init__(self, running: Iterable[Request], weights: Mapping[int, int], room: Room) -> None:
        """`weights`: of the tenants with requests here, waiting ones too; `room`: of the whole shard."""
        self._room = room
        self._weights, self._total_weight = weights, sum(weights.values())
        self._num_blocks: Counter[int] = Counter()
        self._num_places: Counter[int] = Counter()
        for request in running:
            self._num_blocks[request.tenant] += len(request.block_table)
            self._num_places[request.tenant] += 1

    def is_over(self, tenant: int) -> bool:
        """Return whether a tenant holds more than its part."""
        part = self._part(tenant)
        return self._num_blocks[tenant] > part.num_blocks or self._num_places[tenant] > part.num_places

    def has_part_for(self, tenant: int, num_blocks: int) -> bool:
        """Return whether one more request of so many blocks leaves a tenant within its part."""
        part = self._part(tenant)
        return (self._num_blocks[tenant] + num_blocks <= part.num_blocks
                and self._num_places[tenant] < part.num_places)

    def _part(self, tenant: int) -> Room:
        weight, total = self._weights[tenant], self._total_weight
        return Room(self._room.num_blocks * weight // total, max(1, self._room.num_places * weight // total))

    def can_spare_one(self, tenant: int) -> bool:
        return self.is_over(tenant) and self._num_places[tenant] > 1

    def give_back(self, request: Request) -> None:
        """Count a request out."""
        self._num_blocks[request.tenant] -= len(request.block_table)
        self._num_places[request.tenant] -= 1


def who_gives_way(newcomer: Request, num_blocks: int, running: Sequence[Request], shares: TenantShares,
                  lacking: Room) -> list[Request]:
    """Return who must give its blocks and place back so that a newcomer of `num_blocks` can start, first who goes
    first; nobody when all that may would not be enough. `running` in the order of turns. Changes `shares`."""
    is_within = shares.has_part_for(newcomer.tenant, num_blocks)
    found: list[Request] = []
    num_found = 0
    for request in reversed(running):
        if num_found >= lacking.num_blocks and len(found) >= lacking.num_places:
            break
        is_less_urgent = request.priority > newcomer.priority and request.turn > newcomer.turn
        is_beyond = (is_within and request.tenant != newcomer.tenant and request.priority >= newcomer.priority
                     and shares.can_spare_one(request.tenant))
        if is_less_urgent or is_beyond:
            found.append(request)
            num_found += len(request.block_table)
            shares.give_back(request)
    return found if num_found >= lacking.num_blocks and len(found) >= lacking.num_places else []


def last_to_keep(running: Sequence[Request], shares: TenantShares) -> Request:
    """Return who gives its blocks back when those that run lack one: the last in turn of those beyond their part."""
    return next((request for request in reversed(running) if shares.is_over(request.tenant)), running[-1])
