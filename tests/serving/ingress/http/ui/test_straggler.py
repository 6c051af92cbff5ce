"""Who is slower than its profile, beside the others, is named with the reason."""

from __future__ import annotations

from serving.ingress.http.ui.straggler import Straggler, find_straggler
from serving.link.epoch import WorkRatio


def ratio(own: float | None, experts: float | None) -> WorkRatio:
    return WorkRatio(own, experts, num_steps=100)


def found(*ratios: WorkRatio | None) -> Straggler:
    straggler = find_straggler(ratios)
    assert straggler is not None
    return straggler


def test_the_member_that_stands_out_is_named_by_the_part_that_is_slow() -> None:
    by_experts = found(ratio(1.0, 1.1), ratio(1.1, 1.9), ratio(1.0, 1.0))
    assert by_experts.rank == 1 and "experts take 1.90 x" in by_experts.reason and "others 1.05 x" in by_experts.reason
    by_own = found(ratio(3.0, 1.1), ratio(1.0, 1.4), ratio(1.0, 1.0))
    assert by_own.rank == 0 and "own rows take 3.00 x" in by_own.reason


def test_all_alike_have_no_straggler() -> None:
    assert find_straggler([ratio(1.5, 1.6), ratio(1.6, 1.5), ratio(1.4, 1.5)]) is None
    assert find_straggler([]) is None
    assert find_straggler([None, ratio(None, None)]) is None


def test_one_that_is_alone_is_held_to_its_profile() -> None:
    assert find_straggler([ratio(1.1, None)]) is None
    alone = found(None, ratio(None, 2.0))
    assert alone.rank == 1 and "others" not in alone.reason
