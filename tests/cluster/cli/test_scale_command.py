"""`moesaic scale` asks for the same number until the pool has it, also over a coordinator that restarts."""

from __future__ import annotations

import pytest

from cluster.cli import scale_command
from cluster.cli.scale_command import scaled
from cluster.coordinator.client import CoordinatorUnavailableError
from cluster.coordinator.pool_scale import PoolScale


class Client:
    """Answers that it is done at the given call; the second call finds no coordinator."""

    def __init__(self, num_calls: int) -> None:
        self.num_calls = num_calls
        self.asked: list[tuple[str, int, str | None]] = []

    def scale(self, pool: str, num: int, shard_id: str | None) -> PoolScale:
        self.asked.append((pool, num, shard_id))
        if len(self.asked) == 2:
            raise CoordinatorUnavailableError("it restarts")
        return PoolScale(pool, num, num, (), len(self.asked) >= self.num_calls, "")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_command, "_POLL_S", 0.0)


@pytest.mark.parametrize(("wait_s", "num_asked"), [(60.0, 4), (0.0, 1)])
def test_it_asks_until_done_or_once(wait_s: float, num_asked: int) -> None:
    client = Client(num_calls=4)
    assert scaled(client, "cpu", 2, "cpu-a", wait_s).is_done == bool(wait_s)
    assert client.asked == [("cpu", 2, "cpu-a")] * num_asked
