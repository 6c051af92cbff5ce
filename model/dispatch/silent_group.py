"""Stands in for a process group, to measure what a member computes around collectives. Nothing leaves the process."""

from __future__ import annotations

import time

from torch import Tensor

ANSWER_S = 2e-4     # how long the caller sleeps in a collective: it wakes up slower than it went on


class SilentGroup:
    """Answers as members would that send zeros, after a moment, and take whatever they are sent. See Carrier."""

    is_nccl = False

    def all_to_all(self, received: Tensor, sent: Tensor, num_received_M: list[int], num_sent_M: list[int],
                   rank: int) -> None:
        first, from_first = sum(num_sent_M[:rank]), sum(num_received_M[:rank])
        time.sleep(ANSWER_S)
        received.zero_()
        received[from_first:from_first + num_received_M[rank]] = sent[first:first + num_sent_M[rank]]

    def all_gather(self, gathered: Tensor, own: Tensor, rank: int) -> None:
        time.sleep(ANSWER_S)
        gathered.zero_()
        gathered[rank * len(own):(rank + 1) * len(own)] = own

