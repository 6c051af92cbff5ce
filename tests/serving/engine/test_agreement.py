"""All members come to the same from the same headers."""

from __future__ import annotations

import itertools

from model.step import StepHeader
from serving.engine.agreement import Agreement


def agreed(*members: tuple[int, int]) -> Agreement:
    return Agreement(tuple(StepHeader(1, 5, tokens, revision) for tokens, revision in members))


def test_one_member_with_tokens_makes_all_step() -> None:
    agreement = agreed((0, 0), (3, 0))
    assert agreement.is_step and agreement.num_tokens_of_member == (0, 3) and agreement.is_step_at_once(0)
    assert not agreed((0, 0), (0, 0)).is_step


def test_a_placement_changes_when_all_have_told_the_same_newer_one() -> None:
    for revisions in itertools.product(range(3), repeat=3):
        agreement = agreed(*((1, revision) for revision in revisions))
        switches = set(revisions) == {2}
        assert agreement.revision_after(1) == (2 if switches else 1)
        assert agreement.is_step_at_once(1) is not switches
