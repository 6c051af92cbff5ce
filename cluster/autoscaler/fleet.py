"""The fleet and its load as the autoscaler sees them. Pure: plain values."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.memory_plan import MemberMemory

Counts = tuple[int, ...]        # replicas, in the order of the pools


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """Says what one replica of a pool is good for, as it was measured."""

    prefill_tokens_per_s: float
    decode_rows: float              # sequences that it decodes within the SLO of a token
    memory: MemberMemory
    ready_s: float                  # from the wish for it until it serves


@dataclass(frozen=True, slots=True)
class PoolState:
    name: str
    least: int                      # while anything is served
    most: int
    num_wanted: int                 # as it was last decided
    num_ready: int
    facts: ReplicaFacts | None      # None: no replica was ever seen, so nothing is decided about the pool
    cost_per_hour: float = 1.0      # of one replica
    awaited_since_s: float | None = None    # since when fewer are ready than are wanted; None: all are
    num_start: int = 0              # with how many a service begins of which nothing is known yet


@dataclass(frozen=True, slots=True)
class Work:
    """Holds what routers and shards have before them, and all that ever came to them."""

    num_held: int = 0               # requests that wait or run, anywhere
    num_waiting_tokens: int = 0     # of prompts whose first token has yet to come
    num_decoding: int = 0           # sequences whose first token has come
    num_kv_tokens: int = 0          # that all of them hold, or will when their prompts are computed
    num_arrived: int = 0            # requests
    num_prompt_tokens: int = 0      # of those
    num_output_tokens: int = 0      # that those are expected to get


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    pools: tuple[PoolState, ...]
    work: Work

    @property
    def wanted(self) -> Counts:
        return tuple(pool.num_wanted for pool in self.pools)

    @property
    def ready(self) -> Counts:
        return tuple(pool.num_ready for pool in self.pools)
