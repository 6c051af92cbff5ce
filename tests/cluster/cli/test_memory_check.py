"""The doctor and the coordinator say the same of memory, before and after the shards are there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli.doctor import Check, Verdict
from cluster.cli.memory_check import Machine, memory_checks, shards_of, this_machine
from cluster.coordinator.group_size import group_size
from cluster.coordinator.membership import GroupRules, GroupSnapshot, decide
from cluster.coordinator.planning import plan_members
from cluster.coordinator.reports import Report
from cluster.device.profile import emulated
from cluster.planner.layer.error import PlacementError
from cluster.planner.plan_rules import plan_rules
from serving.config import ConfigError, ServeConfig, parse_config
from serving.link.epoch import DeviceFacts, Member, ShardStatus
from tests.cluster.planner.planned_members import MB, model_args
from tests.cluster.profiles import PROFILE
from tests.deadlines import PATIENCE_S

ARGS = model_args()
ALL_COPIES = ARGS.num_moe_layers * ARGS.num_experts
PROCESS_BYTES = 300 * MB
MACHINE = Machine(PROCESS_BYTES, available_bytes=8000 * MB, process_varies_bytes=0)


@dataclass(frozen=True)
class Pool:
    """One whose shards have room for so many expert copies, beside requests or without them; None: no memory_budget."""

    num_copies: int | None
    takes_requests: bool = True
    replicas: int = 1
    emulated_speed: float | None = None


def config(*pools: Pool, members: int | None = None, min_copies: int = 1, policy: str = "speed",
           is_local: bool = False) -> ServeConfig:
    def options(budgets: list[int | None]) -> ServeConfig:
        return parse_config({
            "model": {"path": "/nowhere"}, "scheduler": {"max_batch_tokens": 256}, "group": {"members": members},
            "placement": {"min_copies": min_copies, "policy": policy},
            "local_nodes": [{"name": "here"}] if is_local else [],
            "pools": [{"name": f"p{index}", "replicas": pool.replicas, "memory_budget": budget,
                       "emulated_speed": pool.emulated_speed}
                      for index, (pool, budget) in enumerate(zip(pools, budgets, strict=True))]})

    demand = plan_rules(ARGS, options([None] * len(pools))).demand
    return options([None if pool.num_copies is None else PROCESS_BYTES + demand.fixed_bytes_of(pool.takes_requests)
                    + pool.num_copies * demand.expert_bytes for pool in pools])


def doctor(some: ServeConfig, machine: Machine = MACHINE) -> Check:
    return next(memory_checks(some, ARGS, machine))


def coordinator_serves(some: ServeConfig, machine: Machine = MACHINE) -> bool:
    """All shards report, the coordinator chooses, and its planner places the model on them, or does not."""
    pools = [pool for pool in some.pools for _ in range(pool.replicas)]
    reports = []
    for index, (pool, memory) in enumerate(zip(pools, shards_of(some, machine), strict=True)):
        facts = DeviceFacts("cpu", "test", "packed-cpu", memory.budget_bytes, 1, memory.resident_bytes)
        shard_id = f"{pool.name}-{index}"
        one = Member(shard_id, pool.name, f"id-{index}", f"node-{index}", f"{index}:1", facts,
                     profile=emulated(PROFILE, pool.emulated_speed))
        reports.append(Report(one, ShardStatus(shard_id, 0, "waiting"), 0.0))
    rules = GroupRules(group_size(some), plan_rules(ARGS, some), 10.0, 5.0)
    members = sorted((report.member for report in reports), key=lambda one: one.pool)[:some.num_members]
    assert decide(GroupSnapshot(tuple(reports), None, 0, 0, 0.0), rules).view.phase == "waiting"
    return plan_members(tuple(members), rules, None).placement is not None


EXPERTS_ONLY = Pool(ALL_COPIES // 2, takes_requests=False)


@pytest.mark.parametrize(("some", "verdict"), [
    (config(Pool(ALL_COPIES)), Verdict.OK),
    (config(Pool(ALL_COPIES - 1)), Verdict.FAIL),
    (config(Pool(ALL_COPIES // 2), EXPERTS_ONLY), Verdict.OK),
    (config(Pool(ALL_COPIES // 2), EXPERTS_ONLY, policy="even"), Verdict.FAIL),
    (config(EXPERTS_ONLY, replace(EXPERTS_ONLY, num_copies=0, replicas=3)), Verdict.FAIL),
    (config(Pool(ALL_COPIES), Pool(ALL_COPIES // 2)), Verdict.OK),
    (config(Pool(ALL_COPIES), Pool(ALL_COPIES // 2, takes_requests=False), min_copies=2), Verdict.FAIL),
    (config(Pool(ALL_COPIES), Pool(ALL_COPIES, takes_requests=False), min_copies=2), Verdict.OK),
    (config(Pool(ALL_COPIES), min_copies=2), Verdict.OK),           # alone it has one copy
    (config(Pool(ALL_COPIES // 2, replicas=4), members=2), Verdict.OK),
    (config(Pool(ALL_COPIES // 4, replicas=4), members=2), Verdict.FAIL),
    (config(Pool(ALL_COPIES), Pool(0, replicas=2), members=1), Verdict.WARN),
    (config(Pool(0, replicas=2), Pool(ALL_COPIES), members=1), Verdict.FAIL),
    (config(Pool(None), Pool(0)), Verdict.OK),
    (config(Pool(ALL_COPIES // 2), Pool(None, replicas=2), members=2), Verdict.OK),
    (config(Pool(ALL_COPIES, takes_requests=False), Pool(ALL_COPIES, emulated_speed=1e-4), min_copies=2), Verdict.OK),
])
def test_what_the_doctor_says_is_what_the_coordinator_does(some: ServeConfig, verdict: Verdict) -> None:
    assert doctor(some).verdict is verdict
    assert coordinator_serves(some) == (verdict is not Verdict.FAIL)


pools = st.builds(Pool, st.none() | st.integers(0, ALL_COPIES), st.booleans(), st.integers(1, 2),
                  st.none() | st.sampled_from([1e-4, 0.3]))


@settings(max_examples=25)
@given(st.lists(pools, min_size=1, max_size=3), st.integers(0, 2), st.integers(1, 2),
       st.sampled_from(["speed", "even"]), st.sampled_from([10 * MB, 150 * MB, 1000 * MB]))
def test_they_agree_on_any_config(some: list[Pool], num_fewer: int, min_copies: int, policy: str,
                                  available_bytes: int) -> None:
    num_members = max(1, sum(pool.replicas for pool in some) - num_fewer)
    asked = config(*some, members=num_members, min_copies=min_copies, policy=policy)
    machine = replace(MACHINE, available_bytes=available_bytes)
    assert coordinator_serves(asked, machine) == (doctor(asked, machine).verdict is not Verdict.FAIL)


def test_what_is_missing_is_said_where() -> None:
    check = doctor(config(Pool(ALL_COPIES // 4, replicas=2)))
    assert "2 shards need" in check.found and "are missing: in pool p0 " in check.found
    assert "raise memory_budget" in check.fix and "min_copies" not in check.fix
    twice = doctor(config(Pool(ALL_COPIES // 4, replicas=2), min_copies=2))
    assert "2 copies of experts" in twice.found and "set placement.min_copies to 1" in twice.fix


def test_a_model_without_experts_is_refused_as_the_planner_does() -> None:
    with pytest.raises(PlacementError, match="no layers with experts"):
        next(memory_checks(config(Pool(ALL_COPIES)), model_args(dense=(0, 1, 2)), MACHINE))


def test_a_kv_cache_that_holds_no_sequence_is_refused_before_memory_is_looked_at() -> None:
    asked = parse_config({"model": {"path": "x"}, "pools": [{"name": "few", "device": "cuda", "kv_cache": 100}]})
    with pytest.raises(ConfigError, match=r"pool few: kv_cache=100 bytes, but one KV block takes"):
        next(memory_checks(asked, ARGS, MACHINE))


def test_what_fits_only_just_is_a_warning() -> None:
    check = doctor(config(Pool(ALL_COPIES)), replace(MACHINE, process_varies_bytes=1))
    assert check.verdict is Verdict.WARN and "only just" in check.found


def test_more_members_than_replicas_can_never_start() -> None:
    check = doctor(config(Pool(ALL_COPIES, replicas=2), members=3))
    assert check.verdict is Verdict.FAIL and "all pools together have 2 replicas" in check.found


def test_budgets_of_gpus_are_not_guessed() -> None:
    some = parse_config({"model": {"path": "/nowhere"}, "pools": [{"name": "gpu", "device": "cuda"}]})
    check = doctor(some)
    assert check.verdict is Verdict.WARN and "pool gpu states no memory_budget" in check.found
    assert doctor(some, replace(MACHINE, gpu_free_bytes=10**11)).verdict is Verdict.OK


def test_local_nodes_share_this_machine() -> None:
    some = config(Pool(ALL_COPIES, replicas=2), is_local=True)
    given = sum(pool.replicas * (pool.memory_budget or 0) for pool in some.pools)
    verdicts = [list(memory_checks(some, ARGS, replace(MACHINE, available_bytes=available)))[1].verdict
                for available in (2 * PROCESS_BYTES, given - 1, given)]
    assert verdicts == [Verdict.FAIL, Verdict.WARN, Verdict.OK]


def test_a_process_like_a_shards_is_measured() -> None:
    machine = this_machine("auto")
    assert 100 * MB < machine.process_bytes < 2000 * MB and machine.available_bytes > 0


def test_a_cpu_shard_loads_deepspeed_only_where_gloo_is_asked_for() -> None:
    script = ("import sys; from cluster.cli import memory_check as check; from cluster.device.backend import *; "
              "check._shard_process_bytes('auto'); before = 'deepspeed' in sys.modules; import_if_used('gloo', 'cpu'); "
              "print(before, 'deepspeed' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.splitlines()[-1] == "False True", done.stderr


def test_the_sizes_are_judged_that_a_group_may_have() -> None:
    def sizes(num_copies: int, most: int = 3) -> Check:
        rigid = config(Pool(num_copies, replicas=3))
        pool = rigid.pools[0].model_copy(update={"min_replicas": 1, "max_replicas": most})
        return list(memory_checks(rigid.model_copy(update={"pools": (pool,)}), ARGS, MACHINE))[1]

    assert (sizes(ALL_COPIES).name, sizes(ALL_COPIES).verdict) == ("group sizes", Verdict.OK)
    assert "starts from 1 shards" in sizes(ALL_COPIES).found and " of 3" in sizes(ALL_COPIES).found
    lacking = sizes(ALL_COPIES // 2)
    assert lacking.verdict is Verdict.WARN and "the 1 shards of min_replicas cannot hold" in lacking.found
    assert "starts from 2 shards" in lacking.found
    assert sizes(ALL_COPIES // 8).verdict is Verdict.FAIL and "starts from 5" in sizes(ALL_COPIES // 8, most=8).found
