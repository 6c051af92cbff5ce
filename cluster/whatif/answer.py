"""The answer of `moesaic plan`: a placement on a cluster that need not exist, and what others would give. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.planner.layer.error import PlacementError
from cluster.planner.memory_demand import DTYPE_BYTES
from cluster.planner.memory_fit import memory_fit
from cluster.planner.memory_plan import MemoryDemand, MemoryUse, free_bytes
from cluster.planner.placement import member_costs, plan_placement
from cluster.planner.placement_plan import PlacementPlan, PlannedMember, PlanOptions
from cluster.whatif.cluster_file import with_more_nodes
from cluster.whatif.question import PlanQuestion
from cluster.whatif.start_sizes import StartSizes, start_sizes
from serving.cluster_config import ClusterConfig

MAX_MORE_NODES = 64
Say = Callable[[str], None]     # called with what is worked out next


@dataclass(frozen=True, slots=True)
class Outlook:
    """The speed that another choice would give."""

    what: str                       # "even", "held", or a kind of node of which there would be one more
    tokens_per_s: float | None      # None: it does not fit
    step_s: float | None
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of the cluster that would make a model fit."""

    kind: str
    num_more_nodes: int | None      # None: MAX_MORE_NODES are not enough
    max_batch_tokens: int           # with this in the scheduler's options


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    question: PlanQuestion
    demand: MemoryDemand
    members: tuple[PlannedMember, ...]
    plan: PlacementPlan | None      # None: it does not fit
    missing_bytes: int              # so much more memory, in all, would hold it
    start_sizes: StartSizes | None = None       # None: it does not fit
    even: Outlook | None = None     # None: it was asked for, or nothing fits
    held: Outlook | None = None     # with num_held_rows, when the KV caches do not hold the workload
    one_more: tuple[Outlook, ...] = ()
    remedies: tuple[Remedy, ...] = ()   # when it does not fit
    fits_with_one_copy: bool = False            # of them, where two copies were asked for
    fitting_batch_tokens: int | None = None     # of them: a scheduler.max_batch_tokens that fits

    @property
    def some_can_take_requests(self) -> bool:
        return any(free_bytes(member.memory, self.demand) >= 0 for member in self.members)

    @property
    def kv_tokens(self) -> int:
        """The tokens that all caches together hold, of sequences of the workload's context with their states."""
        used = sum(member.memory.cache_bytes for member in self.plan.members) if self.plan else 0
        return used * self.question.workload.context_tokens // self.question.sequence_bytes

    @property
    def num_state_slots(self) -> int:
        """The slots for states of all members together; 0: no layer keeps a state."""
        caches = [member.memory.cache_bytes for member in self.plan.members] if self.plan else []
        return sum(self.question.cache_sizes(one).num_state_slots for one in caches if one)

    @property
    def num_held_rows(self) -> int:
        """The sequences of the workload's context that the KV caches hold at once."""
        return self.kv_tokens // self.question.workload.context_tokens

    @property
    def wanted_kv_tokens(self) -> int:
        """The tokens of the workload: every row with its context."""
        return self.question.workload.num_rows * self.question.workload.context_tokens


def answer_question(question: PlanQuestion, say: Say) -> PlanAnswer:
    """Answer the question. Raises PlacementError and ConfigError for what is wrong with it, not for lack of memory."""
    cluster, demand = question.cluster, question.demand(question.cluster)
    members = question.members(cluster)
    missing = missing_bytes(question, cluster)
    if missing:
        say("what would make it fit")
        remedies = tuple(_remedy(question, nodes.name) for nodes in cluster.nodes)
        return PlanAnswer(question, demand, members, None, missing, remedies=remedies,
                           fits_with_one_copy=not missing_bytes(question, cluster, min_copies=1),
                           fitting_batch_tokens=_fitting_batch_tokens(question))
    say("placement")
    answer = PlanAnswer(question, demand, members, _plan(question, cluster, question.options), 0,
                        start_sizes([member.memory for member in members], demand, question.options))
    held = even = None
    if 0 < answer.num_held_rows < question.workload.num_rows:
        say("fewer sequences")
        fewer = replace(question, workload=replace(question.workload, num_rows=answer.num_held_rows))
        held = _outlook(fewer, "held", cluster, replace(question.options, exact=False))
    if question.options.policy != "even":
        say("even placement")
        even = _outlook(question, "even", cluster, replace(question.options, policy="even", exact=False))
    one_more = []
    for nodes in cluster.nodes:
        say(f"one more {nodes.name}")
        larger = with_more_nodes(cluster, nodes.name, 1)
        one_more.append(_outlook(question, nodes.name, larger, replace(question.options, exact=False)))
    return replace(answer, held=held, even=even, one_more=tuple(one_more))


def missing_bytes(question: PlanQuestion, cluster: ClusterConfig, min_copies: int | None = None) -> int:
    """Return how much more memory would hold the model on this cluster; 0: it fits. Raises PlacementError.

    `min_copies`: as the question says, unless given.
    """
    options, members = question.options, question.members(cluster)
    num_copies = min_copies or options.min_copies
    if len(members) < num_copies:
        raise PlacementError(f"min_copies={num_copies} with {len(members)} device: copies of an expert are on "
                             "different devices", fix="set it to 1, or add devices")
    memories = [member.memory for member in members]
    return memory_fit(memories, question.demand(cluster), num_copies, options.policy).missing_bytes


def _plan(question: PlanQuestion, cluster: ClusterConfig, options: PlanOptions) -> PlacementPlan:
    members = question.members(cluster)
    costs = member_costs(question.args, DTYPE_BYTES[question.dtype], members, question.workload)
    plan = plan_placement(costs, members, question.demand(cluster), question.config.scheduler.max_batch_tokens,
                          options)
    return replace(plan, members=tuple(
        replace(member, memory=_with_states(question, member.memory)) for member in plan.members))


def _with_states(question: PlanQuestion, use: MemoryUse) -> MemoryUse:
    """Divide the cache into KV blocks and slots for states, as the member will."""
    if not use.kv_cache_bytes:
        return use
    state_bytes = question.cache_sizes(use.kv_cache_bytes).num_state_slots * question.state_slot_bytes
    return replace(use, kv_cache_bytes=use.kv_cache_bytes - state_bytes, state_bytes=state_bytes)


def _outlook(question: PlanQuestion, what: str, cluster: ClusterConfig, options: PlanOptions) -> Outlook:
    try:
        prediction = _plan(question, cluster, options).prediction
    except PlacementError as error:
        return Outlook(what, None, None, error.message.splitlines()[0])
    return Outlook(what, prediction.tokens_per_s, prediction.step_s)


def _fits(question: PlanQuestion, cluster: ClusterConfig) -> bool:
    return not missing_bytes(question, cluster)


def _remedy(question: PlanQuestion, kind: str) -> Remedy:
    """Find how many more nodes would do, with fewer tokens a step if need be: buffers grow with both."""
    scheduler = question.config.scheduler
    asked, least = scheduler.max_batch_tokens, scheduler.max_running_requests
    num_more = _nodes_to_fit(question, kind)
    if num_more is None and least < asked:
        return Remedy(kind, _nodes_to_fit(_with_batch_tokens(question, least), kind), least)
    return Remedy(kind, num_more, asked)


def _with_batch_tokens(question: PlanQuestion, max_batch_tokens: int) -> PlanQuestion:
    scheduler = question.config.scheduler.model_copy(update={"max_batch_tokens": max_batch_tokens})
    return replace(question, config=question.config.model_copy(update={"scheduler": scheduler}))


def _nodes_to_fit(question: PlanQuestion, kind: str) -> int | None:
    for num_more in range(1, MAX_MORE_NODES + 1):
        if _fits(question, with_more_nodes(question.cluster, kind, num_more)):
            return num_more
    return None


def _fitting_batch_tokens(question: PlanQuestion) -> int | None:
    """Halve the tokens of a step until it fits; never to fewer than the scheduler's sequences."""
    scheduler = question.config.scheduler
    tokens = scheduler.max_batch_tokens // 2
    while tokens >= scheduler.max_running_requests:
        if _fits(_with_batch_tokens(question, tokens), question.cluster):
            return tokens
        tokens //= 2
    return None
