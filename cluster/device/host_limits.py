"""Reads what this machine lets the process use: memory and CPUs, or less when a control group (a container) says so.

Linux control groups, version 1 and 2. Every group from the process's own up to the outermost that can be seen counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

UNIFIED = ""        # the one hierarchy of version 2, where version 1 has one for each controller
_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class HostMemory:
    """`limited_by` names the file that allows less than the machine has; empty: none does."""

    total_bytes: int
    available_bytes: int
    limited_by: str = ""


@dataclass(frozen=True, slots=True)
class HostCpus:
    """CPUs that the process can keep busy all the time. `limited_by` as in HostMemory."""

    num_cpus: int
    limited_by: str = ""


@dataclass(frozen=True, slots=True)
class Mount:
    """Says where a hierarchy of control groups is mounted, and which of its groups is seen there."""

    controllers: tuple[str, ...]    # (UNIFIED,) for version 2
    root: str
    point: str


def host_memory() -> HostMemory:
    """Measure now."""
    memory = psutil.virtual_memory()
    return limited_memory(HostMemory(int(memory.total), int(memory.available)))


def host_cpus() -> HostCpus:
    """Count the CPUs that this process may run on, all of the time."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return limited_cpus(affinity)


def limited_memory(machine: HostMemory, root: Path = Path("/")) -> HostMemory:
    """Return the machine's memory, or what the tightest control group leaves of it. `root`: of the file system.

    What a group uses counts without its page cache, which the kernel gives back before it refuses memory.
    """
    found = machine
    for folder in control_groups(root, "memory"):
        version_1 = (folder / "memory.limit_in_bytes").exists()
        names = ("memory.limit_in_bytes",) if version_1 else ("memory.max", "memory.high")
        stat = _read_counts(folder / "memory.stat")
        used_bytes = _read_int(folder / ("memory.usage_in_bytes" if version_1 else "memory.current"))
        limits = {name: _read_int(folder / name) for name in names}
        if version_1:       # that of groups outside, which may not be seen from here
            limits["memory.stat"] = stat.get("hierarchical_memory_limit")
        for name, limit_bytes in limits.items():
            if limit_bytes is None or limit_bytes >= _NO_LIMIT:
                continue
            left_bytes = max(0, limit_bytes - max(0, (used_bytes or 0) - _reclaimable_bytes(stat, version_1)))
            if limit_bytes < found.total_bytes or left_bytes < found.available_bytes:
                found = HostMemory(min(found.total_bytes, limit_bytes), min(found.available_bytes, left_bytes),
                                   str(folder / name))
    return found


def limited_cpus(num_cpus: int, root: Path = Path("/")) -> HostCpus:
    """Return what the tightest quota leaves of so many CPUs, in whole ones: who runs more threads is halted."""
    found = HostCpus(max(1, num_cpus))
    for folder in control_groups(root, "cpu"):
        for name, quota in (("cpu.max", _quota_2(folder)), ("cpu.cfs_quota_us", _quota_1(folder))):
            if quota is not None and max(1, int(quota)) < found.num_cpus:
                found = HostCpus(max(1, int(quota)), str(folder / name))
    return found


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the groups that bound this process in `controller`, its own first, of both versions."""
    paths = parse_membership(_read_text(root / "proc/self/cgroup"))
    for mount in parse_mounts(_read_text(root / "proc/self/mountinfo")):
        key = next((name for name in (controller, UNIFIED) if name in mount.controllers and name in paths), None)
        if key is not None:
            for folder in group_folders(mount, paths[key]):
                if (root / folder.lstrip("/")).is_dir():
                    yield root / folder.lstrip("/")


def parse_membership(text: str) -> dict[str, str]:
    """Read /proc/self/cgroup: the path of this process's group by controller."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            paths |= dict.fromkeys(fields[1].split(","), fields[2])
    return paths


def parse_mounts(text: str) -> list[Mount]:
    """Read /proc/self/mountinfo: the hierarchies of control groups in it."""
    mounts = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if not separator or len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = (UNIFIED,) if kind[0] == "cgroup2" else tuple(kind[2].split(","))
        mounts.append(Mount(controllers, _unescaped(fields[3]), _unescaped(fields[4])))
    return mounts


def group_folders(mount: Mount, path: str) -> list[str]:
    """Return where the group at `path` and all groups around it are, as far as they are seen, innermost first.

    A container may see its own group as the root of the mount, or the paths of the machine outside.
    """
    inside = PurePosixPath(path)
    if ".." in inside.parts:            # it is outside of what is seen
        return [mount.point]
    if mount.root != "/":
        inside = PurePosixPath("/") / (inside.relative_to(mount.root) if inside.is_relative_to(mount.root) else "")
    relative = inside.relative_to("/") if inside.is_absolute() else inside
    return [str(PurePosixPath(mount.point) / part) for part in (relative, *relative.parents)]


def _unescaped(field: str) -> str:
    for escape, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(escape, char)
    return field


def _reclaimable_bytes(stat: dict[str, int], version_1: bool) -> int:
    names = (("total_inactive_file", "total_active_file") if version_1
             else ("inactive_file", "active_file", "slab_reclaimable"))
    return sum(stat.get(name, 0) for name in names)


def _quota_2(folder: Path) -> float | None:
    """`cpu.max` holds "QUOTA PERIOD", or "max PERIOD" without a limit."""
    fields = _read_text(folder / "cpu.max").split()
    if len(fields) != 2 or not all(field.isdecimal() for field in fields) or not int(fields[1]):
        return None
    return int(fields[0]) / int(fields[1])


def _quota_1(folder: Path) -> float | None:
    quota, period = _read_int(folder / "cpu.cfs_quota_us"), _read_int(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and period else None


def _read_counts(path: Path) -> dict[str, int]:
    """Read lines of "name number"."""
    pairs = (line.split() for line in _read_text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _read_int(path: Path) -> int | None:
    """None when it is not there or no count ("max", -1)."""
    text = _read_text(path).strip()
    return int(text) if text.isdecimal() else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
