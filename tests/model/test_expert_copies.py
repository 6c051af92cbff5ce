from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model.expert_copies import choose_copies

ranks = st.lists(st.integers(0, 5), min_size=1, unique=True).map(sorted)


@given(holders=st.lists(ranks, max_size=8), owner=st.integers(0, 5))
def test_the_chosen_rank_holds_the_expert_and_is_the_owner_if_it_can(holders: list[list[int]], owner: int) -> None:
    for expert, chosen in enumerate(choose_copies(holders, owner)):
        assert chosen in holders[expert]
        assert chosen == owner or owner not in holders[expert]


def test_owners_without_a_copy_spread_over_the_copies() -> None:
    holders = [(4, 5)] * 4
    assert [choose_copies(holders, owner) for owner in range(2)] == [(4, 5, 4, 5), (5, 4, 5, 4)]
