"""Every metric name of the project, as Prometheus reads them; names follow vLLM's with our prefix.

A router replica owns one RouterMetrics. Shards have no HTTP door: their figures arrive with their link messages and are
shown under the labels `shard` and `pool`, which are as many as the epoch has members. May import: engine, link.
"""

from __future__ import annotations

import bisect
import enum
import itertools
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from serving.engine.engine import ShardLoad
from serving.engine.expert_load import ExpertLoad
from serving.engine.request import FinishReason
from serving.link.epoch import Epoch, Member, WorkRatio

FIRST_TOKEN_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
                         20.0, 40.0, 80.0, 160.0, 640.0)
TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
                   40.0, 80.0)
REQUEST_BUCKETS_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
                     240.0, 480.0, 960.0, 1920.0)
LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
PAUSE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
MAX_TENANT_LABELS = 100
SHARD_LABELS = ("shard", "pool")
# Resubmitted: prompt and journal, which the new shard computes again. The others while the old one still produced
# tokens: most KV blocks were sent by it, computed again, or in the new shard's prefix cache.
MOVE_WAYS = ("resubmitted", "sent", "computed", "cached")


class MoveCause(enum.StrEnum):
    """Says why a sequence had to leave its shard."""

    LINK_BROKEN = "link_broken"     # the shard died, or the network between it and this router broke
    MEMBER_GONE = "member_gone"     # it is not in the new epoch: it was thought dead, or it left
    GIVEN_UP = "given_up"           # the shard has no room for it any more
    LEAVING = "leaving"             # the member is to leave


class TokenTimes(Collector):
    """A histogram of one series that is added to for every token: the library's own takes ten times as long."""

    def __init__(self, name: str, text: str, bounds_s: tuple[float, ...], registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self.bounds_s = bounds_s
        self.counts = [0] * (len(bounds_s) + 1)         # the last: above all bounds
        self._sum_s = 0.0
        registry.register(self)

    def add(self, seconds: float, num_tokens: int) -> None:
        """Add as many tokens, each after so many seconds."""
        self.counts[bisect.bisect_left(self.bounds_s, seconds)] += num_tokens
        self._sum_s += seconds * num_tokens

    def collect(self) -> Iterable[HistogramMetricFamily]:
        names = [*map(str, self.bounds_s), "+Inf"]
        buckets = list(zip(names, map(float, itertools.accumulate(self.counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets, self._sum_s)


class RequestMetrics:
    """Shows the requests that one router carries. One choice of a client's request is one request here."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"moesaic:{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"moesaic:{name}", text, buckets=buckets, registry=registry)

        self.num_queued = Gauge("moesaic:num_requests_queued", "Requests that wait for admission", registry=registry)
        self.num_open = Gauge("moesaic:num_requests_open", "Requests admitted and not ended", registry=registry)
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of admitted requests")
        self.generation_tokens = counter("generation_tokens_total", "Tokens generated")
        self.prefix_cache_queries = counter("prefix_cache_queries_total", "Prompt tokens looked up in prefix caches")
        self.prefix_cache_hits = counter("prefix_cache_hits_total", "Prompt tokens that a prefix cache served")
        self.ended = counter("request_success_total", "Requests that ended, by reason", ("finished_reason",))
        self.refused = counter("request_refused_total", "Requests refused, by kind of error", ("error",))
        self.num_unplaced = Gauge("moesaic:num_requests_unplaced", "Open requests that wait for a shard",
                                  registry=registry)
        self.moved = counter("sequences_moved_total", "Requests that went on elsewhere, by the way that was taken",
                             ("way",))
        self.num_moved = dict.fromkeys(MOVE_WAYS, 0)
        for way in MOVE_WAYS:
            self.moved.labels(way)
        self.stream_pause = Histogram("moesaic:stream_pause_seconds", "Time between the last token of a request before "
                                      "it was moved and its first one after, by cause", ("cause",),
                                      buckets=PAUSE_BUCKETS_S, registry=registry)
        for cause in MoveCause:
            self.stream_pause.labels(cause.value)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a request", LENGTH_BUCKETS)
        self.generation_length = histogram("request_generation_tokens", "Tokens generated by a request", LENGTH_BUCKETS)
        self.queue_time = histogram("request_queue_time_seconds", "Time from arrival to admission",
                                    FIRST_TOKEN_BUCKETS_S)
        self.first_token = TokenTimes("moesaic:time_to_first_token_seconds", "Time from arrival to the first token",
                                      FIRST_TOKEN_BUCKETS_S, registry)
        self.inter_token = TokenTimes("moesaic:time_per_output_token_seconds", "Time between two tokens of a request",
                                      TOKEN_BUCKETS_S, registry)
        self.num_generated_tokens = 0
        self._num_counted_tokens = 0        # of them, in generation_tokens
        self.latency = histogram("e2e_request_latency_seconds", "Time from arrival to the end", REQUEST_BUCKETS_S)
        for reason in FinishReason:     # shown as 0 before the first, so that rates are right from the start
            self.ended.labels(reason.value)

    def admitted(self, num_prompt_tokens: int, queued_s: float) -> None:
        self.num_open.inc()
        self.prompt_tokens.inc(num_prompt_tokens)
        self.prompt_length.observe(num_prompt_tokens)
        self.queue_time.observe(queued_s)

    def first_token_arrived(self, after_s: float, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """`after_s`: since the request's arrival."""
        self.first_token.add(after_s, 1)
        self.prefix_cache_queries.inc(num_prompt_tokens)
        self.prefix_cache_hits.inc(num_cached_tokens)
        self.num_generated_tokens += 1

    def tokens_arrived(self, num_tokens: int, after_s: float) -> None:
        """Later tokens of one request; `after_s`: since its previous ones."""
        self.inter_token.add(after_s / num_tokens, num_tokens)
        self.num_generated_tokens += num_tokens

    def count_tokens(self) -> None:
        """Bring generation_tokens up to date, before it is looked at."""
        self.generation_tokens.inc(self.num_generated_tokens - self._num_counted_tokens)
        self._num_counted_tokens = self.num_generated_tokens

    def sequence_moved(self, way: str) -> None:
        """It goes on elsewhere; one of MOVE_WAYS."""
        self.num_moved[way] += 1
        self.moved.labels(way).inc()

    def stream_paused(self, cause: MoveCause, pause_s: float) -> None:
        self.stream_pause.labels(cause.value).observe(pause_s)

    def request_ended(self, reason: FinishReason, after_s: float, num_generated_tokens: int) -> None:
        """Once for each admitted request; `after_s`: since its arrival."""
        self.num_open.dec()
        self.ended.labels(reason.value).inc()
        self.latency.observe(after_s)
        self.generation_length.observe(num_generated_tokens)

    def request_refused(self, error: Exception) -> None:
        """`error` is labelled by its class, of which there are few."""
        self.refused.labels(type(error).__name__).inc()


class ShardMetrics:
    """Shows the shards that this router is linked to, from their latest messages."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"moesaic:{name}", text, SHARD_LABELS, registry=registry)

        self.num_running = gauge("num_requests_running", "Requests in the running batch")
        self.num_waiting = gauge("num_requests_waiting", "Requests that wait for KV blocks or a place in the batch")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1")
        self.kv_blocks = gauge("kv_blocks", "KV blocks in all")
        self.state_usage = gauge("state_slots_usage_perc", "Share of the state slots that sequences hold, 0 to 1")
        self.state_slots = gauge("state_slots", "Slots for states in all; 0: no layer keeps one")
        self.snapshots = gauge("state_snapshots", "Snapshots of states that a prefix can be continued from")
        self.tokens_per_s = gauge("shard_tokens_per_second", "Tokens computed over the last seconds of work")
        self.step_time = gauge("step_time_seconds", "Mean length of the recent steps")
        self.emulated_speed = gauge("emulated_speed", "Part of its speed that the shard's pool emulates; 1: all of it")
        self.preemptions = Counter("moesaic:num_preemptions_total", "Requests whose blocks were taken to be recomputed",
                                   SHARD_LABELS, registry=registry)
        self.cached_tokens = Counter("moesaic:shard_cached_tokens_total", "Tokens that the prefix cache served, in "
                                     "hybrids from snapshots of states", SHARD_LABELS, registry=registry)
        self.latest: dict[tuple[str, str], ShardLoad] = {}          # by shard and pool; what the counters stand at

    def joined(self, member: Member) -> None:
        """The shard is linked to."""
        speed = member.profile.emulated_speed if member.profile else None
        self.emulated_speed.labels(member.shard_id, member.pool).set(1.0 if speed is None else speed)

    def observe(self, shard: str, pool: str, load: ShardLoad) -> None:
        """Take up what the shard says in its messages, of which there is one a step: gauges are set when they are
        looked at."""
        before = self.latest.get((shard, pool), ShardLoad())
        if load.num_preemptions > before.num_preemptions:
            self.preemptions.labels(shard, pool).inc(load.num_preemptions - before.num_preemptions)
        if load.num_cached_tokens > before.num_cached_tokens:
            self.cached_tokens.labels(shard, pool).inc(load.num_cached_tokens - before.num_cached_tokens)
        self.latest[shard, pool] = load

    def set_gauges(self) -> None:
        for (shard, pool), load in self.latest.items():
            self.num_running.labels(shard, pool).set(load.num_running)
            self.num_waiting.labels(shard, pool).set(load.num_waiting)
            used = load.kv_blocks_total - load.kv_blocks_free
            self.kv_usage.labels(shard, pool).set(_part(used, load.kv_blocks_total))
            self.kv_blocks.labels(shard, pool).set(load.kv_blocks_total)
            slots = load.state_slots_total
            self.state_usage.labels(shard, pool).set(_part(slots - load.state_slots_free, slots))
            self.state_slots.labels(shard, pool).set(slots)
            self.snapshots.labels(shard, pool).set(load.num_snapshots)
            self.tokens_per_s.labels(shard, pool).set(load.tokens_per_s)
            self.step_time.labels(shard, pool).set(load.step_s)
            self.preemptions.labels(shard, pool)        # shown as 0 before the first, as all counters
            self.cached_tokens.labels(shard, pool)

    def forget(self, shard: str, pool: str) -> None:
        """The shard left the epoch: its series end, so that dead shards do not pile up."""
        if self.latest.pop((shard, pool), None) is None:
            return
        for metric in (self.num_running, self.num_waiting, self.kv_usage, self.kv_blocks, self.tokens_per_s,
                       self.step_time, self.emulated_speed, self.preemptions, self.state_usage, self.state_slots,
                       self.snapshots, self.cached_tokens):
            metric.remove(shard, pool)


def _part(used: int, total: int) -> float:
    return used / total if total else 0.0


class PlacementMetrics:
    """Shows the placement that runs, as the coordinator tells it. One series a layer or a member, never one an expert:
    `moesaic status --experts` has those."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"moesaic:{name}", text, labels, registry=registry)

        self.revision = gauge("placement_revision", "Revision of the placement within the epoch")
        self.predicted_step = gauge("placement_predicted_step_seconds", "Length of a step as the plan predicts it")
        self.bound_step = gauge("placement_bound_step_seconds", "Length that no placement on these members can beat")
        self.moved_bytes = gauge("placement_moved_bytes", "Bytes of experts loaded by the changes that are remembered")
        self.request_share = gauge("request_share", "Part of the new requests that the plan gives a member",
                                   SHARD_LABELS)
        self.expert_copies = gauge("expert_copies", "Expert copies that a member holds", SHARD_LABELS)
        self.imbalance = gauge("expert_load_max_over_mean", "Rows of a layer's busiest expert over the layer's mean",
                               ("layer",))
        self.work_over_profile = gauge("work_over_profile", "Seconds of a member's work over those that its profile "
                                       "says, for own rows and for experts", (*SHARD_LABELS, "part"))

    def observe(self, epoch: Epoch, load: ExpertLoad, ratios: tuple[WorkRatio | None, ...]) -> None:
        """`ratios` by rank."""
        self.revision.set(epoch.revision)
        if epoch.figures is not None:
            self.predicted_step.set(epoch.figures.step_s)
            self.bound_step.set(epoch.figures.bound_s)
        self.moved_bytes.set(sum(change.moved_bytes for change in epoch.changes if change.state == "done"))
        self.request_share.clear()
        self.expert_copies.clear()
        for rank, member in enumerate(epoch.members):
            self.request_share.labels(member.shard_id, member.pool).set(epoch.shares[rank].fraction)
            self.expert_copies.labels(member.shard_id, member.pool).set(epoch.placement.num_experts_of(rank))
        self.work_over_profile.clear()
        for member, ratio in zip(epoch.members, ratios, strict=True):
            for part, value in (("own", ratio.own), ("experts", ratio.experts)) if ratio else ():
                if value is not None:
                    self.work_over_profile.labels(member.shard_id, member.pool, part).set(value)
        for layer, rows_E in enumerate(load.rows()):
            mean = float(rows_E.mean())
            self.imbalance.labels(str(layer)).set(float(rows_E.max()) / mean if mean else 1.0)


class MembershipMetrics:
    """Shows the changes of the group's members, as the coordinator tells them: every router shows the same."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.changes = Counter("moesaic:membership_changes_total", "Changes of the group's members, by cause",
                               ("cause",), registry=registry)
        self.pause = Histogram("moesaic:membership_pause_seconds", "Time that the group stood still for a change of "
                               "its members, by cause", ("cause",), buckets=PAUSE_BUCKETS_S, registry=registry)
        self._last_epoch = 0        # that a counted change has led to

    def observe(self, epoch_after: int, cause: str, pause_s: float | None) -> None:
        """Count a change once, however often it is told; in the order of their epochs. None: nothing ran before."""
        if epoch_after <= self._last_epoch:
            return
        self._last_epoch = epoch_after
        self.changes.labels(cause).inc()
        if pause_s is not None:
            self.pause.labels(cause).observe(pause_s)


class TenantMetrics:
    """Shows what tenants use through this router. Those after the first MAX_TENANT_LABELS are one: "other"."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter("moesaic:tenant_requests_total", "Requests of keys that ended, by how",
                                 ("tenant", "outcome"), registry=registry)
        self._refused = Counter("moesaic:tenant_refused_total", "Requests that a key's limits refused, by kind of "
                                "error", ("tenant", "error"), registry=registry)
        self._tokens = Counter("moesaic:tenant_tokens_total", "Tokens of requests of keys: computed of prompts, cached "
                               "of prompts, generated", ("tenant", "kind"), registry=registry)
        self._names: set[str] = set()

    def ended(self, tenant: str, outcome: str, num_prompt: int, num_cached: int, num_generated: int) -> None:
        name = self._label(tenant)
        self._requests.labels(name, outcome).inc()
        for kind, count in (("prompt", num_prompt - num_cached), ("cached", num_cached), ("generated", num_generated)):
            self._tokens.labels(name, kind).inc(count)

    def refused(self, tenant: str, error: Exception) -> None:
        """`error` is labelled by its class, of which there are few."""
        self._refused.labels(self._label(tenant), type(error).__name__).inc()

    def _label(self, tenant: str) -> str:
        if len(self._names) < MAX_TENANT_LABELS:
            self._names.add(tenant)
        return tenant if tenant in self._names else "other"


class BatchMetrics:
    """Shows the lines of batches that this router computes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.num_running = Gauge("moesaic:batch_lines_running", "Lines of batches that are computed", registry=registry)
        self.lines = Counter("moesaic:batch_lines_total", "Lines of batches, by what came of them", ("outcome",),
                             registry=registry)
        for outcome in ("completed", "failed", "retried"):
            self.lines.labels(outcome)


class AutoscalerMetrics:
    """Shows the autoscaler's latest decision, as the coordinator tells it: every router shows the same."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.wanted = Gauge("moesaic:replicas_wanted", "Replicas of a pool that the autoscaler wants", ("pool",),
                            registry=registry)
        self.backlog = Gauge("moesaic:backlog_seconds", "Time until all prompts that wait are computed",
                             registry=registry)
        self.need = Gauge("moesaic:autoscaler_need", "What is needed most, over what the wanted replicas can do",
                          ("kind",), registry=registry)
        self.asleep = Gauge("moesaic:asleep", "1 while no shard runs and the first request wakes them, and until they "
                            "serve", registry=registry)

    def observe(self, wanted: Mapping[str, int], backlog_s: float, kind: str, ratio: float) -> None:
        for pool, num in wanted.items():
            self.wanted.labels(pool).set(num)
        self.backlog.set(backlog_s)
        self.need.clear()
        self.need.labels(kind).set(ratio)


class RouterMetrics:
    """All metrics of one router replica, on a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = RequestMetrics(self._registry)
        self.shards = ShardMetrics(self._registry)
        self.placement = PlacementMetrics(self._registry)
        self.membership = MembershipMetrics(self._registry)
        self.tenants = TenantMetrics(self._registry)
        self.autoscaler = AutoscalerMetrics(self._registry)
        self.batches = BatchMetrics(self._registry)
        self._remaining = Gauge("moesaic:certificate_remaining_seconds", "Time until the certificate of the doors "
                                "(tls) or links (cluster_tls) ends", ("option",), registry=self._registry)
        self.epoch_number = Gauge("moesaic:epoch", "Number of the running epoch, 0 before the first",
                                  registry=self._registry)

    def watch_certificate(self, option: str, remaining_s: Callable[[], float]) -> None:
        """Show for how long the certificate of this option still counts, as it is when somebody looks."""
        self._remaining.labels(option).set_function(remaining_s)

    def render(self) -> tuple[bytes, str]:
        """The text exposition format, and its content type."""
        self.requests.count_tokens()
        self.shards.set_gauges()
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
