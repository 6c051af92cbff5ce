"""Virtual token counters: how much each tenant was served, so that whoever was served least is next. Pure.

VTC of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024): service is counted in weighted tokens when
it is given, and a tenant that begins to wait is lifted towards those that wait already, so being away saves up little:
a tenant that comes back may be MAX_CREDIT behind the one that was served most, so that its requests are not shared out
among a flood's, and one that is new nothing. Of two tenants that both wait all the time the one is never served more
than 2 max(PROMPT_WEIGHT L, OUTPUT_WEIGHT M, MAX_CREDIT) beyond the other, where L is the longest prompt and M the
tokens that run at a time: the paper's bound where that credit is the least of the three. Of tenants with weights (the
paper's section 4.3) what each was served is divided by its weight before it is counted, and the bound is of that.
"""

from __future__ import annotations

from typing import Generic, TypeVar

TenantT = TypeVar("TenantT")

PROMPT_WEIGHT = 1.0
CACHED_WEIGHT = 0.1         # of a prompt's tokens that the prefix cache served
OUTPUT_WEIGHT = 2.0
MAX_CREDIT = 16384.0        # weighted tokens: what some ten steps compute
_MANY = 1024                # counters that are kept without looking whether they still say anything


def token_cost(num_prompt: int, num_cached: int, num_output: int) -> float:
    """Return what tokens cost. `num_cached`: of the prompt's."""
    return PROMPT_WEIGHT * (num_prompt - num_cached) + CACHED_WEIGHT * num_cached + OUTPUT_WEIGHT * num_output


class TokenCounters(Generic[TenantT]):
    def __init__(self) -> None:
        self._counters: dict[TenantT, float] = {}
        self._waiting: set[TenantT] = set()
        self._last: TenantT | None = None           # that stopped waiting

    def __len__(self) -> int:
        return len(self._counters)

    def of(self, tenant: TenantT) -> float:
        """Return how much a tenant was served; of one that is not known, what is least beside others."""
        counter = self._counters.get(tenant)
        return self._present() if counter is None else counter

    def begin_waiting(self, tenant: TenantT) -> None:
        """Note that a tenant waits that did not."""
        self._counters[tenant] = max(self.of(tenant), self._floor())
        self._waiting.add(tenant)

    def end_waiting(self, tenant: TenantT) -> None:
        """Note that a tenant does not wait any more. What it is served later still counts."""
        self._waiting.remove(tenant)
        self._last = tenant
        if len(self._counters) > 2 * len(self._waiting) + _MANY:
            self._forget()

    def charge(self, tenant: TenantT, cost: float) -> None:
        """Count what a tenant was served; below 0: what it was charged before and did not get."""
        self._counters[tenant] = self.of(tenant) + cost

    def _floor(self) -> float:
        """Return how little a tenant that begins to wait may have been served."""
        most = max(map(self._counters.__getitem__, self._waiting), default=self._present())
        return min(self._present(), most - MAX_CREDIT)

    def _present(self) -> float:
        """Return where a tenant begins that is new."""
        if self._waiting:
            return min(map(self._counters.__getitem__, self._waiting))
        return 0.0 if self._last is None else self._counters[self._last]

    def _forget(self) -> None:
        """Drop the counters of tenants that are no better off than new ones."""
        present = self._present()
        self._counters = {tenant: counter for tenant, counter in self._counters.items()
                          if counter > present or tenant in self._waiting or tenant == self._last}
