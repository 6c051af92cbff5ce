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
    "model/dispatch/row_split.py": {"torch", "ray", "time", "os", "asyncio"},
    "model/dispatch/row_plan.py": {"torch", "ray", "time", "os", "asyncio"},
    "serving/router/shard_choice.py": {"time", "os", "asyncio", "grpc"},
    "serving/engine/scheduler.py": {"time", "os", "asyncio", "grpc"},
    "serving/engine/block_manager.py": {"time", "os", "asyncio", "grpc"},
    "cluster/coordinator/membership.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/coordinator/placement_change.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/whatif/data_sheets.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/whatif/cluster_file.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/whatif/answer.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/whatif/member_groups.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/whatif/notes.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/whatif/expert_ranges.py": {"torch", "ray", "time", "os", "asyncio"},
    "cluster/shard/work_meter.py": {"torch", "ray", "time", "os", "asyncio", "scipy"},
}
PURE_FOLDERS = {"cluster/planner": {"torch", "ray", "time", "os", "asyncio", "grpc"}}
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


@pytest.mark.parametrize("folder", PURE_FOLDERS)
def test_pure_folders_import_nothing_impure(folder: str) -> None:
    for path in sources(folder):
        bad = imported_roots(path) & PURE_FOLDERS[folder]
        assert not bad, f"{path.relative_to(ROOT)} imports {sorted(bad)}: pass the value in as an argument"


@pytest.mark.parametrize("package", ["model", "serving", "cluster"])
def test_init_files_hold_a_docstring_and_nothing_else(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        body = [node for node in ast.parse(path.read_text()).body
                if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
        assert not body, f"{path.relative_to(ROOT)} must hold no code: importing one module loads one"


@pytest.mark.parametrize("package", ["model", "serving", "cluster"])
def test_tests_mirror_the_tree(package: str) -> None:
    for test in sorted((ROOT / "tests" / package).rglob("test_*.py")):
        source = ROOT / package / test.relative_to(ROOT / "tests" / package).with_name(test.name.removeprefix("test_"))
        assert source.exists(), f"{test.relative_to(ROOT)} tests no file: {source.relative_to(ROOT)} is not there"
