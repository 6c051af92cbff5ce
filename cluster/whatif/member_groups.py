"""Members of one kind whose plans are alike, so that they can be shown as one line. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.planner.placement_plan import MemberPlan, PlacementPlan
from cluster.whatif.answer import PlanAnswer
from cluster.whatif.expert_ranges import expert_id_ranges
from model.placement import Placement

_ALIKE = 0.1        # members whose expert copies differ by a smaller part share a line


@dataclass(frozen=True, slots=True)
class MemberGroup:
    """Members alike: `members` are the plans of `ranks`, ascending."""

    kind: str
    ranks: tuple[int, ...]
    members: tuple[MemberPlan, ...]

    @property
    def label(self) -> str:
        return f"{len(self.ranks)} x {self.kind}" if len(self.ranks) > 1 else self.members[0].name

    @property
    def num_copies(self) -> tuple[int, int]:
        """The copies of one member: fewest and most."""
        copies = [member.num_expert_copies for member in self.members]
        return min(copies), max(copies)


def member_groups(answer: PlanAnswer, plan: PlacementPlan) -> tuple[MemberGroup, ...]:
    """Group by kind, those that take requests first. A group's members differ in a few expert copies at most."""
    groups: list[list[int]] = []
    kinds = [member.pool for member in answer.members]
    by_share = sorted(range(len(kinds)), key=lambda rank: -plan.members[rank].share.fraction)
    for rank in sorted(by_share, key=lambda rank: kinds.index(kinds[rank])):
        for group in groups:
            if kinds[group[0]] == kinds[rank] and _are_alike(plan.members[group[0]], plan.members[rank]):
                group.append(rank)
                break
        else:
            groups.append([rank])
    return tuple(MemberGroup(kinds[ranks[0]], tuple(sorted(ranks)), tuple(plan.members[rank] for rank in sorted(ranks)))
                 for ranks in groups)


def _are_alike(one: MemberPlan, other: MemberPlan) -> bool:
    if one.share.token_budget != other.share.token_budget or one.memory.budget_bytes != other.memory.budget_bytes:
        return False
    most = max(one.num_expert_copies, other.num_expert_copies)
    return abs(one.num_expert_copies - other.num_expert_copies) <= max(1, _ALIKE * most)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def experts_a_layer(placement: Placement, ranks: Sequence[int]) -> str:
    """Write the ids where all layers have the same ones, else how many each rank has: '0-15', '19-20 a layer'."""
    of_layer = [tuple(sorted({expert for rank in ranks for expert in placement.experts_of(layer, rank)}))
                for layer in range(placement.num_layers)]
    if not any(of_layer):
        return "none"
    if len(set(of_layer)) == 1 and len(text := expert_id_ranges(of_layer[0])) <= 24:
        return text
    counts = sorted(len(placement.experts_of(layer, rank)) for layer in range(placement.num_layers) for rank in ranks)
    each = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]}-{counts[-1]}"
    return f"{each} a layer"
