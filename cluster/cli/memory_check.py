"""`moesaic doctor` on memory: it finds whether the group of a config can hold its model, as the coordinator will.

The planner's `members_fit` answers. Here is what it is asked about before any shard runs: shards with the budgets that
the pools give, else with those that they would take on a machine like this one.
"""

from __future__ import annotations

import importlib
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch

from cluster.cli.doctor import Check, Verdict
from cluster.device.backend import import_if_used
from cluster.device.facts import available_memory_bytes, memory_budget, resident_memory_bytes
from cluster.launch.interruption import children_unaware
from cluster.planner.costs.step_costs import Workload, check_workload
from cluster.planner.memory_fit import MemoryFit, members_fit
from cluster.planner.memory_plan import MemberMemory
from cluster.planner.plan_rules import PlanRules, plan_rules
from model.args import ModelArgs
from model.kernels.select import select_kernels
from serving.config import PoolConfig, ServeConfig

IMPORT_TIMEOUT_S = 120.0
_FIX = "raise memory_budget, add replicas, or lower kv_cache or scheduler.max_batch_tokens"


@dataclass(frozen=True, slots=True)
class Machine:
    """The memory of this one, in bytes."""

    process_bytes: int              # of a shard's process before it loads anything
    available_bytes: int
    gpu_free_bytes: int | None = None       # None: it has no GPU
    process_varies_bytes: int = 100 << 20   # how much more a shard's process takes where more of torch is resident


def this_machine(backend: str) -> Machine:
    """Measure the memory: what a shard's process takes, in a process of its own that imports what a shard imports with
    this `group.backend`."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        with children_unaware():
            measuring = processes.submit(_shard_process_bytes, backend)
        process_bytes = measuring.result(IMPORT_TIMEOUT_S)
    gpu_free_bytes = torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else None
    return Machine(process_bytes, available_memory_bytes(), gpu_free_bytes)


def _shard_process_bytes(backend: str) -> int:
    for name in ("cluster.deployments", "cluster.shard.shard"):
        importlib.import_module(name)
    import_if_used(backend, "cpu")
    select_kernels("cpu", 1)
    return resident_memory_bytes()


def memory_checks(config: ServeConfig, args: ModelArgs, machine: Machine) -> Iterator[Check]:
    """Compare what shards have with what the model asks. Raises PlacementError for one that no group can serve, and
    ConfigError for a kv_cache that holds no sequence."""
    check_workload(args, Workload(config.placement.num_rows, config.placement.context_tokens))
    rules = plan_rules(args, config)
    num_shards = config.num_shards
    if config.num_members > num_shards:
        yield Check("group", Verdict.FAIL, f"group.members is {config.num_members}, all pools together have "
                    f"{num_shards} replicas", f"set group.members to {num_shards} or less, or add replicas")
        return
    unknown = [pool.name for pool in config.pools if _budget(config, pool, machine) is None]
    if unknown:
        yield Check("memory budgets", Verdict.WARN, f"not looked at: pool {', '.join(unknown)} states no "
                    "memory_budget, and this machine has no GPU", "state it, or run the doctor on a node of that pool")
        return
    yield _budgets(config, rules, machine)
    if any(pool.least_replicas < pool.most_replicas for pool in config.pools) and config.group.members is None:
        yield _sizes(config, rules, machine)
    if config.local_nodes:
        yield _local_nodes(config, rules, machine)


def shards_of(config: ServeConfig, machine: Machine) -> list[MemberMemory]:
    """Return the memory of every shard, in the order in which the coordinator takes those that are there."""
    return _shards(config, machine, {pool.name: pool.replicas for pool in config.pools})


def _shards(config: ServeConfig, machine: Machine, num_of_pool: Mapping[str, int]) -> list[MemberMemory]:
    return [MemberMemory(pool.name, _budget(config, pool, machine) or 0,
                         machine.process_bytes if pool.device == "cpu" else 0)
            for pool in config.pools for _ in range(num_of_pool[pool.name])]


def _budget(config: ServeConfig, pool: PoolConfig, machine: Machine) -> int | None:
    if pool.memory_budget is not None or pool.device == "cpu":
        return memory_budget(pool, machine.available_bytes, machine.process_bytes, config.num_shards_a_machine)
    return None if machine.gpu_free_bytes is None else memory_budget(pool, machine.gpu_free_bytes, 0)


def _budgets(config: ServeConfig, rules: PlanRules, machine: Machine) -> Check:
    """Judge the group of all shards together, and with group.members the smallest that could come first."""
    shards, num_members = shards_of(config, machine), config.num_members
    fit = members_fit(shards[:num_members], rules)
    smallest = sorted(shards, key=lambda shard: shard.budget_bytes - shard.resident_bytes)[:num_members]
    found = f"{_needs(fit)}; {_gib(sum(one.memory.budget_bytes for one in fit.members))} given{_assumed(config)}"
    if not fit.is_enough:
        return Check("memory budgets", Verdict.FAIL, f"{found}; {_missing(fit)}", _fix(fit))
    lacking = members_fit(smallest, rules)
    if not lacking.is_enough:
        return Check("memory budgets", Verdict.WARN, f"{found}; but if the smallest of the {len(shards)} shards come "
                     f"first, {_missing(lacking)}", f"{_fix(lacking)}, or set group.members to {len(shards)}")
    larger = replace(machine, process_bytes=machine.process_bytes + machine.process_varies_bytes)
    if not members_fit(shards_of(config, larger)[:num_members], rules).is_enough:
        return Check("memory budgets", Verdict.WARN, f"{found}; only just: a shard's process takes up to "
                     f"{_gib(machine.process_varies_bytes)} more than one like it took here", _fix(fit))
    return Check("memory budgets", Verdict.OK, found)


def _sizes(config: ServeConfig, rules: PlanRules, machine: Machine) -> Check:
    """Judge groups of all sizes that the pools allow: from which one the service starts, with what room for KV."""
    fits = [members_fit(shards, rules) for shards in _groups(config, machine)]
    enough = [fit for fit in fits if fit.is_enough]
    if not enough:
        return Check("group sizes", Verdict.FAIL, f"the {len(fits[-1].members)} shards of max_replicas cannot hold the "
                     f"model: {_missing(fits[-1])}", "raise max_replicas, or memory_budget")
    shown = {len(fit.members): fit for fit in (enough[0], enough[-1])}
    found = f"starts from {len(enough[0].members)} shards; room for KV caches: " + ", ".join(
        f"{_gib(_kv_room_bytes(fit))} of {num}" for num, fit in shown.items())
    if not fits[0].is_enough:
        return Check("group sizes", Verdict.WARN, f"the {len(fits[0].members)} shards of min_replicas cannot hold the "
                     f"model: {_missing(fits[0])}; {found}", "raise min_replicas, or memory_budget")
    return Check("group sizes", Verdict.OK, found)


def _groups(config: ServeConfig, machine: Machine) -> Iterator[list[MemberMemory]]:
    """Yield the groups from min_replicas to max_replicas, one pool growing after the other."""
    nums = {pool.name: pool.least_replicas for pool in config.pools}
    yield _shards(config, machine, nums)
    for pool in config.pools:
        while nums[pool.name] < pool.most_replicas:
            nums[pool.name] += 1
            yield _shards(config, machine, nums)


def _kv_room_bytes(fit: MemoryFit) -> int:
    """Return what the budgets leave for KV caches and states, where no expert has more copies than it must."""
    least = sum(fit.demand.kv_cache_bytes for one in fit.members if one.takes_requests)
    return sum(one.memory.budget_bytes for one in fit.members) - _needed_bytes(fit) + least


def _local_nodes(config: ServeConfig, rules: PlanRules, machine: Machine) -> Check:
    """Judge all shards on this one machine, in whatever way the members of the group share the memory."""
    shards = [shard for pool, shard in zip(_pool_of_shards(config), shards_of(config, machine), strict=True)
              if pool.device == "cpu"]
    members = shards[:config.num_members]
    needed = (len(shards) - len(members)) * machine.process_bytes
    needed += _needed_bytes(members_fit(members, rules)) if members else 0
    found = f"{_gib(needed)} needed here, {_gib(machine.available_bytes)} available"
    if needed > machine.available_bytes:
        return Check("memory", Verdict.FAIL, found, "stop other programs, or serve a smaller model here")
    given = sum(pool.memory_budget or 0 for pool in _pool_of_shards(config) if pool.device == "cpu")
    if given > machine.available_bytes:
        return Check("memory", Verdict.WARN, f"{found}, {_gib(given)} given to all shards together",
                     "lower memory_budget: KV caches fill it, and this machine has less")
    return Check("memory", Verdict.OK, found)


def _pool_of_shards(config: ServeConfig) -> list[PoolConfig]:
    return [pool for pool in config.pools for _ in range(pool.replicas)]


def _needed_bytes(fit: MemoryFit) -> int:
    """Return the least that all members together take: one with requests, all with their process and buffers."""
    demand = fit.demand
    takers = sum(demand.fixed_bytes_of(one.takes_requests) + one.memory.resident_bytes for one in fit.members)
    return takers + fit.num_copies * demand.num_slots * demand.expert_bytes


def _needs(fit: MemoryFit) -> str:
    demand, copies = fit.demand, f"{fit.num_copies} copies of " if fit.num_copies > 1 else ""
    return (f"{len(fit.members)} shards need {_gib(_needed_bytes(fit))}: {copies}experts "
            f"{_gib(fit.num_copies * demand.num_slots * demand.expert_bytes)}, process and buffers "
            f"{_gib(max(one.memory.resident_bytes for one in fit.members) + demand.buffer_bytes)} on each, shared "
            f"weights and KV cache {_gib(demand.shared_bytes + demand.kv_cache_bytes)} where requests go")


def _missing(fit: MemoryFit) -> str:
    """Say what is missing where: '0.50 GiB are missing: in pool cpu 2 x 0.25 GiB'."""
    lacking = Counter((one.memory.node_name, one.missing_bytes) for one in fit.members if one.missing_bytes)
    where = ", ".join(f"in pool {name} {count} x {_gib(missing)}" for (name, missing), count in lacking.items())
    return f"{_gib(fit.missing_bytes)} are missing: {where}"


def _fix(fit: MemoryFit) -> str:
    return _FIX + (", or set placement.min_copies to 1" if fit.num_copies > 1 else "")


def _assumed(config: ServeConfig) -> str:
    pools = [pool.name for pool in config.pools if pool.memory_budget is None]
    return f" (pool {', '.join(pools)}: what is free on this machine)" if pools else ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
