from __future__ import annotations

from dataclasses import replace

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from model.placement import Placement
from serving.engine.engine import ShardLoad
from serving.engine.expert_load import ExpertLoad
from serving.engine.request import FinishReason
from serving.errors import OverloadedError
from serving.link.epoch import DeviceFacts, DeviceProfile, Epoch, Member, WorkRatio
from serving.metrics import MAX_TENANT_LABELS, RouterMetrics
from tests.placements import even_shares


def samples(metrics: RouterMetrics) -> dict[tuple[str, tuple[str, ...]], float]:
    text = metrics.render()[0].decode()
    return {(sample.name, tuple(sample.labels[label] for label in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


def test_a_request_leaves_its_marks_under_the_names_of_the_field() -> None:
    metrics = RouterMetrics()
    metrics.requests.admitted(num_prompt_tokens=10, queued_s=0.5)
    assert samples(metrics)["moesaic:num_requests_open", ()] == 1
    metrics.requests.first_token_arrived(after_s=1.0, num_prompt_tokens=10, num_cached_tokens=4)
    metrics.requests.tokens_arrived(num_tokens=2, after_s=0.5)
    metrics.requests.request_ended(FinishReason.STOP, after_s=1.5, num_generated_tokens=3)
    metrics.requests.request_refused(OverloadedError("full", retry_after_s=1.0))
    found = samples(metrics)
    for name, value in {
            "num_requests_open": 0, "prompt_tokens_total": 10, "generation_tokens_total": 3,
            "prefix_cache_queries_total": 10, "prefix_cache_hits_total": 4, "request_queue_time_seconds_sum": 0.5,
            "time_to_first_token_seconds_sum": 1.0, "time_per_output_token_seconds_sum": 0.5,
            "time_per_output_token_seconds_count": 2, "e2e_request_latency_seconds_sum": 1.5,
            "request_prompt_tokens_sum": 10, "request_generation_tokens_sum": 3}.items():
        assert found[f"moesaic:{name}", ()] == value, name
    assert [found["moesaic:time_per_output_token_seconds_bucket", (bound,)] for bound in ("0.2", "0.3", "80.0", "+Inf")
            ] == [0, 2, 2, 2]
    assert found["moesaic:request_success_total", ("stop",)] == 1
    assert found["moesaic:request_success_total", ("length",)] == 0
    assert found["moesaic:request_refused_total", ("OverloadedError",)] == 1


def test_shards_show_their_latest_load_and_leave_no_series_behind() -> None:
    metrics = RouterMetrics()
    load = ShardLoad(num_running=3, num_waiting=2, kv_blocks_free=25, kv_blocks_total=100, tokens_per_s=80.0,
                     num_preemptions=4, step_s=0.25, state_slots_free=6, state_slots_total=8, num_snapshots=5,
                     num_cached_tokens=640)
    for _ in range(2):
        metrics.shards.observe("s1", "cpu", load)
    found = samples(metrics)
    for name, value in {
            "num_requests_running": 3, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.75, "kv_blocks": 100,
            "shard_tokens_per_second": 80.0, "step_time_seconds": 0.25, "num_preemptions_total": 4,
            "state_slots_usage_perc": 0.25, "state_slots": 8, "state_snapshots": 5,
            "shard_cached_tokens_total": 640}.items():
        assert found[f"moesaic:{name}", ("cpu", "s1")] == value, name
    metrics.shards.observe("never looked at", "cpu", load)
    for name in ("s1", "never looked at", "never seen"):
        metrics.shards.forget(name, "cpu")
    assert not any("cpu" in labels for _, labels in samples(metrics))


def test_an_emulated_speed_is_shown_as_long_as_the_shard_is_there() -> None:
    metrics = RouterMetrics()
    profile = DeviceProfile("measured", 1e9, ((1, 1e9),), ((1, 1e-4),), ((1, 1e-4),), ((1, 1e-3),), 1e-8,
                            emulated_speed=0.25)
    facts = DeviceFacts("cpu", "a CPU", "packed-cpu", 10, 1)
    slow = Member("s1", "slow", "id", "node", "a:1", facts, profile=profile)
    for one in (slow, replace(slow, shard_id="s2", profile=None)):
        metrics.shards.joined(one)
        metrics.shards.observe(one.shard_id, one.pool, ShardLoad())
    found = samples(metrics)
    assert found["moesaic:emulated_speed", ("slow", "s1")] == 0.25
    assert found["moesaic:emulated_speed", ("slow", "s2")] == 1.0
    metrics.shards.forget("s1", "slow")
    assert not any("s1" in labels for _, labels in samples(metrics))


def test_work_over_the_profile_is_shown_for_the_members_there_are() -> None:
    facts = DeviceFacts("cpu", "a CPU", "packed-cpu", 10, 1)
    members = tuple(Member(name, "cpu", "id", "node", "a:1", facts) for name in ("s1", "s2", "s3"))
    placement, load = Placement(3, (((0,), (1,), (2,)),)), ExpertLoad(1, 3, np.ones((1, 3), np.float32).tobytes())
    metrics = RouterMetrics()
    metrics.placement.observe(Epoch(1, members, placement, "", even_shares(3)), load,
                              (WorkRatio(1.25, 2.5, 50), WorkRatio(None, 1.5, 50), None))
    found = {key: value for key, value in samples(metrics).items() if key[0] == "moesaic:work_over_profile"}
    assert {labels: value for (_, labels), value in found.items()} == {
        ("own", "cpu", "s1"): 1.25, ("experts", "cpu", "s1"): 2.5, ("experts", "cpu", "s2"): 1.5}
    metrics.placement.observe(Epoch(2, members[2:], Placement(1, (((0,),) * 3,)), "", even_shares(1)), load, (None,))
    assert not any(name == "moesaic:work_over_profile" for name, _ in samples(metrics))


def test_a_membership_change_is_counted_once_however_often_it_is_told() -> None:
    metrics = RouterMetrics()
    for _ in range(2):
        metrics.membership.observe(1, "start", None)
        metrics.membership.observe(2, "died", 0.08)
    metrics.membership.observe(3, "died", 2.0)
    found = samples(metrics)
    assert found["moesaic:membership_changes_total", ("start",)] == 1
    assert found["moesaic:membership_changes_total", ("died",)] == 2
    assert found["moesaic:membership_pause_seconds_count", ("died",)] == 2
    assert found["moesaic:membership_pause_seconds_sum", ("died",)] == 2.08
    assert ("moesaic:membership_pause_seconds_count", ("start",)) not in found


def test_the_autoscaler_shows_its_latest_decision_only() -> None:
    metrics = RouterMetrics()
    metrics.autoscaler.observe({"big": 1, "small": 3}, 0.5, "decode", 0.9)
    metrics.autoscaler.observe({"big": 2, "small": 3}, 1.5, "first token", 1.25)
    found = samples(metrics)
    assert found["moesaic:replicas_wanted", ("big",)] == 2 and found["moesaic:replicas_wanted", ("small",)] == 3
    assert found["moesaic:backlog_seconds", ()] == 1.5
    assert {labels: value for (name, labels), value in found.items() if name == "moesaic:autoscaler_need"} == {
        ("first token",): 1.25}


def test_replicas_in_one_process_do_not_share_a_registry() -> None:
    first, second = RouterMetrics(), RouterMetrics()
    first.epoch_number.set(7)
    assert samples(second)["moesaic:epoch", ()] == 0
    assert first.render()[1].startswith("text/plain")


def test_tenants_have_a_bounded_number_of_labels() -> None:
    metrics = RouterMetrics()
    for number in range(MAX_TENANT_LABELS + 50):
        metrics.tenants.ended(f"t{number}", "finished", 10, 4, 3)
    shown = metrics.render()[0].decode()
    assert 'moesaic:tenant_requests_total{outcome="finished",tenant="other"} 50.0' in shown
    assert 'moesaic:tenant_tokens_total{kind="cached",tenant="t0"} 4.0' in shown and 'tenant="t149"' not in shown


def test_certificates_show_what_is_left_of_them_when_somebody_looks() -> None:
    metrics, left_s = RouterMetrics(), [100.0, 90.0]
    metrics.watch_certificate("tls", lambda: left_s.pop(0))
    for wanted in (100.0, 90.0):
        assert f'moesaic:certificate_remaining_seconds{{option="tls"}} {wanted}' in metrics.render()[0].decode()
