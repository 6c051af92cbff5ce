"""A process loads only what it uses by importing its main module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of shards, routers, the command line, and of the coordinator before it plans.
WITHOUT_SCIPY = (
    "cluster.shard.shard", "cluster.router_replica", "cluster.cli.main", "cluster.cli.doctor", "cluster.deployments",
    "cluster.coordinator.view", "cluster.coordinator.client", "cluster.coordinator.coordinator",
    "cluster.planner.costs.measured_profile",
    "cluster.planner.memory_demand", "cluster.planner.memory_plan", "cluster.planner.plan_rules")


def test_only_who_plans_loads_the_solver() -> None:
    code = ("import importlib, sys\n"
            "for name in sys.argv[1:]:\n"
            "    importlib.import_module(name)\n"
            "    assert 'scipy' not in sys.modules, f'{name} loads SciPy'\n")
    subprocess.run([sys.executable, "-c", code, *WITHOUT_SCIPY], cwd=ROOT, check=True)


def test_every_benchmark_finds_what_it_imports() -> None:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    assert len(names) > 8
    code = ("import importlib, sys\n"
            "sys.path.insert(0, 'benchmarks')\n"
            "for name in sys.argv[1:]:\n"
            "    importlib.import_module(name)\n")
    subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, check=True)
