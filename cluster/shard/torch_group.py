"""The deepspeed.comm group of one epoch, where rows go by NCCL, HCCL or Gloo: joined, timed out, torn down.

One process is in one such group at a time.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from types import ModuleType
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from cluster.device.backend import import_backend
from model.errors import GroupError

logger = logging.getLogger(__name__)

# Gloo bound to one address. Plain "gloo" binds to what the host name resolves to, which may be a loopback address, and
# can be told otherwise only through the environment.
GLOO_BACKEND = "moesaic_gloo"


class TorchGroup:
    """Made by `join`; all methods are called from one thread."""

    def __init__(self, rows: dist.ProcessGroup, num_members: int, comm: ModuleType) -> None:
        self.rows = rows
        self._num_members = num_members
        self._comm = comm

    @staticmethod
    def join(rendezvous: str, rank: int, num_members: int, timeout_s: float, use_nccl: bool,
             device: str) -> TorchGroup:
        """Meet the other members at `rendezvous` (tcp://host:port, where rank 0 opens the store) and form the group.

        Blocks until all are there, at most timeout_s seconds, which is also the bound of every later collective.
        Raises GroupError, RuntimeError, OSError.
        """
        if dist.is_initialized():
            raise GroupError("this process is in a group already", fix="close() the group of the last epoch first")
        host, port = _host_and_port(rendezvous)
        try:
            _register_gloo(_local_address(host, port))
            comm = import_backend(device)
            if use_nccl:
                torch.cuda.set_device(torch.device(device))
            with _kept_excepthook():
                comm.init_distributed(dist_backend="nccl" if use_nccl else GLOO_BACKEND, auto_mpi_discovery=False,
                                      verbose=False, timeout=timedelta(seconds=timeout_s), init_method=rendezvous,
                                      rank=rank, world_size=num_members)
        except (RuntimeError, OSError):
            _leave()
            raise
        world = dist.group.WORLD
        assert world is not None
        return TorchGroup(world, num_members, comm)

    def exchange_ints(self, own: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return everybody's, by rank, over Gloo. Raises RuntimeError."""
        # Gloo's all_gather is a ring of num_members - 1 dependent hops; its all_to_all sends to all at once.
        to_each = torch.tensor(own, dtype=torch.int64).repeat(self._num_members, 1)
        gathered = torch.empty_like(to_each)
        self._comm.all_to_all_single(gathered, to_each, group=self.rows)
        return [tuple(ints) for ints in gathered.tolist()]

    def close(self) -> None:
        _leave()


def _leave() -> None:
    """Destroy what exists of the group. Members that are gone already are no error."""
    try:
        if dist.is_initialized():
            dist.destroy_process_group()
    except RuntimeError as error:
        logger.warning("group_destroy_failed error=%s", error)
    # Members find each other under the number of the group. torch counts a group that did not form and does not take it
    # back, so that this process would look for the next one elsewhere than the others.
    distributed_c10d._world.group_count = 0


def _host_and_port(rendezvous: str) -> tuple[str, int]:
    parts = urlsplit(rendezvous)
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        raise GroupError(f"rendezvous {rendezvous!r} is no address", fix="give it as tcp://host:port")
    return parts.hostname, parts.port


def _local_address(host: str, port: int) -> str:
    """Return the address of the interface from which this machine reaches `host`. Sends nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _register_gloo(address: str) -> None:
    """Make GLOO_BACKEND mean: gloo on the interface of `address`."""
    gloo = dist.ProcessGroupGloo

    def create(store: distributed_c10d.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
        options = gloo._Options()  # type: ignore[attr-defined]
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout = timeout
        return gloo(store, rank, size, options)

    dist.Backend.register_backend(GLOO_BACKEND, create, devices=["cpu"])


@contextlib.contextmanager
def _kept_excepthook() -> Iterator[None]:
    """Undo that torch wraps sys.excepthook at every init: a process that joins many epochs must not grow a chain."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook
