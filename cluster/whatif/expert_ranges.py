"""Expert ids in few characters. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def expert_id_ranges(experts: Sequence[int]) -> str:
    """Write ascending ids in short: (0, 1, 2, 5) -> '0-2,5'."""
    runs: list[list[int]] = []
    for expert in experts:
        if runs and expert == runs[-1][1] + 1:
            runs[-1][1] = expert
        else:
            runs.append([expert, expert])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
