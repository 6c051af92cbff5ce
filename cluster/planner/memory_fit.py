"""The answer whether members can hold a model, and if not, what is missing where. Pure, and without SciPy.

One answer for whoever asks: the coordinator before it plans, `moesaic plan`, `moesaic doctor` before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.planner.layer.error import PlacementError
from cluster.planner.memory_plan import MemberMemory, MemoryDemand, free_bytes, max_slots
from cluster.planner.plan_rules import PlanRules

Policy = Literal["speed", "even"]


@dataclass(frozen=True, slots=True)
class MemberFit:
    """One member in the role that fits best. Raising every member's budget by missing_bytes makes the model fit."""

    memory: MemberMemory
    takes_requests: bool
    free_bytes: int             # for experts; negative when not even the fixed part fits
    missing_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """The members by rank, in the roles that miss least."""

    demand: MemoryDemand
    num_copies: int             # of every expert, at least
    members: tuple[MemberFit, ...]

    @property
    def missing_bytes(self) -> int:
        """The bytes that all members together lack; 0: the model fits."""
        return sum(member.missing_bytes for member in self.members)

    @property
    def is_enough(self) -> bool:
        return not self.missing_bytes


def members_fit(memories: Sequence[MemberMemory], rules: PlanRules) -> MemoryFit:
    """Answer for the members of a group that starts by these rules."""
    return memory_fit(memories, rules.demand, rules.num_copies(len(memories)), rules.config.policy)


def memory_fit(memories: Sequence[MemberMemory], demand: MemoryDemand, num_copies: int,
               policy: Policy = "speed") -> MemoryFit:
    """Find the roles that miss least, for `num_copies` copies of every expert, each on another member.

    One member that takes requests, the others with experts only: no other roles need less. A member without room for
    its buffers can be left out, or be given room. By the policy "even" all members take requests.
    """
    choices = [(True,) * len(memories)] if policy == "even" else _one_taker(memories, demand)
    fits = [MemoryFit(demand, num_copies, tuple(members))
            for takes in choices for members in _members(memories, takes, demand, num_copies, policy)]
    return min(fits, key=lambda fit: fit.missing_bytes)


def _one_taker(memories: Sequence[MemberMemory], demand: MemoryDemand) -> list[tuple[bool, ...]]:
    """Let each member be the only one that takes requests. Of those with equal room only one."""
    takers: dict[int, int] = {}
    for rank, memory in enumerate(memories):
        takers.setdefault(free_bytes(memory, demand), rank)
    return [tuple(rank == taker for rank in range(len(memories))) for taker in takers.values()]


def _members(memories: Sequence[MemberMemory], takes_requests: Sequence[bool], demand: MemoryDemand, num_copies: int,
             policy: Policy) -> Iterator[list[MemberFit]]:
    """Yield the members' fits with everybody, and without those who have no room even for experts alone."""
    everybody = list(range(len(memories)))
    useful = [rank for rank in everybody
              if takes_requests[rank] or free_bytes(memories[rank], demand, takes_requests=False) >= 0]
    for ranks in (everybody, useful) if policy == "speed" and num_copies <= len(useful) else (everybody,):
        missing = _missing(memories, takes_requests, demand, num_copies, ranks)
        yield [MemberFit(memory, takes, free_bytes(memory, demand, takes), missing.get(rank, 0))
               for rank, (memory, takes) in enumerate(zip(memories, takes_requests, strict=True))]


def _missing(memories: Sequence[MemberMemory], takes_requests: Sequence[bool], demand: MemoryDemand, num_copies: int,
             ranks: Sequence[int]) -> dict[int, int]:
    """Return the bytes by rank. Copies that lack room are divided equally among the members that could hold more."""
    room = {rank: demand.num_slots - max_slots(memories[rank], demand, takes_requests[rank]) for rank in ranks}
    lacking = demand.num_slots * num_copies - sum(demand.num_slots - left for left in room.values())
    more = dict.fromkeys(ranks, 0)
    while lacking > 0:
        open_ranks = [rank for rank in ranks if room[rank] > more[rank]]
        each = -(-lacking // len(open_ranks))
        for rank in open_ranks:
            added = min(each, room[rank] - more[rank])
            more[rank] += added
            lacking -= added
    return {rank: more[rank] * demand.expert_bytes + max(0, -free_bytes(memories[rank], demand, takes_requests[rank]))
            for rank in ranks}


def does_not_fit(fit: MemoryFit) -> PlacementError:
    """Say of every member what it lacks, byte by byte."""
    demand, total = fit.demand, fit.missing_bytes
    experts = fit.num_copies * demand.num_slots * demand.expert_bytes
    lines = [f"the {len(fit.members)} members cannot hold the model: {total} bytes are missing"]
    for member in fit.members:
        memory = member.memory
        shared = (f" - shared weights {demand.shared_bytes} - KV cache {demand.kv_cache_bytes}"
                  if member.takes_requests else "")
        lines.append(f"member {memory.node_name}: {member.missing_bytes} bytes missing (budget {memory.budget_bytes} - "
                     f"process {memory.resident_bytes}{shared} - buffers {demand.buffer_bytes} = {member.free_bytes} "
                     f"for experts, which take {experts} in all)")
    copies = ", set min_copies to 1" if fit.num_copies > 1 else ""
    return PlacementError("\n".join(lines), fix="raise the members' memory budgets by what they miss, add members with "
                          f"{total} bytes free for experts{copies}, or lower the KV cache and max_batch_tokens")
