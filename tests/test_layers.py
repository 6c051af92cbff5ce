"""The shape of the tree: imports go one way, pure files stay pure, tests mirror the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "model": {"ray", "asyncio", "pydantic", "grpc", "serving", "cluster"},
    "serving": {"ray", "torch", "cluster"},
}
PURE = {            # decide here, act elsewhere: no I/O, no clock, no torch, no Ray
    "model/step.py": {"torch", "ray", "time", "os", "asyncio"},
    "model/placement.py": {"torch", "ray", "time", "os", "asyncio"},
    "model/expert_copies.py": {"torch", "ray", "time", "os", "asyncio"},
    "model/dispatch_plan.py": {"torch", "ray", "time", "os", "asyncio"},
    "serving/router.py": {"time", "os", "asyncio", "grpc"},
    "serving/scheduler.py": {"time", "os", "asyncio", "grpc"},
    "serving/block_manager.py": {"time", "os", "asyncio", "grpc"},
    "cluster/membership.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/device_specs.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/cluster_file.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/cluster_plan.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/plan_groups.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/plan_notes.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/expert_ranges.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/memory_plan.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/layer_problem.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/layer_model.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/layer_rounding.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/layer_greedy.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/layer_placement.py": {"torch", "ray", "time", "os", "asyncio"},
    "serving/device_curve.py": {"torch", "ray", "time", "os", "asyncio", "scipy"},
    "cluster/rates_split.py": {"torch", "ray", "time", "os", "asyncio", "scipy"},
    "cluster/work_ratio.py": {"torch", "ray", "time", "os", "asyncio", "scipy"},
    "cluster/device_curves.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/exchange_cost.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/step_costs.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/cost_model.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/request_shares.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/local_placement.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/member_roles.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/even_placement.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/placement.py": {"torch", "ray", "time", "os", "asyncio"},
}
GENERATED = ("_pb2.py", "_pb2_grpc.py")


def imported_roots(path: Path) -> set[str]:
    roots: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add((node.module or "").split(".")[0])
    return roots


def sources(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if not path.name.endswith(GENERATED)]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    files = sources(package)
    assert files
    for path in files:
        bad = imported_roots(path) & FORBIDDEN[package]
        assert not bad, f"{path.relative_to(ROOT)} imports {sorted(bad)}: move that code up one package"


@pytest.mark.parametrize("name", PURE)
def test_pure_files_import_nothing_impure(name: str) -> None:
    bad = imported_roots(ROOT / name) & PURE[name]
    assert not bad, f"{name} imports {sorted(bad)}: pass the value in as an argument"


@pytest.mark.parametrize("package", ["model", "serving", "cluster"])
def test_init_files_are_empty(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        assert not path.read_text().strip(), f"{path.relative_to(ROOT)} must stay empty: importing one module loads one"


@pytest.mark.parametrize("package", ["model", "serving", "cluster"])
def test_tests_mirror_the_tree(package: str) -> None:
    for test in sorted((ROOT / "tests" / package).rglob("test_*.py")):
        source = ROOT / package / test.relative_to(ROOT / "tests" / package).with_name(test.name.removeprefix("test_"))
        assert source.exists(), f"{test.relative_to(ROOT)} tests no file: {source.relative_to(ROOT)} is not there"
