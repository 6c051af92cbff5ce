"""An epoch: one numbered, immutable (members, ranks, placement). It is all that shards and routers know of others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.curve import Curve
from model.placement import Placement
from model.transport.address import EndpointAddress


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Says what a shard tells the coordinator of its device when it registers."""

    device: str                     # "cpu", "cuda:0"
    device_name: str                # "AMD EPYC", "NVIDIA H200"
    kernels: str                    # Kernels.name: numbers agree bit for bit between equal names
    memory_budget_bytes: int        # what the pool's config lets this shard use, weights + KV cache + buffers
    num_threads: int
    resident_bytes: int = 0         # of the process before it loaded any weights, measured; 0 on an accelerator


@dataclass(frozen=True, slots=True)
class Link:
    """Says how fast a member exchanges rows with the others."""

    latency_s: float                # of one small collective
    bytes_per_s: float              # payload that leaves a member in a collective


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Says how fast one device works in one model's shapes and one dtype. Times already contain `emulated_speed`.

    Curves are (rows, seconds) from one row on. They are read between their points by straight lines, and beyond the
    last by its slope. Weights are counted as read from memory, not from a cache.
    """

    source: Literal["measured", "data-sheet"]
    read_bytes_per_s: float         # of weights
    gemm_flop_per_s: Curve          # FLOP/s in the shape of one expert
    expert_s: Curve                 # one expert of one layer, and to bring rows to it and back within the member
    dense_s: Curve                  # of one layer what its rows' owner computes: norms, attention projections, gate,
                                    # dispatch in a group of several members; no experts, no dense MLP
    head_s: Curve                   # once a step: the batch, last norm, logits, a greedy draw
    attention_s: float              # of one query row over one cached token, one layer
    layer_overhead_s: float = 0.0   # of one layer whatever its rows: planning, wake-ups between collectives
    link: Link | None = None        # None: not measured yet, or alone
    emulated_speed: float | None = None     # None: as fast as it is
    spread: float = 0.0             # relative difference between the repeats of the measurement
    is_noisy: bool = False          # the repeats differ by more than 3 %


@dataclass(frozen=True, slots=True)
class WorkRatio:
    """Seconds that a member worked in its steps over what its profile says for the same rows; older ones count less.

    Both means come with a standard deviation, that of one piece of work: what is done between two exchanges of rows.
    """

    own: float | None               # for its own rows; None: not enough was measured
    experts: float | None           # for experts, whoever's rows they computed
    num_steps: int                  # that were timed since the process began
    own_spread: float = 0.0
    experts_spread: float = 0.0
    planning_s: float | None = None     # to plan whose rows go to which expert, of one layer


@dataclass(frozen=True, slots=True)
class RequestShare:
    """A member's part in the requests: attention work and KV memory. Fraction 0: experts only, no attention weights."""

    fraction: float                 # of new requests; all members' add up to 1
    token_budget: int               # prefill + decode tokens that one step of this member may compute

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1 or (self.fraction > 0 and self.token_budget < 1):
            raise ValueError(f"{self}: a fraction is within 0..1, and who has one computes at least 1 token in a step")


@dataclass(frozen=True, slots=True)
class PlanFigures:
    """Holds what the planner predicts of a placement."""

    num_rows: int                   # of the step that it is made for, all members together
    context_tokens: int             # of a sequence, likewise
    step_s: float                   # predicted
    bound_s: float                  # below which no placement on these members can come
    limit: str                      # what takes most of the step: memory bandwidth, compute, link or overhead
    solver: str                     # "exact", "greedy", "even"; "given" for a placement that somebody else made

    @property
    def tokens_per_s(self) -> float:
        return self.num_rows / self.step_s

    @property
    def ratio(self) -> float:
        return self.step_s / self.bound_s


@dataclass(frozen=True, slots=True)
class PlannedPlacement:
    """Says what a group is to run."""

    placement: Placement
    shares: tuple[RequestShare, ...]
    figures: PlanFigures | None = None


@dataclass(frozen=True, slots=True)
class PlacementChange:
    """One change of the placement within an epoch. A long one goes in several revisions."""

    operation_id: str               # whoever asks twice with the same one gets the same change
    why: str
    moved_bytes: int                # of experts that members load for it
    first_revision: int             # of the epoch before it
    last_revision: int              # the highest one that it has made or tried
    state: Literal["running", "done", "failed"] = "running"
    detail: str = ""                # why it failed
    target: PlannedPlacement | None = None      # while it runs


@dataclass(frozen=True, slots=True)
class Member:
    """One shard of the group. Its rank is its index in Epoch.members."""

    shard_id: str                   # new for every process: a restarted shard is another member
    pool: str
    node_id: str
    node_name: str
    link_address: str               # host:port of its shard link (gRPC)
    facts: DeviceFacts
    store_address: str = ""         # host:port kept free for the store of its next torch group, were it rank 0
    profile: DeviceProfile | None = None
    endpoint: EndpointAddress | None = None     # where other members find it
    heartbeat_port: int = 0         # of the endpoint's host, UDP
    digest: str = ""                # which model it computes: checkpoint, revision, dtype, code; equal in a group


@dataclass(frozen=True, slots=True)
class Epoch:
    number: int                     # from 1; every message between routers and shards carries it
    members: tuple[Member, ...]
    placement: Placement
    rendezvous: str                 # tcp://host:port of rank 0's store of a torch group; "" until all have loaded
    shares: tuple[RequestShare, ...]        # by rank
    figures: PlanFigures | None = None
    revision: int = 0               # of placement and shares: they may change while members and ranks stay
    changes: tuple[PlacementChange, ...] = ()       # the latest ones, oldest first

    def __post_init__(self) -> None:
        if len(self.shares) != len(self.members):
            raise ValueError(f"epoch {self.number} has {len(self.shares)} shares for {len(self.members)} members; give "
                             "each its own")

    def takes_requests(self, rank: int) -> bool:
        """Return False for a member that holds experts only."""
        return self.shares[rank].fraction > 0

    def token_budget(self, rank: int, max_batch_tokens: int) -> int:
        """Return the tokens that a step of the member may compute, never above what its memory is planned for."""
        return min(self.shares[rank].token_budget, max_batch_tokens)

    def rank_of(self, shard_id: str) -> int | None:
        for rank, member in enumerate(self.members):
            if member.shard_id == shard_id:
                return rank
        return None


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """Holds what a member reports of itself, for `moesaic status`, the router's choice and the coordinator."""

    shard_id: str
    epoch_number: int
    state: str
    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    state_slots_total: int = 0      # 0: no layer keeps a state
    state_slots_free: int = 0
    num_snapshots: int = 0          # of states
    num_cached_tokens: int = 0      # that the prefix cache served, since the shard's engine started
    weights_bytes: int = 0
    kv_cache_bytes: int = 0         # states included
    resident_bytes: int = 0         # of the whole process, measured
    bytes_read: int = 0             # of the checkpoint
    bytes_to_read: int = 0          # of the checkpoint, when all is loaded
    num_steps: int = 0
    num_tokens_computed: int = 0
    num_expert_rows: int = 0        # (row, expert) pairs computed here, for anybody
    num_expert_copies: int = 0
    revision: int = 0               # of the placement that its steps use
    prepared_revision: int = 0      # highest whose weights are loaded
    failed_revision: int = 0        # highest that it could not prepare; `detail` says why
    detail: str = ""                # what went wrong, when the state says so
    is_leaving: bool = False        # it was told to go: no epoch is to begin with it
    is_newcomer: bool = False       # it loads for an epoch that has yet to begin, while others run the one before
    # Shard ids: they ended the epoch that it has left, by an end of file or by not answering; or do not answer now.
    lost_peers: tuple[str, ...] = ()
