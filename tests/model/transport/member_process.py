"""A member in a process of its own: does what it is told on stdin, answers on stdout. See members.OtherProcess."""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from typing import Any

from model.transport.endpoint import Endpoint
from model.transport.group import TransportGroup
from model.transport.peer_error import PeerError
from tests.deadlines import BEYOND_PATIENCE_S
from tests.model.transport.members import as_json, exchange, from_json


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG: it dies with the test
    endpoint = Endpoint(sys.argv[2], machine=None if sys.argv[1] else "")
    groups: dict[int, TransportGroup] = {}
    say(as_json(endpoint.address))
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            say(COMMANDS[command](endpoint, groups, *arguments))
        except PeerError as error:
            say([error.reason.name, error.rank])


def say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def join(endpoint: Endpoint, groups: dict[int, TransportGroup], group_id: int, addresses: list[dict[str, Any]],
         rank: int, timeout_s: float = BEYOND_PATIENCE_S) -> str:
    members = [from_json(address) for address in addresses]
    groups[group_id] = endpoint.open_group(group_id, members, rank, timeout_s)
    return "joined"


def exchange_zeros(endpoint: Endpoint, groups: dict[int, TransportGroup], group_id: int, size: int, times: int) -> str:
    group = groups[group_id]
    for _ in range(times):
        received = exchange(group, [bytes(size)] * group.num_members, [size] * group.num_members)
        assert received == [bytes(size)] * group.num_members
    return "exchanged"


def leave(endpoint: Endpoint, groups: dict[int, TransportGroup], group_id: int) -> str:
    groups.pop(group_id).close()
    return "left"


COMMANDS = {"join": join, "exchange": exchange_zeros, "leave": leave}

if __name__ == "__main__":
    main()
