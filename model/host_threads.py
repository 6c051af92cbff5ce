"""Says which threads a member may use in a step, where several members share a machine. Pure.

M members
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostThreads:
    """The threads of one member and of those on its machine, who lend theirs while they have no rows of their own.

    What is computed for own rows (attention, gate, logits) would else run on one member's threads while the others of
    the machine wait for it. Experts are everybody's work at the same time, so each computes those on its own threads.
    """

    num_threads_M: tuple[int, ...]      # by rank; 0: a member that is elsewhere, or lends and borrows none
    rank: int
    num_cpus: int                       # that this member's process can keep busy

    def for_own_rows(self, num_tokens_of_member: tuple[int, ...]) -> int:
        """Return this member's threads for its own rows in a step with these row counts, by rank.

        All threads of the machine's members are divided among those of them that have rows. Never less than its own.
        """
        num_threads_M = self.num_threads_M
        num_sharing = sum(tokens > 0 and threads > 0
                          for tokens, threads in zip(num_tokens_of_member, num_threads_M, strict=True))
        lent = min(sum(num_threads_M), self.num_cpus) // max(1, num_sharing)
        return max(num_threads_M[self.rank], lent)
