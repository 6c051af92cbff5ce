"""A position's cosine and sine never depend on who asked, nor when."""

from __future__ import annotations

import torch

from model.rope import POSITIONS_PER_CHUNK, RopeTable
from model.rope_args import RopeArgs


def test_values_do_not_depend_on_growth() -> None:
    positions = torch.tensor([0, 1, 5, 2 * POSITIONS_PER_CHUNK + 3], dtype=torch.int32)
    at_once, grown = (RopeTable(RopeArgs("default", 1e4), 10, torch.device("cpu")) for _ in range(2))
    cos, sin = at_once.at(positions)
    for i in range(4):
        assert torch.equal(torch.cat(grown.at(positions[i:i + 1])), torch.cat((cos[i:i + 1], sin[i:i + 1])))


def test_both_halves_and_values() -> None:
    cos, sin = RopeTable(RopeArgs("default", 100.0), 4, torch.device("cpu")).at(torch.tensor([3], dtype=torch.int32))
    angles = torch.tensor([3.0, 0.3, 3.0, 0.3])
    torch.testing.assert_close(cos[0], angles.cos())
    torch.testing.assert_close(sin[0], angles.sin())
