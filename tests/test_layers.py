"""The shape of the tree: imports go one way, rooms import what their docstrings say, pure files stay pure.

A room is a folder. Its `__init__.py` ends with "May import: a, b." - the rooms and the modules beside the rooms of its
package that it may import, or "nothing of <package>", or "all of <package>". The same words in a package's own
`__init__.py` are about the modules beside its rooms, where one has none of its own, and "Every room may import: a, b."
names those of them that are for all. The docstrings are the rules; this file only reads them.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.mirror import COVERED_BY

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "serving", "cluster")
FORBIDDEN = {
    "model": {"ray", "asyncio", "pydantic", "grpc", "serving", "cluster", "benchmarks", "tests"},
    "serving": {"ray", "torch", "cluster", "benchmarks", "tests"},
    "cluster": {"benchmarks", "tests"},
}
IMPURE = {"torch", "ray", "grpc", "os", "time", "datetime", "random", "asyncio", "threading", "subprocess", "socket",
          "shutil", "tempfile", "httpx"}
GENERATED = ("_pb2.py", "_pb2_grpc.py")


def sources(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if not path.name.endswith(GENERATED)]


ALL_SOURCES = [path for package in PACKAGES for path in sources(package)]
MODULES = [path for path in ALL_SOURCES if path.name != "__init__.py"]
ROOMS = [path.parent for path in ALL_SOURCES if path.name == "__init__.py" and path.parent.parent != ROOT]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def docstring_of(path: Path) -> str:
    return " ".join((ast.get_docstring(tree_of(path)) or "").split())


@cache
def imported_names(path: Path) -> tuple[str, ...]:
    """Return dotted names, of imports inside functions too; `from a import b` is a.b, whatever b is."""
    return tuple(_imported_names(path))


def _imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: write imports from the top of the tree"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}


@cache
def imported_modules(path: Path) -> frozenset[Path]:
    """Return the files of this tree that it imports; a package counts as its `__init__.py`."""
    return frozenset(_imported_modules(path))


def _imported_modules(path: Path) -> Iterator[Path]:
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] not in (*PACKAGES, "tests"):
            continue
        for count in range(len(parts), 0, -1):
            target = ROOT.joinpath(*parts[:count])
            if target.is_dir():
                yield target / "__init__.py"
            elif target.with_suffix(".py").is_file() or target.name.endswith(("_pb2", "_pb2_grpc")):
                yield target.with_suffix(".py")
            else:
                continue
            break


def loaded_by(*paths: Path) -> set[Path]:
    """Return the files of this tree that importing these loads, sooner or later, themselves included."""
    loaded, new = set(paths), list(paths)
    while new:
        found = {module for module in imported_modules(new.pop()) if module.exists()} - loaded
        loaded |= found
        new += found
    return loaded


def node_of(path: Path) -> str:
    """Return what a file counts as in the graph: its room, or itself beside the rooms of its package. Dotted."""
    part = path.relative_to(ROOT).with_suffix("")
    return ".".join(part.parts if len(part.parts) == 2 and part.name != "__init__" else part.parts[:-1])


def said(path: Path, words: str) -> set[str] | None:
    """Return the nodes that the docstring names behind `words`, dotted from the top. None: it says nothing of that."""
    found = re.search(rf"{words}: (.+?)\.(?:\s|$)", docstring_of(path))
    if found is None:
        return None
    package = path.relative_to(ROOT).parts[0]
    if found[1] in (f"nothing of {package}", f"all of {package}"):
        return set() if found[1].startswith("nothing") else {node_of(file) for file in sources(package)}
    return {f"{package}.{name}" for name in found[1].split(", ")}


def may_import(path: Path) -> set[str]:
    package = ROOT / path.relative_to(ROOT).parts[0] / "__init__.py"
    own = said(path, "May import") if path.parent == package.parent else None
    of_room = said(path.parent / "__init__.py", "May import")
    assert of_room is not None, f'{name_of(path.parent)}/__init__.py must say "May import: ..."'
    return (of_room if own is None else own) | (said(package, "Every room may import") or set())


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        bad = imported_roots(path) & FORBIDDEN[package]
        assert not bad, f"{name_of(path)} imports {sorted(bad)}: move that code up one package"


@pytest.mark.parametrize("room", [ROOT / package for package in PACKAGES] + ROOMS, ids=name_of)
def test_a_room_imports_what_its_docstring_says(room: Path) -> None:
    beside_rooms = room.parent == ROOT
    for path in sorted(room.glob("*.py")):
        if path.name == "__init__.py" or path.name.endswith(GENERATED):
            continue
        found = {node_of(module) for module in imported_modules(path)}
        of_package = {node for node in found if node.split(".")[0] == room.relative_to(ROOT).parts[0]}
        if beside_rooms:        # among themselves they are free, as long as there is no circle
            of_package -= {node_of(file) for file in room.glob("*.py")}
        bad = of_package - may_import(path) - {node_of(path)}
        assert not bad, f"{name_of(path)} imports {sorted(bad)}, which {name_of(room)}/__init__.py does not allow"


@pytest.mark.parametrize("path", [path for path in ALL_SOURCES if said(path, "May import") is not None], ids=name_of)
def test_what_a_docstring_allows_is_there(path: Path) -> None:
    nodes = {node_of(source) for source in ALL_SOURCES}
    for words in ("May import", "Every room may import"):
        absent = (said(path, words) or set()) - nodes
        assert not absent, f"{name_of(path)} allows {sorted(absent)}, which is no room and no module beside the rooms"


def test_rooms_have_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in ALL_SOURCES:
        graph.setdefault(node_of(path), set()).update(map(node_of, imported_modules(path)))
    for node, targets in graph.items():
        targets.discard(node)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(reversed(error.args[1]))}")


def is_pure(path: Path) -> bool:
    """Return whether its docstring, or that of a folder it is in, says the word."""
    package = ROOT / path.relative_to(ROOT).parts[0]
    folders = [folder / "__init__.py" for folder in path.parents if folder.is_relative_to(package)]
    return any(re.search(r"\bPure[.,:]", docstring_of(file)) for file in [path, *folders])


PURE = [path for path in MODULES if is_pure(path)]


def test_planning_is_pure_and_the_word_is_found() -> None:
    assert {path for path in MODULES if path.is_relative_to(ROOT / "cluster/planner")} <= set(PURE)
    assert {ROOT / "serving/engine/scheduler.py", ROOT / "model/step.py"} <= set(PURE)


@pytest.mark.parametrize("path", PURE, ids=name_of)
def test_who_says_pure_decides_without_clock_files_network_or_torch(path: Path) -> None:
    bad = imported_roots(path) & IMPURE
    assert not bad, f"{name_of(path)} imports {sorted(bad)}: pass the value in as an argument"
    heavy = {"torch", "ray"} | ({"scipy"} if "without SciPy" in docstring_of(path) else set())
    by = {name_of(module) for module in loaded_by(path) if imported_roots(module) & heavy}
    assert not by, f"{name_of(path)} loads one of {sorted(heavy)} by {sorted(by)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_init_files_hold_a_docstring_and_nothing_else(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        body = [node for node in tree_of(path).body
                if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
        assert not body and docstring_of(path), f"{name_of(path)} must hold a docstring and no code"


def own_test_of(path: Path) -> Path:
    return ROOT / "tests" / path.relative_to(ROOT).with_name(f"test_{path.name}")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_test_file_is_of_a_module(package: str) -> None:
    for test in sorted((ROOT / "tests" / package).rglob("test_*.py")):
        source = ROOT / package / test.relative_to(ROOT / "tests" / package).with_name(test.name.removeprefix("test_"))
        assert source.exists(), f"{name_of(test)} tests no file: {name_of(source)} is not there"


def test_every_module_has_a_test_file_or_says_who_tests_it() -> None:
    without = {name_of(path) for path in MODULES if not own_test_of(path).exists()}
    absent, stale = sorted(without - set(COVERED_BY)), sorted(set(COVERED_BY) - without)
    assert not absent, f"{absent} have no test file of their name: write it, or name who covers them in tests/mirror.py"
    assert not stale, f"{stale} have a test file of their name, or are gone: remove them from tests/mirror.py"


@pytest.mark.parametrize("name", COVERED_BY)
def test_who_covers_a_module_reaches_it(name: str) -> None:
    test = ROOT / "tests" / COVERED_BY[name]
    assert test.exists(), f"tests/mirror.py names {COVERED_BY[name]}, which is not there"
    helpers = [path for path in test.parent.glob("*.py") if not path.name.startswith("test_")]     # jobs go by name
    if test.parent.name != "e2e":           # its processes import what they need
        assert ROOT / name in loaded_by(test, *helpers), f"{name_of(test)} never loads {name}"


@pytest.mark.parametrize(("modules", "unwanted"), [
    ("cluster.launch.bring_up, cluster.cli.status_table, cluster.deployments", {"torch", "scipy"}),
    ("cluster.shard.shard, cluster.router_replica", {"scipy", "opentelemetry.sdk"})])
def test_what_starts_often_loads_no_library_that_it_does_not_use(modules: str, unwanted: set[str]) -> None:
    """SciPy takes the coordinator a second to import, torch a shard two."""
    code = f"import sys, {modules}; print(*{unwanted} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
