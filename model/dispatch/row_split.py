"""Shares out the rows of an expert over its copies in a step. Pure, no torch: the same answer on every member.

A member takes the sum of rate.seconds(rows) over its experts; the split is to make the slowest member done early. It
uses only IEEE additions, multiplications, divisions and comparisons in a fixed order (not sum(), which differs between
versions of Python): so different members agree, also those that compute it in C (model/kernels/row_split.h).

E experts of the layer, M members, F experts with one holder, C experts with several copies
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.arrays import FloatArray, IntArray
from model.placement import ExpertRate

Part = tuple[int, int, float]       # rank, rows that it computes of an expert, the seconds they take it

UNKNOWN_RATE = ExpertRate(read_s=16.0, row_s=1.0)       # all alike; reading weights lasts as long as 16 rows
MAX_PASSES = 8
SPLIT_STARTS = 8.0  # an expert is not split where less work than so many starts would be left to each holder
CLOSE = 2e-3        # finish times are balanced when they differ by less than this share of the latest


@dataclass(frozen=True, slots=True)
class LayerCopies:
    """Holds the holders of one layer's experts and the members' rates, in the form that `split_rows` needs."""

    num_members: int
    num_experts: int
    fixed_F: IntArray                               # experts with one holder
    holder_F: IntArray
    read_F: FloatArray                              # seconds of that holder, see ExpertRate
    row_F: FloatArray
    start_F: FloatArray
    copied_C: IntArray                              # experts with several holders
    holders_C: tuple[tuple[int, ...], ...]
    short_up_to_C: tuple[float, ...]                # with at most so many rows an expert costs any holder reading only
    splits_from_C: tuple[float, ...]                # with fewer rows no two holders would each do more than read
    read_M: FloatArray
    row_M: FloatArray
    start_M: FloatArray


def layer_copies(holders: Sequence[Sequence[int]], num_members: int, rates: Sequence[ExpertRate]) -> LayerCopies:
    """Prepare `split_rows`. `holders[expert]`: ascending ranks of its copies. `rates` by rank; empty: all alike."""
    rates = rates or (UNKNOWN_RATE,) * num_members
    fixed = [expert for expert, ranks in enumerate(holders) if len(ranks) == 1]
    copied = [expert for expert, ranks in enumerate(holders) if len(ranks) > 1]
    holder_F = np.array([holders[expert][0] for expert in fixed], dtype=np.int64)
    read_M, row_M, start_M = (np.array(values) for values in zip(
        *[(rate.read_s, rate.row_s, rate.start_s) for rate in rates], strict=True))
    rows_while_reading_M: list[float] = ((read_M - start_M) / row_M).tolist()
    rows_worth_starting_M: list[float] = (np.maximum(read_M, SPLIT_STARTS * start_M) / row_M).tolist()
    return LayerCopies(
        num_members, len(holders), np.array(fixed, dtype=np.int64), holder_F, read_M[holder_F], row_M[holder_F],
        start_M[holder_F], np.array(copied, dtype=np.int64), tuple(tuple(holders[expert]) for expert in copied),
        tuple(min(rows_while_reading_M[rank] for rank in holders[expert]) for expert in copied),
        tuple(max(2.0, sum(sorted(rows_worth_starting_M[rank] for rank in holders[expert])[:2])) for expert in copied),
        read_M, row_M, start_M)


def split_rows(copies: LayerCopies, num_rows_E: IntArray) -> IntArray:
    """Split the rows of each expert in a step, all owners together -> how many of them each member computes [E, M].

    Experts with one holder are fixed. The others, most rows first, go whole to the holder that is then done first, or
    are split so that several holders are done at once, if each has enough rows to be busy while it reads the weights.
    Then each is taken out and placed again until that gains little. In the end the slowest member is relieved, as long
    as that works: of a whole expert, for which others may make room, or of rows whose expert is then read once more.
    """
    num_rows_EM = np.zeros((copies.num_experts, copies.num_members), dtype=np.int64)
    num_rows_F = num_rows_E.take(copies.fixed_F)
    num_rows_EM[copies.fixed_F, copies.holder_F] = num_rows_F
    if copies.copied_C.size:
        seconds_F = np.maximum(copies.read_F, copies.start_F + copies.row_F * num_rows_F) * (num_rows_F > 0)
        finish_M = np.bincount(copies.holder_F, weights=seconds_F, minlength=copies.num_members).tolist()
        balancer = _Balancer(copies, num_rows_E.take(copies.copied_C), finish_M)
        balancer.balance()
        ranks, experts, num_rows = [], [], []
        for c, parts in enumerate(balancer.parts_C):
            for rank, rows, _ in parts:
                ranks.append(rank)
                experts.append(c)
                num_rows.append(rows)
        num_rows_EM[copies.copied_C.take(experts), ranks] = num_rows
    return num_rows_EM


class _Balancer:
    """Holds the state of one split: what each member has to do so far, and the parts of every copied expert."""

    def __init__(self, copies: LayerCopies, num_rows_C: IntArray, finish_M: list[float]) -> None:
        self.parts_C: list[tuple[Part, ...]] = [()] * len(num_rows_C)
        self._copies = copies
        self._num_rows_C: list[int] = num_rows_C.tolist()
        self._whole_CM: list[list[float]] = np.maximum(
            copies.read_M, copies.start_M + copies.row_M * num_rows_C[:, None]).tolist()
        self._order: list[int] = (-num_rows_C).argsort(kind="stable")[:np.count_nonzero(num_rows_C)].tolist()
        self._long = [c for c in self._order if self._num_rows_C[c] > copies.short_up_to_C[c]]
        self._finish_M = finish_M
        self._read_M: list[float] = copies.read_M.tolist()
        self._row_M: list[float] = copies.row_M.tolist()
        self._start_M: list[float] = copies.start_M.tolist()
        self._speed_M = [1.0 / row_s for row_s in self._row_M]

    def balance(self) -> None:
        finish_M = self._finish_M
        for c in self._order:
            self.parts_C[c] = parts = self._place(c)
            for rank, _, seconds in parts:
                finish_M[rank] += seconds
        if self._long:
            for _ in range(1, MAX_PASSES):
                latest_s = max(finish_M)
                if self._is_balanced() or not self._place_again() or max(finish_M) > (1.0 - CLOSE) * latest_s:
                    break
        if not self._is_balanced():
            self._relieve_slowest()

    def _is_balanced(self) -> bool:
        latest_s = max(self._finish_M)
        return latest_s - min(self._finish_M) <= CLOSE * latest_s

    def _place_again(self) -> bool:
        """Take every expert out and place it anew, where that is better -> whether any was."""
        finish_M, changed = self._finish_M, False
        for c in self._order:
            before = self.parts_C[c]
            latest_s = max([finish_M[rank] for rank, _, _ in before])
            if latest_s - min([finish_M[rank] for rank in self._copies.holders_C[c]]) <= CLOSE * latest_s:
                continue
            for rank, _, seconds in before:
                finish_M[rank] -= seconds
            after = self._place(c)
            if after != before and self._outcome(after, before) < self._outcome(before, after):
                self.parts_C[c] = before = after
                changed = True
            for rank, _, seconds in before:
                finish_M[rank] += seconds
        return changed

    def _outcome(self, parts: tuple[Part, ...], others: tuple[Part, ...]) -> tuple[float, float]:
        """Judge, smaller is better: by the latest finish among the members of both, then by the seconds spent."""
        latest = max(max(self._finish_M[rank] + seconds for rank, _, seconds in parts),
                     max(self._finish_M[rank] for rank, _, _ in others))
        spent_s = 0.0
        for _, _, seconds in parts:
            spent_s += seconds
        return latest, spent_s

    def _place(self, c: int) -> tuple[Part, ...]:
        """Return the best parts for an expert that nobody has; split only where none reads more than it computes."""
        finish_M, seconds_M, num_rows = self._finish_M, self._whole_CM[c], self._num_rows_C[c]
        holders = self._copies.holders_C[c]
        best = holders[0]
        whole_s = finish_M[best] + seconds_M[best]
        for rank in holders[1:]:
            done_s = finish_M[rank] + seconds_M[rank]
            if done_s < whole_s:
                best, whole_s = rank, done_s
        if num_rows >= self._copies.splits_from_C[c]:
            parts = self._split(num_rows, holders, whole_s, may_read_more=False)
            if parts:
                return parts
        return ((best, num_rows, seconds_M[best]),)

    def _split(self, num_rows: int, holders: tuple[int, ...], limit_s: float, may_read_more: bool) -> tuple[Part, ...]:
        """Return parts for holders that are all done at once and before `limit_s`; none where that is not possible."""
        finish_M, read_M, start_M, speed_M = self._finish_M, self._read_M, self._start_M, self._speed_M
        chosen: list[int] = []
        speed, behind, level_s = 0.0, float(num_rows), math.inf
        for open_s, rank in sorted([(finish_M[rank] + read_M[rank], rank) for rank in holders]):
            new_speed, new_behind = speed + speed_M[rank], behind + (finish_M[rank] + start_M[rank]) * speed_M[rank]
            new_level_s = new_behind / new_speed
            if may_read_more and new_level_s < open_s:
                new_level_s = open_s
            if open_s <= new_level_s < level_s:
                speed, behind, level_s = new_speed, new_behind, new_level_s
                chosen.append(rank)
        if len(chosen) < 2 or level_s >= limit_s:
            return ()
        return self._parts(chosen, num_rows, level_s)

    def _parts(self, ranks: list[int], num_rows: int, level_s: float) -> tuple[Part, ...]:
        """Give whole rows to each of `ranks`, so that all are done at about `level_s`; the last may have less to do."""
        row_M, read_M, start_M, speed_M = self._row_M, self._read_M, self._start_M, self._speed_M
        ready_M = {rank: self._finish_M[rank] + start_M[rank] for rank in ranks}
        shares, left = [], num_rows
        for rank in ranks:
            share = min(left, max(0, int((level_s - ready_M[rank]) * speed_M[rank])))
            shares.append(share)
            left -= share
        for _ in range(left):
            done_s = [ready_M[rank] + row_M[rank] * (share + 1) for rank, share in zip(ranks, shares, strict=True)]
            shares[done_s.index(min(done_s))] += 1
        return tuple([(rank, share, max(read_M[rank], start_M[rank] + row_M[rank] * share))
                      for rank, share in zip(ranks, shares, strict=True) if share])

    def _relieve_slowest(self) -> None:
        """Make the slowest member faster, again and again, as long as that works."""
        for _ in range(MAX_PASSES * self._copies.num_members):
            slowest = self._finish_M.index(max(self._finish_M))
            if not self._find_handover(slowest) and not any(self._relieve(slowest, c) for c in self._long):
                break

    def _find_handover(self, slowest: int) -> bool:
        """Let the slowest give a whole expert to another holder, which may pass on one of its own to have time for it,
        and so on. With experts that cost no more than reading, the step cannot be faster when this finds no way.
        """
        finish_M = self._finish_M
        latest_s = finish_M[slowest]
        if all(finish_s + read_s >= latest_s for finish_s, read_s in zip(finish_M, self._read_M, strict=True)):
            return False
        whole = [(c, self.parts_C[c][0]) for c in reversed(self._order) if len(self.parts_C[c]) == 1]
        handover: dict[int, tuple[int, int]] = {}       # member -> the expert it would get, and from whom
        busy_s = {slowest: latest_s}                    # member -> when it would be done with that one too
        waiting = [slowest]
        for giver in waiting:
            for c, (holder, _, seconds) in whole:
                if holder != giver or not busy_s[giver] - seconds < latest_s:
                    continue
                for rank in self._copies.holders_C[c]:
                    if rank not in busy_s:
                        busy_s[rank] = finish_M[rank] + self._whole_CM[c][rank]
                        handover[rank] = c, giver
                        waiting.append(rank)
                        if busy_s[rank] < latest_s:
                            self._hand_over(handover, rank, slowest)
                            return True
        return False

    def _hand_over(self, handover: dict[int, tuple[int, int]], rank: int, first: int) -> None:
        while rank != first:
            c, giver = handover[rank]
            self._finish_M[giver] -= self._whole_CM[c][giver]
            self._finish_M[rank] += self._whole_CM[c][rank]
            self.parts_C[c] = ((rank, self._num_rows_C[c], self._whole_CM[c][rank]),)
            rank = giver

    def _relieve(self, slowest: int, c: int) -> bool:
        """Split an expert of the slowest member, also over holders that then read more than they compute."""
        finish_M, before = self._finish_M, self.parts_C[c]
        limit_s = finish_M[slowest] * (1.0 - CLOSE)
        if (not any([rank == slowest and seconds > self._read_M[rank] for rank, _, seconds in before])
                or min([finish_M[rank] for rank in self._copies.holders_C[c]]) >= limit_s):
            return False
        for rank, _, seconds in before:
            finish_M[rank] -= seconds
        after = self._split(self._num_rows_C[c], self._copies.holders_C[c], limit_s, may_read_more=True)
        better = bool(after) and self._outcome(after, before)[0] < limit_s
        self.parts_C[c] = after if better else before
        for rank, _, seconds in self.parts_C[c]:
            finish_M[rank] += seconds
        return better
