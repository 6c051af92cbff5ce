"""Snapshots are found by the name of the block that ends there; the scheduler's machine tries
every interleaving."""

from __future__ import annotations

from serving.engine.state_slots import PlannedSlots, StateSlots, snapshot_positions
from tests.serving.engine.fake_group import check_state_slots


def name_of(position: int) -> bytes:
    return f"prefix of {position}".encode()


def run_to(slots: StateSlots, request_id: str, position: int, keeps: bool = False, is_output: bool = False,
           on_the_way: tuple[int, ...] = ()) -> PlannedSlots:
    planned = slots.plan(request_id, on_the_way, name_of)
    slots.commit(request_id, name_of, position, keeps, is_output)
    return planned


def test_a_sequence_goes_back_and_forth_between_two_slots() -> None:
    slots = StateSlots(4)
    assert slots.start("a", None)
    steps = [run_to(slots, "a", position) for position in (8, 9, 10, 11)]
    assert steps[0].read is None
    assert [step.read for step in steps[1:]] == [step.write for step in steps[:-1]]
    assert len({step.write for step in steps}) == 2 and slots.num_free == 2
    slots.release("a")
    assert slots.num_free == 4


def test_the_longest_prefix_that_ends_with_a_snapshot_is_reused() -> None:
    slots = StateSlots(8)
    assert slots.start("a", None)
    run_to(slots, "a", 20, on_the_way=(8, 16))
    slots.release("a")
    names = [name_of(position) for position in (4, 8, 12, 16, 20)]
    assert slots.num_reusable(names) == 4 and slots.num_reusable(names[:3]) == 2 and slots.num_reusable(names[:1]) == 0
    assert slots.start("b", names[3]) and slots.start("c", names[3])
    first, other = slots.plan("b", (), name_of), slots.plan("c", (), name_of)
    assert first.read == other.read and first.write != other.write


def test_a_snapshot_is_not_written_by_the_sequence_that_left_it() -> None:
    slots = StateSlots(8)
    assert slots.start("a", None)
    kept = run_to(slots, "a", 8, keeps=True).write
    writes = {run_to(slots, "a", position).write for position in (9, 10, 11)}
    assert kept not in writes and slots.num_reusable([name_of(4), name_of(8)]) == 2
    check_state_slots(slots, ["a"])


def test_of_what_an_output_leaves_only_the_newest_stays() -> None:
    slots = StateSlots(8)
    assert slots.start("a", None)
    run_to(slots, "a", 8, keeps=True)
    for position in (12, 16, 20):
        run_to(slots, "a", position, keeps=True, is_output=True)
    slots.release("a")
    found = [slots.num_reusable([name_of(position)]) for position in (8, 12, 16, 20)]
    assert found == [1, 0, 0, 1] and slots.num_snapshots == 2


def test_what_an_output_left_before_stays_until_somebody_needs_the_slot() -> None:
    """Another member may be about to take the sequence over as it was a moment ago."""
    slots = StateSlots(5)
    assert slots.start("a", None)
    for position in (12, 16, 20):
        run_to(slots, "a", position, keeps=True, is_output=True)
    assert [slots.num_reusable([name_of(position)]) for position in (12, 16, 20)] == [0, 1, 1]
    check_state_slots(slots, ["a"])
    assert slots.start("b", None)
    assert [slots.num_reusable([name_of(position)]) for position in (16, 20)] == [0, 1]
    check_state_slots(slots, ["a", "b"])


def test_without_room_nothing_is_kept_and_nobody_waits_for_it() -> None:
    slots = StateSlots(2)
    assert slots.start("a", None) and not slots.start("b", None)
    assert run_to(slots, "a", 20, keeps=True, on_the_way=(8, 16)).on_the_way == ()
    assert slots.num_snapshots == 0
    slots.release("a")
    assert slots.num_free == 2 and slots.start("b", None)


def left_by(slots: StateSlots, position: int, on_the_way: tuple[int, ...] = ()) -> bytes:
    """Compute a prompt of its own so far and end. Returns the name of the snapshot at its end."""
    own = f"{position} of its own".encode()
    request_id = own.decode()
    assert slots.start(request_id, None)
    slots.plan(request_id, on_the_way, lambda at: own if at == position else name_of(at))
    slots.commit(request_id, lambda at: own if at == position else name_of(at), position, keeps=True, is_output=False)
    slots.release(request_id)
    return own


def has(slots: StateSlots, *names: bytes) -> list[bool]:
    return [slots.num_reusable([name]) == 1 for name in names]


def test_the_snapshot_that_saves_least_goes_first() -> None:
    slots = StateSlots(6)
    long, short = left_by(slots, 100), left_by(slots, 20)
    behind = left_by(slots, 110, on_the_way=(96,))      # saves 14 tokens where the one at 96 is there
    assert has(slots, long, short, behind, name_of(96)) == [True] * 4
    assert slots.start("new", None)                     # takes the two that are left
    slots.plan("new", (5,), name_of)
    assert has(slots, long, short, behind, name_of(96)) == [True, True, False, True]
    slots.plan("new", (5, 6), name_of)
    assert has(slots, long, short, name_of(96)) == [True, False, True]


def test_what_is_used_stays_and_what_nobody_uses_goes_in_the_end() -> None:
    slots = StateSlots(5)
    large, used = left_by(slots, 100), left_by(slots, 40)
    for position in range(10, 31):
        left_by(slots, position)
        assert has(slots, used) == [True]
        assert slots.start("again", used)
        slots.release("again")
    assert has(slots, large) == [False]


def test_equals_go_by_their_last_use() -> None:
    slots = StateSlots(4)
    for position in (8, 16):
        assert slots.start(str(position), None if position == 8 else name_of(8))
        run_to(slots, str(position), position, keeps=True)
        slots.release(str(position))
    assert slots.start("new", None) and slots.start("more", name_of(8)) is False
    slots.plan("new", (20,), name_of)
    assert has(slots, name_of(8), name_of(16)) == [False, True]


def test_a_step_that_did_not_succeed_publishes_nothing() -> None:
    slots = StateSlots(8)
    assert slots.start("a", None)
    assert [position for position, _ in slots.plan("a", (8, 16), name_of).on_the_way] == [8, 16]
    assert slots.plan("a", (8,), name_of).on_the_way[0][0] == 8      # the next try is shorter
    slots.commit("a", name_of, 12, keeps=False, is_output=False)
    assert slots.num_reusable([name_of(8), name_of(16)]) == 1
    check_state_slots(slots, ["a"])


def test_without_slots_it_stands_in_nobodys_way() -> None:
    slots = StateSlots(0)
    assert slots.num_reusable([b"x", b"y"]) == 2 and slots.start("a", b"y")
    assert slots.plan("a", (8,), name_of) == PlannedSlots()
    slots.commit("a", name_of, 8, keeps=True, is_output=False)
    slots.release("a")


def test_positions_worth_keeping() -> None:
    end, prompt = 99, list(range(100))
    assert snapshot_positions(prompt, (), 16, 2048) == (96,)
    assert snapshot_positions(prompt[:97], (), 16, 2048) == (96,)
    assert snapshot_positions(prompt[:96], (), 16, 2048) == (80,)         # the last token is always computed
    assert snapshot_positions(prompt[:16], (), 16, 2048) == ()
    assert snapshot_positions(prompt, (), 16, 40) == (32, 64, 96)
    messages = [end if index in (20, 35, 50, 70, 90) else 1 for index in range(100)]
    assert snapshot_positions(messages, (end,), 16, 2048) == (16, 48, 64, 80, 96)
    assert snapshot_positions(prompt, (), 16, 2048, shared=40) == (32, 96)
    assert snapshot_positions(range(2000), (), 16, 4096) == (1536, 1984)   # others may differ in the last words only
