"""The checkpoint and the load of short runs of a local group."""

from __future__ import annotations

from pathlib import Path

from benchmarks.local_group.setup import Load
from benchmarks.make_checkpoint import make

LOAD = Load(num_greedy=6, num_sampled=2, longest_prompt=128, max_tokens=(100, 300))


def tiny(folder: Path) -> str:
    """Write it below that folder, and return it as the option --model."""
    make("tiny", folder / "tiny")
    return str(folder / "tiny")
