"""The table of a shard's states."""

from __future__ import annotations

import pytest

from cluster.coordinator.view import ShardState
from cluster.shard.lifecycle import NEXT, IllegalTransition, ShardLifecycle


@pytest.mark.parametrize("state", ShardState)
def test_only_listed_moves_are_legal(state: ShardState) -> None:
    for to in ShardState:
        lifecycle = ShardLifecycle("s")
        lifecycle.state = state
        if to in NEXT[state]:
            lifecycle.advance(to, "test")
            assert lifecycle.state is to
        else:
            with pytest.raises(IllegalTransition, match="allowed next"):
                lifecycle.advance(to, "test")
