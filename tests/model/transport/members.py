"""Endpoints of several members: on threads of this process, or each in a process of its own that can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from model.arrays import IntArray
from model.transport.address import EndpointAddress, Secret
from model.transport.endpoint import Endpoint
from model.transport.group import TransportGroup
from model.transport.peer_error import PeerError
from tests.deadlines import BEYOND_PATIENCE_S, PATIENCE_S

R = TypeVar("R")
ROOT = Path(__file__).parents[3]


class Members:
    """Has `num_members` endpoints, and a thread for each."""

    def __init__(self, num_members: int, shares_memory: bool) -> None:
        machine = None if shares_memory else ""
        self.endpoints = [Endpoint("127.0.0.1", machine=machine) for _ in range(num_members)]
        self.addresses = [endpoint.address for endpoint in self.endpoints]
        self._threads = [ThreadPoolExecutor(1) for _ in range(num_members)]
        self._last_group_id = 0

    def start(self, rank: int, function: Callable[[], R]) -> Future[R]:
        return self._threads[rank].submit(function)

    def run(self, function: Callable[[int], R], ranks: list[int] | None = None) -> list[R]:
        """Call it with each rank, all at once."""
        called = range(len(self.endpoints)) if ranks is None else ranks
        futures = [self.start(rank, lambda rank=rank: function(rank)) for rank in called]  # type: ignore[misc]
        return [future.result(PATIENCE_S) for future in futures]

    def open(self, timeout_s: float = BEYOND_PATIENCE_S, num_members: int | None = None) -> list[TransportGroup]:
        group_id, addresses = self.next_group_id(), self.addresses[:num_members]
        return self.run(lambda rank: self.endpoints[rank].open_group(group_id, addresses, rank, timeout_s),
                        list(range(len(addresses))))

    def next_group_id(self) -> int:
        self._last_group_id += 1
        return self._last_group_id

    def close(self) -> None:
        for endpoint in self.endpoints:
            endpoint.close()
        for thread in self._threads:
            thread.shutdown()


def exchange(group: TransportGroup, sent: list[bytes], received_lengths: list[int]) -> list[bytes]:
    """Send sent[m] to each member m, and return what each has sent to this one."""
    joined = np.frombuffer(b"".join(sent), np.uint8)
    received = np.full(sum(received_lengths), 0xEE, np.uint8)
    group.exchange(joined.ctypes.data, list(map(len, sent)), received.ctypes.data, received_lengths, 1)
    ends = np.cumsum(received_lengths)
    return [part.tobytes() for part in np.split(received, ends[:-1])]


def exchange_sizes(group: TransportGroup, sizes_MM: IntArray, seed: int) -> None:
    """Exchange messages of sizes_MM[sender, receiver] bytes, and compare them with those that were to come."""
    rank = group.rank
    sent = [message(seed, rank, to, int(size)) for to, size in enumerate(sizes_MM[rank])]
    expected = [message(seed, sender, rank, int(size)) for sender, size in enumerate(sizes_MM[:, rank])]
    assert exchange(group, sent, [len(part) for part in expected]) == expected


def message(seed: int, sender: int, receiver: int, size: int) -> bytes:
    random = np.random.default_rng([seed, sender, receiver])
    return random.bytes(min(size, 4099)).ljust(1, b"x") * (size // 4099) + random.bytes(size % 4099)


def failure(function: Callable[[], object]) -> PeerError:
    with pytest.raises(PeerError) as raised:
        function()
    return raised.value


class OtherProcess:
    """Runs member_process.py, which joins groups and exchanges as it is told, line by line."""

    def __init__(self, shares_memory: bool, host: str = "127.0.0.1", namespace: str | None = None) -> None:
        within = [] if namespace is None else ["ip", "netns", "exec", namespace]
        self._process = subprocess.Popen(
            [*within, sys.executable, "-m", "tests.model.transport.member_process", "1" if shares_memory else "", host],
            cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = from_json(json.loads(self._process.stdout.readline()))

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, command: str, *arguments: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> object:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.kill()
        self._process.communicate()


def from_json(fields: dict[str, Any]) -> EndpointAddress:
    return EndpointAddress(**fields | {"token": Secret(fields["token"])})


def as_json(address: EndpointAddress) -> dict[str, object]:
    return {"peer_id": address.peer_id, "host": address.host, "port": address.port, "machine": address.machine,
            "token": address.token.reveal()}
