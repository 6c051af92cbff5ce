"""Names and counts where there is little room."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from cluster.cli.shard_rows import _short, short_names


@pytest.mark.parametrize("name", ["a", "node-0123456789", "計算機の名前はとても長い", "é" * 40])
@pytest.mark.parametrize("max_cells", [0, 8, 9, 12, 40])
def test_short_names_fit(name: str, max_cells: int) -> None:
    (short,) = short_names([name], max_cells)
    assert cell_len(short) <= max(8, max_cells)
    assert short == name or ("…" in short and name.endswith(short.rsplit("…", 1)[1]))


def test_numbered_hosts_stay_apart() -> None:
    names = [f"gpu-pool-of-the-production-cluster-{index}" for index in range(100)]
    assert len(set(short_names(names, 12))) == 100


@pytest.mark.parametrize(("count", "text"), [
    (0, "0"), (999, "999"), (1000, "1k"), (1234, "1.23k"), (999_499, "999k"), (1_000_000, "1M"), (10**11, "100G"),
    (10**16, "10000T")])
def test_counts_are_short(count: int, text: str) -> None:
    assert _short(count) == text
