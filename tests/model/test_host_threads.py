"""The threads that members of one machine lend each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model.host_threads import HostThreads


def test_who_alone_has_rows_has_the_threads_of_all() -> None:
    assert HostThreads((2, 2), 0, 8).for_own_rows((5, 0)) == 4
    assert HostThreads((1, 1, 1), 2, 8).for_own_rows((0, 0, 1)) == 3


def test_members_with_rows_divide_them() -> None:
    assert [HostThreads((2, 2, 2), rank, 8).for_own_rows((1, 9, 0)) for rank in range(3)] == [3, 3, 3]
    assert HostThreads((2, 2), 1, 8).for_own_rows((1, 1)) == 2


def test_members_elsewhere_neither_lend_nor_share() -> None:
    assert HostThreads((2, 0, 2), 0, 8).for_own_rows((1, 7, 0)) == 4


def test_no_more_than_the_process_can_keep_busy() -> None:
    assert HostThreads((1, 1, 1), 0, 2).for_own_rows((1, 0, 0)) == 2


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=6), st.integers(1, 64))
def test_never_less_than_its_own_and_together_never_more_than_all_have(
        members: list[tuple[int, int]], num_cpus: int) -> None:
    num_threads_M, num_tokens_M = zip(*members, strict=True)
    used_M = [HostThreads(num_threads_M, rank, num_cpus).for_own_rows(num_tokens_M) for rank in range(len(members))]
    assert all(used >= own for used, own in zip(used_M, num_threads_M, strict=True))
    borrowed = [used for used, own, tokens in zip(used_M, num_threads_M, num_tokens_M, strict=True)
                if own and tokens and used > own]
    assert sum(borrowed) <= sum(num_threads_M)
