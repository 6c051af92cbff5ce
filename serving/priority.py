"""How urgent a request is: a whole number, the lower the earlier, as in vLLM. How much its tenant counts. Pure."""

from __future__ import annotations

from serving.errors import InvalidRequestError

MIN_PRIORITY, DEFAULT_PRIORITY, MAX_PRIORITY = -100, 0, 100
DEFAULT_WEIGHT, MAX_WEIGHT = 1, 1000         # of a tenant: who has 2 is served twice as much, while all wait
AGEING_S = 10.0     # who has waited for so long counts as one level more urgent, so that nobody waits for ever


def check_priority(priority: int) -> int:
    """Return the priority. Raises InvalidRequestError when it is out of range."""
    if not MIN_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequestError(f"priority={priority} is out of range",
                                  fix=f"give {MIN_PRIORITY}, the most urgent, to {MAX_PRIORITY}", param="priority")
    return priority


def aged_arrival_s(arrival_s: float, priority: int) -> float:
    """Return when a request of the default priority would have come that is as urgent: whose is lowest is next."""
    return arrival_s + AGEING_S * (priority - DEFAULT_PRIORITY)
