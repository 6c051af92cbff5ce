"""Which members of a group share a machine, and so the threads of its CPUs. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from model.host_threads import HostThreads
from serving.link.epoch import Member


def host_threads(members: Sequence[Member], rank: int, num_cpus: int) -> HostThreads | None:
    """Return the threads that this member shares with others of its machine; None where it shares none.

    Machines are told apart as the transport does: containers that cannot share memory share no threads. Accelerators
    compute elsewhere, and a member with an emulated speed is to be as slow as it says. `num_cpus`: that the process of
    this member can keep busy.
    """
    own = members[rank].endpoint
    num_threads_M = tuple(
        member.facts.num_threads if own and member.endpoint and member.facts.device == "cpu"
        and not (member.profile and member.profile.emulated_speed)
        and (member.endpoint == own or own.shares_memory_with(member.endpoint)) else 0
        for member in members)
    if not num_threads_M[rank] or sum(threads > 0 for threads in num_threads_M) < 2:
        return None
    return HostThreads(num_threads_M, rank, num_cpus)
