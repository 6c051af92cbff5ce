"""What the processes of a local group run: coordinator, shard, router. SIGTERM ends them as Ray Serve would."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.local_group.remote import coordinator_at, serve_object
from cluster.device.node import NodeIdentity
from serving.config import ServeConfig

_LOG_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s"
_PR_SET_PDEATHSIG = 1
ADDRESS = "127.0.0.1"
LOCK_S = 2.0                # see _hold_python_lock


@dataclass(frozen=True)
class Role:
    """Says what one process is, and where it finds the others."""

    kind: str               # "coordinator", "shard", "router"
    name: str               # of this process: a shard's node name, unique among all that ever ran
    node_id: str            # the node that it is on; a replacement has the same
    pool: str
    config: ServeConfig
    folder: Path            # of sockets and logs

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def socket_path(self) -> Path:
        return self.folder / f"{self.name}.socket"


def coordinator_socket(folder: Path) -> Path:
    return folder / "coordinator.socket"


def run_role(role: Role) -> None:
    """Be that process until it is told to end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the parent ends its processes
    signal.signal(signal.SIGUSR1, _hold_python_lock)
    log = os.open(role.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    logging.basicConfig(format=_LOG_FORMAT, datefmt="%H:%M:%S", force=True)
    for package in ("cluster", "serving", "model", "benchmarks"):
        logging.getLogger(package).setLevel(logging.INFO)
    mains: dict[str, Callable[[Role], Awaitable[None]]] = {
        "coordinator": _coordinator, "shard": _shard, "router": _router}
    asyncio.run(_until_told_to_end(mains[role.kind](role)))


def _hold_python_lock(*_: object) -> None:
    """Do what a call into C does that does not give the lock back: no other thread runs Python meanwhile."""
    ctypes.PyDLL(None).usleep(round(LOCK_S * 1e6))


async def _until_told_to_end(main: Any) -> None:
    task = asyncio.ensure_future(main)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _coordinator(role: Role) -> None:
    from cluster.coordinator.coordinator import NUMBER_JUMP, Coordinator
    from cluster.coordinator.group_rules import group_rules
    from cluster.device.model_store import locate_checkpoint
    from model.args import read_model_args

    args = read_model_args(locate_checkpoint(role.config.model, "facts"))
    coordinator = Coordinator(group_rules(args, role.config), time.monotonic,
                              numbers_above=secrets.randbelow(NUMBER_JUMP))
    async with await serve_object(coordinator, coordinator_socket(role.folder)):
        await coordinator.run(role.config.placement.rebalance_interval_s)


async def _shard(role: Role) -> None:
    from cluster.shard.shard import Shard

    _compute_while_told(role.folder / "computes")
    pool = next(pool for pool in role.config.pools if pool.name == role.pool)
    await Shard(role.config, pool, _node_of(role), coordinator_at(coordinator_socket(role.folder))).run()


def _compute_while_told(told: Path) -> None:
    """Have no KV blocks sent as long as there is that file, whatever is done sooner: to compare."""
    from serving.link import block_receiver

    choose = block_receiver.is_sent
    block_receiver.is_sent = lambda transfer: not told.exists() and choose(transfer)


async def _router(role: Role) -> None:
    from cluster.router_replica import RouterReplica

    replica = RouterReplica(role.config, _node_of(role), coordinator_at(coordinator_socket(role.folder)))
    async with await serve_object(_RouterLook(replica), role.socket_path):
        await replica.run()


class _RouterLook:
    """Shows what a router keeps to itself: which shard computes which request."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    async def shards_of_requests(self) -> dict[str, str]:
        """Return the shard id of every placed sequence, by the id that the client gave its request."""
        placed = self._replica._service._links._placed
        return {request_of(sequence_id): sequence.link.member.shard_id for sequence_id, sequence in placed.items()}

    async def sequences_moved(self) -> dict[str, int]:
        """Return how many went on elsewhere, by way, since the router started."""
        return dict(self._replica._service._metrics.requests.num_moved)


def request_of(sequence_id: str) -> str:
    """Return the client's id of a request: the router puts two parts before it, and two behind."""
    return sequence_id.split("-", 2)[2].rsplit("-", 2)[0]


def _node_of(role: Role) -> NodeIdentity:
    return NodeIdentity(role.node_id, role.name, ADDRESS)
