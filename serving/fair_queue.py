"""What waits, in the order in which it is to be served. Pure: time is an argument.

The most urgent priority goes first; one that was not served for AGEING_S counts as one level more urgent, so that none
starves, and then again as what it is, so that a backlog of it overtakes nobody. Within a priority the tenant goes first
that was served least of it (token_counters.py), and within a tenant who came first. With one tenant and one priority
that is first come, first served.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from serving.priority import AGEING_S
from serving.token_counters import TokenCounters


class Waiter(Protocol):
    """A request that waits. Nothing of this may change meanwhile."""

    @property
    def tenant(self) -> Hashable: ...
    @property
    def priority(self) -> int: ...
    @property
    def weight(self) -> int:
        """Return how large its tenant's part is beside others'."""
    @property
    def arrival_index(self) -> int:
        """Return a number that no other has, and that is larger than of those before it."""


WaiterT = TypeVar("WaiterT", bound=Waiter)


def _arrival(waiter: Waiter) -> int:
    return waiter.arrival_index


class FairQueue(Generic[WaiterT]):
    """A priority that begins to wait has age 0, and has it again when anything of it is served()."""

    def __init__(self) -> None:
        self._queues: dict[int, dict[Hashable, list[WaiterT]]] = {}     # by priority and tenant; none is empty
        self._counters: dict[int, TokenCounters[Hashable]] = {}         # by priority
        self._since_s: dict[int, float] = {}                            # of priorities: neither new nor served
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[WaiterT]:
        """Yield all in no particular order."""
        return (waiter for queues in self._queues.values() for queue in queues.values() for waiter in queue)

    def add(self, waiter: WaiterT, now_s: float) -> None:
        """Queue a request where its arrival puts it."""
        if waiter.priority not in self._queues:
            self._since_s[waiter.priority] = now_s
        queues = self._queues.setdefault(waiter.priority, {})
        if waiter.tenant not in queues:
            self._counters_of(waiter).begin_waiting(waiter.tenant)
        bisect.insort(queues.setdefault(waiter.tenant, []), waiter, key=_arrival)
        self._num_waiting += 1

    def remove(self, waiter: WaiterT) -> None:
        """Take a request out, which must be here."""
        queues = self._queues[waiter.priority]
        queue = queues[waiter.tenant]
        index = bisect.bisect_left(queue, waiter.arrival_index, key=_arrival)
        assert queue[index] is waiter, "two requests share a number"
        del queue[index]
        self._num_waiting -= 1
        if not queue:
            del queues[waiter.tenant]
            self._counters_of(waiter).end_waiting(waiter.tenant)
        if not queues:
            del self._queues[waiter.priority]

    def charge(self, waiter: Waiter, cost: float) -> None:
        """Count what the tenant of a request is served, whether it still waits or not."""
        self._counters_of(waiter).charge(waiter.tenant, cost / waiter.weight)

    def served(self, priority: int, now_s: float) -> None:
        """Note that a request of a priority is served now."""
        self._since_s[priority] = now_s

    def queues(self, now_s: float) -> Iterator[Sequence[WaiterT]]:
        """Yield each tenant's requests of one priority, first come first; whose turn it is first."""
        for priority in sorted(self._queues, key=lambda priority: self._level(priority, now_s)):
            waiting = self._queues[priority].values()
            yield from sorted(waiting, key=self._place) if len(waiting) > 1 else [*waiting]

    def rank(self, waiter: Waiter, now_s: float) -> tuple[float, int, float, int]:
        """Return what orders requests, also those that do not wait here: whose is lowest is next."""
        return (*self._level(waiter.priority, now_s), self.served_cost(waiter), waiter.arrival_index)

    def _place(self, queue: Sequence[WaiterT]) -> tuple[float, int]:
        return self.served_cost(queue[0]), queue[0].arrival_index

    def served_cost(self, waiter: Waiter) -> float:
        """Return what its tenant was served, in its priority, by the tenant's weight."""
        return self._counters_of(waiter).of(waiter.tenant)

    def _counters_of(self, waiter: Waiter) -> TokenCounters[Hashable]:
        counters = self._counters.get(waiter.priority)
        if counters is None:
            counters = self._counters[waiter.priority] = TokenCounters()
        return counters

    def _level(self, priority: int, now_s: float) -> tuple[float, int]:
        """Return how urgent a priority is, aged; of equal ones that which was more urgent from the start is first."""
        return priority - (now_s - self._since_s.get(priority, now_s)) / AGEING_S, priority
