"""What a process holds: resident memory, threads, file descriptors by their kind, shared memory without a name."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Footprint:
    resident_bytes: int
    num_threads: int
    files: Counter[str]         # open descriptors: "socket", "pipe", "memfd", "eventfd", "file", ...
    num_segments: int           # of shared memory without a name that it has mapped

    @property
    def num_files(self) -> int:
        return self.files.total()


def footprint_of(pid: int) -> Footprint:
    """Raises psutil.NoSuchProcess."""
    process = psutil.Process(pid)
    kinds: Counter[str] = Counter()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            kinds[_kind_of(os.readlink(descriptor))] += 1
        except FileNotFoundError:
            continue            # closed meanwhile
    return Footprint(process.memory_info().rss, process.num_threads(), kinds, _num_segments(pid))


def cpu_seconds(pid: int) -> Counter[str]:
    """Return the CPU time that its threads have taken, by their names."""
    found: Counter[str] = Counter()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):        # it has ended meanwhile
            name = (thread / "comm").read_text(encoding="utf-8").strip()
            found[name] += int((thread / "schedstat").read_text(encoding="ascii").split()[0]) / 1e9
    return found


def _num_segments(pid: int) -> int:
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    return len({line.split()[4] for line in lines if "/memfd:" in line})     # by inode: one may be mapped in parts


def _kind_of(target: str) -> str:
    if target.startswith("/memfd:"):
        return "memfd"
    if target.startswith("anon_inode:"):
        return target.removeprefix("anon_inode:").strip("[]")
    return target.partition(":")[0] if ":" in target else "file"
