"""`moesaic drain` asks for one operation until it is done, also over a coordinator that restarts."""

from __future__ import annotations

import pytest

from cluster.cli import drain_command
from cluster.cli.drain_command import drained
from cluster.coordinator.client import CoordinatorUnavailableError
from cluster.coordinator.leaving import Drain


class Client:
    """Answers that it is done at the given call; the second call finds no coordinator."""

    def __init__(self, num_calls: int) -> None:
        self.num_calls = num_calls
        self.asked: list[tuple[str, str]] = []

    def drain(self, target: str, operation_id: str) -> Drain:
        self.asked.append((target, operation_id))
        if len(self.asked) == 2:
            raise CoordinatorUnavailableError("it restarts")
        return Drain(operation_id, target, ("s",), len(self.asked) >= self.num_calls, 1, 0, "")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_command, "_POLL_S", 0.0)


def test_it_asks_again_with_the_same_id_until_done() -> None:
    client = Client(num_calls=4)
    assert drained(client, "node-a", None, wait_s=60.0).is_done
    assert len(client.asked) == 4 and len(set(client.asked)) == 1


def test_without_waiting_it_asks_once() -> None:
    client = Client(num_calls=4)
    assert not drained(client, "node-a", "op", wait_s=0.0).is_done
    assert client.asked == [("node-a", "op")]
