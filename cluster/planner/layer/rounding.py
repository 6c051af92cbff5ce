"""The way from a relaxed placement of one layer to whole copies, by rules that take milliseconds. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cluster.planner.layer.linear_program import Solved, best_split, member_seconds
from cluster.planner.layer.problem import LayerProblem
from model.arrays import BoolArray, FloatArray

WHOLE = 1 - 1e-6
NUM_SWAPS = 16
NUM_COPY_ROUNDS = 8
CLOSE = 1.001           # to the bound: no more copies are tried


def round_copies(problem: LayerProblem, solved: Solved, max_moves: int) -> BoolArray:
    """Find whole copies near the relaxed ones, in the slots, every expert in min_copies.

    At most max_moves are new, where that is possible.
    """
    held_EM = solved.copies_EM >= WHOLE
    wished_EM = np.where(held_EM, 0.0, np.maximum(solved.fraction_EM * problem.costs_EM, 1e-12 * solved.copies_EM))
    most_first = np.argsort(-(solved.fraction_EM * problem.costs_EM).sum(axis=1), kind="stable")
    for expert in most_first:
        while held_EM[expert].sum() < problem.min_copies:
            add_copy(problem, held_EM, int(expert), wished_EM[expert])
    held_EM = swap_copies(problem, held_EM, NUM_SWAPS)
    _add_wished(problem, held_EM, wished_EM, max_moves)
    return _add_where_it_helps(problem, held_EM, solved.step_s, max_moves)


def add_copy(problem: LayerProblem, held_EM: BoolArray, expert: int, wished_M: FloatArray) -> None:
    """Add a copy of the expert where it is wished, else where it costs least. In place; makes room when it must."""
    free_M = problem.room_M - held_EM.sum(axis=0)
    allowed_M = (free_M > 0) & ~held_EM[expert]
    if not allowed_M.any():
        _make_room(held_EM, free_M, expert)
        allowed_M = (problem.room_M - held_EM.sum(axis=0) > 0) & ~held_EM[expert]
    load_M = member_seconds(problem, held_EM / np.maximum(1, held_EM.sum(axis=1, keepdims=True)))
    after_M = load_M + problem.costs_EM[expert]
    candidates = np.flatnonzero(allowed_M)
    held_EM[expert, min(candidates, key=lambda member: (-wished_M[member], after_M[member]))] = True


def _make_room(held_EM: BoolArray, free_M: FloatArray, expert: int) -> None:
    """Move another expert's copy from a member that does not hold this one to a free slot, as all of those do."""
    for target in np.flatnonzero(free_M > 0):
        for source in np.flatnonzero(~held_EM[expert]):
            movable = np.flatnonzero(held_EM[:, source] & ~held_EM[:, target])
            if len(movable):
                held_EM[movable[0], source], held_EM[movable[0], target] = False, True
                return
    raise AssertionError("LayerProblem checks that there is room")


@dataclass(frozen=True, slots=True)
class _Swap:
    after_s: float          # of the slower of the two members
    expert: int             # leaves the slowest member
    member: int             # and goes there
    other: int | None       # which comes back; None: a free slot is used


def swap_copies(problem: LayerProblem, held_EM: BoolArray, num_swaps: int) -> BoolArray:
    """Exchange a copy of the slowest member with another's, or move it to a free slot, while that helps. In place.

    Only experts with one copy, and no copies that are there already.
    """
    for _ in range(num_swaps):
        load_M = member_seconds(problem, held_EM / held_EM.sum(axis=1, keepdims=True))
        slowest = int(load_M.argmax())
        swap = min(_swaps(problem, held_EM, load_M, slowest), key=lambda one: one.after_s, default=None)
        if swap is None or swap.after_s >= load_M[slowest] * (1 - 1e-9):
            break
        held_EM[swap.expert, slowest], held_EM[swap.expert, swap.member] = False, True
        if swap.other is not None:
            held_EM[swap.other, swap.member], held_EM[swap.other, slowest] = False, True
    return held_EM


def _swaps(problem: LayerProblem, held_EM: BoolArray, load_M: FloatArray, slowest: int) -> Iterator[_Swap]:
    """Yield the best swap and the best move with each other member."""
    costs_EM = problem.costs_EM
    is_movable_EM = held_EM & ~problem.previous_EM() & (held_EM.sum(axis=1) == 1)[:, None]
    own = np.flatnonzero(is_movable_EM[:, slowest])
    for member in range(len(load_M)):
        if member == slowest or not len(own):
            continue
        here = load_M[slowest] - costs_EM[own, slowest]
        there = load_M[member] + costs_EM[own, member]
        if held_EM[:, member].sum() < problem.room_M[member]:
            after = np.maximum(here, there)
            yield _Swap(float(after.min()), int(own[after.argmin()]), member, None)
        theirs = np.flatnonzero(is_movable_EM[:, member])
        if len(theirs):
            after = np.maximum(here[:, None] + costs_EM[theirs, slowest][None],
                               there[:, None] - costs_EM[theirs, member][None])
            one, two = np.unravel_index(int(after.argmin()), after.shape)
            yield _Swap(float(after[one, two]), int(own[one]), member, int(theirs[two]))


def _add_wished(problem: LayerProblem, held_EM: BoolArray, wished_EM: FloatArray, max_moves: int) -> None:
    """Add the copies over which the relaxed placement splits rows, largest parts first, while slots last. In place."""
    previous_EM = problem.previous_EM()
    num_moves = int((held_EM & ~previous_EM).sum())
    pairs = np.argwhere((wished_EM > 1e-9 * max(float(wished_EM.max()), 1e-30)) & ~held_EM)
    for expert, member in sorted(pairs.tolist(), key=lambda pair: (-wished_EM[pair[0], pair[1]], pair)):
        is_new = not previous_EM[expert, member]
        if held_EM[:, member].sum() < problem.room_M[member] and num_moves + is_new <= max_moves:
            held_EM[expert, member] = True
            num_moves += is_new


def _add_where_it_helps(problem: LayerProblem, held_EM: BoolArray, goal_s: float, max_moves: int) -> BoolArray:
    """Give experts of the slowest members a copy on others with a free slot, while the step becomes faster."""
    best_EM, best_s = held_EM, np.inf
    for _ in range(NUM_COPY_ROUNDS):
        step_s, fraction_EM = best_split(problem, held_EM)
        if step_s >= best_s * (1 - 1e-6):
            break
        best_EM, best_s, held_EM = held_EM, step_s, held_EM.copy()
        if step_s <= goal_s * CLOSE or not _relieve(problem, held_EM, fraction_EM, max_moves):
            break
    return best_EM


def _relieve(problem: LayerProblem, held_EM: BoolArray, fraction_EM: FloatArray, max_moves: int) -> bool:
    """Give one more copy to an expert of each of the slowest members, in place. False when there was none to give."""
    costs_EM, load_M = problem.costs_EM, member_seconds(problem, fraction_EM)
    step_s, is_changed = load_M.max(), False
    for slowest in np.flatnonzero(load_M >= step_s * (1 - 1e-6)):
        num_moves = int((held_EM & ~problem.previous_EM()).sum())
        has_slot_M = (held_EM.sum(axis=0) < problem.room_M) & (load_M < step_s * (1 - 1e-6))
        if num_moves >= max_moves or not has_slot_M.any():
            break
        cost_E = costs_EM[:, slowest][:, None]
        shifted_EM = np.minimum(fraction_EM[:, slowest][:, None],
                                (step_s - load_M) / np.maximum(cost_E + costs_EM, 1e-30))
        relief_EM = np.where(has_slot_M & ~held_EM, shifted_EM * cost_E, 0.0)
        best_expert, best_member = np.unravel_index(int(relief_EM.argmax()), relief_EM.shape)
        if relief_EM[best_expert, best_member] > 0:
            held_EM[best_expert, best_member] = is_changed = True
    return is_changed
