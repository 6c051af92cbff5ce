"""A router's load counts what waits and runs once, and expects outputs as long as the latest were."""

from __future__ import annotations

from dataclasses import replace

from serving.router.admission import Ticket
from serving.router.choice import Choice
from serving.router.open_request import OpenPart, OpenRequest
from serving.router.router_load import LoadCounter, RouterLoad
from tests.serving.router.served_shards import ask


class NoText:
    """Is never asked."""


def part(num_prompt_tokens: int, num_choices: int = 1) -> OpenPart:
    asked = ask(prompt=(1,) * num_prompt_tokens, n=num_choices)
    return OpenPart(OpenRequest(0.0, 1.0), 0, asked, Ticket("t", num_choices, 0, 0.0))


def choice(index: int, num_tokens: int) -> Choice:
    one = Choice(index, f"s{index}", NoText(), (), False)       # type: ignore[arg-type]
    one.num_tokens = num_tokens
    return one


def test_who_waits_for_admission_waits_and_who_was_admitted_is_counted_by_its_choices() -> None:
    counter, waiting, open_part = LoadCounter(), part(100), part(40, num_choices=3)
    for one in (waiting, open_part):
        counter.arrived(one, 10)
    assert counter.load([]) == RouterLoad(4, 140, 0, 140, 4, 140, 40)
    counter.entered(open_part)
    placed = [(open_part, choice(0, 0)), (open_part, choice(1, 0)), (open_part, choice(2, 7))]
    assert counter.load(placed) == RouterLoad(4, 140, 1, 147, 4, 140, 40)
    counter.entered(waiting)
    assert counter.load([(open_part, choice(0, 1))]) == RouterLoad(1, 0, 1, 41, 4, 140, 40)


def test_outputs_are_expected_as_long_as_the_latest_were_and_never_longer_than_asked() -> None:
    counter = LoadCounter()
    counter.arrived(part(1), 1000)
    assert counter.load([]).num_output_tokens == 1000
    for _ in range(400):
        counter.ended(50)
    before = counter.load([])
    counter.arrived(part(1), 1000)
    counter.arrived(part(1), 20)
    assert replace(counter.load([]), num_held=1, num_waiting_tokens=1, num_kv_tokens=1, num_arrived=1,
                   num_prompt_tokens=1).num_output_tokens - before.num_output_tokens == 50 + 20
