"""An epoch: one numbered, immutable (members, ranks, placement). It is all that shards and routers know of others."""

from __future__ import annotations

from dataclasses import dataclass

from model.placement import Placement


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a shard tells the coordinator of its device when it registers."""

    device: str                     # "cpu", "cuda:0"
    device_name: str                # "AMD EPYC", "NVIDIA H200"
    kernels: str                    # Kernels.name: numbers agree bit for bit between equal names
    memory_total_bytes: int         # of the device
    memory_budget_bytes: int        # what the pool's config lets this shard use, weights + KV cache + buffers
    num_threads: int
    resident_bytes: int = 0         # of the process before it loaded any weights, measured; 0 on an accelerator


@dataclass(frozen=True, slots=True)
class Member:
    """One shard of the group. Its rank is its index in Epoch.members."""

    shard_id: str                   # new for every process: a restarted shard is another member
    pool: str
    node_id: str
    node_name: str
    link_address: str               # host:port of its shard link (gRPC)
    facts: DeviceFacts
    store_address: str = ""         # host:port kept free for the store of its next process group, were it rank 0


@dataclass(frozen=True, slots=True)
class Epoch:
    number: int                     # from 1; every message between routers and shards carries it
    members: tuple[Member, ...]
    placement: Placement
    rendezvous: str                 # tcp://host:port of rank 0's store of the process group; "" until all have loaded

    def rank_of(self, shard_id: str) -> int | None:
        for rank, member in enumerate(self.members):
            if member.shard_id == shard_id:
                return rank
        return None


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """What a member reports of itself, for `moesaic status`, the router's choice and the coordinator."""

    shard_id: str
    epoch: int
    state: str
    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    resident_bytes: int = 0         # of the whole process, measured
    bytes_read: int = 0             # of the checkpoint
    bytes_to_read: int = 0          # of the checkpoint, when all is loaded
    num_steps: int = 0
    num_tokens_computed: int = 0
    num_expert_rows: int = 0        # (row, expert) pairs computed here, for anybody
    num_expert_copies: int = 0
    detail: str = ""                # what went wrong, when the state says so
