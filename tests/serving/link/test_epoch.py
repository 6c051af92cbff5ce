"""An epoch answers for its members; shares are checked where they are made."""

from __future__ import annotations

import pytest

from model.placement import Placement
from serving.link.epoch import DeviceFacts, Epoch, Member, PlanFigures, RequestShare
from tests.placements import even_shares

FACTS = DeviceFacts("cpu", "a CPU", "packed-cpu", 2 << 30, 1)
MEMBERS = tuple(Member(f"shard-{name}", "pool", f"node-{name}", name, f"127.0.0.1:{port}", FACTS)
                for port, name in enumerate("abc", 9001))
PLACEMENT = Placement(3, (((0,), (1,), (2,)),))


def _epoch(*shares: RequestShare) -> Epoch:
    return Epoch(1, MEMBERS, PLACEMENT, "", shares or even_shares(3))


def test_a_rank_is_the_place_among_the_members() -> None:
    assert [_epoch().rank_of(member.shard_id) for member in MEMBERS] == [0, 1, 2]
    assert _epoch().rank_of("shard-d") is None


def test_every_member_has_a_share() -> None:
    with pytest.raises(ValueError, match="epoch 1 has 2 shares for 3 members"):
        _epoch(*even_shares(2))


def test_a_share_bounds_a_step_and_none_takes_no_request() -> None:
    epoch = _epoch(RequestShare(0.75, 300), RequestShare(0.25, 900), RequestShare(0.0, 0))
    assert [epoch.takes_requests(rank) for rank in range(3)] == [True, True, False]
    assert [epoch.token_budget(rank, 512) for rank in range(3)] == [300, 512, 0]


@pytest.mark.parametrize(("fraction", "token_budget"), [(-0.1, 1), (1.1, 1), (0.5, 0), (float("nan"), 1)])
def test_shares_are_fractions_and_have_tokens(fraction: float, token_budget: int) -> None:
    with pytest.raises(ValueError, match="a fraction is within 0..1"):
        RequestShare(fraction, token_budget)


def test_figures_of_a_plan_follow_from_its_times() -> None:
    figures = PlanFigures(100, 1024, step_s=0.5, bound_s=0.4, limit="compute", solver="exact")
    assert figures.tokens_per_s == 200 and figures.ratio == pytest.approx(1.25)
