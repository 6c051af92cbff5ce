"""Layers to place, seeded, and the rules that ours is compared with.

The rules of others treat members alike; how long their placement takes is then counted at the members' real speeds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cluster.planner.even_placement import equal_slots, even_holders
from cluster.planner.layer.linear_program import best_split, everything_open, member_seconds
from cluster.planner.layer.problem import LayerProblem, holders_mask
from cluster.planner.layer.rounding import add_copy
from model.arrays import BoolArray

NUM_EXPERTS = (16, 64, 128)


def instance(seed: int, is_tight: bool = False) -> LayerProblem:
    """Return a layer with speeds up to 8:1, 3 to 8 members, zipf 0 to 1.2, 1 or 2 copies, 5 to 50 % spare slots.

    Spare: the members' memory has room for experts x copies x (1 + spare). It is divided by chance, a member four times
    as fast has on average twice as much; each member's part is rounded up to whole slots, at most one of each expert.
    Tight: rounded down, and only what is then missing in all is given back, so that 16 experts may have 17 slots.
    """
    random = np.random.default_rng(seed)
    num_experts, min_copies = NUM_EXPERTS[seed % 3], 1 + seed // 3 % 2
    num_members, spare = int(random.integers(3, 9)), random.uniform(0.05, 0.5)
    speed_M = 2.0 ** random.uniform(0, 3, num_members)
    load_E = 1.0 / np.arange(1, num_experts + 1) ** random.uniform(0, 1.2)
    random.shuffle(load_E)
    part_M = np.sqrt(speed_M) * np.exp(random.normal(0, 0.4, num_members))
    wanted = num_experts * min_copies * (1 + spare)
    slots_M = wanted * part_M / part_M.sum()
    slots_M = np.minimum(np.floor(slots_M) if is_tight else np.ceil(slots_M), num_experts)
    while slots_M.sum() < min(wanted, num_experts * num_members):       # what is above one of each goes to the others
        slots_M[np.argmin(np.where(slots_M < num_experts, slots_M / part_M, np.inf))] += 1
    costs_EM = (load_E / load_E.sum())[:, None] / speed_M
    return LayerProblem(costs_EM, tuple(slots_M.astype(int).tolist()), min_copies)


def contiguous_s(problem: LayerProblem) -> float:
    """Give equal numbers of experts in order, as memory allows, and divide rows equally over copies."""
    num_experts = len(problem.costs_EM)
    holders = even_holders(problem.room_M.tolist(), 1, num_experts, problem.min_copies)[0]
    return _equal_split_s(problem, holders_mask(holders, len(problem.slots_M)))


def even_s(problem: LayerProblem) -> float:
    """Place by EPLB's rule: copies for the hottest experts, then the heaviest copy first to the least loaded member.

    All members have equal slots, as memory allows, and rows are divided equally over copies.
    """
    load_E = problem.costs_EM.mean(axis=1)
    num_experts, num_members = problem.costs_EM.shape
    num_slots = max(num_members * int(problem.room_M.min()), num_experts * problem.min_copies)
    num_copies_E = np.full(num_experts, problem.min_copies)
    for _ in range(num_slots - int(num_copies_E.sum())):
        num_copies_E[np.argmax(np.where(num_copies_E < num_members, load_E / num_copies_E, -1.0))] += 1
    alike = LayerProblem(np.repeat((load_E / num_copies_E)[:, None], num_members, axis=1),
                         tuple(equal_slots(problem.room_M.tolist(), num_slots)), problem.min_copies)
    held_EM, load_M = np.zeros(problem.costs_EM.shape, dtype=np.bool_), np.zeros(num_members)
    for expert in np.argsort(-(load_E / num_copies_E), kind="stable"):
        for _ in range(num_copies_E[expert]):
            before_M = held_EM.sum(axis=0)
            add_copy(alike, held_EM, int(expert), -load_M)
            load_M += (held_EM.sum(axis=0) - before_M) * load_E[expert] / num_copies_E[expert]
    return _equal_split_s(problem, held_EM)


def speed_lpt_s(problem: LayerProblem) -> float:
    """Place the longest processing time first, by speed, where there is a slot; divide rows at best."""
    held_EM = np.zeros(problem.costs_EM.shape, dtype=np.bool_)
    for expert in np.argsort(-problem.costs_EM.mean(axis=1), kind="stable"):
        for _ in range(problem.min_copies):
            add_copy(problem, held_EM, int(expert), np.zeros(len(problem.slots_M)))
    return best_split(problem, held_EM)[0]


def _equal_split_s(problem: LayerProblem, held_EM: BoolArray) -> float:
    return float(member_seconds(problem, held_EM / held_EM.sum(axis=1, keepdims=True)).max())


def without_member(problem: LayerProblem, previous: tuple[tuple[int, ...], ...], gone: int) -> LayerProblem:
    """Return the layer after a member has left. Raises PlacementError when the others have no room."""
    holders = tuple(tuple(rank - (rank > gone) for rank in ranks if rank != gone) for ranks in previous)
    slots = problem.slots_M[:gone] + problem.slots_M[gone + 1:]
    return LayerProblem(np.delete(problem.costs_EM, gone, axis=1), slots, problem.min_copies, previous=holders)


def least_moves(problem: LayerProblem) -> int:
    """Return how many copies must be loaded so that every expert has min_copies holders, however slow that is.

    A matching of experts to slots, for which the relaxed program has whole numbers as its optimum.
    """
    solved = replace(everything_open(problem), max_step_s=np.inf).relaxed()
    assert solved is not None, "LayerProblem checks that there is room"
    return round(float(solved.copies_EM[~problem.previous_EM()].sum()))
