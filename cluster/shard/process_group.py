"""The deepspeed.comm group of one epoch: joined, timed out, torn down.

One process is in one group at a time. Collectives here: `agree`; those of the MoE layers are in model/.
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
from model.step import StepHeader

logger = logging.getLogger(__name__)

# Gloo bound to one address. Plain "gloo" binds to what the host name resolves to, which may be a loopback address, and
# can be told otherwise only through the environment.
GLOO_BACKEND = "moesaic_gloo"


class ProcessGroup:
    """Lets the members of one epoch talk. Made by `join`; all methods are called from one thread."""

    def __init__(self, rank: int, num_members: int, timeout_s: float, cpu_group: dist.ProcessGroup,
                 group: dist.ProcessGroup, comm: ModuleType) -> None:
        self.rank = rank
        self.num_members = num_members
        self.group = group              # for rows: nccl on cuda, gloo on cpu
        self.cpu_group = cpu_group      # gloo, for headers
        self._timeout_s = timeout_s
        self._comm = comm
        self._failed = False
        self._closed = False

    @staticmethod
    def join(rendezvous: str, rank: int, num_members: int, timeout_s: float, backend: str,
             device: str) -> ProcessGroup:
        """Meet the other members at `rendezvous` (tcp://host:port, where rank 0 opens the store) and form the group.

        Blocks until all are there, at most timeout_s seconds, which is also the bound of every later collective.
        backend "auto" is nccl on a cuda device and gloo elsewhere. Raises GroupError.
        """
        if dist.is_initialized():
            raise GroupError("this process is in a group already", fix="close() the group of the last epoch first")
        host, port = _host_and_port(rendezvous)
        use_nccl = backend == "nccl" or (backend == "auto" and torch.device(device).type == "cuda")
        timeout = timedelta(seconds=timeout_s)
        try:
            _register_gloo(_local_address(host, port))
            comm = import_backend(device)
            if use_nccl:
                torch.cuda.set_device(torch.device(device))
            with _kept_excepthook():
                comm.init_distributed(dist_backend="nccl" if use_nccl else GLOO_BACKEND, auto_mpi_discovery=False,
                                      verbose=False, timeout=timeout, init_method=rendezvous, rank=rank,
                                      world_size=num_members)
            world = dist.group.WORLD
            assert world is not None
            # deepspeed.comm.new_group cannot be told another backend or a timeout.
            cpu_group = dist.new_group(backend=GLOO_BACKEND, timeout=timeout) if use_nccl else world
        except (RuntimeError, OSError) as error:
            _leave()
            raise GroupError(
                f"rank {rank} could not form the group of {num_members} at {rendezvous} in {timeout_s:g} s: {error}",
                fix="check that every member runs and that this address and its port can be reached from all nodes, "
                    "or raise group.collective_timeout_s") from error
        logger.info("group_joined rank=%d num_members=%d at=%s nccl=%s", rank, num_members, rendezvous, use_nccl)
        return ProcessGroup(rank, num_members, timeout_s, cpu_group, world, comm)

    def agree(self, header: StepHeader) -> tuple[StepHeader, ...]:
        """Exchange headers, index = rank. Blocks for at most the group's timeout.

        Raises GroupError when a member is gone or late, or is in another epoch or step.
        """
        if self._closed:
            raise GroupError(f"rank {self.rank} has left its group", fix="join the next epoch's group")
        own = torch.tensor(header.to_ints(), dtype=torch.int64)
        if self.num_members == 1:
            return (header,)
        # Gloo's all_gather is a ring of num_members - 1 dependent hops; its all_to_all sends to all at once.
        to_each = own.repeat(self.num_members, 1)
        gathered = torch.empty_like(to_each)
        try:
            self._comm.all_to_all_single(gathered, to_each, group=self.cpu_group)
        except RuntimeError as error:
            self._failed = True
            raise GroupError(
                f"rank {self.rank}: the members did not agree on step {header.step_index} of epoch "
                f"{header.epoch_number} within {self._timeout_s:g} s: {error}",
                fix="a member died or is too slow: wait for the next epoch, or raise group.collective_timeout_s",
            ) from error
        headers = tuple(StepHeader.from_ints(tuple(ints)) for ints in gathered.tolist())
        for rank, other in enumerate(headers):
            if (other.epoch_number, other.step_index) != (header.epoch_number, header.step_index):
                self._failed = True
                raise GroupError(
                    f"rank {rank} is at step {other.step_index} of epoch {other.epoch_number}, rank {self.rank} at "
                    f"step {header.step_index} of epoch {header.epoch_number}",
                    fix="all members must join the next epoch")
        return headers

    def close(self) -> None:
        """Leave the group; after it this process can join the next epoch's. May be called twice, never raises."""
        if self._closed:
            return
        self._closed = True
        logger.info("group_left rank=%d num_members=%d failed=%s", self.rank, self.num_members, self._failed)
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
