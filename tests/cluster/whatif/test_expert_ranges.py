from __future__ import annotations

from cluster.whatif.expert_ranges import expert_id_ranges


def test_runs_are_shortened() -> None:
    assert expert_id_ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert expert_id_ranges(()) == ""
